"""Maps: reading FITS images in every usual unit, and the geometry of their pixels.

The oracles are astropy's own spherical offsets and unit conversions, and areas of spherical
polygons; the code under test uses neither.
"""

import gzip
import math
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS, Sip
from astropy.wcs.utils import proj_plane_pixel_area, skycoord_to_pixel
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from hyperjax import maps
from hyperjax.errors import (
    BlankMapError,
    ConfigError,
    HyperjaxError,
    MapUnitError,
    MissingBeamError,
    MissingFileError,
    MissingWcsError,
    NoImageError,
    NotFitsError,
)
from hyperjax.maps import (
    Beam,
    beam_for_survey,
    blank_zeros,
    brightness_unit,
    local_geometry,
    pixel_area_map,
    pixel_covariance,
    read_map,
    sky_covariance,
    sky_ellipse,
)
from hyperjax.simulation import Simulation, simulate, write_simulation

NY, NX = 30, 40
PIXEL_DEG = 2.0 / 3600.0
BEAM_DEG = 8.0 / 3600.0
GAUSSIAN_AREA = math.pi / (4.0 * math.log(2.0))  # of unit FWHM


def make_wcs(
    projection: str = "TAN",
    *,
    frame: str = "icrs",
    centre: tuple[float, float] = (150.0, 2.0),
    cdelt: tuple[float, float] = (-PIXEL_DEG, PIXEL_DEG),
    rotation: float = 0.0,
    shape: tuple[int, int] = (NY, NX),
) -> WCS:
    names = ("GLON", "GLAT") if frame == "galactic" else ("RA--", "DEC-")
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = [f"{name}-{projection}" for name in names]
    wcs.wcs.crval = centre
    wcs.wcs.crpix = [0.5 * (shape[1] + 1), 0.5 * (shape[0] + 1)]
    wcs.wcs.cdelt = cdelt
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    wcs.wcs.pc = [[cos, -sin], [sin, cos]]
    if frame != "galactic":
        wcs.wcs.radesys = frame.upper()
        wcs.wcs.equinox = {"fk4": 1950.0, "fk5": 2000.0}.get(frame, math.nan)
    wcs.wcs.set()
    return wcs


def noise(shape: tuple[int, ...] = (NY, NX)) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape)


def make_header(wcs: WCS | None = None, **cards: object) -> fits.Header:
    """Header of a good Jy/beam map; a card that is None is left out."""
    header = (make_wcs() if wcs is None else wcs).to_header()
    good = {"BUNIT": "Jy/beam", "BMAJ": BEAM_DEG, "BMIN": BEAM_DEG / 2, "BPA": 30.0}
    for key, value in {**good, **cards}.items():
        if value is not None:
            header[key] = value
    return header


def write(path: Path, data: np.ndarray | None = None, header: fits.Header | None = None) -> Path:
    data = noise() if data is None else data
    fits.PrimaryHDU(data, make_header() if header is None else header).writeto(path)
    return path


# Reading


def test_map_in_jy_per_beam_is_read_as_it_is(tmp_path: Path) -> None:
    read = read_map(write(tmp_path / "field.fits"))
    assert read.name == "field"
    assert read.path == tmp_path / "field.fits"
    assert read.shape == (NY, NX)
    assert read.frame == "icrs"
    assert read.unit == u.Jy / u.beam
    assert read.native_per_jy_beam == 1.0
    assert_array_equal(read.data, noise())
    assert read.data.dtype == np.dtype("=f8")
    assert read.data.dtype.isnative
    assert read.data.flags.c_contiguous
    assert read.data.flags.writeable
    assert_allclose(read.pixel_scale_arcsec, 2.0, rtol=1e-7)
    assert_allclose(read.beam_fwhm_pix, 4.0 / math.sqrt(2.0), rtol=1e-7)


def test_a_map_shows_itself_on_one_line(tmp_path: Path) -> None:
    shown = repr(read_map(write(tmp_path / "field.fits", header=make_header(BUNIT="MJy/sr"))))
    beam = f"beam {3600 * BEAM_DEG:.3g} x {1800 * BEAM_DEG:.3g} arcsec"
    assert shown == (
        f"<Map 'field': {NX} x {NY} pixels of 2 arcsec, Jy/beam (read as MJy / sr), {beam}, icrs>"
    )


@pytest.mark.parametrize("ending", ["fits", "fits.gz", "fits.fz", "FITS", "fit"])
def test_every_container_gives_the_same_map(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.b.{ending}"
    primary = fits.PrimaryHDU(noise(), make_header())
    if ending == "fits.fz":
        compressed = fits.CompImageHDU(
            noise(), make_header(), compression_type="GZIP_2", quantize_level=0.0
        )
        fits.HDUList([fits.PrimaryHDU(), compressed]).writeto(path)
    else:
        primary.writeto(path)
    read = read_map(path)
    assert read.name == "a.b"
    assert_array_equal(read.data, noise())


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int32, np.uint8])
def test_every_pixel_type_becomes_native_double(tmp_path: Path, dtype: type) -> None:
    data = np.arange(NY * NX).reshape(NY, NX).astype(dtype)
    read = read_map(write(tmp_path / "m.fits", data))
    assert read.data.dtype == np.float64
    assert_array_equal(read.data, data)


@pytest.mark.parametrize(
    ("bitpix", "zero"), [(np.int16, 5.0), (np.int16, 32768.0), (np.int32, 5.0)]
)
def test_scaled_integers_and_blanks(tmp_path: Path, bitpix: type, zero: float) -> None:
    stored = np.arange(NY * NX).reshape(NY, NX).astype(bitpix)
    stored[3, 4] = -99
    scale = 1.0 if zero > 5.0 else 0.25
    hdu = fits.PrimaryHDU(stored, make_header())
    hdu.header.update(BLANK=-99, BSCALE=scale, BZERO=zero)
    hdu.writeto(tmp_path / "m.fits")
    expected = np.where(stored == -99, np.nan, stored * scale + zero)
    assert_allclose(read_map(tmp_path / "m.fits").data, expected, rtol=1e-6)


