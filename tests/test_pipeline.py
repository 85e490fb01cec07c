"""Whole extractions of simulated maps against their truth, and single scenes of the modelling.

A pull is (measured - true) / error. For n sources its mean scatters by 1 / sqrt(n) and the width
from its median absolute deviation by 1.17 / sqrt(n), where the errors are right.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.stats import mad_std
from astropy.table import QTable
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import uniform_filter
from scipy.optimize import least_squares

from hyperjax import modelling
from hyperjax.catalog import COLUMNS, FLAGS
from hyperjax.config import Config
from hyperjax.detection import Detections
from hyperjax.errors import BlankMapError, ConfigError, MapTooSmallError
from hyperjax.fitting import STEP_LIMIT, FitOptions, FitResult, GroupBatch, fit_groups
from hyperjax.maps import Map, read_map
from hyperjax.modelling import model_sources, with_noise
from hyperjax.noise import Correlation
from hyperjax.photometry import model_flux
from hyperjax.pipeline import Extraction, extract
from hyperjax.simulation import (
    Simulated,
    Simulation,
    SkySources,
    render,
    simulate,
    write_simulation,
)
from hyperjax.sources import SourceFits

CASES = {
    "undersampled": Simulation(
        shape=(240, 260), n_sources=100, seed=11, beam_fwhm_pix=2.0, min_separation_beams=6
    ),
    "far from the centre of SIN": Simulation(
        shape=(300, 330),
        n_sources=100,
        seed=12,
        beam_fwhm_pix=3.5,
        unit="Jy/pixel",
        projection="SIN",
        pixel_arcsec=10.0,
        reference_offset_pix=(-7000.0, 4000.0),
        min_separation_beams=5,
    ),
    "Galactic, rotated": Simulation(
        shape=(320, 300),
        n_sources=100,
        seed=13,
        beam_fwhm_pix=3.5,
        beam_axis_ratio=0.8,
        beam_pa_deg=40.0,
        unit="MJy/sr",
        frame="galactic",
        centre_deg=(30.0, 0.5),
        rotation_deg=35.0,
        wcs_matrix="CD",
        min_separation_beams=5,
    ),
    "flipped, not square": Simulation(
        shape=(310, 310),
        n_sources=100,
        seed=14,
        beam_fwhm_pix=3.5,
        unit="K",
        frequency_ghz=100.0,
        frame="fk5",
        flip=True,
        pixel_arcsec=(1.2, 0.9),
        rotation_deg=-20.0,
        centre_deg=(200.0, 60.0),
        min_separation_beams=5,
    ),
    "ten pixels": Simulation(
        shape=(560, 600), n_sources=60, seed=15, beam_fwhm_pix=10.0, min_separation_beams=5
    ),
}
"""White noise, isolated sources, a plane of 4 rms and structure of 1 rms under them."""

IN_ALL = {"snr_range": (15.0, 100.0), "size_range": (1.0, 1.7), "rms_mjy_beam": 3.0}

Observe = Callable[..., tuple[Simulated, Map]]


class Measured(NamedTuple):
    """An extraction, its rows nearest to the sources of the truth, and the truth."""

    simulated: Simulated
    extraction: Extraction
    rows: QTable
    truth: QTable


@pytest.fixture(scope="module")
def observe(tmp_path_factory: pytest.TempPathFactory) -> Observe:
    """Simulate a map, write it, and read it as a user would."""
    folder: Path = tmp_path_factory.mktemp("maps")

    def observe(options: Simulation, sources: SkySources | None = None) -> tuple[Simulated, Map]:
        simulated = simulate(options, sources)
        path, _ = write_simulation(simulated, folder / "map.fits", overwrite=True)
        return simulated, read_map(path)

    return observe


DEFAULTS = Config()
WHITE = Config.model_validate({"noise": {"model": "white"}})


def measure(simulated: Simulated, image: Map, config: Config = DEFAULTS) -> Measured:
    """Extract the sources of a map, and put them into the order of the truth."""
    extraction = extract(image, config)
    found, truth = extraction.catalog, simulated.truth
    assert len(found) > 0
    x, y = found["X_PIX"].value, found["Y_PIX"].value
    distance = np.hypot(x[:, None] - truth["X_PIX"], y[:, None] - truth["Y_PIX"])
    assert (distance.min(axis=0) < 0.5 * simulated.options.beam_fwhm_pix).all()
    return Measured(simulated, extraction, found[distance.argmin(axis=0)], truth)


@pytest.fixture(scope="module")
def measured(observe: Observe) -> dict[str, Measured]:
    """The extraction of every case with the defaults."""
    return {name: measure(*observe(replace(options, **IN_ALL))) for name, options in CASES.items()}


def pulls(case: Measured, name: str, truth: str | None = None) -> NDArray:
    """Pulls (n,) of a column; those of PA across its wrap, of RA and DEC on the sky."""
    rows, true = case.rows, case.truth
    error = rows[f"{name}_ERR"].value
    if name in ("RA", "DEC"):
        sky = [SkyCoord(table["RA"], table["DEC"]) for table in (true, rows)]
        offset = sky[0].spherical_offsets_to(sky[1])[("RA", "DEC").index(name)].arcsec
        return np.asarray(offset / error)
    difference = (rows[name] - true[truth or name].to(rows[name].unit)).value
    if name == "PA":
        difference = (difference + 90) % 180 - 90
    return np.asarray(difference / error)


def elongated(case: Measured) -> NDArray:
    """Sources whose axes differ by much more than their errors."""
    difference = case.truth["FWHM_1"] - case.truth["FWHM_2"]
    error = np.hypot(case.rows["FWHM_1_ERR"], case.rows["FWHM_2_ERR"])
    return np.asarray((difference / error).to_value(u.dimensionless_unscaled) > 6)


def assert_unbiased(pull: NDArray) -> None:
    """The mean pull is 0 within four of its errors."""
    assert abs(pull.mean()) < 4 * pull.std() / np.sqrt(len(pull))


# --- Against the truth ---------------------------------------------------------------------------

EVERY_CASE = pytest.mark.parametrize("name", CASES)


@EVERY_CASE
def test_every_source_is_found_and_nothing_else(name: str, measured: dict[str, Measured]) -> None:
    case = measured[name]
    assert len(case.extraction.catalog) == len(case.truth)
    assert (case.rows["STATUS"] == 1).all()
    assert not (case.rows["FLAGS"] & ~int(FLAGS.UNRESOLVED)).any()
    assert case.extraction.map.beam_fwhm_pix == pytest.approx(
        case.simulated.options.beam_fwhm_pix, rel=0.06
    )


@EVERY_CASE
@pytest.mark.parametrize("flux", ["FLUX_TOTAL", "FLUX_APCOR"])
def test_fluxes_are_unbiased(name: str, flux: str, measured: dict[str, Measured]) -> None:
    """The median relative error of a flux is 0.5 to 3 %, that of the median of all 0.1 to 0.3 %."""
    case = measured[name]
    assert_unbiased(pulls(case, flux, "FLUX_TOTAL"))
    ratio = (case.rows[flux] / case.truth["FLUX_TOTAL"]).to_value(u.dimensionless_unscaled)
    assert np.median(ratio) == pytest.approx(1.0, abs=0.01)


@EVERY_CASE
@pytest.mark.parametrize("column", ["RA", "DEC", "FLUX_PEAK"])
def test_positions_and_peaks_are_unbiased(
    name: str, column: str, measured: dict[str, Measured]
) -> None:
    assert_unbiased(pulls(measured[name], column))


@EVERY_CASE
@pytest.mark.parametrize("column", ["FWHM_1", "FWHM_2", "PA"])
def test_shapes_of_elongated_sources_are_unbiased(
    name: str, column: str, measured: dict[str, Measured]
) -> None:
    case = measured[name]
    assert elongated(case).sum() >= 15
    assert_unbiased(pulls(case, column)[elongated(case)])


@EVERY_CASE
def test_areas_of_all_sources_are_unbiased(name: str, measured: dict[str, Measured]) -> None:
    """Of a round source noise makes the major axis longer and the minor one shorter."""
    rows, truth = measured[name].rows, measured[name].truth
    ratio = (rows["FWHM_1"] / truth["FWHM_1"] * (rows["FWHM_2"] / truth["FWHM_2"])).value
    assert np.median(ratio) == pytest.approx(1.0, abs=0.015)


@EVERY_CASE
def test_the_noise_is_that_of_the_map(name: str, measured: dict[str, Measured]) -> None:
    """It is told from some hundred beams round each place, so that it scatters."""
    rms = measured[name].rows["RMS"].to_value(u.mJy / u.beam)
    assert_allclose(np.median(rms), IN_ALL["rms_mjy_beam"], rtol=0.05)
    assert np.percentile(np.abs(rms / IN_ALL["rms_mjy_beam"] - 1), 90) < 0.25
    # the spectrum is averaged over modes, of which a wide beam has few above the structure
    off = 0.25 if name == "ten pixels" else 0.08
    assert np.median(measured[name].rows["CHI2_RED"]) == pytest.approx(1.0, abs=off)


@EVERY_CASE
def test_all_positions_of_a_row_are_the_same_place(
    name: str, measured: dict[str, Measured]
) -> None:
    rows, image = measured[name].extraction.catalog, measured[name].extraction.map
    sky = SkyCoord(rows["RA"], rows["DEC"])
    galactic = SkyCoord(rows["GLON"], rows["GLAT"], frame="galactic")
    pixels = image.wcs.pixel_to_world(rows["X_PIX"].value, rows["Y_PIX"].value)
    assert sky.separation(galactic).arcsec.max() < 1e-6
    assert sky.separation(pixels.icrs).arcsec.max() < 1e-6


@pytest.mark.parametrize("column", ["FLUX_TOTAL", "FLUX_APCOR", "RA", "DEC", "FWHM_1", "PA"])
def test_errors_are_as_large_as_the_deviations(column: str, measured: dict[str, Measured]) -> None:
    """All cases together: 460 sources, half of them elongated; the width has an error of 0.08."""
    pooled = []
    for case in measured.values():
        use = elongated(case) if column in ("FWHM_1", "PA") else np.ones(len(case.rows), bool)
        truth = "FLUX_TOTAL" if column == "FLUX_APCOR" else None
        pooled.append(pulls(case, column, truth)[use])
    width = mad_std(np.concatenate(pooled))
    assert 0.8 < width < 1.25


# --- The images ----------------------------------------------------------------------------------


def near_sources(case: Measured, beams: float) -> NDArray:
    """Pixels closer to a source than some beam FWHM."""
    y, x = np.indices(case.extraction.map.shape)
    reach = beams * case.simulated.options.beam_fwhm_pix
    near = np.zeros(x.shape, bool)
    for x0, y0 in zip(case.truth["X_PIX"], case.truth["Y_PIX"], strict=True):
        near |= np.hypot(x - x0, y - y0) < reach
    return near


@EVERY_CASE
def test_data_are_model_and_background_and_residual(
    name: str, measured: dict[str, Measured]
) -> None:
    image = measured[name].extraction
    total = image.model + image.background + image.residual
    assert_allclose(total, image.map.data, rtol=0, atol=1e-12 * np.abs(image.map.data).max())


@EVERY_CASE
def test_the_residual_is_noise(name: str, measured: dict[str, Measured]) -> None:
    """Under the sources too: its mean is 0, its rms that of the noise, its pixels independent.

    A fit takes the noise of its p parameters out of its N pixels: the rms falls by sqrt(1 - p/N),
    and neighbouring pixels become anticorrelated by some p/N.
    """
    case = measured[name]
    near = near_sources(case, 2.0)
    residual = case.extraction.residual / (IN_ALL["rms_mjy_beam"] * 1e-3)
    order = case.rows["POLYN"]
    share = np.sum(6 + (order + 1) * (order + 2) / 2) / near.sum()
    error = 1 / np.sqrt(near.sum())
    assert abs(residual[near].mean()) < 4 * error
    assert np.std(residual[near]) == pytest.approx(np.sqrt(1 - share), abs=0.015)
    both = near[:, 1:] & near[:, :-1]
    lag = np.mean(residual[:, 1:][both] * residual[:, :-1][both])
    assert abs(lag) < share + 4 * error


# --- What must not matter ------------------------------------------------------------------------

FIELD = Simulation(
    shape=(210, 220),
    n_sources=34,
    seed=22,
    beam_fwhm_pix=3.5,
    blend_fraction=0.3,
    min_separation_beams=1.3,
    snr_range=(15.0, 80.0),
    rms_mjy_beam=1.0,
)
BEAM_AREA_PIX = np.pi / (4 * np.log(2)) * 3.5**2
BRIGHTNESSES = [column.name for column in COLUMNS if column.unit and u.Jy in column.unit.bases]
UNITLESS = [column.name for column in COLUMNS if column.name not in (*BRIGHTNESSES, "MAP_ID")]


@pytest.fixture(scope="module")
def field(observe: Observe) -> Measured:
    """A map with blends."""
    return measure(*observe(FIELD))


def assert_same(one: QTable, other: QTable, names: list[str], factor: float = 1.0) -> None:
    """Equal columns, but for a factor and for rounding."""
    assert len(one) == len(other)
    for name in names:
        values, expected = (np.asarray(getattr(t[name], "value", t[name])) for t in (one, other))
        rtol = 1e-2 if name == "BIC" else 1e-4  # a difference, which may be about 0
        assert_allclose(values, factor * expected, rtol=rtol, atol=1e-7 * factor, err_msg=name)


def test_a_constant_added_to_the_map_changes_its_background_only(field: Measured) -> None:
    image = field.extraction.map
    shifted = extract(replace(image, data=image.data + 10.0))
    plain = field.extraction.catalog
    others = [name for name in BRIGHTNESSES if name != "RESIDUALS"]
    assert_same(shifted.catalog, plain, [n for n in UNITLESS + others if n != "NMSE"])
    difference = (shifted.catalog["RESIDUALS"] - plain["RESIDUALS"]).to_value(u.Jy / u.beam)
    assert_allclose(difference, 10.0, rtol=1e-6)
    assert_allclose(shifted.residual, field.extraction.residual, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_factor_multiplies_the_brightness_and_nothing_else(
    field: Measured, factor: float
) -> None:
    image, plain = field.extraction.map, field.extraction.catalog
    scaled = extract(replace(image, data=factor * image.data)).catalog
    assert_same(scaled, plain, BRIGHTNESSES, factor)
    assert_same(scaled, plain, UNITLESS)


def test_the_same_sky_in_two_projections_has_the_same_fluxes(observe: Observe) -> None:
    """Without noise. Pixels of the first map differ by 1 % in area, those of the second do not."""
    options = replace(
        FIELD,
        n_sources=20,
        blend_fraction=0.0,
        min_separation_beams=4,
        noise="none",
        structure=0.0,
        gradient=0.0,
        pixel_arcsec=30.0,
        projection="SIN",
        reference_offset_pix=(-1400.0, 800.0),
        unit="Jy/pixel",
    )
    manual = {"use_manual_rms": True, "rms_value": 1e-3, "rms_unit": "Jy/beam"}
    config = Config.model_validate({"detection": manual})
    first = measure(*observe(options), config)
    centre = first.simulated.wcs.pixel_to_world(110.0, 105.0).galactic
    other = replace(
        options,
        shape=(320, 330),
        projection="TAN",
        reference_offset_pix=(0.0, 0.0),
        frame="galactic",
        centre_deg=(centre.l.deg, centre.b.deg),
        rotation_deg=40.0,
        flip=True,
        unit="MJy/sr",
    )
    second = measure(*observe(other, first.simulated.sources), config)
    for column in ("FLUX_TOTAL", "FLUX_APCOR", "FLUX_PEAK", "FWHM_1", "FWHM_2"):
        true = first.truth["FLUX_TOTAL" if column == "FLUX_APCOR" else column]
        assert_allclose(first.rows[column], true, rtol=1e-4)
        assert_allclose(second.rows[column], true, rtol=1e-4)
    places = [SkyCoord(case.rows["RA"], case.rows["DEC"]) for case in (first, second)]
    assert places[0].separation(places[1]).arcsec.max() < 0.01
    assert_allclose(second.rows["PA"].value, first.rows["PA"].value, atol=0.1)


# --- Options of the whole ------------------------------------------------------------------------


EMPTY = replace(FIELD, n_sources=0, shape=(70, 60))
CORRELATED = Simulation(
    shape=(300, 300), n_sources=40, snr_range=(15, 80), min_separation_beams=4.0, noise="beam"
)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"control": {"detection_only": True}},
        {"background": {"fit_gauss_and_bg_separately": True}},
        {"background": {"fit_gauss_and_bg_separately": True, "fix_min_box": 0}},
    ],
)
def test_a_map_without_sources_gives_an_empty_catalogue(
    config: dict[str, dict[str, object]], observe: Observe
) -> None:
    simulated, image = observe(EMPTY)
    result = extract(image, Config.model_validate(config))
    assert len(result.catalog) == 0
    assert result.catalog.colnames == [column.name for column in COLUMNS]
    assert not result.model.any()
    assert np.std(result.residual) == pytest.approx(1e-3, rel=0.1)
    assert_allclose(result.background + result.residual, simulated.data, atol=1e-15)


def test_the_background_of_a_wide_beam_is_smooth_over_four_beams(observe: Observe) -> None:
    """No wider than that, as with a beam of fewer pixels: else structure stays in the residual."""
    options = replace(EMPTY, beam_fwhm_pix=10.0, shape=(200, 210))
    _, image = observe(options)
    result = extract(image)
    side = 41  # the odd number of pixels above four beams
    assert len(result.catalog) == 0
    inside = (slice(side, -side),) * 2
    expected = uniform_filter(image.data, side)[inside]
    assert_allclose(result.background[inside], expected, atol=1e-9)


def test_detection_only_gives_the_peaks_without_fits(field: Measured) -> None:
    image = field.extraction.map
    found = extract(image, Config.model_validate({"control": {"detection_only": True}}))
    rows = found.catalog
    assert 0 < len(rows) <= len(field.extraction.catalog)
    assert (rows["STATUS"] == -1).all()
    assert (rows["FLAGS"] & FLAGS.NOT_FITTED).all()
    assert_array_equal(rows["X_PIX"].value, found.detections.x)
    assert_allclose(rows["FLUX_PEAK"].to_value(u.Jy / u.beam), found.detections.peak)
    for name in ("FLUX_TOTAL", "FLUX_TOTAL_ERR", "FWHM_1", "PA"):
        assert np.isnan(rows[name]).all()
    assert not found.model.any()


def test_a_manual_noise_is_taken_as_it_is(field: Measured) -> None:
    manual = {"detection": {"use_manual_rms": True, "rms_value": 2e-3, "rms_unit": "Jy/beam"}}
    result = extract(field.extraction.map, Config.model_validate(manual))
    assert_array_equal(result.rms, 2e-3)
    assert_allclose(result.catalog["RMS"].to_value(u.mJy / u.beam), 2.0)
    assert (result.detections.peak >= 5 * 2e-3).all()
    measured = extract(field.extraction.map, WHITE)
    automatic = measured.catalog[: len(result.catalog)]
    ratio = result.catalog["FLUX_TOTAL_ERR"] / automatic["FLUX_TOTAL_ERR"]
    assert_allclose(ratio, 2e-3 / measured.rms[0, 0], rtol=0.02)


@pytest.mark.parametrize(
    ("unit", "in_mjy", "factor"),
    [
        ("Jy/beam", True, 1.0),
        ("mJy/beam", True, 1e-3),
        ("Jy/pixel", True, BEAM_AREA_PIX),
        ("mJy/pixel", False, 1e-3 * BEAM_AREA_PIX),
        (None, True, 1e-3 * BEAM_AREA_PIX),
        (None, False, BEAM_AREA_PIX),
    ],
)
def test_a_manual_noise_has_its_unit(
    unit: str | None, in_mjy: bool, factor: float, field: Measured
) -> None:
    """Without one it is HYPER's: that of a pixel, and so many times less than that of a beam."""
    manual = {"use_manual_rms": True, "rms_value": 2e-3 / factor, "rms_unit": unit}
    only = {"detection": manual, "units": {"convert_mJy": in_mjy}}
    config = Config.model_validate({**only, "control": {"detection_only": True}})
    assert_allclose(extract(field.extraction.map, config).rms, 2e-3, rtol=1e-3)


