"""Which sources are fitted together, and in which window of the map.

Linked groups are cut into blocks that the engine takes in one go (almost always a group is one
block), and each block gets a square window whose side is one of a few sizes, so that few different
fits have to be compiled.
"""

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

SLOTS = (1, 3, 8, 16)
"""Numbers of sources that blocks are padded to; a larger group is cut into blocks."""

SIDES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Sides that windows are enlarged to, pixels."""

_CHUNK = 64  # blocks whose sources are drawn at a time
_CLUSTERED = 200  # largest group whose clusters are looked for; that takes n^2 distances
_COMPILATION = 2e6
"""Cost of compiling one more kind of fit, in units of pixels times rows of products of a fit."""


class Windows(NamedTuple):
    """Square windows of blocks of sources: arrays with one entry per block.

    Attributes
    ----------
    members
        Indices of the block's sources.
    x0, y0
        Pixel of the map at the window's first corner; may lie outside the map.
    side
        Side in pixels.
    slots
        Number of sources that the block is padded to.
    margin
        Pixels further than this from every one of the block's sources are not fitted.
    """

    members: list[NDArray[np.int_]]
    x0: NDArray[np.int_]
    y0: NDArray[np.int_]
    side: NDArray[np.int_]
    slots: NDArray[np.int_]
    margin: float


def pairs_closer(
    x: NDArray[np.float64], y: NDArray[np.float64], reach: float | NDArray[np.float64]
) -> NDArray[np.int_]:
    """Pairs (k, 2) of sources closer than the sum of their reaches: one of all, or each its own.

    Those whose position or reach is not known (NaN) are in none.
    """
    own = np.broadcast_to(reach, len(x))
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(own))
    if known.size == 0:
        return np.zeros((0, 2), int)
    places = np.column_stack([x, y])
    tree = KDTree(places[known])
    pairs = known[tree.query_pairs(2 * own[known].max(), output_type="ndarray").reshape(-1, 2)]
    first, second = pairs.T
    away = np.linalg.norm(places[first] - places[second], axis=1)
    return np.asarray(pairs[away <= own[first] + own[second]])


def link(count: int, pairs: NDArray[np.int_]) -> NDArray[np.int_]:
    """Label the groups of `count` sources, those that `pairs` (k, 2) join, numbered from 0."""
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(links, directed=False)[1].astype(int)


def blocks(
    labels: NDArray[np.int_], x: NDArray[np.float64], y: NDArray[np.float64]
) -> list[NDArray[np.int_]]:
    """Members of each block: the groups, those too large for the engine cut in two while they are.

    A cut goes through the widest gap between clusters (average linkage). What it separates is
    fitted jointly all the same if the blocks are fitted in `turns`.
    """
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(labels) else []
    return [block for group in groups for block in _cut(group, x, y)]


def turns(members: list[NDArray[np.int_]], pairs: NDArray[np.int_]) -> NDArray[np.int_]:
    """When each block is fitted, from 0: not with one that has the other source of one of `pairs`.

    So what goes back and forth between blocks converges (a Gauss-Seidel iteration), which it would
    not where all are fitted at the same time and their sources overlap by much.
    """
    block = np.zeros(sum(len(own) for own in members), int)
    for index, own in enumerate(members):
        block[own] = index
    earlier: list[list[int]] = [[] for _ in members]
    for first, second in np.unique(np.sort(block[pairs], axis=1), axis=0).tolist():
        if first != second:
            earlier[second].append(first)
    turn: list[int] = []
    for others in earlier:
        taken = {turn[other] for other in others}
        turn.append(next(free for free in itertools.count() if free not in taken))
    return np.array(turn, int)


def neighbourhoods(
    x: NDArray[np.float64], y: NDArray[np.float64], distance: float, most: int
) -> tuple[list[NDArray[np.int_]], NDArray[np.int_]]:
    """Each source with those that are closer to it than `distance`, the nearest if there are many.

    Returns
    -------
    members
        Sources of each neighbourhood, at most `most` and in ascending order; no two are the same.
    own
        (n,) which of them is that of each source.
    """
    n = len(x)
    if n == 0:
        return [], np.zeros(0, int)
    places = np.column_stack([x, y])
    _, near = KDTree(places).query(places, k=np.arange(1, most + 1), distance_upper_bound=distance)
    itself = np.arange(n)[:, None]
    near = np.where(near == itself, near[:, :1], near)  # another may be at the same place
    near[:, 0] = np.arange(n)
    rows, own = np.unique(np.sort(near, axis=1), axis=0, return_inverse=True)
    return [np.unique(row[row < n]) for row in rows], own.reshape(n)


def _cut(
    members: NDArray[np.int_], x: NDArray[np.float64], y: NDArray[np.float64]
) -> list[NDArray[np.int_]]:
    if len(members) <= SLOTS[-1]:
        return [members]
    if len(members) > _CLUSTERED:
        along = max((x[members], y[members]), key=np.ptp)
        ranked = members[np.argsort(along, kind="stable")]
        half_way = len(ranked) // 2
        return _cut(ranked[:half_way], x, y) + _cut(ranked[half_way:], x, y)
    from scipy.cluster.hierarchy import fcluster, linkage  # only for large groups

    tree = linkage(np.column_stack([x[members], y[members]]), "average")
    half = fcluster(tree, 2, "maxclust")
    return _cut(members[half == 1], x, y) + _cut(members[half == 2], x, y)


def windows(
    members: list[NDArray[np.int_]],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    margin: float,
    least: int = SIDES[0],
    kinds: tuple[int, ...] = SLOTS,
) -> Windows:
    """Put a window round each block, at least `margin` pixels beyond its outermost sources.

    No window is smaller than `least` pixels; blocks are padded to one of the `kinds` of slots.
    """
    low, high = _corners(members, np.column_stack([x, y]))
    needed = np.ceil(np.max(high - low, axis=1) + 2 * margin + 1).astype(int)
    needed = np.maximum(needed, least)
    side = _enlarged(needed)
    side, slots = _without_rare_kinds(side, _slots(members, kinds))
    corner = np.rint((low + high) / 2 - (side[:, None] - 1) / 2).astype(int)
    return Windows(members, corner[:, 0], corner[:, 1], side, slots, margin)


def _corners(
    members: list[NDArray[np.int_]], places: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper corners (block, 2) of the places (n, 2) of each block's members."""
    if not members:
        return np.zeros((0, 2)), np.zeros((0, 2))
    count = np.array([len(own) for own in members])
    first, own = np.cumsum(count) - count, places[np.concatenate(members)]
    return np.minimum.reduceat(own, first), np.maximum.reduceat(own, first)


