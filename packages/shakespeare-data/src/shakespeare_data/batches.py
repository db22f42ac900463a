"""Windows of a token array as `(x, y)` batches; `y` is `x` shifted by one.

Arrays may be memory-mapped. Only this module uses torch, and only when a batch is a tensor.
"""

import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from shakespeare_data.errors import DataError, whole_number

if TYPE_CHECKING:
    import torch

ON_DISK = np.dtype("<u2")  # nanoGPT's .bin: ids without a header

_STATE_VERSION = 1
_RESIDENT_BYTES = 2**28  # of a mapped file, before its pages are given back to the system

Pair = tuple[NDArray[np.int64], NDArray[np.int64]]


def sample_windows(
    tokens: NDArray[Any], batch_size: int, block_size: int, rng: np.random.Generator
) -> Pair:
    """`batch_size` windows from random places of `tokens` `(N,)`, as nanoGPT's `get_batch`.

    Returns `x` and `y`, int64 `(batch_size, block_size)`. Raises `DataError` if
    `N < block_size + 1`.
    """
    _check(tokens, batch_size, block_size)
    return _gather(sliding_window_view(tokens, block_size + 1), batch_size, rng)


def _gather(windows: NDArray[Any], batch_size: int, rng: np.random.Generator) -> Pair:
    return _pair(windows, rng.integers(len(windows), size=batch_size))


def _pair(windows: NDArray[Any], starts: NDArray[np.int64]) -> Pair:
    rows = windows[starts]  # (B, T + 1)
    return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)


