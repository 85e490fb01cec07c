"""Polynomial backgrounds: fitted on their own round the masked sources, and put together to a map.

A background belongs to a block of sources and is a polynomial over the scaled coordinates of the
block's window (`hyperjax.models.Grid`): the centre of the window is 0, its edge 1.
"""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from astropy.stats import mad_std
from numpy.typing import NDArray

from hyperjax.config import Config
from hyperjax.fitting import FitOptions, GroupBatch, fit_groups
from hyperjax.groups import (
    Windows,
    block_of,
    buckets,
    cut_out,
    in_chunks,
    overlap,
    own_offsets,
    windows,
    within_reach,
)
from hyperjax.sources import SourceFits, source_mask
from hyperjax.theilsen import theil_sen

logger = logging.getLogger(__name__)

MAX_ORDER = 4
_LEAST_COMMON = 2.0  # margin of the common pixels, beam FWHM: beyond the mask of the source
_CLIP_ROUNDS = 3
_CLIP_SIGMA = 3.0
_TAPER = 0.75  # of the margin, from where a background fades: beyond the largest aperture


def powers(order: int) -> NDArray[np.int_]:
    """Exponents (monomial, 2) of x and y, in the order of `hyperjax.models.monomials`."""
    return np.array([(total - b, b) for total in range(order + 1) for b in range(total + 1)], int)


def evaluate(
    coefficients: NDArray[np.float64],
    x: NDArray[Any],
    y: NDArray[Any],
    centre: tuple[float, float],
    half: float,
) -> NDArray[np.float64]:
    """A polynomial of `coefficients` at pixel positions, with its `centre` and scale `half`."""
    u, v = (np.asarray(x) - centre[0]) / half, (np.asarray(y) - centre[1]) / half
    order = int((np.sqrt(8 * len(coefficients) + 1) - 3) / 2)
    table = np.zeros((order + 1, order + 1))
    table[tuple(powers(order).T)] = coefficients
    along_x = [np.polynomial.polynomial.polyval(v, row) for row in table]
    return np.asarray(np.polynomial.polynomial.polyval(u, along_x, tensor=False), float)


class Backgrounds(NamedTuple):
    """Backgrounds of all blocks, in the coordinates of their windows (`Windows`).

    `coefficients` (block, monomial), and the `orders` (block,), -1 where there is none.
    """

    coefficients: NDArray[np.float64]
    orders: NDArray[np.int_]

    @classmethod
    def empty(cls, count: int) -> "Backgrounds":
        """No background for any of `count` blocks."""
        return cls(np.zeros((count, len(powers(MAX_ORDER)))), np.full(count, -1))

    def at(
        self, placed: Windows, block: int, x: NDArray[Any], y: NDArray[Any]
    ) -> NDArray[np.float64]:
        """The background of a block at pixel positions of the map."""
        return evaluate(self.coefficients[block], x, y, *_frame(placed, block))

    @staticmethod
    def terms(side: int) -> NDArray[np.float64]:
        """The monomials (monomial, side, side) on a window."""
        coordinate = (np.arange(side) + 0.5) / (side / 2) - 1
        return np.stack([np.outer(coordinate**b, coordinate**a) for a, b in powers(MAX_ORDER)])

    def images(self, placed: Windows, which: NDArray[np.int_]) -> NDArray[np.float64]:
        """Backgrounds (block, side, side) on the windows of blocks of one bucket."""
        terms = self.terms(int(placed.side[which[0]]))
        return np.tensordot(self.coefficients[which], terms, 1)


