"""A policy refuses what it does not allow, before any other code sees the message."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from flower_adapter import Policy, PolicyError, policy_mod
from flower_adapter.client.policy import LEDGER_FILE, Range
from flower_adapter.protocol import COMPRESSION, MIN_REPLIES, RUN

RULES = """
queries = ["label"]
max-rounds = 3
max-message-bytes = 1_000

[run-config]
batch-size = { min = 8, max = 256 }
optimizer = { one-of = ["adamw", "muon"] }

[limits]
parameters = { max = 1_000 }
"""
SETTINGS = {"batch-size": 16, "optimizer": "muon", "other": "anything"}
TOKEN = "0" * 64


def message(kind: str = "train", token: str | None = TOKEN, **config: Any) -> Message:
    fields = {MIN_REPLIES: 2, "server-round": 1, **config}
    if token is not None:
        fields[RUN] = token
    content = RecordDict({"config": ConfigRecord(fields)})
    if not kind.startswith("query"):
        content["arrays"] = ArrayRecord({"w": Array(np.zeros(10, np.float32))})
    return Message(content, 9, kind)


def context(**settings: Any) -> Context:
    return Context(1, 2, {}, RecordDict(), {**SETTINGS, **settings})


def answer(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


def asked(sent: Message, here: Context, rules: str = RULES, **options: Any) -> str | None:
    """Return the reason of the refusal, or None if the message has reached the client."""
    policy = Policy.from_toml(rules)
    reply = policy_mod(lambda _: policy, **options)(sent, here, answer)
    return reply.error.reason if reply.has_error() else None


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.label"])
def test_what_the_policy_allows_reaches_the_client(kind: str) -> None:
    assert asked(message(kind), context()) is None


def test_a_client_without_a_policy_allows_everything() -> None:
    reply = policy_mod(lambda _: None)(message("query.secrets"), context(), answer)
    assert not reply.has_error()


@pytest.mark.parametrize(
    ("kind", "config", "settings", "reason"),
    [
        ("train", {}, {"batch-size": 1}, "batch-size is 1, this client allows 8 to 256"),
        ("evaluate", {}, {"batch-size": 1}, "batch-size is 1, this client allows 8 to 256"),
        ("train", {}, {"batch-size": True}, "batch-size is true, this client allows 8 to 256"),
        ("train", {}, {"batch-size": "16"}, 'batch-size is "16", this client allows 8 to 256'),
        ("train", {}, {"batch-size": float("nan")}, "batch-size is NaN, this client allows 8"),
        (
            "train",
            {},
            {"optimizer": "sgd"},
            'optimizer is "sgd", this client allows one of "adamw"',
        ),
        ("query.text", {}, {}, 'the query is "text", this client allows one of "label"'),
        ("query", {}, {}, 'the query is "", this client allows one of "label"'),
        ("train.twice", {}, {}, 'the action is "twice", should be none'),
        ("train", {MIN_REPLIES: 1}, {}, "min-replies is 1, this client allows at least 2"),
        ("train", {MIN_REPLIES: "9"}, {}, 'min-replies is "9", this client allows'),
    ],
)
def test_a_refusal_names_the_key_the_value_and_what_is_allowed(
    kind: str, config: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    sent = message(kind, **config)
    assert f"policy: {reason}" in (asked(sent, context(**settings)) or "")


def test_a_key_that_the_policy_limits_must_be_there() -> None:
    here = Context(1, 2, {}, RecordDict(), {"optimizer": "muon"})
    assert asked(message(), here) == "policy: batch-size is missing, this client allows 8 to 256"


def test_a_query_needs_no_settings() -> None:
    assert asked(message("query.label"), Context(1, 2, {}, RecordDict(), {})) is None


def test_a_large_message_is_refused() -> None:
    sent = message()
    sent.content["arrays"] = ArrayRecord({"w": Array(np.zeros(1_000, np.float32))})
    assert "this client allows at most 1000" in (asked(sent, context()) or "")


def test_only_known_runs_are_allowed() -> None:
    sent = message()
    assert asked(sent, context(), f"runs = [{sent.metadata.run_id}]\n{RULES}") is None
    reason = asked(sent, context(), f"runs = [{sent.metadata.run_id + 1}]\n{RULES}")
    assert reason == "policy: the run is not among those that this client allows"


def test_kinds_of_messages_can_be_left_out() -> None:
    reason = asked(message("evaluate"), context(), f'messages = ["train"]\n{RULES}')
    assert reason == 'policy: the message type is "evaluate", this client allows one of "train"'


def test_what_the_app_measures_is_limited() -> None:
    def measure(config: ConfigRecord, context: Context) -> dict[str, float]:
        return {"parameters": 2_000, "something else": 1}

    reason = asked(message(), context(), measure=measure)
    # The value can depend on the client's data, so the server does not get it.
    assert (reason or "").startswith(
        "policy: parameters is out of range, this client allows at most 1,000; its log has the"
    )
    assert asked(message("query.label"), context(), measure=measure) is None


def test_only_the_log_has_the_value_of_what_the_app_measures(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    asked(message(), context(), measure=lambda *_: {"parameters": 1234567})
    assert "parameters is 1234567, this client allows at most 1,000" in flower_log.text


def test_a_message_with_two_configs_is_refused() -> None:
    sent = message()
    sent.content["another"] = ConfigRecord({MIN_REPLIES: 9})
    reason = asked(sent, context())
    assert reason == "policy: the message holds 2 configs, should hold one"


def test_the_record_of_the_compression_is_not_taken_for_the_config() -> None:
    sent = message()
    config = sent.content.pop("config")
    sent.content[COMPRESSION] = ConfigRecord({MIN_REPLIES: 9})
    sent.content["config"] = ConfigRecord({**config, MIN_REPLIES: 1})
    assert "min-replies is 1" in (asked(sent, context()) or "")


def test_a_query_with_arrays_is_refused() -> None:
    sent = message("query.label")
    sent.content["arrays"] = ArrayRecord({"w": Array(np.zeros(10, np.float32))})
    assert asked(sent, context()) == "policy: a query holds arrays, should hold none"


def test_settings_are_checked_before_anything_is_measured() -> None:
    def measure(*_: Any) -> dict[str, float]:
        pytest.fail("measured settings that are not allowed")

    assert asked(message(), context(**{"batch-size": 10**9}), measure=measure)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_run_has_a_limited_number_of_rounds(on_disk: bool, tmp_path: Path) -> None:
    here = context()
    directory = tmp_path / "state" if on_disk else None

    def ask(kind: str = "train", token: str | None = TOKEN, run_id: int = 1) -> str | None:
        fresh = context() if on_disk else here  # the count on disk survives a restart
        sent = message(kind, token)
        sent.metadata.__dict__["_run_id"] = run_id
        return asked(sent, fresh, directory=lambda _: directory)

    limit = "policy: the run has had 3 train messages, which is the limit"
    assert [ask() for _ in range(4)] == [None] * 3 + [limit]
    assert [ask("evaluate") for _ in range(3)] == [None] * 3
    assert ask(run_id=2) == limit  # a resumed run has another id and the same token
    assert ask(token="1" * 64) == limit  # a run of Flower has had its rounds, whatever the token
    assert [ask(token="2" * 64, run_id=3) for _ in range(3)] == [None] * 3
    assert [ask(token=None, run_id=4) for _ in range(4)] == [None] * 3 + [limit]


def test_all_runs_together_have_a_limited_number_of_rounds(tmp_path: Path) -> None:
    rules = f"max-rounds-in-all = 2\n{RULES}"
    reasons = []
    for number in range(3):
        sent = message(token=f"{number:064x}")
        sent.metadata.__dict__["_run_id"] = number
        reasons.append(asked(sent, context(), rules, directory=lambda _: tmp_path))
        ledger = json.loads((tmp_path / LEDGER_FILE).read_text())
        (tmp_path / LEDGER_FILE).write_text(json.dumps({**ledger, "day": "2001-01-01"}))
    assert reasons == [None, None, "policy: all runs have had 2 train messages, which is the limit"]


def test_a_policy_that_says_little_keeps_the_rest_of_its_base() -> None:
    own = Policy.from_toml(
        "max-rounds = 9\n[run-config]\nbatch-size = { min = 1 }", base=Policy.from_toml(RULES)
    )
    assert own.max_rounds == 9
    assert str(own.run_config["batch-size"]) == "at least 1"
    assert own.queries == ("label",)
    assert own.run_config["optimizer"].one_of == ("adamw", "muon")
    assert own.limits == Policy.from_toml(RULES).limits


def test_all_runs_of_a_day_have_a_limited_number_of_rounds(tmp_path: Path) -> None:
    rules = f"max-rounds-per-day = 2\n{RULES}"
    for number, expected in enumerate([None, None, "policy: all runs of today have had 2 train"]):
        sent = message(token=f"{number:064x}")
        reason = asked(sent, context(), rules, directory=lambda _: tmp_path)
        assert (reason or "").startswith(expected or "")
        assert (reason is None) == (expected is None)


def test_a_refused_message_does_not_count(tmp_path: Path) -> None:
    asked(message(), context(**{"batch-size": 1}), directory=lambda _: tmp_path)
    assert not (tmp_path / LEDGER_FILE).exists()


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"runs": 3, "day": "x"}', '{"runs": {"x": 1}}'])
def test_a_damaged_count_refuses_every_round(damage: str, tmp_path: Path) -> None:
    asked(message(), context(), directory=lambda _: tmp_path)
    run = next(iter(json.loads((tmp_path / LEDGER_FILE).read_text())["runs"]))
    (tmp_path / LEDGER_FILE).write_text(damage.replace('"x": 1', f'"{run}": 1'), encoding="utf-8")
    reason = asked(message(), context(), directory=lambda _: tmp_path)
    assert (reason or "").startswith("state: the count of rounds is damaged")


def test_the_count_does_not_tell_the_token(tmp_path: Path) -> None:
    asked(message(), context(), directory=lambda _: tmp_path)
    assert TOKEN not in (tmp_path / LEDGER_FILE).read_text()
    assert (tmp_path / LEDGER_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x = ", "p.toml is not TOML"),
        ("max-round = 3", "p.toml: max-round is unknown, should be one of messages, queries"),
        ("max-rounds = 0", "p.toml: max-rounds is 0, should be a whole number of at least 1"),
        ("max-rounds = true", "p.toml: max-rounds is True, should be a whole number"),
        ('queries = "label"', "p.toml: queries is 'label', should be a list of str"),
        ("runs = ['a']", "p.toml: runs is ['a'], should be a list of int"),
        ("limits = 3", "p.toml: limits is 3, should be a table"),
        ("[limits]\nsteps = 3", "p.toml: limits.steps is 3, should be like { min = 1, max = 9 }"),
        ("[limits]\nsteps = {}", "p.toml: limits.steps is {}, should be like"),
        ("[limits]\nsteps = { most = 3 }", "p.toml: limits.steps is {'most': 3}, should be like"),
        ("[limits]\nsteps = { min = '1' }", "p.toml: limits.steps is {'min': '1'}, should be"),
        ("[limits]\nsteps = { min = nan }", "p.toml: limits.steps is {'min': nan}, should be"),
        ("[limits]\nsteps = { min = 2, max = 1 }", "so nothing is allowed"),
        ("[limits]\nsteps = { one-of = [] }", "should be like"),
    ],
)
def test_a_bad_policy_file_is_named_with_its_key(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError) as caught:
        Policy.read(path)
    assert error in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_policy_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"the policy .*gone.toml cannot be read"):
        Policy.read(tmp_path / "gone.toml")


@given(
    st.floats(allow_nan=False),
    st.floats(allow_nan=False),
    st.one_of(st.floats(), st.integers(), st.text(), st.booleans(), st.lists(st.integers())),
)
def test_a_range_allows_the_numbers_between_its_ends_and_nothing_else(
    low: float, high: float, value: Any
) -> None:
    is_number = type(value) in (int, float)
    assert Range(low, high).allows(value) == (is_number and low <= value and value <= high)


@given(st.sampled_from([1, 1.0, True, "1", None]))
def test_a_choice_has_a_type(value: Any) -> None:
    assert Range(one_of=(1,)).allows(value) == (type(value) is int)
