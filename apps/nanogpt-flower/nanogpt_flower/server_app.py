"""The ServerApp, which averages the clients' models, evaluates the average and writes a sample."""

import logging

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
from gpt_core import GPT, Runtime, evaluate, stream
from nanogpt_flower import progress
from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.composition import (
    NO_CORPUS,
    compression,
    model_config,
    runtime,
    sample_prompt,
    validation_text,
)
from nanogpt_flower.history import History
from nanogpt_flower.schedule import describe_schedule, schedule_notes
from nanogpt_flower.server_text import ask_vocabulary, wait_for_clients
from nanogpt_flower.settings import Settings
from nanogpt_flower.trackers import Trackers, check_trackers
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
    validation = None if corpus is None else tokenizer.encode(validation_text(settings, corpus))
    check_trackers(settings.report_to)
    directory = run_directory(settings, corpus)

    torch.manual_seed(settings.seed)
    model = GPT(model_config(settings, tokenizer.vocab_size))
    initial, prepared = to_arrays(model), run.prepare(model)
    logger.info("output: %s", directory.path)
    logger.info("corpus: %s", f"{corpus.name} ({corpus.source})" if corpus else "none here")
    logger.info("model: %.2fM parameters; server: %s", model.num_parameters() / 1e6, run)
    logger.info("learning rate: %s", describe_schedule(settings))
    note = corpus.note if corpus else NO_CORPUS_NOTE

    def evaluate_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if validation is None:
            return None
        load_arrays(model, arrays)
        batches = sequential_batches(validation, settings.batch_size, settings.block_size)
        return MetricRecord({"val-loss": evaluate(prepared, batches, runtime=run)})

    def finish_round(record: RoundRecord) -> None:
        if not history.rows:  # this is the first call
            directory.write_config(settings, corpus, run, model)
        if record.arrays is None:
            history.replay(record)
            return
        load_arrays(model, record.arrays)
        directory.save_model(model, tokenizer)
        length = settings.round_sample_tokens
        history.add(record, write(model, tokenizer, prompt, length, settings) if length else None)

    nodes = wait_for_clients(grid, settings.min_clients)
    emit_plan(settings, corpus, run, model, directory, len(nodes), note)
    with Trackers(
        settings.report_to, directory.path, directory.path.name, settings.to_run_config()
    ) as trackers:
        model_bytes = sum(len(array.data) for array in initial.values())
        history = History(directory, model_bytes=model_bytes, trackers=trackers, note=note)
        run_rounds(
            grid,
            strategy(settings),
            initial,
            num_rounds=settings.num_server_rounds,
            timeout=settings.round_timeout or None,
            seed=settings.seed,
            guard=Guard(
                min_replies=settings.min_replies,
                max_failed_rounds=settings.max_failed_rounds,
                max_weight_ratio=settings.max_weight_ratio,
            ),
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
    sample = write(model, tokenizer, prompt, settings.sample_tokens, settings)
    directory.write_sample(sample)
    history.write(running=False)
    print(history.table(), flush=True)
    print(f"\n--- sample\n{sample}\n---\noutput: {directory.path}", flush=True)
    progress.emit("end")


def emit_plan(
    settings: Settings,
    corpus: Corpus | None,
    run: Runtime,
    model: GPT,
    directory: RunDirectory,
    num_clients: int,
    note: str,
) -> None:
    """Report the plan of the run to the program that shows its progress."""
    steps = settings.max_steps or None
    tokens = steps and num_clients * steps * settings.batch_size * settings.block_size
    # A reason reads "precision bf16: cpu hardware with bf16 found".
    reasons = dict(reason.split(" ", 1) for reason in run.reasons if ":" in reason)
    reasons = {key: reasons[key] for key in ("device", "precision", "compile") if key in reasons}
    if corpus and settings.corpus == "auto":
        reasons["corpus"] = corpus.name
    progress.emit(
        "plan",
        text=corpus.name if corpus else NO_CORPUS,
        characters=corpus and len(corpus.text),
        clients=num_clients,
        partition=settings.partition,
        parameters=model.num_parameters(),
        rounds=settings.num_server_rounds,
        steps=steps,
        tokens_per_round=tokens,
        tokens=tokens and tokens * settings.num_server_rounds,
        device=str(run.device),
        precision=run.precision,
        compile="on" if run.compile else "off",
        first_round=directory.newest_checkpoint + 1 if settings.resume_from else 1,
        auto=reasons,
        notes=[*([note] if note else []), *schedule_notes(settings)],
        directory=str(directory.path),
    )


def run_directory(settings: Settings, corpus: Corpus | None) -> RunDirectory:
    """Open the directory that `resume-from` names. Create a new one if `resume-from` is empty."""
    if settings.resume_from:
        return RunDirectory.resume(settings, corpus)
    return RunDirectory.create(settings.output_dir, settings.run_name)


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


def write(
    model: GPT, tokenizer: CharTokenizer, prompt: str, length: int, settings: Settings
) -> str:
    """Return the prompt and the `length` characters that the model writes after it."""
    tokens = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]
    written = stream(
        model,
        tokens,
        length,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
    )
    return prompt + "".join(tokenizer.decode([int(token)]) for token in written)
