"""Forced photometry: given positions, given sizes, and tables of one band for another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.stats import mad_std
from astropy.table import QTable, Table
from astropy.wcs import WCS
from numpy.testing import assert_allclose, assert_array_equal
from photutils.aperture import SkyEllipticalAperture, aperture_photometry
from typer.testing import CliRunner

from hyperjax.catalog import FLAGS
from hyperjax.cli import app
from hyperjax.config import Config
from hyperjax.config_io import config_from_dict
from hyperjax.errors import ConfigError, MissingFileError
from hyperjax.forced import given_sources, place, read_sources
from hyperjax.maps import Beam, Map, read_map
from hyperjax.pipeline import Extraction, extract
from hyperjax.products import Layout, write_extraction
from hyperjax.simulation import Simulated, Simulation, SkySources, simulate, write_simulation
from hyperjax.sphere import frame_rotation, gaussian_covariance, gaussian_ellipse

BAND_1 = Simulation(
    shape=(260, 280),
    n_sources=50,
    seed=3,
    pixel_arcsec=3.0,
    beam_fwhm_pix=4.0,
    beam_axis_ratio=0.8,
    beam_pa_deg=30.0,
    snr_range=(20.0, 150.0),
    blend_fraction=0.1,
    min_separation_beams=4.0,
)
BAND_2 = Simulation(
    shape=(420, 440),
    n_sources=50,
    seed=4,
    pixel_arcsec=2.5,
    beam_fwhm_pix=8.0,
    unit="MJy/sr",
    frame="galactic",
    rotation_deg=20.0,
    rms_mjy_beam=3.0,
)
FORMATS = {".ecsv": "ecsv", ".txt": "ipac", ".csv": "csv"}


def in_band(sources: SkySources, first: Simulation, second: Simulation) -> SkySources:
    """The same sources seen with another beam."""
    sky = SkyCoord(sources.ra, sources.dec, unit="deg")

    def beam(band: Simulation) -> Any:
        pa = band.beam_pa_deg + frame_rotation(sky.transform_to(band.frame))
        return gaussian_covariance(*band.beam_axes_arcsec, pa)

    shape = gaussian_covariance(sources.fwhm_major, sources.fwhm_minor, sources.pa)
    major, minor, pa = gaussian_ellipse(shape - beam(first) + beam(second))
    return sources._replace(fwhm_major=major, fwhm_minor=minor, pa=pa, flux=3 * sources.flux)


class Bands:
    """Two simulated bands, the extraction of the first, and its tables."""

    def __init__(self, folder: Path) -> None:
        self.first = simulate(BAND_1)
        centre = self.first.wcs.pixel_to_world(139.5, 129.5).galactic
        options = replace(BAND_2, centre_deg=(float(centre.l.deg), float(centre.b.deg)))
        self.second = simulate(options, in_band(self.first.sources, BAND_1, options))
        self.paths = [
            write_simulation(band, folder / f"band{number}.fits")[0]
            for number, band in enumerate((self.first, self.second), start=1)
        ]
        self.reference = extract(read_map(self.paths[0]), Config())
        self.layout = Layout.from_config(Config(), folder / "out")
        write_extraction(self.reference, self.layout, images=False, plots=False)

    def table(self, suffix: str = ".ecsv") -> Path:
        return self.layout.table("band1", suffix)


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Bands:
    return Bands(tmp_path_factory.mktemp("bands"))


def forced_config(table: Path | str, **more: Any) -> Config:
    options: dict[str, Any] = {
        "detection": {
            "use_fixed_source_table": True,
            "fixed_source_table_path": str(table),
            "fixed_peaks": True,
        },
        "photometry": {"fixed_radius": True},
    }
    for section, keys in more.items():
        options[section] = {**options.get(section, {}), **keys}
    return config_from_dict(options)


@pytest.mark.parametrize("beside", [True, False])
def test_a_table_is_beside_the_configuration_or_among_the_results(
    beside: bool, tmp_path: Path
) -> None:
    """In HYPER it is in the folder of the results."""
    places = [tmp_path / "results" / "t.csv"] + [tmp_path / "t.csv"] * beside
    for number, path in enumerate(places):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"ID,RA,DEC\n{number},10.0,20.0\n")
    options = forced_config("t.csv", photometry={"fixed_radius": False}).model_dump()
    options["paths"]["output"]["dir_root"] = "results"
    given = given_sources(config_from_dict(options, base_dir=tmp_path), "icrs")
    assert given is not None
    assert given.label is not None
    assert list(given.label) == [int(beside)]


@pytest.fixture(scope="module")
def forced(bands: Bands) -> Extraction:
    return extract(read_map(bands.paths[1]), forced_config(bands.table()))


def truth_rows(catalog: QTable, simulated: Simulated) -> Any:
    """Row of the truth for each catalogued source."""
    truth = SkyCoord(simulated.sources.ra, simulated.sources.dec, unit="deg")
    index, separation, _ = SkyCoord(catalog["RA"], catalog["DEC"]).match_to_catalog_sky(truth)
    assert np.all(separation.arcsec < 6)
    return index


# --- One band after another ----------------------------------------------------------------------


def test_the_table_of_one_band_is_usable_as_it_is_for_the_next(
    bands: Bands, forced: Extraction
) -> None:
    given, measured = bands.reference.catalog, forced.catalog
    assert len(measured) == len(given) >= 45
    for name in ("HYPER_ID", "FWHM_1", "FWHM_2", "PA"):
        assert_allclose(measured[name], given[name], rtol=1e-12)
    there = SkyCoord(measured["RA"], measured["DEC"])
    assert np.all(there.separation(SkyCoord(given["RA"], given["DEC"])).arcsec < 1e-6)
    assert np.all(measured["STATUS"] == 1)
    assert np.all(measured["FLAGS"] & FLAGS.FORCED)
    assert_array_equal(measured["RA_ERR"].value, 0)


@pytest.mark.parametrize("flux", ["FLUX_TOTAL", "FLUX_APCOR"])
def test_fluxes_in_the_other_band_are_unbiased_whatever_its_beam(
    bands: Bands, forced: Extraction, flux: str
) -> None:
    """The errors do not hold that of the given positions and sizes, so some 2 % of scatter."""
    catalog = forced.catalog
    true = bands.second.sources.flux[truth_rows(catalog, bands.second)] * u.Jy
    ratio = (catalog[flux] / true).to_value("")
    assert abs(np.median(ratio) - 1) < 0.02
    assert mad_std(ratio) < 0.1


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_of_a_catalogue_gives_the_same_sources(bands: Bands, suffix: str) -> None:
    read = read_sources(bands.table(suffix))
    catalog = bands.reference.catalog
    assert_array_equal(read.label, catalog["HYPER_ID"])
    assert np.all(read.position.separation(SkyCoord(catalog["RA"], catalog["DEC"])).arcsec < 1e-6)
    for column, name in zip(read.ellipses, ("FWHM_1", "FWHM_2", "PA"), strict=True):
        assert_allclose(column, catalog[name].value, rtol=1e-9)
    beam = None if suffix == ".csv" else BAND_1.beam_axes_arcsec
    assert (None if read.beam is None else read.beam[:2]) == (beam and pytest.approx(beam))


def test_the_apertures_of_a_chain_of_bands_stay_those_of_the_first(
    bands: Bands, forced: Extraction, tmp_path: Path
) -> None:
    layout = Layout.from_config(Config(), tmp_path)
    write_extraction(forced, layout, images=False, plots=False)
    for suffix in (".ecsv", ".txt"):
        again = read_sources(layout.table("band2", suffix))
        assert again.beam[:2] == pytest.approx(BAND_1.beam_axes_arcsec)
        assert_allclose(again.ellipses.major, bands.reference.catalog["FWHM_1"].value, rtol=1e-9)


def test_positions_from_a_table_and_sizes_fitted(bands: Bands) -> None:
    config = forced_config(bands.table(), photometry={"fixed_radius": False})
    catalog = extract(read_map(bands.paths[1]), config).catalog
    assert_array_equal(catalog["HYPER_ID"], bands.reference.catalog["HYPER_ID"])
    alone = catalog["DEBLEND"] == 0
    true = bands.second.sources.fwhm_major[truth_rows(catalog, bands.second)]
    assert abs(np.median(catalog["FWHM_1"].value[alone] / true[alone]) - 1) < 0.03
    assert np.all(catalog["RA_ERR"].value[alone] == 0)


# --- The aperture --------------------------------------------------------------------------------


def photutils_sums(extraction: Extraction) -> Any:
    """photutils' sums in ellipses on the sky, Jy, on the map without background."""
    catalog, map_ = extraction.catalog, extraction.map
    image = map_.data - extraction.background
    scale = map_.pixel_scale_arcsec**2 / map_.beam.area_arcsec2
    ratio = extraction.config.photometry.fwhm_radius_ratio
    sums = []
    for row in catalog:
        position = SkyCoord(row["RA"], row["DEC"]).transform_to(map_.frame)
        along = SkyCoord(row["RA"], row["DEC"]).directional_offset_by(row["PA"], 1 * u.arcsec)
        pa = position.position_angle(along.transform_to(map_.frame))
        sky = SkyEllipticalAperture(
            position, ratio * row["FWHM_1"], ratio * row["FWHM_2"], theta=pa
        )
        table = aperture_photometry(np.nan_to_num(image), sky, wcs=map_.wcs)
        sums.append(float(table["aperture_sum"][0]) * scale)
    return np.array(sums)


