"""Fitted sources of one map, in pixels and in the map's brightness unit."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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
        (n,) level of the background under the source, Jy/beam.
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

    def take(self, index: NDArray[np.int_]) -> "SourceFits":
        """Some of the sources."""
        return SourceFits(**{name: column[index] for name, column in self._asdict().items()})
