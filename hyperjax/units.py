"""From pixels to the scaled coordinates of the engine and back, with errors.

`xp` is numpy or jax.numpy.
"""

from types import ModuleType

import numpy as np
from jaxtyping import Array

from hyperjax.batches import MAJOR, MINOR, PEAK, THETA, FitOptions, GroupBatch, X, Y
from hyperjax.models import (
    LEAST_ELLIPTICITY,
    SHAPE,
    AxesGroup,
    GaussianGroup,
    Grid,
    Problem,
    Scale,
    monomials,
)


def to_problems(
    xp: ModuleType, model: GaussianGroup, batch: GroupBatch, options: FitOptions
) -> Problem:
    """The groups in scaled coordinates, with the brightness as it is (`GaussianGroup.scaled`)."""
    count, slots = batch.present.shape
    dtype = batch.data.dtype
    there = batch.present[..., None]
    free = batch.free & there
    slots_filled = {n: xp.where(there, getattr(batch, n), 1) for n in ("start", "lower", "upper")}
    batch = batch._replace(**slots_filled)
    low, high = _sigma_bounds(xp, batch)
    start = xp.where(free, _feasible(xp, batch, low, high), batch.start)
    start = xp.where(there, _to_engine(xp, model, start), 0)
    lower = _bounds(xp, model, batch.lower, low, -np.inf)
    upper = _bounds(xp, model, batch.upper, high, np.inf)
    degrees = np.array([sum(powers) for powers in monomials(model.order)])
    smooth = (count, len(degrees))
    edge = np.full(smooth, np.inf, dtype)

    def whole(sources: Array, background: Array) -> Array:
        return xp.concatenate([sources.reshape(count, -1), background], 1)

    return Problem(
        data=batch.data.reshape(count, -1),
        weight=batch.weight.reshape(count, -1),
        start=whole(start, np.zeros(smooth, dtype)),
        lower=whole(xp.where(free, lower, -np.inf), -edge),
        upper=whole(xp.where(free, upper, np.inf), edge),
        free=whole(free, degrees <= batch.order[:, None]),
        ridge=whole(
            np.zeros((count, slots * SHAPE), dtype), np.full(smooth, options.lambda_l2, dtype)
        ),
        f_scale=np.full(count, options.f_scale, dtype),
        weight_moments=np.zeros((count, len(monomials(model.degree))), dtype),
    )


def on_bound(batch: GroupBatch, params: np.ndarray, grid: Grid) -> np.ndarray:
    """Parameters (group, slot, 6) that are on a bound, to the rounding of the scaled ones."""
    lower, upper = batch.lower.copy(), batch.upper.copy()
    lower[..., MAJOR], upper[..., MINOR] = lower[..., MINOR], upper[..., MAJOR]
    lower[..., THETA], upper[..., THETA] = -np.inf, np.inf
    size = np.abs(params)
    size[..., X : Y + 1] += 2 * grid.half
    slack = 16 * np.finfo(params.dtype).eps * size
    at_bound = (params <= lower + slack) | (params >= upper - slack)
    return np.asarray(at_bound & batch.free & batch.present[..., None])


def to_parameters(
    xp: ModuleType, model: GaussianGroup, batch: GroupBatch, scale: Scale, solved: Array
) -> tuple[Array, Array]:
    """The `solved` scaled parameters (group, P) as (group, slot, 6) and (group, monomial).

    Those of an `AxesGroup` have the axes as they were named: the "major" one may be the smaller.
    """
    count, slots = batch.present.shape
    sources = solved[:, : slots * SHAPE].reshape(count, slots, SHAPE)
    params = _from_engine(xp, model, scale.unit, sources)
    params = xp.where(batch.present[..., None] & batch.free, params, batch.start)
    coefficients = solved[:, slots * SHAPE :] * scale.unit[:, None]
    constant = coefficients[:, :1] + scale.offset[:, None]
    return params, xp.concatenate([constant, coefficients[:, 1:]], 1)


def _or_one(xp: ModuleType, values: Array) -> Array:
    """The values, 1 where they are not positive."""
    return xp.where(values > 0, values, 1)


def _sigma_bounds(xp: ModuleType, batch: GroupBatch) -> tuple[Array, Array]:
    """Bounds (group, slot) of both sigmas; 1 where none is fitted."""
    fitted = xp.any(batch.free[..., MAJOR:THETA], -1)
    low = xp.where(fitted, batch.lower[..., MINOR], 1)
    return low, xp.where(fitted, batch.upper[..., MAJOR], 1)


def _feasible(xp: ModuleType, batch: GroupBatch, low: Array, high: Array) -> Array:
    """The start, moved into the bounds."""
    free = xp.clip(batch.start, batch.lower, batch.upper)[..., :MAJOR]
    sigmas = xp.clip(batch.start[..., MAJOR:THETA], low[..., None], high[..., None])
    return xp.concatenate([free, sigmas, batch.start[..., THETA:]], -1)


def _to_engine(xp: ModuleType, model: GaussianGroup, source: Array) -> Array:
    """Sources (group, slot, 6) in pixels to the model's parameters, scaled but for the peak."""
    grid = model.grid
    x0, y0 = grid.centre
    major = _or_one(xp, source[..., MAJOR]) / grid.half
    minor = _or_one(xp, source[..., MINOR]) / grid.half
    theta = source[..., THETA]
    if isinstance(model, AxesGroup):
        shape = [xp.log(major), xp.log(minor), theta]
    else:
        e = xp.log(major / minor)
        shape = [0.5 * xp.log(major * minor), e * xp.cos(2 * theta), e * xp.sin(2 * theta)]
    columns = [
        source[..., PEAK],
        (source[..., X] - x0) / grid.half,
        (source[..., Y] - y0) / grid.half,
        *shape,
    ]
    return xp.stack(columns, -1)


