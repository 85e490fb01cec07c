"""Alternatives for sources: where they start from, and which of them are put in place."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from hyperjax import deblending
from hyperjax.config import Config
from hyperjax.deblending import Peaks, Verdict, better_sources, halves, merged, worth_of_one
from hyperjax.fitting import FitOptions
from hyperjax.sources import SourceFits, render_sources
from hyperjax.spectrum import Spectrum
from hyperjax.whitened import Field, Noise, filtered, sweep, waves_of, whitened

BEAM = (1.7**2, 0.0, 1.7**2)
FIELD = Field(np.zeros((61, 71)), BEAM, 41, Config())
ELONGATED = np.array([3.0, 33.0, 29.0, 4.0, 2.2, 0.7])


def moments(sources: NDArray) -> NDArray:
    """Flux, centroid and second moments (xx, xy, yy) of an image of sources."""
    image = render_sources(FIELD.data.shape, SourceFits.guess(np.atleast_2d(sources)))
    y, x = np.indices(image.shape)
    flux = image.sum()
    u, v = x - (image * x).sum() / flux, y - (image * y).sum() / flux
    second = [(image * p).sum() / flux for p in (u * u, u * v, v * v)]
    return np.array([flux, (image * x).sum() / flux, (image * y).sum() / flux, *second])


def test_halves_have_the_flux_the_place_and_the_length_of_the_whole() -> None:
    one, two = moments(ELONGATED), moments(halves(ELONGATED, FIELD))
    assert_allclose(two[:3], one[:3], rtol=1e-4)
    axis = np.array([np.cos(0.7), np.sin(0.7)])

    def along(values: NDArray) -> float:
        xx, xy, yy = values[3:]
        return float(axis @ np.array([[xx, xy], [xy, yy]]) @ axis)

    assert along(two) == pytest.approx(along(one), rel=1e-3)


def test_halves_of_a_point_source_are_apart() -> None:
    point = np.array([3.0, 33.0, 29.0, FIELD.sigma_pix, FIELD.sigma_pix, 0.0])
    first, second = halves(point, FIELD)
    assert np.hypot(*(first - second)[1:3]) == pytest.approx(FIELD.sigma_pix)


def test_one_in_the_place_of_several_has_their_moments() -> None:
    several = np.array(
        [ELONGATED, [1.5, 38.0, 33.0, 2.5, 2.0, 2.0], [2.0, 30.0, 25.0, 3.0, 1.8, 1.2]]
    )
    one = merged(several)
    assert one.shape == (1, 6)
    assert one[0, 3] >= one[0, 4]
    assert_allclose(moments(one), moments(several), rtol=2e-3)


NO_PEAKS = Peaks(*np.zeros((4, 0)))
SIZE = FIELD.sigma_pix


def seen(true: NDArray, started: NDArray, peaks: Peaks = NO_PEAKS) -> tuple[Verdict, SourceFits]:
    """What comes of alternatives for fits that have begun with some sources, and these fits."""
    image = render_sources((96, 96), SourceFits.guess(np.array(true)))
    noise = Noise(np.ones(image.shape), Spectrum.white(41))
    field = Field(image + np.random.default_rng(8).normal(size=image.shape), BEAM, 41, Config())
    begun = SourceFits.guess(np.array(started))
    fits = sweep(field, noise, begun, FitOptions()).fits
    white = whitened(field, noise, waves_of(noise, filtered(field, fits)))
    settled = np.zeros(len(started), bool)
    return better_sources(field, noise, white, fits, settled, peaks), fits


def point(x: float, y: float, peak: float = 30.0) -> list[float]:
    return [peak, x, y, SIZE, SIZE, 0.0]


def as_set(fits: SourceFits) -> NDArray:
    """Positions (n, 2), from left to right."""
    places = np.column_stack([fits.x, fits.y])
    return places[np.argsort(fits.x)]


def test_two_that_were_taken_for_one_are_told_apart_and_one_stays_one() -> None:
    pair, alone = [point(30, 30), point(33.5, 31)], [point(70, 70)]
    verdict, fits = seen([*pair, *alone], [point(31.7, 30.5), *alone])
    assert verdict.changed == 1
    assert_allclose(as_set(verdict.fits), [[30, 30], [33.5, 31], [70, 70]], atol=0.3)
    assert verdict.settled.tolist() == [True, False, False]  # the one that stays comes first
    assert verdict.fits.x[0] == fits.x[1]


def test_one_that_was_taken_for_two_is_one() -> None:
    verdict, _ = seen([point(40, 40)], [point(39, 40), point(41.5, 40.5)])
    assert verdict.changed == 1
    assert_allclose(as_set(verdict.fits), [[40, 40]], atol=0.2)


def test_a_peak_of_the_residual_becomes_a_source_beside_another() -> None:
    peak = Peaks(*np.array([[45.0], [40.0], [8.0], [9.0]]))
    verdict, _ = seen([point(40, 40), point(45, 40, 12)], [point(40, 40)], peak)
    assert verdict.changed == 1
    assert_allclose(as_set(verdict.fits), [[40, 40], [45, 40]], atol=0.4)
    verdict, _ = seen([point(40, 40)], [point(40, 40)], peak)
    assert verdict.changed == 0
    assert len(verdict.fits.x) == 1


def test_changes_that_share_sources_are_made_one_after_the_other() -> None:
    """Two neighbours, each a pair: the neighbourhood of either has both."""
    pairs = [point(30, 40), point(34, 40), point(39, 44), point(39, 40)]
    verdict, _ = seen(pairs, [point(32, 40), point(39, 42)])
    assert verdict.changed == 1
    assert len(verdict.fits.x) == 3
    apart = np.array(pairs) + [0, 0, 20, 0, 0, 0] * (np.arange(4) > 1)[:, None]
    verdict, _ = seen(apart, [point(32, 40), point(39, 62)])
    assert verdict.changed == 2
    assert len(verdict.fits.x) == 4


@pytest.mark.parametrize(("x", "changes"), [(44.5, 0), (51.5, 1)], ids=["beside", "further"])
def test_a_bright_source_hides_what_is_beside_it(x: float, changes: int) -> None:
    """Bright sources are no perfect Gaussians: what is less than their share beside them is none.

    Further away it may be the companion of another source.
    """
    bright = [point(40, 40, 2000), point(47.5, 40, 100)]
    peak = Peaks(*np.array([[x], [40.0], [30.0], [12.0]]))
    verdict, _ = seen([*bright, point(x, 40, 12)], bright, peak)
    assert verdict.changed == changes


def test_what_a_source_must_gain() -> None:
    """The threshold squared, and 6 ln(11.1): beams in a circle of two FWHMs."""
    assert worth_of_one(4.0) == pytest.approx(30.44, abs=0.01)
    assert worth_of_one(5.0) == pytest.approx(39.44, abs=0.01)


@pytest.mark.parametrize("start", [46.0, 47.3], ids=["within", "beyond"])
def test_a_companion_of_an_extended_source_is_no_profile(
    start: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within its FWHM, and far below the tenth of it that discs may leave; it stays when found.

    It is none where that is taken for another profile, wherever its fit is begun.
    """
    pair = [[60.0, 40.0, 40.0, 1.5 * SIZE, 1.5 * SIZE, 0.0], point(46, 40, 10)]
    alone, peak = pair[:1], Peaks(*np.array([[start], [40.0], [9.0], [9.0]]))
    verdict, fits = seen(pair, alone, peak)
    assert fits.sigma_minor[0] > 1.35 * SIZE  # as a single source it is extended, too
    assert verdict.changed == 1
    assert_allclose(as_set(verdict.fits), [[40, 40], [46, 40]], atol=0.5)
    verdict, _ = seen(pair, pair)
    assert verdict.changed == 0
    monkeypatch.setattr(deblending, "_OF_PROFILE", -1.0)
    verdict, _ = seen(pair, alone, peak)
    assert verdict.changed == 0
