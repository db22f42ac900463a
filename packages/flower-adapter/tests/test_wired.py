import logging
import random
from collections.abc import Iterable
from functools import lru_cache
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
from flwr.serverapp.strategy import FedAvg, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from localgrid import LocalGrid
from torch import nn

from flower_adapter import (
    CodecError,
    Guarded,
    OuterOptimizer,
    StreamingFedAvg,
    Wired,
    load_arrays,
    to_arrays,
    torch_client_app,
    wire_mod,
)
from flower_adapter.wire import WIRE, Header, decode, encode, is_encoded

CODECS = ["fp32", "bf16", "int8", "int4", "2-bit", "top-k:0.25"]
WIDTH, ROUNDS = 64, 12


@lru_cache
def problem(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(partition)
    x = torch.randn(256, WIDTH, generator=chance)
    truth = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
    return x, x @ truth.T + 0.5


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, 4)


def client_app(mods: Iterable[Any] = (wire_mod,)) -> ClientApp:
    """One step of gradient descent on a problem of linear regression."""

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        x, y = problem(int(context.node_config["partition-id"]))
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        return {"num-examples": len(x), "loss": loss.item()}

    def evaluate(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        x, y = problem(int(context.node_config["partition-id"]))
        with torch.no_grad():
            return {"num-examples": len(x), "loss": nn.functional.mse_loss(model(x), y).item()}

    return torch_client_app(lambda c, n: linear(), train, evaluate, mods=list(mods))


@lru_cache
def plainly_trained() -> ArrayRecord:
    result = run(FedAvg(), LocalGrid(client_app(()), 3), ROUNDS)
    return cast(ArrayRecord, result.arrays)


class Metered(LocalGrid):
    """Counts the bytes of arrays in each message and reply, and can change replies on the way."""

    def __init__(self, app: ClientApp | None = None, num_nodes: int = 3, seed: int = 0) -> None:
        super().__init__(app or client_app(), num_nodes, seed)
        self.traffic: list[tuple[str, int, int, int]] = []  # phase, partition, down, up
        self.errors: list[str] = []

    def reply(self, message: Message) -> Message:
        down = size(message.content)
        reply = self.damaged(super().reply(message))
        phase, node = message.metadata.message_type, message.metadata.dst_node_id
        up = 0 if reply.has_error() else size(reply.content)
        if reply.has_error():
            self.errors.append(reply.error.reason)
        self.traffic.append((phase, self.partition(node), down, up))
        return reply

    def damaged(self, reply: Message) -> Message:
        return reply

    def bytes_down(self, phase: str, partition: int = 0) -> list[int]:
        return [down for p, k, down, _ in self.traffic if (p, k) == (phase, partition)]

    def bytes_up(self, phase: str, partition: int = 0) -> list[int]:
        return [up for p, k, _, up in self.traffic if (p, k) == (phase, partition)]


def size(content: RecordDict) -> int:
    return sum(len(a.data) for record in content.array_records.values() for a in record.values())


def run(strategy: Strategy, grid: LocalGrid, rounds: int = 1, **arguments: Any) -> Any:
    random.seed(0)
    start = arguments.pop("start", None) or to_arrays(linear())
    return strategy.start(grid, start, num_rounds=rounds, **arguments)


def loss_of(arrays: ArrayRecord) -> float:
    model = linear()
    load_arrays(model, arrays)
    with torch.no_grad():
        losses = [nn.functional.mse_loss(model(x), y) for x, y in map(problem, range(3))]
    return float(torch.stack(losses).mean())


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno == logging.WARNING]


LINKS = [*((name, "fp32") for name in CODECS), *((name, name) for name in CODECS[1:])]


@pytest.mark.parametrize(("uplink", "downlink"), [*LINKS, ("fp32", "2-bit")])
def test_a_linear_model_trains_as_well_with_every_codec(uplink: str, downlink: str) -> None:
    inner = FedAvg if downlink == "fp32" else StreamingFedAvg
    grid = Metered()
    wired = run(Wired(inner(), uplink=uplink, downlink=downlink), grid, ROUNDS)
    assert not grid.errors
    begun, exact = loss_of(to_arrays(linear())), loss_of(plainly_trained())
    assert exact < 0.002 * begun
    assert loss_of(wired.arrays) < 0.02 * begun
    evaluated = wired.evaluate_metrics_clientapp[ROUNDS]["loss"]
    assert evaluated == pytest.approx(loss_of(wired.arrays), abs=0.02 * begun)


