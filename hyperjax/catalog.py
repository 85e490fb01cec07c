"""The catalogue: measurements in pixels and Jy/beam become sky positions, sizes and fluxes.

`COLUMNS` says what the catalogue holds and `FLAGS` what its flag bits mean; both travel with every
table, as descriptions of the columns and in ``table.meta``, so that a catalogue explains itself.
"""

from __future__ import annotations

from enum import IntFlag
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from astropy import units as u
from astropy.table import QTable, vstack

from hyperjax.deconvolution import MAX_PA_ERR_DEG, RESOLVED_SIGMA, deconvolve
from hyperjax.groups import pairs_closer
from hyperjax.maps import (
    FWHM_PER_SIGMA,
    local_geometry,
    pixel_covariance,
    sky_covariance,
    sky_ellipse,
)
from hyperjax.models import LEAST_ELLIPTICITY
from hyperjax.photometry import model_flux, quadratic_form, standard_deviation
from hyperjax.sources import overlap_reach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hyperjax.maps import LocalGeometry, Map
    from hyperjax.photometry import Apertures
    from hyperjax.sources import SourceFits

MAX_AXIS_RATIO = 3.0
"""Above this ratio of the fitted axes (in pixels) a source is flagged ELONGATED."""

POOR_CHI2 = 2.0
"""Reduced chi^2 above which what a fit leaves is not noise."""


class FLAGS(IntFlag):
    """Bits of the column FLAGS; each has a `name` and a one-line `description`."""

    description: str

    def __new__(cls, value: int, description: str) -> FLAGS:
        """Make a bit that carries its description."""
        flag = int.__new__(cls, value)
        flag._value_ = value
        flag.description = description
        return flag

    @classmethod
    def on_bound(cls, parameters: NDArray[np.bool_]) -> NDArray[np.int_]:
        """Flags (n,) of the parameters (n, 6) that ended on a bound: peak, x, y, sigmas, theta."""
        return np.asarray(
            cls.PEAK_ON_BOUND * parameters[:, 0]
            + cls.POSITION_ON_BOUND * parameters[:, 1:3].any(axis=1)
            + cls.SIZE_ON_BOUND * parameters[:, 3:5].any(axis=1)
        )

    NOT_CONVERGED = 1, "the fit did not converge: values may be off by more than their errors"
    SECOND_TRY = 2, "the fit converged only at the second try, with wider bounds"
    POSITION_ON_BOUND = 4, "the fitted position lies on the edge of its allowed range"
    SIZE_ON_BOUND = 8, "a fitted size lies on the edge of its allowed range"
    PEAK_ON_BOUND = 16, "the fitted peak lies on the edge of its allowed range"
    STEP_LIMIT = 32, "the fit used up its number of steps"
    NEAR_EDGE = 64, "closer than its major FWHM to the edge of the image"
    BLANK_PIXELS = 128, "part of the aperture is blank or outside the image"
    BLENDED = (
        256,
        "fitted together with another source, or overlaps one; one more that is closer than about "
        "a beam may be hidden in it, for which the errors do not allow",
    )
    SHOULDER = 512, "asymmetric surroundings: may be a bump on the flank of a brighter source"
    NO_COVARIANCE = 1024, "the fit has no covariance; errors that need it are NaN"
    NO_DATA = 2048, "no valid pixel in the aperture"
    ELONGATED = 4096, "axis ratio above 3: may be several sources, or a filament"
    NEGATIVE_FLUX = 8192, "the aperture flux is negative"
    NOT_FITTED = 16384, "not fitted: detected only, or given but not measured"
    FORCED = 32768, "measured at a position that was given, not detected"
    OUTSIDE = 65536, "the given position is outside the image or in blank pixels: not measured"
    NO_SIZE = 131072, "no size was given where sizes are: not measured"
    UNRESOLVED = (
        262144,
        f"the size exceeds the beam by less than {RESOLVED_SIGMA:g} sigma in every direction: "
        "compatible with a point source",
    )
    POOR_FIT = (
        524288,
        "the fit leaves far more than noise (reduced chi^2 above 2), or that of a source that it "
        "touches: no Gaussian, or not as many sources as it was taken for",
    )


