"""Gaussians and pixels on the celestial sphere, found by small steps on it.

The sky geometry of simulations. It shares nothing with that of `hyperjax.maps`, which reads maps:
each is a test of the other.
"""

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FWHM_PER_SIGMA",
    "frame_rotation",
    "gaussian_covariance",
    "gaussian_ellipse",
    "pixel_solid_angles",
    "pixels_per_arcsec",
    "principal_axes",
]

FloatArray = NDArray[np.float64]

FWHM_PER_SIGMA = float(np.sqrt(8 * np.log(2)))
"""FWHM of a Gaussian of unit standard deviation."""


def pixels_per_arcsec(wcs: WCS, sky: SkyCoord, step_arcsec: float) -> FloatArray:
    """Jacobian of the projection, from central differences between points on the sphere.

    Parameters
    ----------
    wcs : astropy.wcs.WCS
        Celestial, two-dimensional.
    sky : SkyCoord, (n,)
        Where. East and North are those of its frame.
    step_arcsec : float
        Half the distance between the points; a tenth of a pixel is good to about 1e-7.

    Returns
    -------
    ndarray, (n, 2, 2)
        Pixels per arcsec: rows (x, y), columns (East, North).
    """
    step = step_arcsec * u.arcsec
    columns = []
    for bearing in (90 * u.deg, 0 * u.deg):
        ahead = wcs.world_to_pixel(sky.directional_offset_by(bearing, step))
        behind = wcs.world_to_pixel(sky.directional_offset_by(bearing + 180 * u.deg, step))
        columns.append(np.subtract(ahead, behind).T / (2 * step_arcsec))
    return np.stack(columns, axis=-1)


def pixel_solid_angles(wcs: WCS, shape: tuple[int, int]) -> FloatArray:
    """Solid angle of every pixel, sr, (ny, nx), from the positions of its four corners."""
    ny, nx = shape
    y, x = np.mgrid[: ny + 1, : nx + 1] - 0.5
    lon, lat = np.deg2rad(wcs.pixel_to_world_values(x, y))
    corner = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)
    rising = corner[1:, 1:] - corner[:-1, :-1]
    falling = corner[1:, :-1] - corner[:-1, 1:]
    return 0.5 * np.linalg.norm(np.cross(rising, falling), axis=-1)


def frame_rotation(sky: SkyCoord) -> FloatArray:
    """Position angle in ICRS, degrees, of the direction to the North of the frame of `sky`."""
    north = sky.directional_offset_by(0 * u.deg, 1 * u.arcmin)
    return np.asarray(sky.icrs.position_angle(north.icrs).deg)


def gaussian_covariance(
    fwhm_major: ArrayLike, fwhm_minor: ArrayLike, pa_deg: ArrayLike
) -> FloatArray:
    """Covariance (n, 2, 2), arcsec², rows and columns (East, North)."""
    pa = np.deg2rad(pa_deg)
    axes = np.array([[np.sin(pa), -np.cos(pa)], [np.cos(pa), np.sin(pa)]])  # columns: along, across
    sigma = np.stack(np.broadcast_arrays(fwhm_major, fwhm_minor), axis=-1) / FWHM_PER_SIGMA
    root = sigma[..., None, :] * np.moveaxis(axes, -1, 0)
    return root @ root.swapaxes(1, 2)


def principal_axes(covariance: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Major and minor sigma (n,) and the unit vectors (n, 2) along the major axes."""
    variance, vectors = np.linalg.eigh(covariance)
    return np.sqrt(variance[:, 1]), np.sqrt(variance[:, 0]), vectors[:, :, 1]


def gaussian_ellipse(covariance: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Major and minor FWHM, and position angle in [0, 180) degrees, each (n,)."""
    major, minor, axis = principal_axes(covariance)
    pa = np.rad2deg(np.arctan2(axis[:, 0], axis[:, 1])) % 180.0
    return FWHM_PER_SIGMA * major, FWHM_PER_SIGMA * minor, pa