def _from_engine(xp: ModuleType, model: GaussianGroup, unit: Array, source: Array) -> Array:
    """Scaled sources to pixel units, with theta in [0, pi)."""
    grid = model.grid
    x0, y0 = grid.centre
    if isinstance(model, AxesGroup):
        log_major, log_minor, theta = source[..., 3], source[..., 4], source[..., 5]
    else:
        e = _ellipticity(xp, source)
        log_major, log_minor = source[..., 3] + e / 2, source[..., 3] - e / 2
        theta = 0.5 * xp.arctan2(source[..., 5], xp.where(e > 0, source[..., 4], 1))
    columns = [
        source[..., 0] * unit[:, None],
        x0 + source[..., 1] * grid.half,
        y0 + source[..., 2] * grid.half,
        grid.half * xp.exp(log_major),
        grid.half * xp.exp(log_minor),
        xp.mod(theta, np.pi),
    ]
    return xp.stack(columns, -1)


def _ellipticity(xp: ModuleType, source: Array) -> Array:
    """Ellipticity e = log(sigma_major / sigma_minor)."""
    square = source[..., 4] ** 2 + source[..., 5] ** 2
    return xp.where(square > 0, xp.sqrt(xp.where(square > 0, square, 1)), 0)


def _bounds(
    xp: ModuleType, model: GaussianGroup, bound: Array, sigma: Array, open_end: float
) -> Array:
    """Bounds as of `_to_engine`: peak, x, y, log sigma (of both axes); other places are open."""
    grid = model.grid
    x0, y0 = grid.centre
    log_sigma, end = xp.log(sigma / grid.half), xp.full_like(sigma, open_end)
    columns = [
        bound[..., PEAK],
        (bound[..., X] - x0) / grid.half,
        (bound[..., Y] - y0) / grid.half,
        log_sigma,
        log_sigma if isinstance(model, AxesGroup) else end,
        end,
    ]
    return xp.stack(columns, -1)


def slopes_of(model: GaussianGroup, unit: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Derivatives (group, slot, 6, 6) of `_from_engine` (row) by the scaled parameters (column).

    The angle of a circular source is undefined: its derivative is that of an axis ratio of
    1 + LEAST_ELLIPTICITY, which gives a huge but finite error.
    """
    grid = model.grid
    if isinstance(model, AxesGroup):
        pixels = [unit[:, None] + 0 * source[..., 0], *np.full((2, *source.shape[:2]), grid.half)]
        axes = grid.half * np.exp(source[..., 3:5])
        diagonal = np.stack([*pixels, axes[..., 0], axes[..., 1], np.ones_like(axes[..., 0])], -1)
        return diagonal[..., None] * np.eye(SHAPE, dtype=source.dtype)
    e = _ellipticity(np, source)
    safe = np.maximum(e, LEAST_ELLIPTICITY)
    cos = np.where(e > 0, source[..., 4] / _or_one(np, e), 1)
    sin = np.where(e > 0, source[..., 5] / _or_one(np, e), 0)
    major = grid.half * np.exp(source[..., 3] + e / 2)
    minor = grid.half * np.exp(source[..., 3] - e / 2)
    zero, one = np.zeros_like(e), np.ones_like(e)
    rows = [
        [unit[:, None] * one, zero, zero, zero, zero, zero],
        [zero, grid.half * one, zero, zero, zero, zero],
        [zero, zero, grid.half * one, zero, zero, zero],
        [zero, zero, zero, major, major * cos / 2, major * sin / 2],
        [zero, zero, zero, minor, -minor * cos / 2, -minor * sin / 2],
        [zero, zero, zero, zero, -sin / (2 * safe), cos / (2 * safe)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def propagated(slopes: np.ndarray, unit: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """S C S^T for the block-diagonal S of the sources' `slopes` and the coefficients' `unit`.

    NaN is what goes with a parameter whose variance is NaN, and nothing else.
    """
    unknown = np.isnan(np.diagonal(inverse, axis1=1, axis2=2))
    if not unknown.any():
        return _transformed(slopes, unit, inverse)
    count, slots = slopes.shape[:2]
    ends = slots * SHAPE
    clean = np.where(unknown[:, :, None] | unknown[:, None, :], 0, inverse)
    from_sources = unknown[:, :ends].reshape(count, slots, 1, SHAPE) & (slopes != 0)
    lost = np.concatenate([from_sources.any(-1).reshape(count, ends), unknown[:, ends:]], 1)
    lost = lost[:, :, None] | lost[:, None, :]
    return np.where(lost, np.nan, _transformed(slopes, unit, clean))


def _transformed(slopes: np.ndarray, unit: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """As `propagated`, of what is known."""
    count, slots = slopes.shape[:2]
    size, ends = inverse.shape[-1], slots * SHAPE
    half = inverse[:, :ends].reshape(count, slots, SHAPE, size)
    half = (slopes @ half).reshape(count, ends, size)
    half = np.concatenate([half, inverse[:, ends:] * unit[:, None, None]], 1)
    whole = half[:, :, :ends].reshape(count, size, slots, SHAPE)
    whole = (whole.swapaxes(1, 2) @ slopes.swapaxes(2, 3)).swapaxes(1, 2)
    whole = whole.reshape(count, size, ends)
    return np.concatenate([whole, half[:, :, ends:] * unit[:, None, None]], 2)
