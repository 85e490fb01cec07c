"""The folder `configs`: examples that load, and a table of all keys with the tests of each."""

import ast
import re
from pathlib import Path

import pytest

from hyperjax.config import Config, all_keys
from hyperjax.config_io import OLDER_KEYS, config_from_dict, load_config
from hyperjax.maps import brightness_unit

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs"

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
    _, test = TABLE[key]
    path, name = test.split("::")
    assert name.startswith("test_")
    assert name in names_of_tests(TESTS.parent / path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    assert f"`{path.name}`" in (CONFIGS / "README.md").read_text(encoding="utf-8")
    config = load_config(path)
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


OLDER = {
    "paths": {"dir_comm": "a"},
    "control": {"use_fixed_source_table": True, "fixed_source_table_path": "t.txt"},
    "detection": {"fixed_peaks": True},
    "background": {"no_background": True, "fit_gauss_and_bg_together": True},
}


@pytest.mark.parametrize("key", OLDER_KEYS)
def test_every_key_of_the_older_dialect_is_read(key: str) -> None:
    config = config_from_dict(OLDER)
    read, meant, unset = {
        "paths.dir_comm": (config.paths.output.dir_root, "a", Config().paths.output.dir_root),
        "control.use_fixed_source_table": (config.detection.use_fixed_source_table, True, False),
        "control.fixed_source_table_path": (config.detection.fixed_source_table_path, "t.txt", ""),
        "background.no_background": (config.background.fit_gauss_and_bg_together, False, True),
    }[key]
    assert read == meant != unset
