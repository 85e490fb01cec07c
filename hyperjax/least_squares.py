"""The bounded Levenberg-Marquardt of the fits as an optimistix solver, for any residual function.

One problem at a time, with an automatic Jacobian::

    optx.least_squares(residuals, BoundedLevenbergMarquardt(), y0, args, options={"lower": 0.0})
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from hyperjax.models import Normal, Objective, Problem
from hyperjax.solver import RUNNING, SINGULAR, State, Tolerances, advance, begin

__all__ = ["BoundedLevenbergMarquardt"]

_UNLIMITED = 2**31 - 1


class BoundedLevenbergMarquardt(optx.AbstractLeastSquaresSolver):
    """Levenberg-Marquardt with bounds, for `optimistix.least_squares`.

    Its step is `hyperjax.solver.advance`, that of `hyperjax.fit_groups`: damping in units of the
    diagonal of J^T J, bounds by projection. `options` may hold `lower` and `upper`: numbers, or
    PyTrees of the structure of y0 or of a prefix of it. A start outside them is moved onto them.

    It stops as soon as one of the three tolerances is met (`hyperjax.solver.Tolerances`).
    optimistix' own implicit derivatives hold where no bound is active; for derivatives of fits
    with active bounds see `hyperjax.fit_parameters`.

    Attributes
    ----------
    ftol
        Relative reduction of the cost that is still to be had when the last step has been taken.
    xtol
        Length of the next step relative to that of the parameters.
    gtol
        Largest cosine between the residuals and a column of the Jacobian.
    """

    ftol: float = 1e-12
    xtol: float = 1e-10
    gtol: float = 0.0

    @property
    def rtol(self) -> float:
        """`ftol`, under optimistix' name."""
        return self.ftol

    @property
    def atol(self) -> float:
        """Zero: all tolerances are relative."""
        return 0.0

    @property
    def norm(self) -> Callable[[PyTree], Array]:
        """The norm of steps and parameters."""
        return optx.two_norm

    def init(
        self,
        fn: Callable,
        y: PyTree,
        args: PyTree,
        options: dict[str, Any],
        f_struct: PyTree,
        aux_struct: PyTree,
        tags: frozenset[object],
    ) -> State:
        """The state before the first evaluation."""
        problem = _bounded(y, options)
        return begin(_Residuals(fn, args, y), problem, self._tolerances(problem.start.dtype))

    def _tolerances(self, dtype: jnp.dtype) -> Tolerances:
        return Tolerances(
            ftol=jnp.asarray(self.ftol, dtype),
            xtol=jnp.asarray(self.xtol, dtype),
            gtol=jnp.asarray(self.gtol, dtype),
            max_steps=jnp.asarray(_UNLIMITED, jnp.int32),  # optimistix counts them
        )

    def step(
        self,
        fn: Callable,
        y: PyTree,
        args: PyTree,
        options: dict[str, Any],
        state: State,
        tags: frozenset[object],
    ) -> tuple[PyTree, State, PyTree]:
        """Evaluate the candidate, keep it if it is better, and propose the next."""
        tolerances = self._tolerances(state.params.dtype)
        state = advance(_Residuals(fn, args, y), _bounded(y, options), state, tolerances)
        kept = ravel_pytree(y)[1](state.params)
        return kept, state, fn(kept, args)[1]

    def terminate(
        self,
        fn: Callable,
        y: PyTree,
        args: PyTree,
        options: dict[str, Any],
        state: State,
        tags: frozenset[object],
    ) -> tuple[Bool[Array, ""], optx.RESULTS]:
        """Whether the iteration has ended, and how."""
        result = optx.RESULTS.where(
            state.status == SINGULAR,
            optx.RESULTS.nonlinear_divergence,
            optx.RESULTS.successful,
        )
        return state.status != RUNNING, result

    def postprocess(
        self,
        fn: Callable,
        y: PyTree,
        aux: PyTree,
        args: PyTree,
        options: dict[str, Any],
        state: State,
        tags: frozenset[object],
        result: optx.RESULTS,
    ) -> tuple[PyTree, PyTree, dict[str, Any]]:
        """The optimum; the cost before the last step is among the statistics."""
        return y, aux, {"cost": state.normal.cost}


@dataclass(frozen=True, eq=False)
class _Residuals(Objective):
    """Half the sum of squares of `fn(y, args)`, a PyTree of the structure of `example`."""

    fn: Callable
    args: PyTree
    example: PyTree

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.example))

    def normal(self, params: Float[Array, " P"], problem: Problem) -> Normal:
        """Cost, gradient and Gauss-Newton matrix, from a forward-mode Jacobian."""
        unravel = ravel_pytree(self.example)[1]

        def flat(params: Float[Array, " P"]) -> Float[Array, " residual"]:
            return ravel_pytree(self.fn(unravel(params), self.args)[0])[0]

        residual, push = jax.linearize(flat, params)
        jacobian = jax.vmap(push, out_axes=1)(jnp.eye(params.size, dtype=params.dtype))
        chi2 = jnp.sum(residual**2)
        return Normal(
            0.5 * chi2, chi2, jnp.zeros_like(chi2), jacobian.T @ residual, jacobian.T @ jacobian
        )


def _bounded(y: PyTree, options: dict[str, Any]) -> Problem:
    """A problem of no pixels: its start and its bounds."""
    start = ravel_pytree(y)[0]
    lower, upper = (
        _flat_bound(options.get(name, end), y)
        for name, end in (("lower", -jnp.inf), ("upper", jnp.inf))
    )
    none, one = jnp.zeros(0, start.dtype), jnp.ones(1, start.dtype)
    return Problem(
        data=none,
        weight=one,
        start=jnp.clip(start, lower, upper),
        lower=lower,
        upper=upper,
        free=jnp.ones(start.shape, bool),
        ridge=jnp.zeros_like(start),
        f_scale=one[0],
        weight_moments=none,
    )


def _flat_bound(bound: PyTree, y: PyTree) -> Float[Array, " P"]:
    """The bound of every parameter, in the order of the flattened `y`."""
    full = jax.tree.map(
        lambda bound, leaf: jnp.broadcast_to(jnp.asarray(bound, leaf.dtype), leaf.shape),
        jax.tree.broadcast(bound, y),
        y,
    )
    return ravel_pytree(full)[0]
