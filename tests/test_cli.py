"""The command line: what users type, what they read, and the exit code that scripts see."""

import gzip
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable
from rich.console import Console
from test_survey import one_source, products, without_pictures, write_map
from typer.testing import CliRunner

import hyperjax
from hyperjax import cli, survey
from hyperjax.config import Config
from hyperjax.config_io import load_config
from hyperjax.evaluate import matches
from hyperjax.simulation import Simulation

COMMANDS = ("run", "completeness", "init", "simulate", "demo")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the processes of these tests share what JAX has compiled."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(given) if given else tmp_path_factory.mktemp("compiled")


@pytest.fixture
def here(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    compiled: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Work in an empty folder, without the user's own configuration and compiled functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    return tmp_path


@pytest.fixture
def fake_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find one source on any map, without JAX, and draw nothing."""
    monkeypatch.setattr(survey, "write_extraction", without_pictures)
    monkeypatch.setattr(survey, "_extractor", lambda cores: one_source)


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the arguments of surveys, and do nothing."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(survey.run)

    def record(*args: Any, **keywords: Any) -> Any:
        calls.append(signature.bind(*args, **keywords).arguments)
        yield from ()

    monkeypatch.setattr(survey, "run", record)
    return calls


def hyperjax_command(*args: object) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def hyperjax_process(*args: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "hyperjax", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def options_in(path: Path) -> dict[str, Any]:
    """Read the options of a configuration file."""
    return load_config(path).model_dump()


def assert_one_error(result: Any, exit_code: int, *words: str) -> None:
    """Check that a command said what is wrong, in one line, and nothing else."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


# --- Start ---------------------------------------------------------------------------------------


def test_help_needs_no_heavy_module() -> None:
    heavy = {"numpy", "scipy", "astropy", "jax", "matplotlib", "pydantic", "photutils", "regions"}
    code = "import sys, json, hyperjax, hyperjax.cli; print(json.dumps(sorted(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert heavy.isdisjoint(json.loads(loaded.stdout))


def test_help_takes_less_than_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert hyperjax_process("--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1


def test_version_and_module_entry() -> None:
    result = hyperjax_process("--version")
    assert result.returncode == 0
    assert result.stdout == f"hyperjax {hyperjax.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = hyperjax_command(command, "--help")
    assert result.exit_code == 0
    assert f"    hyperjax {command}" in result.stdout


@pytest.mark.parametrize("args", [["run", "--sigmas"], ["fly"], ["run", "m.fits", "--sigma", "x"]])
def test_usage_errors_exit_with_2(args: list[str]) -> None:
    assert hyperjax_command(*args).exit_code == 2


# --- The Python names ----------------------------------------------------------------------------

PUBLIC = {
    "Beam",
    "BlankMapError",
    "BoundedLevenbergMarquardt",
    "Completeness",
    "Config",
    "ConfigError",
    "Extraction",
    "FitInputError",
    "FitOptions",
    "FitResult",
    "GroupBatch",
    "HyperjaxError",
    "Map",
    "MapError",
    "MapTooSmallError",
    "MapUnitError",
    "MissingBeamError",
    "MissingFileError",
    "MissingWcsError",
    "NoImageError",
    "NotFitsError",
    "OutputError",
    "RmsMapError",
    "Simulation",
    "__version__",
    "completeness",
    "extract",
    "fit_groups",
    "fit_parameters",
    "fit_profiles",
    "load_config",
    "read_map",
    "run_hyper",
    "score",
    "simulate",
}


def test_exported_names() -> None:
    assert set(hyperjax.__all__) == PUBLIC
    assert PUBLIC <= set(dir(hyperjax))


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_exported_name_is_what_it_says(name: str) -> None:
    exported = getattr(hyperjax, name)
    assert exported.__name__ == name
    assert not inspect.ismodule(exported)


def test_every_exception_is_exported() -> None:
    from hyperjax import errors

    assert {name for name in vars(errors) if name.endswith("Error")} <= PUBLIC


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit_everything'"):
        hyperjax.fit_everything  # noqa: B018


# --- Maps that cannot be used --------------------------------------------------------------------


def missing(path: Path) -> None:
    """Leave the file out."""


def not_fits(path: Path) -> None:
    path.write_text("a few words about the sky\n" * 200)


def truncated(path: Path) -> None:
    write_map(path)
    path.write_bytes(path.read_bytes()[:4000])


def truncated_gzip(path: Path) -> None:
    write_map(path)
    path.write_bytes(gzip.compress(path.read_bytes())[:-900])


def no_image(path: Path) -> None:
    table = fits.BinTableHDU.from_columns([fits.Column("A", "D", array=np.ones(3))])
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path)


def no_wcs(path: Path) -> None:
    fits.PrimaryHDU(np.eye(20), fits.Header({"BMAJ": 1e-3, "BUNIT": "Jy/beam"})).writeto(path)


def no_beam(path: Path) -> None:
    write_map(path, BMAJ=None, BMIN=None)


def no_unit(path: Path) -> None:
    write_map(path, BUNIT=None)


def unknown_unit(path: Path) -> None:
    write_map(path, BUNIT="furlong")


def filled_with(value: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write_map(path)
        with fits.open(path, mode="update") as hdus:
            hdus[0].data[:] = value

    return make


BAD_MAPS = [
    (missing, 2, "no such file"),
    (not_fits, 3, "not a FITS file"),
    (truncated, 3, "cut short"),
    (truncated_gzip, 3, "cut short"),
    (no_image, 3, "no image"),
    (no_wcs, 3, "no celestial coordinates"),
    (no_beam, 3, "--beam"),
    (no_unit, 3, "--unit"),
    (unknown_unit, 3, "furlong"),
    (filled_with(np.nan), 3, "no finite pixel"),
    (filled_with(0.5), 3, "0.5 in every pixel"),
]


@pytest.mark.parametrize(("make", "exit_code", "words"), BAD_MAPS)
def test_bad_map_is_one_error_and_no_output(
    here: Path, make: Callable[[Path], None], exit_code: int, words: str
) -> None:
    make(here / "m.fits")
    result = hyperjax_command("run", "m.fits", "-o", "out")
    assert_one_error(result, exit_code, "m.fits", words)
    assert not (here / "out").exists()


def test_map_smaller_than_the_detection_filter(here: Path) -> None:
    write_map(here / "m.fits", BMAJ=60 / 3600, BMIN=60 / 3600)
    result = hyperjax_command("run", "m.fits", "-o", "out")
    assert_one_error(result, 3, "m.fits", "(log: out/logs/m.log)")
    assert products(here / "out") == []
    assert sorted(path.name for path in here.rglob("*.log")) == ["hyperjax.log", "m.log"]


@pytest.mark.usefixtures("fake_fit")
def test_good_maps_are_finished_beside_bad_ones(here: Path) -> None:
    for name in ("a", "b"):
        write_map(here / f"{name}.fits")
    no_beam(here / "bad.fits")
    result = hyperjax_command("run", "a.fits", "bad.fits", "none.fits", "b.fits", "--jobs", 1)
    assert result.exit_code == 1
    failures = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(":")[1].strip() for line in failures] == ["bad.fits", "none.fits"]
    assert "hyperjax_out/params/params_a.ecsv" in result.stdout
    assert "hyperjax_out/params/params_ALL.ecsv" in result.stdout
    merged = QTable.read(here / "hyperjax_out/params/params_ALL.ecsv")
    assert list(merged["MAP_ID"]) == ["a", "b"]


def test_debug_shows_the_traceback_before_the_line(here: Path) -> None:
    no_beam(here / "m.fits")
    result = hyperjax_command("run", "m.fits", "--debug")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: m.fits")


# --- Configurations that cannot be used ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("detection: {sigma_tres: 4}", ("detection.sigma_tres", "did you mean", "sigma_thres")),
        ("detecton: {sigma_thres: 4}", ("detecton", "did you mean")),
        ("detection: {sigma_thres: -4}", ("detection.sigma_thres", "must be a number > 0")),
        ("detection: {sigma_thres: many}", ("detection.sigma_thres", "many")),
        ("detection: [", ("line 1",)),
        ("files: {file_map_name: maps.txt}", ("maps.txt", "no such list")),
        ("{}", ("files.file_map_name", "no map is named")),
    ],
)
def test_wrong_configuration_is_one_error_and_no_output(
    here: Path, text: str, words: tuple[str, ...]
) -> None:
    (here / "c.yaml").write_text(text)
    assert_one_error(hyperjax_command("run", "c.yaml"), 2, *words)
    assert [path.name for path in here.iterdir()] == ["c.yaml"]


