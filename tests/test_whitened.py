"""What the fits of sources take with them of the noise, against projections in pixels."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy import fft

from hyperjax.config import Config
from hyperjax.sources import SourceFits, stamp_gradients
from hyperjax.spectrum import Spectrum, segment_side
from hyperjax.whitened import Field, Noise, fitted_power

FIELD = Field(np.zeros((256, 256)), (1.7**2, 0.0, 1.7**2), 0, Config())
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
