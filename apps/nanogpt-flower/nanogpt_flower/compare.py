"""Compare training alone, training together, and training on all text in one place.

Each client has the same budget of steps in all three cases:

- alone: a client trains on its own text, without a server.
- federated: all clients train together, as in `nanogpt-flower run`.
- one place: one machine trains on the texts of all clients. It makes the same number of steps, and
  each batch is as large as the batches of all clients together. So it sees as many tokens as the
  federation.

All models start from the same weights. Each model is evaluated on the validation text of each
client, and on the validation texts of all clients together.
"""

import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from flwr.app import Context, RecordDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gpt_core import GPT, evaluate
from nanogpt_flower import progress
from nanogpt_flower.artifacts import RunDirectory, machine, new_run_name, writable_directory
from nanogpt_flower.client_app import train_part
from nanogpt_flower.composition import client_seed, model_config, parts, runtime
from nanogpt_flower.interrupts import ENDING_SIGNALS, deferred
from nanogpt_flower.local.launch import LOG_FILE, PARTS_FILE, Launch, check, run
from nanogpt_flower.report import name_of, write_comparison
from nanogpt_flower.settings import Settings, SettingsError
from nanogpt_flower.trained import load_model
from shakespeare_data import CharTokenizer, Partition, load_corpus, sequential_batches

RESULT_FILE, PICTURE_FILE = "comparison.json", "comparison.png"
ONE_PLACE = "one place"
PLAIN_SECONDS = 10.0  # time between two lines of progress without a terminal
ARMS = ("alone", "federated", "one_place")
COLOURS = {"alone": "#85817a", "federated": "#1a5fa8", "one_place": "#c4570e"}


@dataclass(frozen=True)
class Arm:
    """A training without a server: of one client, or of all text in one place."""

    run_config: Mapping[str, Any]
    num_clients: int
    client: int | None  # the number of the client; None is all text in one place

    @property
    def name(self) -> str:
        """The name that the progress shows."""
        return ONE_PLACE if self.client is None else f"client {self.client} alone"

    @property
    def label(self) -> str:
        """The label of the client. One place is a federation with a single client."""
        if self.client is None:
            return "partition 0000 of 1"
        return f"partition {self.client:04d} of {self.num_clients}"


@dataclass(frozen=True)
class Losses:
    """The losses of one model in nats per character."""

    own: list[float]  # on the validation text of each client
    everybody: float  # on the validation texts of all clients together


def divided(run_config: Mapping[str, Any], num_clients: int) -> Partition:
    """Divide the text of a run among the clients, as the run does."""
    settings = Settings.from_run_config(run_config)
    corpus = load_corpus(settings.corpus)
    return parts(settings, corpus, CharTokenizer.from_text(corpus.text), num_clients)


def train_arm(arm: Arm) -> tuple[GPT, float]:
    """Train without a server, and return the model and the seconds of training."""
    settings = Settings.from_run_config(arm.run_config)
    text = divided(arm.run_config, arm.num_clients)
    if arm.client is None:
        settings = replace(settings, batch_size=settings.batch_size * arm.num_clients)
    part = text.pooled() if arm.client is None else text[arm.client]
    torch.manual_seed(settings.seed)  # the first weights of the server
    model = GPT(model_config(settings, text.tokenizer.vocab_size))
    context = Context(1, 1, {}, RecordDict(), settings.to_run_config())
    started = time.monotonic()
    for server_round in range(1, settings.num_server_rounds + 1):
        seed = client_seed(settings, arm.label, server_round)
        train_part(model, part, context, client=arm.label, server_round=server_round, seed=seed)
    return model, time.monotonic() - started


def losses(model: GPT, settings: Settings, text: Partition) -> Losses:
    """Evaluate a model on the validation text of each client, and on all of them together."""
    run = runtime(settings)
    prepared = run.prepare(model)

    def loss(part: Any) -> float:
        batches = sequential_batches(part.val, settings.batch_size, settings.block_size)
        return evaluate(prepared, batches, runtime=run)

    return Losses([loss(part) for part in text], loss(text.pooled()))


def _run_arm(arm: Arm) -> tuple[Losses, float]:
    model, seconds = train_arm(arm)
    text = divided(arm.run_config, arm.num_clients)
    return losses(model, Settings.from_run_config(arm.run_config), text), seconds


