import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_adapter import Refusal, load_arrays, to_arrays, torch_client_app


def build(config: ConfigRecord, context: Context) -> nn.Module:
    return nn.Linear(2, 1)


def add_one(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return {"num-examples": 7, "loss": 0.5, "lr": float(str(config["lr"]))}


def message(kind: str = MessageType.TRAIN, model: nn.Module | None = None) -> Message:
    arrays = to_arrays(model or nn.Linear(2, 1))
    config = ConfigRecord({"lr": 0.1})
    return Message(RecordDict({"arrays": arrays, "config": config}), 9, kind)


def context(**node_config: Any) -> Context:
    return Context(1, 9, dict(node_config), RecordDict(), {})


def test_a_train_reply_holds_the_trained_arrays_and_the_returned_metrics() -> None:
    sent, received = nn.Linear(2, 1), nn.Linear(2, 1)
    reply = torch_client_app(build, add_one)(message(model=sent), context())
    load_arrays(received, reply.content.array_records["arrays"])
    assert torch.equal(received.weight, sent.weight + 1)
    assert dict(reply.content.metric_records["metrics"]) == {
        "num-examples": 7,
        "loss": 0.5,
        "lr": 0.1,
    }


def test_an_evaluate_reply_holds_metrics_only() -> None:
    app = torch_client_app(build, add_one, add_one)
    reply = app(message(MessageType.EVALUATE), context())
    assert reply.content.metric_records["metrics"]["num-examples"] == 7
    assert not reply.content.array_records


def test_arrays_are_returned_under_the_key_of_the_message() -> None:
    records = RecordDict({"weights": to_arrays(nn.Linear(2, 1)), "c": ConfigRecord({"lr": 1.0})})
    reply = torch_client_app(build, add_one)(Message(records, 9, "train"), context())
    assert list(reply.content.array_records) == ["weights"]


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.label"])
def test_every_reply_carries_the_label(kind: str) -> None:
    app = torch_client_app(build, add_one, add_one)
    reply = app(message(kind), context(**{"partition-id": 7, "num-partitions": 10}))
    assert reply.content.config_records["client"]["label"] == "partition 0007"


def test_a_client_without_a_partition_is_labelled_by_its_node_id() -> None:
    reply = torch_client_app(build, add_one)(message("query.label"), context())
    assert reply.content.config_records["client"]["label"] == "node 9"


def test_the_label_can_be_chosen() -> None:
    app = torch_client_app(build, add_one, label=lambda context: str(context.node_config["path"]))
    reply = app(message("query.label"), context(path="part_3"))
    assert reply.content.config_records["client"]["label"] == "part_3"


def test_build_model_and_train_get_config_and_context() -> None:
    seen: list[object] = []

    def build_seeing(config: ConfigRecord, context: Context) -> nn.Module:
        seen.append((config["lr"], context.node_id))
        return nn.Linear(2, 1)

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, int]:
        seen.append((config["lr"], context.node_id))
        return {"num-examples": 1}

    torch_client_app(build_seeing, train)(message(), context())
    assert seen == [(0.1, 9), (0.1, 9)]


class VocabularyError(ValueError):
    pass


def refusing(error: BaseException) -> ClientApp:
    def train(model: nn.Module, config: ConfigRecord, context: Context) -> Mapping[str, float]:
        raise error

    return torch_client_app(build, train)


@pytest.mark.parametrize(
    "error",
    [
        VocabularyError("part has 'é'"),
        FileNotFoundError(2, "missing", "train.bin"),
        AttributeError("no such thing"),
        MemoryError(),
    ],
    ids=repr,
)
def test_the_server_gets_the_class_of_an_exception_and_the_log_gets_the_rest(
    error: Exception, flower_log: pytest.LogCaptureFixture
) -> None:
    reply = refusing(error)(message(), context())
    assert reply.error.code == 2
    found = re.fullmatch(
        rf"error: this client failed with {type(error).__name__}; "
        r"its log has the details \(([0-9a-f]{6})\)",
        reply.error.reason or "",
    )
    assert found is not None
    assert f"'train' refused ({found[1]})" in flower_log.text
    assert "raise error" in flower_log.text
    assert str(error) in flower_log.text


def test_a_refusal_is_sent_word_for_word() -> None:
    refusal = Refusal("data", "there is no text")
    assert refusing(refusal)(message(), context()).error.reason == "data: there is no text"


def test_the_cause_of_a_refusal_stays_in_the_log(flower_log: pytest.LogCaptureFixture) -> None:
    refusal = Refusal("data", "there is no text")
    refusal.__cause__ = ValueError("/home/me/letters.txt is empty")
    reason = refusing(refusal)(message(), context()).error.reason or ""
    assert reason.startswith("data: there is no text; its log has the details (")
    assert "letters" not in reason
    assert "/home/me/letters.txt is empty" in flower_log.text


