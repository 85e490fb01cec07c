"""The way of one map from pixels to a catalogue."""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.table import QTable
from numpy.typing import NDArray
from scipy import ndimage

from hyperjax.background import mosaic
from hyperjax.catalog import FLAGS, build_catalog, with_poor_fits
from hyperjax.config import Config
from hyperjax.covariance import GroupCovariance, block_covariances, group_covariances
from hyperjax.deblending import Peaks, worth_of_one
from hyperjax.detection import (
    Detections,
    HighPass,
    companions,
    detect,
    filter_size,
    high_pass,
    least_filter_size,
    shoulder_score,
)
from hyperjax.errors import BlankMapError, ConfigError
from hyperjax.forced import Placed, given_sources, place
from hyperjax.logs import counted, timed
from hyperjax.maps import Map
from hyperjax.modelling import Modelled, model_sources, unfitted, with_noise
from hyperjax.noise import Correlation, clipped_rms, measure_correlation
from hyperjax.photometry import Apertures, aperture_photometry
from hyperjax.report import fit_lines
from hyperjax.rms_map import with_usable_noise
from hyperjax.search import find_sources
from hyperjax.sources import SourceFits, near_sources, nearest_values, render_sources
from hyperjax.spectrum import segment_side
from hyperjax.whitened import Field, local_variation, significance

logger = logging.getLogger(__name__)

_SOURCE_FWHM = 1.5  # radius round a source that tells nothing of the noise
_REACH_FWHM = 4.0  # offset up to which noise may be correlated
_LEAST_FWHM = 1.8  # of the beam, pixels: below, sources are not sampled well enough for a spectrum
_SEGMENT_FWHM = 3.0  # least side of the segments of the spectrum, beam FWHM
_SPECTRAL_FILTER_FWHM = 10.0  # side of the high-pass filter before the spectrum, beam FWHM
_ODD_FACTOR = 1.5  # between the noise of a map and that given for it
_OUTLIER = 5.0  # of the residual, in units of the noise: none of it
_DOUBTFUL = FLAGS.POOR_FIT, FLAGS.NOT_CONVERGED  # of sources that are counted in the log
_ROUNDING = 1e-14  # of a map's largest value: what scatters less has no noise


@dataclass(frozen=True, eq=False, repr=False)
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
    fits : SourceFits
        The sources in pixels and Jy/beam, in the catalogue's order.
    separate : ndarray (ny, nx) or None
        The part of the background that was fitted before the sources, where there is one.
    covariances : list of GroupCovariance or None
        Of the parameters of each group, where `fit_options.calc_covar` asks for them.
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
    fits: SourceFits
    separate: NDArray[np.float64] | None = None
    covariances: list[GroupCovariance] | None = None

    def __repr__(self) -> str:
        """One line."""
        return f"<Extraction of {self.map.name}: {counted(len(self.catalog), 'source')}>"


