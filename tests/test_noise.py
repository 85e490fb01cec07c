"""The correlation of noise, and sums over it, against what is known of them."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from hyperjax.noise import Correlation, covariance_of_sums, measure_correlation

SIGMA = 1.6


def smooth_noise(seed: int, shape: tuple[int, int] = (240, 260)) -> NDArray:
    """White noise, convolved with a Gaussian: its correlation is exp(-d^2 / (4 sigma^2))."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return gaussian_filter(noise, SIGMA, mode="wrap")


def gaussian_correlation(reach: int) -> NDArray:
    offset = np.arange(-reach, reach + 1)
    return np.exp(-(offset[:, None] ** 2 + offset**2) / (4 * SIGMA**2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(60, 70), (300, 300)])
def test_white_noise_is_white(seed: int, shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(seed).normal(size=shape)
    assert measure_correlation(noise, 16).is_white
    assert measure_correlation(noise, 16).fwhm_pix == 0


@pytest.mark.parametrize("blank", [0.0, 0.3])
def test_the_correlation_of_smoothed_noise(blank: float) -> None:
    """Half of it is left at a radius of 2 sigma sqrt(ln 2), whatever part of the map is blank."""
    noise = smooth_noise(1)
    holes = gaussian_filter(np.random.default_rng(2).normal(size=noise.shape), 5.0)
    noise[holes < np.quantile(holes, blank)] = np.nan
    found = measure_correlation(noise, 20)
    middle = found.values[found.reach - 4 : found.reach + 5, found.reach - 4 : found.reach + 5]
    assert_allclose(middle, gaussian_correlation(4), atol=0.08)
    assert found.fwhm_pix == pytest.approx(4 * SIGMA * np.sqrt(np.log(2)), rel=0.06)


def test_its_reach_is_where_it_ends() -> None:
    assert 4 <= measure_correlation(smooth_noise(3), 40).reach <= 14


def test_a_gradient_of_the_correlation_is_kept() -> None:
    """Noise that is correlated along x only."""
    noise = gaussian_filter(np.random.default_rng(4).normal(size=(250, 250)), (0, 2.0))
    found = measure_correlation(noise, 12).values
    centre = len(found) // 2
    assert found[centre, centre + 2] == pytest.approx(np.exp(-0.25), abs=0.05)
    assert abs(found[centre + 2, centre]) < 0.05


@pytest.mark.parametrize("part", [0.0, 0.02])
def test_too_few_pixels_are_taken_as_white(part: float) -> None:
    noise = smooth_noise(5)
    noise[np.random.default_rng(6).uniform(size=noise.shape) >= part] = np.nan
    assert measure_correlation(noise, 12).is_white


@pytest.mark.parametrize("shape", [(8, 8), (20, 20)])
def test_a_handful_of_pixels_are_taken_as_white(shape: tuple[int, int]) -> None:
    """So few that any correlation could be chance."""
    noise = np.random.default_rng(11).normal(size=shape)
    noise.flat[20:] = np.nan
    assert measure_correlation(noise, 12).is_white


def test_no_noise_at_all_is_taken_as_white() -> None:
    assert measure_correlation(np.full((60, 60), 0.5), 12).is_white


def test_sums_in_white_noise() -> None:
    weights = np.random.default_rng(7).normal(size=(3, 4, 9, 8))
    expected = np.einsum("npyx,nqyx->npq", weights, weights)
    assert_allclose(covariance_of_sums(weights, Correlation.white()), expected)


@pytest.mark.parametrize("shape", [(9, 8), (3, 5), (20, 21)])
def test_sums_in_correlated_noise_by_summing_over_pairs(shape: tuple[int, int]) -> None:
    weights = np.random.default_rng(8).normal(size=(2, 3, *shape))
    values = gaussian_correlation(8)
    y, x = (axis.ravel() for axis in np.indices(shape))
    dy, dx = y[:, None] - y, x[:, None] - x
    inside = (np.abs(dy) <= 8) & (np.abs(dx) <= 8)
    rho = np.where(inside, values[np.clip(dy, -8, 8) + 8, np.clip(dx, -8, 8) + 8], 0)
    flat = weights.reshape(2, 3, -1)
    found = covariance_of_sums(weights, Correlation(values))
    expected = flat @ rho @ flat.swapaxes(1, 2)
    assert_allclose(found, expected, rtol=0, atol=1e-3 * expected.max())


def test_sums_over_simulated_noise_scatter_as_told() -> None:
    """4000 places in simulated noise: the sums' covariance is that of the formula to 6 %."""
    size, weights = 12, np.random.default_rng(9).uniform(size=(1, 2, 12, 12))
    noise = np.concatenate([smooth_noise(seed, (480, 480)) for seed in range(10, 20)])
    noise /= noise.std()
    places = noise.reshape(-1, size * 2, 480 // (size * 2), size * 2).swapaxes(1, 2)
    cut = places.reshape(-1, size * 2, size * 2)[:, :size, :size]
    sums = np.einsum("kyx,pyx->kp", cut, weights[0])
    assert len(sums) == 4000
    found = covariance_of_sums(weights, Correlation(gaussian_correlation(12)))[0]
    assert_allclose(np.cov(sums.T), found, rtol=0.06)
