import json
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import nanogpt_flower
from nanogpt_flower.settings import Settings, SettingsError, markdown_table

INFINITY = float("inf")
NAN = float("nan")


def test_pyproject_has_every_key_in_order_with_its_default_and_type(
    default_run_config: dict[str, Any],
) -> None:
    # As JSON, 1 and 1.0 are two values, and the order of the keys counts.
    assert json.dumps(Settings().to_run_config()) == json.dumps(default_run_config)


def test_the_app_has_the_version_that_pyproject_gives(app_directory: Path) -> None:
    project = tomllib.loads((app_directory / "pyproject.toml").read_text(encoding="utf-8"))
    assert nanogpt_flower.__version__ == project["project"]["version"]


def test_the_readme_shows_the_table_of_settings(app_directory: Path) -> None:
    readme = (app_directory / "README.md").read_text(encoding="utf-8")
    _, after = readme.split("<!-- settings -->\n")
    shown, _ = after.split("\n<!-- /settings -->")
    assert shown == markdown_table(), "paste the output of `python -m nanogpt_flower.settings`"


def test_the_module_prints_the_table_and_imports_no_library() -> None:
    """The settings can be read and printed where torch and Flower are not installed."""
    program = (
        "import runpy, sys; runpy.run_module('nanogpt_flower.settings', run_name='__main__'); "
        "sys.exit(' '.join(sorted({'torch', 'numpy', 'flwr', 'flower_adapter', 'gpt_core', "
        "'shakespeare_data'} & set(sys.modules))) or 0)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == markdown_table() + "\n"


def test_every_setting_is_a_row_of_the_table() -> None:
    header, _, *rows = markdown_table().splitlines()
    assert header == "| key | default | allowed | description |"
    assert [row.split(" | ")[0] for row in rows] == [
        f"| `{key}`" for key in Settings().to_run_config()
    ]
    for row in rows:
        assert len(row.split(" | ")) == 4
        assert row.endswith(". |")


def test_every_default_is_allowed(default_run_config: dict[str, Any]) -> None:
    assert Settings.from_run_config(default_run_config) == Settings()


def test_settings_survive_the_way_through_a_run_config() -> None:
    changed = Settings(n_layer=2, dropout=0.0, corpus="none", resume_from="runs/1")
    assert Settings.from_run_config(changed.to_run_config()) == changed


def test_settings_that_are_not_given_keep_their_defaults() -> None:
    assert Settings.from_run_config({"seed": 7}) == Settings(seed=7)


COUNT = "a whole number of at least 1"
COUNT_OR_ZERO = "a whole number of at least 0"
FRACTION_WITHOUT_ZERO = "a number above 0 and at most 1"
FRACTION_WITHOUT_ONE = "a number of at least 0 and less than 1"
FINITE = "a finite number of at least 0"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("num-server-rounds", 0, COUNT),
        ("num-server-rounds", 1.5, COUNT),
        ("local-epochs", 0, COUNT),
        ("local-epochs", True, COUNT),
        ("max-steps", -1, COUNT_OR_ZERO),
        ("learning-rate", 0.0, FRACTION_WITHOUT_ZERO),
        ("learning-rate", 1.1, FRACTION_WITHOUT_ZERO),
        ("learning-rate", NAN, FRACTION_WITHOUT_ZERO),
        ("schedule", "step", '"constant", "linear", "cosine" or "warmup-stable-decay"'),
        ("min-learning-rate", -0.1, "a number from 0 to 1"),
        ("schedule-rounds", -1, COUNT_OR_ZERO),
        ("warmup-steps", -1, COUNT_OR_ZERO),
        ("weight-decay", 11.0, "a number from 0 to 10"),
        ("muon-momentum", 1.0, FRACTION_WITHOUT_ONE),
        ("embedding-rate", 0.0, FRACTION_WITHOUT_ZERO),
        ("embedding-rate", 2.0, FRACTION_WITHOUT_ZERO),
        ("grad-clip", INFINITY, FINITE),
        ("windows", "all", '"random" or "disjoint"'),
        ("optimizer", "sgd", '"adamw" or "muon"'),
        ("batch-size", -4, COUNT),
        ("block-size", 0, COUNT),
        ("n-layer", 0, COUNT),
        ("n-head", 0, COUNT),
        ("n-embd", 0, COUNT),
        ("dropout", 1.0, FRACTION_WITHOUT_ONE),
        ("dropout", -0.1, FRACTION_WITHOUT_ONE),
        ("seed", -1, "a whole number from 0 to 4294967295"),
        ("seed", 2**32, "a whole number from 0 to 4294967295"),
        ("corpus", "", '"auto", "tiny-shakespeare"'),
        ("device", "", '"auto", "cpu", "cuda" or "mps"'),
        ("precision", "fp8", '"auto", "fp32" or "bf16"'),
        ("compile", "yes", '"auto", "on" or "off"'),
        ("fraction-train", 0.0, FRACTION_WITHOUT_ZERO),
        ("fraction-evaluate", 1.1, "a number of at least 0 and at most 1"),
        ("fraction-evaluate", -0.1, "a number of at least 0 and at most 1"),
        ("min-clients", 0, COUNT),
        ("min-replies", 0, COUNT),
        ("max-failed-rounds", 0, COUNT),
        ("max-weight-ratio", 1.0, "a finite number above 1"),
        ("max-weight-ratio", INFINITY, "a finite number above 1"),
        ("round-timeout", -1.0, FINITE),
        ("round-timeout", INFINITY, FINITE),
        ("outer-learning-rate", 0.0, "a number above 0 and at most 10"),
        ("outer-learning-rate", 10.1, "a number above 0 and at most 10"),
        ("outer-learning-rate", NAN, "a number above 0 and at most 10"),
        ("outer-momentum", 1.0, FRACTION_WITHOUT_ONE),
        ("outer-momentum", -0.1, FRACTION_WITHOUT_ONE),
        ("uplink", "", 'the name of a codec: "fp32", "bf16"'),
        ("uplink", 2, 'the name of a codec: "fp32", "bf16"'),
        ("downlink", "", "the name of a codec"),
        ("keep-checkpoints", 0, COUNT),
        ("resume-from", 3, "the directory of a run"),
        ("client-state", False, "a directory that can be written"),
        ("sample-tokens", -1, COUNT_OR_ZERO),
        ("sample-prompt", 1, "a text of characters that the corpus has"),
        ("temperature", -0.5, FINITE),
        ("temperature", NAN, FINITE),
        ("top-k", "many", COUNT_OR_ZERO),
        ("output-dir", "", "a directory that can be written"),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_the_allowed_values(
    key: str, value: object, allowed: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_run_config({key: value})  # type: ignore[dict-item]
    assert str(caught.value).startswith(f"{key} is {value!r}; it must be {allowed}")


@pytest.mark.parametrize("key", Settings().to_run_config())
def test_a_value_of_another_type_is_refused(key: str) -> None:
    default = Settings().to_run_config()[key]
    other = 1 if isinstance(default, str) else "1"
    with pytest.raises(SettingsError, match=f"^{key} is {other!r}; it must be "):
        Settings.from_run_config({key: other})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning-rate", 1.0),
        ("dropout", 0.0),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("fraction-evaluate", 0.0),
        ("outer-learning-rate", 10.0),
        ("max-steps", 0),
        ("temperature", 0.0),
        ("uplink", "top-k:0.05"),
        ("client-state", ""),
    ],
)
def test_a_value_at_the_end_of_its_range_is_allowed(key: str, value: Any) -> None:
    assert Settings.from_run_config({key: value}).to_run_config()[key] == value