def compare(launch: Launch, console: Console, *, verbose: bool = False) -> Path:
    """Make a comparison, and return its directory.

    The directory has `comparison.json`, `comparison.html`, `comparison.png`, and the run of the
    federation in `federated/`.

    Raises:
        LocalRunError: the run of the federation has failed.
        SettingsError: the text is not divided among the clients by this program.
        KeyboardInterrupt: the user has interrupted the comparison. All processes have been stopped.
    """
    settings = launch.settings
    if check(launch) is None:
        raise SettingsError(f"corpus is {settings.corpus!r}; a comparison needs a text to divide")
    if settings.resume_from:
        raise SettingsError(
            f"resume-from is {settings.resume_from!r}; it must be empty, because a comparison "
            "trains all its models from the start"
        )
    output_dir = writable_directory(settings.output_dir)
    name = settings.run_name or new_run_name(output_dir, f"compare-{launch.preset}")
    directory = writable_directory(str(output_dir), name)
    run_config = launch.run_config | {"output-dir": str(directory), "run-name": "federated"}
    launch = replace(launch, run_config=run_config)
    started = time.monotonic()
    federated = run(launch, console, verbose=verbose)
    seconds = {"federated": time.monotonic() - started}
    text = divided(run_config, launch.clients)
    models = {"federated": losses(load_model(federated)[0], launch.settings, text)}
    arms = [Arm(run_config, launch.clients, i) for i in (None, *range(launch.clients))]
    results = _run_arms(arms, directory / ".progress.jsonl", console)
    (models["one_place"], seconds["one_place"]), *alone = results
    seconds["alone"] = sum(took for _, took in alone)
    result = _result(launch, federated, text, models, [found for found, _ in alone], seconds)
    target = RunDirectory(directory)
    target.write_json(RESULT_FILE, result)
    target.write(PICTURE_FILE, picture(result))
    write_comparison(directory)
    return directory


