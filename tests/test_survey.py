"""Surveys: what becomes of each map, whatever happens to the others."""

import itertools
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS

from hyperjax import survey
from hyperjax.catalog import COLUMNS
from hyperjax.config import Config
from hyperjax.config_io import config_from_dict
from hyperjax.errors import BlankMapError, MissingFileError, OutputError
from hyperjax.logs import collected, counted, log_file, replay
from hyperjax.products import Layout, write_extraction
from hyperjax.survey import (
    MapOutcome,
    SurveyResult,
    distinct_maps,
    n_jobs,
    run,
    run_hyper,
    survey_result,
)


def write_map(path: Path, **cards: object) -> Path:
    """Write a map of noise, 24 x 20 pixels, in Jy/beam; a card that is None is taken out."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = "RA---TAN", "DEC--TAN"
    wcs.wcs.crval, wcs.wcs.crpix, wcs.wcs.cdelt = (83.8, -5.4), (10, 12), (-1 / 3600, 1 / 3600)
    header = wcs.to_header()
    header.update({"BMAJ": 4 / 3600, "BMIN": 4 / 3600, "BPA": 0.0, "BUNIT": "Jy/beam"})
    for key, value in cards.items():
        if value is None:
            del header[key]
        else:
            header[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(5).normal(0, 1e-3, (24, 20))
    fits.PrimaryHDU(data, header).writeto(path)
    return path


def one_source(image: Any, config: Config) -> Any:
    """Find one source at the centre of any map, in the way of `hyperjax.extract`."""
    catalog = QTable()
    for column in COLUMNS:
        value = {str: image.name, int: 1, float: 2.0}[column.dtype]
        catalog[column.name] = np.array([value]) << column.unit if column.unit else [value]
    ny, nx = image.shape
    centre = image.wcs.pixel_to_world(nx / 2, ny / 2).icrs
    catalog["RA"], catalog["DEC"] = centre.ra.reshape(1), centre.dec.reshape(1)
    catalog.meta["noise_model"] = "white"
    nothing = np.zeros(image.shape)
    return SimpleNamespace(
        map=image,
        config=config,
        catalog=catalog,
        model=nothing,
        background=nothing,
        residual=image.data,
        rms=np.full(image.shape, 1e-3),
        separate=None,
        covariances=None,
        seconds={"fit": 0.25},
    )


def without_pictures(extraction: Any, layout: Layout, *, plots: bool) -> list[Path]:
    """Write the products of a map, but draw nothing."""
    return write_extraction(extraction, layout, plots=False)


@pytest.fixture
def extract_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let surveys in this process use another extraction, and draw nothing."""
    monkeypatch.setattr(survey, "write_extraction", without_pictures)

    def use(extract: Any) -> None:
        monkeypatch.setattr(survey, "_extractor", lambda cores: extract)

    use(one_source)
    return use


def products(out: Path) -> list[str]:
    """Names of the files below a folder that are not logs."""
    files = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".log")
    return sorted(str(path.relative_to(out)) for path in files)


# --- One map -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("extract_with")
def test_good_map_gives_catalogue_files_times_and_log(tmp_path: Path) -> None:
    path = write_map(tmp_path / "orion.fits")
    (outcome,) = run([path], Config(), tmp_path / "out")
    assert outcome.ok
    assert (outcome.path, outcome.name, outcome.n_sources) == (path, "orion", 1)
    assert outcome.rms == 1e-3
    assert set(outcome.steps) == {"read", "start", "fit", "write"}
    assert outcome.seconds == sum(outcome.steps.values()) > 0.25
    assert outcome.files[0] == tmp_path / "out/params/params_orion.ecsv"
    assert all(file.is_file() for file in outcome.files)
    assert outcome.log == tmp_path / "out/logs/orion.log"
    assert "orion: 1 source (" in outcome.log.read_text()


def test_what_the_configuration_says_of_the_map_reaches_the_reader(
    tmp_path: Path, extract_with: Callable[[Any], None]
) -> None:
    path = write_map(tmp_path / "m.fits", BUNIT=None, BMAJ=None, BMIN=None)
    options = {"units": {"map_unit": "MJy/sr"}, "survey": {"beam_fwhm_arcsec": 7}}
    seen = []

    def look(image: Any, config: Config) -> Any:
        seen.append(image)
        return one_source(image, config)

    extract_with(look)
    (outcome,) = run([path], config_from_dict(options), tmp_path / "out")
    assert outcome.ok
    assert seen[0].beam.fwhm_arcsec == 7
    assert seen[0].unit == "MJy/sr"


