"""Compress the messages to clients and decode their replies."""

import logging
from typing import Any
from uuid import uuid4

from flwr.app import ArrayRecord, ConfigRecord

from flower_adapter.arrays.codecs import codec
from flower_adapter.arrays.deltas import decode, encode, same_arrays
from flower_adapter.protocol import COMPRESSION_VERSION, CompressionHeader

EXACT = "fp32"

logger = logging.getLogger("flwr")


class Compression:
    """Codecs for the arrays between server and clients. Clients need `compression_mod`.

    A reply is a delta to the model that the client received. The client adds what it lost in
    encoding to its next reply (error feedback). A message is a delta to the model that clients
    hold, of which the server keeps a copy. The next delta starts from that copy, so it includes
    what the last one lost. A client that does not hold the copy gets it whole: a new client, one
    that was left out of the last round, or one that restarted. A client that holds it already gets
    no arrays.

    Args:
        uplink: codec of the replies, one of `flower_adapter.arrays.codecs`. "fp32" is exact.
        downlink: codec of the messages.

    Raises:
        CodecError: a codec is unknown.
    """

    def __init__(self, *, uplink: str = "bf16", downlink: str = "bf16") -> None:
        self.uplink, self.downlink = codec(uplink).name, codec(downlink).name
        self.reset()

    def __repr__(self) -> str:
        return f"Compression(uplink={self.uplink!r}, downlink={self.downlink!r})"

    @property
    def is_exact(self) -> bool:
        """Whether arrays travel unchanged both ways."""
        return self.uplink == self.downlink == EXACT

    def reset(self) -> None:
        """Forget the models and the clients of an earlier run."""
        self._exact = ArrayRecord()  # the server's model
        self._copy = ArrayRecord()  # the model that clients hold
        self._version = ""  # version of the copy
        self._delta: tuple[str, ArrayRecord] = (
            "",
            ArrayRecord(),
        )  # its base version, its arrays
        self._holders: dict[int, str] = {}  # node id and the version that this client holds
        self._without_mod: set[int] = set()

    def encode(self, arrays: ArrayRecord, node: int) -> tuple[ArrayRecord, ConfigRecord]:
        """Return the arrays to send to a node, and the header that describes them.

        Raises:
            CodecError: the model has moved by NaN or Inf.
        """
        self._follow(arrays)
        # Only an answer shows that a client holds the model. Until then it may have lost it.
        version = self._holders.pop(node, None)
        base, delta = self._delta
        if not self._version:
            start, payload = "", arrays
        elif version == self._version:
            start, payload = version, ArrayRecord()
        elif version and version == base:
            start, payload = version, delta
        else:
            start, payload = "", self._copy
        header = CompressionHeader(self.downlink, self.uplink, start, self._version)
        return payload, header.to_record()

    def note_answer(self, node: int, header: object) -> None:
        """Remember which version of the model a node holds, from the header of its reply."""
        if isinstance(header, ConfigRecord) and header.get("format") == COMPRESSION_VERSION:
            self._holders[node] = str(header.get("version", ""))
        elif not self.is_exact and node not in self._without_mod:
            self._without_mod.add(node)
            logger.warning("node %d sends whole arrays: its ClientApp has no compression_mod", node)

    def decode(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the arrays of a reply, decoded. Arrays that are not compressed stay as they are.

        Raises:
            CodecError: the arrays cannot be decoded.
        """
        return decode(arrays, self._exact)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"exact": self._exact, "copy": self._copy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`. No client is known to hold the copy then."""
        self.reset()
        self._exact, self._copy = state["exact"], state["copy"]
        self._version = "" if self.downlink == EXACT else uuid4().hex

    def _follow(self, arrays: ArrayRecord) -> None:
        """Move the copy that clients hold to `arrays`, unless it is there already."""
        if same_arrays(arrays, self._exact):
            return
        self._exact = arrays
        if self.downlink == EXACT:
            self._copy, self._version = arrays, ""
            return
        encoded = encode(arrays, self._copy, self.downlink)
        self._delta = (self._version, encoded.arrays)
        self._copy, self._version = encoded.decoded, uuid4().hex
