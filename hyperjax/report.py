"""A report of every fit, in words, for the log (`fit_options.verbose`)."""

from collections.abc import Iterator

import numpy as np

from hyperjax.catalog import decode_flags
from hyperjax.logs import counted
from hyperjax.maps import FWHM_PER_SIGMA
from hyperjax.sources import SourceFits

__all__ = ["fit_lines"]

_HOW = {1: "converged", 2: "converged at the second try", 0: "did not converge", -1: "not fitted"}


def fit_lines(fits: SourceFits) -> Iterator[str]:
    """Yield a line for each group, and after it one for each of its sources, with their errors.

    Parameters
    ----------
    fits
        The sources in the order of the catalogue: the first is number 1.
    """
    groups, first = np.unique(fits.group, return_index=True)
    for group in groups[np.argsort(first)]:
        members = np.flatnonzero(fits.group == group)
        yield _group_line(fits, members)
        for number in members:
            yield _source_line(fits, int(number))


def _group_line(fits: SourceFits, members: np.ndarray) -> str:
    """What the fits of a group have in common; a large one may be fitted in several blocks."""
    one = members[0]
    how = ", ".join(dict.fromkeys(_HOW[int(status)] for status in fits.status[members]))
    order = f"order {fits.order[one]}" if fits.order[one] >= 0 else "none"
    return (
        f"fit of {counted(len(members), 'source')}: {how} in "
        f"{counted(int(fits.niter[members].max()), 'step')}; background: {order}; "
        f"chi2_red {fits.chi2_red[one]:.3f}, nmse {fits.nmse[one]:.3g}, bic {fits.bic[one]:.1f}"
    )


def _source_line(fits: SourceFits, i: int) -> str:
    """The fitted parameters of a source in pixels and Jy/beam."""
    error = np.sqrt(np.diagonal(fits.covariance[i]))
    degrees = np.rad2deg(fits.theta[i]), np.rad2deg(error[5])
    flags = ", ".join(decode_flags(int(fits.flags[i])))
    values = [
        f"peak {fits.peak[i]:.4g} +- {error[0]:.2g} Jy/beam",
        f"x {fits.x[i]:.2f} +- {error[1]:.2f}",
        f"y {fits.y[i]:.2f} +- {error[2]:.2f} pixel",
        f"FWHM {FWHM_PER_SIGMA * fits.sigma_major[i]:.2f} +- {FWHM_PER_SIGMA * error[3]:.2f}",
        f"x {FWHM_PER_SIGMA * fits.sigma_minor[i]:.2f} +- {FWHM_PER_SIGMA * error[4]:.2f} pixel",
        f"angle {degrees[0]:.0f} +- {degrees[1]:.0f} deg",
        f"background {fits.background[i]:.4g} Jy/beam",
    ]
    return f"  source {i + 1}: {', '.join(values)}" + (f" ({flags})" if flags else "")