def test_a_fixed_radius_gives_the_sum_of_photutils(forced: Extraction) -> None:
    alone = np.asarray(forced.catalog["DEBLEND"] == 0)
    far = replace(forced, catalog=forced.catalog[alone])
    assert alone.sum() >= 10
    sums = photutils_sums(far) * 1e3
    # the wings of sources outside the group, which are no part of FLUX, are in these sums
    assert_allclose(far.catalog["FLUX"].value, sums, rtol=0.01, atol=0.5)


def test_the_sum_in_a_fixed_ellipse_is_that_of_photutils_to_rounding() -> None:
    map_ = small_map()
    y, x = np.mgrid[:100, :120]
    data = map_.data + 0.05 * np.exp(-((x - 60.3) ** 2 + (y - 49.1) ** 2) / 20)
    sky = map_.wcs.pixel_to_world(60.3, 49.1)
    options = {
        "detection": {"fixed_peaks": True, "xcen_fix": sky.ra.deg, "ycen_fix": sky.dec.deg},
        "photometry": {"fixed_radius": True, "fwhm_1": 24, "fwhm_2": 13, "PA_val": 35},
    }
    result = extract(replace(map_, data=data), config_from_dict(options))
    assert_allclose(result.catalog["FLUX"].value, 1e3 * photutils_sums(result), rtol=1e-6)


