"""Aperture photometry against analytic values, photutils and Monte Carlo."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import ArrayLike, NDArray
from photutils.aperture import EllipticalAperture
from scipy.optimize import least_squares

from hyperjax.photometry import Apertures, aperture_photometry, model_flux
from hyperjax.sources import SourceFits, render_sources

FWHM_PER_SIGMA = np.sqrt(8 * np.log(2))

SHAPE = (60, 80)


def make_fits(*sources: ArrayLike, covariance: NDArray | None = None) -> SourceFits:
    """Fits of sources (peak, x, y, sigma_major, sigma_minor, theta), exact unless told."""
    parameters = np.array(sources, dtype=float).reshape(-1, 6)
    if covariance is None:
        covariance = np.zeros((len(parameters), 6, 6))
    return SourceFits.unknown(len(parameters))._replace(
        **dict(zip(SourceFits._fields[:6], parameters.T, strict=True)),
        covariance=np.broadcast_to(covariance, (len(parameters), 6, 6)),
    )


def gaussian_image(parameters: ArrayLike, shape: tuple[int, int] = SHAPE) -> NDArray:
    """Draw one Gaussian on the whole image through its inverse covariance matrix."""
    peak, x0, y0, major, minor, theta = parameters
    axes = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    inverse = axes @ np.diag([major**-2, minor**-2]) @ axes.T
    y, x = np.indices(shape)
    offset = np.stack([x - x0, y - y0])
    return peak * np.exp(-0.5 * np.einsum("iyx,ij,jyx->yx", offset, inverse, offset))


SOURCES = [(2.0, 30.3, 25.8, 4.0, 2.5, 0.6), (1.0, 39.0, 29.4, 3.0, 2.4, 2.2)]


def test_sources_are_drawn_at_pixel_centres_to_six_sigma() -> None:
    image = render_sources(SHAPE, make_fits(*SOURCES))
    expected = sum(gaussian_image(source) for source in SOURCES)
    assert_allclose(image, expected, atol=2.0 * np.exp(-18))


def test_a_source_partly_or_wholly_off_the_map_is_clipped() -> None:
    edge, outside = (1.0, 0.2, 59.0, 3.0, 2.0, 1.0), (1.0, -70.0, 200.0, 3.0, 2.0, 1.0)
    image = render_sources(SHAPE, make_fits(edge, outside))
    assert_allclose(image, gaussian_image(edge), atol=1e-7)


def test_a_source_without_finite_parameters_leaves_the_others_alone() -> None:
    broken = (1.0, np.nan, 20.0, 3.0, 2.0, 0.0)
    fits = make_fits(SOURCES[0], broken)
    image = render_sources(SHAPE, fits)
    assert_allclose(image, gaussian_image(SOURCES[0]), atol=1e-6)
    apertures = aperture_photometry(np.zeros(SHAPE), fits, rms=1.0, ratio=0.5)
    assert np.isfinite([field[0] for field in apertures]).all()
    assert np.isnan([field[1] for field in apertures[:-1]]).all()
    assert apertures.blank_fraction[1] == 1


def test_no_sources_give_an_empty_map_and_empty_arrays() -> None:
    fits = make_fits()
    assert_array_equal(render_sources(SHAPE, fits), np.zeros(SHAPE))
    for field in aperture_photometry(np.zeros(SHAPE), fits, rms=1.0, ratio=0.5):
        assert field.shape == (0,)
        assert field.dtype == np.float64
    assert model_flux(fits)[1].shape == (0,)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0, 1.5])
def test_the_enclosed_fraction_of_a_well_sampled_gaussian_is_analytic(ratio: float) -> None:
    fits = make_fits((3.0, 99.3, 101.6, 16.0, 9.0, 0.7))
    apertures = aperture_photometry(np.zeros((200, 200)), fits, rms=1.0, ratio=ratio)
    assert_allclose(apertures.enclosed, 1 - 2 ** (-4 * ratio**2), rtol=2e-3)
    assert_allclose(apertures.corrected, model_flux(fits)[0], rtol=1e-12)
    area = np.pi * 16 * 9 * (ratio * FWHM_PER_SIGMA) ** 2
    assert_allclose(apertures.area_pix, area, rtol=1e-12)
    assert_allclose(apertures.blank_fraction, 0, atol=0)


def test_the_sum_is_that_of_photutils_on_the_map_without_background_and_companions() -> None:
    rng = np.random.default_rng(1)
    background, noise = 5.0, rng.normal(size=SHAPE)
    data = background + noise + sum(gaussian_image(source) for source in SOURCES)
    fits = make_fits(*SOURCES)
    residual = data - background - render_sources(SHAPE, fits)
    apertures = aperture_photometry(residual, fits, rms=1.0, ratio=0.7)
    for i, companion in enumerate(reversed(SOURCES)):
        _, x, y, major, minor, theta = SOURCES[i]
        ellipse = EllipticalAperture(
            (x, y), a=0.7 * FWHM_PER_SIGMA * major, b=0.7 * FWHM_PER_SIGMA * minor, theta=theta
        )
        cleaned = data - background - gaussian_image(companion)
        (expected,), (error,) = ellipse.do_photometry(cleaned, error=np.ones(SHAPE))
        assert_allclose(apertures.flux[i], expected, rtol=1e-6)
        weights = ellipse.to_mask(method="exact").data
        assert_allclose(apertures.flux_err[i], np.sqrt((weights**2).sum()), rtol=1e-12)
        assert apertures.flux_err[i] <= error  # photutils adds w sigma^2, not w^2 sigma^2


@pytest.mark.parametrize("fwhm_pix", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("centre", [(30.0, 30.0), (30.5, 30.5), (30.2, 29.7)])
def test_the_enclosed_fraction_of_undersampled_sources_is_that_of_their_pixels(
    fwhm_pix: float, centre: tuple[float, float]
) -> None:
    sigma = fwhm_pix / FWHM_PER_SIGMA
    source = (1.7, *centre, sigma, sigma, 0.0)
    ellipse = EllipticalAperture(centre, a=0.5 * fwhm_pix, b=0.5 * fwhm_pix)
    (pixel_sum,), _ = ellipse.do_photometry(gaussian_image(source))
    apertures = aperture_photometry(np.zeros(SHAPE), make_fits(source), rms=1.0, ratio=0.5)
    assert_allclose(apertures.enclosed, pixel_sum / (2 * np.pi * 1.7 * sigma**2), rtol=1e-12)
    assert_allclose(apertures.corrected, 2 * np.pi * 1.7 * sigma**2, rtol=1e-12)


def test_blank_pixels_and_the_edge_leave_the_corrected_flux_right() -> None:
    inside, edge = (2.0, 30.3, 25.8, 4.0, 2.5, 0.6), (2.0, 1.0, 50.0, 3.0, 2.5, 1.4)
    fits = make_fits(inside, edge)
    residual = gaussian_image(inside) + gaussian_image(edge) - render_sources(SHAPE, fits)
    residual[24:27, 28:32] = np.nan
    apertures = aperture_photometry(residual, fits, rms=1.0, ratio=1.0)
    whole = aperture_photometry(np.zeros(SHAPE), fits, rms=1.0, ratio=1.0)
    assert_allclose(apertures.corrected, model_flux(fits)[0], rtol=1e-6)
    assert apertures.flux[0] < whole.flux[0]
    assert_allclose(apertures.area_pix[0], whole.area_pix[0] - 12)
    full_area = np.pi * FWHM_PER_SIGMA**2 * np.array([4.0 * 2.5, 3.0 * 2.5])
    assert_allclose(apertures.blank_fraction, 1 - apertures.area_pix / full_area)
    assert whole.blank_fraction[0] == 0
    assert whole.blank_fraction[1] > 0.2


@pytest.mark.parametrize("x", [30.0, -200.0])
def test_an_aperture_without_data_has_no_flux(x: float) -> None:
    fits = make_fits((1.0, x, 30.0, 3.0, 2.0, 0.0))
    apertures = aperture_photometry(np.full(SHAPE, np.nan), fits, rms=1.0, ratio=0.5)
    assert_array_equal(apertures.area_pix, [0])
    assert_array_equal(apertures.blank_fraction, [1])
    for missing in (apertures.flux, apertures.flux_err, apertures.corrected):
        assert np.isnan(missing).all()


def test_pixels_without_a_noise_value_are_blank() -> None:
    rms = np.ones(SHAPE)
    rms[26, 30] = np.nan
    apertures = aperture_photometry(np.zeros(SHAPE), make_fits(SOURCES[0]), rms=rms, ratio=0.5)
    assert apertures.blank_fraction[0] > 0
    assert np.isfinite(apertures.flux_err).all()


def test_the_aperture_noise_is_the_scatter_of_sums_over_noise() -> None:
    """With noise that grows across the map, against 3000 noise maps (scatter known to 1.3 %)."""
    rng = np.random.default_rng(2)
    fits = make_fits((0.0, 20.3, 18.8, 3.0, 2.0, 0.6))
    rms = np.broadcast_to(np.linspace(0.5, 3.0, 40), (36, 40))
    sums = [
        aperture_photometry(rms * rng.normal(size=rms.shape), fits, rms, 0.7).flux[0]
        for _ in range(3000)
    ]
    predicted = aperture_photometry(np.zeros(rms.shape), fits, rms, 0.7).flux_err[0]
    assert_allclose(np.std(sums), predicted, rtol=0.05)


def test_the_error_of_the_model_flux_is_that_of_draws_from_the_covariance() -> None:
    rng = np.random.default_rng(3)
    parameters = np.array([2.0, 30.0, 25.0, 4.0, 2.5, 0.6])
    mixing = rng.normal(size=(6, 6)) * 0.01 * np.array([2.0, 10.0, 10.0, 4.0, 2.5, 1.0])[:, None]
    covariance = mixing @ mixing.T
    draws = rng.multivariate_normal(parameters, covariance, size=200_000)
    flux, error = model_flux(make_fits(parameters, covariance=covariance))
    assert_allclose(flux, 2 * np.pi * 2.0 * 4.0 * 2.5)
    assert_allclose(error, np.std(2 * np.pi * draws[:, 0] * draws[:, 3] * draws[:, 4]), rtol=0.01)


def test_without_covariance_only_the_errors_that_need_it_are_missing() -> None:
    fits = make_fits(SOURCES[0], covariance=np.full((6, 6), np.nan))
    apertures = aperture_photometry(np.zeros(SHAPE), fits, rms=1.0, ratio=0.5)
    assert np.isnan(model_flux(fits)[1]).all()
    assert np.isnan(apertures.corrected_err).all()
    assert np.isfinite([apertures.flux, apertures.flux_err, apertures.corrected]).all()


def fit_and_measure(data: NDArray, start: NDArray, ratio: float) -> Apertures:
    """Aperture photometry after a least-squares fit by scipy to data of unit noise."""
    solution = least_squares(
        lambda parameters: (gaussian_image(parameters, data.shape) - data).ravel(),
        start,
        x_scale=np.array([start[0], 1, 1, 1, 1, 1]),
    )
    covariance = np.linalg.inv(solution.jac.T @ solution.jac)
    fits = make_fits(solution.x, covariance=covariance)
    residual = data - render_sources(data.shape, fits)
    return aperture_photometry(residual, fits, rms=1.0, ratio=ratio)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_the_error_of_the_corrected_flux_is_the_scatter_of_fits(ratio: float) -> None:
    """Against 400 fits to noise (their scatter is known to 3.5 %)."""
    rng = np.random.default_rng(4)
    truth = np.array([20.0, 12.3, 11.8, 3.0, 2.2, 0.6])
    image = gaussian_image(truth, (24, 25))
    measured = [
        fit_and_measure(image + rng.normal(size=image.shape), truth, ratio) for _ in range(400)
    ]
    fluxes = np.array([apertures.corrected[0] for apertures in measured])
    predicted = np.median([apertures.corrected_err[0] for apertures in measured])
    assert_allclose(np.std(fluxes), predicted, rtol=0.1)
    assert_allclose(np.mean(fluxes), 2 * np.pi * truth[0] * truth[3] * truth[4], rtol=0.01)
