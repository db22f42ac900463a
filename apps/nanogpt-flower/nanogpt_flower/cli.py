"""Write text with the model that a run has trained."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import nanogpt_flower
from gpt_core import GPT, CheckpointError, Runtime, from_pretrained, stream
from nanogpt_flower.artifacts import MODEL_DIRECTORY, TOKENIZER_FILE
from nanogpt_flower.composition import default_prompt
from shakespeare_data import CharTokenizer


def load_model(directory: Path) -> tuple[GPT, CharTokenizer]:
    """Load a model and its tokenizer from a run directory, or from the directory `model/` in it.

    Raises:
        CheckpointError: if the model cannot be loaded or does not fit the tokenizer.
        DataError: if the tokenizer cannot be loaded.
    """
    inside = directory / MODEL_DIRECTORY
    directory = inside if inside.is_dir() else directory
    model, tokenizer = from_pretrained(directory), CharTokenizer.load(directory / TOKENIZER_FILE)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"{directory / TOKENIZER_FILE} has {tokenizer.vocab_size} characters, but the model "
            f"beside it has {model.config.vocab_size}"
        )
    return model, tokenizer


def sample(arguments: argparse.Namespace) -> None:
    """Print the prompt. Then print the text that the model writes, one character at a time."""
    model, tokenizer = load_model(arguments.directory)
    runtime = Runtime.resolve(device=arguments.device, compile="off")
    prompt = arguments.prompt or default_prompt(tokenizer)
    prompt_ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]  # (1, T)
    tokens = stream(
        runtime.prepare(model),
        prompt_ids,
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    print(prompt, end="", flush=True)
    for token in tokens:
        print(tokenizer.decode([int(token)]), end="", flush=True)
    print()


def _whole_number(most: int) -> Callable[[str], int]:
    """Return an argument parser for whole numbers from 0 to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = -1
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(
                f"it is {text!r}; it must be a whole number from 0 to {most}"
            )
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanogpt-flower", description=__doc__)
    parser.add_argument("--version", action="version", version=nanogpt_flower.__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "sample",
        help="print text that a trained model writes",
        epilog='example: nanogpt-flower sample runs/123 --prompt "ROMEO:" --tokens 500 --seed 1',
    )
    count, seed = _whole_number(2**31 - 1), _whole_number(2**63 - 1)
    add = command.add_argument
    add("directory", type=Path, help="a run directory, or the model/ in it")
    add("--prompt", default="", help="start of the text (default: a line break)")
    add("--tokens", type=count, default=500, help="number of characters to write (default: 500)")
    add("--seed", type=seed, help="equal seeds give equal texts (default: another text each time)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top-k", type=count, default=0, help="draw from the k likeliest; 0 is all (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    command.set_defaults(run=sample)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    If the input is bad, the command prints one line on stderr and returns 2.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ValueError as error:  # includes CheckpointError, ConfigError and DataError
        print(f"nanogpt-flower: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
