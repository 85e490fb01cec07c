"""Model all sources of a map: Gaussians on a background, fitted group by group.

All groups are fitted at once, bucket by bucket. Sources outside a group but in its window are
masked at first, then subtracted as they came out of the sweep before (`fit_options.sweeps`).
"""

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hyperjax.background import Backgrounds, level_at, separate_backgrounds
from hyperjax.catalog import FLAGS
from hyperjax.config import Config
from hyperjax.detection import Detections, local_peak
from hyperjax.fitting import CONVERGED, STEP_LIMIT, FitOptions, FitResult, GroupBatch, fit_groups
from hyperjax.groups import (
    Windows,
    block_of,
    blocks,
    buckets,
    cut_out,
    in_chunks,
    link,
    members_of,
    pairs_closer,
    turns,
    windows,
    within_reach,
)
from hyperjax.maps import FWHM_PER_SIGMA
from hyperjax.models import LEAST_ELLIPTICITY
from hyperjax.noise import Correlation, covariance_of_sums
from hyperjax.sources import (
    SourceFits,
    render_sources,
    stamp_gradients,
    stamps,
)
from hyperjax.weights import Sources, pixel_weights

logger = logging.getLogger(__name__)

_START_SIZE = 1.2  # of the beam: sources are rarely smaller
_PEAK_HEADROOM = 3.0  # upper bound of the peak over what the map shows there
_WIDER = 2.0  # bounds of the second try
_MASK_FWHM = 1.0  # radius round a source outside the group, before it is known


class Fitted(NamedTuple):
    """What the errors of a bucket's blocks are made of.

    `weight` (block, side, side) of the squared residuals, and the covariance (block, P, P) that the
    fits have if that is the inverse variance of white noise.
    """

    which: NDArray[np.int_]
    weight: NDArray[np.float64]
    covariance: NDArray[np.float64]


class Modelled(NamedTuple):
    """Fitted sources of a map, the backgrounds under their blocks' windows, and their blocks.

    `joint_orders` (block,) are those of the backgrounds that were fitted with the sources, -1 for
    none; `separate` is the part of the backgrounds that was fitted before them, if there is one.

    The errors are right where pixels weigh as the inverse variance of white noise; else see
    `with_noise`.
    """

    fits: SourceFits
    placed: Windows
    backgrounds: Backgrounds
    blocks: list[Fitted]
    joint_orders: NDArray[np.int_]
    separate: Backgrounds | None = None


class _Start(NamedTuple):
    """Start and bounds of every source: arrays (n, 6) as in `GroupBatch`."""

    start: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    free: NDArray[np.bool_]


def model_sources(
    data: NDArray[np.float64],
    rms: NDArray[np.float64],
    found: Detections,
    fwhm_pix: float,
    config: Config,
    known: SourceFits | None = None,
    shapes: NDArray[np.float64] | None = None,
) -> Modelled:
    """Fit every detected source of a map together with the background under it.

    Parameters
    ----------
    data, rms
        (ny, nx) brightness (NaN where blank) and noise, Jy/beam.
    found
        Positions to start from.
    fwhm_pix
        FWHM of the beam in pixels.
    config
        The sections fit_options, background and photometry are read.
    known
        Fits, from an earlier call, of the first of the sources `found`. Without them there is one
        quick sweep, with neighbours masked and the highest order of the background alone, else
        `fit_options.sweeps`, with neighbours subtracted. The last of these compares the orders.
    shapes
        (n, 3) sigma_major, sigma_minor, theta (pixel, rad) that are held; fitted if None.
    """
    options = config.fit_options
    x, y = found.x, found.y
    pairs = pairs_closer(x, y, options.group_distance_fwhm * fwhm_pix / 2)
    group = link(len(x), pairs)
    placed = windows(blocks(group, x, y), x, y, options.window_fwhm * fwhm_pix)
    start = _first_guess(data, found, fwhm_pix, config, shapes)
    separate = None
    if config.background.fit_gauss_and_bg_separately:
        remainder = data if known is None else data - render_sources(data.shape, known)
        separate = separate_backgrounds(remainder, rms, placed, x, y, fwhm_pix, config)

    turn = turns(placed.members, pairs)
    before = None if known is None else _with_new(known, start)
    sweeps = [(_highest_order(config),)] * (1 if known is None else options.sweeps - 1)
    for tried in sweeps if known is None else [*sweeps, _joint_orders(config)]:
        fits, backgrounds, fitted = _sweep(
            data, rms, placed, turn, tried, start, before, separate, fwhm_pix, config
        )
        before = fits
    joint = backgrounds.orders
    if separate is not None:
        fits, backgrounds = _with_separate(fits, backgrounds, separate, placed)
    level = level_at(placed, backgrounds, fits.x, fits.y)
    fits = fits._replace(background=level)
    return Modelled(fits.in_groups(group), placed, backgrounds, fitted, joint, separate)


