"""Simulated maps of every kind of noise, extracted and compared with the truth.

Maps of white, beam-shaped and 1/f noise, with blank pixels, slopes, noise that varies, crowds and
grids of sources: whether errors are right (the widths of the pulls), fluxes unbiased, sources
found, and nothing found where there is none. The tables of docs/noise.md are made by this script.

    python benchmarks/noise.py --markdown
    python benchmarks/noise.py --only "white" "1/f" --maps 24
    python benchmarks/noise.py --only "white, full of rows 3 beams apart" --maps 2
    python benchmarks/noise.py --cost                        # auto beside white, on white maps
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.table import QTable, vstack
from fit import bullets, facts, table
from scipy.special import erfc
from scipy.stats import median_abs_deviation

from hyperjax import Config, Map, Simulation, extract, read_map, simulate
from hyperjax.evaluate import matches
from hyperjax.runtime import configure_runtime
from hyperjax.simulation import Simulated

SURE, SURER = 8, 10  # flux over its error: of bias and scatter; of fluxes that are far off
FAR_OFF = 0.3
ALONE = 2.5  # beams without another source; a source in a blend has none that was not found there
HIDDEN = 1.5  # beams to a source that was not found: it may be part of this one
ELONGATED = 1.3  # axis ratio from which axes and position angles are told apart
FAINT = ((5, 6), (6, 8), (8, 12))  # flux over its error
APART = ((0.8, 1.0), (1.0, 1.25), (1.25, 1.5), (1.5, 2.5))  # beams to the nearest other source
COMMON = {
    **{"shape": (400, 400), "n_sources": 60, "min_separation_beams": 4.0, "snr_range": (5.0, 80.0)},
    **{"gradient": 0.0, "structure": 0.0},
}
CROWD = {"n_sources": 300, "min_separation_beams": 0.8, "blend_fraction": 0.3}

EXTENDED = {
    **{"n_sources": 120, "min_separation_beams": 1.5, "blend_fraction": 0.4},
    **{"snr_range": (4.0, 200.0), "size_range": (1.0, 2.5)},
}


def grid(beams: float, count: int, fwhm: float = 4.0) -> dict[str, Any]:
    """So many sources in rows and columns, so many beams apart."""
    side = np.arange(count) * beams * fwhm
    side = side - side.mean() + (COMMON["shape"][0] - 1) / 2
    return {"positions": tuple((float(x), float(y)) for x in side for y in side)}


def full_of_rows(beams: float, fwhm: float = 4.0) -> dict[str, Any]:
    """The same from edge to edge."""
    return grid(beams, int(0.95 * COMMON["shape"][0] / (beams * fwhm)), fwhm)


def growing(simulated: Simulated) -> np.ndarray:
    """The map with noise that grows five times from its left to its right."""
    factor = np.linspace(1, 5, simulated.data.shape[1])
    return simulated.data + (factor - 1) * simulated.noise


@dataclass(frozen=True)
class Case:
    """Options of `Simulation`, and what is done to the maps besides."""

    options: dict[str, Any]
    data: Callable[[Simulated], np.ndarray] = lambda simulated: simulated.data


TEN = {"beam_fwhm_pix": 10.0, "n_sources": 20}
BEAM = {"noise": "beam"}
HOLES = {"border_pix": 20, "n_holes": 6}
TILTED = {"beam_fwhm_pix": 5.0, "beam_axis_ratio": 0.6, "beam_pa_deg": 30.0}
CASES = {
    "white": Case({}),
    "beam-shaped": Case(BEAM),
    "1/f": Case({"noise": "1/f"}),
    "white, beam of 2 pixels": Case({"beam_fwhm_pix": 2.0}),
    "beam-shaped, beam of 10 pixels": Case(BEAM | TEN),
    "white, beam of 10 pixels": Case(TEN),
    "white; a slope of 100 and structure of 10 times the noise": Case(
        {"gradient": 100.0, "structure": 10.0}
    ),
    "beam-shaped; blank border and holes": Case(BEAM | HOLES),
    "white; border and holes of zeros": Case(HOLES | {"blank": "zero"}),
    "beam-shaped, beam of 5 pixels, axis ratio 0.6": Case(BEAM | TILTED),
    "white, growing five times across the map": Case({"n_sources": 80}, growing),
    "white, 300 sources, 30 % in blends": Case(CROWD),
    "white, 300 sources a beam apart, 30 % in blends": Case(CROWD | {"min_separation_beams": 1.0}),
    "beam-shaped, 300 sources, 30 % in blends": Case(CROWD | BEAM),
    "1/f, 300 sources, 30 % in blends": Case(CROWD | {"noise": "1/f"}),
    "white, 190 sources 1.5 to 2.5 beams apart": Case(
        {"n_sources": 190, "min_separation_beams": 1.5, "blend_fraction": 0.8}
    ),
    "white, 120 sources of 1 to 2.5 beams, 40 % in blends": Case(EXTENDED),
    "beam-shaped, 120 sources of 1 to 2.5 beams, 40 % in blends": Case(EXTENDED | BEAM),
    "white, a grid 4 beams apart": Case(grid(4, 11)),
    "white, a grid 2.5 beams apart": Case(grid(2.5, 11)),
    "white, faint": Case({"n_sources": 80, "snr_range": (3.0, 10.0)}),
    "beam-shaped, faint": Case(BEAM | {"n_sources": 80, "snr_range": (3.0, 10.0)}),
    "1/f, faint": Case({"noise": "1/f", "n_sources": 80, "snr_range": (3.0, 10.0)}),
    "white, no source": Case({"n_sources": 0}),
    "beam-shaped, no source": Case(BEAM | {"n_sources": 0}),
    "beam-shaped, beam of 5 pixels, axis ratio 0.6, no source": Case(
        BEAM | TILTED | {"n_sources": 0}
    ),
    "1/f, no source": Case({"noise": "1/f", "n_sources": 0}),
    "white, no source; blank border and holes": Case(HOLES | {"n_sources": 0}),
    "beam-shaped, no source; blank border and holes": Case(BEAM | HOLES | {"n_sources": 0}),
}
CROWDS = [name for name in CASES if "300 sources" in name]
FULL = {
    f"{noise.replace('beam', 'beam-shaped')}, {of}full of rows {beams:g} beams apart": Case(
        {"noise": noise, "snr_range": snr} | full_of_rows(beams)
    )
    for of, snr in (("", (5.0, 80.0)), ("faint sources, ", (3.0, 20.0)))
    for noise in ("white", "beam", "1/f")
    for beams in (4, 3, 2.5, 2)
}
"""Patterns that the noise's spectrum may hold: hundreds to thousands of sources a map."""