def test_all_bad_values_and_unknown_keys_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_run_config({"batch-size": 0, "n-layers": 2, "top-k": -1})
    assert str(caught.value) == (
        "batch-size is 0; it must be a whole number of at least 1; "
        "n-layers is not a setting of this app (the nearest is n-layer); "
        "top-k is -1; it must be a whole number of at least 0"
    )


def test_one_client_alone_must_be_asked_for_in_both_settings() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_run_config({"min-clients": 1})
    assert str(caught.value) == ("min-replies is 2; it must be at most min-clients, which is 1")
    assert Settings.from_run_config({"min-clients": 1, "min-replies": 1}).min_replies == 1


def test_settings_that_contradict_each_other_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_run_config({"n-embd": 100, "min-replies": 3})
    assert str(caught.value) == (
        "n-embd is 100; it must be divisible by n-head, which is 6; "
        "min-replies is 3; it must be at most min-clients, which is 2"
    )


@pytest.mark.parametrize(
    "key", [item.name.replace("_", "-") for item in fields(Settings) if item.type is float]
)
def test_a_whole_number_becomes_a_float_where_a_float_is_expected(key: str) -> None:
    whole = {"max-weight-ratio": 2}.get(key, 1)
    if key in ("dropout", "outer-momentum", "muon-momentum", "min-learning-rate"):
        whole = 0
    value = Settings.from_run_config({key: whole}).to_run_config()[key]
    assert value == whole
    assert isinstance(value, float)