def extract(map: Map, config: Config = Config()) -> Extraction:  # noqa: B008
    """Find the compact sources of a map and measure them; nothing is written.

    Parameters
    ----------
    map
        A map (`hyperjax.read_map`).
    config
        The options; the defaults suit a map in a unit and with a beam that its header knows. A
        map of the noise that does not go with the map, or is not positive, is not used: a warning
        and the catalogue's metadata (`rms_map_not_used`) say why, and pixels are fitted
        (`noise.model: white`).

    Returns
    -------
    Extraction
        The catalogue and the images of model, background, residual and noise.

    Raises
    ------
    MapTooSmallError
        If the map is smaller than the detection filter.
    TypeError
        If it is given a path, say, in place of a map.
    BlankMapError
        If the map has no noise, so that no signal-to-noise ratio can be had.
    MissingFileError, ConfigError
        If the table of sources, where the options name one, is not there or is none.
    """
    if not isinstance(map, Map):
        raise TypeError(f"extract() takes a Map, not {type(map).__name__}: use read_map(path)")
    seconds: dict[str, float] = {}
    has_noise = map.rms is not None
    map, config, unusable = with_usable_noise(map, config)
    given = given_sources(config, map.frame)
    placed = None if given is None else place(given, map)
    measured, why_white = _by_spectrum(map, config, seconds)
    if measured is None:
        measured = _by_pixels(map, config, seconds, placed)
    fits, found = measured.fits, measured.found
    if measured.noise_model == "correlated" or _is_weighed_by_noise(config):
        fits = with_poor_fits(fits)
    with timed(seconds, "photometry", map.name):
        order = np.argsort(-found.snr, kind="stable")
        shapes = None
        if placed is not None:
            fits, found = placed.all_rows(fits, found)
            shapes = placed.apertures(fits)
            order = np.arange(len(fits.x)) if placed.at_positions else order
        ratio = config.photometry.fwhm_radius_ratio
        apertures = aperture_photometry(
            measured.residual, fits, measured.rms, ratio, measured.summed, shapes
        )
    with timed(seconds, "catalogue", map.name):
        found = Detections(*(column[order] for column in found))
        catalog = build_catalog(
            map,
            fits.take(order),
            Apertures(*(column[order] for column in apertures)),
            found,
            convert_mjy=config.units.convert_mJy,
            shoulder_threshold=config.detection.shoulder_threshold,
            calibration_error=config.photometry.calibration_error,
        )
        if placed is not None:
            placed.complete(catalog)
        at_positions = placed is not None and placed.at_positions
        rows = np.flatnonzero(placed.measured) if placed and at_positions else np.argsort(order)
        covariances = measured.covariances(rows) if config.fit_options.calc_covar else None
        catalog.meta |= {
            "sigma_thres": config.detection.sigma_thres,
            "fit_reach_pix": float(config.fit_options.window_fwhm * map.beam_fwhm_pix),
            **_noise_metadata(measured, unusable or why_white),
        }
        if unusable is not None:
            catalog.meta["rms_map_not_used"] = unusable
        elif map.rms is not None:
            catalog.meta |= _given_noise_metadata(map, None if has_noise else config)
    if config.fit_options.verbose and not config.control.detection_only:
        for line in fit_lines(fits.take(order)):
            logger.info("%s: %s", map.name, line)
    logger.info("%s: %s", map.name, _summary(measured, catalog, seconds))
    return Extraction(
        map=map,
        config=config,
        catalog=catalog,
        model=measured.model,
        background=measured.background,
        residual=measured.residual,
        rms=measured.rms,
        detections=found,
        seconds=seconds,
        fits=fits.take(order),
        separate=measured.separate,
        covariances=covariances,
    )


@dataclass(frozen=True, eq=False)
class _Measured:
    """Sources of a map, in either way, and what they were found in and leave of it.

    `correlation` is that of the residual, as it is told, and `summed` that which errors of sums
    over apertures take. `covariances` takes the row in the catalogue of each source. `peaks_left`
    and `edge_peaks` count the peaks that are left in the residual. See `Extraction` for the images.
    `noise_over_given` is the noise of the residual in units of what was given.
    """

    fits: SourceFits
    found: Detections
    model: NDArray[np.float64]
    background: NDArray[np.float64]
    residual: NDArray[np.float64]
    rms: NDArray[np.float64]
    correlation: Correlation
    summed: Correlation
    noise_model: str
    covariances: Callable[[NDArray[np.int_]], list[GroupCovariance] | None]
    separate: NDArray[np.float64] | None = None
    peaks_left: int | None = None
    edge_peaks: int | None = None
    noise_over_given: float | None = None


def _is_weighed_by_noise(config: Config) -> bool:
    """Whether the chi^2 of fits of pixels is in units of the noise."""
    options = config.fit_options
    return options.loss == "linear" and options.weights in ("null", "inverse_rms")


def _summary(measured: _Measured, catalog: QTable, seconds: dict[str, float]) -> str:
    """One line for the log."""
    rms = float(np.nanmedian(measured.rms))
    width = measured.correlation.fwhm_pix
    shared = f"correlated over {width:.1f} pixels (FWHM)" if width else "not correlated"
    spectrum = (
        "with the spectrum of the noise"
        if measured.noise_model == "correlated"
        else "pixel by pixel"
    )
    flags = np.asarray(catalog["FLAGS"])
    doubtful = {flag.name: np.count_nonzero(flags & flag) for flag in _DOUBTFUL}
    found = [counted(len(catalog), "source")]
    found += [f"{count} of them {name}" for name, count in doubtful.items() if count]
    took = ", ".join(f"{step} {duration:.2f} s" for step, duration in seconds.items())
    return (
        f"noise of pixels {rms:.4g} Jy/beam, {shared}; fitted {spectrum}; {', '.join(found)} "
        f"({took})"
    )