def flux_and_peak_pulls(options: Simulation, observe: Observe, config: Config) -> NDArray:
    """(measured - true) / error of total fluxes and of peaks (2, n)."""
    found = measure(*observe(options), config)
    names = ("FLUX_TOTAL", "FLUX_PEAK")
    pulls = [(found.rows[n] - found.truth[n]) / found.rows[f"{n}_ERR"] for n in names]
    return np.array([pull.to_value(u.dimensionless_unscaled) for pull in pulls])


@pytest.mark.parametrize("model", ["auto", "white"])
def test_errors_in_noise_that_neighbouring_pixels_share(model: str, observe: Observe) -> None:
    """Of 120 sources, in either way; errors for white noise would be half as large."""
    config = Config.model_validate({"noise": {"model": model}})
    maps = [replace(CORRELATED, seed=seed) for seed in (1, 2, 3)]
    pulls = np.concatenate([flux_and_peak_pulls(o, observe, config) for o in maps], axis=1)
    assert_allclose(pulls.std(axis=1), 1, atol=0.2)


def test_the_catalogue_tells_what_the_noise_is(field: Measured, observe: Observe) -> None:
    meta = field.extraction.catalog.meta
    assert meta["noise_model"] == "correlated"
    assert meta["noise_correlation_fwhm_pix"] == 0
    assert meta["sigma_thres"] == 5
    assert (meta["residual_peaks"], meta["edge_peaks"]) == (0, 0)
    _, image = observe(CORRELATED)
    meta = extract(image).catalog.meta
    assert meta["noise_model"] == "correlated"
    assert (
        3.5 < meta["noise_correlation_fwhm_pix"] < 5.7
    )  # sqrt(2) beams, less what the filter took