def test_one_given_aperture_round_detected_sources(bands: Bands) -> None:
    options = {
        "photometry": {"fixed_radius": True, "fwhm_1": 30, "fwhm_2": 20, "PA_val": 40},
        "control": {"n_cores": 1},
    }
    result = extract(read_map(bands.paths[1]), config_from_dict(options))
    catalog = result.catalog
    assert catalog.meta["aperture"].startswith("FWHM 30 x 20 arcsec, position angle 40 deg")
    alone = np.asarray(catalog["DEBLEND"] == 0)
    centre = SkyCoord(catalog["RA"], catalog["DEC"]).galactic
    along = centre.directional_offset_by(40 * u.deg, 1 * u.arcsec).icrs
    drawn = catalog[alone]
    drawn["FWHM_1"], drawn["FWHM_2"] = 30 * u.arcsec, 20 * u.arcsec
    drawn["PA"] = centre.icrs.position_angle(along)[alone]
    sums = photutils_sums(replace(result, catalog=drawn)) * 1e3
    assert_allclose(catalog["FLUX"].value[alone], sums, rtol=0.01, atol=0.5)
    true = bands.second.sources.flux[truth_rows(catalog[alone], bands.second)] * u.Jy
    assert abs(np.median((catalog["FLUX_APCOR"][alone] / true).to_value("")) - 1) < 0.02


