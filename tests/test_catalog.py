"""The catalogue: sky quantities against astropy and analytic values, errors against Monte Carlo."""

from dataclasses import replace
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import QTable
from astropy.wcs import WCS
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from hyperjax.catalog import COLUMNS, FLAGS, build_catalog, decode_flags, merge_catalogs
from hyperjax.maps import Beam, Map, local_geometry
from hyperjax.photometry import Apertures

FWHM_PER_SIGMA = np.sqrt(8 * np.log(2))
ARCSEC_PER_PIX = 2.0


class Fits(NamedTuple):
    """A fit's result with the fields of `hyperjax.fitting.SourceFits`."""

    peak: NDArray
    x: NDArray
    y: NDArray
    sigma_major: NDArray
    sigma_minor: NDArray
    theta: NDArray
    covariance: NDArray
    group: NDArray
    group_size: NDArray
    background: NDArray
    order: NDArray
    nmse: NDArray
    chi2_red: NDArray
    bic: NDArray
    niter: NDArray
    status: NDArray
    flags: NDArray


class Detections(NamedTuple):
    snr: NDArray
    rms: NDArray
    shoulder_score: NDArray


TYPICAL = np.array([0.3, 60.0, 45.0, 3.0, 2.0, 0.6])
ERRORS = np.array([0.01, 0.05, 0.08, 0.06, 0.05, 0.04])


def make_fits(
    n: int = 1, parameters: NDArray = TYPICAL, covariance: NDArray | None = None, **fields: Any
) -> Fits:
    """Build n fits with the same parameters (peak, x, y, sigma_major, sigma_minor, theta)."""
    covariance = np.diag(ERRORS**2) if covariance is None else covariance
    integers = {"group": 0, "group_size": 1, "order": 1, "niter": 7, "status": 1, "flags": 0}
    floats = {"background": 0.02, "nmse": 0.1, "chi2_red": 1.1, "bic": 30.0}
    values = {
        **dict(zip(Fits._fields, np.repeat(parameters[:, None], n, axis=1), strict=False)),
        "covariance": np.repeat(covariance[None], n, axis=0),
        **{name: np.full(n, value) for name, value in (integers | floats).items()},
    }
    return Fits(**(values | {name: np.array(value) for name, value in fields.items()}))


def make_apertures(n: int = 1, **fields: float) -> Apertures:
    values = {
        "flux": 6.0,
        "flux_err": 0.2,
        "enclosed": 0.5,
        "corrected": 12.0,
        "corrected_err": 0.5,
        "area_pix": 26.0,
        "blank_fraction": 0.0,
    }
    return Apertures(**{name: np.full(n, value) for name, value in (values | fields).items()})


def make_detections(n: int = 1, shoulder_score: float = 0.1) -> Detections:
    return Detections(np.full(n, 15.0), np.full(n, 0.02), np.full(n, shoulder_score))


