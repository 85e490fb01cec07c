"""Bounded Levenberg-Marquardt: one step of it, and many problems at once in persistent lanes.

`advance` is one iteration on one problem. `solve_lanes` runs it over a stack of problems: a fixed
number of lanes iterate together, and a lane whose problem has ended writes its result and loads the
next one, so that the work is the sum of the problems' iterations and not the slowest problem's.
`hyperjax.least_squares` offers the same iteration as an optimistix solver.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hyperjax.definite import solve_definite
from hyperjax.models import Chart, Normal, Objective, Problem
from hyperjax.parts import Packed, apart, packed

RUNNING, CONVERGED, STEP_LIMIT, SINGULAR, NO_DATA = range(5)
"""How a problem stands: still running; at its optimum; out of steps; no descent found, though not
at an optimum; without a single valid pixel."""

FIRST_DAMPING = 1e-2
_LEAST_DAMPING = 1e-9
_MOST_DAMPING = 1e12
_LEAST_RATIO = 0.05  # of successive decrements


class Tolerances(NamedTuple):
    """When to stop, and how to begin; data, so that changing them compiles nothing.

    Attributes
    ----------
    ftol
        Relative reduction of the cost that is still to be had when the last step has been taken.
    xtol
        Length of the next step relative to the parameters (MINPACK's xtol; scaled coordinates).
    gtol
        Largest cosine between the residuals and a column of the Jacobian (MINPACK's gtol).
    max_steps
        Evaluations of the model.
    atol
        Reduction of the cost that is still to be had and is rounding, whatever the cost: data
        without noise have none.
    damping
        Marquardt's lambda of the first step.
    """

    ftol: Float[Array, ""]
    xtol: Float[Array, ""]
    gtol: Float[Array, ""]
    max_steps: Int[Array, ""]
    atol: Float[Array, ""] | float = 0.0
    damping: Float[Array, ""] | float = FIRST_DAMPING


class State(NamedTuple):
    """Where the iteration of one problem stands."""

    params: Float[Array, " P"]
    candidate: Float[Array, " P"]
    normal: Normal
    predicted: Float[Array, ""]
    decrement: Float[Array, ""]
    damping: Float[Array, ""]
    growth: Float[Array, ""]
    steps: Int[Array, ""]
    status: Int[Array, ""]


class Solution(NamedTuple):
    """Optimum of one problem: parameters, normal equations there, steps and status."""

    params: Float[Array, " P"]
    normal: Normal
    steps: Int[Array, ""]
    status: Int[Array, ""]


def begin(model: Objective, problem: Problem, tolerances: Tolerances) -> State:
    """The state before the first evaluation."""
    size, dtype = model.size, problem.start.dtype
    nowhere = Normal(
        jnp.asarray(jnp.inf, dtype),
        jnp.zeros((), dtype),
        jnp.zeros((), dtype),
        jnp.zeros(size, dtype),
        jnp.zeros((size, size), dtype),
    )
    return State(
        params=problem.start,
        candidate=problem.start,
        normal=nowhere,
        predicted=jnp.ones((), dtype),
        decrement=jnp.zeros((), dtype),
        damping=jnp.asarray(tolerances.damping, dtype),
        growth=jnp.asarray(2.0, dtype),
        steps=jnp.zeros((), jnp.int32),
        status=jnp.asarray(RUNNING, jnp.int32),
    )


def advance(
    model: Objective,
    problem: Problem | Packed[Problem],
    state: State | Packed[State],
    tolerances: Tolerances,
) -> State:
    """One iteration: evaluate the candidate, keep it if it is better, propose the next.

    Steps are damped by lambda times the diagonal of the Gauss-Newton matrix (Marquardt 1963),
    lambda follows Nielsen's rule (1999, IMM-REP-1999-05). Bounds are kept by projection:
    coordinates that are on a bound and pushed outwards are left out of the step, the others are
    clipped at theirs (Bertsekas 1982, SIAM J. Control Optim. 20, 221).

    The step that the tolerances find small enough to stop is still taken, but not evaluated:
    `normal` stays that of the point before it.
    """
    trial = apart(functools.partial(_trial, model))(problem, state)
    state, better = apart(_judged)(state, trial)
    chart = apart(functools.partial(_chart, model))(state, problem)
    here = apart(_here)(state, problem, chart)
    step = apart(damped_step)(here.local, here.blocked, state.damping)
    return apart(functools.partial(_proposed, model))(
        problem, state, here, step, better, tolerances
    )


def _trial(model: Objective, problem: Problem, state: State) -> Normal:
    return model.normal(state.candidate, problem)


def _judged(state: State, trial: Normal) -> tuple[State, Bool[Array, ""]]:
    """The state at the better of its point and the candidate, and whether that is the candidate.

    `trial` is the candidate's evaluation.
    """
    gain = (state.normal.cost - trial.cost) / state.predicted
    first = state.steps == 0
    better = first | ((trial.cost < state.normal.cost) & jnp.isfinite(trial.cost))
    damping, growth = next_damping(state.damping, state.growth, gain, better, first)
    state = state._replace(
        params=jnp.where(better, state.candidate, state.params),
        normal=jax.tree.map(lambda new, old: jnp.where(better, new, old), trial, state.normal),
        damping=damping,
        growth=growth,
        steps=state.steps + 1,
    )
    return state, better


class _Here(NamedTuple):
    """The point of a state in the coordinates of its chart; `blocked` ones do not move."""

    chart: Chart
    local: Normal
    blocked: Bool[Array, " P"]


def _chart(model: Objective, state: State, problem: Problem) -> Chart:
    return model.chart(state.params, state.normal.gradient, problem)


def _here(state: State, problem: Problem, chart: Chart) -> _Here:
    local = to_local(state.normal, chart)
    return _Here(chart, local, blocked_by_bounds(problem, chart, local.gradient))


def _proposed(
    model: Objective,
    problem: Problem,
    state: State,
    here: _Here,
    step: Float[Array, " P"],
    better: Bool[Array, ""],
    tolerances: Tolerances,
) -> State:
    """The state with its next candidate, or at its end."""
    chart, local, blocked = here
    clipped = jnp.clip(step, chart.lower - chart.value, chart.upper - chart.value)
    clipped = jnp.where(blocked, 0, clipped)
    predicted = -(local.gradient @ clipped + 0.5 * clipped @ local.matrix @ clipped)

    decrement = newton_decrement(local, blocked, step, state.damping)
    left = still_to_gain(decrement, state.decrement, better)
    diagonal = jnp.diagonal(local.matrix)
    at_optimum = converged(
        state.params, local, diagonal, blocked, step, state.damping, left, tolerances
    )
    status = standing(at_optimum, state.damping, state.steps, tolerances)
    candidate = model.retract(state.params, chart, clipped, problem)
    last = (status == CONVERGED) & (predicted > 0)
    return state._replace(
        params=jnp.where(last, candidate, state.params),
        candidate=candidate,
        predicted=jnp.where(predicted > 0, predicted, jnp.abs(predicted) + 1e-30),
        decrement=jnp.where(better, decrement, state.decrement),
        status=status.astype(jnp.int32),
    )


def next_damping(
    damping: Float[Array, ""],
    growth: Float[Array, ""],
    gain: Float[Array, ""],
    better: Bool[Array, ""],
    first: Bool[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Damping, and its growth at the next failure, after a step with this `gain`: Nielsen's rule.

    `gain` is the reduction of the cost over that predicted; the `first` point is no step.
    """
    shrink = jnp.maximum(1 / 3, 1 - (2 * jnp.minimum(gain, 1) - 1) ** 3).astype(damping.dtype)
    after = damping * jnp.where(first, 1, jnp.where(better, shrink, growth))
    grown = jnp.where(better, 2.0, 2 * growth).astype(damping.dtype)
    return jnp.maximum(after, _LEAST_DAMPING), grown


def standing(
    at_optimum: Bool[Array, ""],
    damping: Float[Array, ""],
    steps: Int[Array, ""],
    tolerances: Tolerances,
) -> Int[Array, ""]:
    """How a problem stands after an iteration."""
    running = jnp.where(steps >= tolerances.max_steps, STEP_LIMIT, RUNNING)
    return jnp.where(at_optimum, CONVERGED, jnp.where(damping > _MOST_DAMPING, SINGULAR, running))


def to_local(normal: Normal, chart: Chart) -> Normal:
    """The normal equations in the chart's coordinates."""
    return Normal(
        normal.cost,
        normal.chi2,
        normal.spread,
        chart.basis.T @ normal.gradient,
        chart.basis.T @ normal.matrix @ chart.basis + jnp.diag(chart.bend),
    )


def blocked_by_bounds(
    problem: Problem, chart: Chart, gradient: Float[Array, " P"]
) -> Bool[Array, " P"]:
    """Coordinates that must not move: not free, or on a bound with the descent pointing out."""
    slack = 8 * jnp.finfo(gradient.dtype).eps * (1 + jnp.abs(chart.value))
    at_lower = (chart.value <= chart.lower + slack) & (gradient > 0)
    at_upper = (chart.value >= chart.upper - slack) & (gradient < 0)
    return ~problem.free | chart.frozen | at_lower | at_upper


def damped_step(
    normal: Normal, blocked: Bool[Array, " P"], damping: Float[Array, ""]
) -> Float[Array, " P"]:
    """Minus the gradient over the damped matrix, with blocked coordinates at rest.

    The matrix is scaled to a unit diagonal before the equations are solved.
    """
    diagonal = jnp.diagonal(normal.matrix)
    idle = blocked | (diagonal <= 0)
    scale = jnp.where(idle, 0, 1 / jnp.sqrt(jnp.where(idle, 1, diagonal)))
    scaled = normal.matrix * scale[:, None] * scale
    damped = scaled + jnp.diag(jnp.where(idle, 1, damping).astype(scale.dtype))
    return scale * solve_definite(damped, (-scale * normal.gradient)[:, None])[:, 0]


def newton_decrement(
    local: Normal, blocked: Bool[Array, " P"], step: Float[Array, " P"], damping: Float[Array, ""]
) -> Float[Array, ""]:
    """Reduction of the cost that an undamped step promises, from a damped one."""
    return -0.5 * jnp.where(blocked, 0, local.gradient) @ step * (1 + damping)


def still_to_gain(
    decrement: Float[Array, ""], before: Float[Array, ""], better: Bool[Array, ""]
) -> Float[Array, ""]:
    """Reduction of the cost that is left after a step with this `decrement`.

    Decrements shrink from step to step by a ratio that hardly changes near the optimum, as long as
    steps are accepted; the sum of those to come is a geometric series. Far from it they may shrink
    faster once: a small ratio is not believed.
    """
    ratio = jnp.maximum(decrement / jnp.where(before > 0, before, decrement), _LEAST_RATIO)
    shrinking = better & (ratio < 0.5)
    return jnp.where(shrinking, decrement * ratio / (1 - ratio), decrement)


def converged(
    params: Float[Array, " P"],
    local: Normal,
    diagonal: Float[Array, " P"],
    blocked: Bool[Array, " P"],
    step: Float[Array, " P"],
    damping: Float[Array, ""],
    left: Float[Array, ""],
    tolerances: Tolerances,
) -> Bool[Array, ""]:
    """Whether one of the three tolerances is met on the coordinates that can move.

    `diagonal` is that of the local matrix.
    """
    gradient = jnp.where(blocked, 0, local.gradient)
    cosine = jnp.abs(gradient) / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1) * 2 * local.cost)
    length = jnp.linalg.norm(step) * (1 + damping)
    return (
        (left <= tolerances.ftol * local.cost + tolerances.atol)
        | (jnp.max(cosine) <= tolerances.gtol)
        | (length <= tolerances.xtol * (tolerances.xtol + jnp.linalg.norm(params)))
    )


