"""Sources that are given, not detected: forced photometry, and apertures of given sizes.

What is given is a table (`read_sources`) or lists in the configuration; `given_sources` finds
which, `place` puts it on a map. Positions that are outside a map or in its blank pixels are not
measured, but keep their rows in the catalogue.

A given ellipse is that of the aperture. The source itself looks different in a map with another
beam: what is known of the beam that the ellipse was measured with is taken out of its model, and
the beam of the map put in. The model of a source is never smaller than the beam.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io.ascii import InconsistentTableError
from astropy.table import QTable, Table

from hyperjax.catalog import FLAGS
from hyperjax.detection import Detections, local_peak
from hyperjax.errors import ConfigError, MissingFileError
from hyperjax.maps import local_geometry, pixel_covariance
from hyperjax.sources import SourceFits

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from hyperjax.config import Config
    from hyperjax.maps import Map

    Floats = NDArray[np.float64]

logger = logging.getLogger(__name__)

__all__ = [
    "Ellipses",
    "GivenSources",
    "Placed",
    "given_sources",
    "pixel_axes",
    "place",
    "read_sources",
]

_KEY = "detection.fixed_source_table_path"
_BEAM_KEYS = ("major_arcsec", "minor_arcsec", "pa_icrs_deg")


class Ellipses(NamedTuple):
    """Ellipses on the sky: FWHM of both axes (arcsec), position angle (deg, ICRS); (n,) each."""

    major: Floats
    minor: Floats
    pa: Floats

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Whether each has a size and an angle."""
        return np.asarray((self.major > 0) & (self.minor > 0) & np.isfinite(self.pa))


@dataclass(frozen=True, eq=False)
class GivenSources:
    """Sources whose positions, or sizes, or both, are given.

    Attributes
    ----------
    label : ndarray or None
        (n,) their IDs, integers or text; None where there are none.
    position : SkyCoord or None
        (n,) ICRS; None where sources are detected.
    ellipses : Ellipses or None
        (n,) of the apertures; of one for all sources where these are detected; None where sizes
        are fitted.
    beam : tuple of float or None
        FWHM (arcsec) of the axes and position angle (deg, ICRS) of the beam of the map that the
        ellipses were measured on, where it is known.
    """

    label: NDArray[Any] | None
    position: SkyCoord | None
    ellipses: Ellipses | None
    beam: tuple[float, float, float] | None = None


def given_sources(config: Config, frame: str = "icrs") -> GivenSources | None:
    """Return what a configuration gives of the sources; None where it gives nothing.

    Parameters
    ----------
    config
        Its sections detection and photometry say what is given.
    frame
        Frame of the map, in which the positions and angles of lists are.

    Raises
    ------
    MissingFileError, ConfigError
        The table is not there, or is none of sources.
    """
    sizes = config.photometry.fixed_radius
    if config.detection.use_fixed_source_table:
        table = read_sources(_table_path(config))
        if not sizes:
            return replace(table, ellipses=None, beam=None)
        if table.ellipses is None:
            raise ConfigError(
                f"{config.detection.fixed_source_table_path}: no columns FWHM_1, FWHM_2, PA, which "
                "photometry.fixed_radius takes from it; add them, or set that to false "
                "(--fit-sizes)"
            )
        return table
    position = None
    if config.detection.fixed_peaks:
        x, y = (list(v or ()) for v in (config.detection.xcen_fix, config.detection.ycen_fix))
        position = SkyCoord(x, y, unit="deg", frame=frame).icrs
    if position is None and not sizes:
        return None
    ellipses = _listed_ellipses(config, frame, position) if sizes else None
    return GivenSources(None, position, ellipses)


def _listed_ellipses(config: Config, frame: str, position: SkyCoord | None) -> Ellipses:
    """Ellipses of the lists; their angles in the frame of the map where sources are detected."""
    options = config.photometry
    first = np.asarray(options.fwhm_1, float)
    second = first if options.fwhm_2 is None else np.asarray(options.fwhm_2, float)
    columns = first, second, np.asarray(options.PA_val or 0.0, float)
    shape = np.broadcast_shapes(*(column.shape for column in columns), np.shape(position or [0]))
    major, minor, pa = _ordered(*(np.broadcast_to(column, shape) for column in columns))
    return Ellipses(major, minor, pa if position is None else _icrs_angles(position, pa, frame))


def _icrs_angles(position: SkyCoord, pa: Floats, frame: str) -> Floats:
    """Position angles in ICRS of those in another frame."""
    there = position.transform_to(frame)
    along = there.directional_offset_by(pa * u.deg, 1 * u.arcsec).icrs
    return np.asarray(position.position_angle(along).deg % 180.0)