def make_map(
    rotation_deg: float = 0.0,
    flipped: bool = False,
    frame: str = "icrs",
    beam: Beam | None = None,
    projection: str = "TAN",
) -> Map:
    """Make a map with square pixels, its y axis turned from North by the rotation (towards -x).

    With `flipped` East is towards +x before the rotation.
    """
    wcs = WCS(naxis=2)
    lon, lat = ("GLON", "GLAT") if frame == "galactic" else ("RA--", "DEC-")
    wcs.wcs.ctype = f"{lon}-{projection}", f"{lat}-{projection}"
    wcs.wcs.crval = (30.0, 40.0)
    wcs.wcs.crpix = (61.0, 46.0)
    if frame != "galactic":
        wcs.wcs.radesys = frame.upper()
    angle = np.deg2rad(rotation_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs.wcs.cd = np.diag([1 if flipped else -1, 1]) @ turn * ARCSEC_PER_PIX / 3600
    return Map(
        name="field",
        path=None,
        data=np.zeros((100, 120)),
        wcs=wcs,
        beam=beam or Beam(12.0, 10.0, 20.0),
        unit=u.MJy / u.sr,
        native_per_jy_beam=3.0,
        frame=frame,
    )


def catalog_of(
    fits: Fits | None = None, map: Map | None = None, *, convert_mjy: bool = False, **apertures: Any
) -> QTable:
    fits = make_fits() if fits is None else fits
    n = len(fits.x)
    return build_catalog(
        map or make_map(),
        fits,
        make_apertures(n, **apertures),
        make_detections(n),
        convert_mjy=convert_mjy,
    )


NAMES = """
MAP_ID HYPER_ID FLUX_PEAK FLUX_PEAK_ERR FLUX FLUX_ERR FLUX_APCOR FLUX_APCOR_ERR FLUX_TOTAL
FLUX_TOTAL_ERR RESIDUALS POLYN NMSE CHI2_RED BIC FWHM_1 FWHM_1_ERR FWHM_2 FWHM_2_ERR PA PA_ERR
FWHM_1_DECONV FWHM_1_DECONV_ERR FWHM_2_DECONV FWHM_2_DECONV_ERR PA_DECONV PA_DECONV_ERR STATUS
GLON GLAT RA DEC RA_ERR DEC_ERR X_PIX Y_PIX DEBLEND CLUSTER GROUP SHOULDER_SCORE SNR RMS FLAGS
NITER
""".split()
INTEGERS = {"HYPER_ID", "POLYN", "STATUS", "DEBLEND", "CLUSTER", "GROUP", "FLAGS", "NITER"}


@pytest.mark.parametrize("n", [0, 1, 3])
def test_all_columns_have_their_order_type_unit_and_description(n: int) -> None:
    catalog = catalog_of(make_fits(n))
    assert len(catalog) == n
    assert catalog.colnames == NAMES
    for column in COLUMNS:
        values = catalog[column.name]
        kind = "U" if column.name == "MAP_ID" else "i" if column.name in INTEGERS else "f"
        assert values.dtype.kind == kind
        assert kind == "U" or values.dtype.itemsize == 8
        assert values.info.unit == column.unit
        assert values.info.description == column.description
    assert list(catalog["HYPER_ID"]) == list(range(1, n + 1))


def test_fluxes_are_scaled_by_pixel_over_beam_area() -> None:
    (row,) = catalog_of()
    jy_per_sum = ARCSEC_PER_PIX**2 / (np.pi / (4 * np.log(2)) * 12.0 * 10.0)
    assert_allclose(row["FLUX_PEAK"].to_value("Jy / beam"), 0.3)
    assert_allclose(row["FLUX_PEAK_ERR"].to_value("Jy / beam"), 0.01)
    assert_allclose(row["RESIDUALS"].to_value("Jy / beam"), 0.02)
    assert_allclose(row["RMS"].to_value("Jy / beam"), 0.02)
    sums = {
        "FLUX": 6.0,
        "FLUX_ERR": 0.2,
        "FLUX_APCOR": 12.0,
        "FLUX_APCOR_ERR": 0.5,
        "FLUX_TOTAL": 2 * np.pi * 0.3 * 3.0 * 2.0,
    }
    for name, value in sums.items():
        assert_allclose(row[name].to_value("Jy"), value * jy_per_sum, rtol=1e-7)
    relative_error = np.sqrt((0.01 / 0.3) ** 2 + (0.06 / 3.0) ** 2 + (0.05 / 2.0) ** 2)
    assert_allclose(row["FLUX_TOTAL_ERR"] / row["FLUX_TOTAL"], relative_error, rtol=1e-12)


def test_a_point_source_has_its_peak_as_total_flux() -> None:
    """A Gaussian of the beam's size: Jy/beam at its peak is Jy in all."""
    sigmas = np.array([12.0, 10.0]) / FWHM_PER_SIGMA / ARCSEC_PER_PIX
    fits = make_fits(parameters=np.array([0.3, 60.0, 45.0, *sigmas, 0.6]))
    assert_allclose(catalog_of(fits)["FLUX_TOTAL"].value, 0.3, rtol=1e-7)


def test_the_effective_beam_area_counts() -> None:
    spire = make_map(beam=Beam(18.0, 18.0, effective_area_arcsec2=423.0))
    expected = 6.0 * ARCSEC_PER_PIX**2 / 423.0
    assert_allclose(catalog_of(map=spire)["FLUX"].to_value("Jy"), expected, rtol=1e-7)


def test_the_local_pixel_area_counts_far_from_the_projection_centre() -> None:
    """A SIN pixel's area is that at the centre divided by the cosine of the distance to it."""
    field = make_map(projection="SIN")
    field.wcs.wcs.cd = np.diag([-0.5, 0.5])
    far, centre = catalog_of(make_fits(2, x=[110.0, 60.0]), field)["FLUX"]
    sine = np.deg2rad(50 * 0.5)
    assert_allclose(far / centre, 1 / np.sqrt(1 - sine**2), rtol=1e-4)


def test_a_calibration_error_is_in_all_flux_errors() -> None:
    fits, field = make_fits(), make_map()
    args = field, fits, make_apertures(), make_detections()
    plain = build_catalog(*args)
    (row,) = with_term = build_catalog(*args, calibration_error=0.05)
    for name in ("FLUX_PEAK", "FLUX", "FLUX_APCOR", "FLUX_TOTAL"):
        expected = np.sqrt(plain[f"{name}_ERR"][0] ** 2 + (0.05 * plain[name][0]) ** 2)
        assert_allclose(row[f"{name}_ERR"].value, expected.value, rtol=1e-12)
    for name in set(plain.colnames) - {"FLUX_PEAK_ERR", "FLUX_ERR", "FLUX_APCOR_ERR"}:
        if name != "FLUX_TOTAL_ERR":
            assert_array_equal(with_term[name], plain[name])
    assert with_term.meta["calibration_error"] == 0.05
    assert "calibration_error" in with_term.meta["errors"]
    assert plain.meta["calibration_error"] == 0
    assert "without" in plain.meta["errors"]


def test_mjy_and_jy_are_the_same_fluxes() -> None:
    jy, mjy = catalog_of(convert_mjy=False), catalog_of(convert_mjy=True)
    for column in COLUMNS[2:]:
        assert_allclose(
            u.Quantity(mjy[column.name]).to_value(column.unit or u.one),
            u.Quantity(jy[column.name]).value,
            rtol=1e-14,
        )
    assert mjy["FLUX"].unit == u.mJy
    assert mjy["FLUX"].unit.to_string() == "mJy"
    assert mjy["FLUX_PEAK"].unit.to_string() == "mJy / beam"
    assert_allclose(mjy["FLUX_PEAK"].value, 300.0)
    assert catalog_of(make_fits(0), convert_mjy=True)["RMS"].unit == u.mJy / u.beam


@pytest.mark.parametrize("rotation", [0.0, 30.0, 90.0, 205.0])
@pytest.mark.parametrize("flipped", [False, True])
def test_sky_sizes_angle_and_errors_in_a_rotated_map(rotation: float, flipped: bool) -> None:
    """Square pixels: sizes scale, the angle turns, and errors keep their relative values."""
    (row,) = catalog_of(map=make_map(rotation, flipped))
    assert_allclose(row["FWHM_1"].to_value("arcsec"), 6.0 * FWHM_PER_SIGMA, rtol=1e-6)
    assert_allclose(row["FWHM_2"].to_value("arcsec"), 4.0 * FWHM_PER_SIGMA, rtol=1e-6)
    assert_allclose(row["FWHM_1_ERR"] / row["FWHM_1"], 0.06 / 3.0, rtol=1e-6)
    assert_allclose(row["FWHM_2_ERR"] / row["FWHM_2"], 0.05 / 2.0, rtol=1e-6)
    from_north = np.rad2deg(0.6) + rotation - 90  # from the unflipped y axis, towards -x
    expected_pa = (-from_north if flipped else from_north) % 180
    assert_allclose(row["PA"].to_value("deg"), expected_pa, atol=1e-4)
    assert_allclose(row["PA_ERR"].to_value("deg"), np.rad2deg(0.04), rtol=1e-5)
    cos, sin = np.cos(np.deg2rad(rotation)), np.sin(np.deg2rad(rotation))
    position_errors = ARCSEC_PER_PIX * np.hypot([0.05 * cos, 0.05 * sin], [0.08 * sin, 0.08 * cos])
    assert_allclose(row["RA_ERR"].to_value("arcsec"), position_errors[0], rtol=1e-6)
    assert_allclose(row["DEC_ERR"].to_value("arcsec"), position_errors[1], rtol=1e-6)


@pytest.mark.parametrize("frame", ["icrs", "fk5", "galactic"])
def test_positions_and_angle_are_those_of_astropy(frame: str) -> None:
    """The angle is that from the centre to a point on the major axis, in ICRS."""
    field = make_map(15.0, frame=frame)
    (row,) = catalog_of(make_fits(x=[65.0], y=[80.0]), field)
    centre: SkyCoord = field.wcs.pixel_to_world(65.0, 80.0).icrs
    tip = field.wcs.pixel_to_world(65.0 + 0.5 * np.cos(0.6), 80.0 + 0.5 * np.sin(0.6)).icrs
    assert centre.separation(SkyCoord(row["RA"], row["DEC"])) < 1e-8 * u.arcsec
    assert centre.separation(SkyCoord(row["GLON"], row["GLAT"], frame="galactic")) < 1e-8 * u.arcsec
    difference = (row["PA"] - centre.position_angle(tip)).to_value("deg")
    assert_allclose((difference + 90) % 180, 90, atol=1e-3)


def sky_shapes(parameters: NDArray, jacobian: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """FWHMs (arcsec) and PA (deg) on the sky by diagonalising J S J^T; parameters (n, 3)."""
    major, minor, theta = parameters.T
    axes = np.moveaxis(
        np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]]), -1, 0
    )
    to_sky = jacobian @ axes * np.column_stack([major, minor])[:, None, :]
    values, vectors = np.linalg.eigh(to_sky @ np.swapaxes(to_sky, 1, 2))
    fwhms = FWHM_PER_SIGMA * np.sqrt(values)
    pa = np.rad2deg(np.arctan2(vectors[:, 0, 1], vectors[:, 1, 1])) % 180
    return fwhms[:, 1], fwhms[:, 0], pa


