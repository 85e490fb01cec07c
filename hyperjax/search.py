"""Find and model all sources of a map in noise that neighbouring pixels share.

The noise is measured on what the sources leave of the map, all sources are fitted anew, and what is
left is searched for more, twice if anything was added; and so again, until next to nothing is
added, or five times (nine where sources may be a pattern). In the last noise those are fitted again
that have moved, or that others have moved beside, until none moves. A pattern on the sky would be
in the noise's spectrum, which therefore has no directions at first.
"""

import logging
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from hyperjax.catalog import POOR_CHI2
from hyperjax.deblending import (
    LEAST_OF_MEMBERS,
    MISMATCH,
    NEAR_FWHM,
    ON_BOUND,
    Peaks,
    better_sources,
    worth_of_one,
)
from hyperjax.fitting import FitOptions
from hyperjax.groups import pairs_closer
from hyperjax.maps import FWHM_PER_SIGMA
from hyperjax.photometry import model_flux
from hyperjax.sources import SourceFits, nearest_values
from hyperjax.spectrum import Waves
from hyperjax.whitened import (
    ROUGH,
    Field,
    Noise,
    Swept,
    filled_in,
    filtered,
    first_noise,
    fit_new,
    is_cut,
    overlapping,
    refiltered,
    significance,
    sweep,
    sweep_again,
    updated_noise,
    waves_of,
    whitened,
)

logger = logging.getLogger(__name__)

_START_SIZE = 1.2  # of the beam: sources are rarely smaller
_NEAR_SNR = 3.0  # of a peak of the residual that is tried as a companion
_NEIGHBOURS = 8  # sources near a peak that are looked at
_MANY = 20  # sources, which do not become fainter by chance
_MOST_FAINTER = 0.75  # share of sources that do where noise gets directions
_NOISES = 5  # times that the noise is measured while sources are added
_NOISES_OF_PATTERN = 9  # the same where sources may be a pattern
_WARY_NOISES = 7  # of these, at most, first, without directions
_FEW = 0.003  # share of sources whose changes are nothing to the noise
_MOST_MOVED = 0.5  # errors, in new noise: a source's own window tells 0.96 of what it moves
_UNMOVED = 0.1  # errors: sources that have moved by less, and their neighbours, are settled
_DRIFTING = 0.02  # the same where most sources move by more: together they may go far
_FAR_MOVED = 2.0  # errors: what moves further may move what is about it
_SWEEPS = 60  # of the last fits at most, until nothing moves
_ROUNDS = 2  # of changes in the same noise
_RINGS = 2.5  # of the reach of a poor fit: where whitening makes rings of what it leaves
_LEAST_RATIO = math.sqrt(5.0)  # of the total flux of a source and its error
_BLANK = -1e9  # of the matched filter, in blank pixels
_EDGE_FWHM = 2.0  # of the beam: what is closer to an edge may be its work
_RING_FWHM = 3.0  # of the beam, round a bright source: where rings may be at first
_RING = 0.2  # of the source: their brightness


class Found(NamedTuple):
    """Sources of a map, the covariances of their blocks, and the noise that they were found in.

    And the peaks above the threshold that are left in the residual, but for those round sources
    that fit poorly. Of those at edges only what would be worth a source, and apart.
    """

    fits: SourceFits
    blocks: list[tuple[NDArray[np.int_], NDArray[np.float64]]]
    noise: Noise
    peaks: Peaks
    edge_peaks: Peaks


