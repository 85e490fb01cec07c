"""One tool's catalogue of one map in the columns of hyperjax: what `comparison.py` measures.

This runs in the environment of the tools, without hyperjax. The map is a plain 2-D image in Jy/beam
with the beam in its header, and has no blank pixels. What is not set here has the tool's default.

    ENVIRONMENT/bin/python benchmarks/comparison_tools.py TOOL MAP.fits CATALOGUE.ecsv --sigma 4
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray

FWHM_PER_SIGMA = float(np.sqrt(8 * np.log(2)))
FREQUENCY_HZ = 1e11  # PyBDSF asks for one; it changes nothing in a map of one frequency
BACKGROUND_BOX = 64  # pixels: the default of SEP, given to photutils, which has none
LEAST_PIXELS = 5  # of a segment: the default of SEP, given to photutils, which has none
LEAST_RADIUS = 1.75  # pixels, of an aperture: what the guide of SEP has

Columns = Mapping[str, ArrayLike]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Image:
    """A map in Jy/beam with what is needed to make sky and fluxes of pixels and their sums."""

    data: FloatArray
    wcs: WCS
    pixel_arcsec: float
    beam_pix: tuple[float, float, float]  # FWHM of both axes, angle from +x in deg

    @property
    def beam_fwhm_pix(self) -> float:
        return float(np.sqrt(self.beam_pix[0] * self.beam_pix[1]))

    @property
    def beam_area_pix(self) -> float:
        return float(np.pi / (4 * np.log(2)) * self.beam_pix[0] * self.beam_pix[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tool", choices=EXTRACT)
    parser.add_argument("map", type=Path)
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("--sigma", type=float, default=4.0, help="threshold in rms; default: 4")
    options = parser.parse_args()
    columns = EXTRACT[options.tool](options.map, options.sigma)
    table = Table({name: np.asarray(values, float) for name, values in columns.items()})
    for name in table.colnames:
        table[name].unit = UNITS[name]
    table.write(options.catalogue, format="ascii.ecsv")


UNITS = {
    "RA": u.deg,
    "DEC": u.deg,
    "FLUX_TOTAL": u.Jy,
    "FLUX_TOTAL_ERR": u.Jy,
    "FWHM_1": u.arcsec,
    "FWHM_2": u.arcsec,
}


def read(path: Path) -> Image:
    """Read the map; its pixels are square and North is up, as in the maps of `comparison.py`."""
    with fits.open(path) as hdus:
        header, data = hdus[0].header, np.ascontiguousarray(hdus[0].data, dtype=np.float64)
    wcs = WCS(header)
    pixel_deg = float(np.sqrt(wcs.proj_plane_pixel_area().to_value("deg2")))
    axes = (header["BMAJ"] / pixel_deg, header["BMIN"] / pixel_deg)
    return Image(data, wcs, 3600 * pixel_deg, (*axes, 90.0 + header["BPA"]))


def measured(
    image: Image,
    position: tuple[ArrayLike, ArrayLike],
    flux_sum: tuple[ArrayLike, ArrayLike],
    fwhm_pix: tuple[ArrayLike, ArrayLike],
) -> Columns:
    """Columns from pixel positions, summed brightness with its error, and sizes in pixels."""
    ra, dec = image.wcs.all_pix2world(*position, 0)
    flux, error = (np.asarray(value, float) / image.beam_area_pix for value in flux_sum)
    first, second = (np.asarray(value, float) * image.pixel_arcsec for value in fwhm_pix)
    return {
        "RA": ra,
        "DEC": dec,
        "FLUX_TOTAL": flux,
        "FLUX_TOTAL_ERR": error,
        "FWHM_1": np.maximum(first, second),
        "FWHM_2": np.minimum(first, second),
    }


# --- The tools -----------------------------------------------------------------------------------


def pybdsf(path: Path, sigma: float) -> Columns:
    """Fit Gaussians to islands; the list of Gaussians, which keeps the members of blends apart.

    The mean is a map, too, since the background is not the same everywhere.
    """
    import bdsf

    image = bdsf.process_image(
        str(path), thresh_pix=sigma, mean_map="map", frequency=FREQUENCY_HZ, quiet=True
    )
    listed = path.with_name("gaussians.fits")
    image.write_catalog(outfile=str(listed), format="fits", catalog_type="gaul", clobber=True)
    table = Table.read(listed)
    return {
        "RA": table["RA"],
        "DEC": table["DEC"],
        "FLUX_TOTAL": table["Total_flux"],
        "FLUX_TOTAL_ERR": table["E_Total_flux"],
        "FWHM_1": 3600 * table["Maj"],
        "FWHM_2": 3600 * table["Min"],
    }


def aegean(path: Path, sigma: float) -> Columns:
    """BANE's background and noise, then aegean; its FITS tables hold positions in 32 bits only."""
    scripts = Path(sys.executable).parent
    subprocess.run([scripts / "BANE", path], check=True)
    listed = path.with_name("found.csv")
    command = [scripts / "aegean", path, "--autoload", "--seedclip", str(sigma)]
    subprocess.run([*command, "--table", listed], check=True)
    table = Table.read(path.with_name("found_comp.csv"), format="ascii.csv")
    error = np.asarray(table["err_int_flux"], float)
    return {
        "RA": table["ra"],
        "DEC": table["dec"],
        "FLUX_TOTAL": table["int_flux"],
        "FLUX_TOTAL_ERR": np.where(error > 0, error, np.nan),  # -1: it has none
        "FWHM_1": table["a"],
        "FWHM_2": table["b"],
    }


