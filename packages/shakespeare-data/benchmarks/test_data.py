"""Text to ids and ids to batches, beside nanoGPT's plain ways, on as many characters."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

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
    """nanoGPT's `get_batch`: a tensor a row, then a stack of them."""
    starts = torch.randint(len(tokens) - BLOCK_SIZE, (BATCH_SIZE,)).tolist()
    x = [torch.from_numpy(tokens[i : i + BLOCK_SIZE].astype(np.int64)) for i in starts]
    y = [torch.from_numpy(tokens[i + 1 : i + 1 + BLOCK_SIZE].astype(np.int64)) for i in starts]
    return torch.stack(x), torch.stack(y)


def test_encode(compare: Callable[..., None], tokens: Tokens, tokenizer: CharTokenizer) -> None:
    """Text of the corpus' length to uint16 ids."""
    text = tokenizer.decode(tokens)
    stoi = {character: i for i, character in enumerate(tokenizer.vocab)}
    compare(
        lambda: tokenizer.encode(text),
        lambda: np.array([stoi[character] for character in text], dtype=np.uint16),
        reference_name="dict and list",
        amount=len(text),
        unit="characters",
    )


def test_decode(compare: Callable[..., None], tokens: Tokens, tokenizer: CharTokenizer) -> None:
    """Ids to text, as many as the corpus has."""
    itos = dict(enumerate(tokenizer.vocab))
    compare(
        lambda: tokenizer.decode(tokens),
        lambda: "".join([itos[i] for i in tokens.tolist()]),
        reference_name="dict and join",
        amount=len(tokens),
        unit="characters",
    )


def test_batches_in_memory(compare: Callable[..., None], tokens: Tokens) -> None:
    """100 batches of 64 x 256 from an array."""
    batches = Batches(tokens, BATCH_SIZE, BLOCK_SIZE, seed=0)
    compare(
        lambda: [next(batches) for _ in range(BATCHES)],
        lambda: [stack_of_slices(tokens) for _ in range(BATCHES)],
        reference_name="stack of slices",
        amount=BATCHES * BATCH_SIZE * BLOCK_SIZE,
        unit="tokens",
    )


def test_batches_memory_mapped(compare: Callable[..., None], mapped: Path) -> None:
    """100 batches of 64 x 256 from a memory-mapped train.bin."""
    batches = Batches(np.memmap(mapped, "<u2", "r"), BATCH_SIZE, BLOCK_SIZE, seed=0)
    compare(
        lambda: [next(batches) for _ in range(BATCHES)],
        lambda: [stack_of_slices(np.memmap(mapped, "<u2", "r")) for _ in range(BATCHES)],
        reference_name="stack of slices, file opened for each batch as in nanoGPT",
        amount=BATCHES * BATCH_SIZE * BLOCK_SIZE,
        unit="tokens",
    )
