"""The ServerApp: average what the clients learned, evaluate it, and write Shakespeare."""

import logging
import time
from collections.abc import Iterator

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.app.typing import ConfigRecordValues
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from flower_adapter import (
    Checkpoint,
    Checkpointed,
    Dropped,
    Guarded,
    OuterOptimizer,
    Seeded,
    StreamingFedAvg,
    Wired,
    load_arrays,
    to_arrays,
)
from gpt_core import GPT, Runtime, evaluate, stream
from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.composition import (
    NO_CORPUS,
    VOCABULARY,
    check_vocabulary,
    model_config,
    runtime,
    sample_prompt,
)
from nanogpt_flower.history import History
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, Corpus, DataError, load_corpus, sequential_batches

REMIND_SECONDS = 30.0  # between two lines that say that clients are missing

app = ServerApp()
logger = logging.getLogger("flwr.nanogpt_flower")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Check everything that can be wrong, then run the rounds and write the sample."""
    settings = Settings.from_run_config(context.run_config)
    run = runtime(settings)
    if settings.max_steps and settings.local_epochs > 1:
        logger.warning(
            "local-epochs is %d but has no effect: max-steps is %d and decides; max-steps=0 trains "
            "for epochs",
            settings.local_epochs,
            settings.max_steps,
        )
    corpus = None if settings.corpus == NO_CORPUS else load_corpus(settings.corpus)
    tokenizer = CharTokenizer.from_text(corpus.text) if corpus else ask_vocabulary(grid, settings)
    prompt = sample_prompt(settings, tokenizer)
    validation = validation_split(settings, corpus, tokenizer)
    directory = run_directory(settings, context)

    torch.manual_seed(settings.seed)
    model = GPT(model_config(settings, tokenizer.vocab_size))
    logger.info("output: %s", directory.path)
    logger.info("corpus: %s", f"{corpus.name} ({corpus.source})" if corpus else "none here")
    logger.info("model: %.2fM parameters; server: %s", model.num_parameters() / 1e6, run)
    history = History(directory, note=corpus.note if corpus else NO_CORPUS_NOTE)
    run_rounds(grid, settings, corpus, tokenizer, validation, model, run, history)

    sample = prompt + "".join(write(model, tokenizer, prompt, settings))
    directory.write_sample(sample)
    print(history.table(), flush=True)
    print(f"\n--- sample\n{sample}\n---\noutput: {directory.path}", flush=True)


def run_directory(settings: Settings, context: Context) -> RunDirectory:
    """A new one, or that of the run that is resumed."""
    if settings.resume_from:
        return RunDirectory.resume(settings)
    return RunDirectory.create(settings.output_dir, context.run_id)


NO_CORPUS_NOTE = "the server has no text: val loss is the mean over the clients' own"


def run_rounds(
    grid: Grid,
    settings: Settings,
    corpus: Corpus | None,
    tokenizer: CharTokenizer,
    validation: NDArray[np.uint16] | None,
    model: GPT,
    run: Runtime,
    history: History,
) -> None:
    """Federated averaging; afterwards `model` is the last average, saved after every round."""
    initial = to_arrays(model)
    prepared = run.prepare(model)

    def evaluate_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if validation is None:
            return None
        load_arrays(model, arrays)
        batches = sequential_batches(validation, settings.batch_size, settings.block_size)
        return MetricRecord({"val-loss": evaluate(prepared, batches, runtime=run)})

    def finish_round(checkpoint: Checkpoint) -> None:
        if not history.rows:  # only now is it sure that the run can begin, or go on
            history.directory.write_config(settings, corpus, run, model)
        load_arrays(model, checkpoint.arrays)
        history.directory.save_model(model, tokenizer)
        history.show(checkpoint)

    guarded = Guarded(
        Wired(outer_strategy(settings), uplink=settings.uplink, downlink=settings.downlink),
        min_replies=settings.min_replies,
        max_failed_rounds=settings.max_failed_rounds,
    )
    checkpoints = history.directory.checkpoints
    strategy = Checkpointed(
        Seeded(guarded, seed=settings.seed),
        checkpoints,
        keep=settings.keep_checkpoints,
        best="val-loss",
        resume_from=checkpoints if settings.resume_from else None,
        on_round=finish_round,
    )
    to_clients: dict[str, ConfigRecordValues] = {
        "tokenizer": tokenizer.to_json(),
        "corpus": corpus.name if corpus else NO_CORPUS,
        "corpus-sha256": corpus.sha256 if corpus else "",
    }
    wait_for_clients(grid, settings.min_clients)
    strategy.start(
        grid,
        initial,
        num_rounds=settings.num_server_rounds,
        timeout=settings.round_timeout or float("inf"),
        train_config=ConfigRecord(to_clients),
        evaluate_config=ConfigRecord(to_clients),
        evaluate_fn=evaluate_round,
    )
    history.notes += left_out(guarded.dropped)


def outer_strategy(settings: Settings) -> OuterOptimizer:
    """The average of the clients, and the outer optimizer's step towards it."""
    average = StreamingFedAvg(
        fraction_train=settings.fraction_train,
        fraction_evaluate=settings.fraction_evaluate,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=settings.min_clients,
    )
    return OuterOptimizer(
        average,
        learning_rate=settings.outer_learning_rate,
        momentum=settings.outer_momentum,
    )


