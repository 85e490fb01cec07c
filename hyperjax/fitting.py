"""Joint fits of many groups of sources at once.

`fit_groups` takes a `GroupBatch` (cutouts of the same size, each with the same number of source
slots) in pixel units and returns a `FitResult` in the same units. Inside, every problem is brought
to scaled coordinates and to data of unit scale (so that a fit of Jy or of MJy/sr takes the
same steps), solved in persistent lanes, on all cores, and brought back with its covariance.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Bool

from hyperjax.batches import (
    HIGHEST_ORDER,
    MAJOR,
    MINOR,
    PEAK,
    THETA,
    FitOptions,
    FitResult,
    GroupBatch,
    X,
    check_parameters,
    check_pixels,
    shapes_partly_held,
    validated,
)
from hyperjax.errors import FitInputError
from hyperjax.kernels import solve_on
from hyperjax.large_groups import inverse_blocks, solve_large
from hyperjax.lockstep import fit_with_others
from hyperjax.models import SHAPE, AxesGroup, GaussianGroup, Grid, Model, Problem, Scale
from hyperjax.runtime import at_once, fit_threads
from hyperjax.solver import (
    CONVERGED,
    NO_DATA,
    SINGULAR,
    STEP_LIMIT,
    Solution,
    Tolerances,
)
from hyperjax.spectral import SpectralGroup
from hyperjax.units import on_bound, propagated, slopes_of, to_parameters, to_problems

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

_Rows = TypeVar("_Rows", GroupBatch, FitResult)
_ORDERS = (1, 2, HIGHEST_ORDER)  # that code is compiled for; lower ones hold coefficients at 0
_BLOCKS, _DEVICE_BLOCKS = (2048, 4096), (8192, 131072)  # problems in a call x bytes of a number
_BLOCK_BYTES = 256_000_000  # of their data and weights, at most, of all threads together
_DEVICE_BYTES = 4_000_000_000  # working set of the lanes of a device that is not a processor
_DEVICE_LANES = 16384  # of it, at most
_ROUNDING = 8  # of a model's pixel, in the last digit of data of unit scale
_FEW_STEPS, _FEW_STEPS_TO_BOUND = 9, 7  # that a fit takes from a fair start
_HELD_REACH = 4.0  # factor by which sigmas that are held may differ from free ones
_SAME_COST = 1e-6  # relative difference
_LEAST_SIZE = 0.5  # sigma of a source that pixels can tell
_SMALL = 0.05  # of the way from the smallest to the largest size: small sources
_OTHER_DAMPING = 1.0  # of the first step where the fit before was doubtful
_ALIGNMENT = 64  # bytes, of arrays that jax does not copy
_LANES = 256  # of a core x bytes of a number, at most
_MOST_SLOTS = 32  # that are solved in lanes, with dense matrices
_LANE_BYTES = 2_500_000  # working set of the lanes of one core: it should fit the cache


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

        from hyperjax import GroupBatch, fit_groups

        rng = np.random.default_rng(0)
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
    batch = validated(batch, options)
    _, ny, nx = batch.data.shape
    if highest_order > HIGHEST_ORDER:
        raise FitInputError(f"highest_order: at most {HIGHEST_ORDER}; got {highest_order}")
    wanted = max(int(batch.order.max()), highest_order)
    highest = next(order for order in _ORDERS if wanted <= order)
    slots = batch.start.shape[1]
    kind = Grid((ny, nx)), slots, highest, options.loss
    partly = shapes_partly_held(batch.free & batch.present[..., None])
    if slots > _MOST_SLOTS:
        if partly.any():
            raise FitInputError(
                f"free: in groups of more than {_MOST_SLOTS} slots both sigmas and theta of a "
                "source are free, or none of them"
            )
        return _large(GaussianGroup(*kind), options, batch)
    whole = _with_whole_shapes(batch) if partly.any() else batch
    result = _in_lanes(GaussianGroup(*kind), options, whole)
    rows = np.flatnonzero(partly)
    if rows.size:
        some = _rows_of(batch, rows)
        held = _with_held_axes(AxesGroup(*kind), options, some, _rows_of(result, rows))
        _replace(result, rows, held)
    return result


def _with_whole_shapes(batch: GroupBatch) -> GroupBatch:
    """The batch with all of a source's shape free where something of it is.

    Sigmas that are both held have no bounds (theirs are not read): some, about what they are.
    """
    shape = batch.free[..., MAJOR:].any(-1, keepdims=True) & (np.arange(SHAPE) >= MAJOR)
    held = shape & ~batch.free[..., MAJOR:THETA].any(-1, keepdims=True)
    sigmas = batch.start[..., MAJOR:THETA]
    return batch._replace(
        free=batch.free | shape,
        lower=np.where(held, sigmas.min(-1, keepdims=True) / _HELD_REACH, batch.lower),
        upper=np.where(held, sigmas.max(-1, keepdims=True) * _HELD_REACH, batch.upper),
    )


def _with_held_axes(
    model: AxesGroup, options: FitOptions, batch: GroupBatch, free: FitResult
) -> FitResult:
    """The fits of groups with shapes that are partly held, from those with their shapes `free`.

    An angle that is far off does not find back: halfway the axes are alike, and it has no effect.
    So they begin at the free shape, twice, as its axes have two names, and at the given start.
    """
    sound = np.isfinite(free.params).all(-1) & (free.params[..., MAJOR:THETA] > 0).all(-1)
    there = batch.present & sound
    shapes = np.where(there[..., None], free.params, batch.start)
    closer = _from_held(batch, _axes_exchanged(shapes, there)) < _from_held(batch, shapes)
    names = (_axes_exchanged(shapes, there & which) for which in (closer, ~closer))
    fits = [
        _in_lanes(model, options, batch._replace(start=np.where(batch.free, start, batch.start)))
        for start in (*names, batch.start)
    ]
    best = fits[0]
    for other in fits[1:]:
        better = _lower(other, best)
        _replace(best, better, _rows_of(other, better))
    return best._replace(steps=free.steps + sum(fit.steps for fit in fits))


def _from_held(batch: GroupBatch, params: np.ndarray) -> np.ndarray:
    """How far shapes (group, slot) are from what is held of them."""
    there = batch.present[..., None] & ~batch.free[..., MAJOR:]
    is_now, held = (np.where(there, of[..., MAJOR:], 1) for of in (params, batch.start))
    change, turn = np.log(is_now[..., :2] / held[..., :2]), np.sin(is_now[..., 2:] - held[..., 2:])
    return np.asarray(np.abs(change).sum(-1) + np.abs(turn).sum(-1))


def _axes_exchanged(params: np.ndarray, which: np.ndarray) -> np.ndarray:
    """The same sources (group, slot, 6), some with the names of their axes exchanged."""
    out = params.copy()
    out[which, MAJOR], out[which, MINOR] = params[which, MINOR], params[which, MAJOR]
    out[which, THETA] = (params[which, THETA] + np.pi / 2) % np.pi
    return out


def _replace(result: FitResult, rows: np.ndarray, new: FitResult) -> None:
    """Put other results in some rows."""
    for whole, own in zip(result, new, strict=True):
        whole[rows] = own


def _lower(one: FitResult, other: FitResult) -> np.ndarray:
    """Rows in which one result has converged to a lower cost, or alone to the same."""
    share = np.where(other.status == CONVERGED, 1, 1 - _SAME_COST)
    return np.flatnonzero((one.status == CONVERGED) & ~(other.cost <= share * one.cost))


def _rows_of(batch: _Rows, rows: np.ndarray) -> _Rows:
    """Some groups of a batch, or of its result."""
    return type(batch)(*(leaf[rows] for leaf in batch))


def _in_lanes(model: GaussianGroup, options: FitOptions, batch: GroupBatch) -> FitResult:
    """The fits of a batch, those with doubtful results from other starts too."""

    def fit(piece: GroupBatch, device: jax.Device) -> FitResult:
        check_parameters(piece)
        fits = _fitted(model, options, piece, device)
        if not np.isfinite(fits.cost[fits.status != NO_DATA]).all():
            check_pixels(piece)
        return fits

    result = in_pieces(fit, batch, model, options)
    return _best_of_starts(model, options, batch, result) if options.other_starts else result


def _best_of_starts(
    model: GaussianGroup, options: FitOptions, batch: GroupBatch, result: FitResult
) -> FitResult:
    """The result, with doubtful fits of several sources replaced by better ones from elsewhere."""
    few = np.where(result.on_bound.any((1, 2)), _FEW_STEPS_TO_BOUND, _FEW_STEPS)
    slow = (result.steps > few) & (model.loss == "linear")  # robust ones take more steps
    doubtful = (result.status == SINGULAR) | (result.status == CONVERGED) & slow
    doubtful &= batch.present.sum(1) > 1
    fit = functools.partial(_fitted, model, options._replace(damping=_OTHER_DAMPING))
    before = batch.start
    for start in _other_starts(batch, result.params.copy()):
        again = np.flatnonzero(doubtful & (start != before).any((1, 2)))
        before = start
        if not again.size:
            continue
        some = _rows_of(batch._replace(start=start), again)
        other = in_pieces(fit, some, model, options)
        steps = result.steps[again] + other.steps
        better = _lower(other, _rows_of(result, again))
        _replace(result, again[better], _rows_of(other, better))
        result.steps[again] = steps
    return result


def _other_starts(batch: GroupBatch, fitted: np.ndarray) -> Iterator[np.ndarray]:
    """Other starts (group, slot, 6) for what was `fitted` from the first: `FitOptions`.

    Of ten such starts these four, for 36 000 blends of the kinds of benchmarks/fit.py, left the
    fewest in a minimum that is not the lowest one known.
    """
    moves = batch.free & batch.present[..., None]
    seen = _LEAST_SIZE, max(batch.data.shape[1:]) / 2  # sizes that the cutout can tell
    low = np.clip(np.where(batch.present, batch.lower[..., MINOR], 1), *seen)
    high = np.clip(np.where(batch.present, batch.upper[..., MAJOR], 1), *seen)

    def begun(share: float, places: np.ndarray, peaks: np.ndarray) -> np.ndarray:
        size = (low ** (1 - share) * high**share)[..., None]
        columns = [peaks, places, size, size, fitted[..., THETA:]]
        start = np.where(moves, np.concatenate(columns, -1), batch.start)
        return start.astype(batch.start.dtype)

    peaks, places = batch.start[..., :X], batch.start[..., X:MAJOR]
    own = moves[..., PEAK : X + 1].all(-1, keepdims=True)  # in peaks alone a fit has one minimum
    mean = np.sum(peaks, 1, keepdims=True, where=own) / np.maximum(own.sum(1, keepdims=True), 1)
    yield begun(_SMALL, places, peaks)
    yield begun(1 - _SMALL, places, peaks)
    yield begun(0.5, 2 * places - fitted[..., X:MAJOR], peaks)
    yield begun(0.5, fitted[..., X:MAJOR], np.where(own, mean, peaks))


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
        See `FitOptions`; the loss is linear, and there are no other starts.

    Raises
    ------
    FitInputError
        If a part of a shape is held.
    """
    if shapes_partly_held(batch.free & batch.present[..., None]).any():
        raise FitInputError("free: both sigmas and theta of a source are free, or none of them")
    model = SpectralGroup(Grid((side, side)), batch.start.shape[1], -1)
    result = in_pieces(functools.partial(_fitted, model, options), batch, model, options)
    power = np.sum(batch.data**2, axis=(1, 2))
    return result._replace(nmse=2 * result.cost / np.where(power > 0, power, 1))