def test_infinities_become_nan(tmp_path: Path) -> None:
    data = noise()
    data[0, :3] = np.inf, -np.inf, np.nan
    read = read_map(write(tmp_path / "m.fits", data))
    assert np.isnan(read.data[0, :3]).all()
    assert np.isfinite(read.data).sum() == NY * NX - 3


def test_degenerate_axes_are_dropped(tmp_path: Path) -> None:
    header = make_header(
        CTYPE3="FREQ", CRVAL3=2e11, CDELT3=1e6, CRPIX3=1.0, CUNIT3="Hz", CTYPE4="STOKES"
    )
    read = read_map(write(tmp_path / "m.fits", noise((1, 1, NY, NX)), header))
    assert_array_equal(read.data, noise())
    assert read.wcs.naxis == 2


def test_spectral_axis_first(tmp_path: Path) -> None:
    plain = make_wcs(rotation=20.0)
    header = make_header(CTYPE1="FREQ", CRVAL1=2e11, CDELT1=1e6, CRPIX1=1.0, CUNIT1="Hz", BUNIT="K")
    pc = plain.wcs.get_pc()
    for fits_axis in (1, 2):
        to = fits_axis + 1
        header[f"CTYPE{to}"] = plain.wcs.ctype[fits_axis - 1]
        header[f"CUNIT{to}"] = "deg"
        for key, values in (("CRVAL", "crval"), ("CRPIX", "crpix"), ("CDELT", "cdelt")):
            header[f"{key}{to}"] = getattr(plain.wcs, values)[fits_axis - 1]
        for other in (1, 2):
            header[f"PC{to}_{other + 1}"] = pc[fits_axis - 1, other - 1]
    for key in ("PC1_1", "PC1_2", "PC2_1"):
        header[key] = 1.0 if key == "PC1_1" else 0.0
    read = read_map(write(tmp_path / "m.fits", noise((NY, NX, 1)), header))
    assert_allclose(read.data * read.native_per_jy_beam, noise(), rtol=1e-15)
    assert_same_sky(read.wcs, plain)
    per_beam = u.K.to(u.Jy / u.sr, equivalencies=u.brightness_temperature(2e11 * u.Hz))
    assert_allclose(read.native_per_jy_beam, 1.0 / (per_beam * read.beam.area_sr), rtol=1e-12)


def assert_same_sky(one: WCS, other: WCS) -> None:
    x, y = np.meshgrid([0.0, 17.0, NX - 1.0], [0.0, 11.0, NY - 1.0])
    there, expected = one.pixel_to_world(x, y), other.pixel_to_world(x, y)
    assert there.separation(expected).arcsec.max() < 1e-7


def test_latitude_first_is_transposed(tmp_path: Path) -> None:
    plain = make_wcs("SIN", rotation=20.0, cdelt=(-PIXEL_DEG, 2 * PIXEL_DEG))
    swapped = plain.sub([2, 1])
    assert list(swapped.wcs.ctype) == ["DEC--SIN", "RA---SIN"]
    read = read_map(write(tmp_path / "m.fits", noise().T.copy(), make_header(swapped)))
    assert list(read.wcs.wcs.ctype) == ["RA---SIN", "DEC--SIN"]
    assert_array_equal(read.data, noise())
    assert read.data.flags.c_contiguous
    assert_same_sky(read.wcs, plain)


def test_first_image_or_that_asked_for(tmp_path: Path) -> None:
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=np.arange(3))], name="T")
    images = [
        fits.ImageHDU(noise() + offset, make_header(), name=name)
        for offset, name in enumerate(("SCI", "ERR"))
    ]
    path = tmp_path / "m.fits"
    fits.HDUList([fits.PrimaryHDU(), table, *images]).writeto(path)
    assert_array_equal(read_map(path).data, noise())
    for which in (3, "3", "ERR", "err"):
        assert_array_equal(read_map(path, hdu=which).data, noise() + 1.0)
    for which in (0, "T", 9, "NONE"):
        with pytest.raises(NoImageError, match="--hdu"):
            read_map(path, hdu=which)


def test_missing_padding_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "m.fits")
    with fits.open(path) as hdus:
        end = hdus[0].fileinfo()["datLoc"] + hdus[0].size
    path.write_bytes(path.read_bytes()[:end])
    assert_array_equal(read_map(path).data, noise())


def test_warnings_of_mended_headers_do_not_reach_the_user(tmp_path: Path) -> None:
    header = make_header()
    header["RADECSYS"] = header.pop("RADESYS")
    header["DATE-OBS"] = "19/04/05"
    header["BLANK"] = -1  # not allowed on floats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write(tmp_path / "m.fits", header=header)
    assert_same_sky(read_map(path).wcs, make_wcs())


def test_galactic_map_that_names_an_equatorial_system(tmp_path: Path) -> None:
    wcs = make_wcs(frame="galactic")
    read = read_map(write(tmp_path / "m.fits", header=make_header(wcs, RADESYS="FK5")))
    assert read.frame == "galactic"
    assert_same_sky(read.wcs, wcs)