def test_bad_map_fails_alone(tmp_path: Path, extract_with: Callable[[Any], None]) -> None:
    def refuse_bad(image: Any, config: Config) -> Any:
        if image.name == "bad":
            raise BlankMapError("bad.fits: blank")
        return one_source(image, config)

    extract_with(refuse_bad)
    maps = [write_map(tmp_path / f"{name}.fits") for name in ("a", "bad", "c")]
    outcomes = list(run(maps, Config(), tmp_path / "out"))
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert (outcomes[1].error, outcomes[1].exit_code) == ("bad.fits: blank", 3)
    assert not any("bad" in name for name in products(tmp_path / "out"))
    assert "bad.fits: blank" in (tmp_path / "out/logs/bad.log").read_text()
    merged = QTable.read(tmp_path / "out/params/params_ALL.ecsv")
    assert list(merged["MAP_ID"]) == ["a", "c"]


def test_unforeseen_exception_is_reported_with_its_log(
    tmp_path: Path, extract_with: Callable[[Any], None]
) -> None:
    def divide(image: Any, config: Config) -> Any:
        return 1 / 0

    extract_with(divide)
    (outcome,) = run([write_map(tmp_path / "m.fits")], Config(), tmp_path / "out")
    assert outcome.exit_code == 1
    assert outcome.error
    assert "ZeroDivisionError" in outcome.error
    assert outcome.log == tmp_path / "out/logs/m.log"
    assert "\n" not in outcome.error
    assert "return 1 / 0" in (outcome.traceback or "")
    assert "return 1 / 0" in (tmp_path / "out/logs/m.log").read_text()


def test_interrupt_is_not_a_failure_of_the_map(
    tmp_path: Path, extract_with: Callable[[Any], None]
) -> None:
    def interrupt(image: Any, config: Config) -> Any:
        raise KeyboardInterrupt

    extract_with(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(run([write_map(tmp_path / "m.fits")], Config(), tmp_path / "out"))


# --- Several maps --------------------------------------------------------------------------------


@pytest.mark.usefixtures("extract_with")
def test_maps_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    maps = [write_map(tmp_path / folder / "m.fits") for folder in ("red", "blue")]
    outcomes = list(run(maps, Config(), tmp_path / "out"))
    assert [outcome.name for outcome in outcomes] == ["red_m", "blue_m"]
    assert [outcome.catalog["MAP_ID"][0] for outcome in outcomes if outcome.catalog] == [
        "red_m",
        "blue_m",
    ]
    assert "params/params_red_m.ecsv" in products(tmp_path / "out")
    assert "red_m" in (tmp_path / "out/logs/hyperjax.log").read_text()


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/x/a.fits", "/x/b.fits.gz", "/x/c.fits.fz"], ["a", "b", "c"]),
        (["/x/1/a.fits", "/y/1/a.fits"], ["1_a", "y_1_a"]),
        (["/x/a.fits", "/x/a.fits.gz"], ["x_a", "a_2"]),
        (["/x/m.fits", "/y/M.fits"], ["x_m", "y_M"]),
        (["/x/b_a.fits", "/b/a.fits", "/c/a.fits"], ["b_a", "a_2", "c_a"]),
        (["/x/ALL.fits", "/x/hyperjax.fits"], ["x_ALL", "x_hyperjax"]),
        (["/a.fits", "/a.fits.gz"], ["a_2", "a_3"]),
        (["/x/a b.fits", "/x/a_b.fits"], ["x_a b", "a_b_2"]),
    ],
)
def test_names_are_unique_and_no_longer_than_needed(paths: list[str], names: list[str]) -> None:
    maps = [Path(path) for path in paths]
    assert list(survey._unique_names(maps, Config()).items()) == list(zip(maps, names, strict=True))


@pytest.mark.usefixtures("extract_with")
def test_map_given_twice_is_worked_on_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_map(tmp_path / "m.fits")
    (tmp_path / "link.fits").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    maps = ["m.fits", path, "../" + tmp_path.name + "/m.fits", "link.fits"]
    assert distinct_maps(maps) == [Path("m.fits")]
    (outcome,) = run(maps, Config(), tmp_path / "out")
    assert (outcome.path, outcome.name) == (Path("m.fits"), "m")
    log = (tmp_path / "out/logs/hyperjax.log").read_text()
    assert log.count("m.fits: given more than once, worked on once") == 1
    assert "1 map finished, 0 failed" in log


