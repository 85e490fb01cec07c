"""Derivatives through the fit against finite differences, optimistix and themselves."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from numpy.testing import assert_allclose

from hyperjax.errors import FitInputError
from hyperjax.fitting import FitOptions, GroupBatch, fit_groups
from hyperjax.implicit import fit_parameters
from hyperjax.least_squares import BoundedLevenbergMarquardt

SIDE, SLOTS = 24, 2
PEAK, X, Y, MAJOR, MINOR, THETA = range(6)
Y_PIX, X_PIX = np.mgrid[:SIDE, :SIDE].astype(float)
TIGHT = FitOptions(ftol=0.0)

quick_jit = functools.partial(  # these tests are mostly compilation
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)
fitted_linear = functools.partial(fit_parameters, options=TIGHT, highest_order=1)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def image_of(source, xp=np):
    peak, x, y, major, minor, theta = source
    u = (X_PIX - x) * xp.cos(theta) + (Y_PIX - y) * xp.sin(theta)
    v = -(X_PIX - x) * xp.sin(theta) + (Y_PIX - y) * xp.cos(theta)
    return peak * xp.exp(-0.5 * (u**2 / major**2 + v**2 / minor**2))


def make_batch(seed: int = 0) -> GroupBatch:
    """One group of two sources, one of a single source with masked (NaN) pixels."""
    rng = np.random.default_rng(seed)
    sources = np.array(
        [
            [[30, 5.2, 6.1, 2.4, 1.6, 0.6], [20, 10.3, 9.4, 2.2, 1.5, 2.2]],
            [[25, 7.7, 7.2, 2.3, 1.7, 1.1], [0, 0, 0, 0, 0, 0]],
        ]
    )
    present = np.array([[True, True], [True, False]])
    data = rng.normal(size=(2, SIDE, SIDE)) + 3
    for group in range(2):
        data[group] += sum(image_of(s) for s in sources[group][present[group]])
    weight = rng.uniform(0.5, 1.5, data.shape)
    weight[1, :3, :3], data[1, :3, :3] = 0, np.nan
    there = present[..., None]
    spread = np.array([30, 2, 2, 1.2, 1.2, 0])
    return GroupBatch(
        data=data,
        weight=weight,
        start=sources * np.array([1.1, 1, 1, 1.1, 1.0, 1]),
        lower=np.where(there, sources - spread, 0),
        upper=np.where(there, sources + spread, 0),
        free=np.broadcast_to(there, sources.shape),
        present=present,
        order=np.array([1, 0]),
    )


def direction(batch: GroupBatch, names: tuple[str, ...], seed: int = 1) -> dict[str, np.ndarray]:
    """A random change of some of the arrays, none of the others and where pixels are masked."""
    rng = np.random.default_rng(seed)
    every = ("data", "weight", "start", "lower", "upper")
    out = {name: rng.normal(size=getattr(batch, name).shape) * (name in names) for name in every}
    for name in ("data", "weight"):
        out[name] = np.where(batch.weight > 0, out[name], 0)
    for name in ("start", "lower", "upper"):
        out[name] = np.where(batch.present[..., None], out[name], 0)
    return out


@quick_jit
def forward(batch: GroupBatch, change: dict) -> tuple:
    """Change of (params, coefficients), by forward mode."""

    def fitted(changed):
        return fitted_linear(batch._replace(**changed))

    now = {name: getattr(batch, name) for name in change}
    return jax.jvp(fitted, (now,), (change,))[1]


def differences(batch: GroupBatch, change: dict, options: FitOptions, h: float) -> tuple:
    """The same, by central differences of `fit_groups`."""
    ends = [
        fit_groups(
            batch._replace(**{k: getattr(batch, k) + sign * h * v for k, v in change.items()}),
            options,
        )
        for sign in (1, -1)
    ]
    params = (ends[0].params - ends[1].params) / (2 * h)
    coefficients = (ends[0].coefficients - ends[1].coefficients) / (2 * h)
    return params, coefficients[:, :3]


def assert_same(got: tuple, want: tuple, present: np.ndarray, rtol: float) -> None:
    for one, other in zip(got, want, strict=True):
        scale = np.abs(other).max()
        assert_allclose(one, other, rtol=rtol, atol=rtol * scale)
    assert (np.asarray(got[0])[~present] == 0).all()


def test_finds_what_fit_groups_finds() -> None:
    batch = make_batch()
    fit = fit_groups(batch, TIGHT)
    params, coefficients = quick_jit(fitted_linear)(batch)
    assert_allclose(params, fit.params, rtol=1e-6)
    assert_allclose(coefficients, fit.coefficients[:, :3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [("data",), ("weight",), ("data", "weight")])
def test_matches_finite_differences(names: tuple[str, ...]) -> None:
    batch = make_batch()
    change = direction(batch, names)
    want = differences(batch, change, TIGHT, 1e-4)
    assert_same(forward(batch, change), want, batch.present, 1e-5)


def on_bounds(batch: GroupBatch) -> GroupBatch:
    """Bounds that cut one source's width, another's length and position off."""
    lower, upper = batch.lower.copy(), batch.upper.copy()
    lower[0, 0, MAJOR : MINOR + 1] = 1.9
    upper[0, 1, MAJOR : MINOR + 1] = 1.9
    upper[1, 0, X] = 7.4
    upper[1, 0, PEAK] = 22
    return batch._replace(lower=lower, upper=upper)


@pytest.mark.parametrize("names", [("data",), ("lower", "upper"), ("data", "weight", "lower")])
def test_active_bounds(names: tuple[str, ...]) -> None:
    batch = on_bounds(make_batch())
    fit = fit_groups(batch, TIGHT)
    assert fit.on_bound[0, 0, MINOR]
    assert fit.on_bound[0, 1, MAJOR]
    assert fit.on_bound[1, 0, [PEAK, X]].all()
    change = direction(batch, names)
    want = differences(batch, change, TIGHT, 1e-4)
    got = forward(batch, change)
    assert_same(got, want, batch.present, 1e-4)
    if "lower" not in names:
        assert_allclose(np.asarray(got[0])[fit.on_bound][[0, 2, 3]], 0, atol=1e-9)


def test_the_start_has_no_derivative_unless_it_is_held() -> None:
    batch = make_batch()
    change = direction(batch, ("start",))
    assert (np.asarray(forward(batch, change)[0]) == 0).all()
    free = batch.free.copy()
    free[0, 0, [X, Y]] = False
    free[1, 0, MAJOR:] = False
    held = batch._replace(free=free)
    change["start"] *= 0.1
    want = differences(held, change, TIGHT, 1e-4)
    assert_same(forward(held, change), want, batch.present, 1e-4)


def test_forward_is_reverse() -> None:
    """For any two directions u (in) and v (out): v . (J u) = (J^T v) . u, with active bounds."""
    batch = on_bounds(make_batch())
    change = direction(batch, ("data", "weight", "lower", "upper"))
    now = {name: jnp.asarray(getattr(batch, name)) for name in change}
    pushed = forward(batch, change)
    rng = np.random.default_rng(3)
    out = tuple(jnp.asarray(rng.normal(size=leaf.shape)) for leaf in pushed)

    @quick_jit
    def backward(now, out):
        pull = jax.vjp(lambda c: fitted_linear(batch._replace(**c)), now)[1]
        return pull(out)[0]

    pulled = backward(now, out)
    assert all(np.isfinite(leaf).all() for leaf in pulled.values())
    one = sum(float(jnp.vdot(a, b)) for a, b in zip(pushed, out, strict=True))
    other = sum(float(jnp.vdot(change[name], pulled[name])) for name in change)
    assert one == pytest.approx(other, rel=1e-9)


def test_under_jit_and_vmap() -> None:
    """Gradients of a stack of batches: along a direction, those of each alone by forward mode."""
    batch = make_batch()
    rng = np.random.default_rng(4)
    noise = 0.3 * np.where(batch.weight > 0, rng.normal(size=(3, *batch.data.shape)), 0)
    stack = jnp.asarray(batch.data + noise)

    def total(data):
        params, coefficients = fitted_linear(batch._replace(data=data))
        return params[..., PEAK].sum() + coefficients[:, 0].sum()

    together = quick_jit(jax.vmap(jax.grad(total)))(stack)
    change = direction(batch, ("data",))
    for one, data in zip(together, stack, strict=True):
        params, coefficients = forward(batch._replace(data=data), change)
        want = params[..., PEAK].sum() + coefficients[:, 0].sum()
        assert_allclose(jnp.vdot(one, change["data"]), want, rtol=1e-7)
    assert (np.asarray(together)[:, batch.weight == 0] == 0).all()


def test_matches_optimistix() -> None:
    """The same gradient as `optimistix.ImplicitAdjoint` through its own solver."""
    batch = make_batch()
    root = np.sqrt(batch.weight[0])

    def residual(p, data):
        model = image_of(p[:6], jnp) + image_of(p[6:12], jnp)
        u, v = (X_PIX - 7.5) / 8, (Y_PIX - 7.5) / 8
        return root * (model + p[12] + p[13] * u + p[14] * v - data)

    def by_optimistix(data):
        start = jnp.append(batch.start[0].ravel(), jnp.asarray([3.0, 0.0, 0.0]))
        solver = BoundedLevenbergMarquardt(ftol=1e-16, xtol=1e-12)
        return optx.least_squares(residual, solver, start, args=data).value[jnp.asarray([0, 3, 6])]

    first = jax.tree.map(lambda leaf: leaf[:1], batch)

    def by_us(data):
        params = fitted_linear(first._replace(data=data[None]))[0]
        return params.ravel()[jnp.asarray([0, 3, 6])]

    data = jnp.asarray(batch.data[0])
    want = quick_jit(jax.jacrev(by_optimistix))(data)
    got = quick_jit(jax.jacrev(by_us))(data)
    assert_allclose(got, want, rtol=1e-5, atol=1e-7 * np.abs(want).max())


def test_robust_loss_and_penalty() -> None:
    batch = make_batch()
    options = FitOptions(loss="soft_l1", f_scale=1.5, lambda_l2=2.0, ftol=1e-15)
    change = direction(batch, ("data",))
    want = differences(batch, change, options, 1e-4)

    @quick_jit
    def pushed(data, change):
        def fitted(data):
            return fit_parameters(batch._replace(data=data), options, highest_order=1)

        return jax.jvp(fitted, (data,), (change,))[1]

    got = pushed(batch.data, change["data"])
    assert_same(got, want, batch.present, 1e-5)


def test_of_a_shape_that_is_partly_held() -> None:
    """A held angle and a held axis, whose derivatives are those of their starts."""
    batch = make_batch()
    free = batch.free.copy()
    free[0, 0, 5] = free[1, 0, 4] = False
    start = batch.start.copy()
    start[0, 1, 5], start[1, 0, 5] = 2.1, 1.2
    batch = batch._replace(free=free, start=start)
    change = direction(batch, ("data", "start"))

    @quick_jit
    def forward(arrays: dict, change: dict) -> tuple:
        return jax.jvp(lambda some: fitted_linear(batch._replace(**some)), (arrays,), (change,))[1]

    got = forward({name: getattr(batch, name) for name in change}, change)
    want = differences(batch, change, TIGHT, 1e-3)
    assert_same(got, want, batch.present, 1e-5)
    assert got[0][0, 0, 5] == pytest.approx(change["start"][0, 0, 5])
    assert got[0][1, 0, 4] == pytest.approx(change["start"][1, 0, 4])


def test_orders_above_the_highest_are_refused() -> None:
    batch = make_batch()
    with pytest.raises(FitInputError, match=r"^order: 1 is above highest_order, 0"):
        fit_parameters(batch, highest_order=0)


def test_shapes_that_are_partly_held_must_be_known() -> None:
    """Those of a batch that is all traced are not: such groups have no result."""
    batch = make_batch()
    free = batch.free.copy()
    free[0, 0, 5] = False
    params, coefficients = quick_jit(fitted_linear)(batch._replace(free=free.astype(int)))
    assert np.isnan(params[0]).all()
    assert np.isnan(coefficients[0]).all()
    assert_allclose(params[1], quick_jit(fitted_linear)(batch)[0][1], rtol=1e-9)
