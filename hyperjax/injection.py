"""What of a map's sources is found, how well it is measured, and how much of what is found is real.

Sources of known flux are added to the map itself, with its noise, its background and its sources,
a few at a time, and the map is extracted as it would be without them. Every realisation is one
`hyperjax.extract` with the user's own options: nothing of it is simplified.

Whether an injected source is found
    The new catalogue is matched with the injected sources and those of the map's own catalogue
    together, one to one, the closest pairs first, within half a beam. So a source that was there
    before is not taken for the injected one beside it. Where one detection stands for two, the
    injected source and one of the map's own that is not found beside it any more, it counts for the
    one whose total flux is closer to that of the detection.

Reliability
    False detections are those in the negative of the map without its sources: noise is as often
    below zero as above, but no source is. What interferometers leave in negative bowls and
    sidelobes counts as false, too; the residual itself would not do, as it holds the sources that
    were too faint to be found.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.stats import binom_conf_interval, mad_std
from astropy.table import QTable, Table, vstack
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.optimize import minimize
from scipy.spatial import KDTree
from scipy.special import ndtr, ndtri

from hyperjax.config import Config
from hyperjax.config_io import with_overrides
from hyperjax.errors import ConfigError, MapError, MapTooSmallError
from hyperjax.evaluate import matches
from hyperjax.logs import counted, without_warnings
from hyperjax.maps import Map, local_geometry, pixel_covariance
from hyperjax.pipeline import Extraction, extract
from hyperjax.rms_map import with_usable_noise
from hyperjax.sources import SourceFits, nearest_values, render_sources

__all__ = [
    "FRACTIONS",
    "WELL_FOUND",
    "Completeness",
    "Curve",
    "completeness",
    "deviations",
]

FRACTIONS = (0.5, 0.8, 0.9, 0.95)
"""Completeness of which the flux is told."""

WELL_FOUND = 10.0
"""S/N from which it does not matter for what is measured that only what is found is."""

Floats = NDArray[np.float64]
Progress = Callable[[int, int], object]
"""Takes how many extractions are done, and how many there are."""

_APART_FWHM = 8.0  # least distance of two injected sources: windows of fits do not overlap
_FILLED = 0.25  # share of the map in discs of that diameter; 0.55 cannot be exceeded
_EDGE_FWHM = 1.0  # least distance from the edge and from blank pixels
_MATCH_FWHM = 0.5
_CONFUSED_FWHM = 1.0  # distance of a source of the map from which an injected one is by itself
_EXTRA_FWHM = 1.5  # distance up to which a detection is a piece of an injected source
_RANGE = 0.3, 10.0  # of the injected fluxes, in units of the flux at the threshold
_PILOT = 30.0  # peaks of the sources that tell the noise of sources, in units of the pixel noise
_PILOT_TOLERANCE = 0.2  # relative error of the peak of one that is not confused
_MOST_PILOTS = 100
_FEW = 50  # injected sources, which tell no limits and no biases
_PER_BIN, _BINS = 60, (4, 16)  # injected sources in a bin, about; least and most bins
_SIGMA_SHARE = 0.6827
_RESAMPLED = 200
_LEAST_SHARE = 1e-6  # a probability is not less, nor closer to 1
_WIDTHS = 0.1, 3.0  # of the curve, in the logarithm: noise alone makes 0.2 of a threshold of 5


@dataclass(frozen=True, eq=False, repr=False)
class Completeness:
    """What came of the injected sources.

    Attributes
    ----------
    injections : QTable
        One row per injected source: what it was, whether it was found and as what.
    by_flux, by_snr : QTable
        The same in bins of the injected total flux and of the injected peak over the noise of a
        point source at its place: completeness, bias (median) and scatter (1.4826 MAD) of flux,
        position and FWHM, pulls, and the reliability of the map's own catalogue.
    limits : QTable
        Flux and S/N where the completeness reaches `FRACTIONS`, NaN where it does not.
    detected, negative : QTable
        The catalogue of the map and that of its negative without sources.
    """

    injections: QTable
    by_flux: QTable
    by_snr: QTable
    limits: QTable
    detected: QTable
    negative: QTable

    def __repr__(self) -> str:
        """One line."""
        found, n = int(self.injections["FOUND"].sum()), len(self.injections)
        return f"<Completeness of {self.injections.meta['map']}: {found} of {n} found>"

    def summary(self) -> str:
        """One paragraph of what was found."""
        meta, rows = self.injections.meta, {row["FRACTION"]: row for row in self.limits}
        parts = [
            f"{meta['map']}: {counted(len(self.injections), 'source')} injected in "
            f"{counted(meta['realisations'], 'realisation')}."
        ]
        for fraction in (0.5, 0.9):
            row = rows[fraction]
            if len(self.injections) < _FEW:
                continue
            if np.isfinite(row["FLUX"]):
                flux, error = row["FLUX"], (row["FLUX_HIGH"] - row["FLUX_LOW"]) / 2
                parts.append(
                    f"{100 * fraction:.0f} % are found at {flux.value:.4g} +- {error.value:.2g} "
                    f"{flux.unit} (S/N {row['SNR']:.2f})."
                )
            else:
                parts.append(f"{100 * fraction:.0f} % are not reached.")
        real, false = len(self.detected), len(self.negative)
        share = f" ({100 * max(1 - false / real, 0):.1f} % reliable)" if real else ""
        parts.append(f"The map itself has {counted(real, 'source')}, its negative {false}{share}.")
        well = self.injections[self.injections["FOUND"] & (self.injections["SNR"] >= WELL_FOUND)]
        if len(self.injections) < _FEW:
            parts.append(f"So few tell no more; inject some hundreds (-n), {_FEW} at least.")
        elif len(well) > 1:
            off = deviations(well)
            pull = _told(mad_std, off["PULL_FLUX"])
            parts.append(
                f"Of those found at S/N {WELL_FOUND:g} and more, fluxes are off by "
                f"{100 * _told(np.median, off['FLUX']):+.1f} % (median) and scatter by "
                f"{100 * _told(mad_std, off['FLUX']):.1f} %, {pull:.2f} times their errors."
            )
        return " ".join(parts)


def completeness(
    map: Map,
    config: Config = Config(),  # noqa: B008
    *,
    n: int = 2000,
    seed: int = 1,
    fluxes: tuple[float, float] | None = None,
    fwhm_beams: tuple[float, float] = (1.0, 1.0),
    progress: Progress | None = None,
) -> Completeness:
    """Inject sources into a map and see which of them are found, and as what.

    Parameters
    ----------
    map
        A map (`hyperjax.read_map`).
    config
        The options of the extraction.
    n
        Number of injected sources.
    seed
        The same seed gives the same result.
    fluxes
        Least and largest total flux density, Jy; from 0.3 to 10 times that of a point source at the
        threshold unless given. They are spaced evenly in the logarithm.
    fwhm_beams
        Least and largest FWHM in units of the beam's; the ellipses are those of the beam, scaled.
    progress
        Is called after every extraction.

    Returns
    -------
    Completeness
        Tables; nothing is written.

    Raises
    ------
    ConfigError
        The options are of no use here: sources that are given, or not fitted.
    MapTooSmallError
        There is no room for a source.
    MapError
        Even bright sources are not found.
    """
    _refuse(config, n, fluxes, fwhm_beams)
    quiet = with_overrides(
        config,
        {
            "fit_options.verbose": False,
            "fit_options.calc_covar": False,
            "photometry.calibration_error": 0.0,  # injected fluxes have none
        },
    )
    map, quiet, unusable = with_usable_noise(map, quiet)
    places = _Places(map, quiet)
    runs = -(-n // places.at_once)
    steps = _Steps(3 + runs, progress)
    random = np.random.default_rng(seed)
    before = steps.done(extract(map, quiet))
    negative = steps.done(_of_version(replace(map, data=before.model - map.data), quiet))
    pilot = _pilot(map, before, places, random)
    noise = steps.done(_point_noise(_of_version(_with(map, pilot), quiet), pilot, map))
    if fluxes is None:
        at_threshold = quiet.detection.sigma_thres * noise * float(np.nanmedian(before.rms))
        fluxes = _RANGE[0] * at_threshold, _RANGE[1] * at_threshold
    flux = random.permutation(np.geomspace(*fluxes, n))
    size = random.uniform(*fwhm_beams, n)
    tables: list[QTable] = []
    for first in range(0, n, places.at_once):
        some = slice(first, first + places.at_once)
        x, y = places.draw(len(flux[some]), random)
        injected = _injected(map, x, y, flux[some], size[some])
        after = _of_version(_with(map, injected), quiet)
        tables.append(steps.done(_compared(before, after, injected, noise, len(tables))))
    injections = vstack(tables)
    injections.meta = _metadata(map, config, seed, len(tables), places, noise, before)
    if unusable is not None:
        for table in (injections, before.catalog, negative.catalog):
            table.meta |= {"rms_map_not_used": unusable, "noise_model_reason": unusable}
    return _summarised(injections, before.catalog, negative.catalog, seed)


def _of_version(map: Map, config: Config) -> Extraction:
    """What is found on a version of the map; its warnings would be those of the map, or of no use.

    They name the map, which has not what they tell, such as a bright source at an edge.
    """
    with without_warnings():
        return extract(map, config)


class _Steps:
    """Counts what is done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.count, self.progress = total, 0, progress
        if progress is not None:
            progress(0, total)

    def done(self, what: Any) -> Any:
        self.count += 1
        if self.progress is not None:
            self.progress(self.count, self.total)
        return what


