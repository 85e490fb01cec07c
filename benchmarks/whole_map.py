"""Time, processor time and memory of whole runs on one map: hyperjax beside hyper_py.

Every run is a process of its own, from its start to its last product, as a user would call it:

1. hyperjax with an empty compilation cache: the first run ever on a computer;
2. hyperjax with the cache that run left, and hyper_py, in turns (A B A B ...).

hyper_py runs with the configuration that it ships, changed only in its paths and its detection
threshold, with ``survey_code`` 15 (the beam of the header) and all pictures and FITS products off,
and so that one map costs it least: in one process (``parallel_maps`` off), and with linear algebra
on one thread (``--blas-threads``), since a second adds to its CPU time.

CPU time is user plus system time of a run with all its subprocesses; memory is that of the largest
of them; the load is the computer's in the last five minutes, these runs included. This script
imports no heavy module: it would count as their memory.

    python benchmarks/whole_map.py                            # hyperjax alone, on a simulated map
    python benchmarks/whole_map.py MAP.fits --hyper-py ENVIRONMENT/bin/python --markdown
"""

import argparse
import csv
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, NoReturn

import yaml

SIMULATED = ("--shape", "360", "400", "--sources", "200", "--blend-fraction", "0.2", "--seed", "1")
"""The map if none is given, as densely filled as the published one of hyper_py's benchmark."""

HEADINGS = ("", "runs", "wall [s]", "CPU [s]", "memory [MiB]", "sources")
BLAS_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PACKAGES = ("numpy", "scipy", "astropy", "photutils")
VERSIONS_CODE = """
import platform, sys
from importlib.metadata import version
names = [f"{name} {version(name)}" for name in sys.argv[1:]]
print(", ".join([*names, f"Python {platform.python_version()}"]))
"""
HYPER_PY_FOLDER_CODE = """
from importlib.util import find_spec
print(find_spec("hyper_py").submodule_search_locations[0])
"""


