"""Products of single fits: what they hold, and that they can be drawn again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.wcs import WCS
from matplotlib.image import imread
from numpy.testing import assert_allclose
from typer.testing import CliRunner

from hyperjax import singles
from hyperjax.cli import app
from hyperjax.config_io import config_from_dict
from hyperjax.cutouts import KINDS, PANELS, cutouts, scene_of
from hyperjax.maps import read_map
from hyperjax.pipeline import extract
from hyperjax.products import Layout
from hyperjax.simulation import Simulation, simulate, write_simulation
from hyperjax.singles import write_singles
from hyperjax.survey import SurveyResult, run_hyper

MAP = Simulation(
    shape=(150, 170),
    n_sources=12,
    seed=7,
    unit="MJy/sr",
    blend_fraction=0.3,
    beam_axis_ratio=0.8,
    frame="galactic",
    rotation_deg=25.0,
)
ALL: dict[str, Any] = {
    "background": {"fit_gauss_and_bg_separately": True},
    "fit_options": {"calc_covar": True},
    "fits_output": {f"fits_{kind}": True for kind in KINDS},
    "visualization": {f"visualize_{kind}": True for kind in KINDS},
}


class Finished:
    """A finished run of a map whose name has a space, with all products."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.simulated = simulate(MAP)
        self.path, _ = write_simulation(self.simulated, folder / "a map.fits")
        self.out = folder / "out"
        paths = {"output": {"dir_root": str(self.out)}}
        options = {"files": {"file_map_name": str(self.path)}, "paths": paths, **ALL, **more}
        self.config = config_from_dict(options)
        self.result: SurveyResult = run_hyper(self.config)
        outcome = self.result.outcomes[0]
        assert outcome.ok, outcome.traceback
        self.catalog = QTable.read(outcome.files[0])
        self.files = outcome.files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("singles"))


