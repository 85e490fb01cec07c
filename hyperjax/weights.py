"""How much each pixel counts in a fit: the schemes of `fit_options.weights`.

A scheme is a factor of the residual in units of the noise, so its square multiplies the inverse
variance. Factors that follow the brightness follow the *modelled* sources, not the data: weights
that know the noise of their own pixel prefer those where it is positive, and so bias the flux.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hyperjax.background import Backgrounds, powers
from hyperjax.config import FitOptions
from hyperjax.groups import Windows, in_chunks, own_offsets

BY_SIGNAL = ("snr", "power_snr", "map")
"""Schemes whose weights follow the brightness of the sources."""

_LEAST_FACTOR = 1e-3  # of the largest in a window: less would leave too few pixels for a shape
_CLIP_SIGMA = 3.0
_CLIP_ROUNDS = 5


class Sources(NamedTuple):
    """What is known of the sources of some blocks of one bucket.

    `image` (block, side, side) of each block's own sources, Jy/beam; positions (n,) of all sources
    of the map; the sigma of the beam, pixels; the order of the background that is fitted with them.
    """

    image: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    beam_sigma: float
    order: int


def pixel_weights(
    image: NDArray[np.float64],
    noise: NDArray[np.float64],
    usable: NDArray[np.bool_],
    placed: Windows,
    which: NDArray[np.int_],
    sources: Sources,
    options: FitOptions,
) -> NDArray[np.float64]:
    r"""Weights (block, side, side) of the squared residuals, 0 for unusable pixels.

    With the noise :math:`\sigma`, its median :math:`\sigma_0` in the window and the modelled
    brightness S they are

    ============ ===================================================================
    inverse_rms  :math:`1 / \sigma^2`
    null         :math:`1 / \sigma_0^2`
    mask         that, and 0 where the residual stands out by 3 of its scatter
    map          that times :math:`\max(S / \sigma_0, 1)^2`
    snr          :math:`\max(S / \sigma, 1)^2 / \sigma^2`
    power_snr    :math:`\max(S / \sigma, 1)^{2 p} / \sigma^2` for p = `power_snr`
    spatial      :math:`\exp(-d^2 / s^2) / \sigma^2`, d away from the nearest source
    ============ ===================================================================

    for s = `spatial_weight_sigma` times that of the beam. No factor of the residual is less than a
    thousandth of the largest in its window, and the mean of their squares is 1 there, so that chi^2
    remains what it is.

    Parameters
    ----------
    image, noise, usable
        (block, side, side) of some blocks of one bucket.
    placed, which
        All blocks, and which these are.
    sources
        What was known of them before this fit.
    options
        weights, power_snr and spatial_weight_sigma are read.
    """
    sigma = np.where(usable, noise, np.nan)
    middle = np.nanmedian(
        np.where(usable.any(axis=(1, 2), keepdims=True), sigma, 1.0), axis=(1, 2), keepdims=True
    )
    if options.weights in ("null", "mask", "map"):
        sigma = np.where(usable, middle, np.nan)
    factor = np.ones_like(image)
    if options.weights in BY_SIGNAL:
        power = options.power_snr if options.weights == "power_snr" else 1.0
        signal = np.fmax(sources.image / sigma, 1.0)
        factor = (signal / _largest(signal, usable)) ** power
    elif options.weights == "spatial":
        width = options.spatial_weight_sigma * sources.beam_sigma
        factor = np.exp(-_squared_distance(placed, which, sources) / (2 * width**2))
    elif options.weights == "mask":
        usable = usable & ~_outliers(image - sources.image, usable, sources.order)
    share = np.maximum(factor / _largest(factor, usable), _LEAST_FACTOR) ** 2
    pixels = np.maximum(usable.sum(axis=(1, 2), keepdims=True), 1)
    mean = np.sum(np.where(usable, share, 0.0), axis=(1, 2), keepdims=True) / pixels
    return np.where(usable, share / np.where(mean > 0, mean, 1.0) / sigma**2, 0.0)


def _largest(values: NDArray[np.float64], usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Largest value in each window, 1 where no pixel is usable."""
    largest = np.max(np.where(usable, values, 0.0), axis=(1, 2), keepdims=True)
    return np.where(largest > 0, largest, 1.0)


def _squared_distance(
    placed: Windows, which: NDArray[np.int_], sources: Sources
) -> NDArray[np.float64]:
    """Of the pixels (block, side, side) from the nearest of their block's sources."""
    side = int(placed.side[which[0]])
    out = np.empty((len(which), side, side))
    for some in in_chunks(which):
        dx, dy, first = own_offsets(placed, which[some], sources.x, sources.y)
        out[some] = np.minimum.reduceat(dx**2 + dy**2, first)
    return out


def _outliers(
    residual: NDArray[np.float64], usable: NDArray[np.bool_], order: int
) -> NDArray[np.bool_]:
    """Pixels that stand out of a clipped polynomial, of an order of 0 at least, by 3 sigma."""
    terms = Backgrounds.terms(residual.shape[1])[: len(powers(max(order, 0)))]
    basis = terms.reshape(len(terms), -1).T
    out = np.zeros(usable.shape, bool)
    for values, valid, found in zip(residual, usable, out, strict=True):
        kept = valid.copy()
        for _ in range(_CLIP_ROUNDS):
            if kept.sum() <= 2 * len(terms):
                break
            inside = kept.ravel()
            fitted = np.linalg.lstsq(basis[inside], values[kept], rcond=None)[0]
            rest = values - (basis @ fitted).reshape(values.shape)
            kept = valid & (np.abs(rest) <= _CLIP_SIGMA * np.std(rest[kept]))
        found[:] = valid & ~kept
    return out
