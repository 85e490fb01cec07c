"""The command ``hyperjax``: a thin layer over the library.

Heavy modules (numpy, astropy, JAX) are imported inside the commands, so that ``--help`` is quick.
Results go to the standard output; progress, log and errors go to the standard error.
"""

import gc
import logging
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperjax.errors import ConfigError, HyperjaxError, MissingFileError, OutputError
from hyperjax.logs import attached, counted

if TYPE_CHECKING:
    from rich.console import Console

    from hyperjax.config import Config, Units
    from hyperjax.simulation import Simulated
    from hyperjax.survey import MapOutcome, SurveyResult

__all__ = ["app", "main"]

DEFAULT_OUTPUT = "hyperjax_out"
"""Output folder where neither ``-o`` nor a configuration names another."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_WIDE = 1000  # characters of a line off a terminal, which nothing is folded to fit
_GARBAGE_THRESHOLDS = 50_000, 20, 50  # of new objects, and of collections of the younger ones

app = typer.Typer(
    name="hyperjax",
    epilog="First time? `hyperjax demo` simulates a map, extracts its sources and scores them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line.

    Garbage is looked for more rarely than Python does by itself, which takes a tenth of the time of
    a short run.
    """
    gc.set_threshold(*_GARBAGE_THRESHOLDS)
    app(prog_name="hyperjax")


# --- What the commands share ---------------------------------------------------------------------

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what is done.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks of errors, and log every detail.")
]

Unit = Annotated[
    str | None,
    typer.Option(
        metavar="UNIT",
        help="Brightness unit: Jy/beam, Jy/pix, MJy/sr, K. Default: that of the header.",
    ),
]
BeamFwhm = Annotated[
    float | None,
    typer.Option(metavar="ARCSEC", help="FWHM of the beam, arcsec. Default: that of the header."),
]
RmsMap = Annotated[
    Path | None,
    typer.Option(
        metavar="RMS.fits",
        help="FITS image of the noise of the map, on its grid. Default: measured.",
    ),
]
RmsHdu = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Number or name of the extension of the noise, in --rms-map or in the map itself.",
    ),
]
RmsKind = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="What the image of the noise holds: rms, variance, or weight (the inverse variance "
        "is proportional to it: exposure, coverage). Default: rms.",
    ),
]


@contextmanager
def _errors_in_one_line(debug: bool = False) -> Iterator[None]:
    """End a command that fails on purpose with one line and its exit code."""
    try:
        yield
    except HyperjaxError as error:
        if debug:
            traceback.print_exc()
        _print_error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _print_error(error: object) -> None:
    typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)


@contextmanager
def _log_on_terminal(console: "Console", verbose: bool, quiet: bool) -> Iterator[None]:
    """Show log records; Python's warnings are for the log files, unless all is asked for."""
    from rich.logging import RichHandler

    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False)
    handler.addFilter(lambda record: verbose or record.name != "py.warnings")
    handler.addFilter(_is_not_failed_map)
    logging.captureWarnings(True)
    try:
        with attached(handler, level):
            yield
    finally:
        logging.captureWarnings(False)


def _is_not_failed_map(record: logging.LogRecord) -> bool:
    """Whether a record is other than the failure of a map, which the end of the run reports."""
    return not (record.name == "hyperjax.survey" and record.levelno >= logging.ERROR)


def _short(path: Path) -> str:
    """Show a path from the current folder where it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"hyperjax {version('hyperjax')}")
        raise typer.Exit


@app.callback()
def _hyperjax(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Source extraction and photometry for astronomical maps.

    Finds the compact sources of FITS maps, fits them and their background with
    Gaussians, and writes catalogues (ECSV, IPAC, CSV), DS9 regions, the model,
    residual, background and noise maps, and a picture.

        hyperjax run map.fits -o results
    """


# --- run -----------------------------------------------------------------------------------------


