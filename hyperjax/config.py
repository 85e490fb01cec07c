"""The typed configuration: what can be set, in which unit, within which range, and why.

One frozen model per section of HYPER's YAML file, with its key names; options that HYPER does not
have stand in the section where they belong. The models are the only place where a key, its default,
its range and its meaning are written: the commented template, the messages of `ConfigError` and the
checks are generated from them.

Numbers may be given as text, as they come from YAML files: see `hyperjax.config_io`, which reads
and writes these.
"""

import functools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)
from pydantic.fields import FieldInfo

__all__ = [
    "Background",
    "Config",
    "Control",
    "Detection",
    "Files",
    "FitOptions",
    "FitsOutput",
    "InputPaths",
    "Key",
    "Noise",
    "OutputPaths",
    "Paths",
    "Photometry",
    "Survey",
    "Units",
    "Visualization",
    "all_keys",
    "cut",
    "expand_home",
    "shown",
    "submodel",
]


# --- The kinds of values -------------------------------------------------------------------------


@dataclass(frozen=True)
class Differs:
    """Marks a key whose default (or unit) is not HYPER's: HYPER's value, and why ours is better."""

    hyper: Any
    why: str


def _number(value: object) -> object:
    """Read a finite number that is written as text; a truth value is not a number."""
    if isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if not math.isfinite(number):
        return value
    return int(number) if number.is_integer() else number


def _listed(value: object) -> object:
    """Take a single value as a list of one."""
    return (value,) if isinstance(value, str | int | float) else value


def _null_text(value: object) -> object:
    """HYPER writes the absence of weights as ``null``, in quotes or without."""
    return "null" if value is None else value


def _increasing(limits: tuple[float, float]) -> tuple[float, float]:
    if not limits[0] < limits[1]:
        raise ValueError("the first number must be below the second")
    return limits


def _not_decreasing(limits: tuple[int, int]) -> tuple[int, int]:
    if not limits[0] <= limits[1]:
        raise ValueError("the first number must not be above the second")
    return limits


T = TypeVar("T")
Some = Annotated[tuple[T, ...], Field(min_length=1), BeforeValidator(_listed)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[^/\\]+$")]
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NotNegative = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Tolerance = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
Longitude = Annotated[float, Field(ge=-360, le=360), BeforeValidator(_number)]
Latitude = Annotated[float, Field(ge=-90, le=90), BeforeValidator(_number)]
Epsilon = Annotated[float, Field(ge=1), BeforeValidator(_number)]
Whole = Annotated[int, Field(ge=0), BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_number)]
Order = Annotated[int, Field(ge=0, le=4), BeforeValidator(_number)]
Channels = Annotated[tuple[Count, Count], AfterValidator(_not_decreasing)]
Interval = Annotated[tuple[Number, Number], AfterValidator(_increasing)]
Hdu = Annotated[Annotated[int, Field(ge=0)] | Text | None, BeforeValidator(_number)]
SurveyCode = Annotated[Literal[1, 2, 3, 4, 5, 6, 7, 8, 15], BeforeValidator(_number)]
Weights = Annotated[
    Literal["null", "inverse_rms", "snr", "power_snr", "map", "mask", "spatial"],
    BeforeValidator(_null_text),
]


def expand_home(path: str | Path) -> Path:
    """Put the user's home for a leading ``~``; an unknown user's is left as it is."""
    return Path(os.path.expanduser(path))


# --- The sections --------------------------------------------------------------------------------


