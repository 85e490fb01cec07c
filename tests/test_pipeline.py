"""Whole extractions of simulated maps against their truth, and single scenes of the modelling.

A pull is (measured - true) / error. For n sources its mean scatters by 1 / sqrt(n) and the width
from its median absolute deviation by 1.17 / sqrt(n), where the errors are right.
"""

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
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from hyperjax.config import Config
from hyperjax.maps import Map, read_map
from hyperjax.pipeline import Extraction, extract
from hyperjax.simulation import Simulated, Simulation, SkySources, simulate, write_simulation

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


def measure(simulated: Simulated, image: Map, config: Config = Config()) -> Measured:
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
    return {
        name: measure(*observe(replace(options, **IN_ALL))) for name, options in CASES.items()
    }


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
    return np.asarray(
        (case.truth["FWHM_1"] > 1.15 * case.truth["FWHM_2"]) & (case.truth["SNR"] > 20)
    )


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
    assert not case.rows["FLAGS"].any()
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
    ratio = rows["FWHM_1"] * rows["FWHM_2"] / (truth["FWHM_1"] * truth["FWHM_2"])
    assert np.median(ratio) == pytest.approx(1.0, abs=0.015)


@EVERY_CASE
def test_the_noise_is_that_of_the_map(name: str, measured: dict[str, Measured]) -> None:
    """Clipping at three sigma takes 1.5 % away."""
    rms = measured[name].rows["RMS"].to_value(u.mJy / u.beam)
    assert_allclose(rms, IN_ALL["rms_mjy_beam"], rtol=0.05)
    assert np.median(measured[name].rows["CHI2_RED"]) == pytest.approx(1.0, abs=0.08)


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
def test_errors_are_as_large_as_the_deviations(
    column: str, measured: dict[str, Measured]
) -> None:
    """All white-noise cases together: 460 sources, of which some 200 are elongated."""
    pooled = []
    for case in measured.values():
        use = elongated(case) if column in ("FWHM_1", "PA") else np.ones(len(case.rows), bool)
        truth = "FLUX_TOTAL" if column == "FLUX_APCOR" else None
        pooled.append(pulls(case, column, truth)[use])
    width = mad_std(np.concatenate(pooled))
    assert 0.85 < width < 1.2


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

    The fits take 7 to 12 parameters of some 100 to 2000 pixels.
    """
    case = measured[name]
    near = near_sources(case, 1.0)
    residual = case.extraction.residual / (IN_ALL["rms_mjy_beam"] * 1e-3)
    pixels = residual[near]
    error = 1 / np.sqrt(len(pixels))
    assert abs(pixels.mean()) < 4 * error
    assert np.std(pixels) == pytest.approx(1.0, abs=0.06)
    both = near[:, 1:] & near[:, :-1]
    lag = np.mean(residual[:, 1:][both] * residual[:, :-1][both])
    assert abs(lag) < 0.06
