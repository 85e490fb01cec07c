"""Small positive definite systems, alone, stacked, and from several threads."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hyperjax.definite import inverse_over_free, solve_definite

TWO_AT_A_TIME = """
import sys
from pathlib import Path
import jax
import numpy as np
from hyperjax.fitting import FitOptions, GroupBatch, fit_groups
from hyperjax.implicit import fit_parameters
from hyperjax.runtime import at_once, configure_runtime

configure_runtime(threads=2, cache=Path(sys.argv[1]))
rng = np.random.default_rng(0)
groups, slots, side = 256, 8, 16
y, x = np.mgrid[:side, :side]
start = np.broadcast_to([10.0, 0, 0, 1.8, 1.6, 0], (groups, slots, 6)).copy()
start[..., 1:3] = rng.uniform(3, side - 3, (groups, slots, 2))
spread = np.array([9.9, 2, 2, 1, 1, 0])
batch = GroupBatch(
    data=rng.normal(size=(groups, side, side)), weight=np.ones((groups, side, side)),
    start=start, lower=start - spread, upper=start + spread,
    free=np.ones(start.shape, bool), present=np.ones((groups, slots), bool),
    order=np.full(groups, 2),
)
for _ in range(4):
    assert np.isfinite(fit_groups(batch, FitOptions(max_steps=8)).cost).all()

few = GroupBatch(*(leaf[:64] for leaf in batch))
options = FitOptions(max_steps=8)

def total(data):
    return fit_parameters(few._replace(data=data), options)[0][..., 0].sum()

slope = jax.jit(jax.grad(total))
slope(few.data).block_until_ready()

def slopes(_):
    for _ in range(5):
        slope(few.data).block_until_ready()

at_once(slopes, range(2), 2)
"""


def matrices(count: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    root = rng.normal(size=(count, size, size + 3))
    matrix = root @ root.swapaxes(1, 2)
    scale = np.sqrt(np.diagonal(matrix, axis1=1, axis2=2))
    return matrix / scale[:, :, None] / scale[:, None, :]


@pytest.mark.parametrize("size", [1, 6, 12, 13, 40])
def test_solutions_are_those_of_numpy(size: int) -> None:
    """One matrix, and a stack of them by vmap, of sizes on both sides of the elimination's."""
    matrix = matrices(5, size)
    right = np.random.default_rng(0).normal(size=(5, size, 2))
    wanted = np.linalg.solve(matrix, right)
    with jax.enable_x64(True):
        assert_allclose(solve_definite(matrix[0], right[0]), wanted[0], rtol=1e-9)
        assert_allclose(jax.jit(jax.vmap(solve_definite))(matrix, right), wanted, rtol=1e-9)


@pytest.mark.parametrize("size", [2, 20])
def test_no_solution_where_the_matrix_is_not_positive_definite(size: int) -> None:
    matrix = np.eye(size)
    matrix[-1, -1] = -1
    with jax.enable_x64(True):
        alone = solve_definite(jnp.asarray(matrix), jnp.ones((size, 1)))
        stacked = jax.vmap(solve_definite)(np.stack([np.eye(size), matrix]), np.ones((2, size, 1)))
    assert np.isnan(alone).any()
    assert_array_equal(stacked[0], 1)
    assert np.isnan(stacked[1]).any()


@pytest.mark.parametrize("size", [5, 18])
def test_inverse_over_the_free_parameters(size: int) -> None:
    """Held parameters have 0; those without any effect NaN, and leave the others alone."""
    matrix = matrices(1, size)[0] * np.outer(*[np.logspace(-8, 8, size)] * 2)
    free = np.arange(size) != 1
    matrix[3] = matrix[:, 3] = 0
    with jax.enable_x64(True):
        inverse = np.asarray(inverse_over_free(jnp.asarray(matrix), jnp.asarray(free)))
    used = [k for k in range(size) if k not in (1, 3)]
    wanted = np.linalg.inv(matrix[np.ix_(used, used)])
    assert_allclose(inverse[np.ix_(used, used)], wanted, rtol=1e-7)
    assert_array_equal(inverse[1, used], 0)
    assert np.isnan(inverse[3]).all()
    assert np.isnan(inverse[:, 3]).all()


def test_two_fits_at_a_time_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Two threads of fits on XLA's pool of two: with stacks of matrices in LAPACK they hung."""
    done = subprocess.run(
        [sys.executable, "-c", TWO_AT_A_TIME, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"NPROC": "2", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
