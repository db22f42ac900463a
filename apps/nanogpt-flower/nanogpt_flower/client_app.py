"""The ClientApp, which trains and evaluates the global model on this client's own text."""

import hashlib
import json
import logging
import time
from dataclasses import asdict
from math import inf

import numpy as np
import torch
from flwr.app import ConfigRecord, Context

from flower_adapter import (
    AuditLog,
    DiskState,
    Refusal,
    compression_mod,
    derive,
    policy_mod,
    restore_state,
    save_state,
    state_digest,
    torch_client_app,
)
from gpt_core import (
    GPT,
    ConfigError,
    Progress,
    build_optimizer,
    evaluate,
    train_steps,
)
from nanogpt_flower import progress
from nanogpt_flower.client_node import (
    audit_path,
    default_policy,
    is_reproducible,
    keeps_ended_runs,
    policy,
    secret,
    state_path,
    text_name,
)
from nanogpt_flower.client_text import client_part, directory_part, label, model_tokenizer
from nanogpt_flower.composition import VOCABULARY, client_seed, model_config, runtime
from nanogpt_flower.schedule import learning_rate, smallest_learning_rate_sum
from nanogpt_flower.settings import Settings, SettingsError
from nanogpt_flower.startup import leave_out_the_compiler
from shakespeare_data import Batches, CharTokenizer, Part, sequential_batches

logger = logging.getLogger("flwr.nanogpt_flower")


def build_model(config: ConfigRecord, context: Context) -> GPT:
    """Create a model from the settings in `context` and the vocabulary in `config`.

    `torch_client_app` then loads the server's weights into this model.
    """
    return GPT(model_config(run_settings(context), model_tokenizer(config).vocab_size))


def run_settings(context: Context) -> Settings:
    """Read the settings of the run.

    Raises:
        Refusal: the server has set a value that is not allowed.
    """
    try:
        return Settings.from_run_config(context.run_config)
    except SettingsError as error:
        raise Refusal("settings", "a setting of the run is not allowed") from error


def server_round(config: ConfigRecord) -> int:
    """Return the round of a message.

    Raises:
        Refusal: the message has no round.
    """
    value = config.get("server-round")
    if not isinstance(value, int):
        raise Refusal("message", "server-round is missing")
    return value


def measure(config: ConfigRecord, context: Context) -> dict[str, float]:
    """Compute what the policy limits, without a model and without the server's arrays."""
    settings, tokenizer = run_settings(context), model_tokenizer(config)
    part = client_part(settings, config, context)
    return measure_part(settings, part, tokenizer, server_round(config))


def measure_part(
    settings: Settings, part: Part, tokenizer: CharTokenizer, server_round: int
) -> dict[str, float]:
    """Compute what a round of training on this text takes.

    Raises:
        Refusal: there is no model of this shape.
    """
    steps = num_steps(settings, part)
    windows = steps * settings.batch_size
    try:
        shape = model_config(settings, tokenizer.vocab_size)
    except ConfigError as error:
        raise Refusal("settings", "the shape of the model is not allowed") from error
    return {
        "characters": len(part.train),
        "steps": steps,
        "windows": windows,
        "tokens": windows * settings.block_size,
        "learning-rate-sum": smallest_learning_rate_sum(settings, steps, server_round),
        "parameters": shape.num_parameters(),
        "vocabulary": tokenizer.vocab_size,
    }


def train(model: GPT, config: ConfigRecord, context: Context) -> dict[str, float]:
    """Train for one round and return the metrics."""
    settings, at = run_settings(context), server_round(config)
    part = client_part(settings, config, context)
    logger.info("[%s] trains on %s characters", text_name(context), f"{len(part.train):,}")
    client = label(context)
    if is_reproducible(context):
        seed = client_seed(settings, client, at)
    else:
        seed = secret_seed(model, config, context)
    rules = policy(context)
    longest = rules.limits["seconds"].max if rules and "seconds" in rules.limits else inf
    return train_part(
        model, part, context, client=client, server_round=at, seed=seed, max_seconds=longest
    )


def secret_seed(model: GPT, config: ConfigRecord, context: Context) -> list[int]:
    """Return a seed that nobody without the secret of this client can compute.

    A round that a resumed run repeats has the same seed. Any other request has another seed: other
    weights, other settings or another optimizer state in the same round must not show the server
    the same windows again.
    """
    asked = {key: context.run_config.get(key) for key in default_policy().run_config}
    weights = hashlib.sha256()
    for tensor in model.state_dict().values():
        weights.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    request = (
        str(config.get("tokenizer")),
        str(config["server-round"]),
        json.dumps(asked, sort_keys=True),
        weights.hexdigest(),
        state_digest(context),
    )
    return list(derive(secret(context), "draws", *request))


def train_part(
    model: GPT,
    part: Part,
    context: Context,
    *,
    client: str,
    server_round: int,
    seed: list[int],
    max_seconds: float = inf,
) -> dict[str, float]:
    """Train on a text for one round and return the metrics.

    The optimizer continues from its state in `context` at the end of the previous round.

    Args:
        model: the model, which is trained in place.
        part: the text.
        context: the settings of the run, and the state of the client.
        client: the name of the client in the log.
        server_round: the round, which decides the learning rate.
        seed: decides the batches and the dropout.
        max_seconds: the longest time that the round may take.

    Raises:
        Refusal: the round takes longer.
    """
    settings = run_settings(context)
    deadline = time.monotonic() + max_seconds
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))  # dropout
    run = runtime(settings)
    logger.info("[%s] computes with %s", client, run)

    if not run.compile:
        leave_out_the_compiler()
    prepared = run.prepare(model)
    optimizer = build_optimizer(
        model,
        settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.muon_momentum,
        embedding_rate=settings.embedding_rate,
    )
    state = restore_state(context, valid_for=model, optimizer=optimizer)
    steps_before = state["steps"] if state else 0
    steps = num_steps(settings, part)

    def rate(step: int) -> float:
        if time.monotonic() > deadline:
            raise Refusal("policy", f"the round takes longer than {max_seconds:g} seconds")
        return learning_rate(settings, steps, server_round, step, steps_before + step)

    def report(now: Progress) -> None:
        logger.info("[%s] %s", client, now)
        progress.emit("client", round=server_round, client=client, **asdict(now))

    result = train_steps(
        prepared,
        Batches(
            part.train,
            settings.batch_size,
            settings.block_size,
            seed=seed,
            windows=settings.windows,  # type: ignore[arg-type]
        ),
        optimizer,
        steps=steps,
        runtime=run,
        grad_clip=settings.grad_clip,
        learning_rate=rate,
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
    settings = run_settings(context)
    part, run = client_part(settings, config, context), runtime(settings)
    progress.emit("evaluate", round=server_round(config), client=label(context))
    batches = sequential_batches(part.val, settings.batch_size, settings.block_size)
    loss = evaluate(run.prepare(model), batches, runtime=run)
    return {"val-loss": loss, "num-examples": len(part.val) - 1}


def vocabulary(context: Context) -> ConfigRecord:
    """Return the vocabulary of this client's text. A server that has no text asks for it."""
    tokenizer = directory_part(context).tokenizer
    return ConfigRecord({"label": label(context), "tokenizer": tokenizer.to_json()})


audit = AuditLog(audit_path)
app = torch_client_app(
    build_model,
    train,
    evaluate_part,
    label=label,
    queries={VOCABULARY: vocabulary},
    skeleton=build_model,
    mods=[
        audit,
        policy_mod(policy, measure=measure, directory=state_path),
        DiskState(state_path, keep_ended=keeps_ended_runs),
        compression_mod,
        audit.update,
    ],
)
