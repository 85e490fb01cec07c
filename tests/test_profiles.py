"""Fits of any profile: against the moment path, the truth and Monte Carlo."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from hyperjax.errors import FitInputError
from hyperjax.fitting import CONVERGED, NO_DATA, FitOptions, GroupBatch, fit_groups
from hyperjax.models import gaussian, moffat
from hyperjax.profiles import fit_profiles

SIDE, SLOTS = 24, 2
Y_PIX, X_PIX = np.mgrid[:SIDE, :SIDE].astype(float)


def gaussian_batch(n: int) -> GroupBatch:
    """Two sources in even groups, one in odd ones, in pixel parameters of `fit_groups`."""
    rng = np.random.default_rng(0)
    sources = np.array([[30, 6.2, 7.1, 2.6, 1.7, 0.6], [20, 13.3, 11.4, 2.2, 1.5, 2.2]])
    present = np.ones((n, SLOTS), bool)
    present[1::2, 1] = False
    data = rng.normal(size=(n, SIDE, SIDE)) + 4 + 0.1 * X_PIX
    for slot, (peak, x, y, major, minor, theta) in enumerate(sources):
        u = (X_PIX - x) * np.cos(theta) + (Y_PIX - y) * np.sin(theta)
        v = -(X_PIX - x) * np.sin(theta) + (Y_PIX - y) * np.cos(theta)
        image = peak * np.exp(-0.5 * (u**2 / major**2 + v**2 / minor**2))
        data += present[:, slot, None, None] * image
    there = np.broadcast_to(present[..., None], (n, SLOTS, 6))
    spread = np.array([60, 3, 3, 1.4, 1.4, 0])
    return GroupBatch(
        data=data,
        weight=rng.uniform(0.5, 1.5, data.shape) * (rng.uniform(size=data.shape) > 0.05),
        start=there * sources * np.array([1.2, 1.02, 0.98, 1.1, 1.1, 1]),
        lower=there * (sources - spread),
        upper=there * (sources + spread),
        free=there,
        present=present,
        order=np.ones(n, int),
    )


def smooth_parameters(params: np.ndarray) -> np.ndarray:
    """(peak, x, y, sigma_major, sigma_minor, theta) as `models.gaussian` has them."""
    major, minor, theta = (np.where(params[..., k] > 0, params[..., k], 1) for k in (3, 4, 5))
    e = np.log(major / minor)
    shape = [0.5 * np.log(major * minor), e * np.cos(2 * theta), e * np.sin(2 * theta)]
    return np.stack([*(params[..., k] for k in range(3)), *shape], -1)


@pytest.mark.parametrize(
    ("loss", "dtype"), [("linear", np.float64), ("linear", np.float32), ("soft_l1", np.float64)]
)
def test_finds_what_the_moment_path_finds(loss: str, dtype: type) -> None:
    batch = gaussian_batch(6)
    batch = batch._replace(**{k: getattr(batch, k).astype(dtype) for k in GroupBatch._fields[:5]})
    options = FitOptions(loss=loss, ftol=1e-14 if dtype == np.float64 else None)
    ours = fit_groups(batch, options)
    lower, upper = batch.lower.copy(), batch.upper.copy()
    lower[..., 3:], upper[..., 3:] = -3, 3
    general = batch._replace(start=smooth_parameters(batch.start), lower=lower, upper=upper)
    fit = fit_profiles(gaussian, general, options)
    assert fit.params.dtype == dtype
    assert (fit.status == CONVERGED).all()
    there = batch.present
    tolerance = 1e-5 if dtype == np.float64 else 0.02
    assert_allclose(
        fit.params[there], smooth_parameters(ours.params)[there], rtol=tolerance, atol=tolerance
    )
    small = 1e-7 if dtype == np.float64 else 1e-4
    for name in ("cost", "chi2_red", "bic", "nmse"):
        assert_allclose(getattr(fit, name), getattr(ours, name), rtol=10 * small)
    columns = [0, 1, 2, 6, 7, 8]  # parameters that both have
    assert_allclose(
        np.diagonal(fit.covariance, axis1=1, axis2=2)[:, columns],
        np.diagonal(ours.covariance, axis1=1, axis2=2)[:, columns],
        rtol=1e-3 if dtype == np.float64 else 0.02,
    )


def test_moffat_recovers_the_truth_and_its_errors() -> None:
    """600 fits of one sky: the scatter is as predicted, within 4 sampling errors (2.9 % each)."""
    n = 600
    rng = np.random.default_rng(2)
    truth = np.array([200.0, 9.3, 10.4, np.log(3.0), 0.3, -0.2, np.log(2.5)])
    image = np.asarray(moffat(jnp.asarray(X_PIX), jnp.asarray(Y_PIX), jnp.asarray(truth)))
    everywhere = np.ones((n, 1, 7))
    spread = np.array([150, 3, 3, 1.5, 1, 1, 1.5])
    fit = fit_profiles(
        moffat,
        GroupBatch(
            data=image + rng.normal(size=(n, SIDE, SIDE)),
            weight=np.ones((n, SIDE, SIDE)),
            start=(truth + 0.1) * everywhere,
            lower=(truth - spread) * everywhere,
            upper=(truth + spread) * everywhere,
            free=everywhere > 0,
            present=np.ones((n, 1), bool),
            order=np.full(n, -1),
        ),
    )
    assert (fit.status == CONVERGED).all()
    predicted = np.sqrt(np.median(np.diagonal(fit.covariance, axis1=1, axis2=2), 0))
    params = fit.params[:, 0]
    assert_allclose(params.std(0), predicted, rtol=0.12)
    assert (np.abs(np.median(params, 0) - truth) < 5 * 1.25 * predicted / np.sqrt(n)).all()


def test_bounds_are_boxes_and_held_parameters_stay() -> None:
    batch = gaussian_batch(2)
    start = smooth_parameters(batch.start)
    lower, upper = start - 5.0, start + 5.0
    lower[..., 0], upper[..., 0] = 0, 15
    free = batch.free.copy()
    free[..., 1] = False
    held = batch._replace(start=start, lower=lower, upper=upper, free=free)
    fit = fit_profiles(gaussian, held)
    there = batch.present
    assert_allclose(fit.params[there][:, 0], 15, rtol=1e-12)
    assert fit.on_bound[there][:, 0].all()
    assert (fit.params[there][:, 1] == start[there][:, 1]).all()


def test_nothing_is_known_of_a_group_without_data() -> None:
    batch = gaussian_batch(3)
    start = smooth_parameters(batch.start)
    weight = batch.weight.copy()
    weight[1] = 0
    wide = batch._replace(start=start, lower=start - 5.0, upper=start + 5.0, weight=weight)
    fit = fit_profiles(gaussian, wide)
    assert list(fit.status == NO_DATA) == [False, True, False]
    for name in ("cost", "chi2_red", "bic", "nmse"):
        assert list(np.isnan(getattr(fit, name))) == [False, True, False], name


def test_bad_input_names_the_argument() -> None:
    batch = gaussian_batch(2)
    with pytest.raises(FitInputError, match=r"^upper"):
        fit_profiles(gaussian, batch._replace(upper=batch.upper[..., :5]))
    with pytest.raises(FitInputError, match=r"^lower, upper"):
        fit_profiles(gaussian, batch._replace(lower=batch.upper, upper=batch.lower))