class Batches:
    """Batches of windows, endless or for some epochs; the same seed gives the same sequence.

    Each item is `(x, y)`, int64 `(batch_size, block_size)`, the caller's to keep or change.

    - `source`: ids `(N,)` in an array, which may be memory-mapped and larger than memory, or the
      path of a `.bin` of little-endian uint16 ids, which is then mapped.
    - `seed`: an int or several, such as `(seed, client, round)`; none negative, those after the
      first below 2^32. Other seeds give other sequences: `1`, `(1, 0)` and `(1, 0, 0)` are three.
    - `epochs`: None for endless random windows; else that many passes over the non-overlapping
      windows, each pass in another order. The last batch of a pass may have fewer rows; up to
      `block_size - 1` tokens at the end fill no window and are left out.
    - `return_tensors`: `"pt"` for torch tensors, `"np"` for NumPy arrays (no torch needed).
    - `device`: where tensors go. They are drawn a batch ahead; for CUDA through pinned memory,
      without waiting for the copy.

    It is its own iterator, which goes on where it was and, after its epochs, stays at its end.
    `state_dict` and `load_state_dict` continue a sequence. A file that is mapped
    holds some 256 MiB of resident memory, and what one batch touches (Linux).

    Raises `DataError` for sizes that cannot work, a file that is no `.bin`, and when torch is asked
    for and not installed.
    """

    def __init__(
        self,
        source: NDArray[Any] | str | Path,
        batch_size: int,
        block_size: int,
        *,
        seed: int | Sequence[int],
        epochs: int | None = None,
        return_tensors: Literal["pt", "np"] = "pt",
        device: "str | torch.device | None" = None,
    ) -> None:
        tokens = map_tokens(Path(source)) if isinstance(source, str | Path) else source
        _check(tokens, batch_size, block_size)
        if epochs is not None:
            epochs = whole_number("epochs", epochs, 1)
        if return_tensors not in ("pt", "np"):
            raise DataError(f"return_tensors must be 'pt' or 'np', it is {return_tensors!r}")
        if device is not None and return_tensors != "pt":
            raise DataError(f"device is {str(device)!r}, which needs return_tensors='pt'")
        self._tokens = tokens
        self._batch_size = int(batch_size)
        self._block_size = int(block_size)
        self._seed = _integers(seed)
        self._rng = _rng(self._seed)
        self._epochs = epochs
        self._torch = _torch() if return_tensors == "pt" else None
        self._device = None if device is None else _usable(self._torch, device)
        self._drawn = 0
        self._ahead: list[tuple[dict[str, Any], Any]] = []  # at most one: state before it, batch
        self._order: tuple[int, NDArray[np.int64]] | None = None  # an epoch and its windows
        self._windows = sliding_window_view(tokens, block_size + 1)
        self._pages = _Pages.of(tokens)

    def __iter__(self) -> Self:
        return self

    def __len__(self) -> int:
        """How many batches all epochs have; `TypeError` if there is no end."""
        if self._epochs is None:
            raise TypeError("endless batches have no length; give epochs for some")
        return self._epochs * self._batches_per_epoch

    def __next__(self) -> Any:
        if self._device is None:
            return self._draw()
        _, batch = self._ahead.pop() if self._ahead else (None, self._draw())
        if self._epochs is None or self._drawn < len(self):
            self._ahead.append((self._state(), self._draw()))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the batches taken so far, for JSON."""
        return self._ahead[0][0] if self._ahead else self._state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, on the same tokens, sizes, seed and epochs.

        Raises `DataError` naming what differs; this object is then as it was.
        """
        expected = self._state()
        if not isinstance(state, dict):
            raise DataError(f"the state of batches must be a dict, it is {type(state).__name__}")
        if differing := expected.keys() ^ state.keys():
            raise DataError(
                f"the state of batches must have {', '.join(sorted(expected))} and no more; "
                f"lacking or unknown: {', '.join(sorted(map(str, differing)))}"
            )
        for key in expected.keys() - {"drawn", "rng"}:
            if state[key] != expected[key]:
                raise DataError(
                    f"the state of batches has {key} {state[key]!r}, these have {expected[key]!r}"
                )
        drawn, end = state["drawn"], None if self._epochs is None else len(self)
        if not isinstance(drawn, int) or drawn < 0 or (end is not None and drawn > end):
            raise DataError(
                f"drawn of the state of batches must be from 0 to {end or 'any number'}, "
                f"it is {drawn!r}"
            )
        rng = _rng(self._seed)
        try:
            rng.bit_generator.state = state["rng"]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise DataError(f"rng of the state of batches is no PCG64's: {error}") from error
        self._rng, self._drawn, self._ahead = rng, drawn, []

    def _state(self) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "num_tokens": len(self._tokens),
            "batch_size": self._batch_size,
            "block_size": self._block_size,
            "seed": self._seed,
            "epochs": self._epochs,
            "drawn": self._drawn,
            "rng": self._rng.bit_generator.state,
        }

    @property
    def _batches_per_epoch(self) -> int:
        return -(-_num_windows(self._tokens, self._block_size) // self._batch_size)

    def _draw(self) -> Any:
        if self._epochs is not None and self._drawn >= len(self):
            raise StopIteration
        if self._pages is not None:
            self._pages.give_back()
        if self._epochs is None:
            pair = _gather(self._windows, self._batch_size, self._rng)
        else:
            pair = self._of_epoch(*divmod(self._drawn, self._batches_per_epoch))
        self._drawn += 1
        return pair if self._torch is None else tuple(map(self._tensor, pair))

    def _of_epoch(self, epoch: int, batch: int) -> Pair:
        if self._order is None or self._order[0] != epoch:
            num_windows = _num_windows(self._tokens, self._block_size)
            self._order = epoch, _rng(self._seed, epoch).permutation(num_windows)
        chosen = self._order[1][batch * self._batch_size : (batch + 1) * self._batch_size]
        return _pair(self._windows, chosen * self._block_size)

    def _tensor(self, array: NDArray[np.int64]) -> "torch.Tensor":
        assert self._torch is not None
        tensor: torch.Tensor = self._torch.from_numpy(array)
        if self._device is None:
            return tensor
        pinned = tensor.pin_memory() if self._device.type == "cuda" else tensor
        return pinned.to(self._device, non_blocking=True)


def sequential_batches(
    tokens: NDArray[Any], batch_size: int, block_size: int
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """One pass from front to back in which each of the `N - 1` targets occurs exactly once.

    Yields int64 `(B, block_size)` pairs of non-overlapping windows, then what remains as a last
    pair of shape `(1, r)` with `r < block_size`.
    """
    _check(tokens, batch_size, block_size)
    return _in_order(tokens, batch_size, block_size, _torch())


def _in_order(
    tokens: NDArray[Any], batch_size: int, block_size: int, torch: Any
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    end = _num_windows(tokens, block_size) * block_size
    xs = tokens[:end].reshape(-1, block_size)
    ys = tokens[1 : end + 1].reshape(-1, block_size)
    for start in range(0, len(xs), batch_size):
        rows = slice(start, start + batch_size)
        yield (
            torch.from_numpy(xs[rows].astype(np.int64)),
            torch.from_numpy(ys[rows].astype(np.int64)),
        )
    if end + 1 < len(tokens):
        rest = np.asarray(tokens[end:], dtype=np.int64)[None]  # (1, r + 1)
        yield torch.from_numpy(rest[:, :-1].copy()), torch.from_numpy(rest[:, 1:].copy())


def map_tokens(path: Path) -> NDArray[np.uint16]:
    """The ids of a `.bin`, memory-mapped and read-only. Raises `DataError` naming `path`."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path} is empty, expected ids of 2 bytes")
        if size % ON_DISK.itemsize:
            raise DataError(f"{path} has {size} bytes, ids of 2 bytes need an even number")
        return np.memmap(path, dtype=ON_DISK, mode="r")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


class _Pages:
    """The resident pages of a mapped file: as many as were touched, until they are given back.

    They are the system's to take when memory is short, but count as the process' until then.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._allowed = _resident_file_bytes() + _RESIDENT_BYTES

    @classmethod
    def of(cls, tokens: NDArray[Any]) -> Self | None:
        """Those of `tokens`, if a larger file that is only read lies behind them."""
        if sys.platform != "linux" or getattr(tokens, "mode", None) != "r":
            return None  # without MADV_DONTNEED; or changes of the caller's would be dropped by it
        base: Any = tokens
        while isinstance(base, np.ndarray):
            base = base.base
        return cls(base) if isinstance(base, mmap.mmap) and len(base) > _RESIDENT_BYTES else None

    def give_back(self) -> None:
        if sys.platform == "linux" and _resident_file_bytes() > self._allowed:
            self._mapping.madvise(mmap.MADV_DONTNEED)


def _resident_file_bytes() -> int:
    shared_pages = int(Path("/proc/self/statm").read_bytes().split()[2])  # man 5 proc
    return shared_pages * os.sysconf("SC_PAGE_SIZE")


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
    whole_number("batch_size", batch_size, 1)
    whole_number("block_size", block_size, 1)
    if len(tokens) < block_size + 1:
        raise DataError(
            f"block_size {block_size} needs at least {block_size + 1} tokens, "
            f"there are {len(tokens)}"
        )


def _rng(seed: Sequence[int], *more: int) -> np.random.Generator:
    # as a spawn key, since SeedSequence takes (1,), (1, 0) and (1, 0, 0) for the same entropy
    return np.random.default_rng(np.random.SeedSequence(seed[0], spawn_key=(*seed[1:], *more)))


def _integers(seed: int | Sequence[int]) -> list[int]:
    numbers = [seed] if isinstance(seed, int | np.integer) else seed
    if isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers):
        whole = all(isinstance(number, int | np.integer) for number in numbers)
        if whole and min(numbers) >= 0 and max(numbers[1:], default=0) < 2**32:
            return [int(number) for number in numbers]
    raise DataError(
        "seed must be an integer of at least 0, or several of which those after the first are "
        f"below 2^32; it is {seed!r}"
    )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise DataError(
            "batches of tensors need torch: pip install torch (NumPy arrays: return_tensors='np')"
        ) from error
    return torch


def _usable(torch: Any, device: "str | torch.device") -> Any:
    """The device, which has held a tensor."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"device is {str(device)!r}, which torch cannot use here: {reason}"
        ) from error
    return found
