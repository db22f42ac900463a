"""The run directory: what a run leaves on disk, and the table that it prints."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from gpt_core import GPT, Runtime, save_pretrained
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, Corpus

MODEL_DIRECTORY = "model"
TOKENIZER_FILE = "tokenizer.json"
PACKAGES = ("nanogpt-flower", "gpt-core", "shakespeare-data", "flower-adapter", "flwr", "torch")


@dataclass(frozen=True)
class Row:
    """One round in the table and in `metrics.jsonl`; losses in nats a character."""

    round: int
    train_loss: float | None  # mean over the clients' steps, weighted by num-examples
    val_loss: float  # of the averaged model on the whole validation split
    client_val_loss: float | None  # mean over the clients' validation parts
    clients: int  # whose training went into the average

    def __str__(self) -> str:
        train = "-" if self.train_loss is None else f"{self.train_loss:.4f}"
        perplexity = math.exp(min(self.val_loss, 700.0))
        return f"{self.round:>5}  {train:>10}  {self.val_loss:>8.4f}  {perplexity:>10.2f}"


class RunDirectory:
    """`<output-dir>/<run id>/`: config.json, metrics.jsonl, model/, sample.txt, curve.png."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, output_dir: str, run_id: int) -> "RunDirectory":
        """Make the directory, and make sure that it can be written.

        Raises:
            SettingsError: if it cannot.
        """
        path = Path(output_dir).expanduser().resolve() / str(run_id)
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise SettingsError(
                f"output-dir is {output_dir!r}; it must be a directory that can be written, but "
                f"{path} is not: {error.strerror}"
            ) from error
        return cls(path)

    def write_config(
        self, settings: Settings, corpus: Corpus, runtime: Runtime, model: GPT
    ) -> None:
        """`config.json`: everything that the figures of the run depend on."""
        about = {
            "settings": settings.to_run_config(),
            "parameters": model.num_parameters(),
            "corpus": {
                "name": corpus.name,
                "source": corpus.source,
                "sha256": corpus.sha256,
                "licence": corpus.licence,
                "note": corpus.note,
            },
            "server": runtime.to_dict(),
            "versions": {name: version(name) for name in PACKAGES},
        }
        self._write("config.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`. It holds no times, so equal runs leave equal files."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save_model(self, model: GPT, tokenizer: CharTokenizer) -> None:
        """`model/`: config.json, model.safetensors, tokenizer.json."""
        save_pretrained(model, self.path / MODEL_DIRECTORY)
        tokenizer.save(self.path / MODEL_DIRECTORY / TOKENIZER_FILE)

    def write_sample(self, text: str) -> None:
        """`sample.txt`."""
        self._write("sample.txt", text)

    def draw_curve(self, rows: list["Row"], title: str) -> None:
        """`curve.png`: loss by round."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        rounds = [row.round for row in rows]
        axes.plot(rounds, [row.val_loss for row in rows], "o-", label="validation")
        trained = [row for row in rows if row.train_loss is not None]
        axes.plot(
            [row.round for row in trained],
            [cast(float, row.train_loss) for row in trained],
            "s--",
            label="training",
        )
        axes.set(xlabel="round", ylabel="loss (nats a character)", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        beside = self.path / ".curve.png"
        figure.savefig(beside, format="png")
        beside.replace(self.path / "curve.png")

    def _write(self, name: str, text: str) -> None:
        beside = self.path / f".{name}"
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.path / name)


class History:
    """The rounds so far: a row each, printed and written as it is finished."""

    HEADER = f"{'round':>5}  {'train loss':>10}  {'val loss':>8}  {'perplexity':>10}"

    def __init__(self, directory: RunDirectory, *, note: str = "") -> None:
        self.rows: list[Row] = []
        self._directory = directory
        self._note = note
        self._metrics: dict[str, float] = {}
        self._clients = 0

    def aggregate(self, key: str) -> Callable[[list[RecordDict], str], MetricRecord]:
        """A `…_metrics_aggr_fn` for a strategy: Flower's weighted mean, with `key` kept."""

        def aggregate(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
            metrics = aggregate_metricrecords(replies, weighted_by)
            self._metrics[key] = cast(float, metrics[key])
            if key == "train-loss":
                self._clients = len(replies)
            return metrics

        return aggregate

    def finish_round(self, server_round: int, val_loss: float) -> None:
        """Print the row, append it to `metrics.jsonl`, draw the curve anew."""
        row = Row(
            round=server_round,
            train_loss=self._metrics.pop("train-loss", None),
            val_loss=val_loss,
            client_val_loss=self._metrics.pop("val-loss", None),
            clients=self._clients,
        )
        self.rows.append(row)
        self._directory.append_metrics({**asdict(row), "perplexity": math.exp(min(val_loss, 700))})
        self._directory.draw_curve(self.rows, "Federated NanoGPT")
        print(
            self.HEADER if server_round == 0 else "",
            row,
            sep="\n" if server_round == 0 else "",
            flush=True,
        )

    def table(self) -> str:
        """All rows, and under them what a reader must know to compare them."""
        lines = [self.HEADER, *map(str, self.rows)]
        if self._note:
            lines.append(f"note: {self._note}")
        return "\n".join(lines)
