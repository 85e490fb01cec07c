"""Detection and noise, against sums over boxes, analytic values and noise without sources."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import truncnorm

from hyperjax.config import Detection
from hyperjax.detection import (
    Detections,
    brightest_within,
    detect,
    filter_size,
    find_peaks,
    high_pass,
    local_peak,
    shoulder_score,
    snap,
)
from hyperjax.errors import MapTooSmallError
from hyperjax.noise import clipped_rms, clipped_share

FWHM = 3.5
SHAPE = (120, 130)
EDGE = 0.5 * FWHM


class Blob(NamedTuple):
    """A round Gaussian."""

    peak: float
    x: float
    y: float
    fwhm: float = FWHM


def image_of(*blobs: Blob, shape: tuple[int, int] = SHAPE) -> NDArray:
    """Draw Gaussians on an empty image."""
    y, x = np.indices(shape)
    image = np.zeros(shape)
    for blob in blobs:
        square = (x - blob.x) ** 2 + (y - blob.y) ** 2
        image += blob.peak * 0.5 ** (4 * square / blob.fwhm**2)
    return image


def noise(seed: int, shape: tuple[int, int] = SHAPE, fwhm: float = 0.0) -> NDArray:
    """Noise of unit rms, white or correlated over a Gaussian of the given FWHM."""
    image = np.random.default_rng(seed).normal(size=shape)
    if fwhm:
        image = ndimage.gaussian_filter(image, fwhm / np.sqrt(8 * np.log(2)), mode="wrap")
    return image / image.std()


def detect_in(
    data: NDArray, rms: float = 1.0, separation: float = FWHM, **options: object
) -> Detections:
    """Detect with the filter that belongs to the beam."""
    filtered = high_pass(data, filter_size(FWHM, 0, data.shape, "map"))
    return detect(
        filtered,
        rms,
        FWHM,
        Detection(**options),
        edge_pix=EDGE,
        separation_pix=separation,
    )


def in_order_of_x(found: Detections) -> Detections:
    """The detections from left to right."""
    order = np.argsort(found.x)
    return Detections(*(column[order] for column in found))


# --- The filter ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fwhm", "wanted", "size"),
    [
        (3.5, 0, 15),  # 4 FWHM
        (2.0, 0, 9),
        (5.0, 0, 25),  # HYPER's floor(FWHM)^2
        (10.2, 0, 101),
        (12.0, 0, 121),  # 10 FWHM
        (25.0, 0, 251),
        (60.0, 0, 499),  # the map
        (3.5, 20, 21),
        (3.5, 7, 7),
    ],
)
def test_the_filter_is_odd_and_some_beams_wide(fwhm: float, wanted: int, size: int) -> None:
    assert filter_size(fwhm, wanted, (500, 600), "map") == size


@pytest.mark.parametrize(("fwhm", "wanted", "size"), [(5.0, 0, 21), (3.0, 25, 25)])
def test_a_map_smaller_than_the_filter_is_refused_with_the_remedy(
    fwhm: float, wanted: int, size: int
) -> None:
    remedy = rf"m51: .* 300 x 20 pixels.* {size} pixels.*kernel_size_pix.*--beam"
    with pytest.raises(MapTooSmallError, match=remedy):
        filter_size(fwhm, wanted, (20, 300), "m51")


@pytest.mark.parametrize("beams", [4, 10])
def test_the_filter_takes_little_of_a_point_source(beams: int) -> None:
    """A box of n FWHM takes pi / (4 ln 2) / n^2 of a peak: 7 and 1 %."""
    fwhm = 12.0
    data = image_of(Blob(1.0, 150.0, 150.0, fwhm), shape=(301, 301))
    peak = high_pass(data, int(beams * fwhm) + 1).max()
    assert 1 - peak == pytest.approx(np.pi / (4 * np.log(2)) / beams**2, rel=0.2)


def test_a_wide_beam_finds_its_sources_on_a_small_map() -> None:
    """Beams of 25 pixels on 300 pixels: floor(FWHM)^2 would be a box of 625."""
    blobs = [Blob(30.0, 70.0, 80.0, 25.0), Blob(20.0, 200.0, 90.0, 25.0)]
    data = image_of(*blobs, shape=(300, 300)) + noise(11, (300, 300))
    filtered = high_pass(data, filter_size(25.0, 0, data.shape, "map"))
    found = detect(
        filtered,
        clipped_rms(filtered),
        25.0,
        Detection(),
        edge_pix=12.5,
        separation_pix=25.0,
    )
    assert_allclose(np.sort(found.x), [70.0, 200.0], atol=5)


def test_the_filter_subtracts_the_mean_of_the_box() -> None:
    data = noise(0)
    boxes = np.lib.stride_tricks.sliding_window_view(data, (9, 9))
    expected = data[4:-4, 4:-4] - boxes.mean(axis=(2, 3))
    assert_allclose(high_pass(data, 9)[4:-4, 4:-4], expected, atol=1e-12)


@pytest.mark.parametrize("blank", [False, True])
def test_a_plane_vanishes_up_to_the_edges(blank: bool) -> None:
    y, x = np.indices(SHAPE)
    data = 1e3 + 5.0 * x - 3.0 * y
    if blank:
        data[:, :7] = data[40:60, 50:55] = np.nan
    filtered = high_pass(data, 15)
    assert_array_equal(np.isnan(filtered), np.isnan(data))
    assert np.nanmax(np.abs(filtered)) < 1e-9


def test_blank_pixels_count_nowhere_in_the_filter() -> None:
    """Where there is no plane in the data, the level is the mean of the box's valid pixels."""
    data = noise(1)
    data[30:33, 40:50] = np.nan
    y, x = np.nonzero(np.isfinite(data))
    basis = np.column_stack([np.ones(len(x)), x, y])
    data[y, x] -= basis @ np.linalg.lstsq(basis, data[y, x])[0]
    filtered = high_pass(data, 9)
    for row, column in [(28, 40), (33, 52), (31, 39)]:
        box = data[row - 4 : row + 5, column - 4 : column + 5]
        assert filtered[row, column] == pytest.approx(data[row, column] - np.nanmean(box))