def _noise_metadata(measured: _Measured, why_white: str | None) -> dict[str, Any]:
    """What the catalogue says of the noise, and of the peaks that are left in it."""
    out: dict[str, Any] = {
        "noise": "rms_jy_beam is the median noise of a pixel of the high-pass filtered residual "
        "(or as given, where pixels are fitted), noise_correlation_fwhm_pix the width of its "
        "autocorrelation, 0 where there is none",
        "rms_jy_beam": float(np.nanmedian(measured.rms)),
        "noise_correlation_fwhm_pix": measured.correlation.fwhm_pix,
        "noise_model": measured.noise_model,
    }
    if why_white is not None:
        out["noise_model_reason"] = why_white
    if measured.noise_over_given is not None:
        out["rms_map_factor"] = measured.noise_over_given
    if measured.peaks_left is not None:
        out["residual_peaks"] = measured.peaks_left
        out["edge_peaks"] = measured.edge_peaks
    return out


def _given_noise_metadata(map: Map, config: Config | None) -> dict[str, str]:
    """Which image of the noise was used: that of the options, None if the map came with one."""
    if config is None:
        return {"rms_map": "came with the map", "rms_map_kind": "rms"}
    noise = config.noise
    file = {"rms_map": str(noise.rms_map or map.name), "rms_map_kind": noise.rms_kind}
    return file if noise.rms_hdu is None else file | {"rms_map_hdu": str(noise.rms_hdu)}


def _by_spectrum(
    map: Map, config: Config, seconds: dict[str, float]
) -> tuple[_Measured | None, str | None]:
    """Find and fit the sources in noise of a measured spectrum; or why that is not to be."""
    if config.noise.model == "white":
        return None, "noise.model is white"
    if config.of_pixels:
        key = config.of_pixels[0]
        logger.info("%s: fitted pixel by pixel, as %s asks for it", map.name, key)
        return None, f"{key} asks for the fit of pixels"
    box = _spectral_filter(map)
    if box is None:
        _filter_size(map, config)  # an error where the map is too small for the other way, too
        return None, _warned_of_white(
            map,
            config,
            f"is too small for the spectrum of its noise ({map.shape[1]} x {map.shape[0]} pixels), "
            f"or its beam too narrow ({map.beam_fwhm_pix:.1f} pixels)",
        )
    with timed(seconds, "fit", map.name):
        (xx, xy), (_, yy) = map.beam_covariance_pix.tolist()
        field = Field(map.data, (xx, xy, yy), box, config, map.rms)
        sources = find_sources(field)
    if sources is None:
        blank = 100 * (1 - np.mean(field.valid))
        return None, _warned_of_white(
            map,
            config,
            f"has too few squares of {segment_side(map.shape)} pixels that are not blank for the "
            f"most part ({blank:.0f} % of it are blank: cut it to what is not), or no noise beside "
            "its brightest pixel",
        )
    fits, noise = sources.fits, sources.noise
    _tell_of_peaks(map, sources.peaks, sources.edge_peaks, config.detection.sigma_thres)
    with timed(seconds, "images", map.name):
        model = render_sources(map.shape, fits)
        size = least_filter_size(map.beam_fwhm_pix)
        passed = HighPass(field.valid, size)
        residual = passed(map.data - model)
        background = map.data - model - residual
        unit = np.where(field.inner, residual / noise.scale, np.nan)
        rms = np.where(field.valid, noise.scale * clipped_rms(unit), np.nan)
        fits = fits._replace(background=nearest_values(background, fits.x, fits.y))
        found = _detections(fits, rms, passed(map.data), map, config)
        factor = None
        if map.rms is not None:
            use = "of which only the variation over the map is used"
            factor = _factor_of_given_noise(map, config, rms, use)
            _tell_of_variation(map, local_variation(field, unit))
    with timed(seconds, "errors", map.name):
        correlation = _correlation(map, residual / rms, fits)
    measured = _Measured(
        fits=fits,
        found=found,
        model=model,
        background=background,
        residual=residual,
        rms=rms,
        correlation=correlation,
        summed=noise.spectrum.correlation(size, math.ceil(_REACH_FWHM * map.beam_fwhm_pix)),
        noise_model="correlated",
        peaks_left=len(sources.peaks.x),
        edge_peaks=len(sources.edge_peaks.x),
        noise_over_given=factor,
        covariances=functools.partial(block_covariances, sources.blocks),
    )
    return measured, None


