"""The ServerApp, which averages the clients' models, evaluates the average and writes a sample."""

import logging
from collections.abc import Iterator

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from flower_adapter import (
    Checkpoints,
    Guard,
    OuterOptimizer,
    RoundRecord,
    StreamingFedAvg,
    load_arrays,
    run_rounds,
    to_arrays,
)
from gpt_core import GPT, evaluate, stream
from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.composition import (
    NO_CORPUS,
    compression,
    model_config,
    runtime,
    sample_prompt,
)
from nanogpt_flower.history import History
from nanogpt_flower.server_text import ask_vocabulary, wait_for_clients
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, Corpus, load_corpus, sequential_batches

NO_CORPUS_NOTE = "the server has no text: val loss is the mean over the clients' own text"

app = ServerApp()
logger = logging.getLogger("flwr.nanogpt_flower")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Prepare the run, run all rounds, and write the sample."""
    settings = Settings.from_run_config(context.run_config)
    run, codecs = runtime(settings), compression(settings)
    corpus = None if settings.corpus == NO_CORPUS else load_corpus(settings.corpus)
    tokenizer = CharTokenizer.from_text(corpus.text) if corpus else ask_vocabulary(grid, settings)
    prompt = sample_prompt(settings, tokenizer)
    validation = None if corpus is None else tokenizer.encode(corpus.split()[1])
    directory = run_directory(settings, corpus, context)

    torch.manual_seed(settings.seed)
    model = GPT(model_config(settings, tokenizer.vocab_size))
    initial, prepared = to_arrays(model), run.prepare(model)
    logger.info("output: %s", directory.path)
    logger.info("corpus: %s", f"{corpus.name} ({corpus.source})" if corpus else "none here")
    logger.info("model: %.2fM parameters; server: %s", model.num_parameters() / 1e6, run)
    history = History(directory, note=corpus.note if corpus else NO_CORPUS_NOTE)

    def evaluate_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if validation is None:
            return None
        load_arrays(model, arrays)
        batches = sequential_batches(validation, settings.batch_size, settings.block_size)
        return MetricRecord({"val-loss": evaluate(prepared, batches, runtime=run)})

    def finish_round(record: RoundRecord) -> None:
        if not history.rows:  # this is the first call
            directory.write_config(settings, corpus, run, model)
        if record.arrays is not None:
            load_arrays(model, record.arrays)
            directory.save_model(model, tokenizer)
        history.add(record)

    wait_for_clients(grid, settings.min_clients)
    run_rounds(
        grid,
        strategy(settings),
        initial,
        num_rounds=settings.num_server_rounds,
        timeout=settings.round_timeout or None,
        seed=settings.seed,
        guard=Guard(min_replies=settings.min_replies, max_failed_rounds=settings.max_failed_rounds),
        compression=codecs,
        outer=OuterOptimizer(
            learning_rate=settings.outer_learning_rate, momentum=settings.outer_momentum
        ),
        checkpoints=Checkpoints(
            directory.checkpoints,
            keep=settings.keep_checkpoints,
            best="val-loss",
            resume=bool(settings.resume_from),
        ),
        train_config=config_for_clients(corpus, tokenizer),
        evaluate_config=config_for_clients(corpus, tokenizer),
        evaluate_fn=evaluate_round,
        on_round=finish_round,
    )
    sample = prompt + "".join(write(model, tokenizer, prompt, settings))
    directory.write_sample(sample)
    print(history.table(), flush=True)
    print(f"\n--- sample\n{sample}\n---\noutput: {directory.path}", flush=True)


def run_directory(settings: Settings, corpus: Corpus | None, context: Context) -> RunDirectory:
    """Open the directory that `resume-from` names. Create a new one if `resume-from` is empty."""
    if settings.resume_from:
        return RunDirectory.resume(settings, corpus)
    return RunDirectory.create(settings.output_dir, context.run_id)


def config_for_clients(corpus: Corpus | None, tokenizer: CharTokenizer) -> ConfigRecord:
    """Return the vocabulary of the model and the name and SHA-256 of the server's corpus."""
    return ConfigRecord(
        {
            "tokenizer": tokenizer.to_json(),
            "corpus": corpus.name if corpus else NO_CORPUS,
            "corpus-sha256": corpus.sha256 if corpus else "",
        }
    )


def strategy(settings: Settings) -> StreamingFedAvg:
    """Create the strategy for federated averaging from the settings."""
    return StreamingFedAvg(
        fraction_train=settings.fraction_train,
        fraction_evaluate=settings.fraction_evaluate,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=settings.min_clients,
    )


def write(model: GPT, tokenizer: CharTokenizer, prompt: str, settings: Settings) -> Iterator[str]:
    """Write the sample with the model, and yield it one character at a time."""
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