@pytest.mark.parametrize("theta", [0.1, 1.2, 2.9])
def test_shape_errors_are_those_of_draws_from_the_covariance(theta: float) -> None:
    """In skewed, non-square pixels, where sizes and angle mix."""
    field = make_map()
    field.wcs.wcs.cd = np.array([[-2.0, 0.7], [0.4, 3.0]]) / 3600
    rng = np.random.default_rng(5)
    mixing = rng.normal(size=(6, 6)) * (0.005 * np.array([0.3, 1, 1, 3.0, 2.0, 1.0]))[:, None]
    covariance = mixing @ mixing.T
    parameters = np.array([*TYPICAL[:5], theta])
    (row,) = catalog_of(make_fits(parameters=parameters, covariance=covariance), field)
    draws = rng.multivariate_normal(parameters, covariance, size=100_000)[:, 3:]
    jacobian = local_geometry(field.wcs, 60.0, 45.0).jacobian[0]
    major, minor, pa = sky_shapes(draws, jacobian)
    assert_allclose(row["FWHM_1"].to_value("arcsec"), np.mean(major), rtol=1e-3)
    assert_allclose(row["FWHM_1_ERR"].to_value("arcsec"), np.std(major), rtol=0.02)
    assert_allclose(row["FWHM_2_ERR"].to_value("arcsec"), np.std(minor), rtol=0.02)
    turn = (pa - row["PA"].to_value("deg") + 90) % 180 - 90
    assert_allclose(np.mean(turn), 0, atol=0.1)
    assert_allclose(row["PA_ERR"].to_value("deg"), np.std(turn), rtol=0.02)


