"""The audit log says what was asked of a client, and what has left it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import nn

from flower_adapter import (
    AuditLog,
    Policy,
    Refusal,
    compression_mod,
    policy_mod,
    to_arrays,
    torch_client_app,
)
from flower_adapter.protocol import COMPRESSION, RUN, CompressionHeader

TOKEN = "0" * 64


def move(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
    with torch.no_grad():
        model.weight += 3.0  # type: ignore[operator]
        model.bias -= 4.0  # type: ignore[operator]
    return {"num-examples": 2, "loss": float("nan")}


def app(path: Path, work: Any = move, rules: str = "min-replies = 1") -> Any:
    audit, policy = AuditLog(lambda _: path), Policy.from_toml(rules)
    mods = [audit, policy_mod(lambda _: policy), compression_mod, audit.update]
    return torch_client_app(lambda *_: nn.Linear(1, 1), work, mods=mods)


def message(kind: str = "train", **records: Any) -> Message:
    config = ConfigRecord({"server-round": 7, RUN: TOKEN})
    arrays = to_arrays(nn.Linear(1, 1))
    return Message(RecordDict({"arrays": arrays, "config": config, **records}), 9, kind)


def context() -> Context:
    return Context(1, 2, {}, RecordDict(), {"batch-size": 8})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_line_says_what_was_asked_and_what_has_left(tmp_path: Path) -> None:
    path, sent = tmp_path / "state" / "audit.jsonl", message()
    data = [array.data for array in sent.content["arrays"].values()]
    reply = app(path)(sent, context())
    [line] = lines(path)
    assert line["run"] == sent.metadata.run_id
    assert line["token"] == hashlib.sha256(TOKEN.encode()).hexdigest()[:32]
    assert (line["message"], line["round"], line["refused"]) == ("train", 7, None)
    assert line["settings"] == {"batch-size": 8}
    assert line["received"]["bytes"] == sum(map(len, data))
    assert line["sent"]["bytes"] == sum(len(a.data) for a in reply.content["arrays"].values())
    assert line["sent"]["update-norm"] == pytest.approx(5.0)  # of (3, -4)
    assert line["metrics"] == {"num-examples": 2, "loss": "nan"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_digest_of_the_weights_follows_the_weights(tmp_path: Path) -> None:
    path, sent = tmp_path / "audit.jsonl", message()
    other = message()
    for each in (sent, sent, other):
        app(path)(each, context())
    first, again, third = (line["received"]["sha256"] for line in lines(path))
    assert first == again != third


def test_the_norm_is_that_of_the_update_and_the_bytes_are_those_that_travel(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"

    def work(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        with torch.no_grad():
            model.weight += 0.5  # type: ignore[operator]
        return {"num-examples": 1}

    audit = AuditLog(lambda _: path)
    client = torch_client_app(
        lambda *_: nn.Linear(64, 64), work, mods=[audit, compression_mod, audit.update]
    )
    header = CompressionHeader("fp32", "2-bit", "", "").to_record()
    sent = message(arrays=to_arrays(nn.Linear(64, 64)), **{COMPRESSION: header})
    reply = client(sent, context())
    [line] = lines(path)
    assert line["sent"]["bytes"] == sum(len(a.data) for a in reply.content["arrays"].values())
    assert line["sent"]["bytes"] < 4 * 64 * 64 / 8
    assert line["sent"]["update-norm"] == pytest.approx(0.5 * 64, rel=1e-6)


def test_refusals_exceptions_and_unknown_messages_are_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"

    def refuse(*_: Any) -> Any:
        raise Refusal("data", "no text")

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("of 1415 characters")

    app(path, refuse)(message(), context())
    app(path, fail)(message(), context())
    app(path)(message("query.secrets"), context())
    app(path, rules="min-replies = 2")(message(), context())
    reasons = [line["refused"] for line in lines(path)]
    assert reasons[0] == "data: no text"
    assert "ZeroDivisionError" in reasons[1]
    assert "1415" not in path.read_text(encoding="utf-8")
    assert "secrets" in reasons[2]
    assert reasons[3].startswith("policy: ")
    assert all(line["sent"] is None for line in lines(path))


def test_the_log_is_only_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"mine": 1}\n', encoding="utf-8")
    app(path)(message(), context())
    assert lines(path)[0] == {"mine": 1}
    assert len(lines(path)) == 2


def test_a_client_whose_log_cannot_be_written_sends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    reply = app(tmp_path / "file" / "audit.jsonl")(message(), context())
    assert reply.has_error()


def test_a_client_without_a_path_has_no_log(tmp_path: Path) -> None:
    audit = AuditLog(lambda _: None)
    client = torch_client_app(lambda *_: nn.Linear(1, 1), move, mods=[audit, audit.update])
    assert not client(message(), context()).has_error()


def test_hostile_texts_are_cut_and_stay_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    here = Context(1, 2, {}, RecordDict(), {"key": "x\n" * 10**6, "nan": float("inf")})
    app(path)(message(), here)
    [line] = lines(path)
    assert len(line["settings"]["key"]) == 200
    assert np.isinf(float(line["settings"]["nan"]))