def solve_lanes(
    model: Objective,
    problems: Packed[Problem],
    tolerances: Tolerances,
    lanes: int,
    count: Int[Array, ""] | None = None,
) -> Packed[Solution]:
    """Iterate a stack of prepared problems to their ends, `lanes` at a time.

    Only the first `count` are solved (all, unless given); the others are padding, and come back as
    zeros. A lane whose problem has ended has its steps set to 0: it begins with the next one. What
    lanes load, carry and write is packed: each array is an operation of its own.
    """
    size = len(jax.tree.leaves(problems.arrays)[0])
    count = jnp.asarray(size) if count is None else count
    lanes = min(lanes, size)
    one = problems.unpack(jax.tree.map(lambda leaf: leaf[0], problems.arrays))
    blank = packed(begin(model, one, tolerances))
    begun = blank.arrays[2 * model.size :]  # after params and candidate
    empty = packed(_solution(blank.unpack(blank.arrays)))
    rest_of = packed(one._replace(data=(), weight=())).unpack

    def loaded_of(arrays: tuple[Array, Array, Array]) -> Problem:
        data, weight, rest = arrays
        return rest_of(rest)._replace(data=data, weight=weight)

    def load(
        index: Int[Array, " lane"], states: Float[Array, "lane value"]
    ) -> tuple[Any, Float[Array, "lane value"]]:
        rows = jax.tree.map(lambda leaf: leaf.at[index].get(mode="clip"), problems.arrays)
        problem = jax.vmap(problems.unpack)(rows)
        first = jnp.concatenate([problem.start, problem.start, jnp.tile(begun, (lanes, 1))], 1)
        fresh = jax.vmap(blank.unpack)(states).steps == 0
        pixels = problem.data, problem.weight
        rest = jax.vmap(packed)(problem._replace(data=(), weight=()))
        return (*pixels, rest.arrays), jnp.where(fresh[:, None], first, states)

    def store(places, state, results):  # type: ignore[no-untyped-def]
        index, following = places[:-1], places[-1]
        ended = (state.status != RUNNING) & (index < count)
        slot = jnp.where(ended, index, size)
        solutions = jax.vmap(lambda state: packed(_solution(state)).arrays)(state)
        results = results.at[slot].set(solutions, mode="drop")
        index = jnp.where(ended, following + jnp.cumsum(ended) - 1, index)
        places = jnp.append(index, following + jnp.sum(ended)).astype(places.dtype)
        state = state._replace(steps=jnp.where(ended, 0, state.steps))
        return places, jax.vmap(lambda state: packed(state).arrays)(state), results

    def trip(carry):  # type: ignore[no-untyped-def]
        places, states, results = carry  # of the lanes' problems, and the next to load
        loaded, states = apart(load)(places[:-1], states)
        problem, state = Packed(loaded, loaded_of), Packed(states, blank.unpack)
        state = jax.vmap(lambda p, s: advance(model, p, s, tolerances))(problem, state)
        return apart(store)(places, state, results)

    carry = (
        jnp.arange(lanes + 1),
        jnp.zeros((lanes, len(blank.arrays)), blank.arrays.dtype),
        jnp.zeros((size, len(empty.arrays)), empty.arrays.dtype),
    )
    results = lax.while_loop(lambda c: jnp.any(c[0][:-1] < count), trip, carry)[-1]
    return Packed(results, empty.unpack)


def _solution(state: State) -> Solution:
    return Solution(state.params, state.normal, state.steps, state.status)
