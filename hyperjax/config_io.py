"""Configurations as files: YAML in both dialects of HYPER's, maps, and a commented template.

YAML is read as text and each value is then read as the type of its key. So ``1e-6`` is a number,
``2024_01`` can be a folder, and ``yes`` is true only where true or false is asked for. What is
wrong is told in one line.
"""

import difflib
import functools
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from hyperjax.config import (
    Config,
    Key,
    all_keys,
    cut,
    expand_home,
    shown,
    submodel,
)
from hyperjax.errors import ConfigError, MissingFileError

__all__ = [
    "CONFIG_NAME",
    "OLDER_KEYS",
    "config_from_dict",
    "find_config",
    "find_or_offer_config",
    "load_config",
    "map_paths",
    "template",
    "with_overrides",
]

CONFIG_NAME = "hyper_config.yaml"

_MAP = re.compile(r"^[^.].*\.(fits|fit|fts)(\.(gz|fz))?$", re.IGNORECASE)


# --- Errors in one line --------------------------------------------------------------------------

_NOT_A_SECTION = "must be a section, with keys of its own"


def _guess(unknown: str) -> str:
    """Tell which key or section an unknown one may have been meant for."""
    section, _, name = unknown.rpartition(".")
    homonyms = [key for key in all_keys() if key.rpartition(".")[2] == name]
    siblings = [key for key in all_keys() if key.startswith(f"{section}.")]
    sections = list(Config.model_fields) if not section else []
    for choices in (homonyms, sections, siblings, list(all_keys())):
        names = {key.rpartition(".")[2]: key for key in choices}
        close = difflib.get_close_matches(name, names, n=1)
        if close:
            return f"did you mean {names[close[0]]}?"
    return "`hyperjax init` writes a file with every key"


def _key_at(location: tuple[int | str, ...]) -> str:
    """Full path of the key that an error of pydantic belongs to, without what is inside it."""
    parents = [".".join(map(str, location[:n])) for n in range(len(location) + 1)]
    return next((parent for parent in parents if parent in all_keys()), cut(parents[-1]))


def _problem(error: Mapping[str, Any]) -> str:
    """One error of pydantic, in the words of the configuration."""
    key = _key_at(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown {'key' if '.' in key else 'section'}; {_guess(key)}"
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        if key in all_keys():
            return f"{key} = {shown(error['input'])}: {reason}"
        return f"{key}.{reason}".lstrip(".")
    if key in all_keys():
        return f"{key} = {shown(error['input'])}: must be {all_keys()[key].allowed}"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} = {shown(error['input'])}: {_NOT_A_SECTION}"
    return f"{key}: {error['msg']}"


def _one_line(error: ValidationError) -> str:
    """Tell the first problem in full, and the keys of the others."""
    problems: dict[str, Any] = {}
    for each in error.errors():
        problems.setdefault(_key_at(each["loc"]), each)
    others = list(problems)[1:]
    also = f" (also wrong: {', '.join(others)})" if others else ""
    return _problem(next(iter(problems.values()))) + also


# --- HYPER's older dialect -----------------------------------------------------------------------

OLDER_KEYS = {
    "paths.dir_comm": "The folder of maps and results: paths.output.dir_root, and what "
    "paths.input.dir_maps is relative to.",
    "control.use_fixed_source_table": "Older name of detection.use_fixed_source_table.",
    "control.fixed_source_table_path": "Older name of detection.fixed_source_table_path.",
    "background.no_background": "If true: neither background.fit_gauss_and_bg_separately nor "
    "fit_gauss_and_bg_together.",
}
"""Keys of HYPER's older files and what they mean; `config_from_dict` translates them."""


def _moved(tree: dict[str, Any], old: str, new: str, value: object) -> None:
    """Give a setting of the older dialect its present place."""
    *sections, name = new.split(".")
    for depth, section in enumerate(sections, 1):
        inner = tree.get(section) or {}
        if not isinstance(inner, Mapping):
            raise ValueError(f"{'.'.join(sections[:depth])} = {shown(inner)}: {_NOT_A_SECTION}")
        tree[section] = tree = dict(inner)
    if name in tree and tree[name] != value:
        raise ValueError(f"{old}: older name of {new}, which is given too; keep that one")
    tree[name] = value


def _taken(tree: dict[str, Any], section: str, name: str) -> Any:
    """Take a key out of a section; None where it is not given."""
    keys = tree.get(section)
    if not isinstance(keys, Mapping) or name not in keys:
        return None
    tree[section] = {key: value for key, value in keys.items() if key != name}
    return keys[name]


def _with_common_folder(tree: dict[str, Any], folder: object) -> None:
    """Translate paths.dir_comm: the maps' folder is inside it, and so are all results."""
    if not isinstance(folder, str | Path):
        raise ValueError(f"paths.dir_comm = {shown(folder)}: must be text")
    maps = _taken(tree["paths"], "input", "dir_maps") or "."
    _moved(tree, "paths.dir_comm", "paths.output.dir_root", str(folder))
    _moved(tree, "paths.dir_comm", "paths.input.dir_maps", str(Path(folder) / str(maps)))


