"""The noise of a map as a configuration gives it (`noise.rms_map`, `rms_hdu`, `rms_kind`)."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from hyperjax.config import Config
from hyperjax.errors import ConfigError, MapError, RmsMapError
from hyperjax.maps import Map, read_noise

logger = logging.getLogger(__name__)

_REMEDY = (
    "this is the image of the noise: give its file as noise.rms_map (--rms-map), its HDU as "
    "noise.rms_hdu (--rms-hdu), and what it holds as noise.rms_kind (--rms-kind): rms in the unit "
    "of the map or like it, variance in the square of such a unit, or weight in any"
)


def with_usable_noise(map: Map, config: Config) -> tuple[Map, Config, str | None]:
    """Give a map the noise that the options name; if that is of no use, say so, and go without.

    Returns
    -------
    tuple
        The map as of `with_rms_map`, the options, None. Or the map as it is, the options without
        an image of the noise and with `noise.model: white`, and why.

    Raises
    ------
    MissingFileError, MapError, ConfigError
        As `with_rms_map`, but for `RmsMapError`.
    """
    try:
        return with_rms_map(map, config), config, None
    except RmsMapError as error:
        logger.warning(
            "%s; it is not used: the noise is measured on the map and taken as independent from "
            "pixel to pixel (noise.model = white), and as the same all over the map",
            error,
        )
        measured = {"rms_map": None, "rms_hdu": None, "rms_kind": "rms", "model": "white"}
        noise = config.noise.model_copy(update=measured)
        return map, config.model_copy(update={"noise": noise}), str(error)


def with_rms_map(map: Map, config: Config) -> Map:
    """Give a map the noise that the options name; it is blank where the noise is.

    Parameters
    ----------
    map
        A map.
    config
        Where it names no image of the noise, or the map has its noise already, the map is returned
        as it is.

    Raises
    ------
    MissingFileError, MapError
        As `hyperjax.maps.read_noise`.
    ConfigError
        If the image is to be in the map's own file, and the map has none.
    """
    given = config.noise
    if not given.is_given or map.rms is not None:
        return map
    try:
        rms = read_noise(_file_of_noise(map, config), map, given.rms_hdu, given.rms_kind)
    except RmsMapError:
        raise
    except MapError as error:
        fault = str(error).rsplit("; ", 1)[0]
        raise type(error)(f"{fault}; {_REMEDY}") from None
    return replace(map, data=np.where(np.isfinite(rms), map.data, np.nan), rms=rms)


def _file_of_noise(map: Map, config: Config) -> Path:
    if config.noise.rms_map is not None:
        return config.resolve(config.noise.rms_map)
    if map.path is None:
        raise ConfigError(
            f"noise.rms_hdu = {config.noise.rms_hdu}: map {map.name} comes from no file; give the "
            "file of the noise as noise.rms_map"
        )
    return map.path