@pytest.mark.parametrize("jobs", [1, 2])
def test_nothing_is_written_if_no_map_can_be_read(tmp_path: Path, jobs: int) -> None:
    maps = [tmp_path / "missing.fits", write_map(tmp_path / "no_beam.fits", BMAJ=None)]
    outcomes = list(run(maps, Config(), tmp_path / "out", jobs))
    assert sorted(outcome.exit_code for outcome in outcomes) == [MissingFileError.exit_code, 3]
    assert [outcome.log for outcome in outcomes] == [None, None]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("extract_with")
def test_a_map_that_cannot_be_read_is_in_the_log_of_the_run_only(tmp_path: Path) -> None:
    maps = [write_map(tmp_path / "no_beam.fits", BMAJ=None), write_map(tmp_path / "m.fits")]
    failed, finished = run(maps, Config(), tmp_path / "out")
    assert (failed.log, finished.log) == (None, tmp_path / "out/logs/m.log")
    logs = sorted(path.name for path in (tmp_path / "out/logs").iterdir())
    assert logs == ["hyperjax.log", "m.log"]
    log = (tmp_path / "out/logs/hyperjax.log").read_text()
    assert "configuration: " in log
    assert f"{maps[0]}: no beam" in log
    assert "1 map finished, 1 failed" in log


@pytest.mark.parametrize(
    ("brightest", "model", "words"),
    [
        (3.21, "white", "pixel has 3.21 times the noise; lower --sigma or detection.sigma_thres"),
        (
            7.5,
            "white",
            "pixel has 7.5 times the noise but is too close to an edge (photometry.aper_",
        ),
        (7.5, "white", "(detection.roundlim, sharplim, shoulder_filter)"),
        (7.5, "correlated", "or a fit there has a total flux below that many times its error"),
    ],
)
def test_a_map_without_sources_says_what_would_have_been_one(
    tmp_path: Path, extract_with: Callable[[Any], None], brightest: float, model: str, words: str
) -> None:
    def nothing(image: Any, config: Config) -> Any:
        found = one_source(image, config)
        found.catalog = found.catalog[:0]
        found.catalog.meta["noise_model"] = model
        found.residual = np.zeros(image.shape)
        found.residual[3, 3] = brightest * 1e-3
        return found

    extract_with(nothing)
    config = config_from_dict({"units": {"convert_mJy": False}})
    (outcome,) = run([write_map(tmp_path / "m.fits")], config, tmp_path / "out")
    assert outcome.ok
    assert outcome.log is not None
    (line,) = (line for line in outcome.log.read_text().splitlines() if "WARNING" in line)
    assert "m: no source of 5 times the noise (0.005 Jy/beam) or more" in line
    assert words in line


@pytest.mark.parametrize("at", ["out", "out/params", "out/logs"])
def test_file_in_place_of_an_output_folder_is_found_first(
    tmp_path: Path, extract_with: Callable[[Any], None], at: str
) -> None:
    extract_with(None)
    (tmp_path / at).parent.mkdir(exist_ok=True)
    (tmp_path / at).touch()
    with pytest.raises(OutputError, match=str(tmp_path / at)):
        list(run([write_map(tmp_path / "m.fits")], Config(), tmp_path / "out"))


def outcome_of(index: int, exit_code: int) -> MapOutcome:
    error = "m.fits: bad" if exit_code else None
    return MapOutcome(Path("m"), "m", index, {}, error=error, exit_code=exit_code)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0], 0),
        ([0, 0], 0),
        ([0, 3], 1),
        ([2], 2),
        ([3], 3),
        ([3, 3], 3),
        ([2, 2], 2),
        ([2, 3], 3),
        ([1], 1),
    ],
)
def test_exit_code(codes: list[int], expected: int, tmp_path: Path) -> None:
    outcomes = [outcome_of(index, code) for index, code in enumerate(codes)]
    layout = Layout.from_config(Config(), tmp_path)
    result = survey_result(outcomes[::-1], layout)
    assert result.exit_code == expected
    assert [outcome.index for outcome in result.outcomes] == list(range(len(codes)))
    assert len(result.finished) + len(result.failed) == len(codes)


