"""The same simulated maps and configuration for hyperjax and hyper_py: what makes them differ?

Both read one configuration file, that which hyper_py ships, changed in its paths, its detection
threshold and what the `CASES` name. hyperjax runs once. hyper_py runs as it is, and then with one
of its behaviours after the other changed (`amended.py`), each on top of those before: what a step
takes away is what that behaviour explains. For every case it prints

* the ladder: after each step, how many sources hyper_py finds, how many of them both find, how many
  are not in the truth, and the share of sources whose FLUX (the aperture sum), FWHM_1, FWHM_2 or PA
  differ by more than one and three errors (those of hyperjax, for FLUX with what the fit of the
  aperture adds);
* the causes: the cause of a source's difference is the first step from which on no quantity of it
  differs by more than three errors, or one; how many sources each cause has, and how far its step
  moved them; and those that are left;
* how far both are from the truth, before the first step and after the last.

    python benchmarks/parity.py --hyper-py ENVIRONMENT/bin/python --table sources.csv
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from astropy.coordinates import SkyCoord
from astropy.table import QTable, Table, vstack
from numpy.typing import NDArray
from whole_map import (
    BLAS_VARIABLES,
    HYPER_PY_FOLDER_CODE,
    PACKAGES,
    answer,
    installed,
    measured,
    program,
    scratch_folder,
)


class Step(NamedTuple):
    """A behaviour of hyper_py, and the amendments that change it (`amended.py`)."""

    name: str
    changes: tuple[str, ...]
    is_choice: bool = False  # of hyperjax, which does otherwise, rather than a defect


class Case(NamedTuple):
    """What both are configured to do on which map, and what hyper_py is changed in."""

    title: str
    config: Mapping[str, Mapping[str, Any]]
    steps: Sequence[Step]
    map: tuple[str, ...] = ()  # options of the simulation
    at_truth: bool = False  # whether both are given the true positions


NOISE = Step("one noise, of the unfiltered map", ("noise",))
THRESHOLD = Step("threshold on the unfiltered map", ("threshold",))
WEIGHTS = Step("weights that follow noisy pixels", ("weights",))
POSITIONS = Step("centroids of the unfiltered map", ("positions",))
MASK = Step("background: sources masked too narrowly", ("mask",))
FILLING = Step("background: masked pixels filled and fitted", ("filling",))
SELECTION = Step("background: boxes compared on other pixels", ("selection",))
PEAKS = Step("lower bounds of peaks", ("peaks",))
ANGLES = Step("angles stop at 90 deg from the x axis", ("angles",))
SIZES = Step("sizes beyond aper_sup", ("sizes",))
CIRCLE = Step("smaller circles fitted in blends", ("circle",))
NUMBER = Step("own source masked as another's", ("number",))
NEIGHBOURS = Step("neighbours outside the group stay", ("neighbours",))
GROUPS = Step("groups of 2 beams, not 2.5", ("groups",), is_choice=True)
FILTER = Step("filter of 3.75 beams, not 4.25", ("filter",), is_choice=True)
BACKGROUND = Step("background: mask, filling, boxes", ("mask", "filling", "selection"))
SAME = Step("the background that hyperjax fitted", ("background",), is_choice=True)
IN_BLENDS = Step("sizes and circles in blends", ("sizes", "circle"))
CHOICES = Step("groups and filter", ("groups", "filter"), is_choice=True)

CASES: Mapping[str, Case] = {
    "shipped": Case(
        "as hyper_py ships it",
        {},
        (
            *(NOISE, THRESHOLD, WEIGHTS, POSITIONS, MASK, FILLING, SELECTION),
            *(PEAKS, ANGLES, SIZES, CIRCLE, GROUPS, FILTER, NEIGHBOURS, SAME),
        ),
    ),
    "vary": Case(
        "positions fitted",
        {"fit_options": {"vary": True}},
        (
            *(Step("one noise, threshold", ("noise", "threshold")), PEAKS, WEIGHTS, POSITIONS),
            *(BACKGROUND, ANGLES, IN_BLENDS, CHOICES, NEIGHBOURS, SAME),
        ),
    ),
    "together": Case(
        "background fitted with the sources",
        {
            "background": {
                "fit_gauss_and_bg_separately": False,
                "fit_gauss_and_bg_together": True,
                "polynomial_orders": [1],
                "fix_max_box": 3,
            },
            "fit_options": {"use_l2_regularization": False, "weights": "inverse_rms"},
        },
        (
            *(Step("one noise, threshold", ("noise", "threshold")), NUMBER, POSITIONS, PEAKS),
            *(ANGLES, IN_BLENDS, CHOICES, NEIGHBOURS),
        ),
    ),
    "flat": Case(
        "no background, in the map and in the fit",
        {"background": {"fit_gauss_and_bg_separately": False, "fix_max_box": 3}},
        (
            *(Step("one noise, threshold", ("noise", "threshold")), NUMBER, WEIGHTS, POSITIONS),
            *(PEAKS, ANGLES, IN_BLENDS, CHOICES, NEIGHBOURS),
        ),
        ("--gradient", "0", "--structure", "0"),
    ),
    "given": Case(
        "positions given",
        {},
        (WEIGHTS, BACKGROUND, PEAKS, ANGLES, IN_BLENDS, CHOICES, NEIGHBOURS, SAME),
        at_truth=True,
    ),
    "even": Case(
        "pixels weighed alike",
        {"fit_options": {"weights": "null"}},
        (
            *(Step("one noise, threshold", ("noise", "threshold")), POSITIONS, BACKGROUND),
            *(PEAKS, ANGLES, IN_BLENDS, CHOICES, NEIGHBOURS, SAME),
        ),
    ),
}

AMENDED = Path(__file__).with_name("amended.py")
QUANTITIES = ("FLUX", "FWHM_1", "FWHM_2", "PA")
LIMITS = (3, 1)  # errors
BEAM_PIX = 4.0  # FWHM of the simulated beam
WIDTH = 1.4826  # of a Gaussian over its median absolute deviation


def main() -> None:
    options = parse_options()
    with scratch_folder(options.keep, "parity_") as scratch:
        report(options, scratch)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hyper-py", metavar="PYTHON", type=program, required=True)
    parser.add_argument("--hyperjax", metavar="PYTHON", type=program, default=sys.executable)
    parser.add_argument("--sources", type=int, default=110, help="of a map; default: 110")
    parser.add_argument("--side", type=int, default=410, help="of a map, pixels; default: 410")
    parser.add_argument("--blend-fraction", type=float, default=0.15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3], help="one map each")
    parser.add_argument("--sigma", type=float, default=5.0, help="threshold in rms; default: 5")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="of one run, s")
    parser.add_argument("--table", type=Path, metavar="FILE", help="CSV: every source, its causes")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder for all products")
    options = parser.parse_args()
    if options.keep is not None and options.keep.exists():
        parser.error(f"{options.keep}: exists")
    return options


def report(options: argparse.Namespace, scratch: Path) -> None:
    print(
        f"- {date.today()}; maps of {options.sources} sources on {options.side} x {options.side} "
        f"pixels, {options.blend_fraction:.0%} of them close to another, seeds "
        f"{', '.join(map(str, options.seeds))}, threshold {options.sigma:g}\n"
        f"- hyperjax: {installed(options.hyperjax, ('hyperjax', 'jax', *PACKAGES))}\n"
        f"- hyper_py: {installed(options.hyper_py, ('hyper-py-photometry', 'lmfit', *PACKAGES))}"
    )
    tables = []
    for name in options.cases:
        case = CASES[name]
        seeds = [
            compared(options, case, seed, scratch / f"{name}_{seed}") for seed in options.seeds
        ]
        pooled = Comparison.pooled(seeds)
        print("\n".join(["", f"## {case.title}", "", *told(case, pooled)]), flush=True)
        tables.append(per_source(name, case, pooled))
    if options.table:
        vstack(tables).write(options.table, format="ascii.csv", overwrite=True)


# --- The runs ------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """What came out, for the true sources (n,) of some maps and after each step (step,).

    `ours` is hyperjax's, `theirs` hyper_py's; values (quantity, n) and (step, quantity, n) are NaN
    where the source was not found. `found` are the sources (step,) of hyper_py, `false` those that
    are not in the truth.
    """

    seed: NDArray[np.int_]
    truth: QTable
    ours: NDArray[np.float64]
    errors: NDArray[np.float64]
    theirs: NDArray[np.float64]
    found: NDArray[np.int_]
    false: NDArray[np.int_]
    our_found: int
    our_false: int

    @classmethod
    def pooled(cls, some: Sequence["Comparison"]) -> "Comparison":
        """Those of some maps as one."""
        return cls(
            np.concatenate([one.seed for one in some]),
            vstack([one.truth for one in some], metadata_conflicts="silent"),
            *(
                np.concatenate([getattr(one, name) for one in some], axis=-1)
                for name in ("ours", "errors", "theirs")
            ),
            sum(one.found for one in some),
            sum(one.false for one in some),
            sum(one.our_found for one in some),
            sum(one.our_false for one in some),
        )

    @property
    def off(self) -> NDArray[np.float64]:
        """Differences over errors (step, quantity, n): hyper_py minus hyperjax."""
        return differences(self.theirs, self.ours) / self.errors

    def beyond(self, limit: float) -> NDArray[np.bool_]:
        """Sources (step, n) that hyperjax found and hyper_py did not, or with other values."""
        off = self.off
        return np.isfinite(self.ours[0]) & ~(np.abs(off) <= limit).all(axis=1)


def compared(options: argparse.Namespace, case: Case, seed: int, folder: Path) -> Comparison:
    """Run hyperjax, and hyper_py after each step, on one map."""
    folder.mkdir()
    path = simulated_map(options, case, seed, folder)
    truth = QTable.read(path.with_name("map_truth.ecsv"))
    config = configuration(options, case, path, truth)
    ours = run_hyperjax(options, config, folder / "hyperjax")
    tables = [run_hyper_py(options, config, folder / "0", (), None)]
    changes: tuple[str, ...] = ()
    for number, step in enumerate(case.steps, 1):
        changes, known = changes + step.changes, folder / f"{number - 1}/out/params/params_ALL.csv"
        tables.append(run_hyper_py(options, config, folder / str(number), changes, known))
    values, false = zip(*(at_truth(table, truth) for table in tables), strict=True)
    our_values, our_false = at_truth(ours, truth)
    return Comparison(
        seed=np.full(len(truth), seed),
        truth=truth,
        ours=our_values,
        errors=at_truth(ours, truth, errors)[0],
        theirs=np.array(values),
        found=np.array([len(table) for table in tables]),
        false=np.array(false),
        our_found=len(ours),
        our_false=our_false,
    )


def simulated_map(options: argparse.Namespace, case: Case, seed: int, folder: Path) -> Path:
    path = folder / "map.fits"
    command = [options.hyperjax, "-m", "hyperjax", "simulate", str(path), *case.map]
    command += ["--shape", str(options.side), str(options.side), "--seed", str(seed)]
    command += ["--sources", str(options.sources), "--beam-fwhm-pix", str(BEAM_PIX)]
    command += ["--blend-fraction", str(options.blend_fraction)]
    measured(command, folder / "simulate", options.timeout)
    return path


def configuration(
    options: argparse.Namespace, case: Case, path: Path, truth: QTable
) -> dict[str, Any]:
    """The file that hyper_py ships, for a map and a case."""
    package = Path(answer(options.hyper_py, HYPER_PY_FOLDER_CODE))
    config = yaml.safe_load((package / "assets/default_config.yaml").read_text(encoding="utf-8"))
    config["paths"]["input"]["dir_maps"] = str(path.parent)
    config["files"]["file_map_name"] = path.name
    config["control"]["parallel_maps"] = False
    config["detection"]["sigma_thres"] = options.sigma
    config["fit_options"]["fit_aperture_sigma"] = 1.0  # hyper_py's own default, which it leaves out
    if case.at_truth:
        config["detection"]["fixed_peaks"] = True
        config["detection"]["xcen_fix"] = values(truth, "RA").tolist()
        config["detection"]["ycen_fix"] = values(truth, "DEC").tolist()
    for section, changed in case.config.items():
        config[section].update(changed)
    return dict(config)


def written(config: dict[str, Any], folder: Path) -> Path:
    """The configuration file of a run, in a folder of its own."""
    folder.mkdir()
    config["paths"]["output"]["dir_root"] = str(folder / "out")
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def run_hyperjax(options: argparse.Namespace, config: dict[str, Any], folder: Path) -> Table:
    command = [options.hyperjax, "-m", "hyperjax", "run", str(written(config, folder))]
    measured(command, folder, options.timeout, {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    return QTable.read(folder / "out/params/params_ALL.ecsv")


def run_hyper_py(
    options: argparse.Namespace,
    config: dict[str, Any],
    folder: Path,
    changes: Sequence[str],
    known: Path | None,
) -> Table:
    """The merged catalogue of hyper_py; where nothing is changed, of hyper_py as it is."""
    file = str(written(config, folder))
    command = [options.hyper_py, "-m", "hyper_py", file]
    if changes:
        command = [options.hyper_py, str(AMENDED), file, "--beam-pix", str(BEAM_PIX)]
        background = folder.with_name("hyperjax") / "out/fits/map_background.fits"
        command += ["--known", str(known), "--background", str(background), "--change", *changes]
    alone = {**dict.fromkeys(BLAS_VARIABLES, "1"), "PYTHONPATH": ""}
    measured(command, folder, options.timeout, alone)
    return Table.read(folder / "out/params/params_ALL.csv", format="ascii.csv")


# --- Sources -------------------------------------------------------------------------------------


def values(table: Table, name: str) -> NDArray[np.float64]:
    return np.asarray(getattr(table[name], "value", table[name]), float)


def errors(table: Table, name: str) -> NDArray[np.float64]:
    """Errors of hyperjax; that of FLUX with what the fit of the aperture adds to its noise.

    What has none, such as the PA of a round source, counts as unknown.
    """
    if name == "FLUX":
        share = values(table, "FLUX") / values(table, "FLUX_APCOR")
        return share * values(table, "FLUX_APCOR_ERR")
    return np.nan_to_num(values(table, f"{name}_ERR"), nan=np.inf)


def at_truth(table: Table, truth: QTable, column: Any = values) -> tuple[NDArray[np.float64], int]:
    """Values (quantity, n) of the true sources in a catalogue, and how many others it has."""
    rows, sources = matched(table, truth)
    out = np.full((len(QUANTITIES), len(truth)), np.nan)
    for line, name in zip(out, QUANTITIES, strict=True):
        line[sources] = column(table, name)[rows]
    return out, len(table) - len(rows)


def matched(one: Table, other: Table, radius: float = 2.0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows of both that are each other's nearest, within a radius in arcsec."""
    sky = [SkyCoord(values(t, "RA"), values(t, "DEC"), unit="deg") for t in (one, other)]
    there, distance, _ = sky[0].match_to_catalog_sky(sky[1])
    back = sky[1].match_to_catalog_sky(sky[0])[0]
    rows = np.flatnonzero((back[there] == np.arange(len(one))) & (distance.arcsec < radius))
    return rows, there[rows]


