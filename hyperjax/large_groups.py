"""Fits of groups of hundreds of sources: the same model and iteration, on sparse matrices.

Sources reach only so far, so that most pairs of a large group have no pixel in common. The Jacobian
is kept as a sparse matrix of the pixels within `_REACH` of each source, and the damped normal
equations, sparse but for the rows of the background, are solved by a sparse factorisation. Memory
and time grow with the number of sources, not with its square. What a step is, when it is kept and
when the fit ends is as in `hyperjax.solver.advance`.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse
from scipy.sparse.linalg import SuperLU, splu

from hyperjax.models import (
    SHAPE,
    Chart,
    GaussianGroup,
    Normal,
    Problem,
    Scale,
    misfit,
    monomials,
    move_shape,
    precision,
    shape_chart,
    source_quadratics,
)
from hyperjax.solver import (
    CONVERGED,
    NO_DATA,
    RUNNING,
    Solution,
    Tolerances,
    blocked_by_bounds,
    converged,
    newton_decrement,
    next_damping,
    standing,
    still_to_gain,
)

__all__ = ["inverse_blocks", "solve_large"]

_REACH = 7.0  # of a source, in its larger sigma: 2e-11 of the peak
_COLUMNS = 96  # of the inverse at a time
_LEAST_PIVOT = 4 * np.finfo(np.float64).eps

_scale = jax.jit(GaussianGroup.scale, static_argnums=0)
_scaled = jax.jit(GaussianGroup.scaled, static_argnums=0)
_quadratics = jax.jit(jax.vmap(source_quadratics))
_precisions = jax.jit(jax.vmap(precision))
_charts = jax.jit(jax.vmap(shape_chart))
_moved = jax.jit(jax.vmap(move_shape))


class _Columns(NamedTuple):
    """Sparse weighted Jacobian of the sources (pixel, 6 slots), and their sum on the pixels."""

    jacobian: sparse.csc_array
    image: Float[np.ndarray, " pixel"]


def solve_large(
    model: GaussianGroup, problem: Problem, tolerances: Tolerances
) -> tuple[Solution, Scale]:
    """Solve one problem of any number of slots, in float64.

    Parameters
    ----------
    model
        The group; its loss may be any.
    problem
        As `GaussianGroup.scaled` takes it. A slot without a source has the peak 0 and nothing free.
    tolerances
        As of `hyperjax.solver`.

    Returns
    -------
    Solution
        As of `hyperjax.solver.solve_one`, with a sparse matrix in its normal equations.
    Scale
        The units that the solution is in.
    """
    with jax.enable_x64(True):
        scale = jax.tree.map(np.asarray, _scale(model, problem))
        scaled = jax.tree.map(np.asarray, _scaled(model, problem, scale))
        return _iterated(model, scaled, tolerances), scale


def inverse_blocks(
    matrix: sparse.csc_array, free: Bool[np.ndarray, " P"], slots: int
) -> Float[np.ndarray, "slot 6 6"]:
    """Blocks of each source in the inverse of the matrix over its free parameters.

    As `hyperjax.definite.inverse_over_free` has them: 0 for what is held, NaN for what is free but
    without any effect.
    """
    diagonal = matrix.diagonal()
    used = free & (diagonal > 0)
    root = np.where(used, 1 / np.sqrt(np.where(used, diagonal, 1)), 0)
    factor = _factor(matrix, root, np.where(used, _LEAST_PIVOT, 1))
    count = slots * SHAPE
    blocks = np.full((slots, SHAPE, SHAPE), np.nan)
    if factor is None:
        return blocks
    for first in range(0, count, _COLUMNS):
        columns = np.arange(first, min(first + _COLUMNS, count))
        unit = np.zeros((len(free), len(columns)))
        unit[columns, columns - first] = root[columns]
        inverse = root[columns, None] * factor.solve(unit)[columns]
        some = np.arange(len(columns) // SHAPE)
        own = inverse.reshape(len(some), SHAPE, len(some), SHAPE)[some, :, some]
        blocks[columns[0] // SHAPE + some] = own
    idle = (free & ~used)[:count].reshape(slots, SHAPE)
    return np.where(idle[:, :, None] | idle[:, None, :], np.nan, blocks)


def _iterated(model: GaussianGroup, problem: Problem, tolerances: Tolerances) -> Solution:
    """The iteration of `hyperjax.solver.advance` from the start to the end of one problem."""
    smooth = np.asarray(model.grid.vandermonde(model.order, np.dtype(np.float64)))
    params, candidate = problem.start, problem.start
    normal = _normal(model, problem, smooth, candidate)
    if not (problem.weight > 0).any():
        return Solution(params, normal, np.int32(0), np.int32(NO_DATA))
    trial, better, before = normal, True, np.float64(0)
    damping, growth = np.array(tolerances.damping), np.array(2.0)
    steps, status, predicted = 0, RUNNING, 1.0
    while status == RUNNING:
        if steps > 0:
            trial = _normal(model, problem, smooth, candidate)
            better = bool(trial.cost < normal.cost)
            gain = (normal.cost - trial.cost) / predicted
            damping, growth = map(np.asarray, next_damping(damping, growth, gain, better, False))
        if better:
            params, normal = candidate, trial
        chart, blocks = _chart(model, problem, params, np.asarray(normal.gradient))
        local = _to_local(normal, chart)
        blocked = np.asarray(blocked_by_bounds(problem, chart, local.gradient))
        diagonal = local.matrix.diagonal()
        step = _damped_step(local, diagonal, blocked, float(damping))
        clipped = np.clip(step, chart.lower - chart.value, chart.upper - chart.value)
        clipped = np.where(blocked, 0, clipped)
        predicted = -float(local.gradient @ clipped + 0.5 * clipped @ (local.matrix @ clipped))
        decrement = newton_decrement(local, blocked, step, damping)
        left = still_to_gain(decrement, before, np.asarray(better))
        steps += 1
        at_optimum = converged(params, local, diagonal, blocked, step, damping, left, tolerances)
        status = int(standing(at_optimum, damping, steps, tolerances))
        candidate = _retracted(problem, params, chart.value, blocks, clipped)
        if status == CONVERGED and predicted > 0:
            params = candidate
        predicted = predicted if predicted > 0 else abs(predicted) + 1e-30
        before = decrement if better else before
    return Solution(params, normal, np.int32(steps), np.int32(status))


def _normal(
    model: GaussianGroup,
    problem: Problem,
    smooth: Float[np.ndarray, "pixel monomial"],
    params: Float[np.ndarray, " P"],
) -> Normal:
    """Cost, gradient and Gauss-Newton matrix, the matrix sparse."""
    count = model.slots * SHAPE
    jacobian, image = _columns(model, problem, params[:count].reshape(-1, SHAPE))
    residual = problem.weight * (problem.data - image - smooth @ params[count:])
    cost, chi2, spread, pull = map(np.asarray, misfit(model.loss, residual, problem))
    pulled = sparse.csc_array(
        (jacobian.data * pull[jacobian.indices], jacobian.indices, jacobian.indptr),
        shape=jacobian.shape,
    )
    weighted = problem.weight[:, None] * smooth
    mixed = pulled.T @ weighted
    rows = [
        [jacobian.T @ pulled, sparse.csc_array(mixed)],
        [sparse.csc_array(mixed.T), sparse.csc_array(weighted.T @ (pull[:, None] * weighted))],
    ]
    gradient = -np.concatenate([jacobian.T @ (pull * residual), weighted.T @ (pull * residual)])
    return Normal(
        cost=cost + 0.5 * np.sum(problem.ridge * params**2),
        chi2=chi2,
        spread=spread,
        gradient=gradient + problem.ridge * params,
        matrix=(sparse.block_array(rows) + sparse.diags_array(problem.ridge)).tocsc(),
    )


def _columns(
    model: GaussianGroup, problem: Problem, sources: Float[np.ndarray, "slot 6"]
) -> _Columns:
    """The sources' columns of the Jacobian, on the pixels within `_REACH` of each."""
    x, y = model.grid.axes
    image = np.zeros((len(y), len(x)))
    pixel = np.arange(image.size).reshape(image.shape)
    weight = problem.weight.reshape(image.shape)
    precisions, quadratics = np.asarray(_precisions(sources[:, 3:])), _quadratics(sources)
    sigma = np.exp(sources[:, 3] + np.hypot(sources[:, 4], sources[:, 5]) / 2)
    there = problem.free[: sources.size].reshape(sources.shape).any(1) | (sources[:, 0] != 0)
    values, rows, sizes = [], [], np.zeros(len(sources), int)
    for k in np.flatnonzero(there):
        box = tuple(
            slice(*np.searchsorted(axis, [middle - _REACH * sigma[k], middle + _REACH * sigma[k]]))
            for axis, middle in ((y, sources[k, 2]), (x, sources[k, 1]))
        )
        own_y, own_x = y[box[0], None], x[box[1]]
        xx, xy, yy = precisions[k]
        dx, dy = own_x - sources[k, 1], own_y - sources[k, 2]
        unit = np.exp(-0.5 * (xx * dx**2 + 2 * xy * dx * dy + yy * dy**2))
        image[box] += sources[k, 0] * unit
        powers = np.stack([own_x**a * own_y**b for a, b in monomials(2)])
        columns = np.tensordot(np.asarray(quadratics[k]), powers, 1) * (unit * weight[box])
        values.append(columns.ravel())
        rows.append(np.tile(pixel[box].ravel(), SHAPE))
        sizes[k] = unit.size
    ends = np.concatenate([[0], np.cumsum(np.repeat(sizes, SHAPE))])
    parts = (np.concatenate([[], *values]), np.concatenate([np.zeros(0, int), *rows]), ends)
    return _Columns(sparse.csc_array(parts, shape=(image.size, sources.size)), image.ravel())