def _factor_of_given_noise(
    map: Map, config: Config, noise: NDArray[np.float64], use: str
) -> float | None:
    """How many times what is given the noise is; a warning where that is not near 1.

    None for a weight, which tells only how the noise varies. `use` are words on what is done with
    it.
    """
    if config.noise.rms_kind == "weight":
        return None
    factor = float(np.nanmedian(noise / np.asarray(map.rms)))
    if not 1 / _ODD_FACTOR < factor < _ODD_FACTOR:
        logger.warning(
            "%s: the noise of the map is %.3g times that of the given image of the noise, %s; "
            "check its unit, and what it holds (noise.rms_kind)",
            map.label,
            factor,
            use,
        )
    return factor


def _tell_of_variation(map: Map, variation: float) -> None:
    """Warn where the noise of the map varies otherwise than the noise that is given."""
    if variation > _ODD_FACTOR:
        logger.warning(
            "%s: the noise of the map varies by a factor of %.2g otherwise than that of the given "
            "image of the noise; check what it holds (noise.rms_kind), or leave it out",
            map.label,
            variation,
        )


def _spectral_filter(map: Map) -> int | None:
    """Side of the high-pass filter before the noise's spectrum; None if the map has none.

    It takes away what is larger than any source, so that the spectrum is that of the noise.
    """
    fwhm, segment = map.beam_fwhm_pix, segment_side(map.shape)
    if fwhm < _LEAST_FWHM or segment < _SEGMENT_FWHM * fwhm:
        return None
    return 2 * int(_SPECTRAL_FILTER_FWHM / 2 * fwhm) + 1


def _tell_of_peaks(map: Map, peaks: Peaks, at_edge: Peaks, threshold: float) -> None:
    """Say which peaks are left in the residual: as a warning, if one is worth a source."""
    if len(peaks.x):
        is_worth = peaks.snr.max() ** 2 >= worth_of_one(threshold)
        logger.log(
            logging.WARNING if is_worth else logging.INFO,
            "%s: %s of %g sigma or more left in the residual; %s",
            map.name,
            counted(len(peaks.x), "peak"),
            threshold,
            _highest(peaks),
        )
    if len(at_edge.x):
        logger.warning(
            "%s: %s left at edges, too close to them for what is there to be measured, and fluxes "
            "beside them may be off; %s",
            map.name,
            counted(len(at_edge.x), "bright peak"),
            _highest(at_edge),
        )


def _highest(peaks: Peaks) -> str:
    """Where the highest of some peaks is."""
    i = int(np.argmax(peaks.snr))
    place = f"({peaks.x[i]:.1f}, {peaks.y[i]:.1f})"
    return f"the highest, of {peaks.snr[i]:.1f} sigma, is at pixel {place}"


def _warned_of_white(map: Map, config: Config, why: str) -> str:
    """Say that the spectrum of a map's noise cannot be had, and why."""
    threshold = (
        "the noise as given"
        if _noise_is_known(map, config)
        else "the scatter of the whole filtered map, which bright sources raise"
    )
    logger.warning(
        "%s: the map %s; sources are fitted as if the noise of its pixels were independent (as "
        "with noise.model: white), and the threshold is in units of %s",
        map.label,
        why,
        threshold,
    )
    return f"the map {why}"


def _detections(
    fits: SourceFits,
    rms: NDArray[np.float64],
    filtered: NDArray[np.float64],
    map: Map,
    config: Config,
) -> Detections:
    """The sources as detections, for the catalogue."""
    x, y, peak = fits.x, fits.y, fits.peak
    score = shoulder_score(filtered, x, y, peak, map.beam_fwhm_pix, config.detection)
    return Detections(x, y, peak, significance(fits), nearest_values(rms, x, y), score)


