"""Fluxes of fitted sources: in elliptical apertures, corrected to the total, and of the model.

The aperture of a source is the ellipse whose semi-axes are its fitted FWHMs, or those that are
given, times ``fwhm_radius_ratio`` = k. It is summed on the map from which the background and every
*other* source were subtracted, which is the residual map plus the source's own Gaussian. For a
well-sampled Gaussian it encloses the fraction ``1 - 2**(-4 k**2)`` of the total.

All values are in the pixel system of the fit: surface brightness in Jy/beam, sums over pixels in
pix^2 Jy/beam (`hyperjax.catalog` multiplies them by pixel area / beam area, which gives Jy),
positions in 0-based pixels with integers at pixel centres, angles in radians from +x towards +y.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from photutils.geometry import elliptical_overlap_grid

from hyperjax.groups import overlap
from hyperjax.maps import FWHM_PER_SIGMA
from hyperjax.noise import Correlation, covariance_of_sums
from hyperjax.sources import gaussian_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from hyperjax.sources import SourceFits


_CHUNK = 1024  # apertures whose pixels are in memory at a time
_NO_PIXEL = np.zeros((1, 1))


class Apertures(NamedTuple):
    """Aperture photometry of n sources; all arrays have shape (n,).

    Without any valid pixel `flux` and `corrected` are NaN, `enclosed` and `area_pix` are 0. A
    source whose parameters are not finite has NaN throughout, but `blank_fraction` 1.
    """

    flux: NDArray[np.float64]
    """Sum over the aperture of the background- and companion-subtracted map, pix^2 Jy/beam."""
    flux_err: NDArray[np.float64]
    """Noise of that sum in the aperture as drawn, with independent pixels, pix^2 Jy/beam."""
    enclosed: NDArray[np.float64]
    """Fraction of the source's own Gaussian that the aperture's valid pixels collect."""
    corrected: NDArray[np.float64]
    """`flux` / `enclosed`: the total flux seen through the aperture, pix^2 Jy/beam."""
    corrected_err: NDArray[np.float64]
    """Its error with the uncertainty of the fitted shape; NaN without a covariance."""
    area_pix: NDArray[np.float64]
    """Area of the valid pixels in the aperture, pix^2."""
    blank_fraction: NDArray[np.float64]
    """Fraction of the aperture's area that is blank or outside the map."""


class _Ellipse(NamedTuple):
    """One source's position (pixel), size (standard deviations, pixel) and angle (radians)."""

    x: float
    y: float
    sigma_major: float
    sigma_minor: float
    theta: float


class _Sums(NamedTuple):
    """Sums over one aperture, weighted by each valid pixel's overlap with it."""

    residual: float = np.nan
    gradient: tuple[float, ...] | NDArray[np.float64] = (0.0,) * 6  # of the source's own model
    area: float = 0.0
    blank_fraction: float = 1.0
    noise: NDArray[np.float64] = _NO_PIXEL  # of the pixels in the sum


_UNDRAWABLE = _Sums(gradient=(np.nan,) * 6, area=np.nan, noise=np.full((1, 1), np.nan))


