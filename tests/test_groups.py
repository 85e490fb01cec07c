"""Groups, blocks and windows, against brute force and plain slicing of padded images."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from hyperjax.groups import (
    SIDES,
    SLOTS,
    Windows,
    blocks,
    buckets,
    cut_out,
    link,
    neighbourhoods,
    overlap,
    pairs_closer,
    turns,
    windows,
    within_reach,
)

POSITIONS = st.lists(
    st.tuples(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32)), max_size=25
)


def columns(positions: list[tuple[float, float]]) -> tuple[NDArray, NDArray]:
    """Arrays x and y of some positions."""
    x, y = np.array(positions, float).reshape(-1, 2).T
    return x, y


def scattered(count: int, extent: float, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Random positions in a square."""
    x, y = np.random.default_rng(seed).uniform(0, extent, (2, count))
    return x, y


def transitive_closure(x: NDArray, y: NDArray, distance: float) -> NDArray:
    """Whether two sources are connected (n, n), by powers of the matrix of the close pairs."""
    xy = np.column_stack([x, y])
    connected = cdist(xy, xy) <= distance
    for _ in range(len(x)):
        connected = connected @ connected
    return connected


# --- link ----------------------------------------------------------------------------------------


def linked(x: NDArray, y: NDArray, distance: float) -> NDArray:
    """Groups of sources that are closer than a distance."""
    return link(len(x), pairs_closer(x, y, distance / 2))


@settings(deadline=None)
@given(POSITIONS, st.floats(0.5, 40))
def test_two_sources_share_a_group_where_a_chain_of_close_pairs_connects_them(
    positions: list[tuple[float, float]], distance: float
) -> None:
    x, y = columns(positions)
    group = linked(x, y, distance)
    assert_array_equal(group[:, None] == group, transitive_closure(x, y, distance))


@settings(deadline=None)
@given(POSITIONS)
def test_groups_are_numbered_without_gaps(positions: list[tuple[float, float]]) -> None:
    group = linked(*columns(positions), 8.0)
    assert_array_equal(np.unique(group), np.arange(len(np.unique(group))))


def test_none_and_one_source() -> None:
    assert linked(np.zeros(0), np.zeros(0), 3.0).shape == (0,)
    assert_array_equal(linked(np.array([4.0]), np.array([2.0]), 3.0), [0])


def test_a_chain_is_one_group_and_a_gap_divides_it() -> None:
    x = np.array([0.0, 2.0, 4.0, 6.0, 9.0, 11.0])
    assert_array_equal(linked(x, np.zeros(6), 2.5), [0, 0, 0, 0, 1, 1])


# --- blocks --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(POSITIONS, st.floats(1, 60))
def test_blocks_hold_every_source_once_and_no_more_than_the_engine_takes(
    positions: list[tuple[float, float]], distance: float
) -> None:
    x, y = columns(positions)
    group = linked(x, y, distance)
    members = blocks(group, x, y)
    assert_array_equal(np.sort(np.concatenate([*members, np.zeros(0, int)])), np.arange(len(x)))
    for block in members:
        assert 1 <= len(block) <= SLOTS[-1]
        assert len(np.unique(group[block])) == 1
    for label, size in enumerate(np.bincount(group)):
        if size <= SLOTS[-1]:
            assert sum(label in group[block] for block in members) == 1


@pytest.mark.parametrize("count", [30, 1000])
def test_a_large_group_is_cut_across_its_longer_extent(count: int) -> None:
    x, y = scattered(count, 40.0 * count)
    y /= 1000 * count
    members = blocks(np.zeros(count, int), x, y)
    assert max(len(block) for block in members) <= SLOTS[-1]
    assert_array_equal(np.sort(np.concatenate(members)), np.arange(count))
    reach = sorted((x[block].min(), x[block].max()) for block in members)
    assert all(before[1] < after[0] for before, after in pairwise(reach))


def test_a_large_group_is_cut_at_its_widest_gaps() -> None:
    """Three rows of ten, further from each other than their own sources."""
    x, y = (values.ravel() for values in np.meshgrid(np.arange(10.0), [0.0, 40.0, 80.0]))
    members = blocks(np.zeros(30, int), x, y)
    rows = np.arange(30).reshape(3, 10).tolist()
    assert sorted(sorted(block.tolist()) for block in members) == rows


