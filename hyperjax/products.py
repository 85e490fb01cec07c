"""What is written of an extraction: tables, regions, images and a picture.

The files of a map appear together, when all are complete. The names follow HYPER's layout::

    OUT/params/params_<map>.ecsv .txt .csv           the catalogue (ECSV, IPAC, CSV)
    OUT/regions/region_files_<map>_centroids.reg     DS9 regions: crosses
    OUT/regions/region_files_<map>_ellipses.reg      DS9 regions: FWHM ellipses, crosses with the ID
    OUT/fits/<map>_{model,residual,background,rms}.fits
    OUT/fits/<map>_background_separate.fits          where a background is fitted separately
    OUT/fits/<map>_covariance.fits                   where fit_options.calc_covar asks for it
    OUT/plots/<map>_overview.png
    OUT/params/params_ALL.ecsv .txt .csv             the catalogues of all maps
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import astropy.units as u
import numpy as np
from astropy.coordinates import Angle, SkyCoord
from astropy.io import fits
from astropy.table import QTable, Table
from regions import EllipseSkyRegion, PointSkyRegion, Regions

from hyperjax.covariance import covariance_hdus
from hyperjax.files import write_together

if TYPE_CHECKING:
    from astropy.units import Quantity
    from numpy.typing import NDArray

    from hyperjax.config import Config
    from hyperjax.maps import Map
    from hyperjax.pipeline import Extraction

IMAGES = ("model", "residual", "background", "rms")
"""The images of an extraction that are written as FITS."""

DS9_FRAMES = ("icrs", "fk5", "fk4", "galactic")
"""The frames in which regions are written; those of a map in any other frame are in ICRS."""

SCALE_KEY = "JY_BEAM"
"""Header card of images whose unit is not per pixel: the value of 1 Jy/beam in that unit."""

MERGED = "ALL"
"""What stands for the map's name in the names of the merged tables."""

_TABLE_FORMATS = {".ecsv": "ascii.ecsv", ".txt": "ascii.ipac", ".csv": "ascii.csv"}
_IPAC_LINE = 78  # characters in a comment of an IPAC header

# DS9 regions: positions and angles in degrees, to a few nanoarcseconds; semi-axes in arcseconds
_REGION_DECIMALS = 12  # of a degree: regions of a 0.01 arcsec beam keep seven digits

_Writer = Callable[[Path], object]


@dataclass(frozen=True)
class Layout:
    """Where the files of a run go.

    Attributes
    ----------
    tables, regions, logs, images, plots : Path
        The folders.
    table_base, region_base : str
        What the names of tables and regions start with.
    root : Path
        The folder that all others are in, if they are not elsewhere.
    """

    tables: Path
    regions: Path
    logs: Path
    images: Path
    plots: Path
    table_base: str = "params"
    region_base: str = "region_files"
    root: Path = Path()

    @classmethod
    def from_config(cls, config: Config, out: str | os.PathLike[str]) -> Layout:
        """Return the layout that a configuration asks for.

        Parameters
        ----------
        config : Config
            Its ``paths.output`` names the folders, its ``files`` the bases of the names.
        out : path-like
            The output folder; folders of the configuration that are not absolute lie in it.
        """
        root, folders, files = Path(out), config.paths.output, config.files
        return cls(
            tables=root / folders.dir_table_out,
            regions=root / folders.dir_region_out,
            logs=root / folders.dir_log_out,
            images=root / "fits",
            plots=root / "plots",
            table_base=files.file_table_base,
            region_base=files.file_region_base,
            root=root,
        )

    def table(self, name: str, suffix: str = ".ecsv") -> Path:
        """Return the path of the catalogue of a map (or of `MERGED`)."""
        return self.tables / f"{self.table_base}_{_file_stem(name)}{suffix}"

    def region(self, name: str, kind: str) -> Path:
        """Return the path of a map's regions of a kind, ``"centroids"`` or ``"ellipses"``."""
        return self.regions / f"{self.region_base}_{_file_stem(name)}_{kind}.reg"

    def image(self, name: str, kind: str) -> Path:
        """Return the path of one of a map's `IMAGES`."""
        return self.images / f"{_file_stem(name)}_{kind}.fits"

    def plot(self, name: str, kind: str = "overview") -> Path:
        """Return the path of a picture of a map."""
        return self.plots / f"{_file_stem(name)}_{kind}.png"

    def log(self, name: str) -> Path:
        """Return the path of the log of a map."""
        return self.logs / f"{_file_stem(name)}.log"


def _file_stem(name: str) -> str:
    """Return a map's name with what no file name can hold replaced."""
    return name.replace("/", "_").replace("\0", "_")


