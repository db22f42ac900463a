"""Selections of the arrays that travel, in a module and in a ClientApp."""

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from torch import Tensor, nn
from zoo import Holder, LowRank, TiedLanguageModel, build, compiled

from flower_adapter import ArrayMismatch, load_arrays, to_arrays, torch_client_app
from flower_adapter.arrays import npy
from flower_adapter.arrays.selection import (
    Entry,
    Selection,
    adapters,
    excluding,
    matching,
    trainable,
    without_normalization,
)


def convolutional() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))


CONV = {"0.weight", "0.bias"}
BATCH_NORM = {
    "1.weight",
    "1.bias",
    "1.running_mean",
    "1.running_var",
    "1.num_batches_tracked",
}
HEAD = {"3.weight", "3.bias"}


def frozen_first() -> nn.Sequential:
    module = convolutional()
    module[0].requires_grad_(False)
    return module


def is_square(entry: Entry) -> bool:
    return entry.tensor.ndim == 2 and entry.tensor.shape[0] == entry.tensor.shape[1]


@pytest.mark.parametrize(
    ("module", "select", "names"),
    [
        (convolutional(), trainable, CONV | HEAD | {"1.weight", "1.bias"}),
        (frozen_first(), trainable, HEAD | {"1.weight", "1.bias"}),
        (convolutional(), without_normalization, CONV | HEAD),
        (convolutional(), matching("3.*"), HEAD),
        (convolutional(), matching("*.bias", "0.w*"), CONV | {"1.bias", "3.bias"}),
        (convolutional(), matching("3.WEIGHT", "*.bias"), {"0.bias", "1.bias", "3.bias"}),
        (convolutional(), excluding("1.*"), CONV | HEAD),
        (convolutional(), excluding("0.*", "1.*"), HEAD),
        (convolutional(), lambda entry: isinstance(entry.owner, nn.Linear), HEAD),
        (convolutional(), lambda entry: not entry.tensor.is_floating_point(), {
            "1.num_batches_tracked"
        }),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), is_square, {"0.weight"}),
        (LowRank(), adapters, {"lora_A", "lora_B"}),
        (nn.Sequential(LowRank(), nn.Linear(16, 2)), adapters, {"0.lora_A", "0.lora_B"}),
        (Holder(block=Holder(adapter=nn.Linear(2, 2), base=nn.Linear(2, 2))), adapters, {
            "block.adapter.weight", "block.adapter.bias"
        }),
        (LowRank(), trainable, {"lora_A", "lora_B"}),
    ],
)  # fmt: skip
def test_exactly_the_selected_arrays_travel(
    module: nn.Module, select: Selection, names: set[str]
) -> None:
    assert set(to_arrays(module, select=select)) == names


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        compiled(nn.BatchNorm1d(4)),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_normalization_layer_of_torch_can_be_left_out(norm: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(4, 4), norm)
    assert len(to_arrays(module)) > 2
    assert set(to_arrays(module, select=without_normalization)) == {"0.weight", "0.bias"}


def test_a_parametrized_normalization_layer_can_be_left_out() -> None:
    norm = nn.utils.parametrizations.weight_norm(nn.LayerNorm((3, 4)))
    module = nn.Sequential(nn.Linear(4, 4), norm)
    assert set(to_arrays(module, select=without_normalization)) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("select", [matching("3.*"), without_normalization, trainable])
