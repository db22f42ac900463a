import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import nanogpt_flower
from nanogpt_flower.settings import Settings, SettingsError


def test_the_defaults_of_pyproject_are_those_of_the_dataclass(
    default_run_config: dict[str, Any],
) -> None:
    assert Settings.from_run_config(default_run_config) == Settings()
    assert Settings().to_run_config() == default_run_config


def test_the_version_is_that_of_pyproject(app_directory: Path) -> None:
    project = tomllib.loads((app_directory / "pyproject.toml").read_text(encoding="utf-8"))
    assert nanogpt_flower.__version__ == project["project"]["version"]


@pytest.mark.parametrize("readme", ["README.md", "../../README.md"])
def test_the_readmes_list_every_key_with_its_default(app_directory: Path, readme: str) -> None:
    text = (app_directory / readme).read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([a-z-]+)` \| `([^`]*)` \|", text, flags=re.MULTILINE))
    as_toml = {
        key: f'"{value}"'.replace("\n", r"\n") if isinstance(value, str) else str(value)
        for key, value in Settings().to_run_config().items()
    }
    assert listed == as_toml


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("num-server-rounds", 0, "a whole number of at least 1"),
        ("num-server-rounds", 1.5, "a whole number of at least 1"),
        ("batch-size", -4, "a whole number of at least 1"),
        ("block-size", 0, "a whole number of at least 1"),
        ("local-epochs", True, "a whole number of at least 1"),
        ("max-steps", -1, "a whole number of at least 0"),
        ("learning-rate", 0.0, "a number above 0"),
        ("learning-rate", -0.1, "a number above 0"),
        ("learning-rate", float("nan"), "a number above 0"),
        ("dropout", 1.0, "at least 0 and less than 1"),
        ("optimizer", "sgd", '"adamw" or "muon"'),
        ("precision", "fp8", '"auto" or "fp32" or "bf16"'),
        ("compile", "yes", '"auto" or "on" or "off"'),
        ("seed", -1, "from 0 to"),
        ("fraction-train", 0.0, "above 0 and at most 1"),
        ("fraction-evaluate", 1.1, "at least 0 and at most 1"),
        ("temperature", -0.5, "a number of at least 0"),
        ("top-k", "many", "a whole number of at least 0"),
        ("corpus", "", "tiny-shakespeare"),
        ("output-dir", "", "a directory that can be written"),
        ("min-replies", 0, "a whole number of at least 1"),
        ("max-failed-rounds", 0, "a whole number of at least 1"),
        ("round-timeout", -1.0, "a number of seconds of at least 0"),
        ("round-timeout", float("inf"), "a number of seconds of at least 0"),
        ("outer-learning-rate", 0.0, "a number above 0 and at most 10"),
        ("outer-learning-rate", float("nan"), "a number above 0 and at most 10"),
        ("outer-momentum", 1.0, "a number of at least 0 and less than 1"),
        ("outer-momentum", -0.1, "a number of at least 0 and less than 1"),
        ("uplink", "3-bit", '"2-bit", "top-k" or "top-k:0.01"'),
        ("uplink", "top-k:2", '"2-bit", "top-k" or "top-k:0.01"'),
        ("downlink", "", '"2-bit", "top-k" or "top-k:0.01"'),
        ("keep-checkpoints", 0, "a whole number of at least 1"),
        ("resume-from", 3, "the directory of a run that was cut off"),
        ("client-state", False, "a directory that can be written"),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_what_is_allowed(
    default_run_config: dict[str, Any], key: str, value: object, allowed: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_run_config(default_run_config | {key: value})
    message = str(caught.value)
    assert f"{key} is {value!r}" in message
    assert allowed in message


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"batch-size is 0.*; top-k is -1"):
        Settings.from_run_config({"batch-size": 0, "top-k": -1})


def test_a_width_that_the_heads_cannot_share_is_refused() -> None:
    with pytest.raises(SettingsError, match="n-embd is 100; it must be divisible by n-head"):
        Settings.from_run_config({"n-embd": 100})


def test_a_whole_number_serves_as_a_rate() -> None:
    assert Settings.from_run_config({"learning-rate": 1, "dropout": 0}).learning_rate == 1.0


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(SettingsError, match="n-layers is no setting"):
        Settings.from_run_config({"n-layers": 2})


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4", "2-bit", "top-k:0.1"])
def test_every_codec_serves_both_ways(codec: str) -> None:
    settings = Settings.from_run_config({"uplink": codec, "downlink": codec})
    assert (settings.uplink, settings.downlink) == (codec, codec)