def write_extraction(
    extraction: Extraction, layout: Layout, *, images: bool = True, plots: bool = True
) -> list[Path]:
    """Write the products of one map, all of them or none.

    The files take their final names only when the last of them is complete, the ECSV table at the
    very end: where it is, the others are too. Files of an earlier run are replaced.

    Parameters
    ----------
    extraction : Extraction
        What `hyperjax.extract` returned.
    layout : Layout
        Where to write.
    images, plots : bool, optional
        Whether to write the FITS images and the overview picture.

    Returns
    -------
    list of Path
        The files, tables first.

    Raises
    ------
    OutputError
        If a folder or file cannot be written.
    """
    name, catalog = extraction.map.name, extraction.catalog
    writers = _table_writers(catalog, layout, name)
    frame = region_frame(extraction.map)
    crosses, ellipses = centroid_regions(catalog, frame), ellipse_regions(catalog, frame)
    writers[layout.region(name, "centroids")] = _text_writer(crosses)
    writers[layout.region(name, "ellipses")] = _text_writer(ellipses + crosses)
    if images:
        for kind in IMAGES:
            image = partial(_write_image, extraction.map, getattr(extraction, kind), kind)
            writers[layout.image(name, kind)] = image
        if extraction.separate is not None:
            writers[layout.image(name, "background_separate")] = partial(
                _write_image, extraction.map, extraction.separate, "background_separate"
            )
    if extraction.covariances is not None:
        table = partial(
            covariance_hdus, extraction.covariances, catalog, extraction.config.units.per_jy
        )
        writers[layout.image(name, "covariance")] = lambda path: table().writeto(path)
    if plots:
        writers[layout.plot(name)] = partial(_write_overview, extraction)
    return write_together(writers)


def write_merged(catalog: QTable, layout: Layout) -> list[Path]:
    """Write the merged catalogue of all maps, ``params_ALL`` as ECSV, IPAC and CSV.

    Parameters
    ----------
    catalog : `~astropy.table.QTable`
        The rows of all maps.
    layout : Layout
        Where to write.

    Returns
    -------
    list of Path
        The three files.

    Raises
    ------
    OutputError
        If a folder or file cannot be written.
    """
    return write_together(_table_writers(catalog, layout, MERGED))


def copy_as_merged(layout: Layout, name: str) -> list[Path]:
    """Write the catalogue of the only map as the merged catalogue too.

    Parameters
    ----------
    layout : Layout
        Where to write.
    name : str
        The map, whose catalogue is written already.

    Returns
    -------
    list of Path
        The three files.

    Raises
    ------
    OutputError
        If a folder or file cannot be written.
    """
    return write_together(
        {
            layout.table(MERGED, suffix): partial(shutil.copyfile, layout.table(name, suffix))
            for suffix in _TABLE_FORMATS
        }
    )


def _text_writer(text: str) -> _Writer:
    return partial(Path.write_text, data=text, encoding="utf-8")


def _table_writers(catalog: QTable, layout: Layout, name: str) -> dict[Path, _Writer]:
    writers = (partial(_write_table, catalog, kind) for kind in _TABLE_FORMATS.values())
    return dict(zip((layout.table(name, s) for s in _TABLE_FORMATS), writers, strict=True))


def _write_table(catalog: QTable, kind: str, path: Path) -> None:
    if kind == "ascii.ecsv":
        catalog.write(path, format=kind)
    elif kind == "ascii.ipac":
        table = ipac_table(catalog)
        numbers = [column.name for column in table.itercols() if column.dtype.kind == "f"]
        table.write(path, format=kind, fill_values=[("nan", "null", *numbers)])
    else:
        Table(catalog).write(path, format=kind)  # columns without units are written faster


def ipac_table(catalog: QTable) -> Table:
    """Return a catalogue in the form that the IPAC format can hold.

    Parameters
    ----------
    catalog : `~astropy.table.QTable`
        A catalogue.

    Returns
    -------
    `~astropy.table.Table`
        The same values; the columns' descriptions are comments, and of the metadata the short
        scalars are keywords.
    """
    table = Table(catalog)
    descriptions = {c.info.name: c.info.description for c in catalog.itercols()}
    keywords = {k: v for k, v in catalog.meta.items() if _is_ipac_value(k, v)}
    notes = {k: v for k, v in catalog.meta.items() if k not in keywords}
    table.meta = {
        "keywords": {key: {"value": value} for key, value in keywords.items()},
        "comments": [*_ipac_comments(notes), *_ipac_comments(descriptions)],
    }
    return table


def _is_ipac_value(key: str, value: object) -> bool:
    """Whether an entry of the metadata fits on a header line as a keyword."""
    short = isinstance(value, str | int | float) and len(f"{key}{value}") < _IPAC_LINE - 8
    return short and key.isidentifier() and str(value).isprintable()


def _ipac_comments(notes: Mapping[str, Any]) -> Iterator[str]:
    """Yield the header lines that hold texts; what is neither text nor a mapping is left out."""
    for key, value in notes.items():
        if isinstance(value, str):
            yield from textwrap.wrap(f"{key}: {value}", _IPAC_LINE, subsequent_indent="  ")
        elif isinstance(value, Mapping):
            yield from _ipac_comments(value)


def region_frame(map: Map) -> str:
    """Return the frame of a map's regions: its own, or ICRS where DS9 has no name for it."""
    return map.frame if map.frame in DS9_FRAMES else "icrs"