def test_a_path_is_no_map() -> None:
    with pytest.raises(TypeError, match=r"read_map\(path\)"):
        extract("map.fits")  # type: ignore[arg-type]


def test_a_manual_noise_below_all_rounding_is_refused(field: Measured) -> None:
    manual = {"detection": {"use_manual_rms": True, "rms_value": 1e-200}}
    with pytest.raises(ConfigError, match=r"detection\.rms_value = 1e-200: .*rounding"):
        extract(field.extraction.map, Config.model_validate(manual))


def test_a_map_smaller_than_the_filter_is_refused(observe: Observe) -> None:
    _, image = observe(replace(EMPTY, shape=(14, 200)))
    with pytest.raises(MapTooSmallError, match=r"map\.fits: .*kernel_size_pix"):
        extract(image)
    smaller = Config.model_validate({"detection": {"kernel_size_pix": 13}})
    assert len(extract(image, smaller).catalog) == 0


def test_a_map_without_noise_is_refused_with_the_remedy(field: Measured) -> None:
    data = np.zeros_like(field.extraction.map.data)
    data[100, 100] = 1.0
    with pytest.raises(BlankMapError, match="use_manual_rms"):
        extract(replace(field.extraction.map, data=data))


def test_rows_are_numbered_by_their_signal_to_noise(field: Measured) -> None:
    rows = field.extraction.catalog
    assert_array_equal(rows["HYPER_ID"], np.arange(1, len(rows) + 1))
    assert (np.diff(rows["SNR"]) <= 0).all()
    assert_allclose(rows["SNR"], field.extraction.detections.snr)
    assert_array_equal(rows["DEBLEND"], rows["CLUSTER"] > 1)
    assert 2 <= rows["CLUSTER"].max() <= len(rows)


