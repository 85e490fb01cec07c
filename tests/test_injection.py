"""Completeness: injected sources against an independent simulation, statistics of known answer."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import QTable
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from scipy.optimize import approx_fprime
from scipy.special import ndtr, ndtri
from typer.testing import CliRunner

import hyperjax
from hyperjax import injection
from hyperjax.cli import app
from hyperjax.config import Config
from hyperjax.config_io import with_overrides
from hyperjax.errors import ConfigError, MapTooSmallError
from hyperjax.injection import Completeness, Curve, completeness
from hyperjax.injection_products import completeness_figure, write_completeness
from hyperjax.logs import without_warnings
from hyperjax.maps import Map, read_map
from hyperjax.simulation import Simulation, SkySources, simulate, write_simulation

QUIET_SKY = Simulation(
    shape=(256, 240), n_sources=6, seed=5, min_separation_beams=8, gradient=0, structure=0
)


def observed(options: Simulation, folder: Path) -> Map:
    return read_map(write_simulation(simulate(options), folder / "sky.fits", overwrite=True)[0])


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Map:
    return observed(QUIET_SKY, tmp_path_factory.mktemp("sky"))


@pytest.fixture(scope="module")
def result(sky: Map) -> Completeness:
    return completeness(sky, n=400, seed=3)


# --- A whole map ---------------------------------------------------------------------------------


def test_the_noise_of_a_point_source_is_that_of_the_matched_filter(result: Completeness) -> None:
    """In white noise of sigma that is sigma / sqrt(sum g^2), and sum g^2 = pi s^2."""
    size = QUIET_SKY.beam_fwhm_pix / np.sqrt(8 * np.log(2))
    expected = QUIET_SKY.rms_mjy_beam / 1e3 / (np.sqrt(np.pi) * size)
    assert_allclose(result.injections.meta["point_source_noise_jy"], expected, rtol=0.15)


def test_bright_sources_are_found_and_faint_ones_are_not(result: Completeness) -> None:
    table, limit = result.injections, result.limits[0]
    assert table["FOUND"][table["SNR"] > 12].mean() > 0.98
    assert table["FOUND"][table["SNR"] < 2.5].sum() == 0
    assert 5 < limit["SNR"] < 9  # the total flux must be of 5 sigma, whose error is sqrt(2) larger
    assert limit["SNR_LOW"] < limit["SNR"] < limit["SNR_HIGH"] < limit["SNR"] + 1
    noise = result.injections.meta["point_source_noise_jy"] * 1e3
    assert_allclose(limit["FLUX"].to_value(u.mJy) / noise, limit["SNR"], rtol=0.1)
    assert np.all(np.diff(result.limits["FLUX"].value) >= 0)


def test_half_are_found_at_the_threshold_of_a_peak(sky: Map) -> None:
    """Where the brightest pixel decides, the noise of that pixel is as often up as down."""
    config = with_overrides(Config(), {"noise.model": "white"})
    result = completeness(sky, config, n=200, fluxes=(2e-3, 12e-3))
    assert_allclose(result.injections.meta["point_source_noise_jy"], 1e-3, rtol=0.25)
    assert 4 < result.limits["SNR"][0] < 5.5


def test_fluxes_positions_and_sizes_come_back_with_their_errors(result: Completeness) -> None:
    table = result.injections
    off = injection.deviations(table[table["FOUND"] & (table["SNR"] > 10)])
    n = len(off["FLUX"])
    assert n > 100
    assert abs(np.median(off["FLUX"])) < 0.03
    for name in ("FLUX", "RA", "DEC", "FWHM"):
        pull = off[f"PULL_{name}"]
        assert abs(np.median(pull)) < 4 * 1.25 / np.sqrt(n)
        assert 0.8 < np.std(pull[np.abs(pull) < 5]) < 1.25


def test_the_tables_hold_every_source_once(result: Completeness) -> None:
    for table in (result.by_flux, result.by_snr):
        assert table["N"].sum() == 400
        assert table["N_FOUND"].sum() == result.injections["FOUND"].sum()
        assert table["N_DETECTED"].sum() == len(result.detected)
        assert table["N_NEGATIVE"].sum() == len(result.negative)
        share = table["N_FOUND"] / np.maximum(table["N"], 1)
        some = table["N"] > 0
        assert_allclose(table["COMPLETENESS"][some], share[some])


def test_every_column_of_every_table_says_what_it_is(result: Completeness) -> None:
    for table in (result.injections, result.by_flux, result.by_snr, result.limits):
        for column in table.itercols():
            assert column.info.description, column.info.name


def test_the_same_seed_gives_the_same(sky: Map) -> None:
    one, two, other = (completeness(sky, n=20, seed=seed).injections for seed in (1, 1, 2))
    for name in one.colnames:
        assert_array_equal(one[name], two[name])
    assert not np.array_equal(one["X_PIX"], other["X_PIX"])


def test_progress_is_told_of_every_extraction(sky: Map) -> None:
    told: list[tuple[int, int]] = []
    completeness(sky, n=3, progress=lambda *step: told.append(step))
    assert told == [(step, 4) for step in range(5)]


# --- What is injected ----------------------------------------------------------------------------


def test_an_injected_point_source_is_the_beam_on_the_sky(tmp_path: Path) -> None:
    """Against the simulation, which finds pixels from the sky in its own way."""
    options = Simulation(
        shape=(90, 100),
        positions=((40.3, 52.8),),
        frame="galactic",
        centre_deg=(30.0, 40.0),
        rotation_deg=35.0,
        pixel_arcsec=(3.0, 4.0),
        beam_axis_ratio=0.6,
        beam_pa_deg=25.0,
        unit="MJy/sr",
    )
    image = observed(options, tmp_path)
    x, y = np.array([40.3]), np.array([52.8])
    injected = injection._injected(image, x, y, np.array([2.0]), np.array([1.5]))
    major, minor = (1.5 * axis for axis in options.beam_axes_arcsec)
    place = injected.sky
    north = place.galactic.directional_offset_by(options.beam_pa_deg * u.deg, 1 * u.arcmin)
    pa = place.position_angle(north.icrs).deg
    there = SkySources(
        *(np.atleast_1d(v) for v in (place.ra.deg, place.dec.deg, 2.0, major, minor, pa))
    )
    expected = simulate(options, there).model
    drawn = injection._with(replace(image, data=np.zeros(image.shape)), injected).data
    assert_allclose(drawn, expected, atol=2e-4 * expected.max())
    assert_allclose(injected.fwhm, 1.5 * options.beam_fwhm_arcsec, rtol=1e-6)


def test_injected_sources_keep_their_distance(tmp_path: Path) -> None:
    options = replace(QUIET_SKY, border_pix=10, n_holes=4)
    image = observed(options, tmp_path)
    places = injection._Places(image, Config())
    x, y = places.draw(places.at_once, np.random.default_rng(1))
    assert len(x) == places.at_once > 10
    distance = np.hypot(x[:, None] - x, y[:, None] - y) + 1e9 * np.eye(len(x))
    assert distance.min() > 8 * 4
    blank = np.argwhere(np.isnan(image.data))
    nearest = np.hypot(x[:, None] - blank[:, 1], y[:, None] - blank[:, 0]).min()
    assert nearest > 4


# --- Which are found -----------------------------------------------------------------------------


def extraction_of(at: list[tuple[float, float]], flux: list[float]) -> Any:
    """What the matching needs of an extraction: positions in pixels of 1 arcsec, beam of 4."""
    x, y = np.array(at, float).reshape(-1, 2).T
    catalog = QTable({"RA": x / 3600 * u.deg, "DEC": y / 3600 * u.deg})
    catalog["FLUX_TOTAL"] = np.array(flux) * u.Jy
    beam = SimpleNamespace(fwhm_arcsec=4.0)
    return SimpleNamespace(
        map=SimpleNamespace(beam_fwhm_pix=4.0, beam=beam),
        config=with_overrides(Config(), {"units.convert_mJy": False}),
        catalog=catalog,
        fits=SimpleNamespace(x=x, y=y),
    )


REAL = (100.0, 100.0)


@pytest.mark.parametrize(
    ("place", "flux", "after", "found"),
    [
        ((50.0, 50.0), 3.0, [(REAL, 10.0), ((50.5, 50.5), 3.1)], 1),
        ((50.0, 50.0), 3.0, [(REAL, 10.0)], -1),
        ((50.0, 50.0), 3.0, [(REAL, 10.0), ((53.0, 50.0), 3.0)], -1),  # too far off
        ((100.3, 100.0), 1.0, [((100.1, 100.0), 11.0)], -1),  # the real one, a little brighter
        ((100.3, 100.0), 1.0, [((100.3, 100.0), 10.5)], -1),  # the same, nearer to the injected
        ((100.3, 100.0), 30.0, [((100.2, 100.0), 40.0)], 0),  # the injected, a little brighter
        ((100.3, 100.0), 30.0, [((100.0, 100.0), 40.0)], 0),  # the same, nearer to the real one
        ((101.8, 100.0), 1.0, [(REAL, 9.0), ((101.7, 100.0), 1.9)], 1),  # both
    ],
)
def test_one_detection_is_one_source(
    place: tuple[float, float],
    flux: float,
    after: list[tuple[tuple[float, float], float]],
    found: int,
) -> None:
    injected: Any = SimpleNamespace(
        fits=SimpleNamespace(x=np.array([place[0]]), y=np.array([place[1]])),
        flux=np.array([flux]),
        sky=SkyCoord([place[0] / 3600], [place[1] / 3600], unit="deg"),
    )
    before, now = extraction_of([REAL], [10.0]), extraction_of(*map(list, zip(*after, strict=True)))
    row, pieces, confused = injection._recovered(before, now, injected)
    assert row[0] == found
    if place == (50.0, 50.0):
        assert pieces[0] == (found < 0 and len(after) > 1)
    assert confused[0] == (place != (50.0, 50.0))


def test_nothing_is_found_in_an_empty_catalogue() -> None:
    injected: Any = SimpleNamespace(
        fits=SimpleNamespace(x=np.array([9.0]), y=np.array([9.0])),
        flux=np.array([1.0]),
        sky=SkyCoord([0.0], [0.0], unit="deg"),
    )
    nothing = extraction_of([], [])
    row, pieces, _ = injection._recovered(nothing, nothing, injected)
    assert (row[0], pieces[0]) == (-1, 0)


# --- Statistics of known answer ------------------------------------------------------------------


def trials(n: int, ceiling: float = 1.0, seed: int = 1) -> tuple[QTable, NDArray[np.bool_]]:
    """Sources that are found with the probability Phi((log10 flux - 1) / 0.2) x ceiling."""
    random = np.random.default_rng(seed)
    flux = np.geomspace(1, 100, n)
    found = random.random(n) < ceiling * ndtr((np.log10(flux) - 1) / 0.2)
    return QTable({"FLUX_TOTAL": flux * u.mJy, "SNR": flux / 2, "FOUND": found}), found


def test_limits_are_those_of_a_known_curve() -> None:
    off = []
    for seed in range(8):
        limits = injection._limits(trials(1000, seed=seed)[0], seed)
        true = 10 ** (1 + 0.2 * ndtri(limits["FRACTION"]))
        half = np.log(limits["FLUX_HIGH"] / limits["FLUX_LOW"]) / 2
        off.append(np.log(limits["FLUX"].value / true) / half)
        assert_allclose(limits["SNR"], limits["FLUX"].value / 2, rtol=1e-9)
    mean, scatter = np.mean(off, axis=0), np.std(off, axis=0)
    assert np.all(np.abs(mean) < 4 / np.sqrt(8))
    assert np.all((scatter > 0.4) & (scatter < 1.8))


def test_a_limit_that_is_not_reached_is_not_told() -> None:
    limits = injection._limits(trials(1000, ceiling=0.7)[0], 1)
    assert_array_equal(np.isfinite(limits["FLUX"]), [True, False, False, False])


def test_the_likelihood_of_the_curve_has_its_gradient() -> None:
    table, found = trials(300)
    log = np.log(table["FLUX_TOTAL"].value)
    at = np.array([0.9, 2.2, 0.4])
    _, gradient = injection._unlikelihood(at, log, found)
    numerical = approx_fprime(at, lambda params: injection._unlikelihood(params, log, found)[0])
    assert_allclose(gradient, numerical, rtol=1e-4)


@pytest.mark.parametrize("found", [True, False])
def test_where_all_or_none_are_found_there_is_no_limit(found: bool) -> None:
    flux = np.geomspace(1, 10, 50)
    curve = Curve.fitted(flux, np.full(50, found))
    assert np.isnan(curve.where((0.5, 0.9))).all()


def test_shares_have_binomial_intervals() -> None:
    """Wilson (1927): the ends solve |p - k/n| = z sqrt(p (1 - p) / n)."""
    table = QTable({"N": [40, 0, 7]})
    injection._add_share(table, "X", np.array([31, 0, 7]), np.array([40, 0, 7]))
    assert np.isnan(table["X"][1])
    z = ndtri(0.5 + 0.6827 / 2)
    for end in ("X_LOW", "X_HIGH"):
        p = table[end][0]
        assert_allclose(abs(p - 31 / 40), z * np.sqrt(p * (1 - p) / 40), rtol=1e-6)
    assert table["X"][2] == table["X_HIGH"][2] == 1


def test_reliability_counts_the_negative_map(result: Completeness) -> None:
    """Of 10 detections against 3 of the negative in a bin, 7 are taken for real."""
    edges = [*result.by_snr["SNR_FROM"], result.by_snr["SNR_TO"][-1]]
    middle, flux = np.sqrt(edges[3] * edges[4]), 1 * u.mJy
    detected = QTable({"SNR": [middle] * 10 + [1e6], "FLUX_TOTAL": [1.0] * 11 * flux})
    negative = QTable({"SNR": [middle] * 3 + [1e-6], "FLUX_TOTAL": [1.0] * 4 * flux})
    table = injection._binned(result.injections, "SNR", detected, negative)
    assert_allclose(table["RELIABILITY"][3], 0.7)
    assert table["N_DETECTED"][-1] == table["N_NEGATIVE"][0] == 1
    assert np.isnan(table["RELIABILITY"][0])


# --- Files and the command -----------------------------------------------------------------------


def test_the_files_hold_the_result(result: Completeness, tmp_path: Path) -> None:
    files = write_completeness(result, tmp_path)
    assert [path.name for path in files] == [
        "sky_injections.ecsv",
        "sky_by_flux.ecsv",
        "sky_by_snr.ecsv",
        "sky_limits.ecsv",
        "sky_completeness.png",
    ]
    assert sorted(files) == sorted((tmp_path / "completeness").iterdir())
    again = QTable.read(files[1])
    assert_allclose(again["COMPLETENESS"], result.by_flux["COMPLETENESS"])
    assert again["FLUX"].unit == u.mJy
    assert again.meta["seed"] == 3
    assert files[-1].read_bytes().startswith(b"\x89PNG")


def test_a_figure_is_drawn_where_nothing_is_found(sky: Map) -> None:
    nothing = completeness(sky, n=50, fluxes=(1e-6, 2e-6))
    assert nothing.injections["FOUND"].sum() == 0
    assert "50 % are not reached" in nothing.summary()
    assert len(completeness_figure(nothing).axes) == 4


@pytest.mark.parametrize("n", [3, 6])
def test_a_figure_is_drawn_of_few_sources(sky: Map, n: int, tmp_path: Path) -> None:
    """With too few for a median; the file is written all the same."""
    few = completeness(sky, n=n, fluxes=(0.05, 0.2))
    assert few.injections["FOUND"].sum() > 0
    assert "So few tell no more" in few.summary()
    assert "% are found" not in few.summary()
    assert all(path.exists() for path in write_completeness(few, tmp_path))


def test_warnings_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And not with each of the injected maps."""
    path = tmp_path / "tiny.fits"
    assert (
        CliRunner()
        .invoke(app, ["simulate", str(path), "--shape", "30", "30", "--sources", "1"])
        .exit_code
        == 0
    )
    completeness(hyperjax.read_map(path), n=4)
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert said
    assert len(said) == len(set(said))


