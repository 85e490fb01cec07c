"""Polynomial backgrounds, against numpy's polynomials and extractions without bias."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy import units as u
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.polynomial import polyval2d
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from hyperjax.background import (
    MAX_ORDER,
    Backgrounds,
    _margins,
    evaluate,
    level_at,
    mosaic,
    powers,
    separate_backgrounds,
)
from hyperjax.config import Config
from hyperjax.detection import Detections
from hyperjax.fitting import GroupBatch, fit_groups
from hyperjax.groups import Windows, blocks, link, pairs_closer, windows
from hyperjax.maps import read_map
from hyperjax.modelling import unfitted
from hyperjax.models import monomials
from hyperjax.pipeline import extract
from hyperjax.simulation import Simulation, simulate, write_simulation
from hyperjax.sources import SourceFits

BEAM = 3.5
SHAPE = (90, 100)
X, Y = np.array([20.3, 24.0, 70.2, 45.0, 80.6]), np.array([30.1, 31.2, 25.4, 62.0, 83.7])


def placed_round(x: NDArray, y: NDArray, margin: float = 3.0) -> Windows:
    """Windows of groups linked at 2.5 beams."""
    groups = link(len(x), pairs_closer(x, y, 2.5 * BEAM / 2))
    return windows(blocks(groups, x, y), x, y, margin * BEAM)


def plane_of(order: int, scale: float = 1.0, seed: int = 0) -> NDArray:
    """A polynomial over the map: its value on every pixel."""
    table = np.random.default_rng(seed).normal(size=(order + 1, order + 1))
    table[np.add.outer(np.arange(order + 1), np.arange(order + 1)) > order] = 0.0
    y, x = np.indices(SHAPE)
    return scale * polyval2d(x / 50 - 1, y / 50 - 1, table)


# --- Polynomials ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(-1, MAX_ORDER + 1))
def test_the_terms_are_in_the_order_of_the_models(order: int) -> None:
    assert [tuple(pair) for pair in powers(order).tolist()] == monomials(order)


@settings(deadline=None)
@given(
    st.integers(0, MAX_ORDER),
    st.tuples(st.floats(-50, 50), st.floats(-50, 50)),
    st.floats(1, 100),
    st.integers(0, 1000),
)
def test_a_polynomial_has_the_values_of_numpys(
    order: int, centre: tuple[float, float], half: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    coefficients = rng.normal(size=len(powers(order)))
    x, y = centre[0] + half * rng.uniform(-1, 1, 20), centre[1] + half * rng.uniform(-1, 1, 20)
    table = np.zeros((order + 1, order + 1))
    for value, (a, b) in zip(coefficients, powers(order), strict=True):
        table[a, b] = value
    expected = polyval2d((x - centre[0]) / half, (y - centre[1]) / half, table)
    assert_allclose(evaluate(coefficients, x, y, centre, half), expected, atol=1e-12)


def test_a_grid_of_rows_and_columns_gives_an_image() -> None:
    image = evaluate(
        np.array([1.0, 2.0, 3.0]), np.arange(4)[None], np.arange(3)[:, None], (0, 0), 1
    )
    y, x = np.indices((3, 4))
    assert_allclose(image, 1 + 2 * x + 3 * y)


def test_the_coefficients_of_a_joint_fit_are_those_of_the_window() -> None:
    """A background that `fit_groups` finds has its values where `Backgrounds` puts them."""
    data, placed = plane_of(2), placed_round(np.array([40.0]), np.array([50.0]))
    side, x0, y0 = int(placed.side[0]), int(placed.x0[0]), int(placed.y0[0])
    cutout = data[None, y0 : y0 + side, x0 : x0 + side]
    nothing = np.zeros((1, 1, 6))
    batch = GroupBatch(
        cutout,
        np.ones_like(cutout),
        nothing,
        nothing,
        nothing,
        nothing > 0,
        nothing[..., 0] > 0,
        [2],
    )
    found = Backgrounds.empty(1)
    found.coefficients[:, :6] = fit_groups(batch).coefficients
    assert_allclose(found.images(placed, np.array([0])), cutout, atol=1e-9)
    x, y = np.array([38.0]), np.array([52.0])
    assert_allclose(level_at(placed, found, np.array([38.0]), np.array([52.0])), data[52, 38])
    assert_allclose(found.at(placed, 0, x, y), data[52, 38])


# --- The background round masked sources ---------------------------------------------------------


def separately(data: NDArray, rms: float = 1.0, **options: object) -> tuple[Windows, Backgrounds]:
    """Fit the surroundings of the sources at X, Y."""
    config = Config.model_validate(
        {
            "background": {"fix_min_box": 3, "fix_max_box": 3, **options},
            "fit_options": {"min_method": "bic"},
        }
    )
    placed = placed_round(X, Y)
    noise = np.where(np.isfinite(data), rms, np.nan)
    return placed, separate_backgrounds(data, noise, placed, X, Y, BEAM, config)


def with_sources(data: NDArray) -> NDArray:
    """Put compact things of 1000 on the sources' places, which have to be masked."""
    y, x = np.indices(SHAPE)
    out = data.copy()
    for x0, y0 in zip(X, Y, strict=True):
        out[np.hypot(x - x0, y - y0) < BEAM] += 1000.0
    return out


