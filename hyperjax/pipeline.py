"""The way of one map from pixels to a catalogue."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from astropy.table import QTable
from numpy.typing import NDArray

from hyperjax.background import mosaic
from hyperjax.catalog import build_catalog
from hyperjax.config import Config
from hyperjax.detection import Detections, detect, filter_size, high_pass, with_companions
from hyperjax.errors import BlankMapError
from hyperjax.maps import Map
from hyperjax.modelling import model_sources, unfitted
from hyperjax.noise import clipped_rms
from hyperjax.photometry import Apertures, aperture_photometry
from hyperjax.sources import render_sources

logger = logging.getLogger(__name__)

_ROUNDING = 1e-14  # of a map's largest value: what scatters less has no noise


@dataclass(frozen=True, eq=False)
class Extraction:
    """What was found in one map.

    Attributes
    ----------
    map : Map
        The map.
    config : Config
        The options.
    catalog : QTable
        One row per source (`hyperjax.catalog.COLUMNS`).
    model, background, residual, rms : ndarray (ny, nx)
        The fitted sources, the background under them, data - background - model, and the noise,
        in Jy/beam; the residual is NaN where the map is blank.
    detections : Detections
        The peaks that the fits started from, in the catalogue's order.
    seconds : dict of str to float
        Wall-clock time of each step.
    """

    map: Map
    config: Config
    catalog: QTable
    model: NDArray[np.float64]
    background: NDArray[np.float64]
    residual: NDArray[np.float64]
    rms: NDArray[np.float64]
    detections: Detections
    seconds: dict[str, float]


def extract(map: Map, config: Config = Config()) -> Extraction:  # noqa: B008
    """Find the compact sources of a map and measure them; nothing is written.

    Parameters
    ----------
    map
        A map (`hyperjax.read_map`).
    config
        The options; the defaults suit a map in a unit and with a beam that its header knows.

    Returns
    -------
    Extraction
        The catalogue and the images of model, background, residual and noise.

    Raises
    ------
    MapTooSmallError
        If the map is smaller than the detection filter.
    BlankMapError
        If the map has no noise, so that no signal-to-noise ratio can be had.
    """
    seconds: dict[str, float] = {}
    fwhm, name = map.beam_fwhm_pix, str(map.path or map.name)
    size = filter_size(fwhm, config.detection.kernel_size_pix, map.shape, name)
    with _timed(seconds, "detection"):
        filtered = high_pass(map.data, size)
        rms = scatter = _noise(map, filtered, config)
        found = _detect(map, filtered, scatter, config)
    if config.control.detection_only:
        modelled, fits = None, unfitted(found, fwhm, config)
    else:
        with _timed(seconds, "first fit"):
            noise = np.where(np.isfinite(map.data), rms, np.nan)
            first = model_sources(map.data, noise, found, fwhm, config).fits
        with _timed(seconds, "companions"):
            rest = high_pass(map.data - render_sources(map.shape, first), size)
            if not config.detection.use_manual_rms:  # without the dips that sources leave
                rms = clipped_rms(rest) or scatter
            more = _detect(map, rest, scatter, config)
            found = with_companions(found, more, _separation(map, config))
        with _timed(seconds, "fit"):
            noise = np.where(np.isfinite(map.data), rms, np.nan)
            modelled = model_sources(map.data, noise, found, fwhm, config, first)
            fits = modelled.fits
    with _timed(seconds, "images"):
        model = render_sources(map.shape, fits)
        background = map.data - model - high_pass(map.data - model, size)
        if modelled is not None:
            background = mosaic(modelled.placed, modelled.backgrounds, fits, background)
        residual = map.data - background - model
    with _timed(seconds, "photometry"):
        ratio = config.photometry.fwhm_radius_ratio
        apertures = aperture_photometry(residual, fits, rms, ratio)
    with _timed(seconds, "catalogue"):
        order = np.argsort(-found.peak, kind="stable")
        found = Detections(*(column[order] for column in found))
        found = found._replace(rms=np.full(len(order), rms))
        catalog = build_catalog(
            map,
            fits.take(order),
            Apertures(*(column[order] for column in apertures)),
            found,
            convert_mjy=config.units.convert_mJy,
            shoulder_threshold=config.detection.shoulder_threshold,
        )
    took = ", ".join(f"{step} {duration:.2f} s" for step, duration in seconds.items())
    logger.info("%s: noise %.4g Jy/beam, %d sources (%s)", map.name, rms, len(order), took)
    noise = np.where(np.isfinite(map.data), rms, np.nan)
    return Extraction(map, config, catalog, model, background, residual, noise, found, seconds)


def _detect(map: Map, filtered: NDArray[np.float64], scatter: float, config: Config) -> Detections:
    """Compact sources of a filtered map that stand out of its scatter (Jy/beam)."""
    return detect(
        filtered,
        scatter,
        map.beam_fwhm_pix,
        config.detection,
        edge_pix=config.photometry.aper_inf * map.beam_fwhm_pix,
        separation_pix=_separation(map, config),
        source=map.name,
    )


def _noise(map: Map, filtered: NDArray[np.float64], config: Config) -> float:
    """The noise of a filtered map, Jy/beam."""
    if config.detection.use_manual_rms:
        return config.detection.rms_value
    rms = clipped_rms(filtered)
    if not rms > _ROUNDING * np.nanmax(np.abs(map.data)):
        raise BlankMapError(
            f"{map.path or map.name}: more than half of the map has one and the same value, so its "
            "noise cannot be measured; mask that part with NaN, or set detection.use_manual_rms "
            "and detection.rms_value"
        )
    return rms


def _separation(map: Map, config: Config) -> float:
    """Smallest separation of two detected peaks, pixels."""
    wanted = config.detection.dist_limit_arcsec
    return wanted / map.pixel_scale_arcsec if wanted > 0 else map.beam_fwhm_pix


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Note the wall-clock time of a step."""
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