def _refuse(
    config: Config, n: int, fluxes: tuple[float, float] | None, fwhm: tuple[float, float]
) -> None:
    for key, given in (
        ("detection.fixed_peaks", config.detection.fixed_peaks),
        ("control.detection_only", config.control.detection_only),
    ):
        if given:
            raise ConfigError(
                f"{key} = true: the completeness is that of sources that are detected and fitted; "
                "set it to false"
            )
    if n < 1:
        raise ConfigError(f"-n {n}: must be at least 1 source")
    if fluxes is not None and not 0 < fluxes[0] < fluxes[1] < np.inf:
        low, high = (1e3 * flux for flux in fluxes)
        raise ConfigError(f"fluxes {low:g} to {high:g} mJy: must rise from a positive number")
    if not 1 <= fwhm[0] <= fwhm[1] < np.inf:
        raise ConfigError(
            f"FWHM {fwhm[0]:g} to {fwhm[1]:g} beams: must rise, from 1 or more (sources are as the "
            "beam shows them)"
        )


# --- What is injected ----------------------------------------------------------------------------


class _Places:
    """Where sources can be injected into a map, and how many at once."""

    def __init__(self, map: Map, config: Config) -> None:
        fwhm = map.beam_fwhm_pix
        valid = np.isfinite(map.data)
        depth = distance_transform_edt(np.pad(valid, 1))[1:-1, 1:-1]
        edge = max(_EDGE_FWHM, config.photometry.aper_inf) * fwhm + 1
        self.y, self.x = np.nonzero(depth > edge)
        if len(self.x) == 0:
            raise MapTooSmallError(
                f"{map.label}: no pixel is further than {edge:.1f} pixels from the edge "
                "and from blank pixels, so no source can be injected; give a larger map"
            )
        self.apart = _APART_FWHM * fwhm
        disc = np.pi / 4 * self.apart**2
        self.at_once = max(1, int(_FILLED * len(self.x) / disc))

    def draw(self, count: int, random: np.random.Generator) -> tuple[Floats, Floats]:
        """Random positions (count,) that keep their distance."""
        at = np.zeros((0, 2))
        while len(at) < count:
            pixel = random.integers(len(self.x), size=4 * count)
            offset = random.uniform(-0.5, 0.5, (len(pixel), 2))
            new = np.column_stack([self.x[pixel], self.y[pixel]]) + offset
            at = _thinned(np.concatenate([at, new]), self.apart)
        return at[:count, 0], at[:count, 1]


