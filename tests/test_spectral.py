"""The Fourier-space model against transforms, derivatives and fits made in other ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy.optimize import least_squares
from test_implicit import quick_jit

from hyperjax.errors import FitInputError
from hyperjax.fitting import CONVERGED, FitOptions, GroupBatch, fit_groups, fit_spectra
from hyperjax.models import Grid, Problem, gaussian
from hyperjax.spectral import SpectralGroup, modes

SIDE = 32


def some_sources(slots: int, seed: int = 1) -> NDArray:
    """Sources in scaled coordinates, well inside a window."""
    rng = np.random.default_rng(seed)
    rows = [
        [rng.uniform(1, 5), *rng.normal(0, 0.12, 2), np.log(0.13), *rng.normal(0, 0.3, 2)]
        for _ in range(slots)
    ]
    return np.concatenate(rows)


def transformed(image: NDArray) -> NDArray:
    """Modes of an image about its centre, by the definition of the transform."""
    y, x = np.mgrid[: len(image), : len(image)] - (len(image) - 1) / 2
    kx, ky = modes(len(image))
    waves = [np.sum(image * np.exp(-2j * np.pi * (a * x + b * y))) for b in ky for a in kx]
    return np.concatenate([np.real(waves), np.imag(waves)])


@pytest.fixture(autouse=True)
def double():  # type: ignore[no-untyped-def]
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("slots", [1, 3])
def test_the_model_is_the_transform_of_its_image(slots: int) -> None:
    model, params = SpectralGroup(Grid((SIDE, SIDE)), slots, -1), some_sources(slots)
    x, y = model.grid.pixels(jnp.float64)
    image = sum(gaussian(x, y, jnp.asarray(source)) for source in params.reshape(slots, 6))
    expected = transformed(np.reshape(image, (SIDE, SIDE)))
    image = quick_jit(model.image)(jnp.asarray(params))
    assert_allclose(image, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_the_normal_equations_are_those_of_the_jacobian(slots: int) -> None:
    model, params = SpectralGroup(Grid((SIDE, SIDE)), slots, -1), jnp.asarray(some_sources(slots))
    rng, count = np.random.default_rng(2), quick_jit(model.image)(params).size
    weight = rng.uniform(0.5, 1.5, count // 2)
    problem = Problem(
        data=jnp.asarray(rng.normal(0, 20, count)),
        weight=jnp.asarray(weight),
        start=params,
        lower=params - 1,
        upper=params + 1,
        free=jnp.ones(len(params), bool),
        ridge=jnp.zeros(len(params)),
        f_scale=jnp.ones(()),
        weight_moments=jnp.zeros(0),
    )
    jacobian = np.tile(weight, 2)[:, None] * np.asarray(quick_jit(jax.jacfwd(model.image))(params))
    residual = problem.data - np.tile(weight, 2) * np.asarray(quick_jit(model.image)(params))
    normal = quick_jit(model.normal)(params, problem)
    assert_allclose(normal.cost, 0.5 * residual @ residual, rtol=1e-12)
    assert_allclose(normal.cost, quick_jit(model.cost)(params, problem), rtol=1e-12)
    scale = np.sqrt(np.diag(jacobian.T @ jacobian))
    assert_allclose(normal.gradient / scale, -jacobian.T @ residual / scale, atol=1e-9)
    matrix = normal.matrix / scale[:, None] / scale
    assert_allclose(matrix, jacobian.T @ jacobian / scale[:, None] / scale, atol=1e-12)


def one_source(seed: int) -> tuple[NDArray, NDArray]:
    """An image of white noise of unit variance with a source, and its start in pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    image = 30 * np.exp(-0.5 * (((x - 15.7) / 2.4) ** 2 + ((y - 15.1) / 1.8) ** 2))
    return image + rng.normal(size=image.shape), np.array([25.0, 15.4, 15.4, 2.2, 2.0, 0.1])


