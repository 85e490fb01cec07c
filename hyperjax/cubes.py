"""Datacubes: channels as maps, and the cube of their backgrounds.

A channel is read by itself, and the cube of backgrounds is written channel by channel: a cube may
be larger than the memory. Channels are counted from 1, as FITS counts pixels.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from astropy import units as u
from astropy.io import fits
from astropy.stats import sigma_clip, sigma_clipped_stats
from astropy.wcs import WCS

from hyperjax.background import goodness
from hyperjax.errors import ConfigError, HyperjaxError, MissingWcsError
from hyperjax.files import atomic_path
from hyperjax.maps import Beam, Map, full_wcs, hdu_of_image, map_of_plane, open_map
from hyperjax.sources import near_sources

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from hyperjax.config import Config
    from hyperjax.pipeline import Extraction

    Floats = NDArray[np.float64]

__all__ = [
    "Cube",
    "background_of",
    "channel_name",
    "cube_at",
    "read_channel",
    "slice_name",
    "write_cube",
    "write_slice",
]


class Cube(NamedTuple):
    """What a file says of its cube.

    Attributes
    ----------
    path, hdu
        The file, and its image's HDU as it was asked for.
    channels
        How many there are.
    pixels
        Of each.
    usable
        Those (from 1) that hold more than one value.
    """

    path: Path
    hdu: int | str | None
    channels: int
    pixels: int
    usable: tuple[int, ...]

    def chosen(self, limits: tuple[int, int] | None) -> list[int]:
        """Return the usable channels from the first to the last of the limits.

        Raises
        ------
        ConfigError
            If there is none.
        """
        first, last = limits or (1, self.channels)
        chosen = [channel for channel in self.usable if first <= channel <= last]
        if not chosen:
            raise ConfigError(
                f"control.channels = [{first}, {last}]: {self.path} has {self.channels} channels, "
                f"{len(self.usable)} of them with data; none of these is chosen"
            )
        return chosen


def cube_at(path: Path, hdu: int | str | None) -> Cube | None:
    """Return what there is of a cube; None where the file holds a map, or cannot be read.

    Every channel is looked at once, to tell which are blank, and again if the file has changed.
    """
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return None
    return _cube_at(path, hdu, changed)


@functools.lru_cache(maxsize=16)
def _cube_at(path: Path, hdu: int | str | None, changed: int) -> Cube | None:
    """As `cube_at`, of a file that was `changed` then (ns)."""
    try:
        with open_map(path) as hdus:
            image = hdu_of_image(hdus, path, hdu)
            channels = _channel_axis(image, full_wcs(image.header, hdus, path), path)
            if channels is None:
                return None
            usable = [n for n in range(1, channels + 1) if _has_data(_plane(image, n))]
            pixels = int(np.prod(image.shape[-2:]))
    except MissingWcsError:
        raise
    except HyperjaxError:
        return None
    return Cube(path, hdu, channels, pixels, tuple(usable))


def _channel_axis(image: Any, wcs: WCS, path: Path) -> int | None:
    """Number of channels of an image whose first two axes are the sky; None for a map."""
    long = [length for length in image.shape[:-2] if length > 1]
    if not long:
        return None
    if {wcs.wcs.lng, wcs.wcs.lat} != {0, 1} or len(long) > 1:
        names = ", ".join(wcs.wcs.ctype)
        raise MissingWcsError(
            f"{path}: a cube must have two celestial axes and then one of channels, not {names}; "
            "reorder its axes"
        )
    return int(long[0])


def _plane(image: Any, channel: int) -> Floats:
    """One channel as it is stored, (ny, nx); of the file only this is read."""
    index = tuple(channel - 1 if length > 1 else 0 for length in image.shape[:-2])
    return np.array(image.section[(*index, slice(None), slice(None))], float)


def _has_data(plane: Floats) -> bool:
    finite = plane[np.isfinite(plane)]
    return bool(finite.size) and finite.min() < finite.max()


def read_channel(path: Path, channel: int, config: Config) -> Map:
    """Read one channel of a cube as a map, with its own beam and frequency.

    The beam is that of the configuration, else the channel's in a BEAMS table, else the header's.

    Parameters
    ----------
    path
        The cube.
    channel
        Which, from 1.
    config
        The sections files, units and survey say how.
    """
    with open_map(path) as hdus:
        image = hdu_of_image(hdus, path, config.files.hdu)
        wcs = full_wcs(image.header, hdus, path)
        plane, beam = _plane(image, channel), _beam_of_channel(hdus, channel)
        header = image.header.copy()
    plane[np.isinf(plane)] = np.nan
    fixed = config.survey.beam_fwhm_arcsec is not None or config.survey.survey_code != 15
    return map_of_plane(
        path,
        header,
        wcs,
        plane,
        unit=config.units.map_unit,
        beam=None if fixed else beam,
        beam_fwhm_arcsec=config.survey.beam_fwhm_arcsec,
        survey_code=config.survey.survey_code,
        frequency_ghz=config.units.frequency_ghz or _frequency_ghz(wcs, channel),
    )


def _beam_of_channel(hdus: fits.HDUList, channel: int) -> Beam | None:
    """The beam in the table of beams that CASA writes; None without one."""
    if "BEAMS" not in hdus:
        return None
    table = hdus["BEAMS"]
    rows = table.data
    mine = rows[rows["CHAN"] == channel - 1] if "CHAN" in rows.names else rows[channel - 1 :]
    if len(mine) == 0:
        return None
    units = {column.name: u.Unit(column.unit or "deg") for column in table.columns}
    major, minor = (float((mine[key][0] * units[key]).to_value("arcsec")) for key in _AXES)
    angle = float((mine["BPA"][0] * units["BPA"]).to_value("deg"))
    return Beam(major, minor, angle) if major >= minor > 0 else None


_AXES = ("BMAJ", "BMIN")


def _frequency_ghz(wcs: WCS, channel: int) -> float | None:
    """Frequency of a channel, from any kind of spectral axis; None where it has none."""
    try:
        value = wcs.sub(["spectral"]).pixel_to_world(channel - 1).to_value("GHz")
    except (ValueError, TypeError, AttributeError, u.UnitsError):
        return None
    return float(value) if value > 0 else None


# --- Backgrounds ---------------------------------------------------------------------------------


def background_of(extraction: Extraction) -> Floats:
    """Return the background of a channel in its own unit, NaN where none was modelled.

    It was modelled where pixels were fitted, if a background was asked for; in the outer quarter of
    that it goes over into the smoothed map. Without measured sources it is a polynomial over the
    whole channel, of the best of the orders background.pol_orders_bkg_no_sources.
    """
    map_, config = extraction.map, extraction.config
    there, background = np.isfinite(map_.data), extraction.background
    drawn = extraction.fits.is_drawable
    if not drawn.any():
        background = _without_sources(map_.data, config)
    else:
        options, fits_ = config.background, extraction.fits
        there &= options.fit_gauss_and_bg_together or options.fit_gauss_and_bg_separately
        reach = extraction.catalog.meta["fit_reach_pix"]
        there &= near_sources(map_.shape, fits_.x[drawn], fits_.y[drawn], reach)
    return np.where(there, background * map_.native_per_jy_beam, np.nan)


def _without_sources(data: Floats, config: Config) -> Floats:
    """The best clipped polynomial of a whole image.

    Orders are compared on the same pixels: those that the highest one does not clip.
    """
    from astropy.modeling.fitting import FittingWithOutlierRemoval, LinearLSQFitter
    from astropy.modeling.polynomial import Polynomial2D  # slow to import, and rarely needed

    valid = np.isfinite(data)
    pixels = data[valid]
    y, x = (2 * axis / max(max(data.shape) - 1, 1) - 1 for axis in np.indices(data.shape))
    models: dict[int, Floats] = {}
    for order in sorted(config.background.pol_orders_bkg_no_sources):
        if order == 0:
            models[order] = np.full(data.shape, sigma_clipped_stats(pixels)[1])
            kept = ~sigma_clip(pixels).mask
        else:
            fit = FittingWithOutlierRemoval(LinearLSQFitter(), sigma_clip, niter=3, sigma=3.0)
            polynomial, clipped = fit(Polynomial2D(order), x[valid], y[valid], pixels)
            models[order], kept = polynomial(x, y), ~clipped

    def score(order: int) -> float:
        residual = (pixels - models[order][valid])[kept]
        terms = (order + 1) * (order + 2) // 2
        return goodness(residual, pixels[kept], terms, config.fit_options.min_method)

    return models[min(models, key=score)]


def slice_name(name: str) -> str:
    """Return the name of the file of a channel's background."""
    return f"{name}_background.fits"


