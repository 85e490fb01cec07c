"""Noise spectra, whitening and the matched filter, against noise that is known."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter

from hyperjax.detection import high_pass
from hyperjax.noise import local_rms
from hyperjax.spectrum import Spectrum, Waves, measure_spectrum, segment_side

SHAPE = (300, 340)


def coloured(seed: int, shape: tuple[int, int] = SHAPE, slope: float = 1.0) -> NDArray:
    """Periodic noise of the power (1 + (k0 / k)^slope), k0 = 0.1, in a crop of twice the area."""
    big = tuple(2 * side for side in shape)
    k = np.hypot(fft.fftfreq(big[0])[:, None], fft.rfftfreq(big[1]))
    root = np.sqrt(true_power(k, slope))
    white = np.random.default_rng(seed).normal(size=big)
    return fft.irfft2(fft.rfft2(white) * root, big)[: shape[0], : shape[1]]


def true_power(k: NDArray, slope: float = 1.0) -> NDArray:
    return 1 + (0.1 / np.maximum(k, 1e-3)) ** slope


def everywhere(image: NDArray) -> NDArray:
    return np.ones(image.shape, bool)


def spectrum_of(image: NDArray, valid: NDArray | None = None) -> Spectrum:
    valid = everywhere(image) if valid is None else valid
    found = Spectrum.white(0)
    for _ in range(2):
        measured = measure_spectrum(Waves.of(np.where(valid, image, 0)), valid, found)
        assert measured is not None
        found = measured
    return found


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("holes", [False, True])
def test_the_power_of_noise(slope: float, holes: bool) -> None:
    image = coloured(1, slope=slope)
    valid = everywhere(image)
    if holes:
        valid[40:60, 100:130] = valid[200:] = False
    found = spectrum_of(image, valid)
    k = np.hypot(*np.meshgrid(fft.fftfreq(len(found.power)), fft.fftfreq(len(found.power))))
    ratio = found.power / (true_power(k, slope) if slope else 2.0)
    middling = (k > 0.03) & (k < 0.5)
    assert np.median(ratio[middling]) == pytest.approx(1, abs=0.05)
    assert np.std(ratio[middling]) < (0.3 if holes else 0.2)


def test_noise_that_depends_on_the_direction() -> None:
    image = gaussian_filter(np.random.default_rng(2).normal(size=SHAPE), (0, 2.0), mode="wrap")
    found = spectrum_of(image)
    k = fft.fftfreq(len(found.power))
    along_x = np.exp(-4 * (np.pi * 2.0 * k) ** 2)
    seen = along_x > 0.02
    assert_allclose(found.power.mean(0)[seen], along_x[seen], rtol=0.2)
    assert np.std(found.power.mean(1)) < 0.15 * found.power.mean()


@pytest.mark.parametrize("slope", [1.0, 2.5])
def test_whitened_noise_is_white(slope: float) -> None:
    image = coloured(3, slope=slope)
    white = Waves.of(image).whitened(spectrum_of(image))
    assert np.std(white) == pytest.approx(1, abs=0.03)
    assert abs(np.mean(white[1:] * white[:-1])) < 0.03
    assert abs(np.mean(white[:, 1:] * white[:, :-1])) < 0.03


@pytest.mark.parametrize("beam", [(2.9, 0.0, 2.9), (5.0, 2.0, 3.0)], ids=["round", "elongated"])
def test_the_matched_filter_has_unit_noise_and_the_right_peak(
    beam: tuple[float, float, float],
) -> None:
    """The peak's noise is 1 / sqrt(sum |B|^2 / P), with the true power P and the transform B."""
    image, (xx, xy, yy) = coloured(4), beam
    snr, error = Waves.of(image).matched(spectrum_of(image), beam)
    assert np.std(snr) == pytest.approx(1, abs=0.05)
    ky, kx = np.meshgrid(fft.fftfreq(512), fft.fftfreq(512), indexing="ij")
    y, x = np.indices((512, 512)) - 256
    inverse = np.linalg.inv([[xx, xy], [xy, yy]])
    exponent = inverse[0, 0] * x**2 + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y**2
    power = np.abs(fft.fft2(np.exp(-exponent / 2))) ** 2
    expected = 1 / np.sqrt(np.mean(power / true_power(np.hypot(kx, ky))))
    assert error == pytest.approx(expected, rel=0.05)
    source = np.zeros(SHAPE)
    source[120:181, 90:151] = 50 * np.exp(-exponent / 2)[226:287, 226:287]
    both = Waves.of(image + source).matched(spectrum_of(image), beam)[0]
    assert (both - snr)[150, 120] * error == pytest.approx(50, rel=0.02)