def assert_recovered(placed: Windows, found: Backgrounds, truth: NDArray, atol: float) -> None:
    """Under each source and all over the windows of the blocks."""
    nearest = truth[np.rint(Y).astype(int), np.rint(X).astype(int)]
    level = level_at(placed, found, np.rint(X), np.rint(Y))
    assert_allclose(level, nearest, atol=atol)
    for block in range(len(placed.members)):
        x0, y0, side = placed.x0[block], placed.y0[block], placed.side[block]
        rows, columns = (slice(max(v, 0), v + side) for v in (y0, x0))
        part = truth[rows, columns]
        y, x = np.mgrid[
            rows.start : rows.start + part.shape[0], columns.start : columns.start + part.shape[1]
        ]
        assert_allclose(found.at(placed, block, x, y), part, atol=atol)


@pytest.mark.parametrize(
    ("order", "boxes"),
    [(0, {}), (1, {}), (2, {}), (2, {"fix_max_box": 4.5}), (2, {"fix_min_box": 0.0})],
)
def test_a_polynomial_under_masked_sources_is_recovered(
    order: int, boxes: dict[str, float]
) -> None:
    """In boxes, in larger ones, and over the whole map; blank pixels do not count."""
    truth = plane_of(order, 20.0)
    data = with_sources(truth)
    data[50:55, 30:60] = np.nan
    placed, found = separately(data, pol_orders_separate=[order], **boxes)
    assert_array_equal(found.orders, order)
    assert_recovered(placed, found, truth, atol=1e-6)


@pytest.mark.parametrize(
    ("smallest", "largest", "margins"),
    [(0, 5, [0]), (3, 3, [3]), (3, 5, [3, 4, 5]), (3, 4.5, [3, 4, 4.5])],
)
def test_boxes_reach_from_the_smallest_to_the_largest_margin(
    smallest: float, largest: float, margins: list[float]
) -> None:
    assert _margins(smallest, largest) == margins


def test_larger_boxes_are_tried_up_to_the_largest() -> None:
    """Least squares of the smallest box fit its own pixels best; Theil-Sen's medians need not."""
    data = with_sources(plane_of(1, 20.0)) + np.random.default_rng(3).normal(size=SHAPE)
    placed = placed_round(X, Y)

    def fitted(largest: float) -> NDArray:
        boxes = {"fix_min_box": 3, "fix_max_box": largest, "pol_orders_separate": [1]}
        options = {"background": boxes, "fit_options": {"bg_fitters": ["theilsen"]}}
        config = Config.model_validate(options)
        return separate_backgrounds(data, np.ones(SHAPE), placed, X, Y, BEAM, config).coefficients

    assert_array_equal(fitted(3), fitted(3))
    assert (fitted(3) != fitted(7)).any()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_order_of_the_background_is_found(order: int) -> None:
    """A background that the noise does not hide, by the Bayesian information criterion."""
    rng = np.random.default_rng(order)
    x, y = 20.0 + 25.0 * np.indices((7, 7)).reshape(2, -1)
    shape = (200, 200)
    v, w = np.indices(shape) / 10.0
    terms = [np.zeros(shape), 3 * w + 2 * v, w**2 - v * w + 2 * v**2]
    data = terms[order] + rng.normal(size=shape)
    placed = placed_round(x, y)
    config = Config.model_validate({"background": {"fix_min_box": 3, "fix_max_box": 3}})
    found = separate_backgrounds(data, np.ones(shape), placed, x, y, BEAM, config)
    assert np.mean(found.orders == order) > 0.85
    assert (found.orders >= order).all()


def test_outliers_are_clipped() -> None:
    rng = np.random.default_rng(3)
    data = with_sources(plane_of(1, 20.0) + rng.normal(size=SHAPE))
    bad = rng.uniform(size=SHAPE) < 0.01
    placed, clean = separately(data, pol_orders_separate=[1])
    _, found = separately(data + 500.0 * bad, pol_orders_separate=[1])
    levels = (level_at(placed, each, X, Y) for each in (clean, found))
    assert_allclose(*levels, atol=0.5)