def _large(model: GaussianGroup, options: FitOptions, batch: GroupBatch) -> FitResult:
    """The fits of groups of any number of sources, one by one (`hyperjax.large_groups`)."""
    check_parameters(batch)
    check_pixels(batch)

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
        slopes = slopes_of(model, scale.unit, _sources_of(model, solution))
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
    slopes = slopes_of(model, scale.unit, _sources_of(model, solution))
    inverse = propagated(slopes, scale.unit, solution.normal.matrix)
    result = _to_results(model, batch, problems.free, solution, scale, inverse)
    return _with_axes_in_order(batch, result) if isinstance(model, AxesGroup) else result


def _with_axes_in_order(batch: GroupBatch, result: FitResult) -> FitResult:
    """The result with the larger axis of each source that is not wholly held as the major one."""
    count, slots = result.params.shape[:2]
    size = result.covariance.shape[-1]
    crossed = result.params[..., MINOR] > result.params[..., MAJOR]
    crossed &= batch.free[..., MAJOR:].any(-1)
    place = np.arange(SHAPE)
    other = np.where(place == MAJOR, MINOR, np.where(place == MINOR, MAJOR, place))
    order = np.where(crossed[..., None], other, place)
    params = np.take_along_axis(result.params, order, -1)
    params[..., THETA] = (params[..., THETA] + np.pi / 2 * crossed) % np.pi
    own = (order + SHAPE * np.arange(slots)[:, None]).reshape(count, -1)
    every = np.broadcast_to(np.arange(slots * SHAPE, size), (count, size - slots * SHAPE))
    own = np.concatenate([own, every], 1)
    covariance = np.take_along_axis(result.covariance, own[:, :, None], 1)
    covariance = np.take_along_axis(covariance, own[:, None, :], 2)
    at_bound = np.take_along_axis(result.on_bound, order, -1)
    return result._replace(params=params, covariance=covariance, on_bound=at_bound)


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
        on_bound=on_bound(batch, params, model.grid),
    )


def _sources_of(model: GaussianGroup, solution: Solution) -> np.ndarray:
    """The scaled parameters (group, slot, 6) of the sources."""
    return np.asarray(solution.params[:, : model.slots * SHAPE].reshape(-1, model.slots, SHAPE))
