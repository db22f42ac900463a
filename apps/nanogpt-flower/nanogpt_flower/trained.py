"""Load the model of a run, write text with it, and evaluate it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt_core import (
    GPT,
    CheckpointError,
    Runtime,
    evaluate,
    from_pretrained,
    int8_weights,
    stream,
)
from nanogpt_flower.artifacts import CONFIG_FILE, MODEL_DIRECTORY, TOKENIZER_FILE, RunDirectory
from nanogpt_flower.composition import NO_CORPUS, default_prompt, runtime, validation_text
from nanogpt_flower.runs import is_run
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, load_corpus, sequential_batches


def load_model(directory: Path) -> tuple[GPT, CharTokenizer]:
    """Load a model and its tokenizer from a run directory, or from the directory `model/` in it.

    Raises:
        CheckpointError: if the model cannot be loaded or does not fit the tokenizer.
        DataError: if the tokenizer cannot be loaded.
    """
    inside = directory / MODEL_DIRECTORY
    directory = inside if inside.is_dir() else directory
    if is_run(directory) and not (directory / TOKENIZER_FILE).exists():
        raise CheckpointError(f"the run in {directory} has not saved a model")
    model, tokenizer = from_pretrained(directory), CharTokenizer.load(directory / TOKENIZER_FILE)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"{directory / TOKENIZER_FILE} has {tokenizer.vocab_size} characters, but the model "
            f"beside it has {model.config.vocab_size}"
        )
    return model, tokenizer


class Writer:
    """A trained model that writes text.

    Args:
        directory: a run directory, or the `model/` in it.
        device: "auto", "cpu", "cuda" or "mps".
        int8: whether to keep the weights as int8 numbers.
    """

    def __init__(self, directory: Path, *, device: str = "auto", int8: bool = False) -> None:
        model, self.tokenizer = load_model(directory)
        run = Runtime.resolve(device=device, compile="off")
        self.model = run.prepare(int8_weights(model) if int8 else model)

    def write(
        self,
        prompt: str,
        length: int,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the prompt, and then `length` characters, one at a time.

        An empty prompt is replaced by the default prompt.

        Raises:
            DataError: the prompt has a character that the model does not know.
            ValueError: a number is out of its range.
        """
        prompt = prompt or default_prompt(self.tokenizer)
        ids = torch.from_numpy(self.tokenizer.encode(prompt).astype("int64"))[None]  # (1, T)
        tokens = stream(
            self.model,
            ids,
            length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        yield prompt
        for token in tokens:
            yield self.tokenizer.decode([int(token)])


@dataclass(frozen=True)
class Evaluation:
    """The loss of a trained model on a text."""

    text: str  # the name of the text
    characters: int  # characters that the model predicted
    loss: float  # nats per character

    @property
    def bits(self) -> float:
        """The loss in bits per character."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


def evaluate_run(directory: Path, text: Path | None = None) -> Evaluation:
    """Evaluate the model of a run on the validation text of the run, or on a text file.

    The device, the precision and the windows are those of the run. On the validation text the loss
    is therefore that of the last round.

    Raises:
        ValueError: the run has no text of its own, its text has changed, or the text has characters
            that the model does not know. The message says which.
    """
    model, tokenizer = load_model(directory)
    config = RunDirectory(directory).read_json(CONFIG_FILE)
    if "settings" not in config:
        raise SettingsError(f"{directory} has no {CONFIG_FILE}, so its settings are not known")
    settings = Settings.from_run_config(config["settings"])
    if text is not None:
        name, content = str(text), load_corpus(str(text.absolute())).text
    elif settings.corpus == NO_CORPUS:
        raise SettingsError(f"the server of {directory.name} had no text; give a text with --text")
    else:
        corpus = load_corpus(settings.corpus)
        if corpus.sha256 != config["corpus"]["sha256"]:
            raise SettingsError(
                f"the text {settings.corpus!r} has changed since the run: its SHA-256 is "
                f"{corpus.sha256} but was {config['corpus']['sha256']}"
            )
        name, content = f"validation text of {corpus.name}", validation_text(settings, corpus)
    ids = tokenizer.encode(content)
    run = runtime(settings)
    batches = sequential_batches(ids, settings.batch_size, settings.block_size)
    loss = evaluate(run.prepare(model), batches, runtime=run)
    return Evaluation(name, len(ids) - 1, loss)
