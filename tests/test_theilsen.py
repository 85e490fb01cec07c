"""Theil-Sen fits, against scipy's minimiser and lines without and with outliers."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import theilslopes

from hyperjax.theilsen import spatial_median, theil_sen


def quadratic(n: int, seed: int, noise: float = 0.0) -> tuple[NDArray, NDArray, NDArray]:
    """Terms, values and coefficients of a random quadratic surface."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(-1, 1, (2, n))
    terms = np.stack([np.ones(n), x, y, x**2, x * y, y**2], axis=-1)
    truth = rng.normal(size=6)
    return terms, terms @ truth + noise * rng.normal(size=n), truth


def test_the_spatial_median_has_the_least_sum_of_distances() -> None:
    rng = np.random.default_rng(0)
    points, weights = rng.standard_cauchy((300, 3)), rng.uniform(size=300)
    best = minimize(
        lambda middle: weights @ np.linalg.norm(points - middle, axis=1),
        np.zeros(3),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 5000},
    )
    assert_allclose(spatial_median(points, weights), best.x, atol=1e-6)


def test_the_spatial_median_may_be_one_of_the_points() -> None:
    points = np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert_allclose(spatial_median(points, np.ones(5)), 0.0, atol=1e-12)
    assert_array_equal(spatial_median(np.ones((4, 2)), np.ones(4)), 1.0)


@pytest.mark.parametrize("share", [0.0, 0.08])
def test_a_surface_is_recovered_whatever_the_outliers_are(share: float) -> None:
    """0.92^6 = 0.61 of the subsets are clean: an exact surface comes back exactly."""
    terms, values, truth = quadratic(600, 1)
    values[np.random.default_rng(2).uniform(size=600) < share] += 1e4
    assert_allclose(theil_sen(terms, values), truth, atol=1e-6)


def test_it_is_about_as_precise_as_least_squares_and_unbiased() -> None:
    errors = []
    for seed in range(60):
        terms, values, truth = quadratic(400, seed, noise=1.0)
        least_squares = np.linalg.lstsq(terms, values, rcond=None)[0]
        errors.append([terms @ (fit - truth) for fit in (theil_sen(terms, values), least_squares)])
    ours, best = np.std(errors, axis=(0, 2))
    assert ours < 1.4 * best
    assert np.abs(np.mean(errors, axis=0)[0].mean()) < 4 * best / np.sqrt(60)


def test_a_line_is_near_that_of_scipy() -> None:
    """Theirs is the median of all slopes: another estimator with the same breakdown."""
    rng = np.random.default_rng(3)
    x = rng.uniform(0, 10, 200)
    y = 3 + 2 * x + rng.normal(size=200)
    y[:40] += 50
    slope = theil_sen(np.column_stack([np.ones(200), x]), y)[1]
    assert_allclose(slope, theilslopes(y, x).slope, atol=0.1)
    assert_allclose(slope, 2.0, atol=0.1)
    assert abs(np.polyfit(x, y, 1)[0] - 2.0) > 0.2


def test_units_of_the_terms_do_not_matter() -> None:
    terms, values, _ = quadratic(100, 4, noise=1.0)
    scale = 10.0 ** np.arange(-3, 3)
    assert_allclose(theil_sen(terms * scale, values) * scale, theil_sen(terms, values), rtol=1e-6)
    assert_allclose(theil_sen(terms, 1e6 * values), 1e6 * theil_sen(terms, values), rtol=1e-9)


def test_too_few_values_give_nothing() -> None:
    terms, values, _ = quadratic(6, 5)
    assert np.isnan(theil_sen(terms, values)).all()
    assert np.isnan(theil_sen(np.ones((9, 6)), np.ones(9))).all()
