"""Many maps with one configuration: read, extract, write, and go on whatever happens to one map.

The failure of a map is data, not an exception: every map gives a `MapOutcome`. Maps run in this
process or, with more than one job, each in a process of a few that are kept, one map at a time, so
that a process that dies takes one map with it. Channels of a cube are worked on several at a time,
in step (`hyperjax.lockstep`), for their fits to share batches.
"""

import functools
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain, count, groupby
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from astropy.table import QTable

from hyperjax.catalog import merge_catalogs
from hyperjax.config import Config
from hyperjax.config_io import config_from_dict, find_or_offer_config, load_config, map_paths
from hyperjax.cubes import channel_name, cube_at, read_channel, slice_name, write_cube, write_slice
from hyperjax.errors import HyperjaxError, MapError, OutputError
from hyperjax.files import remove_temporaries
from hyperjax.forced import given_sources
from hyperjax.lockstep import in_step
from hyperjax.logs import collected, counted, log_file, replay, timed
from hyperjax.maps import Map, map_name, read_map
from hyperjax.products import MERGED, Layout, copy_as_merged, write_extraction, write_merged
from hyperjax.runtime import configure_runtime, usable_cores
from hyperjax.singles import folders, stem_without_spaces, write_singles

if TYPE_CHECKING:
    from hyperjax.pipeline import Extraction

__all__ = [
    "MapOutcome",
    "SurveyResult",
    "configured_map",
    "distinct_maps",
    "n_jobs",
    "output_folder",
    "planned_names",
    "run",
    "run_hyper",
    "survey_result",
]

logger = logging.getLogger(__name__)

SOME_FAILED = 1
"""Exit code where some of several maps failed, and that of errors that nobody foresaw."""

_IN_STEP, _PIXELS_IN_STEP = 16, 4_000_000  # channels, and their pixels, at most
_LAST_SECONDS = 2.0  # that a process has to clean up when it is told to end


@dataclass(frozen=True, eq=False)
class MapOutcome:
    """What became of one map.

    Attributes
    ----------
    path : Path
        The map.
    name : str
        Its name in the products: the file's, made unique among the maps of the survey.
    index : int
        Its place among the maps of the survey.
    steps : dict of str to float
        Wall-clock time of each step, seconds.
    catalog : QTable or None
        The sources; None if the map failed.
    rms : float
        Median noise, Jy/beam; NaN if the map failed.
    files : tuple of Path
        What was written, the ECSV table first.
    log : Path or None
        The map's log; None if there is none, as the map could not be read and the error says why.
    error : str or None
        Why the map failed, in one line.
    traceback : str or None
        Where it failed.
    exit_code : int
        Exit code of the command line for that error; 0 if there is none.
    """

    path: Path
    name: str
    index: int
    steps: dict[str, float]
    catalog: QTable | None = field(default=None, repr=False)
    rms: float = np.nan
    files: tuple[Path, ...] = ()
    log: Path | None = None
    error: str | None = None
    traceback: str | None = field(default=None, repr=False)
    exit_code: int = 0

    @property
    def ok(self) -> bool:
        """Whether the map was finished."""
        return self.error is None

    @property
    def noise_model(self) -> str:
        """What the noise was taken for, "correlated" or "white"; "" if the map failed."""
        return "" if self.catalog is None else self.catalog.meta["noise_model"]

    @property
    def n_sources(self) -> int:
        """Number of catalogued sources."""
        return 0 if self.catalog is None else len(self.catalog)

    @property
    def seconds(self) -> float:
        """Wall-clock time of all steps."""
        return sum(self.steps.values())