@pytest.mark.parametrize("gzipped", [False, True])
def test_reading_takes_at_most_one_extra_copy(tmp_path: Path, gzipped: bool) -> None:
    n = 1000
    path = tmp_path / ("m.fits.gz" if gzipped else "m.fits")
    data = np.tile(noise((1, n)), (n, 1))
    write(path, data, make_header(make_wcs(shape=(n, n)), BUNIT="Jy" if not gzipped else "K"))
    tracemalloc.start()
    read = read_map(path, frequency_ghz=100.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * read.data.nbytes


# Units

SPELLINGS = {
    u.Jy / u.pix: ["Jy", "JY", "Jy/pix", "JY/PIXEL", "Jy pixel-1", "Jy/px", "pixel-1 Jy", "Jansky"],
    u.mJy / u.pix: ["mJy", "mJy/pixel", "mJY/PIXEL", "1e-3 Jy/pix"],
    u.Jy / u.beam: [
        *("Jy/beam", "JY/BEAM", "beam-1 Jy", "Jy beam-1", "Jy/bm", "jy/beam", "Jy beam^-1"),
        *("Jy.beam-1", "Jy beam**-1", "Jy per beam", "Jy beam^{-1}", " Jy/beam ", "Jy/(beam)"),
    ],
    u.mJy / u.beam: ["mJy/beam", "mjy/beam", "mJY/BEAM", "mJy beam-1"],
    u.uJy / u.beam: ["uJy/beam", "UJY/BEAM", "µJy/beam"],
    u.MJy / u.sr: ["MJy/sr", "MJy sr-1", "MJY/SR", "Mjy/sr", "sr-1 MJy"],
    u.mJy / u.sr: ["mJy/sr", "mJY/SR"],
    u.mJy / u.arcsec**2: ["mJy/arcsec2", "mJy/arcsec**2", "mJy arcsec-2", "mJy/ARCSEC^2"],
    u.Unit("W m-2 Hz-1 sr-1"): ["W/m2/Hz/sr", "W m-2 Hz-1 sr-1"],
    u.K: ["K", "Kelvin", "KELVIN", "K (Tb)", "K(Tb)", "K (Tmb)", "K_RJ"],
    u.mK: ["mK", "mk", "mK (Tb)", "mK_RJ"],
}
MEANT = [(text, unit) for unit, texts in SPELLINGS.items() for text in texts]


@pytest.mark.parametrize(("text", "unit"), MEANT)
def test_spellings_of_units(text: str, unit: u.UnitBase) -> None:
    assert_allclose(brightness_unit(text).to(unit), 1.0, rtol=1e-14)


@pytest.mark.parametrize(
    "text",
    [
        *("MJY/BEAM", "mjy/sr", "MJY", "Mjy/pixel"),  # milli or mega?
        *("adu", "counts/s", "K km/s", "Jy/beam.km/s", "K_CMB", "K (Ta*)", "Jy/sr/beam", "mag"),
        *("mag(AB)", "1", "Jy beam", "/", "Jy/beam (I)", "m"),
    ],
)
def test_what_is_no_unit_of_brightness(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        brightness_unit(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("Jy", True), ("mJy", True), ("JY/PIXEL", False), ("Jy/px", False), ("MJy/sr", False)],
)
@pytest.mark.parametrize("given", [False, True])
def test_a_unit_that_does_not_say_per_what_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, said: bool, given: bool
) -> None:
    path = write(tmp_path / "m.fits", header=make_header(BUNIT=None if given else text))
    with caplog.at_level("WARNING", "hyperjax"):
        read_map(path, unit=text if given else None)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == said
    for message in messages:
        assert message.startswith(f"{path}: the unit {text!r}")
        assert "read as per pixel" in message
        assert "units.map_unit" in message
        assert "--unit" in message


def beam_area(unit: u.UnitBase = u.arcsec**2) -> float:
    return (GAUSSIAN_AREA * BEAM_DEG**2 / 2 * u.deg**2).to_value(unit)


@pytest.mark.parametrize(
    ("text", "jy_per_beam"),
    [
        ("mJy/beam", 1e-3),
        ("Jy/pixel", beam_area() / 4.0),
        ("mJy", 1e-3 * beam_area() / 4.0),
        ("MJy/sr", 1e6 * beam_area(u.sr)),
        ("mJy/arcsec2", 1e-3 * beam_area()),
        ("K", 22.2e9**2 * 2 * 1.380649e-23 / 299792458.0**2 * 1e26 * beam_area(u.sr)),
    ],
)
def test_conversion_to_jy_per_beam(tmp_path: Path, text: str, jy_per_beam: float) -> None:
    in_header = write(tmp_path / "header.fits", header=make_header(BUNIT=text))
    not_in_header = write(tmp_path / "given.fits", header=make_header(BUNIT="rubbish"))
    for path, unit in ((in_header, None), (not_in_header, text)):
        read = read_map(path, unit=unit, frequency_ghz=22.2)
        assert_allclose(read.data, noise() * jy_per_beam, rtol=1e-7)
        assert_allclose(read.data * read.native_per_jy_beam, noise(), rtol=1e-14)


@pytest.mark.parametrize(
    "cards",
    [
        {"RESTFRQ": 90e9},
        {"RESTFREQ": 90e9},
        {"CTYPE3": "FREQ", "CRVAL3": 90.0, "CUNIT3": "GHz", "CDELT3": 1.0, "RESTFRQ": 80e9},
        {"CTYPE3": "FREQ", "CRVAL3": 80e9, "CDELT3": 10e9, "CRPIX3": 0.0, "CUNIT3": "Hz"},
        {"CTYPE3": "VRAD", "CRVAL3": 0.0, "CUNIT3": "m/s", "CDELT3": 1.0, "RESTFRQ": 90e9},
    ],
)
def test_frequency_of_a_map_in_kelvin(tmp_path: Path, cards: dict[str, object]) -> None:
    data = noise((1, NY, NX)) if "CTYPE3" in cards else noise()
    path = write(tmp_path / "m.fits", data, make_header(**{"CRPIX3": 1.0, **cards}, BUNIT="K"))
    factor = (1 * u.K).to_value(u.Jy / u.sr, u.brightness_temperature(90 * u.GHz)) * beam_area(u.sr)
    assert_allclose(read_map(path).data, noise() * factor, rtol=1e-10)
    assert_allclose(
        read_map(path, frequency_ghz=180.0).data, noise() * 4.0 * factor, rtol=1e-10
    )  # the argument goes first


