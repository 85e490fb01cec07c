"""Derivatives of fitted parameters with respect to the data, the weights and the bounds.

`fit_parameters` finds the same optimum as `hyperjax.fit_groups`, inside jax's transformations. It
is not the iterations that are differentiated but the conditions that hold at their end (the
implicit function theorem; Blondel et al. 2022, arXiv:2105.15183): in the local coordinates q of the
optimum (`models.Chart`) some, B, rest on their bounds b or are held, and along the others, F, the
slope of the cost is zero. So

    dq_B = db,    H_FF dq_F = -d(slope)_F - H_FB dq_B,

with H the exact second derivatives of the cost and d(slope) the change of the slope at a fixed
point. This is linear in the changes, so reverse mode is its transpose.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from hyperjax.fitting import (
    FitOptions,
    GroupBatch,
    check_shapes,
    lanes_for,
    to_parameters,
    to_problems,
    tolerances_of,
)
from hyperjax.models import Chart, GaussianGroup, Grid, Model, Problem
from hyperjax.solver import Tolerances, blocked_by_bounds, solve_lanes

__all__ = ["fit_parameters"]

_POLISH = 2  # Newton steps behind the iteration's own end


def fit_parameters(
    batch: GroupBatch,
    options: FitOptions = FitOptions(),  # noqa: B008
    *,
    highest_order: int = 2,
) -> tuple[Float[Array, "group slot 6"], Float[Array, "group monomial"]]:
    """Fitted parameters as a differentiable function of data, weights and bounds.

    A pure function for `jax.jit`, `vmap`, `grad` and `jvp`, in the precision of its arguments;
    derivatives want float64 (`jax.enable_x64`). Values are not checked, only shapes.

    Parameters
    ----------
    batch
        As for `hyperjax.fit_groups`. Data, weight, lower and upper have derivatives (bounds where
        they are active). The start has none, but for parameters that are held at it.
    options
        As for `hyperjax.fit_groups`; `loss` must be known at compile time.
    highest_order
        Highest order of the backgrounds, 0 to 4, known at compile time. The orders in the batch
        must not be above it.

    Returns
    -------
    params
        (group, slot, 6) peak, x, y, sigma_major, sigma_minor, theta. The angle of a circular
        source has no derivative; it is given as 0.
    coefficients
        (group, monomial) of the background, as `FitResult.coefficients`.

    Examples
    --------
    How the peaks' sum depends on every pixel::

        def total(data):
            params, _ = fit_parameters(batch._replace(data=data))
            return params[..., 0].sum()

        with jax.enable_x64(True):
            slope = jax.jit(jax.grad(total))(batch.data)
    """
    batch = GroupBatch(*(jnp.asarray(leaf) for leaf in batch))
    check_shapes(batch, options)
    _, ny, nx = batch.data.shape
    model = GaussianGroup(Grid((ny, nx)), batch.start.shape[1], highest_order, options.loss)
    problems, scale = to_problems(jnp, model, batch, options)
    tolerances = tolerances_of(options, batch.data.dtype)
    problems = jax.tree.map(jnp.asarray, problems)
    solved = optimum(model, problems, jax.tree.map(jnp.asarray, tolerances))
    return to_parameters(jnp, model, batch, scale, solved)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def optimum(model: Model, problems: Problem, tolerances: Tolerances) -> Float[Array, "group P"]:
    """The parameters at the optimum of each problem (leading axis)."""
    lanes = lanes_for(model, problems.data.dtype)
    every = jnp.asarray(len(problems.data))
    params = solve_lanes(model, problems, tolerances, lanes, every).params
    polish = jax.vmap(functools.partial(_polished, model))
    return lax.fori_loop(0, _POLISH, lambda _, params: polish(params, problems), params)


@optimum.defjvp
def _optimum_jvp(
    model: Model,
    primals: tuple[Problem, Tolerances],
    tangents: tuple[Problem, Tolerances],
) -> tuple[Float[Array, "group P"], Float[Array, "group P"]]:
    problems, tolerances = primals
    params = optimum(model, problems, tolerances)
    change = jax.vmap(functools.partial(_response, model))(params, problems, _moving(tangents[0]))
    return params, change


def _moving(change: Problem) -> dict[str, Array]:
    """The changes of what has derivatives: `free` is yes or no, `weight_moments` is derived."""
    named = change._asdict()
    return {name: named[name] for name in named if name not in ("free", "weight_moments")}


def _slope(
    model: Model, params: Float[Array, " P"], chart: Chart, problem: Problem
) -> Float[Array, " P"]:
    """Derivative of the cost along the local coordinates, at `params`."""
    return _slope_after(model, params, chart, problem, jnp.zeros_like(params))


def _slope_after(
    model: Model,
    params: Float[Array, " P"],
    chart: Chart,
    problem: Problem,
    step: Float[Array, " P"],
) -> Float[Array, " P"]:
    """The same, after a local step."""
    return jax.grad(lambda step: model.cost(model.path(params, chart, step), problem))(step)


def _here(
    model: Model, params: Float[Array, " P"], problem: Problem
) -> tuple[Chart, Float[Array, " P"], Bool[Array, " P"]]:
    """The local coordinates at `params`, the slope along them, and which must not move."""
    chart = model.chart(params, jax.grad(model.cost)(params, problem), problem)
    slope = _slope(model, params, chart, problem)
    return chart, slope, blocked_by_bounds(problem, chart, slope)


def _hessian(
    model: Model, params: Float[Array, " P"], chart: Chart, problem: Problem
) -> Float[Array, "P P"]:
    """Exact second derivatives of the cost along the local coordinates."""
    here = jnp.zeros_like(params)
    return jax.jacfwd(lambda step: _slope_after(model, params, chart, problem, step))(here)


def _solved(
    hessian: Float[Array, "P P"], blocked: Bool[Array, " P"], right: Float[Array, " P"]
) -> Float[Array, " P"]:
    """Solution of H_FF q_F = right_F; 0 for the blocked coordinates."""
    diagonal = jnp.abs(jnp.diagonal(hessian))
    idle = blocked | (diagonal == 0)
    scale = jnp.where(idle, 0, 1 / jnp.sqrt(jnp.where(idle, 1, diagonal)))
    scaled = hessian * scale[:, None] * scale + jnp.diag(idle.astype(hessian.dtype))
    return scale * jnp.linalg.solve(scaled, scale * right)


def _polished(model: Model, params: Float[Array, " P"], problem: Problem) -> Float[Array, " P"]:
    """One Newton step further, if it does not raise the cost."""
    chart, slope, blocked = _here(model, params, problem)
    step = -_solved(_hessian(model, params, chart, problem), blocked, slope)
    clipped = jnp.clip(step, chart.lower - chart.value, chart.upper - chart.value)
    moved = model.retract(params, chart, jnp.where(blocked, 0, clipped), problem)
    better = model.cost(moved, problem) <= model.cost(params, problem) * (1 + 1e-12)
    return jnp.where(better, moved, params)


def _response(
    model: Model, params: Float[Array, " P"], problem: Problem, change: dict[str, Array]
) -> Float[Array, " P"]:
    """Change of the optimum with that of the problem, to first order."""
    chart, _, blocked = _here(model, params, problem)
    names = ("data", "weight", "ridge", "f_scale")

    def slope_of(*values: Array) -> Float[Array, " P"]:
        changed = problem._replace(**dict(zip(names, values, strict=True)))
        return _slope(model, params, chart, changed)

    now = tuple(getattr(problem, name) for name in names)
    _, pushed = jax.jvp(slope_of, now, tuple(change[name] for name in names))
    carried = _carried(model, params, problem, chart, blocked, change)
    hessian = _hessian(model, params, chart, problem)
    local = carried - _solved(hessian, blocked, pushed + hessian @ carried)
    return chart.basis @ local


def _carried(
    model: Model,
    params: Float[Array, " P"],
    problem: Problem,
    chart: Chart,
    blocked: Bool[Array, " P"],
    change: dict[str, Array],
) -> Float[Array, " P"]:
    """Local change of the coordinates that rest on a bound or are held; 0 for the others."""

    def bounds(lower: Array, upper: Array) -> tuple[Array, Array]:
        moved = model.chart(
            params, jnp.zeros_like(params), problem._replace(lower=lower, upper=upper)
        )
        return moved.lower, moved.upper

    _, (lower, upper) = jax.jvp(
        bounds, (problem.lower, problem.upper), (change["lower"], change["upper"])
    )
    start = jnp.linalg.solve(chart.basis, change["start"])
    at_lower = chart.value - chart.lower < chart.upper - chart.value
    bound = jnp.where(at_lower, lower, upper)
    return jnp.where(~problem.free, start, jnp.where(blocked & ~chart.frozen, bound, 0))
