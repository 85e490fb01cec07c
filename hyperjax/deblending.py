"""Whether a block of sources is better explained by one source more, or by one less.

Alternatives are tried for all blocks at once, on the same windows as the block itself: a source
cut in two along its major axis; a new source where the residual has a peak; the block without one
of its sources. What counts is the gain in chi^2.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from hyperjax.fitting import CONVERGED, FitOptions, FitResult
from hyperjax.groups import Windows, members_of
from hyperjax.photometry import quadratic_form
from hyperjax.sources import SourceFits
from hyperjax.whitened import (
    SLOTS,
    Field,
    Noise,
    fit_windows,
    in_windows,
    on_map,
    significance,
    window_data,
)

NEAR_FWHM = 1.5
"""Peaks of the residual that are closer to a source belong to its block."""

LEAST_SNR_SQUARED = 5.0
"""A source whose total flux is less significant is none."""

_PARAMETERS = 6
_MISMATCH = 0.05  # of a source's S/N: real sources differ from Gaussians by that
_POINT_MISMATCH = 0.02  # where all sources of a block are as small as point sources
_POINT_SIZE = 1.6  # of the beam, at most
_ROUGH = FitOptions(ftol=2e-3, max_steps=15)  # enough to tell a gain of some tens
_SMALLEST = 0.7  # of the minor axis: sizes of the halves of a source that is narrower than the beam
_LEAST_OFFSET = 0.5  # of the halves from the middle, sigma of the beam


class Peaks(NamedTuple):
    """Peaks (n,) of the matched filter: position, signal-to-noise ratio, and brightness Jy/beam."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    snr: NDArray[np.float64]
    peak: NDArray[np.float64]

    def take(self, index: NDArray[np.int_] | NDArray[np.bool_]) -> "Peaks":
        """Some of the peaks."""
        return Peaks(*(column[index] for column in self))


class _Alternative(NamedTuple):
    """Another set of sources (k, 6) for a block, in its window."""

    block: int
    sources: NDArray[np.float64]


class Verdict(NamedTuple):
    """What came of the alternatives: the sources, which of them are new, and which blocks gained.

    `settled` (n,) are the sources for which nothing came near to being better.
    """

    fits: SourceFits
    settled: NDArray[np.bool_]
    changed: int


def better_blocks(
    field: Field,
    noise: Noise,
    white: NDArray[np.float64],
    fits: SourceFits,
    settled: NDArray[np.bool_],
    placed: Windows,
    peaks: Peaks,
) -> Verdict:
    """Put the best alternative of every block in its place, where it is better by enough.

    One source more must gain the chi^2 of a detection, 6 ln(pixels) for its parameters (the
    Bayesian information criterion), and the square of what a source that is no Gaussian leaves,
    which is more where the sources are larger than the beam; a source without which less than that
    is lost goes.

    Parameters
    ----------
    white
        The whitened residual of `fits`.
    settled
        (n,) sources that were tried before, to no avail.
    placed
        The blocks of the sources.
    peaks
        Peaks of the residual.
    """
    which = np.arange(len(placed.members))
    own = members_of(placed, which)
    sources = np.split(in_windows(fits, noise, placed, which), np.flatnonzero(own.slot == 0)[1:])
    options = list(_alternatives(field, noise, fits, settled, placed, peaks, sources))
    tried = np.unique([option.block for option in options]).astype(int)
    present = [_Alternative(int(block), sources[block]) for block in tried]
    cost, results = _tried(field, noise, white, fits, placed, [*present, *options])
    before = np.full(len(which), np.nan)
    before[tried] = cost[: len(tried)]
    best: dict[int, tuple[float, NDArray[np.float64]]] = {}
    near = np.zeros(len(which), bool)
    strength = significance(fits)
    for option, after, result in zip(
        options, cost[len(tried) :], results[len(tried) :], strict=True
    ):
        block, members = option.block, placed.members[option.block]
        loses = len(option.sources) < len(members)
        major = fits.sigma_major[members] if loses or result is None else result[:, 3]
        worth = _worth(field, int(placed.side[block]), strength[members].max(), major)
        gain = 2 * (before[block] - after) + (worth if loses else -worth)
        near[block] |= gain > -worth / 2
        if result is not None and gain > best.get(block, (0.0,))[0]:
            best[block] = (gain, result)
    return _replaced(fits, noise, placed, best, near)


def _worth(field: Field, side: int, strength: float, major: NDArray[np.float64]) -> float:
    """Chi^2 that one source more must gain in a block with sources of some `major` sigmas."""
    are_points = np.all(major < _POINT_SIZE * field.sigma_pix)
    mismatch = (_POINT_MISMATCH if are_points else _MISMATCH) * strength
    detection = field.config.detection.sigma_thres**2
    return float(detection + _PARAMETERS * np.log(side**2) + mismatch**2)


