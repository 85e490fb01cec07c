"""The same simulated map and configuration for hyperjax and hyper_py: do they agree, and where not?

Both read one configuration file, that which hyper_py ships, changed in its paths and its detection
threshold, and then, step by step, in the options that may make a difference (`LADDER`): what a step
takes away is what that option explains. For every step it prints

* how many sources each finds, how many of them both find, and how many are not in the truth;
* for FLUX (the aperture sum), FWHM_1, FWHM_2 and PA of the sources in common the median difference,
  hyper_py minus hyperjax, and the share of sources in which it exceeds one and three errors (those
  of hyperjax, for FLUX with what the fit of the aperture adds);
* how far each of them is from the truth: the median and the scatter (from the median absolute
  deviation) of the relative error.

    python benchmarks/parity.py --hyper-py ENVIRONMENT/bin/python --sources 110 --side 410
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from astropy.coordinates import SkyCoord
from astropy.table import QTable, Table
from numpy.typing import NDArray
from whole_map import (
    BLAS_VARIABLES,
    HYPER_PY_FOLDER_CODE,
    PACKAGES,
    answer,
    installed,
    measured,
    program,
)

LADDER: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]] = (
    ("as hyper_py ships it", {}),
    ("the noise given", {"detection": {"use_manual_rms": True}}),
    ("all pixels weigh the same", {"fit_options": {"weights": "inverse_rms"}}),
    (
        "background fitted with the sources",
        {
            "background": {
                "fit_gauss_and_bg_separately": False,
                "fit_gauss_and_bg_together": True,
                "polynomial_orders": [1],
            },
            "fit_options": {"use_l2_regularization": False},
        },
    ),
    ("sizes from 0.5 to 4 beams", {"photometry": {"aper_inf": 0.5, "aper_sup": 4.0}}),
    ("every pixel of the window fitted", {"fit_options": {"fit_aperture_sigma": None}}),
    ("positions fitted", {"fit_options": {"vary": True}}),
)
"""Steps: each has the options of all before it, too."""

QUANTITIES = ("FLUX", "FWHM_1", "FWHM_2", "PA")
BEAM_PIX = 4.0  # FWHM of the simulated beam
WIDTH = 1.4826  # of a Gaussian over its median absolute deviation


def main() -> None:
    options = parse_options()
    scratch = options.keep or Path(tempfile.mkdtemp(prefix="parity_"))
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        print("\n".join(report(options, scratch.resolve())))
    finally:
        if not options.keep:
            shutil.rmtree(scratch)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hyper-py", metavar="PYTHON", type=program, required=True)
    parser.add_argument("--hyperjax", metavar="PYTHON", type=program, default=sys.executable)
    parser.add_argument("--sources", type=int, default=150)
    parser.add_argument("--side", type=int, default=480, help="of the map, pixels; default: 480")
    parser.add_argument("--blend-fraction", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--sigma", type=float, default=5.0, help="threshold in rms; default: 5")
    parser.add_argument("--steps", type=int, default=len(LADDER), help="of the ladder")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="of one run, s")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder for all products")
    options = parser.parse_args()
    if options.keep is not None and options.keep.exists():
        parser.error(f"{options.keep}: exists")
    return options


def report(options: argparse.Namespace, scratch: Path) -> list[str]:
    path = simulated_map(options, scratch)
    truth = QTable.read(path.with_name("map_truth.ecsv"))
    package = Path(answer(options.hyper_py, HYPER_PY_FOLDER_CODE))
    config = yaml.safe_load((package / "assets/default_config.yaml").read_text(encoding="utf-8"))
    config["paths"]["input"]["dir_maps"] = str(path.parent)
    config["files"]["file_map_name"] = path.name
    config["control"]["parallel_maps"] = False
    config["detection"]["sigma_thres"] = options.sigma
    config["fit_options"]["fit_aperture_sigma"] = 1.0  # hyper_py's own default, which it leaves out
    lines = [
        f"{date.today()}; {options.sources} sources on {options.side} x {options.side} pixels, "
        f"{options.blend_fraction:.0%} of them close to another, seed {options.seed}, threshold "
        f"{options.sigma:g}",
        f"hyperjax: {installed(options.hyperjax, ('hyperjax', 'jax', *PACKAGES))}",
        f"hyper_py: {installed(options.hyper_py, ('hyper-py-photometry', 'lmfit', *PACKAGES))}",
    ]
    for number, (step, changes) in enumerate(LADDER[: options.steps]):
        for section, values in changes.items():
            config[section].update(values)
        tables = []
        for name, noise in noises(truth).items():
            config["detection"]["rms_value"] = noise
            tables.append(run(options, name, config, scratch / f"{number}_{name}"))
        lines += ["", f"## {number}. {step}", "", *compared(*tables, truth)]
    return lines


def noises(truth: QTable) -> dict[str, float]:
    """The true noise in the unit of each: mJy/pixel (with convert_mJy), and Jy/beam."""
    jy_beam = float(np.median(truth["FLUX_PEAK"].to_value("Jy/beam") / truth["SNR"]))
    beam_pix = np.pi / (4 * np.log(2)) * BEAM_PIX**2
    return {"hyper_py": float(1e3 * jy_beam / beam_pix), "hyperjax": jy_beam}


def simulated_map(options: argparse.Namespace, scratch: Path) -> Path:
    path = scratch / "map.fits"
    command = [options.hyperjax, "-m", "hyperjax", "simulate", str(path)]
    command += ["--shape", str(options.side), str(options.side), "--seed", str(options.seed)]
    command += ["--sources", str(options.sources), "--beam-fwhm-pix", str(BEAM_PIX)]
    command += ["--blend-fraction", str(options.blend_fraction)]
    measured(command, scratch / "simulate", options.timeout)
    return path


def run(options: argparse.Namespace, name: str, config: dict[str, Any], folder: Path) -> Table:
    """Run one of the two and read its merged catalogue; positions, arcsec, mJy."""
    config["paths"]["output"]["dir_root"] = str(folder / "out")
    folder.mkdir()
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    if name == "hyper_py":
        command = [options.hyper_py, "-m", "hyper_py", str(file)]
        measured(command, folder, options.timeout, dict.fromkeys(BLAS_VARIABLES, "1"))
        return Table.read(folder / "out/params/params_ALL.csv", format="ascii.csv")
    command = [options.hyperjax, "-m", "hyperjax", "run", str(file)]
    measured(command, folder, options.timeout, {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    return QTable.read(folder / "out/params/params_ALL.ecsv")


def values(table: Table, name: str) -> NDArray[np.float64]:
    return np.asarray(getattr(table[name], "value", table[name]), float)


def matched(one: Table, other: Table, radius: float = 2.0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows of both that are each other's nearest, within a radius in arcsec."""
    sky = [SkyCoord(values(t, "RA"), values(t, "DEC"), unit="deg") for t in (one, other)]
    there, distance, _ = sky[0].match_to_catalog_sky(sky[1])
    back = sky[1].match_to_catalog_sky(sky[0])[0]
    rows = np.flatnonzero((back[there] == np.arange(len(one))) & (distance.arcsec < radius))
    return rows, there[rows]