def _ordered(major: Floats, minor: Floats, pa: Floats) -> Ellipses:
    """Ellipses with the larger axis first."""
    swap = minor > major
    ordered = np.where(swap, minor, major), np.where(swap, major, minor)
    return Ellipses(*ordered, np.where(swap, pa + 90.0, pa) % 180.0)


# --- Tables --------------------------------------------------------------------------------------


def _table_path(config: Config) -> Path:
    """The table of sources: beside the configuration, else, as in HYPER, among the results."""
    given = str(config.detection.fixed_source_table_path)
    beside, in_results = (config.resolve(part) for part in (given, config.paths.output.dir_root))
    inside = in_results / given
    return inside if inside.is_file() and not beside.is_file() else beside


def read_sources(path: Path) -> GivenSources:
    """Read a table of sources: IPAC, ECSV or CSV, with RA and DEC, and what there is of the rest.

    Parameters
    ----------
    path
        Columns, in any case and order: ID (or HYPER_ID), RA, DEC, FWHM_1, FWHM_2, PA. Numbers
        without a unit are degrees, FWHM arcseconds. Other columns are not read.

    Raises
    ------
    MissingFileError, ConfigError
        There is no such table, or it is none of sources.
    """
    table = _read_table(path)
    columns = {name.upper(): table[name] for name in table.colnames}
    missing = [name for name in ("RA", "DEC") if name not in columns]
    if missing:
        raise ConfigError(
            f"{path}: no column {' and no column '.join(missing)}; a table of sources "
            f"({_KEY}) has ID, RA, DEC and, for given sizes, FWHM_1, FWHM_2, PA"
        )
    ra, dec = (_values(path, name, columns[name], u.deg) for name in ("RA", "DEC"))
    if np.any(np.abs(dec) > 90) or np.any(np.abs(ra) > 360):
        raise ConfigError(f"{path}: RA and DEC must be degrees, DEC from -90 to 90")
    if not (np.isfinite(ra) & np.isfinite(dec)).all():
        raise ConfigError(f"{path}: RA and DEC must be numbers in every row")
    label = next((columns[name] for name in ("ID", "HYPER_ID") if name in columns), None)
    return GivenSources(
        label=None if label is None else np.asarray(label),
        position=SkyCoord(ra, dec, unit="deg", frame="icrs"),
        ellipses=_tabled_ellipses(path, columns),
        beam=_beam_of(table.meta),
    )