def test_missing_configuration(here: Path) -> None:
    assert_one_error(hyperjax_command("run", "c.yaml"), 2, "c.yaml", "no such")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--sigma", "-1", "must be a number > 0"),
        ("--jobs", "0", ">= 1"),
        ("--beam", "0", "> 0"),
        ("--survey-code", "9", "one of 1, 2, 3"),
    ],
)
def test_option_out_of_range(here: Path, option: str, value: str, words: str) -> None:
    write_map(here / "m.fits")
    assert_one_error(hyperjax_command("run", "m.fits", option, value), 2, "command line", words)


@pytest.mark.parametrize("args", [["c.yaml", "m.fits"], ["c.yaml", "-c", "d.yaml"]])
def test_configuration_stands_alone_or_behind_c(here: Path, args: list[str]) -> None:
    assert_one_error(hyperjax_command("run", *args), 2, "c.yaml", "-c")


@pytest.mark.parametrize("where", ["out", "out/params"])
def test_output_folder_that_cannot_be_made(here: Path, where: str) -> None:
    write_map(here / "m.fits")
    (here / where).parent.mkdir(exist_ok=True)
    (here / where).touch()
    assert_one_error(hyperjax_command("run", "m.fits", "-o", "out"), 2, where, "-o")
    assert products(here / "out") in ([], ["params"])