def test_warnings_of_versions_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hyperjax")
    logger = logging.getLogger("hyperjax.pipeline")
    with without_warnings():
        logger.warning("%s: a bright source at the edge", "one")
        logger.info("%s: done", "one")
    logger.warning("%s: a bright source at the edge", "other")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_noise_of_no_use_is_not_used_here_either(sky: Map, tmp_path: Path) -> None:
    path = tmp_path / "rms.fits"
    fits.writeto(path, np.zeros(sky.shape), sky.wcs.to_header())
    call = ["completeness", str(sky.path), "-n", "4", "-o", str(tmp_path), "--rms-map", str(path)]
    told = CliRunner().invoke(app, call)
    assert told.exit_code == 0, told.output
    assert "zero or negative" in told.stderr
    table = QTable.read(tmp_path / "completeness" / "sky_limits.ecsv")
    for key in ("rms_map_not_used", "noise_model_reason"):
        assert "zero or negative" in table.meta[key]
    assert table.meta["noise_model"] == "white"


def test_the_command_tells_the_limits(sky: Map, tmp_path: Path) -> None:
    call = ["completeness", str(sky.path), "-n", "60", "-o", str(tmp_path), "--sigma", "4"]
    told = CliRunner().invoke(app, call)
    assert told.exit_code == 0, told.output
    assert "60 sources injected" in told.stdout
    assert "50 % are found at" in told.stdout
    limits = QTable.read(tmp_path / "completeness" / "sky_limits.ecsv")
    assert limits.meta["sigma_thres"] == 4
    assert "completeness" in hyperjax.__all__


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--fwhm", "0.5", "1"], "FWHM 0.5 to 1 beams"),
        (["--flux", "3", "1"], "fluxes 3 to 1 mJy"),
        (["-n", "0"], "-n 0"),
    ],
)
def test_wrong_options_get_one_line(sky: Map, args: list[str], words: str) -> None:
    told = CliRunner().invoke(app, ["completeness", str(sky.path), *args])
    assert told.exit_code == 2
    (line,) = told.stderr.splitlines()
    assert words in line


def test_what_makes_no_sense_is_refused(sky: Map, tmp_path: Path) -> None:
    alone = with_overrides(Config(), {"control.detection_only": True})
    with pytest.raises(ConfigError, match=r"control\.detection_only"):
        completeness(sky, alone)
    tiny = replace(sky, data=sky.data[:9, :9])
    with pytest.raises(MapTooSmallError, match="no source can be injected"):
        completeness(tiny)