FITTERS = ["least_squares", "huber", "theilsen"]


def levels_of(data: NDArray, **fit_options: object) -> NDArray:
    """Planes round the sources at X, Y: their levels under the sources."""
    background = {"fix_min_box": 3, "fix_max_box": 3, "pol_orders_separate": [1]}
    config = Config.model_validate({"background": background, "fit_options": fit_options})
    placed = placed_round(X, Y)
    found = separate_backgrounds(data, np.ones(SHAPE), placed, X, Y, BEAM, config)
    return level_at(placed, found, X, Y)


@pytest.mark.parametrize("fitter", FITTERS)
@pytest.mark.parametrize("order", [0, 1, 4])
def test_every_fitter_recovers_every_order(fitter: str, order: int) -> None:
    truth = plane_of(order, 20.0)
    config = Config.model_validate(
        {
            "background": {"fix_min_box": 3, "fix_max_box": 3, "pol_orders_separate": [order]},
            "fit_options": {"bg_fitters": [fitter], "huber_epsilons": [1.35]},
        }
    )
    placed = placed_round(X, Y)
    data = with_sources(truth)
    found = separate_backgrounds(data, np.ones(SHAPE), placed, X, Y, BEAM, config)
    assert_allclose(
        level_at(placed, found, np.rint(X), np.rint(Y)),
        truth[np.rint(Y).astype(int), np.rint(X).astype(int)],
        atol=1e-4,
    )


def crowded(seed: int) -> tuple[NDArray, NDArray]:
    """A plane, and the same with 15 % of the pixels 4 rms brighter: too faint to be clipped."""
    rng = np.random.default_rng(seed)
    clean = with_sources(plane_of(1, 20.0) + rng.normal(size=SHAPE))
    return clean, clean + 4.0 * (rng.uniform(size=SHAPE) < 0.15)


def test_robust_fitters_are_biased_less_by_faint_sources_in_the_box() -> None:
    bias = {}
    for fitter in FITTERS:
        shifts = [
            levels_of(bad, bg_fitters=[fitter], huber_epsilons=[1.1])
            - levels_of(clean, bg_fitters=[fitter], huber_epsilons=[1.1])
            for clean, bad in map(crowded, range(8))
        ]
        bias[fitter] = np.mean(shifts)
    assert bias["least_squares"] > 0.1
    assert bias["huber"] < 0.8 * bias["least_squares"]
    assert bias["theilsen"] < 0.7 * bias["least_squares"]


def test_a_large_epsilon_of_huber_is_least_squares() -> None:
    _, data = crowded(1)
    huber = {"bg_fitters": ["huber"]}
    plain, wide, narrow = (
        levels_of(data, **options)
        for options in ({}, huber | {"huber_epsilons": [50]}, huber | {"huber_epsilons": [1.0]})
    )
    assert_allclose(wide, plain, atol=1e-6)
    assert np.abs(narrow - plain).max() > 0.01


def test_the_best_of_all_fitters_is_kept_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """Of several the one with the least nmse on the common pixels, block by block."""
    _, data = crowded(2)
    alone = {
        name: levels_of(data, bg_fitters=[name], huber_epsilons=[1.35], min_method="nmse")
        for name in FITTERS
    }
    with caplog.at_level("INFO", "hyperjax"):
        best = levels_of(
            data, bg_fitters=FITTERS, huber_epsilons=[1.35], min_method="nmse", verbose=True
        )
    told = [record.getMessage() for record in caplog.records]
    for members, text in zip(placed_round(X, Y).members, told, strict=True):
        name = next(name for name in FITTERS if name in text)
        assert_allclose(best[members], alone[name][members])
        assert text.startswith("background round (")
        assert "box 3 FWHM, order 1" in text


def test_the_whole_map_is_fitted_where_the_smallest_box_is_zero() -> None:
    """A bump 12 pixels away spoils the box, but hardly the plane of the whole map."""
    y, x = np.indices(SHAPE)
    truth = plane_of(1, 20.0)
    noise = np.random.default_rng(0).normal(size=SHAPE)
    bump = 60 * np.exp(-((x - X[2]) ** 2 + (y - Y[2] - 12) ** 2) / 50)
    data = with_sources(truth + bump + noise)
    level = truth[np.rint(Y).astype(int), np.rint(X).astype(int)][2]
    options = {"pol_orders_separate": [1]}
    placed, box = separately(data, **options)
    _, whole = separately(data, fix_min_box=0, fix_max_box=5, **options)
    errors = [
        abs(level_at(placed, each, np.rint(X), np.rint(Y))[2] - level) for each in (box, whole)
    ]
    assert errors[1] < errors[0] / 3


