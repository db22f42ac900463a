"""Arrays to and from the clients of any strategy in fewer bytes."""

from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flower_adapter.compress import VERSION, CodecError, codec
from flower_adapter.messages import error_for
from flower_adapter.strategies.wrapper import Wrapper, logger
from flower_adapter.wire import WIRE, Header, decode, encode, is_encoded

EXACT = "fp32"


class Wired(Wrapper):
    """`strategy`, whose messages carry arrays encoded with `downlink`, and replies with `uplink`.

    The codecs are those of `flower_adapter.compress`; "fp32" both ways changes nothing. Clients
    need `flower_adapter.wire_mod`, and no setting: the server's messages say what to do.

    Replies are deltas against the model that the client received, with error feedback on the
    client, and are added to the server's own model here. Messages are deltas against the model that
    the clients hold: a copy of it follows the server's model, so that what one round's encoding
    loses is in the next one's delta. A client that does not hold that copy, being new, or left out
    of the last round, or restarted, is sent it whole; one that holds it already, because the model
    has not changed since it evaluated it, is sent nothing. Strategies see neither codec nor copy.

    A reply of a client without the mod counts as it is, with a warning.

    A reply that cannot be decoded becomes an error, which strategies pass over.

    Raises:
        CodecError: a codec is unknown; from `configure_train` and `configure_evaluate`, the model
            has moved by NaN or Inf, or the strategy sends a model of its own to each client.
    """

    def __init__(self, strategy: Strategy, *, uplink: str = "bf16", downlink: str = "bf16") -> None:
        super().__init__(strategy)
        self.uplink, self.downlink = codec(uplink).name, codec(downlink).name
        self._exact = ArrayRecord()  # the server's model
        self._held = ArrayRecord()  # the copy that clients hold
        self._version = ""  # of the copy
        self._delta: tuple[str, ArrayRecord] = ("", ArrayRecord())  # the version it starts from
        self._holders: dict[int, str] = {}  # node and the version it holds
        self._without_mod: set[int] = set()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._encoded(super().configure_train(server_round, arrays, config, grid))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, map(self.received, replies))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._encoded(super().configure_evaluate(server_round, arrays, config, grid))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return super().aggregate_evaluate(server_round, map(self.received, replies))

    def received(self, reply: Message) -> Message:
        """`reply` with its arrays in full; a reply that has been through here is left alone."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            self._holders.pop(node, None)
            return super().received(reply)
        answer = reply.content.pop(WIRE, None)
        if isinstance(answer, ConfigRecord) and answer.get("format") == VERSION:
            self._holders[node] = str(answer.get("version", ""))
        for key, arrays in list(reply.content.array_records.items()):
            if any(map(is_encoded, arrays.values())):
                try:
                    reply.content[key] = decode(arrays, self._exact)
                    arrays.clear()
                except CodecError as error:
                    return super().received(_error_reply(reply, error))
            elif answer is None and not self._is_exact() and node not in self._holders:
                self._warn_once(node)
        return super().received(reply)

    def state_dict(self) -> dict[str, Any]:
        return {"exact": self._exact, "held": self._held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._exact, self._held = state["exact"], state["held"]
        # Nobody is known to hold it; of an exact downlink there is nothing to hold.
        self._version = "" if self.downlink == EXACT else uuid4().hex
        self._holders, self._delta = {}, ("", ArrayRecord())

    def summary(self) -> None:
        logger.info("\t├──> Wired: uplink %s, downlink %s", self.uplink, self.downlink)
        super().summary()

    def _is_exact(self) -> bool:
        return self.uplink == self.downlink == EXACT

    def _warn_once(self, node: int) -> None:
        if node not in self._without_mod:
            self._without_mod.add(node)
            logger.warning("node %d sends whole arrays: its ClientApp has no wire mod", node)

    def _encoded(self, messages: Iterable[Message]) -> list[Message]:
        if self._is_exact():
            return list(messages)
        messages = list(messages)
        models = [arrays for m in messages for arrays in m.content.array_records.values()]
        if not all(_same(model, models[0]) for model in models):
            raise CodecError("the messages hold several models; Wired needs one for all clients")
        encoded = [self._encode(message) for message in messages]
        # Only an answer shows that a node holds the model; until then it may have been lost.
        for message in encoded:
            self._holders.pop(message.metadata.dst_node_id, None)
        return encoded

    def _encode(self, message: Message) -> Message:
        records = list(message.content.array_records.items())
        if len(records) != 1:
            raise CodecError(f"a message holds {len(records)} ArrayRecords, should hold one")
        [(key, arrays)] = records
        self._follow(arrays)
        holds = self._holders.get(message.metadata.dst_node_id)
        start, delta = self._delta
        if not self._version:
            base, payload = "", arrays
        elif holds == self._version:
            base, payload = holds, ArrayRecord()
        elif holds and holds == start:
            base, payload = holds, delta
        else:
            base, payload = "", self._held
        header = Header(self.downlink, self.uplink, base, self._version)
        # A new RecordDict: strategies give the same one to all messages.
        message.content = RecordDict({**message.content, key: payload, WIRE: header.to_record()})
        return message

    def _follow(self, arrays: ArrayRecord) -> None:
        """Move the copy that clients hold to `arrays`, unless it is there already."""
        if _same(arrays, self._exact):
            return
        self._exact = arrays
        if self.downlink == EXACT:
            self._held, self._version = arrays, ""
            return
        encoded = encode(arrays, self._held, self.downlink)
        self._delta = (self._version, encoded.arrays)
        self._held, self._version = encoded.received, uuid4().hex


def _error_reply(reply: Message, error: CodecError) -> Message:
    """What Flower makes of a reply that cannot be used, so that every strategy passes over it."""
    return make_message(metadata=reply.metadata, error=error_for(error))


def _same(arrays: ArrayRecord, others: ArrayRecord) -> bool:
    if arrays is others:
        return True
    return list(arrays) == list(others) and all(
        array.data == others[name].data for name, array in arrays.items()
    )
