"""The directory of a run and the files that the run writes into it."""

import io
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nanogpt_flower
from gpt_core import GPT, Runtime, save_pretrained
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, Corpus

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"
MODEL_DIRECTORY = "model"
TOKENIZER_FILE = "tokenizer.json"

MODEL_KEYS = ("n-layer", "n-head", "n-embd", "block-size")  # a resumed run cannot change these
CORPUS_FIELDS = ("name", "source", "sha256", "licence", "note")
LIBRARIES = ("gpt-core", "shakespeare-data", "flower-adapter", "flwr", "torch")

Points = list[tuple[int, float]]  # (round, loss)


def writable_directory(output_dir: str, subdirectory: str = "") -> Path:
    """Create a directory, check that files can be created in it, and return its absolute path.

    Raises:
        SettingsError: if the directory cannot be created or written.
    """
    path = Path(output_dir, subdirectory)
    try:
        path = path.expanduser().resolve()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    # RuntimeError: "~name" of an unknown user. ValueError: a NUL character in the path.
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(
            f"output-dir is {output_dir!r}; it must be a directory that can be written, but "
            f"{path} cannot be written: {reason}"
        ) from error
    return path


class RunDirectory:
    """The directory of one run, `<output-dir>/<run id>/`.

    Each file is written under a temporary name, synced to the disk, and then renamed. Therefore a
    reader never sees a file that is only half written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, output_dir: str, run_id: int) -> "RunDirectory":
        """Create the directory of a new run.

        Raises:
            SettingsError: if the directory cannot be created or written.
        """
        return cls(writable_directory(output_dir, str(run_id)))

    @classmethod
    def resume(cls, settings: Settings, corpus: Corpus | None) -> "RunDirectory":
        """Open the directory of the run that `resume-from` names.

        `corpus` is the text of the server now, or None if the server has no text.

        Raises:
            SettingsError: if the directory has no checkpoints, if its `config.json` cannot be read,
                or if that run had a model of another size or another text.
        """
        path = Path(settings.resume_from).expanduser().resolve()
        if not (path / CHECKPOINTS).is_dir():
            raise SettingsError(
                f"resume-from is {settings.resume_from!r}; it must be the directory of a run, but "
                f"{path} has no {CHECKPOINTS}"
            )
        config = path / CONFIG_FILE
        if config.exists():
            try:
                saved = json.loads(config.read_text(encoding="utf-8"))
                old, old_text = saved["settings"], saved["corpus"] and saved["corpus"]["sha256"]
            except (ValueError, KeyError, TypeError) as error:
                raise SettingsError(f"{config} is damaged, so its run cannot be resumed") from error
            new = settings.to_run_config()
            changes = [
                f"{key} is {new[key]} but was {old.get(key)}"
                for key in MODEL_KEYS
                if new[key] != old.get(key)
            ]
            if changes:
                raise SettingsError(
                    f"the run in {path} trained a model of another size: {', '.join(changes)}"
                )
            text = corpus and corpus.sha256
            if text != old_text:
                raise SettingsError(
                    f"the run in {path} had another text: the SHA-256 of the corpus is {text} but "
                    f"was {old_text}"
                )
        return cls(path)

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints. A run can be resumed from a checkpoint."""
        return self.path / CHECKPOINTS

    def write_config(
        self, settings: Settings, corpus: Corpus | None, runtime: Runtime, model: GPT
    ) -> None:
        """Write the settings, the corpus, the versions and the server's device to `config.json`."""
        config = {
            "settings": settings.to_run_config(),
            "parameters": model.num_parameters(),
            "corpus": corpus and {name: getattr(corpus, name) for name in CORPUS_FIELDS},
            "server": runtime.to_dict(),
            "versions": {
                "nanogpt-flower": nanogpt_flower.__version__,
                **{name: version(name) for name in LIBRARIES},
            },
        }
        self._write_text(CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write `metrics.jsonl` with one line for each round."""
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        self._write_text("metrics.jsonl", "".join(lines))

    def save_model(self, model: GPT, tokenizer: CharTokenizer) -> None:
        """Save the model and its tokenizer in `model/`."""
        save_pretrained(model, self.path / MODEL_DIRECTORY)
        tokenizer.save(self.path / MODEL_DIRECTORY / TOKENIZER_FILE)

    def write_sample(self, text: str) -> None:
        """Write the text to `sample.txt`."""
        self._write_text("sample.txt", text)

    def draw_curve(self, validation: Points, training: Points) -> None:
        """Draw a curve of the losses of all rounds and save it as `curve.png`."""
        from matplotlib.figure import Figure  # imported here because this import is slow
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for points, style, label in (
            (validation, "o-", "validation"),
            (training, "s--", "training"),
        ):
            rounds = [server_round for server_round, _ in points]
            losses = [loss for _, loss in points]
            axes.plot(rounds, losses, style, label=label)
        axes.set(xlabel="round", ylabel="loss (nats per character)", title="Federated NanoGPT")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        image = io.BytesIO()
        figure.savefig(image, format="png")
        self._write("curve.png", image.getvalue())

    def _write_text(self, name: str, text: str) -> None:
        self._write(name, text.encode())

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.path / f".{name}"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)