def test_each_step_is_timed(field: Measured) -> None:
    assert all(seconds >= 0 for seconds in field.extraction.seconds.values())
    assert {"fit", "images", "errors", "photometry", "catalogue"} <= set(field.extraction.seconds)


def test_blank_pixels_stay_blank_and_count_nowhere(observe: Observe) -> None:
    """Holes within a beam of sources: the fluxes stay unbiased, and the images blank there."""
    options = replace(
        FIELD, n_sources=40, shape=(200, 210), blend_fraction=0.0, min_separation_beams=4
    )
    simulated, image = observe(options)
    data = image.data.copy()
    x, y = (np.rint(simulated.truth[name]).astype(int) for name in ("X_PIX", "Y_PIX"))
    for row, column in zip(y, x, strict=True):
        data[row - 1 : row + 3, column + 3 : column + 8] = np.nan
    case = measure(simulated, replace(image, data=data))
    blank = np.isnan(data)
    assert_array_equal(np.isnan(case.extraction.residual), blank)
    assert_array_equal(np.isnan(case.extraction.rms), blank)
    assert np.isfinite(case.extraction.model).all()
    for column in ("FLUX_TOTAL", "FLUX_APCOR"):
        pull = pulls(case, column, "FLUX_TOTAL")
        assert_unbiased(pull)
        assert np.std(pull) < 1.4