def buckets(
    placed: Windows, among: NDArray[np.bool_] | None = None
) -> dict[tuple[int, int], NDArray[np.int_]]:
    """Indices of the blocks (all, or some) that share their window's side and number of slots."""
    use = np.ones(len(placed.side), bool) if among is None else among
    keys = sorted(set(zip(placed.side[use].tolist(), placed.slots[use].tolist(), strict=True)))
    return {
        (side, count): np.flatnonzero(use & (placed.side == side) & (placed.slots == count))
        for side, count in keys
    }


class Members(NamedTuple):
    """Sources of some blocks, one entry each: the block's row among them, its slot, the source."""

    row: NDArray[np.int_]
    slot: NDArray[np.int_]
    source: NDArray[np.int_]


def members_of(placed: Windows, which: NDArray[np.int_]) -> Members:
    """All sources of some blocks."""
    members = [placed.members[block] for block in which]
    count = np.array([len(m) for m in members], int)
    slot = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    source = np.concatenate(members) if members else np.zeros(0, int)
    return Members(np.repeat(np.arange(len(which)), count), slot, source)


def in_chunks(which: NDArray[np.int_]) -> list[slice]:
    """Places of some blocks in chunks, so that the stamps of all sources are never in memory."""
    return [slice(first, first + _CHUNK) for first in range(0, len(which), _CHUNK)]