class Column(NamedTuple):
    """A column of the catalogue. Units in Jy are written as mJy where the catalogue is in mJy."""

    name: str
    dtype: type
    unit: u.UnitBase | None
    description: str


_JY_BEAM = u.Jy / u.beam
_ERR = "1-sigma uncertainty of"

COLUMNS: tuple[Column, ...] = (
    Column("MAP_ID", str, None, "Name of the map"),
    Column(
        "HYPER_ID",
        int,
        None,
        "Number of the source in its map, by decreasing S/N, from 1; the ID of a given source",
    ),
    Column("FLUX_PEAK", float, _JY_BEAM, "Peak of the fitted Gaussian"),
    Column("FLUX_PEAK_ERR", float, _JY_BEAM, f"{_ERR} FLUX_PEAK"),
    Column(
        "FLUX",
        float,
        u.Jy,
        "Sum in the elliptical aperture (semi-axes: FWHM x fwhm_radius_ratio), background and "
        "companions subtracted, not corrected for the flux outside",
    ),
    Column("FLUX_ERR", float, u.Jy, "Noise of FLUX in the aperture as drawn"),
    Column("FLUX_APCOR", float, u.Jy, "Total flux density from FLUX, corrected for the aperture"),
    Column(
        "FLUX_APCOR_ERR",
        float,
        u.Jy,
        f"{_ERR} FLUX_APCOR: that of FLUX_TOTAL, as the aperture follows the fitted shape, and the "
        "noise in the aperture that the fit has not taken up (little, or none)",
    ),
    Column("FLUX_TOTAL", float, u.Jy, "Total flux density of the fitted Gaussian (recommended)"),
    Column("FLUX_TOTAL_ERR", float, u.Jy, f"{_ERR} FLUX_TOTAL"),
    Column(
        "RESIDUALS",
        float,
        _JY_BEAM,
        "Background level: the fitted background at the source's centre",
    ),
    Column("POLYN", int, None, "Order of the polynomial background, -1 for none"),
    Column("NMSE", float, None, "Normalised mean squared error of the group's fit"),
    Column(
        "CHI2_RED",
        float,
        None,
        "Reduced chi-square of the group's fit; below 1 where the noise is smoother than the floor "
        "of its spectrum, which leaves the errors as they are",
    ),
    Column("BIC", float, None, "Bayesian information criterion of the group's fit"),
    Column(
        "FWHM_1",
        float,
        u.arcsec,
        "Major FWHM of the fitted Gaussian, beam included; that of a given ellipse",
    ),
    Column("FWHM_1_ERR", float, u.arcsec, f"{_ERR} FWHM_1"),
    Column("FWHM_2", float, u.arcsec, "Minor FWHM, as FWHM_1"),
    Column("FWHM_2_ERR", float, u.arcsec, f"{_ERR} FWHM_2"),
    Column("PA", float, u.deg, "Position angle of the major axis, East of North (ICRS), 0 to 180"),
    Column(
        "PA_ERR",
        float,
        u.deg,
        f"{_ERR} PA; at most 51.96 = 90/sqrt(3), that of an unknown angle (round sources)",
    ),
    Column(
        "FWHM_1_DECONV",
        float,
        u.arcsec,
        "Major FWHM without the beam, 0 for a source smaller than the beam; see flag UNRESOLVED",
    ),
    Column(
        "FWHM_1_DECONV_ERR",
        float,
        u.arcsec,
        f"{_ERR} FWHM_1_DECONV, upwards: that of its square, which is finite at 0",
    ),
    Column("FWHM_2_DECONV", float, u.arcsec, "Minor FWHM without the beam, as FWHM_1_DECONV"),
    Column("FWHM_2_DECONV_ERR", float, u.arcsec, f"{_ERR} FWHM_2_DECONV, as FWHM_1_DECONV_ERR"),
    Column(
        "PA_DECONV",
        float,
        u.deg,
        "Position angle of FWHM_1_DECONV, as PA; NaN where that is 0",
    ),
    Column("PA_DECONV_ERR", float, u.deg, f"{_ERR} PA_DECONV, limited as PA_ERR"),
    Column("STATUS", int, None, "Fit: 1 converged, 2 at the second try, 0 failed, -1 none"),
    Column("GLON", float, u.deg, "Galactic longitude"),
    Column("GLAT", float, u.deg, "Galactic latitude"),
    Column("RA", float, u.deg, "Right ascension (ICRS)"),
    Column("DEC", float, u.deg, "Declination (ICRS)"),
    Column("RA_ERR", float, u.arcsec, f"{_ERR} RA, on the sky: times cos(DEC)"),
    Column("DEC_ERR", float, u.arcsec, f"{_ERR} DEC"),
    Column("X_PIX", float, u.pix, "Column of the image, 0 at the centre of the first pixel"),
    Column("Y_PIX", float, u.pix, "Row of the image, 0 at the centre of the first pixel"),
    Column("DEBLEND", int, None, "1 if fitted together with other sources, else 0"),
    Column("CLUSTER", int, None, "Number of sources in the group"),
    Column("GROUP", int, None, "Number of the group of sources that were fitted together, from 1"),
    Column("SHOULDER_SCORE", float, None, "Asymmetry of the surroundings, relative to the peak"),
    Column(
        "SNR",
        float,
        None,
        "Significance of the source as it was found; not FLUX_PEAK / RMS. Where noise_model is "
        "correlated: its peak over the error of that with position and shape as fitted. Where it "
        "is white: brightest pixel of the high-pass filtered map at the source (of the filtered "
        "residual for a source found there), over the scatter of the filtered map",
    ),
    Column("RMS", float, _JY_BEAM, "Noise of a pixel at the source, in the high-pass filtered map"),
    Column("FLAGS", int, None, "Bits that are explained in the table's metadata"),
    Column("NITER", int, None, "Steps of the fit"),
)
"""What the catalogue holds, in this order."""


