"""Schemes of weights: against their formulae, and what each changes in fits of simulated maps."""

import numpy as np
import pytest
from astropy.stats import mad_std
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from hyperjax.config import Config, FitOptions
from hyperjax.detection import Detections
from hyperjax.groups import Windows, windows
from hyperjax.modelling import model_sources, with_noise
from hyperjax.noise import Correlation
from hyperjax.photometry import model_flux
from hyperjax.simulation import render
from hyperjax.sources import SourceFits
from hyperjax.weights import Sources, pixel_weights

BEAM = 3.5
SIGMA = BEAM / np.sqrt(8 * np.log(2))
RMS = 2.0

# --- The formulae --------------------------------------------------------------------------------


def one_window() -> tuple[Windows, Sources, NDArray, NDArray]:
    """A window with one source of peak 100 off its centre, in noise that grows to the right."""
    x, y = np.array([9.3]), np.array([8.1])
    placed = windows([np.array([0])], x, y, 7.0)
    side = int(placed.side[0])
    own = (x - placed.x0, y - placed.y0)
    image = render((side, side), *own, *(np.array([v]) for v in (100.0, SIGMA, SIGMA, 0.0)))[None]
    noise = np.broadcast_to(np.linspace(1.0, 4.0, side), (1, side, side)).copy()
    return placed, Sources(image, x, y, SIGMA, 0), image, noise


def weights_of(scheme: str, image: NDArray | None = None, **options: float) -> NDArray:
    placed, sources, drawn, noise = one_window()
    image = drawn if image is None else image
    chosen = FitOptions(weights=scheme, **options)
    usable = np.ones(image.shape, bool)
    usable[0, 0, :] = False
    weight = pixel_weights(image, noise, usable, placed, np.array([0]), sources, chosen)
    assert not weight[~usable].any()
    return weight[usable]


def expected(factor: NDArray, noise: NDArray) -> NDArray:
    """(factor / noise)^2 with a factor of mean square 1, and no less than 1e-3 of the largest."""
    factor = np.maximum(factor, 1e-3 * factor.max())
    return factor**2 / np.mean(factor**2) / noise**2


def test_every_scheme_is_its_formula() -> None:
    placed, sources, image, noise = one_window()
    image, noise = image[:, 1:].ravel(), noise[:, 1:].ravel()
    middle = np.full_like(noise, np.median(noise))
    snr, brightness = np.maximum(image / noise, 1), np.maximum(image / middle, 1)
    y, x = np.indices((placed.side[0], placed.side[0]))[:, 1:]
    square = (x + placed.x0 - sources.x) ** 2 + (y + placed.y0 - sources.y) ** 2
    ones = np.ones_like(noise)
    assert_allclose(weights_of("inverse_rms"), expected(ones, noise))
    assert_allclose(weights_of("null"), expected(ones, middle))
    assert_allclose(weights_of("snr"), expected(snr, noise))
    assert_allclose(weights_of("map"), expected(brightness, middle))
    for power in (0.0, 2.0, 5.0):
        assert_allclose(weights_of("power_snr", power_snr=power), expected(snr**power, noise))
    for width in (1.0, 1.5):
        gauss = np.exp(-square.ravel() / (2 * (width * SIGMA) ** 2))
        assert_allclose(
            weights_of("spatial", spatial_weight_sigma=width), expected(gauss, noise), rtol=1e-9
        )


def test_no_power_overflows() -> None:
    weight = weights_of("power_snr", power_snr=1e4)
    assert np.isfinite(weight).all()
    assert (weight > 0).all()


def test_mask_takes_out_what_the_sources_do_not_explain() -> None:
    """Neither the source nor a slope is an outlier, a hot pixel and a dead one are."""
    *_, drawn, _ = one_window()
    data = drawn + 7.0 + np.random.default_rng(0).normal(size=drawn.shape)
    data[0, 4, 5] += 60.0
    data[0, 11, 10] -= 60.0
    masked = np.flatnonzero(weights_of("mask", data) == 0)
    side = drawn.shape[1]
    assert {4 * side + 5 - side, 11 * side + 10 - side} <= set(masked.tolist())
    assert len(masked) <= 4