def batch_of(data: NDArray, weight: NDArray, start: NDArray, order: int) -> GroupBatch:
    count = len(data)
    starts = np.broadcast_to(start, (count, 1, 6)).copy()
    lower, upper = starts.copy(), starts.copy()
    lower[..., :3] -= [25, 4, 4]
    upper[..., :3] += [np.inf, 4, 4]
    lower[..., 3:5], upper[..., 3:5] = 0.8, 6.0
    everything = np.ones((count, 1), bool)
    return GroupBatch(
        data=data,
        weight=weight,
        start=starts,
        lower=lower,
        upper=upper,
        free=np.ones(starts.shape, bool),
        present=everything,
        order=np.full(count, order),
    )


def spectral_batch(images: NDArray, start: NDArray) -> GroupBatch:
    """White noise: every mode but the mean has the weight sqrt(2) / side, conjugates once."""
    kx, ky = modes(SIDE)
    weight = np.full((len(ky), len(kx)), np.sqrt(2) / SIDE)
    weight[ky <= 0, 0] = 0
    data = np.stack([transformed(image) for image in images]) * np.tile(weight.ravel(), 2)
    shape = (len(images), 2, weight.size)
    return batch_of(
        data.reshape(shape), np.broadcast_to(weight.ravel(), shape[::2]), start, order=-1
    )


def test_in_white_noise_it_is_the_fit_of_pixels_with_a_free_mean() -> None:
    images, starts = zip(*(one_source(seed) for seed in range(30)), strict=True)
    images = np.stack(images)
    pixels = fit_groups(batch_of(images, np.ones_like(images), starts[0], order=0))
    spectral = fit_spectra(spectral_batch(images, starts[0]), SIDE)
    assert (spectral.status == CONVERGED).all()
    error = np.sqrt(np.diagonal(pixels.covariance[:, :5, :5], axis1=1, axis2=2))
    difference = (spectral.params - pixels.params)[:, 0, :5] / error
    assert np.std(difference) < 0.06  # the Nyquist modes, and waves round the window
    own = np.sqrt(np.diagonal(spectral.covariance[:, :5, :5], axis1=1, axis2=2))
    assert_allclose(own, error, rtol=0.05)


def test_the_optimum_is_that_of_scipy() -> None:
    image, start = one_source(1)
    batch = spectral_batch(image[None], start)
    result = fit_spectra(batch, SIDE, FitOptions(ftol=1e-14, max_steps=100))
    data, weight = batch.data[0].ravel(), np.tile(batch.weight[0], 2)
    y, x = np.mgrid[:SIDE, :SIDE]

    def residual(p: NDArray) -> NDArray:
        cos, sin = np.cos(p[5]), np.sin(p[5])
        u, v = (x - p[1]) * cos + (y - p[2]) * sin, (y - p[2]) * cos - (x - p[1]) * sin
        return data - weight * transformed(
            p[0] * np.exp(-0.5 * ((u / p[3]) ** 2 + (v / p[4]) ** 2))
        )

    best = least_squares(residual, start, x_scale=[10, 1, 1, 1, 1, 1])
    assert_allclose(result.cost[0], best.cost, rtol=1e-6)
    assert_allclose(result.params[0, 0, :5], best.x[:5], rtol=1e-4)


def test_bounds_and_held_parameters_are_kept() -> None:
    image, start = one_source(2)
    batch = spectral_batch(image[None], start)
    batch.upper[..., 3:5] = 2.1
    batch.free[..., 1] = False
    result = fit_spectra(batch, SIDE)
    assert result.params[0, 0, 1] == start[1]
    assert result.params[0, 0, 3] == pytest.approx(2.1)
    assert result.on_bound[0, 0, 3]
    assert result.status[0] == CONVERGED


def test_an_empty_window_is_no_data() -> None:
    image, start = one_source(3)
    batch = spectral_batch(image[None], start)
    empty = batch._replace(weight=0 * batch.weight, data=0 * batch.data)
    assert fit_spectra(empty, SIDE).status[0] != CONVERGED


def test_parts_of_shapes_are_not_held_in_spectra() -> None:
    image, start = one_source(2)
    batch = spectral_batch(image[None], start)
    batch.free[..., 5] = False
    with pytest.raises(FitInputError, match=r"^free: both sigmas and theta"):
        fit_spectra(batch, SIDE)
