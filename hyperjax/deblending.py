"""Whether a source and its neighbours are better explained by one source more, or by one less.

Alternatives are tried for the neighbourhoods of all sources at once, each on the same window as
what is there at present: a source cut in two along its major axis; a new source where the residual
has a peak; the neighbourhood without its source, or with one in the place of all. What counts is
the gain in chi^2. What is further away stays as it is, to be fitted anew when the best are in.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from hyperjax.fitting import CONVERGED, FitResult
from hyperjax.groups import Windows, members_of
from hyperjax.maps import FWHM_PER_SIGMA
from hyperjax.photometry import model_flux
from hyperjax.radial import explained_by_profiles
from hyperjax.runtime import at_once
from hyperjax.sources import SourceFits, nearest_values
from hyperjax.whitened import (
    ROUGH,
    SLOTS,
    Field,
    Noise,
    fit_windows,
    in_windows,
    on_map,
    significance,
    surroundings,
    window_data,
)

NEAR_FWHM = 2.0
"""Peaks of the residual that are closer to a source belong to its neighbourhood."""

LEAST_OF_MEMBERS = 1.0
"""A source that was compared with alternatives is none if its total flux is less, over its error.

That a blend is two is certain before it is known how much each of them has.
"""

ON_BOUND = 0.999
"""Share of the largest size from which a source is as large as it may be."""

MISMATCH = 0.02
"""What of a source is no Gaussian, as a share of it."""

_PARAMETERS = 6
_BEAMS = 4 * math.log(2) * NEAR_FWHM**2  # in the circle that a source's neighbours are in
_OTHER_MISMATCH = 0.1  # the same of an extended source whose radial profile is another one
_OF_PROFILE = 0.5  # of a gain in chi^2, from which it may be that profile's
_PROFILE_FWHM = 1.0  # of an extended source: what its profile leaves is closer than that
_EXTENDED = 1.35  # least minor axis of such a source, of the beam: blends of two are narrower
_LEAST_SPLIT = 50.0  # square of the S/N of a source that may be two
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
    """Another set of sources (k, 6) for a neighbourhood (block), in its window."""

    block: int
    sources: NDArray[np.float64]


class _Fitted(NamedTuple):
    """An alternative as it was fitted: its cost, and its sources (k, 6) in the window.

    And these on the map, None where one of them is none; the data (2, mode) of the window and their
    weights (mode,).
    """

    cost: float
    sources: NDArray[np.float64]
    on_map: NDArray[np.float64] | None
    data: NDArray[np.float64]
    weight: NDArray[np.float64]


class _Alike(NamedTuple):
    """Alternatives that are fitted together: which, their windows, and the data of all windows."""

    which: NDArray[np.int_]
    window: NDArray[np.int_]
    data: NDArray[np.float64]
    weight: NDArray[np.float64]
    slots: int
    side: int


class Verdict(NamedTuple):
    """What came of the alternatives: the sources, and how many neighbourhoods have changed.

    `settled` (n,) are the sources for which nothing came near to being better.
    """

    fits: SourceFits
    settled: NDArray[np.bool_]
    changed: int


def better_sources(
    field: Field,
    noise: Noise,
    white: NDArray[np.float64],
    fits: SourceFits,
    settled: NDArray[np.bool_],
    peaks: Peaks,
) -> Verdict:
    """Put the best alternatives in the places of sources, where they are better by enough.

    One source more must gain `worth_of_one`, and what sources beside it may leave that are no
    Gaussians. Of extended ones that is also what other radial profiles would take away, and more
    where that is most of the gain. Where fewer sources lose less than that, they are put in place.
    Of alternatives that share sources the best one is.

    Parameters
    ----------
    white
        The whitened residual of `fits`.
    settled
        (n,) sources that were tried before, to no avail.
    peaks
        Peaks of the residual.
    """
    if not len(fits.x):
        return Verdict(fits, settled, 0)
    placed, own = surroundings(field, fits)
    which = np.arange(len(placed.members))
    first = np.flatnonzero(members_of(placed, which).slot == 0)[1:]
    sources = np.split(in_windows(fits, noise, placed, which), first)
    strength = significance(fits)
    options = list(
        _alternatives(field, noise, fits, strength, settled, placed, own, peaks, sources)
    )
    tried = np.unique([option.block for option in options]).astype(int).tolist()
    present = [_Alternative(block, sources[block]) for block in tried]
    fitted = _tried(field, noise, white, fits, placed, [*present, *options])
    at_present = dict(zip(tried, fitted, strict=False))
    best: dict[int, tuple[float, NDArray[np.float64]]] = {}
    near = np.zeros(len(which), bool)
    for option, after in zip(options, fitted[len(tried) :], strict=True):
        block, before = option.block, at_present[option.block]
        more = len(option.sources) - len(sources[block])
        gain = 2 * (before.cost - after.cost)
        if more > 0 and 2 * gain < more * worth_of_one(field.config.detection.sigma_thres):
            continue  # it is not near, whatever else it must be worth
        worth = _worth(
            field,
            int(placed.side[block]),
            strength[placed.members[block]],
            sources[block],
            option,
            before,
            after,
        )
        gain -= worth * np.sign(more)
        near[block] |= gain > -worth / 2
        if after.on_map is not None and gain > best.get(block, (0.0,))[0]:
            best[block] = (gain, after.on_map)
    return _replaced(fits, ~near[own], placed, best)


def worth_of_one(threshold: float) -> float:
    """Chi^2 that a source must gain: that of a detection, and the price of its parameters.

    That is the Bayesian information criterion (Schwarz 1978, Ann. Stat. 6, 461) of six parameters
    for as many measurements as there are beams in the circle that its neighbours are in.
    """
    return threshold**2 + _PARAMETERS * math.log(_BEAMS)


def _worth(
    field: Field,
    side: int,
    strength: NDArray[np.float64],
    present: NDArray[np.float64],
    option: _Alternative,
    before: _Fitted,
    after: _Fitted,
) -> float:
    """Chi^2 that the more sources must gain: of those at present and an alternative.

    The `present` sources (k, 6) have the signal-to-noise ratios `strength` (k,). What counts is
    what the fewer sources may leave beside what has changed, as both were fitted.
    """
    more = len(option.sources) - len(present)
    same = (present[:, None] == option.sources).all(axis=2)
    stays = same.any(axis=1)
    fewer = before if more > 0 else after
    if more < 0 and stays.any():
        strength = strength[stays]
    elif more < 0:  # one in the place of all
        strength = np.sqrt([max(np.sum(before.data**2) - 2 * before.cost, 0.0)])
    changed = np.vstack([present[~stays], after.sources[~same.any(axis=0)]])[:, 1:3]
    away = np.linalg.norm(fewer.sources[:, None, 1:3] - changed, axis=2).min(axis=1)
    size = FWHM_PER_SIGMA * fewer.sources[:, 3]
    near = away <= size + field.fwhm_pix
    extended = near & (fewer.sources[:, 4] > _EXTENDED * field.sigma_pix)
    extended &= away <= _PROFILE_FWHM * size
    worth = abs(more) * worth_of_one(field.config.detection.sigma_thres)
    worth += float(np.sum((MISMATCH * strength[near]) ** 2))
    gain = 2 * (before.cost - after.cost)
    if not extended.any() or (more > 0 and gain <= worth):
        return worth
    of_profile = explained_by_profiles(
        fewer.data, fewer.weight, side, fewer.sources, np.flatnonzero(extended)
    )
    if of_profile > _OF_PROFILE * abs(gain):
        worth += float(np.sum((_OTHER_MISMATCH * strength[extended]) ** 2))
    return worth + of_profile


def _alternatives(
    field: Field,
    noise: Noise,
    fits: SourceFits,
    strength: NDArray[np.float64],
    settled: NDArray[np.bool_],
    placed: Windows,
    own: NDArray[np.int_],
    peaks: Peaks,
    sources: list[NDArray[np.float64]],
) -> Iterable[_Alternative]:
    """What else the neighbourhoods may hold; each source is changed in its own one."""
    distance, nearest = KDTree(np.column_stack([fits.x, fits.y])).query(
        np.column_stack([peaks.x, peaks.y])
    )
    near = np.flatnonzero(distance < NEAR_FWHM * field.fwhm_pix)
    points, block = _point_sources(field, noise, peaks.take(near)), own[nearest[near]]
    order = np.argsort(block, kind="stable")
    ends = np.searchsorted(block[order], np.arange(len(placed.members) + 1))
    for index, members in enumerate(placed.members):
        present = sources[index]
        fresh = not settled[members].all()
        for slot in np.flatnonzero(own[members] == index) if fresh else ():
            rest = np.delete(present, slot, 0)
            if strength[members[slot]] ** 2 > _LEAST_SPLIT:
                yield _Alternative(index, np.vstack([rest, halves(present[slot], field)]))
            if len(members) > 1:
                yield _Alternative(index, rest)
        if fresh and len(members) > 2 and present[:, 0].any():
            yield _Alternative(index, merged(present))
        corner = np.array([0, placed.x0[index], placed.y0[index], 0, 0, 0])
        for new in order[ends[index] : ends[index + 1]]:
            yield _Alternative(index, np.vstack([present, points[new] - corner]))


def merged(sources: NDArray[np.float64]) -> NDArray[np.float64]:
    """One source (1, 6) in the place of several, with the same second moments."""
    peak, x, y, major, minor, theta = sources.T
    flux = peak * major * minor
    share = flux / flux.sum()
    axis = np.stack([np.cos(theta), np.sin(theta)], 1)
    across = np.stack([-np.sin(theta), np.cos(theta)], 1)
    middle = np.array([share @ x, share @ y])
    offset = np.column_stack([x, y]) - middle
    spread = (
        np.einsum("k,ki,kj->ij", share * major**2, axis, axis)
        + np.einsum("k,ki,kj->ij", share * minor**2, across, across)
        + np.einsum("k,ki,kj->ij", share, offset, offset)
    )
    squares, axes = np.linalg.eigh(spread)
    small, large = np.sqrt(squares)
    angle = np.arctan2(axes[1, 1], axes[0, 1]) % np.pi
    return np.array([[flux.sum() / (small * large), *middle, large, small, angle]])


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


def _point_sources(field: Field, noise: Noise, peaks: Peaks) -> NDArray[np.float64]:
    """Peaks as point sources (n, 6), in units of the noise."""
    unit = nearest_values(noise.scale, peaks.x, peaks.y)
    size = np.full(len(unit), field.sigma_pix)
    return np.column_stack([peaks.peak / unit, peaks.x, peaks.y, size, size, 0 * size])


def _tried(
    field: Field,
    noise: Noise,
    white: NDArray[np.float64],
    fits: SourceFits,
    placed: Windows,
    options: list[_Alternative],
) -> list[_Fitted]:
    """Fit all alternatives."""
    block = np.array([option.block for option in options], int)
    count = np.array([len(option.sources) for option in options], int)
    slots = np.array(SLOTS)[np.searchsorted(SLOTS, count)]
    alike: list[_Alike] = []
    for side in np.unique(placed.side[block]):
        here = placed.side[block] == side
        blocks, place = np.unique(block[here], return_inverse=True)
        data, weight = window_data(white, field, noise, fits, placed, blocks)
        for kind in np.unique(slots[here]):
            some = slots[here] == kind
            alike.append(
                _Alike(np.flatnonzero(here)[some], place[some], data, weight, int(kind), int(side))
            )

    def fit(some: _Alike) -> tuple[FitResult, NDArray[np.bool_]]:
        starts = np.concatenate([options[i].sources for i in some.which])
        row = np.repeat(np.arange(len(some.which)), count[some.which])
        data, weight = some.data[some.window], some.weight[some.window]
        result = fit_windows(field, data, weight, starts, row, some.slots, some.side, ROUGH)
        return result, _are_sources(field, result, row)

    fitted: dict[int, _Fitted] = {}
    for some, (result, sound) in zip(alike, at_once(fit, alike), strict=True):
        corner = (at[block[some.which], None] for at in (placed.x0, placed.y0))
        there, _ = on_map(result.params, noise, *corner)
        for i, option in enumerate(some.which.tolist()):
            window, of_one = some.window[i], slice(count[option])
            fitted[option] = _Fitted(
                cost=float(result.cost[i]),
                sources=result.params[i, of_one],
                on_map=there[i, of_one] if sound[i] else None,
                data=some.data[window],
                weight=some.weight[window],
            )
    return [fitted[option] for option in range(len(options))]


def _are_sources(field: Field, result: FitResult, row: NDArray[np.int_]) -> NDArray[np.bool_]:
    """Whether a fit (group,) converged to sources that are compact and significant, all of them."""
    slot = np.arange(len(row)) - np.searchsorted(row, row)
    own = _PARAMETERS * slot[:, None] + np.arange(_PARAMETERS)
    covariance = result.covariance[row[:, None, None], own[:, :, None], own[:, None]]
    sources = SourceFits.guess(result.params[row, slot])._replace(covariance=covariance)
    flux, error = model_flux(sources)
    significant = (error > 0) & (flux > LEAST_OF_MEMBERS * error)
    sound = significant & (sources.sigma_major < ON_BOUND * field.largest_pix)
    missing = np.bincount(row, ~sound, len(result.cost))
    return np.asarray((missing == 0) & (result.status == CONVERGED))


def _replaced(
    fits: SourceFits,
    settled: NDArray[np.bool_],
    placed: Windows,
    best: dict[int, tuple[float, NDArray[np.float64]]],
) -> Verdict:
    """The sources, with the best alternatives in the places of neighbourhoods that share none."""
    gone, new = np.zeros(len(fits.x), bool), [np.zeros((0, _PARAMETERS))]
    for block, (_, sources) in sorted(best.items(), key=lambda item: -item[1][0]):
        if not gone[placed.members[block]].any():
            gone[placed.members[block]] = True
            new.append(sources)
    fresh = SourceFits.guess(np.concatenate(new))
    unsettled = np.zeros(len(fresh.x), bool)
    kept = fits.take(np.flatnonzero(~gone)).and_more(fresh)
    return Verdict(kept, np.append(settled[~gone], unsettled), len(new) - 1)
