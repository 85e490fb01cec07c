"""Groups of many sources: the sparse fit against the dense one, and its memory.

The dense fit has tests of its own against scipy (`test_fitting.py`). Here both are given the same
problems, those of that file.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from test_fitting import PEAK, SLOTS, THETA, make_batch

from hyperjax import fitting, large_groups
from hyperjax.errors import FitInputError
from hyperjax.fitting import (
    CONVERGED,
    NO_DATA,
    STEP_LIMIT,
    FitOptions,
    FitResult,
    GroupBatch,
    fit_groups,
)

SIGMA, STEP = 1.7, 8.0  # of a source and from one to the next, pixels


def sparse_fit(
    batch: GroupBatch, options: FitOptions, monkeypatch: pytest.MonkeyPatch
) -> FitResult:
    """Fit small groups as if they were large."""
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "_MOST_SLOTS", 0)
        return fit_groups(batch, options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("free", FitOptions()),
        ("held", FitOptions()),
        ("faint", FitOptions()),
        ("penalised", FitOptions(lambda_l2=100.0)),
        ("robust", FitOptions(loss="cauchy", f_scale=1.5)),
    ],
)
def test_the_sparse_fit_is_the_dense_one(
    kind: str, options: FitOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    snr = (3.0, 5.0) if kind == "faint" else (10.0, 50.0)
    batch, _ = make_batch(12, seed=5, order=1, snr=snr, masked=0.2)
    if kind == "held":
        free = batch.free.copy()
        free[:, :, 1:] = False
        batch = batch._replace(free=free)
    options = options._replace(ftol=1e-14)
    dense, sparse = fit_groups(batch, options), sparse_fit(batch, options, monkeypatch)
    assert (dense.status == CONVERGED).all()
    assert_array_equal(sparse.status, dense.status)
    assert_allclose(sparse.cost, dense.cost, rtol=1e-12)
    assert_allclose(sparse.chi2_red, dense.chi2_red, rtol=1e-6)
    assert_allclose(sparse.bic, dense.bic, rtol=1e-6)
    assert_allclose(sparse.nmse, dense.nmse, rtol=1e-6)
    assert_array_equal(sparse.on_bound, dense.on_bound)
    assert dense.on_bound.any() == (kind == "faint")
    size = np.where(batch.present[..., None], batch.start[..., :THETA], 1)
    assert_allclose(sparse.params[..., :THETA] / size, dense.params[..., :THETA] / size, atol=1e-5)
    smooth = sparse.coefficients.shape[1]
    assert_allclose(sparse.coefficients, dense.coefficients[:, :smooth], atol=1e-4)
    assert sparse.covariance.shape == (12, SLOTS, 6, 6)
    for slot in range(SLOTS):
        own = slice(6 * slot, 6 * slot + 6)
        expected = dense.covariance[:, own, own]
        root = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
        unit = np.where(root > 0, root, 1)[:, :, None] * np.where(root > 0, root, 1)[:, None, :]
        assert_allclose(sparse.covariance[:, slot] / unit, expected / unit, atol=1e-3)


def grid_of_sources(count: int, seed: int = 1) -> tuple[GroupBatch, np.ndarray]:
    """One group of touching sources in unit noise on a slope, and the truth (slot, 6)."""
    rng = np.random.default_rng(seed)
    columns = int(np.ceil(np.sqrt(count)))
    side = int(STEP * columns) + 20
    middle = 14 + STEP * np.stack(np.divmod(np.arange(count), columns)[::-1], 1)
    major = SIGMA * rng.uniform(1.05, 1.4, count)
    truth = np.column_stack(
        [
            np.exp(rng.uniform(np.log(10), np.log(100), count)),
            middle + rng.uniform(-1.5, 1.5, (count, 2)),
            major,
            major * rng.uniform(0.8, 0.95, count),
            rng.uniform(0, np.pi, count),
        ]
    )
    y, x = np.mgrid[:side, :side]
    data = rng.normal(size=(side, side)) + 3 + 0.05 * x - 0.03 * y
    for peak, x0, y0, a, b, theta in truth:
        u = (x - x0) * np.cos(theta) + (y - y0) * np.sin(theta)
        v = -(x - x0) * np.sin(theta) + (y - y0) * np.cos(theta)
        data += peak * np.exp(-0.5 * (u**2 / a**2 + v**2 / b**2))
    start, low, high = truth.copy(), truth.copy(), truth.copy()
    start[:, PEAK] *= 0.8
    start[:, 1:3] += rng.uniform(-0.4, 0.4, (count, 2))
    start[:, 3:] = SIGMA, SIGMA, 0.0
    low[:, PEAK], high[:, PEAK] = 0.0, 3 * truth[:, PEAK]
    low[:, 1:3] -= 2
    high[:, 1:3] += 2
    low[:, 3:5], high[:, 3:5] = 0.7 * SIGMA, 2 * SIGMA
    every = np.ones((1, count), bool)
    free = np.ones((1, count, 6), bool)
    weight = np.ones((1, side, side))
    sources = (leaf[None] for leaf in (start, low, high))
    return GroupBatch(data[None], weight, *sources, free, every, np.array([1])), truth


def test_five_hundred_sources_are_fitted_jointly_with_their_errors() -> None:
    """Widths of the pulls scatter by 1.17 / sqrt(500) = 5 %."""
    batch, truth = grid_of_sources(500)
    result = fit_groups(batch)
    assert result.status[0] == CONVERGED
    assert result.chi2_red[0] == pytest.approx(1, abs=0.03)
    errors = np.sqrt(np.diagonal(result.covariance[0], axis1=1, axis2=2))
    off = result.params[0] - truth
    off[:, THETA] = (off[:, THETA] + np.pi / 2) % np.pi - np.pi / 2
    pulls = off / errors
    assert_allclose(1.4826 * np.median(np.abs(pulls), axis=0), 1, atol=0.15)
    assert np.abs(pulls[:, :THETA]).max() < 5


MEMORY = """
import resource, sys
from test_large_groups import grid_of_sources
from hyperjax.fitting import FitOptions, fit_groups

