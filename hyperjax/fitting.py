"""Joint fits of many groups of sources at once.

`fit_groups` takes a `GroupBatch` (cutouts of the same size, each with the same number of source
slots) in pixel units and returns a `FitResult` in the same units. Inside, every problem is brought
to scaled coordinates and to data of unit scale (so that a fit of Jy or of MJy/sr takes the
same steps), solved in persistent lanes, on all cores, and brought back with its covariance.
"""

import functools
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hyperjax.errors import FitInputError
from hyperjax.kernels import solve_on
from hyperjax.large_groups import inverse_blocks, solve_large
from hyperjax.lockstep import fit_with_others
from hyperjax.models import (
    LEAST_ELLIPTICITY,
    LOSSES,
    SHAPE,
    GaussianGroup,
    Grid,
    Model,
    Problem,
    Scale,
    monomials,
)
from hyperjax.runtime import at_once, fit_threads
from hyperjax.solver import (
    CONVERGED,
    FIRST_DAMPING,
    NO_DATA,
    SINGULAR,
    STEP_LIMIT,
    Solution,
    Tolerances,
)
from hyperjax.spectral import SpectralGroup

__all__ = [
    "CONVERGED",
    "NO_DATA",
    "SINGULAR",
    "STEP_LIMIT",
    "FitOptions",
    "FitResult",
    "GroupBatch",
    "fit_groups",
    "fit_spectra",
]

PEAK, X, Y, MAJOR, MINOR, THETA = range(SHAPE)
"""Places of a source's parameters: peak, x, y, sigma_major, sigma_minor, theta."""

_ORDERS = (1, 2, 4)  # that code is compiled for; lower ones hold coefficients at 0
_BLOCKS, _DEVICE_BLOCKS = (2048, 4096), (8192, 131072)  # problems in a call x bytes of a number
_BLOCK_BYTES = 256_000_000  # of their data and weights, at most, of all threads together
_DEVICE_BYTES = 4_000_000_000  # working set of the lanes of a device that is not a processor
_DEVICE_LANES = 16384  # of it, at most
_ROUNDING = 8  # of a model's pixel, in the last digit of data of unit scale
_FEW_STEPS = 8  # that a fit takes from a fair start
_OTHER_DAMPING = 1.0  # of the first step where the fit before was doubtful
_ALIGNMENT = 64  # bytes, of arrays that jax does not copy
_LANES = 256  # of a core x bytes of a number, at most
_MOST_SLOTS = 32  # that are solved in lanes, with dense matrices
_LANE_BYTES = 2_500_000  # working set of the lanes of one core: it should fit the cache


class GroupBatch(NamedTuple):
    """Groups of sources on cutouts of one size, padded to the same number of slots.

    Attributes
    ----------
    data
        (group, ny, nx) brightness, in any unit; not read where `weight` is 0.
    weight
        (group, ny, nx) inverse variance of the data, 0 where masked.
    start, lower, upper
        (group, slot, 6) start and bounds of peak, x, y, sigma_major, sigma_minor (pixels;
        0-based pixel centres of the cutout) and theta (rad, from +x towards +y; its bounds are
        not read, and both sigmas of a source share the bounds of sigma_minor and sigma_major:
        the lower of the first, the upper of the second). A start outside its bounds is moved to
        them.
    free
        (group, slot, 6) False where a parameter is held at its start; sigma_major, sigma_minor and
        theta of a source are held together.
    present
        (group, slot) False for slots that hold no source.
    order
        (group,) order of the polynomial background that is fitted with the sources, -1 for none.
    """

    data: Float[Array, "group ny nx"]
    weight: Float[Array, "group ny nx"]
    start: Float[Array, "group slot 6"]
    lower: Float[Array, "group slot 6"]
    upper: Float[Array, "group slot 6"]
    free: Bool[Array, "group slot 6"]
    present: Bool[Array, "group slot"]
    order: Int[Array, " group"]


