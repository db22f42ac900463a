"""What a selection lets travel, and what it leaves alone, in a module and in a ClientApp."""

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from torch import Tensor, nn
from zoo import Holder, LowRank, TiedLanguageModel, build, compiled

from flower_adapter import ArrayMismatch, load_arrays, npy, to_arrays, torch_client_app
from flower_adapter.selection import (
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
def test_what_is_selected_travels(module: nn.Module, select: Selection, names: set[str]) -> None:
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
def test_every_normalization_layer_of_torch_stays(norm: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(4, 4), norm)
    assert len(to_arrays(module)) > 2
    assert set(to_arrays(module, select=without_normalization)) == {"0.weight", "0.bias"}


def test_a_parametrized_normalization_layer_stays() -> None:
    norm = nn.utils.parametrizations.weight_norm(nn.LayerNorm((3, 4)))
    module = nn.Sequential(nn.Linear(4, 4), norm)
    assert set(to_arrays(module, select=without_normalization)) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("select", [matching("3.*"), without_normalization, trainable])
def test_what_is_not_selected_stays_untouched(select: Selection) -> None:
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


def test_names_that_are_missing_unknown_or_not_selected_are_named_and_nothing_is_loaded() -> None:
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


def test_of_a_module_without_anything_nothing_can_be_selected() -> None:
    assert not to_arrays(nn.ReLU(), select=trainable)
    load_arrays(nn.ReLU(), ArrayRecord(), select=trainable)


def test_a_tied_weight_is_asked_for_once_under_its_first_name() -> None:
    asked: list[str] = []

    def select(entry: Entry) -> bool:
        asked.append(entry.name)
        return True

    to_arrays(TiedLanguageModel(), select=select)
    assert asked == ["embedding.weight", "body.weight", "body.bias"]


def test_a_selected_tied_weight_moves_under_all_its_names() -> None:
    source, target = TiedLanguageModel(), TiedLanguageModel()
    body = target.body.weight.clone()
    select = matching("embedding.*")
    load_arrays(target, to_arrays(source, select=select), select=select)
    assert torch.equal(target.head.weight, source.embedding.weight)
    assert torch.equal(target.body.weight, body)


def test_patterns_are_of_the_names_without_compilation() -> None:
    module = compiled(nn.Sequential(compiled(convolutional()[0]), convolutional()[1]))
    assert set(to_arrays(module, select=matching("0.*"))) == CONV
    assert set(to_arrays(module, select=without_normalization)) == CONV
    assert set(to_arrays(module, select=trainable)) == CONV | {"1.weight", "1.bias"}


def test_a_compiled_module_takes_the_selection_of_a_bare_one() -> None:
    bare, fast = nn.Linear(3, 2), compiled(nn.Linear(3, 2))
    load_arrays(fast, to_arrays(bare, select=matching("bias")), select=matching("bias"))
    assert torch.equal(fast.bias, bare.bias)
    assert not torch.equal(fast.weight, bare.weight)


def test_what_only_the_child_called_module_sends_comes_back() -> None:
    source, target = (build("one child called module", seed) for seed in (1, 2))
    select = matching("module.*")
    load_arrays(target, to_arrays(source, select=select), select=select)
    assert torch.equal(target.module.weight, source.module.weight)


def test_of_a_state_dict_names_and_tensors_can_be_selected() -> None:
    state = convolutional().state_dict()
    assert set(to_arrays(state, select=matching("3.*"))) == HEAD
    assert set(to_arrays(state, select=lambda entry: entry.owner is None)) == set(state)


def test_of_a_state_dict_nothing_is_trainable_and_no_layer_is_known() -> None:
    state = convolutional().state_dict()
    with pytest.raises(TypeError, match=r"0\.weight is of a state dict: what is trainable"):
        to_arrays(state, select=trainable)
    with pytest.raises(TypeError, match=r"0\.weight is of a state dict"):
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
    """A client whose training moves all that it has by the client's own amount."""

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.found: list[dict[str, Tensor]] = []
        self.context = context(amount)
        self.app = torch_client_app(self.build, self.train, self.look, select=without_normalization)

    def build(self, config: ConfigRecord, context: Context) -> nn.Module:
        return convolutional()

    def look(self, model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, int]:
        self.found.append(snapshot(model))
        return {"num-examples": 1}

    def train(self, model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, int]:
        self.look(model, config, context)
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


def test_evaluation_sees_the_client_s_own_batch_norm_and_does_not_change_it() -> None:
    server, client = convolutional(), FedBN(3)
    client.answer(server)
    for _ in range(2):
        assert client.answer(server, MessageType.EVALUATE) is None
        assert client.found[-1]["1.running_mean"].tolist() == [3, 3, 3]


def test_a_client_without_a_past_has_the_batch_norm_of_a_new_model() -> None:
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


def test_of_a_frozen_base_nothing_is_sent_or_kept() -> None:
    server, held = LowRank(256, 256), context()
    app = low_rank_client(adapters, server.base)
    for _ in range(2):
        reply = app(message(server, adapters), held)
        arrays = reply.content.array_records["arrays"]
        assert set(arrays) == {"lora_A", "lora_B"}
        assert sum(len(array.data) for array in arrays.values()) < 2 * 2 * 256 * 4 + 512
        assert context_bytes(held) == 0
        expected = float(server.base.weight.double().sum())
        assert reply.content.metric_records["metrics"]["base"] == expected


def test_a_trained_half_that_is_not_shared_is_kept_without_the_frozen_base() -> None:
    server, held = LowRank(256, 256), context()
    select = matching("lora_A")
    app = low_rank_client(select, server.base)
    app(message(server, select), held)
    assert 256 * 2 * 4 < context_bytes(held) < 256 * 2 * 4 + 2000  # lora_B, of 256 x 2
    app(message(server, select), held)
    assert context_bytes(held) < 256 * 2 * 4 + 2000


def test_a_server_that_sends_more_than_is_selected_is_answered_with_the_names() -> None:
    server, held = LowRank(256, 256), context()
    app = low_rank_client(adapters, server.base)
    reply = app(message(server, matching("lora_*", "base.bias")), held)
    assert reply.error.reason == (
        "ArrayMismatch: arrays do not fit LowRank:\n  base.bias is float32 (256,), is not selected"
    )
    assert context_bytes(held) == 0


def test_a_refused_round_leaves_the_client_s_own_layers_as_they_were() -> None:
    server, client = convolutional(), FedBN(4)
    client.answer(server)
    records = RecordDict({"arrays": ArrayRecord({"0.weight": npy.to_array(torch.ones(1).numpy())})})
    assert client.app(Message(records, 9, MessageType.TRAIN), client.context).has_error()
    client.answer(server)
    assert client.found[-1]["1.running_mean"].tolist() == [4, 4, 4]


def test_a_pattern_that_was_forgotten_is_refused() -> None:
    with pytest.raises(TypeError, match=r"for 0\.weight, should be True or False; matching"):
        to_arrays(convolutional(), select=matching)  # type: ignore[arg-type]
