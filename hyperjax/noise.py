"""The noise of a map."""

import numpy as np
from astropy.stats import sigma_clip
from numpy.typing import NDArray

_CLIP_SIGMA = 3.0
_CLIP_ITERATIONS = 10


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