def _truth(key: str, value: object) -> bool:
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError(f"{key} = {shown(value)}: must be true or false") from None


def _present_dialect(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Translate what HYPER's older files say differently; ValueError where it is contradictory."""
    tree = dict(raw)
    folder = _taken(tree, "paths", "dir_comm")
    if folder is not None:
        _with_common_folder(tree, folder)
    for name in ("use_fixed_source_table", "fixed_source_table_path"):
        value = _taken(tree, "control", name)
        if value is not None:
            key = f"control.{name}"
            meant = _truth(key, value) if name == "use_fixed_source_table" else value
            _moved(tree, key, f"detection.{name}", meant)
    none = _taken(tree, "background", "no_background")
    if none is not None and _truth("background.no_background", none):
        off = {"fit_gauss_and_bg_separately": False, "fit_gauss_and_bg_together": False}
        tree["background"] = tree["background"] | off
    options = tree.get("fit_options")
    if isinstance(options, Mapping) and options.get("fit_method") == "leastsq":
        tree["fit_options"] = {**options, "fit_method": "least_squares"}
    return tree


# --- Reading -------------------------------------------------------------------------------------


class _TextLoader(yaml.SafeLoader):
    """YAML with plain values left as text (but null), which refuses duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                problem = f"duplicate key {key.value!r}, first given on line {lines[key.value]}"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
        return node

    def construct_text(self, node: Any) -> Any:
        return self.construct_scalar(node)


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in ("bool", "int", "float", "binary", "timestamp"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _TextLoader.construct_text)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Where a YAML file is wrong and why, on one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return ": not a YAML text file"
    reason = ", ".join(part for part in (error.context, error.problem) if part)
    hint = " (indent with spaces, not with tabs)" if "'\\t'" in reason else ""
    return f", line {error.problem_mark.line + 1}: {reason}{hint}"


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_TextLoader)
    except FileNotFoundError:
        raise MissingFileError(
            f"{path}: no such configuration file; `hyperjax init {path}` writes one"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a YAML text file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_problem(error)}") from None


def config_from_dict(
    options: Mapping[str, Any] | None,
    source: str = "configuration",
    base_dir: Path | None = None,
) -> Config:
    """Check nested options, of either dialect of HYPER's, and make them a `Config`.

    Parameters
    ----------
    options
        Sections of keys, as in the YAML file; what is absent takes its default.
    source
        What error messages name as the origin.
    base_dir
        Folder that relative paths are relative to; the current one if None.

    Raises
    ------
    ConfigError
        In one line: the source, the key's full path, what is wrong and what is allowed.
    """
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise ConfigError(f"{source}: must hold sections such as 'detection:', with keys in them")
    try:
        config = Config.model_validate(_present_dialect(options))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from None
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    config._source = source
    config._base_dir = base_dir
    return config


def load_config(path: str | Path) -> Config:
    """Read a YAML configuration, of either dialect of HYPER's; an empty file holds the defaults.

    Relative paths in it are relative to its folder; in the user's own configuration, which serves
    all projects, to the current folder.

    Raises
    ------
    MissingFileError
        There is no such file.
    ConfigError
        In one line: the file, the line or the key's full path, what is wrong, what is allowed.
    """
    path = expand_home(path)
    own = path.absolute() in _user_configs()
    raw = _read_yaml(path)
    return config_from_dict(raw, str(path), None if own else path.absolute().parent)


def _user_configs() -> list[Path]:
    """The user's own configuration, and that which hyper_py keeps."""
    hyper_py = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hyper-py"
    return [platformdirs.user_config_path("hyperjax") / CONFIG_NAME, hyper_py / CONFIG_NAME]


def find_config(argument: str | Path | None = None) -> Path | None:
    """Find the configuration: the argument, else ./hyper_config.yaml, else the user's own.

    The argument is returned whether the file exists or not; None where nothing is found. The
    user's own is in the folder of hyperjax (`platformdirs.user_config_path`), else in hyper_py's.
    """
    if argument is not None:
        return expand_home(argument)
    candidates = (Path(CONFIG_NAME), *_user_configs())
    return next((path for path in candidates if path.is_file()), None)


def find_or_offer_config(argument: str | Path | None = None) -> Path:
    """Find the configuration as `find_config`; where there is none, write one to be edited.

    Raises
    ------
    ConfigError
        There was none: says that ./hyper_config.yaml was written, or why it was not.
    """
    found = find_config(argument)
    if found is not None:
        return found
    path = Path(CONFIG_NAME)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template())
    except OSError as error:
        raise ConfigError(
            f"{path}: no configuration is here, and none can be written ({error.strerror})"
        ) from None
    raise ConfigError(
        f"no map and no configuration given: wrote {path}; name your maps in it "
        "(files.file_map_name) and run `hyperjax run` again, or try `hyperjax run MAP.fits`"
    )


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options with those of `top` in place of those of `base`."""
    both = {
        key: _merged(base[key], top[key])
        for key in base.keys() & top.keys()
        if isinstance(base[key], Mapping) and isinstance(top[key], Mapping)
    }
    return {**base, **top, **both}


def with_overrides(
    config: Config, overrides: Mapping[str, Any], source: str = "command line"
) -> Config:
    """Copy a configuration with some options replaced, all of it checked again.

    Parameters
    ----------
    config
        What to start from; its `base_dir` and `source` are kept.
    overrides
        New values by full path, such as ``{"detection.sigma_thres": 4.0}``. A relative path is
        relative to `config.base_dir`: make one that a user typed absolute.
    source
        What error messages name as the origin of the overrides.

    Raises
    ------
    ConfigError
        As `config_from_dict`.
    """
    options: dict[str, Any] = config.model_dump(exclude_unset=True)
    for key, value in overrides.items():
        branch = functools.reduce(lambda inner, name: {name: inner}, key.split(".")[::-1], value)
        options = _merged(options, branch)
    changed = config_from_dict(options, source, config._base_dir)
    changed._source = config.source
    return changed


# --- The maps ------------------------------------------------------------------------------------


def _names_in(path: Path) -> list[str]:
    """Names in a list of maps: one per line, without comments."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such list of maps") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"{path}: the list of maps cannot be read: {reason}") from None
    names = [re.split(r"(?:^|\s)#", line)[0].strip() for line in lines]
    if not any(names):
        raise ConfigError(f"{path}: the list of maps is empty")
    return [name for name in names if name]