# --- Scenes of the modelling ---------------------------------------------------------------------

BEAM = 3.5
SIGMA = BEAM / np.sqrt(8 * np.log(2))
NO_BACKGROUND = {"background": {"fit_gauss_and_bg_together": False}}


class Scene(NamedTuple):
    """Gaussians (n,) in pixels, and an image of them."""

    peak: NDArray
    x: NDArray
    y: NDArray
    sigma_major: NDArray
    sigma_minor: NDArray
    theta: NDArray
    data: NDArray

    @property
    def flux(self) -> NDArray:
        """Integrals over the pixels."""
        return 2 * np.pi * self.peak * self.sigma_major * self.sigma_minor


def scene(
    shape: tuple[int, int],
    peak: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    size: ArrayLike = 1.1,
    *,
    beam: float = BEAM,
    noise: float = 1.0,
    seed: int = 0,
) -> Scene:
    """Sources of some sizes (in beams) with random ellipticity, in white noise."""
    rng = np.random.default_rng(seed)
    peak, x, y, size = (np.array(v, float) for v in np.broadcast_arrays(peak, x, y, size))
    sigma = size * beam / np.sqrt(8 * np.log(2))
    stretch, theta = rng.uniform(1.0, 1.1, x.shape), rng.uniform(0, np.pi, x.shape)
    image = render(shape, x, y, peak, sigma * stretch, sigma / stretch, theta)
    data = image + noise * rng.standard_normal(shape)
    return Scene(peak, x, y, sigma * stretch, sigma / stretch, theta, data)


