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

    Uplink: a reply is a delta to the model that the client received. Encoding loses a part of this
    delta. The client keeps this loss and adds a share of it to its next delta (error feedback, see
    `flower_adapter.arrays.codecs.Codec`). The server adds the delta to the model that the client
    received.

    Downlink: encoding loses something, so the model that clients decode differs a little from the
    server's model. The server keeps a copy of this decoded model. The clients train from the copy,
    and the replies are added to the copy. So the next model has only what clients have trained, and
    the loss of the downlink is gone. What a client gets depends on the model that it holds:
    - A client that holds the previous decoded model gets the delta.
    - A client that already holds the new decoded model gets no arrays.
    - Any other client gets the whole new decoded model. Such a client is new, did not take part in
      the last round, or failed to answer the last message, for example because it restarted and
      lost its state.

    Args:
        uplink: codec for the replies, a name from `flower_adapter.arrays.codecs`.
        downlink: codec for the messages, a name from the same list. If both codecs are "fp32",
            arrays are sent unchanged.

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
        """True if arrays travel unchanged in both directions."""
        return self.uplink == self.downlink == EXACT

    def reset(self) -> None:
        """Forget the models and the clients from an earlier run."""
        self._exact = ArrayRecord()  # the server's model
        self._copy = ArrayRecord()  # the decoded model on the clients
        self._version = ""  # version of the copy
        self._previous = ""  # version of the copy before this one
        self._delta = ArrayRecord()  # from the previous copy to this copy
        self._holders: dict[int, str] = {}  # by node id: the version that the client holds
        self._without_mod: set[int] = set()

    def encode(self, arrays: ArrayRecord, node: int) -> tuple[ArrayRecord, ConfigRecord]:
        """Return the arrays to send to a node, and the header that describes them.

        Raises:
            CodecError: the delta from the last model to `arrays` holds NaN, Inf or values that are
                too large for the codec.
        """
        self._follow(arrays)
        # Only a reply shows which version a client holds. The server therefore forgets the client's
        # version here, and `note_answer` stores it again when the client replies.
        version = self._holders.pop(node, None)
        if not self._version:
            start, payload = "", arrays
        elif version == self._version:
            start, payload = version, ArrayRecord()
        elif version and version == self._previous:
            start, payload = version, self._delta
        else:
            start, payload = "", self._copy
        header = CompressionHeader(self.downlink, self.uplink, start, self._version)
        return payload, header.to_record()

    def note_answer(self, node: int, header: object) -> None:
        """Read the header of a reply, and remember which model version the node holds."""
        if isinstance(header, ConfigRecord) and header.get("format") == COMPRESSION_VERSION:
            version = header.get("version", "")
            known = version in (self._version, self._previous)
            self._holders[node] = str(version) if known else ""
        elif not self.is_exact and node not in self._without_mod:
            self._without_mod.add(node)
            logger.warning("node %d sends whole arrays: its ClientApp has no compression_mod", node)

    def decode(self, arrays: ArrayRecord) -> ArrayRecord:
        """Decode the arrays of a reply. Arrays that are not compressed stay as they are.

        Raises:
            CodecError: the arrays cannot be decoded.
        """
        return decode(arrays, self._copy)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"exact": self._exact, "copy": self._copy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned. Each client then gets the whole model once."""
        self.reset()
        self._exact, self._copy = state["exact"], state["copy"]
        self._version = "" if self.downlink == EXACT else uuid4().hex

    def _follow(self, arrays: ArrayRecord) -> None:
        """Store `arrays` as the server's model and update the clients' copy, if `arrays` are new.

        With a lossy downlink codec, encode the delta from the old copy to `arrays`. Decoding this
        delta gives the new copy.
        """
        if same_arrays(arrays, self._exact):
            return
        if self.downlink == EXACT:
            self._exact, self._copy, self._version = arrays, arrays, ""
            return
        encoded = encode(arrays, self._copy, self.downlink)
        self._exact = arrays
        self._previous, self._delta = self._version, encoded.arrays
        self._copy, self._version = encoded.decoded, uuid4().hex
