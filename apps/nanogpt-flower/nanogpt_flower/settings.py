"""The settings of a run, with their keys, defaults, ranges and descriptions.

Flower also needs the keys and the defaults in `pyproject.toml`. A test checks that
`pyproject.toml` agrees with this module. `python -m nanogpt_flower.settings` prints all settings as
a table. The README of the app shows this table.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any

Value = bool | int | float | str


class SettingsError(ValueError):
    """The error for settings that cannot work. The message names them and what is allowed."""


def _setting(
    default: Value, description: str, allowed: str, is_allowed: Callable[[Any], bool]
) -> Any:
    metadata = {"description": description, "allowed": allowed, "is_allowed": is_allowed}
    return field(default=default, metadata=metadata)


def _whole_number(default: int, description: str, *, least: int) -> Any:
    allowed = f"a whole number of at least {least}"
    return _setting(default, description, allowed, lambda value: value >= least)


def _below_one(default: float, description: str) -> Any:
    allowed = "a number of at least 0 and less than 1"
    return _setting(default, description, allowed, lambda value: 0.0 <= value < 1.0)


def _finite(default: float, description: str) -> Any:
    allowed = "a finite number of at least 0"
    return _setting(default, description, allowed, lambda value: isfinite(value) and value >= 0.0)


def _choice(default: str, description: str, *choices: str) -> Any:
    *others, last = [f'"{choice}"' for choice in choices]
    allowed = f"{', '.join(others)} or {last}"
    return _setting(default, description, allowed, choices.__contains__)


def _text(default: str, description: str, allowed: str, *, may_be_empty: bool = False) -> Any:
    return _setting(default, description, allowed, lambda value: may_be_empty or value != "")


@dataclass(frozen=True)
class Settings:
    """The settings of a run. Each field is a key of `--run-config`, with `_` in place of `-`."""

    num_server_rounds: int = _whole_number(
        5, "Number of rounds of training and averaging.", least=1
    )
    local_epochs: int = _whole_number(
        1,
        "Number of passes that a client makes over its text in each round. The client stops "
        "earlier if it reaches `max-steps`.",
        least=1,
    )
    max_steps: int = _whole_number(
        50,
        "Largest number of optimizer steps of a client in each round. 0 means no limit.",
        least=0,
    )
    learning_rate: float = _setting(
        1e-3,
        "Highest learning rate of the clients' optimizer.",
        "a number above 0 and at most 1",
        lambda value: 0.0 < value <= 1.0,
    )
    schedule: str = _choice(
        "constant",
        "Course of the learning rate after the warm-up. It follows the steps of all rounds: "
        '"linear" and "cosine" fall to `min-learning-rate` at the end of the last round, and '
        '"warmup-stable-decay" falls during the last fifth of the steps.',
        "constant",
        "linear",
        "cosine",
        "warmup-stable-decay",
    )
    min_learning_rate: float = _setting(
        0.0,
        "Learning rate at the end of the schedule. It must be at most `learning-rate`.",
        "a number from 0 to 1",
        lambda value: 0.0 <= value <= 1.0,
    )
    schedule_rounds: int = _whole_number(
        0,
        "Number of rounds that the schedule lasts. 0 means all rounds of the run. A resumed run "
        "keeps the number of rounds with which it started.",
        least=0,
    )
    warmup_steps: int = _whole_number(
        20,
        "Number of steps in which a client's learning rate rises from 0 to `learning-rate`. "
        "A client does this warm-up only once. It can take more than one round.",
        least=0,
    )
    optimizer: str = _choice(
        "adamw",
        'Optimizer of the clients. With "muon", Muon trains the hidden matrices and AdamW trains '
        "all other parameters. A client keeps the optimizer's state between rounds.",
        "adamw",
        "muon",
    )
    weight_decay: float = _setting(
        0.1,
        "Weight decay of the matrices, in units of the learning rate. With AdamW it also applies "
        "to the embeddings.",
        "a number from 0 to 10",
        lambda value: 0.0 <= value <= 10.0,
    )
    muon_momentum: float = _below_one(
        0.95,
        "Momentum of Muon.",
    )
    embedding_rate: float = _setting(
        1.0,
        "Learning rate of the parameters that AdamW trains beside Muon, as a multiple of "
        "`learning-rate`. They are the embeddings and the norms.",
        "a number above 0 and at most 1",
        lambda value: 0.0 < value <= 1.0,
    )
    grad_clip: float = _finite(
        1.0,
        "Largest norm of a step's gradient. A longer gradient is scaled down. 0 means no limit.",
    )
    batch_size: int = _whole_number(64, "Number of windows of text in a batch.", least=1)
    windows: str = _choice(
        "random",
        'Way in which a client draws windows of its text in a round. With "random" it draws each '
        'window alone, as nanoGPT does. With "disjoint" it passes over windows that do not '
        "overlap, so that it reads all of its text almost equally often.",
        "random",
        "disjoint",
    )
    block_size: int = _whole_number(256, "Number of characters in a window of text.", least=1)
    n_layer: int = _whole_number(6, "Number of Transformer blocks in the model.", least=1)
    n_head: int = _whole_number(6, "Number of attention heads in each block.", least=1)
    n_embd: int = _whole_number(
        384, "Number of channels of the model. `n-head` must divide this number.", least=1
    )
    dropout: float = _below_one(
        0.2,
        "Dropout rate on embeddings and residual branches.",
    )
    seed: int = _setting(
        1337,
        "Seed for the first weights, the partition, the batches, dropout, the choice of clients "
        "and the samples.",
        "a whole number from 0 to 4294967295",
        lambda value: 0 <= value < 2**32,
    )
    corpus: str = _text(
        "auto",
        'Text to train on. "auto" is "tiny-shakespeare" if the file is on this machine or can be '
        'downloaded, else "nine-plays". With "none" the server has no text, and each client has '
        "its own text.",
        '"auto", "tiny-shakespeare", "nine-plays", "plays", "none", or the path of a UTF-8 text '
        "or of a directory of such texts",
    )
    partition: str = _text(
        "contiguous",
        "Scheme that divides the corpus among the clients. A number after a colon is the `alpha` "
        'of "dirichlet" and "quantity-skew", and the `window` of "iid". Options can also be named, '
        'as in "dirichlet:alpha=0.1,by=speaker". A client with a directory of text does not use '
        "the scheme.",
        '"contiguous", "iid", "by-play", "by-speaker", "dirichlet:0.5" or "quantity-skew:0.5"',
    )
    device: str = _text(
        "auto",
        'Device of the server and of each client. "auto" is a GPU if PyTorch finds one, else the '
        "CPU.",
        '"auto", "cpu", "cuda" or "mps"',
    )
    precision: str = _choice(
        "auto",
        'Number format of the computation. "auto" is bf16 if the hardware supports it, else fp32.',
        "auto",
        "fp32",
        "bf16",
    )
    compile: str = _choice("auto", 'Use of `torch.compile`. "auto" is "off".', "auto", "on", "off")
    fraction_train: float = _setting(
        1.0,
        "Fraction of the connected clients that train in each round.",
        "a number above 0 and at most 1",
        lambda value: 0.0 < value <= 1.0,
    )
    fraction_evaluate: float = _setting(
        1.0,
        "Fraction of the connected clients that evaluate the model in each round.",
        "a number of at least 0 and at most 1",
        lambda value: 0.0 <= value <= 1.0,
    )
    min_clients: int = _whole_number(
        2, "Number of clients that must be connected before the first round.", least=1
    )
    min_replies: int = _whole_number(
        2,
        "Smallest number of good replies, for training and for evaluation separately. If training "
        "has fewer good replies, the model stays as it was. This number must be at most "
        "`min-clients`. With 1 the new model can be the weights of a single client.",
        least=1,
    )
    max_failed_rounds: int = _whole_number(
        3, "Number of failed rounds in a row after which the run fails.", least=1
    )
    max_weight_ratio: float = _setting(
        10.0,
        "Largest weight of a client in the mean, as a multiple of the clients' median weight. The "
        "weight of a client is the number of its characters.",
        "a finite number above 1",
        lambda value: isfinite(value) and value > 1.0,
    )
    round_timeout: float = _finite(
        3600.0,
        "Seconds for which the server waits for replies. The limit applies to training and to "
        "evaluation separately. 0 means no limit.",
    )
    outer_learning_rate: float = _setting(
        1.0,
        "Learning rate of the server's step from the old model towards the clients' average. "
        "DiLoCo uses 0.7.",
        "a number above 0 and at most 10",
        lambda value: 0.0 < value <= 10.0,
    )
    outer_momentum: float = _below_one(
        0.0,
        "Nesterov momentum of the server's step. DiLoCo uses 0.9.",
    )
    uplink: str = _text(
        "fp32",
        "Codec of the arrays that clients send to the server.",
        'the name of a codec: "fp32", "bf16", "int8", "int4", "2-bit", "top-k" or "top-k:0.05"',
    )
    downlink: str = _text(
        "fp32",
        "Codec of the arrays that the server sends to clients.",
        "the name of a codec, as for `uplink`",
    )
    keep_checkpoints: int = _whole_number(
        3, "Number of newest checkpoints to keep. The best checkpoint is kept too.", least=1
    )
    resume_from: str = _text(
        "",
        "Directory of an earlier run. That run continues from its newest checkpoint. "
        "If this setting is empty, a new run starts.",
        "the directory of a run, or empty",
        may_be_empty=True,
    )
    client_state: str = _text(
        "",
        "Directory where simulated clients keep their state on disk for a later resume. "
        "If this setting is empty, nothing is kept on disk.",
        "a directory that can be written, or empty",
        may_be_empty=True,
    )
    sample_tokens: int = _whole_number(
        500,
        "Number of characters in the sample that the server writes after the last round.",
        least=0,
    )
    round_sample_tokens: int = _whole_number(
        200,
        "Number of characters in the sample that the server writes after each round.",
        least=0,
    )
    sample_prompt: str = _text(
        "",
        "Start of the samples. If it is empty, a sample starts with a line break or, if the "
        "corpus has none, with the first character of the vocabulary.",
        "a text of characters that the corpus has, or empty",
        may_be_empty=True,
    )
    temperature: float = _finite(
        0.8,
        "Temperature of the samples. 0 always takes the likeliest character.",
    )
    top_k: int = _whole_number(
        0, "Number of likeliest characters to draw the samples from. 0 means all.", least=0
    )
    output_dir: str = _text(
        "runs",
        "Directory in which each run creates its own directory. "
        "A relative path is relative to the directory where the SuperLink was started.",
        "a directory that can be written",
    )
    run_name: str = _setting(
        "",
        "Name of the run and of its directory. If it is empty, the name is the time of the start.",
        'a name of letters, digits, "-", "_" and ".", or empty',
        lambda value: re.fullmatch(r"([\w-][\w.-]*)?", value) is not None,
    )
    report_to: str = _text(
        "",
        "Trackers that get the values of each round, separated by commas. Each one needs the extra "
        "of the same name.",
        '"tensorboard", "wandb" or "trackio", or several of them with commas, or empty',
        may_be_empty=True,
    )

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Value]) -> "Settings":
        """Check a run config and create the settings from it. Missing settings get their defaults.

        Raises:
            SettingsError: if a key or a value is bad. The message names all bad keys and values.
        """
        known = {_key(item.name): item for item in fields(cls)}
        values: dict[str, Any] = {}
        problems: list[str] = []
        for key, value in run_config.items():
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f" (the nearest is {near[0]})" if near else ""
                problems.append(f"{key} is not a setting of this app{hint}")
                continue
            item = known[key]
            if item.type is float and type(value) is int:
                value = float(value)
            if type(value) is item.type and item.metadata["is_allowed"](value):
                values[item.name] = value
            else:
                problems.append(f"{key} is {value!r}; it must be {item.metadata['allowed']}")
        if not problems:
            settings = cls(**values)
            problems = settings._contradictions()
        if problems:
            raise SettingsError("; ".join(problems))
        return settings

    def _contradictions(self) -> list[str]:
        """Describe each pair of settings that cannot work together."""
        found = []
        if self.n_embd % self.n_head:
            found.append(
                f"n-embd is {self.n_embd}; it must be divisible by n-head, which is {self.n_head}"
            )
        if self.min_learning_rate > self.learning_rate:
            found.append(
                f"min-learning-rate is {self.min_learning_rate}; it must be at most learning-rate, "
                f"which is {self.learning_rate}"
            )
        if (
            self.schedule != "constant"
            and self.min_learning_rate == 0
            and 0 < self.schedule_rounds < self.num_server_rounds
        ):
            found.append(
                f"schedule-rounds is {self.schedule_rounds} and num-server-rounds is "
                f"{self.num_server_rounds}, so the learning rate would be 0 in the last rounds; "
                f"schedule-rounds={self.num_server_rounds} would stretch the schedule over all "
                "rounds, and a min-learning-rate above 0 would train on at that rate"
            )
        if self.min_replies > self.min_clients:
            found.append(
                f"min-replies is {self.min_replies}; it must be at most min-clients, which is "
                f"{self.min_clients}"
            )
        return found

    def to_run_config(self) -> dict[str, Value]:
        """Return all settings as a run config. The keys have `-` in place of `_`."""
        return {_key(name): value for name, value in asdict(self).items()}


def _key(field_name: str) -> str:
    return field_name.replace("_", "-")


def markdown_table() -> str:
    """Return a table of all settings in Markdown."""
    lines = ["| key | default | allowed | description |", "|---|---|---|---|"]
    for item in fields(Settings):
        default = json.dumps(item.default)
        allowed, description = item.metadata["allowed"], item.metadata["description"]
        lines.append(f"| `{_key(item.name)}` | `{default}` | {allowed} | {description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
