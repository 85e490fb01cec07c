"""What other radial profiles of sources explain of what Gaussians leave."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.optimize import least_squares

from hyperjax.radial import explained_by_profiles
from hyperjax.spectral import modes

SIDE = 48
SIGMA = 2.0
PLACE = np.array([24.3, 22.8])
Y, X = np.indices((SIDE, SIDE))


def gaussian(params: NDArray) -> NDArray:
    """An elliptical Gaussian (side, side)."""
    peak, x, y, major, minor, theta = params
    along = (X - x) * np.cos(theta) + (Y - y) * np.sin(theta)
    across = (Y - y) * np.cos(theta) - (X - x) * np.sin(theta)
    return np.asarray(peak * np.exp(-((along / major) ** 2 + (across / minor) ** 2) / 2))


def transformed(image: NDArray) -> tuple[NDArray, NDArray]:
    """Modes (2, mode) of an image about its centre, as sums, and weights of white noise.

    The sums are written out, mode by mode.
    """
    kx, ky = modes(SIDE)
    columns = np.exp(-2j * np.pi * np.outer(kx, np.arange(SIDE) - (SIDE - 1) / 2))
    rows = np.exp(-2j * np.pi * np.outer(ky, np.arange(SIDE) - (SIDE - 1) / 2))
    values = (rows @ image @ columns.T).ravel() * np.sqrt(2) / SIDE
    weight = np.full((len(ky), len(kx)), np.sqrt(2) / SIDE)
    weight[:, 0] = 0  # once each of the conjugates; fine modes, where samples have an alias, not
    weight[np.abs(ky) > 0.4] = 0
    weight[:, kx > 0.4] = 0
    return np.stack([values.real, values.imag]), weight.ravel()


def left_by_gaussian(image: NDArray) -> tuple[NDArray, float, float]:
    """The best Gaussian (1, 6) of the used modes, the chi^2 that it leaves, and that of none."""
    data, weight = transformed(image)
    used = weight > 0

    def residual(params: NDArray) -> NDArray:
        model, _ = transformed(gaussian(params))
        return np.asarray((data - model)[:, used].ravel())

    start = np.array([image.max(), *PLACE, 4.0, 3.5, 0.5])
    found = least_squares(residual, start, xtol=1e-12, ftol=1e-12)
    return found.x[None], 2 * found.cost, float(np.sum(data[:, used] ** 2))


def explained(image: NDArray, sources: NDArray) -> float:
    data, weight = transformed(image)
    return explained_by_profiles(data, weight, SIDE, sources, np.array([0]))


def disc(radius: float) -> NDArray:
    """A uniform disc seen with the beam, drawn on finer pixels."""
    fine = (np.arange(10 * SIDE) - 4.5) / 10
    inside = np.hypot(fine - PLACE[0], fine[:, None] - PLACE[1]) < radius
    coarse = inside.reshape(SIDE, 10, SIDE, 10).mean(axis=(1, 3))
    return np.asarray(30 * gaussian_filter(coarse, SIGMA, truncate=6))


def test_a_gaussian_leaves_nothing() -> None:
    params = np.array([30.0, *PLACE, 4.0, 3.0, 0.6])
    assert explained(gaussian(params), params[None]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("beams", [1.0, 2.0, 3.0])
def test_the_profile_of_a_disc_is_explained(beams: float) -> None:
    """Nine tenths of the chi^2 that a Gaussian leaves of a disc of so many beams, across."""
    image = disc(beams * SIGMA * np.sqrt(2 * np.log(2)))
    source, left, power = left_by_gaussian(image)
    assert left > 1e-5 * power
    assert 0.9 * left < explained(image, source) <= left * (1 + 1e-6)


def test_a_companion_is_not_explained() -> None:
    """Of what a Gaussian leaves of two sources, a small part is taken for a profile."""
    image = gaussian(np.array([30.0, *PLACE, 4.0, 4.0, 0.0]))
    image += gaussian(np.array([8.0, PLACE[0] + 7, PLACE[1] + 3, 2.0, 2.0, 0.0]))
    source, left, _ = left_by_gaussian(image)
    assert 0 < explained(image, source) < 0.2 * left


def test_a_series_is_explained_whole() -> None:
    """Noise-free terms of the series: what no change of the Gaussian can be, by least squares."""
    params = np.array([30.0, *PLACE, 4.0, 3.0, 0.6])
    unit = gaussian(params)
    step = 1e-4 * np.array([30, 1, 1, 4, 3, 1])
    columns = [
        (gaussian(params + step * own) - gaussian(params - step * own)) / 2 for own in np.eye(6)
    ]

    def scaled(factor: float) -> NDArray:
        return gaussian(params * [1, 1, 1, factor, factor, 1]) / factor**2

    # a second difference of the size has terms of degree 2 of the series, and of 0 and 1
    bent = (scaled(1.001) - 2 * unit + scaled(0.999)) / 0.001**2
    data, weight = transformed(bent)
    used = weight > 0
    matrix = np.stack([transformed(column)[0][:, used].ravel() for column in columns], 1)
    values = data[:, used].ravel()
    beyond = values - matrix @ np.linalg.lstsq(matrix, values, rcond=None)[0]
    assert explained(unit + bent, params[None]) == pytest.approx(np.sum(beyond**2), rel=1e-3)


def test_what_neighbours_may_take_is_not_explained() -> None:
    """A profile counts less what the Jacobian of all sources holds, by least squares."""
    first = np.array([30.0, *PLACE, 4.0, 3.0, 0.6])
    second = np.array([20.0, PLACE[0] + 6, PLACE[1] - 3, 3.0, 2.5, 1.9])
    sources = np.stack([first, second])
    image = gaussian(first) + gaussian(second) + disc(5.0)
    columns = []
    for params in sources:
        for own in 1e-4 * np.diag([30, 1, 1, 4, 3, 1]):
            columns.append((gaussian(params + own) - gaussian(params - own)) / 2e-4)

    def stretched(params: NDArray, factor: float) -> NDArray:
        return gaussian(params * [1, 1, 1, factor, factor, 1]) / factor**2

    # differences of order 2 to 4 of the size have the terms of degree 2 to 4 of the series
    steps = (0.96, 0.98, 1.0, 1.02, 1.04)
    profiles = [stretched(first, factor) for factor in steps]
    modes_of = [transformed(each)[0] for each in (*columns, *profiles, disc(5.0))]
    used = transformed(image)[1] > 0
    values = np.stack([each[:, used].ravel() for each in modes_of], 1)
    data, of_all, of_jacobian = values[:, -1], values[:, :-1], values[:, : len(columns)]

    def left(matrix: NDArray) -> float:
        scaled = matrix / np.linalg.norm(matrix, axis=0)
        return float(np.sum((data - scaled @ np.linalg.lstsq(scaled, data, rcond=1e-14)[0]) ** 2))

    assert explained(image, sources) == pytest.approx(left(of_jacobian) - left(of_all), rel=0.01)


def test_profiles_of_sources_that_are_not_named_stay_gaussian() -> None:
    image = disc(4.0)
    source, _, _ = left_by_gaussian(image)
    data, weight = transformed(image)
    nothing = np.array([], int)
    assert explained_by_profiles(data, weight, SIDE, source, nothing) == 0