def test_a_window_without_valid_pixels_has_no_weights() -> None:
    placed, sources, image, noise = one_window()
    nothing = np.zeros(image.shape, bool)
    for scheme in ("null", "inverse_rms", "snr", "power_snr", "map", "mask", "spatial"):
        blank = np.full(image.shape, np.nan)
        options = FitOptions(weights=scheme)
        weight = pixel_weights(blank, noise, nothing, placed, np.array([0]), sources, options)
        assert_array_equal(weight, 0.0)


# --- What they do to fits ------------------------------------------------------------------------


def on_grid(count: int, spacing: float = 27.0) -> tuple[NDArray, NDArray]:
    shift = np.random.default_rng(1).uniform(-0.5, 0.5, (2, count**2))
    x, y = spacing * (np.indices((count, count)).reshape(2, -1) + 0.75) + shift
    return x, y


def simulated(snr: float, count: int = 10) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Beams of one brightness on a grid in white noise of `RMS`: data, x, y, and the true flux."""
    x, y = on_grid(count)
    side = int(27 * (count + 0.5))
    beams = np.full(x.shape, SIGMA)
    peak = np.full(x.shape, snr * RMS)
    image = render((side, side), x, y, peak, beams, beams, 0 * beams)
    noise = RMS * np.random.default_rng(0).standard_normal(image.shape)
    return image + noise, x, y, 2 * np.pi * SIGMA**2 * peak


def fit(
    data: NDArray, x: NDArray, y: NDArray, snr: float, correlation: NDArray | None = None, **options
) -> SourceFits:
    """Model a map as an extraction does, in two fits, from positions half a pixel off at most."""
    config = Config.model_validate({"fit_options": options})
    rng = np.random.default_rng(9)
    start = [v + rng.uniform(-0.3, 0.3, v.shape) for v in (x, y)]
    level = np.full(len(x), RMS)
    found = Detections(*start, snr * level, level / RMS, level, 0 * level)
    noise = np.full(data.shape, RMS)
    first = model_sources(data, noise, found, BEAM, config).fits
    modelled = model_sources(data, noise, found, BEAM, config, first)
    if config.fit_options.loss != "linear":
        return modelled.fits
    shared = Correlation.white() if correlation is None else Correlation(correlation)
    return with_noise(modelled, noise, shared).fits


SCHEMES = [
    ("null", 50.0, {}),
    ("inverse_rms", 50.0, {}),
    ("inverse_rms", 50.0, {"fit_aperture_sigma": 1.0}),
    ("snr", 50.0, {}),
    ("map", 50.0, {}),
    ("mask", 50.0, {}),
    ("spatial", 50.0, {}),
    ("power_snr", 500.0, {"power_snr": 2}),
    ("power_snr", 2000.0, {}),
]


@pytest.mark.parametrize(("scheme", "snr", "options"), SCHEMES)
def test_fluxes_and_their_errors_are_right_under_all_weights(
    scheme: str, snr: float, options: dict[str, float]
) -> None:
    """100 sources: the mean of the pulls is known to 0.1, their width to 0.12."""
    data, x, y, truth = simulated(snr)
    fits = fit(data, x, y, snr, weights=scheme, **options)
    flux, error = model_flux(fits)
    pull = (flux - truth) / error
    assert (fits.status == 1).all()
    assert 0.7 < mad_std(pull) < 1.35
    assert abs(pull.mean()) < 4 * pull.std() / np.sqrt(len(pull))


@pytest.mark.parametrize("scheme", ["snr", "spatial"])
def test_errors_are_right_in_noise_that_pixels_share_too(scheme: str) -> None:
    """Noise smoothed to 3 pixels has the correlation of a Gaussian that is wider by sqrt(2)."""
    snr = 60.0
    data, x, y, truth = simulated(snr)
    white = np.random.default_rng(5).standard_normal(data.shape)
    width = 3.0 / np.sqrt(8 * np.log(2))
    smooth = gaussian_filter(white, width, mode="wrap")
    noise = np.random.default_rng(0).standard_normal(data.shape)
    data = data - RMS * noise + RMS * smooth / smooth.std()
    offset = np.arange(-8, 9)
    rho = np.exp(-(offset[:, None] ** 2 + offset**2) / (4 * width**2))
    (flux, error), (_, as_if_white) = (
        model_flux(fit(data, x, y, snr, shared, weights=scheme)) for shared in (rho, None)
    )
    assert 0.7 < mad_std((flux - truth) / error) < 1.35
    assert mad_std((flux - truth) / as_if_white) < 0.65


def test_weights_by_signal_cost_precision_but_follow_the_core() -> None:
    """The more the weights prefer the peak, the larger the errors of the flux."""
    data, x, y, _ = simulated(500.0, 4)
    errors = [
        np.median(model_flux(fit(data, x, y, 500.0, weights=scheme, **options))[1])
        for scheme, options in [
            ("inverse_rms", {}),
            ("snr", {}),
            ("power_snr", {"power_snr": 2}),
            ("power_snr", {"power_snr": 5}),
        ]
    ]
    assert (np.diff(errors) > 0).all()


def test_power_one_is_snr() -> None:
    data, x, y, _ = simulated(50.0, 3)
    one = fit(data, x, y, 50.0, weights="snr")
    same = fit(data, x, y, 50.0, weights="power_snr", power_snr=1)
    assert_array_equal(one.peak, same.peak)
    assert_array_equal(one.covariance, same.covariance)


def with_hot_pixels(snr: float = 50.0) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """3 % of the pixels 30 rms too bright, but none within 1.5 pixels of a source's centre."""
    data, x, y, truth = simulated(snr, 8)
    rows, columns = np.indices(data.shape)
    near = (np.hypot(columns[..., None] - x, rows[..., None] - y) < 1.5).any(axis=-1)
    hot = (np.random.default_rng(3).uniform(size=data.shape) < 0.03) & ~near
    return data + 30 * RMS * hot, x, y, truth