def _with_new(known: SourceFits, start: _Start) -> SourceFits:
    """Known sources, and after them new ones as they are before any fit."""
    new = start.start[len(known.x) :]
    fits = SourceFits.unknown(len(start.start))
    for column, before, guess in zip(fits[:6], known[:6], new.T, strict=True):
        column[:] = np.concatenate([before, guess])
    return fits


def _first_guess(
    data: NDArray[np.float64],
    found: Detections,
    fwhm_pix: float,
    config: Config,
    shapes: NDArray[np.float64] | None,
) -> _Start:
    """Start values and bounds from the detections and the beam."""
    options, sizes = config.fit_options, config.photometry
    sigma = fwhm_pix / FWHM_PER_SIGMA
    shift = max(1.0, options.position_range_fwhm * fwhm_pix)
    n = len(found.x)
    above = local_peak(data, found.x, found.y, 1.0) - np.nanmedian(data)
    highest = _PEAK_HEADROOM * (found.peak + np.fmax(above, 0))
    low, high = sizes.aper_inf * sigma, sizes.aper_sup * sigma
    size = np.full(n, np.clip(_START_SIZE * sigma, low, high))
    start = np.column_stack([found.peak, found.x, found.y, size, size, np.zeros(n)])
    ones = np.ones(n)
    lowest = 0 * found.peak
    if config.detection.fixed_peaks:  # noise has either sign
        highest = np.full(n, _PEAK_HEADROOM * np.nanmax(np.abs(data)))
        lowest = -highest
    lower = np.column_stack(
        [lowest, found.x - shift, found.y - shift, low * ones, low * ones, 0 * ones]
    )
    upper = np.column_stack(
        [
            highest,
            found.x + shift,
            found.y + shift,
            high * ones,
            high * ones,
            np.pi * ones,
        ]
    )
    free = np.ones((n, 6), bool)
    free[:, 1:3] = config.positions_vary
    if shapes is not None:
        start[:, 3:], free[:, 3:] = shapes, False
    return _Start(start, lower, upper, free)


def _sweep(
    data: NDArray[np.float64],
    rms: NDArray[np.float64],
    placed: Windows,
    turn: NDArray[np.int_],
    orders: tuple[int, ...],
    start: _Start,
    last: SourceFits | None,
    separate: Backgrounds | None,
    fwhm_pix: float,
    config: Config,
) -> tuple[SourceFits, Backgrounds, list[Fitted]]:
    """Fit all blocks once, with what is known of the others (`last`) subtracted.

    Of the `orders` of the background that are tried the best one is kept.

    Blocks of one group overlap: each sees what came out of those whose turn was before. All at
    once, they would run away from each other.
    """
    fits, backgrounds = SourceFits.unknown(len(start.start)), Backgrounds.empty(len(placed.members))
    fitted = []
    reach = _reach(placed, fwhm_pix, config)
    guess = _with_new(SourceFits.unknown(0), start)
    if last is not None:
        fits = last = last.copy()  # which changes turn by turn
    for now in range(np.max(turn, initial=-1) + 1):
        seen = guess if last is None else last
        total = None if last is None else render_sources(data.shape, last)
        for (_, slots), which in buckets(placed, turn == now).items():
            image = _window_data(data, placed, which, last, total)
            noise = cut_out(rms, placed, which)
            usable = _usable(
                image, noise, placed, which, start.start, last is None, reach, fwhm_pix
            )
            if separate is not None:
                image = image - separate.images(placed, which)
            drawn = _own_sources(seen, placed, which)
            about = Sources(drawn, seen.x, seen.y, fwhm_pix / FWHM_PER_SIGMA, max(orders))
            options = config.fit_options
            weight = pixel_weights(image, noise, usable, placed, which, about, options)
            batch = _batch(image, weight, placed, which, slots, start, last)
            result, order, second = _best_fit(batch, orders, config)
            _store(fits, result, order, second, placed, which)
            backgrounds.coefficients[which, : result.coefficients.shape[1]] = result.coefficients
            backgrounds.orders[which] = order
            fitted.append(Fitted(which, weight, result.covariance))
    return fits, backgrounds, fitted