def differences(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """One minus other (..., quantity, n); angles modulo 180."""
    out = one - other
    angle = QUANTITIES.index("PA")
    out[..., angle, :] = (out[..., angle, :] + 90) % 180 - 90
    return out


def expected(truth: QTable) -> NDArray[np.float64]:
    """What an extraction should give; an aperture of half the FWHM holds half of a Gaussian."""
    flux = 0.5 * truth["FLUX_TOTAL"].to_value("mJy")
    return np.stack([flux, *(values(truth, name) for name in QUANTITIES[1:])])


def causes(beyond: NDArray[np.bool_]) -> NDArray[np.int_]:
    """The step that explains each source of (step, n); 0 for none, -1 for those that are left.

    That is the first after which it is within the limit, and remains so.
    """
    last = len(beyond) - 1 - np.argmax(beyond[::-1], axis=0)
    step = np.where(beyond.any(axis=0), last + 1, 0)
    return np.where(step == len(beyond), -1, step)


# --- What is told --------------------------------------------------------------------------------


def told(case: Case, all_of_it: Comparison) -> list[str]:
    return [
        *ladder(case, all_of_it),
        "",
        *explained(case, all_of_it),
        "",
        *left(all_of_it),
        "",
        *off_truth(all_of_it),
    ]


def ladder(case: Case, result: Comparison) -> list[str]:
    """How the two agree after each step."""
    heads = [f"{name} > {limit}" for name in QUANTITIES for limit in LIMITS]
    columns = ["hyper_py changed in", "sources", "false", "of hyperjax's", "of hyper_py's", *heads]
    lines = [
        f"hyperjax: {result.our_found} sources of {len(result.truth)}, {result.our_false} false",
        "",
        *table_head(columns),
    ]
    names = ["nothing", *(step.name for step in case.steps)]
    off = np.abs(result.off)
    for number, name in enumerate(names):
        both = np.isfinite(off[number, 0])
        cells = [
            name,
            str(result.found[number]),
            str(result.false[number]),
            f"{both.sum() / result.our_found:.1%}",
            f"{both.sum() / result.found[number]:.1%}",
            *(f"{np.mean(line[both] > limit):.0%}" for line in off[number] for limit in LIMITS),
        ]
        lines.append(row(cells))
    return lines


def explained(case: Case, result: Comparison) -> list[str]:
    """How many sources each step explains, and by how much it moved those beyond three errors."""
    columns = ["cause", *(f"sources > {limit}" for limit in LIMITS), "FLUX", "FWHM_1", "PA"]
    found = {limit: causes(result.beyond(limit)) for limit in LIMITS}
    lines = table_head(columns)
    for number, step in enumerate(case.steps, 1):
        moved = differences(result.theirs[number], result.theirs[number - 1])
        moved[:3] /= result.ours[:3]
        some = moved[:, found[LIMITS[0]] == number]
        name = f"{step.name} (a choice)" if step.is_choice else step.name
        counts = [str(np.sum(found[limit] == number)) for limit in LIMITS]
        lines.append(row([name, *counts, *typical(some)]))
    rest = [str(np.sum(found[limit] == -1)) for limit in LIMITS]
    total = [str(np.sum(found[limit] != 0)) for limit in LIMITS]
    return [*lines, row(["left", *rest, "", "", ""]), row(["all", *total, "", "", ""])]


def typical(moved: NDArray[np.float64]) -> list[str]:
    """Median sizes of the moves (quantity, n) of FLUX, FWHM_1 and PA."""
    moved = np.abs(moved[:, np.isfinite(moved[0])])
    if moved.size == 0:
        return ["", "", ""]
    flux, major, _, angle = np.median(moved, axis=1)
    return [f"{flux:.1%}", f"{major:.1%}", f"{angle:.1f} deg"]


def left(result: Comparison) -> list[str]:
    """Every source that is left beyond three errors."""
    rest = np.flatnonzero(causes(result.beyond(LIMITS[0])) == -1)
    if rest.size == 0:
        return ["No source is left beyond three errors."]
    lines = table_head(["left: seed", "ID", "S/N", "neighbour [beams]", *QUANTITIES])
    for source in rest:
        off = result.off[-1, :, source]
        cells = [f"{value:+.1f}" if np.isfinite(value) else "not found" for value in off]
        snr, near = (f"{result.truth[name][source]:.1f}" for name in ("SNR", "NEIGHBOUR"))
        seed, number = str(result.seed[source]), str(result.truth["ID"][source])
        lines.append(row([seed, number, snr, near, *cells]))
    return lines


def off_truth(result: Comparison) -> list[str]:
    """Median and scatter of what is relative to the truth; degrees for PA."""
    lines = table_head(["off truth", "hyper_py", "hyper_py, all steps", "hyperjax"])
    true = expected(result.truth)
    for number, name in enumerate(QUANTITIES):
        cells = [name]
        for some in (result.theirs[0], result.theirs[-1], result.ours):
            off = differences(some, true)[number]
            off = off if name == "PA" else 100 * off / true[number]
            off = off[np.isfinite(off)]
            spread = WIDTH * np.median(np.abs(off - np.median(off)))
            unit = "deg" if name == "PA" else "%"
            cells.append(f"{np.median(off):.1f} +- {spread:.1f} {unit}")
        lines.append(row(cells))
    return lines


def per_source(name: str, case: Case, result: Comparison) -> Table:
    """Every true source: differences in errors before the first step and after the last; causes."""
    names = ["", *(step.name for step in case.steps), "left"]
    out = Table({"CASE": [name] * len(result.truth), "SEED": result.seed})
    for column in ("ID", "SNR", "NEIGHBOUR"):
        out[column] = np.round(values(result.truth, column), 2)
    for label, off in (("FIRST", result.off[0]), ("LAST", result.off[-1])):
        for quantity, line in zip(QUANTITIES, off, strict=True):
            out[f"{quantity}_{label}"] = np.round(line, 2)
    for limit in LIMITS:
        out[f"CAUSE_{limit}"] = [names[step] for step in causes(result.beyond(limit))]
    return out


def table_head(columns: Sequence[str]) -> list[str]:
    return [row(columns), row(["---", *["---:"] * (len(columns) - 1)])]


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