def write_slice(extraction: Extraction, path: Path) -> Path:
    """Write the background of a channel, in the cube's unit.

    Parameters
    ----------
    extraction
        Of the channel.
    path
        The file.
    """
    map_ = extraction.map
    header = map_.wcs.to_header(relax=True)
    header["BUNIT"] = map_.unit.to_string("fits")
    hdu = fits.PrimaryHDU(background_of(extraction).astype(np.float32), header)
    with atomic_path(path) as temporary:
        hdu.writeto(temporary)
    return path


def write_cube(cube: Cube, slices: Mapping[int, Path], target: Path) -> Path:
    """Write the cube of backgrounds from its slices: of the size and with the axes of the input.

    Parameters
    ----------
    cube
        The input.
    slices
        Files of the backgrounds by channel; NaN for channels without one.
    target
        The file.

    Returns
    -------
    Path
        The target.
    """
    with open_map(cube.path) as hdus:
        image = hdu_of_image(hdus, cube.path, cube.hdu)
        header, shape = _image_header(image.header), image.shape
        beams = hdus["BEAMS"].copy() if "BEAMS" in hdus else None
    header["BITPIX"] = -32
    header["CHAN_1"] = (min(slices, default=0), "first channel with a background, from 1")
    header["CHAN_N"] = (max(slices, default=0), "last channel with a background")
    if beams is not None:
        header["CASAMBM"] = (True, "beams are in the table BEAMS")
    blank = np.full(shape[-2:], np.nan, np.float32)
    with atomic_path(target) as temporary:
        stream = fits.StreamingHDU(temporary, header)
        try:
            for channel in range(1, cube.channels + 1):
                path = slices.get(channel)
                stream.write(blank if path is None else fits.getdata(path).astype(np.float32))
        finally:
            stream.close()
        if beams is not None:
            fits.append(temporary, beams.data, beams.header)
    return target


_STORAGE = ("BSCALE", "BZERO", "BLANK", "DATAMIN", "DATAMAX", "CHECKSUM", "DATASUM", "XTENSION")


def _image_header(header: fits.Header) -> fits.Header:
    """The header of a primary HDU of the same axes, without what tells how values are stored."""
    own = fits.PrimaryHDU(header=header).header.copy()
    for key in (*_STORAGE, "CASAMBM", "PCOUNT", "GCOUNT", "EXTNAME", "EXTVER"):
        own.remove(key, ignore_missing=True)
    own["NAXIS"] = header["NAXIS"]
    for axis in range(1, header["NAXIS"] + 1):
        before = "NAXIS" if axis == 1 else f"NAXIS{axis - 1}"
        own.set(f"NAXIS{axis}", header[f"NAXIS{axis}"], after=before)
    return own


def channel_name(path_name: str, channel: int) -> str:
    """Return the name of a channel among the products."""
    return f"{path_name}_ch{channel:04d}"