def test_arrays_that_do_not_fit_are_refused_and_named_in_the_log(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    reply = torch_client_app(build, add_one)(message(model=nn.Linear(3, 1)), context())
    assert "failed with ArrayMismatch" in (reply.error.reason or "")
    assert "weight is float32 (1, 3), should be float32 (1, 2)" in flower_log.text


@pytest.mark.parametrize("kind", ["train.unknown", "query.unknown", "evaluate"])
def test_a_message_that_the_client_does_not_answer_gets_an_error_and_passes_the_mods(
    kind: str,
) -> None:
    seen: list[str] = []

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        seen.append(message.metadata.message_type)
        return call_next(message, context)

    sent = message()
    sent.metadata.__dict__["_message_type"] = kind
    reply = torch_client_app(build, add_one, mods=[mod])(sent, context())
    assert "failed with ValueError" in (reply.error.reason or "")
    assert seen == [kind]


@pytest.mark.parametrize("wrong", ["shape", "missing", "extra", "bytes"])
def test_arrays_are_compared_with_the_skeleton_before_a_model_is_built(wrong: str) -> None:
    """The model is as large as the settings ask, so a server could ask for too much memory."""
    arrays = to_arrays(nn.Linear(2, 1))
    if wrong == "shape":
        arrays = to_arrays(nn.Linear(3, 1))
    elif wrong == "missing":
        del arrays["bias"]
    elif wrong == "extra":
        arrays["more"] = arrays["bias"]
    else:
        weight = arrays["weight"]
        arrays["weight"] = Array(weight.dtype, weight.shape, weight.stype, weight.data[:-4])
    app = torch_client_app(
        lambda *_: pytest.fail("a model was built"), add_one, skeleton=lambda *_: nn.Linear(2, 1)
    )
    sent = Message(RecordDict({"arrays": arrays, "config": ConfigRecord()}), 9, "train")
    assert "failed with ArrayMismatch" in (app(sent, context()).error.reason or "")


def test_a_skeleton_is_built_without_random_numbers() -> None:
    """The first ones on the meta device would make torch import its compiler."""
    drawn = []

    def skeleton(config: ConfigRecord, context: Context) -> nn.Module:
        before = torch.get_rng_state()
        model = nn.Sequential(nn.Linear(2, 3), nn.Embedding(4, 2), nn.LSTM(2, 2))
        nn.init.normal_(tensor=model[0].weight)
        drawn.append(not torch.equal(before, torch.get_rng_state()))
        return nn.Linear(2, 1)

    app = torch_client_app(build, add_one, skeleton=skeleton)
    assert not app(message(), context()).has_error()
    assert drawn == [False]


def test_a_skeleton_that_fits_takes_no_memory_and_changes_nothing() -> None:
    devices = []

    def skeleton(config: ConfigRecord, context: Context) -> nn.Module:
        model = build(config, context)
        devices.append(next(model.parameters()).device.type)
        return model

    model = nn.Linear(2, 1)
    with_skeleton = torch_client_app(build, add_one, skeleton=skeleton)(
        message(model=model), context()
    )
    without = torch_client_app(build, add_one)(message(model=model), context())
    assert devices == ["meta"]
    assert with_skeleton.content == without.content


@pytest.mark.parametrize("records", [{}, {"a": ArrayRecord(), "b": ArrayRecord()}])
def test_a_message_without_exactly_one_array_record_is_refused(
    records: dict[str, ArrayRecord],
) -> None:
    reply = torch_client_app(build, add_one)(
        Message(RecordDict({**records}), 9, "train"), context()
    )
    assert reply.error.reason == f"message: holds {len(records)} ArrayRecords, should hold one"


def returning(metrics: Any) -> Callable[..., Any]:
    def my_train(model: nn.Module, config: ConfigRecord, context: Context) -> Any:
        return metrics

    return my_train


@pytest.mark.parametrize(
    "metrics", [{}, {"num-examples": 0}, {"num-examples": -1}, {"num-examples": float("nan")}]
)
def test_num_examples_must_be_above_zero(
    metrics: dict[str, float], flower_log: pytest.LogCaptureFixture
) -> None:
    reply = torch_client_app(build, returning(metrics))(message(), context())
    assert reply.has_error()
    assert "my_train returned num-examples" in flower_log.text


@pytest.mark.parametrize("value", [torch.tensor(1.0), "1", True, None, [1.0]])
def test_a_metric_that_is_not_a_number_is_named(
    value: object, flower_log: pytest.LogCaptureFixture
) -> None:
    app = torch_client_app(build, returning({"num-examples": 1, "loss": value}))
    assert "failed with TypeError" in (app(message(), context()).error.reason or "")
    assert "my_train returned loss =" in flower_log.text


def test_a_query_is_answered_by_its_function_or_refused_with_its_error() -> None:
    def vocabulary(context: Context) -> ConfigRecord:
        if "path" not in context.node_config:
            raise ValueError("there is no path")
        return ConfigRecord({"characters": "ab"})

    app = torch_client_app(build, add_one, queries={"vocabulary": vocabulary})
    answer = app(message("query.vocabulary"), context(path="x"))
    assert answer.content.config_records["client"]["characters"] == "ab"
    reason = app(message("query.vocabulary"), context()).error.reason or ""
    assert reason.startswith("error: this client failed with ValueError")