def test_the_filter_is_a_part_of_what_happens_to_sources() -> None:
    """The transfer holds the high-pass filter, whose noise the spectrum is of."""
    box = 41
    filtered = high_pass(np.random.default_rng(5).normal(size=SHAPE), box)
    found = measure_spectrum(Waves.of(filtered), everywhere(filtered), Spectrum.white(box))
    assert found is not None
    k = np.array([0.0, 1 / 64, 3 / 64, 0.2])
    transfer = found.transfer(k, np.array([0.1]))[:, 0]
    assert_allclose(transfer, 1.0, rtol=0.12)
    mean = np.sin(np.pi * 41 / 64) / (41 * np.sin(np.pi / 64))
    along = found.transfer(np.zeros(1), np.array([1 / 64]))[0, 0]
    assert along == pytest.approx((1 - mean) * found.whitening(np.zeros(1), np.array([1 / 64])))


def test_the_correlation_is_that_of_the_filtered_noise() -> None:
    """White noise after a smaller box: 1 - 2 B + B * B, with the mean B over the box."""
    noise, wide, narrow = np.random.default_rng(9).normal(size=(500, 500)), 41, 11
    filtered = high_pass(noise, wide)
    found = measure_spectrum(Waves.of(filtered), everywhere(filtered), Spectrum.white(wide))
    assert found is not None
    rho = found.correlation(narrow, 8)
    assert rho.reach == 8
    offset = np.arange(-8, 9)
    box, both = (np.abs(offset) <= narrow // 2) / narrow, (narrow - np.abs(offset)) / narrow**2
    expected = -2 * np.outer(box, box) + np.outer(both, both)
    expected[8, 8] += 1
    assert_allclose(rho.values, expected / expected[8, 8], atol=0.01)


def test_in_rings_power_is_the_same_in_all_directions() -> None:
    """A power law keeps its slope; a line is spread over its octave."""
    k = fft.fftfreq(64)
    radius = np.maximum(np.hypot(k[:, None], k), 1 / 64)
    smooth = Spectrum(radius**-1.0, 0)
    assert_allclose(smooth.in_rings().power[2:31, 2], smooth.power[2:31, 2], rtol=0.25)
    line = smooth.power.copy()
    line[8, 0] *= 1000
    spread = Spectrum(line, 0).in_rings().power
    assert_allclose(spread, spread.T)
    assert spread[8, 0] == pytest.approx(spread[0, 8])
    assert spread[8, 0] < line[8, 0] / 10


def test_power_that_was_fitted_away_is_put_back() -> None:
    image = np.random.default_rng(6).normal(size=SHAPE)
    side = segment_side(SHAPE)
    share = np.full((side, side), 0.2)
    plain = measure_spectrum(Waves.of(image), everywhere(image), Spectrum.white(0))
    filled = measure_spectrum(Waves.of(image), everywhere(image), Spectrum.white(0), share)
    assert plain is not None
    assert filled is not None
    assert_allclose(filled.power, plain.power / 0.8, rtol=1e-12)


def test_what_is_too_small_or_blank_has_no_spectrum() -> None:
    small = np.random.default_rng(7).normal(size=(40, 200))
    assert segment_side(small.shape) == 0
    assert measure_spectrum(Waves.of(small), everywhere(small), Spectrum.white(0)) is None
    large = np.random.default_rng(8).normal(size=SHAPE)
    assert measure_spectrum(Waves.of(large), ~everywhere(large), Spectrum.white(0)) is None


def test_the_local_noise() -> None:
    """It follows a ramp, and neither outliers nor blank pixels change it."""
    rng = np.random.default_rng(9)
    ramp = np.linspace(1, 5, 400)
    image = rng.normal(size=(300, 400)) * ramp
    valid = everywhere(image)
    valid[:, :20] = valid[100:150, 200:260] = False
    image[rng.random(image.shape) < 0.01] = 1e3
    found = local_rms(np.where(valid, image, 0), valid, 25.0)
    inside = found[40:-40, 60:-60]
    assert_allclose(inside, np.broadcast_to(ramp[60:-60], inside.shape), rtol=0.12)
    assert np.median(inside / ramp[60:-60]) == pytest.approx(1, abs=0.02)


def test_what_is_no_noise_in_a_part_of_the_map_does_not_count() -> None:
    image = coloured(5, (400, 400))
    lump = np.zeros_like(image)
    lump[90:110, 290:310] = 30.0
    found, clean = spectrum_of(image + gaussian_filter(lump, 3)), spectrum_of(image)
    assert_allclose(found.power, clean.power, rtol=0.4)
    assert np.median(found.power / clean.power) == pytest.approx(1, abs=0.02)


def test_more_segments_than_are_counted_give_the_same_spectrum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = coloured(6, (600, 600))
    clean = spectrum_of(image)
    monkeypatch.setattr("hyperjax.spectrum._MOST_SEGMENTS", 40)
    few = spectrum_of(image)
    assert np.median(few.power / clean.power) == pytest.approx(1, abs=0.02)
    assert not np.array_equal(few.power, clean.power)


def test_an_island_in_a_blank_map_has_a_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperjax.spectrum._MOST_SEGMENTS", 20)
    valid = np.zeros((1200, 1200), bool)
    valid[700:1000, 300:640] = True
    image = np.zeros(valid.shape)
    image[valid] = coloured(7).ravel()
    alone = spectrum_of(coloured(7))
    assert np.median(spectrum_of(image, valid).power / alone.power) == pytest.approx(1, abs=0.1)