def true_orders(method: str, true: int) -> NDArray:
    """Orders that are chosen of 0 to 4 round 49 places, where the truth has one."""
    rng = np.random.default_rng(true)
    x, y = 20.0 + 25.0 * np.indices((7, 7)).reshape(2, -1)
    shape = (200, 200)
    v, w = np.indices(shape) / 10.0
    data = (v + 2 * w - 30.0) ** true / 30.0**true * 1e4 + rng.normal(size=shape)
    config = Config.model_validate(
        {
            "background": {
                "fix_min_box": 3,
                "fix_max_box": 3,
                "pol_orders_separate": [0, 1, 2, 3, 4],
            },
            "fit_options": {"min_method": method},
        }
    )
    placed = placed_round(x, y)
    return separate_backgrounds(data, np.ones(shape), placed, x, y, BEAM, config).orders


@pytest.mark.parametrize("true", [0, 1, 2])
def test_bic_finds_the_true_order_and_nmse_the_highest(true: int) -> None:
    bic, redchi, nmse = (true_orders(method, true) for method in ("bic", "redchi", "nmse"))
    assert np.mean(bic == true) > 0.9
    assert (nmse == 4).all()
    assert bic.mean() < redchi.mean() < 4


def test_surroundings_without_valid_pixels_have_the_level_of_the_map() -> None:
    data = with_sources(7.0 + 0.1 * plane_of(1))
    data[:55, :60] = np.nan
    placed, found = separately(data)
    alone = np.array([X[members[0]] < 40 for members in placed.members])
    assert_array_equal(found.orders == -1, alone)
    assert_allclose(found.coefficients[alone, 0], np.nanmedian(data), atol=0.05)
    assert not found.coefficients[alone, 1:].any()


def test_no_sources_have_no_backgrounds() -> None:
    nothing = np.zeros(0)
    placed = windows([], nothing, nothing, 10.0)
    data = np.ones(SHAPE)
    found = separate_backgrounds(data, data, placed, nothing, nothing, BEAM, Config())
    assert found.coefficients.shape[0] == found.orders.shape[0] == 0
    assert level_at(placed, found, nothing, nothing).shape == (0,)


# --- The background of the map -------------------------------------------------------------------


def sources_at(x: NDArray, y: NDArray) -> SourceFits:
    """Sources of the size of the beam."""
    one = np.ones_like(x)
    return unfitted(Detections(x, y, one, one, one, 0 * one), BEAM, Config())


def test_each_source_has_the_background_of_its_block_in_the_map() -> None:
    placed = placed_round(X, Y)
    found = Backgrounds.empty(len(placed.members))
    found.coefficients[:, 0] = np.arange(len(placed.members)) + 1.0
    image = mosaic(placed, found, sources_at(X, Y), np.zeros(SHAPE))
    y, x = np.indices(SHAPE)
    distance = np.hypot(x - X[:, None, None], y - Y[:, None, None])
    block = np.empty(len(X))
    for number, members in enumerate(placed.members):
        block[members] = number + 1.0
    nearest = block[distance.argmin(axis=0)]
    close = distance.min(axis=0) < 2.0 * BEAM  # an aperture reaches no further
    assert_array_equal(image[close], nearest[close])
    assert not image[distance.min(axis=0) > 3.0 * BEAM].any()
    assert (image <= nearest).all()


def test_a_map_without_sources_has_its_smooth_background() -> None:
    nothing = np.zeros(0)
    smooth = plane_of(1)
    placed = windows([], nothing, nothing, 10.0)
    image = mosaic(placed, Backgrounds.empty(0), sources_at(nothing, nothing), smooth)
    assert_array_equal(image, smooth)


# --- Ways to treat the background ----------------------------------------------------------------

WAYS = {
    "none": {"fit_gauss_and_bg_together": False},
    "separately": {
        "fit_gauss_and_bg_together": False,
        "fit_gauss_and_bg_separately": True,
        "fix_max_box": 3,
    },
    "together": {},
    "both": {"fit_gauss_and_bg_separately": True, "fix_max_box": 3},
}
ISOLATED = Simulation(
    shape=(300, 300),
    n_sources=80,
    seed=31,
    beam_fwhm_pix=BEAM,
    min_separation_beams=6,
    size_range=(1.0, 1.2),
    snr_range=(20.0, 80.0),
)


BY_PIXELS = {"noise": {"model": "white"}}


