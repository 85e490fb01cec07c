"""Programs in parts: what they compute, and the threads that they run in."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hyperjax.parts import Packed, apart, in_turns, packed

OWN_THREAD = """
import time
import numpy as np
from hyperjax.runtime import configure_runtime
configure_runtime(threads=1)
from hyperjax.fitting import GroupBatch, fit_groups

slots, side, dtype = {slots}, {side}, np.{dtype}
rng = np.random.default_rng(0)
y, x = np.mgrid[:side, :side]
start = np.zeros((400, slots, 6))
start[..., 0] = 20
start[..., 1] = side / 2 + np.linspace(-side / 4, side / 4, slots) * (slots > 1)
start[..., 2] = side / 2
start[..., 3:5] = 2
spread = np.array([15, 2, 2, 1, 1, 0])
truth = start + rng.uniform(-0.5, 0.5, (400, slots, 1))
data = rng.normal(size=(400, side, side))
for k in range(slots):
    peak, x0, y0 = truth[:, k, :3, None, None].swapaxes(0, 1)
    data += peak * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / 8)
batch = GroupBatch(
    data=data.astype(dtype),
    weight=np.ones(data.shape, dtype),
    start=start,
    lower=start - spread,
    upper=start + spread,
    free=np.ones(start.shape, bool),
    present=np.ones(start.shape[:2], bool),
    order=np.full(400, 2 if slots > 1 else 1),
)
fit_groups(batch)
every, own = time.process_time(), time.thread_time()
for _ in range(4):
    fit_groups(batch)
print((time.thread_time() - own) / (time.process_time() - every))
"""


@pytest.mark.parametrize(
    ("slots", "side", "dtype"), [(1, 31, "float64"), (1, 31, "float32"), (4, 48, "float64")]
)
def test_fits_work_in_the_thread_that_calls_them(
    slots: int, side: int, dtype: str, tmp_path: Path
) -> None:
    """XLA's own pool takes next to nothing from it: nearly all CPU time is the thread's."""
    done = subprocess.run(
        [sys.executable, "-c", OWN_THREAD.format(slots=slots, side=side, dtype=dtype)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "NPROC"}
        | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) > 0.85


def test_parts_are_functions_of_their_own() -> None:
    """What is kept apart is called by the compiled program; what it calls is a part of it."""

    def inner(x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, jnp.sin(x), jnp.cos(x))  # jnp.where is compiled for itself too

    kept = jax.jit(lambda x: apart(inner)(2 * x) + 1).lower(jnp.ones(50)).compile().as_text()
    plain = jax.jit(lambda x: inner(2 * x) + 1).lower(jnp.ones(50)).compile().as_text()
    assert kept.count(" call(") == 1
    assert plain.count(" call(") == 0


def test_packed_arguments_are_unpacked_inside() -> None:
    tree = {"a": np.arange(3.0), "b": (np.int32(7), np.array([True, False]))}
    one = packed(tree)
    assert one.arrays.shape == (6,)

    def read(tree: dict) -> tuple:
        assert tree["b"][0].dtype == jnp.int32
        assert tree["b"][1].dtype == bool
        return tree["a"].sum() * tree["b"][0], tree["b"][1]

    total, mask = jax.jit(apart(read))(one)
    assert total == 21
    assert_array_equal(mask, [True, False])
    stack = Packed(jnp.stack([one.arrays, 2 * one.arrays]), one.unpack)
    assert_array_equal(jax.vmap(apart(read))(stack)[0], [21, 84])


@pytest.mark.parametrize(("at_once", "count"), [(4, None), (3, None), (4, 5), (20, 3), (4, 0)])
def test_rows_are_taken_in_turns(at_once: int, count: int | None) -> None:
    """Whether or not the turns come out even; rows beyond the count are zeros, or as wanted."""
    rows = (np.arange(1.0, 11), np.arange(20.0).reshape(10, 2))
    wanted = rows[0][:, None] * rows[1], rows[0] + 1
    number = None if count is None else jnp.asarray(count)
    got = jax.jit(lambda r: in_turns(lambda row: (row[0] * row[1], row[0] + 1), r, at_once, number))
    for values, right in zip(got(rows), wanted, strict=True):
        done = 10 if count is None else count
        assert_array_equal(values[:done], right[:done])
        turns = -(-done // at_once) * at_once
        assert (values[turns:] == 0).all()
