"""The run config as one typed, validated dataclass; every key of `pyproject.toml` is here."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flower_adapter.compress import CodecError, codec

Value = bool | int | float | str


class SettingsError(ValueError):
    """Run-config values that cannot work; the message names each key, its value and what may be."""


def _key(default: Value, allowed: str, check: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"allowed": allowed, "check": check})


def _count(default: int, *, least: int = 1) -> Any:
    return _key(default, f"a whole number of at least {least}", lambda value: value >= least)


def _choice(default: str, *choices: str) -> Any:
    return _key(default, " or ".join(f'"{choice}"' for choice in choices), choices.__contains__)


def _codec(default: str) -> Any:
    def known(name: str) -> bool:
        try:
            codec(name)
        except CodecError:
            return False
        return True

    return _key(default, '"fp32", "bf16", "int8", "int4", "2-bit", "top-k" or "top-k:0.01"', known)


def _text(default: str, allowed: str, *, least: int = 1) -> Any:
    return _key(default, allowed, lambda value: len(value) >= least)


@dataclass(frozen=True)
class Settings:
    """What `flwr run --run-config` can set, in kebab case there."""

    num_server_rounds: int = _count(5)
    local_epochs: int = _count(1)
    max_steps: int = _count(50, least=0)
    learning_rate: float = _key(
        1e-3, "a number above 0 and at most 1", lambda value: 0.0 < value <= 1.0
    )
    warmup_steps: int = _count(20, least=0)
    optimizer: str = _choice("adamw", "adamw", "muon")
    batch_size: int = _count(64)
    block_size: int = _count(256)
    n_layer: int = _count(6)
    n_head: int = _count(6)
    n_embd: int = _count(384)
    dropout: float = _key(
        0.2, "a number of at least 0 and less than 1", lambda value: 0.0 <= value < 1.0
    )
    seed: int = _key(1337, "a whole number from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
    corpus: str = _text(
        "auto",
        '"auto", "tiny-shakespeare", "nine-plays", "plays", "none", or the path of a UTF-8 text',
    )
    device: str = _text("auto", '"auto", "cpu", "cuda" or "mps"')
    precision: str = _choice("auto", "auto", "fp32", "bf16")
    compile: str = _choice("auto", "auto", "on", "off")
    fraction_train: float = _key(
        1.0, "a number above 0 and at most 1", lambda value: 0.0 < value <= 1.0
    )
    fraction_evaluate: float = _key(
        1.0, "a number of at least 0 and at most 1", lambda value: 0.0 <= value <= 1.0
    )
    min_clients: int = _count(2)
    min_replies: int = _count(1)
    max_failed_rounds: int = _count(3)
    round_timeout: float = _key(
        0.0, "a number of seconds of at least 0", lambda value: 0.0 <= value < 1e9
    )
    outer_learning_rate: float = _key(
        1.0, "a number above 0 and at most 10", lambda value: 0.0 < value <= 10.0
    )
    outer_momentum: float = _key(
        0.0, "a number of at least 0 and less than 1", lambda value: 0.0 <= value < 1.0
    )
    uplink: str = _codec("fp32")
    downlink: str = _codec("fp32")
    keep_checkpoints: int = _count(3)
    resume_from: str = _text("", "the directory of a run that was cut off", least=0)
    client_state: str = _text("", "a directory that can be written", least=0)
    sample_tokens: int = _count(500, least=0)
    sample_prompt: str = _text("", "a text of characters of the vocabulary", least=0)
    temperature: float = _key(0.8, "a number of at least 0", lambda value: 0.0 <= value < 1e6)
    top_k: int = _count(0, least=0)
    output_dir: str = _text("runs", "a directory that can be written")

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Value]) -> "Settings":
        """Check every key at once.

        Raises:
            SettingsError: naming each bad key, its value and what is allowed.
        """
        values, wrong = {}, []
        known = {item.name.replace("_", "-"): item for item in fields(cls)}
        for key, value in run_config.items():
            if key not in known:
                wrong.append(f"{key} is no setting of this app")
                continue
            item = known[key]
            if item.type is float and type(value) is int:
                value = float(value)
            if type(value) is not item.type or not item.metadata["check"](value):
                wrong.append(f"{key} is {value!r}; it must be {item.metadata['allowed']}")
            values[item.name] = value
        if wrong:
            raise SettingsError("; ".join(wrong))
        settings = cls(**values)  # type: ignore[arg-type]
        if settings.n_embd % settings.n_head:
            raise SettingsError(
                f"n-embd is {settings.n_embd}; it must be divisible by n-head, which is "
                f"{settings.n_head}"
            )
        if settings.min_replies > settings.min_clients:
            raise SettingsError(
                f"min-replies is {settings.min_replies}; it must be at most min-clients, which is "
                f"{settings.min_clients}"
            )
        return settings

    def to_run_config(self) -> dict[str, Value]:
        """All settings under their run-config keys."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}