def test_flux_per_pixel_is_divided_by_the_local_area(tmp_path: Path) -> None:
    wcs = make_wcs("SIN", cdelt=(-0.1, 0.1), shape=(200, 300))
    sky_brightness = 3.0 + noise((200, 300))  # Jy per square degree
    per_pixel = sky_brightness * polygon_areas(wcs, (200, 300)) / 3600.0**2
    header = make_header(wcs, BUNIT="Jy/pixel", BMAJ=1.0, BMIN=1.0)
    read = read_map(write(tmp_path / "m.fits", per_pixel, header))
    assert_allclose(read.data, sky_brightness * GAUSSIAN_AREA, rtol=3e-6)
    assert isinstance(read.native_per_jy_beam, np.ndarray)
    assert read.native_per_jy_beam.shape == read.shape
    assert np.ptp(read.native_per_jy_beam) > 0.01 * read.native_per_jy_beam.min()


# Beams


def test_beam_areas() -> None:
    assert_allclose(Beam(4.0, 9.0).fwhm_arcsec, 6.0)
    assert_allclose(Beam(4.0, 9.0).area_arcsec2, 1.1330900354567985 * 36.0, rtol=1e-12)
    assert_allclose(Beam(18.0, 18.0, 0.0, 423.0).area_arcsec2, 423.0)
    assert_allclose(Beam(1.0, 1.0, 0.0, 1.0).area_sr, (1 * u.arcsec**2).to_value(u.sr), rtol=1e-12)


@pytest.mark.parametrize(
    ("code", "fwhm", "area"),
    [
        (1, 5.2, None),
        (2, 6.8, None),
        (3, 12.0, None),
        (4, 18.0, 423.0),
        (5, 24.0, 751.0),
        (6, 34.5, 1587.0),
        (7, 8.0, None),
        (8, 14.5, None),
    ],
)
def test_beams_of_surveys(tmp_path: Path, code: int, fwhm: float, area: float | None) -> None:
    beam = beam_for_survey(code)
    assert beam.fwhm_arcsec == pytest.approx(fwhm)
    assert beam.area_arcsec2 == pytest.approx(GAUSSIAN_AREA * fwhm**2 if area is None else area)
    assert read_map(write(tmp_path / "m.fits"), survey_code=code).beam == beam


@pytest.mark.parametrize("code", [0, 9, 15])
def test_no_such_survey(code: int) -> None:
    with pytest.raises(ConfigError, match=f"survey_code = {code}"):
        beam_for_survey(code)


AIPS = "AIPS   CLEAN BMAJ=  {}E-03 BMIN=  1.0000E-03 BPA=  -12.50"


@pytest.mark.parametrize(
    ("cards", "history", "expected"),
    [
        ({}, [], (8.0, 4.0, 30.0)),
        ({"BPA": None}, [], (8.0, 4.0, 0.0)),
        ({"BMIN": None}, [], (8.0, 8.0, 30.0)),
        ({"BMIN": 2 * BEAM_DEG}, [], (16.0, 8.0, 120.0)),
        ({"BMAJ": None, "BMIN": None, "BPA": None}, [AIPS.format(1.25)], (4.5, 3.6, -12.5)),
        (
            {"BMAJ": None, "BMIN": None, "BPA": None},
            ["noise", AIPS.format(1.25), AIPS.format(1.5), "AIPS   CLEAN NITER= 10"],
            (5.4, 3.6, -12.5),
        ),
        ({}, [AIPS.format(1.25)], (8.0, 4.0, 30.0)),
    ],
)
def test_beam_in_the_header(
    tmp_path: Path, cards: dict[str, object], history: list[str], expected: tuple[float, ...]
) -> None:
    header = make_header(**cards)
    for line in history:
        header["HISTORY"] = line
    beam = read_map(write(tmp_path / "m.fits", header=header)).beam
    assert_allclose((beam.major_arcsec, beam.minor_arcsec, beam.pa_deg), expected, rtol=1e-12)


@pytest.mark.parametrize("frame", ["icrs", "galactic", "fk4"])
def test_the_beams_angle_in_icrs_is_that_of_its_tip(tmp_path: Path, frame: str) -> None:
    """BPA is East of North in the frame of the map, whatever the map's rotation."""
    wcs = make_wcs(frame=frame, rotation=25.0)
    read = read_map(write(tmp_path / "m.fits", header=make_header(wcs, BPA=30.0)))
    centre = wcs.pixel_to_world(0.5 * (NX - 1), 0.5 * (NY - 1))
    tip = centre.directional_offset_by(30 * u.deg, 10 * u.arcsec)
    expected = centre.icrs.position_angle(tip.icrs).to_value("deg") % 180
    assert_allclose(read.beam_pa_icrs_deg, expected, atol=1e-3)
    ny, nx = read.shape
    jacobian = local_geometry(read.wcs, (nx - 1) / 2, (ny - 1) / 2).jacobian
    major, minor, pa = sky_ellipse(jacobian, read.beam_covariance_pix[None])
    assert_allclose([major[0], minor[0]], [read.beam.major_arcsec, read.beam.minor_arcsec])
    assert_allclose(pa[0], read.beam_pa_icrs_deg, atol=1e-6)
    assert_allclose(
        np.linalg.det(read.beam_covariance_pix) ** 0.25 * np.sqrt(8 * np.log(2)),
        read.beam_fwhm_pix,
        rtol=1e-3,
    )
    assert (abs(read.beam_pa_icrs_deg - 30.0) > 1) == (frame == "galactic")


