"""Run hyper_py with some of its behaviours changed: which of them make its results differ?

For `parity.py`, in an environment that has hyper_py and not hyperjax. hyper_py's files stay as they
are: the functions that do what is to be changed are replaced in this process alone. Each of the
`AMENDMENTS` changes one behaviour; its docstring says what hyper_py does then.

    python amended.py CONFIG.yaml --beam-pix 4 --change noise threshold weights
"""

import argparse
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from astropy.io import ascii as tables
from astropy.io import fits
from astropy.modeling import models
from astropy.stats import sigma_clipped_stats
from astropy.wcs import WCS
from hyper_py import bkg_multigauss, bkg_single, detection, fitting, gaussfit, hyper, single_map
from lmfit import Parameters, minimize
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

FWHM_PER_SIGMA = np.sqrt(8 * np.log(2))
FILTER_FWHM = 4.0  # least side of the filter of the detection, of hyperjax
NEAR_FWHM = 12.0  # neighbours further away are not subtracted
MASK_SIGMA = 3.0  # radius of a source in the fit of a background, sigmas of the beam
GROUP_FWHM = 2.5  # that of the default of hyperjax
ROUNDS = 3  # of fits with weights that follow the model
LEAST_WEIGHT = 1e-3  # of the largest

Image = NDArray[np.float64]


@functools.cache
def config() -> dict[str, Any]:
    """The configuration file, and what else the amendments have to know."""
    return {}


def high_pass(image: Image) -> Image:
    """The map minus its mean in a box of the side that hyper_py's detection takes, or another."""
    filled = np.where(np.isfinite(image), image, np.nanmedian(image))
    return np.asarray(filled - uniform_filter(filled, config()["filter_side"], mode="nearest"))


def beam_sigma() -> float:
    return float(config()["beam_pix"] / FWHM_PER_SIGMA)


def around(function: Callable[..., Any], change: Callable[[dict[str, Any]], None]) -> Any:
    """A function whose arguments, by name, are changed before every call."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        change(given)
        return function(**given)

    return changed


# --- Detection -----------------------------------------------------------------------------------


def filtered_noise() -> None:
    """The threshold is a multiple of the noise of the filtered map."""

    def change(given: dict[str, Any]) -> None:
        filtered = high_pass(given["real_map"])
        given["rms_real"] = sigma_clipped_stats(filtered, sigma=3.0, maxiters=10)[2]

    single_map.detect_sources = around(single_map.detect_sources, change)


def filtered_threshold() -> None:
    """The filtered map, not the map, has to be above the threshold."""

    def change(given: dict[str, Any]) -> None:
        given["real_map"] = high_pass(given["real_map"])

    detection.filter_by_snr = around(detection.filter_by_snr, change)


def filtered_positions() -> None:
    """Positions are centroids of the filtered map above the least of the nine pixels."""

    def snapped(peaks: Any, real_map: Image, search_radius_pix: float = 1.0) -> Any:
        filtered = high_pass(real_map)
        out = peaks.copy()
        for row in out:
            row["xcentroid"], row["ycentroid"] = centroid(
                filtered, row["xcentroid"], row["ycentroid"]
            )
        return out

    detection.snap_to_map_peak = snapped


def centroid(image: Image, x: float, y: float) -> tuple[float, float]:
    """Of the 3 x 3 pixels round the brightest of five near a position, above the least of them."""
    column, row = round(float(x)), round(float(y))
    steps = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    dx, dy = max(steps, key=lambda step: image[row + step[1], column + step[0]])
    column, row = column + dx, row + dy
    near = image[row - 1 : row + 2, column - 1 : column + 2]
    weight = (near - near.min()) / np.sum(near - near.min())
    step = np.arange(-1, 2)
    return float(column + np.sum(weight * step)), float(row + np.sum(weight * step[:, None]))


def wide_filter() -> None:
    """Peaks are searched in a map that is filtered as hyperjax filters it."""
    side = FILTER_FWHM * config()["beam_pix"]
    config()["filter_side"] = 2 * int(np.ceil((side - 1) / 2)) + 1

    def filtered(image: Image, kernel_size_pix: int, fwhm_pix: float) -> Image:
        return np.maximum(high_pass(image), 0.0)

    detection.high_pass_filter = filtered


# --- Backgrounds ---------------------------------------------------------------------------------


class Circle:
    """In place of the Gaussian that is fitted to mask a source: a circle of a fixed radius.

    A mask reaches to 0.1353 of the peak: two sigma.
    """

    def __call__(self, start: Any, x: Image, y: Image, z: Image) -> Any:
        width = MASK_SIGMA / 2 * beam_sigma()
        peak, centre = start.amplitude.value, (start.x_mean.value, start.y_mean.value)
        return models.Gaussian2D(peak, *centre, width, width)


def whole_mask() -> None:
    """Sources are masked with circles that hold them, and no mask is made smaller."""
    for module in (bkg_single, bkg_multigauss):
        module.fitting = SimpleNamespace(LevMarLSQFitter=Circle)
    bkg_multigauss.find_objects = lambda labels: []


def no_filling() -> None:
    """What is masked stays so: it is not filled with its surroundings, as background to fit."""
    for module in (bkg_single, bkg_multigauss):
        module.interpolate_replace_nans = lambda image, kernel: image


def same_pixels() -> None:
    """Backgrounds of boxes of all sizes are compared on the pixels that all of them share."""
    gaussfit.masked_background_single_sources = best_of(bkg_single.masked_background_single_sources)
    fitting.multigauss_background = best_of(bkg_multigauss.multigauss_background)


def best_of(function: Callable[..., Any]) -> Any:
    """A function that fits backgrounds, called box by box."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        tried = [function(**{**given, "box_sizes": [box]}) for box in given["box_sizes"]]
        shape = given["image"].shape
        masked = [on_map(result[1], result, shape) for result in tried]
        left = [on_map(result[0], result, shape) for result in tried]
        common = np.all(np.isfinite(masked), axis=0)
        return tried[int(np.argmin([np.mean(image[common] ** 2) for image in left]))]

    return chosen


