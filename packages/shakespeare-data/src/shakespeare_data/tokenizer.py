"""Characters to small integers and back, by table look-up."""

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

_NAMED_CHARACTERS = 128  # of a vocabulary, in an error
_PAIRS_FROM = 2**12  # characters from which a table of pairs pays
_BLOCK = 2**15  # characters at a time: what is temporary stays in the cache


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character, in code-point order, as in nanoGPT's `shakespeare_char`.

    Two tokenizers are equal when their vocabularies are. Raises `DataError` if `vocab` is empty,
    not strictly increasing, longer than 65,536 characters or holds a surrogate.
    """

    vocab: str

    def __post_init__(self) -> None:
        codes = _code_points(self.vocab, "the vocabulary")
        if not self.vocab:
            raise DataError("a tokenizer needs at least one character, the text is empty")
        if len(codes) > MAX_VOCAB_SIZE:
            raise DataError(
                f"the text has {len(codes):,} distinct characters, "
                f"ids of 16 bits allow {MAX_VOCAB_SIZE:,}"
            )
        if np.any(codes[1:] <= codes[:-1]):
            raise DataError("the vocabulary must be sorted, each character once")

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The tokenizer of the characters that occur in `text`."""
        _code_points(text, "the text")
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the vocabulary's UTF-8 bytes."""
        return sha256(self.vocab.encode()).hexdigest()[:16]

    @cached_property
    def _codes(self) -> NDArray[np.uint32]:
        return _code_points(self.vocab, "the vocabulary")

    @cached_property
    def _ids(self) -> NDArray[np.int32]:
        """Id by code point, -1 where there is none; the last entry stands for all beyond it."""
        ids = np.full(int(self._codes[-1]) + 2, -1, dtype=np.int32)
        ids[self._codes] = np.arange(self.vocab_size, dtype=np.int32)
        return ids

    @cached_property
    def _pairs(self) -> NDArray[np.uint32]:
        """Two ids by two Latin-1 characters, each way as they lie in memory: one look-up for both.

        A character outside the vocabulary has 2^16 - 1, which is no id: these are at most 256.
        """
        byte = np.full(256, 2**16 - 1, dtype=np.uint16)
        codes = self._codes[self._codes < 256]
        byte[codes] = np.arange(len(codes), dtype=np.uint16)
        characters = np.arange(2**16, dtype="<u2").view(np.uint8)  # (2 * 2^16,)
        return byte[characters].view(np.uint32)

    def encode(self, text: str, *, replacement: str | None = None) -> NDArray[np.uint16]:
        """`text` as ids, uint16 `(len(text),)`.

        A character outside the vocabulary becomes `replacement`, a character of it. Without one
        it raises `DataError`, with its position.
        """
        ids = np.empty(len(text), dtype=np.uint16)
        substitute = None if replacement is None else self._id(replacement)
        if len(text) < _PAIRS_FROM or not self._encode_pairs(text, ids):
            for start in range(0, len(text), _BLOCK):
                block = slice(start, start + _BLOCK)
                self._encode_block(text[block], ids[block], start, substitute)
        return ids

    def _encode_pairs(self, text: str, out: NDArray[np.uint16]) -> bool:
        """Fill `out` by twos; false if `text` has a character beyond Latin-1 or the vocabulary."""
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
            # "wrap" does without the pass that checks all indices; none is out of range
            self._pairs.take(indices[: len(pairs)], out=ids, mode="wrap")
            if len(latin) % 2:
                alone = self._pairs[latin[-1] : latin[-1] + 1]  # as if U+0000 came after it
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
        """The text of `ids`, integers `(T,)`. Raises `DataError` for an id out of range."""
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
        """`{"type": "char", "vocab": "…"}`."""
        return json.dumps({"type": "char", "vocab": self.vocab}, ensure_ascii=False)

    @classmethod
    def from_json(cls, document: str) -> Self:
        """The inverse of `to_json`. Raises `DataError` if `document` is anything else."""
        try:
            content = json.loads(document)
        except json.JSONDecodeError as error:
            raise DataError(f"the tokenizer is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("type") != "char":
            raise DataError('the tokenizer must be a JSON object with "type": "char"')
        vocab = content.get("vocab")
        if not isinstance(vocab, str):
            raise DataError('"vocab" of the tokenizer must be a string')
        return cls(vocab)

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to `path` in UTF-8, atomically. Raises `DataError` if it cannot."""
        try:
            write_atomically(Path(path), self.to_json().encode())
        except OSError as error:
            raise DataError(f"cannot write the tokenizer {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises `DataError` naming `path` if that is not possible."""
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
