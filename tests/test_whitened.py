"""What fits of sources take with them of the noise, against projections in pixels; sweeps."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy import fft

from hyperjax import whitened
from hyperjax.config import Config
from hyperjax.fitting import FitOptions
from hyperjax.sources import SourceFits, render_sources, stamp_gradients
from hyperjax.spectrum import Spectrum, segment_side
from hyperjax.whitened import (
    Field,
    Noise,
    Swept,
    filtered,
    fitted_power,
    refiltered,
    sweep,
    sweep_again,
)

FIELD = Field(np.zeros((256, 256)), (1.7**2, 0.0, 1.7**2), 0, Config())
FILTERED = Noise(np.ones(FIELD.data.shape), Spectrum.white(41))
SIDE = segment_side(FIELD.data.shape)
NOISE = Noise(np.ones(FIELD.data.shape), Spectrum.white(0))
ONE = np.array([[5.0, 100.3, 90.8, 2.6, 1.7, 0.6]])
BLEND = np.vstack([ONE, [3.0, 102.1, 91.9, 2.0, 1.8, 2.0], [4.0, 101.0, 88.0, 1.9, 1.7, 1.0]])


def fitted(sources: NDArray) -> tuple[SourceFits, NDArray]:
    """Sources with the errors of a joint fit, and their columns (6 k, SIDE, SIDE)."""
    fits, n = SourceFits.guess(sources), len(sources)
    corner = np.full(n, 100 - SIDE // 2), np.full(n, 90 - SIDE // 2)
    slopes = stamp_gradients(fits, np.arange(n), *corner, SIDE).reshape(6 * n, SIDE, SIDE)
    flat = slopes.reshape(6 * n, -1)
    covariance = np.linalg.inv(flat @ flat.T)
    own = [covariance[6 * i : 6 * i + 6, 6 * i : 6 * i + 6] for i in range(n)]
    return fits._replace(covariance=np.array(own)), slopes


@pytest.mark.parametrize("sources", [ONE, BLEND], ids=["one", "blend"])
def test_fits_take_as_many_modes_as_they_have_parameters(sources: NDArray) -> None:
    fits, _ = fitted(sources)
    share = fitted_power(FIELD, NOISE, fits)
    assert share.mean() * FIELD.data.size == pytest.approx(6 * len(sources), rel=0.02)
    held = fits._replace(covariance=fits.covariance * (np.arange(6) != 1)[:, None])
    share = fitted_power(FIELD, NOISE, held)
    assert share.mean() * FIELD.data.size == pytest.approx(5 * len(sources), rel=0.02)


def test_the_power_is_that_of_the_projection_on_the_slopes() -> None:
    fits, slopes = fitted(ONE)
    waves = fft.fft2(slopes).reshape(6, -1)
    power = np.einsum("ak,ab,bk->k", waves.conj(), fits.covariance[0], waves).real
    share = fitted_power(FIELD, NOISE, fits) * FIELD.data.size
    assert_allclose(share.ravel(), power, atol=0.07 * power.max())  # linear between 32 modes
    assert power.max() > 10 * power.mean()  # which is not the same for all modes


def test_a_round_source_takes_as_many_as_one_that_is_nearly_round() -> None:
    """The angle of a round source changes nothing, but its ellipticity is fitted all the same."""
    nearly = np.array([[5.0, 100.3, 90.8, 2.0001, 2.0, 0.0]])
    fits, _ = fitted(nearly)
    other = fitted_power(FIELD, NOISE, fits)
    share = fitted_power(FIELD, NOISE, fits._replace(sigma_major=fits.sigma_minor))
    assert_allclose(share, other, atol=1e-3 * other.max())


PAIRS = np.array(
    [
        [5.0, 100.3, 90.8, 2.6, 1.7, 0.6],
        [3.0, 104.1, 93.9, 2.0, 1.8, 2.0],
        [4.0, 200.2, 60.4, 2.2, 1.9, 1.0],
        [4.5, 150.6, 200.1, 2.1, 1.7, 0.3],
    ]
)


def swept_pairs() -> tuple[Field, Swept]:
    """A pair and two others, in noise of unit variance, and their fits."""
    true = SourceFits.guess(PAIRS * [20, 1, 1, 1, 1, 1])
    noise = np.random.default_rng(3).normal(size=FIELD.data.shape)
    field = dataclasses.replace(FIELD, data=render_sources(noise.shape, true) + noise, box=41)
    return field, sweep(field, FILTERED, true, FitOptions())


def parameters(fits: SourceFits) -> NDArray:
    return np.column_stack(fits[:6])


def test_only_blocks_of_named_sources_are_fitted_again() -> None:
    """All others are as they were, their covariances too."""
    field, swept = swept_pairs()
    wrong = swept.fits._replace(peak=np.array([0.98, 0.98, 0.999, 0.999]) * swept.fits.peak)
    among = np.array([False, True, False, False])
    again = sweep_again(field, FILTERED, swept._replace(fits=wrong), among, FitOptions())
    assert_allclose(parameters(again.fits)[:2], parameters(swept.fits)[:2], rtol=2e-3)
    assert_allclose(parameters(again.fits)[2:], parameters(wrong)[2:], rtol=0)
    assert [list(own) for own, _ in again.blocks] == [[0, 1], [2], [3]]
    for own, matrix in again.blocks:
        before = next(other for some, other in swept.blocks if set(some) == set(own))
        assert_allclose(matrix, before, rtol=0.02, atol=1e-6)
    none = np.zeros(4, bool)
    assert sweep_again(field, FILTERED, swept, none, FitOptions()) is swept


def test_what_is_left_of_a_block_is_fitted_again() -> None:
    """Without its neighbour a source is a block of its own."""
    field, swept = swept_pairs()
    keep = np.array([True, False, True, True])
    some = swept.take(keep)
    assert sorted(tuple(own) for own, _ in some.blocks) == [(1,), (2,)]
    again = sweep_again(field, FILTERED, some, np.zeros(3, bool), FitOptions())
    alone = sweep(field, FILTERED, some.fits, FitOptions())
    assert_allclose(parameters(again.fits)[0], parameters(alone.fits)[0], rtol=1e-6)
    assert np.abs(again.fits.peak[0] / some.fits.peak[0] - 1) > 0.01  # it holds both now
    assert_allclose(parameters(again.fits)[1:], parameters(some.fits)[1:], rtol=0)
    assert [list(own) for own, _ in again.blocks] == [[0], [1], [2]]
    assert_allclose(again.blocks[0][1], alone.fits.covariance[0], rtol=1e-6)


@pytest.mark.parametrize("changed", [[], [1], [0, 1, 2]], ids=["none", "one", "most"])
@pytest.mark.parametrize("hole", [False, True], ids=["whole", "hole"])
def test_what_changed_sources_leave_is_what_all_leave(changed: list[int], hole: bool) -> None:
    """Only those are drawn that have changed; beside blank pixels, too."""
    field, swept = swept_pairs()
    data = field.data.copy()
    data[85:90, 95:110] = np.nan if hole else data[85:90, 95:110]
    field, before = dataclasses.replace(field, data=data), swept.fits
    after = before.copy()
    after.peak[changed] *= 1.3
    after.x[changed] += 0.4
    left = refiltered(field, filtered(field, before), before, after)
    assert_allclose(left, filtered(field, after), atol=1e-9)
    assert (before.peak[changed] != after.peak[changed]).all()  # a copy is one


def test_each_turn_sees_what_came_out_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a cluster, and more sources that stand alone and are not fitted."""
    cluster = [(40 + 5.2 * i, 40 + 5.2 * j) for i in range(7) for j in range(7)]
    alone = [(20 + 15 * i, 150 + 20 * j) for i in range(15) for j in range(4)]
    fitted = np.arange(len(cluster + alone)) < len(cluster)
    true = SourceFits.guess(np.array([[40, x, y, 1.9, 1.8, 0.3] for x, y in cluster + alone]))
    noise = np.random.default_rng(5).normal(size=FIELD.data.shape)
    field = dataclasses.replace(FIELD, data=render_sources(noise.shape, true) + noise, box=41)
    begun = true._replace(peak=np.where(fitted, 0.9, 1.0) * true.peak)
    fit_blocks, waves_of, seen = whitened._fit_blocks, whitened.waves_of, []
    monkeypatch.setattr(
        whitened, "waves_of", lambda noise, left: seen.append(left) or waves_of(noise, left)
    )

    def checked(*args: Any) -> Any:
        assert_allclose(seen[-1], filtered(field, args[4]), atol=1e-9)
        return fit_blocks(*args)

    monkeypatch.setattr(whitened, "_fit_blocks", checked)
    swept = sweep(field, FILTERED, begun, FitOptions(), among=fitted)
    assert len(seen) >= 4
    assert np.abs(swept.fits.peak / true.peak - 1).max() < 0.2
