"""The ClientApp, which trains and evaluates the global model on this client's own text."""

import logging
from dataclasses import asdict

import numpy as np
import torch
from flwr.app import ConfigRecord, Context

from flower_adapter import (
    DiskState,
    compression_mod,
    restore_state,
    save_state,
    torch_client_app,
)
from gpt_core import GPT, Progress, build_optimizer, evaluate, learning_rate_at, train_steps
from nanogpt_flower import progress
from nanogpt_flower.client_text import client_part, directory_part, label, text_name
from nanogpt_flower.composition import VOCABULARY, client_seed, model_config, runtime
from nanogpt_flower.settings import Settings
from shakespeare_data import Batches, CharTokenizer, Part, sequential_batches

logger = logging.getLogger("flwr.nanogpt_flower")


def build_model(config: ConfigRecord, context: Context) -> GPT:
    """Create a model from the settings in `context` and the vocabulary in `config`.

    `torch_client_app` then loads the server's weights into this model.
    """
    settings = Settings.from_run_config(context.run_config)
    tokenizer = CharTokenizer.from_json(str(config["tokenizer"]))
    return GPT(model_config(settings, tokenizer.vocab_size))


def train(model: GPT, config: ConfigRecord, context: Context) -> dict[str, float]:
    """Train for one round and return the metrics."""
    settings = Settings.from_run_config(context.run_config)
    part, server_round = client_part(settings, config, context), int(str(config["server-round"]))
    logger.info("[%s] trains on %s characters", text_name(context), f"{len(part.train):,}")
    return train_part(model, part, context, client=label(context), server_round=server_round)


def train_part(
    model: GPT, part: Part, context: Context, *, client: str, server_round: int
) -> dict[str, float]:
    """Train on a text for one round and return the metrics.

    The seed depends on the client's label and on the round. The optimizer continues from its state
    in `context` at the end of the previous round.
    """
    settings = Settings.from_run_config(context.run_config)
    seed = client_seed(settings, client, server_round)
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))  # dropout
    run = runtime(settings)
    logger.info("[%s] computes with %s", client, run)

    prepared = run.prepare(model)
    optimizer = build_optimizer(model, settings.optimizer, learning_rate=settings.learning_rate)
    state = restore_state(context, valid_for=model, optimizer=optimizer)
    steps_before = state["steps"] if state else 0

    def learning_rate(step: int) -> float:
        return learning_rate_at(
            steps_before + step, peak=settings.learning_rate, warmup_steps=settings.warmup_steps
        )

    def report(now: Progress) -> None:
        logger.info("[%s] %s", client, now)
        progress.emit("client", round=server_round, client=client, **asdict(now))

    result = train_steps(
        prepared,
        Batches(part.train, settings.batch_size, settings.block_size, seed=seed),
        optimizer,
        steps=num_steps(settings, part),
        runtime=run,
        learning_rate=learning_rate,
        on_progress=report,
        progress_seconds=1.0 if progress.is_shown() else 5.0,
    )
    save_state(context, valid_for=model, optimizer=optimizer, steps=steps_before + result.steps)
    return {
        "train-loss": result.loss,
        "num-examples": len(part.train),
        "tokens": result.tokens,
        "train-seconds": result.seconds,
    }


def num_steps(settings: Settings, part: Part) -> int:
    """Return the number of training steps in one round.

    The client makes `local-epochs` passes over its text, but at most `max-steps` steps. In a pass
    it draws random windows, as nanoGPT does. The number of windows in a pass is the number of
    characters in the training text minus `block-size`, because a window can start at that many
    positions.
    """
    windows = len(part.train) - settings.block_size
    passes = settings.local_epochs * -(-windows // settings.batch_size)
    return min(passes, settings.max_steps or passes)


def evaluate_part(model: GPT, config: ConfigRecord, context: Context) -> dict[str, float]:
    """Return the loss of the global model on the whole validation text of this client."""
    settings = Settings.from_run_config(context.run_config)
    part, run = client_part(settings, config, context), runtime(settings)
    progress.emit("evaluate", round=int(str(config["server-round"])), client=label(context))
    batches = sequential_batches(part.val, settings.batch_size, settings.block_size)
    loss = evaluate(run.prepare(model), batches, runtime=run)
    return {"val-loss": loss, "num-examples": len(part.val) - 1}


def vocabulary(context: Context) -> ConfigRecord:
    """Return the vocabulary of this client's text. A server that has no text asks for it."""
    tokenizer = directory_part(context).tokenizer
    return ConfigRecord({"label": text_name(context), "tokenizer": tokenizer.to_json()})


def state_directory(context: Context) -> str | None:
    """Return the directory where this client keeps its state on disk.

    Return None if the client does not keep its state on disk.
    """
    return str(context.node_config.get("state-path", context.run_config["client-state"])) or None


app = torch_client_app(
    build_model,
    train,
    evaluate_part,
    label=label,
    queries={VOCABULARY: vocabulary},
    mods=[DiskState(state_directory, label=label), compression_mod],
)
