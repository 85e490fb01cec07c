"""Each option changes the result in the way it should: whole extractions of small maps.

`configs/README.md` names the test of every key; those of single functions are with them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import ArrayLike, NDArray
from typer.testing import CliRunner

from hyperjax.catalog import FLAGS
from hyperjax.cli import app
from hyperjax.config import Config, Detection
from hyperjax.config_io import config_from_dict
from hyperjax.detection import shoulder_score
from hyperjax.maps import Map, read_map
from hyperjax.pipeline import extract
from hyperjax.simulation import Simulation, render, simulate, write_simulation
from hyperjax.survey import run_hyper

BEAM = 3.5
SIGMA = BEAM / np.sqrt(8 * np.log(2))
SIDE = 150
X, Y = (v.ravel() + 25.3 for v in np.meshgrid(33.0 * np.arange(4), 33.0 * np.arange(4)))
PEAK = np.linspace(20.0, 95.0, 16)  # in units of the noise

Draw = Callable[..., Map]


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """Put Gaussians, in units of the noise of 1 mJy/beam, and anything else on a map."""
    empty = Simulation(shape=(SIDE, SIDE), n_sources=1, beam_fwhm_pix=BEAM, pixel_arcsec=2.0)
    path, _ = write_simulation(simulate(empty), tmp_path_factory.mktemp("m") / "m.fits")
    blank = read_map(path)

    def draw(
        peak: ArrayLike = PEAK,
        x: ArrayLike = X,
        y: ArrayLike = Y,
        size: ArrayLike = 1.0,
        ratio: ArrayLike = 1.0,
        plus: ArrayLike = 0.0,
        seed: int = 0,
    ) -> Map:
        peak, x, y, size, ratio = (
            np.array(v, float) for v in np.broadcast_arrays(peak, x, y, size, ratio)
        )
        sigmas = SIGMA * size * np.sqrt(ratio), SIGMA * size / np.sqrt(ratio)
        sky = render((SIDE, SIDE), x, y, peak, *sigmas, np.full(x.shape, 0.4))
        noise = np.random.default_rng(seed).standard_normal(sky.shape)
        return replace(blank, data=1e-3 * (sky + noise + plus))

    return draw


@pytest.fixture(scope="module")
def field(draw: Draw) -> Map:
    return draw()


def catalog(map: Map, **sections: dict[str, object]) -> QTable:
    return extract(map, config_from_dict(sections)).catalog


def detected(map: Map, **sections: dict[str, object]) -> QTable:
    return catalog(map, control={"detection_only": True}, **sections)


def near(found: QTable, x: float, y: float, radius: float = 1.5) -> NDArray:
    return np.hypot(found["X_PIX"].value - x, found["Y_PIX"].value - y) < radius


# --- Detection -----------------------------------------------------------------------------------


def test_the_threshold_leaves_out_what_is_fainter(field: Map) -> None:
    low = detected(field, detection={"sigma_thres": 5})
    high = detected(field, detection={"sigma_thres": 20})
    assert len(low) == len(X)
    assert (high["SNR"] >= 20).all()
    assert len(high) == np.sum(low["SNR"] >= 20) < len(low)


def test_a_larger_kernel_takes_less_of_the_peaks(field: Map) -> None:
    """A box of n pixels takes pi / (4 ln 2) (FWHM / n)^2 of a peak."""
    small, large = (
        detected(field, detection={"kernel_size_pix": n})["FLUX_PEAK"][:8].value for n in (9, 33)
    )
    taken = [np.pi / (4 * np.log(2)) * (BEAM / n) ** 2 for n in (9, 33)]
    assert_allclose(np.median(small / large), (1 - taken[0]) / (1 - taken[1]), atol=0.03)


def test_roundness_limits_leave_out_streaks(draw: Draw) -> None:
    map = draw(60.0, [40.0, 100.0], [40.0, 100.0], ratio=[1.0, 6.0])
    assert len(detected(map)) == 2
    found = detected(map, detection={"roundlim": [-0.5, 0.5]})
    assert_array_equal(near(found, 40, 40), [True])


def test_sharpness_limits_leave_out_hot_pixels(draw: Draw) -> None:
    hot = np.zeros((SIDE, SIDE))
    hot[100, 100] = 80.0
    map = draw(60.0, [40.0], [40.0], plus=hot)
    assert near(detected(map), 100, 100).any()
    found = detected(map, detection={"sharplim": [0.1, 1.0]})
    assert_array_equal(near(found, 40, 40), [True])


def test_of_peaks_within_the_distance_limit_the_brighter_is_kept(draw: Draw) -> None:
    map = draw([60.0, 40.0], [60.0, 67.0], [70.0, 70.0])
    assert len(detected(map)) == 2
    found = detected(map, detection={"dist_limit_arcsec": 16.0})  # 8 pixels of 2 arcsec
    assert_array_equal(near(found, 60, 70), [True])
    assert len(detected(map, detection={"dist_limit_arcsec": 12.0})) == 2


@pytest.mark.parametrize(
    ("factor", "angles", "score"),
    [(1.0, 64, 0.5), (2.0, 64, 1.0), (2.0, 4, np.sqrt(0.5)), (2.0, 7, np.cos(np.pi / 28))],
)
def test_the_ring_of_the_shoulder_score(factor: float, angles: int, score: float) -> None:
    """A slope of g per pixel differs by 2 g r across a ring of radius r; few points miss it."""
    rows, columns = np.indices((60, 60))
    slope = (rows + columns) / np.sqrt(2)
    options = Detection(shoulder_ring_factor=factor, shoulder_n_angles=angles)
    place = np.array([30.0])
    found = shoulder_score(slope, place, place, np.array([4 * BEAM]), BEAM, options)
    assert_allclose(found, score, rtol=0.02)


def test_a_shoulder_is_flagged_and_dropped_where_it_is_asked_for(draw: Draw) -> None:
    """A bump on a steep slope; its score is between the two thresholds."""
    slope = 4.0 * np.indices((SIDE, SIDE))[1]
    map = draw(40.0, [75.0], [75.0], plus=slope)
    score = float(detected(map)["SHOULDER_SCORE"][0])
    for threshold, shoulder in ((0.8 * score, True), (1.2 * score, False)):
        kept = detected(map, detection={"shoulder_threshold": threshold})
        assert_array_equal(kept["FLAGS"] & FLAGS.SHOULDER > 0, shoulder)
        options = {"shoulder_threshold": threshold, "shoulder_filter": True}
        assert len(detected(map, detection=options)) == (not shoulder)


# --- Sizes and apertures -------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_the_aperture_holds_its_share_of_a_gaussian(field: Map, ratio: float) -> None:
    """1 - 2^(-4 k^2) for semi-axes of k FWHM; the corrected flux is the total one."""
    found = catalog(field, photometry={"fwhm_radius_ratio": ratio})
    share = (found["FLUX"] / found["FLUX_TOTAL"]).value
    assert_allclose(np.median(share), 1 - 2.0 ** (-4 * ratio**2), atol=0.02)
    assert_allclose(np.median((found["FLUX_APCOR"] / found["FLUX_TOTAL"]).value), 1, atol=0.02)


def test_fitted_sizes_stay_within_their_limits(draw: Draw) -> None:
    map = draw(size=np.linspace(1.0, 2.0, 16))
    free = catalog(map)["FWHM_2"].value / (2 * BEAM)
    assert free.min() < 1.2
    assert free.max() > 1.7
    options = {"aper_inf": 1.3, "aper_sup": 1.6}
    found = catalog(map, photometry=options)
    sizes = np.array([found["FWHM_1"].value, found["FWHM_2"].value]) / (2 * BEAM)
    bound = found["FLAGS"] & FLAGS.SIZE_ON_BOUND > 0
    once = found["STATUS"] == 1
    assert (sizes[:, once] > 1.29).all()
    assert (sizes[:, once] < 1.61).all()
    assert bound.sum() > 4


def test_peaks_within_aper_inf_of_the_edge_are_dropped(draw: Draw) -> None:
    map = draw(60.0, [5.0, 75.0], [75.0, 75.0])
    assert len(detected(map)) == 2
    assert_array_equal(near(detected(map, photometry={"aper_inf": 2.0}), 75, 75), [True])


# --- Fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", ["ftol", "xtol", "gtol"])
def test_a_loose_tolerance_ends_a_fit_earlier(field: Map, tolerance: str) -> None:
    """Of the three the first that is met ends a fit; the two others are off."""
    off = {"ftol": 0.0, "xtol": 0.0, "gtol": 0.0}
    tight, loose = (
        catalog(field, fit_options={**off, tolerance: value}) for value in (1e-10, 0.05)
    )
    assert loose["NITER"].mean() < tight["NITER"].mean()


def test_the_fit_is_cut_off_after_max_nfev_steps(field: Map) -> None:
    found = catalog(field, fit_options={"max_nfev": 1, "sweeps": 1})
    assert (found["NITER"] <= 1).all()
    assert (catalog(field)["NITER"] > 1).any()


def test_vary_fits_the_positions(field: Map) -> None:
    white = {"model": "white"}  # which starts from the same peaks as a detection alone
    free, fixed = (
        catalog(field, fit_options={"vary": vary}, noise=white) for vary in (True, False)
    )
    assert (free["RA_ERR"] > 0).all()
    assert_array_equal(fixed["RA_ERR"].value, 0.0)
    places = detected(field)
    assert_allclose(fixed["X_PIX"].value, places["X_PIX"].value)
    off = [
        np.mean(
            [
                np.hypot(c["X_PIX"].value - x, c["Y_PIX"].value - y).min()
                for x, y in zip(X, Y, strict=True)
            ]
        )
        for c in (free, fixed)
    ]
    assert off[0] < off[1]


def test_sources_closer_than_the_group_distance_are_fitted_jointly(draw: Draw) -> None:
    map = draw([60.0, 50.0], [60.0, 60.0 + 3 * BEAM], [75.0, 75.0])
    for distance, members in ((2.5, 1), (3.5, 2)):
        found = catalog(map, fit_options={"group_distance_fwhm": distance})
        assert_array_equal(found["CLUSTER"], members)
        assert_array_equal(found["DEBLEND"], members - 1)


def test_a_larger_window_makes_the_background_more_certain(field: Map) -> None:
    small, large = (
        catalog(field, fit_options={"window_fwhm": size}, background={"polynomial_orders": [1]})
        for size in (2.0, 4.0)
    )
    assert np.median(small["FLUX_TOTAL_ERR"] / large["FLUX_TOTAL_ERR"]) > 1.1


def test_a_given_order_is_the_one_that_is_fitted(field: Map) -> None:
    for orders in ([0], [3], [4, 1]):
        found = catalog(field, background={"polynomial_orders": orders})
        assert set(found["POLYN"]) <= set(orders)


@pytest.mark.parametrize(
    ("background", "order"),
    [
        ({"fit_gauss_and_bg_together": False}, -1),
        ({"fit_gauss_and_bg_together": True, "polynomial_orders": [1]}, 1),
        (
            {
                "fit_gauss_and_bg_together": False,
                "fit_gauss_and_bg_separately": True,
                "pol_orders_separate": [2],
            },
            2,
        ),
        (
            {
                "fit_gauss_and_bg_separately": True,
                "pol_orders_separate": [2],
                "polynomial_orders": [0],
            },
            2,
        ),
    ],
    ids=["none", "together", "separately", "both"],
)
def test_the_background_is_fitted_as_the_switches_say(
    field: Map, background: dict[str, object], order: int
) -> None:
    assert_array_equal(catalog(field, background=background)["POLYN"], order)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_joint_background_beats_a_separate_one_on_a_steep_gradient(seed: int, draw: Draw) -> None:
    """36 sources two beams apart; both of order 2, one of few pixels between masked sources."""
    y, x = np.indices((SIDE, SIDE))
    true_x, true_y = (v.ravel() + 50.0 for v in np.meshgrid(7.0 * np.arange(6), 7.0 * np.arange(6)))
    map = draw(40.0, true_x, true_y, plus=0.03 * (x - 75.0) ** 2 + 3.0 * y, seed=seed)
    error = {}
    for way in ("together", "separately"):
        switches = {f"fit_gauss_and_bg_{w}": w == way for w in ("together", "separately")}
        orders = {"polynomial_orders": [2], "pol_orders_separate": [2]}
        found = catalog(map, background={**switches, **orders}, detection={"sigma_thres": 8})
        x_pix, y_pix = found["X_PIX"].value, found["Y_PIX"].value
        row = np.hypot(x_pix[:, None] - true_x, y_pix[:, None] - true_y).argmin(axis=0)
        flux = found["FLUX_TOTAL"][row].to_value("mJy")
        error[way] = np.sqrt(np.mean((flux / 40.0 - 1) ** 2))
    assert error["together"] < 0.03
    assert error["together"] < 0.7 * error["separately"]


@pytest.mark.parametrize(("method", "order"), [("bic", 1), ("nmse", 2)])
def test_the_order_of_a_joint_background_is_chosen(method: str, order: int, draw: Draw) -> None:
    """On a plane; nmse takes the highest."""
    map = draw(plus=np.indices((SIDE, SIDE))[0])
    options = {"min_method": method, "weights": None}
    found = catalog(map, fit_options=options, background={"polynomial_orders": [0, 1, 2]})
    assert np.median(found["POLYN"]) == order


# --- Units, paths and files ----------------------------------------------------------------------


def test_flux_densities_are_in_the_unit_that_is_asked_for(field: Map) -> None:
    jy, mjy = (catalog(field, units={"convert_mJy": convert}) for convert in (False, True))
    for name in ("FLUX", "FLUX_ERR", "FLUX_TOTAL", "FLUX_PEAK", "RESIDUALS", "RMS"):
        assert str(mjy[name].unit) == "m" + str(jy[name].unit)
        assert_allclose(mjy[name].value, 1e3 * jy[name].value, rtol=1e-9)


def test_folders_and_names_of_a_run_are_those_of_the_configuration(
    tmp_path: Path, field: Map
) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    header = field.wcs.to_header()
    header["BUNIT"] = "Jy/beam"
    for name in ("one", "two"):
        fits.writeto(maps / f"{name}.fits", field.data, header)
    (maps / "list.txt").write_text("one.fits\ntwo.fits\n")
    config = config_from_dict(
        {
            "paths": {
                "input": {"dir_maps": "maps"},
                "output": {
                    "dir_root": "results",
                    "dir_table_out": "tables",
                    "dir_region_out": "ds9",
                    "dir_log_out": "records",
                },
            },
            "files": {
                "file_map_name": "list.txt",
                "file_table_base": "fluxes",
                "file_region_base": "marks",
                "file_log_name": "run.txt",
            },
            "survey": {"beam_fwhm_arcsec": 2 * BEAM},
            "control": {"detection_only": True, "parallel_maps": False},
        },
        base_dir=tmp_path,
    )
    result = run_hyper(config)
    assert result.exit_code == 0
    assert [outcome.n_sources for outcome in result.finished] == [len(X)] * 2
    root = tmp_path / "results"
    for name in ("one", "two", "ALL"):
        assert (root / f"tables/fluxes_{name}.csv").is_file()
        assert (root / f"tables/fluxes_{name}.txt").is_file()
    for name in ("one", "two"):
        assert (root / f"ds9/marks_{name}_ellipses.reg").is_file()
        assert (root / f"records/{name}.log").is_file()
    assert (root / "records/run.txt").is_file()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_map_is_drawn_unless_that_is_not_wanted(wanted: bool, tmp_path: Path, field: Map) -> None:
    header = field.wcs.to_header()
    header["BUNIT"] = "Jy/beam"
    fits.writeto(tmp_path / "m.fits", field.data, header)
    flag = "--overview" if wanted else "--no-overview"
    options = ["--detection-only", "--beam", str(2 * BEAM), flag, "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["run", str(tmp_path / "m.fits"), *options])
    assert result.exit_code == 0
    assert (tmp_path / "out/plots/m_overview.png").is_file() == wanted
    assert ("pictures: " in result.stdout) == wanted


@pytest.mark.parametrize(
    ("code", "area"),
    [
        (1, 1.1331 * 5.2**2),
        (2, 1.1331 * 6.8**2),
        (3, 1.1331 * 12.0**2),
        (4, 423.0),
        (5, 751.0),
        (6, 1587.0),
        (7, 1.1331 * 8.0**2),
        (8, 1.1331 * 14.5**2),
    ],
)
def test_the_survey_says_what_a_jansky_per_pixel_is_per_beam(
    tmp_path: Path, field: Map, code: int, area: float
) -> None:
    """Pixels of 2 arcsec: a map in Jy/pixel is its own times the beam's area over 4 arcsec^2."""
    header = field.wcs.to_header()
    header["BUNIT"] = "Jy/pixel"
    fits.writeto(tmp_path / "m.fits", field.data, header)
    map = read_map(tmp_path / "m.fits", survey_code=code)
    assert_allclose(np.median(map.data / field.data), area / 4.0, rtol=1e-3)


def test_the_defaults_are_those_of_an_empty_configuration(field: Map) -> None:
    assert_array_equal(catalog(field)["FLUX"], extract(field, Config()).catalog["FLUX"])