class FitOptions(NamedTuple):
    """How to fit. `loss` shapes the compiled code; the others are data.

    Attributes
    ----------
    loss
        "linear", "soft_l1", "huber" or "cauchy", as in `scipy.optimize.least_squares`.
    f_scale
        Residual, in units of the noise, from which the loss is no longer quadratic.
    lambda_l2
        L2 penalty on the polynomial's coefficients (noise units over a cutout scaled to [-1, 1]).
    ftol, xtol, gtol, max_steps, damping
        When to stop, and how to begin (`hyperjax.solver.Tolerances`).
    other_starts
        Whether groups of several sources are fitted twice more where their optimum may be the wrong
        one: with a parameter on a bound, far from the start (more than eight steps with the linear
        loss), or none found (SINGULAR). That is from round sources of sizes in the middle of their
        bounds, then with their positions on the other side of their starts too, with short first
        steps; the best fit counts. (Gaussians, up to 32 slots.)
    """

    loss: str = "linear"
    f_scale: float = 1.0
    lambda_l2: float = 0.0
    ftol: float | None = None
    xtol: float = 0.0
    gtol: float = 0.0
    max_steps: int = 200
    damping: float = FIRST_DAMPING
    other_starts: bool = True


class FitResult(NamedTuple):
    """Fitted groups, in the batch's units, with the groups' order kept.

    Cost, statistics and covariance are those of the last evaluation, one small step before the
    parameters (`solver.advance`).

    Attributes
    ----------
    params
        (group, slot, 6) peak, x, y, sigma_major >= sigma_minor, theta in [0, pi).
    coefficients
        (group, monomial) of the background over `models.monomials`, in scaled coordinates; 0 beyond
        the group's order.
    covariance
        (group, P, P) of the sources' parameters and then the coefficients: the inverse of the
        Gauss-Newton matrix at the optimum, for a robust loss times the spread of the residuals
        (`models.misfit`); 0 for what was held, NaN where it is singular. For batches of more than
        32 slots (group, slot, 6, 6): each source's own block of it, as the whole grows with the
        square of their number.
    cost
        (group,) half the weighted sum of squared residuals (of the loss). It and the statistics are
        NaN for a group without data.
    chi2_red, bic, nmse
        (group,) chi^2 per degree of freedom; n ln(chi^2/n) + k ln n for n pixels and k free
        parameters; weighted sum of squared residuals over that of the data about their mean.
    steps, status
        (group,) evaluations of the model, of all fits where there were other starts, and
        CONVERGED, STEP_LIMIT, SINGULAR or NO_DATA.
    on_bound
        (group, slot, 6) parameters that ended on a bound.
    """

    params: Float[Array, "group slot 6"]
    coefficients: Float[Array, "group monomial"]
    covariance: Float[Array, "group P P"]
    cost: Float[Array, " group"]
    chi2_red: Float[Array, " group"]
    bic: Float[Array, " group"]
    nmse: Float[Array, " group"]
    steps: Int[Array, " group"]
    status: Int[Array, " group"]
    on_bound: Bool[Array, "group slot 6"]


def fit_groups(
    batch: GroupBatch,
    options: FitOptions = FitOptions(),  # noqa: B008
    *,
    highest_order: int = -1,
) -> FitResult:
    """Fit every group of the batch: Gaussians and a polynomial background, jointly.

    Groups may have any number of sources; batches of more than 32 slots are solved group by group
    on sparse matrices, so that memory does not grow with the square of the slots.

    Parameters
    ----------
    batch
        Groups on cutouts of one size. Its data's type, float32 or float64, is that of the fit,
        whatever jax's own default.
    options
        See `FitOptions`.
    highest_order
        Order of a background that code is compiled for in any case: batches of lower orders then
        share it.

    Returns
    -------
    FitResult
        Arrays (numpy) with the leading axis of the batch. A group without a valid pixel has the
        status NO_DATA and its start as parameters; the others are not affected by it.

    Raises
    ------
    FitInputError
        If shapes, bounds, data or options are inconsistent; the message names the argument.

    Examples
    --------
    One source on a plane, in one cutout of unit noise::

        y, x = np.mgrid[:24, :24]
        data = 20 * np.exp(-((x - 11.3) ** 2 + (y - 12.1) ** 2) / 8) + rng.normal(size=(24, 24))
        start = np.array([15, 11, 12, 1.7, 1.7, 0])
        spread = np.array([15, 2, 2, 1, 1, 0])
        batch = GroupBatch(
            data=data[None],
            weight=np.ones((1, 24, 24)),
            start=start[None, None],
            lower=(start - spread)[None, None],
            upper=(start + spread)[None, None],
            free=np.ones((1, 1, 6), bool),
            present=np.ones((1, 1), bool),
            order=np.array([1]),
        )
        fit = fit_groups(batch)
        fit.params[0, 0], np.sqrt(np.diagonal(fit.covariance[0]))[:6]
    """
    batch = _validated(batch, options)
    _, ny, nx = batch.data.shape
    wanted = max(int(batch.order.max()), highest_order)
    highest = next(order for order in _ORDERS if wanted <= order)
    slots = batch.start.shape[1]
    model = GaussianGroup(Grid((ny, nx)), slots, highest, options.loss)
    if slots > _MOST_SLOTS:
        return _large(model, options, batch)

    def fit(piece: GroupBatch, device: jax.Device) -> FitResult:
        _check_parameters(piece)
        fits = _fitted(model, options, piece, device)
        if not np.isfinite(fits.cost[fits.status != NO_DATA]).all():
            _check_pixels(piece)
        return fits

    result = in_pieces(fit, batch, model, options)
    return _best_of_starts(model, options, batch, result) if options.other_starts else result