class Detected(Protocol):
    """What the catalogue takes from the detection; arrays of shape (n,)."""

    @property
    def snr(self) -> NDArray[np.float64]:
        """Signal-to-noise ratio."""

    @property
    def rms(self) -> NDArray[np.float64]:
        """Noise at the source, Jy/beam."""

    @property
    def shoulder_score(self) -> NDArray[np.float64]:
        """Asymmetry of the source's surroundings, relative to its peak."""


def decode_flags(value: int) -> list[str]:
    """Name the bits that are set in a value of the column FLAGS, lowest first.

    >>> decode_flags(258)
    ['SECOND_TRY', 'BLENDED']
    """
    return [str(flag.name) for flag in FLAGS if flag & int(value)]


def build_catalog(
    map: Map,
    fits: SourceFits,
    apertures: Apertures,
    detections: Detected,
    *,
    convert_mjy: bool = True,
    shoulder_threshold: float = 0.5,
    calibration_error: float = 0.0,
) -> QTable:
    r"""Make the catalogue of one map: sky positions, sizes, fluxes, their errors, and flags.

    Positions, sizes and angles go from pixels to the sky through the Jacobian J of the map's
    coordinates at each source, covariances with them: :math:`C_{sky} = J\,C_{xy}\,J^T`. Flux
    densities are sums over pixels times (local pixel area / beam area).

    Parameters
    ----------
    map
        The map, for its coordinates, beam and name.
    fits, apertures, detections
        n sources in the same order, which becomes the order of the catalogue.
    convert_mjy
        Fluxes in mJy and mJy/beam instead of Jy and Jy/beam.
    shoulder_threshold
        Shoulder score above which a source is flagged SHOULDER.
    calibration_error
        Relative uncertainty of the flux scale, in quadrature in the errors of all fluxes.

    Returns
    -------
    QTable
        The columns of `COLUMNS`; n rows, also for n = 0.
    """
    geometry = local_geometry(map.wcs, fits.x, fits.y)
    n = len(fits.x)
    sizes, unresolved = _sizes(fits, geometry, map)
    values = {
        "MAP_ID": np.full(n, map.name),
        "HYPER_ID": np.arange(1, n + 1),
        **_calibrated(_fluxes(map, fits, apertures, geometry), calibration_error),
        **_fit_quality(fits),
        **sizes,
        **_positions(fits, geometry),
        "SHOULDER_SCORE": detections.shoulder_score,
        "SNR": detections.snr,
        "RMS": detections.rms,
        "FLAGS": _all_flags(map.shape, fits, apertures)
        | _bits(detections.shoulder_score > shoulder_threshold, FLAGS.SHOULDER)
        | _bits(unresolved, FLAGS.UNRESOLVED),
    }
    catalog = QTable()
    for column in COLUMNS:
        catalog[column.name] = _as_column(values[column.name], column, convert_mjy)
        catalog[column.name].info.description = column.description
    catalog.meta = _metadata(map) | {
        "calibration_error": float(calibration_error),
        "errors": "1 sigma; those of fluxes with calibration_error, a fraction of the flux that "
        "all sources share, in quadrature"
        if calibration_error
        else "1 sigma, without the uncertainty of the calibration",
    }
    return catalog