def _thinned(at: Floats, apart: float) -> Floats:
    """Positions (n, 2) without those that are too close to one before them."""
    keep = np.ones(len(at), bool)
    pairs = KDTree(at).query_pairs(apart, output_type="ndarray")
    for first, second in pairs[np.lexsort(pairs.T[::-1])]:
        keep[second] &= not keep[first]
    return at[keep]


class _Injected(NamedTuple):
    """Injected sources, (n,): on the map, and total flux (Jy), FWHM (arcsec) and sky position."""

    fits: SourceFits
    flux: Floats
    fwhm: Floats
    sky: SkyCoord


def _injected(map: Map, x: Floats, y: Floats, flux: Floats, size: Floats) -> _Injected:
    """Sources of the beam's shape, `size` times as large, in a map."""
    geometry = local_geometry(map.wcs, x, y)
    beam = map.beam
    covariance = pixel_covariance(
        geometry.jacobian,
        size * beam.major_arcsec,
        size * beam.minor_arcsec,
        map.beam_pa_at(geometry.sky),
    )
    variance, axes = np.linalg.eigh(covariance)
    minor, major = np.sqrt(variance).T
    theta = np.arctan2(axes[:, 1, 1], axes[:, 0, 1]) % np.pi
    jy_per_peak = 2 * np.pi * major * minor * geometry.pixel_area_arcsec2 / beam.area_arcsec2
    params = np.column_stack([flux / jy_per_peak, x, y, major, minor, theta])
    return _Injected(SourceFits.guess(params), flux, size * beam.fwhm_arcsec, geometry.sky)


