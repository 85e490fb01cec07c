"""The configuration: defaults, both dialects of HYPER's files, and every message in one line."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from hyperjax.config import Config, Detection, all_keys
from hyperjax.config_io import (
    config_from_dict,
    find_config,
    find_or_offer_config,
    load_config,
    map_paths,
    template,
    with_overrides,
)
from hyperjax.errors import ConfigError, MissingFileError

REPOSITORY = Path(__file__).parents[1]

# HYPER's defaults, from its documentation.
HYPER: dict[str, Any] = {
    "paths": {
        "output": {"dir_table_out": "params", "dir_region_out": "regions", "dir_log_out": "logs"}
    },
    "files": {
        "file_table_base": "params",
        "file_region_base": "region_files",
        "file_log_name": "hyper_py.log",
    },
    "control": {
        "parallel_maps": True,
        "n_cores": 2,
        "detection_only": False,
        "datacube": False,
        "dir_datacube_slices": "maps",
    },
    "units": {"convert_mJy": True},
    "survey": {"survey_code": 15},
    "detection": {
        "sigma_thres": 5.0,
        "use_manual_rms": False,
        "rms_value": 1e-6,
        "kernel_size_pix": 0,
        "roundlim": [-4, 4],
        "sharplim": [-2, 2],
        "dist_limit_arcsec": 0,
        "use_fixed_source_table": False,
        "fixed_peaks": False,
        "snap_radius_pix": 1.0,
        "shoulder_filter": False,
        "shoulder_threshold": 0.5,
        "shoulder_ring_factor": 1.5,
        "shoulder_n_angles": 16,
        "shoulder_neighbor_mask": 1.0,
    },
    "photometry": {
        "aper_inf": 1.0,
        "aper_sup": 2.0,
        "fwhm_radius_ratio": 0.5,
        "fixed_radius": False,
    },
    "fit_options": {
        "fit_method": "least_squares",
        "loss": "linear",
        "f_scale": 0.1,
        "max_nfev": 50000,
        "xtol": 1e-8,
        "ftol": 1e-8,
        "gtol": 1e-8,
        "weights": "snr",
        "power_snr": 5,
        "calc_covar": False,
        "min_method": "nmse",
        "verbose": False,
        "use_l2_regularization": True,
        "lambda_l2": 1e-4,
        "vary": False,
        "bg_fitters": ["least_squares"],
        "huber_epsilons": [1.1, 1.35, 1.7, 2.0],
        "fit_aperture_sigma": 1.0,
        "spatial_weight_sigma": 1.5,
    },
    "background": {
        "fit_gauss_and_bg_separately": True,
        "pol_orders_separate": [0, 1, 2],
        "fix_min_box": 3,
        "fix_max_box": 5,
        "fit_gauss_and_bg_together": False,
        "polynomial_orders": [0],
        "pol_orders_bkg_no_sources": [0],
    },
    "fits_output": {
        "fits_fitting": False,
        "fits_deblended": False,
        "fits_bg_separate": False,
        "fits_output_dir_fitting": "fits/fitting",
        "fits_output_dir_deblended": "fits/deblended",
        "fits_output_dir_bg_separate": "fits/bg_separate",
    },
    "visualization": {
        "visualize_fitting": False,
        "visualize_deblended": False,
        "visualize_bg_separate": False,
        "output_dir_fitting": "plots/fitting",
        "output_dir_deblended": "plots/deblended",
        "output_dir_bg_separate": "plots/bg_separate",
    },
}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested options by their full path."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        leaves |= inner
    return leaves


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def models_of(section: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [f.annotation for f in section.model_fields.values()]
    below = [m for m in inner if isinstance(m, type) and issubclass(m, BaseModel)]
    return [section, *(each for m in below for each in models_of(m))]


def message_of(options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(options, "my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


def load_text(folder: Path, text: str) -> Config:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def message_of_text(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_text(folder, text)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder / "my.yaml"))
    return message.removeprefix(str(folder / "my.yaml"))


# --- Defaults and the models ---------------------------------------------------------------------


def test_defaults_are_for_the_best_science() -> None:
    config = Config()
    assert config.photometry.aper_inf == 0.5
    assert config.photometry.aper_sup == 4.0
    assert config.positions_vary
    assert config.fit_options.weights == "inverse_rms"
    assert config.fit_options.position_range_fwhm == 0.5
    assert config.fit_options.group_distance_fwhm == 2.5
    assert config.fit_options.window_fwhm == 3.0
    assert config.fit_options.sweeps == 2
    assert config.fit_options.use_l2_regularization is False
    assert config.fit_options.min_method == "bic"
    assert config.fit_options.max_nfev == 200
    assert config.fit_options.f_scale == 1.0
    assert config.background.fit_gauss_and_bg_separately is False
    assert config.background.fit_gauss_and_bg_together is True
    assert config.background.polynomial_orders == (0, 1, 2)
    assert config.noise.model == "auto"
    assert config.units.convert_mJy is True
    assert config.survey.survey_code == 15
    assert config.files.file_map_name is None


@pytest.mark.parametrize("key", flat(HYPER))
def test_a_default_that_is_not_hypers_says_why(key: str) -> None:
    differs = all_keys()[key].differs
    ours = flat(Config().model_dump(mode="json"))[key]
    if ours != flat(HYPER)[key]:
        assert differs is not None
    if differs is not None:
        hyper = list(differs.hyper) if isinstance(differs.hyper, tuple) else differs.hyper
        assert hyper == flat(HYPER)[key]
        assert len(differs.why) > 20


@pytest.mark.parametrize("key", all_keys())
def test_every_key_has_a_meaning_a_unit_and_a_valid_default(key: str) -> None:
    field = all_keys()[key].field
    assert field.description
    assert field.description.endswith(".")
    allowed = all_keys()[key].allowed
    counted_by_name = key in ("survey.survey_code", "files.hdu", "noise.rms_hdu")
    if ("number" in allowed or "integer" in allowed) and not counted_by_name:
        assert "[" in field.description, "no unit"
    default = flat(Config().model_dump())[key]
    assert config_from_dict(nested(key, default)).model_dump() == Config().model_dump()


@pytest.mark.parametrize("section", models_of(Config))
def test_every_section_is_frozen_closed_and_described(section: type[BaseModel]) -> None:
    assert section.__doc__
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == "forbid"


def test_config_is_frozen_hashable_and_survives_pickling(tmp_path: Path) -> None:
    config = load_text(tmp_path, "detection: {sigma_thres: 4}")
    with pytest.raises(ValidationError):
        config.detection = Detection()
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert hash(again) == hash(config)
    assert again.base_dir == tmp_path


# --- The template --------------------------------------------------------------------------------


def test_template_loads_back_to_the_defaults(tmp_path: Path) -> None:
    assert load_text(tmp_path, template()).model_dump() == Config().model_dump()
    assert config_from_dict(yaml.safe_load(template())) == Config()


def test_template_holds_every_key_once_with_its_comment() -> None:
    assert list(flat(yaml.safe_load(template()))) == list(flat(Config().model_dump()))
    plain = " ".join(line.strip().removeprefix("# ") for line in template().splitlines())
    for about in all_keys().values():
        assert str(about.field.description) in plain
        assert f"({about.allowed})" in plain
        if about.differs is not None:
            assert f"Why it differs: {about.differs.why}." in plain


def test_template_is_tidy() -> None:
    lines = template().splitlines()
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if line != line.rstrip()]
    assert "HYPER: 1.0. Why it differs: a bound at the true size of a point source" in template()


def test_default_yaml_in_the_repository_is_the_template() -> None:
    written = (REPOSITORY / "configs" / "default.yaml").read_text(encoding="utf-8")
    assert written == template()


# --- YAML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "detection:\n", "paths: {input: }\n"])
def test_an_empty_file_or_section_holds_the_defaults(tmp_path: Path, text: str) -> None:
    config = load_text(tmp_path, text)
    assert config.model_dump() == Config().model_dump()
    assert config.source == str(tmp_path / "my.yaml")


@pytest.mark.parametrize("number", ["1e-6", "1.e-6", "1.0E-6", "'1e-6'", "0.000001", ".1e-5"])
def test_every_spelling_of_a_number_is_a_number(tmp_path: Path, number: str) -> None:
    config = load_text(tmp_path, f"detection: {{rms_value: {number}}}")
    assert config.detection.rms_value == 1e-6


def test_numbers_and_names_are_read_as_their_key_asks(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        "fit_options: {max_nfev: 1e3, weights: null}\n"
        "survey: {survey_code: '4'}\n"
        "files: {hdu: 010, file_table_base: 2024-01-05}\n"
        "paths: {output: {dir_root: 2024_01, dir_log_out: on}}\n"
        "background: {polynomial_orders: 2}\n",
    )
    assert config.fit_options.max_nfev == 1000
    assert config.fit_options.weights == "null"
    assert config.survey.survey_code == 4
    assert config.files.hdu == 10
    assert config.files.file_table_base == "2024-01-05"
    assert config.paths.output.dir_root == "2024_01"
    assert config.paths.output.dir_log_out == "on"
    assert config.background.polynomial_orders == (2,)


def test_hdu_is_a_number_or_a_name(tmp_path: Path) -> None:
    assert load_text(tmp_path, "files: {hdu: 1}").files.hdu == 1
    assert load_text(tmp_path, "files: {hdu: SCI}").files.hdu == "SCI"
    assert load_text(tmp_path, "files: {hdu: inf}").files.hdu == "inf"
    assert load_text(tmp_path, "files: {hdu: }").files.hdu is None


@pytest.mark.parametrize(
    ("word", "value"),
    [("on", True), ("yes", True), ("True", True), ("off", False), ("NO", False), ("false", False)],
)
def test_truth_values(tmp_path: Path, word: str, value: bool) -> None:
    assert load_text(tmp_path, f"fit_options: {{vary: {word}}}").fit_options.vary is value


def test_anchors_merges_and_nulls(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        "fit_options: {xtol: &tight 1e-10, ftol: *tight}\n"
        "fits_output: &off {fits_fitting: false}\n"
        "visualization: {<<: {visualize_fitting: true}, visualize_fitting: false}\n"
        "survey: {beam_fwhm_arcsec: null}\n"
        "units: {map_unit: ~, frequency_ghz: }\n",
    )
    assert config.fit_options.xtol == config.fit_options.ftol == 1e-10
    assert config.visualization.visualize_fitting is False
    assert config.units.map_unit is None
    assert config.units.frequency_ghz is None


@pytest.mark.parametrize("tag", ["!!float 1e-6", "!!str 1e-6"])
def test_explicit_tags_change_nothing(tmp_path: Path, tag: str) -> None:
    assert load_text(tmp_path, f"detection: {{rms_value: {tag}}}").detection.rms_value == 1e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "detection:\n  sigma_thres: 4\n  rms_value: 1\n  sigma_thres: 5\n",
            ", line 4: duplicate key 'sigma_thres', first given on line 2",
        ),
        (
            "detection: {}\nsurvey: {}\ndetection: {}\n",
            ", line 3: duplicate key 'detection', first given on line 1",
        ),
        (
            "detection:\n\tsigma_thres: 4\n",
            ", line 2: while scanning for the next token, found character '\\t' that cannot start "
            "any token (indent with spaces, not with tabs)",
        ),
        (
            "detection:\n  sigma_thres: [1, 2\nsurvey: 3\n",
            ", line 3: while parsing a flow sequence, expected ',' or ']', but got ':'",
        ),
        (
            "detection:\n  sigma_thres: !!thing 4\n",
            ", line 2: could not determine a constructor for the tag 'tag:yaml.org,2002:thing'",
        ),
        ("a: 1\n---\nb: 2\n", ", line 2: expected a single document in the stream, but found"),
        ("- detection\n", ": must hold sections such as 'detection:', with keys in them"),
        ("just words\n", ": must hold sections such as 'detection:', with keys in them"),
        ("a: \x00\n", ": not a YAML text file"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, text: str, message: str) -> None:
    assert message_of_text(tmp_path, text).startswith(message)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "map.fits"
    path.write_bytes(b"SIMPLE  =                    T\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"map\.fits: not a YAML text file$"):
        load_config(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError,
        match=r"none\.yaml: no such configuration file; `hyperjax init .*none\.yaml` writes one$",
    ):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        load_config(tmp_path)


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("detection: {sigma_thres: 3}", encoding="utf-8-sig")
    assert load_config(tmp_path / "my.yaml").detection.sigma_thres == 3.0


# --- Messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("detection.sigma_thres", -3, "detection.sigma_thres = -3: must be a number > 0"),
        ("detection.sigma_thres", "0", "detection.sigma_thres = 0: must be a number > 0"),
        ("detection.sigma_thres", "abc", "detection.sigma_thres = 'abc': must be a number > 0"),
        ("detection.sigma_thres", True, "detection.sigma_thres = 'True': must be a number > 0"),
        ("detection.sigma_thres", None, "detection.sigma_thres = null: must be a number > 0"),
        ("detection.sigma_thres", "nan", "detection.sigma_thres = 'nan': must be a number > 0"),
        ("detection.rms_value", float("inf"), "detection.rms_value = inf: must be a number > 0"),
        ("control.n_cores", 0, "control.n_cores = 0: must be an integer >= 1"),
        ("control.n_cores", 1.5, "control.n_cores = 1.5: must be an integer >= 1"),
        ("fit_options.f_scale", 0, "fit_options.f_scale = 0: must be a number > 0"),
        ("fit_options.xtol", 1, "fit_options.xtol = 1: must be a number >= 0 and < 1"),
        (
            "fit_options.loss",
            "square",
            "fit_options.loss = 'square': must be one of linear, soft_l1, huber, cauchy",
        ),
        (
            "fit_options.min_method",
            "aic",
            "fit_options.min_method = 'aic': must be one of nmse, redchi, bic",
        ),
        (
            "fit_options.fit_method",
            "nelder",
            "fit_options.fit_method = 'nelder': must be least_squares",
        ),
        ("fit_options.vary", "maybe", "fit_options.vary = 'maybe': must be null or true or false"),
        (
            "survey.survey_code",
            9,
            "survey.survey_code = 9: must be one of 1, 2, 3, 4, 5, 6, 7, 8, 15",
        ),
        (
            "survey.beam_fwhm_arcsec",
            "0",
            "survey.beam_fwhm_arcsec = 0: must be null or a number > 0",
        ),
        ("noise.model", "red", "noise.model = 'red': must be one of auto, white, correlated"),
        (
            "background.polynomial_orders",
            [0, 5],
            "background.polynomial_orders = 5: must be a list of at least one item, each an "
            "integer >= 0 and <= 4",
        ),
        (
            "background.polynomial_orders",
            [],
            "background.polynomial_orders = []: must be a list of at least one item, each an "
            "integer >= 0 and <= 4",
        ),
        (
            "detection.roundlim",
            [-4, 0, 4],
            "detection.roundlim = [-4, 0, 4]: must be a list of 2 numbers, the first below the "
            "second",
        ),
        (
            "detection.roundlim",
            [4, -4],
            "detection.roundlim = [4, -4]: the first number must be below the second",
        ),
        ("files.hdu", -1, "files.hdu = -1: must be null or an integer >= 0 or text"),
        (
            "files.file_map_name",
            [],
            "files.file_map_name = []: must be null or text or a list of at least one item, each "
            "text",
        ),
        (
            "files.file_table_base",
            "a/b",
            "files.file_table_base = 'a/b': must be a name without slashes",
        ),
        ("paths.output.dir_root", "", "paths.output.dir_root = '': must be text"),
        ("paths.output", "here", "paths.output = 'here': must be a section, with keys of its own"),
        ("detection", [1], "detection = [1]: must be a section, with keys of its own"),
        (
            "photometry",
            {"aper_inf": 5},
            "photometry.aper_inf = 5: must be below aper_sup = 4",
        ),
        (
            "photometry",
            {"aper_inf": 2, "aper_sup": "2"},
            "photometry.aper_inf = 2: must be below aper_sup = 2",
        ),
        (
            "background",
            {"fix_min_box": 6},
            "background.fix_min_box = 6: must not exceed fix_max_box = 5",
        ),
    ],
)
def test_a_wrong_value_names_key_value_and_range(key: str, value: Any, message: str) -> None:
    assert message_of(nested(key, value)) == f"my.yaml: {message}"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("detection.sigma_thresh", "unknown key; did you mean detection.sigma_thres?"),
        ("photometry.sigma_thres", "unknown key; did you mean detection.sigma_thres?"),
        ("photometry.sigma_tres", "unknown key; did you mean detection.sigma_thres?"),
        ("photometry.pa_val", "unknown key; did you mean photometry.PA_val?"),
        ("paths.dir_root", "unknown key; did you mean paths.output.dir_root?"),
        ("paths.input.dir_map", "unknown key; did you mean paths.input.dir_maps?"),
        ("sigma_thres", "unknown section; did you mean detection.sigma_thres?"),
        ("detections", "unknown section; did you mean detection?"),
        ("survey.zzzz", "unknown key; `hyperjax init` writes a file with every key"),
    ],
)
def test_an_unknown_key_is_refused_with_a_guess(key: str, message: str) -> None:
    assert message_of(nested(key, 1)) == f"my.yaml: {key}: {message}"


@pytest.mark.parametrize("key", all_keys())
def test_a_bad_value_in_any_key_is_one_line_with_its_path_and_the_range(key: str) -> None:
    """A section in the place of a value is wrong for every key."""
    message = message_of(nested(key, {"no": "value"}))
    assert message.startswith(f"my.yaml: {key} = {{")
    assert message.endswith(f": must be {all_keys()[key].allowed}")


def values_out_of_range(allowed: str) -> list[Any]:
    """What the words for a range say that is not allowed."""
    wrong: list[Any] = [[[]]]
    for sign, bound in re.findall(r"(>=|>|<=|<) (-?[\d.]+)", allowed):
        step = {">=": -1, ">": 0, "<=": 1, "<": 0}[sign]
        wrong.append(float(bound) + step)
    if "one of" in allowed:
        wrong.append("none of them")
    if "true or false" in allowed:
        wrong += ["perhaps", 2]
    if "number" in allowed or "integer" in allowed:
        wrong += ["many"] if "text" not in allowed else []
    if "name" in allowed:
        wrong.append("a/b")
    return wrong


@pytest.mark.parametrize("key", all_keys())
def test_what_the_range_of_any_key_leaves_out_is_refused(key: str) -> None:
    for value in values_out_of_range(all_keys()[key].allowed):
        message = message_of(nested(key, value))
        assert message.startswith(f"my.yaml: {key} = ")
        assert ": must be " in message


def test_several_mistakes_give_one_line_that_names_them_all() -> None:
    options = {
        "detection": {"sigma_thres": -1, "roundlim": "x"},
        "files": {"hdu": []},
        "oops": 3,
    }
    assert message_of(options) == (
        "my.yaml: files.hdu = []: must be null or an integer >= 0 or text "
        "(also wrong: detection.sigma_thres, detection.roundlim, oops)"
    )


def test_the_file_and_the_key_are_named(tmp_path: Path) -> None:
    message = message_of_text(tmp_path, "detection:\n  sigma_thres: abc\n")
    assert message == ": detection.sigma_thres = 'abc': must be a number > 0"


def test_a_long_value_is_cut_short() -> None:
    for long in ("word " * 1000, "word\n" * 1000, "word" * 1000, list(range(1000))):
        message = message_of({"detection": {"sigma_thres": long}})
        assert len(message) < 120
        assert "0, 1, 2" in message or "word" in message
    assert len(message_of({"oh\nno" * 100: 1})) < 200


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary()
)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_scalars, inner)
)


def refusal(call: Callable[[], Config]) -> str | None:
    """Message of the only exception that a configuration may raise; None if it is fine."""
    try:
        call()
    except ConfigError as error:
        return str(error)
    return None


@settings(deadline=None, max_examples=200)
@given(key=st.sampled_from(sorted(all_keys()) + list(Config.model_fields)), value=_values)
def test_any_value_is_accepted_or_refused_in_one_line(key: str, value: Any) -> None:
    message = refusal(lambda: config_from_dict(nested(key, value)))
    if message is not None:
        assert len(message.splitlines()) == 1
        assert message.startswith(f"configuration: {key}")


@settings(deadline=None, max_examples=200)
@given(text=st.text("ab:-?[]{},&*!|>'\"%@`#~<0. \t\n\\\x00\x85\u2028é", max_size=30))
def test_any_text_is_accepted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    message = refusal(lambda: load_config(path))
    if message is not None:
        assert len(message.splitlines()) == 1
        assert message.startswith(str(path))


# --- Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [(None, "null"), ("null", "null"), ("snr", "snr"), ("inverse_rms", "inverse_rms")],
)
def test_no_weights_are_written_with_or_without_quotes(written: str | None, meant: str) -> None:
    assert config_from_dict({"fit_options": {"weights": written}}).fit_options.weights == meant


@pytest.mark.parametrize("weights", ["snr", "power_snr", "map", "spatial"])
def test_weights_that_vary_do_not_go_with_a_robust_loss(weights: str) -> None:
    assert message_of({"fit_options": {"weights": weights, "loss": "cauchy"}}) == (
        f"my.yaml: fit_options.weights = {weights}: does not go with loss = cauchy, which takes "
        "the pixels of large weight for outliers; use loss = linear, or weights = null, mask or "
        "inverse_rms"
    )


# --- HYPER's files -------------------------------------------------------------------------------


def test_hypers_own_defaults_load() -> None:
    config = config_from_dict(HYPER)
    assert flat(config.model_dump(mode="json")).items() >= flat(HYPER).items()


OLDER = """
paths:
  dir_comm: /data/survey
  input: {dir_maps: Maps}
  output: {dir_table_out: Params, dir_region_out: Region_files, dir_log_out: Logfile}