@dataclass(frozen=True)
class Run:
    """What one process, with all its subprocesses, cost, and what it found."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    sources: int


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    map: Path
    sigma: float
    timeout_s: float
    scratch: Path  # every run gets a folder of its own in it
    hyperjax: str  # the Python that has it
    hyper_py: str | None
    blas_threads: int  # of hyper_py

    @property
    def cache(self) -> Path:
        """The compilation cache of hyperjax, which nobody used before."""
        return self.scratch / "jax_cache"


def main() -> None:
    """Measure, and print the tables."""
    options = parse_options()
    signal.signal(signal.SIGTERM, exit_at_signal)
    with scratch_folder(options.keep, "whole_map_") as scratch:
        report(options, scratch)


@contextmanager
def scratch_folder(keep: Path | None, prefix: str) -> Iterator[Path]:
    """A folder for all products: that which is to be kept, or one that goes away in the end."""
    folder = keep or Path(tempfile.mkdtemp(prefix=prefix))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
    finally:
        if not keep:
            shutil.rmtree(folder)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("map", nargs="?", type=Path, help="FITS map; one is simulated if not given")
    parser.add_argument(
        "--hyper-py", metavar="PYTHON", type=program, help="Python that has hyper_py installed"
    )
    parser.add_argument(
        "--hyperjax", metavar="PYTHON", type=program, default=sys.executable, help="default: own"
    )
    parser.add_argument(
        "--blas-threads", type=positive, default=1, metavar="N", help="of hyper_py; default: 1"
    )
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="default: 3")
    parser.add_argument("--sigma", type=float, default=4.0, help="threshold in rms; default: 4")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="of one run, s")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder for all products")
    parser.add_argument("--markdown", action="store_true", help="print for a README")
    options = parser.parse_args()
    if options.map is not None and not options.map.is_file():
        parser.error(f"{options.map}: no such file")
    if options.keep is not None and options.keep.exists():
        parser.error(f"{options.keep}: exists; its compilation cache would not be empty")
    return options


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def program(text: str) -> str:
    """Find a program; its path is made absolute, not resolved, or it would leave its venv."""
    path = shutil.which(text)
    if path is None:
        raise argparse.ArgumentTypeError(f"{text}: no such program")
    return os.path.abspath(path)


def exit_at_signal(number: int, frame: FrameType | None) -> NoReturn:
    """End as at an error, so that no process is left behind."""
    sys.exit(128 + number)


def report(options: argparse.Namespace, scratch: Path) -> None:
    """Run everything and print: where, the table, the ratios."""
    versions = [
        f"hyperjax: {installed(options.hyperjax, ('hyperjax', 'jax', *PACKAGES))}",
        f"hyper_py: {installed(options.hyper_py, ('hyper-py-photometry', 'lmfit', *PACKAGES))}, "
        f"BLAS threads {options.blas_threads}"
        if options.hyper_py
        else "hyper_py: not run (--hyper-py)",
    ]
    path = options.map.resolve() if options.map else simulated_map(options, scratch)
    bench = Bench(
        map=path,
        sigma=options.sigma,
        timeout_s=options.timeout,
        scratch=scratch,
        hyperjax=options.hyperjax,
        hyper_py=options.hyper_py,
        blas_threads=options.blas_threads,
    )
    first = run_hyperjax(bench, "hyperjax_first")
    pairs = [
        (
            run_hyperjax(bench, f"hyperjax_{turn}"),
            run_hyper_py(bench, bench.hyper_py, f"hyper_py_{turn}") if bench.hyper_py else None,
        )
        for turn in range(1, options.repeats + 1)
    ]
    rivals = [(ours, theirs) for ours, theirs in pairs if theirs]
    rows = [
        row("hyperjax, first run ever", [first]),
        row("hyperjax", [ours for ours, _ in pairs]),
    ]
    if rivals:
        rows.append(row("hyper_py", [theirs for _, theirs in rivals]))
    facts = [
        f"{date.today()}, {path.name}, threshold {bench.sigma:g} rms; {processor()}, "
        f"load {os.getloadavg()[1]:.1f}",
        *versions,
        *ratio_lines(rivals),
    ]
    print("\n".join(markdown(rows, facts) if options.markdown else plain(rows, facts)))


# --- The two programs ----------------------------------------------------------------------------


def simulated_map(options: argparse.Namespace, scratch: Path) -> Path:
    path = scratch / "simulated.fits"
    command = [options.hyperjax, "-m", "hyperjax", "simulate", str(path), *SIMULATED]
    measured(command, scratch / "simulate", options.timeout)
    return path


def run_hyperjax(bench: Bench, name: str) -> Run:
    """Run hyperjax with its defaults, but for the threshold."""
    folder = bench.scratch / name
    command = [bench.hyperjax, "-m", "hyperjax", "run", str(bench.map)]
    command += ["--sigma", str(bench.sigma), "--out", str(folder / "out")]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(bench.cache)}
    return counted(measured(command, folder, bench.timeout_s, environment), folder)


def run_hyper_py(bench: Bench, python: str, name: str) -> Run:
    """Run hyper_py with the configuration that it ships, `adapted` to the map."""
    folder = bench.scratch / name
    package = Path(answer(python, HYPER_PY_FOLDER_CODE))
    template = (package / "assets" / "default_config.yaml").read_text(encoding="utf-8")
    config = adapted(yaml.safe_load(template), bench, folder / "out")
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [python, "-m", "hyper_py", str(folder / "config.yaml")]
    environment = {variable: str(bench.blas_threads) for variable in BLAS_VARIABLES}
    return counted(measured(command, folder, bench.timeout_s, environment), folder)


def adapted(config: dict[str, Any], bench: Bench, out: Path) -> dict[str, Any]:
    """Fit hyper_py's own configuration to the map; all that it may draw or save is off."""
    config["paths"]["input"]["dir_maps"] = str(bench.map.parent)
    config["paths"]["output"]["dir_root"] = str(out)
    config["files"]["file_map_name"] = bench.map.name
    config["control"]["parallel_maps"] = False  # over maps, of which there is one
    config["survey"]["survey_code"] = 15
    config["detection"]["sigma_thres"] = bench.sigma
    for section in ("fits_output", "visualization"):
        switches = {key: False for key, value in config[section].items() if value is True}
        config[section].update(switches)
    return config