def _best_of_starts(
    model: GaussianGroup, options: FitOptions, batch: GroupBatch, result: FitResult
) -> FitResult:
    """The result, with doubtful fits of several sources replaced by better ones from elsewhere."""
    slow = (result.steps > _FEW_STEPS) & (model.loss == "linear")  # robust fits take more steps
    odd = result.on_bound.any((1, 2)) | slow
    doubtful = (result.status == SINGULAR) | ((result.status == CONVERGED) & odd)
    options = options._replace(damping=_OTHER_DAMPING)
    fit = functools.partial(_fitted, model, options)
    before = batch.start
    for start in (_in_the_middle, _on_the_other_side):
        elsewhere = start(batch, result)
        differs = (elsewhere != before).any((1, 2))
        again = np.flatnonzero(doubtful & differs & (batch.present.sum(1) > 1))
        before = elsewhere
        if not again.size:
            continue
        some = GroupBatch(*(leaf[again] for leaf in batch._replace(start=elsewhere)))
        other = in_pieces(fit, some, model, options)
        steps = result.steps[again] + other.steps
        better = (other.status == CONVERGED) & ~(result.cost[again] <= other.cost)
        for whole, new in zip(result, other, strict=True):
            whole[again[better]] = new[better]
        result.steps[again] = steps
    return result


def _in_the_middle(batch: GroupBatch, _: FitResult) -> np.ndarray:
    """Starts (group, slot, 6) with the sizes that are free in the middle of their bounds, round."""
    middle = np.sqrt(batch.lower[..., MINOR] * batch.upper[..., MAJOR])
    known = batch.present & np.isfinite(middle) & (middle > 0)
    moves = known[..., None] & batch.free & (np.arange(SHAPE) >= MAJOR)
    shape = np.where(np.arange(SHAPE) == THETA, 0, middle[..., None])
    return np.where(moves, shape, batch.start)


def _on_the_other_side(batch: GroupBatch, result: FitResult) -> np.ndarray:
    """Those of `_in_the_middle`, each position as far beyond the start as it was fitted before."""
    place = (np.arange(SHAPE) == X) | (np.arange(SHAPE) == Y)
    moves = place & batch.free & batch.present[..., None]
    opposite = 2 * batch.start - result.params
    return np.where(moves, opposite, _in_the_middle(batch, result))


def fit_spectra(batch: GroupBatch, side: int, options: FitOptions = FitOptions()) -> FitResult:  # noqa: B008
    """Fit every group of the batch to the Fourier modes of its whitened window.

    Parameters
    ----------
    batch
        Groups as `fit_groups` takes them, with the modes in the place of the pixels: `data` is
        (group, 2, mode), real and imaginary parts, and `weight` (group, mode), as
        `hyperjax.spectral.SpectralGroup` has them. `order` is -1.
    side
        Side of the windows, pixels, even.
    options
        See `FitOptions`; the loss is linear.
    """
    model = SpectralGroup(Grid((side, side)), batch.start.shape[1], -1)
    result = in_pieces(functools.partial(_fitted, model, options), batch, model, options)
    power = np.sum(batch.data**2, axis=(1, 2))
    return result._replace(nmse=2 * result.cost / np.where(power > 0, power, 1))