# --- What reaches the survey ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "section", "key", "value"),
    [
        (["--sigma", "4"], "detection", "sigma_thres", 4),
        (["-j", "3"], "control", "n_cores", 3),
        (["--detection-only"], "control", "detection_only", True),
        (["--unit", "MJy/sr"], "units", "map_unit", "MJy/sr"),
        (["--frequency", "230"], "units", "frequency_ghz", 230),
        (["--beam", "18.2"], "survey", "beam_fwhm_arcsec", 18.2),
        (["--survey-code", "4"], "survey", "survey_code", 4),
        (["--hdu", "2"], "files", "hdu", 2),
        (["--hdu", "SCI"], "files", "hdu", "SCI"),
    ],
)
def test_option_reaches_the_configuration(
    here: Path, surveys: list[Any], args: list[str], section: str, key: str, value: object
) -> None:
    assert hyperjax_command("run", "m.fits", *args).exit_code == 0
    assert getattr(getattr(surveys[0]["config"], section), key) == value
    assert surveys[0]["maps"] == [Path("m.fits")]


def test_jobs_of_the_command_line_go_before_a_serial_configuration(
    here: Path, surveys: list[Any]
) -> None:
    (here / "c.yaml").write_text("control: {parallel_maps: false}")
    hyperjax_command("run", "m.fits", "-c", "c.yaml")
    hyperjax_command("run", "m.fits", "-c", "c.yaml", "--jobs", 3)
    assert [call["jobs"] for call in surveys] == [1, 3]


@pytest.mark.parametrize("args", [["c/c.yaml"], ["-c", "c/c.yaml"], []])
def test_maps_and_folders_from_a_configuration(
    here: Path, surveys: list[Any], args: list[str]
) -> None:
    name = "c/c.yaml" if args else "hyper_config.yaml"
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_text(
        "files: {file_map_name: [a.fits, b.fits]}\npaths: {output: {dir_root: results}}"
    )
    assert hyperjax_command("run", *args).exit_code == 0
    folder = (here / name).parent
    assert surveys[0]["maps"] == [folder / "a.fits", folder / "b.fits"]
    assert surveys[0]["out"] == folder / "results"