def find_sources(field: Field) -> Found | None:
    """Find and fit all sources of a map; None if the spectrum of its noise cannot be had."""
    all_of_it = filtered(field, None)
    noise_of_all = first_noise(field, all_of_it)
    if noise_of_all is None:
        return None
    noise, pattern = noise_of_all
    threshold = field.config.detection.sigma_thres
    first = find_peaks(field, noise, waves_of(noise, all_of_it), threshold)
    fits = sweep(field, noise, _as_sources(field, _without_faint(field, first)), ROUGH).fits
    asked = field.config.fit_options
    options = FitOptions(
        ftol=asked.ftol, xtol=asked.xtol, gtol=asked.gtol, max_steps=asked.max_nfev
    )
    settled, wary, left = np.zeros(len(fits.x), bool), True, None
    for number in range(_NOISES_OF_PATTERN):
        if number >= _NOISES and not pattern:
            break
        left, before = filtered(field, fits) if left is None else left, noise
        noise = updated_noise(field, before, fits, left)
        pattern = pattern or noise.spectrum.stands_out
        wary = wary and number < _WARY_NOISES
        if wary and pattern:
            noise = updated_noise(field, before, fits, left, smooth=True)
        swept = sweep(field, noise, fits, options if number else ROUGH, left)
        if pattern and not wary and _are_in_noise(fits, swept.fits):
            logger.warning(
                "the sources form a pattern, which cannot be told from the noise: the noise is "
                "taken to be the same in all directions, and fluxes may be some per cent too low"
            )
            noise = updated_noise(field, before, fits, left, smooth=True)
            break
        seen, change = fits, _change(fits, swept.fits)
        settled &= ~_has_come_near(field, fits, swept.fits)
        keep = _is_source(field, swept.fits, threshold if number else 0.0)
        kept = swept.fits.take(np.flatnonzero(keep))
        fits, settled, changes, left = _searched(field, noise, kept, settled[keep])
        logger.debug(
            "noise %d: %d changes, %d sources moved", number, changes, np.sum(change > _MOST_MOVED)
        )
        few = number > 0 and left is not None and changes <= _FEW * len(fits.x)
        if few and wary and pattern:
            wary = False
        elif few and changes:
            break  # all are fitted to the end, with those that are new
        elif few:
            stale = change > _MOST_MOVED
            stale |= _beside(field, swept, _moving(change) | ~keep)
            stale |= _about(field, swept.fits, ~keep)
            seen = seen.take(np.flatnonzero(keep))
            return _settled(field, noise, swept.take(keep), stale[keep], options, seen, left)
    everything = np.ones(len(fits.x), bool)
    return _settled(field, noise, Swept(fits, []), everything, options, fits, left)


def _settled(
    field: Field,
    noise: Noise,
    swept: Swept,
    stale: NDArray[np.bool_],
    options: FitOptions,
    seen: SourceFits,
    left: NDArray[np.float64] | None = None,
) -> Found:
    """Fit sources until none moves, without those that turn out to be none.

    Those are fitted that are `stale` (n,), since they or what is beside them have moved, that blank
    pixels cut into, or whose block is another one now; and those about one that is gone, or is far
    from where it was `seen` when they were fitted last. What still moves by much after `_SWEEPS`
    times, or goes to and fro by that, has not converged. What the sources leave of the map as they
    are may be given.
    """
    sweeps, earlier, seen_at = 0, None, _places(seen)
    while True:
        before = filled_in(field, noise, swept.fits)
        filled = _moving(_change(swept.fits, before))
        stale = stale | is_cut(field, before) | _beside(field, swept, filled)
        if left is None:
            left = filtered(field, before)
        else:
            left = refiltered(field, left, swept.fits, before)
        again = sweep_again(field, noise, swept._replace(fits=before), stale, options, left)
        left = refiltered(field, left, before, again.fits)
        swept, change = again, _change(before, again.fits)
        moving = _moving(change)
        keep = _is_source(field, swept.fits, field.config.detection.sigma_thres)
        far = _change_from(seen_at, swept.fits) > _FAR_MOVED
        if earlier is not None:  # what goes to and fro is where it was
            far &= _moving(_change(earlier, swept.fits))
        seen_at[:, far] = _places(swept.fits)[:, far]
        about = _about(field, swept.fits, far | ~keep)
        stale = moving | _beside(field, swept, moving | ~keep) | about
        if not keep.all():
            swept, stale, left = swept.take(keep), stale[keep], None
            seen_at, earlier = seen_at[:, keep], None
            continue
        sweeps += 1
        logger.debug("final fit %d: %d sources moved", sweeps, moving.sum())
        back = earlier is not None and not _moving(_change(earlier, swept.fits)).any()
        earlier, ended = before, not stale.any() or (back and not about.any())
        if ended or sweeps == _SWEEPS:
            swept.fits.status[change > _MOST_MOVED] = 0
            return _found(field, noise, swept, left)


