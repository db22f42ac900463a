"""The ServerApp: average what the clients learned, evaluate it, and write Shakespeare."""

import logging

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.app.typing import ConfigRecordValues
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_adapter import Guarded, Seeded, load_arrays, to_arrays
from gpt_core import GPT, evaluate, stream
from nanogpt_flower.artifacts import History, RunDirectory
from nanogpt_flower.composition import model_config, runtime
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, load_corpus, sequential_batches

app = ServerApp()
logger = logging.getLogger("flwr.nanogpt_flower")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Check everything that can be wrong, then run the rounds."""
    settings = Settings.from_run_config(context.run_config)
    run = runtime(settings)
    corpus = load_corpus(settings.corpus)
    tokenizer = CharTokenizer.from_text(corpus.text)
    prompt = torch.from_numpy(tokenizer.encode(settings.sample_prompt).astype("int64"))[None]
    validation = tokenizer.encode(corpus.split()[1])
    directory = RunDirectory.create(settings.output_dir, context.run_id)

    torch.manual_seed(settings.seed)
    model = GPT(model_config(settings, tokenizer.vocab_size))
    directory.write_config(settings, corpus, run, model)
    logger.info("output: %s", directory.path)
    logger.info("corpus: %s (%s)", corpus.name, corpus.source)
    logger.info("model: %.2fM parameters; server: %s", model.num_parameters() / 1e6, run)
    history = History(directory, note=corpus.note)
    initial = to_arrays(model)
    prepared = run.prepare(model)

    def evaluate_round(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        load_arrays(model, arrays)
        batches = sequential_batches(validation, settings.batch_size, settings.block_size)
        loss = evaluate(prepared, batches, runtime=run)
        directory.save_model(model, tokenizer)
        history.finish_round(server_round, loss)
        return MetricRecord({"val-loss": loss})

    strategy = FedAvg(
        fraction_train=settings.fraction_train,
        fraction_evaluate=settings.fraction_evaluate,
        min_train_nodes=1,
        min_evaluate_nodes=1,
        train_metrics_aggr_fn=history.aggregate("train-loss"),
        evaluate_metrics_aggr_fn=history.aggregate("val-loss"),
    )
    to_clients: dict[str, ConfigRecordValues] = {
        "tokenizer": tokenizer.to_json(),
        "corpus": corpus.name,
        "corpus-sha256": corpus.sha256,
    }
    Seeded(Guarded(strategy), seed=settings.seed).start(
        grid,
        initial,
        num_rounds=settings.num_server_rounds,
        timeout=float("inf"),
        train_config=ConfigRecord(to_clients),
        evaluate_config=ConfigRecord(to_clients),
        evaluate_fn=evaluate_round,
    )

    tokens = stream(
        model,
        prompt,
        settings.sample_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
    )
    sample = settings.sample_prompt + tokenizer.decode([int(token) for token in tokens])
    directory.write_sample(sample)
    print(history.table(), flush=True)
    print(f"\n--- sample\n{sample}\n---\noutput: {directory.path}", flush=True)