def _read_table(path: Path) -> Table:
    """The table in a file, whose first characters tell its format."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().strip()
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such table of sources ({_KEY}, --sources)") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"{path}: the table of sources cannot be read: {reason}") from None
    ipac = first.startswith(("\\", "|"))
    kind = "ascii.ecsv" if "ECSV" in first else "ascii.ipac" if ipac else "ascii.csv"
    try:
        table = Table.read(path, format=kind)
    except (InconsistentTableError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ConfigError(f"{path}: no IPAC, ECSV or CSV table ({reason})") from None
    return table


def _values(path: Path, name: str, column: Any, unit: u.UnitBase) -> Floats:
    """A column as numbers in a unit, NaN where there is none."""
    try:
        numbers = np.ma.filled(np.ma.asarray(column).astype(float), np.nan)
        return np.asarray((numbers * (column.unit or unit)).to_value(unit), float)
    except (ValueError, TypeError, u.UnitConversionError):
        raise ConfigError(f"{path}: the column {name} must hold numbers, in {unit}") from None


def _tabled_ellipses(path: Path, columns: Mapping[str, Any]) -> Ellipses | None:
    """Ellipses of a table; None if it has none. Without FWHM_2 they are circles."""
    if "FWHM_1" not in columns:
        return None
    major = _values(path, "FWHM_1", columns["FWHM_1"], u.arcsec)
    minor, pa = major, np.zeros_like(major)
    if "FWHM_2" in columns:
        minor = _values(path, "FWHM_2", columns["FWHM_2"], u.arcsec)
    if "PA" in columns:
        pa = _values(path, "PA", columns["PA"], u.deg)
    return _ordered(major, minor, pa)


def _beam_of(meta: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """The beam that the sizes in a catalogue of ours belong to, from its metadata."""
    keywords = meta.get("keywords", {})
    flat = {key: entry.get("value") for key, entry in keywords.items()} | dict(meta)
    for prefix in ("sizes_beam", "beam"):
        values = [flat.get(f"{prefix}_{key}") for key in _BEAM_KEYS]
        if all(isinstance(value, int | float) for value in values):
            major, minor, pa = map(float, values)  # type: ignore[arg-type]
            return major, minor, pa
    return None


# --- On a map ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Placed:
    """Given sources on a map; m of the n are measured.

    Attributes
    ----------
    given : GivenSources
        What was given.
    map : Map
        The map.
    x, y : ndarray
        (n,) pixel positions; empty where sources are detected.
    measured : ndarray of bool
        (n,) whether the position is on a pixel that is not blank, and has a size if sizes are
        given.
    """

    given: GivenSources
    map: Map
    x: Floats
    y: Floats
    measured: NDArray[np.bool_]

    @property
    def at_positions(self) -> bool:
        """Whether positions are given, so that nothing is detected."""
        return self.given.position is not None

    def detections(self, filtered: Floats, scatter: float) -> Detections:
        """Return the m measured sources as if they were detected.

        Parameters
        ----------
        filtered
            The high-pass filtered map, for peaks and signal-to-noise ratios.
        scatter
            That of the filtered map, Jy/beam.
        """
        x, y = self.x[self.measured], self.y[self.measured]
        peak = local_peak(filtered, x, y, 0.0)
        unknown = np.full(len(x), np.nan)
        return Detections(x, y, peak, peak / scatter, np.full(len(x), scatter), unknown)

    def model_shapes(self) -> Floats | None:
        """Return sigma_major, sigma_minor (pixels) and theta (rad) of the models: (m, 3).

        The given ellipses, with the beam that they were measured with replaced by the map's. None
        where sizes are fitted.
        """
        if not self.at_positions or self.given.ellipses is None:
            return None
        beam = self.map.beam
        pa = self.map.beam_pa_icrs_deg
        jacobian = local_geometry(
            self.map.wcs, self.x[self.measured], self.y[self.measured]
        ).jacobian
        ellipses = (column[self.measured] for column in self.given.ellipses)
        shape = pixel_covariance(jacobian, *ellipses)
        ones = np.ones(len(shape))
        own = pixel_covariance(jacobian, beam.major_arcsec * ones, beam.minor_arcsec * ones, pa)
        if self.given.beam is not None:
            other = pixel_covariance(jacobian, *(value * ones for value in self.given.beam))
            shape = shape - other + own
        return _axes(_at_least(shape, own))

    def apertures(self, fits: SourceFits) -> Floats | None:
        """Return sigma_major, sigma_minor and theta of the ellipses round fitted sources: (n, 3).

        None where apertures follow the fits.
        """
        ellipses = self._ellipses_at(fits)
        if ellipses is None:
            return None
        usable = np.isfinite(fits.x) & np.isfinite(fits.y) & ellipses.usable
        out = np.full((len(fits.x), 3), np.nan)
        jacobian = local_geometry(self.map.wcs, fits.x[usable], fits.y[usable]).jacobian
        out[usable] = pixel_axes(jacobian, *(column[usable] for column in ellipses))
        return out

    def _ellipses_at(self, fits: SourceFits) -> Ellipses | None:
        """Given ellipses of the n sources, position angles in ICRS."""
        given = self.given.ellipses
        if given is None or self.at_positions:
            return given
        n = len(fits.x)
        major, minor, pa = (np.full(n, column[0]) for column in given)
        if n == 0:
            return Ellipses(major, minor, pa)
        sky = local_geometry(self.map.wcs, fits.x, fits.y).sky
        return Ellipses(major, minor, _icrs_angles(sky, pa, self.map.frame))

    def all_rows(self, fits: SourceFits, found: Detections) -> tuple[SourceFits, Detections]:
        """Return the n sources in the order given, unknown (status -1) where not measured."""
        if not self.at_positions:
            return fits, found
        n, rows = len(self.x), np.flatnonzero(self.measured)
        every = SourceFits.unknown(n)._replace(
            x=self.x.copy(),
            y=self.y.copy(),
            group=np.full(n, -1),
            group_size=np.ones(n, int),
            order=np.full(n, -1),
            status=np.full(n, -1),
        )
        peaks = Detections(self.x.copy(), self.y.copy(), *np.full((4, n), np.nan))
        for columns, measured in ((every, fits), (peaks, found)):
            for column, values in zip(columns, measured, strict=True):
                column[rows] = values
        every.flags[:] |= FLAGS.FORCED
        every.flags[~self.measured] |= self._why_not()
        return every, peaks

    def _why_not(self) -> NDArray[np.int_]:
        """Flags of the sources that are not measured."""
        blank = ~_on_pixels(self.map, self.x, self.y)
        return np.where(blank, int(FLAGS.OUTSIDE), int(FLAGS.NO_SIZE))[~self.measured]

    def complete(self, catalog: QTable) -> None:
        """Put what was given into the catalogue: IDs, positions off the map, and ellipses.

        Parameters
        ----------
        catalog
            That of the n sources, which is changed.
        """
        ellipses = self.given.ellipses
        if self.given.position is None:
            major, minor, pa = (float(column[0]) for column in ellipses or ())
            catalog.meta["aperture"] = (
                f"FWHM {major:g} x {minor:g} arcsec, position angle {pa:g} deg in the frame of the "
                "map, times fwhm_radius_ratio: given, for all sources"
            )
            return
        if ellipses is not None:
            catalog.meta["sizes"] = "given"
            for name, values in zip(("FWHM_1", "FWHM_2", "PA"), ellipses, strict=True):
                catalog[name][:] = values * catalog[name].unit
                catalog[f"{name}_ERR"][:] = 0 * catalog[f"{name}_ERR"].unit
            for key, value in zip(_BEAM_KEYS, self.given.beam or (), strict=False):
                catalog.meta[f"sizes_beam_{key}"] = value
        off = ~self.measured
        sky = self.given.position[off]
        places = {"RA": sky.ra, "DEC": sky.dec, "GLON": sky.galactic.l, "GLAT": sky.galactic.b}
        for name, angle in places.items():
            catalog[name][off] = angle.to(catalog[name].unit)
        _keep_labels(catalog, self.given.label)


def place(given: GivenSources, map: Map) -> Placed:
    """Put given sources on a map.

    Parameters
    ----------
    given
        What is given (`given_sources`).
    map
        The map.
    """
    if given.position is None:
        none = np.zeros(0)
        return Placed(given, map, none, none, none.astype(bool))
    x, y = _pixels(map, given.position)
    measured = _on_pixels(map, x, y)
    if given.ellipses is not None:
        measured &= given.ellipses.usable
        if given.beam is None:
            logger.warning(
                "%s: given sizes are taken as they are in this map, for the beam that they were "
                "measured with is not known; where it is another one, use an ECSV or IPAC "
                "catalogue of hyperjax's, which knows it, or fit the sizes (--fit-sizes)",
                map.label,
            )
    return Placed(given, map, x, y, measured)


def _pixels(map: Map, sky: SkyCoord) -> tuple[Floats, Floats]:
    """Pixel positions; NaN where the projection has none, as on the far side of the sky."""
    if len(sky) == 0:
        return np.zeros(0), np.zeros(0)
    with np.errstate(invalid="ignore"):
        x, y = (np.asarray(axis, float) for axis in map.wcs.world_to_pixel(sky))
        back = map.wcs.pixel_to_world(np.nan_to_num(x), np.nan_to_num(y)).icrs
        here = sky.separation(back).arcsec < map.pixel_scale_arcsec
    return np.where(here, x, np.nan), np.where(here, y, np.nan)


def _on_pixels(map: Map, x: Floats, y: Floats) -> NDArray[np.bool_]:
    """Whether the nearest pixel is one of the map, and not blank."""
    ny, nx = map.shape
    with np.errstate(invalid="ignore"):
        inside = (x >= -0.5) & (x < nx - 0.5) & (y >= -0.5) & (y < ny - 0.5)
    column, row = (np.rint(np.where(inside, axis, 0.0)).astype(int) for axis in (x, y))
    value = map.data[np.clip(row, 0, ny - 1), np.clip(column, 0, nx - 1)]
    return np.asarray(inside & np.isfinite(value))


def pixel_axes(jacobian: Floats, major: Floats, minor: Floats, pa: Floats) -> Floats:
    """Return sigma_major, sigma_minor (pixels), theta (rad) of ellipses on the sky: (m, 3).

    Parameters
    ----------
    jacobian
        (m, 2, 2) of the map there (`hyperjax.maps.LocalGeometry`).
    major, minor, pa
        (m,) FWHM (arcsec) and position angle (deg), ICRS.
    """
    return _axes(pixel_covariance(jacobian, major, minor, pa))


def _at_least(shape: Floats, least: Floats) -> Floats:
    """Covariances (m, 2, 2) with no axis smaller than that of others: in the frame of these."""
    root = np.linalg.cholesky(least)
    inverse = np.linalg.inv(root)
    values, axes = np.linalg.eigh(inverse @ shape @ inverse.swapaxes(1, 2))
    rooted = root @ axes
    return (rooted * np.maximum(values, 1.0)[:, None]) @ rooted.swapaxes(1, 2)


def _axes(covariance: Floats) -> Floats:
    """sigma_major, sigma_minor and theta, in [0, pi), of covariances: (m, 3)."""
    values, axes = np.linalg.eigh(covariance)
    theta = np.arctan2(axes[:, 1, 1], axes[:, 0, 1]) % np.pi
    return np.column_stack([np.sqrt(values[:, 1]), np.sqrt(values[:, 0]), theta])


def _keep_labels(catalog: QTable, label: NDArray[Any] | None) -> None:
    """Number the rows as given; what is no number goes in a column of its own."""
    if label is None:
        return
    if label.dtype.kind in "iu":
        catalog["HYPER_ID"][:] = label
        return
    position = catalog.colnames.index("HYPER_ID") + 1
    catalog.add_column(np.asarray(label, str), index=position, name="SOURCE_ID")
    catalog["SOURCE_ID"].info.description = "ID of the source in the given table"