class _Section(BaseModel):
    """A frozen group of keys; an unknown key is refused, an empty section holds the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, data: Any) -> Any:
        return {} if data is None else data


class InputPaths(_Section):
    """Where the maps are."""

    dir_maps: Text = Field(
        default=".", description="Folder of the maps, relative to the folder of this file."
    )


class OutputPaths(_Section):
    """Where the results go."""

    dir_root: Text = Field(
        default="output", description="Folder of all results, relative to the folder of this file."
    )
    dir_table_out: Text = Field(
        default="params", description="Folder of the catalogues, in dir_root."
    )
    dir_region_out: Text = Field(
        default="regions", description="Folder of the DS9 regions, in dir_root."
    )
    dir_log_out: Text = Field(default="logs", description="Folder of the logs, in dir_root.")


class Paths(_Section):
    """Folders; relative ones are relative to the folder of this file."""

    input: InputPaths = InputPaths()
    output: OutputPaths = OutputPaths()


class Files(_Section):
    """Names of the maps and of the result files."""

    file_map_name: Text | Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="The map or maps, in paths.input.dir_maps: one FITS file, a list of them, a "
        "folder of them (. for dir_maps itself), or a .txt file with one name per line (# starts a "
        "comment), there or beside this file. Not needed when the maps are given on the command "
        "line.",
    )
    hdu: Hdu = Field(
        default=None,
        description="The extension that holds the image, by number (0 is the primary one) or by "
        "name; null takes the first image.",
    )
    file_table_base: Name = Field(
        default="params", description="The catalogues are named <file_table_base>_<map>."
    )
    file_region_base: Name = Field(
        default="region_files", description="The region files are named <file_region_base>_<map>."
    )
    file_log_name: Annotated[
        Name, Differs("hyper_py.log", "the log carries the program's name")
    ] = Field(default="hyperjax.log", description="Name of the log of the whole run.")


class Control(_Section):
    """How the run is organised."""

    parallel_maps: bool = Field(default=True, description="Work on several maps at the same time.")
    n_cores: Count = Field(
        default=2, description="How many maps at the same time, where parallel_maps is true [maps]."
    )
    detection_only: bool = Field(
        default=False,
        description="Stop after the detection: positions, peaks and S/N without any fit.",
    )
    datacube: bool = Field(
        default=False,
        description="The maps are cubes: treat every channel as a map, and write the cube of their "
        "backgrounds.",
    )
    dir_datacube_slices: Text = Field(
        default="maps",
        description="Folder of the backgrounds of the channels of cubes, in paths.output.dir_root.",
    )
    channels: Channels | None = Field(
        default=None,
        description="First and last channel of cubes that is treated, from 1; null takes all "
        "[channel].",
    )

    @model_validator(mode="after")
    def _channels_of_a_cube(self) -> "Control":
        if self.channels is not None and not self.datacube:
            raise ValueError(
                f"channels = {shown(self.channels)}: only cubes have channels; set "
                "control.datacube = True, or leave it out"
            )
        return self


class Units(_Section):
    """Units of the maps and of the catalogue."""

    convert_mJy: bool = Field(
        default=True,
        description="Give flux densities in mJy (true) or Jy (false), in the catalogue, the "
        "picture and on the screen.",
    )
    map_unit: Text | None = Field(
        default=None,
        description="Brightness unit of the maps, such as Jy/beam, Jy/pix, MJy/sr or K, used in "
        "place of the header's BUNIT; null takes BUNIT. Jy alone is Jy/pix.",
    )
    frequency_ghz: Positive | None = Field(
        default=None,
        description="Frequency of the maps, needed only where the unit is K; null takes it from "
        "the header [GHz].",
    )

    @property
    def flux_unit(self) -> str:
        """Unit of flux densities: mJy or Jy."""
        return "mJy" if self.convert_mJy else "Jy"

    @property
    def per_jy(self) -> float:
        """Value of 1 Jy in that unit."""
        return 1e3 if self.convert_mJy else 1.0


class Survey(_Section):
    """The beam."""

    survey_code: SurveyCode = Field(
        default=15,
        description="Which beam: 15 that of the header (BMAJ, BMIN, BPA); or a fixed one: 1, 2, 3 "
        "PACS 70, 100, 160 um (5.2, 6.8, 12.0 arcsec); 4, 5, 6 SPIRE 250, 350, 500 um (18.0, 24.0, "
        "34.5 arcsec); 7, 8 JCMT 450, 850 um (8.0, 14.5 arcsec).",
    )
    beam_fwhm_arcsec: Positive | None = Field(
        default=None,
        description="FWHM of a circular Gaussian beam, used in place of the header's beam and of "
        "survey_code; null leaves it to those [arcsec].",
    )


class Detection(_Section):
    """Finding the sources."""

    sigma_thres: Positive = Field(
        default=5.0,
        description="Threshold. In noise of a measured spectrum (noise.model): signal-to-noise "
        "ratio of a peak of the matched filter, and of the total flux that is fitted there. Where "
        "pixels are fitted: how high a peak must stand above the mean of the filtered map, in "
        "units of its scatter, which many bright sources raise [noise].",
    )
    use_manual_rms: bool = Field(
        default=False,
        description="Use rms_value for the noise, in place of the rms measured on the map.",
    )
    rms_value: Positive = Field(
        default=1e-6, description="The noise where use_manual_rms is true [rms_unit]."
    )
    rms_unit: Literal["Jy/beam", "mJy/beam", "Jy/pixel", "mJy/pixel"] | None = Field(
        default=None,
        description="Unit of rms_value; null is HYPER's: mJy/pixel where units.convert_mJy is "
        "true, else Jy/pixel.",
    )
    kernel_size_pix: Whole = Field(
        default=0,
        description="Side of the square box whose local mean the high-pass filter subtracts; 0 "
        "takes it from the beam: floor(FWHM)^2 as in HYPER, but 4 beam FWHM at least and 10 at "
        "most [pixel].",
    )
    roundlim: Interval = Field(
        default=(-4.0, 4.0),
        description="Lowest and highest roundness, as DAOFIND has it [dimensionless].",
    )
    sharplim: Interval = Field(
        default=(-2.0, 2.0),
        description="Lowest and highest sharpness, as DAOFIND has it [dimensionless].",
    )
    dist_limit_arcsec: NotNegative = Field(
        default=0.0,
        description="Of two peaks that are closer than this only the brighter is kept; 0 means "
        "one beam FWHM [arcsec].",
    )
    use_fixed_source_table: bool = Field(
        default=False,
        description="Take what fixed_peaks and photometry.fixed_radius give from a table with the "
        "columns ID, RA, DEC (ICRS) and FWHM_1, FWHM_2 [arcsec], PA [deg]: IPAC, ECSV or CSV. A "
        "catalogue that hyperjax wrote is one.",
    )
    fixed_source_table_path: Text | None = Field(
        default=None,
        description="The table of sources where use_fixed_source_table is true, relative to the "
        "folder of this file; where it is not there, in paths.output.dir_root, as in HYPER.",
    )
    fixed_peaks: bool = Field(
        default=False,
        description="Measure at given positions and detect nothing: forced photometry. One row "
        "for each position, in the order given; those outside the map are flagged.",
    )
    xcen_fix: Some[Longitude] | None = Field(
        default=None,
        description="Longitudes of the given positions, in the frame of the map [deg].",
    )
    ycen_fix: Some[Latitude] | None = Field(
        default=None, description="Latitudes of the given positions, in the frame of the map [deg]."
    )
    snap_radius_pix: NotNegative = Field(
        default=1.0,
        description="How far a peak may move to the centroid of the brightest pixel nearby; 0 "
        "moves none [pixel].",
    )
    shoulder_filter: bool = Field(
        default=False,
        description="Drop the peaks whose shoulder score, the asymmetry of a ring round the peak "
        "over its height, says that they are the flank of a brighter source.",
    )
    shoulder_threshold: Positive = Field(
        default=0.5, description="Highest shoulder score that is kept [dimensionless]."
    )
    shoulder_ring_factor: Positive = Field(
        default=1.5, description="Radius of the ring of the shoulder score [beam FWHM]."
    )
    shoulder_n_angles: Annotated[int, Field(ge=4), BeforeValidator(_number)] = Field(
        default=16, description="Number of points on the ring of the shoulder score [points]."
    )
    shoulder_neighbor_mask: NotNegative = Field(
        default=1.0,
        description="Points of the ring that are closer than this to another peak do not count "
        "[beam FWHM].",
    )


class Photometry(_Section):
    """Sizes of the sources and of their apertures."""

    aper_inf: Annotated[
        Positive,
        Differs(1.0, "a bound at the true size of a point source biases its flux"),
    ] = Field(
        default=0.5,
        description="Smallest width of a fitted source [sigma of the beam]. Also how far from the "
        "edge of the map, and from blank pixels, a peak must be to be detected [beam FWHM].",
    )
    aper_sup: Annotated[
        Positive,
        Differs(2.0, "sources that are larger than two beams lose flux at the bound"),
    ] = Field(default=4.0, description="Largest width of a fitted source [sigma of the beam].")
    fwhm_radius_ratio: Positive = Field(
        default=0.5, description="Semi-axes of the elliptical aperture [fitted FWHM]."
    )
    fixed_radius: bool = Field(
        default=False,
        description="Use the ellipses fwhm_1, fwhm_2, PA_val for the apertures (their semi-axes "
        "are these times fwhm_radius_ratio), not the fitted ones. At given positions "
        "(detection.fixed_peaks) the sizes of the sources are not fitted either.",
    )
    fwhm_1: Some[NotNegative] | None = Field(
        default=None,
        description="Major FWHM of the given ellipses: one, or one per given position [arcsec].",
    )
    fwhm_2: Some[NotNegative] | None = Field(
        default=None,
        description="Minor FWHM of the given ellipses: one, or one per given position; null means "
        "fwhm_1 [arcsec].",
    )
    PA_val: Some[Longitude] | None = Field(
        default=None,
        description="Position angle of the given ellipses in the frame of the map, East of North: "
        "one, or one per given position; null means 0 [deg].",
    )

    calibration_error: Tolerance = Field(
        default=0.0,
        description="Relative uncertainty of the flux scale of the map, such as 0.05, which is "
        "added in quadrature to the errors of all fluxes (peak, aperture, total); all sources "
        "share it [fraction].",
    )

    @model_validator(mode="after")
    def _sizes_in_order(self) -> "Photometry":
        if not self.aper_inf < self.aper_sup:
            raise ValueError(
                f"aper_inf = {self.aper_inf:g}: must be below aper_sup = {self.aper_sup:g}"
            )
        return self


_NOT_ROBUST = ("snr", "power_snr", "map", "spatial")


class FitOptions(_Section):
    """Fitting Gaussians to the sources."""

    fit_method: Literal["least_squares"] = Field(
        default="least_squares",
        description="Least squares with bounds (Levenberg-Marquardt); HYPER's leastsq is accepted "
        "and means the same.",
    )
    loss: Literal["linear", "soft_l1", "huber", "cauchy"] = Field(
        default="linear",
        description="Loss of a residual: linear is least squares, the others are robust.",
    )
    f_scale: Annotated[
        Positive,
        Differs(0.1, "in HYPER in units of the weighted residual, which vary from map to map"),
    ] = Field(
        default=1.0,
        description="Size of a residual from which the loss is robust [sigma of the noise].",
    )
    max_nfev: Annotated[
        Count,
        Differs(
            50000, "derivatives are analytic: an evaluation is a step, and a fit takes some ten"
        ),
    ] = Field(
        default=200, description="Largest number of evaluations of the model in one fit [count]."
    )
    xtol: Tolerance = Field(
        default=1e-8, description="Converged when no parameter changes by more [relative]."
    )
    ftol: Tolerance = Field(
        default=1e-8, description="Converged when the cost changes by less [relative]."
    )
    gtol: Tolerance = Field(
        default=1e-8,
        description="Converged when the gradient of the cost is smaller [dimensionless].",
    )
    weights: Annotated[
        Weights, Differs("snr", "pixels of which the noise is the same tell the same")
    ] = Field(
        default="inverse_rms",
        description="Weights of the pixels' residuals: null (all equal), inverse_rms (1 / noise), "
        "snr (that times the S/N of the modelled sources, at least 1), power_snr (times its power "
        "power_snr), map (the modelled brightness), mask (null, without pixels that stand out of "
        "the residual by 3 of its scatter), spatial (1 / noise times a Gaussian round each "
        "source).",
    )
    power_snr: NotNegative = Field(
        default=5.0, description="Exponent of the S/N where weights is power_snr [dimensionless]."
    )
    calc_covar: bool = Field(
        default=False,
        description="Write the covariance of all parameters of each group, as a FITS table in the "
        "folder fits; the errors in the catalogue need no switch.",
    )
    min_method: Annotated[
        Literal["nmse", "redchi", "bic"],
        Differs("nmse", "nmse falls with every added term, so it always prefers the higher order"),
    ] = Field(
        default="bic",
        description="Which background is best: that of the lowest nmse (mean squared residual, "
        "normalised), redchi (reduced chi squared) or bic (Bayesian information criterion).",
    )
    verbose: bool = Field(
        default=False,
        description="Report every fit in the log: each group, its sources with their errors, and "
        "which separate background was chosen.",
    )
    use_l2_regularization: Annotated[
        bool, Differs(True, "the penalty pulls the background to zero and so biases the flux")
    ] = Field(
        default=False,
        description="Penalise the coefficients of a background that is fitted together with the "
        "sources.",
    )
    lambda_l2: NotNegative = Field(
        default=1e-4,
        description="Strength of the penalty of use_l2_regularization [dimensionless].",
    )
    vary: Annotated[
        bool | None,
        Differs(False, "the peaks of the detection are pinned to a pixel, the sources not"),
    ] = Field(
        default=None,
        description="Fit the positions too, within position_range_fwhm; null fits those of "
        "detected sources, but not given ones (detection.fixed_peaks).",
    )
    position_range_fwhm: Positive = Field(
        default=0.5,
        description="How far a fitted position may move, along each axis, but 1 pixel at least "
        "[beam FWHM].",
    )
    group_distance_fwhm: Annotated[
        NotNegative,
        Differs("2 x aper_sup", "neighbours further out are subtracted between the sweeps"),
    ] = Field(
        default=2.5, description="Sources that are closer than this are fitted jointly [beam FWHM]."
    )
    window_fwhm: Positive = Field(
        default=3.0,
        description="Margin of the window of a fit beyond the outermost positions of its group "
        "[beam FWHM].",
    )
    sweeps: Count = Field(
        default=2,
        description="Rounds of fits of all groups, each with the neighbours outside the group "
        "subtracted [rounds].",
    )
    bg_fitters: Some[Literal["least_squares", "huber", "theilsen"]] = Field(
        default=("least_squares",),
        description="How a background is fitted separately: least_squares, huber (with each of "
        "huber_epsilons), theilsen (the median of exact fits to many small subsets of the pixels); "
        "pixels that stand out by 3 of their scatter are left out. The best is kept.",
    )
    huber_epsilons: Some[Epsilon] = Field(
        default=(1.1, 1.35, 1.7, 2.0),
        description="Residuals from which huber, of bg_fitters, is robust [scatter].",
    )
    fit_aperture_sigma: Annotated[
        NotNegative | None, Differs(1.0, "every pixel of the window tells something")
    ] = Field(
        default=None,
        description="Only pixels in a circle round a source are fitted, in a group in those of all "
        "its sources: its radius is that much more than photometry.aper_sup; null fits the "
        "whole window [sigma of the beam].",
    )
    spatial_weight_sigma: Positive = Field(
        default=1.5,
        description="Width of the weights where weights is spatial [sigma of the beam].",
    )

    @model_validator(mode="after")
    def _one_way_to_weigh(self) -> "FitOptions":
        if self.loss != "linear" and self.weights in _NOT_ROBUST:
            raise ValueError(
                f"weights = {self.weights}: does not go with loss = {self.loss}, which takes the "
                "pixels of large weight for outliers; use loss = linear, or weights = null, mask "
                "or inverse_rms"
            )
        return self


class Background(_Section):
    """The background under the sources: separately, together with them, both or none."""

    fit_gauss_and_bg_separately: Annotated[
        bool,
        Differs(True, "a background that is subtracted first carries no error into the flux"),
    ] = Field(
        default=False,
        description="Fit a polynomial to the surroundings of each group, the sources masked, and "
        "subtract it before the sources are fitted.",
    )
    pol_orders_separate: Some[Order] = Field(
        default=(0, 1, 2),
        description="Orders of the separate polynomial that are tried; the best is kept [order].",
    )
    fix_min_box: NotNegative = Field(
        default=3.0,
        description="Smallest margin of the box of the separate fit beyond the group; 0 takes "
        "the whole map [beam FWHM].",
    )
    fix_max_box: NotNegative = Field(
        default=5.0,
        description="Largest margin of the box of the separate fit beyond the group; not used "
        "where fix_min_box is 0 [beam FWHM].",
    )
    fit_gauss_and_bg_together: Annotated[
        bool,
        Differs(False, "a joint fit carries the uncertainty of the background into the flux"),
    ] = Field(
        default=True,
        description="Fit a polynomial background together with the sources of each group.",
    )
    polynomial_orders: Annotated[
        Some[Order], Differs((0,), "backgrounds have slopes, which a constant leaves in the flux")
    ] = Field(
        default=(0, 1, 2),
        description="Orders of the joint polynomial that are tried; the best is kept [order].",
    )
    pol_orders_bkg_no_sources: Some[Order] = Field(
        default=(0,),
        description="Orders of the polynomial that is the background of a channel of a cube "
        "without a source; the best is kept, 0 is the clipped median [order].",
    )

    @model_validator(mode="after")
    def _boxes_in_order(self) -> "Background":
        if self.fix_min_box > self.fix_max_box:
            raise ValueError(
                f"fix_min_box = {self.fix_min_box:g}: must not exceed "
                f"fix_max_box = {self.fix_max_box:g}"
            )
        return self


class Noise(_Section):
    """The noise of the maps."""

    model: Literal["auto", "white", "correlated"] = Field(
        default="auto",
        description="What the fit takes the noise for. correlated: noise of a power spectrum that "
        "is measured on the map itself; sources are found by its matched filter and fitted in "
        "Fourier space, where a smooth background is noise, too. white: pixels are independent; "
        "sources are found and fitted as in HYPER, each on a polynomial. auto: correlated, where "
        "the map is large enough and every option that only the fit of pixels knows (those of "
        "backgrounds, weights, losses ...) has its default, which counts for nothing then. Errors "
        "are those of the noise as measured in any case.",
    )
    rms_map: Text | None = Field(
        default=None,
        description="FITS image of the noise of the map, on its grid and in a unit that the map "
        "could have (without one, in the map's), relative to the folder of this file; blank (NaN) "
        "pixels are not used. Where pixels are taken as independent it is the noise of the "
        "weights, the errors and the threshold; otherwise it says how the noise varies over the "
        "map, and one factor comes from the map itself. null measures the noise.",
    )
    rms_hdu: Hdu = Field(
        default=None,
        description="Number (0 is the first) or name of the HDU of rms_map; where rms_map is null, "
        "of the file of each map. null is the first image of rms_map.",
    )
    rms_kind: Literal["rms", "variance", "weight"] = Field(
        default="rms",
        description="What the image of the noise holds. rms: its standard deviation. variance: "
        "the square of that, in the square of such a unit. weight: what the inverse variance "
        "is proportional to, such as the coverage or the time of integration, in any unit; pixels "
        "of weight 0 are not used, and one factor comes from the map itself.",
    )

    @property
    def is_given(self) -> bool:
        """Whether there is an image of the noise."""
        return self.rms_map is not None or self.rms_hdu is not None


class FitsOutput(_Section):
    """FITS files of single fits, in Jy/beam or mJy/beam (units.convert_mJy)."""

    fits_fitting: bool = Field(
        default=False,
        description="Write, for each group, the data, the pixels near the sources, the model and "
        "the residual.",
    )
    fits_deblended: bool = Field(
        default=False,
        description="Write, for each source, the data, the map without background and other "
        "sources, the model of the source and the residual.",
    )
    fits_bg_separate: bool = Field(
        default=False,
        description="Write, for each group, the data, the data with the sources masked, the "
        "background that was fitted separately, and the data without it. Nothing is written "
        "where background.fit_gauss_and_bg_separately is false.",
    )
    fits_output_dir_fitting: Text = Field(
        default="fits/fitting", description="Folder for fits_fitting, in paths.output.dir_root."
    )
    fits_output_dir_deblended: Text = Field(
        default="fits/deblended", description="Folder for fits_deblended, in paths.output.dir_root."
    )
    fits_output_dir_bg_separate: Text = Field(
        default="fits/bg_separate",
        description="Folder for fits_bg_separate, in paths.output.dir_root.",
    )


class Visualization(_Section):
    """Pictures."""

    visualize_overview: bool = Field(
        default=True,
        description="Draw one picture of each map: the map, the model and the residual.",
    )
    visualize_fitting: bool = Field(
        default=False,
        description="Draw what fits_fitting writes, as images and as surfaces.",
    )
    visualize_deblended: bool = Field(
        default=False, description="Draw what fits_deblended writes, as images and as surfaces."
    )
    visualize_bg_separate: bool = Field(
        default=False, description="Draw what fits_bg_separate writes, as images and as surfaces."
    )
    output_dir_fitting: Text = Field(
        default="plots/fitting",
        description="Folder for visualize_fitting, in paths.output.dir_root.",
    )
    output_dir_deblended: Text = Field(
        default="plots/deblended",
        description="Folder for visualize_deblended, in paths.output.dir_root.",
    )
    output_dir_bg_separate: Text = Field(
        default="plots/bg_separate",
        description="Folder for visualize_bg_separate, in paths.output.dir_root.",
    )


class Config(_Section):
    """All options of a run; ``Config()`` holds the defaults, and a map alone needs no more.

    Frozen and hashable: lists of the YAML file are tuples here. `config_from_dict` and
    `load_config` give one-line errors; calling the class gives pydantic's.
    """

    paths: Paths = Paths()
    files: Files = Files()
    control: Control = Control()
    units: Units = Units()
    survey: Survey = Survey()
    detection: Detection = Detection()
    photometry: Photometry = Photometry()
    fit_options: FitOptions = FitOptions()
    background: Background = Background()
    noise: Noise = Noise()
    fits_output: FitsOutput = FitsOutput()
    visualization: Visualization = Visualization()

    _source: str = PrivateAttr("configuration")
    _base_dir: Path | None = PrivateAttr(None)

    @property
    def source(self) -> str:
        """What the options were read from: the name of the file, as error messages show it."""
        return self._source

    @property
    def base_dir(self) -> Path:
        """Folder that relative paths are relative to: that of the file, else the current one."""
        return self._base_dir or Path.cwd()

    def resolve(self, path: str | Path) -> Path:
        """Make a path of the configuration absolute; ``~`` is the user's home."""
        return self.base_dir / expand_home(path)

    @property
    def positions_vary(self) -> bool:
        """Whether positions are fitted: as `fit_options.vary` says, else unless they are given."""
        vary = self.fit_options.vary
        return not self.detection.fixed_peaks if vary is None else vary

    @property
    def rms_unit(self) -> str:
        """Unit of ``detection.rms_value``."""
        hyper = "mJy/pixel" if self.units.convert_mJy else "Jy/pixel"
        return self.detection.rms_unit or hyper

    @property
    def of_pixels(self) -> tuple[str, ...]:
        """Keys that are not at their defaults and that the fit of pixels alone knows."""
        keys = all_keys()
        return tuple(key for key in _OF_PIXELS if _value(self, key) != keys[key].default)

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Keys of backgrounds and fits that were given, but as they are by default.

        They count for nothing where sources are fitted in the noise as measured, unless the file
        that gives them says noise.model, too.
        """
        if self.noise.model != "auto" or "model" in self.noise.model_fields_set or self.of_pixels:
            return ()
        parts = (key.split(".") for key in _OF_PIXELS)
        return tuple(
            f"{section}.{name}"
            for section, name in parts
            if section in ("background", "fit_options")
            and name in getattr(self, section).model_fields_set
        )

    @model_validator(mode="after")
    def _noise_that_goes_with_the_rest(self) -> "Config":
        if self.noise.model == "correlated" and self.of_pixels:
            key = self.of_pixels[0]
            raise ValueError(
                f"noise.model = correlated: does not go with {key} = {shown(_value(self, key))}, "
                "which only the fit of pixels knows; use noise.model = auto or white"
            )
        return self

    @model_validator(mode="after")
    def _one_noise(self) -> "Config":
        if not self.noise.is_given:
            if self.noise.rms_kind != "rms":
                raise ValueError(
                    f"noise.rms_kind = {shown(self.noise.rms_kind)}: there is no image of the "
                    "noise; give one as noise.rms_map or noise.rms_hdu"
                )
            return self
        key = "rms_map" if self.noise.rms_map is not None else "rms_hdu"
        if self.control.datacube:
            raise ValueError(
                f"noise.{key} = {shown(getattr(self.noise, key))}: does not go with "
                "control.datacube = True; leave it out, and the noise of each channel is measured"
            )
        if self.detection.use_manual_rms:
            raise ValueError(
                f"noise.{key} = {shown(getattr(self.noise, key))}: does not go with "
                "detection.use_manual_rms = True; give one of them"
            )
        return self

    @model_validator(mode="after")
    def _given_sources_are_there(self) -> "Config":
        problem = _missing_of_given_sources(self.detection, self.photometry)
        if problem is not None:
            raise ValueError(problem)
        return self


# --- Sources that are given ----------------------------------------------------------------------


def _missing_of_given_sources(detection: Detection, photometry: Photometry) -> str | None:
    """What fixed peaks and radii lack, or what of them contradicts the rest; None if all is well.

    What a table of sources lacks is found where it is read (`hyperjax.forced`).
    """
    if detection.use_fixed_source_table:
        return _missing_of_table(detection, photometry)
    if detection.fixed_peaks:
        counts = [len(detection.xcen_fix or ()), len(detection.ycen_fix or ())]
        if 0 in counts or counts[0] != counts[1]:
            return (
                f"detection.fixed_peaks = True: detection.xcen_fix has {counts[0]} values and "
                f"ycen_fix {counts[1]}; give as many of one as of the other [deg], or a table "
                "(detection.use_fixed_source_table)"
            )
    if not photometry.fixed_radius:
        return None
    count = len(detection.xcen_fix or ()) if detection.fixed_peaks else 1
    return _wrong_ellipses(photometry, count)


def _missing_of_table(detection: Detection, photometry: Photometry) -> str | None:
    if detection.fixed_source_table_path is None:
        return (
            "detection.fixed_source_table_path = null: must be the path of a table where "
            "detection.use_fixed_source_table is true"
        )
    if not detection.fixed_peaks:
        alone = "without it nothing is taken from the table"
        ellipses = "the ellipses of a table belong to its positions"
        return (
            "detection.fixed_peaks = False: must be true where detection.use_fixed_source_table "
            f"is; {ellipses if photometry.fixed_radius else alone}"
        )
    return None


def _wrong_ellipses(photometry: Photometry, count: int) -> str | None:
    """What is wrong with given ellipses for some positions (1 where sources are detected)."""
    if photometry.fwhm_1 is None:
        return (
            "photometry.fwhm_1 = null: must be a list of FWHM > 0 [arcsec] where "
            "photometry.fixed_radius is true"
        )
    for name in ("fwhm_1", "fwhm_2", "PA_val"):
        values = getattr(photometry, name) or (1.0,)
        if name != "PA_val" and min(values) <= 0:
            return f"photometry.{name} = {shown(values)}: must be > 0 [arcsec]"
        if len(values) not in (1, count):
            allowed = f"1 value, or {count}: one for each position" if count > 1 else "1 value"
            return f"photometry.{name}: has {len(values)} values; must have {allowed}"
    return None


# --- What only the fit of pixels knows ----------------------------------------------------------

_OF_PIXELS = (
    "control.detection_only",
    "control.datacube",
    "detection.use_manual_rms",
    "detection.kernel_size_pix",
    "detection.roundlim",
    "detection.sharplim",
    "detection.dist_limit_arcsec",
    "detection.snap_radius_pix",
    "detection.shoulder_filter",
    "detection.fixed_peaks",
    "photometry.fixed_radius",
    "fit_options.loss",
    "fit_options.weights",
    "fit_options.min_method",
    "fit_options.use_l2_regularization",
    "fit_options.fit_aperture_sigma",
    "fit_options.group_distance_fwhm",
    "fit_options.window_fwhm",
    "fit_options.sweeps",
    "background.fit_gauss_and_bg_separately",
    "background.fit_gauss_and_bg_together",
    "background.polynomial_orders",
)


def _value(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


# --- What the models say about a key -------------------------------------------------------------


class Key(NamedTuple):
    """One key: its section's model, its name there, and its field."""

    section: type[BaseModel]
    name: str
    field: FieldInfo

    @property
    def default(self) -> Any:
        """The default."""
        return self.field.default

    @property
    def allowed(self) -> str:
        """The values that the key accepts, in words."""
        return _in_words(_schema(self.section)["properties"][self.name])

    @property
    def differs(self) -> Differs | None:
        """HYPER's default, where it is another."""
        return next((mark for mark in self.field.metadata if isinstance(mark, Differs)), None)


