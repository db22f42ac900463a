from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from grids import Metered, data, reasons, run, size
from torch import nn

from flower_adapter import (
    Checkpoints,
    CodecError,
    Compression,
    OuterOptimizer,
    RoundFailed,
    StreamingFedAvg,
    compression_mod,
    load_arrays,
    to_arrays,
    torch_client_app,
)
from flower_adapter.protocol import COMPRESSION, CompressionHeader
from flower_adapter.testing import LocalGrid

CODECS = ["fp32", "bf16", "int8", "int4", "2-bit", "top-k:0.25"]
WIDTH, ROUNDS = 64, 12


@lru_cache
def problem(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(partition)
    x = torch.randn(256, WIDTH, generator=chance)
    truth = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
    return x, x @ truth.T + 0.5


@lru_cache
def start() -> ArrayRecord:
    torch.manual_seed(0)
    return to_arrays(nn.Linear(WIDTH, 4))


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, 4)


def client_app(mods: Iterable[Any] = (compression_mod,)) -> ClientApp:
    """Return a ClientApp that takes one step of gradient descent on a linear regression."""

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        x, y = problem(int(context.node_config["partition-id"]))
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= cast(torch.Tensor, parameter.grad)
        return {"num-examples": len(x), "loss": loss.item()}

    def evaluate(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        x, y = problem(int(context.node_config["partition-id"]))
        with torch.no_grad():
            return {"num-examples": len(x), "loss": nn.functional.mse_loss(model(x), y).item()}

    return torch_client_app(lambda c, n: linear(), train, evaluate, mods=list(mods))


def metered(num_nodes: int = 3) -> Metered:
    return Metered(client_app(), num_nodes)


def train(grid: LocalGrid, num_rounds: int = 1, **arguments: Any) -> Any:
    strategy = arguments.pop("strategy", None) or FedAvg()
    arguments = {"start": start(), "num_rounds": num_rounds, **arguments}
    return run(grid, strategy, **arguments)


@lru_cache
def plainly_trained() -> ArrayRecord:
    return cast(ArrayRecord, train(LocalGrid(client_app(()), 3), ROUNDS)[0].arrays)


def whole() -> int:
    """Return the bytes of the model, sent whole."""
    return size(RecordDict({"arrays": start()}))


def loss_of(arrays: ArrayRecord) -> float:
    model = linear()
    load_arrays(model, arrays)
    with torch.no_grad():
        losses = [nn.functional.mse_loss(model(x), y) for x, y in map(problem, range(3))]
    return float(torch.stack(losses).mean())


# Training


LINKS = [*((name, "fp32") for name in CODECS), *((name, name) for name in CODECS[1:])]


@pytest.mark.parametrize(("uplink", "downlink"), [*LINKS, ("fp32", "2-bit")])
def test_a_linear_model_trains_as_well_with_every_codec(uplink: str, downlink: str) -> None:
    strategy = FedAvg if downlink == "fp32" else StreamingFedAvg
    grid = metered()
    compression = Compression(uplink=uplink, downlink=downlink)
    result, _ = train(grid, ROUNDS, strategy=strategy(), compression=compression)
    assert not grid.errors
    begun, exact = loss_of(start()), loss_of(plainly_trained())
    assert exact < 0.002 * begun
    assert loss_of(result.arrays) < 0.02 * begun
    evaluated = result.evaluate_metrics_clientapp[ROUNDS]["loss"]
    assert evaluated == pytest.approx(loss_of(result.arrays), abs=0.02 * begun)


def test_fp32_both_ways_changes_nothing() -> None:
    plain_grid, grid = Metered(client_app(())), metered()
    plain, _ = train(plain_grid, 3)
    result, _ = train(grid, 3, compression=Compression(uplink="fp32", downlink="fp32"))
    assert data(result.arrays) == data(plain.arrays)
    assert sorted(grid.traffic) == sorted(plain_grid.traffic)
    assert not any(context.state for context in grid.contexts.values())


def test_a_client_with_the_mod_serves_a_server_without_compression() -> None:
    grid, plain = metered(), Metered(client_app(()))
    assert data(train(grid, 2)[0].arrays) == data(train(plain, 2)[0].arrays)
    assert sorted(grid.traffic) == sorted(plain.traffic)


@pytest.mark.parametrize("uplink", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_models_of_other_precisions_keep_their_dtypes(uplink: str, dtype: torch.dtype) -> None:
    def add(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        with torch.no_grad():
            model.weight.add_(0.25)
        return {"num-examples": 1}

    app = torch_client_app(lambda c, n: linear().to(dtype), add, mods=[compression_mod])
    begun = to_arrays(linear().to(dtype))
    result, _ = train(
        Metered(app),
        8,
        strategy=FedAvg(fraction_evaluate=0.0),
        start=begun,
        compression=Compression(uplink=uplink, downlink="int8"),
    )
    moved = result.arrays["weight"].numpy().astype(float) - begun["weight"].numpy()
    assert result.arrays["weight"].dtype == begun["weight"].dtype
    np.testing.assert_allclose(moved.mean(), 2.0, atol=0.6 if uplink == "top-k:0.25" else 0.02)


# Traffic


BITS = {"bf16": 16, "int8": 8, "int4": 4.125, "2-bit": 2.125, "top-k:0.25": 16}


@pytest.mark.parametrize("name", BITS)
def test_as_many_bytes_travel_as_the_codec_says(name: str) -> None:
    grid = metered()
    train(grid, 3, compression=Compression(uplink=name, downlink=name))
    scales = 4 * 4 if name == "int8" else 0  # a float32 for each of 4 channels
    encoded = 4 * WIDTH * BITS[name] / 8 + scales + len(start()["bias"].data)
    assert grid.bytes_down("train") == [whole(), 0, 0]
    # 2-bit has a code of variable length, and these arrays are small for its tables
    margin = 0.5 * encoded if name == "2-bit" else 0
    for travelled in (grid.bytes_up("train"), grid.bytes_down("evaluate")):
        assert travelled == pytest.approx([encoded] * 3, rel=0, abs=margin)
    assert grid.bytes_up("evaluate") == [0] * 3


def test_nothing_is_sent_when_the_model_has_not_changed() -> None:
    class Idle(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            return None, super().aggregate_train(server_round, replies)[1]

    grid = metered()
    train(grid, 3, strategy=Idle(), compression=Compression())
    assert grid.bytes_down("train") == [whole(), 0, 0]
    assert grid.bytes_down("evaluate") == [0, 0, 0]
    assert not grid.errors


def test_a_node_that_joins_late_is_sent_the_whole_model_and_then_deltas() -> None:
    grid = metered()

    def join(found: Any) -> None:
        if found.server_round == 2:
            grid.contexts[5] = Context(1, 5, {"partition-id": 3}, RecordDict(), {})

    compression = Compression(uplink="int8", downlink="int8")
    _, records = train(grid, 4, compression=compression, on_round=join)
    assert grid.bytes_down("train", 3) == [whole(), 0]
    assert grid.bytes_down("train", 0) == [whole(), 0, 0, 0]
    assert all(0 < down < whole() for down in grid.bytes_down("evaluate", 3))
    assert not grid.errors
    assert loss_of(records[4].arrays) < loss_of(records[2].arrays)


def test_a_node_left_out_of_a_round_is_sent_what_it_lacks() -> None:
    grid = metered(4)
    strategy = FedAvg(fraction_train=0.5, fraction_evaluate=0.5)
    result, _ = train(grid, 12, strategy=strategy, compression=Compression(uplink="int8"), seed=1)
    assert not grid.errors
    assert loss_of(result.arrays) < 0.02 * loss_of(start())


@pytest.mark.parametrize("lost_before", ["train", "evaluate"])
def test_a_node_that_lost_its_context_refuses_once_and_is_then_sent_the_model_whole(
    lost_before: str,
) -> None:
    class Losing(Metered):
        def reply(self, message: Message) -> Message:
            at = message.content["config"]["server-round"]
            if (message.metadata.message_type, at) == (lost_before, 3):
                self.contexts[self.node(1)].state.clear()
            return super().reply(message)

    grid = Losing(client_app())
    _, records = train(grid, 5, compression=Compression(downlink="int8"))
    [error] = grid.errors
    assert error.startswith("compression: this client does not hold the model")
    assert error.endswith("the server will send the whole model next time")
    left_out = [(c.phase, r.server_round, c.node) for r in records for c in r.left_out]
    assert left_out == [(lost_before, 3, grid.node(1))]
    down = grid.bytes_down("train", 1) + grid.bytes_down("evaluate", 1)
    assert down.count(whole()) == 2
    assert len(records[5].train_clients) == 3


def test_a_node_that_errs_is_sent_the_model_whole_the_next_time() -> None:
    class Failing(Metered):
        def changed(self, reply: Message) -> Message:
            if self.partition(reply.metadata.src_node_id) == 1 and len(self.traffic) < 3:
                return Message(Error(2, "ill"), reply_to=self.sent[-1])
            return reply

    grid = Failing(client_app())
    train(grid, 2, compression=Compression())
    assert grid.bytes_down("train", 1)[0] == grid.bytes_down("evaluate", 1)[0] == whole()
    assert grid.bytes_down("evaluate", 0)[0] < whole()
    assert grid.errors == ["ill"]


def test_clients_without_the_mod_count_get_whole_models_and_are_named_once(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    with_mod, without = client_app(), client_app(())

    class Mixed(Metered):
        def reply(self, message: Message) -> Message:
            is_without = self.partition(message.metadata.dst_node_id) == 1
            self.client_app = without if is_without else with_mod
            return super().reply(message)

    grid = Mixed(with_mod)
    result, records = train(grid, ROUNDS, compression=Compression(uplink="int8", downlink="int8"))
    assert not grid.errors
    assert not any(found.left_out for found in records)
    assert loss_of(result.arrays) < 0.05 * loss_of(start())
    assert {*grid.bytes_down("train", 1), *grid.bytes_up("train", 1)} == {whole()}
    assert max(grid.bytes_up("train", 0)) < whole()
    text = f"node {grid.node(1)} sends whole arrays: its ClientApp has no compression_mod"
    assert flower_log.text.count("no compression_mod") == flower_log.text.count(text) == 1


# What is refused


@pytest.mark.parametrize("name", ["", "fp16", "top-k:", "top-k:0", "top-k:2", "top-k:x", "INT8"])
def test_an_unknown_codec_is_refused_where_it_is_named(name: str) -> None:
    for link in ("uplink", "downlink"):
        with pytest.raises(CodecError, match=f"codec {name!r}"):
            Compression(**{link: name})


class Rewriting(Metered):
    """Changes the header of messages."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(client_app())
        self.changes = changes

    def reply(self, message: Message) -> Message:
        message.content[COMPRESSION] = ConfigRecord(
            {**message.content[COMPRESSION], **self.changes}
        )
        return super().reply(message)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"format": 3},
            "the message uses compression format 3, this side knows 2: install the same "
            "flower-adapter on both sides",
        ),
        ({"format": "2"}, "the message uses compression format '2', this side knows 2"),
        ({"uplink": "int3"}, "codec 'int3' is unknown here, should be one of fp32, "),
        ({"uplink": 3}, "the compression record is "),
        ({"base": "v7"}, "does not hold the model to which the message is a delta"),
    ],
)
def test_a_client_refuses_a_message_that_it_cannot_decode_and_logs_why(
    changes: dict[str, Any], reason: str, flower_log: pytest.LogCaptureFixture
) -> None:
    grid = Rewriting(**changes)
    with pytest.raises(RoundFailed) as caught:
        train(grid, compression=Compression())
    assert len(grid.errors) == 3
    assert all(error.startswith("compression: this client ") for error in grid.errors)
    assert reason in flower_log.text
    assert sorted(client.reason for client in caught.value.left_out) == sorted(grid.errors)


class Damaging(Metered):
    """Changes the encoded array in each train reply of node 1."""

    def __init__(self, damage: Any) -> None:
        super().__init__(client_app())
        self.damage = damage

    def changed(self, reply: Message) -> Message:
        if self.partition(reply.metadata.src_node_id) == 1 and not reply.has_error():
            for arrays in reply.content.array_records.values():
                arrays["weight"] = self.damage(arrays["weight"])
        return reply


def other(**changes: Any) -> Any:
    def damage(a: Array) -> Array:
        fields = {"dtype": a.dtype, "shape": a.shape, "stype": a.stype, "data": a.data}
        return Array(**{**fields, **changes})

    return damage


DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated": (lambda a: other(data=a.data[:-1])(a), "has 271 bytes, should have 272"),
    "empty": (other(data=b""), "has 0 bytes"),
    "other shape": (other(shape=(WIDTH, 4)), "is float32 (64, 4), should be float32 (4, 64)"),
    "no shape": (other(shape=()), "weight"),
    "empty shape": (other(shape=(0, 3), data=b""), "weight"),
    "negative shape": (other(shape=(-4, -WIDTH)), "weight"),
    "other dtype": (other(dtype="float64"), "is float64 (4, 64), should be float32 (4, 64)"),
    "unknown codec": (other(stype="flower-adapter/int3/2"), "codec 'int3' is unknown here"),
    "later version": (
        other(stype="flower-adapter/int8/3"),
        "is int8 of compression format 3, this side knows 2",
    ),
    "no version": (other(stype="flower-adapter/int8"), "compression format none"),
    "nan": (
        lambda a: other(data=np.full(4, np.nan, np.float32).tobytes() + a.data[16:])(a),
        "weight holds NaN or Inf (256 of 256 values)",
    ),
    "indices": (
        other(stype="flower-adapter/top-k:0.01/2", data=b"\xff" * 24),
        "indices outside the 256 values",
    ),
}


@pytest.mark.parametrize("strategy", [FedAvg, StreamingFedAvg])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_reply_is_left_out_in_each_round(kind: str, strategy: type[FedAvg]) -> None:
    damage, reason = DAMAGES[kind]
    grid = Damaging(damage)
    result, records = train(grid, 2, strategy=strategy(), compression=Compression(uplink="int8"))
    for found in records[1:]:
        assert reason in reasons(grid, found)[1]
        assert len(found.left_out) == 1
        assert [grid.partition(client.node) for client in found.train_clients] == [0, 2]
    assert np.isfinite(loss_of(result.arrays))


@pytest.mark.parametrize("strategy", [FedAvg, StreamingFedAvg])
def test_without_a_guard_a_reply_that_cannot_be_decoded_is_left_out_too(
    strategy: type[FedAvg],
) -> None:
    def trained(grid: LocalGrid) -> dict[str, bytes]:
        compression = Compression(uplink="int8")
        return data(train(grid, strategy=strategy(), compression=compression, guard=None)[0].arrays)

    without = metered()
    del without.contexts[without.node(1)]
    assert trained(Damaging(other(data=b""))) == trained(without)


@pytest.mark.parametrize("uplink", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_clients_model_is_refused_and_the_log_names_the_array(
    uplink: str, bad: float, flower_log: pytest.LogCaptureFixture
) -> None:
    def spoil(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        if context.node_config["partition-id"] == 1:
            with torch.no_grad():
                model.weight[0, 3] = bad
        return {"num-examples": 1}

    grid = Metered(torch_client_app(lambda c, n: linear(), spoil, mods=[compression_mod]))
    compression = Compression(uplink=uplink)
    _, [_, first] = train(grid, strategy=FedAvg(fraction_evaluate=0.0), compression=compression)
    [(partition, reason)] = reasons(grid, first).items()
    assert partition == 1
    assert reason.startswith("compression: this client cannot encode its arrays")
    assert "weight has moved by NaN, Inf or values too" in flower_log.text


class Exploding(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        _, metrics = super().aggregate_train(server_round, replies)
        model = linear()
        nn.init.constant_(model.weight, float("nan"))
        return to_arrays(model), metrics


def test_nan_of_the_server_is_never_sent() -> None:
    with pytest.raises(RoundFailed, match="the new global arrays are unusable: weight holds NaN"):
        train(metered(), strategy=Exploding(), compression=Compression())
    with pytest.raises(CodecError, match="weight has moved by NaN"):
        train(metered(), strategy=Exploding(), compression=Compression(), guard=None)


class Personal(FedAvg):
    """Sends a model of its own to each client."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        for k, message in enumerate(super().configure_train(server_round, arrays, config, grid)):
            model = linear()
            nn.init.constant_(model.weight, k)
            message.content = RecordDict({**message.content, "arrays": to_arrays(model)})
            yield message


@pytest.mark.parametrize("downlink", ["fp32", "int8"])
def test_a_strategy_that_sends_each_client_its_own_model_is_refused(downlink: str) -> None:
    with pytest.raises(RoundFailed, match="CodecError: the strategy sends different models"):
        train(metered(), strategy=Personal(), compression=Compression(downlink=downlink))


def test_a_message_with_two_records_of_arrays_is_refused() -> None:
    class Doubled(FedAvg):
        def configure_train(self, *arguments: Any) -> Iterable[Message]:
            for message in super().configure_train(*arguments):
                message.content = RecordDict({**message.content, "more": start()})
                yield message

    with pytest.raises(RoundFailed, match="a message holds 2 ArrayRecords, should hold one"):
        train(metered(), strategy=Doubled(), compression=Compression())


# The header


def test_a_header_comes_back_from_its_record_whatever_is_empty() -> None:
    for header in (
        CompressionHeader("int8", "2-bit", "", ""),
        CompressionHeader("fp32", "top-k:0.1", "a", "b"),
    ):
        record = header.to_record()
        assert RecordDict({"x": record})["x"].count_bytes() > 0
        assert CompressionHeader.from_record(record) == header
    for wrong in (None, MetricRecord({"format": 2}), ConfigRecord()):
        with pytest.raises(ValueError, match="the message uses compression format None"):
            CompressionHeader.from_record(wrong)


# State


def test_a_resumed_run_gives_the_bits_of_a_run_that_was_not_stopped(tmp_path: Path) -> None:
    def compressed(grid: Metered, num_rounds: int, **arguments: Any) -> Any:
        return train(
            grid,
            num_rounds,
            strategy=FedAvg(fraction_evaluate=0.0),
            compression=Compression(uplink="int8", downlink="2-bit"),
            outer=OuterOptimizer(),
            **arguments,
        )[0].arrays

    unbroken = compressed(metered(), 6)
    grid = metered()
    compressed(grid, 3, checkpoints=Checkpoints(tmp_path))
    resumed = compressed(grid, 6, checkpoints=Checkpoints(tmp_path, resume=True))
    assert data(resumed) == data(unbroken)
    assert not grid.errors
    down = grid.bytes_down("train")
    # No client is known to hold the copy after the resume, so it is sent whole once.
    assert [sent == whole() for sent in down] == [True, False, False, True, False, False]


def test_a_state_goes_from_one_compression_to_another() -> None:
    first, second = (Compression(downlink="2-bit") for _ in range(2))
    models = [start(), plainly_trained()]
    for model in models:
        first.encode(model, node=1)
    assert first.state_dict().keys() == {"exact", "copy"}
    second.load_state_dict(first.state_dict())
    sent, header = second.encode(models[-1], node=1)
    assert data(sent) == data(first.state_dict()["copy"])
    assert CompressionHeader.from_record(header).base == ""
    assert data(sent) != data(models[-1])  # 2-bit has lost something


@pytest.mark.parametrize("downlink", ["fp32", "int8"])
def test_a_state_of_a_run_that_has_not_begun_can_be_loaded_too(downlink: str) -> None:
    compression = Compression(downlink=downlink)
    compression.load_state_dict(Compression(downlink=downlink).state_dict())
    sent, header = compression.encode(start(), node=1)
    assert data(sent) == data(start())
    assert CompressionHeader.from_record(header).base == ""


def test_clients_of_an_exact_downlink_keep_no_copy_of_the_model(tmp_path: Path) -> None:
    grid = metered()
    compression = Compression(uplink="int8", downlink="fp32")
    train(grid, 2, compression=compression, checkpoints=Checkpoints(tmp_path))
    resume = Checkpoints(tmp_path, resume=True)
    train(grid, 4, compression=compression, checkpoints=resume)
    for context in grid.contexts.values():
        assert not any("model" in name for name in context.state)
        assert any("residual" in name for name in context.state)


def test_a_client_that_answers_an_old_version_is_sent_the_model_whole() -> None:
    compression = Compression(downlink="int8")
    models = [start(), plainly_trained(), start()]
    headers = []
    for model in models:
        _, header = compression.encode(model, node=1)
        headers.append(header)
    compression.note_answer(1, headers[0])  # two versions behind
    compression.note_answer(2, headers[1])  # one version behind
    compression.note_answer(3, headers[2])
    compression.note_answer(4, ConfigRecord({"format": 99, "version": headers[2]["version"]}))
    bases = {
        node: CompressionHeader.from_record(compression.encode(models[2], node)[1]).base
        for node in (1, 2, 3, 4, 5)
    }
    assert bases == {1: "", 2: headers[1]["version"], 3: headers[2]["version"], 4: "", 5: ""}


@pytest.mark.parametrize("codec", ["int8", "2-bit"])
def test_two_records_of_a_reply_have_a_residual_each(codec: str) -> None:
    """The second record of a client, such as the control variates of SCAFFOLD, changes no bit."""
    header = CompressionHeader("fp32", codec, "", "").to_record()
    trained = to_arrays(linear())
    opposite = ArrayRecord(
        {name: Array(start()[name].numpy() - trained[name].numpy()) for name in trained}
    )

    def sent(context: Context, **records: ArrayRecord) -> bytes:
        message = Message(RecordDict({"arrays": start(), COMPRESSION: header}), 1, "train")
        reply = compression_mod(
            message, context, lambda m, _: Message(RecordDict(dict(records)), reply_to=m)
        )
        return b"".join(data(reply.content["arrays"]).values())

    alone, beside = (Context(1, 1, {}, RecordDict(), {}) for _ in range(2))
    for _ in range(3):
        expected = sent(alone, arrays=trained)
        assert sent(beside, arrays=trained, controls=opposite) == expected