def _large(model: GaussianGroup, options: FitOptions, batch: GroupBatch) -> FitResult:
    """The fits of groups of any number of sources, one by one (`hyperjax.large_groups`)."""
    _check_parameters(batch)
    _check_pixels(batch)

    def fit(row: int) -> FitResult:
        one = GroupBatch(*(leaf[row : row + 1] for leaf in batch))
        doubled = (leaf.astype(np.float64) if leaf.dtype.kind == "f" else leaf for leaf in one)
        one = GroupBatch(*doubled)
        problems = to_problems(np, model, one, options)
        problem = jax.tree.map(lambda leaf: leaf[0], problems)
        solution, scale = solve_large(
            model, problem, tolerances_of(options, problem.data.size, np.float64)
        )
        inverse = inverse_blocks(solution.normal.matrix, problem.free, model.slots)
        solution = solution._replace(normal=solution.normal._replace(matrix=None))
        solution, scale = jax.tree.map(lambda leaf: np.asarray(leaf)[None], (solution, scale))
        slopes = _slopes(model.grid, scale.unit, _sources_of(model, solution))
        covariance = slopes @ inverse[None] @ slopes.swapaxes(-1, -2)
        return _to_results(model, one, problems.free, solution, scale, covariance)

    fits = at_once(fit, range(len(batch.data)), fit_threads(1))
    results = FitResult(*(np.concatenate(leaves) for leaves in zip(*fits, strict=True)))
    dtype = batch.data.dtype
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf, results
    )


def _fitted(
    model: GaussianGroup, options: FitOptions, batch: GroupBatch, device: jax.Device
) -> FitResult:
    """The fits of at most the largest of the `block_sizes` groups."""
    problems = to_problems(np, model, batch, options)
    solution, scale = solve_block(model, problems, options, device)
    slopes = _slopes(model.grid, scale.unit, _sources_of(model, solution))
    inverse = _propagated(slopes, scale.unit, solution.normal.matrix)
    return _to_results(model, batch, problems.free, solution, scale, inverse)


def in_pieces(
    fit: Callable[[GroupBatch, jax.Device], FitResult],
    batch: GroupBatch,
    model: Model,
    options: FitOptions,
) -> FitResult:
    """Fit a batch in pieces of at most the `block_sizes`, several at a time.

    In a call that works in step with others it is joined with batches of the same model, options
    and type (`hyperjax.lockstep`). Each thread (`runtime.fit_threads`) makes a piece ready, fits
    it on a device and reads the result, so that little more than the batch is in memory.
    """
    dtype = batch.data.dtype
    sizes, lanes = block_sizes(model, dtype), lanes_for(model, dtype)
    return fit_with_others(
        (model, options, dtype), functools.partial(_in_pieces, fit, sizes, lanes), batch
    )


