"""Maps of the sky: what a FITS image means in Jy/beam, and the local geometry of its pixels.

`read_map` turns an image in any of the usual brightness units into a `Map` in Jy/beam with the beam
and the celestial coordinates that photometry needs. `local_geometry` linearises the coordinates
round any pixel position, so that areas and position angles hold far from the projection centre.

Pixel positions are 0-based and refer to pixel centres; ``x`` counts along the array's last axis,
``y`` along its first. Sky positions are ICRS, position angles in degrees East of North.
"""

import logging
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS, FITSFixedWarning, WcsError
from astropy.wcs.utils import pixel_to_skycoord, proj_plane_pixel_scales, wcs_to_celestial_frame
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from hyperjax.errors import (
    BlankMapError,
    ConfigError,
    MapUnitError,
    MissingBeamError,
    MissingFileError,
    MissingWcsError,
    NoImageError,
    NotFitsError,
    RmsMapError,
)

__all__ = [
    "BEAM_IN_HEADER",
    "FWHM_PER_SIGMA",
    "SURVEY_BEAMS",
    "Beam",
    "LocalGeometry",
    "Map",
    "beam_for_survey",
    "brightness_unit",
    "local_geometry",
    "map_name",
    "pixel_area_map",
    "pixel_covariance",
    "read_map",
    "read_noise",
    "sky_covariance",
    "sky_ellipse",
]

logger = logging.getLogger(__name__)

FloatArray: TypeAlias = NDArray[np.float64]

FWHM_PER_SIGMA = math.sqrt(8.0 * math.log(2.0))
"""FWHM of a Gaussian of unit standard deviation."""

_LEAST_ZEROS = 16  # pixels of an area that is blank
_FADED = 1e-3  # of the usual brightness: less is the wing of a model
_ARCSEC = math.radians(1.0 / 3600.0)


@dataclass(frozen=True)
class Beam:
    """Beam of a map: the Gaussian that a point source looks like.

    Parameters
    ----------
    major_arcsec, minor_arcsec : float
        FWHM along the two axes.
    pa_deg : float
        Position angle of the major axis, East of North in the map's own frame.
    effective_area_arcsec2 : float, optional
        Solid angle, where it is known not to be that of the Gaussian.
    """

    major_arcsec: float
    minor_arcsec: float
    pa_deg: float = 0.0
    effective_area_arcsec2: float | None = None

    @property
    def fwhm_arcsec(self) -> float:
        """FWHM of the circular Gaussian of the same area."""
        return math.sqrt(self.major_arcsec * self.minor_arcsec)

    @property
    def area_arcsec2(self) -> float:
        """Solid angle in square arcseconds; pi/(4 ln 2) x major x minor for a Gaussian."""
        if self.effective_area_arcsec2 is not None:
            return self.effective_area_arcsec2
        return math.pi / (4.0 * math.log(2.0)) * self.major_arcsec * self.minor_arcsec

    @property
    def area_sr(self) -> float:
        """Solid angle in steradians."""
        return self.area_arcsec2 * _ARCSEC**2


BEAM_IN_HEADER = 15
"""The survey code of a map whose header gives the beam."""

SURVEY_BEAMS = {
    1: Beam(5.2, 5.2),  # PACS 70 um
    2: Beam(6.8, 6.8),  # PACS 100 um
    3: Beam(12.0, 12.0),  # PACS 160 um
    4: Beam(18.0, 18.0, effective_area_arcsec2=423.0),  # SPIRE 250 um
    5: Beam(24.0, 24.0, effective_area_arcsec2=751.0),  # SPIRE 350 um
    6: Beam(34.5, 34.5, effective_area_arcsec2=1587.0),  # SPIRE 500 um
    7: Beam(8.0, 8.0),  # JCMT 450 um
    8: Beam(14.5, 14.5),  # JCMT 850 um
}
"""Beams of the surveys that have a code."""


def beam_for_survey(code: int) -> Beam:
    """Beam of a survey: 1-3 PACS, 4-6 SPIRE, 7-8 JCMT, by increasing wavelength.

    Raises
    ------
    ConfigError
        If no beam goes with the code.
    """
    try:
        return SURVEY_BEAMS[code]
    except KeyError:
        raise ConfigError(
            f"survey.survey_code = {code} (--survey-code): no such survey; use 1 to 8, or "
            f"{BEAM_IN_HEADER} to take the beam from the map's header"
        ) from None


_NUMBER = r"([-+]?\d*\.?\d+(?:[EeDd][-+]?\d+)?)"
_AIPS_BEAM = re.compile(
    rf"AIPS.*?BMAJ\s*=\s*{_NUMBER}(?:.*?BMIN\s*=\s*{_NUMBER})?(?:.*?BPA\s*=\s*{_NUMBER})?"
)


def _number(header: fits.Header, key: str) -> float | None:
    """Value of a header card as a number; None if it is absent or blank, NaN if it is not one."""
    try:
        value = header.get(key)
        return None if value is None or isinstance(value, fits.card.Undefined) else float(value)
    except (TypeError, ValueError, fits.VerifyError):
        return math.nan


def _aips_beam(header: fits.Header) -> tuple[float, float | None, float | None] | None:
    """BMAJ, BMIN, BPA (deg) of the last restoring beam that AIPS wrote in the HISTORY."""
    history = [_AIPS_BEAM.search(str(line)) for line in header.get("HISTORY", ())]
    found = [match for match in history if match]
    if not found:
        return None
    major, minor, pa = (
        None if number is None else float(number.upper().replace("D", "E"))
        for number in found[-1].groups()
    )
    return None if major is None else (major, minor, pa)