files: {file_map_name: list.txt, file_table_base: out, file_region_base: ell}
control:
  n_cores: 4
  datacube : false
  use_fixed_source_table: false
  fixed_source_table_path: "sources.txt"
detection:
  rms_value: 1.e-6
  fixed_peaks: false
  xcen_fix: [84.7090236, 84.7114699]
  ycen_fix: [-69.0776622, -69.0773034]
photometry: {aper_inf: 1.0, aper_sup: 2.0, fixed_radius: false, fwhm_1: [0.7], PA_val: [136.9]}
fit_options: {fit_method: leastsq, xtol: 1e-8, weights: "snr", lambda_l2: 1e-4}
background: {no_background: true, polynomial_orders: [0], fit_gauss_and_bg_separately: true}
visualization: {visualize_fitting: false, output_dir_fitting: "Plots/Fitting"}
"""


def test_the_older_dialect(tmp_path: Path) -> None:
    config = load_text(tmp_path, OLDER)
    assert config.paths.output.dir_root == "/data/survey"
    assert Path(config.paths.input.dir_maps) == Path("/data/survey/Maps")
    assert config.paths.output.dir_table_out == "Params"
    assert config.detection.use_fixed_source_table is False
    assert config.detection.fixed_source_table_path == "sources.txt"
    assert config.fit_options.fit_method == "least_squares"
    assert config.background.fit_gauss_and_bg_separately is False
    assert config.background.fit_gauss_and_bg_together is False
    assert config.background.polynomial_orders == (0,)


@pytest.mark.parametrize(
    ("paths", "maps"),
    [
        ({"dir_comm": "a"}, "a"),
        ({"dir_comm": "a", "input": None}, "a"),
        ({"dir_comm": "a", "input": {"dir_maps": "/b"}}, "/b"),
        ({"dir_comm": Path("a"), "output": {"dir_root": "a"}}, "a"),
    ],
)
def test_the_common_folder_of_the_older_dialect(paths: dict[str, Any], maps: str) -> None:
    config = config_from_dict({"paths": paths})
    assert Path(config.paths.input.dir_maps) == Path(maps)
    assert config.paths.output.dir_root == "a"


def test_no_background_true_is_no_polynomial_at_all() -> None:
    config = config_from_dict(
        {"background": {"no_background": True, "fit_gauss_and_bg_together": True}}
    )
    assert not config.background.fit_gauss_and_bg_together
    assert not config.background.fit_gauss_and_bg_separately


def test_no_background_false_leaves_the_background_as_it_is() -> None:
    config = config_from_dict({"background": {"no_background": "no"}})
    assert config.model_dump() == Config().model_dump()


def test_translation_leaves_the_given_options_alone() -> None:
    options = {"paths": {"dir_comm": "a", "input": {"dir_maps": "b"}}, "control": {"n_cores": 1}}
    before = repr(options)
    config_from_dict(options)
    assert repr(options) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"paths": {"dir_comm": "a", "output": {"dir_root": "b"}}},
            "paths.dir_comm: older name of paths.output.dir_root, which is given too; keep that "
            "one",
        ),
        ({"paths": {"dir_comm": 3}}, "paths.dir_comm = 3: must be text"),
        (
            {"paths": {"dir_comm": "a", "output": [1]}},
            "paths.output = [1]: must be a section, with keys of its own",
        ),
        (
            {"control": {"use_fixed_source_table": "maybe"}},
            "control.use_fixed_source_table = 'maybe': must be true or false",
        ),
        (
            {"control": {"channels": [2, 5]}},
            "control.channels = [2, 5]: only cubes have channels; set control.datacube = True, or "
            "leave it out",
        ),
        (
            {"background": {"no_background": "maybe"}},
            "background.no_background = 'maybe': must be true or false",
        ),
        (
            {"control": {"use_fixed_source_table": True}},
            "detection.fixed_source_table_path = null: must be the path of a table where "
            "detection.use_fixed_source_table is true",
        ),
    ],
)
def test_mistakes_in_the_older_dialect(options: dict[str, Any], message: str) -> None:
    assert message_of(options) == f"my.yaml: {message}"


# --- Overrides -----------------------------------------------------------------------------------


def test_overrides_replace_only_what_they_name(tmp_path: Path) -> None:
    config = load_text(tmp_path, "detection: {sigma_thres: 4, snap_radius_pix: 0}")
    changed = with_overrides(
        config,
        {"detection.sigma_thres": "3.5", "paths.output.dir_root": "/out", "files.hdu": 2},
    )
    assert changed.detection.sigma_thres == 3.5
    assert changed.detection.snap_radius_pix == 0.0
    assert changed.paths.output.dir_root == "/out"
    assert changed.files.hdu == 2
    assert changed.base_dir == tmp_path
    assert changed.source == config.source
    assert config.detection.sigma_thres == 4.0
    assert with_overrides(config, {}) == config


def test_overrides_keep_what_the_file_switched_off() -> None:
    config = config_from_dict({"photometry": {"fixed_radius": False, "fwhm_1": [0.7]}})
    assert with_overrides(config, {"detection.sigma_thres": 4}).photometry.fwhm_1 == (0.7,)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"detection.sigma_thres": 0}, "detection.sigma_thres = 0: must be a number > 0"),
        (
            {"detection.sigma": 4},
            "detection.sigma: unknown key; did you mean detection.sigma_thres?",
        ),
        (
            {"detection.sigma_thres.x": 4},
            "detection.sigma_thres = {'x': 4}: must be a number > 0",
        ),
        ({"photometry.aper_sup": 0.2}, "photometry.aper_inf = 0.5: must be below aper_sup = 0.2"),
    ],
)
def test_overrides_are_checked(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(Config(), overrides)
    assert str(caught.value) == f"command line: {message}"


# --- Finding the configuration and the maps ------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Give an empty current folder and an empty folder of the user's own configuration."""
    here, user = tmp_path / "here", tmp_path / "user"
    here.mkdir()
    user.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: user / name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(user))
    return here, user / "hyperjax"