@app.command(
    epilog="Exit codes: 0 all maps finished; 1 some of several failed; 2 the call or the "
    "configuration is wrong; 3 no map could be used; 130 interrupted."
)
def run(
    maps: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MAP.fits|CONFIG.yaml",
            help="FITS maps (.fits, .fits.gz, .fits.fz), or one configuration that names them. "
            "Default: ./hyper_config.yaml, or the user's own configuration.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="CONFIG.yaml",
            help="Configuration; what is given on the command line goes before it.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Folder of the results. "
            f"Default: that of the configuration; without one, {DEFAULT_OUTPUT}.",
        ),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            "--sigma",
            "-s",
            metavar="N",
            help="Threshold, in units of the noise: of the peaks of the matched filter, and of "
            "the total fluxes that are fitted. Default: 5.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", metavar="N", help="Maps worked on at the same time. Default: 2."
        ),
    ] = None,
    unit: Unit = None,
    beam: BeamFwhm = None,
    rms_map: RmsMap = None,
    rms_hdu: RmsHdu = None,
    rms_kind: RmsKind = None,
    frequency: Annotated[
        float | None,
        typer.Option(
            metavar="GHZ", help="Frequency of a map in K, GHz. Default: that of the header."
        ),
    ] = None,
    hdu: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Number or name of the extension. Default: the first image."
        ),
    ] = None,
    survey_code: Annotated[
        int | None,
        typer.Option(
            metavar="CODE",
            help="Fixed beam: 1-3 PACS 70, 100, 160 um; 4-6 SPIRE 250, 350, 500 um; 7, 8 JCMT "
            "450, 850 um. Default: 15, the header's.",
        ),
    ] = None,
    sources: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE",
            help="Measure these sources and detect none: a table with ID, RA, DEC, FWHM_1, FWHM_2, "
            "PA (IPAC, ECSV, CSV), or a catalogue of another map.",
        ),
    ] = None,
    fit_sizes: Annotated[
        bool,
        typer.Option("--fit-sizes", help="With --sources: take the positions only, fit the sizes."),
    ] = False,
    detection_only: Annotated[
        bool, typer.Option("--detection-only", help="Detect the sources, but do not fit them.")
    ] = False,
    overview: Annotated[
        bool | None,
        typer.Option("--overview/--no-overview", help="Draw a picture of each map. Default: yes."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show at the end how long each step took.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Extract the sources of maps and write the catalogues.

    One map, with the beam and the unit of its header:

        hyperjax run orion.fits --sigma 4 -o results

    Several maps, two at a time, with a configuration:

        hyperjax run *.fits -c hyper_config.yaml --jobs 2

    The sources of one map in the apertures of another (forced photometry):

        hyperjax run band2.fits --sources out/params/params_band1.ecsv

    Maps, folders and everything else from a configuration:

        hyperjax run hyper_config.yaml

    Without an argument the configuration is looked for, as in HYPER: it is
    ./hyper_config.yaml, else hyper_config.yaml in the user's configuration
    folder; where there is neither, ./hyper_config.yaml is written, to be edited.
    """
    given = {
        "paths.output.dir_root": str(out.absolute()) if out else None,
        "detection.sigma_thres": sigma,
        "control.n_cores": jobs,
        "control.parallel_maps": None if jobs is None else True,
        "control.detection_only": detection_only or None,
        "units.map_unit": unit,
        "units.frequency_ghz": frequency,
        "survey.beam_fwhm_arcsec": beam,
        "survey.survey_code": survey_code,
        "files.hdu": hdu,
        "noise.rms_map": str(rms_map.absolute()) if rms_map else None,
        "noise.rms_hdu": rms_hdu,
        "noise.rms_kind": rms_kind,
        "detection.fixed_source_table_path": str(sources.absolute()) if sources else None,
        "detection.use_fixed_source_table": True if sources else None,
        "detection.fixed_peaks": True if sources else None,
        "photometry.fixed_radius": False if fit_sizes else True if sources else None,
        "visualization.visualize_overview": overview,
    }
    with _errors_in_one_line(debug):
        options, paths = _inputs(maps or [], config, given)
        if not quiet and not sources:  # given sources are fitted pixel by pixel
            _notes_of_noise(options)
        result = _run(paths, options, verbose, quiet, debug)
        if not quiet:
            _print_summary(result, options.units)
        if profile:
            _print_profile(result.outcomes)
        _print_failures(result, debug)
    raise typer.Exit(result.exit_code)


def _notes_of_noise(options: "Config") -> None:
    """Say which options make the fit another one, and which have no effect."""
    keys, idle = options.of_pixels, options.without_effect
    if keys and options.noise.model == "auto" and not options.control.detection_only:
        typer.echo(
            f"note: {_first_of(keys)}: sources are found and fitted pixel by pixel, as HYPER does, "
            "and not in the noise as measured; set noise.model = white to ask for that without "
            "this note",
            err=True,
        )
    if idle:
        typer.echo(
            f"note: {_first_of(idle)}: no effect, as sources are fitted in the noise as measured; "
            "set noise.model = white to fit them pixel by pixel, or auto to go on without this "
            "note",
            err=True,
        )


def _first_of(keys: Sequence[str]) -> str:
    """The first of some keys, and how many there are besides."""
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def _inputs(
    maps: Sequence[Path], config: Path | None, given: dict[str, Any]
) -> "tuple[Config, Sequence[Path]]":
    """Tell maps from configuration, and put what is given on the command line before the rest."""
    from hyperjax.config import Config
    from hyperjax.config_io import find_or_offer_config, load_config, map_paths, with_overrides

    files = [path for path in maps if path.suffix.lower() in (".yaml", ".yml")]
    if files and (config or len(maps) > 1):
        raise ConfigError(f"{files[0]}: give one configuration, and beside maps with -c")
    config = files[0] if files else config
    if not maps and config is None:
        config = find_or_offer_config()
    options = load_config(config) if config else Config()
    defaults = {} if config else {"paths.output.dir_root": str(Path(DEFAULT_OUTPUT).absolute())}
    set_here = {key: value for key, value in given.items() if value is not None}
    options = with_overrides(options, {**defaults, **set_here})
    return options, map_paths(options) if files or not maps else maps


def _run(
    maps: Sequence[Path], config: "Config", verbose: bool, quiet: bool, debug: bool
) -> "SurveyResult":
    """Run a survey and draw its progress."""
    from rich.console import Console

    from hyperjax.products import Layout
    from hyperjax.survey import n_jobs, output_folder, planned_names, survey_result
    from hyperjax.survey import run as run_survey

    console = Console(stderr=True, quiet=quiet)
    level = logging.DEBUG if debug else logging.INFO
    out, jobs = output_folder(config), n_jobs(config)
    outcomes = run_survey(maps, config, out, jobs, level)
    names = planned_names(maps, config)
    with _log_on_terminal(console, verbose, quiet), closing(outcomes):
        done = list(_with_progress(outcomes, names, jobs, console))
    return survey_result(done, Layout.from_config(config, out))


def _with_progress(
    outcomes: "Iterable[MapOutcome]", names: Sequence[str], jobs: int, console: "Console"
) -> "Iterator[MapOutcome]":
    """Draw a bar on a terminal, which moves while JAX compiles, or write a line for each map."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], MofNCompleteColumn())
    unfinished = dict(enumerate(names))
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task(_running(unfinished, jobs), total=len(names))
        for number, outcome in enumerate(outcomes, start=1):
            del unfinished[outcome.index]
            progress.update(bar, advance=1, description=_running(unfinished, jobs))
            if len(names) > 1 and not console.is_terminal:
                console.print(f"{number}/{len(names)} {_in_words(outcome)}", markup=False)
            yield outcome


def _running(unfinished: Mapping[int, str], jobs: int) -> str:
    """Name the maps that are worked on: the first of those that are not finished."""
    from rich.markup import escape

    names = list(islice(unfinished.values(), jobs))
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return escape(", ".join(names[:2] if more else names) + more)


def _in_words(outcome: "MapOutcome") -> str:
    result = counted(outcome.n_sources, "source") if outcome.ok else "failed"
    return f"{outcome.name}: {result}, {outcome.seconds:.1f} s"


def _print_summary(result: "SurveyResult", units: "Units") -> None:
    """Print a row for each finished map: sources, noise, how it was taken, time and catalogue."""
    rows = [
        (
            outcome.name,
            str(outcome.n_sources),
            f"{units.per_jy * outcome.rms:.4g}",
            outcome.noise_model,
            f"{outcome.seconds:.1f}",
            _short(outcome.files[0]),
        )
        for outcome in result.finished
    ]
    if rows:
        rms = f"rms [{units.flux_unit}/beam]"
        _print_table(("map", "sources", rms, "noise model", "seconds", "catalogue"), rows)
    more = []
    if any(path.suffix == ".png" for outcome in result.finished for path in outcome.files):
        more.append(f"pictures: {_short(result.layout.plots)}")
    if len(rows) > 1:
        more.append(f"merged catalogue: {_short(result.merged_table)}")
    if more:
        typer.echo("\n".join(["", *more]))


def _print_profile(outcomes: "Iterable[MapOutcome]") -> None:
    """Print how long each step took, over all maps."""
    totals: dict[str, float] = {}
    for outcome in outcomes:
        for step, seconds in outcome.steps.items():
            totals[step] = totals.get(step, 0.0) + seconds
    typer.echo()
    _print_table(("step", "seconds"), [(step, f"{time:.2f}") for step, time in totals.items()])


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, numbers to the right; off a terminal as wide as they need."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in titles:
        justify = "right" if title.split()[0] in ("sources", "seconds", "rms") else "left"
        table.add_column(Text(title), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:
        console.width = _WIDE
    console.print(table)


def _print_failures(result: "SurveyResult", debug: bool) -> None:
    """Print a line for each map that failed, with its log if it has one."""
    for outcome in result.failed:
        if debug and outcome.traceback:
            typer.echo(outcome.traceback, err=True)
        log = f" (log: {_short(outcome.log)})" if outcome.log else ""
        _print_error(f"{outcome.error}{log}")


# --- plot ----------------------------------------------------------------------------------------


@app.command()
def plot(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|CONFIG.yaml",
            help="The output folder of a finished run, or its configuration.",
            show_default=False,
        ),
    ],
    ids: Annotated[
        str,
        typer.Option("--id", metavar="3,7", help="HYPER_IDs of the sources. Default: all."),
    ] = "",
    names: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME", help="Only this map (may be repeated)."),
    ] = None,
    kinds: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="What to draw, separated by commas: fitting (groups), deblended (sources), "
            "bg_separate (of runs with background.fit_gauss_and_bg_separately).",
        ),
    ] = "fitting,deblended",
    debug: Debug = False,
) -> None:
    """Draw single fits of a finished run again, from what it wrote.

    The groups of sources 3 and 7, and these sources without their neighbours:

        hyperjax plot results --id 3,7
    """
    with _errors_in_one_line(debug):
        from hyperjax.config import Config
        from hyperjax.config_io import load_config
        from hyperjax.products import Layout
        from hyperjax.singles import draw_again, finished_maps
        from hyperjax.survey import output_folder

        is_config = results.suffix.lower() in (".yaml", ".yml")
        config = load_config(results) if is_config else Config()
        layout = Layout.from_config(config, output_folder(config) if is_config else results)
        maps = names or finished_maps(layout)
        if not maps:
            raise MissingFileError(
                f"{layout.images}: no finished map there; give the output folder of a finished run"
            )
        pictures = draw_again(layout, config, maps, _numbers(ids), _kinds(kinds))
        for path in pictures:
            typer.echo(_short(path.absolute()))
        if not pictures:
            typer.echo(f"nothing to draw: no {kinds} in {', '.join(maps)}", err=True)