def level_at(
    placed: Windows, backgrounds: Backgrounds, x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The background (n,) under each source, from that of its block."""
    if len(x) == 0:
        return np.zeros(0)
    block = block_of(placed)
    half = placed.side[block] / 2
    u = (x - placed.x0[block] + 0.5) / half - 1
    v = (y - placed.y0[block] + 0.5) / half - 1
    terms = [u**a * v**b for a, b in powers(MAX_ORDER)]
    return np.asarray(np.sum(backgrounds.coefficients[block].T * terms, axis=0))


def mosaic(
    placed: Windows,
    backgrounds: Backgrounds,
    fits: SourceFits,
    smooth: NDArray[np.float64],
) -> NDArray[np.float64]:
    """One background image from those of all blocks.

    A pixel has the background of the block whose source is nearest, which fades into the `smooth`
    background of the whole map (ny, nx) from three quarters of the window's margin to all of it.
    """
    out = smooth.copy()
    nearest = np.full(smooth.shape, np.inf)
    for which in buckets(placed).values():
        distance = _distances(placed, which, fits)
        fade = np.clip((1 - distance / placed.margin) / (1 - _TAPER), 0, 1)
        images = backgrounds.images(placed, which)
        for row, block in enumerate(which):
            corner = int(placed.x0[block]), int(placed.y0[block])
            here, there = overlap(*corner, images.shape[1], smooth.shape)
            mine = distance[row][here] < nearest[there]
            faded = fade[row][here] * (images[row][here] - smooth[there])
            out[there] = np.where(mine, smooth[there] + faded, out[there])
            nearest[there] = np.where(mine, distance[row][here], nearest[there])
    return out


def _distances(placed: Windows, which: NDArray[np.int_], fits: SourceFits) -> NDArray[np.float64]:
    """Distance of the pixels (block, side, side) from the nearest of their block's sources."""
    side = int(placed.side[which[0]])
    out = np.empty((len(which), side, side))
    for some in in_chunks(which):
        dx, dy, first = own_offsets(placed, which[some], fits.x, fits.y)
        out[some] = np.minimum.reduceat(np.hypot(dx, dy), first)
    return out


def separate_backgrounds(
    data: NDArray[np.float64],
    rms: NDArray[np.float64],
    placed: Windows,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    fwhm_pix: float,
    config: Config,
) -> Backgrounds:
    """Fit a polynomial to the surroundings of every block, with all sources masked.

    Every margin from `fix_min_box` to `fix_max_box` (in steps of one beam FWHM; 0 takes the whole
    map), every one of `pol_orders_separate` and every one of `bg_fitters` is a candidate. The best
    by `min_method` is kept, on the pixels of the smallest box, which are common to all, without
    those that stand out of the candidate of the highest order in the largest box.
    """
    options, method = config.background, config.fit_options.min_method
    image = np.where(source_mask(data.shape, x, y, fwhm_pix), np.nan, data)
    margins = _margins(options.fix_min_box, options.fix_max_box)
    boxes = windows(placed.members, x, y, max(*margins, 1.0) * fwhm_pix)
    common = boxes._replace(margin=max(options.fix_min_box, _LEAST_COMMON) * fwhm_pix)
    best, score = Backgrounds.empty(len(placed.members)), np.full(len(placed.members), np.inf)
    best.coefficients[:, 0] = np.nanmedian(image)  # where no box has a pixel
    if len(score) == 0:
        return best
    chosen: list[_Candidate | None] = [None] * len(score)

    def fitted(candidate: _Candidate) -> Backgrounds:
        margin, order, fitter = candidate
        if margin == 0:
            return _of_whole_map(image, rms, placed, order, fitter)
        box = boxes._replace(margin=margin * fwhm_pix)
        return _of_boxes(image, rms, box, placed, x, y, order, fitter)

    candidates = [
        _Candidate(margin, order, fitter)
        for margin in margins
        for order in options.pol_orders_separate
        for fitter in _fitters(config)
    ]
    reference = fitted(max(candidates))
    for candidate in candidates:
        found = fitted(candidate)
        value = _score(image, rms, placed, found, reference, common, x, y, method)
        better = value < score
        score[better] = value[better]
        best.coefficients[better] = found.coefficients[better]
        best.orders[better] = candidate.order
        chosen = [candidate if now else before for before, now in zip(chosen, better, strict=True)]
    if config.fit_options.verbose:
        _report(placed, x, y, chosen, score, method)
    return best


class _Fitter(NamedTuple):
    """A way to fit a polynomial: least_squares, huber with an epsilon, or theilsen."""

    name: str = "least_squares"
    epsilon: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} {self.epsilon:g}" if self.epsilon else self.name


class _Candidate(NamedTuple):
    """A background to try: the box's margin in beam FWHM, the order, and the way to fit."""

    margin: float
    order: int
    fitter: _Fitter


def _fitters(config: Config) -> list[_Fitter]:
    """What `bg_fitters` and `huber_epsilons` ask for."""
    options = config.fit_options
    return [
        fitter
        for name in options.bg_fitters
        for fitter in (
            [_Fitter(name, epsilon) for epsilon in options.huber_epsilons]
            if name == "huber"
            else [_Fitter(name)]
        )
    ]


def _report(
    placed: Windows,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    chosen: Iterable[_Candidate | None],
    score: NDArray[np.float64],
    method: str,
) -> None:
    """Log which background each block got."""
    for members, candidate, value in zip(placed.members, chosen, score, strict=True):
        where = f"round ({x[members].mean():.1f}, {y[members].mean():.1f})"
        if candidate is None:
            logger.info("background %s: the level of the map, as no box has a pixel", where)
            continue
        box = f"box {candidate.margin:g} FWHM" if candidate.margin else "whole map"
        parts = where, box, candidate.order, candidate.fitter, method, value
        logger.info("background %s: %s, order %d, %s, %s %.4g", *parts)