def submodel(field: FieldInfo) -> type[BaseModel] | None:
    """Model of a field that is a section; None for a key."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _walk(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Key]]:
    for name, field in section.model_fields.items():
        inner = submodel(field)
        if inner is None:
            yield prefix + name, Key(section, name, field)
        else:
            yield from _walk(inner, f"{prefix}{name}.")


@functools.cache
def all_keys() -> dict[str, Key]:
    """Every key by its full path, such as ``detection.sigma_thres``."""
    return dict(_walk(Config))


@functools.cache
def _schema(section: type[BaseModel]) -> dict[str, Any]:
    return section.model_json_schema()


_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_KINDS = {"number": "a number", "integer": "an integer", "boolean": "true or false"}


def _in_words(schema: Mapping[str, Any]) -> str:
    """Say in words which values a JSON schema allows."""
    match schema:
        case {"anyOf": choices}:
            null_first = sorted(choices, key=lambda choice: choice.get("type") != "null")
            return " or ".join(_in_words(choice) for choice in null_first)
        case {"enum": choices}:
            return "one of " + ", ".join(str(choice) for choice in choices)
        case {"const": only}:
            return str(only)
        case {"prefixItems": items}:
            kind = "integers >= 1" if items[0].get("type") == "integer" else "numbers"
            return f"a list of {len(items)} {kind}, the first below the second"
        case {"items": item}:
            return f"a list of at least one item, each {_in_words(item)}"
        case {"pattern": _}:
            return "a name without slashes"
        case {"type": "string"}:
            return "text"
        case {"type": kind}:
            bounds = [f"{sign} {schema[k]:g}" for k, sign in _BOUNDS.items() if k in schema]
            return f"{_KINDS.get(kind, kind)} {' and '.join(bounds)}".rstrip()
    raise TypeError(f"no words for {schema}")


def cut(text: str) -> str:
    """Cut a text for a message: on one line, and not too long."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def shown(value: object) -> str:
    """Show a value in a message."""
    if value is None:
        return "null"
    return cut(repr(list(value) if isinstance(value, tuple) else value))