def test_command_line_goes_before_the_configuration(here: Path, surveys: list[Any]) -> None:
    (here / "c.yaml").write_text(
        "detection: {sigma_thres: 7, rms_value: 1e-6}\npaths: {output: {dir_root: results}}"
    )
    hyperjax_command("run", "m.fits", "-c", "c.yaml", "-o", "elsewhere", "--sigma", 3)
    detection = surveys[0]["config"].detection
    assert (detection.sigma_thres, detection.rms_value) == (3, 1e-6)
    assert surveys[0]["out"] == here / "elsewhere"


def test_map_alone_takes_the_defaults(here: Path, surveys: list[Any]) -> None:
    (here / "hyper_config.yaml").write_text("detection: {sigma_thres: 7}")
    hyperjax_command("run", "m.fits")
    assert surveys[0]["config"].detection == Config().detection
    assert surveys[0]["out"] == here / "hyperjax_out"


def test_run_without_anything_writes_a_template(here: Path) -> None:
    assert_one_error(hyperjax_command("run"), 2, "hyper_config.yaml", "file_map_name")
    assert options_in(here / "hyper_config.yaml") == Config().model_dump()
    assert_one_error(hyperjax_command("run"), 2, "no map is named")


# --- What is shown -------------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_fit")
def test_summary_names_sources_noise_time_and_catalogue(here: Path) -> None:
    write_map(here / "orion.fits")
    result = hyperjax_command("run", "orion.fits")
    assert result.exit_code == 0
    assert result.stderr == ""
    title, row, *_ = result.stdout.splitlines()
    assert title.split() == [
        "map",
        "sources",
        "rms",
        "[mJy/beam]",
        "noise",
        "model",
        "seconds",
        "catalogue",
    ]
    assert row.split()[:4] == ["orion", "1", "1", "white"]
    assert row.split()[-1] == "hyperjax_out/params/params_orion.ecsv"


@pytest.mark.usefixtures("fake_fit")
def test_an_option_that_makes_the_fit_another_one_is_told(here: Path) -> None:
    write_map(here / "orion.fits")
    (here / "c.yaml").write_text("fit_options: {loss: cauchy}")
    (note,) = hyperjax_command("run", "orion.fits", "-c", "c.yaml").stderr.splitlines()
    assert note.startswith("note: fit_options.loss: sources are found and fitted pixel by pixel")
    assert hyperjax_command("run", "orion.fits", "-c", "c.yaml", "-q").stderr == ""
    (here / "d.yaml").write_text("fit_options: {loss: cauchy}\nnoise: {model: white}")
    assert hyperjax_command("run", "orion.fits", "-c", "d.yaml").stderr == ""


@pytest.mark.usefixtures("fake_fit")
def test_options_at_their_defaults_that_have_no_effect_are_told(here: Path) -> None:
    write_map(here / "orion.fits")
    joint = "background: {fit_gauss_and_bg_together: true, polynomial_orders: [0, 1, 2]}\n"
    (here / "c.yaml").write_text(joint)
    call = ("run", "orion.fits", "-s", 6, "-c", "c.yaml")
    (note,) = hyperjax_command(*call).stderr.splitlines()
    assert note.startswith("note: background.fit_gauss_and_bg_together and 1 more: no effect")
    assert hyperjax_command(*call, "-q").stderr == ""
    for model in ("auto", "white"):
        (here / "c.yaml").write_text(f"{joint}noise: {{model: {model}}}")
        assert hyperjax_command(*call).stderr == ""
    for path in (here / "init.yaml", here / "c.yaml"):
        hyperjax_command("init", path, "--force")
        assert hyperjax_command("run", "orion.fits", "-c", path).stderr == ""


@pytest.mark.usefixtures("fake_fit")
def test_summary_is_in_jy_where_the_catalogue_is(here: Path) -> None:
    write_map(here / "orion.fits")
    (here / "c.yaml").write_text("units: {convert_mJy: false}")
    title, row, *_ = hyperjax_command("run", "orion.fits", "-c", "c.yaml").stdout.splitlines()
    assert "rms [Jy/beam]" in title
    assert row.split()[2] == "0.001"


