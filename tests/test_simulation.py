"""Simulated maps against analytic geometry, fluxes and noise."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from astropy import constants as const
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial import cKDTree

from hyperjax.errors import ConfigError, OutputError
from hyperjax.simulation import (
    Simulated,
    Simulation,
    demo_simulation,
    render,
    simulate,
    write_simulation,
)
from hyperjax.sphere import pixel_solid_angles, pixels_per_arcsec

ARCSEC2_PER_SR = u.sr.to(u.arcsec**2)
DEGREE_PIX = 3600  # pixels of 1 arcsec

# Nothing but sources.
CLEAN = Simulation(
    shape=(120, 150),
    n_sources=8,
    noise="none",
    gradient=0.0,
    structure=0.0,
    beam_fwhm_pix=5.0,
    edge_margin_beams=4.0,
)
SKIES = {
    "plain": {},
    "rotated": {"rotation_deg": 35.0},
    "flipped": {"flip": True, "rotation_deg": -20.0},
    "non-square": {"pixel_arcsec": (0.8, 1.25), "rotation_deg": 50.0, "beam_fwhm_pix": 7.0},
    "CD matrix": {"wcs_matrix": "CD", "rotation_deg": 120.0, "pixel_arcsec": (1.5, 1.0)},
    "Galactic": {"frame": "galactic", "rotation_deg": 10.0, "projection": "SIN"},
    "FK4": {"frame": "fk4", "centre_deg": (120.0, 75.0)},
    "SIN, 25 degrees off": {
        "projection": "SIN",
        "reference_offset_pix": (10.0 * DEGREE_PIX, -23.0 * DEGREE_PIX),
    },
    "CAR, at 60 degrees": {
        "projection": "CAR",
        "centre_deg": (210.0, 0.0),
        "reference_offset_pix": (0.0, -60.0 * DEGREE_PIX),
        "beam_fwhm_pix": 6.0,
    },
    "fine pixels, coarse beam": {"pixel_arcsec": 0.012, "beam_fwhm_pix": 2.5},
}


@pytest.fixture(params=list(SKIES))
def sky_options(request: pytest.FixtureRequest) -> Simulation:
    return dataclasses.replace(CLEAN, **SKIES[request.param])


def one_source(options: Simulation, shape: tuple[float, float, float]) -> Simulated:
    """Put one source of 1 Jy near the middle of the map."""
    ny, nx = options.shape
    return simulate(
        dataclasses.replace(
            options, positions=((nx / 2 + 0.3, ny / 2 - 0.4),), fluxes=(1.0,), shapes=(shape,)
        )
    )


def sky_moments(simulated: Simulated) -> tuple[np.ndarray, np.ndarray]:
    """Mean offset (2,) and covariance (2, 2), arcsec, of the flux round the first source.

    Measured on the sphere: East and North offsets in ICRS of every pixel from the source.
    """
    ny, nx = simulated.options.shape
    y, x = np.mgrid[:ny, :nx]
    pixels = simulated.wcs.pixel_to_world(x.ravel(), y.ravel()).icrs
    pixels = SkyCoord(pixels.ra, pixels.dec)
    origin = simulated.sources.coordinates[0]
    offsets = np.stack([o.to_value(u.arcsec) for o in origin.spherical_offsets_to(pixels)])
    weights = (simulated.data * pixel_solid_angles(simulated.wcs, (ny, nx))).ravel()
    return np.average(offsets, axis=1, weights=weights), np.cov(
        offsets, aweights=np.maximum(weights, 0), ddof=0
    )


# ---------------------------------------------------------------------------------------- geometry


def test_pixel_jacobian_of_a_tangent_plane() -> None:
    """At the reference point it is the inverse of the CD matrix, East and North in ICRS."""
    options = dataclasses.replace(CLEAN, rotation_deg=30.0, pixel_arcsec=(0.8, 1.25))
    wcs = simulate(options).wcs
    centre = SkyCoord(*options.centre_deg, unit="deg")[None]
    cd_arcsec = wcs.pixel_scale_matrix * 3600
    assert_allclose(pixels_per_arcsec(wcs, centre, 0.1)[0], np.linalg.inv(cd_arcsec), atol=1e-6)


@pytest.mark.parametrize(
    ("sky", "area"),
    [
        ("SIN, 25 degrees off", lambda distance, dec: 1 / np.cos(distance)),
        ("CAR, at 60 degrees", lambda distance, dec: np.cos(dec)),
        ("plain", lambda distance, dec: np.cos(distance) ** 3),
    ],
)
def test_pixel_area_far_from_the_reference_point(sky, area) -> None:
    simulated = simulate(dataclasses.replace(CLEAN, **SKIES[sky]))
    options = simulated.options
    sources = simulated.sources.coordinates
    centre = SkyCoord(*options.centre_deg, unit="deg")
    expected = area(centre.separation(sources).rad, sources.dec.rad)  # nominal pixels: 1 arcsec²
    jacobian = pixels_per_arcsec(simulated.wcs, sources, 0.1)
    assert_allclose(1 / np.abs(np.linalg.det(jacobian)), expected, rtol=1e-6)
    x, y = np.rint(simulated.wcs.world_to_pixel(sources)).astype(int)
    areas = pixel_solid_angles(simulated.wcs, options.shape) * ARCSEC2_PER_SR
    assert_allclose(areas[y, x], expected, rtol=2e-5)  # half a pixel away
    if sky.startswith("SIN"):
        assert np.all(expected > 1.1)


@pytest.mark.parametrize("flip", [False, True])
def test_rotation_turns_the_y_axis_west_of_north(flip: bool) -> None:
    options = dataclasses.replace(CLEAN, rotation_deg=25.0, flip=flip)
    wcs = simulate(options).wcs
    low, high = wcs.pixel_to_world([75.0, 75.0], [60.0, 61.0])
    assert_allclose(low.position_angle(high).wrap_at("180d").deg, -25.0, atol=0.01)
    left, right = wcs.pixel_to_world([75.0, 76.0], [60.0, 60.0])
    assert_allclose(left.position_angle(right).deg, 65.0 if flip else 245.0, atol=0.01)


@pytest.mark.parametrize("matrix", ["PC", "CD"])
def test_header_keywords(matrix) -> None:
    header = simulate(dataclasses.replace(CLEAN, wcs_matrix=matrix, rotation_deg=5.0)).header
    assert f"{matrix}1_2" in header
    assert ("CDELT1" in header) == (matrix == "PC")
    assert header["BMAJ"] == header["BMIN"] == pytest.approx(5 / 3600)


def test_truth_position_is_on_the_map(sky_options: Simulation) -> None:
    simulated = simulate(sky_options)
    truth = simulated.truth
    assert len(truth) == sky_options.n_sources
    x, y = simulated.wcs.world_to_pixel(SkyCoord(truth["RA"], truth["DEC"]))
    assert_allclose(truth["X_PIX"], x, atol=1e-6)
    assert_allclose(truth["Y_PIX"], y, atol=1e-6)
    galactic = SkyCoord(truth["GLON"], truth["GLAT"], frame="galactic")
    assert np.all(galactic.separation(SkyCoord(truth["RA"], truth["DEC"])).arcsec < 1e-6)


def test_shape_on_the_sky_is_the_truth(sky_options: Simulation) -> None:
    """The second moments of the pixels, taken on the sphere, give back FWHM and PA."""
    minor, pa = sky_options.beam_fwhm_arcsec, 37.0
    major = 1.6 * minor
    simulated = one_source(sky_options, (major, minor, pa))
    offset, covariance = sky_moments(simulated)
    variance, vectors = np.linalg.eigh(covariance)
    assert_allclose(offset, 0, atol=2e-3 * minor)
    assert_allclose(np.sqrt(8 * np.log(2) * variance), [minor, major], rtol=2e-4)
    assert_allclose(np.rad2deg(np.arctan2(*vectors[:, 1])) % 180, pa, atol=0.05)
    assert simulated.truth["PA"][0] == pa * u.deg


def test_beam_angle_is_in_the_frame_of_the_map() -> None:
    """A point source in a Galactic map is elongated at BPA from Galactic North."""
    options = dataclasses.replace(
        CLEAN, frame="galactic", beam_axis_ratio=0.6, beam_pa_deg=20.0, size_range=(1.0, 1.0)
    )
    simulated = simulate(options)
    sky = simulated.sources.coordinates
    ahead = sky.directional_offset_by(simulated.sources.pa * u.deg, 1 * u.arcsec)
    angle = sky.galactic.position_angle(ahead.galactic).deg % 180
    assert_allclose(angle, 20.0, atol=1e-3)
    major, minor = options.beam_axes_arcsec
    assert_allclose(simulated.sources.fwhm_major, major)
    assert_allclose(simulated.sources.fwhm_minor, minor)
    assert_allclose(simulated.header["BPA"], 20.0)
    assert_allclose(minor / major, 0.6)


# ------------------------------------------------------------------------------------------ fluxes


@pytest.mark.parametrize("unit", ["Jy/beam", "Jy/pixel", "MJy/sr", "K"])
def test_total_flux_in_every_unit(sky_options: Simulation, unit) -> None:
    """The sum over the pixels, converted by hand with the pixel areas, is the sum of the truth."""
    options = dataclasses.replace(sky_options, unit=unit, frequency_ghz=350.0)
    simulated = simulate(options)
    area = pixel_solid_angles(simulated.wcs, options.shape)
    beam = np.pi / (4 * np.log(2)) * np.prod(options.beam_axes_arcsec) / ARCSEC2_PER_SR
    rayleigh_jeans = (2 * const.k_B * (350 * u.GHz) ** 2 / const.c**2).to_value(u.Jy / u.K)
    jy_per_pixel = {
        "Jy/beam": area / beam,
        "Jy/pixel": 1.0,
        "MJy/sr": 1e6 * area,
        "K": rayleigh_jeans * area,
    }[unit]
    assert_allclose(np.sum(simulated.data * jy_per_pixel), simulated.sources.flux.sum(), rtol=1e-6)
    assert_allclose(simulated.truth["FLUX_TOTAL"].to_value(u.Jy), simulated.sources.flux)
    assert simulated.header["BUNIT"] == unit


def test_peak_and_snr() -> None:
    options = dataclasses.replace(CLEAN, snr_range=(8.0, 30.0), rms_mjy_beam=2.0)
    simulated = simulate(options)
    truth = simulated.truth
    assert np.all((truth["SNR"] >= 8) & (truth["SNR"] <= 30))
    assert_allclose(truth["FLUX_PEAK"].to_value(u.mJy / u.beam), truth["SNR"] * 2.0)
    in_beams = truth["FWHM_1"] * truth["FWHM_2"] / (options.beam_fwhm_arcsec * u.arcsec) ** 2
    assert_allclose(truth["FLUX_TOTAL"].value, truth["FLUX_PEAK"].value * in_beams)
    x, y = np.rint([truth["X_PIX"], truth["Y_PIX"]]).astype(int)
    nearest = simulated.model[y, x] * 1e3 / truth["FLUX_PEAK"].value
    assert np.all((nearest > 0.9) & (nearest < 1.1))


def test_point_source_is_the_beam() -> None:
    """A source of 1 Jy on a pixel centre peaks at 1 Jy/beam and halves one HWHM away."""
    options = dataclasses.replace(CLEAN, beam_fwhm_pix=6.0)
    simulated = simulate(
        dataclasses.replace(
            options, positions=((70.0, 50.0),), fluxes=(1.0,), shapes=((6.0, 6.0, 0.0),)
        )
    )
    assert_allclose(simulated.data[50, 70], 1.0)
    assert_allclose(simulated.data[50, [67, 73]], 0.5, rtol=1e-6)
    assert_allclose(simulated.data[[47, 53], 70], 0.5, rtol=1e-6)


def test_same_sky_on_another_map() -> None:
    first = simulate(dataclasses.replace(CLEAN, shape=(150, 150)))
    other = dataclasses.replace(
        CLEAN, shape=(260, 240), frame="galactic", projection="SIN", pixel_arcsec=0.9, flip=True
    )
    sky = SkyCoord(*CLEAN.centre_deg, unit="deg").galactic
    other = dataclasses.replace(other, centre_deg=(sky.l.deg, sky.b.deg), unit="Jy/pixel")
    second = simulate(other, first.sources)
    for column in ("ID", "RA", "DEC", "FLUX_TOTAL", "FWHM_1", "FWHM_2", "PA"):
        assert_array_equal(second.truth[column], first.truth[column])
    assert_allclose(second.data.sum(), first.sources.flux.sum(), rtol=1e-6)


def test_sources_off_the_map_are_not_in_the_truth() -> None:
    positions = ((-2.0, 50.0), (40.0, 50.0), (90.0, 2.0), (400.0, 50.0))
    options = dataclasses.replace(CLEAN, positions=positions, border_pix=5)
    truth = simulate(options).truth
    assert_array_equal(truth["ID"], [2])
    assert np.isinf(truth["NEIGHBOUR"][0])


# ------------------------------------------------------------------------------------------ render


def test_render_against_the_formula() -> None:
    y, x = np.mgrid[:40, :50]
    theta = 0.7
    along = (x - 20.3) * np.cos(theta) + (y - 18.8) * np.sin(theta)
    across = -(x - 20.3) * np.sin(theta) + (y - 18.8) * np.cos(theta)
    expected = 2.5 * np.exp(-0.5 * ((along / 4.0) ** 2 + (across / 2.0) ** 2))
    image = render((40, 50), 20.3, 18.8, 2.5, 4.0, 2.0, theta)
    assert_allclose(image, expected, atol=1e-9)


def test_render_adds_and_conserves_flux() -> None:
    pair = render((80, 90), [30.2, 50.0], [40.0, 41.5], [1.0, 3.0], [3.0, 5.0], [2.0, 2.5], [1, 2])
    assert_allclose(pair.sum(), 2 * np.pi * (1 * 3 * 2 + 3 * 5 * 2.5), rtol=1e-9)


@pytest.mark.parametrize("position", [(-100.0, 5.0), (5.0, 300.0), (500.0, -40.0)])
def test_render_outside(position) -> None:
    assert not render((30, 20), *position, 1.0, 2.0, 2.0, 0.0).any()


def test_render_nothing() -> None:
    assert_array_equal(render((3, 4), *[np.empty(0)] * 6), np.zeros((3, 4)))


# ------------------------------------------------------------------------ noise, background, blanks


@pytest.mark.parametrize("noise", ["white", "beam", "1/f"])
def test_noise_rms(noise) -> None:
    options = Simulation(shape=(500, 480), noise=noise, rms_mjy_beam=2.0, n_sources=0)
    simulated = simulate(options)
    independent = simulated.noise.size / (1 if noise == "white" else options.beam_fwhm_pix**2)
    assert_allclose(np.std(simulated.noise) * 1e3, 2.0, rtol=5 / np.sqrt(2 * independent))


def lag_correlation(image: np.ndarray, dx: int, dy: int) -> float:
    ny, nx = image.shape
    first = image[max(0, dy) : ny + min(0, dy), max(0, dx) : nx + min(0, dx)]
    second = image[max(0, -dy) : ny + min(0, -dy), max(0, -dx) : nx + min(0, -dx)]
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def test_white_noise_is_white() -> None:
    noise = simulate(Simulation(shape=(500, 500), n_sources=0)).noise
    assert abs(lag_correlation(noise, 1, 0)) < 0.01
    assert abs(lag_correlation(noise, 0, 1)) < 0.01


def test_beam_noise_correlation() -> None:
    """White noise convolved with a Gaussian of covariance S has correlation exp(-d S^-1 d / 4)."""
    options = Simulation(
        shape=(800, 800), noise="beam", n_sources=0, beam_axis_ratio=0.5, beam_pa_deg=-45.0
    )
    noise = simulate(options).noise
    major, minor = np.array(options.beam_axes_arcsec) / np.sqrt(8 * np.log(2))
    # PA -45: the beam points up and right where East is to the left.
    for lag in (1, 2, 3):
        separation = 2 * lag**2
        along = lag_correlation(noise, lag, lag)
        across = lag_correlation(noise, lag, -lag)
        assert_allclose(along, np.exp(-separation / (4 * major**2)), atol=0.02)
        assert_allclose(across, np.exp(-separation / (4 * minor**2)), atol=0.02)


def test_red_noise_power() -> None:
    """Averaged over maps, the power at the knee is twice that of the white part."""
    powers = []
    for seed in range(20):
        options = Simulation(
            shape=(256, 256), noise="1/f", n_sources=0, seed=seed, noise_knee_beams=4.0
        )
        powers.append(np.abs(np.fft.fft2(simulate(options).noise)) ** 2)
    wave_number = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    power = np.mean(powers, axis=0)
    knee = power[np.abs(wave_number * 16.0 - 1) < 0.1].mean()
    white = power[wave_number > 0.35].mean()
    assert_allclose(knee / white, 2.0, rtol=0.2)


def test_background_amplitudes() -> None:
    options = Simulation(
        shape=(300, 200), n_sources=0, noise="none", rms_mjy_beam=2.0, gradient=6.0, structure=0.0
    )
    plane = simulate(dataclasses.replace(options, offset=10.0)).data * 1e3
    assert_allclose([np.ptp(plane), plane.mean()], [12.0, 20.0])
    assert_allclose(np.diff(plane, 2, axis=0), 0, atol=1e-9)
    assert_allclose(np.diff(plane, 2, axis=1), 0, atol=1e-9)
    structure = simulate(dataclasses.replace(options, gradient=0.0, structure=3.0)).data * 1e3
    assert_allclose([structure.std(), structure.mean()], [6.0, 0.0], atol=1e-9)
    assert np.abs(np.diff(structure)).max() < 0.1 * structure.std()


@pytest.mark.parametrize("blank", ["nan", "zero"])
def test_blank_border_and_holes(blank) -> None:
    options = dataclasses.replace(
        CLEAN, shape=(300, 320), border_pix=10, n_holes=2, blank=blank, edge_margin_beams=1.5
    )
    simulated = simulate(options)
    is_blank = np.isnan(simulated.data) if blank == "nan" else simulated.data == 0
    assert is_blank[:10].all()
    assert is_blank[:, -10:].all()
    assert_array_equal(is_blank & ~simulated.valid, ~simulated.valid)
    assert np.mean(~simulated.valid[10:-10, 10:-10]) > 0.001
    truth = simulated.truth
    blank_xy = np.argwhere(~simulated.valid)[:, ::-1]
    distance = cKDTree(blank_xy).query(np.c_[truth["X_PIX"], truth["Y_PIX"]])[0]
    assert distance.min() > 1.5 * options.beam_fwhm_pix - 1


# --------------------------------------------------------------------------------- drawing, seeds


def test_same_seed_same_map() -> None:
    options = Simulation(shape=(200, 200), n_sources=20, n_holes=1)
    first, again = simulate(options), simulate(options)
    assert_array_equal(first.data, again.data)
    other = simulate(dataclasses.replace(options, seed=2))
    assert np.nanmax(np.abs(other.data - first.data)) > 0


def test_noise_does_not_move_the_sources() -> None:
    options = Simulation(shape=(200, 200), n_sources=20)
    white = simulate(options)
    correlated = simulate(dataclasses.replace(options, noise="beam", structure=5.0))
    assert_array_equal(white.model, correlated.model)


def test_separations_and_neighbours() -> None:
    options = dataclasses.replace(
        CLEAN, shape=(300, 300), n_sources=60, min_separation_beams=1.2, blend_fraction=0.5
    )
    truth = simulate(options).truth
    xy = np.c_[truth["X_PIX"], truth["Y_PIX"]]
    nearest = cKDTree(xy).query(xy, k=2)[0][:, 1] / options.beam_fwhm_pix
    assert_allclose(truth["NEIGHBOUR"], nearest, rtol=1e-4)
    assert nearest.min() >= 1.2
    assert np.mean(nearest < 2.2) > 0.5


def test_sizes_stay_in_their_range() -> None:
    options = dataclasses.replace(CLEAN, shape=(300, 300), n_sources=50, size_range=(1.1, 1.4))
    truth = simulate(options).truth
    major = truth["FWHM_1"].value / options.beam_fwhm_arcsec
    minor = truth["FWHM_2"].value / options.beam_fwhm_arcsec
    assert np.all((major >= 1.1 - 1e-9) & (major <= 1.4 + 1e-9))
    assert np.all((minor >= 1) & (minor <= major))
    assert np.ptp(truth["PA"].value) > 90


@pytest.mark.parametrize("count", [0, 1])
def test_few_sources(count: int) -> None:
    truth = simulate(dataclasses.replace(CLEAN, n_sources=count)).truth
    assert len(truth) == count
    assert truth["FLUX_TOTAL"].unit == u.mJy


def test_demonstration_map() -> None:
    truth = simulate(demo_simulation()).truth
    assert len(truth) == 60
    assert 10 <= np.sum(truth["NEIGHBOUR"] < 2.5) <= 30


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"unit": "erg"}, "unit"),
        ({"noise": "pink"}, "noise"),
        ({"unit": "K"}, "frequency_ghz"),
        ({"rms_mjy_beam": 0.0}, "rms_mjy_beam"),
        ({"pixel_arcsec": (1.0, -1.0)}, "pixel_arcsec"),
        ({"n_sources": -1}, "n_sources"),
        ({"snr_range": (10.0, 5.0)}, "snr_range"),
        ({"size_range": (0.5, 2.0)}, "size_range"),
        ({"beam_axis_ratio": 1.5}, "axis ratio"),
        ({"n_sources": 2, "fluxes": (1.0,)}, "1 fluxes for 2 sources"),
    ],
)
def test_options_that_describe_no_map(wrong, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Simulation(**wrong)


@pytest.mark.parametrize("wrong", [{"n_sources": 500}, {"border_pix": 60, "n_sources": 1}])
def test_too_many_sources_for_the_map(wrong) -> None:
    with pytest.raises(ConfigError, match="fit on the map"):
        simulate(dataclasses.replace(CLEAN, **wrong))


# ----------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("extension", [".fits", ".fits.gz"])
def test_written_files_read_back(tmp_path: Path, extension: str) -> None:
    options = dataclasses.replace(CLEAN, border_pix=3, bunit="Jy beam-1", frequency_ghz=230.0)
    simulated = simulate(options)
    image, table = write_simulation(simulated, tmp_path / "new" / f"sim{extension}")
    assert sorted(p.name for p in image.parent.iterdir()) == sorted(
        [f"sim{extension}", "sim_truth.ecsv"]
    )
    with fits.open(image) as hdus:
        assert_array_equal(hdus[0].data, simulated.data)
        header = hdus[0].header
    assert header["BUNIT"] == "Jy beam-1"
    assert header["RESTFRQ"] == 230e9
    assert_allclose(
        WCS(header).wcs_pix2world([[5, 7]], 0), simulated.wcs.wcs_pix2world([[5, 7]], 0)
    )
    truth = QTable.read(table)
    for name in simulated.truth.colnames:
        assert_array_equal(truth[name], simulated.truth[name])
    assert truth.meta["simulation"]["shape"] == list(options.shape)
    assert truth.meta["beam"]["major_arcsec"] == pytest.approx(5.0)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    simulated = simulate(CLEAN)
    (tmp_path / "sim_truth.ecsv").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        write_simulation(simulated, tmp_path / "sim.fits")
    assert [p.name for p in tmp_path.iterdir()] == ["sim_truth.ecsv"]
    write_simulation(simulated, tmp_path / "sim.fits", overwrite=True)
    assert len(QTable.read(tmp_path / "sim_truth.ecsv")) == CLEAN.n_sources


@pytest.mark.parametrize("name", ["sim.txt", ".fits", "sim.fits.fz"])
def test_other_extensions_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"\.fits"):
        write_simulation(simulate(CLEAN), tmp_path / name)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="a file is in the place of an output folder"):
        write_simulation(simulate(CLEAN), tmp_path / "file" / "sim.fits")


def test_a_simulated_map_shows_itself_on_one_line() -> None:
    simulated = simulate(Simulation(shape=(40, 50), n_sources=2, unit="MJy/sr"))
    assert repr(simulated) == "<Simulated: 50 x 40 pixels in MJy/sr, 2 sources on the map>"