def _with_separate(
    fits: SourceFits, backgrounds: Backgrounds, separate: Backgrounds, placed: Windows
) -> tuple[SourceFits, Backgrounds]:
    """The backgrounds fitted with the sources and those fitted before them, added up."""
    highest = np.maximum(backgrounds.orders, separate.orders)
    total = Backgrounds(backgrounds.coefficients + separate.coefficients, highest)
    return fits._replace(order=highest[block_of(placed)]), total


def _window_data(
    data: NDArray[np.float64],
    placed: Windows,
    which: NDArray[np.int_],
    last: SourceFits | None,
    total: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """Cutouts of the map without the sources outside each block."""
    image = cut_out(data, placed, which)
    if last is None or total is None:
        return image
    return image - cut_out(total, placed, which, fill=0.0) + _own_sources(last, placed, which)


def _own_sources(fits: SourceFits, placed: Windows, which: NDArray[np.int_]) -> NDArray[np.float64]:
    """The sources of each block alone (block, side, side)."""
    side = int(placed.side[which[0]])
    out = np.zeros((len(which), side, side))
    for some in in_chunks(which):
        own, blocks = members_of(placed, which[some]), which[some]
        corner = placed.x0[blocks[own.row]], placed.y0[blocks[own.row]]
        drawn = stamps(fits, own.source, *corner, side)
        out[some] = np.add.reduceat(drawn, np.flatnonzero(own.slot == 0))
    return out


def _usable(
    image: NDArray[np.float64],
    noise: NDArray[np.float64],
    placed: Windows,
    which: NDArray[np.int_],
    guess: NDArray[np.float64],
    mask_others: bool,
    reach: float,
    fwhm_pix: float,
) -> NDArray[np.bool_]:
    """Pixels (block, side, side) that take part in the fit: within `reach` of a source."""
    x, y = guess[:, 1], guess[:, 2]
    usable = np.isfinite(image) & np.isfinite(noise) & (noise > 0)
    usable &= within_reach(placed, which, x, y, reach)
    if mask_others:
        usable &= ~_near_neighbours(placed, which, x, y, _MASK_FWHM * fwhm_pix)
    return usable


def _reach(placed: Windows, fwhm_pix: float, config: Config) -> float:
    """How far from a source pixels are fitted: to the window's margin, or `fit_aperture_sigma`.

    That is beyond the largest size that a source may have.
    """
    beyond = config.fit_options.fit_aperture_sigma
    if beyond is None:
        return placed.margin
    circle = (config.photometry.aper_sup + beyond) * fwhm_pix / FWHM_PER_SIGMA
    return min(placed.margin, circle)


def with_noise(modelled: Modelled, rms: NDArray[np.float64], correlation: Correlation) -> Modelled:
    r"""The sources and blocks with the errors that the noise of the map gives them.

    A fit with the weights W has the covariance

    .. math:: C\,(J^T W N W J)\,C, \quad C = (J^T W J)^{-1}

    in noise of the covariance N (White 1980, Econometrica 48, 817): C itself where N is the inverse
    of W, but not where neighbouring pixels share noise, or weigh otherwise.

    Parameters
    ----------
    modelled
        Fits with the linear loss.
    rms, correlation
        Noise of every pixel (ny, nx), Jy/beam, and how that of neighbours is correlated.
    """
    fits, placed = modelled.fits, modelled.placed
    drawn = fits.elliptical(LEAST_ELLIPTICITY)  # as the covariances of the fits have it
    covariance, blocks = fits.covariance.copy(), []
    for which, weight, narrow in modelled.blocks:
        row, slot, source = members_of(placed, which)
        finite, wide = np.nan_to_num(narrow), np.full_like(narrow, np.nan)
        for some in in_chunks(which):
            noise = np.nan_to_num(cut_out(rms, placed, which[some]))
            columns = _columns(drawn, placed, which[some], narrow.shape[1])
            columns *= (weight[some] * noise)[:, None]
            wide[some] = finite[some] @ covariance_of_sums(columns, correlation) @ finite[some]
        wide = np.where(np.isfinite(narrow), wide, np.nan)
        own = 6 * slot[:, None] + np.arange(6)
        covariance[source] = wide[row[:, None, None], own[:, :, None], own[:, None]]
        blocks.append(Fitted(which, weight, wide))
    return modelled._replace(fits=fits._replace(covariance=covariance), blocks=blocks)


def _columns(
    fits: SourceFits, placed: Windows, which: NDArray[np.int_], size: int
) -> NDArray[np.float64]:
    """The Jacobian of blocks of a bucket (block, `size`, side, side): sources, then polynomial."""
    side, own = int(placed.side[which[0]]), members_of(placed, which)
    slots, corner = int(placed.slots[which[0]]), which[own.row]
    out = np.zeros((len(which), size, side, side))
    slopes = stamp_gradients(fits, own.source, placed.x0[corner], placed.y0[corner], side)
    out[own.row[:, None], 6 * own.slot[:, None] + np.arange(6)] = slopes
    smooth = Backgrounds.terms(side)[: size - 6 * slots]
    out[:, 6 * slots :] = smooth
    return out


def _near_neighbours(
    placed: Windows,
    which: NDArray[np.int_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    radius: float,
) -> NDArray[np.bool_]:
    """Pixels (block, side, side) nearer than `radius` to a source outside the block.

    Pixels that are nearer to one of the block's own sources are left in.
    """
    side = int(placed.side[which[0]])
    grid = np.arange(side)
    out = np.zeros((len(which), side, side), bool)
    for mask, block in zip(out, which, strict=True):
        x0, y0 = placed.x0[block], placed.y0[block]
        close = (np.abs(x - x0 - side / 2) < side / 2 + radius) & (
            np.abs(y - y0 - side / 2) < side / 2 + radius
        )
        close[placed.members[block]] = False
        if not close.any():
            continue
        own = _distance(grid, x[placed.members[block]] - x0, y[placed.members[block]] - y0)
        other = _distance(grid, x[close] - x0, y[close] - y0)
        mask |= (other < radius) & (other < own)
    return out


def _distance(
    grid: NDArray[np.int_], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance of every pixel of a window to the nearest of some positions."""
    square = (grid[None, None, :] - x[:, None, None]) ** 2 + (
        grid[None, :, None] - y[:, None, None]
    ) ** 2
    return np.sqrt(square.min(axis=0))


def _batch(
    image: NDArray[np.float64],
    weight: NDArray[np.float64],
    placed: Windows,
    which: NDArray[np.int_],
    slots: int,
    start: _Start,
    last: SourceFits | None,
) -> GroupBatch:
    """Pad the blocks to the bucket's slots."""
    own, shape = members_of(placed, which), (len(which), slots, 6)
    corner = np.zeros((len(own.row), 6))
    corner[:, 1], corner[:, 2] = placed.x0[which[own.row]], placed.y0[which[own.row]]

    def padded(values: NDArray[np.float64]) -> NDArray[np.float64]:
        out = np.zeros(shape)
        out[own.row, own.slot] = values[own.source] - corner
        return out

    free, present = np.zeros(shape, bool), np.zeros(shape[:2], bool)
    free[own.row, own.slot] = start.free[own.source]
    present[own.row, own.slot] = True
    return GroupBatch(
        data=np.nan_to_num(image),
        weight=weight,
        start=padded(start.start if last is None else _as_params(last)),
        lower=padded(start.lower),
        upper=padded(start.upper),
        free=free,
        present=present,
        order=np.zeros(len(which)),
    )


def _best_fit(
    batch: GroupBatch, orders: tuple[int, ...], config: Config
) -> tuple[FitResult, NDArray[np.int_], NDArray[np.bool_]]:
    """The best of some background orders of each group, with a second try for fits that failed.

    Every order is one more problem of the batch. Returns the fits, the orders, and which fits
    needed the second try.
    """
    count, tried = len(batch.data), len(orders)
    candidates = GroupBatch(*(np.concatenate([leaf] * tried) for leaf in batch))
    candidates = candidates._replace(order=np.repeat(orders, count))
    result = _fitted(candidates, config)
    result, repeated = _second_try(candidates, result, config)
    best = np.argmin(_criterion(result, config).reshape(tried, count), axis=0)
    chosen = best * count + np.arange(count)
    return (
        FitResult(*(leaf[chosen] for leaf in result)),
        candidates.order[chosen],
        repeated[chosen],
    )


def _second_try(
    batch: GroupBatch, result: FitResult, config: Config
) -> tuple[FitResult, NDArray[np.bool_]]:
    """Fit again, with wider bounds, what did not converge."""
    failed = (result.status != CONVERGED) & (batch.weight > 0).any(axis=(1, 2))
    if not failed.any():
        return result, failed
    some = GroupBatch(*(leaf[failed] for leaf in batch))
    middle, half = (some.lower + some.upper) / 2, (some.upper - some.lower) / 2
    lower, upper = middle - _WIDER * half, middle + _WIDER * half
    lower[..., 0] = np.minimum(some.lower[..., 0], 0)
    lower[..., 3:5] = some.lower[..., 3:5] / _WIDER
    upper[..., 3:5] = some.upper[..., 3:5] * _WIDER
    tried = _fitted(some._replace(lower=lower, upper=upper), config)
    improved = np.zeros(len(failed), bool)
    improved[failed] = tried.status == CONVERGED
    spread = [np.zeros((len(failed), *leaf.shape[1:]), leaf.dtype) for leaf in tried]
    for leaf, values in zip(spread, tried, strict=True):
        leaf[failed] = values
    return _merge(improved, FitResult(*spread), result), improved


def _merge(mask: NDArray[np.bool_], new: FitResult, old: FitResult) -> FitResult:
    return FitResult(
        *(
            np.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(new, old, strict=True)
        )
    )


def _fitted(batch: GroupBatch, config: Config) -> FitResult:
    """The fits of a batch, all in the program of the configuration's highest order."""
    options = config.fit_options
    numerics = FitOptions(
        loss=options.loss,
        f_scale=options.f_scale,
        lambda_l2=options.lambda_l2 if options.use_l2_regularization else 0.0,
        ftol=options.ftol,
        xtol=options.xtol,
        gtol=options.gtol,
        max_steps=options.max_nfev,
    )
    return fit_groups(batch, numerics, highest_order=_highest_order(config))


def _highest_order(config: Config) -> int:
    """The highest order of the polynomial that is fitted with the sources, -1 for none."""
    return max(_joint_orders(config))


def _joint_orders(config: Config) -> tuple[int, ...]:
    joint = config.background.fit_gauss_and_bg_together
    return tuple(config.background.polynomial_orders) if joint else (-1,)


def _criterion(result: FitResult, config: Config) -> NDArray[np.float64]:
    """What the best order has least of; a fit that failed is never the best of several."""
    values = {"nmse": result.nmse, "redchi": result.chi2_red, "bic": result.bic}
    value = values[config.fit_options.min_method]
    return np.where((result.status == CONVERGED) & np.isfinite(value), value, np.inf)


def _as_params(fits: SourceFits) -> NDArray[np.float64]:
    return np.column_stack(fits[:6])


def _store(
    fits: SourceFits,
    result: FitResult,
    order: NDArray[np.int_],
    second: NDArray[np.bool_],
    placed: Windows,
    which: NDArray[np.int_],
) -> None:
    """Put the results of a bucket's blocks in the places of their sources."""
    row, slot, source = members_of(placed, which)
    for column, values in zip(fits[:6], result.params[row, slot].T, strict=True):
        column[source] = values
    fits.x[source] += placed.x0[which[row]]
    fits.y[source] += placed.y0[which[row]]
    own = 6 * slot[:, None] + np.arange(6)
    fits.covariance[source] = result.covariance[row[:, None, None], own[:, :, None], own[:, None]]
    fits.order[source] = order[row]
    fits.nmse[source] = result.nmse[row]
    fits.chi2_red[source] = result.chi2_red[row]
    fits.bic[source] = result.bic[row]
    fits.niter[source] = result.steps[row]
    converged = result.status[row] == CONVERGED
    fits.status[source] = np.where(converged, np.where(second[row], 2, 1), 0)
    out_of_steps = FLAGS.STEP_LIMIT * (result.status[row] == STEP_LIMIT)
    fits.flags[source] = FLAGS.on_bound(result.on_bound[row, slot]) | out_of_steps


def unfitted(found: Detections, fwhm_pix: float, config: Config) -> SourceFits:
    """Positions and peaks as detected, without a shape (status -1)."""
    n = len(found.x)
    reach = config.fit_options.group_distance_fwhm * fwhm_pix / 2
    group = link(n, pairs_closer(found.x, found.y, reach))
    unknown = np.full(n, np.nan)
    params = (found.peak, found.x, found.y, unknown, unknown, unknown)
    fits = SourceFits.guess(np.column_stack(params)).in_groups(group)
    return fits._replace(order=np.full(n, -1), status=np.full(n, -1))