fit_groups(grid_of_sources(int(sys.argv[1]))[0], FitOptions(max_steps=2))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_square_of_the_sources() -> None:
    """400 more take less than 0.4 GB; in lanes, 128 took 3 GB."""

    def most(count: int) -> float:
        """Peak memory of a process of its own, bytes."""
        call = [sys.executable, "-c", MEMORY, str(count)]
        done = subprocess.run(call, cwd=Path(__file__).parent, capture_output=True, check=True)
        return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)

    assert most(440) - most(40) < 0.4e9


def test_large_groups_in_32_bits_and_without_data() -> None:
    """Of two groups one has no valid pixel, and the other has empty slots."""
    batch, truth = grid_of_sources(36)
    two = GroupBatch(*(np.concatenate([leaf, leaf]) for leaf in batch))
    two.weight[1] = 0
    two.present[0, 33:] = False
    two = two._replace(**{name: getattr(two, name).astype(np.float32) for name in two._fields[:5]})
    result = fit_groups(two)
    assert result.params.dtype == np.float32
    assert list(result.status) == [CONVERGED, NO_DATA]
    assert_array_equal(result.params[1], two.start[1])
    assert_array_equal(result.params[0, 33:], two.start[0, 33:])
    near = result.params[0, :24, 1:3] - truth[:24, 1:3]  # not beside the missing ones
    assert np.abs(near).max() < 0.5


def test_steps_and_bad_values_of_large_groups() -> None:
    batch, _ = grid_of_sources(36)
    assert fit_groups(batch, FitOptions(max_steps=1)).status[0] == STEP_LIMIT
    batch.data[0, 3, 3] = np.nan
    with pytest.raises(FitInputError, match="data: not finite"):
        fit_groups(batch)


def test_a_singular_matrix_has_no_factors() -> None:
    ones = sparse.csc_array(np.ones((2, 2)))
    assert large_groups._factor(ones, np.ones(2), np.zeros(2)) is None
    assert large_groups._factor(ones, np.ones(2), np.ones(2)) is not None


def test_a_singular_matrix_is_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose first matrix has no factors goes on with more damping, to the same end."""
    batch, _ = grid_of_sources(36)
    usual = fit_groups(batch)
    factor, calls = large_groups._factor, []

    def none_at_first(*arguments: Any) -> Any:
        calls.append(arguments)
        return None if len(calls) == 1 else factor(*arguments)

    monkeypatch.setattr(large_groups, "_factor", none_at_first)
    fit = fit_groups(batch)
    assert fit.steps[0] > usual.steps[0]
    assert fit.status[0] == CONVERGED
    assert_allclose(fit.cost, usual.cost, rtol=1e-6)


def test_parts_of_shapes_are_not_held_in_large_groups() -> None:
    batch, _ = grid_of_sources(36)
    free = batch.free.copy()
    free[0, 7, THETA] = False
    with pytest.raises(FitInputError, match=r"^free: in groups of more than 32 slots"):
        fit_groups(batch._replace(free=free))
