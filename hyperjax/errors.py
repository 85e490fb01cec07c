"""What hyperjax raises when it cannot go on.

Every exception carries one line for the user (what is wrong, where, what to do) and the exit code
of the command line: 2 for a mistake in the call or the configuration, 3 for a map that cannot be
used. Problems with single sources are never exceptions: they are flags in the catalogue
(`hyperjax.catalog.FLAGS`).
"""


class HyperjaxError(Exception):
    """Base of everything that hyperjax raises on purpose."""

    exit_code = 2


class ConfigError(HyperjaxError):
    """The configuration, or a command-line option, is wrong."""


class MissingFileError(HyperjaxError):
    """A file that was asked for is not there."""


class OutputError(HyperjaxError):
    """An output file or folder cannot be written."""


class FitInputError(HyperjaxError, ValueError):
    """Arrays given to the fit are inconsistent; the message names the argument."""


class MapError(HyperjaxError):
    """A map cannot be used."""

    exit_code = 3


class NotFitsError(MapError):
    """The file is not FITS, or is cut short."""


class NoImageError(MapError):
    """The FITS file holds no image of at least two dimensions."""


class MissingWcsError(MapError):
    """The image has no celestial coordinates."""


class MissingBeamError(MapError):
    """The map carries no usable beam, and none was given."""


class MapUnitError(MapError):
    """The brightness unit is missing, unknown, or cannot be converted to Jy/beam."""


class BlankMapError(MapError):
    """The map has no finite pixel, or the same value everywhere."""


class MapTooSmallError(MapError):
    """The map is smaller than the detection filter."""


class RmsMapError(MapError):
    """The map of the noise does not go with the map, or is not positive."""
