"""The folder `configs`: examples that load, and a table of all keys with the tests of each."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from hyperjax.config import NOT_YET, all_keys
from hyperjax.config_io import OLDER_KEYS, config_from_dict, load_config
from hyperjax.errors import ConfigError
from hyperjax.maps import brightness_unit

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs"
REFUSAL = "tests/test_config.py::test_what_is_not_there_yet_is_refused_with_an_alternative"

ROW = re.compile(r"^\| `([\w.]+)` \| (.+) \| `([\w/.]+::\w+)` \|$", re.MULTILINE)
TABLE = {key: (what, test) for key, what, test in ROW.findall((CONFIGS / "README.md").read_text())}


def names_of_tests(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_has_every_key_of_both_dialects_once() -> None:
    rows = ROW.findall((CONFIGS / "README.md").read_text(encoding="utf-8"))
    assert [key for key, *_ in rows] == [*all_keys(), *OLDER_KEYS]
    for key, (what, _) in TABLE.items():
        assert what == (OLDER_KEYS.get(key) or all_keys()[key].field.description)


@pytest.mark.parametrize("key", [*all_keys(), *OLDER_KEYS])
def test_every_key_has_a_test_that_exists(key: str) -> None:
    """One that is not there yet has the test of its refusal, and no other key has that."""
    _, test = TABLE[key]
    path, name = test.split("::")
    assert name.startswith("test_")
    assert name in names_of_tests(TESTS.parent / path)
    assert (test == REFUSAL) == (key in NOT_YET)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    """One that needs what is not there yet passes as soon as it is."""
    assert f"`{path.name}`" in (CONFIGS / "README.md").read_text(encoding="utf-8")
    try:
        config = load_config(path)
    except ConfigError as error:
        if "not in this version of hyperjax" in str(error):
            pytest.xfail(str(error))
        raise
    assert config.files.file_map_name is not None or path.stem == "default"
    assert config.base_dir == CONFIGS
    if config.units.map_unit is not None:
        brightness_unit(config.units.map_unit)


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "default.yaml"}), ids=lambda p: p.stem
)
def test_every_example_explains_itself(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"hyperjax run {path.name}" in text
    assert text.count("#") > 4


@pytest.mark.parametrize("key", OLDER_KEYS)
def test_every_key_of_the_older_dialect_is_read(key: str) -> None:
    values: dict[str, Any] = {
        "paths.dir_comm": "a",
        "control.use_fixed_source_table": False,
        "control.fixed_source_table_path": "t.txt",
        "background.no_background": True,
    }
    section, name = key.split(".")
    options: dict[str, Any] = {section: {name: values[key]}}
    if key == "control.fixed_source_table_path":
        options[section]["use_fixed_source_table"] = False
    config_from_dict(options)
