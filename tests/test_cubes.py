"""Datacubes: their channels are maps, and their backgrounds make a cube like the input."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.wcs import WCS
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from typer.testing import CliRunner

from hyperjax import fitting, survey
from hyperjax.cli import app
from hyperjax.config_io import config_from_dict
from hyperjax.cubes import _without_sources, cube_at, read_channel
from hyperjax.errors import ConfigError, MissingWcsError
from hyperjax.maps import read_map
from hyperjax.simulation import Simulation, simulate
from hyperjax.survey import run_hyper

SHAPE = (90, 100)
CHANNELS = 5
EMPTY, BLANK = 3, 4  # channels without a source, and without a value
SKY = Simulation(shape=SHAPE, n_sources=6, seed=2, noise="white", snr_range=(20.0, 60.0))


class Made:
    """A cube of (Stokes, channel, y, x) with a beam for each channel."""

    def __init__(self, path: Path, unit: str = "Jy/beam", stokes: bool = True) -> None:
        self.path = path
        channels = [simulate(replace(SKY, seed=7 + n)) for n in range(1, CHANNELS + 1)]
        self.backgrounds: list[NDArray[np.float64]] = []
        planes = []
        for number, made in enumerate(channels, start=1):
            smooth = made.background
            plane = made.data
            if number == EMPTY:
                y, x = np.indices(SHAPE)
                smooth = 1e-3 * (2 + 0.05 * x - 0.03 * y)
                plane = smooth + made.noise
            self.backgrounds.append(smooth)
            planes.append(np.full(SHAPE, np.nan) if number == BLANK else plane)
        self.planes = np.array(planes)
        header = channels[0].header.copy()
        header["CTYPE3"], header["CUNIT3"], header["CRPIX3"] = "FREQ", "Hz", 1.0
        header["CRVAL3"], header["CDELT3"] = 100e9, 1e9
        if stokes:
            header["CTYPE4"], header["CRPIX4"], header["CRVAL4"] = "STOKES", 1.0, 1.0
            header["CDELT4"] = 1.0
        header["BUNIT"], header["CASAMBM"] = unit, True
        for key in ("BMAJ", "BMIN", "BPA"):
            header.remove(key)
        data = self.planes[None] if stokes else self.planes
        image = fits.PrimaryHDU(data.astype(np.float32), header)
        major = channels[0].options.beam_fwhm_arcsec * (1 + 0.02 * np.arange(CHANNELS))
        self.major = major
        table = Table(
            {
                "BMAJ": major * u.arcsec,
                "BMIN": major * u.arcsec,
                "BPA": np.zeros(CHANNELS) * u.deg,
                "CHAN": np.arange(CHANNELS, dtype=np.int32),
                "POL": np.zeros(CHANNELS, np.int32),
            }
        )
        beams = fits.BinTableHDU(table, name="BEAMS")
        fits.HDUList([image, beams]).writeto(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("cube") / "c.fits")


def options_for(path: Path, out: Path, **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "files": {"file_map_name": str(path)},
        "paths": {"output": {"dir_root": str(out)}},
        "control": {"datacube": True, "n_cores": 1, "dir_datacube_slices": "slices"},
        "background": {"pol_orders_bkg_no_sources": [0, 1]},
    }
    for section, keys in more.items():
        options[section] = {**options.get(section, {}), **keys}
    return options


class Ran:
    def __init__(self, made: Made, out: Path, **more: Any) -> None:
        self.out = out
        self.result = run_hyper(config_from_dict(options_for(made.path, out, **more)))
        assert self.result.exit_code == 0, [o.traceback for o in self.result.failed]
        self.cube = out / "fits" / "c_background_cube.fits"


@pytest.fixture(scope="module")
def ran(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(made, tmp_path_factory.mktemp("ran"))


# --- Channels ------------------------------------------------------------------------------------


def test_channels_with_data_are_found(made: Made) -> None:
    cube = cube_at(made.path, None)
    assert cube is not None
    assert (cube.channels, cube.usable) == (CHANNELS, (1, 2, 3, 5))
    assert cube.chosen((2, 4)) == [2, 3]
    with pytest.raises(ConfigError, match=r"control\.channels = \[4, 4\]: .* has 5 channels"):
        cube.chosen((4, 4))


@pytest.mark.parametrize("channel", [1, 5])
def test_a_channel_is_a_map_with_its_own_beam(made: Made, channel: int) -> None:
    map_ = read_channel(made.path, channel, config_from_dict({}))
    assert map_.beam.major_arcsec == pytest.approx(made.major[channel - 1])
    assert_allclose(map_.data, made.planes[channel - 1], rtol=1e-6)
    wanted = {"survey": {"beam_fwhm_arcsec": 7.0}}
    assert read_channel(made.path, channel, config_from_dict(wanted)).beam.major_arcsec == 7


def test_messages_name_the_channel(made: Made) -> None:
    channel = read_channel(made.path, 2, config_from_dict({}))
    assert channel.label == str(made.path)
    assert replace(channel, name="c_ch0002").label == f"{made.path} (c_ch0002)"


def test_a_channel_in_kelvin_has_its_own_frequency(tmp_path: Path) -> None:
    made = Made(tmp_path / "k.fits", unit="K", stokes=False)
    for channel in (1, 5):
        map_ = read_channel(made.path, channel, config_from_dict({}))
        kelvin = u.brightness_temperature(
            (99 + channel) * u.GHz, map_.beam.area_arcsec2 * u.arcsec**2
        )
        ratio = (1 * u.K).to_value(u.Jy, kelvin)
        assert_allclose(map_.data, ratio * made.planes[channel - 1], rtol=1e-4)


def test_one_channel_is_read_not_the_cube(tmp_path: Path) -> None:
    path = tmp_path / "large.fits"
    header = simulate(SKY).header
    header["CTYPE3"] = "CHANNEL"
    plane = np.random.default_rng(1).normal(size=(500, 500)).astype(np.float32)
    fits.PrimaryHDU(np.broadcast_to(plane, (60, 500, 500)), header).writeto(path)
    tracemalloc.start()
    map_ = read_channel(path, 60, config_from_dict({}))
    assert cube_at(path, None) is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_allclose(map_.data, plane)
    assert peak < path.stat().st_size / 3


def test_a_cube_with_the_sky_behind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.fits"
    header = simulate(SKY).header
    for key in ("CTYPE", "CRPIX", "CRVAL", "CDELT", "CUNIT"):
        header[f"{key}3"] = header[f"{key}2"]
    header["CTYPE2"], header["CUNIT2"] = "FREQ", "Hz"
    header["CRPIX2"], header["CRVAL2"], header["CDELT2"] = 1.0, 1e11, 1e9
    fits.PrimaryHDU(np.random.default_rng(1).normal(size=(20, 4, 30)), header).writeto(path)
    with pytest.raises(MissingWcsError, match="reorder its axes"):
        cube_at(path, None)


# --- What is measured ----------------------------------------------------------------------------


def test_sources_are_those_of_the_channels_as_maps(made: Made, ran: Ran, tmp_path: Path) -> None:
    header = fits.getheader(made.path)
    for key in list(header):
        if key.endswith(("3", "4")) and key[:-1] in ("CTYPE", "CUNIT", "CRPIX", "CRVAL", "CDELT"):
            header.remove(key)
    for key in ("CASAMBM", "NAXIS3", "NAXIS4"):
        header.remove(key)
    for channel in (1, 5):
        plane = made.planes[channel - 1].astype(np.float32)
        path = tmp_path / f"ch{channel}.fits"
        header["BMAJ"] = header["BMIN"] = made.major[channel - 1] / 3600
        fits.PrimaryHDU(plane, header).writeto(path)
        alone = run_hyper(
            {
                "files": {"file_map_name": str(path)},
                "paths": {"output": {"dir_root": str(tmp_path)}},
                "noise": {"model": "white"},  # as the channels of cubes are fitted
            }
        ).outcomes[0]
        catalog = QTable.read(ran.out / "params" / f"params_c_ch{channel:04d}.ecsv")
        assert alone.catalog is not None
        assert len(catalog) == len(alone.catalog) >= 5
        assert_allclose(catalog["FLUX_TOTAL"].value, alone.catalog["FLUX_TOTAL"].value, rtol=1e-5)


def test_channels_share_batches_and_logs_are_their_own(
    made: Made, ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fits that are alike; what comes out is what channels give one at a time."""
    fitted: dict[str, list[int]] = {"in step": [], "alone": []}
    in_pieces = fitting._in_pieces
    for way, most in (("in step", survey._IN_STEP), ("alone", 1)):

        def counting(fit: Any, sizes: Any, lanes: int, batch: Any, way: str = way) -> Any:
            fitted[way].append(len(batch.data))
            return in_pieces(fit, sizes, lanes, batch)

        monkeypatch.setattr(fitting, "_in_pieces", counting)
        monkeypatch.setattr(survey, "_IN_STEP", most)
        out = Ran(made, tmp_path / way)
        for mine, other in zip(out.result.outcomes, ran.result.outcomes, strict=True):
            assert mine.catalog is not None
            assert other.catalog is not None
            assert mine.log is not None
            for column in ("FLUX_TOTAL", "FLUX_TOTAL_ERR", "FWHM_1", "FLUX"):
                assert_allclose(mine.catalog[column].value, other.catalog[column].value, rtol=1e-7)
            lines = [line for line in mine.log.read_text().splitlines() if "_ch0" in line]
            assert lines
            assert all(mine.name in line for line in lines)
    assert sum(fitted["in step"]) == sum(fitted["alone"])
    assert len(fitted["in step"]) < 0.5 * len(fitted["alone"])