def _with(map: Map, injected: _Injected) -> Map:
    return replace(map, data=map.data + render_sources(map.shape, injected.fits))


def _pilot(map: Map, before: Extraction, places: _Places, random: np.random.Generator) -> _Injected:
    """Bright point sources."""
    x, y = places.draw(min(places.at_once, _MOST_PILOTS), random)
    rms = nearest_values(before.rms, x, y)
    unit = _injected(map, x, y, np.ones(len(x)), np.ones(len(x)))
    return _injected(map, x, y, _PILOT * rms / unit.fits.peak, np.ones(len(x)))


def _point_noise(after: Extraction, pilot: _Injected, map: Map) -> float:
    """Noise of the peak of a point source over that of a pixel.

    It is what the catalogue's S/N of a bright source says, so that injected and measured S/N mean
    the same whichever way sources are found.
    """
    peak = pilot.fits.peak
    near = _within(_Sources.of(after), _positions(pilot), _MATCH_FWHM * map.beam_fwhm_pix)
    row = np.array(
        [
            index[0]
            for index, true in zip(near, peak, strict=True)
            if len(index) and abs(after.fits.peak[index[0]] / true - 1) < _PILOT_TOLERANCE
        ],
        int,
    )
    if len(row) == 0:
        raise MapError(
            f"{map.label}: of {counted(len(pilot.flux), 'injected source')} of "
            f"{_PILOT:g} times the noise none is found as what it is, so that the completeness "
            "means nothing; see what `hyperjax run` finds, and lower detection.sigma_thres"
        )
    noise = after.detections.rms[row] * after.detections.snr[row]
    return float(np.median(after.fits.peak[row] / noise))


# --- What is found -------------------------------------------------------------------------------


def _compared(
    before: Extraction, after: Extraction, injected: _Injected, noise: float, number: int
) -> QTable:
    """One row for each injected source."""
    row, pieces, confused = _recovered(before, after, injected)
    found = row >= 0
    catalog, fits = after.catalog, after.fits
    x, y = injected.fits.x, injected.fits.y
    flux_unit = catalog["FLUX_TOTAL"].unit
    local = noise * nearest_values(before.rms, x, y)
    east, north = injected.sky[found].spherical_offsets_to(
        SkyCoord(catalog["RA"][row[found]], catalog["DEC"][row[found]])
    )
    table = QTable()
    table["REALISATION"] = np.full(len(x), number)
    table["X_PIX"], table["Y_PIX"] = x * u.pix, y * u.pix
    table["RA"], table["DEC"] = injected.sky.ra.to(u.deg), injected.sky.dec.to(u.deg)
    table["FLUX_TOTAL"] = (injected.flux * u.Jy).to(flux_unit)
    table["FWHM"] = injected.fwhm * u.arcsec
    table["SNR"] = injected.fits.peak / local
    table["FOUND"], table["CONFUSED"], table["PIECES"] = found, confused, pieces

    def of_found(values: Any) -> Any:
        """Values of the found sources in their rows, NaN in the others."""
        unit = getattr(values, "unit", None)
        out = np.full(len(x), np.nan)
        out[found] = values.value if unit is not None else values
        return out if unit is None else out * unit

    for name in ("FLUX_TOTAL", "FLUX_TOTAL_ERR", "SNR"):
        table[f"FOUND_{name}"] = of_found(catalog[name][row[found]])
    table["RA_OFFSET"], table["DEC_OFFSET"] = (
        of_found(offset.to(u.arcsec)) for offset in (east, north)
    )
    for name in ("RA_ERR", "DEC_ERR"):
        table[name] = of_found(catalog[name][row[found]])
    fwhm = np.sqrt(catalog["FWHM_1"] * catalog["FWHM_2"])
    table["FOUND_FWHM"] = of_found(fwhm[row[found]])
    table["FOUND_FWHM_ERR"] = of_found((fwhm * _relative_size_error(fits))[row[found]])
    table["FOUND_FLAGS"] = np.where(found, catalog["FLAGS"][row] if len(catalog) else 0, 0)
    for name, text in _MEANING.items():
        table[name].info.description = text
    return table