@pytest.mark.parametrize(
    "options",
    [{"weights": "mask"}, {"loss": "cauchy"}, {"loss": "huber"}, {"loss": "soft_l1"}],
    ids=lambda options: next(iter(options.values())),
)
def test_hot_pixels_that_bias_least_squares_are_survived(options: dict[str, str]) -> None:
    data, x, y, truth = with_hot_pixels()
    plain, robust = (
        np.abs(model_flux(fit(data, x, y, 50.0, **chosen))[0] / truth - 1)
        for chosen in ({}, options)
    )
    assert np.median(robust) < np.median(plain) / 3
    if options.get("loss") == "cauchy":
        assert np.median(robust) < 0.03


def test_f_scale_is_where_a_loss_begins_to_be_robust() -> None:
    """A scale far beyond all residuals gives back least squares, a small one does not."""
    data, x, y, truth = with_hot_pixels()
    linear = fit(data, x, y, 50.0)
    wide = fit(data, x, y, 50.0, loss="cauchy", f_scale=1e4)
    assert_allclose(wide.peak, linear.peak, rtol=1e-4)
    narrow = fit(data, x, y, 50.0, loss="cauchy", f_scale=1.0)
    error = [np.median(np.abs(model_flux(f)[0] / truth - 1)) for f in (narrow, wide)]
    assert error[0] < error[1] / 3


@pytest.mark.parametrize(
    "options", [{"weights": "spatial"}, {"fit_aperture_sigma": 0.0}, {"fit_aperture_sigma": 1.0}]
)
def test_what_is_far_from_a_source_is_kept_out(options: dict[str, object]) -> None:
    """A bright wall 2.6 beams away, within the window, but outside the circle of 2.1 beams."""
    data, x, y, truth = simulated(50.0, 6)
    rows, columns = np.indices(data.shape)
    distance = np.hypot(columns[..., None] - x, rows[..., None] - y).min(axis=-1)
    data[(distance > 2.6 * BEAM) & (columns % 27 < 13)] += 50 * RMS
    whole, inside = (
        np.median(np.abs(model_flux(fit(data, x, y, 50.0, **chosen))[0] / truth - 1))
        for chosen in ({}, options)
    )
    assert inside < 0.06
    assert inside < whole / 2


def test_the_circles_of_a_group_are_united() -> None:
    """The companion has its own circle: both fluxes are right."""
    x, y = np.array([30.0, 30.0 + 1.5 * BEAM]), np.array([30.0, 30.0])
    beams, peak = np.full(2, SIGMA), np.array([100.0, 60.0])
    image = render((60, 64), x, y, peak, beams, beams, 0 * beams)
    data = image + 0.01 * np.random.default_rng(0).standard_normal(image.shape)
    fits = fit(data, x, y, 50.0, fit_aperture_sigma=0.0, sweeps=3)
    assert (fits.group_size == 2).all()
    assert_allclose(model_flux(fits)[0], 2 * np.pi * SIGMA**2 * peak, rtol=2e-3)
