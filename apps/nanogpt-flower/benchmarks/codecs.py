"""The app's clients and server in one process: bytes, time and loss of every codec.

    python benchmarks/codecs.py [key=value ...] [--codecs fp32,bf16,int8,int4,2-bit]

Each codec is used both ways ("2-bit/int8": up in 2 bits, down in 8), for a whole federation of two
clients at the app's default settings but for those given. Messages are counted as they leave either
side.
"""

import argparse
import json
import random
import statistics
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import flower_adapter.strategies.wired
import flower_adapter.wire
from flower_adapter import Guarded, Seeded, Wired, load_arrays, to_arrays
from gpt_core import GPT, evaluate
from nanogpt_flower.client_app import app
from nanogpt_flower.composition import model_config, runtime
from nanogpt_flower.server_app import outer_strategy, validation_split
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, load_corpus, sequential_batches


class OneProcess(Grid):
    """A grid that runs the ClientApp of each node at once, and counts the bytes."""

    def __init__(self, client_app: ClientApp, run_config: dict[str, Any], num_nodes: int) -> None:
        self.app = client_app
        self.contexts = {
            node: Context(
                1,
                node,
                {"partition-id": node - 1, "num-partitions": num_nodes},
                RecordDict(),
                run_config,
            )
            for node in range(1, num_nodes + 1)
        }
        self.bytes: dict[str, list[int]] = defaultdict(list)
        self.waiting: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            kind = message.metadata.message_type
            message_id = message.metadata.__dict__["_message_id"] = str(uuid4())
            self.bytes[f"{kind} down"].append(size(message))
            reply = self.app(message, self.contexts[message.metadata.dst_node_id])
            self.bytes[f"{kind} up"].append(size(reply))
            self.waiting[message_id] = reply
            yield message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.waiting.pop(message_id) for message_id in message_ids]

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(list(self.push_messages(messages)))


def size(message: Message) -> int:
    return sum(record.count_bytes() for record in message.content.values())


def federation(settings: Settings) -> None:
    """One federation, and a line of its figures."""
    corpus = load_corpus(settings.corpus)
    tokenizer = CharTokenizer.from_text(corpus.text)
    validation = validation_split(settings, corpus, tokenizer)
    torch.manual_seed(settings.seed)
    run, model = runtime(settings), GPT(model_config(settings, tokenizer.vocab_size))
    losses = []

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        load_arrays(model, arrays)
        batches = sequential_batches(validation, settings.batch_size, settings.block_size)
        losses.append(evaluate(model, batches, runtime=run))
        print(f"  {settings.uplink} round {server_round}: {losses[-1]:.4f}", flush=True)
        return MetricRecord({"val-loss": losses[-1]})

    to_clients = {
        "tokenizer": tokenizer.to_json(),
        "corpus": corpus.name,
        "corpus-sha256": corpus.sha256,
    }
    grid = OneProcess(app, settings.to_run_config(), settings.min_clients)
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds[name].append(time.perf_counter() - start)

        return call

    wire, wired = flower_adapter.wire, flower_adapter.strategies.wired
    with (
        patch.object(wire, "encode", timed("encode", wire.encode)),
        patch.object(wired, "encode", timed("encode", wired.encode)),
        patch.object(wire, "decode", timed("decode", wire.decode)),
        patch.object(wired, "decode", timed("decode", wired.decode)),
    ):
        strategy = Guarded(
            Wired(outer_strategy(settings), uplink=settings.uplink, downlink=settings.downlink)
        )
        Seeded(strategy, seed=settings.seed).start(
            grid,
            to_arrays(model),
            num_rounds=settings.num_server_rounds,
            train_config=ConfigRecord(to_clients),
            evaluate_config=ConfigRecord(to_clients),
            evaluate_fn=evaluate_fn,
        )
    figures = {
        "codec": f"{settings.uplink} up, {settings.downlink} down",
        "losses": [round(loss, 4) for loss in losses],
        "first message MB": grid.bytes["train down"][0] / 1e6,
        **{f"{kind} MB": statistics.median(sent) / 1e6 for kind, sent in grid.bytes.items()},
        **{f"{name} ms": statistics.median(took) * 1e3 for name, took in seconds.items()},
    }
    print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--codecs", default="fp32,bf16,int8,int4,2-bit")
    options = parser.parse_args()
    given = tomllib.loads("\n".join(options.settings))
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)  # as in a ServerApp: else no message can be made
    for codec in options.codecs.split(","):
        uplink, _, downlink = codec.partition("/")
        random.seed(0)
        codecs = {"uplink": uplink, "downlink": downlink or uplink}
        federation(Settings.from_run_config({**given, **codecs}))


if __name__ == "__main__":
    main()