def test_position_errors_are_those_of_draws_from_the_covariance() -> None:
    """Correlated errors of x and y in a rotated Galactic map, through astropy's coordinates."""
    field = make_map(25.0, frame="galactic")
    covariance = np.diag(ERRORS**2)
    covariance[1, 2] = covariance[2, 1] = 0.7 * 0.05 * 0.08
    (row,) = catalog_of(make_fits(covariance=covariance), field)
    rng = np.random.default_rng(6)
    draws = rng.multivariate_normal([60.0, 45.0], covariance[1:3, 1:3], size=50_000)
    offsets = SkyCoord(row["RA"], row["DEC"]).spherical_offsets_to(
        field.wcs.pixel_to_world(*draws.T).icrs
    )
    for name, offset in zip(["RA_ERR", "DEC_ERR"], offsets, strict=True):
        assert_allclose(row[name].to_value("arcsec"), np.std(offset.to_value("arcsec")), rtol=0.02)


def test_the_angle_of_a_round_source_is_unknown() -> None:
    fits = make_fits(3, sigma_major=[2.0, 2.001, 6.0], sigma_minor=[2.0, 2.0, 2.0])
    fits.covariance[:2, 5, 5] = 1e6
    errors = catalog_of(fits)["PA_ERR"].to_value("deg")
    assert_allclose(errors[:2], 90 / np.sqrt(3))
    assert_allclose(errors[2], np.rad2deg(0.04), rtol=1e-5)


