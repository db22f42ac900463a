import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shakespeare_data import (
    Batches,
    DataError,
    epoch_batches,
    num_epoch_batches,
    sample_windows,
    sequential_batches,
)

TOKENS = np.random.default_rng(0).integers(0, 65, 1000).astype(np.uint16)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Tokens, batch and block sizes that fit."""
    length = draw(st.integers(2, 300))
    return length, draw(st.integers(1, 12)), draw(st.integers(1, length - 1))


def naive_windows(
    tokens: np.ndarray, batch_size: int, block_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """nanoGPT's way: a slice a row, then a stack."""
    starts = rng.integers(len(tokens) - block_size, size=batch_size)
    x = np.stack([tokens[i : i + block_size].astype(np.int64) for i in starts])
    y = np.stack([tokens[i + 1 : i + 1 + block_size].astype(np.int64) for i in starts])
    return x, y


@given(sizes(), st.integers(0, 2**32))
def test_sampled_windows_equal_a_stack_of_slices(size: tuple[int, int, int], seed: int) -> None:
    length, batch_size, block_size = size
    tokens = TOKENS[:length]
    x, y = sample_windows(tokens, batch_size, block_size, np.random.default_rng(seed))
    expected = naive_windows(tokens, batch_size, block_size, np.random.default_rng(seed))
    np.testing.assert_array_equal(x, expected[0])
    np.testing.assert_array_equal(y, expected[1])
    assert x.dtype == y.dtype == np.int64
    assert x.flags.c_contiguous
    assert y.flags.c_contiguous


def test_every_window_is_sampled_sooner_or_later() -> None:
    tokens = np.arange(12, dtype=np.uint16)
    x, y = sample_windows(tokens, 1000, 4, np.random.default_rng(0))
    assert set(x[:, 0].tolist()) == set(range(8))
    assert set(y[:, -1].tolist()) == set(range(4, 12))


def test_batches_are_tensors_of_the_windows_in_the_generators_order() -> None:
    batches, rng = Batches(TOKENS, 8, 16, seed=(1, 2)), np.random.default_rng((1, 2))
    for _ in range(3):
        x, y = next(batches)
        expected = naive_windows(TOKENS, 8, 16, rng)
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (8, 16)
        assert x.tolist() == expected[0].tolist()
        assert y.tolist() == expected[1].tolist()
        assert y.view(-1).shape == (128,)


def test_a_list_is_no_array() -> None:
    with pytest.raises(DataError, match="tokens must be a numpy array, it is list"):
        Batches([1, 2, 3, 4], 1, 2, seed=1)  # type: ignore[arg-type]


def test_batches_depend_on_each_number_of_the_seed() -> None:
    def first(seed: int | tuple[int, ...]) -> list[list[int]]:
        x, _ = next(Batches(TOKENS, 4, 8, seed=seed))
        return x.tolist()

    assert first((3, 0, 1)) == first((3, 0, 1))
    assert len({str(first(seed)) for seed in (3, (3, 0, 1), (3, 1, 1), (3, 0, 2), (4, 0, 1))}) == 5


def test_batches_from_a_memory_mapped_file_equal_those_from_memory(tmp_path: Path) -> None:
    TOKENS.astype("<u2").tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype="<u2", mode="r")
    pairs = zip(Batches(mapped, 8, 16, seed=1), Batches(TOKENS, 8, 16, seed=1), strict=True)
    for _ in range(3):
        (x, y), (expected_x, expected_y) = next(pairs)
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
        x.zero_()  # a batch is the caller's own; the file is read-only


@given(sizes(), st.integers(0, 2**32))
def test_an_epoch_has_each_non_overlapping_window_once(
    size: tuple[int, int, int], seed: int
) -> None:
    length, batch_size, block_size = size
    tokens = np.arange(length, dtype=np.uint16)
    batches = list(epoch_batches(tokens, batch_size, block_size, seed=seed))
    starts = [row[0] for x, _ in batches for row in x.tolist()]
    assert sorted(starts) == list(range(0, length - block_size, block_size))
    for x, y in batches:
        assert (y == x + 1).all()
        assert (x[:, -1] - x[:, 0] == block_size - 1).all()
    assert len(batches) == num_epoch_batches(tokens, batch_size, block_size)
    assert all(len(x) == batch_size for x, _ in batches[:-1])


def test_epochs_are_shuffled_by_their_seed() -> None:
    def order(seed: int) -> list[list[int]]:
        return [x.tolist() for x, _ in epoch_batches(TOKENS, 4, 8, seed=seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)


@given(sizes())
def test_a_sequential_pass_predicts_every_target_once_and_in_order(
    size: tuple[int, int, int],
) -> None:
    length, batch_size, block_size = size
    tokens = np.arange(length, dtype=np.uint16)
    batches = list(sequential_batches(tokens, batch_size, block_size))
    assert [i for _, y in batches for i in y.flatten().tolist()] == list(range(1, length))
    assert [i for x, _ in batches for i in x.flatten().tolist()] == list(range(length - 1))
    remainder = (length - 1) % block_size
    if remainder:
        assert batches[-1][0].shape == (1, remainder)
    full = batches[: len(batches) - bool(remainder)]
    assert all(x.shape[1] == block_size and len(x) <= batch_size for x, _ in full)
    assert len(full) == num_epoch_batches(tokens, batch_size, block_size)


Call = Callable[[np.ndarray, int, int], object]
CALLS = {
    "sample_windows": lambda t, b, s: sample_windows(t, b, s, np.random.default_rng(0)),
    "Batches": lambda t, b, s: Batches(t, b, s, seed=0),
    "epoch_batches": lambda t, b, s: epoch_batches(t, b, s, seed=0),
    "num_epoch_batches": num_epoch_batches,
    "sequential_batches": sequential_batches,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(
    ("tokens", "batch_size", "block_size", "message"),
    [
        (TOKENS, 0, 8, "batch_size must be at least 1, it is 0"),
        (TOKENS, -3, 8, "batch_size must be at least 1, it is -3"),
        (TOKENS, 1, 0, "block_size must be at least 1, it is 0"),
        (TOKENS, 1, 1000, "block_size 1000 needs at least 1001 tokens, there are 1000"),
        (TOKENS[:0], 1, 1, "block_size 1 needs at least 2 tokens, there are 0"),
        (TOKENS.astype(float), 1, 8, "array of integers, got float64"),
        (TOKENS.reshape(10, 100), 1, 8, r"of shape \(10, 100\)"),
    ],
)
def test_sizes_that_cannot_work_are_refused_at_the_call(
    call: Call, tokens: np.ndarray, batch_size: int, block_size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        call(tokens, batch_size, block_size)


@pytest.mark.parametrize("seed", [None, -1, (1, -1), "one"])
def test_a_seed_that_is_none_is_refused(seed: int) -> None:
    with pytest.raises(DataError, match="seed must be integers of at least 0"):
        Batches(TOKENS, 1, 8, seed=seed)


def test_without_torch_windows_work_and_tensors_name_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    x, _ = sample_windows(TOKENS, 2, 8, np.random.default_rng(0))
    assert x.shape == (2, 8)
    for call in (CALLS["Batches"], CALLS["epoch_batches"], CALLS["sequential_batches"]):
        with pytest.raises(DataError, match=r"pip install torch"):
            call(TOKENS, 2, 8)
