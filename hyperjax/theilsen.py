"""Theil-Sen fits of many unknowns: the spatial median of exact fits to small random subsets.

After Dang, Peng, Wang & Zhang (2009, "Theil-Sen estimators in a multiple linear regression model").
A subset has as many pixels as there are unknowns, and counts by the volume that its pixels span, as
distant pairs count more in weighted medians of slopes (Sievers 1978, JASA 73, 628). With a share f
of outliers among the pixels a share (1 - f)^p of the subsets of p is clean; the median holds while
that is more than a half.
"""

import numpy as np
from numpy.typing import NDArray

_SUBSETS = 5000
_ITERATIONS = 100
_TOLERANCE = 1e-9  # of the distance that the median moves, to that of the fits from it
_LEAST_VOLUME = 1e-6  # of the largest: less, and the pixels of a subset say next to nothing


def theil_sen(
    terms: NDArray[np.float64], values: NDArray[np.float64], seed: int = 0
) -> NDArray[np.float64]:
    """Coefficients (p,) of `terms` (n, p) that give `values` (n,).

    NaN for less than p + 1 values, and where the terms are not independent of each other.

    Distances of two fits are the rms difference of what they give on all n: the median is taken in
    an orthonormal basis, so neither the coordinates nor the units of the terms matter. The subsets
    are drawn from `seed`, so that the same data give the same fit.
    """
    n, p = terms.shape
    if n <= p or np.linalg.matrix_rank(terms) < p:
        return np.full(p, np.nan)
    basis, triangle = np.linalg.qr(terms)
    basis, triangle = np.sqrt(n) * basis, triangle / np.sqrt(n)
    subset = np.random.default_rng(seed).integers(0, n, (_SUBSETS, p))
    matrix = basis[subset]
    volume = np.abs(np.linalg.det(matrix))
    fair = volume > _LEAST_VOLUME * np.max(volume)
    fits = np.linalg.solve(matrix[fair], values[subset[fair]][..., None])[..., 0]
    return np.asarray(np.linalg.solve(triangle, spatial_median(fits, volume[fair])))


def spatial_median(
    points: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The point (p,) whose weighted distances to the points (k, p) have the least sum.

    By Weiszfeld's iteration (1937); a point that the median falls on counts as one that is near.
    """
    middle = np.average(points, axis=0, weights=weights)
    for _ in range(_ITERATIONS):
        distance = np.linalg.norm(points - middle, axis=1)
        scale = np.median(distance)
        if not scale > 0:
            break
        share = weights / np.maximum(distance, _TOLERANCE * scale)
        moved = share @ points / share.sum()
        step = np.linalg.norm(moved - middle)
        middle = moved
        if step <= _TOLERANCE * scale:
            break
    return np.asarray(middle)