def _numbers(text: str) -> list[int]:
    """Numbers separated by commas."""
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise ConfigError(f"--id {text}: must be whole numbers, separated by commas") from None


def _kinds(text: str) -> list[str]:
    from hyperjax.cutouts import KINDS

    kinds = [kind.strip() for kind in text.split(",")]
    if not set(kinds) <= set(KINDS):
        raise ConfigError(f"--kind {text}: must be some of {', '.join(KINDS)}")
    return kinds


# --- completeness --------------------------------------------------------------------------------


@app.command()
def completeness(
    map: Annotated[Path, typer.Argument(metavar="MAP.fits", help="The map.", show_default=False)],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="CONFIG.yaml", help="Configuration of the run."),
    ] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", help="Number of injected sources.")] = 2000,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="The same seed gives the same result.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Folder of the results, which are in its folder completeness. "
            f"Default: that of the configuration; without one, {DEFAULT_OUTPUT}.",
        ),
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option("--sigma", "-s", metavar="N", help="Detection threshold. Default: 5."),
    ] = None,
    flux: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Range of the total fluxes, mJy. Default: 0.3 to 10 times that of a point source "
            "at the threshold.",
            show_default=False,
        ),
    ] = None,
    fwhm: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOW HIGH", help="Range of the FWHM, beam included, in beams."),
    ] = (1.0, 1.0),
    unit: Unit = None,
    beam: BeamFwhm = None,
    rms_map: RmsMap = None,
    rms_hdu: RmsHdu = None,
    rms_kind: RmsKind = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Inject sources into a map, extract it, and tell what is found and how well.

    At which flux 50 and 90 % of the sources of this map are found:

        hyperjax completeness orion.fits --sigma 4 -o results

    Written are tables of completeness, reliability, biases, scatters and pulls
    against flux and signal-to-noise ratio, the injected sources, and a figure.
    """
    given = {
        "paths.output.dir_root": str(out.absolute()) if out else None,
        "detection.sigma_thres": sigma,
        "units.map_unit": unit,
        "survey.beam_fwhm_arcsec": beam,
        "noise.rms_map": str(rms_map.absolute()) if rms_map else None,
        "noise.rms_hdu": rms_hdu,
        "noise.rms_kind": rms_kind,
    }
    with _errors_in_one_line(debug):
        from rich.console import Console

        from hyperjax.injection import completeness as of_map
        from hyperjax.injection_products import write_completeness
        from hyperjax.runtime import configure_runtime
        from hyperjax.survey import configured_map, output_folder

        options, (path,) = _inputs([map], config, given)
        console = Console(stderr=True, quiet=quiet)
        fluxes = (flux[0] / 1e3, flux[1] / 1e3) if flux else None
        with _log_on_terminal(console, verbose, quiet), _bar_of_extractions(console) as progress:
            image = configured_map(path, options)
            configure_runtime()
            result = of_map(
                image,
                options,
                n=n,
                seed=seed,
                fluxes=fluxes,
                fwhm_beams=fwhm,
                progress=progress,
            )
        files = write_completeness(result, output_folder(options))
        if not quiet:
            typer.echo(result.summary())
            typer.echo(f"\ntables and figure: {_short(files[-1].parent)}")


@contextmanager
def _bar_of_extractions(console: "Console") -> "Iterator[Callable[[int, int], None]]":
    """Draw a bar on a terminal; yield what moves it."""
    from rich.progress import Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("extractions", total=None)

        def moved(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        yield moved


# --- init ----------------------------------------------------------------------------------------


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The file to write.")] = Path(
        "hyper_config.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    debug: Debug = False,
) -> None:
    """Write a commented configuration: every key, its meaning, unit and default.

    From a new configuration to catalogues:

        hyperjax init orion.yaml
        hyperjax run orion.yaml

    In between, name the maps in it (files.file_map_name).
    """
    with _errors_in_one_line(debug):
        from hyperjax.config_io import template

        _write_text(path, template(), force)
        typer.echo(f"wrote {path}; name your maps in it and run `hyperjax run {path}`")


def _write_text(path: Path, text: str, force: bool = False) -> None:
    """Write a new text file."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{path}: exists already; give another name, or --force") from None
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