def test_the_beam_given_goes_before_survey_and_header(tmp_path: Path) -> None:
    path = write(tmp_path / "m.fits", header=make_header(BMAJ=None, BMIN=None, BUNIT="MJy/sr"))
    assert read_map(path, beam_fwhm_arcsec=10.0, survey_code=4).beam == Beam(10.0, 10.0)


# Geometry

WCSES = {
    "tan": make_wcs(),
    "sin": make_wcs("SIN"),
    "sin far from its centre": make_wcs("SIN", cdelt=(-0.05, 0.05), shape=(-900, 900)),
    "car": make_wcs("CAR", centre=(10.0, 0.0), cdelt=(-0.05, 0.05), shape=(-900, -700)),
    "galactic": make_wcs("CAR", frame="galactic", centre=(30.0, 0.0)),
    "galactic, rotated": make_wcs(frame="galactic", centre=(120.0, 60.0), rotation=35.0),
    "rotated": make_wcs(rotation=-70.0),
    "x to the East": make_wcs(cdelt=(PIXEL_DEG, PIXEL_DEG)),
    "not square": make_wcs("SIN", cdelt=(-PIXEL_DEG, 2.5 * PIXEL_DEG), rotation=25.0),
    "fk4": make_wcs(frame="fk4", centre=(150.0, 70.0)),
    "fk5": make_wcs(frame="fk5", centre=(150.0, -70.0)),
    "across RA = 0": make_wcs(centre=(0.0, 45.0)),
    "round the pole": make_wcs(centre=(10.0, 89.99)),
    "tiny pixels": make_wcs(cdelt=(-1e-9, 1e-9)),
}
X, Y = np.array([0.0, 19.7, 39.0, 8.3, 25.5]), np.array([0.0, 14.2, 29.0, 22.0, 3.1])


def pixel_offsets(wcs: WCS, sky: SkyCoord, pa_deg: np.ndarray, step: u.Quantity) -> np.ndarray:
    """Pixels per arcsecond along a position angle, from offsets on the sphere: (n, 2)."""
    ahead, behind = (
        np.stack(skycoord_to_pixel(sky.directional_offset_by(pa_deg * u.deg, sign * step), wcs), -1)
        for sign in (1, -1)
    )
    return (ahead - behind) / (2.0 * step.to_value(u.arcsec))


@pytest.mark.parametrize("name", WCSES)
def test_ellipse_placed_on_the_sky_is_found_again(name: str) -> None:
    wcs = WCSES[name]
    major, minor = np.array([9.0, 8.0, 30.0, 5.0, 6.0]), np.array([3.0, 7.0, 4.0, 2.0, 5.9])
    pa = np.array([0.5, 179.0, 45.0, 100.0, 135.0])
    geometry = local_geometry(wcs, X, Y)
    expected = wcs.pixel_to_world(X, Y).icrs
    assert geometry.sky.frame.name == "icrs"
    assert geometry.sky.separation(expected).arcsec.max() < 1e-8
    step = {"tiny pixels": 0.05, "round the pole": 2.0}.get(name, 0.3) * u.arcsec
    along = pixel_offsets(wcs, expected, pa, step) * major[:, None]
    across = pixel_offsets(wcs, expected, pa + 90.0, step) * minor[:, None]
    covariance = sum(axis[:, :, None] * axis[:, None, :] for axis in (along, across)) / (
        8.0 * math.log(2.0)
    )
    found = sky_ellipse(geometry.jacobian, covariance)
    assert_allclose(found[0], major, rtol=2e-6)
    assert_allclose(found[1], minor, rtol=2e-6)
    assert_allclose(found[2], pa, atol=2e-3 if name == "tiny pixels" else 3e-4)


@pytest.mark.parametrize("name", WCSES)
def test_pixel_areas_are_those_of_spherical_polygons(name: str) -> None:
    wcs = WCSES[name]
    area = local_geometry(wcs, X, Y).pixel_area_arcsec2
    half = 1000.0 if name == "tiny pixels" else 0.5
    tolerance = 1e-5 if name == "fk4" else 1e-6  # aberration moves the polygon's corners
    assert_allclose(area, polygon_area(wcs, X, Y, half) / (2.0 * half) ** 2, rtol=tolerance)


@pytest.mark.parametrize("name", ["tan", "sin", "rotated", "x to the East", "not square"])
def test_pixel_area_at_the_reference_pixel(name: str) -> None:
    wcs = WCSES[name]
    x, y = wcs.wcs.crpix - 1.0
    area = local_geometry(wcs, x, y).pixel_area_arcsec2
    assert_allclose(area, [proj_plane_pixel_area(wcs) * 3600.0**2], rtol=1e-8)


