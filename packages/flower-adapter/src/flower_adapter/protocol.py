"""This module defines the keys and format versions in messages, replies and client contexts.

Other modules use these constants and never write the strings themselves. A message from the server
carries Flower's config record with some of the keys below. With compression it also carries the
record `COMPRESSION`. A reply from a client carries the record `CLIENT`. If the message carried
`COMPRESSION` and the client uses `compression_mod`, the reply carries `COMPRESSION` too.
"""

import hashlib
import re
from typing import Any, NamedTuple, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType

# Keys that Flower's strategies use.
SERVER_ROUND = "server-round"
NUM_EXAMPLES = "num-examples"

# Key of the config record, set in every message of a phase.
MIN_REPLIES = "flower-adapter.min-replies"  # fewest replies from which the server takes a mean

# Keys of the config record, set by a server that writes checkpoints.
# The first one is the token of the run for this client: 64 hex digits, the same after each resume.
# The server derives it from a secret in its checkpoints and from the client's label. No other
# client and no other server knows it.
RUN = "flower-adapter.run"
ATTEMPTS = "flower-adapter.attempts"  # "4:1f0c…" for each resume: round before it, attempt id

# The record in a reply that names the client.
CLIENT = "client"
LABEL = "label"
KEEPS_STATE = "keeps-state"  # True if the client keeps a state on disk for a resume
LABEL_ACTION = "label"
LABEL_QUERY = f"{MessageType.QUERY}.{LABEL_ACTION}"

# The query that a server sends after the last round to each client that keeps a state on disk.
END_ACTION = "end_of_run"
END_QUERY = f"{MessageType.QUERY}.{END_ACTION}"

# The record that describes compressed arrays. A client's context also uses this name, as the
# prefix of two states: the model and the error feedback.
COMPRESSION = "flower-adapter.compression"
COMPRESSION_VERSION = 2
_COMPRESSED = "flower-adapter/"  # how the `stype` of a compressed array begins

REPLY_RECORDS = frozenset({CLIENT, COMPRESSION})  # the config records that a reply may hold

# In a client's context: the name of the state with the trained arrays and the buffers that the
# client does not share.
PERSONAL = "flower-adapter.personal"

# The record in a client's context that holds the client's own secret.
OWN_SECRET = "flower-adapter.own-secret"

# The record in a client's context that names the file on disk with the same state.
DISK_STATE = "flower-adapter.disk-state"

_TOKEN = re.compile("[0-9a-f]{64}")


class CompressionHeader(NamedTuple):
    """Describes how the arrays of a message and of the reply to it are compressed."""

    downlink: str  # codec of the arrays in the message
    uplink: str  # codec for the arrays in the reply
    base: str  # version of the model to which the arrays are deltas; "" if the arrays are whole
    version: str  # version of the model after decoding; "" if the client need not keep it

    @classmethod
    def from_record(cls, record: Any) -> "CompressionHeader":
        """Read a header from its record.

        Raises:
            ValueError: the format version is not supported, or a field is not a str.
        """
        version = record.get("format") if isinstance(record, ConfigRecord) else None
        if version != COMPRESSION_VERSION:
            raise ValueError(
                f"the message uses compression format {version!r}, this side knows "
                f"{COMPRESSION_VERSION}: install the same flower-adapter on both sides"
            )
        values = [record.get(field, "") for field in cls._fields]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(
                f"the compression record is {dict(record)}, should hold texts for {cls._fields}"
            )
        return cls(*cast(list[str], values))

    def to_record(self) -> ConfigRecord:
        """Return the record for a message, without the empty fields.

        These fields are left out because Flower's `count_bytes` raises ValueError for an empty
        string.
        """
        fields = {name: value for name, value in self._asdict().items() if value}
        return ConfigRecord({"format": COMPRESSION_VERSION, **fields})


def compressed_stype(codec: str) -> str:
    """Return the `stype` of an array that was compressed with `codec`."""
    return f"{_COMPRESSED}{codec}/{COMPRESSION_VERSION}"


def is_compressed(stype: str) -> bool:
    """Tell whether an array with this `stype` is compressed."""
    return stype.startswith(_COMPRESSED)


def codec_of(stype: str) -> str:
    """Return the codec that is named in the `stype` of a compressed array.

    Raises:
        ValueError: the format version is not supported.
    """
    name, _, version = stype.removeprefix(_COMPRESSED).partition("/")
    if version != str(COMPRESSION_VERSION):
        raise ValueError(
            f"is {name} of compression format {version or 'none'}, this side knows "
            f"{COMPRESSION_VERSION}"
        )
    return name


def default_label(context: Context) -> str:
    """Return "partition 0007" for partition-id 7, or "node 123" if there is no partition-id."""
    partition = context.node_config.get("partition-id")
    if partition is None:
        return f"node {context.node_id}"
    return f"partition {int(partition):04d}"


def label_record(label: str) -> ConfigRecord:
    """Return the record in which a reply carries its client's label."""
    return ConfigRecord({LABEL: label})


def token_of(config: ConfigRecord) -> str | None:
    """Return the token that proves to a client that a message comes from the server of its run."""
    token = config.get(RUN)
    return token if isinstance(token, str) and _TOKEN.fullmatch(token) else None


def digest(token: str) -> str:
    """Return a name for a run that does not tell its token."""
    return hashlib.sha256(token.encode()).hexdigest()[:32]


def label_of(reply: Message) -> str | None:
    """Return the label in a reply, or None if the reply has no label."""
    if reply.has_error():
        return None
    record = reply.content.config_records.get(CLIENT)
    label = None if record is None else record.get(LABEL)
    return label if isinstance(label, str) else None


def keeps_state(reply: Message) -> bool:
    """Tell whether a reply says that its client keeps a state on disk."""
    record = reply.content.config_records.get(CLIENT)
    return record is not None and record.get(KEEPS_STATE) is True


def array_bytes(message: Message) -> int:
    """Return the number of bytes of all arrays in a message. An error holds none."""
    if message.has_error():
        return 0
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    return sum(len(array.data) for record in records for array in record.values())


def config_of(message: Message) -> ConfigRecord:
    """Return the server's config from a message, or an empty record if there is none."""
    return config_item(message)[1]


def config_item(message: Message) -> tuple[str, ConfigRecord]:
    """Return the key and the record of the server's config in a message.

    If there is none, return the key "config", which Flower's strategies use, and an empty record.
    """
    records = message.content.config_records
    configs = [(key, record) for key, record in records.items() if key != COMPRESSION]
    return configs[0] if configs else ("config", ConfigRecord())
