"""Fitted sources of one map, in pixels and in the map's brightness unit."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hyperjax.groups import overlap, pixel_offsets
from hyperjax.maps import FWHM_PER_SIGMA

Floats = NDArray[np.float64] | float
"""A number, or an array of them."""

_REACH = 6.0
"""How far sources are drawn, in standard deviations: exp(-18) = 1.5e-8 of the peak is left."""

_OVERLAP_SIZES = 1.5  # mean FWHM of two sources that overlap; 2 found no more
_MASK_SIGMA = 2.0  # an elliptical Gaussian down to exp(-2) = 0.1353 of its peak
_MASK_SIZE = 1.5  # of the beam: sizes are not known yet
_STEP, _CHUNK = 4, 256  # half-sides of stamps are multiples of this; stamps drawn at a time


class SourceFits(NamedTuple):
    """Elliptical Gaussians fitted to one map: arrays with one entry per source.

    A source's brightness is peak * exp(-(u^2 / sigma_major^2 + v^2 / sigma_minor^2) / 2), with u
    along its major axis; its sum over pixels is 2 pi peak sigma_major sigma_minor.

    Attributes
    ----------
    peak
        (n,) above the background, Jy/beam.
    x, y
        (n,) 0-based pixel position.
    sigma_major, sigma_minor
        (n,) pixels; FWHM = sqrt(8 ln 2) sigma.
    theta
        (n,) angle of the major axis from +x towards +y, rad, in [0, pi).
    covariance
        (n, 6, 6) of (peak, x, y, sigma_major, sigma_minor, theta); 0 for what was held fixed, NaN
        where it could not be had.
    group, group_size
        (n,) index of the group of sources that were linked, and its number of members.
    background
        (n,) level of the background at the source's centre, Jy/beam.
    order
        (n,) order of the chosen polynomial background, -1 where there is none.
    nmse, chi2_red, bic
        (n,) quality of the fit of the source's group (`hyperjax.fitting.FitResult`).
    niter
        (n,) evaluations of the model.
    status
        (n,) 1 converged, 2 converged at the second try with wider bounds, 0 failed, -1 not fitted.
    flags
        (n,) bits of `hyperjax.catalog.FLAGS`.
    """

    peak: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    sigma_major: NDArray[np.float64]
    sigma_minor: NDArray[np.float64]
    theta: NDArray[np.float64]
    covariance: NDArray[np.float64]
    group: NDArray[np.int_]
    group_size: NDArray[np.int_]
    background: NDArray[np.float64]
    order: NDArray[np.int_]
    nmse: NDArray[np.float64]
    chi2_red: NDArray[np.float64]
    bic: NDArray[np.float64]
    niter: NDArray[np.int_]
    status: NDArray[np.int_]
    flags: NDArray[np.int_]

    @classmethod
    def unknown(cls, n: int) -> "SourceFits":
        """`n` sources of which nothing is known: NaN, and 0 for integers."""
        integers = ("group", "group_size", "order", "niter", "status", "flags")
        columns = {
            name: np.zeros(n, int) if name in integers else np.full(n, np.nan)
            for name in cls._fields
        }
        return cls(**columns | {"covariance": np.full((n, 6, 6), np.nan)})

    def take(self, index: NDArray[np.int_]) -> "SourceFits":
        """Some of the sources."""
        return SourceFits(**{name: column[index] for name, column in self._asdict().items()})

    def copy(self) -> "SourceFits":
        """The same in arrays of their own."""
        return SourceFits(**{name: column.copy() for name, column in self._asdict().items()})

    def in_groups(self, group: NDArray[np.int_]) -> "SourceFits":
        """The sources with the labels of their groups, from 0, and the groups' sizes."""
        size = np.bincount(group)[group] if len(group) else group
        return self._replace(group=group, group_size=size)

    def and_more(self, more: "SourceFits") -> "SourceFits":
        """These sources, and after them others."""
        return SourceFits(*(np.concatenate(pair) for pair in zip(self, more, strict=True)))

    @classmethod
    def guess(cls, params: NDArray[np.float64]) -> "SourceFits":
        """Sources of known parameters (n, 6) that nothing else is known of."""
        columns = dict(zip(cls._fields[:6], params.T.copy(), strict=True))
        return cls.unknown(len(params))._replace(**columns)

    @property
    def is_drawable(self) -> NDArray[np.bool_]:
        """Whether each source (n,) has a finite peak, position and shape."""
        finite = np.isfinite(self[:6]).all(axis=0)
        return np.asarray(finite & (self.sigma_minor > 0) & (self.sigma_major > 0))

    def elliptical(self, least: float) -> "SourceFits":
        """The same, round ones with a `least` ellipticity: their angle and ratio are fitted too."""
        major = np.maximum(self.sigma_major, (1 + least) * self.sigma_minor)
        return self._replace(sigma_major=major)


def overlap_reach(fits: SourceFits) -> NDArray[np.float64]:
    """Reach (n,) of sources, pixels: those closer than the sum of theirs overlap.

    Each has three quarters of its mean FWHM; NaN where that is not known.
    """
    return _OVERLAP_SIZES / 2 * FWHM_PER_SIGMA * np.sqrt(fits.sigma_major * fits.sigma_minor)


