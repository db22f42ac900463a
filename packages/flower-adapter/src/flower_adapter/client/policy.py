"""A client's policy: what a server may ask of this client.

The server decides the weights and the settings of a run, and both decide how much an update tells
of the text behind it. The policy belongs to the operator of the client. It is a TOML file:

    messages = ["train", "evaluate", "query"]
    queries = ["label", "end_of_run"]
    min-replies = 2

    [run-config]
    batch-size = { min = 8, max = 256 }
    optimizer = { one-of = ["adamw", "muon"] }

    [limits]
    parameters = { max = 100_000_000 }

`policy_mod` refuses every message that the policy does not allow, before any other code sees it.
"""

import json
import logging
import math
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from filelock import FileLock
from flwr.app import ConfigRecord, Context, Message, MessageType

from flower_adapter import protocol
from flower_adapter._flwr import ClientAppCallable, Mod
from flower_adapter.client.refusals import Refusal, refuse
from flower_adapter.client.secret import make_private_directory
from flower_adapter.packing import sync

LEDGER_FILE = "rounds.json"
_ROUNDS = f"{protocol.OWN_SECRET}.rounds"  # the ledger of a client that has no directory
_LONGEST_VALUE = 60  # characters of a value that a refusal quotes

# Flower's own logger, so that the lines appear in the client's log.
logger = logging.getLogger("flwr")

Measure = Callable[[ConfigRecord, Context], Mapping[str, float]]


class PolicyError(ValueError):
    """An error: a policy file cannot be used. The message names the file and the key."""


@dataclass(frozen=True)
class Range:
    """The values that a policy allows for one key: numbers from `min` to `max`, or `one_of`."""

    min: float = -math.inf
    max: float = math.inf
    one_of: tuple[Any, ...] = ()

    def allows(self, value: object) -> bool:
        """Tell whether the range holds a value."""
        if self.one_of:
            return any(type(value) is type(choice) and value == choice for choice in self.one_of)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.min <= value <= self.max  # type: ignore[operator]

    def __str__(self) -> str:
        if self.one_of:
            return "one of " + ", ".join(json.dumps(choice) for choice in self.one_of)
        if math.isinf(self.max):
            return f"at least {_number(self.min)}"
        if math.isinf(self.min):
            return f"at most {_number(self.max)}"
        return f"{_number(self.min)} to {_number(self.max)}"


