"""Where the compact sources of a map are.

The steps are HYPER's (Traficante et al. 2015, MNRAS 451, 3089): a high-pass filter takes away what
is larger than a source, DAOStarFinder finds peaks in what is left, and peaks are dropped that lie
at an edge, next to a brighter one, or below the threshold. Unlike HYPER's, peaks are measured
and the noise is taken on the filtered map: on a structured background the value of the map itself
says little about a compact source.
"""

import logging
import warnings
from typing import NamedTuple

import numpy as np
from astropy.stats import sigma_clipped_stats
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from hyperjax.config import Detection
from hyperjax.errors import MapTooSmallError

logger = logging.getLogger(__name__)

_FINDER_SIGMA = 2.0  # of the filtered map: low, since the threshold proper comes last
_FILTER_PEAK = 100.0
_LEAST_FILTER_FWHM = 4.0  # side of the high-pass filter: below it takes away the source itself
_MOST_FILTER_FWHM = 10.0


class Detections(NamedTuple):
    """Peaks, brightest first: arrays (n,).

    Attributes
    ----------
    x, y
        0-based pixel position.
    peak
        Value of the filtered map at the peak, in the map's unit.
    snr
        `peak` over the scatter that it had to stand out of.
    rms
        Noise of a pixel at the peak, in the map's unit.
    shoulder_score
        Asymmetry of the ring round the peak over the peak: near 0 for an isolated source, near 1
        on the flank of a brighter one.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    peak: NDArray[np.float64]
    snr: NDArray[np.float64]
    rms: NDArray[np.float64]
    shoulder_score: NDArray[np.float64]


def detect(
    filtered: NDArray[np.float64],
    rms: float,
    fwhm_pix: float,
    options: Detection,
    *,
    edge_pix: float,
    separation_pix: float,
    source: str = "map",
) -> Detections:
    """Find the compact sources of a map.

    Parameters
    ----------
    filtered
        The map after `high_pass`, NaN where blank.
    rms
        Scatter of the filtered map, which the threshold is a multiple of.
    fwhm_pix
        FWHM of the beam in pixels.
    options
        The configuration's section `detection`.
    edge_pix
        Peaks closer than this to the image's edge or to a blank pixel are dropped.
    separation_pix
        Of two peaks closer than this the brighter is kept.
    source
        What to call the map in messages.
    """
    x, y = find_peaks(filtered, fwhm_pix, options.roundlim, options.sharplim)
    logger.debug("%s: %d peaks in the filtered map", source, len(x))
    x, y = snap(filtered, x, y, options.snap_radius_pix)
    clear = ndimage.distance_transform_edt(np.pad(np.isfinite(filtered), 1))[1:-1, 1:-1]
    inside = clear[_nearest(y, filtered.shape[0]), _nearest(x, filtered.shape[1])] > edge_pix
    x, y = x[inside], y[inside]
    peak = local_peak(filtered, x, y, options.snap_radius_pix)
    order = np.argsort(-peak, kind="stable")
    order = order[peak[order] >= options.sigma_thres * rms]
    order = order[brightest_within(x[order], y[order], separation_pix)]
    x, y, peak = x[order], y[order], peak[order]
    score = shoulder_score(filtered, x, y, peak, fwhm_pix, options)
    found = Detections(x, y, peak, peak / rms, np.full(len(x), rms), score)
    if options.shoulder_filter:
        keep = score <= options.shoulder_threshold
        logger.info("%s: %d peaks dropped as shoulders", source, np.sum(~keep))
        found = Detections(*(column[keep] for column in found))
    return found


def companions(known: Detections, more: Detections, separation_pix: float) -> Detections:
    """Those of `more` that are not closer than a separation to a known source."""
    if len(known.x) == 0 or len(more.x) == 0:
        return more
    tree = KDTree(np.column_stack([known.x, known.y]))
    new = tree.query(np.column_stack([more.x, more.y]))[0] >= separation_pix
    return Detections(*(column[new] for column in more))


def filter_size(fwhm_pix: float, wanted: int, shape: tuple[int, ...], source: str) -> int:
    """Side of the high-pass filter's box in pixels, odd: `wanted`, or from the beam if that is 0.

    HYPER's side is floor(FWHM)^2 pixels. For beams of less than four pixels that is below the size
    of a source, for wide ones a large part of the map: it is kept between 4 and 10 FWHM, where the
    box takes 7 and 1 % of a point source's peak. A map smaller than that has a box of its own size,
    if that is 4 FWHM at least.

    Raises
    ------
    MapTooSmallError
        If the image is smaller than the filter.
    """
    least, most = least_filter_size(fwhm_pix), _odd(_MOST_FILTER_FWHM * fwhm_pix)
    of_map = min(shape) - 1 + min(shape) % 2
    size = _odd(wanted) if wanted else max(least, min(_odd(int(fwhm_pix) ** 2), most, of_map))
    if size > of_map:
        raise MapTooSmallError(
            f"{source}: the map, {shape[1]} x {shape[0]} pixels, is smaller than the detection "
            f"filter of {size} pixels; set detection.kernel_size_pix in the configuration, or "
            f"check the beam ({fwhm_pix:.3g} pixels FWHM; --beam or survey.beam_fwhm_arcsec)"
        )
    return size


def least_filter_size(fwhm_pix: float) -> int:
    """Side of the smallest box of the high-pass filter in pixels, odd."""
    return _odd(_LEAST_FILTER_FWHM * fwhm_pix)


def _odd(length: float) -> int:
    """The least odd number that is not below a length."""
    return 2 * int(np.ceil((length - 1) / 2)) + 1


def high_pass(data: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The image minus its mean in a square box of `size` pixels; blank pixels count nowhere.

    A plane goes first: where a box is cut off by the edge, its mean is not that of its middle.
    """
    return HighPass(np.isfinite(data), size)(data)


