from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_adapter import load_arrays, to_arrays, torch_client_app


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
    ("error", "reason"),
    [
        (VocabularyError("part has 'é'"), "VocabularyError: part has 'é'"),
        (FileNotFoundError(2, "missing", "train.bin"), "[Errno 2] missing: 'train.bin'"),
    ],
)
def test_a_refusal_is_sent_word_for_word_and_logged_with_its_traceback(
    error: Exception, reason: str, flower_log: pytest.LogCaptureFixture
) -> None:
    reply = refusing(error)(message(), context())
    assert reply.error.code == 2
    assert reply.error.reason is not None
    assert reply.error.reason.endswith(reason)
    assert reply.error.reason.startswith(type(error).__name__)
    assert "raise error" in flower_log.text


def test_any_other_exception_is_left_to_flower() -> None:
    with pytest.raises(AttributeError):
        refusing(AttributeError())(message(), context())


def test_arrays_that_do_not_fit_are_refused_by_name() -> None:
    reply = torch_client_app(build, add_one)(message(model=nn.Linear(3, 1)), context())
    assert reply.error.reason == (
        "ArrayMismatch: arrays do not fit Linear:\n"
        "  weight is float32 (1, 3), should be float32 (1, 2)"
    )


@pytest.mark.parametrize("records", [{}, {"a": ArrayRecord(), "b": ArrayRecord()}])
def test_a_message_without_exactly_one_array_record_is_refused(
    records: dict[str, ArrayRecord],
) -> None:
    reply = torch_client_app(build, add_one)(
        Message(RecordDict({**records}), 9, "train"), context()
    )
    assert reply.error.reason == (
        f"ValueError: the message holds {len(records)} ArrayRecords, should hold one"
    )


def returning(metrics: Any) -> Callable[..., Any]:
    def my_train(model: nn.Module, config: ConfigRecord, context: Context) -> Any:
        return metrics

    return my_train


@pytest.mark.parametrize(
    "metrics", [{}, {"num-examples": 0}, {"num-examples": -1}, {"num-examples": float("nan")}]
)
def test_num_examples_must_be_above_zero(metrics: dict[str, float]) -> None:
    reply = torch_client_app(build, returning(metrics))(message(), context())
    assert reply.error.reason is not None
    assert "my_train returned num-examples" in reply.error.reason


@pytest.mark.parametrize("value", [torch.tensor(1.0), "1", True, None, [1.0]])
def test_a_metric_that_is_not_a_number_is_named(value: object) -> None:
    app = torch_client_app(build, returning({"num-examples": 1, "loss": value}))
    with pytest.raises(TypeError, match="my_train returned loss ="):
        app(message(), context())


def test_a_query_is_answered_by_its_function_or_refused_with_its_error() -> None:
    def vocabulary(context: Context) -> ConfigRecord:
        if "path" not in context.node_config:
            raise ValueError("there is no path")
        return ConfigRecord({"characters": "ab"})

    app = torch_client_app(build, add_one, queries={"vocabulary": vocabulary})
    answer = app(message("query.vocabulary"), context(path="x"))
    assert answer.content.config_records["client"]["characters"] == "ab"
    assert (
        app(message("query.vocabulary"), context()).error.reason == "ValueError: there is no path"
    )
