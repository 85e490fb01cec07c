"""Derivatives of fitted parameters with respect to the data, the weights and the bounds.

`fit_parameters` finds the optimum that `hyperjax.fit_groups` finds from a single start, inside
jax's transformations. It is not the iterations that are differentiated but the conditions that hold
at their end (the implicit function theorem; Blondel et al. 2022, arXiv:2105.15183): in the local
coordinates q of the optimum (`models.Chart`) some, B, rest on their bounds b or are held, and along
the others, F, the slope of the cost is zero. So

    dq_B = db,    H_FF dq_F = -d(slope)_F - H_FB dq_B,

with H the exact second derivatives of the cost and d(slope) the change of the slope at a fixed
point. This is linear in the changes, so reverse mode is its transpose.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Bool, Float, Int

from hyperjax.batches import FitOptions, GroupBatch, check_shapes, shapes_partly_held
from hyperjax.errors import FitInputError
from hyperjax.fitting import lanes_for, tolerances_of
from hyperjax.models import AxesGroup, Chart, GaussianGroup, Grid, Model, Problem
from hyperjax.parts import Packed
from hyperjax.solver import Tolerances, blocked_by_bounds, solve_lanes
from hyperjax.units import to_parameters, to_problems

__all__ = ["fit_parameters"]

_IN_COST = ("data", "weight", "ridge", "f_scale")  # of a problem


def fit_parameters(
    batch: GroupBatch,
    options: FitOptions = FitOptions(),  # noqa: B008
    *,
    highest_order: int = 2,
) -> tuple[Float[Array, "group slot 6"], Float[Array, "group monomial"]]:
    """Fitted parameters as a differentiable function of data, weights and bounds.

    A pure function for `jax.jit`, `vmap`, `grad` and `jvp`, in the precision of its arguments;
    derivatives want float64 (`jax.enable_x64`). Values are not checked, only shapes. There are no
    other starts (`FitOptions.other_starts`): for blends that need one, take the start from the
    `params` of `hyperjax.fit_groups`.

    Parameters
    ----------
    batch
        As for `hyperjax.fit_groups`. Data, weight, lower and upper have derivatives (bounds where
        they are active). The start has none, but for parameters that are held at it.
    options
        As for `hyperjax.fit_groups`, but the iteration goes on to the last digit unless `ftol` is
        given: derivatives are as exact as the optimum. `loss` must be known at compile time.
    highest_order
        Highest order of the backgrounds, 0 to 4, known at compile time.

    Returns
    -------
    params
        (group, slot, 6) peak, x, y, sigma_major, sigma_minor, theta. The angle of a circular
        source has no derivative; it is given as 0. Where something, but not all, of a shape is held
        the axes of all sources are as they are named (sigma_major may be the smaller one), and the
        start must be near. Take it from `hyperjax.fit_groups`; where that has exchanged the axes of
        a source (what was held is in the other place), exchange them back. `free` must be known at
        compile time then; where it is not, such groups are NaN.
    coefficients
        (group, monomial) of the background, as `FitResult.coefficients`.

    Raises
    ------
    FitInputError
        If shapes or options are inconsistent, or an order in the batch is above the highest.

    Examples
    --------
    How the peaks' sum depends on every pixel::

        def total(data):
            params, _ = fit_parameters(batch._replace(data=data))
            return params[..., 0].sum()

        with jax.enable_x64(True):
            slope = jax.jit(jax.grad(total))(batch.data)
    """
    known = _known(batch)
    batch = GroupBatch(*(jnp.asarray(leaf) for leaf in batch))
    check_shapes(batch, options)
    if known.order is not None and known.order.max() > highest_order:
        raise FitInputError(f"order: {known.order.max()} is above highest_order, {highest_order}")
    batch = batch._replace(free=batch.free.astype(bool), present=batch.present.astype(bool))
    partly = known.free is not None and shapes_partly_held(known.free).any()
    _, ny, nx = batch.data.shape
    kind = AxesGroup if partly else GaussianGroup
    model = kind(Grid((ny, nx)), batch.start.shape[1], highest_order, options.loss)
    problems = jax.tree.map(jnp.asarray, to_problems(jnp, model, batch, options))
    scale = jax.vmap(model.scale)(problems)
    problems = jax.vmap(model.scaled)(problems, scale)
    exact = 0.0 if options.ftol is None else options.ftol
    tolerances = tolerances_of(options._replace(ftol=exact), ny * nx, batch.data.dtype)
    solved = optimum(model, problems, jax.tree.map(jnp.asarray, tolerances))
    params, coefficients = to_parameters(jnp, model, batch, scale, solved)
    if known.free is None:
        unfit = shapes_partly_held(batch.free & batch.present[..., None])
        params = jnp.where(unfit[:, None, None], jnp.nan, params)
        coefficients = jnp.where(unfit[:, None], jnp.nan, coefficients)
    return params, coefficients


class _Known(NamedTuple):
    """Parts of a batch that are known while it is traced; None where they are not.

    A slot counts as present where that is not known.
    """

    order: Int[np.ndarray, " group"] | None
    free: Bool[np.ndarray, "group slot 6"] | None


def _known(batch: GroupBatch) -> _Known:
    def value(leaf: Array) -> np.ndarray | None:
        return None if isinstance(leaf, jax.core.Tracer) else np.asarray(leaf)

    free, present = value(batch.free), value(batch.present)
    if free is not None and present is not None and free.shape[:-1] == present.shape:
        free = free & present[..., None].astype(bool)
    return _Known(value(batch.order), free)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def optimum(model: Model, problems: Problem, tolerances: Tolerances) -> Float[Array, "group P"]:
    """The parameters at the optimum of each problem (leading axis)."""
    lanes = lanes_for(model, problems.data.dtype)
    ready = Packed(jax.vmap(model.prepare)(problems), lambda problem: problem)
    solutions = solve_lanes(model, ready, tolerances, lanes)
    return jax.vmap(solutions.unpack)(solutions.arrays).params


@optimum.defjvp
def _optimum_jvp(
    model: Model,
    primals: tuple[Problem, Tolerances],
    tangents: tuple[Problem, Tolerances],
) -> tuple[Float[Array, "group P"], Float[Array, "group P"]]:
    problems, tolerances = primals
    params = optimum(model, problems, tolerances)
    moving = {name: getattr(tangents[0], name) for name in (*_IN_COST, "start", "lower", "upper")}
    return params, jax.vmap(functools.partial(_response, model))(params, problems, moving)


def _response(
    model: Model, params: Float[Array, " P"], problem: Problem, change: dict[str, Array]
) -> Float[Array, " P"]:
    """Change of the optimum with that of the problem, to first order."""

    def gradient_of(params: Array, *values: Array) -> Array:
        changed = problem._replace(**dict(zip(_IN_COST, values, strict=True)))
        return jax.grad(model.cost)(params, changed)

    now = [getattr(problem, name) for name in _IN_COST]
    gradient, push = jax.linearize(gradient_of, params, *now)
    still = [jnp.zeros_like(value) for value in now]
    curvature = jax.vmap(lambda step: push(step, *still))(jnp.eye(model.size, dtype=params.dtype))
    pushed = push(jnp.zeros_like(params), *(change[name] for name in _IN_COST))

    chart = model.chart(params, gradient, problem)
    blocked = blocked_by_bounds(problem, chart, chart.basis.T @ gradient)
    hessian = chart.basis.T @ curvature @ chart.basis + _bend(model, params, chart, gradient)
    carried = _carried(model, params, problem, chart, blocked, change)
    right = chart.basis.T @ pushed + hessian @ carried
    return chart.basis @ (carried - _solved(hessian, blocked, right))


def _bend(
    model: Model, params: Float[Array, " P"], chart: Chart, gradient: Float[Array, " P"]
) -> Float[Array, "P P"]:
    """Second derivatives of the cost that come from the local coordinates being curved."""
    here = jnp.zeros_like(params)
    return jax.hessian(lambda step: gradient @ model.path(params, chart, step))(here)


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
        moved = problem._replace(lower=lower, upper=upper)
        there = model.chart(params, jnp.zeros_like(params), moved)
        return there.lower, there.upper

    _, (lower, upper) = jax.jvp(
        bounds, (problem.lower, problem.upper), (change["lower"], change["upper"])
    )
    start = _inverse(chart.basis) @ change["start"]
    at_lower = chart.value - chart.lower < chart.upper - chart.value
    bound = jnp.where(at_lower, lower, upper)
    return jnp.where(~problem.free, start, jnp.where(blocked & ~chart.frozen, bound, 0))


def _solved(
    hessian: Float[Array, "P P"], blocked: Bool[Array, " P"], right: Float[Array, " P"]
) -> Float[Array, " P"]:
    """Solution of H_FF q_F = right_F; 0 for the blocked coordinates."""
    diagonal = jnp.abs(jnp.diagonal(hessian))
    idle = blocked | (diagonal == 0)
    scale = jnp.where(idle, 0, 1 / jnp.sqrt(jnp.where(idle, 1, diagonal)))
    scaled = hessian * scale[:, None] * scale + jnp.diag(idle.astype(hessian.dtype))
    return scale * (_inverse(scaled) @ (scale * right))


_inverse = sequential_vmap(jnp.linalg.inv)  # one at a time: see `hyperjax.definite`