_MEANING = {
    "REALISATION": "Number of the extraction, from 0",
    "X_PIX": "Column of the injected source, 0 at the centre of the first pixel",
    "Y_PIX": "Row of the injected source",
    "RA": "Right ascension (ICRS) of the injected source",
    "DEC": "Declination (ICRS) of the injected source",
    "FLUX_TOTAL": "Injected total flux density",
    "FWHM": "Injected FWHM, beam included (geometric mean)",
    "SNR": "Injected peak over the noise of a point source there",
    "FOUND": "Whether it was found",
    "CONFUSED": "Whether a source of the map is within one beam FWHM",
    "PIECES": "Detections nearby that are neither it nor sources of the map",
    "FOUND_FLUX_TOTAL": "Total flux density that was measured",
    "FOUND_FLUX_TOTAL_ERR": "1-sigma uncertainty of FOUND_FLUX_TOTAL",
    "FOUND_SNR": "S/N of the detection, as in the catalogue",
    "RA_OFFSET": "Measured less injected right ascension, on the sky",
    "DEC_OFFSET": "Measured less injected declination",
    "RA_ERR": "1-sigma uncertainty of RA_OFFSET",
    "DEC_ERR": "1-sigma uncertainty of DEC_OFFSET",
    "FOUND_FWHM": "FWHM that was measured (geometric mean)",
    "FOUND_FWHM_ERR": "1-sigma uncertainty of FOUND_FWHM",
    "FOUND_FLAGS": "FLAGS of the detection, as in the catalogue",
}


def _relative_size_error(fits: SourceFits) -> Floats:
    """Relative error (n,) of the geometric mean of the axes."""
    major, minor, c = fits.sigma_major, fits.sigma_minor, fits.covariance
    variance = c[:, 3, 3] / major**2 + c[:, 4, 4] / minor**2 + 2 * c[:, 3, 4] / (major * minor)
    return np.sqrt(np.where(variance >= 0, variance, np.nan)) / 2


def _recovered(
    before: Extraction, after: Extraction, injected: _Injected
) -> tuple[NDArray[np.int_], NDArray[np.int_], NDArray[np.bool_]]:
    """Which row of the new catalogue each injected source is (-1: none), pieces, and confusion."""
    fwhm = before.map.beam_fwhm_pix
    old, new = _Sources.of(before), _Sources.of(after)
    own = _positions(injected, before.config.units.per_jy)
    truth = Table(
        {
            "RA": np.concatenate([before.catalog["RA"].value, injected.sky.ra.deg]),
            "DEC": np.concatenate([before.catalog["DEC"].value, injected.sky.dec.deg]),
        }
    )
    row = np.full(len(own.flux), -1)
    again = np.full(len(old.flux), -1)
    if len(new.flux):
        pairs = matches(after.catalog, truth, _MATCH_FWHM * before.map.beam.fwhm_arcsec)
        is_old = pairs.truth < len(again)
        again[pairs.truth[is_old]] = pairs.catalog[is_old]
        row[pairs.truth[~is_old] - len(again)] = pairs.catalog[~is_old]
    confused = np.zeros(len(row), bool)
    for index, near in enumerate(_within(old, own, _CONFUSED_FWHM * fwhm)):
        confused[index] = len(near) > 0
        if len(near) and len(new.flux):
            row[index] = _one_of_two(index, row, again, own, old, new, _MATCH_FWHM * fwhm)
    taken = np.zeros(len(new.flux), bool)
    taken[row[row >= 0]] = taken[again[again >= 0]] = True
    around = _within(new, own, _EXTRA_FWHM * fwhm)
    pieces = np.array([np.sum(~taken[near]) for near in around], int)
    return row, pieces, confused


class _Sources(NamedTuple):
    """Positions (n, 2) in pixels and total fluxes (n,)."""

    at: Floats
    flux: Floats

    @classmethod
    def of(cls, extraction: Extraction) -> "_Sources":
        at = np.column_stack([extraction.fits.x, extraction.fits.y])
        return cls(at, np.asarray(extraction.catalog["FLUX_TOTAL"].value))


def _positions(injected: _Injected, per_jy: float = 1.0) -> _Sources:
    """Positions and fluxes of injected sources, in the catalogue's unit."""
    fits = injected.fits
    return _Sources(np.column_stack([fits.x, fits.y]), per_jy * injected.flux)


def _within(some: _Sources, of: _Sources, radius: float) -> list[NDArray[np.int_]]:
    """Which sources are closer than a radius to each of others, the closest first."""
    if len(some.at) == 0:
        return [np.zeros(0, int) for _ in of.at]
    near = [np.array(row, int) for row in KDTree(some.at).query_ball_point(of.at, radius)]
    off = (np.linalg.norm(some.at[row] - at, axis=1) for row, at in zip(near, of.at, strict=True))
    return [row[np.argsort(far, kind="stable")] for row, far in zip(near, off, strict=True)]