def left_out(dropped: list[Dropped]) -> list[str]:
    """A line for each client whose replies were dropped, and for each reason."""
    rounds: dict[tuple[int, str, str], list[int]] = {}
    for phase, server_round, node, reason in dropped:
        rounds.setdefault((node, phase, reason), []).append(server_round)
    return [
        f"LEFT OUT of {phase} in round {', '.join(map(str, missed))}: node {node}: {reason}"
        for (node, phase, reason), missed in rounds.items()
    ]


def wait_for_clients(grid: Grid, least: int) -> list[int]:
    """The connected nodes, once there are `least`; says at times for what it waits."""
    said, count = -float("inf"), -1
    while len(nodes := sorted(grid.get_node_ids())) < least:
        if len(nodes) != count or time.monotonic() - said > REMIND_SECONDS:
            said, count = time.monotonic(), len(nodes)
            logger.info("waiting for clients: %d connected, min-clients is %d", count, least)
        time.sleep(1)
    return nodes


def ask_vocabulary(grid: Grid, settings: Settings) -> CharTokenizer:
    """The vocabulary that the clients' own directories share.

    Raises:
        DataError: if a client has none to give.
        VocabularyMismatch: if two of them differ, naming both.
    """
    nodes = wait_for_clients(grid, settings.min_clients)
    queries = [Message(RecordDict(), node, f"query.{VOCABULARY}") for node in nodes]
    shared: tuple[str, CharTokenizer] | None = None
    for reply in grid.send_and_receive(queries):
        if reply.has_error():
            raise DataError(f"corpus is {NO_CORPUS!r}, and a client refused: {reply.error.reason}")
        answer = reply.content.config_records["client"]
        told = str(answer["label"]), CharTokenizer.from_json(str(answer["tokenizer"]))
        shared = shared or told
        check_vocabulary(*told, *shared)
    if shared is None:
        raise DataError(f"corpus is {NO_CORPUS!r}, and no client told its vocabulary")
    return shared[1]


def validation_split(
    settings: Settings, corpus: Corpus | None, tokenizer: CharTokenizer
) -> NDArray[np.uint16] | None:
    """The last 10 % of the server's corpus, which must hold a window and its targets."""
    if corpus is None:
        return None
    tokens = tokenizer.encode(corpus.split()[1])
    if len(tokens) <= settings.block_size:
        raise SettingsError(
            f"block-size is {settings.block_size}; the validation split of {corpus.name} has "
            f"{len(tokens)} characters, so it must be at most {len(tokens) - 1}, "
            "and with several clients less"
        )
    return tokens


def write(model: GPT, tokenizer: CharTokenizer, prompt: str, settings: Settings) -> Iterator[str]:
    """The sample, a character at a time."""
    tokens = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]
    for token in stream(
        model,
        tokens,
        settings.sample_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
    ):
        yield tokenizer.decode([int(token)])