def test_no_map_finished_means_no_catalogue(tmp_path: Path) -> None:
    result = SurveyResult((outcome_of(0, 3),), Layout.from_config(Config(), tmp_path))
    assert result.catalog is None


def test_a_result_shows_itself_on_one_line(tmp_path: Path) -> None:
    outcomes = outcome_of(0, 3), outcome_of(1, 0), outcome_of(2, 0)
    result = SurveyResult(outcomes, Layout.from_config(Config(), tmp_path))
    where = tmp_path / "params"
    assert repr(result) == f"<SurveyResult: 2 maps finished, 1 failed, 0 sources in {where}>"


# --- run_hyper -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("extract_with")
@pytest.mark.parametrize("kind", ["path", "text", "mapping", "config", "none"])
def test_run_hyper_takes_a_file_or_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write_map(tmp_path / "maps/m.fits")
    monkeypatch.chdir(tmp_path)
    options = {
        "paths": {"input": {"dir_maps": "maps"}, "output": {"dir_root": "results"}},
        "files": {"file_map_name": "m.fits"},
    }
    file = tmp_path / ("hyper_config.yaml" if kind == "none" else "c.yaml")
    file.write_text(
        "paths: {input: {dir_maps: maps}, output: {dir_root: results}}\n"
        "files: {file_map_name: m.fits}\n"
    )
    given = {
        "path": file,
        "text": str(file),
        "mapping": options,
        "config": config_from_dict(options),
        "none": None,
    }
    result = run_hyper(given[kind])
    assert result.exit_code == 0
    assert result.catalog is not None
    assert len(result.catalog) == 1
    assert result.merged_table == tmp_path / "results/params/params_ALL.ecsv"
    assert result.merged_table.is_file()


def test_run_hyper_raises_for_a_missing_configuration(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such configuration"):
        run_hyper(tmp_path / "c.yaml")


def test_number_of_jobs_follows_the_configuration() -> None:
    assert n_jobs(config_from_dict({"control": {"n_cores": 7}})) == 7
    assert n_jobs(config_from_dict({"control": {"n_cores": 7, "parallel_maps": False}})) == 1


# --- Several processes ---------------------------------------------------------------------------


def task_named(name: str, index: int, out: Path) -> Any:
    config = Config()
    layout = Layout.from_config(config, out)
    return survey._Task(Path(f"{name}.fits"), name, index, config, layout, logging.INFO)


def die_over_b(team: Any) -> list[MapOutcome]:
    if "b" in [task.name for task in team]:
        os._exit(9)
    for task in team:
        logging.getLogger("hyperjax.test").info("%s in process %d", task.name, os.getpid())
    return [outcome_of(task.index, 0) for task in team]


def sleep(team: Any) -> list[MapOutcome]:
    (task,) = team
    (task.layout.logs.parent / f"{task.name}.{os.getpid()}").touch()
    time.sleep(120)
    return [outcome_of(task.index, 0)]


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [1, 2, 1]])
def test_dying_process_takes_one_map_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sizes: list[int]
) -> None:
    """Also where it worked on several in step."""
    tasks = iter([task_named(name, index, tmp_path) for index, name in enumerate("abcd")])
    teams = [tuple(itertools.islice(tasks, size)) for size in sizes]
    with caplog.at_level(logging.INFO, "hyperjax"):
        parts = survey._in_processes(teams, 2, die_over_b)
        outcomes = sorted(itertools.chain.from_iterable(parts), key=lambda o: o.index)
    assert [outcome.ok for outcome in outcomes] == [True, False, True, True]
    assert outcomes[1].exit_code == 1
    assert "b.fits: the process that worked on it ended" in str(outcomes[1].error)
    messages = [r.getMessage() for r in caplog.records if r.name == "hyperjax.test"]
    assert sorted(message[0] for message in messages) == ["a", "c", "d"]
    assert str(os.getpid()) not in {message.split()[-1] for message in messages}


def sleep_deaf(team: Any) -> list[MapOutcome]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return sleep(team)


def processes_in(folder: Path, n: int, timeout: float = 60) -> list[int]:
    """Wait until n processes sleep over a map; their numbers."""
    end = time.monotonic() + timeout
    while len(list(folder.glob("?.*"))) < n and time.monotonic() < end:
        time.sleep(0.05)
    return [int(path.suffix[1:]) for path in folder.glob("?.*")]