# --- The noise -----------------------------------------------------------------------------------


def test_the_clipped_rms_of_pure_noise_is_its_standard_deviation() -> None:
    """The mean of 40 maps of 40000 pixels, each good to 1 / sqrt(2 N) = 0.35 %."""
    rms = [clipped_rms(2.0 * noise(seed, (200, 200))) for seed in range(40)]
    assert np.mean(rms) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("contamination", [0.0, 0.05])
def test_outliers_and_blank_pixels_hardly_change_the_clipped_rms(contamination: float) -> None:
    """Outliers of 20 sigma in 5 % of the pixels move it by less than 1.4 %."""
    data = noise(2, (200, 200))
    data[np.random.default_rng(0).uniform(size=data.shape) < contamination] += 20.0
    data[:20] = np.nan
    assert clipped_rms(data) == pytest.approx(1.0, rel=0.014)


@pytest.mark.parametrize("clip", [2.5, 3.0, 4.0])
def test_the_share_that_clipping_leaves_is_a_fixed_point(clip: float) -> None:
    """Clipping once more, by scipy's truncated Gaussian, changes nothing."""
    share = clipped_share(clip, 30)
    assert share == pytest.approx(truncnorm.std(-clip * share, clip * share), rel=1e-9)


# --- What is found -------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, FWHM])
@pytest.mark.parametrize("seed", range(4))
def test_noise_alone_gives_no_source_at_five_sigma(seed: int, correlation: float) -> None:
    """A map of 40000 independent pixels exceeds 5 sigma with a probability of 1.1 %."""
    data = noise(seed, (200, 200), correlation)
    assert len(detect_in(data, clipped_rms(high_pass(data, 15))).x) == 0


LADDER = [Blob(peak, 12.3 + 17 * i, 40.4 + 3 * i) for i, peak in enumerate([4, 8, 16, 32, 64, 128])]


def test_positions_peaks_and_signal_to_noise_of_sources_without_noise() -> None:
    found = in_order_of_x(detect_in(image_of(*LADDER), rms=0.5))
    assert_allclose(found.x, [blob.x for blob in LADDER], atol=0.25)
    assert_allclose(found.y, [blob.y for blob in LADDER], atol=0.25)
    filtered = high_pass(image_of(*LADDER), 15)
    assert_array_equal(
        found.peak, filtered[np.rint(found.y).astype(int), np.rint(found.x).astype(int)]
    )
    assert_array_equal(found.snr, found.peak / 0.5)
    assert_array_equal(found.rms, 0.5)


def test_the_brightest_comes_first() -> None:
    assert (np.diff(detect_in(image_of(*LADDER)).peak) < 0).all()


@pytest.mark.parametrize("threshold", [2.0, 5.0, 20.0, 1000.0])
def test_the_threshold_divides_the_peaks(threshold: float) -> None:
    every = detect_in(image_of(*LADDER), sigma_thres=1.0)
    found = detect_in(image_of(*LADDER), sigma_thres=threshold)
    assert_array_equal(found.peak, every.peak[every.peak >= threshold])