@dataclass(frozen=True)
class Policy:
    """The limits for requests of a server. A key of the TOML file has `-` in place of `_`.

    Args:
        messages: the kinds of messages that the client answers: "train", "evaluate", "query".
        queries: the queries that it answers, for example "label".
        runs: the ids of the runs that it takes part in, as `flwr list` shows them. An empty list
            allows every run.
        max_rounds: how many train messages, and how many evaluate messages, one run may send.
        max_rounds_per_day: how many train messages, and how many evaluate messages, all runs
            together may send in a day (UTC).
        max_rounds_in_all: how many train messages, and how many evaluate messages, all runs
            together may ever send. A server can call each message a run of its own, so only this
            number bounds what leaves the client.
        min_replies: the server must promise to average at least this many replies.
        max_message_bytes: the size of the arrays in a message.
        run_config: the allowed values of keys of the run config. Keys that are not in this table
            may have any value.
        limits: the allowed values of what the app computes for a message (see `policy_mod`).
    """

    messages: tuple[str, ...] = (MessageType.TRAIN, MessageType.EVALUATE, MessageType.QUERY)
    queries: tuple[str, ...] = (protocol.LABEL_ACTION, protocol.END_ACTION)
    runs: tuple[int, ...] = ()
    max_rounds: int = 1_000
    max_rounds_per_day: int = 2_000
    max_rounds_in_all: int = 100_000
    min_replies: int = 2
    max_message_bytes: int = 2**30
    run_config: Mapping[str, Range] = field(default_factory=dict)
    limits: Mapping[str, Range] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, base: Self | None = None) -> Self:
        """Read a policy file. What it does not say is taken from `base` (see `from_toml`).

        Raises:
            PolicyError: the file cannot be read, or a key is unknown or has a bad value.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"the policy {path} cannot be read: {error}") from error
        return cls.from_toml(text, str(path), base)

    @classmethod
    def from_toml(cls, text: str, name: str = "policy", base: Self | None = None) -> Self:
        """Read a policy from TOML.

        Args:
            text: the TOML.
            name: stands for the file in error messages.
            base: gives each key that the text does not have, and each key of the two tables. So a
                text that changes one limit keeps the others. The default is `Policy()`.

        Raises:
            PolicyError: a key is unknown or has a bad value.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PolicyError(f"{name} is not TOML: {error}") from error
        known = {item.name.replace("_", "-"): item for item in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in document.items():
            if key not in known:
                raise PolicyError(f"{name}: {key} is unknown, should be one of {', '.join(known)}")
            values[known[key].name] = _read_value(f"{name}: {key}", value, known[key].type)
        base = cls() if base is None else base
        for table in ("run_config", "limits"):
            values[table] = {**getattr(base, table), **values.get(table, {})}
        return replace(base, **values)

    def check_settings(self, run_config: Mapping[str, Any]) -> None:
        """Check the keys of a run config.

        Raises:
            Refusal: a key is missing or has a value that is not allowed.
        """
        for key, allowed in self.run_config.items():
            if key not in run_config:
                raise Refusal("policy", f"{key} is missing, this client allows {allowed}")
            _check(key, run_config[key], allowed)

    def check_limits(self, measured: Mapping[str, float]) -> None:
        """Check what the app has computed for a message.

        Raises:
            Refusal: a value is not allowed. The value can depend on the client's data, so only the
                cause has it.
        """
        for key, value in measured.items():
            allowed = self.limits.get(key)
            if allowed is not None and not allowed.allows(value):
                raise Refusal(
                    "policy", f"{key} is out of range, this client allows {allowed}"
                ) from ValueError(f"{key} is {_quoted(value)}, this client allows {allowed}")

    def check_message(self, message: Message) -> None:
        """Check the type, the size and the run of a message, and what it says of the average.

        Raises:
            Refusal: the message is not allowed.
        """
        kind, _, action = message.metadata.message_type.partition(".")
        if kind not in self.messages:
            raise Refusal("policy", f"the message type is {_quoted(kind)}, {_in(self.messages)}")
        if kind == MessageType.QUERY and action not in self.queries:
            raise Refusal("policy", f"the query is {_quoted(action)}, {_in(self.queries)}")
        if kind != MessageType.QUERY and action:
            raise Refusal("policy", f"the action is {_quoted(action)}, should be none")
        if self.runs and message.metadata.run_id not in self.runs:
            raise Refusal("policy", "the run is not among those that this client allows")
        configs = [key for key in message.content.config_records if key != protocol.COMPRESSION]
        if len(configs) > 1:  # the client must not check one record and use another
            raise Refusal("policy", f"the message holds {len(configs)} configs, should hold one")
        if kind == MessageType.QUERY and message.content.array_records:
            raise Refusal("policy", "a query holds arrays, should hold none")
        size = protocol.array_bytes(message)
        if size > self.max_message_bytes:
            raise Refusal(
                "policy",
                f"the arrays of the message have {size} bytes, this client allows at most "
                f"{self.max_message_bytes}",
            )
        if kind == MessageType.QUERY:
            return
        self.check_min_replies(protocol.config_of(message).get(protocol.MIN_REPLIES, 1))

    def check_min_replies(self, replies: object) -> None:
        """Check the number of replies that the server promises to average.

        Raises:
            Refusal: the number is too small.
        """
        if not isinstance(replies, int) or replies < self.min_replies:
            raise Refusal(
                "policy",
                f"min-replies is {_quoted(replies)}, this client allows at least "
                f"{self.min_replies}",
            )


def policy_mod(
    policy: Callable[[Context], Policy | None],
    *,
    measure: Measure | None = None,
    directory: Callable[[Context], Path | None] = lambda _: None,
) -> Mod:
    """Return a mod that refuses every message that the policy of a client does not allow.

    Put it before all other mods that do something with a message.

    Args:
        policy: returns the policy of a client, or None if the client has none, for example because
            a simulation runs on the server's own machine.
        measure: computes from a train or evaluate message what the policy's `limits` limit, for
            example the number of parameters of the model. It must not take much memory or time.
        directory: where the client counts the rounds of each run, in the file `rounds.json`. With
            None the count is in the client's context, and ends with it.
    """

    def check(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        try:
            rules = policy(context)
            if rules is None:
                return call_next(message, context)
            rules.check_message(message)
            kind = message.metadata.message_type
            if kind in (MessageType.TRAIN, MessageType.EVALUATE):
                config = protocol.config_of(message)
                rules.check_settings(context.run_config)
                if measure is not None:
                    rules.check_limits(measure(config, context))
                # A run is known by its token and by Flower's id, so that a server cannot call each
                # message of one run of Flower another run.
                runs = [f"flower run {message.metadata.run_id}"]
                runs += [token] if (token := protocol.token_of(config)) else []
                names = [protocol.digest(run) for run in runs]
                _count(rules, kind, names, context, directory(context))
        except Refusal as error:
            return refuse(message, error)
        return call_next(message, context)

    return check


def _count(
    rules: Policy, kind: str, runs: list[str], context: Context, directory: Path | None
) -> None:
    """Count a round before it is done, so that a failure does not give it back.

    Raises:
        Refusal: the run, all runs of this day, or all runs ever have had all their rounds.
    """
    if directory is None:
        saved = context.state.get(_ROUNDS)
        ledger = json.loads(str(saved["json"])) if isinstance(saved, ConfigRecord) else {}
        _add_round(rules, kind, runs, ledger)
        context.state[_ROUNDS] = ConfigRecord({"json": json.dumps(ledger)})
        return
    make_private_directory(directory)
    path = directory / LEDGER_FILE
    with FileLock(directory / f".{LEDGER_FILE}.lock", timeout=60):
        try:
            ledger = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            _add_round(rules, kind, runs, ledger)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, Refusal):
                raise
            # Without the count the client does not know what it may still do.
            raise Refusal("state", "the count of rounds is damaged") from error
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(ledger, indent=1), encoding="utf-8")
        partial.chmod(0o600)
        sync(partial)
        partial.replace(path)
        sync(directory)