@pytest.mark.parametrize("work", [sleep, sleep_deaf])
def test_stopping_early_ends_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Any
) -> None:
    def interrupt(*args: Any, **keywords: Any) -> Any:
        assert len(processes_in(tmp_path, 2)) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(survey, "wait", interrupt)
    start = time.monotonic()
    teams = [(task_named("a", 0, tmp_path),), (task_named("b", 1, tmp_path),)]
    with pytest.raises(KeyboardInterrupt):
        next(survey._in_processes(teams, 2, work))
    assert not children_but([])
    assert time.monotonic() - start < 100


def children_but(own: list[BaseProcess]) -> set[BaseProcess]:
    """Child processes beside some, once those that have ended are known to have.

    A pool's own thread may be the one that has just waited for its process.
    """
    deadline = time.monotonic() + 10
    while (left := set(multiprocessing.active_children()) - set(own)) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    return left


def test_stopping_early_leaves_the_processes_of_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that the calling program has begun in the meantime."""
    own = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))

    def begin_own_and_interrupt(*args: Any, **keywords: Any) -> Any:
        own.start()
        raise KeyboardInterrupt

    monkeypatch.setattr(survey, "wait", begin_own_and_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(survey._in_processes([(task_named("a", 0, tmp_path),)], 1, sleep))
        assert not children_but([own])
        assert own.is_alive()
    finally:
        own.kill()
        own.join()


def sleep_over_two_maps(folder: Path) -> None:
    teams = [(task_named("a", 0, folder),), (task_named("b", 1, folder),)]
    list(survey._in_processes(teams, 2, sleep))


def test_processes_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(
        target=sleep_over_two_maps, args=(tmp_path,)
    )
    parent.start()
    children = processes_in(tmp_path, 2)
    parent.kill()
    parent.join()
    end = time.monotonic() + 30
    while any(map(is_alive, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(children) == 2
    assert not any(map(is_alive, children))


def is_alive(process: int) -> bool:
    """Whether a process runs (a dead one that nobody waits for does not)."""
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False


def test_outcomes_of_other_processes_are_put_in_order(tmp_path: Path) -> None:
    path = write_map(tmp_path / "no_beam.fits", BMAJ=None)
    maps = [tmp_path / "missing.fits", path]
    outcomes = run(maps, Config(), tmp_path / "out", jobs=2)
    result = survey_result(outcomes, Layout.from_config(Config(), tmp_path / "out"))
    assert [outcome.exit_code for outcome in result.outcomes] == [2, 3]
    assert "no_beam.fits" in (result.outcomes[1].error or "")


# --- Logs ----------------------------------------------------------------------------------------


def test_log_file_leaves_the_loggers_as_they_were(tmp_path: Path) -> None:
    library = logging.getLogger("hyperjax")
    before = (library.level, list(library.handlers))
    with log_file(tmp_path / "logs/m.log") as begin:
        logging.getLogger("hyperjax.maps").info("read")
        assert begin() == tmp_path / "logs/m.log"
        logging.getLogger("hyperjax.maps").debug("a detail")
        logging.getLogger("hyperjax.maps").info("fitted")
        assert "fitted" in (tmp_path / "logs/m.log").read_text()
    logging.getLogger("hyperjax.maps").info("later")
    lines = (tmp_path / "logs/m.log").read_text().splitlines()
    assert [line.split("INFO")[1] for line in lines] == [
        "    hyperjax.maps: read",
        "    hyperjax.maps: fitted",
    ]
    assert (library.level, library.handlers) == before


def test_a_log_that_never_begins_is_no_file(tmp_path: Path) -> None:
    with log_file(tmp_path / "logs/m.log"):
        logging.getLogger("hyperjax.maps").info("read")
    assert list(tmp_path.iterdir()) == []


def test_log_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with (
        log_file(tmp_path / "logs/m.log") as begin,
        pytest.raises(OutputError, match=r"m\.log.*-o"),
    ):
        begin()


@pytest.mark.parametrize(("number", "words"), [(0, "0 maps"), (1, "1 map"), (2, "2 maps")])
def test_things_are_counted_in_words(number: int, words: str) -> None:
    assert counted(number, "map") == words


def test_collected_records_are_handled_again_where_they_are_wanted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("hyperjax.fitting")
    with collected(logging.INFO) as records:
        log.info("fitted %d groups", 3)
        log.warning("slow")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hyperjax"):
        replay(records)
    assert [record.getMessage() for record in caplog.records] == ["slow"]
    assert [record.getMessage() for record in records] == ["fitted 3 groups", "slow"]