def unit_vectors(wcs: WCS, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lon, lat = np.radians(wcs.all_pix2world(x, y, 0))
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def polygon_area(wcs: WCS, x: np.ndarray, y: np.ndarray, half: float = 0.5) -> np.ndarray:
    """Solid angle (arcsec2) of the spherical quadrangle of a pixel's corners, in the map's frame.

    Two triangles, each by Van Oosterom and Strackee (1983), which holds for tiny ones.
    """
    a, b, c, d = (
        unit_vectors(wcs, x + half * i, y + half * j)
        for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    )
    return triangle_area(a, b, c) + triangle_area(a, c, d)


def triangle_area(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    triple = np.abs(np.sum(a * np.cross(b - a, c - a), axis=-1))
    dots = (np.sum(p * q, axis=-1) for p, q in ((a, b), (b, c), (c, a)))
    return 2.0 * np.arctan2(triple, 1.0 + sum(dots)) * math.degrees(3600.0) ** 2


def polygon_areas(wcs: WCS, shape: tuple[int, int]) -> np.ndarray:
    y, x = np.indices(shape, dtype=float)
    return polygon_area(wcs, x, y)


def test_area_map_of_a_wide_field() -> None:
    shape = (600, 600)
    wcs = make_wcs("SIN", cdelt=(-1 / 60, 1 / 60), shape=shape)
    area = pixel_area_map(wcs, shape)
    assert area.max() > 1.007 * area.min()
    assert_allclose(area, polygon_areas(wcs, shape), rtol=1e-6)


def test_sin_pixels_differ_by_a_tenth_far_out() -> None:
    shape = (200, 200)
    wcs = make_wcs("SIN", cdelt=(-1 / 60, 1 / 60), shape=shape)
    wcs.wcs.crpix = [-1400.0, 100.0]
    area = pixel_area_map(wcs, shape)
    assert area.mean() > 1.1 * 3600.0
    assert_allclose(area, polygon_areas(wcs, shape), rtol=1e-6)


def test_area_map_of_equal_areas_is_constant() -> None:
    wcs = make_wcs("CEA", centre=(20.0, 0.0), cdelt=(-0.01, 0.01), shape=(300, 500))
    assert_allclose(pixel_area_map(wcs, (300, 500)), 36.0**2, rtol=1e-8)


@pytest.mark.parametrize("shape", [(2, 2), (3, 70), (65, 5)])
def test_area_map_of_small_maps(shape: tuple[int, int]) -> None:
    wcs = make_wcs("SIN", cdelt=(-0.01, 0.01), shape=shape)
    assert_allclose(pixel_area_map(wcs, shape), polygon_areas(wcs, shape), rtol=1e-6)


def test_distorted_pixels() -> None:
    wcs = make_wcs("TAN-SIP", shape=(200, 200))
    a, b = np.zeros((3, 3)), np.zeros((3, 3))
    a[2, 0], b[0, 2] = 5e-4, -2e-4
    wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    area = pixel_area_map(wcs, (200, 200))
    assert np.ptp(area) > 0.2
    assert_allclose(area, polygon_areas(wcs, (200, 200)), rtol=1e-6)


def test_distortion_is_read_and_kept_beside_a_degenerate_axis(tmp_path: Path) -> None:
    wcs = make_wcs("TAN-SIP")
    a = np.zeros((3, 3))
    a[2, 0] = 1e-3
    wcs.sip = Sip(a, np.zeros((3, 3)), None, None, wcs.wcs.crpix)
    header = wcs.to_header(relax=True)
    header.update(BUNIT="Jy", BMAJ=BEAM_DEG)
    flat = read_map(write(tmp_path / "m.fits", header=header))
    assert_same_sky(flat.wcs, wcs)
    assert_allclose(
        flat.native_per_jy_beam * flat.beam.area_arcsec2, polygon_areas(wcs, (NY, NX)), rtol=1e-6
    )
    header.update(CTYPE3="STOKES", CRVAL3=1.0, CDELT3=1.0, CRPIX3=1.0)
    deep = read_map(write(tmp_path / "n.fits", noise((1, NY, NX)), header))
    assert_same_sky(deep.wcs, wcs)


def test_positions_off_the_sky_are_nan() -> None:
    wcs = make_wcs("AIT", frame="galactic", centre=(0, 0), cdelt=(-1, 1), shape=(180, 360))
    geometry = local_geometry(wcs, [0.0, 179.5, 0.0], [0.0, 89.5, 89.5])
    assert_array_equal(np.isnan(geometry.pixel_area_arcsec2), [True, False, True])
    assert_array_equal(np.isnan(geometry.sky.ra.deg), [True, False, True])
    assert_array_equal(np.isnan(geometry.jacobian).all(axis=(1, 2)), [True, False, True])
    area = pixel_area_map(wcs, (180, 360))
    assert_allclose(np.nansum(area) / 3600.0**2, 4 * math.pi * math.degrees(1) ** 2, rtol=0.02)


def test_all_sky_map_is_whole_to_its_edges() -> None:
    wcs = make_wcs("CAR", frame="galactic", centre=(0.0, 0.0), cdelt=(-1, 1), shape=(180, 360))
    area = pixel_area_map(wcs, (180, 360))
    assert_allclose(area.sum() / 3600.0**2, 4 * math.pi * math.degrees(1) ** 2, rtol=1e-4)


def test_no_position() -> None:
    geometry = local_geometry(WCSES["galactic"], [], [])
    assert geometry.sky.shape == (0,)
    assert geometry.jacobian.shape == (0, 2, 2)
    assert geometry.pixel_area_arcsec2.shape == (0,)


def angle_between(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Difference of two axes' directions, which repeat after half a turn."""
    return np.abs((one - other + 90.0) % 180.0 - 90.0)


@given(
    entries=st.tuples(*[st.floats(-5.0, 5.0)] * 4).filter(
        lambda j: abs(j[0] * j[3] - j[1] * j[2]) > 0.3
    ),
    minor=st.floats(0.1, 50.0),
    ratio=st.floats(1.05, 10.0),
    pa=st.floats(0.0, 180.0),
)
def test_ellipses_go_to_pixels_and_back(
    entries: tuple[float, ...], minor: float, ratio: float, pa: float
) -> None:
    jacobian = np.array(entries).reshape(1, 2, 2)
    covariance = pixel_covariance(jacobian, [minor * ratio], [minor], [pa])
    major_found, minor_found, pa_found = sky_ellipse(jacobian, covariance)
    assert_allclose(major_found, minor * ratio, rtol=1e-8)
    assert_allclose(minor_found, minor, rtol=1e-8)
    assert 0.0 <= pa_found[0] < 180.0
    assert angle_between(pa_found, np.array([pa]))[0] < 1e-5


def test_position_angles_stay_below_180() -> None:
    covariance = np.array([[[1.0, -1e-20], [-1e-20, 4.0]]])
    assert sky_ellipse(np.eye(2)[None], covariance)[2][0] == 0.0


def test_sky_covariance_keeps_leading_axes() -> None:
    jacobian = np.array([[-2.0, 0.0], [0.0, 3.0]])
    covariance = np.broadcast_to([[1.0, 0.5], [0.5, 2.0]], (4, 5, 2, 2))
    expected = np.broadcast_to([[4.0, -3.0], [-3.0, 18.0]], (4, 5, 2, 2))
    assert_allclose(sky_covariance(jacobian, covariance), expected)


def test_ellipses_off_the_sky_are_nan() -> None:
    ellipse = sky_ellipse(np.full((1, 2, 2), np.nan), np.eye(2)[None])
    assert np.isnan(ellipse).all()


# What cannot be read


def missing(path: Path) -> None:
    del path


def folder(path: Path) -> None:
    path.mkdir()


def text(path: Path) -> None:
    path.write_text("RA Dec flux\n" * 1000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path, keep: int) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:keep])


def cut_in_data(path: Path) -> None:
    cut(path, 2880 + 4000)


def cut_in_header(path: Path) -> None:
    cut(path, 500)


def cut_extension(path: Path) -> None:
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(noise(), make_header())]).writeto(path)
    path.write_bytes(path.read_bytes()[: 2880 + 700])