@pytest.mark.parametrize("seed", range(3))
def test_blocks_whose_sources_are_near_each_other_are_fitted_in_turns(seed: int) -> None:
    """No two of a turn have a pair; and no block could have had an earlier turn."""
    x, y = scattered(300, 300.0, seed)
    reach = np.random.default_rng(seed).uniform(2.0, 12.0, 300)
    members = blocks(linked(x, y, 10.0), x, y)
    turn = turns(members, pairs_closer(x, y, reach))
    assert turn.max() >= 2
    for index, block in enumerate(members):
        others = [
            turn[other]
            for other, their in enumerate(members[:index])
            if (
                np.hypot(x[block, None] - x[their], y[block, None] - y[their])
                <= reach[block, None] + reach[their]
            ).any()
        ]
        assert turn[index] == min(set(range(len(members))) - set(others))


def test_without_pairs_all_blocks_are_fitted_at_once() -> None:
    members = [np.array([0, 2]), np.array([1])]
    assert_array_equal(turns(members, np.array([[0, 2]])), [0, 0])
    assert_array_equal(turns(members, np.zeros((0, 2), int)), [0, 0])
    assert turns([], np.zeros((0, 2), int)).shape == (0,)


def test_pairs_are_closer_than_the_sum_of_their_reaches() -> None:
    x, y = np.array([0.0, 3.0, 10.0]), np.zeros(3)
    assert_array_equal(pairs_closer(x, y, 1.5), [[0, 1]])
    assert_array_equal(np.sort(pairs_closer(x, y, np.array([1.0, 1.9, 6.0])), axis=0), [[1, 2]])
    assert pairs_closer(x[:0], y[:0], 1.5).shape == (0, 2)
    some = pairs_closer(np.append(np.nan, x), np.append(0.0, y), np.append(99.0, 1.5 + 0 * x))
    assert_array_equal(some, [[1, 2]])
    assert pairs_closer(x, y, np.full(len(x), np.nan)).shape == (0, 2)


# --- windows -------------------------------------------------------------------------------------


def placed_at_random(seed: int = 3) -> tuple[Windows, NDArray, NDArray]:
    """Windows round the groups of 300 sources, of one to a dozen each."""
    x, y = scattered(300, 400.0, seed)
    return windows(blocks(linked(x, y, 14.0), x, y), x, y, 10.5), x, y


@pytest.mark.parametrize("seed", range(3))
def test_windows_hold_their_sources_with_the_margin(seed: int) -> None:
    placed, x, y = placed_at_random(seed)
    for members, x0, y0, side in zip(
        placed.members, placed.x0, placed.y0, placed.side, strict=True
    ):
        assert side in SIDES
        for first, position in ((x0, x[members]), (y0, y[members])):
            assert position.min() - placed.margin >= first - 0.5
            assert position.max() + placed.margin <= first + side - 0.5


def test_a_group_wider_than_the_largest_window_gets_a_wider_one() -> None:
    x = np.array([0.0, 2500.0])
    placed = windows([np.array([0, 1])], x, x, 10.0)
    assert placed.side[0] >= 2521
    assert placed.x0[0] <= -10
    assert placed.x0[0] + placed.side[0] > 2510


def test_no_sources_have_no_windows() -> None:
    placed = windows([], np.zeros(0), np.zeros(0), 5.0)
    assert placed.side.shape == placed.x0.shape == placed.y0.shape == (0,)
    assert buckets(placed) == {}


def test_one_source_is_in_the_middle_of_the_smallest_side_that_holds_it() -> None:
    placed = windows([np.array([0])], np.array([100.2]), np.array([-3.4]), 10.0)
    assert_array_equal(placed.side, [24])  # 2 x 10 + 1 pixels are needed
    middle = placed.x0[0] + 11.5, placed.y0[0] + 11.5
    assert np.abs(np.subtract(middle, (100.2, -3.4))).max() <= 0.5


def test_buckets_partition_the_blocks_by_side_and_slots() -> None:
    placed, _, _ = placed_at_random()
    parts = buckets(placed)
    assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(placed.side)))
    assert len(parts) > 1
    for (side, slots), which in parts.items():
        assert slots in SLOTS
        assert (placed.side[which] == side).all()
        assert (placed.slots[which] == slots).all()
        assert all(len(placed.members[block]) <= slots for block in which)


def pairs(separation: NDArray) -> tuple[list[NDArray], NDArray, NDArray]:
    """Pairs of sources along x: members, x and y."""
    x = np.column_stack([np.zeros_like(separation), separation]).ravel()
    return list(np.arange(len(x)).reshape(-1, 2)), x, np.zeros_like(x)