# --- simulate ------------------------------------------------------------------------------------


@app.command()
def simulate(
    context: typer.Context,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT.fits",
            help="The map; the truth is written beside it as OUT_truth.ecsv.",
            show_default=False,
        ),
    ],
    shape: Annotated[
        tuple[int, int], typer.Option(metavar="NY NX", help="Size of the map, pixels.")
    ] = (400, 400),
    n_sources: Annotated[
        int, typer.Option("--n-sources", "--sources", metavar="N", help="Number of sources.")
    ] = 100,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same map.")] = 1,
    beam_fwhm_pix: Annotated[
        float, typer.Option("--beam-fwhm-pix", metavar="PIXELS", help="FWHM of the beam, pixels.")
    ] = 4.0,
    beam_axis_ratio: Annotated[
        float, typer.Option(metavar="RATIO", help="Minor over major axis of the beam.")
    ] = 1.0,
    beam_pa_deg: Annotated[
        float, typer.Option(metavar="DEG", help="Position angle of the beam, deg East of North.")
    ] = 0.0,
    pixel_arcsec: Annotated[
        float, typer.Option(metavar="ARCSEC", help="Side of a pixel, arcsec.")
    ] = 1.0,
    frame: Annotated[
        str, typer.Option(metavar="FRAME", help="icrs, fk5, fk4 or galactic.")
    ] = "icrs",
    projection: Annotated[
        str, typer.Option(metavar="CODE", help="FITS projection: TAN, SIN, CAR ...")
    ] = "TAN",
    centre_deg: Annotated[
        tuple[float, float],
        typer.Option(metavar="LON LAT", help="Longitude and latitude of the centre, deg."),
    ] = (83.8, -5.4),
    rotation_deg: Annotated[
        float, typer.Option(metavar="DEG", help="Rotation of the map, deg (CROTA2).")
    ] = 0.0,
    unit: Annotated[
        str, typer.Option(metavar="UNIT", help="Jy/beam, Jy/pixel, MJy/sr or K.")
    ] = "Jy/beam",
    frequency_ghz: Annotated[
        float | None, typer.Option(metavar="GHZ", help="Frequency, GHz; needed for K.")
    ] = None,
    snr_range: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOW HIGH", help="Range of the peaks, in units of the rms."),
    ] = (8.0, 100.0),
    size_range: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOW HIGH", help="Range of the major FWHM, in beams."),
    ] = (1.0, 1.5),
    blend_fraction: Annotated[
        float,
        typer.Option(
            metavar="FRACTION",
            help="Part of the sources put next to another, within a beam beyond the smallest "
            "distance.",
        ),
    ] = 0.0,
    min_separation_beams: Annotated[
        float, typer.Option(metavar="BEAMS", help="Smallest distance of two sources, beam FWHM.")
    ] = 1.5,
    edge_margin_beams: Annotated[
        float, typer.Option(metavar="BEAMS", help="Smallest distance to the edge, beam FWHM.")
    ] = 2.0,
    noise: Annotated[
        str, typer.Option(metavar="KIND", help="white, beam (correlated), 1/f or none.")
    ] = "white",
    rms_mjy_beam: Annotated[float, typer.Option(metavar="MJY", help="The noise, mJy/beam.")] = 1.0,
    gradient: Annotated[
        float, typer.Option(metavar="RMS", help="Range of the background's plane, in rms.")
    ] = 4.0,
    structure: Annotated[
        float, typer.Option(metavar="RMS", help="Strength of the background's structure, in rms.")
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace existing files.")] = False,
    debug: Debug = False,
) -> None:
    """Make a map with known sources, and the table of the truth.

    A map of 200 sources, a third of them close to another:

        hyperjax simulate sky.fits --sources 200 --blend-fraction 0.33
        hyperjax run sky.fits

    The options are fields of hyperjax.Simulation, which has more of them.
    """
    with _errors_in_one_line(debug):
        import dataclasses

        from hyperjax.simulation import Simulation, write_simulation
        from hyperjax.simulation import simulate as simulate_map

        fields = {field.name for field in dataclasses.fields(Simulation)}
        chosen = {name: value for name, value in context.params.items() if name in fields}
        with _fields_as_options(chosen):
            simulated = simulate_map(Simulation(**chosen))
        map_path, truth_path = write_simulation(simulated, out, overwrite=force)
        sources = counted(len(simulated.truth), "source")
        typer.echo(f"wrote {map_path} and {truth_path} ({sources})")


