import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shakespeare_data.batches as module
from shakespeare_data import (
    Batches,
    DataError,
    sample_windows,
    sequential_batches,
)

TOKENS = np.random.default_rng(0).integers(0, 65, 1000).astype(np.uint16)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draw a number of tokens, a batch size and a block size that fit."""
    length = draw(st.integers(2, 300))
    return length, draw(st.integers(1, 12)), draw(st.integers(1, length - 1))


def naive_windows(
    tokens: np.ndarray, batch_size: int, block_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw windows as nanoGPT does: take one slice for each row, then stack the slices."""
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


def test_every_window_can_be_sampled() -> None:
    tokens = np.arange(12, dtype=np.uint16)
    x, y = sample_windows(tokens, 1000, 4, np.random.default_rng(0))
    assert set(x[:, 0].tolist()) == set(range(8))
    assert set(y[:, -1].tolist()) == set(range(4, 12))


def test_batches_are_the_windows_that_a_seeded_generator_draws() -> None:
    batches = Batches(TOKENS, 8, 16, seed=(1, 2))
    rng = np.random.default_rng(np.random.SeedSequence(1, spawn_key=(2,)))
    for _ in range(3):
        x, y = next(batches)
        expected = naive_windows(TOKENS, 8, 16, rng)
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (8, 16)
        assert x.tolist() == expected[0].tolist()
        assert y.tolist() == expected[1].tolist()
        assert y.view(-1).shape == (128,)


def test_a_list_is_refused() -> None:
    with pytest.raises(DataError, match="tokens must be a numpy array, it is list"):
        Batches([1, 2, 3, 4], 1, 2, seed=1)  # type: ignore[arg-type]


def test_batches_depend_on_each_number_of_the_seed() -> None:
    def first(seed: int | tuple[int, ...]) -> list[list[int]]:
        x, _ = next(Batches(TOKENS, 4, 8, seed=seed))
        return x.tolist()

    assert first((3, 0, 1)) == first((3, 0, 1))
    # NumPy's SeedSequence alone would not tell (3,), (3, 0) and (3, 0, 0) apart.
    seeds = (3, (3, 0), (3, 0, 0), (3, 0, 1), (3, 1, 1), (3, 0, 2), (4, 0, 1))
    assert len({str(first(seed)) for seed in seeds}) == len(seeds)


def test_a_later_epoch_differs_from_the_first_epoch_of_a_longer_seed() -> None:
    def order(seed: int | tuple[int, ...], epochs: int) -> list[list[int]]:
        batches = Batches(TOKENS, 4, 8, seed=seed, epochs=epochs, return_tensors="np")
        return [x.tolist() for x, _ in batches][-31:]

    assert order(5, 3) != order((5, 2), 1)


def test_a_state_with_numpy_sizes_can_be_saved_as_json() -> None:
    batches = Batches(TOKENS, np.int64(4), np.int64(8), seed=np.uint32(1), epochs=np.int64(2))
    assert json.loads(json.dumps(batches.state_dict())) == batches.state_dict()


def test_batches_from_a_memory_mapped_file_equal_those_from_memory(tmp_path: Path) -> None:
    TOKENS.astype("<u2").tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype="<u2", mode="r")
    pairs = zip(Batches(mapped, 8, 16, seed=1), Batches(TOKENS, 8, 16, seed=1), strict=True)
    for _ in range(3):
        (x, y), (expected_x, expected_y) = next(pairs)
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
        x.zero_()  # the caller may change a batch, although the file is read-only


@given(sizes(), st.integers(0, 2**32))
def test_an_epoch_has_each_non_overlapping_window_once(
    size: tuple[int, int, int], seed: int
) -> None:
    length, batch_size, block_size = size
    tokens = np.arange(length, dtype=np.uint16)
    batches = list(Batches(tokens, batch_size, block_size, seed=seed, epochs=1))
    starts = [row[0] for x, _ in batches for row in x.tolist()]
    assert sorted(starts) == list(range(0, length - block_size, block_size))
    for x, y in batches:
        assert (y == x + 1).all()
        assert (x[:, -1] - x[:, 0] == block_size - 1).all()
    assert len(batches) == len(Batches(tokens, batch_size, block_size, seed=seed, epochs=1))
    assert all(len(x) == batch_size for x, _ in batches[:-1])


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    batches = Batches(TOKENS, 4, 8, seed=(1, 2), epochs=3, return_tensors="np")
    rows = np.concatenate([x for x, _ in batches]).reshape(3, -1, 8)
    assert len(rows[0]) == 124
    windows = TOKENS[: 124 * 8].reshape(-1, 8)
    for epoch, found in enumerate(rows):
        seed = np.random.SeedSequence(1, spawn_key=(2, epoch))
        order = np.random.default_rng(seed).permutation(124)
        np.testing.assert_array_equal(found, windows[order])