def merge_catalogs(catalogs: Sequence[QTable]) -> QTable:
    """Stack the catalogues of several maps (at least one); units become those of the first.

    Metadata that all share stay as they are; the others become ``meta["maps"]``, one dictionary
    for each map. A single catalogue is returned as it is.
    """
    if len(catalogs) == 1:
        return catalogs[0]
    same_units = [_with_units_of(catalogs[0], catalog) for catalog in catalogs]
    merged = vstack(same_units, metadata_conflicts="silent")
    shared = {
        key: value
        for key, value in catalogs[0].meta.items()
        if all(key in other.meta and other.meta[key] == value for other in catalogs)
    }
    own = [{k: v for k, v in catalog.meta.items() if k not in shared} for catalog in catalogs]
    merged.meta = {**shared, "maps": own}
    return merged


def _with_units_of(first: QTable, catalog: QTable) -> QTable:
    converted = catalog.copy()
    for name, column in first.columns.items():
        if isinstance(column, u.Quantity):
            converted[name] = catalog[name].to(column.unit)
    return converted


def _as_column(
    values: NDArray[Any], column: Column, convert_mjy: bool
) -> NDArray[Any] | u.Quantity:
    """Values (in Jy where fluxes) with the column's type, in the unit that was asked for."""
    typed: NDArray[Any] = np.asarray(values, dtype=column.dtype)
    if column.unit is None:
        return typed
    quantity = typed * column.unit
    if convert_mjy and u.Jy in column.unit.bases:
        return quantity.to(column.unit * u.mJy / u.Jy)
    return quantity


def _metadata(map: Map) -> dict[str, Any]:
    """Metadata in plain Python types, as ECSV needs them."""
    return {
        "creator": f"hyperjax {version('hyperjax')}",
        "map": map.name,
        "map_unit": str(map.unit),
        "beam_major_arcsec": float(map.beam.major_arcsec),
        "beam_minor_arcsec": float(map.beam.minor_arcsec),
        "beam_pa_icrs_deg": map.beam_pa_icrs_deg,
        "beam_pa_map_deg": float(map.beam.pa_deg),
        "map_frame": map.frame,
        "beam_area_arcsec2": float(map.beam.area_arcsec2),
        "recommended": "FLUX_TOTAL for total flux densities; RA and DEC for positions. FLUX_TOTAL "
        "and the correction of FLUX_APCOR are those of a Gaussian: of sources that are none "
        "(POOR_FIT) FLUX holds more in a larger aperture (photometry.fwhm_radius_ratio)",
        "position_angle": "PA is that of the major axis, East of North in ICRS, from 0 to 180 deg; "
        "so is beam_pa_icrs_deg, at the centre of the map; beam_pa_map_deg is that of the header, "
        "East of North in the frame of the map",
        "flags": {f"{flag.name} ({flag.value})": flag.description for flag in FLAGS},
    }