def test_an_empty_image_has_no_peaks() -> None:
    x, y = find_peaks(np.zeros(SHAPE), FWHM, (-4.0, 4.0), (-2.0, 2.0))
    assert len(x) == len(y) == 0


def test_limits_that_no_peak_meets_give_no_source() -> None:
    assert len(detect_in(image_of(*LADDER), sharplim=(5.0, 6.0)).x) == 0


def test_positions_scatter_round_the_truth() -> None:
    """At S/N 30 a centroid of 3 x 3 pixels is good to half a pixel, without a common shift."""
    rng = np.random.default_rng(6)
    x, y = 12.0 + 15.0 * np.indices((10, 10)).reshape(2, -1) + rng.uniform(-0.5, 0.5, (2, 100))
    data = image_of(*(Blob(30.0, a, b) for a, b in zip(x, y, strict=True)), shape=(160, 160))
    found = detect_in(data + noise(6, data.shape))
    assert len(found.x) == 100
    index = np.argmin(np.hypot(found.x[:, None] - x, found.y[:, None] - y), axis=1)
    shift = np.column_stack([found.x - x[index], found.y - y[index]])
    assert np.abs(shift).max() < 0.6
    assert (np.abs(shift.mean(axis=0)) < 4 * shift.std(axis=0) / 10).all()


def test_a_steep_gradient_neither_makes_nor_loses_sources() -> None:
    """A plane of 1000 sigma from side to side changes no digit that matters."""
    data = image_of(*LADDER, Blob(15.0, 4.2, 100.0)) + noise(7)
    y, x = np.indices(SHAPE)
    flat, steep = detect_in(data), detect_in(data + 5.0 * x - 3.0 * y)
    assert len(flat.x) == 6  # all but the source of 4 sigma
    for plain, tilted in zip(flat, steep, strict=True):
        assert_allclose(tilted, plain, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_factor_changes_nothing_but_the_peaks(scale: float) -> None:
    data = image_of(*LADDER) + noise(8)
    plain, scaled = detect_in(data), detect_in(scale * data, rms=scale)
    assert_allclose(scaled.peak, scale * plain.peak, rtol=1e-9)
    for name in ("x", "y", "snr", "shoulder_score"):
        assert_allclose(getattr(scaled, name), getattr(plain, name), rtol=1e-9)


# --- What is left out ----------------------------------------------------------------------------


def distance_to_blank(data: NDArray, found: Detections) -> NDArray:
    """From each detection's pixel to the nearest pixel that is blank or outside, by brute force."""
    y, x = np.nonzero(~np.pad(np.isfinite(data), 1))
    pixel_x, pixel_y = np.rint(found.x), np.rint(found.y)
    return np.min(np.hypot(pixel_x - (x - 1)[:, None], pixel_y - (y - 1)[:, None]), axis=0)


def test_peaks_at_the_edge_and_next_to_blank_pixels_are_dropped() -> None:
    at_edge = [Blob(50.0, 0.3 * i, 8.0 + 10 * i) for i in range(11)]
    at_hole = [Blob(50.0, 60.0 + 0.3 * i, 8.0 + 10 * i) for i in range(11)]
    far = [Blob(50.0, 30.0, 8.0 + 10 * i) for i in range(11)]
    data = image_of(*at_edge, *at_hole, *far)
    data[:, 66:75] = np.nan
    found = detect_in(data)
    assert (distance_to_blank(data, found) > EDGE).all()
    assert sum(found.x < 10) == sum(np.round(b.x) + 1 > EDGE for b in at_edge)
    assert sum((found.x > 20) & (found.x < 40)) == len(far)
    assert sum(found.x > 50) == sum(66 - np.round(b.x) > EDGE for b in at_hole)


def test_a_hole_in_noise_makes_no_source() -> None:
    data = noise(9, (200, 200)) + 100.0
    data[50:90, 70:75] = data[120, 130] = data[:3] = np.nan
    assert len(detect_in(data).x) == 0


def test_of_two_close_peaks_the_brighter_is_kept() -> None:
    pair = image_of(Blob(30.0, 50.0, 60.0), Blob(40.0, 60.0, 60.0))
    assert len(detect_in(pair, separation=9.0).x) == 2
    found = detect_in(pair, separation=11.0)
    assert_allclose(found.x, [60.0], atol=0.1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=30), st.floats(0.1, 15))