_SAME_GRID_PIX = 0.1  # offset of two grids that are the same
_MIN_BEAM_DEG = 1e-12  # some nanoarcseconds
_BEAM_REMEDY = (
    "give its FWHM in arcsec as survey.beam_fwhm_arcsec in the configuration or --beam on the "
    "command line, or its survey.survey_code or --survey-code"
)


def _beam_from_header(header: fits.Header, path: Path) -> Beam:
    """Beam of the BMAJ, BMIN and BPA cards (deg), or of AIPS' HISTORY."""
    major, minor, pa = (_number(header, key) for key in ("BMAJ", "BMIN", "BPA"))
    if major is None:
        major, minor, pa = _aips_beam(header) or (None, None, None)
    if major is None:
        raise MissingBeamError(f"{path}: no beam (BMAJ) in the header; {_BEAM_REMEDY}")
    minor = major if minor is None else minor
    if not all(_MIN_BEAM_DEG < fwhm < 180.0 for fwhm in (major, minor)):
        raise MissingBeamError(
            f"{path}: the header's beam, BMAJ = {major:g} and BMIN = {minor:g} deg, is not one; "
            f"{_BEAM_REMEDY}"
        )
    pa = pa if pa is not None and math.isfinite(pa) else 0.0
    if minor > major:
        major, minor, pa = minor, major, pa + 90.0
    return Beam(major * 3600.0, minor * 3600.0, pa)


def _beam(
    header: fits.Header, path: Path, beam_fwhm_arcsec: float | None, survey_code: int
) -> Beam:
    """Beam asked for by its FWHM, else by its survey, else the header's."""
    if beam_fwhm_arcsec is not None:
        if not _MIN_BEAM_DEG < beam_fwhm_arcsec / 3600.0 < 180.0:
            raise MissingBeamError(
                f"{path}: a beam FWHM of {beam_fwhm_arcsec:g} arcsec is not one; give a positive "
                "survey.beam_fwhm_arcsec or --beam"
            )
        return Beam(beam_fwhm_arcsec, beam_fwhm_arcsec)
    if survey_code != BEAM_IN_HEADER:
        return beam_for_survey(survey_code)
    return _beam_from_header(header, path)


_JY_PER_PIXEL = u.Jy / u.pix
_JY_PER_BEAM = u.Jy / u.beam
_JY_PER_SR = u.Jy / u.sr

_UNIT_WORDS = {
    "jy": "Jy",
    "jansky": "Jy",
    "janskys": "Jy",
    "ujy": "uJy",
    "beam": "beam",
    "beams": "beam",
    "bm": "beam",
    "pix": "pix",
    "pixel": "pix",
    "pixels": "pix",
    "px": "pix",
    "sr": "sr",
    "steradian": "sr",
    "arcsec": "arcsec",
    "k": "K",
    "kelvin": "K",
}
"""Spellings of units, in lower case, that mean one thing in any case."""

_SOLID_ANGLE = re.compile(r"sr|sterad|arcsec|arcmin|deg", re.IGNORECASE)
_BRIGHTNESS_TEMPERATURE = re.compile(
    r"^([mu]?k|kelvin)[\s_(]+t?_?(?:mb|b|rj)\)?$", flags=re.IGNORECASE
)


def _unit_word(word: str, per_solid_angle: bool) -> str:
    """Spelling that astropy knows of one word of a unit; the word itself if there is none.

    Only the case tells mJy from MJy. Where a writer lost it, the usual of the two is meant if the
    first letter agrees: mJy per beam or pixel, MJy per solid angle.
    """
    if word in {"mjy", "MJY", "Mjy"}:
        usual = "MJy" if per_solid_angle else "mJy"
        return usual if usual[0] == word[0] else word
    if word in {"mJY", "mk"}:
        return {"mJY": "mJy", "mk": "mK"}[word]
    return _UNIT_WORDS.get(word.lower(), word)


