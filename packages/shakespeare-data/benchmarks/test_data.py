"""Compare the speed of the tokenizer and the batches with simple reference code.

Some of the reference code works as in nanoGPT. The text has as many characters as Tiny Shakespeare.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import BPE

from shakespeare_data import Batches, CharTokenizer

LENGTH = 1_115_394  # characters of Tiny Shakespeare
BATCH_SIZE, BLOCK_SIZE = 64, 256
BATCHES = 100  # drawn in each round

Tokens = NDArray[np.uint16]


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return np.random.default_rng(0).integers(0, 65, LENGTH).astype(np.uint16)


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return CharTokenizer("".join(map(chr, range(ord("!"), ord("!") + 65))))


@pytest.fixture(scope="module")
def mapped(tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("part") / "train.bin"
    tokens.astype("<u2").tofile(path)
    return path


def stack_of_slices(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch as nanoGPT's `get_batch` does.

    The function makes one tensor for each row and then stacks the tensors.
    """
    starts = torch.randint(len(tokens) - BLOCK_SIZE, (BATCH_SIZE,)).tolist()
    x = [torch.from_numpy(tokens[i : i + BLOCK_SIZE].astype(np.int64)) for i in starts]
    y = [torch.from_numpy(tokens[i + 1 : i + 1 + BLOCK_SIZE].astype(np.int64)) for i in starts]
    return torch.stack(x), torch.stack(y)


def times(count: int, encode: Callable[[], object]) -> None:
    for _ in range(count):
        encode()


def test_encode(compare: Callable[..., None], tokens: Tokens, tokenizer: CharTokenizer) -> None:
    """Measure ten encodings of the text. The reference uses a dict."""
    text = tokenizer.decode(tokens)
    stoi = {character: i for i, character in enumerate(tokenizer.vocab)}
    compare(
        lambda: times(10, lambda: tokenizer.encode(text)),
        lambda: times(10, lambda: np.array([stoi[c] for c in text], dtype=np.uint16)),
        reference_name="dict and list",
        amount=10 * len(text),
        unit="characters",
    )


def test_encode_beside_tokenizers(
    compare: Callable[..., None], tokens: Tokens, tokenizer: CharTokenizer
) -> None:
    """Measure one encoding of the text.

    The reference is a character-level model from Hugging Face's package `tokenizers`.
    """
    text = tokenizer.decode(tokens)
    lines = [
        text[start : start + 30] for start in range(0, len(text), 30)
    ]  # tokenizers is faster on many short lines
    theirs = Tokenizer(BPE({character: i for i, character in enumerate(tokenizer.vocab)}, []))

    def encode_lines() -> NDArray[np.uint16]:
        ids = [i for encoding in theirs.encode_batch(lines) for i in encoding.ids]
        return np.array(ids, dtype=np.uint16)

    np.testing.assert_array_equal(encode_lines(), tokens)
    compare(
        lambda: tokenizer.encode(text),
        encode_lines,
        reference_name="tokenizers, BPE without merges, lines in a batch",
        amount=len(text),
        unit="characters",
    )


def test_decode(compare: Callable[..., None], tokens: Tokens, tokenizer: CharTokenizer) -> None:
    """Measure one decoding of the ids. The reference uses a dict."""
    itos = dict(enumerate(tokenizer.vocab))
    compare(
        lambda: tokenizer.decode(tokens),
        lambda: "".join([itos[i] for i in tokens.tolist()]),
        reference_name="dict and join",
        amount=len(tokens),
        unit="characters",
    )


def test_batches_in_memory(compare: Callable[..., None], tokens: Tokens) -> None:
    """Measure 100 batches of 64 x 256 tokens from an array."""
    batches = Batches(tokens, BATCH_SIZE, BLOCK_SIZE, seed=0)
    compare(
        lambda: [next(batches) for _ in range(BATCHES)],
        lambda: [stack_of_slices(tokens) for _ in range(BATCHES)],
        reference_name="stack of slices",
        amount=BATCHES * BATCH_SIZE * BLOCK_SIZE,
        unit="tokens",
    )


def test_batches_memory_mapped(compare: Callable[..., None], mapped: Path) -> None:
    """Measure 100 batches of 64 x 256 tokens from a memory-mapped file."""
    batches = Batches(np.memmap(mapped, "<u2", "r"), BATCH_SIZE, BLOCK_SIZE, seed=0)
    compare(
        lambda: [next(batches) for _ in range(BATCHES)],
        lambda: [stack_of_slices(np.memmap(mapped, "<u2", "r")) for _ in range(BATCHES)],
        reference_name="stack of slices, file opened for each batch as in nanoGPT",
        amount=BATCHES * BATCH_SIZE * BLOCK_SIZE,
        unit="tokens",
    )


def test_epoch_in_memory(compare: Callable[..., None], tokens: Tokens) -> None:
    """Measure one epoch of shuffled windows.

    The reference is torch's `DataLoader` with slices of the array.
    """

    class Windows(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
        def __len__(self) -> int:
            return (len(tokens) - 1) // BLOCK_SIZE

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            window = torch.from_numpy(
                tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE + 1].astype(np.int64)
            )
            return window[:-1], window[1:]

    loader = torch.utils.data.DataLoader(Windows(), BATCH_SIZE, shuffle=True)
    compare(
        lambda: list(Batches(tokens, BATCH_SIZE, BLOCK_SIZE, seed=0, epochs=1)),
        lambda: list(loader),
        reference_name="DataLoader of slices",
        amount=len(Windows()) * BLOCK_SIZE,
        unit="tokens",
    )
