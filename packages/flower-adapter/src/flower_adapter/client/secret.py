"""A client's own secret, from which it derives what nobody else may be able to compute."""

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

from flwr.app import ConfigRecord, Context

from flower_adapter import protocol
from flower_adapter.client.refusals import Refusal
from flower_adapter.packing import sync

SECRET_FILE = "secret"
SECRET_BYTES = 32


def own_secret(context: Context, directory: Path | None) -> bytes:
    """Return the secret of this client, and make it if there is none. It never leaves the client.

    The secret stays in the file `<directory>/secret`, which only its owner can read. Without a
    directory it stays in the client's context, which ends with the run.

    Raises:
        Refusal: the file is damaged.
    """
    if directory is None:
        record = context.state.get(protocol.OWN_SECRET)
        if not isinstance(record, ConfigRecord):
            record = ConfigRecord({"secret": secrets.token_bytes(SECRET_BYTES)})
            context.state[protocol.OWN_SECRET] = record
        return bytes(record["secret"])  # type: ignore[arg-type]
    path = directory / SECRET_FILE
    if not path.exists():
        make_private_directory(directory)
        partial = directory / f".{SECRET_FILE}-{secrets.token_hex(8)}"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
        sync(partial)
        with suppress(FileExistsError):  # another process was first, and its secret counts
            os.link(partial, path)
        partial.unlink()
        sync(directory)
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise Refusal("state", "the secret of this client is damaged") from ValueError(
            f"{path} has {len(secret)} bytes, should have {SECRET_BYTES}"
        )
    return secret


def derive(secret: bytes, *parts: str) -> bytes:
    """Return 32 bytes that nobody can compute without the secret (HMAC-SHA256).

    Each part is preceded by its length, so different parts give different bytes.
    """
    text = b"".join(len(part := item.encode()).to_bytes(8, "big") + part for item in parts)
    return hmac.new(secret, text, hashlib.sha256).digest()


def make_private_directory(directory: Path) -> None:
    """Make a directory that only its owner can enter. Parents that are missing are made too."""
    if not directory.is_dir():
        make_private_directory(directory.parent)
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        sync(directory.parent)