class HighPass:
    """`high_pass` for images with the same `valid` pixels."""

    def __init__(self, valid: NDArray[np.bool_], size: int) -> None:
        self.size = size
        there = valid.astype(float)
        self._there = True if valid.all() else valid  # numpy is slow with masks
        share = self._box(there)
        self._per_share = np.divide(1, share, out=np.full(valid.shape, np.nan), where=valid)
        y, x = self._axes = [np.linspace(-1, 1, length) for length in valid.shape]
        columns, rows = there.sum(0), there.sum(1)
        self._count = one = columns.sum()
        sum_x, sum_y = columns @ x, rows @ y
        products = [
            [one, sum_x, sum_y],
            [sum_x, columns @ x**2, y @ there @ x],
            [sum_y, y @ there @ x, rows @ y**2],
        ]
        self._inverse = np.linalg.pinv(products)

    def __call__(self, data: NDArray[np.float64]) -> NDArray[np.float64]:
        """The filtered image, NaN where it is not valid."""
        y, x = self._axes
        some = np.where(self._there, data, 0.0)
        np.subtract(some, some.sum() / self._count, out=some, where=self._there)
        columns, rows = some.sum(0), some.sum(1)
        constant, along_x, along_y = self._inverse @ [columns.sum(), columns @ x, rows @ y]
        plane = constant + along_x * x + along_y * y[:, None]
        flat = np.subtract(some, plane, out=some, where=self._there)
        return np.asarray(flat - self._box(flat) * self._per_share)

    def _box(self, image: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(ndimage.uniform_filter(image, self.size, mode="constant"))


def find_peaks(
    filtered: NDArray[np.float64],
    fwhm_pix: float,
    roundlim: tuple[float, float],
    sharplim: tuple[float, float],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions (x, y) of the peaks of a high-pass filtered map, by DAOStarFinder."""
    from photutils.detection import DAOStarFinder  # brings astropy's modelling, 0.15 s
    from photutils.utils.exceptions import NoDetectionsWarning

    positive = np.clip(np.nan_to_num(filtered), 0, None)
    top = float(positive.max())
    if not top > 0:
        return np.zeros(0), np.zeros(0)
    positive *= _FILTER_PEAK / top
    scatter = sigma_clipped_stats(positive[np.isfinite(filtered)], sigma=3.0, maxiters=10)[2]
    finder = DAOStarFinder(
        threshold=_FINDER_SIGMA * scatter,
        fwhm=fwhm_pix,
        sharpness_range=sharplim,
        roundness_range=roundlim,
        min_separation=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoDetectionsWarning)
        table = finder.find_stars(positive)
    if table is None:
        return np.zeros(0), np.zeros(0)
    return np.array(table["x_centroid"], float), np.array(table["y_centroid"], float)


def snap(
    data: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move each position to the centroid of the 3 x 3 pixels round the brightest one in reach.

    The weights are the values above the smallest of the nine. A radius of 0 moves none.
    """
    if len(x) == 0 or radius == 0:
        return x, y
    column, row = _brightest_pixel(data, x, y, radius)
    step = np.arange(-1, 2)
    rows = row[:, None, None] + step[None, :, None]
    columns = column[:, None, None] + step[None, None, :]
    values = _at(data, rows, columns)
    lowest = np.min(np.where(np.isfinite(values), values, np.inf), axis=(1, 2), keepdims=True)
    weights = np.where(np.isfinite(values), values - lowest, 0.0)
    total = np.sum(weights, axis=(1, 2))
    flat = total <= 0
    total = np.where(flat, 1.0, total)
    x_new = column + np.sum(weights * step[None, None, :], axis=(1, 2)) / total
    y_new = row + np.sum(weights * step[None, :, None], axis=(1, 2)) / total
    return np.where(flat, column, x_new), np.where(flat, row, y_new)


def local_peak(
    data: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """Value of the brightest pixel within `radius` (and at least the nearest) of each position."""
    if len(x) == 0:
        return np.zeros(0)
    column, row = _brightest_pixel(data, x, y, radius)
    return data[row, column]


def brightest_within(
    x: NDArray[np.float64], y: NDArray[np.float64], separation: float
) -> NDArray[np.int_]:
    """Indices of the peaks that have no kept brighter one closer than `separation`.

    Positions are given brightest first.
    """
    keep = np.ones(len(x), bool)
    if len(x) > 1 and separation > 0:
        pairs = KDTree(np.column_stack([x, y])).query_pairs(separation, output_type="ndarray")
        for bright, faint in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]:
            if keep[bright]:
                keep[faint] = False
    return np.flatnonzero(keep)


def shoulder_score(
    data: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    peak: NDArray[np.float64],
    fwhm_pix: float,
    options: Detection,
) -> NDArray[np.float64]:
    """Asymmetry of the ring round each peak over the peak.

    Opposite points of a ring of radius `shoulder_ring_factor` x FWHM are compared; the score is
    the largest difference over the peak. Points within `shoulder_neighbor_mask` x FWHM of another
    peak, or blank, are left out with their opposites, since a companion is no flank.
    """
    if len(x) == 0:
        return np.zeros(0)
    points = options.shoulder_n_angles
    pairs = points // 2 if points % 2 == 0 else points  # an odd number has no opposite ones
    half_circle = 2 * np.pi * np.arange(pairs) / points
    angles = np.concatenate([half_circle, half_circle + np.pi])
    radius = options.shoulder_ring_factor * fwhm_pix
    ring_x = x[:, None] + radius * np.cos(angles)
    ring_y = y[:, None] + radius * np.sin(angles)
    values = ndimage.map_coordinates(
        np.nan_to_num(data, nan=0.0), [ring_y, ring_x], order=1, mode="nearest"
    )
    usable = np.isfinite(_at(data, np.rint(ring_y).astype(int), np.rint(ring_x).astype(int)))
    usable &= ~_near_others(x, y, ring_x, ring_y, options.shoulder_neighbor_mask * fwhm_pix)
    both = usable[:, :pairs] & usable[:, pairs:]
    difference = np.abs(values[:, :pairs] - values[:, pairs:])
    return np.max(np.where(both, difference, 0.0), axis=1) / peak


def _near_others(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    ring_x: NDArray[np.float64],
    ring_y: NDArray[np.float64],
    radius: float,
) -> NDArray[np.bool_]:
    """Whether a point of a source's ring lies within `radius` of another source."""
    tree = KDTree(np.column_stack([x, y]))
    neighbours = min(3, len(x))  # the source itself and two more
    distance, index = tree.query(np.stack([ring_x, ring_y], -1), k=np.arange(1, neighbours + 1))
    other = index != np.arange(len(x))[:, None, None]
    return np.any(other & (distance < radius), axis=-1)


def _nearest(position: NDArray[np.float64], size: int) -> NDArray[np.int_]:
    """The nearest pixel along an axis, within the image."""
    return np.clip(np.rint(position).astype(int), 0, size - 1)


def _at(
    data: NDArray[np.float64], rows: NDArray[np.int_], columns: NDArray[np.int_]
) -> NDArray[np.float64]:
    """Pixel values, NaN outside the image."""
    ny, nx = data.shape
    inside = (rows >= 0) & (rows < ny) & (columns >= 0) & (columns < nx)
    return np.where(inside, data[np.clip(rows, 0, ny - 1), np.clip(columns, 0, nx - 1)], np.nan)


def _brightest_pixel(
    data: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Column and row of the brightest pixel within `radius` of the nearest one."""
    reach = int(radius)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    near = np.hypot(dx, dy) <= radius
    rows = _nearest(y, data.shape[0])[:, None] + dy[near]
    columns = _nearest(x, data.shape[1])[:, None] + dx[near]
    values = _at(data, rows, columns)
    best = np.argmax(np.where(np.isfinite(values), values, -np.inf), axis=1)
    every = np.arange(len(x))
    return columns[every, best], rows[every, best]