@pytest.mark.usefixtures("fake_fit")
def test_quiet_shows_nothing(here: Path) -> None:
    write_map(here / "m.fits")
    result = hyperjax_command("run", "m.fits", "-q")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.usefixtures("fake_fit")
def test_verbose_shows_the_log(here: Path) -> None:
    write_map(here / "m.fits")
    assert "INFO: m: 1 source (" in hyperjax_command("run", "m.fits", "-v").stderr


@pytest.mark.usefixtures("fake_fit")
def test_profile_shows_the_steps(here: Path) -> None:
    write_map(here / "m.fits")
    result = hyperjax_command("run", "m.fits", "--profile")
    steps = re.findall(r"^(\w+) +[\d.]+$", result.stdout, re.MULTILINE)
    assert steps == ["read", "start", "fit", "write"]


@pytest.mark.usefixtures("fake_fit")
def test_progress_is_one_line_for_each_map_off_a_terminal(here: Path) -> None:
    for name in ("a", "b"):
        write_map(here / f"{name}.fits")
    result = hyperjax_command("run", "a.fits", "b.fits", "-j", 1)
    assert [line.split(",")[0] for line in result.stderr.splitlines()] == [
        "1/2 a: 1 source",
        "2/2 b: 1 source",
    ]


@pytest.mark.usefixtures("fake_fit")
def test_a_map_given_twice_counts_once(here: Path) -> None:
    for name in ("a", "b"):
        write_map(here / f"{name}.fits")
    result = hyperjax_command("run", "a.fits", here / "a.fits", "b.fits", "-j", 1)
    assert result.exit_code == 0
    assert [line.split(",")[0] for line in result.stderr.splitlines()] == [
        "WARNING: a.fits: given more than once",
        "1/2 a: 1 source",
        "2/2 b: 1 source",
    ]


@pytest.mark.parametrize(
    ("names", "jobs", "shown"),
    [
        (["a", "b", "c"], 1, "a"),
        (["a", "b", "c"], 4, "a, b, c"),
        (["a", "b", "c", "d", "e"], 4, "a, b and 2 more"),
        (["[red]"], 2, r"\[red]"),
        ([], 2, ""),
    ],
)
def test_the_maps_that_are_worked_on_are_named(names: list[str], jobs: int, shown: str) -> None:
    assert cli._running(dict(enumerate(names)), jobs) == shown


def test_the_bar_names_the_map_and_moves_while_it_is_worked_on() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)

    def slowly() -> Any:
        time.sleep(0.5)
        yield survey.MapOutcome(Path("m.fits"), "m", 0, steps={})

    list(cli._with_progress(slowly(), ["m.fits"], 1, console))
    text = re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())
    assert len(set(re.findall(r"(\S) m\.fits", text))) > 2  # of the spinner
    assert "0:00:00" in text


def test_run_says_where_it_looks_for_a_configuration() -> None:
    words = " ".join(hyperjax_command("run", "--help").stdout.split())
    assert "./hyper_config.yaml, else hyper_config.yaml in the user's configuration" in words
    assert "where there is neither, ./hyper_config.yaml is written, to be edited" in words


def test_interrupt_is_a_short_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(survey, "run", interrupt)
    result = hyperjax_command("run", "m.fits")
    assert result.exit_code == cli.INTERRUPTED
    assert result.stderr == "interrupted\n"


# --- init, simulate ------------------------------------------------------------------------------


def test_init_writes_every_default_and_replaces_nothing(here: Path) -> None:
    assert hyperjax_command("init").exit_code == 0
    assert options_in(here / "hyper_config.yaml") == Config().model_dump()
    (here / "hyper_config.yaml").write_text("detection: {sigma_thres: 7}")
    assert_one_error(hyperjax_command("init"), 2, "hyper_config.yaml", "--force")
    assert load_config(here / "hyper_config.yaml").detection.sigma_thres == 7
    assert hyperjax_command("init", "--force").exit_code == 0
    assert options_in(here / "hyper_config.yaml") == Config().model_dump()


def test_init_in_a_folder_that_is_not_there(here: Path) -> None:
    assert_one_error(hyperjax_command("init", "none/c.yaml"), 2, "none/c.yaml")