def on_map(cutout: Image, result: Sequence[Any], shape: tuple[int, int]) -> Image:
    x_min, x_max, y_min, y_max = result[9:13]
    out = np.full(shape, np.nan)
    out[y_min:y_max, x_min:x_max] = cutout
    return out


def other_background() -> None:
    """The background is not fitted here: it is that which hyperjax fitted."""
    single = bkg_single.masked_background_single_sources
    gaussfit.masked_background_single_sources = with_background(single)
    fitting.multigauss_background = with_background(bkg_multigauss.multigauss_background)


def with_background(function: Callable[..., Any]) -> Any:
    """A function that fits backgrounds, with another background in what it gives."""
    signature, chosen = inspect.signature(function), best_of(function)
    background, seen = (fits.getdata(config()[name]) for name in ("background", "map"))

    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        image = signature.bind(*args, **kwargs).arguments["image"]
        result = list(chosen(*args, **kwargs))
        x_min, x_max, y_min, y_max = result[9:13]
        box = (slice(y_min, y_max), slice(x_min, x_max))
        unit = np.nanmedian(image[box] / seen[box])
        result[3] = unit * background[box]
        result[0] = image[box] - result[3]
        return tuple(result)

    return replaced


# --- Fits ----------------------------------------------------------------------------------------


class OtherBounds(Parameters):
    """Peaks from 0 to thrice the brightest pixel; sizes up to the largest; angles unbounded."""

    peaks = sizes = angles = False

    def add(self, name: Any, value: Any = None, **options: Any) -> None:
        if self.peaks and str(name).endswith("amplitude"):
            options.update(min=0.0, max=3 * value)
        if self.sizes and str(name).endswith(("_sx", "_sy", "_sigmax", "_sigmay")):
            options["max"] = float(config()["photometry"]["aper_sup"]) * beam_sigma()
            value = min(value, options["max"])
        if self.angles and str(name).endswith("theta"):
            options.update(min=-np.inf, max=np.inf)
        super().add(name, value, **options)


def other_bounds(name: str) -> None:
    setattr(OtherBounds, name, True)
    for module in (gaussfit, fitting):
        module.Parameters = OtherBounds


def wide_peaks() -> None:
    """Peaks may be as low as 0, in the fit and where a source is taken out of the model."""
    other_bounds("peaks")


def bounded_sizes() -> None:
    """Sizes stay below `aper_sup` beams."""
    other_bounds("sizes")


def free_angles() -> None:
    """Angles go on beyond 90 degrees from the x axis, where the same ellipse begins again."""
    other_bounds("angles")


def wide_groups() -> None:
    """Groups reach as far as those of hyperjax."""

    def wider(given: dict[str, Any]) -> None:
        given["aper_sup"] = GROUP_FWHM / 2

    single_map.group_sources = around(single_map.group_sources, wider)