def _one_of_two(
    index: int,
    row: NDArray[np.int_],
    again: NDArray[np.int_],
    own: _Sources,
    old: _Sources,
    new: _Sources,
    radius: float,
) -> int:
    """Row of the new catalogue of an injected source with others near it, -1 for none."""
    mine = _Sources(own.at[[index]], own.flux[[index]])
    detection = int(row[index])
    if detection < 0:
        near = _within(new, mine, radius)[0]
        detection = next((int(c) for c in near if c in again), -1)
        rivals = np.flatnonzero(again == detection) if detection >= 0 else np.zeros(0, int)
    else:
        there = _Sources(new.at[[detection]], new.flux[[detection]])
        rivals = np.array([o for o in _within(old, there, radius)[0] if again[o] < 0], int)
    if detection < 0 or len(rivals) == 0:
        return detection
    off = np.abs(new.flux[detection] - old.flux[rivals])
    return detection if abs(new.flux[detection] - mine.flux[0]) < np.min(off) else -1


# --- What it comes to ----------------------------------------------------------------------------


def _metadata(
    map: Map,
    config: Config,
    seed: int,
    runs: int,
    places: _Places,
    noise: float,
    before: Extraction,
) -> dict[str, Any]:
    rms = float(np.nanmedian(before.rms))
    return {
        "creator": before.catalog.meta["creator"],
        "map": map.name,
        "seed": seed,
        "realisations": runs,
        "injected_at_once": places.at_once,
        "least_separation_pix": float(places.apart),
        "match_radius_arcsec": float(_MATCH_FWHM * map.beam.fwhm_arcsec),
        "beam_fwhm_arcsec": float(map.beam.fwhm_arcsec),
        "sigma_thres": float(config.detection.sigma_thres),
        **{
            key: before.catalog.meta[key]
            for key in ("noise_model", "noise_model_reason")
            if key in before.catalog.meta
        },
        "rms_jy_beam": rms,
        "point_source_noise_jy": noise * rms,
        "found": "matched one to one, within match_radius_arcsec, with the injected sources and "
        "the map's own together; a detection that stands for two of these is the one whose total "
        "flux is closer",
        "reliability": "1 - (detections in the negative of the map without its sources) / "
        "(detections in the map), in bins of what was measured, the outermost of which are open",
        "errors": f"binomial (Wilson), {100 * _SIGMA_SHARE:.1f} %",
    }


def _summarised(injections: QTable, detected: QTable, negative: QTable, seed: int) -> Completeness:
    by_flux = _binned(injections, "FLUX_TOTAL", detected, negative)
    by_snr = _binned(injections, "SNR", detected, negative)
    limits = _limits(injections, seed)
    for table in (by_flux, by_snr, limits):
        table.meta = dict(injections.meta)
    return Completeness(injections, by_flux, by_snr, limits, detected, negative)


def deviations(found: QTable) -> dict[str, Floats]:
    """What was measured less what was injected, each (n,), for rows of found sources.

    Of FLUX and FWHM relative to what was injected, of RA and DEC in arcsec on the sky, and each in
    units of its error (PULL_FLUX and so on).
    """
    flux = found["FOUND_FLUX_TOTAL"] - found["FLUX_TOTAL"]
    size = found["FOUND_FWHM"] - found["FWHM"]
    return {
        "FLUX": (flux / found["FLUX_TOTAL"]).to_value(u.one),
        "RA": found["RA_OFFSET"].to_value(u.arcsec),
        "DEC": found["DEC_OFFSET"].to_value(u.arcsec),
        "FWHM": (size / found["FWHM"]).to_value(u.one),
        "PULL_FLUX": (flux / found["FOUND_FLUX_TOTAL_ERR"]).to_value(u.one),
        "PULL_RA": (found["RA_OFFSET"] / found["RA_ERR"]).to_value(u.one),
        "PULL_DEC": (found["DEC_OFFSET"] / found["DEC_ERR"]).to_value(u.one),
        "PULL_FWHM": (size / found["FOUND_FWHM_ERR"]).to_value(u.one),
    }