def fit(
    sources: Scene,
    *,
    beam: float = BEAM,
    offset: float = 0.3,
    rms: float = 1.0,
    again: bool = True,
    **config: dict[str, object],
) -> SourceFits:
    """Model a scene as an extraction does, from positions that are off by up to `offset` pixels.

    The first fit masks neighbours; what comes out of it is where the second starts (`again`).
    """
    options = Config.model_validate(config)
    rng = np.random.default_rng(9)
    x, y = (v + rng.uniform(-offset, offset, v.shape) for v in (sources.x, sources.y))
    peak, level = sources.peak, np.full(len(x), rms)
    found = Detections(x, y, peak, peak / rms, level, np.zeros(len(x)))
    noise = np.where(np.isfinite(sources.data), rms, np.nan)
    modelled = model_sources(sources.data, noise, found, beam, options)
    if again:
        modelled = model_sources(sources.data, noise, found, beam, options, modelled.fits)
    linear = options.fit_options.loss == "linear"
    return with_noise(modelled, noise, Correlation.white()).fits if linear else modelled.fits


def flux_pulls(sources: Scene, fits: SourceFits) -> NDArray:
    """(measured - true) / error of the total fluxes."""
    flux, error = model_flux(fits)
    return (flux - sources.flux) / error


def on_grid(count: int, spacing: float, seed: int = 1) -> tuple[NDArray, NDArray]:
    """Positions (count^2,) on a grid, off by up to half a pixel."""
    shift = np.random.default_rng(seed).uniform(-0.5, 0.5, (2, count**2))
    x, y = spacing * (np.indices((count, count)).reshape(2, -1) + 0.75) + shift
    return x, y