def test_lookup_order(folders: tuple[Path, Path]) -> None:
    here, user = folders
    assert find_config() is None
    theirs = user.parent / "hyper-py" / "hyper_config.yaml"
    theirs.parent.mkdir()
    theirs.write_text("")
    assert find_config() == theirs
    assert load_config(theirs).base_dir == here
    user.mkdir()
    (user / "hyper_config.yaml").write_text("")
    assert find_config() == user / "hyper_config.yaml"
    (here / "hyper_config.yaml").write_text("")
    assert find_config() == Path("hyper_config.yaml")
    assert find_config("other.yaml") == Path("other.yaml")
    assert find_config("~/x.yaml") == Path.home() / "x.yaml"


def test_where_there_is_no_configuration_one_is_written(folders: tuple[Path, Path]) -> None:
    here, _ = folders
    with pytest.raises(ConfigError, match=r"wrote hyper_config\.yaml; name your maps in it"):
        find_or_offer_config()
    assert (here / "hyper_config.yaml").read_text(encoding="utf-8") == template()
    assert find_or_offer_config() == Path("hyper_config.yaml")
    assert find_or_offer_config("other.yaml") == Path("other.yaml")


def test_a_configuration_that_cannot_be_written(folders: tuple[Path, Path]) -> None:
    here, _ = folders
    (here / "hyper_config.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"none can be written \("):
        find_or_offer_config()


def test_relative_paths_are_relative_to_the_files_own_folder(folders: tuple[Path, Path]) -> None:
    here, user = folders
    (here / "sub").mkdir()
    (here / "sub" / "my.yaml").write_text("files: {file_map_name: m.fits}")
    config = load_config("sub/my.yaml")
    assert config.base_dir == here / "sub"
    assert config.resolve("output") == here / "sub" / "output"
    assert config.resolve("/output") == Path("/output")
    assert config.resolve("~/output") == Path.home() / "output"
    assert map_paths(config) == [here / "sub" / "m.fits"]
    assert Config().base_dir == here
    user.mkdir()
    (user / "hyper_config.yaml").write_text("")
    assert load_config(user / "hyper_config.yaml").base_dir == here


def test_maps_by_name_list_and_file(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    (maps / "list.txt").write_text(
        "# the survey\nb.fits\n\n  c d#1.fits  # the second\n/e/f.fits\n", encoding="utf-8-sig"
    )
    expected = [maps / "b.fits", maps / "c d#1.fits", Path("/e/f.fits")]
    head = "paths: {input: {dir_maps: maps}}\nfiles: {file_map_name: "
    assert map_paths(load_text(tmp_path, head + "a.fits}")) == [maps / "a.fits"]
    assert map_paths(load_text(tmp_path, head + "list.txt}")) == expected
    assert map_paths(load_text(tmp_path, head + "[a.fits, list.txt]}")) == [
        maps / "a.fits",
        *expected,
    ]


def test_a_list_of_maps_may_be_beside_the_configuration(tmp_path: Path) -> None:
    """One in the folder of the maps goes before it; the names are in that folder either way."""
    maps = tmp_path / "maps"
    maps.mkdir()
    text = "paths: {input: {dir_maps: maps}}\nfiles: {file_map_name: list.txt}"
    (tmp_path / "list.txt").write_text("a.fits\n")
    assert map_paths(load_text(tmp_path, text)) == [maps / "a.fits"]
    (maps / "list.txt").write_text("b.fits\n")
    assert map_paths(load_text(tmp_path, text)) == [maps / "b.fits"]


def test_a_folder_stands_for_the_maps_in_it(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    (maps / "more").mkdir(parents=True)
    for name in ("b.fits", "a.FITS.gz", "c.fts.fz", "notes.txt", ".hidden.fits", "more/d.fit"):
        (maps / name).touch()
    head = "paths: {input: {dir_maps: maps}}\nfiles: {file_map_name: "
    here = [maps / "a.FITS.gz", maps / "b.fits", maps / "c.fts.fz"]
    assert map_paths(load_text(tmp_path, head + ".}")) == here
    assert map_paths(load_text(tmp_path, head + "more}")) == [maps / "more/d.fit"]
    assert map_paths(load_text(tmp_path, head + "[more, e.fits, .]}")) == [
        maps / "more/d.fit",
        maps / "e.fits",
        *here,
    ]
    (maps / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: no FITS file"):
        map_paths(load_text(tmp_path, head + "empty}"))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("null", ConfigError, "my.yaml: files.file_map_name: no map is named; set it, or give"),
        ("none.txt", MissingFileError, "none.txt: no such list of maps"),
        ("empty.txt", ConfigError, "empty.txt: the list of maps is empty"),
        ("binary.txt", ConfigError, "binary.txt: the list of maps cannot be read: not a text file"),
    ],
)
def test_no_maps(tmp_path: Path, name: str, kind: type[Exception], message: str) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(kind) as caught:
        map_paths(load_text(tmp_path, f"files: {{file_map_name: {name}}}"))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
