"""Maps with known sources, and the truth about them.

Sources are defined on the sky: position, total flux density, FWHM and position angle (East of
North) in ICRS. They reach the pixels through the local Jacobian of the WCS, found by moving
small steps on the sphere, so a rotated, flipped, non-square or Galactic map, or one far from its
projection centre, tests the geometry of whatever reads it.

The beam is Gaussian and constant on the sky; its position angle is that of the header's BPA, in
the map's own frame. Everything is built in Jy/beam and converted to the map's unit at the end.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.ndimage import distance_transform_edt

from hyperjax.errors import ConfigError, OutputError
from hyperjax.files import write_together
from hyperjax.sphere import (
    FWHM_PER_SIGMA,
    frame_rotation,
    gaussian_covariance,
    gaussian_ellipse,
    pixel_solid_angles,
    pixels_per_arcsec,
    principal_axes,
)

__all__ = [
    "Simulated",
    "Simulation",
    "SkySources",
    "demo_simulation",
    "render",
    "simulate",
    "write_simulation",
]

Unit = Literal["Jy/beam", "Jy/pixel", "MJy/sr", "K"]
Frame = Literal["icrs", "fk5", "fk4", "galactic"]
Noise = Literal["white", "beam", "1/f", "none"]
Blank = Literal["nan", "zero"]
WcsMatrix = Literal["PC", "CD"]
FloatArray = NDArray[np.float64]

_GAUSSIAN_AREA = np.pi / (4 * np.log(2))  # area of a Gaussian over its FWHM_1 x FWHM_2
_WINDOW_SIGMA = 7.0  # leaves out exp(-24.5) = 2e-11 of the flux
_BLEND_REACH_BEAMS = 1.0  # how far beyond the smallest separation a partner is put
_TRIES = 2000  # for the next source, before the map counts as full

_FRAME_CARDS: dict[Frame, dict[str, str | float]] = {
    "icrs": {"RADESYS": "ICRS"},
    "fk5": {"RADESYS": "FK5", "EQUINOX": 2000.0},
    "fk4": {"RADESYS": "FK4", "EQUINOX": 1950.0},
    "galactic": {},
}


@dataclass(frozen=True)
class Simulation:
    """What a simulated map contains.

    Lengths "in beams" are multiples of the beam's FWHM, the geometric mean of its two axes.

    Attributes
    ----------
    shape : tuple of int
        ``(ny, nx)``, pixels.
    n_sources : int
        Number of sources; ignored if `positions` is given.
    seed : int
        The same seed gives the same map. Sources, background, holes and noise draw from separate
        streams: another noise leaves the sources where they are.
    beam_fwhm_pix : float
        Beam FWHM in nominal pixels, ``sqrt(|CDELT1 CDELT2|)``.
    beam_axis_ratio : float
        Minor over major axis of the beam.
    beam_pa_deg : float
        Position angle of the beam, degrees East of North in the map's frame.
    pixel_arcsec : float or tuple of float
        Nominal pixel side, or the two sides ``(x, y)``, arcsec.
    frame : {"icrs", "fk5", "fk4", "galactic"}
        Celestial frame of the header.
    projection : str
        FITS projection code: "TAN", "SIN", "CAR", ...
    centre_deg : tuple of float
        CRVAL: longitude and latitude of the reference point in `frame`, degrees.
    reference_offset_pix : tuple of float
        CRPIX minus the centre of the map, ``(x, y)`` pixels.
    rotation_deg : float
        CROTA2: the +y axis points this far West of North.
    flip : bool
        East to the right: CDELT1 > 0.
    wcs_matrix : {"PC", "CD"}
        Keywords that hold the WCS matrix.
    unit : {"Jy/beam", "Jy/pixel", "MJy/sr", "K"}
        Brightness unit of the map; "K" is the Rayleigh-Jeans temperature at `frequency_ghz`.
    bunit : str or None
        Spelling of BUNIT, if it is to differ from `unit`.
    frequency_ghz : float or None
        Written as RESTFRQ.
    snr_range : tuple of float
        Range of peak over rms, drawn log-uniformly.
    size_range : tuple of float
        Range of the convolved major FWHM in beams (exact for a round beam), drawn uniformly.
    axis_ratio_range : tuple of float
        Range of the minor over the major axis before convolution, drawn uniformly.
    min_separation_beams : float
        Smallest distance of two sources.
    blend_fraction : float
        Fraction of the sources that are put within one beam of that smallest distance to another.
    edge_margin_beams : float
        Smallest distance of a source to the edge of the map and to blank pixels.
    positions : tuple of (x, y), or None
        Exact positions, 0-based pixels, in place of random ones; neither margin nor separation
        is enforced.
    fluxes : tuple of float, or None
        Exact total flux densities, Jy, one per source.
    shapes : tuple of (major, minor, PA), or None
        Exact convolved FWHMs, arcsec, and position angles, degrees East of North in ICRS.
    noise : {"white", "beam", "1/f", "none"}
        "beam" is white noise convolved with the beam; "1/f" has power
        ``1 + (knee wavelength / wavelength)**alpha``.
    rms_mjy_beam : float
        Standard deviation of the noise, mJy/beam, and the scale of the sources and the
        background; still that scale when `noise` is "none".
    noise_alpha, noise_knee_beams : float
        Slope and knee wavelength of "1/f" noise.
    offset : float
        Constant added to the map, in rms.
    gradient : float
        Peak-to-peak range of a plane across the map, in rms.
    structure : float
        Standard deviation of smooth random structure, in rms.
    structure_scale_beams : float
        FWHM of the kernel that smooths it.
    border_pix : int
        Width of a blank border.
    n_holes : int
        Number of blank discs.
    hole_radius_beams : float
        Their radius.
    blank : {"nan", "zero"}
        What blank pixels hold.
    """

    shape: tuple[int, int] = (400, 400)
    n_sources: int = 100
    seed: int = 1
    beam_fwhm_pix: float = 4.0
    beam_axis_ratio: float = 1.0
    beam_pa_deg: float = 0.0
    pixel_arcsec: float | tuple[float, float] = 1.0
    frame: Frame = "icrs"
    projection: str = "TAN"
    centre_deg: tuple[float, float] = (83.8, -5.4)
    reference_offset_pix: tuple[float, float] = (0.0, 0.0)
    rotation_deg: float = 0.0
    flip: bool = False
    wcs_matrix: WcsMatrix = "PC"
    unit: Unit = "Jy/beam"
    bunit: str | None = None
    frequency_ghz: float | None = None
    snr_range: tuple[float, float] = (8.0, 100.0)
    size_range: tuple[float, float] = (1.0, 1.5)
    axis_ratio_range: tuple[float, float] = (0.3, 1.0)
    min_separation_beams: float = 1.5
    blend_fraction: float = 0.0
    edge_margin_beams: float = 2.0
    positions: tuple[tuple[float, float], ...] | None = None
    fluxes: tuple[float, ...] | None = None
    shapes: tuple[tuple[float, float, float], ...] | None = None
    noise: Noise = "white"
    rms_mjy_beam: float = 1.0
    noise_alpha: float = 3.0
    noise_knee_beams: float = 10.0
    offset: float = 0.0
    gradient: float = 4.0
    structure: float = 1.0
    structure_scale_beams: float = 20.0
    border_pix: int = 0
    n_holes: int = 0
    hole_radius_beams: float = 3.0
    blank: Blank = "nan"

    def __post_init__(self) -> None:
        """Refuse options that describe no map."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, not one of {', '.join(choices)}"
                )
        for name in _POSITIVE:
            if not np.all(np.asarray(getattr(self, name)) > 0):
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("snr_range", "size_range", "axis_ratio_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"{name} must rise from a positive number, not {low} to {high}")
        if self.size_range[0] < 1:
            raise ConfigError("size_range must start at 1 beam or more: sources are convolved")
        if max(self.beam_axis_ratio, self.axis_ratio_range[1], self.blend_fraction) > 1:
            raise ConfigError("axis ratios and blend_fraction must not exceed 1")
        if self.unit == "K" and self.frequency_ghz is None:
            raise ConfigError("a map in K needs frequency_ghz")
        for name in ("fluxes", "shapes"):
            given = getattr(self, name)
            if given is not None and len(given) != self.source_count:
                raise ConfigError(f"{len(given)} {name} for {self.source_count} sources")

    @property
    def source_count(self) -> int:
        """Number of sources, given or to be drawn."""
        return self.n_sources if self.positions is None else len(self.positions)

    @property
    def pixel_sides_arcsec(self) -> tuple[float, float]:
        """Nominal sides of a pixel along x and y, arcsec."""
        side = self.pixel_arcsec
        return side if isinstance(side, tuple) else (side, side)

    @property
    def beam_fwhm_arcsec(self) -> float:
        """Geometric mean of the beam's axes, arcsec."""
        return self.beam_fwhm_pix * float(np.sqrt(np.prod(self.pixel_sides_arcsec)))

    @property
    def beam_axes_arcsec(self) -> tuple[float, float]:
        """Major and minor FWHM of the beam, arcsec."""
        stretch = float(np.sqrt(self.beam_axis_ratio))
        return self.beam_fwhm_arcsec / stretch, self.beam_fwhm_arcsec * stretch

    @property
    def beam_area_sr(self) -> float:
        """Solid angle of the Gaussian beam, sr."""
        return float(_GAUSSIAN_AREA * self.beam_fwhm_arcsec**2 * u.arcsec.to(u.rad) ** 2)


_CHOICES: dict[str, tuple[str, ...]] = {
    "unit": get_args(Unit),
    "frame": get_args(Frame),
    "noise": get_args(Noise),
    "blank": get_args(Blank),
    "wcs_matrix": get_args(WcsMatrix),
}
_POSITIVE = (
    "shape",
    "beam_fwhm_pix",
    "beam_axis_ratio",
    "pixel_arcsec",
    "rms_mjy_beam",
    "noise_knee_beams",
    "structure_scale_beams",
)
_NOT_NEGATIVE = (
    "n_sources",
    "seed",
    "min_separation_beams",
    "blend_fraction",
    "edge_margin_beams",
    "structure",
    "border_pix",
    "n_holes",
    "hole_radius_beams",
)


class SkySources(NamedTuple):
    """Gaussian sources on the sky, beam-convolved; every field has shape (n,)."""

    ra: FloatArray  # ICRS, deg
    dec: FloatArray  # ICRS, deg
    flux: FloatArray  # total flux density, Jy
    fwhm_major: FloatArray  # arcsec
    fwhm_minor: FloatArray  # arcsec
    pa: FloatArray  # of the major axis, deg East of North in ICRS

    @property
    def coordinates(self) -> SkyCoord:
        """Positions in ICRS."""
        return SkyCoord(self.ra, self.dec, unit="deg", frame="icrs")


@dataclass(frozen=True, eq=False)
class Simulated:
    """A simulated map, what it was made of, and the truth.

    Attributes
    ----------
    options : Simulation
        What was asked for.
    header : astropy.io.fits.Header
        WCS, beam and unit.
    wcs : astropy.wcs.WCS
        The WCS of that header.
    data : ndarray, (ny, nx)
        The map, in ``options.unit``.
    model, background, noise : ndarray, (ny, nx)
        The sources, the background (with the offset) and the noise alone, Jy/beam, blank pixels
        filled.
    valid : ndarray of bool, (ny, nx)
        False where the map is blank.
    sources : SkySources
        The sources on the sky; given to `simulate`, they put the same sky on another map.
    truth : astropy.table.QTable
        One row per source whose centre is on a valid pixel; see `truth_table`.
    """

    options: Simulation
    header: fits.Header
    wcs: WCS
    data: FloatArray
    model: FloatArray
    background: FloatArray
    noise: FloatArray
    valid: NDArray[np.bool_]
    sources: SkySources
    truth: QTable

    def __repr__(self) -> str:
        """Size, unit and number of sources on one line."""
        ny, nx = self.options.shape
        unit, sources = self.options.unit, len(self.truth)
        return f"<Simulated: {nx} x {ny} pixels in {unit}, {sources} sources on the map>"


def simulate(options: Simulation, sources: SkySources | None = None) -> Simulated:
    """Make a map with known sources; nothing is written.

    Parameters
    ----------
    options : Simulation
        What the map contains.
    sources : SkySources, optional
        Sources to put on the map in place of those that `options` describes.

    Returns
    -------
    Simulated
        The map and the truth.

    Raises
    ------
    hyperjax.errors.ConfigError
        The sources do not fit on the map.
    """
    source_rng, hole_rng, background_rng, noise_rng = (
        np.random.default_rng(stream) for stream in np.random.SeedSequence(options.seed).spawn(4)
    )
    header = map_header(options)
    wcs = WCS(header)
    valid = valid_pixels(options, hole_rng)
    if sources is None:
        sources = draw_sources(options, wcs, valid, source_rng)
    model = render(options.shape, *pixel_gaussians(options, wcs, sources))
    background = draw_background(options, background_rng)
    noise = draw_noise(options, wcs, noise_rng)
    data = (model + background + noise) * native_per_jy_beam(options, wcs)
    data[~valid] = np.nan if options.blank == "nan" else 0.0
    truth = truth_table(options, wcs, sources, valid)
    return Simulated(options, header, wcs, data, model, background, noise, valid, sources, truth)


def demo_simulation() -> Simulation:
    """Options of the demonstration map: 60 sources, a quarter of them blended, white noise."""
    return Simulation(
        shape=(360, 360),
        n_sources=60,
        seed=3,
        beam_axis_ratio=0.8,
        beam_pa_deg=30.0,
        blend_fraction=0.25,
        gradient=6.0,
        structure=1.5,
    )


# ------------------------------------------------------------------------------- the map's frame


def map_header(options: Simulation) -> fits.Header:
    """Header of the map: WCS, beam, unit and frequency.

    The matrix is that of CROTA2 (Calabretta & Greisen 2002, eq. 189): rectangular pixels stay
    rectangular when they are rotated.
    """
    ny, nx = options.shape
    east, north = (side / 3600 for side in options.pixel_sides_arcsec)
    cdelt = np.array([east if options.flip else -east, north])
    angle = np.deg2rad(options.rotation_deg)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    cd = rotation * cdelt
    lon, lat = ("GLON", "GLAT") if options.frame == "galactic" else ("RA", "DEC")
    major, minor = options.beam_axes_arcsec

    header = fits.Header()
    header["OBJECT"] = "simulated sources"
    header["BUNIT"] = options.bunit or options.unit
    header["BMAJ"] = (major / 3600, "[deg] beam FWHM, major axis")
    header["BMIN"] = (minor / 3600, "[deg] beam FWHM, minor axis")
    header["BPA"] = (options.beam_pa_deg, "[deg] East of North")
    header["CTYPE1"] = f"{lon:-<4}-{options.projection}"
    header["CTYPE2"] = f"{lat:-<4}-{options.projection}"
    for axis, size in enumerate((nx, ny)):
        header[f"CUNIT{axis + 1}"] = "deg"
        header[f"CRVAL{axis + 1}"] = options.centre_deg[axis]
        header[f"CRPIX{axis + 1}"] = (size + 1) / 2 + options.reference_offset_pix[axis]
    if options.wcs_matrix == "PC":
        header["CDELT1"], header["CDELT2"] = cdelt
    matrix = cd if options.wcs_matrix == "CD" else cd / cdelt[:, None]
    for row, column in np.ndindex(2, 2):
        header[f"{options.wcs_matrix}{row + 1}_{column + 1}"] = matrix[row, column]
    header.update(_FRAME_CARDS[options.frame])
    if options.frequency_ghz is not None:
        header["RESTFRQ"] = (options.frequency_ghz * 1e9, "[Hz]")
    return header


def native_per_jy_beam(options: Simulation, wcs: WCS) -> float | FloatArray:
    """Value in the map's unit of 1 Jy/beam: an array (ny, nx) for Jy/pixel, else a scalar."""
    if options.unit == "Jy/beam":
        return 1.0
    if options.unit == "Jy/pixel":
        return pixel_solid_angles(wcs, options.shape) / options.beam_area_sr
    brightness = 1 * u.Jy / (options.beam_area_sr * u.sr)
    if options.unit == "MJy/sr":
        return float(brightness.to_value(u.MJy / u.sr))
    frequency = u.brightness_temperature(options.frequency_ghz * u.GHz)
    return float(brightness.to_value(u.K, frequency))


# ------------------------------------------------------------------------- ellipses on the map


def _beam_covariance(options: Simulation, sky: SkyCoord) -> FloatArray:
    """Covariance (n, 2, 2) of the beam at `sky`, arcsec², along East and North of ICRS."""
    return gaussian_covariance(*options.beam_axes_arcsec, options.beam_pa_deg + frame_rotation(sky))


def _jacobian(options: Simulation, wcs: WCS, sky: SkyCoord) -> FloatArray:
    """Pixels per arcsec (n, 2, 2) along East and North of ICRS."""
    return pixels_per_arcsec(wcs, sky.icrs, 0.1 * min(options.pixel_sides_arcsec))


def _centre(options: Simulation, wcs: WCS) -> SkyCoord:
    """Sky position of the centre of the map, shape (1,)."""
    ny, nx = options.shape
    return wcs.pixel_to_world([(nx - 1) / 2], [(ny - 1) / 2])


def _beam_covariance_pix(options: Simulation, wcs: WCS) -> FloatArray:
    """Covariance (2, 2) of the beam at the centre of the map, pixel²."""
    centre = _centre(options, wcs)
    jacobian = _jacobian(options, wcs, centre)[0]
    return jacobian @ _beam_covariance(options, centre)[0] @ jacobian.T


# ------------------------------------------------------------------------------------ the sources


def draw_sources(
    options: Simulation, wcs: WCS, valid: NDArray[np.bool_], rng: np.random.Generator
) -> SkySources:
    """Draw the sources that `options` describes; what it gives explicitly is taken as it is."""
    x, y = _positions(options, wcs, valid, rng)
    count = len(x)
    sky = wcs.pixel_to_world(x, y)
    beam = options.beam_fwhm_arcsec
    major = beam * np.sqrt(rng.uniform(*options.size_range, count) ** 2 - 1)
    minor = major * rng.uniform(*options.axis_ratio_range, count)
    intrinsic = gaussian_covariance(major, minor, rng.uniform(0.0, 180.0, count))
    low, high = np.log(options.snr_range)
    snr = np.exp(rng.uniform(low, high, count))

    if options.shapes is None:
        fwhm_major, fwhm_minor, pa = gaussian_ellipse(intrinsic + _beam_covariance(options, sky))
    else:
        fwhm_major, fwhm_minor, pa = np.asarray(options.shapes, float).reshape(count, 3).T
    if options.fluxes is None:
        flux = snr * options.rms_mjy_beam * 1e-3 * fwhm_major * fwhm_minor / beam**2
    else:
        flux = np.asarray(options.fluxes, float)
    icrs = sky.icrs
    return SkySources(icrs.ra.deg, icrs.dec.deg, flux, fwhm_major, fwhm_minor, pa)


def _positions(
    options: Simulation, wcs: WCS, valid: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Pixel positions x, y, each (n,), given or random."""
    if options.positions is not None:
        x, y = np.asarray(options.positions, float).reshape(-1, 2).T
        return x, y
    jacobian = _jacobian(options, wcs, _centre(options, wcs))[0]
    beams_per_pixel = np.linalg.inv(jacobian) / options.beam_fwhm_arcsec
    sides = np.linalg.norm(beams_per_pixel, axis=0)[::-1]
    distance = distance_transform_edt(np.pad(valid, 1), sampling=sides)[1:-1, 1:-1]
    allowed = distance > options.edge_margin_beams
    return _scatter(options, valid & allowed, beams_per_pixel, rng)


def _scatter(
    options: Simulation,
    allowed: NDArray[np.bool_],
    beams_per_pixel: FloatArray,
    rng: np.random.Generator,
) -> tuple[FloatArray, FloatArray]:
    """Draw random positions on the allowed pixels, no two closer than the smallest separation."""
    pixels = np.argwhere(allowed)[:, ::-1]
    placed = np.empty((options.n_sources, 2))
    for count in range(options.n_sources):
        for _ in range(_TRIES if len(pixels) else 0):
            candidate = _candidate(options, pixels, placed[:count], beams_per_pixel, rng)
            distance = np.linalg.norm((placed[:count] - candidate) @ beams_per_pixel.T, axis=1)
            if _on(allowed, candidate) and np.all(distance >= options.min_separation_beams):
                placed[count] = candidate
                break
        else:
            raise ConfigError(
                f"only {count} of {options.n_sources} sources fit on the map: lower n_sources, "
                "min_separation_beams or edge_margin_beams, or enlarge the shape"
            )
    return placed[:, 0], placed[:, 1]


def _candidate(
    options: Simulation,
    pixels: NDArray[np.intp],
    placed: FloatArray,
    beams_per_pixel: FloatArray,
    rng: np.random.Generator,
) -> FloatArray:
    """Draw a position (2,): anywhere on `pixels`, or, for a blend, near a placed source."""
    if len(placed) and rng.random() < options.blend_fraction:
        return _partner(options, placed[rng.integers(len(placed))], beams_per_pixel, rng)
    return pixels[rng.integers(len(pixels))] + rng.uniform(-0.5, 0.5, 2)


def _partner(
    options: Simulation, xy: FloatArray, beams_per_pixel: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Draw a position (2,) near that of another source."""
    distance = options.min_separation_beams + rng.uniform(0.0, _BLEND_REACH_BEAMS)
    angle = rng.uniform(0.0, 2 * np.pi)
    offset = distance * np.array([np.cos(angle), np.sin(angle)])
    return xy + np.linalg.solve(beams_per_pixel, offset)


def _on(allowed: NDArray[np.bool_], xy: FloatArray) -> NDArray[np.bool_]:
    """Whether positions (..., 2) are on the map and on an allowed pixel."""
    column, row = np.moveaxis(np.rint(xy).astype(int), -1, 0)
    ny, nx = allowed.shape
    inside = (row >= 0) & (row < ny) & (column >= 0) & (column < nx)
    return inside & allowed[np.clip(row, 0, ny - 1), np.clip(column, 0, nx - 1)]


def _world_to_pixel(wcs: WCS, sources: SkySources) -> tuple[FloatArray, FloatArray]:
    """0-based pixel positions x, y, each (n,)."""
    x, y = wcs.world_to_pixel(sources.coordinates)
    return np.asarray(x, float), np.asarray(y, float)


def pixel_gaussians(
    options: Simulation, wcs: WCS, sources: SkySources
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """Project sources onto the map.

    Returns
    -------
    x, y, peak, sigma_major, sigma_minor, theta : ndarray, (n,)
        As `render` takes them: 0-based pixels, Jy/beam, pixels, radians.
    """
    x, y = _world_to_pixel(wcs, sources)
    sky = sources.coordinates
    jacobian = _jacobian(options, wcs, sky)
    covariance = gaussian_covariance(sources.fwhm_major, sources.fwhm_minor, sources.pa)
    major, minor, axis = principal_axes(jacobian @ covariance @ jacobian.swapaxes(1, 2))
    theta = np.arctan2(axis[:, 1], axis[:, 0]) % np.pi
    return x, y, _peak(options, sources), major, minor, theta


def _peak(options: Simulation, sources: SkySources) -> FloatArray:
    """Peaks (n,), Jy/beam: the flux density in one beam area at the centre of each source."""
    return sources.flux * options.beam_fwhm_arcsec**2 / (sources.fwhm_major * sources.fwhm_minor)


def render(
    shape: tuple[int, int],
    x: ArrayLike,
    y: ArrayLike,
    peak: ArrayLike,
    sigma_major: ArrayLike,
    sigma_minor: ArrayLike,
    theta: ArrayLike,
) -> FloatArray:
    """Sum of elliptical Gaussians, sampled at the pixel centres.

    Parameters
    ----------
    shape : tuple of int
        ``(ny, nx)``.
    x, y : array_like, (n,)
        Centres, 0-based pixels.
    peak : array_like, (n,)
        Peaks, in the unit of the result.
    sigma_major, sigma_minor : array_like, (n,)
        Standard deviations, pixels.
    theta : array_like, (n,)
        Angles of the major axes from +x towards +y, radians.

    Returns
    -------
    ndarray, (ny, nx)
        The image; each Gaussian ends seven major sigmas from its centre.
    """
    image = np.zeros(shape)
    columns = (x, y, peak, sigma_major, sigma_minor, theta)
    for gaussian in zip(*(np.atleast_1d(np.asarray(c, float)) for c in columns), strict=True):
        _add_gaussian(image, *gaussian)
    return image


def _add_gaussian(
    image: FloatArray, x: float, y: float, peak: float, major: float, minor: float, theta: float
) -> None:
    """Add one Gaussian to `image` inside its window."""
    ny, nx = image.shape
    reach = _WINDOW_SIGMA * major
    columns = slice(max(0, int(np.ceil(x - reach))), max(0, min(nx, int(x + reach) + 1)))
    rows = slice(max(0, int(np.ceil(y - reach))), max(0, min(ny, int(y + reach) + 1)))
    dx = np.arange(columns.start, columns.stop) - x
    dy = np.arange(rows.start, rows.stop)[:, None] - y
    along = (dx * np.cos(theta) + dy * np.sin(theta)) / major
    across = (dy * np.cos(theta) - dx * np.sin(theta)) / minor
    image[rows, columns] += peak * np.exp(-0.5 * (along**2 + across**2))


# ----------------------------------------------------------------- the background, noise and blanks


def _random_field(
    shape: tuple[int, int],
    amplitude: Callable[[FloatArray, FloatArray], FloatArray],
    pad: float,
    rng: np.random.Generator,
) -> FloatArray:
    """Stationary Gaussian field of unit expected variance.

    `amplitude` takes the frequencies ky, kx (cycles per pixel) and returns the square root of the
    power. The field is periodic over the map and `pad` pixels more.
    """
    ny, nx = (fft.next_fast_len(size + int(np.ceil(pad)), real=True) for size in shape)
    ky, kx = np.meshgrid(fft.fftfreq(ny), fft.fftfreq(nx), indexing="ij")
    filter_ = amplitude(ky, kx)
    filter_ /= np.sqrt(np.mean(filter_**2))
    spectrum = filter_[:, : nx // 2 + 1] * fft.rfft2(rng.standard_normal((ny, nx)))
    return fft.irfft2(spectrum, s=(ny, nx))[: shape[0], : shape[1]]


def _gaussian_transfer(ky: FloatArray, kx: FloatArray, covariance: FloatArray) -> FloatArray:
    """Fourier transform of a Gaussian of unit integral and the given covariance, pixel²."""
    (xx, xy), (_, yy) = covariance
    return np.exp(-2 * np.pi**2 * (xx * kx**2 + 2 * xy * kx * ky + yy * ky**2))


def _red_amplitude(ky: FloatArray, kx: FloatArray, knee: float, alpha: float) -> FloatArray:
    """Square root of ``1 + (knee / wavelength)**alpha``, and 0 at zero frequency."""
    wave_number = np.hypot(ky, kx)
    wave_number[0, 0] = np.inf
    amplitude = np.sqrt(1 + (knee * wave_number) ** -alpha)
    amplitude[0, 0] = 0.0
    return amplitude


def draw_noise(options: Simulation, wcs: WCS, rng: np.random.Generator) -> FloatArray:
    """Noise (ny, nx), Jy/beam."""
    rms = options.rms_mjy_beam * 1e-3
    if options.noise == "none":
        return np.zeros(options.shape)
    if options.noise == "white":
        return rms * rng.standard_normal(options.shape)
    if options.noise == "beam":
        beam = _beam_covariance_pix(options, wcs)
        reach = 2 * _WINDOW_SIGMA * np.sqrt(np.linalg.eigvalsh(beam)[-1])
        return rms * _random_field(
            options.shape, lambda ky, kx: _gaussian_transfer(ky, kx, beam), reach, rng
        )
    knee = options.noise_knee_beams * options.beam_fwhm_pix
    return rms * _random_field(
        options.shape, lambda ky, kx: _red_amplitude(ky, kx, knee, options.noise_alpha), knee, rng
    )


def draw_background(options: Simulation, rng: np.random.Generator) -> FloatArray:
    """Background (ny, nx), Jy/beam: offset, plane in a random direction and smooth structure."""
    plane = _plane(options.shape, rng.uniform(0.0, 2 * np.pi))
    background = options.offset + options.gradient * plane
    if options.structure > 0:
        scale = options.structure_scale_beams * options.beam_fwhm_pix
        kernel = np.eye(2) * (scale / FWHM_PER_SIGMA) ** 2
        smooth = _random_field(
            options.shape, lambda ky, kx: _gaussian_transfer(ky, kx, kernel), 3 * scale, rng
        )
        background += options.structure * (smooth - smooth.mean()) / smooth.std()
    return options.rms_mjy_beam * 1e-3 * background


def _plane(shape: tuple[int, int], angle: float) -> FloatArray:
    """Plane (ny, nx) of zero mean and unit range that rises towards `angle` from +x."""
    y, x = (np.linspace(-1.0, 1.0, size) if size > 1 else np.zeros(1) for size in shape)
    plane = x * np.cos(angle) + y[:, None] * np.sin(angle)
    extent = np.ptp(plane)
    return plane / extent if extent > 0 else plane


def valid_pixels(options: Simulation, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Pixels (ny, nx) that are neither in the blank border nor in a hole."""
    ny, nx = options.shape
    border = options.border_pix
    valid = np.zeros(options.shape, bool)
    valid[border : ny - border, border : nx - border] = True
    y, x = np.ogrid[:ny, :nx]
    radius = options.hole_radius_beams * options.beam_fwhm_pix
    for row, column in rng.uniform(0, options.shape, (options.n_holes, 2)):
        valid &= np.hypot(x - column, y - row) > radius
    return valid


# -------------------------------------------------------------------------------------- the truth


def truth_table(
    options: Simulation, wcs: WCS, sources: SkySources, valid: NDArray[np.bool_]
) -> QTable:
    """Table of the sources whose centres are on valid pixels, named as in the catalogue.

    ID counts all of `sources` from 1; NEIGHBOUR is among those of the table.
    """
    x, y = _world_to_pixel(wcs, sources)
    inside = _on(valid, np.stack([x, y], axis=-1))
    peak = _peak(options, sources)[inside] * 1e3
    number = np.flatnonzero(inside) + 1
    x, y = x[inside], y[inside]
    sources = SkySources(*(column[inside] for column in sources))
    sky = sources.coordinates
    galactic = sky.galactic
    columns: list[tuple[str, Any, str]] = [
        ("ID", number, "source, counted from 1"),
        ("RA", sources.ra * u.deg, "right ascension, ICRS"),
        ("DEC", sources.dec * u.deg, "declination, ICRS"),
        ("GLON", galactic.l.deg * u.deg, "Galactic longitude"),
        ("GLAT", galactic.b.deg * u.deg, "Galactic latitude"),
        ("X_PIX", x, "x, 0-based pixel"),
        ("Y_PIX", y, "y, 0-based pixel"),
        ("FLUX_TOTAL", sources.flux * 1e3 * u.mJy, "total flux density"),
        ("FLUX_PEAK", peak * u.mJy / u.beam, "peak of the convolved source"),
        ("FWHM_1", sources.fwhm_major * u.arcsec, "convolved FWHM, major axis"),
        ("FWHM_2", sources.fwhm_minor * u.arcsec, "convolved FWHM, minor axis"),
        ("PA", sources.pa * u.deg, "position angle of the major axis, East of North in ICRS"),
        ("SNR", peak / options.rms_mjy_beam, "peak over the rms of the noise"),
        ("NEIGHBOUR", _neighbour(sky, options), "distance to the nearest source, beam FWHM"),
    ]
    truth = QTable({name: value for name, value, _ in columns})
    for name, _, description in columns:
        truth[name].info.description = description
    major, minor = options.beam_axes_arcsec
    truth.meta["beam"] = {
        "major_arcsec": major,
        "minor_arcsec": minor,
        "pa_deg": options.beam_pa_deg,
    }
    truth.meta["simulation"] = {k: _plain(v) for k, v in dataclasses.asdict(options).items()}
    return truth


def _neighbour(sky: SkyCoord, options: Simulation) -> FloatArray:
    """Distance (n,) to the nearest other source in beams; infinite if there is none."""
    if len(sky) < 2:
        return np.full(len(sky), np.inf)
    _, separation, _ = sky.match_to_catalog_sky(sky, nthneighbor=2)
    return np.asarray(separation.arcsec / options.beam_fwhm_arcsec)


def _plain(value: Any) -> Any:
    """Replace tuples, which YAML does not know, with lists."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------- writing


def write_simulation(
    simulated: Simulated, path: str | Path, *, overwrite: bool = False
) -> tuple[Path, Path]:
    """Write the map, and beside it the truth as ``<stem>_truth.ecsv``.

    Both appear when both are complete.

    Parameters
    ----------
    simulated : Simulated
        What `simulate` returned.
    path : path-like
        The map: ``.fits`` or ``.fits.gz``. Its folder is made if it is missing.
    overwrite : bool
        Replace files that exist.

    Returns
    -------
    map_path, truth_path : pathlib.Path
        What was written.

    Raises
    ------
    hyperjax.errors.OutputError
        A file exists already, has another extension, or cannot be written.
    """
    map_path = Path(path)
    stem, dot, extension = map_path.name.rpartition(".fits")
    if not (stem and dot and extension in ("", ".gz")):
        raise OutputError(f"{map_path}: a simulated map is written as .fits or .fits.gz")
    truth_path = map_path.with_name(f"{stem}_truth.ecsv")
    for target in (map_path, truth_path):
        if target.exists() and not overwrite:
            raise OutputError(
                f"{target}: exists already; give another name, or have it replaced (--force, in "
                "Python overwrite=True)"
            )
    image = fits.PrimaryHDU(simulated.data, simulated.header)
    write_truth = partial(simulated.truth.write, format="ascii.ecsv")
    write_together({map_path: image.writeto, truth_path: write_truth})
    return map_path, truth_path
