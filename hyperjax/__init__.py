"""Source extraction and photometry for astronomical maps, on JAX.

A FITS map in, a catalogue to publish out::

    from hyperjax import Config, extract, read_map, run_hyper

    run_hyper("config.yaml")                         # a survey, as the configuration says
    result = extract(read_map("m.fits"), Config())   # one map, nothing written
    result.catalog                                   # an astropy QTable

The names are imported when they are first used, so that ``import hyperjax`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hyperjax.errors import (
    BlankMapError,
    ConfigError,
    FitInputError,
    HyperjaxError,
    MapError,
    MapTooSmallError,
    MapUnitError,
    MissingBeamError,
    MissingFileError,
    MissingWcsError,
    NoImageError,
    NotFitsError,
    OutputError,
    RmsMapError,
)

if TYPE_CHECKING:
    from hyperjax.batches import FitOptions, FitResult, GroupBatch
    from hyperjax.config import Config
    from hyperjax.config_io import load_config
    from hyperjax.evaluate import score
    from hyperjax.fitting import fit_groups
    from hyperjax.implicit import fit_parameters
    from hyperjax.injection import Completeness, completeness
    from hyperjax.least_squares import BoundedLevenbergMarquardt
    from hyperjax.maps import Beam, Map, read_map
    from hyperjax.pipeline import Extraction, extract
    from hyperjax.profiles import fit_profiles
    from hyperjax.simulation import Simulation, simulate
    from hyperjax.survey import run_hyper

    __version__: str

__all__ = [
    "Beam",
    "BlankMapError",
    "BoundedLevenbergMarquardt",
    "Completeness",
    "Config",
    "ConfigError",
    "Extraction",
    "FitInputError",
    "FitOptions",
    "FitResult",
    "GroupBatch",
    "HyperjaxError",
    "Map",
    "MapError",
    "MapTooSmallError",
    "MapUnitError",
    "MissingBeamError",
    "MissingFileError",
    "MissingWcsError",
    "NoImageError",
    "NotFitsError",
    "OutputError",
    "RmsMapError",
    "Simulation",
    "__version__",
    "completeness",
    "extract",
    "fit_groups",
    "fit_parameters",
    "fit_profiles",
    "load_config",
    "read_map",
    "run_hyper",
    "score",
    "simulate",
]

_HOME = {
    "Beam": "maps",
    "BoundedLevenbergMarquardt": "least_squares",
    "Completeness": "injection",
    "Config": "config",
    "Extraction": "pipeline",
    "FitOptions": "batches",
    "FitResult": "batches",
    "GroupBatch": "batches",
    "Map": "maps",
    "Simulation": "simulation",
    "completeness": "injection",
    "extract": "pipeline",
    "fit_groups": "fitting",
    "fit_parameters": "implicit",
    "fit_profiles": "profiles",
    "load_config": "config_io",
    "read_map": "maps",
    "run_hyper": "survey",
    "score": "evaluate",
    "simulate": "simulation",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that makes it (PEP 562)."""
    if name == "__version__":
        return import_module("importlib.metadata").version("hyperjax")
    if name in _HOME:
        return getattr(import_module(f"hyperjax.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
