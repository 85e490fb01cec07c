"""The noise of a map."""

import numpy as np
from astropy.stats import sigma_clip
from numpy.typing import NDArray

from hyperjax.detection import high_pass

_CLIP_SIGMA = 3.0
_CLIP_ITERATIONS = 10
_MASK_ROUNDS = 2


def clipped_rms(data: NDArray[np.float64]) -> float:
    """Standard deviation of the finite pixels after 3-sigma clipping about the median.

    Parameters
    ----------
    data
        Image, NaN where blank; high-pass filtered, if the background has structure.
    """
    kept = sigma_clip(
        data[np.isfinite(data)],
        sigma=_CLIP_SIGMA,
        maxiters=_CLIP_ITERATIONS,
        masked=False,
    )
    return float(np.std(kept))


def rms_between_sources(data: NDArray[np.float64], size: int) -> float:
    """`clipped_rms` of the high-pass filtered map, its peaks masked before the filter.

    A source leaves a dip round itself, as wide as the filter, that clipping does not take out:
    where sources are many or bright the filtered map scatters by more than its noise.

    Parameters
    ----------
    data
        Image, NaN where blank.
    size
        Side of the filter's box in pixels (`hyperjax.detection.filter_size`).
    """
    filtered = high_pass(data, size)
    rms = clipped_rms(filtered)
    for _ in range(_MASK_ROUNDS):
        data = np.where(filtered > _CLIP_SIGMA * rms, np.nan, data)
        filtered = high_pass(data, size)
        rms = clipped_rms(filtered) or rms
    return rms