def _by_pixels(
    map: Map, config: Config, seconds: dict[str, float], placed: Placed | None
) -> _Measured:
    """Find and fit the sources as HYPER does, pixel by pixel, on polynomial backgrounds."""
    with timed(seconds, "detection", map.name):
        size = _filter_size(map, config)
        filtered = high_pass(map.data, size)
        rms = scatter = _noise(map, filtered, config)
        if placed is not None and placed.at_positions:
            found = placed.detections(filtered, scatter)
            found = found._replace(snr=found.snr / _relative_noise(map, found))
        else:
            found = _detect(map, filtered, scatter, config)
    if config.control.detection_only:
        modelled, fits = None, unfitted(found, map.beam_fwhm_pix, config)
    else:
        modelled, found, rms = _modelled(map, found, scatter, config, seconds, placed)
        fits = modelled.fits
    noise = _noise_map(map, rms)
    with timed(seconds, "images", map.name):
        model = render_sources(map.shape, fits)
        smooth = background = map.data - model - high_pass(map.data - model, size)
        separate = None
        if modelled is not None:
            background = mosaic(modelled.placed, modelled.backgrounds, fits, smooth)
            if modelled.separate is not None:
                separate = mosaic(modelled.placed, modelled.separate, fits, smooth)
        residual = map.data - background - model
        factor = None
        if map.rms is not None:
            strength = map.rms * clipped_rms(residual / map.rms)
            use = "which threshold, weights and errors are taken from"
            factor = _factor_of_given_noise(map, config, strength, use)
    with timed(seconds, "errors", map.name):
        correlation = _correlation(map, residual / _variation(map), fits)
        if modelled is not None:
            modelled = _with_errors(map, config, modelled, noise, correlation)
            fits = modelled.fits
    return _Measured(
        fits=fits,
        found=found._replace(rms=rms * _relative_noise(map, found)),
        model=model,
        background=background,
        residual=residual,
        rms=noise,
        correlation=correlation,
        summed=correlation,
        noise_model="white",
        noise_over_given=factor,
        covariances=lambda rows: modelled and group_covariances(modelled, rows),
        separate=separate,
    )


def _with_errors(
    map: Map,
    config: Config,
    modelled: Modelled,
    noise: NDArray[np.float64],
    correlation: Correlation,
) -> Modelled:
    """The fits with the errors that the noise as measured gives them, where that is known."""
    loss = config.fit_options.loss
    if loss == "linear":
        return with_noise(modelled, noise, correlation)
    if not correlation.is_white:
        logger.warning(
            "%s: neighbouring pixels share noise, which errors of fits with the loss %s do not "
            "know: they are too small; use fit_options.loss = linear for right ones",
            map.label,
            loss,
        )
    return modelled


def _modelled(
    map: Map,
    found: Detections,
    scatter: float,
    config: Config,
    seconds: dict[str, float],
    placed: Placed | None,
) -> tuple[Modelled, Detections, float]:
    """Fit all sources, look for companions in what is left, and fit all again.

    Returns the fits, the detections with the companions, and the noise of the residual: without
    the dips that sources leave in a filtered map.
    """
    fwhm, rms = map.beam_fwhm_pix, scatter
    shapes = None if placed is None else placed.model_shapes()
    with timed(seconds, "first fit", map.name):
        noise = _noise_map(map, rms)
        first = model_sources(map.data, noise, found, fwhm, config, shapes=shapes).fits
    with timed(seconds, "companions", map.name):
        rest = high_pass(map.data - render_sources(map.shape, first), _filter_size(map, config))
        if not _noise_is_known(map, config):
            rms = clipped_rms(rest / _variation(map)) or scatter
        if not config.detection.fixed_peaks:
            fitted = found._replace(x=first.x, y=first.y)
            new = companions(fitted, _detect(map, rest, scatter, config), _separation(map, config))
            found = Detections(*(np.concatenate(pair) for pair in zip(found, new, strict=True)))
    with timed(seconds, "fit", map.name):
        noise = _noise_map(map, rms)
        modelled = model_sources(map.data, noise, found, fwhm, config, first, shapes)
    return modelled, found, rms


