"""The batched fit against scipy, Monte Carlo and analytic truths.

All batches have cutouts of 24 x 24 pixels and two slots, so that one compilation serves them.
"""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import least_squares

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

SIDE, SLOTS, SIGMA = 24, 2, 1.7
PEAK, X, Y, MAJOR, MINOR, THETA = range(6)
Y_PIX, X_PIX = np.mgrid[:SIDE, :SIDE].astype(float)
MIDDLE, HALF = (SIDE - 1) / 2, SIDE / 2


def image_of(sources: np.ndarray, coefficients: np.ndarray | None = None) -> np.ndarray:
    """Gaussians (peak, x, y, sigma_major, sigma_minor, theta) on a polynomial of order <= 2."""
    out = np.zeros((SIDE, SIDE))
    for peak, x, y, major, minor, theta in sources:
        u = (X_PIX - x) * np.cos(theta) + (Y_PIX - y) * np.sin(theta)
        v = -(X_PIX - x) * np.sin(theta) + (Y_PIX - y) * np.cos(theta)
        out += peak * np.exp(-0.5 * (u**2 / major**2 + v**2 / minor**2))
    if coefficients is not None:
        u, v = (X_PIX - MIDDLE) / HALF, (Y_PIX - MIDDLE) / HALF
        for term, value in zip((1, u, v, u * u, u * v, v * v), coefficients, strict=False):
            out += value * term
    return out


def random_sources(rng: np.random.Generator, count: int, snr: tuple[float, float]) -> np.ndarray:
    """Sources at least 4 pixels apart, of 1.1 to 1.9 beams."""
    while True:
        xy = MIDDLE + rng.uniform(-4, 4, (count, 2))
        if count == 1 or np.hypot(*(xy[0] - xy[1])) > 4:
            break
    sizes = np.sort(SIGMA * rng.uniform(1.1, 1.9, (count, 2)), axis=1)[:, ::-1]
    peak = np.exp(rng.uniform(*np.log(snr), count))
    return np.column_stack([peak, xy, sizes, rng.uniform(0, np.pi, count)])


def make_batch(
    n: int,
    seed: int = 0,
    order: int = 1,
    snr: tuple[float, float] = (10, 50),
    masked: float = 0.0,
    poor: bool = False,
) -> tuple[GroupBatch, np.ndarray]:
    """Groups of one or two sources in unit white noise, and the truth (group, slot, 6)."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((n, SLOTS, 6))
    arrays = {name: np.zeros((n, SLOTS, 6)) for name in ("start", "lower", "upper")}
    present = np.zeros((n, SLOTS), bool)
    data = rng.normal(size=(n, SIDE, SIDE))
    for group in range(n):
        count = 1 + group % 2
        own = random_sources(rng, count, snr)
        truth[group, :count], present[group, :count] = own, True
        coefficients = 3 * rng.normal(size=(order + 1) * (order + 2) // 2)
        data[group] += image_of(own, coefficients)
        off = rng.choice([-1, 1], (count, 2)) * (1.0 if poor else 0.3)
        arrays["start"][group, :count] = np.column_stack(
            [
                own[:, PEAK] * (2.0 if poor else 1.1),
                own[:, 1:3] + off,
                np.full((count, 2), SIGMA * (1.7 if poor else 1.4)),
                np.zeros(count),
            ]
        )
        low, high = own.copy(), own.copy()
        low[:, PEAK], high[:, PEAK] = 0.0, 3 * own[:, PEAK]
        low[:, 1:3] -= 1.5
        high[:, 1:3] += 1.5
        low[:, MAJOR:THETA], high[:, MAJOR:THETA] = SIGMA, 2 * SIGMA
        arrays["lower"][group, :count], arrays["upper"][group, :count] = low, high
    weight = (rng.uniform(size=data.shape) >= masked).astype(float)
    free = np.broadcast_to(present[..., None], truth.shape)
    order_of = np.full(n, order)
    return GroupBatch(data, weight, **arrays, free=free, present=present, order=order_of), truth


def exchanged(params: np.ndarray) -> np.ndarray:
    """The same sources with their minor axis as the major one."""
    turned = params[..., [PEAK, X, Y, MINOR, MAJOR, THETA]]
    turned[..., THETA] = (turned[..., THETA] + np.pi / 2) % np.pi
    return turned


def scipy_cost(batch: GroupBatch, group: int, options: FitOptions, start: np.ndarray) -> float:
    """The lowest cost that scipy's trust region finds from a start (slot, 6), same bounds."""
    there = batch.present[group]
    count, order = int(there.sum()), int(batch.order[group])
    smooth = (order + 1) * (order + 2) // 2
    weight = np.sqrt(batch.weight[group])

    def residual(p: np.ndarray) -> np.ndarray:
        model = image_of(p[: 6 * count].reshape(-1, 6), p[6 * count :])
        return (weight * (batch.data[group] - model)).ravel()

    low, high = (bound[group, :count].copy() for bound in (batch.lower, batch.upper))
    low[:, THETA], high[:, THETA] = -np.inf, np.inf
    held = ~batch.free[group, :count]
    low[held], high[held] = start[:count][held] - 1e-10, start[:count][held] + 1e-10
    low = np.append(low.ravel(), np.full(smooth, -np.inf))
    high = np.append(high.ravel(), np.full(smooth, np.inf))
    level = np.append(np.median(batch.data[group][weight > 0]), np.zeros(smooth - 1))
    first = np.append(start[:count].ravel(), level)
    gap = 1e-9 * (high - low)
    gap[~np.isfinite(gap)] = 0
    fit = least_squares(
        residual,
        np.clip(first, low + gap, high - gap),
        bounds=(low, high),
        loss=options.loss,
        f_scale=options.f_scale,
        x_scale="jac",
        xtol=1e-12,
        ftol=1e-12,
        gtol=1e-12,
        max_nfev=2000,
    )
    return float(fit.cost)