def sep_kron(path: Path, sigma: float) -> Columns:
    """Sums in ellipses of 2.5 Kron radii without the neighbours' pixels, or in a small circle."""
    import sep

    image, data, noise, found, segments = sep_segments(path, sigma)
    ellipse = [found[name] for name in ("x", "y", "a", "b", "theta")]
    own = {"segmap": segments, "seg_id": np.arange(1, len(found) + 1, dtype=np.int32)}
    radius, _ = sep.kron_radius(data, *ellipse, 6.0, **own)
    in_ellipse = sep.sum_ellipse(data, *ellipse, 2.5 * radius, err=noise, subpix=1, **own)
    in_circle = sep.sum_circle(data, *ellipse[:2], LEAST_RADIUS, err=noise, subpix=1, **own)
    small = radius * np.sqrt(found["a"] * found["b"]) < LEAST_RADIUS
    flux, error = (np.where(small, in_circle[i], in_ellipse[i]) for i in (0, 1))
    return sep_columns(image, found, flux, error)


def sep_isophotal(path: Path, sigma: float) -> Columns:
    """Sums of the pixels above the threshold."""
    image, _, noise, found, _ = sep_segments(path, sigma)
    error = np.median(noise) * np.sqrt(found["npix"])
    return sep_columns(image, found, found["flux"], error)


def sep_segments(path: Path, sigma: float) -> tuple[Image, FloatArray, FloatArray, Any, Any]:
    """Image, map without its background, noise, sources and segments, of the map as it is.

    It is not filtered, since its noise is as smooth as its sources.
    """
    import sep

    image = read(path)
    background = sep.Background(image.data)
    data, noise = image.data - background.back(), background.rms()
    found, segments = sep.extract(data, sigma, err=noise, filter_kernel=None, segmentation_map=True)
    return image, data, noise, found, segments


def sep_columns(image: Image, found: Any, flux: FloatArray, error: FloatArray) -> Columns:
    sizes = FWHM_PER_SIGMA * found["a"], FWHM_PER_SIGMA * found["b"]
    return measured(image, (found["x"], found["y"]), (flux, error), sizes)


def photutils_segments(path: Path, sigma: float) -> Columns:
    """Deblended segments and Kron fluxes, of the map as it is (see `sep_segments`)."""
    from photutils.segmentation import SourceCatalog, SourceFinder

    image = read(path)
    data, noise = flattened(image)
    segments = SourceFinder(n_pixels=LEAST_PIXELS, progress_bar=False)(data, sigma * noise)
    found = SourceCatalog(data, segments, error=noise, progress_bar=False)
    sizes = (
        FWHM_PER_SIGMA * found.semimajor_axis.value,
        FWHM_PER_SIGMA * found.semiminor_axis.value,
    )
    fluxes = found.kron_flux, found.kron_flux_err
    return measured(image, (found.x_centroid, found.y_centroid), fluxes, sizes)


def photutils_gaussians(path: Path, sigma: float) -> Columns:
    """Peaks of DAOFIND, grouped and fitted as PSFs.

    The PSF is a Gaussian whose widths and angle are fitted, too, starting at the beam; peaks are
    kept whatever their shape and distance, since sources may be extended and blended.
    """
    from photutils.detection import DAOStarFinder
    from photutils.psf import GaussianPRF, PSFPhotometry, SourceGrouper

    image = read(path)
    data, noise = flattened(image)
    major, minor, angle = image.beam_pix
    width = image.beam_fwhm_pix
    model = GaussianPRF(x_fwhm=major, y_fwhm=minor, theta=angle)
    for free in (model.x_fwhm, model.y_fwhm, model.theta):
        free.fixed = False
    model.x_fwhm.bounds = model.y_fwhm.bounds = (0.5 * minor, 3 * major)
    finder = DAOStarFinder(
        threshold=sigma * float(np.median(noise)),
        fwhm=width,
        min_separation=0,
        sharpness_range=None,
        roundness_range=None,
    )
    side = 2 * int(np.ceil(width)) + 1
    grouper = SourceGrouper(min_separation=2 * width)
    fit = PSFPhotometry(model, (side, side), finder=finder, grouper=grouper, aperture_radius=width)
    table = fit(data, error=noise)
    position, flux = (table["x_fit"], table["y_fit"]), (table["flux_fit"], table["flux_err"])
    return measured(image, position, flux, (table["x_fwhm_fit"], table["y_fwhm_fit"]))


def flattened(image: Image) -> tuple[FloatArray, FloatArray]:
    """Map without its background, and its noise, by photutils."""
    from photutils.background import Background2D, MedianBackground

    estimate = Background2D(
        image.data, BACKGROUND_BOX, filter_size=(3, 3), bkg_estimator=MedianBackground()
    )
    return image.data - estimate.background, estimate.background_rms


EXTRACT: dict[str, Callable[[Path, float], Columns]] = {
    "pybdsf": pybdsf,
    "aegean": aegean,
    "sep-kron": sep_kron,
    "sep-isophotal": sep_isophotal,
    "photutils-segments": photutils_segments,
    "photutils-gaussians": photutils_gaussians,
}


if __name__ == "__main__":
    main()