def _frame(placed: Windows, block: int) -> tuple[tuple[float, float], float]:
    """Centre and scale of the coordinates of a block's window, in pixels of the map."""
    middle = (float(placed.side[block]) - 1) / 2
    centre = (float(placed.x0[block]) + middle, float(placed.y0[block]) + middle)
    return centre, float(placed.side[block]) / 2


def _margins(smallest: float, largest: float) -> list[float]:
    """Margins to try, in beam FWHM."""
    if smallest == 0:
        return [0.0]
    margins = [smallest + step for step in range(int(largest - smallest) + 1)]
    return margins if margins[-1] == largest else [*margins, largest]


def _of_boxes(
    image: NDArray[np.float64],
    rms: NDArray[np.float64],
    boxes: Windows,
    placed: Windows,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    order: int,
    fitter: _Fitter,
) -> Backgrounds:
    """The polynomial of each block's box."""
    fitted = Backgrounds.empty(len(boxes.members))
    fitted.orders[:] = order
    for which in buckets(boxes).values():
        pixels, noise = cut_out(image, boxes, which), cut_out(rms, boxes, which)
        pixels[~within_reach(boxes, which, x, y, boxes.margin)] = np.nan
        fits = _polynomials(pixels, noise, order, fitter)
        for block, coefficients in zip(which, fits, strict=True):
            moved = _moved(coefficients, _frame(boxes, block), _frame(placed, block))
            fitted.coefficients[block, : len(moved)] = moved
    return fitted


def _of_whole_map(
    image: NDArray[np.float64],
    rms: NDArray[np.float64],
    placed: Windows,
    order: int,
    fitter: _Fitter,
) -> Backgrounds:
    """The polynomial of the whole map, for every block."""
    ny, nx = image.shape
    frame = (((nx - 1) / 2, (ny - 1) / 2), max(nx, ny) / 2)
    coefficients = _polynomials(image[None], rms[None], order, fitter)[0]
    fitted = Backgrounds.empty(len(placed.members))
    fitted.orders[:] = order
    for block in range(len(placed.members)):
        moved = _moved(coefficients, frame, _frame(placed, block))
        fitted.coefficients[block, : len(moved)] = moved
    return fitted


def _polynomials(
    pixels: NDArray[np.float64], noise: NDArray[np.float64], order: int, fitter: _Fitter
) -> NDArray[np.float64]:
    """Sigma-clipped polynomial fits: coefficients (box, monomial) of boxes (box, ny, nx).

    The scatter of the residuals is measured anew in each round: it is the unit of the clipping and
    of huber's epsilon.
    """
    count, ny, nx = pixels.shape
    valid = np.isfinite(pixels) & np.isfinite(noise) & (noise > 0)
    data, inverse_noise = np.nan_to_num(pixels), 1 / np.where(valid, noise, 1.0)
    half, centre = max(ny, nx) / 2, ((nx - 1) / 2, (ny - 1) / 2)
    grid_x, grid_y = np.arange(nx)[None, :], np.arange(ny)[:, None]
    usable, spread = valid.copy(), np.ones(count)
    for row in np.flatnonzero(valid.any(axis=(1, 2))):
        spread[row] = mad_std((data[row] * inverse_noise[row])[valid[row]]) or 1.0
    for _ in range(_CLIP_ROUNDS):
        weight = np.where(usable, (inverse_noise / spread[:, None, None]) ** 2, 0.0)
        coefficients = _fit(data, weight, order, fitter)
        coefficients[~valid.any(axis=(1, 2))] = np.nan
        for box, terms in enumerate(coefficients):
            model = evaluate(terms, grid_x, grid_y, centre, half)
            residual = (data[box] - model) * inverse_noise[box]
            if valid[box].any():
                middle, scatter = np.median(residual[valid[box]]), mad_std(residual[valid[box]])
                usable[box] = valid[box] & (np.abs(residual - middle) <= _CLIP_SIGMA * scatter)
                spread[box] = scatter or 1.0
    return coefficients