def _fluxes(
    map: Map, fits: SourceFits, apertures: Apertures, geometry: LocalGeometry
) -> dict[str, NDArray[np.float64]]:
    """Peaks in Jy/beam and flux densities in Jy."""
    jy_per_sum = geometry.pixel_area_arcsec2 / map.beam.area_arcsec2
    total, total_err = model_flux(fits)
    return {
        "FLUX_PEAK": fits.peak,
        "FLUX_PEAK_ERR": standard_deviation(fits.covariance[:, 0, 0]),
        "FLUX": apertures.flux * jy_per_sum,
        "FLUX_ERR": apertures.flux_err * jy_per_sum,
        "FLUX_APCOR": apertures.corrected * jy_per_sum,
        "FLUX_APCOR_ERR": apertures.corrected_err * jy_per_sum,
        "FLUX_TOTAL": total * jy_per_sum,
        "FLUX_TOTAL_ERR": total_err * jy_per_sum,
        "RESIDUALS": fits.background,
    }


def _calibrated(
    fluxes: dict[str, NDArray[np.float64]], fraction: float
) -> dict[str, NDArray[np.float64]]:
    """The fluxes, with a fraction of each added to its error in quadrature."""
    errors = {
        f"{name}_ERR": np.hypot(fluxes[f"{name}_ERR"], fraction * fluxes[name])
        for name in ("FLUX_PEAK", "FLUX", "FLUX_APCOR", "FLUX_TOTAL")
    }
    return fluxes | errors


def _fit_quality(fits: SourceFits) -> dict[str, NDArray[Any]]:
    return {
        "POLYN": fits.order,
        "NMSE": fits.nmse,
        "CHI2_RED": fits.chi2_red,
        "BIC": fits.bic,
        "STATUS": fits.status,
        "DEBLEND": fits.group_size > 1,
        "CLUSTER": fits.group_size,
        "GROUP": _numbered(fits.group),
        "NITER": fits.niter,
    }


def _numbered(group: NDArray[np.int_]) -> NDArray[np.int_]:
    """Number groups from 1 in the order in which they come; 0 for none (-1)."""
    labels, first = np.unique(group[group >= 0], return_index=True)
    rank = np.zeros(int(np.max(labels, initial=-1)) + 2, int)
    rank[labels[np.argsort(first)]] = np.arange(1, len(labels) + 1)
    return np.asarray(rank[group])


def _positions(fits: SourceFits, geometry: LocalGeometry) -> dict[str, NDArray[np.float64]]:
    """Positions in degrees and pixels, their errors in arcsec on the sky."""
    covariance = sky_covariance(geometry.jacobian, fits.covariance[:, 1:3, 1:3])
    galactic = geometry.sky.galactic
    return {
        "GLON": galactic.l.deg,
        "GLAT": galactic.b.deg,
        "RA": geometry.sky.ra.deg,
        "DEC": geometry.sky.dec.deg,
        "RA_ERR": standard_deviation(covariance[:, 0, 0]),
        "DEC_ERR": standard_deviation(covariance[:, 1, 1]),
        "X_PIX": fits.x,
        "Y_PIX": fits.y,
    }


