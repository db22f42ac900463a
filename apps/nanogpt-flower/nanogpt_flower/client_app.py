"""The ClientApp: train and evaluate the global model on this client's own text."""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from flwr.app import ConfigRecord, Context

from flower_adapter import Durable, restore_state, save_state, torch_client_app, wire_mod
from gpt_core import (
    GPT,
    Progress,
    build_optimizer,
    evaluate,
    learning_rate_at,
    train_steps,
)
from gpt_core.train import Batch
from nanogpt_flower.composition import (
    NO_CORPUS,
    VOCABULARY,
    check_vocabulary,
    model_config,
    parts,
    runtime,
    seed_for,
)
from nanogpt_flower.settings import Settings
from shakespeare_data import (
    Batches,
    CharTokenizer,
    DataError,
    Part,
    load_corpus,
    read_part,
    sequential_batches,
)

logger = logging.getLogger("flwr.nanogpt_flower")


def label(context: Context, part: Part | None = None) -> str:
    """This client's name in every run: of its text, wherever that lies, or of its partition.

    `part` is this client's, if it has been read already.
    """
    name = place(context)
    if "data-path" in context.node_config:
        part = read_part(name) if part is None else part
        return f"text {part.fingerprint}"
    return name


def place(context: Context) -> str:
    """Where this client's text is: its data directory, or its partition."""
    node = context.node_config
    if "data-path" in node:
        return str(node["data-path"])
    if "partition-id" in node and "num-partitions" in node:
        return f"partition {int(node['partition-id']):04d} of {int(node['num-partitions'])}"
    raise DataError(
        f"the node config {dict(node)} names no data; give the SuperNode \"data-path='…'\", or "
        '"partition-id=0 num-partitions=2"'
    )


def own_part(settings: Settings, config: ConfigRecord, context: Context) -> Part:
    """The text of this client, checked against the model's vocabulary."""
    node = context.node_config
    tokenizer = CharTokenizer.from_json(str(config["tokenizer"]))
    name = place(context)
    if "data-path" in node:
        part = read_part(name, block_size=settings.block_size)
    elif config["corpus"] == NO_CORPUS:
        raise DataError(f"the server has no corpus, so {name} needs a data-path of its own")
    else:
        corpus = load_corpus(str(config["corpus"]))
        if corpus.sha256 != config["corpus-sha256"]:
            raise DataError(
                f"the corpus {corpus.name!r} of {name} has SHA-256 {corpus.sha256}; the server's "
                f"has {config['corpus-sha256']!s}"
            )
        everyone = parts(settings, corpus, tokenizer, int(node["num-partitions"]))
        part = everyone[int(node["partition-id"])]
    check_vocabulary(name, part.tokenizer, "the server's model", tokenizer)
    return part


def build_model(config: ConfigRecord, context: Context) -> GPT:
    settings = Settings.from_run_config(context.run_config)
    tokenizer = CharTokenizer.from_json(str(config["tokenizer"]))
    return GPT(model_config(settings, tokenizer.vocab_size))


def training_batches(
    part: Part, settings: Settings, seed: list[int]
) -> tuple[Iterator[Batch], int]:
    """Batches of one round and their number: `max-steps` random ones, or `local-epochs` passes."""
    shape = (settings.batch_size, settings.block_size)
    if settings.max_steps:
        return Batches(part.train, *shape, seed=seed), settings.max_steps
    epochs = Batches(part.train, *shape, seed=seed, epochs=settings.local_epochs)
    return epochs, len(epochs)


def train(model: GPT, config: ConfigRecord, context: Context) -> dict[str, float]:
    """One client's round: from the global model, with the optimizer state of its last round."""
    settings = Settings.from_run_config(context.run_config)
    part, name = own_part(settings, config, context), place(context)
    seed = seed_for(settings, label(context, part), int(str(config["server-round"])))
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))  # dropout
    run = runtime(settings)
    logger.info("[%s] trains on %s characters: %s", name, f"{len(part.train):,}", run)

    prepared = run.prepare(model)
    optimizer = build_optimizer(model, settings.optimizer, learning_rate=settings.learning_rate)
    state = restore_state(context, valid_for=model, optimizer=optimizer)
    done = state["steps"] if state else 0
    batches, steps = training_batches(part, settings, seed)

    def learning_rate(step: int) -> float:
        return learning_rate_at(
            done + step, peak=settings.learning_rate, warmup_steps=settings.warmup_steps
        )

    def report(progress: Progress) -> None:
        logger.info("[%s] %s", name, progress)

    result = train_steps(
        prepared,
        batches,
        optimizer,
        steps=steps,
        runtime=run,
        learning_rate=learning_rate,
        on_progress=report,
    )
    save_state(context, valid_for=model, optimizer=optimizer, steps=done + result.steps)
    return {"train-loss": result.loss, "num-examples": len(part.train)}


def evaluate_part(model: GPT, config: ConfigRecord, context: Context) -> dict[str, float]:
    """The global model's loss on this client's validation part, whole."""
    settings = Settings.from_run_config(context.run_config)
    part, run = own_part(settings, config, context), runtime(settings)
    batches = sequential_batches(part.val, settings.batch_size, settings.block_size)
    loss = evaluate(run.prepare(model), batches, runtime=run)
    return {"val-loss": loss, "num-examples": len(part.val) - 1}


def vocabulary(context: Context) -> ConfigRecord:
    """The characters of this client's own directory, for a server that has no text."""
    name = place(context)
    if "data-path" not in context.node_config:
        raise DataError(f"{name} has no data-path to take a vocabulary from")
    return ConfigRecord({"label": name, "tokenizer": read_part(name).tokenizer.to_json()})


def state_directory(context: Context) -> str | None:
    """Where this client keeps its state, if it is to outlive a restart."""
    node = context.node_config
    return str(node.get("state-path", context.run_config["client-state"])) or None


app = torch_client_app(
    build_model,
    train,
    evaluate_part,
    label=label,
    queries={VOCABULARY: vocabulary},
    mods=[Durable(state_directory, label=label), wire_mod],
)
