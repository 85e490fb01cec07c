"""Catalogues of one map by hyperjax, hyper_py, PyBDSF, Aegean, SEP and photutils, scored alike.

Every tool has the same threshold, estimates background and noise itself, and has its defaults or
what its documentation recommends elsewhere (`comparison_tools.py`). The tools get the map in
Jy/beam with the beam in its header; hyperjax and hyper_py read it as it is. Each run is a process
of its own; its processor time is user plus system time with all subprocesses. All run with
linear algebra on one thread, as in `whole_map.py`. hyperjax runs twice: what counts is the
second, with the compilation cache of the first.

The truth is a table of `hyperjax simulate`, or that of hyper_py's published benchmark
(table_500_Gaussians_1.txt). North must be up, and no pixel blank.

    python benchmarks/comparison.py --tools TOOLS/bin/python --hyper-py HYPER_PY/bin/python
    python benchmarks/comparison.py MAP.fits --truth TRUTH --tools ... --hyper-py ...
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import yaml
from astropy import units as u
from astropy.io import fits
from astropy.table import QTable, Table
from comparison_tools import EXTRACT
from scipy.spatial import cKDTree
from whole_map import (
    BLAS_VARIABLES,
    Bench,
    installed,
    measured,
    processor,
    program,
    run_hyper_py,
    run_hyperjax,
    scratch_folder,
)

from hyperjax import Map, read_map, score
from hyperjax.evaluate import Score

SIMULATED = (
    *("--shape", "500", "500", "--sources", "300", "--noise", "beam", "--snr-range", "6", "100"),
    *("--blend-fraction", "0.4", "--min-separation-beams", "1.2", "--seed", "1"),
)
"""The map if none is given: noise as smooth as the beam, and many blends."""

PACKAGES = ("bdsf", "AegeanTools", "sep", "photutils", "numpy", "scipy", "astropy")
RUNNER = Path(__file__).with_name("comparison_tools.py")
HEADINGS = (
    *("", "found", "false", "blended found, %", "position, px", "flux bias, %", "flux scatter, %"),
    *("> 30 % off, %", "FWHM scatter, %", "pull width", "CPU, s", "wall, s"),
)


def main() -> None:
    options = parse_options()
    with scratch_folder(options.keep, "comparison_") as scratch:
        print("\n".join(report(options, scratch)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("map", nargs="?", type=Path, help="FITS map; one is simulated if not given")
    parser.add_argument("--truth", type=Path, metavar="TABLE", help="of the sources in the map")
    parser.add_argument(
        "--tools", metavar="PYTHON", type=program, help="Python that has the other tools"
    )
    parser.add_argument("--hyper-py", metavar="PYTHON", type=program, help="Python with hyper_py")
    parser.add_argument("--hyperjax", metavar="PYTHON", type=program, default=sys.executable)
    parser.add_argument("--only", nargs="+", choices=EXTRACT, default=list(EXTRACT), metavar="TOOL")
    parser.add_argument("--sigma", type=float, default=4.0, help="threshold in rms; default: 4")
    parser.add_argument(
        "--match-radius", type=float, metavar="ARCSEC", help="default: half a beam FWHM"
    )
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="of one run, s")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder for all products")
    options = parser.parse_args()
    if (options.map is None) != (options.truth is None):
        parser.error("a map needs its --truth, and a truth its map")
    for path in (options.map, options.truth):
        if path is not None and not path.is_file():
            parser.error(f"{path}: no such file")
    if options.keep is not None and options.keep.exists():
        parser.error(f"{options.keep}: exists")
    return options


def report(options: argparse.Namespace, scratch: Path) -> list[str]:
    """Run everything; the table and what was run."""
    path = options.map.resolve() if options.map else simulated_map(options, scratch)
    field = read_map(path)
    truth = read_truth(options.truth or path.with_name("simulated_truth.ecsv"), field)
    radius = options.match_radius or 0.5 * field.beam.fwhm_arcsec
    bench = Bench(
        map=path,
        sigma=options.sigma,
        timeout_s=options.timeout,
        scratch=scratch,
        hyperjax=options.hyperjax,
        hyper_py=options.hyper_py,
        blas_threads=1,
    )
    catalogues = scratch / "catalogues"
    catalogues.mkdir()
    first = run_hyperjax(bench, "hyperjax_first")
    runs = {"hyperjax": hyperjax(bench, catalogues)}
    if options.hyper_py:
        runs["hyper_py"] = hyper_py(bench, options.hyper_py, catalogues)
    if options.tools:
        plain = write_plain(field, scratch / "plain.fits")
        for tool in options.only:
            runs[tool] = run_tool(bench, options.tools, tool, plain, catalogues)
    rows = [
        row(tool, score(Table.read(catalogues / f"{tool}.ecsv"), truth, radius), field, *cost)
        for tool, cost in runs.items()
    ]
    return [
        *markdown(rows),
        "",
        f"- {date.today()}, {path.name}: {len(truth)} sources, threshold {options.sigma:g} rms, "
        f"matched within {radius:.3g} arcsec; {processor()}, load {os.getloadavg()[1]:.1f}",
        f"- hyperjax: {installed(options.hyperjax, ('hyperjax', 'jax'))}; with an empty "
        f"compilation cache {first.cpu_s:.1f} CPU-s, {first.wall_s:.1f} s",
        *([f"- hyper_py: {versions_of_hyper_py(options.hyper_py)}"] if options.hyper_py else []),
        *([f"- others: {installed(options.tools, PACKAGES)}"] if options.tools else []),
    ]


# --- Map and truth -------------------------------------------------------------------------------


def simulated_map(options: argparse.Namespace, scratch: Path) -> Path:
    path = scratch / "simulated.fits"
    command = [options.hyperjax, "-m", "hyperjax", "simulate", str(path), *SIMULATED]
    measured(command, scratch / "simulate", options.timeout)
    return path


def write_plain(field: Map, path: Path) -> Path:
    """Write the map in Jy/beam with nothing but sky, unit and beam in its header."""
    if not np.isfinite(field.data).all():
        sys.exit(f"{field.name}: has blank pixels, which not all tools take")
    header = field.wcs.to_header()
    header["BUNIT"] = "Jy/beam"
    header["BMAJ"] = field.beam.major_arcsec / 3600
    header["BMIN"] = field.beam.minor_arcsec / 3600
    header["BPA"] = field.beam.pa_deg
    fits.writeto(path, field.data, header)
    return path


def read_truth(path: Path, field: Map) -> Table:
    return QTable.read(path) if path.suffix == ".ecsv" else published_truth(path, field)


def published_truth(path: Path, field: Map) -> Table:
    """Read the table of hyper_py's benchmark; what is in its maps is not quite what it says.

    They contain exp(-(dx^2 + dy^2 - sin(2 PA) dx dy) / 2 s^2), an ellipse at 45 deg with the axes
    s / sqrt(1 -+ |sin(2 PA)| / 2), where the table's flux is that of a circle of s.
    """
    table = Table.read(path, format="ascii.ipac")
    x, y, fwhm, pa, flux = (
        np.asarray(table[name], float) for name in ("X", "Y", "FWHM", "PA", "Flux_Integrated")
    )
    shear = 0.5 * np.abs(np.sin(2 * np.deg2rad(pa)))
    ra, dec = field.wcs.all_pix2world(x, y, 0)
    distance, _ = cKDTree(np.c_[x, y]).query(np.c_[x, y], k=2)
    fwhm = fwhm * field.pixel_scale_arcsec
    return QTable(
        {
            "RA": ra * u.deg,
            "DEC": dec * u.deg,
            "FLUX_TOTAL": flux / np.sqrt(1 - shear**2) * u.Jy,
            "FWHM_1": fwhm / np.sqrt(1 - shear) * u.arcsec,
            "FWHM_2": fwhm / np.sqrt(1 + shear) * u.arcsec,
            "NEIGHBOUR": distance[:, 1] / field.beam_fwhm_pix,
        }
    )


# --- The programs: each leaves its catalogue and returns CPU and wall seconds ---------------------


def hyperjax(bench: Bench, catalogues: Path) -> tuple[float, float]:
    run = run_hyperjax(bench, "hyperjax")
    shutil.copy(bench.scratch / "hyperjax/out/params/params_ALL.ecsv", catalogues / "hyperjax.ecsv")
    return run.cpu_s, run.wall_s


def hyper_py(bench: Bench, python: str, catalogues: Path) -> tuple[float, float]:
    """Run hyper_py; its FLUX is divided by the part of a Gaussian that its aperture holds.

    Positions are those of its region file: its tables round them to 5 decimals of a degree.
    """
    run = run_hyper_py(bench, python, "hyper_py")
    folder = bench.scratch / "hyper_py"
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    held = 1 - 2 ** (-4 * config["photometry"]["fwhm_radius_ratio"] ** 2)
    table = Table.read(folder / "out/params/params_ALL.csv", format="ascii.csv", comment="#")
    region = next((folder / "out/regions").glob("*_centroids.reg"))
    points = re.findall(r"^point\((.+),(.+)\)", region.read_text(encoding="utf-8"), re.MULTILINE)
    ra, dec = np.array(points, float).T
    total = QTable(
        {
            "RA": ra * u.deg,
            "DEC": dec * u.deg,
            "FLUX_TOTAL": table["FLUX"] / held * u.mJy,
            "FLUX_TOTAL_ERR": table["FLUX_ERR"] / held * u.mJy,
            "FWHM_1": table["FWHM_1"] * u.arcsec,
            "FWHM_2": table["FWHM_2"] * u.arcsec,
        }
    )
    total.write(catalogues / "hyper_py.ecsv")
    return run.cpu_s, run.wall_s


def versions_of_hyper_py(python: str) -> str:
    return installed(python, ("hyper-py-photometry", "photutils", "numpy", "scipy", "astropy"))


def run_tool(
    bench: Bench, python: str, tool: str, plain: Path, catalogues: Path
) -> tuple[float, float]:
    folder = bench.scratch / tool
    folder.mkdir()
    own = shutil.copy(plain, folder / "map.fits")  # what a tool writes, it writes beside its map
    command = [python, str(RUNNER), tool, str(own), str(catalogues / f"{tool}.ecsv")]
    command += ["--sigma", str(bench.sigma)]
    wall, cpu, _ = measured(command, folder, bench.timeout_s, dict.fromkeys(BLAS_VARIABLES, "1"))
    return cpu, wall


# --- The table -----------------------------------------------------------------------------------


def row(tool: str, result: Score, field: Map, cpu: float, wall: float) -> list[str]:
    position = result.position_offset_arcsec / field.pixel_scale_arcsec
    return [
        tool,
        f"{result.matched} of {result.n_truth}",
        str(result.false),
        number(100 * result.completeness_blended, ".0f"),
        number(position, ".2f"),
        number(100 * result.flux_bias, "+.1f"),
        number(100 * result.flux_mad, ".1f"),
        number(100 * result.flux_outliers, ".1f"),
        number(100 * result.fwhm_mad, ".1f"),
        number(result.flux_pull_mad, ".1f"),
        f"{cpu:.1f}",
        f"{wall:.1f}",
    ]


def number(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "-"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(HEADINGS) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (HEADINGS, rule, *rows)]


if __name__ == "__main__":
    main()