def companions(distance: float, ratio: float) -> Scene:
    """Pairs of sources `distance` beams apart; the second of each is `ratio` times as bright."""
    x, y = on_grid(7, 45.0)
    angle = np.random.default_rng(2).uniform(0, 2 * np.pi, x.size)
    x = np.concatenate([x, x + distance * BEAM * np.cos(angle)])
    y = np.concatenate([y, y + distance * BEAM * np.sin(angle)])
    return scene((330, 330), np.repeat([30.0, 30.0 * ratio], x.size // 2), x, y)


def halves(values: NDArray) -> tuple[NDArray, NDArray]:
    """Of companions: the fainter ones and the brighter ones."""
    faint, bright = np.split(values, 2)
    return faint, bright


def test_both_of_a_close_pair_are_unbiased() -> None:
    """1.2 beams apart: a group of two, fitted jointly."""
    pairs = companions(1.2, 2.0)
    fits = fit(pairs)
    assert (fits.group_size == 2).all()
    assert (fits.status == 1).all()
    pull = flux_pulls(pairs, fits)
    for half in halves(pull):
        assert_unbiased(half)
    assert 0.7 < mad_std(pull) < 1.35  # 98 sources: an error of 0.12


@pytest.mark.parametrize("weights", ["null", "inverse_rms"])
def test_errors_of_a_robust_loss_are_those_of_its_efficiency(weights: str) -> None:
    """In Gaussian noise huber at k = 1 has an efficiency of 0.903 (Huber 1981, section 4.5)."""
    x, y = on_grid(6, 40.0)
    sources = scene((280, 280), 40.0, x, y)
    linear, huber = (
        model_flux(fit(sources, fit_options={"loss": loss, "f_scale": 1.0, "weights": weights}))[1]
        for loss in ("linear", "huber")
    )
    assert_allclose(np.median(huber / linear), 0.903**-0.5, rtol=0.03)


def test_two_sweeps_take_the_neighbours_outside_the_group_out() -> None:
    """Companions 2.6 beams away are not linked; those ten times as bright bias the first fit."""
    pairs = companions(2.6, 10.0)
    first = flux_pulls(pairs, fit(pairs, again=False))
    one, two = (flux_pulls(pairs, fit(pairs, fit_options={"sweeps": n})) for n in (1, 2))
    joint = flux_pulls(pairs, fit(pairs, fit_options={"group_distance_fwhm": 4.0}))
    assert halves(first)[0].mean() < -3
    assert abs(halves(one)[1].mean()) > 0.7
    for half in halves(two):
        assert_unbiased(half)
    assert np.abs(two - joint).mean() < 0.5 * np.abs(one - joint).mean()


def residual_of(sources: Scene, values: NDArray) -> NDArray:
    """What parameters (6 n,) of sources leave of a scene: (pixel,)."""
    peak, *others = values.reshape(6, -1)
    x, y, major, minor, theta = others
    return (sources.data - render(sources.data.shape, x, y, peak, major, minor, theta)).ravel()


def least_squares_fit(sources: Scene, start: NDArray | None = None) -> NDArray:
    """Parameters (6, n) of all sources of a scene at once, by scipy, from the truth if no other."""
    first = np.concatenate(sources[:6]) if start is None else start.ravel()
    scale = np.concatenate(
        [sources.peak, np.ones(4 * len(sources.x)), 0.3 * np.ones_like(sources.x)]
    )
    residual = functools.partial(residual_of, sources)
    solution = least_squares(residual, first, x_scale=scale, method="lm")
    return np.asarray(solution.x.reshape(6, -1))


def deviations(fits: SourceFits, reference: NDArray) -> NDArray:
    """Difference (5, n) from reference parameters in units of the error; sizes sorted, no angle."""
    peak, x, y, *sigmas, _ = reference
    major, minor = np.sort(sigmas, axis=0)[::-1]
    error = np.sqrt(np.diagonal(fits.covariance, axis1=1, axis2=2)[:, :5].T)
    return (np.stack(fits[:5]) - [peak, x, y, major, minor]) / error


@pytest.fixture(scope="module")
def cluster() -> tuple[Scene, NDArray]:
    """Twenty sources 1.8 beams apart, more than the engine takes at once, and their joint fit."""
    x, y = np.indices((5, 4)).reshape(2, -1) * 4.5 + 15.0
    peak = np.random.default_rng(5).uniform(20, 60, 20)
    sources = scene((43, 48), peak, x, y, beam=2.5)
    return sources, least_squares_fit(sources)


def test_a_group_of_twelve_is_fitted_jointly() -> None:
    """To an optimum that is at least as good as that which scipy finds from the truth."""
    x, y = np.indices((4, 3)).reshape(2, -1) * 3.2 + 14.0
    peak = np.random.default_rng(4).uniform(20, 60, 12)
    sources = scene((36, 38), peak, x, y, beam=2.5)
    fits = fit(sources, beam=2.5, **NO_BACKGROUND)
    assert (fits.group_size == 12).all()
    own = np.stack(fits[:6])
    assert np.abs(deviations(fits, least_squares_fit(sources, own))).max() < 0.02
    chi2 = [np.sum(residual_of(sources, p) ** 2) for p in (own, least_squares_fit(sources))]
    assert chi2[0] <= chi2[1] * (1 + 1e-6)


def test_blocks_of_a_large_group_are_close_to_the_joint_fit(
    cluster: tuple[Scene, NDArray],
) -> None:
    sources, joint = cluster
    fits = fit(sources, beam=2.5, **NO_BACKGROUND)
    assert (fits.group_size == 20).all()
    assert np.median(np.abs(deviations(fits, joint))) < 0.1
    assert np.abs(deviations(fits, joint)).max() < 2


def test_blocks_of_a_large_group_converge_to_the_joint_fit(
    cluster: tuple[Scene, NDArray],
) -> None:
    sources, joint = cluster
    fits = fit(sources, beam=2.5, fit_options={"sweeps": 10}, **NO_BACKGROUND)
    assert np.abs(deviations(fits, joint)).max() < 0.05


def test_positions_stay_where_they_are_if_they_must_not_vary() -> None:
    x, y = on_grid(4, 30.0)
    sources = scene((120, 120), 50.0, x, y)
    fits = fit(sources, offset=0.0, fit_options={"vary": False})
    assert_array_equal(fits.x, sources.x)
    assert_array_equal(fits.y, sources.y)
    assert not fits.covariance[:, 1:3].any()
    pull = flux_pulls(sources, fits)
    assert abs(pull.mean()) < 4 / np.sqrt(len(pull))


def test_parameters_that_end_on_a_bound_are_flagged() -> None:
    x, y = on_grid(2, 60.0)
    sources = scene((120, 120), 50.0, x, y, [1.0, 2.5, 1.0, 1.0], noise=0.01)
    start = sources._replace(x=sources.x + np.array([0, 0, 2.5, 0]))
    fits = fit(
        start,
        offset=0.0,
        rms=0.01,
        fit_options={"position_range_fwhm": 0.1},
        photometry={"aper_sup": 1.5},
    )
    assert fits.flags[0] == fits.flags[3] == 0
    assert fits.flags[1] & FLAGS.SIZE_ON_BOUND
    assert fits.sigma_minor[1] == pytest.approx(1.5 * SIGMA)
    assert fits.flags[2] & FLAGS.POSITION_ON_BOUND
    assert fits.x[2] == pytest.approx(start.x[2] - 1.0)


def test_a_peak_is_not_negative() -> None:
    """Where a source was said to be and a dip is, the peak ends at 0."""
    x, y = on_grid(2, 60.0)
    dip = scene((120, 120), [50.0, 50.0, -50.0, 50.0], x, y)
    fits = fit(dip._replace(peak=np.abs(dip.peak)))
    assert fits.peak[2] == 0
    assert_array_equal(fits.flags & FLAGS.PEAK_ON_BOUND > 0, [False, False, True, False])


def test_a_fit_that_runs_out_of_steps_has_failed_and_says_so() -> None:
    x, y = on_grid(2, 60.0)
    sources = scene((120, 120), 50.0, x, y)
    fits = fit(sources, fit_options={"max_nfev": 1, "sweeps": 1})
    assert not fits.status.any()
    assert (fits.flags & FLAGS.STEP_LIMIT).all()


def test_what_does_not_converge_is_tried_again_within_wider_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second group fails while its bounds are the usual ones."""
    x, y = on_grid(2, 60.0)
    sources = scene((120, 120), 50.0, x, y)
    usual = BEAM / np.sqrt(8 * np.log(2)) * 4  # aper_sup

    def fit_groups_stubbornly(
        batch: GroupBatch, options: FitOptions, *, highest_order: int
    ) -> FitResult:
        result = fit_groups(batch, options, highest_order=highest_order)
        middle = batch.start[:, 0, 1] + batch.start[:, 0, 2]
        stubborn = (middle == middle.max()) & (batch.upper[:, 0, 3] < 1.5 * usual)
        return result._replace(status=np.where(stubborn, STEP_LIMIT, result.status))

    monkeypatch.setattr(modelling, "fit_groups", fit_groups_stubbornly)
    fits = fit(sources)
    assert sorted(fits.status) == [1, 1, 1, 2]
    pull = flux_pulls(sources, fits)
    assert np.abs(pull).max() < 4


@pytest.mark.parametrize("place", [(0.0, 30.2), (-0.45, 40.0), (30.0, 79.4), (79.3, 79.3)])
def test_a_source_half_outside_the_map_is_whole_in_the_model(place: tuple[float, float]) -> None:
    """Without noise its flux is exact, with a quarter of its pixels as with all."""
    sources = scene((80, 80), 50.0, [place[0]], [place[1]], noise=1e-3)
    fits = fit(sources, rms=1e-3)
    assert fits.status == 1
    assert model_flux(fits)[0] == pytest.approx(sources.flux, rel=2e-3)
    assert np.abs(flux_pulls(sources, fits)).max() < 4


def test_blank_pixels_over_half_a_source_leave_the_flux_unbiased() -> None:
    x, y = on_grid(7, 30.0)
    sources = scene((220, 220), 50.0, x, y)
    for column, row in zip(x, y, strict=True):
        edge = round(float(column)) + 2
        sources.data[round(float(row)) - 8 : round(float(row)) + 9, edge : edge + 6] = np.nan
    pull = flux_pulls(sources, fit(sources))
    assert abs(pull.mean()) < 4 * pull.std() / 7
    assert 0.75 < mad_std(pull) < 1.3


def test_a_source_without_any_valid_pixel_keeps_its_start() -> None:
    x, y = on_grid(2, 60.0)
    sources = scene((120, 120), 50.0, x, y)
    row, column = round(float(y[1])), round(float(x[1]))
    sources.data[max(row - 14, 0) : row + 15, max(column - 14, 0) : column + 15] = np.nan
    fits = fit(sources, offset=0.0)
    assert fits.status[1] == 0
    assert fits.x[1] == sources.x[1]
    assert (np.delete(fits.status, 1) == 1).all()
    assert np.abs(np.delete(flux_pulls(sources, fits), 1)).max() < 4
