"""The way of one map from pixels to a catalogue."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from astropy.table import QTable
from numpy.typing import NDArray

from hyperjax.catalog import build_catalog
from hyperjax.config import Config
from hyperjax.detection import Detections, detect, filter_size, high_pass
from hyperjax.errors import BlankMapError
from hyperjax.maps import Map
from hyperjax.modelling import detected_only, model_sources
from hyperjax.noise import clipped_rms, rms_between_sources
from hyperjax.photometry import aperture_photometry

logger = logging.getLogger(__name__)


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
    fwhm = map.beam_fwhm_pix
    with _timed(seconds, "noise"):
        size = filter_size(
            fwhm, config.detection.kernel_size_pix, map.shape, str(map.path or map.name)
        )
        filtered = high_pass(map.data, size)
        scatter, rms = _noise(map, filtered, size, config)
    with _timed(seconds, "detection"):
        found = detect(
            filtered,
            scatter,
            fwhm,
            config.detection,
            edge_pix=config.photometry.aper_inf * fwhm,
            separation_pix=_separation(map, config),
            source=map.name,
        )
        found = found._replace(rms=np.full(len(found.x), rms))
    logger.info("%s: noise %.4g Jy/beam, %d sources detected", map.name, rms, len(found.x))
    rms_map = np.where(np.isfinite(map.data), rms, np.nan)
    with _timed(seconds, "fit"):
        model = model_sources if not config.control.detection_only else detected_only
        fits, image, background = model(map.data, rms_map, found, fwhm, config)
    residual = map.data - background - image
    with _timed(seconds, "photometry"):
        ratio = config.photometry.fwhm_radius_ratio
        apertures = aperture_photometry(residual, fits, rms, ratio)
    with _timed(seconds, "catalogue"):
        catalog = build_catalog(
            map,
            fits,
            apertures,
            found,
            convert_mjy=config.units.convert_mJy,
            shoulder_threshold=config.detection.shoulder_threshold,
        )
    logger.info(
        "%s: %s", map.name, ", ".join(f"{step} {took:.2f} s" for step, took in seconds.items())
    )
    return Extraction(map, config, catalog, image, background, residual, rms_map, found, seconds)


def _noise(
    map: Map, filtered: NDArray[np.float64], size: int, config: Config
) -> tuple[float, float]:
    """What peaks must stand out of, and the noise of a pixel; Jy/beam.

    The first is the scatter of the whole filtered map, with the dips that sources leave in it.
    """
    if config.detection.use_manual_rms:
        return config.detection.rms_value, config.detection.rms_value
    scatter = clipped_rms(filtered)
    if not scatter > 0:
        raise BlankMapError(
            f"{map.path or map.name}: more than half of the map has one and the same value, so its "
            "noise cannot be measured; mask that part with NaN, or set detection.use_manual_rms "
            "and detection.rms_value"
        )
    return scatter, rms_between_sources(map.data, size)


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