def test_channels_in_step_in_several_processes(made: Made, ran: Ran, tmp_path: Path) -> None:
    several = Ran(made, tmp_path, control={"n_cores": 2, "parallel_maps": True})
    names = [outcome.name for outcome in several.result.outcomes]
    assert names == [outcome.name for outcome in ran.result.outcomes]
    assert several.result.catalog is not None
    assert ran.result.catalog is not None
    fluxes = (result.catalog["FLUX_TOTAL"].value for result in (several.result, ran.result))
    assert_allclose(*fluxes, rtol=1e-7)


def test_the_cube_of_backgrounds_is_like_the_input(made: Made, ran: Ran) -> None:
    with fits.open(ran.cube) as file:
        file.verify("exception")
        header, data = file[0].header, file[0].data
        assert data.shape == (1, CHANNELS, *SHAPE)
        assert header["BUNIT"] == "Jy/beam"
        assert (header["CHAN_1"], header["CHAN_N"]) == (1, CHANNELS)
        before, after = WCS(fits.getheader(made.path)), WCS(header)
        assert_array_equal(file["BEAMS"].data, fits.getdata(made.path, "BEAMS"))
        assert header["CASAMBM"] is True
        corners = ([0, 99], [0, 89], [0, 4], [0, 0])
        assert_allclose(after.all_pix2world(*corners, 0), before.all_pix2world(*corners, 0))
        assert np.isnan(data[0, BLANK - 1]).all()
        for channel in (1, 2, 5):
            smooth = data[0, channel - 1]
            modelled = np.isfinite(smooth)
            assert 0.1 < modelled.mean() < 1
            catalog = QTable.read(ran.out / "params" / f"params_c_ch{channel:04d}.ecsv")
            near = np.rint([catalog["Y_PIX"].value, catalog["X_PIX"].value]).astype(int)
            assert modelled[tuple(near)].all()
            y, x = np.indices(SHAPE)
            distance = np.min(
                [np.hypot(x - s["X_PIX"].value, y - s["Y_PIX"].value) for s in catalog], axis=0
            )
            assert_array_equal(modelled, distance <= catalog.meta["fit_reach_pix"])
            difference = (smooth - made.backgrounds[channel - 1])[modelled]
            assert abs(np.mean(difference)) < 1e-3  # the noise of a pixel


