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
CORPUS_KEYS = ("name", "source", "sha256", "licence", "note")
PACKAGES = ("nanogpt-flower", "gpt-core", "shakespeare-data", "flower-adapter", "flwr", "torch")


@dataclass(frozen=True)
class Row:
    """One round in the table and in `metrics.jsonl`; losses in nats a character."""

    round: int
    train_loss: float | None  # mean over the clients' steps, weighted by num-examples
    val_loss: float | None  # of the average on the whole validation split, if the server has it
    client_val_loss: float | None  # mean over the clients' validation parts
    clients: int  # whose training went into the average

    @property
    def shown_val_loss(self) -> float | None:
        """The server's figure, else the clients'."""
        return self.client_val_loss if self.val_loss is None else self.val_loss

    @property
    def perplexity(self) -> float | None:
        """e to the validation loss; capped, so that a loss gone wild is still a number."""
        loss = self.shown_val_loss
        return None if loss is None else math.exp(min(loss, 700.0))

    def __str__(self) -> str:
        cells = [
            f"{self.round:>5}",
            _cell(self.train_loss, 10, 4),
            _cell(self.shown_val_loss, 8, 4),
            _cell(self.perplexity, 10, 2),
        ]
        return "  ".join(cells)


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


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
        self, settings: Settings, corpus: Corpus | None, runtime: Runtime, model: GPT
    ) -> None:
        """`config.json`: everything that the figures of the run depend on."""
        about = {
            "settings": settings.to_run_config(),
            "parameters": model.num_parameters(),
            "corpus": corpus and {key: getattr(corpus, key) for key in CORPUS_KEYS},
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
        curves = {
            "validation": [(row.round, row.shown_val_loss) for row in rows],
            "training": [(row.round, row.train_loss) for row in rows],
        }
        for (name, points), style in zip(curves.items(), ("o-", "s--"), strict=True):
            known = [(at, loss) for at, loss in points if loss is not None]
            axes.plot([at for at, _ in known], [loss for _, loss in known], style, label=name)
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
        self.directory = directory
        self.rows: list[Row] = []
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

    def finish_round(self, server_round: int, val_loss: float | None) -> None:
        """Print the row, append it to `metrics.jsonl`, draw the curve anew."""
        row = Row(
            round=server_round,
            train_loss=self._metrics.pop("train-loss", None),
            val_loss=val_loss,
            client_val_loss=self._metrics.pop("val-loss", None),
            clients=self._clients,
        )
        if not self.rows:
            print(self.HEADER)
        print(row, flush=True)
        self.rows.append(row)
        self.directory.append_metrics({**asdict(row), "perplexity": row.perplexity})
        self.directory.draw_curve(self.rows, "Federated NanoGPT")

    def table(self) -> str:
        """All rows, and under them what a reader must know to compare them."""
        lines = [self.HEADER, *map(str, self.rows)]
        if self._note:
            lines.append(f"note: {self._note}")
        return "\n".join(lines)