def test_a_peak_is_dropped_only_for_a_brighter_one_that_is_kept(
    positions: list[tuple[int, int]], separation: float
) -> None:
    x, y = np.array(positions, float).reshape(-1, 2).T
    kept: list[int] = []
    for i in range(len(x)):
        if all(np.hypot(x[i] - x[j], y[i] - y[j]) > separation for j in kept):
            kept.append(i)
    assert_array_equal(brightest_within(x, y, separation), kept)


# --- Snapping ------------------------------------------------------------------------------------


def test_a_peak_snaps_to_the_source_within_the_radius_and_no_further() -> None:
    data = image_of(Blob(10.0, 40.3, 50.0))
    x, y = np.array([41.4, 39.0, 43.2]), np.array([50.2, 49.1, 50.0])
    moved_x, moved_y = snap(data, x, y, 2.0)
    assert_allclose(moved_x[:2], 40.2, atol=0.15)
    assert_allclose(moved_y[:2], 50.0, atol=0.05)
    assert moved_x[2] > 40.4
    assert_array_equal(snap(data, x, y, 0.0), (x, y))


def test_the_peak_is_the_brightest_pixel_in_reach() -> None:
    data = image_of(Blob(10.0, 40.0, 50.0))
    data[50, 41] = np.nan
    assert_array_equal(local_peak(data, np.array([41.0]), np.array([51.0]), 1.5), [10.0])
    assert_array_equal(local_peak(data, np.array([41.0]), np.array([51.0]), 0.0), [data[51, 41]])
    assert local_peak(data, np.zeros(0), np.zeros(0), 1.0).shape == (0,)


# --- Shoulders -----------------------------------------------------------------------------------

BRIGHT, BUMP, ALONE = Blob(100.0, 60.0, 60.0, 12.0), Blob(15.0, 68.0, 60.0), Blob(15.0, 30.0, 25.0)


def scores(data: NDArray, *blobs: Blob, **options: float) -> NDArray:
    """Shoulder scores at the blobs' positions."""
    peak, x, y, _ = np.array(blobs).T
    return shoulder_score(data, x, y, peak, FWHM, Detection(**options))


def test_the_score_is_zero_for_a_symmetric_source() -> None:
    assert_allclose(scores(image_of(ALONE), ALONE), 0.0, atol=1e-3)


def test_the_score_of_a_slope_is_its_difference_across_the_ring() -> None:
    """A slope s along x differs by 2 s r between the ends of a ring of radius r."""
    slope = 0.7 * np.indices(SHAPE)[1]
    expected = 2 * 0.7 * 1.5 * FWHM / ALONE.peak
    assert_allclose(scores(image_of(ALONE) + slope, ALONE), expected, rtol=1e-3)


def test_the_score_is_high_on_the_flank_of_a_bright_source_and_low_on_its_top() -> None:
    found = detect_in(image_of(BRIGHT, BUMP, ALONE))
    blobs = (BRIGHT, BUMP, ALONE)
    distance = [np.hypot(found.x - blob.x, found.y - blob.y) for blob in blobs]
    top, flank, alone = np.argmin(distance, axis=1)
    assert found.shoulder_score[flank] > 0.8
    assert found.shoulder_score[top] < 0.1
    assert found.shoulder_score[alone] < 0.01


def test_the_filter_of_shoulders_drops_what_is_above_its_threshold() -> None:
    data = image_of(BRIGHT, BUMP, ALONE)
    kept = detect_in(data, shoulder_filter=True)
    assert len(kept.x) == 2
    assert (kept.shoulder_score <= 0.5).all()
    assert len(detect_in(data, shoulder_filter=True, shoulder_threshold=5.0).x) == 3


def test_a_score_at_the_threshold_is_kept() -> None:
    data = image_of(BRIGHT, BUMP, ALONE)
    highest = float(detect_in(data).shoulder_score.max())
    assert len(detect_in(data, shoulder_filter=True, shoulder_threshold=highest).x) == 3


def test_a_companion_is_no_flank() -> None:
    """Points of the ring that belong to a listed companion do not count."""
    companion = Blob(15.0, 30.0 + 1.5 * FWHM, 25.0)
    data = image_of(ALONE, companion)
    assert scores(data, ALONE)[0] > 0.9
    assert scores(data, ALONE, companion, shoulder_neighbor_mask=1.5)[0] < 0.15


def test_blank_parts_of_the_ring_do_not_count() -> None:
    data = image_of(ALONE) + 0.7 * np.indices(SHAPE)[1]
    data[:, 34:] = np.nan
    data[:20] = data[30:] = np.nan
    assert_allclose(scores(data, ALONE), 0.0)