def model_flux(fits: SourceFits) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Integrate the fitted Gaussians: :math:`F = 2\pi\,A\,\sigma_1\sigma_2`.

    The error is first order in the covariance of the parameters,
    :math:`\sigma_F^2 = \nabla F^T C\,\nabla F`. As peak and sizes are anticorrelated, it is smaller
    than the errors of peak and sizes would give if they were independent.

    Returns
    -------
    flux, flux_err : ndarray (n,)
        In pix^2 Jy/beam. The error is NaN where there is no covariance.
    """
    flux = 2 * np.pi * fits.peak * fits.sigma_major * fits.sigma_minor
    return flux, standard_deviation(quadratic_form(_flux_gradient(fits), fits.covariance))


def aperture_photometry(
    residual: NDArray[np.float64],
    fits: SourceFits,
    rms: ArrayLike,
    ratio: float,
    correlation: Correlation | None = None,
    shapes: NDArray[np.float64] | None = None,
) -> Apertures:
    r"""Measure each source in its elliptical aperture on the map without background and companions.

    Overlaps of ellipse and pixels are exact. Blank pixels (NaN in `residual` or in `rms`) and those
    outside the map count neither in the sum nor in the enclosed fraction, so that the corrected
    flux stays right as long as the Gaussian is.

    Parameters
    ----------
    residual
        (ny, nx), Jy/beam: data - background - all sources; NaN where blank.
    fits
        The sources that were subtracted.
    rms
        Noise per pixel, Jy/beam: a scalar or (ny, nx).
    ratio
        Semi-axes of the aperture in units of the fitted FWHMs (``fwhm_radius_ratio``).
    correlation
        Of the noise from pixel to pixel; none unless given.
    shapes
        (n, 3) sigma_major, sigma_minor, theta of the ellipses that stand in place of the fitted
        ones for the apertures.

    Notes
    -----
    With overlaps :math:`w_i`, `flux` has the variance :math:`\sum_{ij} w_i \sigma_i \rho_{ij}
    \sigma_j w_j`, in white noise :math:`\sum_i w_i^2 \sigma_i^2`. The uncertainty of the
    background and of the companions is not in it.

    The enclosed fraction E hardly depends on the fitted shape, since the aperture scales with it.
    The fraction of the *true* source that is enclosed does: an ellipse too large by 5 % at a ratio
    of 0.5 collects 7 % more flux, and noise that widens the fit also lifts the sum. Both follow
    from

    .. math:: F / E = F_\mathrm{model} + \frac{1}{E} \sum_i w_i r_i

    with r the residual. In a least-squares fit r is uncorrelated with the parameters, so that

    .. math:: \sigma_{F/E}^2 = \sigma_{F_\mathrm{model}}^2
              + \frac{1}{E^2} \left(\sigma_F^2 - g^T C g\right)

    where C is the covariance of the fit, :math:`g = \sum_i w_i\,\partial m_i / \partial p` the
    gradient of the model's sum in the aperture, and :math:`g^T C g` the noise that the fit has
    taken out of the residual.
    """
    noise = np.broadcast_to(np.asarray(rms, dtype=float), residual.shape)
    drawn_as = _ellipses(fits, shapes)
    all_ = list(zip(fits.is_drawable, fits.peak, _ellipses(fits), drawn_as, strict=True))
    sums: list[_Sums] = []
    variances = np.empty(len(all_))
    for first in range(0, len(all_), _CHUNK):
        some = [
            _sum_aperture(residual, noise, peak, ellipse, drawn, ratio) if there else _UNDRAWABLE
            for there, peak, ellipse, drawn in all_[first : first + _CHUNK]
        ]
        variances[first : first + _CHUNK] = _noise_variances(
            [each.noise for each in some], correlation or Correlation.white()
        )
        sums += [each._replace(noise=_NO_PIXEL) for each in some]
    return _photometry_from_sums(
        fits,
        residual=np.array([each.residual for each in sums], dtype=float),
        gradient=np.array([each.gradient for each in sums], dtype=float).reshape(-1, 6),
        noise_variance=variances,
        area=np.array([each.area for each in sums], dtype=float),
        blank_fraction=np.array([each.blank_fraction for each in sums], dtype=float),
    )


def _noise_variances(
    pixels: Sequence[NDArray[np.float64]], correlation: Correlation
) -> NDArray[np.float64]:
    """Variances (n,) of sums over squares of pixels of some noise each, those of a size at once."""
    sides = np.array([len(square) for square in pixels], dtype=int)
    out = np.empty(len(pixels))
    for side in np.unique(sides):
        which = np.flatnonzero(sides == side)
        squares = np.stack([pixels[index] for index in which.tolist()])
        out[which] = covariance_of_sums(squares[:, None], correlation)[:, 0, 0]
    return out


def quadratic_form(
    vectors: NDArray[np.float64], matrices: NDArray[np.float64]
) -> NDArray[np.float64]:
    """``v^T M v`` of n vectors (n, p) and matrices (n, p, p): the variance of v^T (parameters)."""
    return np.einsum("ni,nij,nj->n", vectors, matrices, vectors)


def standard_deviation(variance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Square root; NaN where there is no valid variance (NaN or negative)."""
    return np.sqrt(np.where(variance >= 0, variance, np.nan))