@dataclass(frozen=True, eq=False)
class SurveyResult:
    """What became of all maps.

    Attributes
    ----------
    outcomes : tuple of MapOutcome
        In the order in which the maps were given.
    layout : Layout
        Where the files are.
    """

    outcomes: tuple[MapOutcome, ...]
    layout: Layout

    def __repr__(self) -> str:
        """How many maps and sources, and where, on one line."""
        sources = counted(sum(outcome.n_sources for outcome in self.outcomes), "source")
        return f"<SurveyResult: {self.summary}, {sources} in {self.layout.tables}>"

    @property
    def summary(self) -> str:
        """How many maps were finished, and how many failed."""
        return f"{counted(len(self.finished), 'map')} finished, {len(self.failed)} failed"

    @property
    def finished(self) -> list[MapOutcome]:
        """Outcomes of the maps that were finished."""
        return [outcome for outcome in self.outcomes if outcome.ok]

    @property
    def failed(self) -> list[MapOutcome]:
        """Outcomes of the maps that failed."""
        return [outcome for outcome in self.outcomes if not outcome.ok]

    @property
    def catalog(self) -> QTable | None:
        """Sources of all finished maps; None if there is no such map."""
        catalogs = [outcome.catalog for outcome in self.outcomes if outcome.catalog is not None]
        return merge_catalogs(catalogs) if catalogs else None

    @property
    def merged_table(self) -> Path:
        """The merged catalogue, ECSV; it is written if at least one map was finished."""
        return self.layout.table(MERGED)

    @property
    def exit_code(self) -> int:
        """0 if no map failed, 1 if some did; if all did, the code they share, else 3."""
        codes = {outcome.exit_code for outcome in self.failed}
        if not codes:
            return 0
        if self.finished:
            return SOME_FAILED
        return codes.pop() if len(codes) == 1 else MapError.exit_code


@dataclass(frozen=True)
class _Task:
    """One map to be worked on, in this process or in another."""

    path: Path
    name: str
    index: int
    config: Config
    layout: Layout
    log_level: int
    cores: int | None = None  # that the fit may use; all of them if None
    channel: int | None = None  # of a cube, from 1


# --- The survey ----------------------------------------------------------------------------------


def run_hyper(config: str | Path | Mapping[str, Any] | Config | None = None) -> SurveyResult:
    """Extract the sources of all maps that a configuration names, and write the products.

    Parameters
    ----------
    config : path-like, mapping, Config or None
        The YAML file, its content as nested dictionaries, or the options themselves. If None it
        is ./hyper_config.yaml, else the user's own (`hyperjax.config_io.find_config`); where there
        is none ./hyper_config.yaml is written, to be edited, and the `ConfigError` says so.

    Returns
    -------
    SurveyResult
        The catalogues, and the errors of maps that failed.

    Raises
    ------
    HyperjaxError
        The configuration is wrong, or the results cannot be written. The failure of a map is not
        an exception but one of the outcomes.

    Notes
    -----
    Several maps run in processes of their own (``control.parallel_maps``, ``control.n_cores``),
    which import the calling script afresh: call this inside ``if __name__ == "__main__":``.
    """
    if isinstance(config, Mapping):
        config = config_from_dict(config)
    elif not isinstance(config, Config):
        config = load_config(find_or_offer_config(config))
    out = output_folder(config)
    outcomes = run(map_paths(config), config, out, n_jobs(config))
    return survey_result(outcomes, Layout.from_config(config, out))


def n_jobs(config: Config) -> int:
    """Return how many maps a configuration wants to be worked on at the same time."""
    return config.control.n_cores if config.control.parallel_maps else 1


def output_folder(config: Config) -> Path:
    """Return the folder of all results that a configuration names."""
    return config.resolve(config.paths.output.dir_root)


def survey_result(outcomes: Iterable[MapOutcome], layout: Layout) -> SurveyResult:
    """Put the outcomes of a survey in the order of its maps."""
    return SurveyResult(tuple(sorted(outcomes, key=lambda outcome: outcome.index)), layout)