def test_arrays_that_are_not_selected_are_unchanged(select: Selection) -> None:
    source, target = convolutional(), convolutional()
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.copy_(tensor + 1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    record = to_arrays(source, select=select)

    load_arrays(target, record, select=select)

    for name, tensor in target.state_dict().items():
        expected = source.state_dict()[name] if name in record else before[name]
        assert torch.equal(tensor, expected), name


def test_missing_unknown_and_unselected_names_are_listed_and_nothing_is_loaded() -> None:
    target = convolutional()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    record = to_arrays(convolutional(), select=matching("3.*", "1.bias"))
    record["9.bias"] = record.pop("3.bias")

    with pytest.raises(ArrayMismatch) as caught:
        load_arrays(target, record, select=matching("3.*"))

    assert caught.value.mismatches == {
        "3.bias": "is missing, should be float32 (2,)",
        "1.bias": "is float32 (3,), is not selected",
        "9.bias": "is float32 (2,), should not be there",
    }
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_whole_record_does_not_fit_a_selection() -> None:
    with pytest.raises(ArrayMismatch, match=r"0\.weight is float32 .*, is not selected"):
        load_arrays(convolutional(), to_arrays(convolutional()), select=matching("3.*"))


@pytest.mark.parametrize(
    ("module", "select"),
    [
        (nn.Linear(2, 2), matching("head.*")),
        (nn.Linear(2, 2), matching()),
        (nn.Linear(2, 2).requires_grad_(False), trainable),
        (nn.Linear(2, 2), adapters),
        (nn.LayerNorm(2), without_normalization),
    ],
)
def test_selecting_nothing_is_refused(module: nn.Module, select: Selection) -> None:
    with pytest.raises(ValueError, match="nothing is selected of weight, bias"):
        to_arrays(module, select=select)
    with pytest.raises(ValueError, match="nothing is selected of weight, bias"):
        load_arrays(module, ArrayRecord(), select=select)


def test_a_module_without_arrays_accepts_any_selection() -> None:
    assert not to_arrays(nn.ReLU(), select=trainable)
    load_arrays(nn.ReLU(), ArrayRecord(), select=trainable)


def test_a_tied_weight_is_one_entry_under_its_first_name() -> None:
    seen: list[str] = []

    def select(entry: Entry) -> bool:
        seen.append(entry.name)
        return True

    to_arrays(TiedLanguageModel(), select=select)
    assert seen == ["embedding.weight", "body.weight", "body.bias"]


def test_a_selected_tied_weight_changes_under_all_its_names() -> None:
    source, target = TiedLanguageModel(), TiedLanguageModel()
    body = target.body.weight.clone()
    select = matching("embedding.*")
    load_arrays(target, to_arrays(source, select=select), select=select)
    assert torch.equal(target.head.weight, source.embedding.weight)
    assert torch.equal(target.body.weight, body)


def test_patterns_match_the_names_of_the_bare_module() -> None:
    module = compiled(nn.Sequential(compiled(convolutional()[0]), convolutional()[1]))
    assert set(to_arrays(module, select=matching("0.*"))) == CONV
    assert set(to_arrays(module, select=without_normalization)) == CONV
    assert set(to_arrays(module, select=trainable)) == CONV | {"1.weight", "1.bias"}


def test_a_compiled_module_loads_the_selected_arrays_of_a_bare_one() -> None:
    bare, fast = nn.Linear(3, 2), compiled(nn.Linear(3, 2))
    load_arrays(fast, to_arrays(bare, select=matching("bias")), select=matching("bias"))
    assert torch.equal(fast.bias, bare.bias)
    assert not torch.equal(fast.weight, bare.weight)


def test_the_arrays_of_a_child_called_module_alone_can_be_loaded() -> None:
    source, target = (build("one child called module", seed) for seed in (1, 2))
    select = matching("module.*")
    load_arrays(target, to_arrays(source, select=select), select=select)
    assert torch.equal(target.module.weight, source.module.weight)


def test_a_state_dict_can_be_selected_by_name() -> None:
    state = convolutional().state_dict()
    assert set(to_arrays(state, select=matching("3.*"))) == HEAD
    assert set(to_arrays(state, select=lambda entry: entry.owner is None)) == set(state)


def test_a_selection_that_needs_a_module_refuses_a_state_dict() -> None:
    state = convolutional().state_dict()
    with pytest.raises(TypeError, match=r"0\.weight comes from a state dict: trainable needs"):
        to_arrays(state, select=trainable)
    with pytest.raises(TypeError, match=r"0\.weight comes from a state dict: without_norm"):
        to_arrays(state, select=without_normalization)


def context(node_id: int = 9) -> Context:
    return Context(1, node_id, {}, RecordDict(), {})


def context_bytes(context: Context) -> int:
    return sum(record.count_bytes() for record in context.state.values())


def message(
    model: nn.Module, select: Selection, kind: str = MessageType.TRAIN, **config: Any
) -> Message:
    records = {"arrays": to_arrays(model, select=select), "config": ConfigRecord(config)}
    return Message(RecordDict(records), 9, kind)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class FedBN:
    """A client that keeps its batch norm. Its training adds `amount` to every array."""

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.found: list[dict[str, Tensor]] = []
        self.context = context(amount)
        select = without_normalization
        self.app = torch_client_app(self.build, self.train, self.evaluate, select=select)

    def build(self, config: ConfigRecord, context: Context) -> nn.Module:
        return convolutional()

    def evaluate(self, model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, int]:
        self.found.append(snapshot(model))
        return {"num-examples": 1}

    def train(self, model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, int]:
        self.evaluate(model, config, context)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(self.amount)
        return {"num-examples": 1}

    def answer(self, server: nn.Module, kind: str = MessageType.TRAIN) -> ArrayRecord | None:
        reply = self.app(message(server, without_normalization, kind), self.context)
        assert not reply.has_error(), reply.error
        return reply.content.array_records.get("arrays")


def test_each_client_keeps_its_own_batch_norm_from_round_to_round() -> None:
    server, clients = convolutional(), [FedBN(2), FedBN(5)]
    for server_round in range(3):
        for client in clients:
            reply = client.answer(server)
            assert reply is not None
            assert set(reply) == CONV | HEAD
            found = client.found[-1]
            assert found["1.num_batches_tracked"].item() == server_round * client.amount
            torch.testing.assert_close(
                found["1.running_mean"], torch.full((3,), float(server_round * client.amount))
            )
            torch.testing.assert_close(
                found["1.weight"], torch.full((3,), 1.0 + server_round * client.amount)
            )
            assert torch.equal(found["0.weight"], server[0].weight)


def test_evaluation_uses_the_client_s_own_batch_norm_and_does_not_change_it() -> None:
    server, client = convolutional(), FedBN(3)
    client.answer(server)
    for _ in range(2):
        assert client.answer(server, MessageType.EVALUATE) is None
        assert client.found[-1]["1.running_mean"].tolist() == [3, 3, 3]


def test_a_client_that_has_not_trained_has_the_batch_norm_of_a_new_model() -> None:
    client = FedBN(3)
    client.answer(convolutional(), MessageType.EVALUATE)
    assert client.found[-1]["1.running_mean"].tolist() == [0, 0, 0]
    assert context_bytes(client.context) == 0


def low_rank_client(select: Selection, base: nn.Module) -> Any:
    def build(config: ConfigRecord, context: Context) -> nn.Module:
        model = LowRank(256, 256)
        model.base.load_state_dict(base.state_dict())
        return model

    def train(model: Any, config: ConfigRecord, context: Context) -> dict[str, float]:
        with torch.no_grad():
            model.lora_A += 1
            model.lora_B += 1
        return {"num-examples": 1, "base": float(model.base.weight.double().sum())}

    return torch_client_app(build, train, select=select)


def test_a_frozen_base_is_neither_sent_nor_saved() -> None:
    server, own_context = LowRank(256, 256), context()
    app = low_rank_client(adapters, server.base)
    for _ in range(2):
        reply = app(message(server, adapters), own_context)
        arrays = reply.content.array_records["arrays"]
        assert set(arrays) == {"lora_A", "lora_B"}
        assert sum(len(array.data) for array in arrays.values()) < 2 * 2 * 256 * 4 + 512
        assert context_bytes(own_context) == 0
        expected = float(server.base.weight.double().sum())
        assert reply.content.metric_records["metrics"]["base"] == expected


def test_a_trained_array_that_is_not_shared_is_saved_without_the_frozen_base() -> None:
    server, own_context = LowRank(256, 256), context()
    select = matching("lora_A")
    app = low_rank_client(select, server.base)
    app(message(server, select), own_context)
    assert 256 * 2 * 4 < context_bytes(own_context) < 256 * 2 * 4 + 2000  # lora_B, of 256 x 2
    app(message(server, select), own_context)
    assert context_bytes(own_context) < 256 * 2 * 4 + 2000


def test_unselected_arrays_are_refused_and_the_log_names_them(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    server, own_context = LowRank(256, 256), context()
    app = low_rank_client(adapters, server.base)
    reply = app(message(server, matching("lora_*", "base.bias")), own_context)
    assert "failed with ArrayMismatch" in reply.error.reason
    assert "base.bias is float32 (256,), is not selected" in flower_log.text
    assert context_bytes(own_context) == 0


def test_a_refused_round_does_not_change_the_client_s_own_layers() -> None:
    server, client = convolutional(), FedBN(4)
    client.answer(server)
    records = RecordDict({"arrays": ArrayRecord({"0.weight": npy.to_array(torch.ones(1).numpy())})})
    assert client.app(Message(records, 9, MessageType.TRAIN), client.context).has_error()
    client.answer(server)
    assert client.found[-1]["1.running_mean"].tolist() == [4, 4, 4]


def test_matching_without_patterns_is_refused() -> None:
    with pytest.raises(TypeError, match=r"for 0\.weight, should return True or False; match"):
        to_arrays(convolutional(), select=matching)  # type: ignore[arg-type]