def test_simulate_has_the_defaults_of_the_library() -> None:
    library = {field.name: field.default for field in fields(Simulation)}
    options = inspect.signature(cli.simulate).parameters
    shown = {name: options[name].default for name in library.keys() & options.keys()}
    assert len(shown) > 15
    assert shown == {name: library[name] for name in shown}


def test_simulate_writes_a_map_and_its_truth(here: Path) -> None:
    options = ["--shape", 60, 50, "--sources", 4, "--seed", 7, "--beam-fwhm-pix", 3]
    result = hyperjax_command("simulate", "sky.fits", *options)
    assert result.exit_code == 0
    assert result.stdout == "wrote sky.fits and sky_truth.ecsv (4 sources)\n"
    assert fits.getdata(here / "sky.fits").shape == (60, 50)
    assert len(QTable.read(here / "sky_truth.ecsv")) == 4
    again = hyperjax_command("simulate", "sky.fits", *options)
    assert_one_error(again, 2, "sky.fits", "exists", "--force")
    assert hyperjax_command("simulate", "sky.fits", *options, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--noise", "pink"], "pink"),
        (["--unit", "K"], "--frequency-ghz"),
        (["--sources", -1], "--n-sources"),
        (["--beam-fwhm-pix", 0], "--beam-fwhm-pix"),
        (
            ["--shape", 30, 30],
            "lower --n-sources, --min-separation-beams or --edge-margin-beams",
        ),
    ],
)
def test_simulation_that_makes_no_sense(here: Path, options: list[Any], words: str) -> None:
    assert_one_error(hyperjax_command("simulate", "sky.fits", *options), 2, words)
    assert list(here.iterdir()) == []


# --- The whole way, with the real fit ------------------------------------------------------------


def test_demo_finds_its_sources(here: Path) -> None:
    result = hyperjax_process("demo", cwd=here)
    assert result.returncode == 0, result.stderr
    found = re.search(r"(\d+) of (\d+) found", result.stdout)
    assert found
    assert int(found[1]) >= 0.9 * int(found[2]) > 0
    for name in re.findall(r"hyperjax_demo/\S+\.(?:png|fits|ecsv)", result.stdout):
        assert (here / name).stat().st_size > 0
    assert (here / "hyperjax_demo/plots/demo_overview.png").is_file()
    assert (here / "hyperjax_demo/plots/demo_comparison.png").is_file()


def test_a_beam_of_25_pixels_on_300(here: Path) -> None:
    beam = ["--beam-fwhm-pix", 25, "--snr-range", 20, 60, "--sources", 3]
    hyperjax_command("simulate", "m.fits", "--shape", 300, 300, *beam)
    result = hyperjax_process("run", "m.fits", cwd=here)
    assert result.returncode == 0, result.stderr
    truth = QTable.read(here / "m_truth.ecsv")
    catalog = QTable.read(here / "hyperjax_out/params/params_m.ecsv")
    assert len(matches(catalog, truth, 5.0).truth) == len(catalog) == 3


def test_two_maps_in_two_processes(here: Path) -> None:
    for seed in (1, 2):
        hyperjax_command("simulate", f"{seed}.fits", "--shape", 80, 80, "--sources", 2)
    no_beam(here / "bad.fits")
    result = hyperjax_process("run", "1.fits", "bad.fits", "2.fits", "--jobs", 2, cwd=here)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: bad.fits")
    merged = QTable.read(here / "hyperjax_out/params/params_ALL.ecsv")
    assert set(merged["MAP_ID"]) == {"1", "2"}


def test_ctrl_c_ends_all_processes(here: Path) -> None:
    for seed in (1, 2):
        hyperjax_command("simulate", f"{seed}.fits", "--shape", 300, 300, "--sources", 90)
    command = [sys.executable, "-m", "hyperjax", "run", "1.fits", "2.fits", "--jobs", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=here) as process:
        logs = here / "hyperjax_out/logs"
        while process.poll() is None and not any(logs.glob("?.log")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == cli.INTERRUPTED
        assert process.stderr
        assert process.stderr.read() == "interrupted\n"
    assert [path for path in here.rglob(".hyperjax-*")] == []
