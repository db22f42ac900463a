"""`shakespeare-data`: look at a corpus, and write its parts for clients."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from shakespeare_data.corpus import load_corpus
from shakespeare_data.errors import DataError
from shakespeare_data.partition import read_part, write_partitions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after an error that stderr explains."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "partition":
            _partition(options.corpus, options.num_partitions, options.output)
        else:
            _info(options.corpus)
    except DataError as error:
        print(f"shakespeare-data: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shakespeare-data",
        description="Look at a corpus, and write its parts for the clients of a federation.",
        epilog="example: shakespeare-data partition --num-partitions 2 --output datasets",
    )
    parser.add_argument("--version", action="version", version=version("shakespeare-data"))
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = argparse.ArgumentParser(add_help=False)
    corpus.add_argument(
        "--corpus",
        default="auto",
        help="auto, tiny-shakespeare, nine-plays, or a UTF-8 text file (default: auto)",
    )
    parts = commands.add_parser(
        "partition",
        parents=[corpus],
        help="write contiguous, equal parts",
        epilog="example: shakespeare-data partition --num-partitions 2 --output datasets",
    )
    parts.add_argument("--num-partitions", type=int, required=True, help="how many clients")
    parts.add_argument(
        "--output", type=_directory, required=True, help="the directory of shakespeare_part_0, …"
    )
    commands.add_parser(
        "info",
        parents=[corpus],
        help="say what a corpus is",
        epilog="example: shakespeare-data info --corpus nine-plays",
    )
    return parser


def _directory(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; it must be a directory")
    return Path(text)


def _partition(corpus_name: str, num_partitions: int, output: Path) -> None:
    directories = write_partitions(load_corpus(corpus_name), num_partitions, output)
    width = max(len(str(directory)) for directory in directories)
    print(f"{'directory':<{width}}  {'train':>10}  {'val':>10}")
    for directory in directories:
        part = read_part(directory)
        print(f"{part.name:<{width}}  {len(part.train):>10,}  {len(part.val):>10,}")


def _info(corpus_name: str) -> None:
    corpus = load_corpus(corpus_name)
    vocab = "".join(sorted(set(corpus.text)))
    print(f"name        {corpus.name}")
    print(f"source      {corpus.source}")
    print(f"licence     {corpus.licence}")
    print(f"characters  {len(corpus.text):,}")
    print(f"vocabulary  {len(vocab)}: {vocab!r}")
    print(f"sha256      {corpus.sha256}")
    if corpus.note:
        print(f"note        {corpus.note}")