def brightness_unit(text: str) -> u.UnitBase:
    """Parse a unit of brightness, whatever its spelling; a flux density is one per pixel.

    Parameters
    ----------
    text : str
        For instance ``Jy``, ``JY/PIXEL``, ``beam-1 Jy``, ``mJy/bm``, ``MJy sr-1`` or ``K (Tb)``.

    Returns
    -------
    astropy.units.UnitBase
        A unit per pixel, per beam or per solid angle, or of temperature.

    Raises
    ------
    ValueError
        If the text is no unit, or not one of brightness, or lost the case that tells mJy from MJy.
    """
    text = _BRIGHTNESS_TEMPERATURE.sub(r"\1", text.strip())
    text = re.sub(r"\bper\b", "/", text).replace("{", "").replace("}", "")
    per_solid_angle = bool(_SOLID_ANGLE.search(text))
    text = re.sub(r"[^\W\d_]+", lambda word: _unit_word(word[0], per_solid_angle), text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", u.UnitsWarning)
        unit = u.Unit(text)
    if not isinstance(unit, u.UnitBase):
        raise ValueError(f"{unit} is logarithmic or structured")
    if unit.is_equivalent(u.Jy):
        unit = unit / u.pix
    if not any(unit.is_equivalent(kind) for kind in (_JY_PER_PIXEL, _JY_PER_BEAM, _JY_PER_SR, u.K)):
        raise ValueError(f"{unit} is not a unit of brightness")
    return unit


_PIXEL_WORD = re.compile(r"pi?x", re.IGNORECASE)


def _unit(header: fits.Header, path: Path, given: str | None) -> u.UnitBase:
    """Find the unit: that given, else the header's BUNIT; warn if it does not say per what."""
    text = given if given is not None else str(header.get("BUNIT") or "")
    remedy = (
        "give Jy/pixel, Jy/beam, MJy/sr or K as units.map_unit in the configuration or --unit on "
        "the command line"
    )
    if not text.strip():
        raise MapUnitError(f"{path}: no brightness unit (BUNIT) in the header; {remedy}")
    try:
        unit = brightness_unit(text)
    except (TypeError, ValueError):
        raise MapUnitError(
            f"{path}: the unit {text.strip()!r} is unknown, ambiguous, or not one of brightness; "
            f"{remedy}"
        ) from None
    if unit.is_equivalent(_JY_PER_PIXEL) and not _PIXEL_WORD.search(text):
        logger.warning(
            "%s: the unit %r does not say per what, and is read as per pixel; if it is not, give "
            "the right one as units.map_unit in the configuration or --unit on the command line",
            path,
            text.strip(),
        )
    return unit


def _frequency(header: fits.Header, wcs: WCS, path: Path, given_ghz: float | None) -> u.Quantity:
    """Frequency given, else that of the image's own spectral axis, else the rest frequency.

    One outside 1 MHz to 1 PHz is none: it was given in another unit.
    """
    hertz = _header_frequencies(header, wcs) if given_ghz is None else [given_ghz * 1e9]
    usable = [value for value in hertz if 1e6 <= value <= 1e15]
    if not usable:
        fault = (
            "the header has no usable one" if given_ghz is None else f"{given_ghz:g} GHz is not one"
        )
        raise MapUnitError(
            f"{path}: a map in K needs its frequency, and {fault}; give it in GHz as "
            "units.frequency_ghz in the configuration or --frequency on the command line"
        )
    return usable[0] * u.Hz


def _header_frequencies(header: fits.Header, wcs: WCS) -> list[float]:
    """Frequencies (Hz) that a header names, the most telling first."""
    spectral = wcs.wcs.spec
    of_axis = (
        [float(wcs.sub(["spectral"]).all_pix2world([0.0], 0)[0][0])]
        if spectral >= 0 and wcs.wcs.ctype[spectral].startswith("FREQ")
        else []
    )
    at_rest = [_number(header, key) for key in ("RESTFRQ", "RESTFREQ")]
    return of_axis + [value for value in at_rest if value is not None]


def _native_per_jy_beam(
    unit: u.UnitBase, beam: Beam, wcs: WCS, shape: tuple[int, ...], frequency: u.Quantity | None
) -> float | FloatArray:
    """Value in the image's unit of 1 Jy/beam: one number, or for a unit per pixel one per pixel."""
    if unit.is_equivalent(_JY_PER_BEAM):
        return float(_JY_PER_BEAM.to(unit))
    if unit.is_equivalent(_JY_PER_PIXEL):
        area = pixel_area_map(wcs, shape)
        area *= float(_JY_PER_PIXEL.to(unit)) / beam.area_arcsec2
        return area
    rayleigh_jeans = [] if frequency is None else u.brightness_temperature(frequency)
    return float(_JY_PER_SR.to(unit, equivalencies=rayleigh_jeans)) / beam.area_sr


class LocalGeometry(NamedTuple):
    """The sky round n pixel positions, to first order.

    Attributes
    ----------
    sky : SkyCoord
        Positions, ICRS, (n,).
    jacobian : ndarray
        Arcseconds per pixel, (n, 2, 2): rows East and North (ICRS), columns x and y.
    pixel_area_arcsec2 : ndarray
        Solid angle of a pixel, the Jacobian's absolute determinant, (n,).

    All are NaN where the map has no sky position.
    """

    sky: SkyCoord
    jacobian: FloatArray
    pixel_area_arcsec2: FloatArray


_MIN_STEP_PIX = 0.25  # less than half a pixel: all-sky maps end at the edge of their last pixel
_MIN_STEP_ARCSEC = 0.1  # the coordinates' rounding, some 1e-10 arcsec, must not show


def local_geometry(wcs: WCS, x: ArrayLike, y: ArrayLike) -> LocalGeometry:
    """Sky positions, and Jacobians of the sky with respect to the pixels, of pixel positions.

    Central differences of the unit vectors towards neighbouring positions, projected on East and
    North at the position itself: they hold at the poles and across a right ascension of zero.

    Parameters
    ----------
    wcs : WCS
        Celestial, 2-D; distortions count.
    x, y : array_like
        Pixel positions, (n,) or scalar, 0-based.

    Returns
    -------
    LocalGeometry
        NaN where there is no sky, as in the corners of an all-sky map.
    """
    x, y = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (x, y)))
    scale_arcsec = 3600.0 * float(np.min(proj_plane_pixel_scales(wcs)))
    step = max(_MIN_STEP_PIX, _MIN_STEP_ARCSEC / scale_arcsec)
    offsets = step * np.array([[0, 1, -1, 0, 0], [0, 0, 0, 1, -1]])[..., np.newaxis]
    around = pixel_to_skycoord(x + offsets[0], y + offsets[1], wcs, origin=0).icrs
    _, right, left, up, down = np.moveaxis(around.cartesian.xyz.value, 0, -1)
    columns = np.stack([right - left, up - down], axis=-1) / (2.0 * step * _ARCSEC)
    jacobian = _east_north(around[0]) @ columns
    return LocalGeometry(around[0], jacobian, np.abs(_determinant(jacobian)))