def run(
    maps: Sequence[str | Path],
    config: Config,
    out: str | Path,
    jobs: int = 1,
    log_level: int = logging.INFO,
) -> Generator[MapOutcome, None, None]:
    """Work on maps, yield the outcome of each when it is finished, then write the merged tables.

    Parameters
    ----------
    maps : sequence of path-like
        FITS files. A file that is given twice is worked on once, as `distinct_maps` has it.
    config : Config
        The options for all maps.
    out : path-like
        The output folder; `hyperjax.products` says what is in it. Nothing is written if no map
        can be read.
    jobs : int
        How many maps are worked on at the same time; 1 works in this process.
    log_level : int
        Lowest level of the records in the logs.

    Yields
    ------
    MapOutcome
        In the order in which maps are finished; `survey_result` puts them in the order given.

    Raises
    ------
    MissingFileError, ConfigError
        The table of given sources is not there, or is none.
    OutputError
        The results cannot be written; found before the work begins where it can be.
    """
    given_sources(config)
    layout = Layout.from_config(config, Path(out).absolute())
    _refuse_unwritable(layout)
    planned = _planned(maps, config)
    workers = min(jobs, len(planned))
    cores = max(1, usable_cores() // workers) if workers > 1 else None
    tasks = [
        _Task(each.path, each.name, index, config, layout, log_level, cores, each.channel)
        for index, each in enumerate(planned)
    ]
    with log_file(layout.logs / config.files.file_log_name, names=(__name__,)) as begin_log:
        _log_what_was_asked(maps, tasks, config)
        outcomes = []
        teams = _teams(tasks, workers)
        working = map(_run_team, teams) if workers == 1 else _in_processes(teams, workers)
        for outcome in chain.from_iterable(working):
            if outcome.log is not None:
                begin_log()
            outcomes.append(outcome)
            yield outcome
        _write_all(survey_result(outcomes, layout))
        if config.control.datacube:
            _write_cubes(tasks, outcomes)


_Team = tuple[_Task, ...]


def _teams(tasks: Sequence[_Task], workers: int) -> list[_Team]:
    """Divide the work: each map alone, and channels of a cube together, for all workers."""
    teams: list[_Team] = []
    for (path, is_channel), own in groupby(tasks, lambda t: (t.path, t.channel is not None)):
        alike, size = tuple(own), 1
        cube = cube_at(path, alike[0].config.files.hdu) if is_channel else None
        if cube is not None:
            room = max(_PIXELS_IN_STEP // cube.pixels, 1)
            size = min(_IN_STEP, room, -(-len(alike) // workers))
        teams += [alike[first : first + size] for first in range(0, len(alike), size)]
    return teams


class _Planned(NamedTuple):
    """A map, or a channel of a cube, and its name in the products."""

    path: Path
    name: str
    channel: int | None = None


def _planned(maps: Sequence[str | Path], config: Config) -> list[_Planned]:
    """Each map once, and each channel of cubes."""
    out: list[_Planned] = []
    for path, name in _unique_names(distinct_maps(maps), config).items():
        cube = cube_at(path, config.files.hdu) if config.control.datacube else None
        if cube is None:
            out.append(_Planned(path, name))
            continue
        chosen = cube.chosen(config.control.channels)
        out += [_Planned(path, channel_name(name, channel), channel) for channel in chosen]
    return out


def planned_names(maps: Sequence[str | Path], config: Config) -> list[str]:
    """Return the names of the files, and channels, in the order in which they are worked on."""
    return [
        each.path.name if each.channel is None else each.name for each in _planned(maps, config)
    ]


def _slice_file(task: _Task) -> Path:
    """The file of the background of a channel."""
    folder = task.layout.root / task.config.control.dir_datacube_slices
    return folder / slice_name(task.name)


def _write_cubes(tasks: Sequence[_Task], outcomes: Sequence[MapOutcome]) -> None:
    """Write the backgrounds of the channels of each cube as one cube."""
    finished = {outcome.index for outcome in outcomes if outcome.ok}
    for path in dict.fromkeys(task.path for task in tasks if task.channel is not None):
        own = [task for task in tasks if task.path == path and task.channel is not None]
        slices = {
            int(task.channel or 0): _slice_file(task) for task in own if task.index in finished
        }
        cube = cube_at(path, own[0].config.files.hdu)
        if cube is not None and slices:
            name = own[0].name.removesuffix(channel_name("", int(own[0].channel or 0)))
            target = write_cube(cube, slices, own[0].layout.image(name, "background_cube"))
            logger.info("%s: %d channels, backgrounds in %s", path, len(slices), target)


def _write_all(result: SurveyResult) -> None:
    """Write the merged tables of the maps that were finished."""
    finished, catalog = result.finished, result.catalog
    if len(finished) == 1:
        copy_as_merged(result.layout, finished[0].name)
    elif catalog is not None:
        write_merged(catalog, result.layout)
    logger.info("%s", result.summary)


def _refuse_unwritable(layout: Layout) -> None:
    """Refuse output folders that cannot be made or written to, without making them."""
    for folder in (layout.tables, layout.regions, layout.logs, layout.images, layout.plots):
        nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not nearest.is_dir():
            raise OutputError(
                f"{nearest}: a file is in the place of an output folder; remove it, or choose "
                "another folder with -o or paths.output.dir_root"
            )
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(
                f"{nearest}: this output folder cannot be written to; choose another with -o or "
                "paths.output.dir_root"
            )


def distinct_maps(maps: Sequence[str | Path]) -> list[Path]:
    """Return each map once, as it was first given, whichever way other paths lead to its file."""
    first: dict[Path, Path] = {}
    for path in map(Path, maps):
        first.setdefault(path.resolve(), path)
    return list(first.values())


def _log_what_was_asked(maps: Sequence[str | Path], tasks: Sequence[_Task], config: Config) -> None:
    """Log what a run begins with: options, and maps that are not done or not named as expected."""
    logger.info("hyperjax %s, configuration: %s", version("hyperjax"), config.source)
    logger.info("options that were set: %s", config.model_dump(exclude_unset=True))
    times = Counter(Path(path).resolve() for path in maps)
    for task in tasks:
        if times[task.path.resolve()] > 1 and task.channel in (None, tasks[0].channel):
            logger.warning("%s: given more than once, worked on once", task.path)
        if task.channel is None and task.name != map_name(task.path):
            logger.info("%s: its products are named %s", task.path, task.name)


def _unique_names(maps: Sequence[Path], config: Config) -> dict[Path, str]:
    """Name the products of each map so that no two, whatever the case of letters, are the same.

    A map's name is that of its file; where it is taken its folders are put before it, then a
    number after it.
    """
    shared = Counter(_alike(map_name(path)) for path in maps)
    taken = {_alike(MERGED), _alike(Path(config.files.file_log_name).stem)}
    names: dict[Path, str] = {}
    for path in maps:
        alone = shared[_alike(map_name(path))] == 1
        names[path] = next(
            name for name in _candidates(path.absolute(), alone) if _alike(name) not in taken
        )
        taken.add(_alike(names[path]))
    return names


def _alike(name: str) -> str:
    """What two names share whose products would have the same files."""
    return stem_without_spaces(name).casefold()


def _candidates(path: Path, alone: bool) -> Iterator[str]:
    """Yield names for a map, from the simplest: the file's alone, with folders, with a number."""
    plain, folders = map_name(path), path.parts[1:-1]
    if alone:
        yield plain
    for first in reversed(range(len(folders))):
        yield "_".join([*folders[first:], plain])
    yield from (f"{plain}_{number}" for number in count(2))


# --- One map -------------------------------------------------------------------------------------


def _run_team(team: _Team) -> Iterator[MapOutcome]:
    """Work on one map, or on several in step."""
    if len(team) == 1:
        yield _run_map(team[0])
    else:
        yield from in_step([functools.partial(_run_in_step, task) for task in team])


def _run_in_step(task: _Task) -> MapOutcome:
    """Work on one map in a thread of its own, of which it logs."""
    return _run_map(task, threading.get_ident())


def _run_map(task: _Task, thread: int | None = None) -> MapOutcome:
    """Read, extract and write one map; whatever goes wrong becomes its outcome.

    A map that cannot be read leaves no log: its error says all that there is to say.
    """
    outcome = _begun(task)
    try:
        log = log_file(task.layout.log(task.name), task.log_level, thread=thread)
        with log as begin_log:
            return _logged(outcome, task, begin_log)
    except OutputError as error:  # of the log itself
        return _failed(outcome, error)


def _begun(task: _Task) -> MapOutcome:
    return MapOutcome(task.path, task.name, task.index, steps={})


def _logged(outcome: MapOutcome, task: _Task, begin_log: Callable[[], Path]) -> MapOutcome:
    """Work on a map and log what became of it.

    This is the one place where exceptions that nobody foresaw are caught: a defect that one map
    uncovers must not cost the others their results.
    """
    logger.info("%s: hyperjax %s", task.path, version("hyperjax"))
    try:
        with timed(outcome.steps, "read", task.name):
            image = replace(_read(task), name=task.name)
        outcome = replace(outcome, log=begin_log())
        outcome = _extracted(outcome, image, task)
    except HyperjaxError as error:
        outcome = _failed(outcome, error)
        logger.error("%s", outcome.error)
    except Exception as error:
        outcome = _failed(replace(outcome, log=begin_log()), error)
        logger.exception("%s", outcome.error)
    else:
        _log_success(outcome)
    return outcome


def _log_success(outcome: MapOutcome) -> None:
    steps = ", ".join(f"{step} {seconds:.2f} s" for step, seconds in outcome.steps.items())
    logger.info("%s: %s (%s)", outcome.name, counted(outcome.n_sources, "source"), steps)


def _extracted(outcome: MapOutcome, image: Map, task: _Task) -> MapOutcome:
    """Extract the sources of a map and write the products; the steps are timed."""
    steps = outcome.steps
    with timed(steps, "start", task.name):
        extract = _extractor(task.cores)
    logger.info("%s, threshold %g", image, task.config.detection.sigma_thres)
    extraction = extract(image, task.config)
    steps.update(extraction.seconds)
    if len(extraction.catalog) == 0:
        logger.warning("%s", _why_empty(extraction))
    singles: list[Path] = []
    if any(folders(task.config, task.layout.root)):
        with timed(steps, "single fits", task.name):
            cores = task.cores or usable_cores()
            singles = write_singles(extraction, task.layout.root, cores)
    with timed(steps, "write", task.name):
        overview = task.config.visualization.visualize_overview
        files = (*write_extraction(extraction, task.layout, plots=overview), *singles)
        if task.channel is not None:
            files = (*files, write_slice(extraction, _slice_file(task)))
    rms = float(np.nanmedian(extraction.rms))
    return replace(outcome, catalog=extraction.catalog, rms=rms, files=files)


def _why_empty(extraction: "Extraction") -> str:
    """What a source must have had, what the map has, and which options to change, in one line."""
    options, units = extraction.config.detection, extraction.config.units
    noise = float(np.nanmedian(extraction.rms))
    brightest = float(np.nanmax(extraction.residual)) / noise  # of the filtered map: no source
    threshold = f"{units.per_jy * options.sigma_thres * noise:.3g} {units.flux_unit}/beam"
    below = brightest < options.sigma_thres
    return (
        f"{extraction.map.name}: no source of {options.sigma_thres:g} times the noise "
        f"({threshold}) or more; the brightest pixel has {brightest:.3g} times the noise"
        + (
            "; lower --sigma or detection.sigma_thres to find fainter ones"
            if below
            else _DROPPED[extraction.catalog.meta["noise_model"]]
        )
    )


_DROPPED = {
    "correlated": " but is too close to an edge (photometry.aper_inf), or a fit there has a total "
    "flux below that many times its error",
    "white": " but is too close to an edge (photometry.aper_inf) or has not the shape of a source "
    "(detection.roundlim, sharplim, shoulder_filter)",
}
"""Why a bright pixel may be no source, by what the noise was taken for."""


def _read(task: _Task) -> Map:
    if task.channel is not None:
        return read_channel(task.path, task.channel, task.config)
    return configured_map(task.path, task.config)


def configured_map(path: str | Path, config: Config) -> Map:
    """Read a map as a configuration says: which extension, unit, beam and frequency."""
    return read_map(
        path,
        hdu=config.files.hdu,
        unit=config.units.map_unit,
        beam_fwhm_arcsec=config.survey.beam_fwhm_arcsec,
        survey_code=config.survey.survey_code,
        frequency_ghz=config.units.frequency_ghz,
    )


@functools.cache
def _extractor(cores: int | None) -> "Callable[[Map, Config], Extraction]":
    """Import the pipeline, and JAX with it, where a map is to be worked on and only there."""
    configure_runtime(cores)

    from hyperjax.pipeline import extract

    return extract


def _failed(outcome: MapOutcome, error: BaseException) -> MapOutcome:
    """Make an exception the outcome of a map."""
    foreseen = isinstance(error, HyperjaxError)
    return replace(
        outcome,
        error=str(error) if foreseen else _unforeseen(outcome, error),
        traceback="".join(traceback.format_exception(error)),
        exit_code=error.exit_code if isinstance(error, HyperjaxError) else SOME_FAILED,
    )


def _unforeseen(outcome: MapOutcome, error: BaseException) -> str:
    """One line on an exception that is no fault of the user's."""
    if isinstance(error, BrokenProcessPool | SystemExit):
        return (
            f"{outcome.path}: the process that worked on it ended (killed, or out of memory?); "
            "try again with --jobs 1"
        )
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{outcome.path}: unexpected {what}; please report it, with its log"


# --- Several processes ---------------------------------------------------------------------------

_Work = Callable[[_Team], Iterable[MapOutcome]]
_Report = tuple[list[MapOutcome], list[logging.LogRecord]]


def _in_processes(
    teams: Iterable[_Team], workers: int, work: _Work = _run_team
) -> Iterator[list[MapOutcome]]:
    """Work on maps in several new processes, one map, or some in step, at a time in each.

    Every process has a pool of its own: if it dies, the map that it takes with it is known, and the
    others are not disturbed; of maps in step each is tried again alone. Processes are spawned, not
    forked, for JAX and its threads do not survive a fork. If the caller stops early, they are told
    to end.
    """
    waiting = deque(teams)
    idle = [_new_process() for _ in range(workers)]
    running: dict[Future[_Report], tuple[_Team, ProcessPoolExecutor]] = {}
    children: set[BaseProcess] = set()
    try:
        while waiting or running:
            while waiting and idle:
                team, process = waiting.popleft(), idle.pop()
                with _interrupts_held():
                    others = set(multiprocessing.active_children())
                    running[process.submit(_report, work, team)] = team, process
                    children |= set(multiprocessing.active_children()) - others
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                team, process = running.pop(future)
                idle.append(_usable(process, future))
                if len(team) > 1 and future.exception() is not None:
                    waiting.extendleft((task,) for task in reversed(team))
                else:
                    yield _reported(future, team)
    finally:
        interrupted = {child for child in children if child.is_alive()} if running else set()
        _end([*idle, *(process for _, process in running.values())], interrupted)


def _end(processes: Iterable[ProcessPoolExecutor], interrupted: Set[BaseProcess]) -> None:
    """End processes that are idle; those that work get a moment to remove temporary files.

    The threads that watch them are waited for: Python's own end would wake them while they close.
    """
    for child in interrupted:
        child.terminate()
    for child in interrupted:
        child.join(_LAST_SECONDS)
        child.kill()
        child.join()
    for process in processes:
        process.shutdown(cancel_futures=True)


def _new_process() -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin_process)


def _usable(process: ProcessPoolExecutor, future: "Future[_Report]") -> ProcessPoolExecutor:
    """Return the process that gave a result, or a new one if it died over it."""
    if not isinstance(future.exception(), BrokenProcessPool):
        return process
    process.shutdown()
    return _new_process()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait while a process starts, which inherits that and so leaves it to this one."""
    if threading.current_thread() is not threading.main_thread():  # it sets no signal handlers
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if held:
        signal.raise_signal(signal.SIGINT)


def _begin_process() -> None:
    """When told to end, do so with the temporary files removed; do not outlive the parent."""
    signal.signal(signal.SIGTERM, _end_process)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.captureWarnings(True)


def _end_process(number: int, frame: FrameType | None) -> NoReturn:
    """End at once: an exception would be raised inside the compiler, which crashes over it."""
    remove_temporaries()
    os._exit(128 + number)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        remove_temporaries()
        os._exit(1)  # the queues of the pool keep it waiting for work otherwise


def _report(work: _Work, team: _Team) -> _Report:
    """Work on maps, and keep what is logged for the process that asked."""
    with collected(logging.INFO) as records:
        outcomes = list(work(team))
    return outcomes, records


def _reported(future: "Future[_Report]", team: _Team) -> list[MapOutcome]:
    """Take over the outcomes of maps, and their log records, from another process."""
    error = future.exception()
    if error is not None:
        (task,) = team
        log = task.layout.log(task.name)
        begun = replace(_begun(task), log=log if log.is_file() else None)
        outcome = _failed(begun, error)
        logger.error("%s", outcome.error)
        return [outcome]
    outcomes, records = future.result()
    replay(records)
    return outcomes