def test_fp32_both_ways_changes_nothing() -> None:
    plain_grid, wired_grid = Metered(client_app(())), Metered()
    plain = run(FedAvg(), plain_grid, 3)
    wired = run(Wired(FedAvg(), uplink="fp32", downlink="fp32"), wired_grid, 3)
    assert {k: a.data for k, a in wired.arrays.items()} == {
        k: a.data for k, a in plain.arrays.items()
    }
    assert wired_grid.traffic == plain_grid.traffic
    assert not any(grid_context.state for grid_context in wired_grid.contexts.values())


BITS = {"bf16": 16, "int8": 8, "int4": 4.125, "2-bit": 2.125, "top-k:0.25": 16}


@pytest.mark.parametrize("name", BITS)
def test_bytes_on_the_wire_are_as_many_as_the_codec_says(name: str) -> None:
    grid = Metered()
    run(Wired(FedAvg(), uplink=name, downlink=name), grid, 3)
    start = to_arrays(linear())
    weight, bias = start["weight"], start["bias"]
    scales = 4 * 4 if name == "int8" else 0  # a float32 for each of 4 channels
    encoded = 4 * WIDTH * BITS[name] / 8 + scales + len(bias.data)
    assert grid.bytes_down("train") == [len(weight.data) + len(bias.data), 0, 0]
    assert grid.bytes_up("train") == [encoded] * 3
    assert grid.bytes_down("evaluate") == [encoded] * 3
    assert grid.bytes_up("evaluate") == [0] * 3


