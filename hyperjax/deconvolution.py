r"""Sizes of sources without the beam.

The second moments of a convolution are the sums of those of its parts. So the moments of a source
before it went through the beam are :math:`D = S - B`, those of the fit less those of the beam, as
matrices on the sky; the axes of D are the deconvolved ones (Wild 1970, Aust. J. Phys. 23, 113, has
the same in FWHM and angles).

Noise makes D of a point source as often negative as positive, and its larger eigenvalue positive
for the most part, so that a comparison of sizes would resolve most of them. A source is called
resolved where along some direction e the excess :math:`e^T D e` is significant: larger than
`RESOLVED_SIGMA` times its own error, the largest ratio of all directions counting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hyperjax.maps import FWHM_PER_SIGMA
from hyperjax.photometry import quadratic_form, standard_deviation

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RESOLVED_SIGMA = 3.0
"""Excess of size over the beam, in units of its error, of a source that is called resolved."""

MAX_PA_ERR_DEG = float(90 / np.sqrt(3))
"""Standard deviation of an angle that is uniform over 180 degrees: nothing is known of it."""

_DIRECTIONS = 24  # of 180 degrees
_ROUNDING = 1e-6  # of the beam's moments: an excess of sizes that are known exactly


class Deconvolved(NamedTuple):
    """Sizes of n sources without the beam; (n,) each.

    FWHMs are 0 where the source is smaller than the beam along that axis, and the angle is NaN
    where both are. Errors of FWHMs are how far the interval of one standard deviation of the
    *square* of the FWHM reaches up, which stays finite for a size of 0.
    """

    major: Floats
    major_err: Floats
    minor: Floats
    minor_err: Floats
    pa_deg: Floats
    pa_err_deg: Floats
    unresolved: NDArray[np.bool_]


def deconvolve(moments: Floats, slopes: Floats, covariance: Floats, beam: Floats) -> Deconvolved:
    """Take the beam out of the sizes of sources.

    Parameters
    ----------
    moments
        (n, 2, 2) second moments of the sources on the sky (East, North), arcsec^2.
    slopes
        (n, 3, 2, 2) their derivatives to three parameters of the shape.
    covariance
        (n, 3, 3) of these parameters. Where it is NaN, so are errors, and a source is not called
        unresolved.
    beam
        (n, 2, 2) second moments of the beam, which are taken for exact.

    Returns
    -------
    Deconvolved
        FWHMs in arcsec, angles in degrees East of North in [0, 180).
    """
    excess = moments - beam
    east, north, cross = excess[:, 0, 0], excess[:, 1, 1], excess[:, 0, 1]
    mean, spread = (east + north) / 2, np.hypot((east - north) / 2, cross)
    pa = np.arctan2(2 * cross, north - east) / 2
    along, across = _direction(pa), _direction(pa + np.pi / 2)

    def error_of(left: Floats, right: Floats) -> Floats:
        gradient = np.einsum("ni,npij,nj->np", left, slopes, right)
        return standard_deviation(quadratic_form(gradient, covariance))

    major, major_err = _fwhm(mean + spread, error_of(along, along))
    minor, minor_err = _fwhm(mean - spread, error_of(across, across))
    turn = error_of(along, across)
    pa_err = np.divide(turn, 2 * spread, out=np.full_like(turn, np.inf), where=spread > 0)
    limited = np.minimum(np.rad2deg(pa_err), MAX_PA_ERR_DEG)
    sized = major > 0
    return Deconvolved(
        major,
        major_err,
        minor,
        minor_err,
        np.where(sized, np.rad2deg(pa) % 180 % 180, np.nan),  # twice: -1e-20 % 180 is 180
        np.where(sized & ~np.isnan(turn), limited, np.nan),
        _unresolved(excess, beam, error_of),
    )


def _direction(pa: Floats) -> Floats:
    """Unit vectors (n, 2) (East, North) at position angles, rad."""
    return np.stack([np.sin(pa), np.cos(pa)], axis=-1)


def _fwhm(variance: Floats, error: Floats) -> tuple[Floats, Floats]:
    """FWHM of Gaussians of some variance, which may be negative, and its error."""
    square = FWHM_PER_SIGMA**2 * np.maximum(variance, 0)
    fwhm = np.sqrt(square)
    return fwhm, np.sqrt(square + FWHM_PER_SIGMA**2 * error) - fwhm


def _unresolved(
    excess: Floats, beam: Floats, error_of: Callable[[Floats, Floats], Floats]
) -> NDArray[np.bool_]:
    """Whether the size (n,) exceeds the beam's significantly along no direction."""
    least = _ROUNDING * np.trace(beam, axis1=1, axis2=2)
    out = np.ones(len(excess), bool)
    for pa in np.arange(_DIRECTIONS) * np.pi / _DIRECTIONS:
        e = _direction(np.full(len(excess), pa))
        more = np.einsum("ni,nij,nj->n", e, excess, e)
        out &= more <= np.maximum(RESOLVED_SIGMA * error_of(e, e), least)
    return out