def test_so_is_that_of_a_source_that_only_the_map_stretches() -> None:
    """Off the centre the projection does so by 1e-6, along an axis of the source, for once."""
    field = make_map()
    fits = make_fits(3, sigma_major=2 + np.array([0, 1e-15, 1e-9]), sigma_minor=np.full(3, 2.0))
    fits.x[:], fits.y[:], fits.theta[:] = 60.0, 2000.0, 0.0
    fits.covariance[:, 5, 5] = (0.05 / 2e-6) ** 2  # of an ellipticity of 0 +- 0.05
    assert_allclose(catalog_of(fits, field)["PA_ERR"].to_value("deg"), 90 / np.sqrt(3))


def test_without_covariance_only_the_errors_are_missing() -> None:
    fits = make_fits(2, x=[30.0, 90.0])
    fits.covariance[0] = np.nan
    catalog = catalog_of(fits)
    missing = {column.name for column in COLUMNS[2:] if np.isnan(catalog[column.name][0])}
    fit_errors = {"FLUX_PEAK_ERR", "FLUX_TOTAL_ERR", "FWHM_1_ERR", "FWHM_2_ERR", "PA_ERR"}
    own = {"FWHM_1_DECONV_ERR", "FWHM_2_DECONV_ERR", "PA_DECONV_ERR"}
    assert missing == fit_errors | own | {"RA_ERR", "DEC_ERR"}
    assert decode_flags(catalog["FLAGS"][0]) == ["NO_COVARIANCE"]
    assert catalog["FLAGS"][1] == 0


def test_a_source_with_no_finite_value_leaves_the_others_alone() -> None:
    fits = make_fits(2, status=[0, 1])
    for values in fits[:7]:
        values[0] = np.nan
    bad, good = catalog_of(fits)
    assert np.isnan([bad["RA"].value, bad["FLUX_TOTAL"].value, bad["PA"].value]).all()
    assert decode_flags(bad["FLAGS"]) == ["NOT_CONVERGED", "NO_COVARIANCE"]
    assert np.isfinite([good["RA"].value, good["FLUX_TOTAL_ERR"].value]).all()
    assert good["FLAGS"] == 0


@pytest.mark.parametrize(
    ("fields", "apertures", "expected"),
    [
        ({}, {}, []),
        ({"flags": [4 + 32]}, {}, ["POSITION_ON_BOUND", "STEP_LIMIT"]),
        ({"status": [2]}, {}, ["SECOND_TRY"]),
        ({"status": [0]}, {}, ["NOT_CONVERGED"]),
        ({"x": [6.0]}, {}, ["NEAR_EDGE"]),
        ({"x": [114.0]}, {}, ["NEAR_EDGE"]),
        ({"y": [-3.0]}, {}, ["NEAR_EDGE"]),
        ({"y": [92.0]}, {}, []),
        ({"group_size": [2]}, {}, ["BLENDED"]),
        ({"sigma_minor": [0.9]}, {}, ["ELONGATED"]),
        ({}, {"blank_fraction": 0.1}, ["BLANK_PIXELS"]),
        ({}, {"flux": np.nan, "area_pix": 0, "blank_fraction": 1.0}, ["BLANK_PIXELS", "NO_DATA"]),
        ({}, {"flux": -1.0}, ["NEGATIVE_FLUX"]),
    ],
)
def test_flags_follow_from_the_measurements(
    fields: dict, apertures: dict, expected: list[str]
) -> None:
    (row,) = catalog_of(make_fits(**fields), **apertures)
    assert decode_flags(row["FLAGS"]) == expected


def test_sources_that_overlap_are_blended_though_fitted_apart() -> None:
    """They do within 1.5 of their mean FWHMs: sqrt(8 ln 2) sqrt(3 x 2) = 5.77 pixels, and twice."""
    larger = np.array([1, 1, 1, 2, 1])
    x = 20 + np.array([0, 8.6, 8.6 + 8.7, 8.6 + 8.7 + 12.9, np.nan])
    fits = make_fits(5, x=x, sigma_major=3.0 * larger, sigma_minor=2.0 * larger)
    blended = catalog_of(fits)["FLAGS"] & FLAGS.BLENDED
    assert list(blended > 0) == [True, True, True, True, False]
    fits.x[1] -= 0.1
    fits.x[3] += 0.2
    blended = catalog_of(fits)["FLAGS"] & FLAGS.BLENDED
    assert list(blended > 0) == [True, True, False, False, False]