def test_nothing_is_sent_when_the_model_has_not_changed() -> None:
    class Idle(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            return None, super().aggregate_train(server_round, replies)[1]

    grid = Metered()
    run(Wired(Idle()), grid, 3)
    whole = size(RecordDict({"arrays": to_arrays(linear())}))
    assert grid.bytes_down("train") == [whole, 0, 0]
    assert grid.bytes_down("evaluate") == [0, 0, 0]
    assert not grid.errors


def test_a_node_that_joins_late_is_sent_the_whole_model_and_then_deltas() -> None:
    grid = Metered()
    strategy = Wired(FedAvg(), uplink="int8", downlink="int8")
    first = run(strategy, grid, 2)
    grid.contexts[5] = Context(1, 5, {"partition-id": 3}, RecordDict(), {})
    grid.traffic.clear()
    result = run(strategy, grid, 2, start=first.arrays)
    whole = size(RecordDict({"arrays": to_arrays(linear())}))
    assert grid.bytes_down("train", 3) == [whole, 0]
    assert grid.bytes_down("train", 0) == [0, 0]
    assert all(0 < down < whole for down in grid.bytes_down("evaluate", 3))
    assert not grid.errors
    assert loss_of(result.arrays) < loss_of(first.arrays)


def test_a_node_left_out_of_a_round_is_sent_what_it_lacks() -> None:
    grid = Metered(num_nodes=4)
    strategy = Wired(FedAvg(fraction_train=0.5, fraction_evaluate=0.5), uplink="int8")
    result = run(strategy, grid, 12)
    assert not grid.errors
    assert loss_of(result.arrays) < 0.02 * loss_of(to_arrays(linear()))


@pytest.mark.parametrize("lost_before", ["train", "evaluate"])
def test_a_node_that_lost_its_context_refuses_once_and_is_then_sent_the_model_whole(
    lost_before: str,
) -> None:
    class Losing(Metered):
        def reply(self, message: Message) -> Message:
            [config] = [c for k, c in message.content.config_records.items() if k != WIRE]
            kind = message.metadata.message_type
            if (kind, config["server-round"]) == (lost_before, 3):
                self.contexts[self.node(1)].state.clear()
            return super().reply(message)

    grid = Losing()
    strategy = Guarded(Wired(FedAvg(), downlink="int8"))
    result = run(strategy, grid, 5)
    [error] = grid.errors
    assert "this client holds none; the server will send it whole the next time" in error
    assert [(d.phase, d.server_round) for d in strategy.dropped] == [(lost_before, 3)]
    whole = size(RecordDict({"arrays": to_arrays(linear())}))
    assert (
        grid.bytes_down("train", 1).count(whole) + grid.bytes_down("evaluate", 1).count(whole) == 2
    )
    assert result.train_metrics_clientapp[5]["num-replies"] == 3


def test_a_node_that_errs_is_sent_the_model_whole_the_next_time() -> None:
    class Failing(Metered):
        def damaged(self, reply: Message) -> Message:
            if self.partition(reply.metadata.src_node_id) == 1 and len(self.traffic) < 3:
                return Message(Error(2, "ill"), reply_to=self.sent[-1])
            return reply

    grid = Failing()
    run(Wired(FedAvg()), grid, 2)
    whole = size(RecordDict({"arrays": to_arrays(linear())}))
    assert grid.bytes_down("train", 1)[0] == grid.bytes_down("evaluate", 1)[0] == whole
    assert grid.bytes_down("evaluate", 0)[0] < whole
    assert grid.errors == ["ill"]


def test_clients_without_the_mod_count_and_are_named_once(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    with_mod, without = client_app(), client_app(())

    class Mixed(Metered):
        def reply(self, message: Message) -> Message:
            self.app = without if self.partition(message.metadata.dst_node_id) == 1 else with_mod
            return super().reply(message)

    for wrap in (lambda s: s, Guarded):
        flower_log.clear()
        grid = Mixed()
        result = run(wrap(Wired(FedAvg(), uplink="int8", downlink="int8")), grid, ROUNDS)
        assert not grid.errors
        assert loss_of(result.arrays) < 0.05 * loss_of(to_arrays(linear()))
        assert [w for w in warnings_of(flower_log) if "wire mod" in w] == [
            f"node {grid.node(1)} sends whole arrays: its ClientApp has no wire mod"
        ]


def test_a_client_with_the_mod_serves_a_server_without_it() -> None:
    grid, plain = Metered(), Metered(client_app(()))
    assert run(FedAvg(), grid, 2).arrays == run(FedAvg(), plain, 2).arrays
    assert grid.traffic == plain.traffic


@pytest.mark.parametrize("name", ["", "fp16", "top-k:", "top-k:0", "top-k:2", "top-k:x", "INT8"])
def test_an_unknown_codec_is_refused_where_it_is_named(name: str) -> None:
    for link in ("uplink", "downlink"):
        with pytest.raises(CodecError, match=f"codec {name!r}"):
            Wired(FedAvg(), **{link: name})


class Rewriting(Metered):
    """Changes the wire record of messages."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes = changes

    def reply(self, message: Message) -> Message:
        message.content[WIRE] = ConfigRecord({**message.content[WIRE], **self.changes})
        return super().reply(message)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"format": 2},
            "CodecError: the message is in version 2 of the wire format, this side knows 1: "
            "install one version of flower-adapter on both",
        ),
        ({"format": "1"}, "CodecError: the message is in version '1' of the wire format"),
        ({"uplink": "int3"}, "CodecError: codec 'int3' is unknown here, should be one of fp32, "),
        ({"uplink": 3}, "CodecError: the wire record is "),
        ({"base": "v7"}, "changes version v7 of the model, this client holds none"),
    ],
)
def test_a_client_refuses_a_message_it_cannot_follow_in_words(
    changes: dict[str, Any], reason: str
) -> None:
    grid = Rewriting(**changes)
    run(Wired(FedAvg(fraction_evaluate=0.0)), grid)
    assert len(grid.errors) == 3
    assert all(reason in error for error in grid.errors)


class Damaging(Metered):
    """Node 1's replies have their encoded array changed."""

    def __init__(self, damage: Any) -> None:
        super().__init__()
        self.damage = damage

    def damaged(self, reply: Message) -> Message:
        if self.partition(reply.metadata.src_node_id) == 1 and not reply.has_error():
            for arrays in reply.content.array_records.values():
                a = arrays["weight"]
                arrays["weight"] = self.damage(a)
        return reply


def other(**changes: Any) -> Any:
    def damage(a: Array) -> Array:
        fields = {"dtype": a.dtype, "shape": a.shape, "stype": a.stype, "data": a.data}
        return Array(**{**fields, **changes})

    return damage


DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated": (lambda a: other(data=a.data[:-1])(a), "has 271 bytes, should have 272"),
    "empty": (other(data=b""), "has 0 bytes"),
    "other shape": (other(shape=(WIDTH, 4)), "the model held has float32"),
    "no shape": (other(shape=()), "weight"),
    "empty shape": (other(shape=(0, 3), data=b""), "weight"),
    "negative shape": (other(shape=(-4, -WIDTH)), "weight"),
    "other dtype": (other(dtype="float64"), "the model held has float32"),
    "unknown codec": (other(stype="flower-adapter/int3/1"), "codec 'int3' is unknown here"),
    "later version": (
        other(stype="flower-adapter/int8/2"),
        "is int8 of version 2, this side knows 1",
    ),
    "no version": (other(stype="flower-adapter/int8"), "weight"),
    "nan": (
        lambda a: other(data=np.full(4, np.nan, np.float32).tobytes() + a.data[16:])(a),
        "weight holds NaN or Inf (256 of 256 values)",
    ),
    "indices": (
        other(stype="flower-adapter/top-k:0.01/1", data=b"\xff" * 24),
        "indices outside of 256 values",
    ),
}


@pytest.mark.parametrize("order", ["Guarded(Wired)", "Wired(Guarded)"])
@pytest.mark.parametrize("inner", [FedAvg, StreamingFedAvg])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_reply_is_dropped_by_a_guard_inside_or_outside(
    kind: str, inner: type[FedAvg], order: str
) -> None:
    damage, reason = DAMAGES[kind]
    guard: Guarded
    strategy: Strategy
    if order == "Guarded(Wired)":
        strategy = guard = Guarded(Wired(inner(), uplink="int8"))
    else:
        guard = Guarded(inner())
        strategy = Wired(guard, uplink="int8")
    result = run(strategy, grid := Damaging(damage), 2)
    assert [(d.server_round, d.node) for d in guard.dropped] == [
        (1, grid.node(1)),
        (2, grid.node(1)),
    ]
    assert all(reason in d.reason for d in guard.dropped)
    assert result.train_metrics_clientapp[2]["num-replies"] == 2
    assert np.isfinite(loss_of(result.arrays))


@pytest.mark.parametrize("inner", [FedAvg, StreamingFedAvg])
def test_without_a_guard_a_damaged_reply_is_passed_over(inner: type[FedAvg]) -> None:
    def trained(grid: LocalGrid) -> ArrayRecord:
        result = run(Wired(inner(fraction_evaluate=0.0), uplink="int8"), grid)
        return cast(ArrayRecord, result.arrays)

    without = Metered()
    del without.contexts[without.node(1)]
    left = trained(Damaging(other(data=b"")))["weight"].numpy()
    np.testing.assert_allclose(left, trained(without)["weight"].numpy(), atol=1e-6)


@pytest.mark.parametrize("uplink", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_clients_model_is_refused_with_the_arrays_name(uplink: str, bad: float) -> None:
    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        if context.node_config["partition-id"] == 1:
            with torch.no_grad():
                model.weight[0, 3] = bad
        return {"num-examples": 1}

    app = torch_client_app(lambda c, n: linear(), train, mods=[wire_mod])
    grid = Metered(app)
    guard = Guarded(Wired(FedAvg(fraction_evaluate=0.0), uplink=uplink))
    run(guard, grid)
    [dropped] = guard.dropped
    assert dropped.node == grid.node(1)
    assert dropped.reason.startswith("CodecError: weight has moved by NaN, Inf or values too")


def test_nan_of_the_server_is_refused_with_the_arrays_name() -> None:
    class Exploding(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            _, metrics = super().aggregate_train(server_round, replies)
            model = linear()
            nn.init.constant_(model.weight, float("nan"))
            return to_arrays(model), metrics

    with pytest.raises(CodecError, match="weight has moved by NaN"):
        run(Wired(Exploding()), Metered())


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
    with pytest.raises(CodecError):
        run(Wired(Personal(), downlink=downlink), Metered())


@pytest.mark.parametrize("uplink", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_models_of_other_precisions_keep_their_dtypes(uplink: str, dtype: torch.dtype) -> None:
    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        with torch.no_grad():
            model.weight.add_(0.25)
        return {"num-examples": 1}

    app = torch_client_app(lambda c, n: linear().to(dtype), train, mods=[wire_mod])
    strategy = Wired(FedAvg(fraction_evaluate=0.0), uplink=uplink, downlink="int8")
    start = to_arrays(linear().to(dtype))
    result = run(strategy, Metered(app), 8, start=start)
    moved = result.arrays["weight"].numpy().astype(float) - start["weight"].numpy()
    assert result.arrays["weight"].dtype == start["weight"].dtype
    np.testing.assert_allclose(moved.mean(), 2.0, atol=0.6 if uplink == "top-k:0.25" else 0.02)


@pytest.mark.parametrize("codec", ["2-bit", "top-k:0.1", "int4", "int8"])
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-4, 1e4), rows=st.integers(1, 20))
def test_what_the_server_decodes_adds_up_to_the_true_updates(
    codec: str, seed: int, scale: float, rows: int
) -> None:
    chance = np.random.default_rng(seed)
    base = ArrayRecord({"w": Array(np.zeros((rows, 20), np.float32))})
    constant = chance.normal(size=(rows, 20)) * chance.exponential(size=(rows, 20)) * scale
    true, decoded, residual, ratios = np.zeros_like(constant), np.zeros_like(constant), None, []
    for server_round in range(1, 49):
        update = constant + scale * chance.normal(size=constant.shape)
        update = update.astype(np.float32)
        encoded = encode(ArrayRecord({"w": Array(update)}), base, codec, residual)
        residual = encoded.residual
        true += update
        decoded += decode(encoded.arrays, base)["w"].numpy()
        if server_round in (8, 48):
            ratios.append(np.linalg.norm(true - decoded) / np.linalg.norm(true))
    # What is owed is bounded, so that its part in the sum falls as 1 / rounds.
    assert ratios[1] < max(0.75 * ratios[0], 0.01)
    assert np.linalg.norm(true - decoded) == pytest.approx(
        float(torch.linalg.vector_norm(residual["w"])), rel=1e-2, abs=1e-5 * np.linalg.norm(true)
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), name=st.sampled_from([*CODECS, "top-k"]))
def test_both_sides_decode_the_same_bits(seed: int, name: str) -> None:
    chance = np.random.default_rng(seed)
    shape = tuple(chance.integers(1, 12, chance.integers(2, 4)))

    def drawn() -> ArrayRecord:
        values = chance.normal(size=shape).astype(np.float32)
        return ArrayRecord({"w": Array(values), "b": Array(values[0]), "n": Array(np.array([3]))})

    base, arrays = drawn(), drawn()
    encoded = encode(arrays, base, name)
    assert decode(encoded.arrays, base) == encoded.received
    assert [is_encoded(a) for a in encoded.arrays.values()] == [True, len(shape) > 2, False]
    for array in encoded.arrays.values():
        if is_encoded(array):
            with pytest.raises(TypeError, match="Unsupported serialization type"):
                array.numpy()


def test_a_header_comes_back_from_its_record_whatever_is_empty() -> None:
    for header in (Header("int8", "2-bit", "", ""), Header("fp32", "top-k:0.1", "a", "b")):
        record = header.to_record()
        assert RecordDict({"x": record})["x"].count_bytes() > 0
        assert Header.from_record(record) == header
    for wrong in (None, MetricRecord({"format": 1}), ConfigRecord()):
        with pytest.raises(CodecError, match="is in version None of the wire format"):
            Header.from_record(wrong)


def test_the_state_takes_over_the_copy_that_clients_hold() -> None:
    whole_grid, grid = Metered(), Metered()
    strategies = [
        Wired(OuterOptimizer(FedAvg(fraction_evaluate=0.0)), uplink="int8", downlink="2-bit")
        for _ in range(3)
    ]
    whole = run(strategies[0], whole_grid, 6)
    half = run(strategies[1], grid, 3)
    assert strategies[1].state_dict().keys() == {"exact", "held"}
    strategies[2].load_state_dict(strategies[1].state_dict())
    strategies[2].strategy.load_state_dict(  # type: ignore[attr-defined]
        strategies[1].strategy.state_dict()  # type: ignore[attr-defined]
    )
    resumed = run(strategies[2], grid, 3, start=half.arrays)
    # Float addition is in another order of nodes; what 2-bit loses is the same.
    np.testing.assert_allclose(
        resumed.arrays["weight"].numpy(), whole.arrays["weight"].numpy(), atol=1e-5
    )
    # Nobody is known to hold it, so it is sent whole once.
    assert grid.bytes_down("train")[3] > grid.bytes_down("train")[4]
    assert not grid.errors


def test_a_fresh_state_can_be_taken_over_too() -> None:
    for downlink in ("fp32", "int8"):
        strategy = Wired(FedAvg(), downlink=downlink)
        strategy.load_state_dict(Wired(FedAvg(), downlink=downlink).state_dict())
        grid = Metered()
        result = run(strategy, grid, 3)
        assert not grid.errors
        assert loss_of(result.arrays) < loss_of(to_arrays(linear()))


def test_clients_of_an_exact_downlink_keep_no_copy_after_a_resume_either() -> None:
    strategy, grid = Wired(FedAvg(), uplink="int8", downlink="fp32"), Metered()
    strategy.load_state_dict({"exact": to_arrays(linear()), "held": to_arrays(linear())})
    run(strategy, grid, 2)
    for context in grid.contexts.values():
        assert not any("held" in name for name in context.state)