def centroid_regions(catalog: QTable, frame: str) -> str:
    """Return DS9 regions of the catalogued positions: crosses, with the HYPER_ID.

    Parameters
    ----------
    catalog : `~astropy.table.QTable`
        A catalogue; rows without a finite position are left out.
    frame : str
        One of `DS9_FRAMES`.
    """
    rows = catalog[_is_located(catalog)]
    crosses = [
        PointSkyRegion(position, meta={"text": str(label)}, visual={"marker": "+"})
        for position, label in zip(_positions(rows, frame), rows["HYPER_ID"], strict=True)
    ]
    return _ds9(crosses, frame)


def ellipse_regions(catalog: QTable, frame: str) -> str:
    """Return DS9 regions of the fitted shapes: FWHM ellipses.

    The full axes of an ellipse are the source's FWHMs (DS9 writes semi-axes, so half of them).
    DS9 and `regions` measure the angle of the first axis from West through North, i.e. it is the
    position angle in the region's own frame less 90 degrees.

    Parameters
    ----------
    catalog : `~astropy.table.QTable`
        A catalogue; rows without a finite position or without a shape are left out.
    frame : str
        One of `DS9_FRAMES`.
    """
    shaped = catalog[_is_located(catalog) & has_shape(catalog)]
    turn = position_angles(shaped, frame) - 90 * u.deg
    angles = [Angle(column, u.deg) for column in (shaped["FWHM_1"], shaped["FWHM_2"], turn)]
    ellipses = [
        EllipseSkyRegion(*row) for row in zip(_positions(shaped, frame), *angles, strict=True)
    ]
    return _ds9(ellipses, frame)


def position_angles(catalog: QTable, frame: str) -> Quantity:
    """Return the sources' position angles in a frame, East of that frame's North.

    Parameters
    ----------
    catalog : `~astropy.table.QTable`
        RA, DEC, and PA in the equatorial (ICRS) frame; all finite.
    frame : str
        An astropy frame.

    Returns
    -------
    Quantity
        (n,) degrees in [0, 180).
    """
    icrs = _positions(catalog, "icrs")
    along = icrs.directional_offset_by(catalog["PA"], 1 * u.arcsec).transform_to(frame)
    return icrs.transform_to(frame).position_angle(along).to(u.deg) % (180 * u.deg)


def _is_located(catalog: QTable) -> NDArray[np.bool_]:
    return np.isfinite(catalog["RA"]) & np.isfinite(catalog["DEC"])


def has_shape(catalog: QTable) -> NDArray[np.bool_]:
    """Whether a source has a fitted shape: axes of positive length and an angle.

    Parameters
    ----------
    catalog : `~astropy.table.QTable`
        A catalogue of n rows.

    Returns
    -------
    ndarray of bool
        (n,)
    """
    return (catalog["FWHM_1"] > 0) & (catalog["FWHM_2"] > 0) & np.isfinite(catalog["PA"])


def _positions(catalog: QTable, frame: str) -> SkyCoord:
    return SkyCoord(catalog["RA"], catalog["DEC"], frame="icrs").transform_to(frame)


def _ds9(regions: Sequence[EllipseSkyRegion | PointSkyRegion], frame: str) -> str:
    if not regions:
        return f"# Region file format: DS9\n{frame}\n"
    return Regions(list(regions)).serialize(format="ds9", precision=_REGION_DECIMALS)


def image_hdu(map: Map, image: NDArray[np.float64], kind: str) -> fits.PrimaryHDU:
    """Return an image of an extraction as FITS, in the input map's unit and on its grid.

    Parameters
    ----------
    map : Map
        The map that the image belongs to.
    image : ndarray
        (ny, nx) Jy/beam.
    kind : str
        What it is, for the header.

    Returns
    -------
    `~astropy.io.fits.PrimaryHDU`
        The image in float32 (a map's noise is far above its rounding), NaN where the map is blank.
    """
    native = np.multiply(image, map.native_per_jy_beam, dtype=np.float32, casting="same_kind")
    native[np.isnan(map.data)] = np.nan
    header = map.wcs.to_header(relax=True)
    header["BUNIT"] = map.unit.to_string("fits")
    if np.isscalar(map.native_per_jy_beam):
        header[SCALE_KEY] = (map.native_per_jy_beam, "1 Jy/beam in BUNIT")
    header["BMAJ"] = (map.beam.major_arcsec / 3600, "[deg] FWHM of the beam")
    header["BMIN"] = (map.beam.minor_arcsec / 3600, "[deg]")
    header["BPA"] = (map.beam.pa_deg, "[deg] East of North")
    header["HISTORY"] = f"hyperjax {version('hyperjax')}: {kind}, stored as float32"
    return fits.PrimaryHDU(native, header)


def _write_image(map: Map, image: NDArray[np.float64], kind: str, path: Path) -> None:
    image_hdu(map, image, kind).writeto(path)


def _write_overview(extraction: Extraction, path: Path) -> None:
    from hyperjax.figures import overview, save_figure  # matplotlib only where something is drawn

    save_figure(overview(extraction), path)