def _sizes(
    fits: SourceFits, geometry: LocalGeometry, map: Map
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.bool_]]:
    r"""FWHMs (arcsec) and position angle (deg) on the sky, with first-order errors.

    With and without the beam; and whether each source is unresolved.

    With the shape matrix :math:`S = J R\,\mathrm{diag}(\sigma_1^2, \sigma_2^2)\,R^T J^T`, its
    eigenvalues :math:`\lambda_i` and unit eigenvectors :math:`e_i` on the sky, perturbation theory
    gives :math:`d\lambda_i = e_i^T dS\,e_i` and the turn of the axes towards each other,
    :math:`d\varphi = e_1^T dS\,e_2 / (\lambda_1 - \lambda_2)`. No derivative of an angle is
    taken across its wrap at 180 deg. The error of PA is infinite to first order for a round source:
    it is limited to `MAX_PA_ERR_DEG`.
    """
    shape = _shape_matrix(fits)
    major, minor, pa = sky_ellipse(geometry.jacobian, shape)
    east, north = np.sin(np.deg2rad(pa)), np.cos(np.deg2rad(pa))
    axis_1, axis_2 = np.stack([east, north], axis=-1), np.stack([north, -east], axis=-1)
    perturbations = sky_covariance(geometry.jacobian[:, None], _shape_derivatives(fits))

    def error_of(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
        gradient = np.einsum("ni,npij,nj->np", left, perturbations, right)
        return standard_deviation(quadratic_form(gradient, fits.covariance[:, 3:, 3:]))

    to_fwhm = FWHM_PER_SIGMA**2 / 2  # as FWHM^2 = 8 ln 2 lambda
    gap = (major**2 - minor**2) / FWHM_PER_SIGMA**2
    shapes = sky_covariance(geometry.jacobian, shape)
    own = deconvolve(shapes, perturbations, fits.covariance[:, 3:, 3:], _beams(map, geometry))
    return {
        "FWHM_1": major,
        "FWHM_1_ERR": to_fwhm * error_of(axis_1, axis_1) / major,
        "FWHM_2": minor,
        "FWHM_2_ERR": to_fwhm * error_of(axis_2, axis_2) / minor,
        "PA": pa,
        "PA_ERR": _limited_pa_error(error_of(axis_1, axis_2), gap),
        "FWHM_1_DECONV": own.major,
        "FWHM_1_DECONV_ERR": own.major_err,
        "FWHM_2_DECONV": own.minor,
        "FWHM_2_DECONV_ERR": own.minor_err,
        "PA_DECONV": own.pa_deg,
        "PA_DECONV_ERR": own.pa_err_deg,
    }, own.unresolved & (fits.status != -1)


def _beams(map: Map, geometry: LocalGeometry) -> NDArray[np.float64]:
    """Second moments (n, 2, 2) of the beam on the sky at each source, arcsec^2."""
    beam, n = map.beam, len(geometry.jacobian)
    sky = np.broadcast_to(np.eye(2), (n, 2, 2))
    return pixel_covariance(
        sky,
        np.full(n, beam.major_arcsec),
        np.full(n, beam.minor_arcsec),
        map.beam_pa_at(geometry.sky),
    )


def _limited_pa_error(turn: NDArray[np.float64], gap: NDArray[np.float64]) -> NDArray[np.float64]:
    """``turn / gap`` in degrees, at most that of an unknown angle; NaN stays NaN."""
    error = np.divide(turn, gap, out=np.full_like(turn, np.inf), where=gap > 0)
    return np.where(np.isnan(turn), np.nan, np.minimum(np.rad2deg(error), MAX_PA_ERR_DEG))


def _shape_matrix(fits: SourceFits) -> NDArray[np.float64]:
    """Second moments of the Gaussians in pix^2: (n, 2, 2)."""
    along, across = _axis_projectors(fits.theta)
    return (
        fits.sigma_major[:, None, None] ** 2 * along + fits.sigma_minor[:, None, None] ** 2 * across
    )


def _shape_derivatives(fits: SourceFits) -> NDArray[np.float64]:
    """Differentiate the second moments to (sigma_major, sigma_minor, theta): (n, 3, 2, 2)."""
    major, minor = fits.sigma_major[:, None, None], fits.sigma_minor[:, None, None]
    along, across = _axis_projectors(fits.theta)
    cos, sin = np.cos(2 * fits.theta), np.sin(2 * fits.theta)
    turned = _matrices(-sin, cos, cos, sin)  # derivative of `along` to theta
    gap = np.maximum(major**2 - minor**2, 2 * LEAST_ELLIPTICITY * minor**2)
    return np.stack([2 * major * along, 2 * minor * across, gap * turned], axis=1)


def _axis_projectors(
    theta: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Projectors on the axis at angle theta and on the one across: (n, 2, 2) each."""
    cos, sin = np.cos(theta), np.sin(theta)
    along = _matrices(cos**2, cos * sin, cos * sin, sin**2)
    return along, np.eye(2) - along


def _matrices(
    xx: NDArray[np.float64],
    xy: NDArray[np.float64],
    yx: NDArray[np.float64],
    yy: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Build n 2x2 matrices from their elements: (n, 2, 2)."""
    return np.stack([np.stack([xx, xy], axis=-1), np.stack([yx, yy], axis=-1)], axis=-2)


def with_poor_fits(fits: SourceFits) -> SourceFits:
    """Flag the sources whose fit leaves more than noise, and those that they touch."""
    out = fits.chi2_red > POOR_CHI2
    reach = FWHM_PER_SIGMA * fits.sigma_major
    for poor in np.flatnonzero(out):
        away = np.hypot(fits.x - fits.x[poor], fits.y - fits.y[poor])
        out = out | (away < reach + reach[poor])
    return fits._replace(flags=fits.flags | _bits(out, FLAGS.POOR_FIT))


def _all_flags(shape: tuple[int, int], fits: SourceFits, apertures: Apertures) -> NDArray[np.int_]:
    """Join the flags of the fit with those that follow from its result: (n,)."""
    conditions = {
        FLAGS.NOT_CONVERGED: fits.status == 0,
        FLAGS.NOT_FITTED: fits.status == -1,
        FLAGS.SECOND_TRY: fits.status == 2,
        FLAGS.NEAR_EDGE: _distance_to_edge(shape, fits) < FWHM_PER_SIGMA * fits.sigma_major,
        FLAGS.BLANK_PIXELS: apertures.blank_fraction > 0,
        FLAGS.BLENDED: (fits.group_size > 1) | _overlap_another(fits),
        FLAGS.NO_COVARIANCE: ~np.isfinite(fits.covariance).all(axis=(1, 2)),
        FLAGS.NO_DATA: ~(apertures.area_pix > 0),
        FLAGS.ELONGATED: fits.sigma_major > MAX_AXIS_RATIO * fits.sigma_minor,
        FLAGS.NEGATIVE_FLUX: apertures.flux < 0,
    }
    flags = np.asarray(fits.flags, dtype=int)
    for flag, condition in conditions.items():
        flags = flags | _bits(condition, flag)
    return flags


def _overlap_another(fits: SourceFits) -> NDArray[np.bool_]:
    """Whether each source (n,) overlaps another one."""
    out = np.zeros(len(fits.x), bool)
    out[pairs_closer(fits.x, fits.y, overlap_reach(fits)).ravel()] = True
    return out


def _bits(condition: NDArray[np.bool_], flag: FLAGS) -> NDArray[np.int_]:
    return np.where(condition, int(flag), 0)


def _distance_to_edge(shape: tuple[int, int], fits: SourceFits) -> NDArray[np.float64]:
    """Distance in pixels to the nearest edge of the image, negative outside it."""
    ny, nx = shape
    sides = [fits.x + 0.5, nx - 0.5 - fits.x, fits.y + 0.5, ny - 0.5 - fits.y]
    return np.min(sides, axis=0)