@given(sizes(), st.integers(0, 2**32), st.integers(1, 40))
def test_a_pass_over_disjoint_windows_has_no_token_twice(
    size: tuple[int, int, int], seed: int, taken: int
) -> None:
    length, batch_size, block_size = size
    tokens = np.arange(length, dtype=np.uint16)
    batches = Batches(tokens, batch_size, block_size, seed=seed, windows="disjoint")
    drawn = list(islice(batches, taken))
    assert all(x.shape == (batch_size, block_size) and (y == x + 1).all() for x, y in drawn)
    starts = [int(row[0]) for x, _ in drawn for row in x]
    per_pass = max(1, (length - 1) // block_size - 1)
    for first in range(0, len(starts), per_pass):
        in_order = sorted(starts[first : first + per_pass])
        assert all(b - a >= block_size for a, b in pairwise(in_order))


def test_passes_over_disjoint_windows_reach_all_tokens_almost_equally_often() -> None:
    drawn = Counter[int]()
    in_order = np.arange(1000, dtype=np.uint16)
    for x, _ in islice(Batches(in_order, 4, 8, seed=1, windows="disjoint"), 31 * 400):
        drawn.update(x.flatten().tolist())
    inner = [drawn[token] for token in range(16, 983)]
    assert min(inner) > 0.95 * max(inner)
    orders = {
        next(Batches(TOKENS, 4, 8, seed=seed, windows="disjoint"))[0].numpy().tobytes()
        for seed in range(20)
    }
    assert len(orders) == 20


def test_endless_batches_have_no_length() -> None:
    assert len(Batches(TOKENS, 4, 8, seed=1, epochs=2)) == 2 * 31
    with pytest.raises(TypeError, match="no length; give epochs"):
        len(Batches(TOKENS, 4, 8, seed=1))


@given(
    size=sizes(),
    seed=st.integers(0, 2**32),
    epochs=st.none() | st.integers(1, 3),
    windows=st.sampled_from(["random", "disjoint"]),
    taken=st.integers(0, 12),
)
def test_a_restored_state_continues_the_sequence(
    size: tuple[int, int, int],
    seed: int,
    epochs: int | None,
    windows: Literal["random", "disjoint"],
    taken: int,
) -> None:
    length, batch_size, block_size = size

    def fresh() -> Batches:
        tokens = TOKENS[:length]
        return Batches(tokens, batch_size, block_size, seed=seed, epochs=epochs, windows=windows)

    def taken_from(batches: Batches, count: int) -> list[list[list[int]]]:
        return [x.tolist() for x, _ in islice(batches, count)]

    whole = taken_from(fresh(), taken + 20)
    first = fresh()
    assert taken_from(first, taken) == whole[:taken]
    state = json.loads(json.dumps(first.state_dict()))
    assert taken_from(first, 20) == whole[taken:]
    second = fresh()
    taken_from(second, 3)  # the state replaces this position
    second.load_state_dict(state)
    assert taken_from(second, 20) == whole[taken:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 999}, "has num_tokens 999, but these batches have num_tokens 1000"),
        ({"batch_size": 5}, "has batch_size 5, but these batches have batch_size 4"),
        ({"block_size": 9}, "has block_size 9, but these batches have block_size 8"),
        ({"seed": [2]}, r"has seed \[2\], but these batches have seed \[1\]"),
        ({"epochs": None}, "has epochs None, but these batches have epochs 1"),
        (
            {"windows": "disjoint"},
            "has windows 'disjoint', but these batches have windows 'random'",
        ),
        ({"version": 1}, "has version 1, but these batches have version 2"),
        ({"drawn": -1}, "drawn .* at least 0 and at most 31, it is -1"),
        ({"drawn": 32}, "drawn .* at least 0 and at most 31, it is 32"),
        ({"drawn": "all"}, "drawn .* it is 'all'"),
        (
            {"rng": {"bit_generator": "MT19937"}},
            "rng in the state of batches is not the state of a PCG64",
        ),
        ({"more": 1}, "missing or unknown: more"),
    ],
)
def test_a_state_of_other_batches_is_refused_and_changes_nothing(
    change: dict[str, object], message: str
) -> None:
    batches, untouched = (Batches(TOKENS, 4, 8, seed=1, epochs=1) for _ in range(2))
    with pytest.raises(DataError, match=message):
        batches.load_state_dict(batches.state_dict() | change)
    assert next(batches)[0].tolist() == next(untouched)[0].tolist()