def test_shoulders_are_flagged_above_the_threshold() -> None:
    args = make_map(), make_fits(), make_apertures(), make_detections(shoulder_score=0.4)
    assert build_catalog(*args, shoulder_threshold=0.5)["FLAGS"][0] == 0
    assert build_catalog(*args, shoulder_threshold=0.3)["FLAGS"][0] == FLAGS.SHOULDER


def test_flags_are_distinct_described_bits() -> None:
    values = [flag.value for flag in FLAGS]
    assert values == [2**i for i in range(len(values))]
    assert all(flag.description for flag in FLAGS)
    assert decode_flags(0) == []
    assert decode_flags(sum(values)) == [flag.name for flag in FLAGS]
    assert decode_flags(np.int64(1 << 40 | 256)) == ["BLENDED"]


def test_the_catalogue_explains_itself_also_after_writing() -> None:
    catalog = catalog_of(make_fits(2))
    text = StringIO()
    catalog.write(text, format="ascii.ecsv")
    again = QTable.read(text.getvalue(), format="ascii.ecsv")
    assert again.meta == catalog.meta
    assert again.meta["map"] == "field"
    assert again.meta["map_unit"] == "MJy / sr"
    assert_allclose(again.meta["beam_area_arcsec2"], np.pi / (4 * np.log(2)) * 120.0)
    assert again.meta["flags"]["BLENDED (256)"] == FLAGS.BLENDED.description
    assert again.meta["map_frame"] == "icrs"
    assert again.meta["beam_pa_map_deg"] == 20.0
    assert_allclose(again.meta["beam_pa_icrs_deg"], 20.0)
    for name in NAMES:
        assert_array_equal(again[name], catalog[name])


def test_the_beam_has_the_angle_of_a_source_of_its_shape() -> None:
    """PA and beam_pa_icrs_deg are in one frame, whatever the frame and rotation of the map."""
    field = make_map(35.0, frame="galactic")
    centre = field.wcs.pixel_to_world(59.5, 49.5)
    tip = field.wcs.world_to_pixel(centre.directional_offset_by(20 * u.deg, 1 * u.arcsec))
    theta = np.arctan2(tip[1] - 49.5, tip[0] - 59.5)
    sigmas = np.array([12.0, 10.0]) / FWHM_PER_SIGMA / ARCSEC_PER_PIX
    catalog = catalog_of(make_fits(parameters=np.array([0.3, 59.5, 49.5, *sigmas, theta])), field)
    assert_allclose(catalog["PA"][0].value, catalog.meta["beam_pa_icrs_deg"], atol=1e-3)
    assert catalog.meta["beam_pa_map_deg"] == 20.0


def test_merging_stacks_maps_in_the_units_of_the_first() -> None:
    other = replace(make_map(), name="another field", beam=Beam(20.0, 20.0, 20.0))
    empty = catalog_of(make_fits(0), replace(make_map(), name="nothing"))
    tables = [catalog_of(make_fits(2), convert_mjy=True), empty, catalog_of(map=other)]
    merged = merge_catalogs(tables)
    assert merged.colnames == NAMES
    assert list(merged["MAP_ID"]) == ["field", "field", "another field"]
    assert list(merged["HYPER_ID"]) == [1, 2, 1]
    assert merged["FLUX_PEAK"].unit == u.mJy / u.beam
    assert_allclose(merged["FLUX_PEAK"].value, 300.0)
    assert merged["FLUX"].unit == u.mJy
    assert_allclose(merged["FLUX"][2].to_value("Jy"), tables[2]["FLUX"][0].value)
    descriptions = [merged[column.name].info.description for column in COLUMNS]
    assert descriptions == [column.description for column in COLUMNS]
    assert merged.meta["flags"] == tables[0].meta["flags"]
    assert merged.meta["beam_pa_map_deg"] == 20.0
    assert [entry["map"] for entry in merged.meta["maps"]] == ["field", "nothing", "another field"]
    assert [entry["beam_major_arcsec"] for entry in merged.meta["maps"]] == [12.0, 12.0, 20.0]


def test_merging_empty_catalogues_gives_an_empty_one() -> None:
    merged = merge_catalogs([catalog_of(make_fits(0)), catalog_of(make_fits(0))])
    assert merged.colnames == NAMES
    assert len(merged) == 0
    assert merged["FLUX"].unit == u.Jy
