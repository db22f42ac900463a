"""Send the messages of a phase, and return the good replies."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from flower_adapter import protocol
from flower_adapter.arrays.codecs import CodecError
from flower_adapter.arrays.convert import widen_integers
from flower_adapter.arrays.deltas import same_arrays
from flower_adapter.printable import shown
from flower_adapter.server.checkpoints import Checkpoint
from flower_adapter.server.compression import Compression
from flower_adapter.server.guard import NO_UPDATE, Guard, Update, scale_update
from flower_adapter.server.nodes import Nodes
from flower_adapter.server.record import (
    LONGEST_LABEL,
    LONGEST_REASON,
    ClientRecord,
    LeftOut,
    Metrics,
    RoundRecord,
)
from flower_adapter.server.replies import KeptReply, ReplyStore, receive

TRAIN, EVALUATE = "train", "evaluate"  # the two phases of a round
NO_REPLY = "no reply in time"

logger = logging.getLogger("flwr")


@dataclass
class GoodReply:
    """A reply that counts, and the record of its client in this phase."""

    kept: KeptReply
    client: ClientRecord
    records: list[str]  # names of the records with arrays and metrics
    update: Update
    sent: ArrayRecord  # the global arrays that the client got


@dataclass
class DecodedReplies:
    """An iterable over kept replies. It decodes each reply when the caller reaches it."""

    exchange: "Exchange"
    replies: list[GoodReply]

    def __iter__(self) -> Iterator[Message]:
        return map(self.exchange.decoded, self.replies)


@dataclass
class Exchange:
    """Compresses messages, checks each reply when it arrives, and judges all replies together.

    With a `saved` state, which a run with checkpoints has, each message carries the token with
    which its client recognizes the run.
    """

    grid: Grid
    nodes: Nodes
    guard: Guard | None
    compression: Compression | None
    weight_key: str
    timeout: float | None
    saved: Checkpoint | None = None
    keepers: set[int] = field(default_factory=set)  # nodes that keep a state on disk

    def run(
        self,
        phase: str,
        messages: list[Message],
        arrays: ArrayRecord,
        record: RoundRecord,
        store: ReplyStore,
        usual: Metrics | None = None,
    ) -> list[GoodReply]:
        """Send the messages, and return the good replies in the order of the clients' labels.

        Args:
            phase: "train" or "evaluate".
            messages: the strategy's messages, one for each client.
            arrays: the global arrays, which the messages carry.
            record: the round's record. This method adds the bytes sent and received to the record.
                It also adds each client that was left out, with the reason.
            store: keeps the arrays of the replies.
            usual: the metrics of a client in the last such phase that did not fail, or None.
        """
        messages = self._addressed(messages)
        if self.compression is not None and not self.compression.is_exact:
            with record.timed("encode"):
                messages = self._compressed(self.compression, messages)
        sent = {message.metadata.dst_node_id: protocol.array_bytes(message) for message in messages}
        record.bytes_sent += sum(sent.values())
        started = time.monotonic()
        replies: list[GoodReply] = []
        labels: dict[int, str | None] = {}
        arrived: dict[int, int] = {}  # by node id: size of the arrays in its reply
        faults = dict.fromkeys(sent, NO_REPLY)  # by node id: why the node has no good reply
        for node, reply in receive(self.grid, messages, self.timeout):
            seconds = time.monotonic() - started
            try:
                if isinstance(reply, Exception):
                    raise reply
                arrived[node] = protocol.array_bytes(reply)
                record.bytes_received += arrived[node]
                with record.timed("decode"):
                    labels[node] = protocol.label_of(reply)
                    update = self._check(node, reply, arrays if phase == TRAIN else None)
                names = _names(reply)
                kept = store.keep(reply)
            except Exception as error:
                faults[node] = self._fault(node, error)
                continue
            faults.pop(node)
            if protocol.keeps_state(reply):
                self.keepers.add(node)
            client = ClientRecord(
                node, None, _metrics(reply), update.norm, sent[node], arrived[node], seconds
            )
            replies.append(GoodReply(kept, client, names, update, arrays))
        self.nodes.learn(labels)
        for node in sorted(faults, key=self.nodes.order):
            sizes = sent[node], arrived.get(node, 0)
            self._leave_out(phase, node, faults[node], record, *sizes)
        for good in replies:
            good.client.label = self.nodes.label(good.client.node)
        return self._judge(phase, replies, record, usual)

    def decoded(self, reply: GoodReply) -> Message:
        """Return a kept reply as a message with plain arrays. The caller may change it."""
        message = reply.kept.load()
        message.content = self._decode(message.content)
        client = reply.client
        for key, record in list(message.content.items()):
            if isinstance(record, ArrayRecord) and self.guard is not None:
                if list(record) != list(reply.sent):  # some strategies go by the order
                    record = ArrayRecord({name: record[name] for name in reply.sent})
                    message.content[key] = record
                if client.scaled != 1:
                    scale_update(record, reply.sent, client.scaled)
                widen_integers(record)
            elif isinstance(record, MetricRecord) and client.reduced_weight is not None:
                changed = {**record, self.weight_key: client.reduced_weight}
                message.content[key] = MetricRecord(changed)
        return message

    def tokens(self) -> dict[int, str]:
        """Return the token of each node that keeps a state on disk."""
        found = {node: self._token(node) for node in sorted(self.keepers)}
        return {node: token for node, token in found.items() if token is not None}

    def _token(self, node: int) -> str | None:
        label = self.nodes.label(node)
        return None if self.saved is None or label is None else self.saved.token(label)

    def _addressed(self, messages: list[Message]) -> list[Message]:
        """Add to each message how many replies the mean needs, and the token for its client.

        Strategies give the same content to all messages, so each message gets a new content with a
        new config. The strategy's own config therefore never holds a token.
        """
        if self.saved is not None:
            self.nodes.ask(message.metadata.dst_node_id for message in messages)
        least = 1 if self.guard is None else self.guard.min_replies
        for message in messages:
            key, config = protocol.config_item(message)
            config = ConfigRecord({**config, protocol.MIN_REPLIES: least})
            token = self._token(message.metadata.dst_node_id)
            if self.saved is not None and token is not None:
                config[protocol.RUN] = token
                if self.saved.attempts:
                    config[protocol.ATTEMPTS] = list(self.saved.attempts)
            message.content = RecordDict({**message.content, key: config})
        return messages

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

    def _check(self, node: int, reply: Message, sent: ArrayRecord | None) -> Update:
        """Return the size of the update in a reply. Raise ValueError if the reply is unusable."""
        if reply.has_error():
            raise ValueError(reply.error.reason or f"error code {reply.error.code}")
        if reply.metadata.src_node_id != node:
            raise ValueError(f"says that it comes from node {reply.metadata.src_node_id}")
        header = reply.content.pop(protocol.COMPRESSION, None)
        if self.guard is not None:
            self.guard.check_declared(reply.content, self.weight_key, sent)
        if self.compression is not None:
            self.compression.note_answer(node, header)
        content = self._decode(reply.content)
        if self.guard is None:
            return NO_UPDATE
        update = self.guard.check(content, self.weight_key, sent)
        if protocol.CLIENT in reply.content:
            reply.content[protocol.CLIENT] = _client_record(reply)
        return update

    def _fault(self, node: int, error: Exception) -> str:
        """Return why a reply cannot be used. An unexpected exception is logged as well."""
        if isinstance(error, ValueError):
            return str(error)
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if self.guard is None:
            raise error
        logger.warning("the reply of node %d cannot be read", node, exc_info=error)
        return f"its reply cannot be read: {type(error).__name__}: {error}"

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

    def _judge(
        self, phase: str, replies: list[GoodReply], record: RoundRecord, usual: Metrics | None
    ) -> list[GoodReply]:
        """Compare the replies, and return those that count in the order of the labels."""
        good = sorted(replies, key=lambda reply: self.nodes.order(reply.client.node))
        if self.guard is None:
            return good
        strangers = self.guard.strangers(
            [reply.client.metrics for reply in good], [reply.records for reply in good], usual
        )
        good = self._without(strangers, phase, good, record)
        outliers = self.guard.outliers([reply.update for reply in good])
        good = self._without(outliers, phase, good, record)
        self._limit(self.guard, phase, [reply.client for reply in good], record)
        return good

    def _without(
        self, reasons: dict[int, str], phase: str, replies: list[GoodReply], record: RoundRecord
    ) -> list[GoodReply]:
        """Leave out the replies with these indices, and return the others."""
        for index, reason in reasons.items():
            client = replies[index].client
            sizes = client.bytes_sent, client.bytes_received
            self._leave_out(phase, client.node, reason, record, *sizes)
        return [reply for index, reply in enumerate(replies) if index not in reasons]

    def _limit(
        self, guard: Guard, phase: str, clients: list[ClientRecord], record: RoundRecord
    ) -> None:
        """Note for each client by how much its update is scaled and its weight is reduced."""
        scales = guard.scales([client.update_norm for client in clients])
        given = [client.metrics[self.weight_key] for client in clients]
        for client, scale, weight, counts in zip(
            clients, scales, given, guard.weights(given), strict=True
        ):
            place = f"{phase} round {record.server_round}: node {client.node}"
            if scale < 1:
                client.scaled = scale
                longest = scale * client.update_norm
                logger.warning(
                    "%s: its update has norm %.4g, scaled down to %.4g, %g times the median",
                    place,
                    client.update_norm,
                    longest,
                    guard.clip_norm_ratio,
                )
            if counts != weight:
                client.reduced_weight = counts
                logger.warning(
                    "%s: its weight %.4g is reduced to %.4g, %g times the median",
                    place,
                    weight,
                    counts,
                    guard.max_weight_ratio,
                )

    def _leave_out(
        self, phase: str, node: int, reason: str, record: RoundRecord, sent: int, received: int
    ) -> None:
        reason = shown(reason, LONGEST_REASON)
        logger.warning(
            "%s round %d: left out node %d: %s",
            phase,
            record.server_round,
            node,
            reason,
        )
        record.num_left_out += 1
        record.left_out.append(LeftOut(phase, node, self.nodes.label(node), reason, sent, received))


def _client_record(reply: Message) -> ConfigRecord:
    """Return the record that names the client, with its known fields in their allowed length."""
    record = ConfigRecord()
    if label := protocol.label_of(reply):
        record[protocol.LABEL] = shown(label, LONGEST_LABEL)
    if protocol.keeps_state(reply):
        record[protocol.KEEPS_STATE] = True
    return record


def _names(reply: Message) -> list[str]:
    """Return the names of the records with arrays and metrics."""
    records = reply.content.items()
    return [name for name, record in records if isinstance(record, ArrayRecord | MetricRecord)]


def _metrics(reply: Message) -> Metrics:
    records = [record for record in reply.content.values() if isinstance(record, MetricRecord)]
    return {name: value for record in records for name, value in record.items()}
