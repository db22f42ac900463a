"""The run directory: what a run leaves on disk."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nanogpt_flower
from gpt_core import GPT, Runtime, save_pretrained
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, Corpus

CHECKPOINTS = "checkpoints"
SHAPE_KEYS = ("n-layer", "n-head", "n-embd", "block-size")  # what a model cannot change later
MODEL_DIRECTORY = "model"
TOKENIZER_FILE = "tokenizer.json"
CORPUS_KEYS = ("name", "source", "sha256", "licence", "note")
LIBRARIES = ("gpt-core", "shakespeare-data", "flower-adapter", "flwr", "torch")

Points = list[tuple[int, float]]  # round and loss


def writable_directory(output_dir: str, *below: str) -> Path:
    """The absolute path of a directory in `output_dir`, or of that itself, made and tried out.

    Raises:
        SettingsError: if it cannot be made or written.
    """
    path = Path(output_dir, *below)
    try:
        path = path.expanduser().resolve()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError, ValueError) as error:  # also: no such user, a NUL in it
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(
            f"output-dir is {output_dir!r}; it must be a directory that can be written, but "
            f"{path} is not: {why}"
        ) from error
    return path


class RunDirectory:
    """`<output-dir>/<run id>/`: checkpoints/, config.json, curve.png, metrics.jsonl, model/, …"""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, output_dir: str, run_id: int) -> "RunDirectory":
        """Make the directory, and make sure that it can be written.

        Raises:
            SettingsError: if it cannot.
        """
        return cls(writable_directory(output_dir, str(run_id)))

    @classmethod
    def resume(cls, settings: Settings) -> "RunDirectory":
        """The directory of the run that was cut off.

        Raises:
            SettingsError: if there is none, with checkpoints in it, or if that run's model was
                another.
        """
        resume_from = settings.resume_from
        path = Path(resume_from).expanduser().resolve()
        if not (path / CHECKPOINTS).is_dir():
            raise SettingsError(
                f"resume-from is {resume_from!r}; it must be the directory of a run, but {path} "
                f"has no {CHECKPOINTS}"
            )
        config = path / "config.json"
        if config.exists():
            before = json.loads(config.read_text(encoding="utf-8"))["settings"]
            now = settings.to_run_config()
            if changed := [key for key in SHAPE_KEYS if before[key] != now[key]]:
                told = ", ".join(f"{key} is {now[key]}, was {before[key]}" for key in changed)
                raise SettingsError(f"the run in {path} was of another model: {told}")
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """`checkpoints/`: what a run needs to go on."""
        return self.path / CHECKPOINTS

    def write_config(
        self, settings: Settings, corpus: Corpus | None, runtime: Runtime, model: GPT
    ) -> None:
        """`config.json`: everything that the figures of the run depend on."""
        about = {
            "settings": settings.to_run_config(),
            "parameters": model.num_parameters(),
            "corpus": corpus and {key: getattr(corpus, key) for key in CORPUS_KEYS},
            "server": runtime.to_dict(),
            "versions": {
                "nanogpt-flower": nanogpt_flower.__version__,
                **{name: version(name) for name in LIBRARIES},
            },
        }
        self._write("config.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """`metrics.jsonl`, a line a round. It holds no times, so equal runs leave equal files."""
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        self._write("metrics.jsonl", "".join(lines))

    def save_model(self, model: GPT, tokenizer: CharTokenizer) -> None:
        """`model/`: config.json, model.safetensors, tokenizer.json."""
        save_pretrained(model, self.path / MODEL_DIRECTORY)
        tokenizer.save(self.path / MODEL_DIRECTORY / TOKENIZER_FILE)

    def write_sample(self, text: str) -> None:
        """`sample.txt`."""
        self._write("sample.txt", text)

    def draw_curve(self, validation: Points, training: Points) -> None:
        """`curve.png`: loss by round."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for points, style, name in (
            (validation, "o-", "validation"),
            (training, "s--", "training"),
        ):
            axes.plot([at for at, _ in points], [loss for _, loss in points], style, label=name)
        axes.set(xlabel="round", ylabel="loss (nats a character)", title="Federated NanoGPT")
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