def modelled_weights() -> None:
    """Weights that follow the signal-to-noise ratio follow that of the model."""

    def again(residual: Any, params: Any, args: Any, kws: Any, **options: Any) -> Any:
        x, y, data = args
        follows = kws["weights"] > 0  # there they are the data over the noise
        noise = np.median(data[follows] / kws["weights"][follows])
        result = minimize(residual, params, args=args, kws={"weights": None}, **options)
        for _ in range(ROUNDS):
            model = residual(result.params, x, y, np.zeros_like(data))
            signal = np.maximum(model / noise, 1.0)
            weights = np.maximum(signal / signal.max(), LEAST_WEIGHT)
            result = minimize(
                residual, result.params, args=args, kws={"weights": weights}, **options
            )
        return result

    for module in (gaussfit, fitting):
        module.minimize = again


def same_circle() -> None:
    """Blended sources are fitted in circles of the same size as isolated ones."""
    original = fitting._moment_init

    def moments(data: Image, x: float, y: float, sigma: float) -> tuple[float, float, float]:
        largest = float(config()["photometry"]["aper_sup"]) * sigma
        return largest, 0.98 * largest, original(data, x, y, sigma)[2] or 0.0

    fitting._moment_init = moments


def own_pixels() -> None:
    """An isolated source is known by its own number, not by its number among the isolated."""

    def numbered(given: dict[str, Any]) -> None:
        near = np.hypot(
            given["all_sources_xcen"] - given["xcen"], given["all_sources_ycen"] - given["ycen"]
        )
        given["source_id"] = int(np.argmin(near))

    single_map.fit_isolated_gaussian = around(single_map.fit_isolated_gaussian, numbered)


def without_neighbours() -> None:
    """Sources outside a group are subtracted, as an earlier run measured them."""
    known = tables.read(config()["known"], format="csv")

    def subtracted(given: dict[str, Any]) -> None:
        struct = given["map_struct"]
        x, y = WCS(struct["header"]).wcs_world2pix(known["RA"], known["DEC"], 0)
        own_x, own_y = np.atleast_1d(given["xcen"]), np.atleast_1d(given["ycen"])
        distance = np.hypot(x[:, None] - own_x, y[:, None] - own_y).min(axis=1)
        image = given["image"].copy()
        for row in np.flatnonzero(distance > 2.0):
            near = np.hypot(x[row] - own_x, y[row] - own_y).min()
            if near < NEAR_FWHM * config()["beam_pix"]:
                image -= gaussian(known[row], x[row], y[row], struct["pix_dim"], image.shape)
        given["image"] = image

    for name in ("fit_isolated_gaussian", "fit_group_with_background"):
        setattr(single_map, name, around(getattr(single_map, name), subtracted))


def gaussian(row: Any, x: float, y: float, scale: float, shape: tuple[int, int]) -> Image:
    """A source of a catalogue, in the unit of the map per pixel."""
    sigma = [row[name] / scale / FWHM_PER_SIGMA for name in ("FWHM_1", "FWHM_2")]
    ratio = float(config()["photometry"]["fwhm_radius_ratio"])
    peak = row["FLUX"] / (1 - 2 ** (-4 * ratio**2)) / (2 * np.pi * sigma[0] * sigma[1])
    theta = np.deg2rad(row["PA"] + 90)
    grid_y, grid_x = np.indices(shape)
    return np.asarray(models.Gaussian2D(peak, x, y, *sigma, theta)(grid_x, grid_y))


AMENDMENTS: Mapping[str, Callable[[], None]] = {
    "noise": filtered_noise,
    "threshold": filtered_threshold,
    "positions": filtered_positions,
    "mask": whole_mask,
    "filling": no_filling,
    "selection": same_pixels,
    "background": other_background,
    "peaks": wide_peaks,
    "sizes": bounded_sizes,
    "angles": free_angles,
    "groups": wide_groups,
    "filter": wide_filter,
    "weights": modelled_weights,
    "circle": same_circle,
    "number": own_pixels,
    "neighbours": without_neighbours,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--beam-pix", type=float, required=True, help="FWHM of the beam, pixels")
    parser.add_argument("--known", type=Path, help="catalogue of an earlier run, for neighbours")
    parser.add_argument("--background", type=Path, help="image of it, unit of the map")
    parser.add_argument("--change", nargs="*", choices=AMENDMENTS, default=[])
    options = parser.parse_args()
    config().update(yaml.safe_load(options.config.read_text(encoding="utf-8")))
    side = int(options.beam_pix) ** 2
    config().update(beam_pix=options.beam_pix, known=options.known, filter_side=side - 1 + side % 2)
    paths, name = config()["paths"]["input"], config()["files"]["file_map_name"]
    config().update(background=options.background, map=Path(paths["dir_maps"]) / name)
    for name in options.change:
        AMENDMENTS[name]()
    hyper.start_hyper(str(options.config))


if __name__ == "__main__":
    main()