def counted(usage: tuple[float, float, float], folder: Path) -> Run:
    """Add the number of rows of the merged CSV table, which both programs write."""
    path = folder / "out" / "params" / "params_ALL.csv"
    if not path.is_file():
        sys.exit(f"{folder.name}: the run ended well but wrote no {path.name}\n{tail(folder)}")
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(line for line in lines if not line.startswith("#"))
        return Run(*usage, sources=sum(1 for row in rows if row) - 1)


# --- One process ---------------------------------------------------------------------------------


def measured(
    command: Sequence[str],
    folder: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> tuple[float, float, float]:
    """Run a program to its end: wall seconds, CPU seconds and the peak memory in MiB.

    `os.wait4` counts the subprocesses that the program waited for: their processor time is added,
    and the memory is that of the largest process.
    """
    folder.mkdir(exist_ok=True)
    overdue = threading.Event()
    with (folder / "output.txt").open("wb") as output:
        start = perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "MPLBACKEND": "Agg", **(environment or {})},
            process_group=0,
        )
        timer = threading.Timer(timeout_s, stop, (process.pid, overdue.set))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall = perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            stop(process.pid)
    if overdue.is_set() or process.returncode:
        why = f"stopped after {timeout_s:g} s" if overdue.is_set() else f"exit {process.returncode}"
        sys.exit(f"{folder.name}: {why}: {' '.join(command)}\n{tail(folder)}")
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * bytes_per_unit / 2**20


def stop(group: int, also: Callable[[], object] = lambda: None) -> None:
    """Kill what is left of a group of processes."""
    also()
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def tail(folder: Path, lines: int = 15) -> str:
    text = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def answer(python: str, code: str, *arguments: str) -> str:
    """Let another Python answer a question on standard output."""
    command = [python, "-c", code, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{python}: {error.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


# --- What is printed -----------------------------------------------------------------------------


def installed(python: str, packages: Iterable[str]) -> str:
    return answer(python, VERSIONS_CODE, *packages)


def processor() -> str:
    """Name the processor, the cores that may be used, and the system."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), model
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {model}, {platform.system()} {platform.machine()}"


def row(label: str, runs: Sequence[Run]) -> list[str]:
    sources = sorted({run.sources for run in runs})
    return [
        label,
        str(len(runs)),
        spread([run.wall_s for run in runs], "{:.1f}"),
        spread([run.cpu_s for run in runs], "{:.1f}"),
        spread([run.peak_mib for run in runs], "{:.0f}"),
        ", ".join(map(str, sources)),
    ]


def spread(values: Sequence[float], form: str) -> str:
    """Median and range, or the one value that there is."""
    median, low, high = (
        form.format(value) for value in (statistics.median(values), min(values), max(values))
    )
    return median if len(values) == 1 else f"{median} ({low}..{high})"


def ratio_lines(pairs: Sequence[tuple[Run, Run]]) -> list[str]:
    """hyper_py over hyperjax, each run over the one just before it."""
    if not pairs:
        return []
    cpu = spread([theirs.cpu_s / ours.cpu_s for ours, theirs in pairs], "{:.2f}")
    wall = spread([theirs.wall_s / ours.wall_s for ours, theirs in pairs], "{:.2f}")
    return [f"hyper_py / hyperjax, pair by pair: CPU time {cpu}, wall time {wall}"]


def plain(rows: Sequence[Sequence[str]], facts: Sequence[str]) -> list[str]:
    table = [HEADINGS, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]
    return [*lines, "", *facts]


def markdown(rows: Sequence[Sequence[str]], facts: Sequence[str]) -> list[str]:
    rule = ["---", *["---:"] * (len(HEADINGS) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, rule, *rows)]
    return [*lines, "", *(f"- {fact}" for fact in facts)]


if __name__ == "__main__":
    main()
