"""Convert text to token ids and token ids to text, with one token for each character.

Both conversions look up values in tables.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shakespeare_data._atomic import write_atomically
from shakespeare_data.errors import DataError

MAX_VOCAB_SIZE = 2**16  # ids are uint16
MAX_DOCUMENT = 100_000  # characters of a tokenizer in JSON; the largest vocabulary takes fewer

_NAMED_CHARACTERS = 128  # an error message shows at most this many characters of a vocabulary
_PAIRS_FROM = 2**12  # shorter texts do not use the table of pairs, because it takes time to build
_BLOCK = 2**15  # characters in one step; small temporary arrays fit into the processor's cache


@dataclass(frozen=True)
class CharTokenizer:
    """A tokenizer with one token for each character, as in nanoGPT's `shakespeare_char`.

    The id of a character is its index in `vocab`. The characters in `vocab` are sorted by code
    point. Two tokenizers are equal if their vocabularies are equal. Raises `DataError` if `vocab`
    is empty or not sorted, contains a character twice, contains more than 65,536 characters, or
    contains a lone surrogate.
    """

    vocab: str

    def __post_init__(self) -> None:
        codes = _code_points(self.vocab, "the vocabulary")
        if not self.vocab:
            raise DataError("a tokenizer needs at least one character, but the text is empty")
        if len(codes) > MAX_VOCAB_SIZE:
            raise DataError(
                f"the text has {len(codes):,} distinct characters, "
                f"but ids of 16 bits allow {MAX_VOCAB_SIZE:,}"
            )
        if np.any(codes[1:] <= codes[:-1]):
            raise DataError("the vocabulary must be sorted and have each character once")

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Make a tokenizer from all characters that occur in `text`."""
        _code_points(text, "the text")
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """The number of characters in the vocabulary."""
        return len(self.vocab)

    @property
    def fingerprint(self) -> str:
        """A short identifier of the vocabulary.

        The identifier consists of the first 16 hexadecimal digits of a SHA-256. The SHA-256 is
        computed from the vocabulary in UTF-8.
        """
        return sha256(self.vocab.encode()).hexdigest()[:16]

    @cached_property
    def _codes(self) -> NDArray[np.uint32]:
        return _code_points(self.vocab, "the vocabulary")

    @cached_property
    def _ids(self) -> NDArray[np.int32]:
        """A table that maps each code point to its id, as an int32 array.

        A code point outside the vocabulary has the value -1. The last entry is always -1. All code
        points beyond the end of the table use this entry.
        """
        ids = np.full(int(self._codes[-1]) + 2, -1, dtype=np.int32)
        ids[self._codes] = np.arange(self.vocab_size, dtype=np.int32)
        return ids

    @cached_property
    def _pairs(self) -> NDArray[np.uint32]:
        """A table that maps two Latin-1 characters to their two ids.

        With this table, one look-up encodes two characters. Each character is one byte, and the two
        bytes together are the index, a uint16. Each id is a uint16, and the two ids together are
        the value in the table, a uint32. A character outside the vocabulary has 2^16 - 1 in place
        of an id. This is never the id of a Latin-1 character: ids follow the order of the code
        points, so these ids are at most 255.
        """
        byte = np.full(256, 2**16 - 1, dtype=np.uint16)
        codes = self._codes[self._codes < 256]
        byte[codes] = np.arange(len(codes), dtype=np.uint16)
        characters = np.arange(2**16, dtype="<u2").view(np.uint8)  # (2 * 2^16,)
        return byte[characters].view(np.uint32)

    def encode(self, text: str, *, replacement: str | None = None) -> NDArray[np.uint16]:
        """Return the ids of the characters in `text` as a uint16 array `(len(text),)`.

        A character outside the vocabulary gets the id of the character `replacement`. If
        `replacement` is `None`, such a character raises `DataError`. The message then names the
        character and its position.
        """
        ids = np.empty(len(text), dtype=np.uint16)
        substitute = None if replacement is None else self._id(replacement)
        if len(text) < _PAIRS_FROM or not self._encode_pairs(text, ids):
            for start in range(0, len(text), _BLOCK):
                block = slice(start, start + _BLOCK)
                self._encode_block(text[block], ids[block], start, substitute)
        return ids

    def _encode_pairs(self, text: str, out: NDArray[np.uint16]) -> bool:
        """Look up two characters of `text` at a time, and write their ids to `out`.

        Returns `True` if all characters are encoded. Returns `False` if a character is not in
        Latin-1 or not in the vocabulary. In that case `out` is incomplete.
        """
        indices = np.empty(_BLOCK // 2, dtype=np.intp)
        for start in range(0, len(text), _BLOCK):
            try:
                latin = text[start : start + _BLOCK].encode("latin-1")
            except UnicodeEncodeError:
                return False
            pairs = np.frombuffer(latin, "<u2", len(latin) // 2)
            stop = start + 2 * len(pairs)
            indices[: len(pairs)] = pairs
            ids = out[start:stop].view(np.uint32)
            # "wrap" skips the check of all indices. The check is not needed: all indices are valid.
            self._pairs.take(indices[: len(pairs)], out=ids, mode="wrap")
            if len(latin) % 2:
                alone = self._pairs[latin[-1] : latin[-1] + 1]  # encoded as a pair with U+0000
                out[stop] = alone.view(np.uint16)[0]
        return int(out.max()) < 2**16 - 1

    def _encode_block(
        self, text: str, out: NDArray[np.uint16], offset: int, substitute: int | None
    ) -> None:
        ids = np.take(self._ids, _code_points(text, "the text", offset), mode="clip")
        if ids.min() < 0:
            if substitute is None:
                position = int(np.argmax(ids < 0))
                raise DataError(
                    f"{_named(text[position])} at position {offset + position} is not in the "
                    f"vocabulary of {self.vocab_size} characters {self._named_vocab}"
                )
            ids[ids < 0] = substitute
        out[:] = ids

    @property
    def _named_vocab(self) -> str:
        more = self.vocab_size - _NAMED_CHARACTERS
        return repr(self.vocab[:_NAMED_CHARACTERS]) + (f" and {more} more" if more > 0 else "")

    def _id(self, replacement: str) -> int:
        if len(replacement) != 1 or replacement not in self.vocab:
            raise DataError(
                f"replacement must be one character of the vocabulary {self._named_vocab}, "
                f"it is {replacement!r}"
            )
        return self.vocab.index(replacement)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text for `ids`, which are integers `(T,)`.

        Raises `DataError` if `ids` is not one-dimensional, if it has a value that is not an
        integer, or if an id is out of range.
        """
        array = np.asarray(ids)
        if array.size == 0:
            return ""
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"ids must be a one-dimensional array of integers, "
                f"got {array.dtype} of shape {array.shape}"
            )
        if array.max() >= self.vocab_size or array.min() < 0:
            position = int(np.argmax((array < 0) | (array >= self.vocab_size)))
            raise DataError(
                f"id {array[position]} at position {position} is outside 0 to {self.vocab_size - 1}"
            )
        if self._codes[-1] < 256:
            latin: bytes = self._codes.astype(np.uint8)[array].tobytes()
            return latin.decode("latin-1")
        text: bytes = self._codes[array].tobytes()
        return text.decode("utf-32-le")

    def to_json(self) -> str:
        """Return the tokenizer as JSON in the form `{"type": "char", "vocab": "…"}`."""
        return json.dumps({"type": "char", "vocab": self.vocab}, ensure_ascii=False)

    @classmethod
    def from_json(cls, document: str) -> Self:
        """Make a tokenizer from a JSON document that `to_json` returned.

        Raises `DataError` if `document` has a different form, or more than 100,000 characters.
        """
        if len(document) > MAX_DOCUMENT:
            raise DataError(
                f"the tokenizer has {len(document):,} characters of JSON, "
                f"but at most {MAX_DOCUMENT:,} are allowed"
            )
        try:
            content = json.loads(document)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of many digits
            raise DataError(f"the tokenizer is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("type") != "char":
            raise DataError('the tokenizer must be a JSON object with "type": "char"')
        vocab = content.get("vocab")
        if not isinstance(vocab, str):
            raise DataError('"vocab" of the tokenizer must be a string')
        return cls(vocab)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON to the file `path`.

        The file is encoded in UTF-8 and written atomically. Raises `DataError` if the file cannot
        be written. In that case, an existing file at `path` stays unchanged.
        """
        try:
            write_atomically(Path(path), self.to_json().encode())
        except OSError as error:
            raise DataError(f"cannot write the tokenizer {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a tokenizer from a file that `save` wrote.

        Raises `DataError` if the file cannot be read or does not contain a tokenizer.
        """
        try:
            document = Path(path).read_bytes().decode()
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"the tokenizer {path} is not UTF-8 at byte {error.start}") from error
        try:
            return cls.from_json(document)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


def _code_points(text: str, what: str, offset: int = 0) -> NDArray[np.uint32]:
    try:
        return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has a lone surrogate, U+{ord(text[error.start]):04X}, "
            f"at position {offset + error.start}; that is not a character"
        ) from error


def _named(character: str) -> str:
    return f"character {character!r} (U+{ord(character):04X})"