def _correlation(map: Map, noise: NDArray[np.float64], fits: SourceFits) -> Correlation:
    """How the noise (ny, nx) of neighbouring pixels is correlated, away from all sources.

    And away from what stands out of it: what is left of sources that were not fitted, or poorly.
    """
    radius = _SOURCE_FWHM * map.beam_fwhm_pix
    covered = near_sources(map.shape, fits.x, fits.y, radius)
    outlying = np.abs(noise) > _OUTLIER * clipped_rms(noise)
    if outlying.any():
        covered |= ndimage.distance_transform_edt(~outlying) <= radius
    reach = math.ceil(_REACH_FWHM * map.beam_fwhm_pix)
    return measure_correlation(np.where(covered, np.nan, noise), reach)


def _filter_size(map: Map, config: Config) -> int:
    """Side of the box of the high-pass filter, pixels."""
    wanted, source = config.detection.kernel_size_pix, map.label
    return filter_size(map.beam_fwhm_pix, wanted, map.shape, source)


def _noise_is_known(map: Map, config: Config) -> bool:
    """Whether the strength of the noise is given, and not measured."""
    by_map = map.rms is not None and config.noise.rms_kind != "weight"
    return by_map or config.detection.use_manual_rms


def _variation(map: Map) -> NDArray[np.float64] | float:
    """The noise of every pixel in units of the typical noise: 1 where it was not given."""
    return 1.0 if map.rms is None else map.rms / float(np.nanmedian(map.rms))


def _noise_map(map: Map, rms: float) -> NDArray[np.float64]:
    """The noise of every pixel, typically `rms`; NaN where the map is blank."""
    return np.where(np.isfinite(map.data), rms * _variation(map), np.nan)


def _relative_noise(map: Map, found: Detections) -> NDArray[np.float64]:
    """Noise at each source (n,) in units of the typical noise."""
    variation = np.broadcast_to(_variation(map), map.shape)
    return nearest_values(variation, np.nan_to_num(found.x), np.nan_to_num(found.y))


def _detect(map: Map, filtered: NDArray[np.float64], scatter: float, config: Config) -> Detections:
    """Compact sources of a filtered map that stand out of its scatter (Jy/beam).

    Where the noise was given, of the scatter times the local noise over the typical one.
    """
    found = detect(
        filtered / _variation(map),
        scatter,
        map.beam_fwhm_pix,
        config.detection,
        edge_pix=config.photometry.aper_inf * map.beam_fwhm_pix,
        separation_pix=_separation(map, config),
        source=map.name,
    )
    relative = _relative_noise(map, found)
    return found._replace(peak=found.peak * relative, rms=found.rms * relative)


def _noise(map: Map, filtered: NDArray[np.float64], config: Config) -> float:
    """The noise of a filtered map, Jy/beam."""
    if map.rms is not None and _noise_is_known(map, config):
        return float(np.nanmedian(map.rms))
    least = _ROUNDING * np.nanmax(np.abs(map.data))
    if config.detection.use_manual_rms:
        rms = _manual_rms(map, config)
        if not rms > least:
            raise ConfigError(
                f"detection.rms_value = {config.detection.rms_value:g}: {rms:.3g} Jy/beam is below "
                f"the rounding of the values of {map.label} (up to {least / _ROUNDING:g} Jy/beam); "
                "give the noise of the map, and its unit as detection.rms_unit"
            )
        return rms
    rms = clipped_rms(filtered / _variation(map))
    if not rms > least:
        raise BlankMapError(
            f"{map.label}: the noise cannot be measured, as more than half of the map has one and "
            "the same value, or is nothing beside its brightest pixel "
            f"({least / _ROUNDING:.3g} Jy/beam); mask that with NaN, or set "
            "detection.use_manual_rms, detection.rms_value and rms_unit"
        )
    return rms


def _manual_rms(map: Map, config: Config) -> float:
    """The noise that the configuration gives, Jy/beam."""
    unit = config.rms_unit
    rms = config.detection.rms_value * (1e-3 if unit.startswith("m") else 1)
    per_beam = unit.endswith("beam")
    return rms if per_beam else rms * map.beam.area_arcsec2 / map.pixel_scale_arcsec**2


def _separation(map: Map, config: Config) -> float:
    """Smallest separation of two detected peaks, pixels."""
    wanted = config.detection.dist_limit_arcsec
    return wanted / map.pixel_scale_arcsec if wanted > 0 else map.beam_fwhm_pix