def map_paths(config: Config) -> list[Path]:
    """Find the maps that a configuration names, in its order, as absolute paths.

    A name that ends in .txt stands for the names in that file, which is looked for in
    paths.input.dir_maps and then in the folder of the configuration; a folder for all FITS files in
    it, sorted by name. Whether the maps exist is not checked.

    Raises
    ------
    ConfigError
        No map is named, a list is empty or not text, or a folder has no map.
    MissingFileError
        A list of maps is not there.
    """
    names = config.files.file_map_name
    if names is None:
        raise ConfigError(
            f"{config.source}: files.file_map_name: no map is named; set it, or give the maps on "
            "the command line"
        )
    folder = config.resolve(config.paths.input.dir_maps)
    found: list[Path] = []
    for name in (names,) if isinstance(names, str) else names:
        path = folder / expand_home(name)
        if path.suffix.lower() == ".txt":
            beside = config.resolve(name)
            listed = _names_in(beside if beside.is_file() and not path.exists() else path)
            found += [folder / expand_home(each) for each in listed]
        else:
            found += _maps_in(path) if path.is_dir() else [path]
    return found


def _maps_in(folder: Path) -> list[Path]:
    """FITS files of a folder, not those of the folders in it."""
    maps = sorted(path for path in folder.iterdir() if _MAP.search(path.name) and path.is_file())
    if not maps:
        raise ConfigError(f"{folder}: no FITS file (.fits, .fit, .fts, also .gz or .fz) is in it")
    return maps


# --- The template --------------------------------------------------------------------------------

_HEADING = """\
The configuration of hyperjax: every key, with its default.

Every key may be left out, and so may every section. The comments say what a key means, its
unit in [brackets], its default and (what is allowed). Sections and keys are HYPER's, whose own
files are read too; where a default differs from HYPER's, the comment says why.
"""


def _yaml_value(value: object) -> str:
    """Write a value on one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=math.inf).split("\n")[0]


def _comment(text: str, indent: int) -> list[str]:
    prefix = " " * indent + "# "
    return textwrap.wrap(
        text,
        98,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _key_lines(path: str, key: Key, indent: int) -> list[str]:
    """Lines of the template for one key: meaning, default and range, differences, the value."""
    default = _yaml_value(key.default)
    lines = _comment(str(key.field.description), indent)
    lines += _comment(f"Default: {default} ({key.allowed})", indent)
    if key.differs is not None:
        hyper = _yaml_value(key.differs.hyper)
        lines += _comment(f"HYPER: {hyper}. Why it differs: {key.differs.why}.", indent)
    return [*lines, f"{' ' * indent}{key.name}: {default}"]


def _section_lines(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Lines of the template for the keys of a section, and the sections in it."""
    indent = 2 * prefix.count(".")
    for name, field in section.model_fields.items():
        inner = submodel(field)
        if inner is None:
            yield from _key_lines(prefix + name, Key(section, name, field), indent)
        else:
            if not prefix:
                yield ""
            yield from _comment(str(inner.__doc__), indent)
            yield f"{' ' * indent}{name}:"
            yield from _section_lines(inner, f"{prefix}{name}.")


def template() -> str:
    """Write a commented YAML configuration with every key at its default.

    Generated from the models; reading it gives ``Config()``.
    """
    heading = [f"# {line}".rstrip() for line in _HEADING.splitlines()]
    return "\n".join([*heading, *_section_lines(Config)]) + "\n"