def _alternatives(
    field: Field,
    noise: Noise,
    fits: SourceFits,
    settled: NDArray[np.bool_],
    placed: Windows,
    peaks: Peaks,
    sources: list[NDArray[np.float64]],
) -> Iterable[_Alternative]:
    """What else the blocks may hold."""
    strength = significance(fits)
    distance, nearest = KDTree(np.column_stack([fits.x, fits.y])).query(
        np.column_stack([peaks.x, peaks.y])
    )
    nearest = np.where(distance < NEAR_FWHM * field.fwhm_pix, nearest, -1)
    for block, members in enumerate(placed.members):
        own = sources[block]
        least = _worth(field, int(placed.side[block]), 0.0, np.zeros(1))
        room = len(members) < SLOTS[-1]
        fresh = not settled[members].all()
        for slot, source in enumerate(members):
            rest = np.delete(own, slot, 0)
            if room and fresh and strength[source] ** 2 > least:
                yield _Alternative(block, np.vstack([rest, halves(own[slot], field)]))
            if fresh and len(members) > 1:
                yield _Alternative(block, rest)
        if room:
            for new in np.flatnonzero(np.isin(nearest, members)):
                added = _in_window(peaks, int(new), field, noise, placed, block)
                yield _Alternative(block, np.vstack([own, added]))


def halves(source: NDArray[np.float64], field: Field) -> NDArray[np.float64]:
    """Two sources (2, 6) in the place of one, along its major axis, with the same second moments.

    They are of the size of the beam, where the source is not narrower than that.
    """
    peak, x, y, major, minor, theta = source
    size = min(field.sigma_pix, max(minor, _SMALLEST * field.sigma_pix))
    offset = max(np.sqrt(max(major**2 - size**2, 0.0)), _LEAST_OFFSET * field.sigma_pix)
    shift = offset * np.array([np.cos(theta), np.sin(theta)])
    both = np.tile([peak * major * minor / (2 * size**2), x, y, size, size, 0.0], (2, 1))
    both[0, 1:3] += shift
    both[1, 1:3] -= shift
    return both


def _in_window(
    peaks: Peaks, which: int, field: Field, noise: Noise, placed: Windows, block: int
) -> NDArray[np.float64]:
    """A peak as a point source (1, 6) in a block's window."""
    one = peaks.take(np.array([which]))
    size = np.full(1, field.sigma_pix)
    source = SourceFits.guess(np.column_stack([one.peak, one.x, one.y, size, size, 0 * size]))
    alone = placed._replace(members=[np.array([0])], x0=placed.x0[[block]], y0=placed.y0[[block]])
    return in_windows(source, noise, alone, np.array([0]))


def _tried(
    field: Field,
    noise: Noise,
    white: NDArray[np.float64],
    fits: SourceFits,
    placed: Windows,
    options: list[_Alternative],
) -> tuple[NDArray[np.float64], list[NDArray[np.float64] | None]]:
    """Cost of each alternative and its sources on the map, None where one of them is none."""
    cost = np.full(len(options), np.inf)
    sources: list[NDArray[np.float64] | None] = [None] * len(options)
    block = np.array([option.block for option in options], int)
    count = np.array([len(option.sources) for option in options], int)
    slots = np.array(SLOTS)[np.searchsorted(SLOTS, count)]
    for side in np.unique(placed.side[block]):
        here = placed.side[block] == side
        blocks, place = np.unique(block[here], return_inverse=True)
        data, weight = window_data(white, field, noise, fits, placed, blocks)
        for kind in np.unique(slots[here]):
            some = slots[here] == kind
            which, window = np.flatnonzero(here)[some], place[some]
            starts = np.concatenate([options[i].sources for i in which])
            row = np.repeat(np.arange(len(which)), count[which])
            result = fit_windows(
                field, data[window], weight[window], starts, row, int(kind), int(side), _ROUGH
            )
            cost[which] = result.cost
            sound = _are_sources(result, row)
            for i, option in enumerate(which):
                if sound[i]:
                    corner = np.full(count[option], block[option])
                    params = result.params[i, : count[option]]
                    sources[option] = on_map(params, noise, placed.x0[corner], placed.y0[corner])[0]
    return cost, sources


def _are_sources(result: FitResult, row: NDArray[np.int_]) -> NDArray[np.bool_]:
    """Whether a fit (group,) converged to sources whose total fluxes are all significant."""
    slot = np.arange(len(row)) - np.searchsorted(row, row)
    own = _PARAMETERS * slot[:, None] + np.arange(_PARAMETERS)
    covariance = result.covariance[row[:, None, None], own[:, :, None], own[:, None]]
    peak, _, _, major, minor, _ = result.params[row, slot].T
    zero = np.zeros_like(peak)
    slope = np.column_stack([major * minor, zero, zero, peak * minor, peak * major, zero])
    variance = quadratic_form(slope, covariance)
    significant = (peak * major * minor) ** 2 > LEAST_SNR_SQUARED * variance
    missing = np.bincount(row, ~(significant & (variance > 0)), len(result.cost))
    return np.asarray((missing == 0) & (result.status == CONVERGED))


def _replaced(
    fits: SourceFits,
    noise: Noise,
    placed: Windows,
    best: dict[int, tuple[float, NDArray[np.float64]]],
    near: NDArray[np.bool_],
) -> Verdict:
    """The sources, with the best alternatives in the places of their blocks."""
    own = members_of(placed, np.arange(len(placed.members)))
    changed = np.isin(own.row, list(best))
    gone, settled = np.zeros(len(fits.x), bool), np.zeros(len(fits.x), bool)
    gone[own.source], settled[own.source] = changed, ~near[own.row]
    kept = fits.take(np.flatnonzero(~gone))
    new = np.concatenate([np.zeros((0, _PARAMETERS)), *(sources for _, sources in best.values())])
    fresh = np.zeros(len(new), bool)
    return Verdict(
        kept.and_more(SourceFits.guess(new)), np.concatenate([settled[~gone], fresh]), len(best)
    )
