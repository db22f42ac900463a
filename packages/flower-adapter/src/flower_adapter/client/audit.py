"""A client's audit log: what each server asked, what left the client, and what was refused.

The log is a file of JSON lines, to which the client only appends. Each message gives one line:

    time          when the answer was ready, in UTC
    run           Flower's id of the run
    token         a digest of the run's token, the same after a resume, or null
    message       the type of the message, and `round` its round
    settings      the run config of a train or evaluate message
    received      bytes and SHA-256 of the arrays in the message
    sent          bytes of the arrays in the reply, the L2 norm of the update, and characters of
                  the other records, such as a label or a vocabulary
    metrics       the metrics in the reply
    refused       the reason that the server got, or null

Flower 1.41 does not tell a client who has submitted a run, so the log cannot say it.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord

from flower_adapter import protocol
from flower_adapter._flwr import ClientAppCallable
from flower_adapter.arrays import npy
from flower_adapter.client.refusals import refusing_mod
from flower_adapter.client.secret import make_private_directory

_LONGEST_TEXT = 200  # characters of a text that the server has chosen
_MOST_SETTINGS = 100


class AuditLog:
    """Two mods that write the audit log of a client.

    `ClientApp(mods=[audit, policy, DiskState(...), compression_mod, audit.update])`: the first mod
    sees the messages as they travel and writes the log. The last one sees the arrays without
    compression and measures the update.

    Args:
        path: returns the path of the log for a context, or None for a client without a log.
    """

    def __init__(self, path: Callable[[Context], Path | None]) -> None:
        self.path = path
        self._norm: float | None = None

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer the message, then write its line. The line is on the disk before the answer goes.

        Raises:
            OSError: the log cannot be written. The server does not get the answer.
        """
        path = self.path(context)
        if path is None:
            return call_next(message, context)
        line = _asked(message, context)
        self._norm = None
        reply = refusing_mod(message, context, call_next)
        line |= _answered(reply, self._norm)
        _append(path, {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line})
        return reply

    def update(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Measure the norm of the update, before compression."""
        if message.metadata.message_type != MessageType.TRAIN or self.path(context) is None:
            return call_next(message, context)
        received = _arrays(message)
        reply = call_next(message, context)
        self._norm = None if reply.has_error() else _distance(_arrays(reply), received)
        return reply


def _asked(message: Message, context: Context) -> dict[str, Any]:
    config = protocol.config_of(message)
    token = protocol.token_of(config)
    kind = message.metadata.message_type
    is_work = kind in (MessageType.TRAIN, MessageType.EVALUATE)
    return {
        "run": message.metadata.run_id,
        "token": token and protocol.digest(token),
        "message": _short(kind),
        "round": _short(config.get(protocol.SERVER_ROUND)),
        "settings": _settings(context) if is_work else None,
        "received": {"bytes": protocol.array_bytes(message), "sha256": _sha256(message)},
    }


def _settings(context: Context) -> dict[str, Any]:
    """Return the run config, without more than a server has a use for."""
    known = list(context.run_config.items())[:_MOST_SETTINGS]
    return {key[:_LONGEST_TEXT]: _short(value) for key, value in known}


def _answered(reply: Message, norm: float | None) -> dict[str, Any]:
    if reply.has_error():
        return {"sent": None, "metrics": None, "refused": reply.error.reason}
    records = [record for record in reply.content.values() if isinstance(record, MetricRecord)]
    metrics = {name: _short(value) for record in records for name, value in record.items()}
    configs = [record for record in reply.content.values() if isinstance(record, ConfigRecord)]
    sent = {"bytes": protocol.array_bytes(reply), "update-norm": norm, "texts": len(repr(configs))}
    return {"sent": sent, "metrics": metrics, "refused": None}


def _append(path: Path, line: dict[str, Any]) -> None:
    make_private_directory(path.parent)
    text = (json.dumps(line) + "\n").encode()
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=60), path.open("ab", 0) as file:
        path.chmod(0o600)
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(text) != len(text):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)  # half a line would spoil the next one
            raise


def _arrays(message: Message) -> dict[str, Any]:
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    return {name: array for record in records for name, array in record.items()}


def _distance(now: dict[str, Any], before: dict[str, Any]) -> float:
    total = 0.0
    for name, array in now.items():
        values = npy.from_array(array)
        if name in before and values.dtype.kind == "f":
            change = values.astype(np.float64) - npy.from_array(before[name])
            total = math.hypot(total, float(np.linalg.norm(change)))
    return total


def _sha256(message: Message) -> str | None:
    arrays = _arrays(message)
    total = hashlib.sha256()
    for name, array in arrays.items():
        total.update(repr((name, array.dtype, tuple(array.shape), array.stype)).encode())
        total.update(array.data)
    return total.hexdigest() if arrays else None


def _short(value: object) -> object:
    """Return a value that JSON can hold, and no text that is too long."""
    if isinstance(value, ConfigRecord | list | bytes):
        value = repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value[:_LONGEST_TEXT] if isinstance(value, str) else value