CASES = {
    "plain": ({}, FitOptions()),
    "poor starts": ({"poor": True}, FitOptions()),
    "faint": ({"snr": (3, 5)}, FitOptions()),
    "order 2, 30 % masked": ({"order": 2, "masked": 0.3}, FitOptions()),
    "cauchy": ({}, FitOptions(loss="cauchy")),
}


@pytest.mark.parametrize("case", CASES)
def test_reaches_the_cost_of_scipy(case: str) -> None:
    """Cost at most that of the better of two tight scipy fits, from the start and the truth."""
    keywords, options = CASES[case]
    n = 24
    batch, truth = make_batch(n, **keywords)
    fit = fit_groups(batch, options)
    assert (fit.status == CONVERGED).all()
    best = np.array(
        [
            min(scipy_cost(batch, g, options, s) for s in (batch.start[g], truth[g]))
            for g in range(n)
        ]
    )
    reached = fit.cost <= best * (1 + 1e-6)
    assert reached.sum() >= n - 1  # several minima: neither always finds the lowest


def test_keeps_the_bounds_exactly() -> None:
    """Circular sources of the size of the lower bound: the optimum is on it, or beyond."""
    rng = np.random.default_rng(5)
    batch, truth = make_batch(40, seed=5)
    point = truth.copy()
    point[..., MAJOR:THETA] = SIGMA
    data = np.stack([image_of(s[p]) for s, p in zip(point, batch.present, strict=True)])
    fit = fit_groups(batch._replace(data=data + rng.normal(size=data.shape)))
    there = batch.present
    assert (fit.status == CONVERGED).all()
    sizes = fit.params[there][:, MAJOR:THETA]
    assert sizes.min() >= SIGMA * (1 - 1e-12)
    assert sizes.max() <= 2 * SIGMA * (1 + 1e-12)
    bound = fit.on_bound[there][:, MAJOR:THETA]
    assert 0.2 < bound.mean() < 0.9
    assert_allclose(sizes[:, 1][bound[:, 1]], SIGMA, rtol=1e-12)


@pytest.mark.parametrize("ftol", [None, 0.03])
def test_whatever_ends_on_a_bound_is_told(ftol: float | None) -> None:
    """Also what the last step, which is not evaluated, has put there: with a loose tolerance."""
    batch, _ = make_batch(600, seed=6, snr=(3, 8))
    fit = fit_groups(batch, FitOptions(ftol=ftol, other_starts=False))
    sizes, bound = (values[batch.present][:, MAJOR:THETA] for values in (fit.params, fit.on_bound))
    ends = (sizes <= SIGMA * (1 + 1e-12)) | (sizes >= 2 * SIGMA * (1 - 1e-12))
    assert (ends.sum(axis=0) > 20).all()
    assert_array_equal(bound, ends)


