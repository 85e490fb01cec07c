"""The algebra of the moment kernel, against automatic differentiation and plain sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import least_squares

from hyperjax.models import (
    LOSSES,
    GaussianGroup,
    Grid,
    Problem,
    ProfileGroup,
    gaussian,
    moffat,
    monomials,
    precision,
    precision_slopes,
    robust,
)

SHAPE = (20, 26)


def problem_for(model: GaussianGroup | ProfileGroup, params, seed: int = 0) -> Problem:
    """Noisy data of `params` (off by a little) with uneven weights and masked pixels."""
    rng = np.random.default_rng(seed)
    ny, nx = model.grid.shape
    size = model.size
    weight = rng.uniform(0.5, 2.0, ny * nx) * (rng.uniform(size=ny * nx) > 0.2)
    data = np.asarray(jax.jit(model.image)(jnp.asarray(params))) + rng.normal(size=ny * nx)
    return Problem(
        data=jnp.asarray(data),
        weight=jnp.asarray(weight),
        start=jnp.asarray(params),
        lower=jnp.full(size, -jnp.inf),
        upper=jnp.full(size, jnp.inf),
        free=jnp.ones(size, bool),
        ridge=jnp.asarray(rng.uniform(0, 0.1, size)),
        f_scale=jnp.asarray(1.5),
        weight_moments=jnp.zeros(0),
    )


def params_for(slots: int, order: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sources = np.column_stack(
        [
            rng.uniform(5, 20, slots),
            rng.uniform(-0.6, 0.6, (slots, 2)),
            rng.uniform(np.log(0.1), np.log(0.3), slots),
            rng.uniform(-0.5, 0.5, (slots, 2)),
        ]
    )
    return np.concatenate([sources.ravel(), rng.normal(size=len(monomials(order)))])


@pytest.mark.parametrize(
    ("slots", "order", "loss"),
    [(1, -1, "linear"), (3, 1, "linear"), (2, 4, "cauchy"), (1, 1, "huber"), (2, 2, "soft_l1")],
)
def test_moments_give_what_the_jacobian_gives(slots: int, order: int, loss: str) -> None:
    fast = GaussianGroup(Grid(SHAPE), slots, order, loss)
    plain = ProfileGroup(Grid(SHAPE), gaussian, 6, slots, order, loss)
    params = params_for(slots, order)
    problem = jax.jit(fast.prepare)(problem_for(fast, params))
    away = jnp.asarray(params) + 0.02
    got, want = jax.jit(fast.normal)(away, problem), jax.jit(plain.normal)(away, problem)
    assert_allclose(got.cost, want.cost, rtol=1e-12)
    assert_allclose(got.chi2, want.chi2, rtol=1e-12)
    scale = np.sqrt(np.diag(want.matrix))
    assert_allclose(got.gradient / scale, want.gradient / scale, atol=1e-9)
    assert_allclose(
        got.matrix / np.outer(scale, scale), want.matrix / np.outer(scale, scale), atol=1e-9
    )


@pytest.mark.parametrize("loss", ["linear", "cauchy"])
def test_gradient_is_the_derivative_of_the_cost(loss: str) -> None:
    model = GaussianGroup(Grid(SHAPE), 2, 1, loss)
    params = params_for(2, 1)
    problem = jax.jit(model.prepare)(problem_for(model, params))
    away = jnp.asarray(params) + 0.02
    want = jax.jit(jax.grad(lambda p: model.normal(p, problem).cost))(away)
    got = jax.jit(model.normal)(away, problem).gradient
    assert_allclose(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_scipy(loss: str) -> None:
    """One residual at a time: scipy's cost at its start, 1/2 C^2 rho((r/C)^2)."""
    for residual in (0.0, 0.3, 1.4, 1.6, 30.0):
        fit = least_squares(
            lambda p, r=residual: np.array([r]) + 0 * p, [0.0], loss=loss, f_scale=1.5, max_nfev=1
        )
        rho = robust(loss, jnp.asarray((residual / 1.5) ** 2))[0]
        assert_allclose(0.5 * 1.5**2 * rho, fit.cost, rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_weight_is_its_derivative(loss: str) -> None:
    for z in (0.01, 0.5, 3.0, 50.0):
        want = jax.grad(lambda z: robust(loss, z)[0])(z)
        assert_allclose(robust(loss, jnp.asarray(z))[1], want, rtol=1e-12)


@pytest.mark.parametrize(
    "shape", [(0.1, 0.0, 0.0), (0.1, 1e-3, 0.0), (-2.0, 0.3, -0.8), (0.0, 0.02, 0.0)]
)
def test_precision_is_the_inverse_covariance(shape: tuple[float, float, float]) -> None:
    log_size, e1, e2 = shape
    e, theta = np.hypot(e1, e2), 0.5 * np.arctan2(e2, e1)
    turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    sigmas = np.exp([log_size + e / 2, log_size - e / 2])
    want = np.linalg.inv(turn @ np.diag(sigmas**2) @ turn.T)
    got = precision(jnp.asarray(shape))
    assert_allclose(got, [want[0, 0], want[0, 1], want[1, 1]], rtol=1e-10, atol=1e-14)
    assert_allclose(
        precision_slopes(jnp.asarray(shape)).T,
        jax.jacfwd(precision)(jnp.asarray(shape)),
        rtol=1e-7,
        atol=1e-12,
    )


def test_precision_slopes_are_smooth_at_the_circle() -> None:
    at = precision_slopes(jnp.zeros(3))
    near = precision_slopes(jnp.asarray([0.0, 1e-5, -1e-5]))
    assert np.isfinite(at).all()
    assert_allclose(at, near, atol=1e-4)


def test_gaussian_volume() -> None:
    """Its sum over pixels is 2 pi peak sigma_major sigma_minor."""
    grid = Grid((61, 61))
    sigma_major, sigma_minor, theta = 5.0, 3.0, 0.6
    e = np.log(sigma_major / sigma_minor)
    log_size = np.log(np.sqrt(sigma_major * sigma_minor) / grid.half)
    source = jnp.asarray([2.0, 0.01, -0.02, log_size, e * np.cos(1.2), e * np.sin(1.2)])
    x, y = grid.pixels(jnp.float64)
    assert_allclose(
        gaussian(x, y, source).sum(), 2 * np.pi * 2.0 * sigma_major * sigma_minor, rtol=1e-6
    )
    assert theta == pytest.approx(0.5 * np.arctan2(source[5], source[4]))


def test_moffat_tends_to_a_gaussian() -> None:
    """(1 + q/(2 beta))^-beta -> exp(-q/2): a core wider by sqrt(2 beta), beta large."""
    x, y = Grid((30, 30)).pixels(jnp.float64)
    shape = jnp.asarray([3.0, 0.1, 0.0, np.log(0.2), 0.3, 0.1])
    beta = 1e7
    core = shape.at[3].add(0.5 * np.log(2 * beta))
    assert_allclose(moffat(x, y, jnp.append(core, np.log(beta))), gaussian(x, y, shape), atol=1e-5)


@pytest.mark.parametrize("slots", [1, 4, 8])
def test_padding_adds_no_flux(slots: int) -> None:
    one = params_for(1, -1)
    padding = np.tile([0.0, 0.0, 0.0, np.log(0.2), 0.0, 0.0], slots - 1)
    model = GaussianGroup(Grid(SHAPE), slots, -1)
    image = model.image(jnp.asarray(np.concatenate([one, padding])))
    assert_allclose(image, GaussianGroup(Grid(SHAPE), 1, -1).image(jnp.asarray(one)), rtol=1e-12)


@pytest.mark.parametrize("shape", [(16, 16), (15, 21), (8, 30)])
def test_grid_is_centred_on_pixels(shape: tuple[int, int]) -> None:
    grid = Grid(shape)
    x, y = grid.pixels(jnp.float64)
    assert_allclose([x.mean(), y.mean()], 0, atol=1e-12)
    x0, y0 = grid.centre
    assert_allclose((x[0] * grid.half + x0, y[0] * grid.half + y0), (0, 0), atol=1e-12)
    assert grid == Grid(shape)
    assert hash(grid) == hash(Grid(shape))