@contextmanager
def _fields_as_options(fields: Collection[str]) -> Iterator[None]:
    """Name options of the command in messages that name fields of `Simulation`."""
    try:
        yield
    except ConfigError as error:
        options = {name: f"--{name.replace('_', '-')}" for name in fields if "_" in name}
        raise ConfigError(
            re.sub(r"\w+", lambda word: options.get(word[0], word[0]), str(error))
        ) from error


# --- demo ----------------------------------------------------------------------------------------


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder of everything.")
    ] = Path("hyperjax_demo"),
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Simulate a map, extract its sources, score them against the truth.

    Everything in one folder:

        hyperjax demo -o hyperjax_demo

    The pictures to look at are named at the end.
    """
    with _errors_in_one_line(debug):
        from hyperjax.config_io import config_from_dict
        from hyperjax.simulation import demo_simulation, write_simulation
        from hyperjax.simulation import simulate as simulate_map

        simulated = simulate_map(demo_simulation())
        map_path, truth_path = write_simulation(simulated, out / "demo.fits", overwrite=True)
        typer.echo(f"simulated {len(simulated.truth)} sources: {map_path}, truth: {truth_path}")
        config = config_from_dict({"paths": {"output": {"dir_root": str(out.absolute())}}})
        result = _run([map_path], config, verbose, quiet=False, debug=debug)
        _print_failures(result, debug)
        if result.finished:
            _print_summary(result, config.units)
            _print_score(result, simulated)
    raise typer.Exit(result.exit_code)


def _print_score(result: "SurveyResult", simulated: "Simulated") -> None:
    """Compare a demonstration's catalogue with the truth, in words, a table and a picture."""
    from hyperjax.evaluate import matches, score
    from hyperjax.figures import comparison, save_figure
    from hyperjax.files import atomic_path

    catalog, truth = result.outcomes[0].catalog, simulated.truth
    radius = simulated.options.beam_fwhm_arcsec / 2
    scored = score(catalog, truth, radius)
    picture = result.layout.plot("demo", "comparison")
    save_figure(comparison(catalog, truth, matches(catalog, truth, radius)), picture)
    with atomic_path(result.layout.tables / "demo_score.ecsv") as table:
        scored.table().write(table, format="ascii.ecsv")
    typer.echo("\nagainst the truth, matched within half a beam:")
    for line in scored.lines():
        typer.echo(f"  {line}")
    typer.echo(f"\nlook at {_short(result.layout.plot('demo'))} and {_short(picture)}")
