"""Define the command `shakespeare-data`, which describes a corpus and divides it among clients."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from statistics import median

from shakespeare_data.corpus import Corpus, load_corpus
from shakespeare_data.errors import DataError
from shakespeare_data.partition import SCHEMES, Partition, partition
from shakespeare_data.plays import Speech
from shakespeare_data.plot import plot_partition
from shakespeare_data.sources import TinyShakespeare

Parser = argparse.ArgumentParser

_EXAMPLES = """\
examples:
  shakespeare-data info --corpus plays
  shakespeare-data download
  shakespeare-data partition --num-partitions 2 --output datasets
  shakespeare-data partition --num-partitions 10 --scheme dirichlet --alpha 0.1 --seed 1
  shakespeare-data show MENENIUS --play Coriolanus
  shakespeare-data plot --num-partitions 10 --scheme by-speaker --output roles.png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    The exit status is 0 after success and 2 after an error. An error is printed to stderr as one
    line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal may be unable to show a character of the text.
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except DataError as error:
        print(f"shakespeare-data: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # stdout cannot be written; all other file errors are DataErrors
        # Python writes to stdout once more when it exits, and that must not fail.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has closed the pipe
            return 0
        print(f"shakespeare-data: error: cannot print: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shakespeare-data",
        description="Look at a corpus, and divide it among the clients of a federation.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("shakespeare-data"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    corpus, division = _corpus_options(), _division_options()

    def add(name: str, about: str, example: str, *parents: Parser) -> Parser:
        return commands.add_parser(
            name, help=about, description=about, parents=parents, epilog=f"example: {example}"
        )

    info = add("info", "describe a corpus", "shakespeare-data info --corpus plays", corpus)
    info.set_defaults(run=_info)

    download = add(
        "download", "download Tiny Shakespeare into the cache", "shakespeare-data download"
    )
    download.set_defaults(run=_download)

    parts = add(
        "partition",
        "divide a corpus among clients, print a report, and write the parts with --output",
        "shakespeare-data partition --num-partitions 2 --output datasets",
        corpus,
        division,
    )
    parts.add_argument(
        "--output",
        type=_path,
        help="directory for shakespeare_part_0, ... and partition.json (default: only a report)",
    )
    parts.set_defaults(run=_partition)

    show = add(
        "show",
        "print the speeches of a role",
        "shakespeare-data show MENENIUS --play Coriolanus",
        corpus,
    )
    show.add_argument("role", help="the name of a speaker, in upper or lower case")
    show.add_argument("--play", help="the title of the play, if several plays have this role")
    show.set_defaults(run=_show)

    plot = add(
        "plot",
        "draw the size and divergence of each part (needs matplotlib)",
        "shakespeare-data plot --num-partitions 10 --scheme dirichlet --output parts.png",
        corpus,
        division,
    )
    plot.add_argument("--output", type=_path, required=True, help="the PNG file to write")
    plot.set_defaults(run=_plot)
    return parser


def _corpus_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--corpus",
        default="auto",
        help="auto, tiny-shakespeare, nine-plays, plays, a UTF-8 text file or a directory of "
        "*.txt (default: auto, which is Tiny Shakespeare or, without a network, the nine plays)",
    )
    return options


def _division_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--num-partitions", type=int, required=True, help="number of clients")
    options.add_argument(
        "--scheme",
        choices=SCHEMES,
        default="contiguous",
        help="way to divide the text (default: contiguous)",
    )
    options.add_argument("--seed", type=int, default=0, help="seed of random draws (default: 0)")
    options.add_argument(
        "--alpha",
        type=float,
        help="concentration, for dirichlet and quantity-skew (default: 0.5)",
    )
    options.add_argument(
        "--by",
        choices=["play", "speaker"],
        help="groups that dirichlet divides among the clients (default: play)",
    )
    options.add_argument(
        "--window",
        type=int,
        help="characters that stay together, for iid and quantity-skew (default: 1024)",
    )
    options.add_argument(
        "--min-characters",
        type=int,
        default=2,
        help="each client gets at least this many characters for training, and at least as many "
        "for validation (default: 2)",
    )
    options.add_argument(
        "--split",
        choices=["end", "play", "speech"],
        help="validate on the end of the text, on the last plays, or on every n-th speech "
        "(default: end for contiguous, iid and quantity-skew, else speech)",
    )
    options.add_argument(
        "--validation-fraction",
        type=float,
        default=0.1,
        help="share of the text for validation (default: 0.1)",
    )
    return options


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _info(options: argparse.Namespace) -> None:
    corpus = load_corpus(options.corpus)
    vocab = "".join(sorted(set(corpus.text)))
    print(f"name        {corpus.name}")
    print(f"source      {corpus.source}")
    print(f"licence     {corpus.licence}")
    print(f"characters  {len(corpus.text):,}")
    print(f"vocabulary  {len(vocab)}: {vocab!r}")
    print(f"plays       {len(corpus.plays)}")
    print(f"speeches    {len(corpus.speeches):,}")
    print(f"roles       {len({speech.role for speech in corpus.speeches if speech.speaker}):,}")
    print(f"sha256      {corpus.sha256}")
    if corpus.note:
        print(f"note        {corpus.note}")


def _download(_: argparse.Namespace) -> None:
    tiny = TinyShakespeare()
    content, source = tiny.read()
    print(f"{tiny.path}: {len(content):,} bytes, SHA-256 as expected ({source})")


def _partition(options: argparse.Namespace) -> None:
    divided = _divide(options)
    if options.output is not None:
        divided.write(options.output)
    _print_report(divided)
    if options.output is None:
        print("nothing was written; use --output DIRECTORY to write the parts")
    else:
        last = f" to shakespeare_part_{len(divided) - 1}" if len(divided) > 1 else ""
        print(f"written to {options.output}: shakespeare_part_0{last}")


def _show(options: argparse.Namespace) -> None:
    corpus = load_corpus(options.corpus)
    speeches = [
        speech
        for speech in corpus.speeches
        if speech.speaker.lower() == options.role.lower()
        and (options.play is None or speech.play.lower() == options.play.lower())
    ]
    if not speeches:
        raise DataError(_no_such_role(corpus, options.role, options.play))
    if len(plays := list(dict.fromkeys(speech.play for speech in speeches))) > 1:
        raise DataError(f"{options.role} is in {', '.join(plays)}; choose one with --play")
    for speech in speeches:
        print(f"[{_place(speech)}]\n{speech.text.rstrip()}\n")


def _no_such_role(corpus: Corpus, role: str, play: str | None) -> str:
    titles = [title for _, title in corpus.titles] or [corpus.name]
    if play is not None and play.lower() not in map(str.lower, titles):
        return f"{corpus.name} has no play {play!r}; its plays are {', '.join(titles)}"
    roles = {
        speech.speaker
        for speech in corpus.speeches
        if speech.speaker and (play is None or speech.play.lower() == play.lower())
    }
    like = sorted(name for name in roles if role.lower() in name.lower())
    close = like or get_close_matches(role.upper(), roles)
    where = f"{corpus.name}{f', {play}' if play else ''}"
    advice = (
        f"; similar names: {', '.join(close)}"
        if close
        else f"; none of its {len(roles)} roles is similar"
    )
    return f"{where} has no role {role!r}{advice}"


def _place(speech: Speech) -> str:
    return ", ".join(filter(None, [speech.play, speech.act, speech.scene]))


def _plot(options: argparse.Namespace) -> None:
    plot_partition(_divide(options), options.output)
    print(options.output)


def _divide(options: argparse.Namespace) -> Partition:
    return partition(
        load_corpus(options.corpus),
        options.num_partitions,
        options.scheme,
        options.seed,
        min_characters=options.min_characters,
        validation_fraction=options.validation_fraction,
        split=options.split,
        alpha=options.alpha,
        by=options.by,
        window=options.window,
    )


def _print_report(divided: Partition) -> None:
    report = divided.report()
    print(f"{'client':>6}  {'train':>10}  {'val':>9}  {'speakers':>8}  {'plays':>5}  divergence")
    for part in report:
        print(
            f"{part.client:>6}  {part.train:>10,}  {part.val:>9,}  {part.speakers:>8,}  "
            f"{part.plays:>5}  {part.divergence:.5f}"
        )
    left_out = divided.left_out / len(divided.corpus.text)
    print(
        f"{divided.corpus.name}, {divided.scheme}: {left_out:.1%} of the text left out; divergence "
        f"from the whole text (Jensen-Shannon, bits): median "
        f"{median(part.divergence for part in report):.5f}, "
        f"largest {max(part.divergence for part in report):.5f}"
    )