def nearest_values(
    image: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Values of an image at the pixels (of the image) that are nearest to some positions."""
    row = np.clip(np.rint(y).astype(int), 0, image.shape[0] - 1)
    column = np.clip(np.rint(x).astype(int), 0, image.shape[1] - 1)
    return np.asarray(image[row, column])


def principal_offsets(
    dx: Floats, dy: Floats, theta: Floats
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Offsets from a source along its major and its minor axis."""
    cos, sin = np.asarray(np.cos(theta)), np.asarray(np.sin(theta))
    return dx * cos + dy * sin, dy * cos - dx * sin


def unit_gaussian(
    dx: Floats,
    dy: Floats,
    sigma_major: Floats,
    sigma_minor: Floats,
    theta: Floats,
) -> NDArray[np.float64]:
    """Gaussians of unit peak at pixel offsets (dx, dy) from their centres; arguments broadcast."""
    major, minor = principal_offsets(dx, dy, theta)
    square = (major / sigma_major) ** 2 + (minor / sigma_minor) ** 2
    return np.asarray(np.exp(-0.5 * square))


def gaussian_gradient(
    dx: Floats,
    dy: Floats,
    peak: Floats,
    sigma_major: Floats,
    sigma_minor: Floats,
    theta: Floats,
) -> NDArray[np.float64]:
    """Derivatives (6, ...) of Gaussians to (peak, x, y, sigma_major, sigma_minor, theta)."""
    major, minor = principal_offsets(dx, dy, theta)
    profile = unit_gaussian(dx, dy, sigma_major, sigma_minor, theta)
    cos, sin = np.cos(theta), np.sin(theta)
    along, across = major / sigma_major**2, minor / sigma_minor**2
    logarithmic = [
        along * cos - across * sin,
        along * sin + across * cos,
        along**2 * sigma_major,
        across**2 * sigma_minor,
        across * major - along * minor,
    ]
    return np.stack([profile, *(peak * profile * slope for slope in logarithmic)])


def stamp_gradients(
    fits: SourceFits,
    which: NDArray[np.int_],
    x0: NDArray[np.int_],
    y0: NDArray[np.int_],
    side: int,
) -> NDArray[np.float64]:
    """Derivatives (k, 6, side, side) of `stamps` to the sources' parameters."""
    dx, dy = pixel_offsets(fits.x[which], fits.y[which], x0, y0, side)
    shape = (fits.peak, fits.sigma_major, fits.sigma_minor, fits.theta)
    columns = (column[which, None, None] for column in shape)
    return gaussian_gradient(dx, dy, *columns).swapaxes(0, 1)


def stamps(
    fits: SourceFits,
    which: NDArray[np.int_],
    x0: NDArray[np.int_],
    y0: NDArray[np.int_],
    side: int,
) -> NDArray[np.float64]:
    """Some of the sources (k, side, side), Jy/beam, on windows whose first pixels are (x0, y0)."""
    dx, dy = pixel_offsets(fits.x[which], fits.y[which], x0, y0, side)
    shape = (fits.sigma_major, fits.sigma_minor, fits.theta)
    unit = unit_gaussian(dx, dy, *(column[which, None, None] for column in shape))
    return fits.peak[which, None, None] * unit


def render_sources(shape: tuple[int, int], fits: SourceFits) -> NDArray[np.float64]:
    """Draw the fitted Gaussians, sampled at pixel centres.

    Each is drawn in a square that holds its 6-sigma ellipse. Sources with parameters that are
    not finite are left out.

    Parameters
    ----------
    shape
        (ny, nx) of the image.
    fits
        The sources.

    Returns
    -------
    ndarray (ny, nx)
        Sum of the sources, Jy/beam.
    """
    image = np.zeros(shape)
    drawn = np.flatnonzero(fits.is_drawable)
    half = _STEP * np.ceil(_REACH * fits.sigma_major[drawn] / _STEP).astype(int)
    for size in np.unique(half):
        same = drawn[half == size]
        for first in range(0, len(same), _CHUNK):
            which = same[first : first + _CHUNK]
            x0, y0 = (np.rint(centre[which]).astype(int) - size for centre in (fits.x, fits.y))
            side = 2 * int(size) + 1
            for stamp, x, y in zip(stamps(fits, which, x0, y0, side), x0, y0, strict=True):
                here, there = overlap(int(x), int(y), side, shape)
                image[there] += stamp[here]
    return image


def source_mask(
    shape: tuple[int, ...], x: NDArray[np.float64], y: NDArray[np.float64], fwhm_pix: float
) -> NDArray[np.bool_]:
    """Pixels (ny, nx) of sources, which take no part in the fit of a separate background."""
    radius = _MASK_SIGMA * _MASK_SIZE * fwhm_pix / FWHM_PER_SIGMA
    return near_sources((shape[0], shape[1]), x, y, radius)


def near_sources(
    shape: tuple[int, int], x: NDArray[np.float64], y: NDArray[np.float64], radius: float
) -> NDArray[np.bool_]:
    """Pixels (ny, nx) that are closer to a source than a radius."""
    reach = int(np.ceil(radius))
    grid = np.arange(-reach, reach + 1)
    out = np.zeros(shape, bool)
    for column, row in zip(x, y, strict=True):
        x0, y0 = round(float(column)), round(float(row))
        near = (grid + x0 - column) ** 2 + (grid[:, None] + y0 - row) ** 2 <= radius**2
        here, there = overlap(x0 - reach, y0 - reach, len(grid), shape)
        out[there] |= near[here]
    return out