def _beside(field: Field, swept: Swept, changed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a source (n,) overlaps one of another block that has changed."""
    block = np.full(len(changed), -1)
    for index, (members, _) in enumerate(swept.blocks):
        block[members] = index
    pairs = overlapping(field, swept.fits)
    return _paired(pairs[block[pairs[:, 0]] != block[pairs[:, 1]]], changed)


def _about(field: Field, fits: SourceFits, changed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a source (n,) is about one that has changed, closer than the filter's box is wide.

    So far that has a part in the residual in its window.
    """
    if not changed.any():
        return changed
    return _paired(pairs_closer(fits.x, fits.y, field.box / 2), changed) | changed


def _paired(pairs: NDArray[np.int_], some: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether something (n,) is paired (k, 2) with one of some (n,)."""
    out = np.zeros(len(some), bool)
    out[pairs[some[pairs[:, ::-1]]]] = True
    return out


def _found(field: Field, noise: Noise, swept: Swept, left: NDArray[np.float64]) -> Found:
    """The sources as they are, and the peaks of what is left of the map."""
    fits = swept.fits
    threshold = field.config.detection.sigma_thres
    peaks = find_peaks(field, noise, waves_of(noise, left), threshold, least_depth=0.0)
    whole = nearest_values(field.depth, peaks.x, peaks.y) > _EDGE_FWHM * field.fwhm_pix
    at_edge = peaks.take(~whole & (peaks.snr**2 >= worth_of_one(threshold)))
    poor = fits.take(np.flatnonzero(fits.chi2_red > POOR_CHI2))
    return Found(
        *swept,
        noise,
        _away_from(field, poor, peaks.take(whole), _RINGS),
        _away_from(field, poor, _without_faint(field, at_edge), 1.0),
    )


def _away_from(field: Field, poor: SourceFits, peaks: Peaks, reaches: float) -> Peaks:
    """Peaks that are further than so many of its reaches from each source."""
    away = np.hypot(peaks.x[:, None] - poor.x, peaks.y[:, None] - poor.y)
    return peaks.take(np.all(away > reaches * _reach(field, poor), axis=1))


def _reach(field: Field, fits: SourceFits) -> NDArray[np.float64]:
    """How far from each source (n,) something of it may be left: its major FWHM and the beam's."""
    return FWHM_PER_SIGMA * fits.sigma_major + field.fwhm_pix


def _are_in_noise(before: SourceFits, after: SourceFits) -> bool:
    """Whether sources fitted in new noise are fainter, and too many of them for a coincidence.

    Then their own pattern on the sky is in its spectrum, and is whitened away. (In noise with
    stripes fluxes change as well, but up and down.)
    """
    fainter = model_flux(after)[0] < model_flux(before)[0]
    return len(fainter) >= _MANY and bool(np.mean(fainter) > _MOST_FAINTER)


def _change(before: SourceFits, after: SourceFits) -> NDArray[np.float64]:
    """How far a source (n,) has moved: the peak, the position or a size, in units of its error."""
    return _change_from(_places(before), after)


def _change_from(places: NDArray[np.float64], after: SourceFits) -> NDArray[np.float64]:
    """`_change` from `_places`."""
    error = np.sqrt(np.diagonal(after.covariance, axis1=1, axis2=2)[:, :5].T)
    change = np.abs(_places(after) - places)
    known = error > 0
    return np.asarray(np.divide(change, error, out=np.zeros_like(change), where=known).max(axis=0))


def _places(fits: SourceFits) -> NDArray[np.float64]:
    """Peaks, positions and sizes (5, n) of sources."""
    return np.array(fits[:5])


def _moving(change: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether sources (n,) move, by their changes."""
    drifting = len(change) > 0 and np.median(change) > _DRIFTING
    return change > (_DRIFTING if drifting else _UNMOVED)


def _has_come_near(field: Field, before: SourceFits, after: SourceFits) -> NDArray[np.bool_]:
    """Whether a source (n,) has a neighbour now that it did not have."""
    pairs, old = (_neighbours(field, fits) for fits in (after, before))
    count = len(after.x)
    new = pairs[~np.isin(pairs @ [count, 1], old @ [count, 1])]
    return np.isin(np.arange(count), new)


def _neighbours(field: Field, fits: SourceFits) -> NDArray[np.int_]:
    """Pairs (k, 2) of sources that are compared with alternatives together."""
    return np.sort(pairs_closer(fits.x, fits.y, NEAR_FWHM / 2 * field.fwhm_pix), axis=1)


def _searched(
    field: Field, noise: Noise, fits: SourceFits, settled: NDArray[np.bool_]
) -> tuple[SourceFits, NDArray[np.bool_], int, NDArray[np.float64] | None]:
    """Change the sources while that is better in the present noise; how many changes that were.

    They are looked at `_ROUNDS` times at most. `settled` (n,) are those for which nothing came near
    to being better. What they leave of the map is told with them, unless the last look has changed
    them.
    """
    threshold, total = field.config.detection.sigma_thres, 0
    for _ in range(_ROUNDS):
        left = filtered(field, fits)
        waves = waves_of(noise, left)
        white = whitened(field, noise, waves)
        peaks = find_peaks(field, noise, waves, min(_NEAR_SNR, threshold))
        new = _isolated(field, noise, white, peaks, fits)
        fits, settled, changed = better_sources(field, noise, white, fits, settled, peaks)
        fits = fits.and_more(new)
        settled = np.append(settled, np.zeros(len(new.x), bool))
        total += changed + len(new.x)
        if changed == 0 and len(new.x) == 0:
            return fits, settled, total, left
        fits = sweep(field, noise, fits, ROUGH, among=~settled).fits
        keep = _is_source(field, fits, threshold)
        fits, settled = fits.take(np.flatnonzero(keep)), settled[keep]
    return fits, settled, total, None


def _is_source(field: Field, fits: SourceFits, threshold: float) -> NDArray[np.bool_]:
    """Whether each source is one: significant, and no part of what a brighter one leaves.

    Of those of a group that are not significant only the faintest is none: without it the others,
    fitted anew, may be.
    """
    faint = ~_is_significant(field, fits, threshold)
    faintest = _first_of_groups(faint, _flux_ratio(fits), fits.group)
    return ~(faintest | _is_halo(field, fits))


def _flux_ratio(fits: SourceFits) -> NDArray[np.float64]:
    """Total flux of each source (n,) over its error; 0 where there is none."""
    flux, error = model_flux(fits)
    return np.divide(flux, error, out=np.zeros_like(flux), where=error > 0)


def _is_significant(field: Field, fits: SourceFits, threshold: float) -> NDArray[np.bool_]:
    """Whether each source (n,) is significant.

    An isolated source must reach the threshold with its total flux. Or its chi^2 must be worth a
    source: where noise is of the size of the beam sizes are uncertain, and with them total fluxes,
    of sources that are there without a doubt. (Not at an edge, beyond which noise is continued by
    its mirror image: where it has directions it is another one there.) Sources near others were
    compared with what is there without them, and have a total flux above its error; others, and
    those that blank pixels cut into, above sqrt(5) times its error. Where a fit leaves more than
    noise, errors count as larger by that.
    """
    ratio = _flux_ratio(fits)
    poor = fits.chi2_red > POOR_CHI2
    excess = np.where(poor, fits.chi2_red, 1.0)
    compared = np.isin(np.arange(len(ratio)), _neighbours(field, fits))
    least_ratio = np.where(compared & ~is_cut(field, fits), LEAST_OF_MEMBERS, _LEAST_RATIO)
    least = np.where(poor | ~compared, threshold**2 * excess, 0.0)
    size = np.maximum(FWHM_PER_SIGMA * fits.sigma_major, _EDGE_FWHM * field.fwhm_pix)
    inside = nearest_values(field.depth, fits.x, fits.y) > size
    worth = worth_of_one(threshold) * excess
    reached = (ratio**2 >= least) | inside & (significance(fits) ** 2 >= worth)
    return np.asarray(reached & (ratio > least_ratio))


def _first_of_groups(
    some: NDArray[np.bool_], ratio: NDArray[np.float64], group: NDArray[np.int_]
) -> NDArray[np.bool_]:
    """Of some sources (n,) the one of the smallest ratio in each group."""
    out = np.zeros(len(some), bool)
    order = np.flatnonzero(some)[np.argsort(ratio[some], kind="stable")]
    out[order[np.unique(group[order], return_index=True)[1]]] = True
    return out


def _is_halo(field: Field, fits: SourceFits) -> NDArray[np.bool_]:
    """Whether a source (n,) is as large as it may be, and part of what a brighter one leaves.

    It holds the brighter one: the first look at the noise makes that of the surroundings of very
    bright sources. Or it touches one that is far from a Gaussian.
    """
    out = np.zeros(len(fits.x), bool)
    large = np.flatnonzero(fits.sigma_major >= ON_BOUND * field.largest_pix)
    if large.size:
        size = FWHM_PER_SIGMA * fits.sigma_major
        poor = np.where(fits.chi2_red > POOR_CHI2, size, 0.0)
        places = KDTree(_positions(fits))
        for index in large:
            near = np.array(
                places.query_ball_point(_positions(fits)[index], size[index] + max(poor))
            )
            away = np.hypot(fits.x[near] - fits.x[index], fits.y[near] - fits.y[index])
            near = near[away <= size[index] + poor[near]]
            out[index] = fits.peak[near].max() > fits.peak[index]
    return out


def find_peaks(
    field: Field, noise: Noise, waves: Waves, threshold: float, least_depth: float | None = None
) -> Peaks:
    """Peaks of the matched filter of the beam above a threshold, brightest first.

    They are deeper inside the map than `least_depth` pixels, if not given than the smallest source
    is large.
    """
    if least_depth is None:
        least_depth = max(field.config.photometry.aper_inf * field.fwhm_pix, 1.0)
    snr, error = waves.matched(noise.spectrum, field.beam)
    snr = np.where(field.valid, snr, _BLANK)
    wide = np.pad(snr, 1, constant_values=_BLANK)
    y, x = np.nonzero((snr > threshold) & (field.depth > least_depth))
    around = [wide[y + row, x + column] for row in range(3) for column in range(3)]
    is_top = snr[y, x] == np.max(around, axis=0)
    y, x = y[is_top], x[is_top]
    order = np.argsort(-snr[y, x], kind="stable")
    y, x = y[order], x[order]
    height = snr[y, x]
    return Peaks(
        x + _vertex(wide[y + 1, x], height, wide[y + 1, x + 2]),
        y + _vertex(wide[y, x + 1], height, wide[y + 2, x + 1]),
        height,
        height * error * noise.scale[y, x],
    )


def _without_faint(field: Field, peaks: Peaks) -> Peaks:
    """Peaks, brightest first, without those that are faint for their surroundings.

    The first look at the noise has sources in it, of which whitening makes rings round bright ones.
    What else is there is found when these have been fitted.
    """
    places = KDTree(np.column_stack([peaks.x, peaks.y]))
    brighter, fainter = places.query_pairs(_RING_FWHM * field.fwhm_pix, output_type="ndarray").T
    faint = peaks.snr[fainter] < _RING * peaks.snr[brighter]
    return peaks.take(~np.isin(np.arange(len(peaks.x)), fainter[faint]))


def _vertex(
    before: NDArray[np.float64], at: NDArray[np.float64], after: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where the parabola through three equidistant values has its top, from the middle one.

    That is in the middle if one of the others is blank.
    """
    bend = before - 2 * at + after
    known = (bend < 0) & (np.minimum(before, after) > _BLANK)
    shift = np.divide(before - after, 2 * bend, out=np.zeros_like(at), where=known)
    return np.clip(shift, -0.5, 0.5)


def _isolated(
    field: Field, noise: Noise, white: NDArray[np.float64], peaks: Peaks, fits: SourceFits
) -> SourceFits:
    """Sources at those peaks above the threshold that are at no source yet.

    What is as large as a source may be is what bright sources or the background have left.
    """
    threshold = field.config.detection.sigma_thres
    bright = peaks.take(peaks.snr > threshold)
    if len(fits.x):
        distance = KDTree(_positions(fits)).query(np.column_stack([bright.x, bright.y]))[0]
        bright = bright.take(distance >= NEAR_FWHM * field.fwhm_pix)
        bright = bright.take(_stand_out(field, fits, bright))
    new = fit_new(field, noise, white, _as_sources(field, bright))
    is_source = _is_significant(field, new, threshold) & ~_is_halo(field, new)
    is_source &= new.sigma_major < ON_BOUND * field.largest_pix
    for x, y, snr in zip(*(column[~is_source] for column in bright[:3]), strict=True):
        logger.debug(
            "no source of %.1f sigma or more at the peak of %.1f at (%.1f, %.1f)",
            threshold,
            snr,
            x,
            y,
        )
    return new.take(np.flatnonzero(is_source))


def _stand_out(field: Field, fits: SourceFits, peaks: Peaks) -> NDArray[np.bool_]:
    """Whether peaks (n,) are brighter than what sources near them may leave.

    A source may leave its share within its major FWHM and one of the beam's.
    """
    count = min(_NEIGHBOURS, len(fits.x))
    distance, index = KDTree(_positions(fits)).query(
        np.column_stack([peaks.x, peaks.y]), k=np.arange(1, count + 1)
    )
    reach = _reach(field, fits)
    left = MISMATCH * fits.peak
    return np.asarray(
        np.all((distance > reach[index]) | (peaks.peak[:, None] > left[index]), axis=1)
    )


def _positions(fits: SourceFits) -> NDArray[np.float64]:
    return np.column_stack([fits.x, fits.y])


def _as_sources(field: Field, peaks: Peaks) -> SourceFits:
    """Peaks as round sources, to start from."""
    size = np.full(len(peaks.x), _START_SIZE * field.sigma_pix)
    return SourceFits.guess(
        np.column_stack([peaks.peak, peaks.x, peaks.y, size, size, np.zeros(len(size))])
    )