def _binned(injections: QTable, name: str, detected: QTable, negative: QTable) -> QTable:
    """Completeness, deviations and reliability in logarithmic bins of an injected quantity."""
    unit = getattr(injections[name], "unit", None) or u.one
    values = np.asarray(u.Quantity(injections[name]).to_value(unit))
    count = int(np.clip(len(values) // _PER_BIN, *_BINS))
    low, high = values.min(), values.max()
    edges = np.geomspace(low, high if high > low else 1.1 * low, count + 1)
    bin_of = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, count - 1)
    found = np.asarray(injections["FOUND"])
    n, n_found = (np.bincount(bin_of[some], minlength=count) for some in (found | True, found))
    table = QTable()
    quantity = {"FLUX_TOTAL": "FLUX"}.get(name, name)
    centre = np.sqrt(edges[1:] * edges[:-1])
    for label, column in (("", centre), ("_FROM", edges[:-1]), ("_TO", edges[1:])):
        table[quantity + label] = column if unit == u.one else column * unit
    table["N"], table["N_FOUND"] = n, n_found
    _add_share(table, "COMPLETENESS", n_found, n)
    of_bin = [deviations(injections[found & (bin_of == number)]) for number in range(count)]
    for label in of_bin[0]:
        arcsec = u.arcsec if label in ("RA", "DEC") else None
        for suffix, measure in (("_BIAS", np.median), ("_SCATTER", mad_std)):
            column = np.array([_told(measure, each[label]) for each in of_bin])
            table[label + suffix] = column if arcsec is None else column * arcsec
    table["PIECES"] = np.bincount(bin_of, injections["PIECES"], count) / np.maximum(n, 1)
    n_detected, n_negative = (
        _counts(np.asarray(u.Quantity(catalog[name]).to_value(unit)), edges)
        for catalog in (detected, negative)
    )
    table["N_DETECTED"], table["N_NEGATIVE"] = n_detected, n_negative
    _add_share(table, "RELIABILITY", np.maximum(n_detected - n_negative, 0), n_detected)
    for column in table.itercols():
        column.info.description = _meaning_in_bins(column.info.name)
    return table


def _meaning_in_bins(name: str) -> str:
    """Description of a column of `_binned`."""
    if name in _MEANING_IN_BINS:
        return _MEANING_IN_BINS[name]
    quantity, _, suffix = name.rpartition("_")
    return _MEANING_OF_SUFFIX[suffix].format(_MEASURED[quantity])


_MEANING_IN_BINS = {
    "FLUX": "Middle of the bin of total flux density (geometric mean of its ends)",
    "SNR": "Middle of the bin of the peak over the noise (geometric mean of its ends)",
    "N": "Injected sources in the bin",
    "N_FOUND": "Those that were found",
    "COMPLETENESS": "N_FOUND / N",
    "PIECES": "Detections near an injected source that are no source, per source",
    "N_DETECTED": "Detections in the map with a measured value in the bin",
    "N_NEGATIVE": "The same in the negative of the map without its sources",
    "RELIABILITY": "1 - N_NEGATIVE / N_DETECTED",
}
_MEANING_OF_SUFFIX = {
    "FROM": "Lower end of the bin of {}",
    "TO": "Upper end of the bin of {}",
    "LOW": "Lower end of the binomial interval of {}",
    "HIGH": "Upper end of the binomial interval of {}",
    "BIAS": "Median of the deviation of {} of the sources found",
    "SCATTER": "Scatter (1.4826 median absolute deviations) of that of {}",
}
_MEASURED = {
    "FLUX": "the flux (relative)",
    "SNR": "the peak over the noise",
    "RA": "the right ascension on the sky",
    "DEC": "the declination",
    "FWHM": "the FWHM (relative)",
    "COMPLETENESS": "the completeness",
    "RELIABILITY": "the reliability",
} | {
    f"PULL_{name}": f"{what} in units of its error"
    for name, what in (
        *(("FLUX", "the flux"), ("RA", "the right ascension"), ("DEC", "the declination")),
        ("FWHM", "the FWHM"),
    )
}


def _told(measure: Callable[[Floats], float], values: Floats) -> float:
    finite = _finite(values)
    return float(measure(finite)) if len(finite) > 1 else np.nan


def _finite(values: Floats) -> Floats:
    return np.asarray(values[np.isfinite(values)])


def _counts(values: Floats, edges: Floats) -> NDArray[np.int_]:
    """How many values are in each bin; the outermost are open."""
    inner = np.searchsorted(edges, _finite(values), side="right") - 1
    return np.bincount(np.clip(inner, 0, len(edges) - 2), minlength=len(edges) - 1)


def _add_share(table: QTable, name: str, part: NDArray[np.int_], whole: NDArray[np.int_]) -> None:
    """Add a share, and the ends of its binomial interval; NaN of none."""
    some = whole > 0
    columns = np.full((3, len(whole)), np.nan)
    columns[0, some] = part[some] / whole[some]
    columns[1:, some] = binom_conf_interval(
        part[some], whole[some], _SIGMA_SHARE, interval="wilson"
    )
    table[name], table[f"{name}_LOW"], table[f"{name}_HIGH"] = columns


class Curve(NamedTuple):
    r"""Completeness as a function of flux (or S/N), :math:`c\,\Phi(\ln(F / F_c) / w)`.

    What is near the limit is found where noise lifts it above, whence the integral of a Gaussian;
    what is missed however bright it is, as it is confused with others, makes the ceiling c.
    """

    ceiling: float
    centre: float  # ln F_c
    width: float
    least: float  # of the values that it was fitted to
    largest: float

    @classmethod
    def fitted(
        cls, values: Floats, found: NDArray[np.bool_], start: "Curve | None" = None
    ) -> "Curve":
        """Maximum likelihood, each source being found or not."""
        log = np.log(values)
        first = np.array([0.95, np.quantile(log, 1 - np.mean(found)), 0.2])
        fit = minimize(
            _unlikelihood,
            first if start is None else np.array(start[:3]),
            (log, found),
            method="L-BFGS-B",
            jac=True,
            bounds=[(_LEAST_SHARE, 1 - _LEAST_SHARE), (log.min() - 1, log.max() + 1), _WIDTHS],
        )
        ceiling, centre, width = map(float, fit.x)
        return cls(ceiling, centre, width, float(values.min()), float(values.max()))

    def share(self, values: Floats) -> Floats:
        """Completeness at some values."""
        return np.asarray(self.ceiling * ndtr((np.log(values) - self.centre) / self.width))

    def where(self, fractions: Sequence[float]) -> Floats:
        """Where the completeness reaches fractions, NaN where not within what was injected."""
        share = np.array(fractions) / self.ceiling
        with np.errstate(over="ignore"):
            at = np.exp(self.centre + self.width * ndtri(np.minimum(share, 1)))
        return np.where((at >= self.least) & (at <= self.largest), at, np.nan)


def _unlikelihood(params: Floats, log: Floats, found: NDArray[np.bool_]) -> tuple[float, Floats]:
    """Minus the logarithm of the likelihood of a `Curve`, and its gradient."""
    ceiling, centre, width = params
    z = (log - centre) / width
    phi, density = ndtr(z), np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    share = np.clip(ceiling * phi, _LEAST_SHARE, 1 - _LEAST_SHARE)
    slope = np.where(found, -1 / share, 1 / (1 - share))
    turn = slope * ceiling * density / width
    gradient = np.array([np.sum(slope * phi), -np.sum(turn), -np.sum(turn * z)])
    return -float(np.sum(np.log(np.where(found, share, 1 - share)))), gradient


def _limits(injections: QTable, seed: int) -> QTable:
    """Where completeness reaches `FRACTIONS`, with intervals of resampled injections."""
    found = np.asarray(injections["FOUND"])
    random = np.random.default_rng([seed, 1])
    drawn = random.integers(len(found), size=(_RESAMPLED, len(found)))
    table = QTable({"FRACTION": np.array(FRACTIONS)})
    for name, label in (("FLUX_TOTAL", "FLUX"), ("SNR", "SNR")):
        unit = getattr(injections[name], "unit", None)
        values = np.asarray(u.Quantity(injections[name]).value)
        best = Curve.fitted(values, found)
        limits = best.where(FRACTIONS)
        sampled = [Curve.fitted(values[some], found[some], best).where(FRACTIONS) for some in drawn]
        columns = limits, *np.where(np.isfinite(limits), _interval(np.array(sampled)), np.nan)
        for suffix, column in zip(("", "_LOW", "_HIGH"), columns, strict=True):
            table[label + suffix] = column if unit is None else column * unit
    for column in table.itercols():
        column.info.description = _MEANING_OF_LIMITS[column.info.name]
    return table


_MEANING_OF_LIMITS = {"FRACTION": "Completeness"} | {
    label + suffix: text + meaning
    for label, meaning in (
        ("FLUX", "injected total flux density from which on sources are found with it"),
        ("SNR", "injected peak over the noise from which on they are"),
    )
    for suffix, text in (
        ("", "The "),
        ("_LOW", "Lower end of the interval (resampled injections) of the "),
        ("_HIGH", "Upper end of the interval of the "),
    )
}


def _interval(samples: Floats) -> Floats:
    """Central interval (2, m) of the finite of samples (n, m); NaN if most are not."""
    out = np.full((2, samples.shape[1]), np.nan)
    for column, values in enumerate(samples.T):
        finite = _finite(values)
        if 2 * len(finite) >= len(values):
            out[:, column] = np.quantile(finite, [(1 - _SIGMA_SHARE) / 2, (1 + _SIGMA_SHARE) / 2])
    return out
