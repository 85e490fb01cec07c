"""The noise of a map as a configuration gives it (`noise.rms_map`, `rms_hdu`, `rms_kind`)."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from hyperjax.config import Config
from hyperjax.errors import ConfigError, MapError, RmsMapError
from hyperjax.maps import Map, read_noise


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
        where = "noise.rms_map, noise.rms_hdu and noise.rms_kind"
        raise type(error)(f"{error}; this is the image of the noise, which {where} name") from None
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