def test_a_channel_without_a_source_has_a_background_of_the_right_order(
    made: Made, ran: Ran
) -> None:
    smooth = fits.getdata(ran.cube)[0, EMPTY - 1]
    assert_allclose(smooth, made.backgrounds[EMPTY - 1], atol=2e-4)
    assert len(QTable.read(ran.out / "params" / f"params_c_ch{EMPTY:04d}.ecsv")) == 0


def test_slices_are_the_channels_of_the_cube(ran: Ran) -> None:
    slices = sorted((ran.out / "slices").iterdir())
    assert [path.name for path in slices] == [
        f"c_ch{channel:04d}_background.fits" for channel in (1, 2, 3, 5)
    ]
    cube = fits.getdata(ran.cube)
    for path in slices:
        channel = int(path.name[4:8])
        assert_array_equal(fits.getdata(path), cube[0, channel - 1])


def test_some_channels_keep_their_place(made: Made, ran: Ran, tmp_path: Path) -> None:
    some = Ran(made, tmp_path, control={"channels": [2, 3], "n_cores": 2})
    data, whole = fits.getdata(some.cube), fits.getdata(ran.cube)
    assert data.shape == whole.shape
    assert_allclose(data[0, 1:3], whole[0, 1:3], rtol=1e-6)
    assert np.isnan(data[0, [0, 3, 4]]).all()
    header = fits.getheader(some.cube)
    assert (header["CHAN_1"], header["CHAN_N"]) == (2, 3)
    assert header["CRPIX3"] == 1.0