def _fit(
    data: NDArray[np.float64], weight: NDArray[np.float64], order: int, fitter: _Fitter
) -> NDArray[np.float64]:
    """Polynomials (box, monomial) of boxes (box, ny, nx), weighed in units of their scatter."""
    terms = len(powers(order))
    if fitter.name == "theilsen":
        return np.stack([_theil_sen(*box, order) for box in zip(data, weight > 0, strict=True)])
    count = len(data)
    nothing = np.zeros((count, 1, 6))
    batch = GroupBatch(
        data=data,
        weight=weight,
        start=nothing,
        lower=nothing,
        upper=nothing,
        free=nothing != 0,
        present=np.zeros((count, 1), bool),
        order=np.full(count, order),
    )
    huber = FitOptions(loss="huber", f_scale=fitter.epsilon)
    options = huber if fitter.name == "huber" else FitOptions()
    return np.asarray(fit_groups(batch, options).coefficients[:, :terms])


def _theil_sen(
    data: NDArray[np.float64], usable: NDArray[np.bool_], order: int
) -> NDArray[np.float64]:
    """The polynomial (monomial,) of one box."""
    half = max(data.shape) / 2
    rows, columns = np.nonzero(usable)
    y, x = ((rows + 0.5 - data.shape[0] / 2) / half, (columns + 0.5 - data.shape[1] / 2) / half)
    return theil_sen(np.stack([x**a * y**b for a, b in powers(order)], axis=-1), data[usable])


def _moved(
    coefficients: NDArray[np.float64],
    old: tuple[tuple[float, float], float],
    new: tuple[tuple[float, float], float],
) -> NDArray[np.float64]:
    """The same polynomial in the coordinates of another frame (centre, scale)."""
    (centre, half), order = new, int((np.sqrt(8 * len(coefficients) + 1) - 3) / 2)
    grid = half * np.linspace(-1, 1, order + 2)
    x, y = (axis.ravel() for axis in np.meshgrid(centre[0] + grid, centre[1] + grid))
    u, v = (x - centre[0]) / half, (y - centre[1]) / half
    basis = np.column_stack([u**a * v**b for a, b in powers(order)])
    return np.asarray(np.linalg.lstsq(basis, evaluate(coefficients, x, y, *old), rcond=None)[0])


def _score(
    image: NDArray[np.float64],
    rms: NDArray[np.float64],
    placed: Windows,
    fitted: Backgrounds,
    reference: Backgrounds,
    common: Windows,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    method: str,
) -> NDArray[np.float64]:
    """nmse, reduced chi^2 or BIC of each block's polynomial on the pixels common to all boxes.

    Those that stand out of the `reference` count for none.
    """
    score = np.full(len(placed.members), np.inf)
    terms = len(powers(int(fitted.orders.max())))
    for which in buckets(common).values():
        pixels, noise = cut_out(image, common, which), cut_out(rms, common, which)
        inside = within_reach(common, which, x, y, common.margin)
        grid = np.arange(pixels.shape[1])
        for row, block in enumerate(which):
            use = inside[row] & np.isfinite(pixels[row]) & (noise[row] > 0)
            columns, rows = grid[None, :] + common.x0[block], grid[:, None] + common.y0[block]
            rest = (pixels[row] - reference.at(placed, int(block), columns, rows)) / noise[row]
            use &= _is_within(rest, use)
            model = fitted.at(placed, int(block), columns, rows)
            residual = ((pixels[row] - model) / noise[row])[use]
            score[block] = goodness(residual, (pixels[row] / noise[row])[use], terms, method)
    return score


def _is_within(residual: NDArray[np.float64], use: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels that do not stand out of those in use; all of them where nothing is known of these."""
    values = residual[use & np.isfinite(residual)]
    scatter = mad_std(values) if values.size else 0.0
    if not scatter > 0:
        return np.ones(residual.shape, bool)
    return np.abs(residual - np.median(values)) <= _CLIP_SIGMA * scatter


def goodness(
    residual: NDArray[np.float64], data: NDArray[np.float64], terms: int, method: str
) -> float:
    """Return one number, lower for the better fit of `terms` coefficients to some pixels.

    Parameters
    ----------
    residual, data
        (n,) of the pixels, in one unit.
    terms
        Number of coefficients.
    method
        "nmse" (squares of the residuals over those of the data about their mean), "redchi" or
        "bic". For the same pixels their order does not depend on the unit.
    """
    n, chi2 = len(residual), float(np.sum(residual**2))
    if n <= terms:
        return np.inf
    if method == "nmse":
        return chi2 / max(float(np.sum((data - data.mean()) ** 2)), np.finfo(float).tiny)
    if method == "redchi":
        return chi2 / (n - terms)
    return n * np.log(max(chi2, np.finfo(float).tiny) / n) + terms * np.log(n)