def _run_arms(arms: list[Arm], events: Path, console: Console) -> list[tuple[Losses, float]]:
    """Train all arms in processes that share the cores, and show their progress."""
    cores = os.cpu_count() or 1
    workers = min(cores, len(arms))
    with _progress_file(events), _bars(console, arms) as show:
        pool = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(max(1, cores // workers), events.with_name(LOG_FILE)),
        )
        try:
            futures: list[Future[tuple[Losses, float]]] = []
            with deferred():
                futures += [pool.submit(_run_arm, arm) for arm in arms]
            lines = progress.Lines(events)
            waiting: set[Future[tuple[Losses, float]]] = set(futures)
            while waiting:
                _, waiting = wait(waiting, timeout=0.2)
                show([json.loads(line) for line in lines.new()])
            return [future.result() for future in futures]
        finally:
            with deferred():
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                    process.join()


def _start_worker(threads: int, log: Path) -> None:
    """Prepare a worker process, which writes to the log. The parent ends it after Ctrl-C."""
    with log.open("ab") as output:
        for stream in (1, 2):  # standard output and standard error
            os.dup2(output.fileno(), stream)
    for number in ENDING_SIGNALS:
        handler = signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN
        signal.signal(number, handler)
    torch.set_num_threads(threads)


@contextmanager
def _progress_file(path: Path) -> Iterator[None]:
    os.environ[progress.VARIABLE] = str(path)  # the workers inherit it
    try:
        yield
    finally:
        del os.environ[progress.VARIABLE]
        path.unlink(missing_ok=True)


@contextmanager
def _bars(console: Console, arms: list[Arm]) -> Iterator[Any]:
    """Yield a function that shows new events, as bars or, without a terminal, as plain lines."""
    rounds = int(arms[0].run_config.get("num-server-rounds", Settings().num_server_rounds))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {arm.label: bars.add_task(arm.name, total=rounds, figures="") for arm in arms}
        last = time.monotonic()

        def show(events: list[dict[str, Any]]) -> None:
            nonlocal last
            for event in events:
                if event["event"] == "client":
                    done = event["round"] - 1 + event["step"] / event["steps"]
                    figures = (
                        f"loss {event['loss']:.3f}  {event['tokens_per_second']:,.0f} tokens/s"
                    )
                    bars.update(tasks[event["client"]], completed=done, figures=figures)
            if not console.is_terminal and time.monotonic() - last > PLAIN_SECONDS:
                last = time.monotonic()
                shares = (f"{task.description} {task.percentage:.0f} %" for task in bars.tasks)
                console.print(", ".join(shares), soft_wrap=True)

        yield show


def _result(
    launch: Launch,
    federated: Path,
    text: Partition,
    models: Mapping[str, Losses],
    alone: list[Losses],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of `comparison.json`."""
    settings = launch.settings
    run_directory = RunDirectory(federated)
    described = run_directory.read_json(PARTS_FILE)
    lines = run_directory.read_lines("clients.jsonl")
    clients = [
        {
            **part,
            "own": {
                "alone": alone[i].own[i],
                **{arm: found.own[i] for arm, found in models.items()},
            },
            "everybody": {
                "alone": alone[i].everybody,
                **{arm: found.everybody for arm, found in models.items()},
            },
        }
        for i, part in enumerate(described["clients"])
    ]
    return {
        "preset": launch.preset,
        "partition": settings.partition,
        "corpus": text.corpus.name,
        "corpus_sha256": text.corpus.sha256,
        "settings": settings.to_run_config(),
        "machine": machine(),
        "tokens_per_client": sum(line["tokens"] or 0 for line in lines) // launch.clients,
        "bytes": sum(line["bytes_down"] + line["bytes_up"] for line in lines),
        "seconds": dict(seconds),
        "clients": clients,
    }


def mean(result: Mapping[str, Any], text: str, arm: str) -> float:
    """Return the mean loss over the clients.

    Args:
        result: the content of `comparison.json`.
        text: "own" or "everybody".
        arm: "alone", "federated" or "one_place".
    """
    values = [client[text][arm] for client in result["clients"]]
    return float(sum(values) / len(values))


def table(result: Mapping[str, Any]) -> str:
    """Return the comparison as a table, and the answer in two sentences."""
    clients = result["clients"]
    names = [f"client {number}" for number in range(len(clients))]
    width = max(len(name) for name in names)
    head = f"{'':<{width}}  {'on its own validation text':<36}  on everybody's"
    columns = f"{'alone':>7} {'federated':>9} {'gain':>7} {'one place':>9}"
    lines = [head, f"{'client':<{width}} {columns}  {columns[:17]} {'one place':>9}"]
    means = {text: {arm: mean(result, text, arm) for arm in ARMS} for text in ("own", "everybody")}
    for name, row in zip([*names, "mean"], [*clients, means], strict=True):
        own, everybody = row["own"], row["everybody"]
        lines.append(
            f"{name:<{width}} {own['alone']:>7.4f} {own['federated']:>9.4f} "
            f"{own['alone'] - own['federated']:>+7.4f} {own['one_place']:>9.4f}  "
            f"{everybody['alone']:>7.4f} {everybody['federated']:>9.4f} "
            f"{everybody['one_place']:>9.4f}"
        )
    holds = [
        f"{name}: {name_of(client)}"
        for name, client in zip(names, clients, strict=True)
        if client["holds"]
    ]
    return "\n".join([*lines, *holds, *(fill(sentence, 79) for sentence in answer(result))])


def answer(result: Mapping[str, Any]) -> list[str]:
    """Return what the clients gained by taking part, and what federating cost, in sentences."""
    clients = result["clients"]
    better = sum(client["own"]["federated"] < client["own"]["alone"] for client in clients)
    gain = mean(result, "own", "alone") - mean(result, "own", "federated")
    cost = mean(result, "everybody", "federated") - mean(result, "everybody", "one_place")
    return [
        f"Taking part gave {better} of {len(clients)} clients a lower loss on their own text. On "
        f"average the loss {'fell' if gain >= 0 else 'rose'} by {abs(gain):.4f}.",
        f"On everybody's text, the federated loss is {abs(cost):.4f} "
        f"{'above' if cost >= 0 else 'below'} that of all text in one place.",
    ]


def picture(result: Mapping[str, Any]) -> bytes:
    """Draw the losses of each client as a PNG image."""
    from matplotlib.figure import Figure  # imported here because this import is slow

    clients = result["clients"]
    height = 1.6 + 0.4 * len(clients)
    figure = Figure(figsize=(9.0, height), dpi=150, layout="constrained")
    titles = {"own": "on its own validation text", "everybody": "on everybody's validation text"}
    for axes, (text, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for row, client in enumerate(clients):
            values = client[text]
            axes.plot([min(values.values()), max(values.values())], [row, row], "-", color="#ccc")
        for arm in ARMS:
            axes.plot(
                [client[text][arm] for client in clients],
                range(len(clients)),
                "o",
                color=COLOURS[arm],
                label=arm.replace("_", " "),
            )
        axes.set(title=title, xlabel="loss (nats per character)")
        names = [fill(name_of(client), 30) for client in clients]
        axes.set_yticks(range(len(clients)), names, parse_math=False)  # a name can have a "$"
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].set_ylim(len(clients) - 0.5, -0.5)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(ARMS), frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