def flux_pulls(options: Simulation, way: str, folder: Path) -> NDArray:
    """(measured - true) / error of the total fluxes of an extraction."""
    simulated = simulate(options)
    path, _ = write_simulation(simulated, folder / "map.fits", overwrite=True)
    found = extract(
        read_map(path), Config.model_validate(BY_PIXELS | {"background": WAYS[way]})
    ).catalog
    truth = simulated.truth
    x, y = found["X_PIX"].value, found["Y_PIX"].value
    row = np.hypot(x[:, None] - truth["X_PIX"], y[:, None] - truth["Y_PIX"]).argmin(axis=0)
    difference = found["FLUX_TOTAL"][row] - truth["FLUX_TOTAL"]
    return (difference / found["FLUX_TOTAL_ERR"][row]).to_value(u.dimensionless_unscaled)


@pytest.mark.parametrize(
    ("way", "background"),
    [
        ("none", {"gradient": 0.0, "structure": 0.0}),
        ("separately", {"gradient": 10.0, "structure": 0.0, "offset": 5.0}),
        ("both", {"gradient": 10.0, "structure": 1.0, "offset": 5.0}),
        ("together", {"gradient": 300.0, "structure": 1.0, "offset": -100.0}),
    ],
)
def test_each_way_is_unbiased_where_it_applies(
    way: str, background: dict[str, float], tmp_path: Path
) -> None:
    """The mean pull of 80 sources is 0 within four of its errors."""
    pull = flux_pulls(replace(ISOLATED, **background), way, tmp_path)
    assert abs(pull.mean()) < 4 * pull.std() / np.sqrt(len(pull))


@pytest.mark.parametrize("method", ["bic", "redchi", "nmse"])
def test_the_order_of_the_joint_background_is_chosen_by_the_method(
    method: str, tmp_path: Path
) -> None:
    """No background at all: bic keeps to order 0, nmse takes the highest."""
    flat = replace(ISOLATED, gradient=0.0, structure=0.0)
    path, _ = write_simulation(simulate(flat), tmp_path / "map.fits")
    config = Config.model_validate(BY_PIXELS | {"fit_options": {"min_method": method}})
    order = extract(read_map(path), config).catalog["POLYN"]
    share = np.mean(order == 0)
    if method == "bic":
        assert share > 0.9
    elif method == "redchi":
        assert 0.1 < share < 0.9
    else:
        assert (order == 2).all()


def test_the_penalty_flattens_the_background_that_is_fitted_with_the_sources(
    tmp_path: Path,
) -> None:
    """On a slope: HYPER's strength hardly, a strong one so that the slope stays in the residual."""
    steep = replace(ISOLATED, gradient=300.0)
    path, _ = write_simulation(simulate(steep), tmp_path / "map.fits")
    nmse = []
    for strength in (None, 1e-4, 1e6):
        fit_options = {
            "use_l2_regularization": strength is not None,
            "lambda_l2": strength or 1.0,
        }
        options = {"fit_options": fit_options, "background": {"polynomial_orders": [1]}}
        found = extract(read_map(path), Config.model_validate(options)).catalog
        nmse.append(np.median(found["NMSE"]))
    assert_allclose(nmse[1], nmse[0], rtol=1e-3)
    assert nmse[2] > 1.5 * nmse[0]


def test_every_fit_is_reported_where_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = write_simulation(simulate(replace(ISOLATED, n_sources=6)), tmp_path / "map.fits")
    for verbose in (False, True):
        caplog.clear()
        config = Config.model_validate(BY_PIXELS | {"fit_options": {"verbose": verbose}})
        with caplog.at_level("INFO", "hyperjax"):
            found = extract(read_map(path), config).catalog
        told = [r.getMessage() for r in caplog.records if "source " in r.getMessage()]
        told = [text for text in told if "peak" in text]
        assert len(told) == verbose * len(found)
    told.sort(key=lambda text: int(text.split("source ")[1].split(":")[0]))
    for row, text in zip(found, told, strict=True):
        assert f"x {row['X_PIX'].value:.2f} +-" in text
        assert f"y {row['Y_PIX'].value:.2f} +-" in text
        assert f"peak {row['FLUX_PEAK'].to_value('Jy/beam'):.4g} +-" in text


def test_together_is_better_than_separately_on_a_steep_gradient(tmp_path: Path) -> None:
    steep = replace(ISOLATED, gradient=300.0, structure=2.0)
    together, separately = (flux_pulls(steep, way, tmp_path) for way in ("together", "separately"))
    assert np.sqrt(np.mean(together**2)) <= np.sqrt(np.mean(separately**2))