def _in_pieces(
    fit: Callable[[GroupBatch, jax.Device], FitResult],
    sizes: list[int],
    lanes: int,
    batch: GroupBatch,
) -> FitResult:
    devices = jax.local_devices()
    threads = fit_threads(len(devices))
    count = len(batch.data)
    size = next((size for size in sizes if size * threads >= count), sizes[-1])
    shares = min(threads, max(count // lanes, len(devices)))
    size = min(size, -(-count // shares))
    pieces = [
        GroupBatch(*(leaf[first : first + size] for leaf in batch))
        for first in range(0, count, size)
    ]
    placed = list(zip(pieces, itertools.cycle(devices), strict=False))
    fits = at_once(lambda pair: fit(*pair), placed, threads)
    return FitResult(*(np.concatenate(leaves) for leaves in zip(*fits, strict=True)))


def solve_block(
    model: Model, problems: Problem, options: FitOptions, device: jax.Device
) -> tuple[Solution, Scale]:
    """Solve at most the largest of the `block_sizes` problems on a device: `kernels.solve_on`."""
    dtype, count = problems.data.dtype, len(problems.data)
    size = next(size for size in block_sizes(model, dtype) if size >= count)

    solved = solve_on(
        device,
        model,
        lanes_for(model, dtype),
        jax.tree.map(lambda leaf: _in_rows(leaf, size), problems),
        tolerances_of(options, problems.data[0].size, dtype),
        np.asarray(count, np.int32),
    )
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], solved)


def _in_rows(leaf: np.ndarray, size: int) -> np.ndarray:
    """The array in one of `size` rows, zeros beyond its own, that jax uses where it is."""
    shape, count = (size, *leaf.shape[1:]), len(leaf)
    length = leaf.itemsize * int(np.prod(shape))
    memory = np.empty(length + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    out = memory[first : first + length].view(leaf.dtype).reshape(shape)
    out[:count], out[count:] = leaf, 0
    return out


def block_sizes(model: Model, dtype: Any) -> list[int]:
    """Numbers of problems that are solved in one call: few, so that there are few programs."""
    ny, nx = model.grid.shape
    room = _BLOCK_BYTES // fit_threads(len(jax.local_devices()))
    bytes_each = np.dtype(dtype).itemsize
    most = max(room // (2 * ny * nx * bytes_each), 1)
    wanted = _BLOCKS if jax.default_backend() == "cpu" else _DEVICE_BLOCKS
    return sorted({min(size // bytes_each, 2 ** int(np.log2(most))) for size in wanted})


def tolerances_of(options: FitOptions, pixels: int, dtype: Any) -> Tolerances:
    """The options' tolerances, those that are not given by the type and the number of the data."""
    default = 1e-8 if dtype == np.float64 else 1e-7
    ftol = default if options.ftol is None else max(options.ftol, float(np.finfo(dtype).eps))
    return Tolerances(
        ftol=np.asarray(ftol, dtype),
        xtol=np.asarray(options.xtol, dtype),
        gtol=np.asarray(options.gtol, dtype),
        max_steps=np.asarray(options.max_steps, np.int32),
        atol=np.asarray(pixels * (_ROUNDING * np.finfo(dtype).eps) ** 2, dtype),
        damping=np.asarray(options.damping, dtype),
    )


def _validated(batch: GroupBatch, options: FitOptions) -> GroupBatch:
    """The batch as numpy arrays of consistent shape and one floating dtype."""
    arrays = GroupBatch(*(np.asarray(leaf) for leaf in batch))
    check_shapes(arrays, options)
    arrays = arrays._replace(free=arrays.free.astype(bool), present=arrays.present.astype(bool))
    dtype = np.result_type(arrays.data.dtype, np.float32)
    floats = {
        name: np.ascontiguousarray(getattr(arrays, name), dtype)
        for name in ("data", "weight", "start", "lower", "upper")
    }
    order = arrays.order.astype(np.int32)
    if not ((order >= -1) & (order <= _ORDERS[-1])).all():
        raise FitInputError(f"order: must be -1 (no background) to {_ORDERS[-1]}")
    return arrays._replace(**floats, order=order)


def check_shapes(batch: GroupBatch, options: FitOptions) -> None:
    """Raise `FitInputError` if the shapes of the arrays do not agree, or the loss is unknown."""
    if batch.data.ndim != 3 or 0 in batch.data.shape:
        raise FitInputError(f"data: expected (group, ny, nx), not empty; got {batch.data.shape}")
    count = len(batch.data)
    if batch.present.ndim != 2 or batch.present.shape[1] == 0:
        raise FitInputError(f"present: expected (group, slot); got {batch.present.shape}")
    slots = batch.present.shape[1]
    shapes = {"weight": batch.data.shape, "present": (count, slots)}
    shapes |= dict.fromkeys(("start", "lower", "upper", "free"), (count, slots, SHAPE))
    shapes["order"] = (count,)
    for name, shape in shapes.items():
        if getattr(batch, name).shape != shape:
            raise FitInputError(f"{name}: expected {shape}; got {getattr(batch, name).shape}")
    check_options(options)


def check_options(options: FitOptions) -> None:
    """Raise `FitInputError` if an option cannot be; the message names it."""
    if options.loss not in LOSSES:
        raise FitInputError(f"loss: {options.loss!r} is not one of {', '.join(LOSSES)}")
    for name in ("f_scale", "damping"):
        if not 0 < getattr(options, name) < np.inf:
            raise FitInputError(f"{name}: must be positive; got {getattr(options, name)}")
    for name in ("lambda_l2", "ftol", "xtol", "gtol"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < np.inf:
            raise FitInputError(f"{name}: must not be negative; got {value}")
    if options.max_steps < 1:
        raise FitInputError(f"max_steps: must be at least 1; got {options.max_steps}")


def _check_pixels(batch: GroupBatch) -> None:
    """Raise `FitInputError` if a pixel cannot be fitted: it gives a cost that is not finite."""
    if not batch.weight.max() < np.inf:
        raise FitInputError("weight: must be finite and not negative (0 masks a pixel)")
    if not np.isfinite(np.where(batch.weight > 0, batch.data, 0)).all():
        raise FitInputError("data: not finite under a positive weight; set the weight to 0 there")


def _check_parameters(batch: GroupBatch) -> None:
    """Raise `FitInputError` if a weight is negative, or starts or bounds cannot be."""
    if not batch.weight.min() >= 0:
        raise FitInputError("weight: must be finite and not negative (0 masks a pixel)")
    there = batch.present
    if not np.isfinite(batch.start[there]).all():
        raise FitInputError("start: not finite")
    if not (batch.start[there][:, MAJOR : MINOR + 1] > 0).all():
        raise FitInputError("start: sigma_major and sigma_minor must be positive")
    bounded = (batch.lower[there] <= batch.upper[there])[:, :THETA]
    least, most = batch.lower[there][:, MINOR], batch.upper[there][:, MAJOR]
    if not bounded.all() or not ((least > 0) & (least <= most)).all():
        raise FitInputError("lower, upper: need lower <= upper, and positive sigmas")
    shape = batch.free[there][:, MAJOR:]
    if (shape.any(1) != shape.all(1)).any():
        raise FitInputError("free: both sigmas and theta of a source are free, or none of them")


def lanes_for(model: Model, dtype: Any) -> int:
    """Lanes whose working set (rows of products over the pixels) fits the cache of a core.

    A device that is not a processor gets all that fit its memory.
    """
    ny, nx = model.grid.shape
    rows = model.slots * (model.slots + 1) // 2 + 2 * model.slots + 1
    bytes_each = np.dtype(dtype).itemsize
    lane = rows * ny * nx * bytes_each
    on_cpu = jax.default_backend() == "cpu"
    room, most = (_LANE_BYTES, _LANES // bytes_each) if on_cpu else (_DEVICE_BYTES, _DEVICE_LANES)
    return int(np.clip(2 ** int(np.log2(max(room // lane, 1))), 1, most))


# --- Units: from pixels to scaled coordinates and back. `xp` is numpy or jax.numpy. ---------------


def to_problems(
    xp: ModuleType, model: GaussianGroup, batch: GroupBatch, options: FitOptions
) -> Problem:
    """The groups in scaled coordinates, with the brightness as it is (`GaussianGroup.scaled`)."""
    count, slots = batch.present.shape
    dtype = batch.data.dtype
    there = batch.present[..., None]
    free = batch.free & there
    low, high = _sigma_bounds(xp, batch)
    start = xp.where(free, _feasible(xp, batch, low, high), batch.start)
    start = xp.where(there, _to_engine(xp, model.grid, start), 0)
    lower = _bounds(xp, model.grid, batch.lower, low, -np.inf)
    upper = _bounds(xp, model.grid, batch.upper, high, np.inf)
    degrees = np.array([sum(powers) for powers in monomials(model.order)])
    smooth = (count, len(degrees))
    edge = np.full(smooth, np.inf, dtype)

    def whole(sources: Array, background: Array) -> Array:
        return xp.concatenate([sources.reshape(count, -1), background], 1)

    return Problem(
        data=batch.data.reshape(count, -1),
        weight=batch.weight.reshape(count, -1),
        start=whole(start, np.zeros(smooth, dtype)),
        lower=whole(xp.where(there, lower, -np.inf), -edge),
        upper=whole(xp.where(there, upper, np.inf), edge),
        free=whole(free, degrees <= batch.order[:, None]),
        ridge=whole(
            np.zeros((count, slots * SHAPE), dtype), np.full(smooth, options.lambda_l2, dtype)
        ),
        f_scale=np.full(count, options.f_scale, dtype),
        weight_moments=np.zeros((count, len(monomials(model.degree))), dtype),
    )


def _to_results(
    model: GaussianGroup,
    batch: GroupBatch,
    free: Bool[np.ndarray, "group P"],
    solution: Solution,
    scale: Scale,
    inverse: np.ndarray,
) -> FitResult:
    """The solutions in pixel units, with covariance and statistics.

    `inverse` is that of the matrix (group, ...) in the units of the scaled problem's noise.
    """
    params, coefficients = to_parameters(np, model, batch, scale, solution.params)
    noise = scale.weight * scale.unit**2
    freedom = np.sum(free, 1)
    chi2 = solution.normal.chi2 * noise
    chi2 = np.where(scale.pixels > 0, chi2, np.nan)  # nothing is known without data
    n = np.maximum(scale.pixels, 1).astype(chi2.dtype)
    tiny = np.finfo(chi2.dtype).tiny
    spread = 1 / noise if model.loss == "linear" else solution.normal.spread
    return FitResult(
        params=params,
        coefficients=coefficients,
        covariance=inverse * spread.reshape(-1, *[1] * (inverse.ndim - 1)),
        cost=np.where(scale.pixels > 0, solution.normal.cost * noise, np.nan),
        chi2_red=chi2 / np.maximum(scale.pixels - freedom, 1),
        bic=n * np.log(np.maximum(chi2, tiny) / n) + freedom * np.log(n),
        nmse=chi2 / noise / n,
        steps=solution.steps,
        status=solution.status,
        on_bound=_on_bound(batch, params, model.grid),
    )


def _sources_of(model: GaussianGroup, solution: Solution) -> np.ndarray:
    """The scaled parameters (group, slot, 6) of the sources."""
    return np.asarray(solution.params[:, : model.slots * SHAPE].reshape(-1, model.slots, SHAPE))


def _on_bound(batch: GroupBatch, params: np.ndarray, grid: Grid) -> np.ndarray:
    """Parameters (group, slot, 6) that are on a bound, to the rounding of the scaled ones."""
    lower, upper = batch.lower.copy(), batch.upper.copy()
    lower[..., MAJOR], upper[..., MINOR] = lower[..., MINOR], upper[..., MAJOR]
    lower[..., THETA], upper[..., THETA] = -np.inf, np.inf
    size = np.abs(params)
    size[..., X : Y + 1] += 2 * grid.half
    slack = 16 * np.finfo(params.dtype).eps * size
    at_bound = (params <= lower + slack) | (params >= upper - slack)
    return np.asarray(at_bound & batch.free & batch.present[..., None])


def to_parameters(
    xp: ModuleType, model: GaussianGroup, batch: GroupBatch, scale: Scale, solved: Array
) -> tuple[Array, Array]:
    """The `solved` scaled parameters (group, P) as (group, slot, 6) and (group, monomial)."""
    count, slots = batch.present.shape
    sources = solved[:, : slots * SHAPE].reshape(count, slots, SHAPE)
    params = _from_engine(xp, model.grid, scale.unit, sources)
    shape_moves = xp.any(batch.free[..., MAJOR:], -1, keepdims=True) & (np.arange(SHAPE) >= MAJOR)
    params = xp.where(batch.present[..., None] & (batch.free | shape_moves), params, batch.start)
    coefficients = solved[:, slots * SHAPE :] * scale.unit[:, None]
    constant = coefficients[:, :1] + scale.offset[:, None]
    return params, xp.concatenate([constant, coefficients[:, 1:]], 1)


def _or_one(xp: ModuleType, values: Array) -> Array:
    """The values, 1 where they are not positive."""
    return xp.where(values > 0, values, 1)


def _sigma_bounds(xp: ModuleType, batch: GroupBatch) -> tuple[Array, Array]:
    """Bounds (group, slot) of both sigmas; 1 for slots without a source."""
    low = xp.where(batch.present, batch.lower[..., MINOR], 1)
    return low, xp.where(batch.present, batch.upper[..., MAJOR], 1)


def _feasible(xp: ModuleType, batch: GroupBatch, low: Array, high: Array) -> Array:
    """The start, moved into the bounds."""
    free = xp.clip(batch.start, batch.lower, batch.upper)[..., :MAJOR]
    sigmas = xp.clip(batch.start[..., MAJOR:THETA], low[..., None], high[..., None])
    return xp.concatenate([free, sigmas, batch.start[..., THETA:]], -1)


def _to_engine(xp: ModuleType, grid: Grid, source: Array) -> Array:
    """Sources (group, slot, 6) in pixels to (peak, x, y, log size, e1, e2), scaled but for peak."""
    x0, y0 = grid.centre
    major = _or_one(xp, source[..., MAJOR]) / grid.half
    minor = _or_one(xp, source[..., MINOR]) / grid.half
    e = xp.log(major / minor)
    columns = [
        source[..., PEAK],
        (source[..., X] - x0) / grid.half,
        (source[..., Y] - y0) / grid.half,
        0.5 * xp.log(major * minor),
        e * xp.cos(2 * source[..., THETA]),
        e * xp.sin(2 * source[..., THETA]),
    ]
    return xp.stack(columns, -1)


def _from_engine(xp: ModuleType, grid: Grid, unit: Array, source: Array) -> Array:
    """Scaled sources to pixel units, with sigma_major >= sigma_minor and theta in [0, pi)."""
    x0, y0 = grid.centre
    e = _ellipticity(xp, source)
    columns = [
        source[..., 0] * unit[:, None],
        x0 + source[..., 1] * grid.half,
        y0 + source[..., 2] * grid.half,
        grid.half * xp.exp(source[..., 3] + e / 2),
        grid.half * xp.exp(source[..., 3] - e / 2),
        xp.mod(0.5 * xp.arctan2(source[..., 5], xp.where(e > 0, source[..., 4], 1)), np.pi),
    ]
    return xp.stack(columns, -1)


def _ellipticity(xp: ModuleType, source: Array) -> Array:
    """Ellipticity e = log(sigma_major / sigma_minor)."""
    square = source[..., 4] ** 2 + source[..., 5] ** 2
    return xp.where(square > 0, xp.sqrt(xp.where(square > 0, square, 1)), 0)


def _bounds(xp: ModuleType, grid: Grid, bound: Array, sigma: Array, open_end: float) -> Array:
    """Bounds as of `_to_engine`: peak, x, y, log sigma; the ellipticities' places are open."""
    x0, y0 = grid.centre
    columns = [
        bound[..., PEAK],
        (bound[..., X] - x0) / grid.half,
        (bound[..., Y] - y0) / grid.half,
        xp.log(sigma / grid.half),
        xp.full_like(sigma, open_end),
        xp.full_like(sigma, open_end),
    ]
    return xp.stack(columns, -1)


def _slopes(grid: Grid, unit: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Derivatives (group, slot, 6, 6) of `_from_engine` (row) by the scaled parameters (column).

    The angle of a circular source is undefined: its derivative is that of an axis ratio of
    1 + LEAST_ELLIPTICITY, which gives a huge but finite error.
    """
    e = _ellipticity(np, source)
    safe = np.maximum(e, LEAST_ELLIPTICITY)
    cos = np.where(e > 0, source[..., 4] / _or_one(np, e), 1)
    sin = np.where(e > 0, source[..., 5] / _or_one(np, e), 0)
    major = grid.half * np.exp(source[..., 3] + e / 2)
    minor = grid.half * np.exp(source[..., 3] - e / 2)
    zero, one = np.zeros_like(e), np.ones_like(e)
    rows = [
        [unit[:, None] * one, zero, zero, zero, zero, zero],
        [zero, grid.half * one, zero, zero, zero, zero],
        [zero, zero, grid.half * one, zero, zero, zero],
        [zero, zero, zero, major, major * cos / 2, major * sin / 2],
        [zero, zero, zero, minor, -minor * cos / 2, -minor * sin / 2],
        [zero, zero, zero, zero, -sin / (2 * safe), cos / (2 * safe)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _propagated(slopes: np.ndarray, unit: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """S C S^T for the block-diagonal S of the sources' `slopes` and the coefficients' `unit`."""
    count, slots = slopes.shape[:2]
    size, ends = inverse.shape[-1], slots * SHAPE
    half = inverse[:, :ends].reshape(count, slots, SHAPE, size)
    half = (slopes @ half).reshape(count, ends, size)
    half = np.concatenate([half, inverse[:, ends:] * unit[:, None, None]], 1)
    whole = half[:, :, :ends].reshape(count, size, slots, SHAPE)
    whole = (whole.swapaxes(1, 2) @ slopes.swapaxes(2, 3)).swapaxes(1, 2)
    whole = whole.reshape(count, size, ends)
    return np.concatenate([whole, half[:, :, ends:] * unit[:, None, None]], 2)