def test_few_blocks_of_a_side_get_the_next_larger_one_that_is_in_use() -> None:
    """Many pairs need 24 pixels, three need 32, and one 48: 32 is too rare to be compiled."""
    placed = windows(*pairs(np.repeat([1.0, 8.0, 20.0], [400, 3, 1])), 10.0)
    assert_array_equal(placed.side, np.repeat([24, 48], [400, 4]))


def test_few_blocks_do_not_get_windows_that_cost_more_than_a_compilation() -> None:
    """Twenty single sources beside one chain of a dozen, which needs a far larger window."""
    chain = np.arange(12)
    x = np.concatenate([8.0 * chain, 1000 + 100.0 * np.arange(20)])
    placed = windows([chain, *([i] for i in range(12, 32))], x, np.zeros(32), 10.0)
    assert (placed.side[1:] < placed.side[0]).all()
    assert (placed.slots[1:] == 1).all()


def test_few_blocks_of_a_size_get_the_slots_of_the_next_larger_one_that_is_in_use() -> None:
    members, x, y = pairs(np.repeat(1.0, 40))
    placed = windows([*members, np.array([0]), np.array([3])], x, y, 10.0)
    assert_array_equal(placed.slots, placed.slots[0])
    assert placed.slots[0] >= 2


# --- cutouts -------------------------------------------------------------------------------------

SHAPE = (30, 40)


def single(x: float, y: float, margin: float = 7.0) -> Windows:
    """The window of one source."""
    return windows([np.array([0])], np.array([x]), np.array([y]), margin)


@pytest.mark.parametrize(
    "position",
    [(20.0, 15.0), (0.0, 0.0), (39.0, 29.0), (-0.4, 29.4), (39.4, 3.0), (500.0, 10.0)],
)
def test_cutouts_are_the_image_padded_with_blanks(position: tuple[float, float]) -> None:
    image = np.random.default_rng(0).normal(size=SHAPE)
    placed = single(*position)
    cutout = cut_out(image, placed, np.array([0]))
    pad, side = 600, placed.side[0]
    padded = np.pad(image, pad, constant_values=np.nan)
    x0, y0 = placed.x0[0] + pad, placed.y0[0] + pad
    assert_array_equal(cutout, padded[None, y0 : y0 + side, x0 : x0 + side])


def test_cutouts_have_the_fill_outside_the_image() -> None:
    cutout = cut_out(np.ones(SHAPE), single(0.0, 10.0), np.array([0]), fill=-2.0)
    assert set(np.unique(cutout)) == {-2.0, 1.0}


def test_an_overlap_outside_the_image_is_empty() -> None:
    here, there = overlap(50, -30, 16, SHAPE)
    assert np.zeros((16, 16))[here].size == np.zeros(SHAPE)[there].size == 0


def test_pixels_within_reach_of_the_own_sources_only() -> None:
    placed, x, y = placed_at_random()
    reach = 6.0
    for which in buckets(placed).values():
        mask = within_reach(placed, which, x, y, reach)
        for inside, block in zip(mask, which, strict=True):
            rows, columns = np.indices(inside.shape)
            pixels = np.column_stack(
                [columns.ravel() + placed.x0[block], rows.ravel() + placed.y0[block]]
            )
            own = placed.members[block]
            distance = cdist(pixels, np.column_stack([x[own], y[own]])).min(axis=1)
            assert_array_equal(inside.ravel(), distance <= reach)


@pytest.mark.parametrize("most", [3, 7])
def test_neighbourhoods_hold_the_nearest_sources(most: int) -> None:
    x, y = np.random.default_rng(4).uniform(0, 30, (2, 60))
    x[7], y[7] = x[8], y[8]
    members, own = neighbourhoods(x, y, 4.0, most)
    for source in range(len(x)):
        away = np.hypot(x - x[source], y - y[source])
        nearest = np.sort(away)[:most]
        found = members[own[source]]
        assert source in found
        assert_allclose(np.sort(away[found]), nearest[nearest < 4.0])
    assert len({tuple(group) for group in members}) == len(members)


def test_nothing_has_no_neighbourhoods() -> None:
    members, own = neighbourhoods(np.zeros(0), np.zeros(0), 4.0, 3)
    assert members == []
    assert own.shape == (0,)
