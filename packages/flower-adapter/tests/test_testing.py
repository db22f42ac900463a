import re
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from flower_adapter import run_rounds, testing, to_arrays, torch_client_app
from flower_adapter.testing import LocalGrid


def counting_app() -> ClientApp:
    """Return a ClientApp that counts its messages in the context and changes their content."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = context.state.setdefault("calls", MetricRecord({"count": 0}))
        assert isinstance(state, MetricRecord)
        state["count"] += 1  # type: ignore[operator]
        assert "seen" not in message.content
        message.content["seen"] = ConfigRecord()
        count = MetricRecord({"count": state["count"], "num-examples": 1})
        return Message(RecordDict({"m": count}), reply_to=message)

    return app


def ask(grid: LocalGrid, content: RecordDict | None = None) -> list[Message]:
    content = RecordDict() if content is None else content
    messages = [Message(content, node, "train") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages))


def answered(grid: LocalGrid, replies: list[Message]) -> list[int]:
    return [grid.partition(reply.metadata.src_node_id) for reply in replies]


def test_the_example_in_the_docstring_works() -> None:
    example = "\n".join(re.findall(r"^    (.*)$", (testing.__doc__ or ""), re.MULTILINE))
    assert "LocalGrid(" in example
    trained: list[int] = []

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        trained.append(int(context.node_config["partition-id"]))
        return {"num-examples": 8, "loss": 0.5}

    names: dict[str, Any] = {
        "FedAvg": FedAvg,
        "build_model": lambda config, context: nn.Linear(2, 1),
        "train": train,
        "model": nn.Linear(2, 1),
    }
    exec(example, names)
    assert sorted(trained) == [0, 0, 1, 1, 2, 2]
    assert names["result"].train_metrics_clientapp[2]["loss"] == 0.5


def test_a_grid_works_in_a_process_that_is_no_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    assert len(ask(LocalGrid(counting_app(), 2))) == 2


def test_nodes_have_random_ids_and_the_configs_of_a_simulation() -> None:
    grid = LocalGrid(
        counting_app(), 4, run_config={"lr": 0.1}, node_config={"data": "here"}, run_id=7
    )
    nodes = list(grid.get_node_ids())
    assert nodes == sorted(grid.contexts)
    assert len(set(nodes)) == 4
    assert set(nodes).isdisjoint(range(4))
    for partition in range(4):
        node = grid.node(partition)
        assert grid.partition(node) == partition
        context = grid.contexts[node]
        assert (context.node_id, context.run_id) == (node, 7)
        assert context.run_config == {"lr": 0.1}
        assert context.node_config == {
            "data": "here",
            "partition-id": partition,
            "num-partitions": 4,
        }
    assert grid.run.run_id == 7


def test_the_seed_decides_node_ids_and_the_order_of_replies() -> None:
    def order(seed: int) -> tuple[list[int], list[int]]:
        grid = LocalGrid(counting_app(), 8, seed=seed)
        return list(grid.contexts), answered(grid, ask(grid))

    assert order(1) == order(1)
    assert order(1)[0] != order(2)[0]
    assert order(1)[1] != order(2)[1]
    assert sorted(order(1)[1]) == list(range(8))


def test_replies_come_in_another_order_in_each_round() -> None:
    grid = LocalGrid(counting_app(), 8)
    assert answered(grid, ask(grid)) != answered(grid, ask(grid))


def test_a_context_lasts_as_long_as_the_grid() -> None:
    grid = LocalGrid(counting_app(), 2)
    for expected in (1, 2, 3):
        assert [reply.content["m"]["count"] for reply in ask(grid)] == [expected] * 2
    assert [reply.content["m"]["count"] for reply in ask(LocalGrid(counting_app(), 2))] == [1, 1]


def test_a_change_that_one_client_makes_to_its_message_is_not_seen_by_the_next() -> None:
    content = RecordDict({"config": ConfigRecord({"lr": 0.1})})
    grid = LocalGrid(counting_app(), 3)
    assert len(ask(grid, content)) == 3  # `counting_app` asserts it
    assert list(content) == ["config"]


@pytest.mark.parametrize("message_type", ["train", "evaluate", "query.unknown"])
def test_a_value_error_of_a_client_app_is_an_error_reply(message_type: str) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ValueError("no data")

    grid = LocalGrid(app, 1)
    [node] = grid.get_node_ids()
    [reply] = grid.send_and_receive([Message(RecordDict(), node, message_type)])
    assert reply.has_error()
    assert reply.metadata.src_node_id == node
    if message_type == "train":
        assert reply.error.reason == "<class 'ValueError'>:<'no data'>"
    else:
        assert message_type.split(".")[-1] in reply.error.reason


def test_any_other_exception_of_a_client_app_is_raised_to_the_test() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise KeyError("a bug")

    grid = LocalGrid(app, 2)
    with pytest.raises(KeyError, match="a bug"):
        run_rounds(grid, FedAvg(), to_arrays(nn.Linear(2, 1)), num_rounds=1, guard=None)


def test_each_reply_can_be_pulled_once_by_the_id_of_its_message() -> None:
    grid = LocalGrid(counting_app(), 3)
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    ids = list(grid.push_messages(messages))
    assert sorted(ids) == sorted(message.metadata.message_id for message in messages)
    for message in messages:
        [reply] = grid.pull_messages([message.metadata.message_id])
        assert reply.metadata.src_node_id == message.metadata.dst_node_id
        assert reply.metadata.reply_to_message_id == message.metadata.message_id


def test_messages_that_were_sent_are_listed_by_type() -> None:
    app = torch_client_app(
        lambda config, context: nn.Linear(2, 1),
        lambda model, config, context: {"num-examples": 1},
        lambda model, config, context: {"num-examples": 1},
    )
    grid = LocalGrid(app, 2)
    run_rounds(grid, FedAvg(), to_arrays(nn.Linear(2, 1)), num_rounds=2)
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds == ["train", "train", "evaluate", "evaluate"] * 2
    assert grid.sent_of_type("train") == [*grid.sent[:2], *grid.sent[4:6]]


def test_a_subclass_may_change_a_message_or_its_reply() -> None:
    class Muting(LocalGrid):
        def reply(self, message: Message) -> Message:
            reply = super().reply(message)
            if self.partition(message.metadata.dst_node_id) == 1:
                reply.content["arrays"] = ArrayRecord()
            return reply

    grid = Muting(counting_app(), 2)
    by_partition = {grid.partition(r.metadata.src_node_id): list(r.content) for r in ask(grid)}
    assert by_partition == {0: ["m"], 1: ["m", "arrays"]}


def test_a_node_whose_reply_is_none_does_not_answer() -> None:
    class Dead(LocalGrid):
        def reply(self, message: Message) -> Message | None:
            is_dead = self.partition(message.metadata.dst_node_id) == 1
            return None if is_dead else super().reply(message)

    grid = Dead(counting_app(), 3)
    assert sorted(answered(grid, ask(grid))) == [0, 2]


def test_replies_of_two_pushes_can_be_pulled_in_any_order_and_once() -> None:
    grid = LocalGrid(counting_app(), 2)
    [node, _] = grid.get_node_ids()
    first, second = (
        list(grid.push_messages([Message(RecordDict(), node, "train")])) for _ in range(2)
    )
    assert [len(list(grid.pull_messages(ids))) for ids in (second, first, first)] == [1, 1, 0]


def test_a_change_of_a_config_after_sending_does_not_reach_the_message() -> None:
    grid = LocalGrid(counting_app(), 1)
    [node] = grid.get_node_ids()
    config = ConfigRecord({"lr": 0.1})
    grid.push_messages([Message(RecordDict({"config": config}), node, "train")])
    config["lr"] = 0.2
    assert grid.sent[0].content["config"]["lr"] == 0.1
