"""Windows of a token array as `(x, y)` batches; `y` is `x` shifted by one.

Arrays may be memory-mapped. Only this module uses torch, and only when a batch is a tensor.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from shakespeare_data.errors import DataError

if TYPE_CHECKING:
    import torch


def sample_windows(
    tokens: NDArray[Any], batch_size: int, block_size: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`batch_size` windows from random places of `tokens` `(N,)`, as nanoGPT's `get_batch`.

    Returns `x` and `y`, int64 `(batch_size, block_size)`. Raises `DataError` if
    `N < block_size + 1`.
    """
    _check(tokens, batch_size, block_size)
    return _gather(sliding_window_view(tokens, block_size + 1), batch_size, rng)


def _gather(
    windows: NDArray[Any], batch_size: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows = windows[rng.integers(len(windows), size=batch_size)]  # (B, T + 1)
    return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)


class Batches:
    """Endless random windows as tensors; the same seed gives the same sequence.

    `seed` is an int or several, such as `(seed, client, round)`; none negative. Each item is
    `(x, y)`, int64 `(batch_size, block_size)`. Raises `DataError` for sizes that cannot work and
    when torch is not installed.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        batch_size: int,
        block_size: int,
        *,
        seed: int | Sequence[int],
    ) -> None:
        _check(tokens, batch_size, block_size)
        self._from_numpy = _torch().from_numpy
        self._windows = sliding_window_view(tokens, block_size + 1)
        self._batch_size = batch_size
        self._rng = _rng(seed)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> "tuple[torch.Tensor, torch.Tensor]":
        x, y = _gather(self._windows, self._batch_size, self._rng)
        return self._from_numpy(x), self._from_numpy(y)


def num_epoch_batches(tokens: NDArray[Any], batch_size: int, block_size: int) -> int:
    """How many batches `epoch_batches` yields."""
    _check(tokens, batch_size, block_size)
    return -(-_num_windows(tokens, block_size) // batch_size)


def epoch_batches(
    tokens: NDArray[Any], batch_size: int, block_size: int, *, seed: int | Sequence[int]
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """Each non-overlapping window of `tokens` `(N,)` once, in an order that `seed` shuffles.

    Yields int64 `(B, block_size)` pairs; the last may have fewer rows. Up to `block_size - 1`
    tokens at the end fill no window and are left out.
    """
    _check(tokens, batch_size, block_size)
    order = _rng(seed).permutation(_num_windows(tokens, block_size))
    return _in_order(tokens, batch_size, block_size, order, _torch())


def sequential_batches(
    tokens: NDArray[Any], batch_size: int, block_size: int
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """One pass from front to back in which each of the `N - 1` targets occurs exactly once.

    Yields int64 `(B, block_size)` pairs of non-overlapping windows, then what remains as a last
    pair of shape `(1, r)` with `r < block_size`.
    """
    _check(tokens, batch_size, block_size)
    order = np.arange(_num_windows(tokens, block_size))
    return _in_order(tokens, batch_size, block_size, order, _torch(), remainder=True)


def _in_order(
    tokens: NDArray[Any],
    batch_size: int,
    block_size: int,
    order: NDArray[np.int64],
    torch: Any,
    *,
    remainder: bool = False,
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    end = len(order) * block_size
    xs = tokens[:end].reshape(-1, block_size)
    ys = tokens[1 : end + 1].reshape(-1, block_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield (
            torch.from_numpy(xs[rows].astype(np.int64)),
            torch.from_numpy(ys[rows].astype(np.int64)),
        )
    if remainder and end + 1 < len(tokens):
        rest = np.asarray(tokens[end:], dtype=np.int64)[None]  # (1, r + 1)
        yield torch.from_numpy(rest[:, :-1].copy()), torch.from_numpy(rest[:, 1:].copy())


def _num_windows(tokens: NDArray[Any], block_size: int) -> int:
    return (len(tokens) - 1) // block_size


def _check(tokens: NDArray[Any], batch_size: int, block_size: int) -> None:
    if not isinstance(tokens, np.ndarray):
        raise DataError(f"tokens must be a numpy array, it is {type(tokens).__name__}")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"tokens must be a one-dimensional array of integers, "
            f"got {tokens.dtype} of shape {tokens.shape}"
        )
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, it is {batch_size}")
    if block_size < 1:
        raise DataError(f"block_size must be at least 1, it is {block_size}")
    if len(tokens) < block_size + 1:
        raise DataError(
            f"block_size {block_size} needs at least {block_size + 1} tokens, "
            f"there are {len(tokens)}"
        )


def _rng(seed: int | Sequence[int]) -> np.random.Generator:
    refusal = f"seed must be integers of at least 0, it is {seed!r}"
    if seed is None:  # numpy would take one from the system
        raise DataError(refusal)
    try:
        return np.random.default_rng(seed)
    except (ValueError, TypeError) as error:
        raise DataError(refusal) from error


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise DataError(
            "batches of tensors need torch: pip install torch (sample_windows works without it)"
        ) from error
    return torch