def cut_compressed(path: Path) -> None:
    compressed = fits.CompImageHDU(noise(), make_header(), compression_type="GZIP_2")
    fits.HDUList([fits.PrimaryHDU(), compressed]).writeto(path)
    path.write_bytes(path.read_bytes()[: 2880 * 3])


def cut_gzip(path: Path) -> None:
    write(path)
    whole = gzip.compress(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])


def no_data(path: Path) -> None:
    fits.PrimaryHDU().writeto(path)


def spectrum(path: Path) -> None:
    write(path, noise((1, 1, 100)), fits.Header())


def cube(path: Path) -> None:
    write(path, noise((12, NY, NX)), make_header(CTYPE3="FREQ", CRVAL3=1e9, CDELT3=1e6))


def cube_of_planes(path: Path) -> None:
    write(path, noise((4, 3, NY, NX)), make_header(CTYPE3="FREQ", CTYPE4="STOKES"))


def linear(path: Path) -> None:
    write(path, header=make_header(WCS(naxis=2)))


def no_wcs(path: Path) -> None:
    write(path, header=fits.Header([("BUNIT", "Jy"), ("BMAJ", BEAM_DEG)]))


def no_projection(path: Path) -> None:
    write(path, header=make_header(CTYPE1="RA", CTYPE2="DEC"))


def one_celestial_axis(path: Path) -> None:
    write(path, header=make_header(CTYPE2="FREQ", CUNIT2="Hz"))


def position_velocity(path: Path) -> None:
    header = make_header(CTYPE3="FREQ", CRVAL3=1e9, CDELT3=1e6, CUNIT3="Hz")
    write(path, noise((20, 1, NX)), header)


def singular(path: Path) -> None:
    write(path, header=make_header(CDELT1=0.0))


def ecliptic(path: Path) -> None:
    write(path, header=make_header(CTYPE1="ELON-TAN", CTYPE2="ELAT-TAN"))


def terrestrial(path: Path) -> None:
    write(path, header=make_header(CTYPE1="TLON-TAN", CTYPE2="TLAT-TAN"))


def off_the_sky(path: Path) -> None:
    wcs = make_wcs("AIT", cdelt=(-1.0, 1.0))
    wcs.wcs.crpix = [1000.0, 1000.0]
    write(path, header=make_header(wcs))


def swapped_and_distorted(path: Path) -> None:
    wcs = make_wcs("TAN-SIP")
    wcs.sip = Sip(np.eye(3) * 1e-5, np.eye(3) * 1e-5, None, None, wcs.wcs.crpix)
    header = wcs.to_header(relax=True)
    header.update(CTYPE1="DEC--TAN-SIP", CTYPE2="RA---TAN-SIP", CRVAL1=2.0, CRVAL2=150.0)
    write(path, header=header)


def with_cards(**cards: object) -> Callable[[Path], None]:
    return lambda path: write(path, header=make_header(**cards)) and None


def with_values(value: float) -> Callable[[Path], None]:
    return lambda path: write(path, np.full((NY, NX), value)) and None