def test_the_median_of_a_channel_where_only_order_0_is_asked_for(
    made: Made, tmp_path: Path
) -> None:
    more = {
        "control": {"channels": [EMPTY, EMPTY]},
        "background": {"pol_orders_bkg_no_sources": 0},
    }
    smooth = fits.getdata(Ran(made, tmp_path, **more).cube)[0, EMPTY - 1]
    assert np.ptp(smooth) == 0
    assert smooth[0, 0] == pytest.approx(np.median(made.planes[EMPTY - 1]), abs=1e-4)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize(("slope", "order"), [(0.0, 0), (0.1, 1)])
def test_the_order_of_an_empty_channel_is_the_true_one_in_any_unit(
    scale: float, slope: float, order: int
) -> None:
    """By bic; nmse takes the highest. Hot pixels, which are clipped, have no say in it."""
    orders = {"background": {"pol_orders_bkg_no_sources": [0, 1, 2]}}
    by = {
        method: config_from_dict({**orders, "fit_options": {"min_method": method}})
        for method in ("bic", "nmse")
    }
    for seed in range(8):
        rng = np.random.default_rng(seed)
        data = rng.normal(size=(60, 70)) + slope * np.indices((60, 70))[1]
        data[rng.integers(0, 60, 20), rng.integers(0, 70, 20)] += 30
        bic, nmse = (_without_sources(scale * data, by[name]) / scale for name in ("bic", "nmse"))
        assert (np.ptp(bic) > 0) == (order > 0)
        assert np.abs(np.diff(bic, 2)).max() < 1e-9
        assert np.abs(np.diff(nmse, 2)).max() > 1e-9


def test_a_channel_whose_sources_are_all_off_the_map_has_a_background(
    made: Made, tmp_path: Path
) -> None:
    more = {
        "control": {"channels": [EMPTY, EMPTY]},
        "detection": {"fixed_peaks": True, "xcen_fix": [12.0], "ycen_fix": [3.0]},
    }
    smooth = fits.getdata(Ran(made, tmp_path, **more).cube)[0, EMPTY - 1]
    assert_allclose(smooth, made.backgrounds[EMPTY - 1], atol=2e-4)


def test_where_no_background_is_asked_for_there_is_none(made: Made, tmp_path: Path) -> None:
    more = {"control": {"channels": [1, 1]}, "background": {"fit_gauss_and_bg_together": False}}
    assert np.isnan(fits.getdata(Ran(made, tmp_path, **more).cube)).all()


def test_a_cube_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    header = fits.getheader(Made(tmp_path / "c.fits").path)
    path = tmp_path / "again.fits"
    for number in (4, 2):
        data = np.random.default_rng(1).normal(size=(1, number, *SHAPE))
        fits.PrimaryHDU(data, header).writeto(path, overwrite=True)
        cube = cube_at(path, None)
        assert cube is not None
        assert cube.channels == number


# --- The command line ----------------------------------------------------------------------------


def test_a_cube_on_the_command_line(made: Made, tmp_path: Path) -> None:
    config = tmp_path / "cube.yaml"
    config.write_text("control: {datacube: true, n_cores: 1, channels: [1, 2]}\n")
    call = ["run", str(made.path), "-c", str(config), "-o", str(tmp_path / "o")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "c_ch0001" in result.output
    assert (tmp_path / "o" / "fits" / "c_background_cube.fits").is_file()


def test_a_map_among_cubes_is_a_map(tmp_path: Path) -> None:
    simulated = simulate(SKY)
    path = tmp_path / "m.fits"
    fits.PrimaryHDU(simulated.data, simulated.header).writeto(path)
    assert cube_at(path, None) is None
    outcome = run_hyper(config_from_dict(options_for(path, tmp_path / "out"))).outcomes[0]
    assert (outcome.ok, outcome.name) == (True, "m")
    assert read_map(path).shape == SHAPE
