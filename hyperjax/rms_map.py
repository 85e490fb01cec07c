"""The noise of a map as a configuration gives it (`noise.rms_map`)."""

from dataclasses import replace

import numpy as np

from hyperjax.config import Config
from hyperjax.maps import Map, read_noise


def with_rms_map(map: Map, config: Config) -> Map:
    """Give a map the noise that the options name; it is blank where the noise is.

    Parameters
    ----------
    map
        A map.
    config
        Where `noise.rms_map` is null, or the map has its noise already, it is returned as it is.

    Raises
    ------
    MissingFileError, MapError
        As `hyperjax.maps.read_noise`.
    """
    if config.noise.rms_map is None or map.rms is not None:
        return map
    rms = read_noise(config.resolve(config.noise.rms_map), map)
    return replace(map, data=np.where(np.isfinite(rms), map.data, np.nan), rms=rms)