def _chart(
    model: GaussianGroup,
    problem: Problem,
    params: Float[np.ndarray, " P"],
    gradient: Float[np.ndarray, " P"],
) -> tuple[Chart, Float[np.ndarray, "slot 3 3"]]:
    """Local coordinates as of `GaussianGroup.chart`, the basis sparse, and its blocks of shapes."""
    sources, slopes, lower, upper = (
        leaf[: model.slots * SHAPE].reshape(-1, SHAPE)
        for leaf in (params, gradient, problem.lower, problem.upper)
    )
    low, high = lower[:, 3], upper[:, 3]
    blocks, shape, frozen, bend = map(np.asarray, _charts(sources, slopes, low, high))
    eye = np.eye(3)
    parts = [part for block in blocks for part in (eye, block)]
    rest = np.eye(len(params) - sources.size)
    turns = slice(5, sources.size, SHAPE)
    endless = np.full_like(low, np.inf)
    is_frozen, bends = np.zeros(len(params), bool), np.zeros(len(params))
    is_frozen[turns], bends[turns] = frozen, bend

    def with_shapes(leaf: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        out = leaf.copy()
        out[: sources.size].reshape(-1, SHAPE)[:, 3:] = shapes
        return out

    chart = Chart(
        basis=sparse.csc_array(sparse.block_diag([*parts, rest] if rest.size else parts)),
        value=with_shapes(params, shape),
        lower=with_shapes(problem.lower, np.stack([low, low, -endless], 1)),
        upper=with_shapes(problem.upper, np.stack([high, high, endless], 1)),
        frozen=is_frozen,
        bend=bends,
    )
    return chart, blocks


def _to_local(normal: Normal, chart: Chart) -> Normal:
    """The normal equations in the chart's coordinates."""
    matrix = chart.basis.T @ normal.matrix @ chart.basis + sparse.diags_array(chart.bend)
    return normal._replace(gradient=chart.basis.T @ normal.gradient, matrix=matrix.tocsc())


def _damped_step(
    local: Normal,
    diagonal: Float[np.ndarray, " P"],
    blocked: Bool[np.ndarray, " P"],
    damping: float,
) -> Float[np.ndarray, " P"]:
    """As `hyperjax.solver.damped_step`."""
    idle = blocked | (diagonal <= 0)
    scale = np.where(idle, 0, 1 / np.sqrt(np.where(idle, 1, diagonal)))
    factor = _factor(local.matrix, scale, np.where(idle, 1, damping))
    if factor is None:
        return np.full_like(local.gradient, np.nan)
    return np.asarray(scale * factor.solve(-scale * local.gradient))


def _factor(
    matrix: sparse.csc_array, scale: Float[np.ndarray, " P"], added: Float[np.ndarray, " P"]
) -> SuperLU | None:
    """Factors of a symmetric matrix, scaled from both sides, plus a diagonal; None if singular."""
    diagonal = sparse.diags_array(scale)
    whole = (diagonal @ matrix @ diagonal + sparse.diags_array(added)).tocsc()
    options = {"SymmetricMode": True}
    try:
        return splu(whole, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
    except RuntimeError as error:
        if "singular" not in str(error):
            raise
        return None


def _retracted(
    problem: Problem,
    params: Float[np.ndarray, " P"],
    value: Float[np.ndarray, " P"],
    blocks: Float[np.ndarray, "slot 3 3"],
    step: Float[np.ndarray, " P"],
) -> Float[np.ndarray, " P"]:
    """As `GaussianGroup.retract`."""
    count = len(blocks) * SHAPE
    shapes = [leaf[:count].reshape(-1, SHAPE)[:, 3:] for leaf in (params, value, step)]
    low, high = problem.lower[3:count:SHAPE], problem.upper[3:count:SHAPE]
    out = np.clip(params + step, problem.lower, problem.upper)
    moved = _moved(shapes[0], blocks, shapes[1], shapes[2], low, high)
    out[:count].reshape(-1, SHAPE)[:, 3:] = moved
    return out
