"""Send the messages of a phase, and return the good replies."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from flower_adapter import protocol
from flower_adapter.arrays.codecs import CodecError
from flower_adapter.arrays.convert import widen_integers
from flower_adapter.arrays.deltas import same_arrays
from flower_adapter.server.compression import Compression
from flower_adapter.server.guard import Guard
from flower_adapter.server.nodes import Nodes
from flower_adapter.server.record import ClientRecord, LeftOut, Metrics, RoundRecord
from flower_adapter.server.replies import KeptReply, ReplyStore, num_bytes, receive

TRAIN, EVALUATE = "train", "evaluate"  # the two phases of a round
NO_REPLY = "no reply in time"

logger = logging.getLogger("flwr")


@dataclass
class GoodReply:
    """A reply that counts, and the record of its client in this phase."""

    kept: KeptReply
    client: ClientRecord


@dataclass
class DecodedReplies:
    """An iterable over kept replies. It decodes each reply when the caller reaches it."""

    exchange: "Exchange"
    replies: list[GoodReply]

    def __iter__(self) -> Iterator[Message]:
        return map(self.exchange.decoded, self.replies)


@dataclass
class Exchange:
    """Compresses messages, checks each reply when it arrives, and judges all replies together."""

    grid: Grid
    nodes: Nodes
    guard: Guard | None
    compression: Compression | None
    weight_key: str
    timeout: float | None

    def run(
        self,
        phase: str,
        messages: list[Message],
        arrays: ArrayRecord,
        record: RoundRecord,
        store: ReplyStore,
    ) -> list[GoodReply]:
        """Send the messages, and return the good replies in the order of the clients' labels.

        Args:
            phase: "train" or "evaluate".
            messages: the strategy's messages, one for each client.
            arrays: the global arrays, which the messages carry.
            record: the round's record. This method adds the bytes sent and received to the record.
                It also adds each client that was left out, with the reason.
            store: keeps the arrays of the replies.
        """
        if self.compression is not None and not self.compression.is_exact:
            with record.timed("encode"):
                messages = self._compressed(self.compression, messages)
        sent = {message.metadata.dst_node_id: _num_bytes(message) for message in messages}
        record.bytes_sent += sum(sent.values())
        started = time.monotonic()
        replies: list[GoodReply] = []
        labels: dict[int, str | None] = {}
        arrived: dict[int, int] = {}  # by node id: size of the arrays in its reply
        faults = dict.fromkeys(sent, NO_REPLY)  # by node id: why the node has no good reply
        for reply in receive(self.grid, messages, self.timeout):
            seconds = time.monotonic() - started
            node = reply.metadata.src_node_id
            arrived[node] = 0
            if not reply.has_error():
                arrived[node] = _num_bytes(reply)
                labels[node] = protocol.label_of(reply)
            record.bytes_received += arrived[node]
            try:
                with record.timed("decode"):
                    norm = self._check(reply, arrays if phase == TRAIN else None)
            except ValueError as error:
                faults[node] = str(error)
                continue
            faults.pop(node, None)
            client = ClientRecord(
                node, None, _metrics(reply), norm, sent.get(node, 0), arrived[node], seconds
            )
            replies.append(GoodReply(store.keep(reply), client))
        self.nodes.learn(labels)
        for node in sorted(faults, key=self.nodes.order):
            sizes = sent[node], arrived.get(node, 0)
            self._leave_out(phase, node, faults[node], record, *sizes)
        good = self._judge(phase, replies, record)
        for counted in good:
            counted.client.label = self.nodes.label(counted.client.node)
        return good

    def decoded(self, reply: GoodReply) -> Message:
        """Return a kept reply as a message with plain arrays. The caller may change it."""
        message = reply.kept.load()
        message.content = self._decode(message.content)
        if self.guard is not None:
            for record in message.content.values():
                if isinstance(record, ArrayRecord):
                    widen_integers(record)
        return message

    def _compressed(self, compression: Compression, messages: list[Message]) -> list[Message]:
        """Compress the arrays of the messages."""
        first: ArrayRecord | None = None
        for message in messages:
            records = {k: r for k, r in message.content.items() if isinstance(r, ArrayRecord)}
            if len(records) != 1:
                raise CodecError(f"a message holds {len(records)} ArrayRecords, should hold one")
            [(key, arrays)] = records.items()
            first = arrays if first is None else first
            if not same_arrays(arrays, first):
                raise CodecError(
                    "the strategy sends different models; compression needs one model for all"
                )
            payload, header = compression.encode(arrays, message.metadata.dst_node_id)
            # Strategies give the same content to all messages, so each message gets a new content.
            message.content = RecordDict(
                {**message.content, key: payload, protocol.COMPRESSION: header}
            )
        return messages

    def _check(self, reply: Message, sent: ArrayRecord | None) -> float:
        """Return the norm of the update in a reply. Raise ValueError if the reply is unusable."""
        if reply.has_error():
            raise ValueError(reply.error.reason or f"error code {reply.error.code}")
        header = reply.content.pop(protocol.COMPRESSION, None)
        if self.compression is not None:
            self.compression.note_answer(reply.metadata.src_node_id, header)
        content = self._decode(reply.content)
        return 0.0 if self.guard is None else self.guard.check(content, self.weight_key, sent)

    def _decode(self, content: RecordDict) -> RecordDict:
        """Return the content of a reply with decoded arrays."""
        if self.compression is None:
            return content
        return RecordDict(
            {
                key: self.compression.decode(record) if isinstance(record, ArrayRecord) else record
                for key, record in content.items()
            }
        )

    def _judge(self, phase: str, replies: list[GoodReply], record: RoundRecord) -> list[GoodReply]:
        """Leave out the outliers, and return the other replies in the order of the labels."""
        ordered = sorted(replies, key=lambda reply: self.nodes.order(reply.client.node))
        if self.guard is None:
            return ordered
        outliers = self.guard.outliers(
            [reply.client.update_norm for reply in ordered],
            [reply.client.metrics[self.weight_key] for reply in ordered],
        )
        for index, reason in outliers.items():
            client = ordered[index].client
            sizes = client.bytes_sent, client.bytes_received
            self._leave_out(phase, client.node, reason, record, *sizes)
        return [reply for index, reply in enumerate(ordered) if index not in outliers]

    def _leave_out(
        self, phase: str, node: int, reason: str, record: RoundRecord, sent: int, received: int
    ) -> None:
        logger.warning(
            "%s round %d: left out node %d: %s",
            phase,
            record.server_round,
            node,
            reason,
        )
        record.left_out.append(LeftOut(phase, node, self.nodes.label(node), reason, sent, received))


def _metrics(reply: Message) -> Metrics:
    records = [record for record in reply.content.values() if isinstance(record, MetricRecord)]
    return {name: value for record in records for name, value in record.items()}


def _num_bytes(message: Message) -> int:
    records = message.content.values()
    return sum(num_bytes(record) for record in records if isinstance(record, ArrayRecord))
