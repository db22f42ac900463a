"""Measure how much time Flower and the app add to the training of a client."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from flower_adapter import load_arrays, to_arrays
from gpt_core import GPT, Runtime, build_optimizer, train_steps
from nanogpt_flower.client_app import build_model, train
from nanogpt_flower.composition import model_config
from nanogpt_flower.settings import Settings
from shakespeare_data import Batches, CharTokenizer, load_corpus, partition

QUICK = Path(__file__).parents[1] / "nanogpt_flower" / "presets" / "quick.toml"


def test_round_of_a_client(compare: Callable[..., None], tmp_path: Path) -> None:
    """Compare one round of a client with the training steps alone.

    The round has 100 steps with the preset `quick`. It starts with the arrays that the client
    receives, and it ends with the arrays that the client sends.
    """
    text = tmp_path / "text.txt"
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 200_000)
    text.write_text(letters.astype("uint8").tobytes().decode(), encoding="utf-8")
    preset = tomllib.loads(QUICK.read_text(encoding="utf-8"))
    settings = Settings.from_run_config(
        preset | {"max-steps": 100, "device": "cpu", "corpus": str(text)}
    )

    corpus = load_corpus(settings.corpus)
    tokenizer = CharTokenizer.from_text(corpus.text)
    config = model_config(settings, tokenizer.vocab_size)
    torch.manual_seed(settings.seed)
    model, runtime = GPT(config), Runtime.resolve(device="cpu")
    to_client = ConfigRecord(
        {
            "tokenizer": tokenizer.to_json(),
            "corpus": corpus.name,
            "corpus-sha256": corpus.sha256,
            "server-round": 1,
        }
    )
    node = {"partition-id": 0, "num-partitions": 2}
    context = Context(1, 2, node, RecordDict(), settings.to_run_config())

    arrays = to_arrays(model)

    def round_of_a_client() -> ArrayRecord:
        received = build_model(to_client, context)
        load_arrays(received, arrays)
        train(received, to_client, context)
        return to_arrays(received)

    part = partition(corpus, 2, tokenizer=tokenizer)[0]
    optimizer = build_optimizer(model, settings.optimizer, learning_rate=settings.learning_rate)
    batches = Batches(part.train, settings.batch_size, settings.block_size, seed=0)
    compare(
        round_of_a_client,
        lambda: train_steps(model, batches, optimizer, steps=100, runtime=runtime),
        reference_name="the same steps without Flower",
        amount=100 * settings.batch_size * settings.block_size,
        unit="tokens",
        rounds=3,
    )


def test_batch_beside_its_training_step(compare: Callable[..., None]) -> None:
    """Compare the time to draw a batch with the time of a training step, for the preset `quick`."""
    settings = Settings.from_run_config(
        tomllib.loads(QUICK.read_text(encoding="utf-8")) | {"device": "cpu"}
    )
    tokens = np.random.default_rng(0).integers(0, 65, 1_003_854).astype(np.uint16)
    torch.manual_seed(settings.seed)
    model, runtime = GPT(model_config(settings, 65)), Runtime.resolve(device="cpu")
    optimizer = build_optimizer(model, settings.optimizer, learning_rate=settings.learning_rate)
    batches = Batches(tokens, settings.batch_size, settings.block_size, seed=0)
    compare(
        lambda: [next(batches) for _ in range(100)],
        lambda: train_steps(model, batches, optimizer, steps=100, runtime=runtime),
        reference_name="100 training steps with their batches",
        amount=100 * settings.batch_size * settings.block_size,
        unit="tokens",
    )