# --- Off the map ---------------------------------------------------------------------------------


def small_map(blank: bool = False) -> Map:
    """Noise of 1 mJy/beam on 100 x 120 pixels, the left third blank if asked for."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [80.0, 20.0], [60.5, 50.5]
    wcs.wcs.cdelt = [-2 / 3600, 2 / 3600]
    data = np.random.default_rng(5).normal(0, 1e-3, (100, 120))
    if blank:
        data[:, :40] = np.nan
    beam = Beam(8.0, 8.0)
    return Map("small", None, data, wcs, beam, u.Jy / u.beam, 1.0, "icrs")


def write_table(path: Path, map_: Map, x: Any, y: Any, fwhm: Any = 8.0, ids: Any = None) -> Path:
    """An IPAC table of HYPER's with sources at pixels of a map."""
    sky = map_.wcs.pixel_to_world(np.asarray(x, float), np.asarray(y, float))
    n = len(x)
    table = Table(
        {
            "ID": np.arange(101, 101 + n) if ids is None else ids,
            "RA": sky.ra.deg,
            "DEC": sky.dec.deg,
            "FWHM_1": np.broadcast_to(fwhm, n),
            "FWHM_2": np.broadcast_to(fwhm, n),
            "PA": np.zeros(n),
        }
    )
    table.write(path, format="ascii.ipac", overwrite=True)
    return path


def test_positions_off_the_map_are_flagged_rows_in_order(tmp_path: Path) -> None:
    map_ = small_map(blank=True)
    x, y = [90, -300, 20, 70, 119.6], [50, 50, 50, 150, 20]
    config = forced_config(write_table(tmp_path / "t.txt", map_, x, y))
    catalog = extract(map_, config).catalog
    assert_array_equal(catalog["HYPER_ID"], [101, 102, 103, 104, 105])
    outside = (np.asarray(catalog["FLAGS"]) & FLAGS.OUTSIDE) > 0
    assert_array_equal(outside, [False, True, True, True, True])
    assert np.all(np.asarray(catalog["FLAGS"])[outside] & FLAGS.NO_DATA)
    assert_array_equal(catalog["STATUS"], [1, -1, -1, -1, -1])
    assert np.isfinite(catalog["FLUX"][0])
    assert np.all(np.isnan(catalog["FLUX"][1:]))
    assert np.all(np.isnan(catalog["FLUX_TOTAL"][1:]))
    assert np.all(np.isnan(catalog["RMS"][1:]))
    assert_allclose(catalog["X_PIX"].value, x, atol=1e-6)
    given = read_sources(tmp_path / "t.txt").position
    assert_allclose(catalog["RA"].value, given.ra.deg, atol=1e-9)
    assert_allclose(catalog["GLAT"].value, given.galactic.b.deg, atol=1e-9)