def _add_round(rules: Policy, kind: str, runs: list[str], ledger: dict[str, Any]) -> None:
    today = time.strftime("%Y-%m-%d", time.gmtime())
    if ledger.get("day") != today:
        ledger.update({"day": today, "today": {}})
    of_runs = ledger.setdefault("runs", {})
    counted = [(of_runs.setdefault(run, {}), rules.max_rounds, "the run has") for run in runs]
    counted.append((ledger["today"], rules.max_rounds_per_day, "all runs of today have"))
    counted.append((ledger.setdefault("all", {}), rules.max_rounds_in_all, "all runs have"))
    for counts, most, whose in counted:
        if counts.get(kind, 0) >= most:
            raise Refusal("policy", f"{whose} had {most} {kind} messages, which is the limit")
    for counts, _, _ in counted:
        counts[kind] = counts.get(kind, 0) + 1


def _check(key: str, value: object, allowed: Range) -> None:
    if not allowed.allows(value):
        raise Refusal("policy", f"{key} is {_quoted(value)}, this client allows {allowed}")


def _quoted(value: object) -> str:
    """Return a value of the server as one short printable line."""
    text = json.dumps(value) if isinstance(value, str | int | float) else type(value).__name__
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _in(allowed: tuple[str, ...]) -> str:
    return f"this client allows {Range(one_of=allowed)}" if allowed else "this client allows none"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:g}"


def _read_value(where: str, value: Any, kind: Any) -> Any:
    """Check a value of a policy file, and return it in the type of the policy's field."""
    if kind is int:
        if type(value) is not int or value < 1:
            raise PolicyError(f"{where} is {value!r}, should be a whole number of at least 1")
        return value
    if kind in (tuple[str, ...], tuple[int, ...]):
        item = kind.__args__[0]
        if not isinstance(value, list) or not all(type(each) is item for each in value):
            raise PolicyError(f"{where} is {value!r}, should be a list of {item.__name__}")
        return tuple(value)
    if not isinstance(value, dict):
        raise PolicyError(f"{where} is {value!r}, should be a table")
    return {key: _read_range(f"{where}.{key}", given) for key, given in value.items()}


def _read_range(where: str, given: Any) -> Range:
    form = "should be like { min = 1, max = 9 } or { one-of = [1, 2] }"
    if not isinstance(given, dict) or not given:
        raise PolicyError(f"{where} is {given!r}, {form}")
    if set(given) == {"one-of"} and isinstance(given["one-of"], list) and given["one-of"]:
        return Range(one_of=tuple(given["one-of"]))
    numbers = [type(value) in (int, float) and not math.isnan(value) for value in given.values()]
    if not set(given) <= {"min", "max"} or not all(numbers):
        raise PolicyError(f"{where} is {given!r}, {form}")
    found = Range(**given)
    if found.min > found.max:
        raise PolicyError(f"{where} is {given!r}, so nothing is allowed")
    return found
