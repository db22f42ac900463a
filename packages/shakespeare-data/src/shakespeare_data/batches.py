"""Draw batches `(x, y)` of windows from an array of token ids.

`y` is `x` shifted by one token. The array may be memory-mapped. No other module in this package
uses torch. This module imports torch only if the batches are tensors.
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

ON_DISK = np.dtype("<u2")  # nanoGPT's .bin format: ids without a header

_STATE_VERSION = 2
_RESIDENT_BYTES = 2**28  # when the pages of a mapped file take more, they are released

Pair = tuple[NDArray[np.int64], NDArray[np.int64]]

WINDOWS = ("random", "disjoint")


def sample_windows(
    tokens: NDArray[Any], batch_size: int, block_size: int, rng: np.random.Generator
) -> Pair:
    """Draw `batch_size` random windows from `tokens` `(N,)`, as nanoGPT's `get_batch` does.

    Returns `x` and `y`. Both arrays are int64 `(batch_size, block_size)`. Raises `DataError` if
    `tokens` has fewer than `block_size + 1` ids.
    """
    _check(tokens, batch_size, block_size)
    return _random_pair(sliding_window_view(tokens, block_size + 1), batch_size, rng)


def _random_pair(windows: NDArray[Any], batch_size: int, rng: np.random.Generator) -> Pair:
    return _pair(windows, rng.integers(len(windows), size=batch_size))


def _pair(windows: NDArray[Any], starts: NDArray[np.int64]) -> Pair:
    rows = windows[starts]  # (B, T + 1)
    return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)


class Batches:
    """An iterator over batches of windows. It is endless, or it ends after some epochs.

    Each item is a pair `(x, y)`. Both `x` and `y` are int64 `(batch_size, block_size)`. The caller
    may keep `x` and `y` and change them. The same arguments give the same batches.

    - `source`: an array of token ids `(N,)`, or the path of a `.bin` file with little-endian uint16
      ids. A file is memory-mapped, so the file may be larger than memory.
    - `seed`: an integer, or a sequence such as `(seed, client, round)`. No number may be negative,
      and each number after the first number must be below 2^32. Different seeds give different
      batches. For example, the seeds `1`, `(1, 0)` and `(1, 0, 0)` are different.
    - `epochs`: the number of passes over the non-overlapping windows. Each pass has its own random
      order. The last batch in a pass may have fewer than `batch_size` rows. Up to `block_size - 1`
      tokens at the end of `source` do not fill a window and are left out. If `epochs` is `None`,
      the iterator draws windows without end.
    - `windows`: how windows are drawn without end. `"random"` draws each window independently, as
      nanoGPT does. One pass's worth of such windows misses about a third of the tokens.
      `"disjoint"` makes passes over windows that do not overlap. Each pass begins at another random
      token and has its own random order, so each token is drawn almost equally often.
    - `return_tensors`: `"pt"` gives torch tensors on the CPU. `"np"` gives NumPy arrays, and torch
      is not needed.

    After the last epoch, the iterator gives no more batches. With `state_dict` and
    `load_state_dict`, another process can continue the sequence of batches. On Linux, the pages of
    a mapped file take at most about 256 MiB of memory, plus the pages of one batch.

    Raises `DataError` if an argument is out of range, if `source` has too few ids, if a file cannot
    be read as ids, or if torch is needed but not installed.
    """

    def __init__(
        self,
        source: NDArray[Any] | str | Path,
        batch_size: int,
        block_size: int,
        *,
        seed: int | Sequence[int],
        epochs: int | None = None,
        windows: Literal["random", "disjoint"] = "random",
        return_tensors: Literal["pt", "np"] = "pt",
    ) -> None:
        tokens = map_tokens(Path(source)) if isinstance(source, str | Path) else source
        _check(tokens, batch_size, block_size)
        if epochs is not None:
            epochs = whole_number("epochs", epochs, 1)
        if windows not in WINDOWS:
            raise DataError(f"windows must be one of {', '.join(WINDOWS)}, it is {windows!r}")
        if return_tensors not in ("pt", "np"):
            raise DataError(f"return_tensors must be 'pt' or 'np', it is {return_tensors!r}")
        self._tokens = tokens
        self._batch_size = int(batch_size)
        self._block_size = int(block_size)
        self._seed = _integers(seed)
        self._rng = _rng(self._seed)
        self._epochs = epochs
        self._kind = windows
        self._torch = _torch() if return_tensors == "pt" else None
        self._drawn = 0  # the number of batches drawn so far
        self._order: tuple[int, NDArray[np.int64]] | None = None  # a pass, starts of its windows
        self._windows = sliding_window_view(tokens, block_size + 1)  # (N - T, T + 1)
        self._pages = _ResidentPages.of(tokens)

    def __iter__(self) -> Self:
        return self

    def __len__(self) -> int:
        """Return the number of batches in all epochs together.

        Raises `TypeError` if the batches are endless.
        """
        if self._epochs is None:
            raise TypeError("endless batches have no length; give epochs to get a length")
        return self._epochs * self._batches_per_epoch

    def __next__(self) -> Any:
        if self._epochs is not None and self._drawn >= len(self):
            raise StopIteration
        if self._pages is not None:
            self._pages.release_if_many()
        if self._epochs is not None:
            x, y = self._epoch_pair(*divmod(self._drawn, self._batches_per_epoch))
        elif self._kind == "disjoint":
            x, y = self._disjoint_pair()
        else:
            x, y = _random_pair(self._windows, self._batch_size, self._rng)
        self._drawn += 1
        if self._torch is None:
            return x, y
        return self._torch.from_numpy(x), self._torch.from_numpy(y)

    def state_dict(self) -> dict[str, Any]:
        """Return the current position in the sequence of batches.

        The method `load_state_dict` accepts the result. The result can be saved as JSON.
        """
        return {
            "version": _STATE_VERSION,
            "num_tokens": len(self._tokens),
            "batch_size": self._batch_size,
            "block_size": self._block_size,
            "seed": self._seed,
            "epochs": self._epochs,
            "windows": self._kind,
            "drawn": self._drawn,
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that `state_dict` returned.

        Raises `DataError` if `state` differs from this object in the number of tokens, the batch
        size, the block size, the seed, the number of epochs or the kind of windows, or if `state`
        is damaged. The message names the problem. After an error, this object is unchanged.
        """
        expected = self.state_dict()
        if not isinstance(state, dict):
            raise DataError(f"the state of batches must be a dict, it is {type(state).__name__}")
        if different := expected.keys() ^ state.keys():
            raise DataError(
                f"the state of batches must have the keys {', '.join(sorted(expected))} only; "
                f"missing or unknown: {', '.join(sorted(map(str, different)))}"
            )
        for key in expected.keys() - {"drawn", "rng"}:
            if state[key] != expected[key]:
                raise DataError(
                    f"the state of batches has {key} {state[key]!r}, "
                    f"but these batches have {key} {expected[key]!r}"
                )
        drawn, end = state["drawn"], None if self._epochs is None else len(self)
        if not isinstance(drawn, int) or drawn < 0 or (end is not None and drawn > end):
            upper = "" if end is None else f" and at most {end}"
            raise DataError(
                f"drawn in the state of batches must be at least 0{upper}, it is {drawn!r}"
            )
        rng = _rng(self._seed)
        try:
            rng.bit_generator.state = state["rng"]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise DataError(
                f"rng in the state of batches is not the state of a PCG64: {error}"
            ) from error
        self._rng, self._drawn = rng, drawn

    @property
    def _batches_per_epoch(self) -> int:
        return -(-_num_windows(self._tokens, self._block_size) // self._batch_size)

    def _epoch_pair(self, epoch: int, batch: int) -> Pair:
        if self._order is None or self._order[0] != epoch:
            num_windows = _num_windows(self._tokens, self._block_size)
            order = _rng(self._seed, epoch).permutation(num_windows)
            self._order = epoch, order * self._block_size
        chosen = self._order[1][batch * self._batch_size : (batch + 1) * self._batch_size]
        return _pair(self._windows, chosen)

    def _disjoint_pair(self) -> Pair:
        """Return the next batch of endless passes. A batch may have windows of several passes."""
        # One window fewer than the text has, so that a pass can begin at any token of a window.
        per_pass = max(1, _num_windows(self._tokens, self._block_size) - 1)
        spare = len(self._tokens) - 1 - per_pass * self._block_size
        chosen: list[NDArray[np.int64]] = []
        first = self._drawn * self._batch_size
        left = self._batch_size
        while left:
            number, at = divmod(first, per_pass)
            if self._order is None or self._order[0] != number:
                rng = _rng(self._seed, number)
                offset = rng.integers(spare + 1)
                self._order = number, offset + rng.permutation(per_pass) * self._block_size
            chosen.append(self._order[1][at : at + left])
            first, left = first + len(chosen[-1]), left - len(chosen[-1])
        return _pair(self._windows, np.concatenate(chosen))


def sequential_batches(
    tokens: NDArray[Any], batch_size: int, block_size: int
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """Return an iterator that passes once over `tokens` `(N,)` in order.

    Each of the `N - 1` targets occurs once. The iterator yields pairs of int64 tensors `(B,
    block_size)`, and `B` is at most `batch_size`. The windows do not overlap. If `r` targets remain
    at the end, they form one more pair `(1, r)`. Raises `DataError` if a size is out of range, if
    `tokens` has too few ids, or if torch is not installed.
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
    """Map the token ids in a `.bin` file into memory, and return a read-only array.

    Raises `DataError` if the file cannot be read, is empty, or has an odd number of bytes.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path} is empty, expected ids of 2 bytes")
        if size % ON_DISK.itemsize:
            raise DataError(f"{path} has {size} bytes, ids of 2 bytes need an even number")
        return np.memmap(path, dtype=ON_DISK, mode="r")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


class _ResidentPages:
    """A memory limit for the pages of a mapped file.

    A page that was read stays in memory until the system takes it back. Until then, the page counts
    as memory of this process. Without a limit, random reads from a large file would increase the
    memory of the process up to the size of the file. So `release_if_many` gives all pages back to
    the system if they take more than about 256 MiB.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._allowed = _resident_file_bytes() + _RESIDENT_BYTES

    @classmethod
    def of(cls, tokens: NDArray[Any]) -> Self | None:
        """Return a memory limit for the mapped file that contains `tokens`.

        Returns `None` if the system is not Linux, if `tokens` is not from a file that is mapped
        read-only, or if the file has at most 256 MiB.
        """
        if sys.platform != "linux" or getattr(tokens, "mode", None) != "r":
            # Only Linux has /proc/self/statm, and only its MADV_DONTNEED releases pages at once. In
            # mode "c" (copy-on-write), released pages would lose the changes of the caller.
            return None
        base: Any = tokens
        while isinstance(base, np.ndarray):
            base = base.base
        return cls(base) if isinstance(base, mmap.mmap) and len(base) > _RESIDENT_BYTES else None

    def release_if_many(self) -> None:
        """Give all pages of the file back to the system if they take more than about 256 MiB."""
        if sys.platform == "linux" and _resident_file_bytes() > self._allowed:
            self._mapping.madvise(mmap.MADV_DONTNEED)


def _resident_file_bytes() -> int:
    shared_pages = int(Path("/proc/self/statm").read_bytes().split()[2])  # see proc(5)
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
    # All numbers after the first number are used as a spawn key. If they were used as entropy, the
    # seeds (1,), (1, 0) and (1, 0, 0) would all give the same random numbers.
    return np.random.default_rng(np.random.SeedSequence(seed[0], spawn_key=(*seed[1:], *more)))


def _integers(seed: int | Sequence[int]) -> list[int]:
    numbers = [seed] if isinstance(seed, int | np.integer) else seed
    if isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers):
        whole = all(isinstance(number, int | np.integer) for number in numbers)
        if whole and min(numbers) >= 0 and max(numbers[1:], default=0) < 2**32:
            return [int(number) for number in numbers]
    raise DataError(
        "seed must be an integer of at least 0, or a sequence of such integers in which those "
        f"after the first are below 2^32; it is {seed!r}"
    )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise DataError(
            "batches of tensors need torch: pip install torch (`Batches` also gives NumPy arrays, "
            "with return_tensors='np')"
        ) from error
    return torch