def difference(name: str, one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[Any]:
    """One minus other; angles modulo 180."""
    return (one - other + 90) % 180 - 90 if name == "PA" else one - other


def compared(theirs: Table, ours: Table, truth: QTable) -> list[str]:
    a, b = matched(theirs, ours)
    common = len(a)
    found = [matched(table, truth) for table in (theirs, ours)]
    lines = [
        f"sources: hyper_py {len(theirs)}, hyperjax {len(ours)}, of {len(truth)}; in common "
        f"{common}: {common / len(theirs):.1%} of hyper_py's, {common / len(ours):.1%} of "
        f"hyperjax's; not in the truth: hyper_py {len(theirs) - len(found[0][0])}, hyperjax "
        f"{len(ours) - len(found[1][0])}; S/N of those missed: {missed(truth, found[0][1])}, "
        f"{missed(truth, found[1][1])}",
        "",
        "| | difference | > 1 error | > 3 errors | hyper_py off truth | hyperjax off truth |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    both = np.isin(b, found[1][0])
    a, b = a[both], b[both]
    row_of = dict(zip(*found[1], strict=True))
    t = np.array([row_of[row] for row in b])
    for name in QUANTITIES:
        x, y = values(theirs, name)[a], values(ours, name)[b]
        delta, error = difference(name, x, y), errors(name, ours)[b]
        unit = np.ones_like(y) if name == "PA" else y
        true = expected(name, truth)[t]
        scale = np.ones_like(true) if name == "PA" else true
        off = [difference(name, v, true) / scale for v in (x, y)]
        form = (lambda v: f"{v:.1f} deg") if name == "PA" else (lambda v: f"{100 * v:.1f} %")
        spreads = [WIDTH * np.median(np.abs(v - np.median(v))) for v in off]
        cells = [
            name,
            form(np.median(delta / unit)),
            f"{np.mean(np.abs(delta) > error):.0%}",
            f"{np.mean(np.abs(delta) > 3 * error):.0%}",
            *(f"{form(np.median(v))} +- {form(s)}" for v, s in zip(off, spreads, strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def missed(truth: QTable, found: NDArray[Any]) -> str:
    """The range of the true S/N of what was not found."""
    rest = np.delete(np.asarray(truth["SNR"], float), found)
    return f"{rest.min():.1f} to {rest.max():.1f}" if rest.size else "none"


def errors(name: str, ours: Table) -> NDArray[np.float64]:
    """Errors of hyperjax; that of FLUX with what the fit of the aperture adds to its noise."""
    if name == "FLUX":
        share = values(ours, "FLUX") / values(ours, "FLUX_APCOR")
        return share * values(ours, "FLUX_APCOR_ERR")
    return values(ours, f"{name}_ERR")


def expected(name: str, truth: QTable) -> NDArray[np.float64]:
    """What an extraction should give; an aperture of half the FWHM holds half of a Gaussian."""
    if name == "FLUX":
        return 0.5 * truth["FLUX_TOTAL"].to_value("mJy")
    return values(truth, name)


if __name__ == "__main__":
    main()
