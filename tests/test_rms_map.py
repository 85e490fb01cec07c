"""A given map of the noise: errors and weights where it varies fivefold, units, and bad files."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from typer.testing import CliRunner

from hyperjax.cli import app
from hyperjax.config import Config
from hyperjax.config_io import config_from_dict, load_config
from hyperjax.errors import ConfigError, HyperjaxError, MissingFileError, RmsMapError
from hyperjax.maps import Map, read_map, read_noise
from hyperjax.pipeline import Extraction, extract
from hyperjax.simulation import Simulated, Simulation, simulate

GRID = tuple((26.0 + 32.3 * i, 25.0 + 32.7 * j) for i in range(9) for j in range(9))
SHAPE = (310, 310)
NOISE = 1e-3 * np.broadcast_to(np.geomspace(1.0, 5.0, SHAPE[1]), SHAPE)
AT = np.array(GRID)


class Sky(NamedTuple):
    """A map whose noise rises fivefold from left to right, on disk, and what it is made of."""

    folder: Path
    simulated: Simulated
    image: Map


def write(path: Path, data: NDArray, header: fits.Header) -> Path:
    fits.writeto(path, np.asarray(data, np.float64), header, overwrite=True)
    return path


def of_noise(unit: str = "Jy/beam", **options: object) -> Simulated:
    beam = 4.0
    flux = tuple(30e-3 * np.geomspace(1.0, 5.0, SHAPE[1])[np.rint(AT[:, 0]).astype(int)])
    return simulate(
        Simulation(
            shape=SHAPE,
            positions=GRID,
            fluxes=flux,
            shapes=((1.3 * beam, 1.1 * beam, 30.0),) * len(GRID),
            beam_fwhm_pix=beam,
            gradient=0,
            structure=0,
            rms_mjy_beam=1.0,
            seed=21,
            unit=unit,  # type: ignore[arg-type]
            **options,  # type: ignore[arg-type]
        )
    )


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Sky:
    folder = tmp_path_factory.mktemp("rms")
    simulated = of_noise()
    data = simulated.model + simulated.noise * NOISE / 1e-3
    write(folder / "sky.fits", data, simulated.header)
    write(folder / "rms.fits", NOISE, simulated.header)
    return Sky(folder, simulated, read_map(folder / "sky.fits"))


def with_noise(path: Path, model: str) -> Config:
    return config_from_dict({"noise": {"rms_map": str(path), "model": model}})


def in_order(result: Extraction) -> tuple[QTable, NDArray[np.bool_], NDArray]:
    """The catalogue, whether its rows are in the half of low noise, and pulls of the peaks."""
    rows = result.catalog
    place = np.column_stack([rows["X_PIX"].value, rows["Y_PIX"].value])
    distance = np.linalg.norm(place[:, None] - AT, axis=2)
    near = distance.argmin(axis=1)
    rows, near = rows[distance.min(axis=1) < 2], near[distance.min(axis=1) < 2]
    flux = 30.0 * np.geomspace(1.0, 5.0, SHAPE[1])[np.rint(AT[near, 0]).astype(int)]
    pull = (rows["FLUX_TOTAL"].value - flux) / rows["FLUX_TOTAL_ERR"].value
    return rows, AT[near, 0] < SHAPE[1] / 2, pull


@pytest.mark.parametrize("model", ["auto", "white"])
def test_a_given_noise_makes_the_errors_right_everywhere(sky: Sky, model: str) -> None:
    result = extract(sky.image, with_noise(sky.folder / "rms.fits", model))
    rows, low, pull = in_order(result)
    assert len(rows) >= 79
    assert len(result.catalog) <= 82
    sound = np.abs(pull) < 5
    assert np.sum(~sound) <= 1  # a false companion
    for half in (low & sound, ~low & sound):
        assert abs(np.mean(pull[half])) < 4 / np.sqrt(half.sum())
        assert 0.75 < np.std(pull[half]) < 1.3
    true = NOISE[0, np.rint(rows["X_PIX"].value).astype(int)] * 1e3
    rtol = 0.15 if model == "auto" else 0.02  # a detection may be the pixel beside
    assert_allclose(rows["RMS"].value, true, rtol=rtol)
    assert_allclose(result.rms / np.median(result.rms), NOISE / np.median(NOISE), rtol=1e-9)


def test_the_catalogue_says_which_noise_was_given(sky: Sky) -> None:
    path = sky.folder / "rms.fits"
    meta = extract(sky.image, with_noise(path, "auto")).catalog.meta
    assert (meta["rms_map"], meta["rms_map_kind"]) == (str(path), "rms")
    assert_allclose(meta["rms_map_factor"], 1, atol=0.05)
    assert_allclose(meta["rms_jy_beam"], np.median(NOISE), rtol=0.05)
    assert "noise_model_reason" not in meta
    assert "rms_map" not in extract(sky.image).catalog.meta


@pytest.mark.parametrize(
    ("given", "model", "words"),
    [
        (1000 * NOISE, "auto", "only the variation"),
        (1000 * NOISE, "white", "threshold, weights and errors"),
        (NOISE[:, ::-1], "auto", "varies by a factor of"),
        (np.full(SHAPE, 2e-3), "auto", "varies by a factor of"),
    ],
)
def test_noise_that_the_map_does_not_have_is_told(
    sky: Sky, given: NDArray, model: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(sky.folder / "other.fits", given, sky.simulated.header)
    meta = extract(sky.image, with_noise(path, model)).catalog.meta
    (said,) = [one for one in (r.getMessage() for r in caplog.records) if "given image of" in one]
    assert words in said
    if "varies" not in words:
        assert_allclose(meta["rms_map_factor"], 1e-3, rtol=0.2)
    caplog.clear()
    extract(sky.image, with_noise(sky.folder / "rms.fits", model))
    assert not [r for r in caplog.records if "given image of" in r.getMessage()]


def test_noise_that_comes_with_the_map_is_told(sky: Sky) -> None:
    meta = extract(replace(sky.image, rms=NOISE)).catalog.meta
    assert (meta["rms_map"], meta["rms_map_kind"]) == ("came with the map", "rms")


def test_what_the_image_holds_is_told_on_the_command_line(sky: Sky) -> None:
    path = write(sky.folder / "weight.fits", NOISE**-2, sky.simulated.header)
    call = ["run", str(sky.folder / "sky.fits"), "-o", str(sky.folder / "out_weight")]
    told = CliRunner().invoke(app, [*call, "--rms-map", str(path), "--rms-kind", "weight"])
    assert told.exit_code == 0, told.output
    table = QTable.read(sky.folder / "out_weight/params/params_sky.ecsv")
    assert table.meta["rms_map_kind"] == "weight"
    assert not told.stderr


def test_one_noise_for_all_is_wrong_where_it_varies(sky: Sky) -> None:
    _, low, pull = in_order(extract(sky.image, config_from_dict({"noise": {"model": "white"}})))
    assert np.std(pull[low]) < 0.8
    assert np.std(pull[~low]) > 1.2


@pytest.mark.parametrize(("model", "ratio"), [("auto", 1.0), ("white", 2.0)])
def test_what_the_strength_of_a_given_noise_means(sky: Sky, model: str, ratio: float) -> None:
    """In correlated noise a factor comes from the map; independent pixels have what is given."""
    double = write(sky.folder / "double.fits", 2 * NOISE, sky.simulated.header)
    one, two = (
        extract(sky.image, with_noise(path, model)) for path in (sky.folder / "rms.fits", double)
    )
    errors = [
        float(np.median(result.catalog["FLUX_TOTAL_ERR"].value[:20])) for result in (one, two)
    ]
    assert_allclose(errors[1] / errors[0], ratio, rtol=0.02)


def test_sources_are_found_by_the_local_noise(sky: Sky) -> None:
    """Peaks of 3 times the noise everywhere are below the threshold everywhere."""
    faint = sky.image.data - (1 - 0.15) * sky.simulated.model
    config = with_noise(sky.folder / "rms.fits", "white")
    plain = config_from_dict({"noise": {"model": "white"}})
    image = replace(sky.image, data=faint)
    assert len(extract(image, config).catalog) <= 6
    assert len(extract(image, plain).catalog) != len(extract(image, config).catalog)


def test_pixels_without_noise_are_blank(sky: Sky) -> None:
    holed = np.where(np.arange(SHAPE[1]) < 60, np.nan, NOISE)
    path = write(sky.folder / "holed.fits", holed, sky.simulated.header)
    result = extract(sky.image, with_noise(path, "white"))
    assert np.isnan(result.residual[:, :60]).all()
    assert np.isfinite(result.residual[:, 60:]).all()
    assert result.catalog["X_PIX"].value.min() > 60


@pytest.mark.parametrize(
    ("of_map", "of_rms", "factor"),
    [
        ("Jy/beam", "mJy/beam", 1e3),
        ("Jy/pixel", "Jy/beam", 1.0),
        ("Jy/pixel", "", None),
        ("MJy/sr", "Jy/beam", 1.0),
        ("K", "Jy/beam", 1.0),
    ],
)
def test_units_are_converted(
    of_map: str, of_rms: str, factor: float | None, tmp_path: Path
) -> None:
    simulated = of_noise(of_map, frequency_ghz=230.0)
    image = read_map(write(tmp_path / "m.fits", simulated.data, simulated.header))
    header = simulated.header.copy()
    header["BUNIT"] = of_rms
    if not of_rms:
        del header["BUNIT"]
    scale = image.native_per_jy_beam if factor is None else factor
    path = write(tmp_path / "rms.fits", NOISE * scale, header)
    assert_allclose(read_noise(path, image), NOISE, rtol=1e-6)


@pytest.mark.parametrize(("kind", "power"), [("variance", 2.0), ("weight", -2.0)])
def test_variances_and_weights_are_noise(kind: str, power: float, sky: Sky) -> None:
    """In another unit: weights have none, and variances that of the map, squared."""
    image = replace(sky.image, native_per_jy_beam=1e3)
    header = sky.simulated.header.copy()
    del header["BUNIT"]
    path = write(sky.folder / f"{kind}.fits", (1e3 * NOISE) ** power, header)
    found = read_noise(path, image, kind=kind)
    factor = 1.0 if kind == "variance" else np.median(NOISE) / np.median(found)
    assert_allclose(factor * found, NOISE, rtol=1e-6)


@pytest.mark.parametrize("model", ["auto", "white"])
def test_a_coverage_says_where_the_noise_is_strong(sky: Sky, model: str) -> None:
    """As good as the noise itself; what was never looked at is blank."""
    seen = NOISE**-2 * 17.0
    seen[:, :30] = 0
    path = write(sky.folder / "coverage.fits", seen, sky.simulated.header)
    noise = {"rms_map": str(path), "rms_kind": "weight", "model": model}
    result = extract(sky.image, config_from_dict({"noise": noise}))
    rows, _, pull = in_order(result)
    assert (rows["X_PIX"].value > 30).all()
    assert len(rows) >= 70
    assert np.std(pull[np.abs(pull) < 5]) == pytest.approx(1, abs=0.25)
    rms = result.rms[:, 40:]
    assert_allclose(rms / NOISE[:, 40:], 1, atol=0.05 if model == "white" else 0.15)
    assert np.isnan(result.rms[:, :30]).all()


def test_the_noise_in_an_extension_of_the_map(sky: Sky) -> None:
    hdus = [
        fits.PrimaryHDU(sky.image.data, sky.simulated.header),
        fits.ImageHDU(NOISE, sky.simulated.header, name="ERROR"),
    ]
    path = sky.folder / "both.fits"
    fits.HDUList(hdus).writeto(path, overwrite=True)
    config = config_from_dict({"noise": {"rms_hdu": "ERROR", "model": "white"}})
    assert_allclose(extract(read_map(path), config).rms, NOISE)
    with pytest.raises(HyperjaxError, match="NOTHERE"):
        extract(read_map(path), config_from_dict({"noise": {"rms_hdu": "NOTHERE"}}))
    out = sky.folder / "of_extension"
    options = ["--rms-hdu", "ERROR", "--detection-only", "--no-overview", "-o", str(out)]
    assert CliRunner().invoke(app, ["run", str(path), *options]).exit_code == 0
    assert_allclose(fits.getdata(out / "fits/both_rms.fits"), NOISE, rtol=1e-6)
    with pytest.raises(ConfigError, match="comes from no file"):
        extract(replace(sky.image, path=None), config)


def test_noise_without_coordinates_lies_on_the_pixels_of_the_map(sky: Sky) -> None:
    path = sky.folder / "bare.fits"
    hdus = [fits.PrimaryHDU(sky.image.data, sky.simulated.header), fits.ImageHDU(NOISE)]
    fits.HDUList(hdus).writeto(path, overwrite=True)
    assert_allclose(read_noise(path, read_map(path), 1), NOISE)
    other = sky.folder / "cut.fits"
    fits.HDUList([hdus[0], fits.ImageHDU(NOISE[1:])]).writeto(other, overwrite=True)
    with pytest.raises(RmsMapError, match="310 x 309 pixels"):
        read_noise(other, read_map(other), 1)


@pytest.mark.parametrize("filling", [0.0, -1.0])
@pytest.mark.parametrize("model", ["auto", "white"])
def test_what_the_noise_is_where_the_map_is_blank_does_not_matter(
    filling: float, model: str, sky: Sky
) -> None:
    blank = np.arange(SHAPE[1]) < 190
    image = replace(sky.image, data=np.where(blank, np.nan, sky.image.data))
    path = write(sky.folder / "f.fits", np.where(blank, filling, NOISE), sky.simulated.header)
    rows = extract(image, with_noise(path, model)).catalog
    there = extract(image, with_noise(sky.folder / "rms.fits", model)).catalog
    assert len(rows) == len(there) > 20
    assert_allclose(rows["FLUX_TOTAL"].value, there["FLUX_TOTAL"].value, rtol=1e-9)


def test_variances_have_units(sky: Sky) -> None:
    header = sky.simulated.header.copy()
    header["BUNIT"] = "mJy2/beam2"
    path = write(sky.folder / "v.fits", (1e3 * NOISE) ** 2, header)
    assert_allclose(read_noise(path, sky.image, kind="variance"), NOISE, rtol=1e-6)
    header["BUNIT"] = "m/s"
    path = write(sky.folder / "v.fits", NOISE**2, header)
    with pytest.raises(HyperjaxError, match="brightness"):
        read_noise(path, sky.image, kind="variance")


def test_an_image_of_the_noise_that_cannot_be_used_is_refused() -> None:
    for noise, control, words in (
        ({"rms_kind": "weight"}, {}, "there is no image"),
        ({"rms_hdu": 1}, {"datacube": True}, "does not go with control.datacube"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_from_dict({"noise": noise, "control": control})


def test_one_value_everywhere_is_a_noise(sky: Sky) -> None:
    path = write(sky.folder / "flat.fits", np.full(SHAPE, 2e-3), sky.simulated.header)
    assert_allclose(read_noise(path, sky.image), 2e-3)


def broken(sky: Sky, name: str) -> Path:
    header, noise = sky.simulated.header.copy(), NOISE.copy()
    if name == "shape":
        noise = noise[:100]
    elif name == "grid":
        header["CRPIX1"] += 3
    elif name == "zeros":
        noise[:, :50] = 0
    elif name == "negative":
        noise[7, 7] = -1
    elif name == "unit":
        header["BUNIT"] = "furlong"
    return write(sky.folder / f"{name}.fits", noise, header)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shape", "310 x 100 pixels"),
        ("grid", "3 pixels off"),
        ("zeros", "zero or negative in 15500 pixels"),
        ("negative", "zero or negative in 1 pixels"),
    ],
)
def test_noise_that_does_not_go_with_the_map_is_not_used(
    sky: Sky, name: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, the fit of pixels, and the reason in the table's metadata."""
    path = broken(sky, name)
    with caplog.at_level("WARNING"):
        result = extract(sky.image, with_noise(path, "auto"))
    (said,) = [record.getMessage() for record in caplog.records if words in record.getMessage()]
    assert str(path) in said
    assert "not used" in said
    assert result.catalog.meta["noise_model"] == "white"
    assert words in result.catalog.meta["rms_map_not_used"]
    plain = extract(sky.image, Config(noise={"model": "white"}))
    assert_allclose(result.catalog["FLUX_TOTAL"], plain.catalog["FLUX_TOTAL"])
    assert "rms_map_not_used" not in plain.catalog.meta