def test_all_positions_off_the_map(tmp_path: Path) -> None:
    map_ = small_map()
    table = Table({"ID": ["a", "b", "c"], "RA": [80.0, 260.0, 10.0], "DEC": [30.0, -20.0, -89.0]})
    table["FWHM_1"], table["FWHM_2"], table["PA"] = 10.0, 9.0, 30.0
    table.write(tmp_path / "t.csv", format="ascii.csv")
    result = extract(map_, forced_config(tmp_path / "t.csv"))
    catalog = result.catalog
    assert list(catalog["SOURCE_ID"]) == ["a", "b", "c"]
    assert_array_equal(catalog["HYPER_ID"], [1, 2, 3])
    assert np.all(catalog["FLAGS"] & FLAGS.OUTSIDE)
    assert_allclose(catalog["RA"].value, [80, 260, 10])
    assert_allclose(catalog["FWHM_1"].value, 10)
    assert_array_equal(result.model, 0)
    layout = Layout.from_config(Config(), tmp_path)
    for path in write_extraction(result, layout):
        assert path.is_file()
    again = read_sources(layout.table("small"))
    assert list(again.label) == [1, 2, 3]
    assert len(QTable.read(layout.table("small"))) == 3
    assert len(Table.read(layout.table("small", ".txt"), format="ascii.ipac")) == 3


def test_rows_without_a_size(tmp_path: Path) -> None:
    map_ = small_map()
    table = write_table(tmp_path / "t.txt", map_, [30, 60], [40, 50], fwhm=np.array([8.0, np.nan]))
    catalog = extract(map_, forced_config(table)).catalog
    assert_array_equal(np.asarray(catalog["FLAGS"]) & FLAGS.NO_SIZE, [0, FLAGS.NO_SIZE])
    assert_array_equal(np.isfinite(catalog["FLUX"].value), [True, False])