@pytest.mark.parametrize("factor", [1e-7, 1e7])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_is_scale_invariant(factor: float, dtype: type) -> None:
    batch, _ = make_batch(12, seed=2)
    unit = np.array([factor, 1, 1, 1, 1, 1])
    scaled = batch._replace(
        data=batch.data * factor,
        weight=batch.weight / factor**2,
        start=batch.start * unit,
        lower=batch.lower * unit,
        upper=batch.upper * unit,
    )
    one, other = (
        fit_groups(b._replace(**{k: getattr(b, k).astype(dtype) for k in GroupBatch._fields[:5]}))
        for b in (batch, scaled)
    )
    assert one.params.dtype == dtype
    tolerance = 1e-6 if dtype == np.float64 else 0.02
    free = one.params[batch.present] / unit.clip(1, 1)
    assert_allclose(other.params[batch.present] / unit, free, rtol=tolerance, atol=tolerance)
    assert_allclose(other.chi2_red, one.chi2_red, rtol=tolerance)


def test_f32_finds_what_f64_finds() -> None:
    batch, _ = make_batch(40, seed=3)
    double = fit_groups(batch)
    single = fit_groups(
        batch._replace(**{k: getattr(batch, k).astype(np.float32) for k in GroupBatch._fields[:5]})
    )
    assert_allclose(cost_at(single, batch), cost_at(double, batch), rtol=1e-6)
    assert_allclose(single.cost, double.cost, rtol=1e-5)  # one step before


@pytest.mark.parametrize(("dtype", "digits"), [(np.float64, 1e-10), (np.float32, 1e-3)])
@pytest.mark.parametrize("factor", [1e-7, 1.0])
def test_data_without_noise_are_fitted_exactly(dtype: type, digits: float, factor: float) -> None:
    """Where the cost itself goes to zero, its last digits are no reason to go on."""
    batch, truth = make_batch(20, seed=4)
    data = [image_of(own[there]) for own, there in zip(truth, batch.present, strict=True)]
    unit = np.array([factor, 1, 1, 1, 1, 1])
    changed = {k: getattr(batch, k) * unit for k in ("start", "lower", "upper")}
    changed |= {"data": np.array(data) * factor, "weight": batch.weight / factor**2}
    batch = batch._replace(**{k: v.astype(dtype) for k, v in changed.items()})
    fit = fit_groups(batch, FitOptions(other_starts=False))
    assert (fit.status == CONVERGED).all()
    assert fit.steps.max() < 30
    off = (fit.params / unit - truth)[batch.present][:, :THETA]
    assert_allclose(off, 0, atol=digits)


def cost_at(fit: FitResult, batch: GroupBatch) -> np.ndarray:
    """Costs (group,) of the fitted parameters, in double precision."""
    images = [
        image_of(own[there], smooth)
        for own, there, smooth in zip(
            fit.params.astype(float), batch.present, fit.coefficients.astype(float), strict=True
        )
    ]
    return 0.5 * np.sum(batch.weight * (batch.data - np.array(images)) ** 2, axis=(1, 2))


def errors(fit: FitResult) -> np.ndarray:
    """Standard errors of the sources' parameters (group, slot, 6)."""
    count = fit.params.shape[1] * 6
    variance = np.diagonal(fit.covariance, axis1=1, axis2=2)[:, :count]
    return np.sqrt(variance).reshape(fit.params.shape)


def repeated(noise: np.ndarray) -> tuple[GroupBatch, np.ndarray]:
    """One sky with many noises (n, SIDE, SIDE), fitted from the truth; its sources."""
    truth = np.zeros((SLOTS, 6))
    truth[0] = [60, 11.2, 11.9, 3.4, 2.2, 0.7]
    truth[1] = [45, 16.4, 13.1, 2.9, 2.1, 2.0]
    everywhere = np.ones((len(noise), SLOTS, 6))
    batch = GroupBatch(
        data=image_of(truth, np.array([2.0, 1.0, -1.0])) + noise,
        weight=np.ones(noise.shape),
        start=truth * everywhere,
        lower=(truth - np.array([60, 3, 3, 1.5, 1.5, 0])) * everywhere,
        upper=(truth + np.array([60, 3, 3, 3, 3, 0])) * everywhere,
        free=everywhere > 0,
        present=everywhere[..., 0] > 0,
        order=np.ones(len(noise)),
    )
    return batch, truth