def test_every_group_and_source_has_its_files(finished: Finished) -> None:
    groups, numbers = np.unique(finished.catalog["GROUP"]), finished.catalog["HYPER_ID"]
    assert groups.min() == 1
    assert 1 < len(groups) < len(numbers)
    for kind, what, wanted in (
        ("fitting", "group", groups),
        ("deblended", "source", numbers),
        ("bg_separate", "group", groups),
    ):
        for folder, suffix in (("fits", "fits"), ("plots", "png")):
            names = {path.name for path in (finished.out / folder / kind).iterdir()}
            assert names == {f"a_map_{what}_{number:04d}.{suffix}" for number in wanted}
            assert not any(" " in name for name in names)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"control": {"detection_only": True}}, "control.detection_only makes no fits"),
        ({"noise": {"model": "white"}}, "none without background.fit_gauss_and_bg_separately"),
    ],
)
def test_products_that_cannot_be_made_are_named(
    options: dict[str, Any],
    words: str,
    finished: Finished,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_from_dict({"fits_output": {"fits_bg_separate": True}, **options})
    assert write_singles(extract(read_map(finished.path), config), tmp_path) == []
    assert [words in record.message for record in caplog.records].count(True) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_product_is_written_alone_and_where_it_is_asked_for(
    kind: str, finished: Finished, tmp_path: Path
) -> None:
    config = config_from_dict(
        {
            "background": {"fit_gauss_and_bg_separately": True},
            "fits_output": {f"fits_{kind}": True, f"fits_output_dir_{kind}": "its/fits"},
            "visualization": {f"visualize_{kind}": True, f"output_dir_{kind}": "its/plots"},
        }
    )
    write_singles(extract(read_map(finished.path), config), tmp_path)
    assert {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("*.*")} == {
        Path("its/fits"),
        Path("its/plots"),
    }
    for folder, own in (("fits", "its/fits"), ("plots", "its/plots")):
        names = {path.name for path in (finished.out / folder / kind).iterdir()}
        assert {path.name for path in (tmp_path / own).iterdir()} == names


@pytest.mark.parametrize("kind", KINDS)
def test_fits_are_on_the_sky_where_the_map_is_in_the_unit_of_the_catalogue(
    finished: Finished, kind: str
) -> None:
    map_ = read_map(finished.path)
    for path in (finished.out / "fits" / kind).iterdir():
        with fits.open(path, checksum=True) as file:
            file.verify("exception")
            assert [hdu.name for hdu in file] == list(PANELS[kind])
            for hdu in file:
                assert u.Unit(hdu.header["BUNIT"]) == u.mJy / u.beam
                assert hdu.header["BMAJ"] * 3600 == pytest.approx(map_.beam.major_arcsec)
                wcs = WCS(hdu.header)
                sky = wcs.pixel_to_world(1, 2)
                x, y = np.rint(map_.wcs.world_to_pixel(sky)).astype(int)
                assert hdu.data.shape == file[0].data.shape
            assert file[0].data[2, 1] == pytest.approx(1e3 * map_.data[y, x], rel=1e-5)


def test_panels_of_a_group_add_up_and_its_model_has_its_flux(finished: Finished) -> None:
    """The residual scatters like the noise; the model's sum is the sum of FLUX_TOTAL."""
    map_ = read_map(finished.path)
    area = map_.pixel_scale_arcsec**2 / map_.beam.area_arcsec2
    background = fits.getdata(finished.out / "fits" / "a map_background.fits")
    for group in np.unique(finished.catalog["GROUP"]):
        path = finished.out / "fits" / "fitting" / f"a_map_group_{group:04d}.fits"
        with fits.open(path) as file:
            fitted, model, residual = (np.asarray(hdu.data, float) for hdu in file[1:])
            x, y = map_.wcs.world_to_pixel(WCS(file[0].header).pixel_to_world(0, 0))
        good = np.isfinite(fitted)
        assert_allclose(residual[good], (fitted - model)[good], atol=2e-3)
        assert 0.7 < np.std(residual[good]) / MAP.rms_mjy_beam < 1.4
        rows = slice(round(float(y)), round(float(y)) + len(model))
        columns = slice(round(float(x)), round(float(x)) + model.shape[1])
        under = 1e3 * background[rows, columns] / map_.native_per_jy_beam
        members = finished.catalog[finished.catalog["GROUP"] == group]
        edge = (members["FLAGS"] & 64) > 0
        if not edge.any():
            total = (model - under).sum() * area
            assert total == pytest.approx(members["FLUX_TOTAL"].value.sum(), rel=0.02)


def test_a_deblended_source_has_its_own_flux(finished: Finished) -> None:
    map_ = read_map(finished.path)
    area = map_.pixel_scale_arcsec**2 / map_.beam.area_arcsec2
    for row in finished.catalog:
        path = finished.out / "fits" / "deblended" / f"a_map_source_{row['HYPER_ID']:04d}.fits"
        with fits.open(path) as file:
            model = np.asarray(file["MODEL"].data, float)
            deblended = np.asarray(file["DEBLENDED"].data, float)
            residual = np.asarray(file["RESIDUAL"].data, float)
            x, y = WCS(file[0].header).world_to_pixel(SkyCoord(row["RA"], row["DEC"]))
        assert_allclose(deblended, model + residual, atol=2e-3)
        assert model.sum() * area == pytest.approx(row["FLUX_TOTAL"].value, rel=0.03)
        middle = model[round(float(y)), round(float(x))]
        assert 0.8 < middle / row["FLUX_PEAK"].value <= 1.0001


def test_a_separate_background_is_that_of_the_truth_within_the_noise(finished: Finished) -> None:
    for path in (finished.out / "fits" / "bg_separate").iterdir():
        with fits.open(path) as file:
            data, masked, smooth, rest = (np.asarray(hdu.data, float) for hdu in file)
            x, y = read_map(finished.path).wcs.world_to_pixel(
                WCS(file[0].header).pixel_to_world(0, 0)
            )
        assert_allclose(rest, data - smooth, atol=2e-3)
        assert 0.02 < np.mean(np.isnan(masked)) < 0.9
        there = np.isfinite(masked)
        assert_allclose(masked[there], data[there])
        rows = slice(round(float(y)), round(float(y)) + len(data))
        columns = slice(round(float(x)), round(float(x)) + data.shape[1])
        true = 1e3 * finished.simulated.background[rows, columns]
        assert abs(np.mean(smooth - true)) < MAP.rms_mjy_beam


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_pictures(kind: str, finished: Finished) -> None:
    for path in (finished.out / "plots" / kind).iterdir():
        image = imread(path)
        assert image.shape[1] > 600
        assert image[..., :3].std() > 0.1


def test_covariances_of_groups_hold_the_errors_of_the_catalogue(finished: Finished) -> None:
    table = Table.read(finished.out / "fits" / "a map_covariance.fits", hdu=1)
    catalog = finished.catalog
    assert sum(table["N_SOURCES"]) == len(catalog)
    for row in table:
        matrix = np.asarray(row["COVARIANCE"]).reshape(row["N_PAR"], row["N_PAR"])
        assert_allclose(matrix, matrix.T, rtol=1e-6, atol=1e-12)
        assert np.linalg.eigvalsh(matrix).min() > -1e-9
        for place, number in enumerate(row["HYPER_ID"]):
            source = catalog[catalog["HYPER_ID"] == number][0]
            assert source["GROUP"] == row["GROUP"]
            peak_err = np.sqrt(matrix[6 * place, 6 * place])
            assert peak_err == pytest.approx(source["FLUX_PEAK_ERR"].value, rel=1e-6)
        order = row["POLYN"]
        assert row["N_PAR"] == 6 * row["N_SOURCES"] + (order + 1) * (order + 2) // 2


def test_several_processes_draw_the_same_pictures(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(singles, "_MANY", 1)
    extraction = extract(read_map(finished.path), finished.config)
    written = singles.write_singles(extraction, tmp_path, workers=2)
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == len(set(pictures)) == sum(1 for _ in tmp_path.rglob("*.png"))
    for path in pictures:
        same = finished.out / path.relative_to(tmp_path)
        assert path.read_bytes() == same.read_bytes()


# --- From a finished run -------------------------------------------------------------------------


def test_the_scene_of_a_finished_run_is_that_of_the_run(finished: Finished) -> None:
    layout = Layout.from_config(finished.config, finished.out)
    assert singles.finished_maps(layout) == ["a map"]
    again = singles.read_scene(layout, "a map")
    once = scene_of(extract(read_map(finished.path), finished.config))
    for kind in KINDS:
        pairs = zip(cutouts(once, kind), cutouts(again, kind), strict=True)
        for first, second in pairs:
            assert first.title == second.title
            assert first.corner == second.corner
            for name in PANELS[kind]:
                assert_allclose(second.images[name], first.images[name], atol=5e-3)


def test_the_command_plot_draws_what_is_asked_for(finished: Finished) -> None:
    picture = finished.out / "plots" / "deblended" / "a_map_source_0003.png"
    picture.unlink()
    result = CliRunner().invoke(app, ["plot", str(finished.out), "--id", "3,5"])
    assert result.exit_code == 0, result.output
    assert picture.is_file()
    assert result.output.count("source_") == 2
    assert 1 <= result.output.count("group_") <= 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--id", "999"], "no source 999; sources go by their HYPER_ID, which is 1 to"),
        (["--id", "x"], "--id x: must be whole numbers"),
        (["--kind", "y"], "--kind y: must be some of fitting, deblended, bg_separate"),
        (["--map", "z"], "not there, or not a finished run"),
    ],
)
def test_the_command_plot_refuses(finished: Finished, more: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plot", str(finished.out), *more])
    assert result.exit_code == 2
    assert message in result.output


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path: Path) -> None:
    path, _ = write_simulation(simulate(MAP), tmp_path / "m.fits")
    extraction = extract(read_map(path), config_from_dict({}))
    assert singles.write_singles(extraction, tmp_path / "out") == []
    assert extraction.covariances is None
    assert extraction.separate is None
