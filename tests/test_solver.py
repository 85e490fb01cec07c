"""The optimistix solver against scipy's bounded least squares."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import least_squares

from hyperjax.kernels import _compiled
from hyperjax.least_squares import BoundedLevenbergMarquardt

TIME = np.linspace(0, 4, 40)
AXIS = np.linspace(-3, 3, 60)
NOISE = np.random.default_rng(0).normal(size=60)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def rosenbrock(p, xp=jnp):
    return xp.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]])


def decay(p, xp=jnp):
    data = 3 * np.exp(-1.3 * TIME) + 0.5 + 0.05 * NOISE[:40]
    return p[0] * xp.exp(-p[1] * TIME) + p[2] - data


def bumps(p, xp=jnp):
    data = 5 * np.exp(-0.5 * ((AXIS - 0.4) / 0.6) ** 2) + 2 * np.exp(-0.5 * ((AXIS + 1) / 0.5) ** 2)
    first = p[0] * xp.exp(-0.5 * ((AXIS - p[1]) / p[2]) ** 2)
    second = p[3] * xp.exp(-0.5 * ((AXIS - p[4]) / p[5]) ** 2)
    return first + second - data - 0.2 * NOISE


def unequal(p, xp=jnp):
    """Powell's badly scaled function: parameters 10^5 apart."""
    return xp.stack([1e4 * p[0] * p[1] - 1, xp.exp(-p[0]) + xp.exp(-p[1]) - 1.0001])


INF = np.inf
CASES = {
    "rosenbrock": (rosenbrock, [-1.2, 1.0], [-INF] * 2, [INF] * 2),
    "rosenbrock, bounded": (rosenbrock, [-1.2, 1.0], [-INF, -INF], [0.8, INF]),
    "rosenbrock, start outside": (rosenbrock, [2.0, 2.0], [-1.5, -0.5], [0.8, 0.5]),
    "decay": (decay, [1.0, 1.0, 0.0], [-INF] * 3, [INF] * 3),
    "decay, two on bounds": (decay, [1.0, 1.0, 0.2], [0.0, 0.0, 0.0], [2.5, INF, 0.3]),
    "bumps": (bumps, [3.0, 0.8, 1.0, 1.0, -1.5, 1.0], [0, -3, 0.1, 0, -3, 0.1], [9, 3, 2, 9, 3, 2]),
    "bumps, width on a bound": (
        bumps,
        [3.0, 0.8, 1.0, 1.0, -1.5, 1.0],
        [0, -3, 0.7, 0, -3, 0.1],
        [9, 3, 2, 9, 3, 2],
    ),
    "badly scaled": (unequal, [0.0, 1.0], [0, 1], [1, 20]),
}


@pytest.mark.parametrize("case", CASES)
def test_reaches_the_optimum_of_scipy(case: str) -> None:
    fn, start, lower, upper = (np.asarray(x) if i else x for i, x in enumerate(CASES[case]))
    gap = np.where(np.isfinite(upper - lower), 1e-6, 0)
    want = least_squares(
        lambda p: fn(p, np),
        np.clip(start, lower + gap, upper - gap),
        bounds=(lower, upper),
        x_scale="jac",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        max_nfev=5000,
    )
    got = optx.least_squares(
        lambda p, _: fn(p),
        BoundedLevenbergMarquardt(),
        jnp.asarray(start, float),
        options={"lower": lower, "upper": upper},
    )
    assert got.stats["cost"] <= want.cost * (1 + 1e-9) + 1e-20
    assert (got.value >= lower).all()
    assert (got.value <= upper).all()
    assert got.stats["num_steps"] < 120
    if case != "badly scaled":
        assert_allclose(got.value, want.x, rtol=2e-5, atol=2e-6)


def test_takes_trees_args_and_aux() -> None:
    """Parameters as a dictionary, one bound for a whole leaf, data as args, and an aux output."""

    def residual(y, data):
        model = y["peak"] * jnp.exp(-y["shape"][0] * TIME) + y["shape"][1]
        return {"all": model - data}, model

    data = 3 * np.exp(-1.3 * TIME) + 0.5
    solution = optx.least_squares(
        residual,
        BoundedLevenbergMarquardt(),
        {"peak": jnp.asarray(1.0), "shape": jnp.asarray([1.0, 0.0])},
        args=jnp.asarray(data),
        options={"lower": 0.0, "upper": {"peak": 10.0, "shape": 2.0}},
        has_aux=True,
    )
    assert_allclose(solution.value["peak"], 3, rtol=1e-9)
    assert_allclose(solution.value["shape"], [1.3, 0.5], rtol=1e-9)
    assert_allclose(solution.aux, data, rtol=1e-9)


def test_runs_out_of_steps() -> None:
    solution = optx.least_squares(
        lambda p, _: rosenbrock(p),
        BoundedLevenbergMarquardt(),
        jnp.asarray([-1.2, 1.0]),
        max_steps=3,
        throw=False,
    )
    assert solution.result == optx.RESULTS.nonlinear_max_steps_reached


def test_under_vmap_and_grad() -> None:
    """The optimum of (y - d)^2 + (2 y)^2 is d/5; its derivative by d is 1/5."""

    def optimum(d):
        fit = optx.least_squares(
            lambda y, d: jnp.stack([y - d, 2 * y]), BoundedLevenbergMarquardt(), 0.5 * d, args=d
        )
        return fit.value

    data = jnp.asarray([1.0, -3.0, 7.0])
    assert_allclose(jax.vmap(optimum)(data), data / 5, rtol=2e-6)
    assert_allclose(jax.vmap(jax.grad(optimum))(data), 0.2, rtol=1e-9)


def test_single_precision() -> None:
    solution = optx.least_squares(
        lambda p, _: decay(p).astype(jnp.float32),
        BoundedLevenbergMarquardt(ftol=1e-6, xtol=1e-6),
        jnp.asarray([1.0, 1.0, 0.0], jnp.float32),
    )
    assert solution.value.dtype == jnp.float32
    assert_allclose(solution.value, [3, 1.3, 0.5], atol=0.15)


def test_options_that_the_compiler_does_not_know_are_left_out() -> None:
    """By their name, or the name of a kind; a wrong value of one that it knows is an error."""
    lowered = jax.jit(lambda x: 2 * x).lower(1.0)
    options: dict[str, bool | str] = {"xla_no_such_option": True, "xla_another": "a"}
    options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_OF_ANOTHER_YEAR"
    assert _compiled(lowered, options | {"xla_cpu_multi_thread_eigen": False})(2.0) == 4.0
    with pytest.raises(jax.errors.JaxRuntimeError):
        _compiled(lowered, {"xla_cpu_multi_thread_eigen": "perhaps"})