def pixel_offsets(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    x0: NDArray[np.int_],
    y0: NDArray[np.int_],
    side: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Offsets of pixels from k positions, each on the window whose first pixel is (x0, y0).

    Those of the columns are (k, 1, side), those of the rows (k, side, 1).
    """
    grid = np.arange(side)
    dx, dy = grid + (x0 - x)[:, None], grid + (y0 - y)[:, None]
    return dx[:, None, :], dy[:, :, None]


def own_offsets(
    placed: Windows, which: NDArray[np.int_], x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int_]]:
    """`pixel_offsets` from the k sources of some blocks, and where each block begins among them."""
    own, side = members_of(placed, which), int(placed.side[which[0]])
    corner = placed.x0[which[own.row]], placed.y0[which[own.row]]
    dx, dy = pixel_offsets(x[own.source], y[own.source], *corner, side)
    return dx, dy, np.flatnonzero(own.slot == 0)


def block_of(placed: Windows) -> NDArray[np.int_]:
    """The block (n,) of each source."""
    every = members_of(placed, np.arange(len(placed.members)))
    return every.row[np.argsort(every.source)]


def _enlarged(needed: NDArray[np.int_]) -> NDArray[np.int_]:
    """The next of the `SIDES`, beyond the largest of them the next multiple of it."""
    largest = SIDES[-1]
    listed = np.array(SIDES)[np.searchsorted(SIDES, np.minimum(needed, largest))]
    return np.where(needed > largest, -(-needed // largest) * largest, listed)


def _slots(members: list[NDArray[np.int_]], kinds: tuple[int, ...]) -> NDArray[np.int_]:
    """The number of sources that each block is padded to."""
    return np.array(kinds)[np.searchsorted(kinds, [len(m) for m in members])]


def _without_rare_kinds(
    side: NDArray[np.int_], slots: NDArray[np.int_]
) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Put what few blocks have with a larger kind of window and slots, if there is one.

    Only where the larger fits cost less than a compilation.
    """
    side, slots = side.copy(), slots.copy()
    for kind in sorted(set(zip(slots.tolist(), side.tolist(), strict=True))):
        same = (slots == kind[0]) & (side == kind[1])
        larger = np.flatnonzero((slots >= kind[0]) & (side >= kind[1]) & ~same)
        if larger.size:
            cost = _cost(side[larger], slots[larger])
            best = larger[np.argmin(cost)]
            if same.sum() * cost.min() < _COMPILATION:
                slots[same], side[same] = slots[best], side[best]
    return side, slots


def _cost(side: NDArray[np.int_], slots: NDArray[np.int_]) -> NDArray[np.int_]:
    """Pixels times rows (products of sources with each other, the weights and the residual)."""
    return side**2 * (slots * (slots + 1) // 2 + 2 * slots + 1)


def cut_out(
    image: NDArray[np.float64], placed: Windows, which: NDArray[np.int_], fill: float = np.nan
) -> NDArray[np.float64]:
    """Cutouts (block, side, side) of blocks of one bucket; `fill` outside the image."""
    side = int(placed.side[which[0]])
    ny, nx = image.shape
    out = np.full((len(which), side, side), fill)
    for cutout, x0, y0 in zip(out, placed.x0[which], placed.y0[which], strict=True):
        here, there = overlap(int(x0), int(y0), side, (ny, nx))
        cutout[here] = image[there]
    return out


def overlap(
    x0: int, y0: int, side: int, shape: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Slices of a window, and of the image, for their common pixels."""
    ny, nx = shape
    top, left = max(y0, 0), max(x0, 0)
    bottom, right = max(min(y0 + side, ny), top), max(min(x0 + side, nx), left)
    return (
        (slice(top - y0, bottom - y0), slice(left - x0, right - x0)),
        (slice(top, bottom), slice(left, right)),
    )


def within_reach(
    placed: Windows,
    which: NDArray[np.int_],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    reach: float,
) -> NDArray[np.bool_]:
    """Pixels (block, side, side) within `reach` of one of the block's own sources."""
    side = int(placed.side[which[0]])
    out = np.zeros((len(which), side, side), bool)
    for some in in_chunks(which):
        dx, dy, first = own_offsets(placed, which[some], x, y)
        near = dx**2 + dy**2 <= reach**2
        out[some] = np.logical_or.reduceat(near, first)
    return out