def _photometry_from_sums(
    fits: SourceFits,
    residual: NDArray[np.float64],
    gradient: NDArray[np.float64],
    noise_variance: NDArray[np.float64],
    area: NDArray[np.float64],
    blank_fraction: NDArray[np.float64],
) -> Apertures:
    """Turn the (n,) sums and the (n, 6) gradients into fluxes, fractions and errors."""
    profile_sum = gradient[:, 0]  # the derivative to the peak is the Gaussian of unit peak
    flux = residual + fits.peak * profile_sum
    enclosed = profile_sum / (2 * np.pi * fits.sigma_major * fits.sigma_minor)
    divisor = np.where(enclosed > 0, enclosed, np.nan)
    _, model_err = model_flux(fits)
    left_in_residual = noise_variance - quadratic_form(gradient, fits.covariance)
    return Apertures(
        flux=flux,
        flux_err=np.where(area > 0, np.sqrt(noise_variance), np.nan),
        enclosed=enclosed,
        corrected=flux / divisor,
        corrected_err=np.hypot(model_err, np.sqrt(np.maximum(left_in_residual, 0.0)) / divisor),
        area_pix=area,
        blank_fraction=blank_fraction,
    )


def _sum_aperture(
    residual: NDArray[np.float64],
    noise: NDArray[np.float64],
    peak: float,
    ellipse: _Ellipse,
    drawn: _Ellipse,
    ratio: float,
) -> _Sums:
    """Sum residual and gradient of a source over the aperture `drawn`."""
    x0, y0, overlaps = _overlaps(drawn, ratio)
    here, there = overlap(x0, y0, len(overlaps), residual.shape)
    inside = overlaps[here]
    values, deviation = residual[there], noise[there]
    usable = np.isfinite(values) & np.isfinite(deviation) & (inside > 0)
    rows, columns = np.nonzero(usable)
    if rows.size == 0:
        return _Sums()
    weight = inside[usable]
    dx, dy = (columns + there[1].start - ellipse.x), (rows + there[0].start - ellipse.y)
    weighted, blank = np.zeros(overlaps.shape), overlaps.copy()
    weighted[here][usable] = weight * deviation[usable]
    blank[here][usable] = 0
    return _Sums(
        residual=float(weight @ values[usable]),
        gradient=gaussian_gradient(dx, dy, peak, *ellipse[2:]) @ weight,
        area=weight.sum(),
        blank_fraction=blank.sum() / overlaps.sum(),
        noise=weighted,
    )


def _overlaps(drawn: _Ellipse, ratio: float) -> tuple[int, int, NDArray[np.float64]]:
    """First pixels (x, y) of a square round the aperture, and the share of its pixels in it."""
    major, minor = (
        ratio * FWHM_PER_SIGMA * sigma for sigma in (drawn.sigma_major, drawn.sigma_minor)
    )
    reach = int(np.ceil(major)) + 1
    x0, y0, side = round(drawn.x) - reach, round(drawn.y) - reach, 2 * reach + 1
    left, low = x0 - 0.5 - drawn.x, y0 - 0.5 - drawn.y
    edges = (left, left + side, low, low + side)
    shares = elliptical_overlap_grid(*edges, side, side, major, minor, drawn.theta, 1, 1)
    return x0, y0, np.asarray(shares)


def _ellipses(fits: SourceFits, shapes: NDArray[np.float64] | None = None) -> list[_Ellipse]:
    """The fitted ellipses, or others round the same centres."""
    if shapes is None:
        shapes = np.column_stack([fits.sigma_major, fits.sigma_minor, fits.theta])
    return [_Ellipse(*row) for row in np.column_stack([fits.x, fits.y, shapes]).tolist()]


def _flux_gradient(fits: SourceFits) -> NDArray[np.float64]:
    """Differentiate the Gaussians' integrals to the six parameters: (n, 6)."""
    zero = np.zeros_like(fits.peak)
    columns = [
        fits.sigma_major * fits.sigma_minor,
        zero,
        zero,
        fits.peak * fits.sigma_minor,
        fits.peak * fits.sigma_major,
        zero,
    ]
    return 2 * np.pi * np.column_stack(columns)