def test_a_run_with_noise_that_is_not_used_says_so(sky: Sky) -> None:
    path = broken(sky, "zeros")
    out = ["-o", str(sky.folder / "out_zeros"), "--rms-map", str(path)]
    told = CliRunner().invoke(app, ["run", str(sky.folder / "sky.fits"), *out])
    assert told.exit_code == 0
    assert "zero or negative in 15500 pixels" in told.stderr
    assert "white" in told.stdout
    table = QTable.read(sky.folder / "out_zeros/params/params_sky.ecsv")
    assert "zero or negative" in table.meta["rms_map_not_used"]


def test_a_bad_file_is_refused_in_one_line(sky: Sky) -> None:
    path = broken(sky, "unit")
    with pytest.raises(HyperjaxError, match="furlong") as error:
        extract(sky.image, with_noise(path, "auto"))
    assert str(path) in str(error.value)
    out = ["-o", str(sky.folder / "out"), "--rms-map", str(path)]
    told = CliRunner().invoke(app, ["run", str(sky.folder / "sky.fits"), *out])
    assert told.exit_code == 3
    (line,) = told.stderr.splitlines()
    assert line.startswith("error: ")
    assert "furlong" in line


def test_a_file_that_is_not_there_is_named(sky: Sky) -> None:
    with pytest.raises(MissingFileError, match="nowhere"):
        extract(sky.image, with_noise(Path("/nowhere.fits"), "auto"))