def fitted(batch: GroupBatch, options: FitOptions = FitOptions()) -> FitResult:  # noqa: B008
    """The fits of many groups, 500 at a time: the program for that is that of other tests."""
    parts = [
        fit_groups(GroupBatch(*(leaf[first : first + 500] for leaf in batch)), options)
        for first in range(0, len(batch.data), 500)
    ]
    return FitResult(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


@pytest.mark.parametrize("loss", ["huber", "soft_l1", "cauchy"])
@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_covariance_of_robust_losses_matches_monte_carlo(loss: str, outliers: float) -> None:
    """Also with outliers (5 % of the pixels at 8 sigma), which the weights know nothing of."""
    rng = np.random.default_rng(31)
    noise = rng.normal(size=(2000, SIDE, SIDE))
    noise *= np.where(rng.uniform(size=noise.shape) < outliers, 8, 1)
    batch, _ = repeated(noise)
    fit = fitted(batch, FitOptions(loss=loss, f_scale=1.345))
    assert (fit.status == CONVERGED).all()
    predicted = np.sqrt(np.mean(errors(fit) ** 2, axis=0))
    assert_allclose(fit.params.std(axis=0), predicted, rtol=0.06)


def test_covariance_matches_monte_carlo() -> None:
    """2000 fits of one sky: predicted and seen errors agree to 5 % (sampling: 1.6 %, 1 sigma)."""
    n = 2000
    batch, truth = repeated(np.random.default_rng(11).normal(size=(n, SIDE, SIDE)))
    fit = fitted(batch)
    assert (fit.status == CONVERGED).all()
    assert not fit.on_bound.any()
    predicted = np.median(errors(fit), axis=0)
    assert_allclose(fit.params.std(axis=0), predicted, rtol=0.05)
    assert_allclose(fit.params.mean(axis=0), truth, atol=6 * predicted.max() / np.sqrt(n))
    flux = 2 * np.pi * np.prod(fit.params[..., [PEAK, MAJOR, MINOR]], axis=-1)
    slope = np.zeros((n, SLOTS, 6))
    for column in (PEAK, MAJOR, MINOR):
        slope[..., column] = flux / fit.params[..., column]
    for slot in range(SLOTS):
        own = fit.covariance[:, 6 * slot : 6 * slot + 6, 6 * slot : 6 * slot + 6]
        error = np.sqrt(np.einsum("gi,gij,gj->g", slope[:, slot], own, slope[:, slot]))
        assert_allclose(flux[:, slot].std(), np.median(error), rtol=0.05)
    assert_allclose(fit.chi2_red.mean(), 1, atol=0.01)


def test_held_parameters_do_not_move() -> None:
    """Forced photometry: with positions and shapes held at the truth only peaks are fitted."""
    batch, truth = make_batch(20, seed=4)
    free = np.zeros_like(batch.free)
    free[..., PEAK] = batch.present
    fit = fit_groups(batch._replace(start=truth, free=free))
    assert (fit.status == CONVERGED).all()
    assert_array_equal(fit.params[..., 1:], truth[..., 1:])
    off, error = (fit.params - truth)[batch.present], errors(fit)[batch.present]
    pull = off[:, PEAK] / error[:, PEAK]
    assert abs(pull.mean()) < 4 / np.sqrt(pull.size)
    assert 0.7 < pull.std() < 1.3
    assert (error[:, 1:] == 0).all()


@pytest.mark.parametrize("held", [[THETA], [MAJOR], [MINOR], [MAJOR, MINOR], [MAJOR, THETA]])
def test_any_part_of_a_shape_can_be_held(held: list[int]) -> None:
    """Near the truth, of the first source of every other pair of groups; scipy finds no better."""
    batch, truth = make_batch(12, seed=8, snr=(30, 60))
    free, start = batch.free.copy(), batch.start.copy()
    part = np.zeros_like(free)
    part[::4, 0, held], part[1::4, 0, held] = True, True
    free &= ~part
    start[..., THETA] = truth[..., THETA] + 0.3
    start[part] = (truth * [1, 1, 1, 1.05, 1.05, 1.0])[part]
    batch = batch._replace(free=free, start=start)
    fit = fit_groups(batch)
    assert (fit.status == CONVERGED).all()
    named = np.where((fit.params == start) | ~part, fit.params, exchanged(fit.params))
    assert_allclose(
        named[part], start[part] % np.pi if held == [THETA] else start[part], rtol=1e-14
    )
    as_named = (named == fit.params).all(-1)
    assert (errors(fit)[part & as_named[..., None]] == 0).all()
    assert (errors(fit)[free & as_named[..., None]] > 0).all()
    best = [scipy_cost(batch, g, FitOptions(), s) for g, s in enumerate(batch.start)]
    assert (fit.cost <= np.array(best) * (1 + 1e-6)).all()
    others = ~part.any((1, 2))
    without = fit_groups(batch._replace(**{n: v[others] for n, v in batch._asdict().items()}))
    assert_array_equal(fit.params[others], without.params)


def test_axes_that_cross_are_told_in_their_order() -> None:
    """A held sigma_major of what is larger across is its sigma_minor, a held angle turns by 90."""
    truth = np.array([[40.0, 11.0, 12.0, 2.6, 1.8, 0.5], [0, 0, 0, 0, 0, 0]])
    batch, _ = make_batch(3)
    one = {"present": np.array([[True, False]] * 3), "order": np.full(3, -1)}
    data = np.repeat(image_of(truth[:1])[None], 3, 0)
    start = np.repeat(truth[None], 3, 0)
    start[:, 0, :3] += [3.0, 0.3, -0.2]
    start[:, 0, 3:] = [[1.8, 1.8, 0.5], [2.0, 2.0, 0.5 + np.pi / 2], [1.8, 2.2, 1.9]]
    free = np.ones((3, SLOTS, 6), bool)
    free[0, 0, MAJOR] = free[1, 0, THETA] = free[2, 0, MAJOR] = False
    spread = np.array([40.0, 3.0, 3.0, 0.0, 0.0, 0.0])
    lower, upper = start - spread, start + spread
    lower[..., MAJOR : MINOR + 1], upper[..., MAJOR : MINOR + 1] = 0.5, 6.0
    fit = fit_groups(
        batch._replace(data=data, start=start, free=free, lower=lower, upper=upper, **one)
    )
    assert (fit.status == CONVERGED).all()
    assert_allclose(fit.params[:, 0], np.repeat(truth[:1], 3, 0), rtol=1e-5)
    known = np.zeros((3, 6), bool)
    known[0, MINOR] = known[1, THETA] = known[2, MINOR] = True
    error = np.sqrt(np.diagonal(fit.covariance, axis1=1, axis2=2))[:, :6]
    assert_array_equal(error == 0, known)
    whole = fit_groups(batch._replace(data=data, start=start, lower=lower, upper=upper, **one))
    some = np.delete(np.arange(6), THETA)
    inverse = np.linalg.inv(whole.covariance[1][:6, :6])[np.ix_(some, some)]
    assert_allclose(
        fit.covariance[1][np.ix_(some, some)], np.linalg.inv(inverse), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_parts_of_several_shapes_can_be_held(loss: str, dtype: type) -> None:
    """Of both sources of blends: a sigma of one and the angle of the other, at the truth."""
    batch, truth = make_batch(16, seed=18, snr=(20, 40))
    batch = GroupBatch(*(leaf[1::2] for leaf in batch))
    truth = truth[1::2]
    free, start = batch.free.copy(), batch.start.copy()
    free[:, 0, MINOR] = free[:, 1, THETA] = False
    start[~free] = truth[~free]
    batch = batch._replace(free=free, start=start)
    options = FitOptions(loss=loss)
    single = batch._replace(data=batch.data.astype(dtype), weight=batch.weight.astype(dtype))
    fit = fit_groups(single, options)
    assert fit.params.dtype == dtype
    assert (fit.status == CONVERGED).all()
    best = [
        min(
            scipy_cost(batch, g, options, first[g])
            for first in (start, np.where(free, truth, start))
        )
        for g in range(len(truth))
    ]
    assert (fit.cost <= np.array(best) * (1 + (1e-6 if dtype == np.float64 else 1e-5))).all()


def test_a_free_angle_that_has_no_effect_leaves_the_other_errors_alone() -> None:
    """Sizes held round: as if the angle were held too, but for its own error, which is NaN."""
    batch, _ = make_batch(6, seed=9)
    free, start = batch.free.copy(), batch.start.copy()
    free[..., MAJOR : MINOR + 1] = False
    start[..., MAJOR : MINOR + 1] = 1.4 * SIGMA
    bounds = {n: np.where(free, getattr(batch, n), np.nan) for n in ("lower", "upper")}
    batch = batch._replace(**bounds)  # those of what is held are not read
    some = fit_groups(batch._replace(free=free, start=start))
    free[..., THETA] = False
    held = fit_groups(batch._replace(free=free, start=start))
    assert (some.status == CONVERGED).all()
    assert_allclose(some.params[..., :MAJOR], held.params[..., :MAJOR], rtol=1e-4, atol=1e-4)
    assert_allclose(errors(some)[..., :THETA], errors(held)[..., :THETA], rtol=1e-3)
    assert np.isnan(errors(some)[batch.present][:, THETA]).all()


@pytest.mark.parametrize("held", [[X], [PEAK], [MINOR], [MAJOR, MINOR, THETA]])
def test_what_is_held_has_no_bounds(held: list[int]) -> None:
    """The cost is that of the parameters that are told."""
    batch, _ = make_batch(6, seed=10)
    free, start = batch.free.copy(), batch.start.copy()
    free[..., held] = False
    start[..., held] = (batch.upper * [1.5, 1, 1, 1.2, 1.2, 1] + [0, 2, 0, 0, 0, 1])[..., held]
    without = {n: np.where(free, getattr(batch, n), np.nan) for n in ("lower", "upper")}
    if held == [MINOR]:  # whose bounds are also those of the other sigma
        without = {}
    batch = batch._replace(free=free, start=start, order=np.full(6, 0), **without)
    fit = fit_groups(batch)
    for group, present in enumerate(batch.present):
        level = fit.coefficients[group, :1]
        model = image_of(fit.params[group][present], level)
        cost = 0.5 * np.sum(batch.weight[group] * (batch.data[group] - model) ** 2)
        assert_allclose(fit.cost[group], cost, rtol=1e-4)


def test_orders_that_no_code_is_for_are_refused() -> None:
    batch, _ = make_batch(2)
    with pytest.raises(FitInputError, match=r"^highest_order: at most 4"):
        fit_groups(batch, highest_order=5)
    with pytest.raises(FitInputError, match=r"^order"):
        fit_groups(batch._replace(order=np.array([0.5, 1])))


def test_background_coefficients() -> None:
    """Without noise the polynomial comes back, in the coordinates of the cutout."""
    batch, truth = make_batch(6, seed=6, order=2)
    wanted = np.array([2.0, -1.0, 0.5, 0.3, -0.2, 0.1])
    data = np.stack([image_of(s[p], wanted) for s, p in zip(truth, batch.present, strict=True)])
    fit = fit_groups(batch._replace(data=data), FitOptions(ftol=1e-15))
    assert_allclose(fit.coefficients, np.tile(wanted, (6, 1)), atol=1e-5)


def test_orders_are_data() -> None:
    """A batch may mix orders: each group gets what it would get alone."""
    batch, _ = make_batch(9, seed=7, order=2)
    orders = np.arange(9) % 4 - 1
    mixed = fit_groups(batch._replace(order=orders))
    for order in (-1, 0, 1, 2):
        alone = fit_groups(batch._replace(order=np.full(9, order)))
        assert_allclose(mixed.cost[orders == order], alone.cost[orders == order], rtol=1e-9)
    assert (mixed.coefficients[orders == -1] == 0).all()
    assert (mixed.coefficients[orders == 1][:, 3:] == 0).all()


def test_a_group_without_data_leaves_the_others_alone() -> None:
    batch, _ = make_batch(6, seed=8)
    whole = fit_groups(batch)
    weight, data = batch.weight.copy(), batch.data.copy()
    weight[2], data[2] = 0, np.nan
    fit = fit_groups(batch._replace(weight=weight, data=data))
    assert fit.status[2] == NO_DATA
    others = np.arange(6) != 2
    assert_array_equal(fit.params[others], whole.params[others])
    assert np.isfinite(fit.params).all()
    for name in ("cost", "chi2_red", "bic", "nmse"):
        assert np.array_equal(np.isnan(getattr(fit, name)), ~others), name
    assert_array_equal(fit.steps, np.where(others, whole.steps, 0))


def test_another_start_leaves_the_wrong_minimum() -> None:
    """Two sources 5.6 pixels apart, from a poor start: one ends on a bound of its position.

    The optimum is that of scipy from the truth; groups beside it keep their fits.
    """
    truth = np.array([[11.4, 11.0, 14.6, 3.1, 3.0, 0.0], [14.7, 11.9, 9.3, 2.1, 2.0, 1.8]])
    start = np.array([[5.7, 12.0, 13.6, 1.8, 1.8, 0.0], [7.3, 12.9, 10.3, 3.6, 3.5, 0.0]])
    spread = np.array([0, 2, 2, 0, 0, 0])
    lower, upper = start - spread, start + spread
    lower[:, PEAK], upper[:, PEAK] = start[:, PEAK] / 5, start[:, PEAK] * 5
    lower[:, MAJOR:THETA], upper[:, MAJOR:THETA] = SIGMA / 2, SIGMA * 4
    easy, _ = make_batch(4, seed=21)
    noise = np.random.default_rng(0).normal(size=(1, SIDE, SIDE))
    hard = GroupBatch(
        data=image_of(truth) + noise,
        weight=np.ones((1, SIDE, SIDE)),
        start=start[None],
        lower=lower[None],
        upper=upper[None],
        free=np.ones((1, SLOTS, 6), bool),
        present=np.ones((1, SLOTS), bool),
        order=np.ones(1, int),
    )
    batch = GroupBatch(*(np.concatenate(pair) for pair in zip(easy, hard, strict=True)))
    once, twice = fit_groups(batch, FitOptions(other_starts=False)), fit_groups(batch)
    best = scipy_cost(hard, 0, FitOptions(), truth)
    assert once.on_bound[-1].any()
    assert once.cost[-1] > best + 10
    assert_allclose(twice.cost[-1], best, rtol=1e-6)
    assert twice.steps[-1] > once.steps[-1]
    assert_array_equal(twice.params[:-1], once.params[:-1])
    assert (np.abs(twice.params[-1] - truth)[:, X : Y + 1] < 1).all()


@pytest.mark.parametrize(("loss", "held"), [("huber", []), ("linear", [X, Y, MAJOR, MINOR, THETA])])
def test_fits_are_not_begun_again_without_a_reason(loss: str, held: list[int]) -> None:
    """Robust ones, which take more steps; those of peaks only, whose other starts are the same."""
    batch, _ = make_batch(12, seed=17)
    free = batch.free.copy()
    free[..., held] = False
    start = batch.start.copy()
    start[..., PEAK] = batch.upper[..., PEAK] if held else start[..., PEAK]
    batch = batch._replace(free=free, start=start)
    once = fit_groups(batch, FitOptions(loss=loss, other_starts=False))
    assert (once.steps > 9).any() or held
    assert_array_equal(fit_groups(batch, FitOptions(loss=loss)).steps, once.steps)


def test_step_limit_is_reported() -> None:
    batch, _ = make_batch(6, seed=9, poor=True)
    fit = fit_groups(batch, FitOptions(max_steps=2))
    assert (fit.status == STEP_LIMIT).all()
    assert (fit.steps == 2).all()


def test_l2_penalty_shrinks_the_background() -> None:
    batch, _ = make_batch(6, seed=10)
    free, held = fit_groups(batch), fit_groups(batch, FitOptions(lambda_l2=1e6))
    assert (np.abs(held.coefficients[:, 1:3]) < 0.02 * np.abs(free.coefficients[:, 1:3])).all()


def test_cauchy_survives_hot_pixels() -> None:
    """1 % of pixels at +200 sigma: the linear fit is pulled away, the robust one is not."""
    batch, truth = make_batch(20, seed=12)
    rng = np.random.default_rng(0)
    data = np.where(rng.uniform(size=batch.data.shape) < 0.01, batch.data + 200, batch.data)
    there = batch.present
    linear, robust = (
        np.median(
            np.abs(fit_groups(batch._replace(data=data), FitOptions(loss=loss)).params - truth)[
                there
            ][:, PEAK]
        )
        for loss in ("linear", "cauchy")
    )
    assert robust < 0.4 * linear


BAD = {
    "data": {"data": np.zeros((0, SIDE, SIDE))},
    "weight": {"weight": np.ones((3, SIDE, SIDE + 1))},
    "weight: must": {"weight": -np.ones((3, SIDE, SIDE))},
    "start": {"start": np.zeros((3, SLOTS, 5))},
    "order": {"order": np.full(3, 5)},
    "present": {"present": np.ones(3, bool)},
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input_names_the_argument(argument: str) -> None:
    batch, _ = make_batch(3)
    with pytest.raises(FitInputError, match=f"^{argument}"):
        fit_groups(batch._replace(**BAD[argument]))


def test_bad_values_name_the_argument() -> None:
    batch, _ = make_batch(3)
    data = batch.data.copy()
    data[0, 3, 3] = np.nan
    with pytest.raises(FitInputError, match=r"^data: not finite"):
        fit_groups(batch._replace(data=data))
    with pytest.raises(FitInputError, match=r"^lower, upper"):
        fit_groups(batch._replace(lower=batch.upper, upper=batch.lower))
    with pytest.raises(FitInputError, match=r"^loss"):
        fit_groups(batch, FitOptions(loss="square"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("f_scale", 0.0), ("f_scale", -1.0), ("lambda_l2", -1.0), ("ftol", float("nan"))),
        *(("max_steps", 0), ("damping", 0.0)),
    ],
)
def test_bad_options_are_named(name: str, value: float) -> None:
    batch, _ = make_batch(2)
    with pytest.raises(FitInputError, match=f"^{name}"):
        fit_groups(batch, FitOptions(**{name: value}))


def test_bounds_of_sizes_exclude_each_other() -> None:
    batch, _ = make_batch(2)
    lower, upper = batch.lower.copy(), batch.upper.copy()
    lower[..., MINOR], upper[..., MINOR] = 3.0, 4.0
    upper[..., MAJOR] = 2.0
    with pytest.raises(FitInputError, match=r"^lower, upper"):
        fit_groups(batch._replace(lower=lower, upper=upper))


def test_empty_slots_may_hold_anything_and_masks_may_be_integers() -> None:
    batch, _ = make_batch(4)
    usual = fit_groups(batch)
    empty = ~batch.present
    changed = {name: np.array(getattr(batch, name)) for name in ("start", "lower", "upper")}
    for values in changed.values():
        values[empty] = np.nan
    masks = {name: getattr(batch, name).astype(int) for name in ("free", "present")}
    odd = fit_groups(batch._replace(**changed, **masks))
    assert_array_equal(odd.params[batch.present], usual.params[batch.present])
    assert_array_equal(odd.status, usual.status)


def test_of_several_starts_the_best_fit_counts() -> None:
    """Whichever it is: of many faint blends from poor starts each is the better one for some."""
    batch, _ = make_batch(800, seed=11, snr=(3, 5), poor=True)
    blends = GroupBatch(*(leaf[1::2] for leaf in batch))
    middle = blends.start.copy()
    middle[..., MAJOR:THETA] = np.sqrt(2) * SIGMA
    once = fit_groups(blends, FitOptions(other_starts=False))
    other = fit_groups(blends._replace(start=middle), FitOptions(other_starts=False, damping=1.0))
    both = fit_groups(blends)
    assert (both.cost <= once.cost).all()
    assert (once.cost < other.cost * (1 - 1e-4)).any()
    assert (other.cost < once.cost * (1 - 1e-4)).any()


def test_more_problems_than_a_block() -> None:
    batch, _ = make_batch(12, seed=13)
    many = GroupBatch(*(np.concatenate([leaf] * 90) for leaf in batch))  # 1080 > 2 * 512
    one, all_of_them = fit_groups(batch), fit_groups(many)
    assert_allclose(all_of_them.params, np.concatenate([one.params] * 90), rtol=1e-9, atol=1e-9)


def test_errors_of_sources_that_end_all_but_round_are_those_of_round_ones() -> None:
    """A fit of round sources without noise ends within 1e-6 of round, rarely at it."""
    batch, truth = make_batch(16, seed=4)
    for group, sources in enumerate(truth):
        own = sources[batch.present[group]].copy()
        own[:, MAJOR:THETA] = 1.4 * SIGMA
        batch.data[group] = image_of(own)
    batch.start[batch.present, MAJOR:] = [1.6 * SIGMA, 1.3 * SIGMA, 0.3]
    result = fit_groups(batch, FitOptions())
    params = result.params[batch.present]
    assert_allclose(params[:, MAJOR], params[:, MINOR], rtol=1e-6)
    for group, slot in zip(*np.nonzero(batch.present), strict=True):
        own = slice(6 * slot + MAJOR, 6 * slot + THETA + 1)
        covariance = result.covariance[group, own, own]
        major, minor, theta = np.sqrt(np.diag(covariance))
        assert abs(covariance[0, 1]) < 0.9 * major * minor
        assert theta > 100  # rad
