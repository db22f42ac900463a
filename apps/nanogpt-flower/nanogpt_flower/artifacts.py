"""The directory of a run and the files that the run writes into it."""

import io
import json
import logging
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch

import nanogpt_flower
from flower_adapter.packing import make_directory, sync
from flower_adapter.server.checkpoints import list_checkpoints, round_of
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

logger = logging.getLogger("flwr.nanogpt_flower")


def writable_directory(output_dir: str, subdirectory: str = "") -> Path:
    """Create a directory, check that files can be created in it, and return its absolute path.

    Raises:
        SettingsError: if the directory cannot be created or written.
    """
    path = Path(output_dir, subdirectory)
    try:
        path = path.expanduser().resolve()
        make_directory(path)
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


def new_run_name(output_dir: Path, preset: str = "") -> str:
    """Return a name for a new run that no directory in `output_dir` has.

    The name consists of the time and the preset, as in "2026-11-24-2215-quick". If there is such a
    directory, the name gets a number.
    """
    name = f"{datetime.now():%Y-%m-%d-%H%M}" + (f"-{preset}" if preset else "")
    names, number = name, 1
    while (output_dir / names).exists():
        number += 1
        names = f"{name}-{number}"
    return names


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, memory, GPU, operating system and Python."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


class RunDirectory:
    """The directory of one run, `<output-dir>/<run name>/`.

    Each file is written under a temporary name, synced to the disk, and then renamed. Therefore a
    reader never sees a file that is only half written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, output_dir: str, name: str) -> "RunDirectory":
        """Create the directory of a new run. If the name is empty, the directory gets a new name.

        Raises:
            SettingsError: if the directory cannot be created or written, or if a run is in it.
        """
        name = name or new_run_name(writable_directory(output_dir))
        path = writable_directory(output_dir, name)
        if (path / CHECKPOINTS).exists():
            raise SettingsError(f"run-name is {name!r}, but the directory {path} holds a run")
        return cls(path)

    @classmethod
    def resume(cls, settings: Settings, corpus: Corpus | None) -> "RunDirectory":
        """Open the directory of the run that `resume-from` names.

        `corpus` is the text of the server now, or None if the server has no text.

        Raises:
            SettingsError: if the directory has no checkpoints, or if that run had another text, a
                model of another size or a schedule of another length. If `config.json` is damaged,
                it is moved aside, and only the checkpoints say whether the run fits.
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
                saved = cls(path).read_json(CONFIG_FILE)
                old = dict(saved["settings"])
                old_text = saved["corpus"] and saved["corpus"]["sha256"]
            except (KeyError, TypeError, ValueError):  # includes SettingsError
                aside = config.with_name(f"damaged-{CONFIG_FILE}")
                config.replace(aside)
                logger.error(
                    "%s is damaged and is now %s; nothing can say whether the settings and the "
                    "text are those of before",
                    config,
                    aside,
                )
                return cls(path)
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
            old_rounds = old.get("schedule-rounds") or old.get("num-server-rounds")
            open_ended = settings.schedule != "constant" and not settings.schedule_rounds
            if open_ended and settings.num_server_rounds != old_rounds:
                raise SettingsError(
                    f"the schedule of the run in {path} lasts {old_rounds} rounds, and "
                    f"num-server-rounds is now {settings.num_server_rounds}; "
                    f"schedule-rounds={old_rounds} keeps the schedule, and "
                    f"schedule-rounds={settings.num_server_rounds} stretches it"
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
            "corpus": corpus
            and {name: getattr(corpus, name) for name in CORPUS_FIELDS}
            | {"characters": len(corpus.text)},
            "server": runtime.to_dict(),
            "machine": machine(),
            "versions": {
                "nanogpt-flower": nanogpt_flower.__version__,
                **{name: version(name) for name in LIBRARIES},
            },
        }
        self.write_json(CONFIG_FILE, config)

    @property
    def newest_checkpoint(self) -> int:
        """The round of the newest checkpoint, or 0 if there is none."""
        found = list_checkpoints(self.checkpoints) if self.checkpoints.is_dir() else []
        return max(map(round_of, found), default=0)

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a file with one JSON object."""
        self._write_text(name, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a file with one JSON object. If there is no such file, return an empty dictionary.

        Raises:
            SettingsError: if the file is damaged.
        """
        path = self.path / name
        if not path.exists():
            return {}
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise SettingsError(f"{path} is damaged: it must hold one JSON object") from error
        if not isinstance(document, dict):
            raise SettingsError(f"{path} is damaged: it must hold one JSON object")
        return document

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a file with one JSON object in each line."""
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        self._write_text(name, "".join(lines))

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Read a file with one JSON object in each line. Return [] if there is no such file.

        Raises:
            SettingsError: if the file is damaged.
        """
        path = self.path / name
        if not path.exists():
            return []
        try:
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise SettingsError(f"{path} is damaged: each line must hold a JSON object") from error
        if not all(isinstance(line, dict) for line in lines):
            raise SettingsError(f"{path} is damaged: each line must hold a JSON object")
        return lines

    def save_model(self, model: GPT, tokenizer: CharTokenizer) -> None:
        """Save the model and its tokenizer in `model/`."""
        save_pretrained(model, self.path / MODEL_DIRECTORY)
        tokenizer.save(self.path / MODEL_DIRECTORY / TOKENIZER_FILE)
        sync(self.path / MODEL_DIRECTORY)

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
        self.write("curve.png", image.getvalue())

    def _write_text(self, name: str, text: str) -> None:
        self.write(name, text.encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""
        temporary = self.path / f".{name}.{uuid4().hex}"  # no file of the user has this name
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        finally:
            temporary.unlink(missing_ok=True)
        sync(self.path)