def test_a_state_that_is_not_a_dict_is_refused() -> None:
    with pytest.raises(DataError, match="must be a dict, it is list"):
        Batches(TOKENS, 4, 8, seed=1).load_state_dict([])  # type: ignore[arg-type]


def test_a_later_batch_does_not_change_an_earlier_one() -> None:
    batches = Batches(TOKENS, 4, 8, seed=1, return_tensors="np")
    first, _ = next(batches)
    kept = first.copy()
    next(batches)
    np.testing.assert_array_equal(first, kept)


def test_arrays_equal_tensors_and_need_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = next(Batches(TOKENS, 4, 8, seed=1))
    monkeypatch.setitem(sys.modules, "torch", None)
    found = next(Batches(TOKENS, 4, 8, seed=1, return_tensors="np"))
    assert all(isinstance(array, np.ndarray) and array.dtype == np.int64 for array in found)
    assert [array.tolist() for array in found] == [x.tolist(), y.tolist()]


def test_a_bin_is_mapped_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    TOKENS.astype("<u2").tofile(path)
    for source in (path, str(path)):
        x, _ = next(Batches(source, 4, 8, seed=1))
        assert torch.equal(x, next(Batches(TOKENS, 4, 8, seed=1))[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read .*train.bin"), (b"", "is empty"), (b"abc", "has 3 bytes, .* even number")],
)
def test_a_file_that_is_not_a_bin_is_named(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "train.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Batches(path, 1, 1, seed=1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux releases pages")
def test_a_large_mapped_file_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.bin"
    path.touch()
    os.truncate(path, 2**28)
    monkeypatch.setattr(module, "_RESIDENT_BYTES", 2**20)

    def resident(source: Path | np.ndarray) -> int:
        """Return the largest growth of resident file memory, in bytes, while batches are drawn."""
        before, most = module._resident_file_bytes(), 0
        batches = Batches(source, 1, 8, seed=1, return_tensors="np")
        for _ in range(5000):
            next(batches)
            most = max(most, module._resident_file_bytes() - before)
        return most

    changeable = np.memmap(path, "<u2", "c")  # its pages may hold changes and must be kept
    assert resident(path) < 2**26 < resident(changeable)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, it is 0"),
        ({"windows": "all"}, "windows must be one of random, disjoint, it is 'all'"),
        ({"return_tensors": "jax"}, "return_tensors must be 'pt' or 'np', it is 'jax'"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Batches(TOKENS, 1, 8, seed=1, **options)


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
    assert sum(len(x) for x, _ in full) == (length - 1) // block_size


Call = Callable[[np.ndarray, int, int], object]
CALLS = {
    "sample_windows": lambda t, b, s: sample_windows(t, b, s, np.random.default_rng(0)),
    "Batches": lambda t, b, s: Batches(t, b, s, seed=0),
    "epochs": lambda t, b, s: Batches(t, b, s, seed=0, epochs=1),
    "disjoint": lambda t, b, s: Batches(t, b, s, seed=0, windows="disjoint"),
    "sequential_batches": sequential_batches,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(
    ("tokens", "batch_size", "block_size", "message"),
    [
        (TOKENS, 0, 8, "batch_size must be a whole number of at least 1, it is 0"),
        (TOKENS, -3, 8, "batch_size must be a whole number of at least 1, it is -3"),
        (TOKENS, 1, 0, "block_size must be a whole number of at least 1, it is 0"),
        (TOKENS, 1, 1000, "block_size 1000 needs at least 1001 tokens, there are 1000"),
        (TOKENS[:0], 1, 1, "block_size 1 needs at least 2 tokens, there are 0"),
        (TOKENS.astype(float), 1, 8, "array of integers, got float64"),
        (TOKENS.reshape(10, 100), 1, 8, r"of shape \(10, 100\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_the_call(
    call: Call, tokens: np.ndarray, batch_size: int, block_size: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        call(tokens, batch_size, block_size)


@pytest.mark.parametrize("seed", [None, -1, (1, -1), "one", (), 1.5, (1, 2**32), [[1]]])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(DataError, match="seed must be an integer of at least 0, or a sequence"):
        Batches(TOKENS, 1, 8, seed=seed)


def test_without_torch_windows_work_and_tensors_name_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    x, _ = sample_windows(TOKENS, 2, 8, np.random.default_rng(0))
    assert x.shape == (2, 8)
    for call in (CALLS["Batches"], CALLS["epochs"], CALLS["sequential_batches"]):
        with pytest.raises(DataError, match=r"pip install torch"):
            call(TOKENS, 2, 8)