BEAM_REMEDIES = ["survey.beam_fwhm_arcsec", "--beam", "survey_code"]
UNIT_REMEDIES = ["units.map_unit", "--unit"]
BAD = {
    "missing": (missing, MissingFileError, ["no such file"]),
    "folder": (folder, MissingFileError, ["folder"]),
    "text": (text, NotFitsError, ["not a FITS file", "(No SIMPLE card found, this file does not"]),
    "empty": (empty, NotFitsError, ["not a FITS file"]),
    "cut in the data": (cut_in_data, NotFitsError, ["cut short"]),
    "cut in the header": (cut_in_header, NotFitsError, ["cut short"]),
    "cut in an extension's header": (cut_extension, NotFitsError, ["cut short"]),
    "cut compressed image": (cut_compressed, NotFitsError, ["cut short"]),
    "cut gzip": (cut_gzip, NotFitsError, ["cut short"]),
    "no data": (no_data, NoImageError, ["no image"]),
    "spectrum": (spectrum, NoImageError, ["no image"]),
    "cube": (cube, NoImageError, ["cube of 12 channels", "control.datacube"]),
    "four axes": (cube_of_planes, NoImageError, ["cube of 12 channels", "plane"]),
    "linear axes": (linear, MissingWcsError, ["no celestial coordinates"]),
    "no WCS": (no_wcs, MissingWcsError, ["no celestial coordinates"]),
    "no projection": (no_projection, MissingWcsError, ["'RA', 'DEC'"]),
    "one celestial axis": (one_celestial_axis, MissingWcsError, ["coordinates"]),
    "position and velocity": (position_velocity, MissingWcsError, ["FREQ", "not longitude"]),
    "singular": (singular, MissingWcsError, ["singular"]),
    "ecliptic": (ecliptic, MissingWcsError, ["ELON", "Galactic"]),
    "terrestrial": (terrestrial, MissingWcsError, ["TLON", "Galactic"]),
    "off the sky": (off_the_sky, MissingWcsError, ["centre"]),
    "swapped and distorted": (swapped_and_distorted, MissingWcsError, ["swap"]),
    "no beam": (with_cards(BMAJ=None, BMIN=None), MissingBeamError, BEAM_REMEDIES),
    "zero beam": (with_cards(BMAJ=0.0), MissingBeamError, ["BMAJ = 0", *BEAM_REMEDIES]),
    "negative beam": (with_cards(BMIN=-1.0), MissingBeamError, BEAM_REMEDIES),
    "text for beam": (with_cards(BMAJ="wide"), MissingBeamError, BEAM_REMEDIES),
    "no unit": (with_cards(BUNIT=None), MapUnitError, ["BUNIT", *UNIT_REMEDIES]),
    "blank unit": (with_cards(BUNIT=" "), MapUnitError, ["BUNIT", *UNIT_REMEDIES]),
    "unknown unit": (with_cards(BUNIT="blobs"), MapUnitError, ["'blobs'", *UNIT_REMEDIES]),
    "lost case": (with_cards(BUNIT="MJY/BEAM"), MapUnitError, ["ambiguous", *UNIT_REMEDIES]),
    "no frequency": (
        with_cards(BUNIT="K", RESTFRQ=0.0),
        MapUnitError,
        ["units.frequency_ghz", "--frequency"],
    ),
    "all NaN": (with_values(math.nan), BlankMapError, ["no finite pixel"]),
    "all infinite": (with_values(math.inf), BlankMapError, ["no finite pixel"]),
    "constant": (with_values(3.5), BlankMapError, ["3.5 in every pixel"]),
}


def assert_one_clear_line(error: HyperjaxError, path: Path, words: list[str]) -> None:
    message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "ignore_missing" not in message, "a hint of astropy's on its own options"
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", BAD)
def test_bad_map_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, expected, words = BAD[name]
    path = tmp_path / "bad.fits"
    make(path)
    with pytest.raises(expected) as caught:
        read_map(path)
    assert type(caught.value) is expected
    assert_one_clear_line(caught.value, path, words)


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        ({"beam_fwhm_arcsec": 0.0}, MissingBeamError, ["survey.beam_fwhm_arcsec", "--beam"]),
        ({"beam_fwhm_arcsec": math.nan}, MissingBeamError, ["nan"]),
        ({"unit": "blobs"}, MapUnitError, ["'blobs'", *UNIT_REMEDIES]),
        ({"unit": "K", "frequency_ghz": -1.0}, MapUnitError, ["-1 GHz", "--frequency"]),
    ],
)
def test_bad_option_is_refused_in_one_line(
    tmp_path: Path, options: dict[str, object], expected: type[HyperjaxError], words: list[str]
) -> None:
    path = write(tmp_path / "m.fits")
    with pytest.raises(expected) as caught:
        read_map(path, **options)
    assert_one_clear_line(caught.value, path, words)


def test_public_names() -> None:
    assert all(hasattr(maps, name) for name in maps.__all__)


def noise_with_zeros() -> maps.FloatArray:
    data = np.random.default_rng(3).normal(size=(60, 70))
    data[:5], data[30:40, 20:33] = 0, 0  # a border and a hole
    return data


def test_areas_of_zeros_are_blank() -> None:
    data = noise_with_zeros()
    assert_array_equal(blank_zeros(data), data == 0)


def test_zeros_between_blank_pixels_are_blank() -> None:
    data = noise_with_zeros()
    data[5:10] = np.nan
    assert_array_equal(blank_zeros(data), data == 0)


def test_single_zeros_are_values() -> None:
    """As in maps of whole numbers."""
    data = np.rint(np.random.default_rng(4).normal(0, 4, (500, 500)))
    assert (data == 0).mean() > 0.09
    assert not blank_zeros(data).any()
    sparse = np.random.default_rng(5).normal(size=(50, 50))
    sparse[::7, ::5] = 0
    assert not blank_zeros(sparse).any()


def test_zeros_that_a_source_without_noise_fades_into_are_values() -> None:
    y, x = np.mgrid[:200, :200]
    data = np.exp(-((x - 100) ** 2 + (y - 100) ** 2) / 2)
    assert (data == 0).mean() > 0.8
    assert not blank_zeros(data).any()


def test_a_map_with_zeros_is_read_as_one_with_nan(tmp_path: Path) -> None:
    simulation = simulate(
        Simulation(shape=(90, 90), n_sources=1, border_pix=6, blank="zero", seed=8)
    )
    write_simulation(simulation, tmp_path / "zero.fits")
    blank = np.isnan(read_map(tmp_path / "zero.fits").data)
    assert blank[:6].all()
    assert blank[:, -6:].all()
    assert not blank[6:-6, 6:-6].any()