def _east_north(sky: SkyCoord) -> FloatArray:
    """Directions of East and North at n positions, as unit vectors: (n, 2, 3)."""
    ra, dec = sky.ra.rad, sky.dec.rad
    east = np.stack([-np.sin(ra), np.cos(ra), np.zeros_like(ra)], axis=-1)
    north = np.stack([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)], axis=-1)
    return np.stack([east, north], axis=-2)


def _determinant(matrix: FloatArray) -> FloatArray:
    return matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0]


_AREA_DEGREE = 15  # of the polynomial through the areas, along each axis
_AREA_TOLERANCE = 1e-7  # relative, between the nodes
_AREA_BLOCK_PIX = 1 << 18  # pixels computed at once where no polynomial serves


def pixel_area_map(wcs: WCS, shape: tuple[int, ...]) -> FloatArray:
    """Solid angle of every pixel of a map in square arcseconds, (ny, nx).

    A polynomial through the local areas at Chebyshev's nodes, accurate to 1e-7; every pixel on its
    own where that is not reached, or where parts of the map are off the sky (NaN there).
    """
    ny, nx = shape
    nodes = chebyshev.chebpts1(_AREA_DEGREE + 1)
    areas = _area_on_grid(wcs, *(_to_pixels(nodes, size) for size in shape))
    if np.isfinite(areas).all():
        between = np.concatenate([[-1.0], 0.5 * (nodes[1:] + nodes[:-1]), [1.0]])
        exact = _area_on_grid(wcs, *(_to_pixels(between, size) for size in shape))
        error = _through_nodes(areas, nodes, between, between) - exact
        if np.all(np.abs(error) <= _AREA_TOLERANCE * exact):
            centres = ((2.0 * np.arange(size) + 1.0) / size - 1.0 for size in shape)
            return _through_nodes(areas, nodes, *centres)
    area = np.empty(shape)
    rows = max(1, _AREA_BLOCK_PIX // nx)
    for start in range(0, ny, rows):
        block = np.arange(start, min(start + rows, ny))
        area[block] = _area_on_grid(wcs, block, np.arange(nx))
    return area


def _to_pixels(place: FloatArray, size: int) -> FloatArray:
    """Pixel coordinates of places from -1 to 1, the outer edges of an axis of ``size`` pixels."""
    return 0.5 * size * (place + 1.0) - 0.5


def _through_nodes(
    values: FloatArray, nodes: FloatArray, y: FloatArray, x: FloatArray
) -> FloatArray:
    """Polynomial through values at pairs of nodes, at pairs of other places: (len(y), len(x))."""
    to_coefficients = np.linalg.inv(chebyshev.chebvander(nodes, _AREA_DEGREE))
    rows, columns = (chebyshev.chebvander(v, _AREA_DEGREE) @ to_coefficients for v in (y, x))
    return np.asarray(rows @ values @ columns.T)


def _area_on_grid(wcs: WCS, y: ArrayLike, x: ArrayLike) -> FloatArray:
    """Local pixel areas at all pairs of the coordinates: (len(y), len(x))."""
    yy, xx = np.meshgrid(y, x, indexing="ij")
    return local_geometry(wcs, xx.ravel(), yy.ravel()).pixel_area_arcsec2.reshape(yy.shape)


def sky_covariance(jacobian: ArrayLike, covariance_pix: ArrayLike) -> FloatArray:
    """Covariance of (East, North) in square arcseconds of a covariance of (x, y) in pixels.

    Parameters
    ----------
    jacobian, covariance_pix : array_like
        (..., 2, 2); the Jacobian as in `LocalGeometry`.
    """
    jacobian = np.asarray(jacobian, dtype=np.float64)
    return jacobian @ np.asarray(covariance_pix) @ np.swapaxes(jacobian, -1, -2)


def sky_ellipse(
    jacobian: ArrayLike, covariance_pix: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Half-maximum ellipses on the sky of Gaussians given by their covariances in pixels.

    Parameters
    ----------
    jacobian : array_like
        Arcseconds per pixel, (n, 2, 2), as in `LocalGeometry`.
    covariance_pix : array_like
        Covariance of (x, y), square pixels, (n, 2, 2).

    Returns
    -------
    fwhm_major, fwhm_minor : ndarray
        Arcseconds, (n,).
    pa : ndarray
        Position angle of the major axis, degrees East of North in [0, 180), (n,).
    """
    covariance = sky_covariance(jacobian, covariance_pix)
    east, north, cross = covariance[..., 0, 0], covariance[..., 1, 1], covariance[..., 0, 1]
    mean, half_spread = 0.5 * (east + north), np.hypot(0.5 * (east - north), cross)
    fwhm_major = FWHM_PER_SIGMA * np.sqrt(mean + half_spread)
    fwhm_minor = FWHM_PER_SIGMA * np.sqrt(np.maximum(mean - half_spread, 0.0))
    pa = np.degrees(0.5 * np.arctan2(2.0 * cross, north - east))
    return fwhm_major, fwhm_minor, pa % 180.0 % 180.0  # twice: -1e-20 % 180 is 180


def pixel_covariance(
    jacobian: ArrayLike,
    fwhm_major_arcsec: ArrayLike,
    fwhm_minor_arcsec: ArrayLike,
    pa_deg: ArrayLike,
) -> FloatArray:
    """Covariances in pixels of Gaussians given on the sky: the inverse of `sky_ellipse`.

    Parameters
    ----------
    jacobian : array_like
        Arcseconds per pixel, (n, 2, 2), as in `LocalGeometry`.
    fwhm_major_arcsec, fwhm_minor_arcsec, pa_deg : array_like
        FWHM and position angle East of North, (n,).

    Returns
    -------
    ndarray
        Covariance of (x, y), square pixels, (n, 2, 2).
    """
    pa = np.radians(pa_deg)
    along = np.stack([np.sin(pa), np.cos(pa)], axis=-1)
    across = np.stack([np.cos(pa), -np.sin(pa)], axis=-1)
    half_axes = np.stack(
        [
            np.asarray(fwhm_major_arcsec)[..., np.newaxis] * along,
            np.asarray(fwhm_minor_arcsec)[..., np.newaxis] * across,
        ],
        axis=-1,
    )
    root = np.linalg.inv(np.asarray(jacobian, dtype=np.float64)) @ half_axes / FWHM_PER_SIGMA
    return root @ np.swapaxes(root, -1, -2)


@dataclass(frozen=True, eq=False)
class Map:
    """One image of the sky in Jy/beam.

    Parameters
    ----------
    name : str
        Name of the file without its ending.
    path : Path or None
        File that it came from.
    data : ndarray
        Brightness in Jy/beam, (ny, nx), NaN where there is none.
    wcs : WCS
        Celestial, longitude first, 2-D.
    beam : Beam
        The beam.
    unit : astropy.units.UnitBase
        Unit of the image before it was converted.
    native_per_jy_beam : float or ndarray
        What to multiply ``data`` with to have it back in ``unit``; (ny, nx) for a unit per pixel.
    frame : str
        Celestial frame of the coordinates: ``icrs``, ``fk5``, ``fk4``, ``fk4noeterms`` or
        ``galactic``.
    rms : ndarray or None
        The noise in Jy/beam, (ny, nx), where it is given (`noise.rms_map`); of a map of weights,
        in units of its median.
    """

    name: str
    path: Path | None
    data: FloatArray
    wcs: WCS
    beam: Beam
    unit: u.UnitBase
    native_per_jy_beam: float | FloatArray
    frame: str
    rms: FloatArray | None = None

    @property
    def label(self) -> str:
        """What messages call it: its file, and its name where that is another (a channel's)."""
        if self.path is None:
            return self.name
        same = self.name == map_name(self.path)
        return str(self.path) if same else f"{self.path} ({self.name})"

    def __repr__(self) -> str:
        """Size, unit, beam and frame on one line."""
        ny, nx = self.shape
        beam = f"{self.beam.major_arcsec:.3g} x {self.beam.minor_arcsec:.3g} arcsec"
        return (
            f"<Map {self.name!r}: {nx} x {ny} pixels of {self.pixel_scale_arcsec:.3g} arcsec, "
            f"Jy/beam (read as {self.unit}), beam {beam}, {self.frame}>"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (ny, nx)."""
        ny, nx = self.data.shape
        return ny, nx

    @cached_property
    def pixel_scale_arcsec(self) -> float:
        """Square root of the area of the pixel at the map's centre."""
        return _central_pixel_scale(self.wcs, self.shape)

    @property
    def beam_fwhm_pix(self) -> float:
        """FWHM of the beam in pixels at the map's centre."""
        return self.beam.fwhm_arcsec / self.pixel_scale_arcsec

    @cached_property
    def beam_covariance_pix(self) -> FloatArray:
        """Covariance (2, 2) of the beam in x and y at the map's centre, square pixels."""
        ny, nx = self.shape
        jacobian = local_geometry(self.wcs, 0.5 * (nx - 1), 0.5 * (ny - 1)).jacobian
        axes = self.beam.major_arcsec, self.beam.minor_arcsec, self.beam_pa_icrs_deg
        return pixel_covariance(jacobian, *axes)[0]

    @cached_property
    def beam_pa_icrs_deg(self) -> float:
        """Position angle of the beam, East of North in ICRS, at the map's centre, in [0, 180)."""
        ny, nx = self.shape
        centre = pixel_to_skycoord([0.5 * (nx - 1)], [0.5 * (ny - 1)], self.wcs, origin=0)
        return float(self.beam_pa_at(centre)[0])

    def beam_pa_at(self, sky: SkyCoord) -> FloatArray:
        """Position angle (n,) of the beam, East of North in ICRS, at positions, in [0, 180)."""
        there = sky.transform_to(wcs_to_celestial_frame(self.wcs))
        along = there.directional_offset_by(self.beam.pa_deg * u.deg, 1 * u.arcmin)
        return np.asarray(there.icrs.position_angle(along.icrs).deg % 180.0)


def _central_pixel_scale(wcs: WCS, shape: tuple[int, ...]) -> float:
    ny, nx = shape
    area = local_geometry(wcs, 0.5 * (nx - 1), 0.5 * (ny - 1)).pixel_area_arcsec2
    return math.sqrt(float(area[0]))


def read_map(
    path: str | os.PathLike[str],
    *,
    hdu: int | str | None = None,
    unit: str | None = None,
    beam_fwhm_arcsec: float | None = None,
    survey_code: int = BEAM_IN_HEADER,
    frequency_ghz: float | None = None,
) -> Map:
    """Read a map from a FITS file and convert it to Jy/beam.

    Axes of length one are dropped, BSCALE and BLANK are honoured, infinities become NaN, and an
    image with its latitude axis first is transposed. Fluxes per pixel are divided by the *local*
    area of each pixel; temperatures are those of Rayleigh and Jeans.

    Parameters
    ----------
    path : path-like
        A FITS file: plain, gzipped, or with a tile-compressed image.
    hdu : int or str, optional
        Number (0 is the primary) or name of the HDU; the first with an image if not given.
    unit : str, optional
        Brightness unit, in place of BUNIT; see `brightness_unit`.
    beam_fwhm_arcsec : float, optional
        FWHM of a circular beam, in place of the survey's and the header's.
    survey_code : int
        Survey whose beam to use, in place of the header's (15); see `beam_for_survey`.
    frequency_ghz : float, optional
        Frequency of a map in K, in place of the header's.

    Raises
    ------
    MissingFileError, NotFitsError, NoImageError, MissingWcsError, MissingBeamError, MapUnitError
        If the file lacks what its name says; one line that names the file and the remedy.
    BlankMapError
        If no pixel is finite, or all are equal.
    """
    path = Path(path)
    with mended_headers_unsaid():
        header, wcs, data = _read_image(path, hdu)
    return map_of_plane(
        path,
        header,
        wcs,
        data,
        unit=unit,
        beam_fwhm_arcsec=beam_fwhm_arcsec,
        survey_code=survey_code,
        frequency_ghz=frequency_ghz,
    )


def map_of_plane(
    path: Path,
    header: fits.Header,
    wcs: WCS,
    data: FloatArray,
    *,
    unit: str | None = None,
    beam: Beam | None = None,
    beam_fwhm_arcsec: float | None = None,
    survey_code: int = BEAM_IN_HEADER,
    frequency_ghz: float | None = None,
) -> Map:
    """Make a map of an image that was read, as `read_map` does; `data` is changed.

    Parameters
    ----------
    path, header, wcs : Path, Header, WCS
        Where the image is from, its header and its full coordinates.
    data : ndarray
        (ny, nx) in the header's unit, longitude along the rows.
    beam : Beam, optional
        In place of all others.
    unit, beam_fwhm_arcsec, survey_code, frequency_ghz
        As in `read_map`.
    """
    with mended_headers_unsaid():
        celestial, frame = _celestial(wcs, data.shape, path)
        beam = beam or _beam(header, path, beam_fwhm_arcsec, survey_code)
        native_unit = _unit(header, path, unit)
        in_kelvin = native_unit.is_equivalent(u.K)
        frequency = _frequency(header, wcs, path, frequency_ghz) if in_kelvin else None
    native_per_jy_beam = _native_per_jy_beam(native_unit, beam, celestial, data.shape, frequency)
    data /= native_per_jy_beam
    zeros = blank_zeros(data)
    if zeros.any():
        logger.info("%s: %d pixels that are exactly 0 are taken as blank", path, zeros.sum())
        data[zeros] = np.nan
    return Map(map_name(path), path, data, celestial, beam, native_unit, native_per_jy_beam, frame)


def blank_zeros(data: FloatArray) -> NDArray[np.bool_]:
    """Pixels that are blank, though they hold 0 and not NaN.

    They lie in connected areas of exact zeros, of sixteen pixels at least, at whose edge the map
    begins with values of its usual size. Zeros among noise are none, nor are those that the model
    of a map without noise fades into.
    """
    zero = data == 0
    if not zero.any():
        return zero
    labels, count = ndimage.label(zero)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    usual = np.median(np.abs(data[np.isfinite(data) & ~zero])) if not zero.all() else 0.0
    edge = ndimage.grey_dilation(labels, size=3)
    beside = (edge > 0) & np.isfinite(data) & ~zero
    brightness = np.full(count + 1, np.inf)  # of areas between pixels that are blank
    index = np.unique(edge[beside])
    if index.size:
        brightness[index] = ndimage.median(np.abs(data[beside]), edge[beside], index)
    blank = (areas >= _LEAST_ZEROS) & (brightness > _FADED * usual)
    blank[0] = False
    return np.asarray(blank[labels])


def read_noise(
    path: str | os.PathLike[str], like: Map, hdu: int | str | None = None, kind: str = "rms"
) -> FloatArray:
    """Read an image of the noise of a map: its standard deviation, NaN where either is blank.

    Parameters
    ----------
    path : path-like
        A FITS file.
    like : Map
        The map. An image without coordinates has those of the map, pixel by pixel.
    hdu : int or str, optional
        Number (0 is the primary) or name of the HDU; the first with an image if not given.
    kind : str
        What the image holds: "rms", in any unit that `like` could have, or without one in that of
        `like`; "variance", in the square of such a unit; or "weight", which the inverse variance
        is proportional to, where 0 is blank.

    Returns
    -------
    ndarray
        (ny, nx), in Jy/beam; for a weight in units of its median.

    Raises
    ------
    MissingFileError, NotFitsError, NoImageError, MissingWcsError, MapUnitError, BlankMapError
        As `read_map`.
    RmsMapError
        If it has another shape or lies elsewhere on the sky than the map, or is not positive
        somewhere.
    """
    path = Path(path)
    with mended_headers_unsaid():
        header, wcs, data = _read_image(path, hdu, like)
        celestial, _ = _celestial(wcs, data.shape, path)
        _refuse_other_grid(path, celestial, data.shape, like)
        data[~np.isfinite(like.data)] = np.nan
        if kind == "weight":
            data[data == 0] = np.nan
        seen = np.isfinite(data)
        if not seen.any():
            raise RmsMapError(
                f"{path}: the {kind} map of the noise is blank wherever the map has data; give one "
                "of this map"
            )
        wrong = data <= 0
        if wrong.any():
            of_zero = "negative" if kind == "weight" else "zero or negative"
            raise RmsMapError(
                f"{path}: the {kind} map of the noise is {of_zero} in {wrong.sum()} pixels where "
                "the map has data; name the extension of the noise (noise.rms_hdu), or give "
                "positive values, or NaN where the map is not to be used"
            )
        if kind == "weight":
            return np.asarray(np.sqrt(np.median(data[seen]) / data))
        given = None if header.get("BUNIT") else like.unit.to_string()
        if kind == "variance":
            data = np.sqrt(data)
            given = given or _root_of_unit(header, path)
        unit = _unit(header, path, given)
        if unit == like.unit:
            return data / like.native_per_jy_beam
        frequency = _frequency(header, wcs, path, None) if unit.is_equivalent(u.K) else None
        return data / _native_per_jy_beam(unit, like.beam, like.wcs, data.shape, frequency)


def _root_of_unit(header: fits.Header, path: Path) -> str:
    """The unit whose square a map of variances is in."""
    text = str(header["BUNIT"])
    try:
        return str((u.Unit(text) ** 0.5).to_string())
    except ValueError:
        raise RmsMapError(
            f"{path}: the unit {text.strip()!r} of the variances is unknown; give the square of a "
            "unit of brightness as BUNIT, such as Jy2/beam2, or none for that of the map's"
        ) from None


def _refuse_other_grid(path: Path, wcs: WCS, shape: tuple[int, ...], like: Map) -> None:
    """Refuse an image whose pixels are not those of a map."""
    if shape != like.shape:
        raise RmsMapError(
            f"{path}: the map of the noise has {shape[1]} x {shape[0]} pixels, "
            f"{like.path or like.name} {like.shape[1]} x {like.shape[0]}; give one on the same grid"
        )
    ny, nx = shape
    x, y = np.array([0, nx - 1, (nx - 1) / 2]), np.array([0, ny - 1, (ny - 1) / 2])
    here, there = (pixel_to_skycoord(x, y, each, origin=0).icrs for each in (wcs, like.wcs))
    off = here.separation(there).arcsec / like.pixel_scale_arcsec
    if np.any(off > _SAME_GRID_PIX):
        raise RmsMapError(
            f"{path}: the map of the noise lies {np.nanmax(off):.3g} pixels off "
            f"{like.path or like.name} on the sky; give one on the same grid"
        )


@contextmanager
def mended_headers_unsaid() -> Iterator[None]:
    """Ignore the warnings of headers that astropy could mend or do without."""
    with warnings.catch_warnings():
        for category in (AstropyUserWarning, FITSFixedWarning, u.UnitsWarning):
            warnings.simplefilter("ignore", category)
        yield


def map_name(path: Path) -> str:
    """Name of a map: that of its file without the ending."""
    return re.sub(r"\.(fits|fit|fts)(\.(gz|fz))?$", "", path.name, flags=re.IGNORECASE)


_UNREADABLE = (OSError, EOFError, LookupError, TypeError, ValueError, zlib.error, fits.VerifyError)
"""What astropy raises on files that are not FITS, cut short, or damaged."""


@contextmanager
def _fits_errors(path: Path) -> Iterator[None]:
    """Report what astropy says of a damaged file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Error validating header")
        try:
            yield
        except (*_UNREADABLE, fits.verify.VerifyWarning) as error:
            raise NotFitsError(
                f"{path}: not a FITS file, or cut short or damaged ({_reason(error)}); write or "
                "fetch it again"
            ) from error


def _reason(error: Exception) -> str:
    """What an exception says: its first sentence, for astropy's others are hints on its options."""
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".") or type(error).__name__


def _read_image(
    path: Path, hdu: int | str | None, like: Map | None = None
) -> tuple[fits.Header, WCS, FloatArray]:
    """Header, full coordinates and celestial plane (as stored, but longitude first) of an image.

    An image that belongs to a map may have one and the same value everywhere, and without
    coordinates of its own has those of the map.
    """
    if not path.is_file():
        fault = "is a folder, not a map" if path.is_dir() else "no such file"
        raise MissingFileError(f"{path}: {fault}; give the path of a FITS file")
    with open_map(path) as hdus:
        image = hdu_of_image(hdus, path, hdu)
        if like is not None and "CTYPE1" not in image.header:
            wcs, rows, columns = like.wcs, len(image.shape) - 2, len(image.shape) - 1
        else:
            wcs = full_wcs(image.header, hdus, path)
            rows, columns = _celestial_axes(image.shape, wcs, path)
        with _fits_errors(path):
            plane = _plane(image.data, rows, columns)
        header = image.header
    plane[np.isinf(plane)] = np.nan
    if like is None or np.isnan(plane).all():
        _refuse_blank(plane, path)
    return header, wcs, plane


@contextmanager
def open_map(path: Path) -> Iterator[fits.HDUList]:
    """Open a FITS file; unsigned integers as scaled ones, since astropy forgets BLANK on them."""
    with ExitStack() as stack:
        with _fits_errors(path):
            file = stack.enter_context(path.open("rb"))
            hdus = stack.enter_context(fits.open(file, uint=False))
        yield hdus


def _plane(data: NDArray[Any], rows: int, columns: int) -> FloatArray:
    """Copy of the plane of two axes of an array, the others being of length one."""
    order = [axis for axis in range(data.ndim) if axis not in (rows, columns)]
    plane = data.transpose(*order, rows, columns).reshape(data.shape[rows], data.shape[columns])
    return np.array(plane, dtype=np.float64, order="C")


def hdu_of_image(hdus: fits.HDUList, path: Path, which: int | str | None) -> Any:
    """HDU asked for by number or name, or the first that holds an image."""
    with _fits_errors(path):
        if which is None:
            found = next((hdu for hdu in hdus if _is_image(hdu)), None)
        else:
            found = _hdu(hdus, which)
    if found is None or not _is_image(found):
        where = "" if which is None else f" in HDU {which}"
        raise NoImageError(
            f"{path}: no image of two dimensions{where}; give a file that has one, or name its HDU "
            "with --hdu or files.hdu"
        )
    return found


def _hdu(hdus: fits.HDUList, which: int | str) -> Any:
    """HDU by number (also as text) or name; None if there is none."""
    try:
        return hdus[int(which) if str(which).isdecimal() else which]
    except (IndexError, KeyError):
        return None


def _is_image(hdu: Any) -> bool:
    kinds = (fits.PrimaryHDU, fits.ImageHDU, fits.CompImageHDU)
    return isinstance(hdu, kinds) and sum(length > 1 for length in hdu.shape) >= 2


def _refuse_blank(data: FloatArray, path: Path) -> None:
    low, high = np.fmin.reduce(data, axis=None), np.fmax.reduce(data, axis=None)
    if np.isnan(low):
        fault = "has no finite pixel"
    elif low == high:
        fault = f"has the value {low:g} in every pixel"
    else:
        return
    raise BlankMapError(
        f"{path}: the map {fault}; give another file, or another HDU with --hdu or files.hdu"
    )


def full_wcs(header: fits.Header, hdus: fits.HDUList, path: Path) -> WCS:
    """Coordinates of all axes of an image, or where SIP distorts the first two of these.

    Astropy takes distortions with two axes only.
    """
    try:
        return WCS(header, hdus, naxis=2 if "A_ORDER" in header else None)
    except (WcsError, LookupError, TypeError, ValueError) as error:
        raise MissingWcsError(_wcs_fault(path, error)) from error


def _wcs_fault(path: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        f"{path}: the header's coordinates cannot be used "
        f"({reason[-1].strip() if reason else type(error).__name__}); correct them"
    )


def _celestial_axes(shape: tuple[int, ...], wcs: WCS, path: Path) -> tuple[int, int]:
    """Axes of the array that latitude and longitude run along; the others must be of length one.

    FITS counts its axes from the last of the array's.
    """
    names = list(wcs.wcs.ctype)
    celestial = wcs.wcs.lat, wcs.wcs.lng
    if min(celestial) < 0 or not all("-" in names[axis] for axis in celestial):
        raise MissingWcsError(
            f"{path}: no celestial coordinates in the header (CTYPE {_listed(names)}); give a map "
            "that has them, such as RA---TAN and DEC--TAN"
        )
    rows, columns = (len(shape) - 1 - axis for axis in celestial)
    channels = math.prod(n for axis, n in enumerate(shape) if axis not in (rows, columns))
    if min(rows, columns) < 0 or (channels > 1 and 1 in (shape[rows], shape[columns])):
        raise MissingWcsError(
            f"{path}: the image's axes ({_listed(names)}) are not longitude and latitude; give a "
            "map of the sky"
        )
    if channels > 1:
        raise NoImageError(
            f"{path}: a cube of {channels} channels; set control.datacube to true, which treats "
            "each as a map, or write the plane that you want to a file of its own"
        )
    return rows, columns


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _celestial(wcs: WCS, shape: tuple[int, ...], path: Path) -> tuple[WCS, str]:
    """Celestial coordinates of a map, longitude first, and the name of their frame."""
    if wcs.wcs.lng > wcs.wcs.lat and wcs.has_distortion:
        raise MissingWcsError(
            f"{path}: distorted coordinates with latitude first cannot be used; swap the axes"
        )
    if wcs.wcs.lngtyp not in {"RA", "GLON"}:
        raise MissingWcsError(
            f"{path}: {wcs.wcs.lngtyp} and {wcs.wcs.lattyp} cannot be used; give a map in "
            "equatorial or Galactic coordinates"
        )
    try:
        celestial = wcs.sub(["longitude", "latitude"])
        frame = wcs_to_celestial_frame(celestial).name
    except (WcsError, ValueError) as error:
        raise MissingWcsError(_wcs_fault(path, error)) from error
    with np.errstate(invalid="ignore"):
        scale = _central_pixel_scale(celestial, shape)
    if not (math.isfinite(scale) and scale > 0.0):
        raise MissingWcsError(
            f"{path}: the header's coordinates put no sky at the map's centre; correct them"
        )
    return celestial, frame
