"""Solutions and inverses of small matrices that are symmetric and positive definite.

Many are taken at once by `jax.vmap`, and in several threads. On processors jax hands a stack of
matrices to LAPACK in parts, on the very threads of XLA that wait for them: two programs on two
threads then wait for each other for ever. Here LAPACK gets one matrix at a time, which it works on
where it is called; matrices of a few rows are eliminated without it, in half of the time.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Bool, Float

_FEW = 12  # rows that are eliminated one by one in compiled code


def solve_definite(matrix: Float[Array, "n n"], right: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """The X of matrix X = right; not a number where the matrix is not positive definite.

    No pivots are chosen: the matrix should have a diagonal of ones, or about that.
    """
    if len(matrix) <= _FEW:
        return _eliminated(matrix, right)
    return lax.platform_dependent(matrix, right, cpu=_factorised_alone, default=_factorised)


def inverse_over_free(matrix: Float[Array, "P P"], free: Bool[Array, " P"]) -> Float[Array, "P P"]:
    """Inverse of a matrix over its free parameters.

    0 for what is held; NaN for what is free but without any effect (the position of a source of
    peak 0), which leaves the other parameters alone.
    """
    diagonal = jnp.diagonal(matrix)
    used = free & (diagonal > 0)
    root = jnp.where(used, 1 / jnp.sqrt(jnp.where(used, diagonal, 1)), 0)
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    least = 4 * jnp.finfo(matrix.dtype).eps
    scaled = matrix * root[:, None] * root + eye * jnp.where(used, least, 1)
    inverse = solve_definite(scaled, eye) * root[:, None] * root
    idle = free & ~used
    return jnp.where(idle[:, None] | idle, jnp.nan, inverse)


def _eliminated(matrix: Float[Array, "n n"], right: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """By Gauss-Jordan elimination, each column of which is left out once it is done."""
    rows = jnp.concatenate([matrix, right], 1)
    for _ in range(len(matrix)):
        pivot = jnp.where(rows[0, 0] > 0, rows[0, 0], jnp.nan)
        first = rows[0, 1:] / pivot
        others = rows[1:, 1:] - rows[1:, :1] * first
        rows = lax.optimization_barrier(jnp.concatenate([others, first[None]]))  # or done again
    return rows


def _factorised(matrix: Float[Array, "n n"], right: Float[Array, "n m"]) -> Float[Array, "n m"]:
    factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((factor, True), right)


_factorised_alone = sequential_vmap(_factorised)