COSTS: dict[str, dict[str, Any]] = {
    "400 x 400 pixels, 60 sources 3 beams apart": {"min_separation_beams": 3.0},
    "400 x 400 pixels, 200 sources 1.2 beams apart": {
        "n_sources": 200,
        "min_separation_beams": 1.2,
    },
    "1000 x 1000 pixels, 400 sources 3 beams apart": {
        "shape": (1000, 1000),
        "n_sources": 400,
        "min_separation_beams": 3.0,
    },
}
COST_SEEDS, COST_RUNS = (1, 2, 3), 6


def main() -> None:
    options = parse_options()
    configure_runtime()
    print("\n".join(costs(options) if options.cost else report(options)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CASES | FULL,
        default=list(CASES),
        metavar="CASE",
        help="; ".join(CASES | FULL).replace("%", "%%"),
    )
    parser.add_argument(
        "--cost", action="store_true", help="times of auto and white on maps of white noise"
    )
    parser.add_argument("--maps", type=int, default=8, help="of each kind; default: 8")
    parser.add_argument("--first-seed", type=int, default=100, help="of the maps; default: 100")
    parser.add_argument("--model", choices=("auto", "white", "correlated"), default="auto")
    parser.add_argument("--sigma", type=float, default=5.0, help="threshold; default: 5")
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    return parser.parse_args()


def report(options: argparse.Namespace) -> list[str]:
    """The tables: of sources, of near ones, of faint ones, of maps without any."""
    measured = {name: Measured.of((CASES | FULL)[name], options) for name in options.only}
    with_sources = {name: one for name, one in measured.items() if one.there}
    faint = {name: one for name, one in with_sources.items() if name.endswith("faint")}
    crowds = {name: one for name, one in with_sources.items() if name in CROWDS}
    usual = {name: one for name, one in with_sources.items() if name not in faint}
    without = {name: one for name, one in measured.items() if not one.there}
    tables = [
        (HEADINGS, [[name, *usual_row(one)] for name, one in usual.items()]),
        (APART_HEADINGS, [[name, *apart_row(one)] for name, one in crowds.items()]),
        (FAINT_HEADINGS, [[name, *faint_row(one)] for name, one in faint.items()]),
        (EMPTY_HEADINGS, [[name, *empty_row(one, options)] for name, one in without.items()]),
    ]
    lines = []
    for headings, rows in tables:
        lines += [*table(headings, rows, options.markdown), ""] if rows else []
    notes = [f"{options.maps} maps of each kind, threshold {options.sigma:g}", *facts()]
    return [*lines, *bullets(notes, options.markdown)]


def costs(options: argparse.Namespace) -> list[str]:
    """Warm times of `extract`, auto and white in turns: medians of maps and runs."""
    headings = ("white noise, beam of 4 pixels", "auto", "white", "ratio (CPU), of each map")
    rows = []
    for name, changed in COSTS.items():
        timed: dict[str, list[list[tuple[float, float, int]]]] = {"auto": [], "white": []}
        for seed in COST_SEEDS:
            simulated = simulate(Simulation(**COMMON | changed, seed=seed))
            map = as_map(simulated, simulated.data)
            for model, runs in timed.items():
                extract(map, Config(noise={"model": model}))  # compiles
                runs.append([])
            for _ in range(COST_RUNS):
                for model, runs in timed.items():
                    runs[-1].append(time_of(map, Config(noise={"model": model})))
        wall, cpu, found = (
            {
                model: [np.median([run[i] for run in of]) for of in runs]
                for model, runs in timed.items()
            }
            for i in range(3)
        )
        ratios = np.divide(cpu["auto"], cpu["white"])
        rows.append(
            [
                name,
                *(f"{np.median(wall[m]):.2f} s, {sum(found[m]):.0f} found" for m in timed),
                " ".join(f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    notes = [f"maps of seeds {COST_SEEDS}, {COST_RUNS} runs of each", *facts()]
    lines = table(headings, rows, options.markdown)
    return [*lines, "", *bullets(notes, options.markdown)]


def time_of(map: Map, config: Config) -> tuple[float, float, int]:
    """Wall time and processor time of an extraction, and how many sources it finds."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = len(extract(map, config).catalog)
    return time.perf_counter() - wall, time.process_time() - cpu, count


# --- What is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """All maps of one kind: rows of found sources and of the truth that belong together.

    And the distances of those that were not found to the nearest other source, beams.
    """

    there: int
    false: int
    found: QTable
    true: QTable
    missed: np.ndarray
    beams: float  # area of the maps, beams

    @classmethod
    def of(cls, case: Case, options: argparse.Namespace) -> "Measured":
        """Make the maps, extract them, match the tables."""
        there, false, pairs, missed, beams = 0, 0, [], [], 0.0
        config = Config(detection={"sigma_thres": options.sigma}, noise={"model": options.model})
        for seed in range(options.first_seed, options.first_seed + options.maps):
            simulated = simulate(Simulation(**COMMON | case.options, seed=seed))
            catalog = extract(as_map(simulated, case.data(simulated)), config).catalog
            truth, beam = simulated.truth, simulated.options.beam_fwhm_arcsec
            pair = matches(catalog, truth, beam / 2)
            there += len(truth)
            false += len(catalog) - len(pair.catalog)
            beams += simulated.valid.sum() / simulated.options.beam_fwhm_pix**2
            hidden = np.setdiff1d(np.arange(len(truth)), pair.truth)
            true = truth[pair.truth]
            missed.append(np.asarray(truth["NEIGHBOUR"][hidden]))
            true["HIDDEN"] = nearest(true, truth[hidden], beam)
            true.meta.clear()
            pairs.append((catalog[pair.catalog], true))
        parts = zip(*pairs, strict=True)
        found, true = (vstack(part, metadata_conflicts="silent") for part in parts)
        return cls(there, false, found, true, np.concatenate(missed), beams)


def as_map(simulated: Simulated, data: np.ndarray) -> Map:
    """The simulated map as it is read from a file."""
    from astropy.io import fits

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "simulated.fits"
        fits.writeto(path, data, simulated.header)
        return read_map(path)


def nearest(some: QTable, others: QTable, beam: float) -> np.ndarray:
    """Distance (n,) to the nearest of others, beams."""
    if not len(others):
        return np.full(len(some), np.inf)
    apart = np.hypot(
        some["X_PIX"][:, None] - others["X_PIX"], some["Y_PIX"][:, None] - others["Y_PIX"]
    )
    pixel = float(np.ptp(some["DEC"].to_value("arcsec")) / np.ptp(some["Y_PIX"]))
    return apart.min(1) * pixel / beam


def pulls(one: Measured, some: np.ndarray) -> dict[str, np.ndarray]:
    """Deviations from the truth over their errors, of some sources."""
    found, true = one.found[some], one.true[some]
    elongated = true["FWHM_1"] > ELONGATED * true["FWHM_2"]

    def pull(name: str, of: str | None = None) -> np.ndarray:
        off = (found[name] - true[of or name]) / found[f"{name}_ERR"]
        return np.asarray(off.to_value(u.one))

    east = (found["RA"] - true["RA"]) * np.cos(true["DEC"]) / found["RA_ERR"]
    turn = (found["PA"] - true["PA"] + 90 * u.deg) % (180 * u.deg) - 90 * u.deg
    angle = (turn / found["PA_ERR"]).to_value(u.one)
    return {
        "flux": pull("FLUX_TOTAL"),
        "aperture": pull("FLUX_APCOR", "FLUX_TOTAL"),
        "peak": pull("FLUX_PEAK"),
        "FWHM": np.concatenate([pull(name)[elongated] for name in ("FWHM_1", "FWHM_2")]),
        "position": np.concatenate([east.to_value(u.one), pull("DEC")]),
        "PA": angle[elongated],
    }


# --- Rows of the tables --------------------------------------------------------------------------

HEADINGS = (
    *("noise and sources", "found / there, false", "bias of flux, %", "scatter, %"),
    *("> 30 % off", "not beside one that was not found", "widths: flux, aperture"),
    *("peak, FWHM", "position, PA", "in blends: flux, position"),
)
PAIRS = ("flux", "aperture"), ("peak", "FWHM"), ("position", "PA")
FAINT_HEADINGS = (
    *("noise", "found / there, false"),
    *(f"bias of flux, S/N {low} to {high}, %" for low, high in FAINT),
)
APART_HEADINGS = (
    "noise and sources",
    *(f"{low:g} to {high:g} beams: found, > 30 % off" for low, high in APART),
)
EMPTY_HEADINGS = ("noise", "false sources", "peaks above the threshold if Gaussian")


def usual_row(one: Measured) -> list[str]:
    error, ratio = flux_error(one)
    sure, surer = error[ratio > SURE], ratio > SURER
    far = np.abs(error) > FAR_OFF
    clear = surer & (one.true["HIDDEN"] > HIDDEN)
    alone = np.asarray(one.true["NEIGHBOUR"] > ALONE)
    whole = ~alone & np.asarray(one.true["HIDDEN"] > ALONE)
    own, of_blends = pulls(one, alone), pulls(one, whole)
    return [
        counts(one),
        biased(sure),
        f"{100 * width(sure):.1f}",
        f"{far[surer].sum()} / {surer.sum()}",
        f"{far[clear].sum()} / {clear.sum()}",
        *(widths(own[first], own[second]) for first, second in PAIRS),
        widths(of_blends["flux"], of_blends["position"]),
    ]


def widths(*values: np.ndarray) -> str:
    """Widths of several kinds of deviations; none where there are hardly any sources."""
    return " ".join(f"{width(kind):.2f}" for kind in values) if len(values[0]) > 1 else ""


def faint_row(one: Measured) -> list[str]:
    """Biases by the true flux over the median error, so that the noise does not choose sources.

    The error of each source goes with its measured size, as its flux does.
    """
    error, _ = flux_error(one)
    ratio = (one.true["FLUX_TOTAL"] / np.median(one.found["FLUX_TOTAL_ERR"])).to_value(u.one)
    return [counts(one), *(biased(error[(ratio > low) & (ratio <= high)]) for low, high in FAINT)]


def apart_row(one: Measured) -> list[str]:
    """By the distance to the nearest other source, found or not."""
    error, ratio = flux_error(one)
    far, surer = np.abs(error) > FAR_OFF, ratio > SURER
    cells = []
    for low, high in APART:
        found, missed = (
            (low <= beams) & (beams < high)
            for beams in (np.asarray(one.true["NEIGHBOUR"]), one.missed)
        )
        if found.sum() + missed.sum() == 0:
            cells.append("")
            continue
        share = found.sum() / (found.sum() + missed.sum())
        off = f"{100 * far[surer & found].mean():.1f} %" if (surer & found).any() else "-"
        cells.append(f"{100 * share:.1f} %, {off}")
    return cells


def empty_row(one: Measured, options: argparse.Namespace) -> list[str]:
    """Beside the number of independent beams times the tail of a Gaussian."""
    expected = one.beams * 0.5 * erfc(options.sigma / np.sqrt(2))
    return [str(one.false), f"{expected:.2g}"]


def flux_error(one: Measured) -> tuple[np.ndarray, np.ndarray]:
    """Relative error of the total flux; the flux over its error."""
    error = (one.found["FLUX_TOTAL"] / one.true["FLUX_TOTAL"]).to_value(u.one) - 1
    ratio = (one.found["FLUX_TOTAL"] / one.found["FLUX_TOTAL_ERR"]).to_value(u.one)
    return np.asarray(error), np.asarray(ratio)


def counts(one: Measured) -> str:
    return f"{len(one.found)} / {one.there}, {one.false}"


def biased(error: np.ndarray) -> str:
    """Median and its error, per cent."""
    if len(error) < 2:
        return "-"
    uncertainty = 1.25 * width(error) / np.sqrt(len(error))
    return f"{100 * np.median(error):+.1f} +- {100 * uncertainty:.1f}"


def width(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation of a Gaussian of this median deviation."""
    return float(median_abs_deviation(values, scale="normal", nan_policy="omit"))


if __name__ == "__main__":
    main()