def test_the_path_is_relative_to_the_configuration(sky: Sky) -> None:
    path = sky.folder / "c.yaml"
    path.write_text("noise:\n  rms_map: rms.fits\n  model: white\n")
    result = extract(sky.image, load_config(path))
    assert_allclose(result.rms, NOISE)
    assert result.map.rms is not None


def test_two_noises_contradict_each_other() -> None:
    for noise in ({"rms_map": "a.fits"}, {"rms_hdu": 1}):
        both = {"noise": noise, "detection": {"use_manual_rms": True}}
        with pytest.raises(ConfigError, match="does not go with"):
            config_from_dict(both)


def test_given_positions_have_the_given_noise(sky: Sky) -> None:
    lon, lat = sky.image.wcs.wcs_pix2world(AT[:3, 0], AT[:3, 1], 0)
    config = config_from_dict(
        {
            "noise": {"rms_map": str(sky.folder / "rms.fits")},
            "detection": {
                "fixed_peaks": True,
                "xcen_fix": [*lon.tolist(), 0.0],
                "ycen_fix": [*lat.tolist(), 0.0],
            },
        }
    )
    rows = extract(sky.image, config).catalog
    assert_allclose(
        rows["RMS"].value[:3], 1e3 * NOISE[0, np.rint(AT[:3, 0]).astype(int)], rtol=1e-6
    )
    assert np.all(rows["SNR"][:3] > 5)
    assert np.isnan(rows["FLUX_TOTAL"][3])
