"""Receive replies one by one, and keep them encoded in memory or in a temporary file."""

import copy
import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator
from tempfile import TemporaryFile
from typing import IO, Self

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from flower_adapter._flwr import TransportError

# Seconds between two looks for replies: a fraction of the time since the last reply, within limits.
# A reply waits for at most 2 % of the time that its client took, and long rounds cost few looks.
SHORTEST_WAIT, LONGEST_WAIT, WAIT_FRACTION = 0.05, 1.0, 0.02

logger = logging.getLogger("flwr")


def receive(
    grid: Grid, messages: Iterable[Message], timeout: float | None
) -> Iterator[tuple[int, Message | Exception]]:
    """Send the messages, and yield each reply when it arrives, until `timeout` seconds have passed.

    Each reply comes with the node to which its message was sent. The node that a reply names may be
    another one. Replies are pulled one at a time, so the caller decides how many replies are in
    memory. Flower reads a reply when it is pulled, and a malformed one can raise any exception. It
    then cannot be pulled again, so the exception comes in its place. Only an error of the
    connection to the SuperLink leaves the reply there. Such a reply is pulled again.
    """
    messages = list(messages)
    pending = [message_id for message_id in grid.push_messages(messages) if message_id]
    nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    last_found = time.monotonic()
    while pending:
        # The time is read before the replies are pulled. A slow caller therefore still gets every
        # reply that arrived in time.
        now = time.monotonic()
        is_late = now >= deadline
        for message_id in list(pending):
            node = nodes[message_id]
            replies: list[Message | Exception]
            try:
                replies = list(grid.pull_messages([message_id]))
            except (OSError, TransportError) as error:
                logger.warning("the SuperLink cannot be reached: %s", error)
                continue
            except Exception as error:  # whatever a client has sent
                replies = [error]
            if replies:
                pending.remove(message_id)
                last_found = now
            while replies:
                yield node, replies.pop()  # the list must not keep the reply in memory
        if is_late:
            return
        wait = min(max(SHORTEST_WAIT, WAIT_FRACTION * (now - last_found)), LONGEST_WAIT)
        if pending:
            time.sleep(max(0.0, min(wait, deadline - time.monotonic())))


class KeptReply:
    """A reply whose encoded arrays are in a `ReplyStore`."""

    def __init__(self, message: Message, arrays: "dict[str, _InMemory | _InFile]") -> None:
        self._message = message  # without its arrays
        self._arrays = arrays

    def load(self) -> Message:
        """Return the reply with its arrays. The caller may change it."""
        reply = copy.copy(self._message)
        arrays = {key: kept.load() for key, kept in self._arrays.items()}
        reply.content = RecordDict({**self._message.content, **arrays})
        return reply


class ReplyStore:
    """A context manager that keeps the encoded arrays of replies.

    The first arrays stay in memory until they take `memory` bytes. Further arrays go to a temporary
    file of at most `disk` bytes, which is deleted at the end.
    """

    def __init__(self, memory: int, disk: int) -> None:
        self._free = memory
        self._disk = disk
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, reply: Message) -> KeptReply:
        """Move the arrays of a reply into the store.

        Raises:
            OSError: the temporary file is full or cannot be written. The replies that are already
                in the store stay there.
        """
        records = {k: r for k, r in reply.content.items() if isinstance(r, ArrayRecord)}
        arrays = {key: self._store(record) for key, record in records.items()}
        # The reply gets a new content without arrays, because Flower's typed views can keep the old
        # content in memory.
        rest = {key: record for key, record in reply.content.items() if key not in records}
        reply.content = RecordDict(rest)
        return KeptReply(reply, arrays)

    def _store(self, record: ArrayRecord) -> "_InMemory | _InFile":
        size = num_bytes(record)
        if size <= self._free:
            self._free -= size
            return _InMemory(record)
        if self._file is None:
            # Unbuffered, so that no bytes of a failed write remain in a buffer.
            self._file = TemporaryFile(buffering=0)  # noqa: SIM115, closed in __exit__
        start = self._file.seek(0, os.SEEK_END)
        if start + size > self._disk:
            raise OSError(
                errno.ENOSPC,
                f"the arrays of this reply take {size} bytes, but replies in the temporary file "
                f"may take {self._disk} bytes (reply_disk), and {start} are taken",
            )
        layout = [(n, a.dtype, tuple(a.shape), a.stype, len(a.data)) for n, a in record.items()]
        try:
            for array in record.values():
                _write(self._file, array.data)
        except OSError as error:
            self._file.truncate(start)
            raise OSError(
                error.errno,
                f"{error.strerror}: the temporary file for replies cannot be written; use a larger "
                "reply_memory, or set TMPDIR to a directory with more space",
            ) from error
        record.clear()
        return _InFile(self._file, start, layout)


def _write(file: IO[bytes], content: bytes) -> None:
    """Write all bytes. An unbuffered file may write only a part of them at once."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _read(file: IO[bytes], size: int) -> bytes:
    """Read `size` bytes. An unbuffered file may read only a part of them at once."""
    content = file.read(size)
    while len(content) < size:
        more = file.read(size - len(content))
        if not more:
            raise OSError(f"the temporary file for replies ends {size - len(content)} bytes early")
        content += more
    return content


class _InMemory:
    def __init__(self, record: ArrayRecord) -> None:
        self._record = record

    def load(self) -> ArrayRecord:
        return ArrayRecord(dict(self._record))  # a new record with the same arrays


class _InFile:
    def __init__(
        self, file: IO[bytes], start: int, arrays: list[tuple[str, str, tuple[int, ...], str, int]]
    ) -> None:
        self._file = file
        self._start = start
        self._arrays = arrays  # name, dtype, shape, stype and size in bytes, in the file's order

    def load(self) -> ArrayRecord:
        self._file.seek(self._start)
        return ArrayRecord(
            {
                name: Array(dtype, shape, stype, _read(self._file, size))
                for name, dtype, shape, stype, size in self._arrays
            }
        )


def num_bytes(arrays: ArrayRecord) -> int:
    """Return the number of bytes that the arrays take in a message."""
    return sum(len(array.data) for array in arrays.values())
