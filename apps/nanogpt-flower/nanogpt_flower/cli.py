"""Use what a run of the app has left: text from a trained model, streamed."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import nanogpt_flower
from gpt_core import GPT, CheckpointError, ConfigError, Runtime, from_pretrained, stream
from nanogpt_flower.artifacts import MODEL_DIRECTORY, TOKENIZER_FILE
from nanogpt_flower.composition import sample_start
from shakespeare_data import CharTokenizer, DataError


def load_model(directory: Path) -> tuple[GPT, CharTokenizer]:
    """Model and tokenizer of a run directory, or of the `model/` in it."""
    inside = directory / MODEL_DIRECTORY
    directory = inside if inside.is_dir() else directory
    model, tokenizer = from_pretrained(directory), CharTokenizer.load(directory / TOKENIZER_FILE)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"{directory / TOKENIZER_FILE} has {tokenizer.vocab_size} characters, the model beside "
            f"it {model.config.vocab_size}"
        )
    return model, tokenizer


def sample(arguments: argparse.Namespace) -> None:
    model, tokenizer = load_model(arguments.directory)
    runtime = Runtime.resolve(device=arguments.device, compile="off")
    text = arguments.prompt or sample_start(tokenizer)
    prompt = torch.from_numpy(tokenizer.encode(text).astype("int64"))[None]
    tokens = stream(
        runtime.prepare(model),
        prompt,
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    print(text, end="", flush=True)
    for token in tokens:
        print(tokenizer.decode([int(token)]), end="", flush=True)
    print()


def _whole(most: int) -> Callable[[str], int]:
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
        help="stream text from a trained model",
        epilog='example: nanogpt-flower sample runs/123 --prompt "ROMEO:" --tokens 500 --seed 1',
    )
    count, seed = _whole(2**31 - 1), _whole(2**63 - 1)
    command.add_argument("directory", type=Path, help="a run directory, or the model/ in it")
    command.add_argument("--prompt", default="", help="the text to go on from (a line break)")
    command.add_argument("--tokens", type=count, default=500, help="characters to write (500)")
    command.add_argument("--seed", type=seed, help="of the draws; equal seeds, equal text")
    command.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (0.8)")
    command.add_argument("--top-k", type=count, default=0, help="draw from the k likeliest; 0: all")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    command.set_defaults(run=sample)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a bad input is one line on stderr and exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (CheckpointError, ConfigError, DataError, ValueError) as error:
        print(f"nanogpt-flower: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