def test_no_source_at_all_gives_an_empty_table(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    path.write_text("ID,RA,DEC,FWHM_1,FWHM_2,PA\n")
    assert len(extract(small_map(), forced_config(path)).catalog) == 0


# --- What is measured where nothing is ------------------------------------------------------------


def test_forced_fluxes_of_nothing_scatter_about_zero_as_their_errors_say() -> None:
    """400 positions in white noise: flux / error has mean 0 and scatter 1, and either sign."""
    wide = small_map()
    data = np.random.default_rng(8).normal(0, 1e-3, (500, 500))
    y, x = (axis.ravel() for axis in np.mgrid[20:480:20j, 20:480:20j])
    sky = wide.wcs.pixel_to_world(x, y)
    map_ = replace(wide, data=data)
    options = {
        "detection": {
            "fixed_peaks": True,
            "xcen_fix": list(sky.ra.deg),
            "ycen_fix": list(sky.dec.deg),
        },
        "photometry": {"fixed_radius": True, "fwhm_1": 8.0},
    }
    catalog = extract(map_, config_from_dict(options)).catalog
    for name in ("FLUX_TOTAL", "FLUX_APCOR", "FLUX"):
        pull = (catalog[name] / catalog[f"{name}_ERR"]).to_value("")
        assert abs(np.mean(pull)) < 4 / np.sqrt(len(pull))
        assert 0.9 < np.std(pull) < 1.15
    assert 0.3 < np.mean(catalog["FLUX_TOTAL"] < 0) < 0.7


def test_two_given_sources_in_one_place_do_not_fail(tmp_path: Path) -> None:
    map_ = small_map()
    table = write_table(tmp_path / "t.txt", map_, [60, 60, 90], [50, 50, 50])
    catalog = extract(map_, forced_config(table)).catalog
    assert len(catalog) == 3
    assert np.isfinite(catalog["FLUX_TOTAL"][2])


@pytest.mark.parametrize(("vary", "moved"), [(None, False), (False, False), (True, True)])
def test_given_positions_move_only_if_asked_to(vary: bool | None, moved: bool) -> None:
    map_ = small_map()
    y, x = np.mgrid[:100, :120]
    sigma = 4.0 / np.sqrt(8 * np.log(2))
    data = map_.data + 0.1 * np.exp(-((x - 60.7) ** 2 + (y - 49.5) ** 2) / (2 * sigma**2))
    sky = map_.wcs.pixel_to_world(60.0, 50.0)
    options = {
        "detection": {"fixed_peaks": True, "xcen_fix": sky.ra.deg, "ycen_fix": sky.dec.deg},
        "fit_options": {} if vary is None else {"vary": vary},
    }
    catalog = extract(replace(map_, data=data), config_from_dict(options)).catalog
    expected = (60.7, 49.5) if moved else (60.0, 50.0)
    found = catalog["X_PIX"][0].value, catalog["Y_PIX"][0].value
    assert_allclose(found, expected, atol=0.05 if moved else 1e-8)


def test_lists_are_in_the_frame_of_the_map(bands: Bands) -> None:
    sky = SkyCoord(bands.second.sources.ra, bands.second.sources.dec, unit="deg").galactic
    options = {
        "detection": {
            "fixed_peaks": True,
            "xcen_fix": list(sky.l.deg[:3]),
            "ycen_fix": list(sky.b.deg[:3]),
        },
        "photometry": {"fixed_radius": True, "fwhm_1": [20, 30, 40], "PA_val": [0, 90, 10]},
    }
    given = given_sources(config_from_dict(options), "galactic")
    assert np.all(given.position.separation(sky[:3]).arcsec < 1e-6)
    assert_allclose(given.ellipses.minor, [20, 30, 40])
    turn = frame_rotation(sky[:3])
    assert_allclose(given.ellipses.pa, (turn + np.array([0, 90, 10])) % 180, atol=1e-3)
    placed = place(given, read_map(bands.paths[1]))
    assert placed.measured.all()


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"detection": {"use_fixed_source_table": True, "fixed_peaks": True}},
            "detection.fixed_source_table_path = null: must be the path of a table",
        ),
        (
            {"detection": {"use_fixed_source_table": True, "fixed_source_table_path": "t"}},
            "detection.fixed_peaks = False: must be true where detection.use_fixed_source_table",
        ),
        (
            {"detection": {"fixed_peaks": True, "xcen_fix": [1, 2], "ycen_fix": [3]}},
            "detection.xcen_fix has 2 values and ycen_fix 1",
        ),
        ({"photometry": {"fixed_radius": True}}, "photometry.fwhm_1 = null: must be a list of"),
        (
            {"photometry": {"fixed_radius": True, "fwhm_1": [5, 6]}},
            "photometry.fwhm_1: has 2 values; must have 1 value",
        ),
        (
            {"photometry": {"fixed_radius": True, "fwhm_1": 5, "fwhm_2": 0.0}},
            "photometry.fwhm_2 = [0.0]: must be > 0 [arcsec]",
        ),
    ],
)
def test_contradictions_are_told_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(options)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ID,RA\n1,2\n", "no column DEC"),
        ("ID,RA,DEC\n1,2,95\n", "DEC from -90 to 90"),
        ("ID,RA,DEC\n1,x,5\n", "the column RA must hold numbers, in deg"),
        ("ID,RA,DEC\n1,,5\n", "must be numbers in every row"),
        ("ID,RA,DEC\n1,2,5\n", "no columns FWHM_1, FWHM_2, PA"),
        ("| a | b\n 1 2\n", "no IPAC, ECSV or CSV table"),
        ("", "no column RA and no column DEC"),
        ("X\n1\n", "no column RA and no column DEC"),
    ],
)
def test_tables_that_are_none_of_sources(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        given_sources(forced_config(path))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such table of sources"):
        given_sources(forced_config(tmp_path / "t.csv"))


# --- The command line ----------------------------------------------------------------------------


def test_the_command_line_takes_a_table(bands: Bands, tmp_path: Path) -> None:
    call = ["run", str(bands.paths[1]), "--sources", str(bands.table(".txt")), "-o", str(tmp_path)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    catalog = QTable.read(tmp_path / "params" / "params_band2.ecsv")
    assert_array_equal(catalog["HYPER_ID"], bands.reference.catalog["HYPER_ID"])
    missing = CliRunner().invoke(app, [*call[:2], "--sources", str(tmp_path / "no.txt")])
    assert missing.exit_code == 2
    assert "no such table of sources" in missing.output
