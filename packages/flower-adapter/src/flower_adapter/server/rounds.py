"""The loop over rounds. It reads from top to bottom as a round happens."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flower_adapter import protocol
from flower_adapter.arrays.codecs import CodecError
from flower_adapter.arrays.convert import narrow_like, widen_integers
from flower_adapter.arrays.deltas import same_arrays
from flower_adapter.server.checkpoints import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    new_checkpoint,
    random_states,
    set_random_states,
)
from flower_adapter.server.compression import Compression
from flower_adapter.server.guard import Guard, not_finite
from flower_adapter.server.nodes import Nodes
from flower_adapter.server.outer import OuterOptimizer
from flower_adapter.server.record import (
    ClientRecord,
    LeftOut,
    Metrics,
    RoundFailed,
    RoundRecord,
)
from flower_adapter.server.replies import KeptReply, ReplyStore, num_bytes, receive
from flower_adapter.server.strategy_state import load_strategy_state, strategy_state, weight_key
from flower_adapter.server.streaming import StreamingFedAvg

TRAIN, EVALUATE = "train", "evaluate"  # the two phases of a round
NO_REPLY = "no reply in time"
DEFAULT_GUARD = Guard()

# Flower's own logger, so that these lines appear among the strategy's.
logger = logging.getLogger("flwr")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Configure = Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]


def run_rounds(
    grid: Grid,
    strategy: Strategy,
    arrays: ArrayRecord,
    *,
    num_rounds: int = 3,
    timeout: float | None = 3600.0,
    seed: int | None = None,
    guard: Guard | None = DEFAULT_GUARD,
    compression: Compression | None = None,
    outer: OuterOptimizer | None = None,
    checkpoints: Checkpoints | None = None,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    evaluate_fn: EvaluateFn | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
    reply_memory: int = 2**30,
) -> Result:
    """Run the rounds of a federation with any Flower strategy, and return Flower's `Result`.

    A round takes these steps. The strategy chooses clients. The messages are sent, and each reply
    is checked when it arrives and kept encoded. When all replies are there, or the timeout has
    passed, they are judged together. The strategy aggregates the good ones in the order of their
    labels, and the outer optimizer takes its step. The clients evaluate the new arrays, then the
    server does. The checkpoint is written, and `on_round` is called.

    With too few good replies the phase has failed: the strategy sees no reply, and the global
    arrays stay as they were. So they do if the aggregate holds NaN or Inf.

    Args:
        grid: Flower's grid.
        strategy: any strategy of Flower or a subclass. Checkpoints need to know its state, see
            `flower_adapter.server.strategy_state`.
        arrays: the initial global arrays. In a resumed run they only say how the model must look.
        num_rounds: number of rounds, including those before a resume.
        timeout: seconds to wait for the replies of a phase. None waits as long as it takes.
        seed: decides which clients are sampled, together with their labels. With one seed and the
            same connected clients, every run samples the same ones. None leaves it to chance.
        guard: decides which replies count. With a guard, integer and bool arrays reach the strategy
            as float64, because some strategies of Flower cannot take them, and the aggregate gets
            the dtypes of the global arrays. None hands every reply without an error to the strategy
            as it is. Strategies for XGBoost need this.
        compression: codecs for the arrays. None sends them as they are.
        outer: the outer optimizer. None takes the strategy's aggregate as it is.
        checkpoints: where and how to write checkpoints, and whether to resume. None writes none.
        train_config: values for the config of train messages.
        evaluate_config: values for the config of evaluate messages.
        evaluate_fn: evaluates the global arrays on the server, before the first round and after
            each round.
        on_round: is called with the record of each round after its checkpoint is written, first for
            round 0. A resumed run first calls it for each round before the resume. The records of
            these rounds have no `arrays`, except the last one.
        reply_memory: bytes for the replies of a phase. Further replies are kept in a temporary file
            until they are aggregated.

    Raises:
        CheckpointError: the checkpoints do not allow this run, see `Checkpoints`.
        CodecError: the global arrays moved by NaN or Inf, or the strategy sends a model of its own
            to each client, which compression cannot follow.
        RoundFailed: `guard.max_failed_rounds` rounds in a row, or all rounds, have failed.
        TypeError: `strategy` is no strategy, or checkpoints cannot save its state.
    """
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy is {strategy!r}, should be a strategy of Flower")
    for part in (compression, outer):
        if part is not None:
            part.reset()
    federation = _Federation(
        grid=grid,
        strategy=strategy,
        nodes=Nodes(grid, seed),
        guard=guard,
        compression=compression,
        outer=outer,
        num_rounds=num_rounds,
        timeout=timeout,
        reply_memory=reply_memory,
    )
    train_config = ConfigRecord() if train_config is None else train_config
    evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config

    def finish(state: Checkpoint, record: RoundRecord) -> None:
        state.server_round = record.server_round
        state.records.append(record)
        if checkpoints is not None:
            with _timed(record, "checkpoint"):
                state.states = federation.states()
                state.random_states = random_states()
                checkpoints.write(state)
        if on_round is not None:
            on_round(replace(record, arrays=state.arrays))

    with checkpoints.locked() if checkpoints is not None else nullcontext():
        state = checkpoints.find(arrays) if checkpoints is not None else None
        _log_start(federation, state, checkpoints)
        if state is None:
            state = new_checkpoint(str(grid.run.run_id) if checkpoints is not None else "", arrays)
            record = RoundRecord(0)
            _evaluate_on_server(state, record, evaluate_fn)
            finish(state, record)
        else:
            federation.load_states(state)
            _replay(state, on_round)
        if checkpoints is not None:
            for config in (train_config, evaluate_config):
                config[protocol.RUN] = state.run
                if state.attempts:
                    config[protocol.ATTEMPTS] = list(state.attempts)

        for server_round in range(state.server_round + 1, num_rounds + 1):
            logger.info("")
            logger.info("[ROUND %s/%s]", server_round, num_rounds)
            record = RoundRecord(server_round)
            federation.train(state, record, train_config)
            federation.evaluate(state, record, evaluate_config)
            _evaluate_on_server(state, record, evaluate_fn)
            finish(state, record)
    return _result(state)


@dataclass
class _Federation:
    """The parts of a run, and the two phases that call them."""

    grid: Grid
    strategy: Strategy
    nodes: Nodes
    guard: Guard | None
    compression: Compression | None
    outer: OuterOptimizer | None
    num_rounds: int
    timeout: float | None
    reply_memory: int

    def train(self, state: Checkpoint, record: RoundRecord, config: ConfigRecord) -> None:
        """Let clients train, and move the global arrays to the aggregate."""
        with ReplyStore(self.reply_memory) as store:
            configure = self.strategy.configure_train
            replies = self._collect(TRAIN, configure, state, record, config, store)
            if replies is None:
                return
            with _timed(record, "aggregate"):
                arrays, metrics = self.strategy.aggregate_train(
                    record.server_round, self._in_memory(replies)
                )
                if arrays is not None and self.guard is not None:
                    arrays = narrow_like(arrays, state.arrays)
                    if fault := not_finite(arrays):
                        self._fail(TRAIN, f"the aggregate is unusable: {fault}", state, record)
                        return
                if arrays is not None and self.outer is not None:
                    arrays = self.outer.step(state.arrays, arrays)
        record.train_metrics = _noted(metrics)
        state.failed_rounds[TRAIN] = 0
        if arrays is not None:
            state.arrays = arrays

    def evaluate(self, state: Checkpoint, record: RoundRecord, config: ConfigRecord) -> None:
        """Let clients evaluate the global arrays."""
        with ReplyStore(self.reply_memory) as store:
            configure = self.strategy.configure_evaluate
            replies = self._collect(EVALUATE, configure, state, record, config, store)
            if replies is None:
                return
            metrics = self.strategy.aggregate_evaluate(
                record.server_round, self._in_memory(replies)
            )
            record.evaluate_metrics = _noted(metrics)
        state.failed_rounds[EVALUATE] = 0

    def states(self) -> dict[str, object]:
        """Return the states of the parts, for a checkpoint."""
        states: dict[str, object] = {"strategy": strategy_state(self.strategy)}
        for name, part in (("compression", self.compression), ("outer", self.outer)):
            if part is not None:
                states[name] = part.state_dict()
        return states

    def load_states(self, checkpoint: Checkpoint) -> None:
        """Load the states of a checkpoint."""
        states = checkpoint.states
        try:
            load_strategy_state(self.strategy, states["strategy"])
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        for name, part in (("compression", self.compression), ("outer", self.outer)):
            if (part is not None) != (name in states):
                now, then = ("with", "without") if part is not None else ("without", "with")
                raise CheckpointError(f"the run was {then} {name}, this is {now}")
            if part is not None:
                part.load_state_dict(states[name])
        set_random_states(checkpoint.random_states)

    def _collect(
        self,
        phase: str,
        configure: Configure,
        state: Checkpoint,
        record: RoundRecord,
        config: ConfigRecord,
        store: ReplyStore,
    ) -> "list[_Reply] | None":
        """Send the messages of a phase, and return its good replies in the order of their labels.

        Returns None if the phase has failed.
        """
        at = record.server_round
        with _timed(record, phase):
            messages = self.nodes.choose(
                lambda grid: configure(at, state.arrays, config, grid), f"{at}-{phase}"
            )
            messages = self._compressed(messages)
            sent = {m.metadata.dst_node_id: _num_bytes(m) for m in messages}
            record.bytes_sent += sum(sent.values())
            started = time.monotonic()
            good: list[_Reply] = []
            labels: dict[int, str | None] = {}
            faults = dict.fromkeys(sent, NO_REPLY)  # of each node without a good reply
            for reply in receive(self.grid, messages, self.timeout):
                seconds = time.monotonic() - started
                node = reply.metadata.src_node_id
                received = 0
                if not reply.has_error():
                    received = _num_bytes(reply)
                    labels[node] = protocol.label_of(reply)
                record.bytes_received += received
                try:
                    norm = self._check(reply, phase, state.arrays)
                except ValueError as error:
                    faults[node] = str(error)
                    continue
                faults.pop(node, None)
                kept = store.keep(reply)
                client = ClientRecord(
                    node, None, _metrics(reply), norm, sent.get(node, 0), received, seconds
                )
                good.append(_Reply(kept, client))
            self.nodes.learn(labels)
        for node in sorted(faults, key=self.nodes.order):
            self._leave_out(phase, node, faults[node], record)
        good = self._judged(phase, good, record)
        shortage = self.guard.shortage(len(good), len(messages)) if self.guard is not None else None
        if shortage is not None:
            self._fail(phase, shortage, state, record)
            return None
        clients = record.train_clients if phase == TRAIN else record.evaluate_clients
        for item in good:
            item.client.label = self.nodes.label(item.client.node)
            clients.append(item.client)
        return good

    def _compressed(self, messages: list[Message]) -> list[Message]:
        """Compress the arrays of messages."""
        if self.compression is None or self.compression.is_exact:
            return messages
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
            payload, header = self.compression.encode(arrays, message.metadata.dst_node_id)
            # A new content, because strategies give the same one to all messages.
            message.content = RecordDict(
                {**message.content, key: payload, protocol.COMPRESSION: header}
            )
        return messages

    def _check(self, reply: Message, phase: str, sent: ArrayRecord) -> float:
        """Check one reply, and return the norm of its update; ValueError says why it is bad."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise ValueError(reply.error.reason or f"error code {reply.error.code}")
        header = reply.content.pop(protocol.COMPRESSION, None)
        if self.compression is not None:
            self.compression.note_answer(node, header)
        content = self._decoded(reply.content)
        if self.guard is None:
            return 0.0
        return self.guard.check(
            content, weight_key(self.strategy), sent if phase == TRAIN else None
        )

    def _decoded(self, content: RecordDict) -> RecordDict:
        """Return a reply's content with its arrays decoded."""
        if self.compression is None:
            return content
        return RecordDict(
            {
                key: self.compression.decode(r) if isinstance(r, ArrayRecord) else r
                for key, r in content.items()
            }
        )

    def _judged(self, phase: str, replies: "list[_Reply]", record: RoundRecord) -> "list[_Reply]":
        """Return the replies that count, in the order of their labels."""
        ordered = sorted(replies, key=lambda reply: self.nodes.order(reply.client.node))
        if self.guard is None or phase == EVALUATE:
            return ordered
        outliers = self.guard.outliers([reply.client.update_norm for reply in ordered])
        for index, reason in outliers.items():
            self._leave_out(phase, ordered[index].client.node, reason, record)
        return [reply for index, reply in enumerate(ordered) if index not in outliers]

    def _in_memory(self, replies: "Sequence[_Reply]") -> Iterable[Message]:
        """Return the replies as the strategy takes them, decoded again.

        `StreamingFedAvg` takes an iterator, with one reply in memory. Other strategies may go
        through the replies twice or change them, so they get a list.
        """
        decoded = (self._message(reply.kept) for reply in replies)
        return decoded if isinstance(self.strategy, StreamingFedAvg) else list(decoded)

    def _message(self, kept: KeptReply) -> Message:
        message = kept.load()
        message.content = self._decoded(message.content)
        if self.guard is not None:
            for record in message.content.values():
                if isinstance(record, ArrayRecord):
                    widen_integers(record)
        return message

    def _leave_out(self, phase: str, node: int, reason: str, record: RoundRecord) -> None:
        logger.warning(
            "%s round %d: left out node %d: %s", phase, record.server_round, node, reason
        )
        record.left_out.append(LeftOut(phase, node, self.nodes.label(node), reason))

    def _fail(self, phase: str, reason: str, state: Checkpoint, record: RoundRecord) -> None:
        """Count a failed phase. Raise if there were too many in a row."""
        assert self.guard is not None
        record.failures.append(f"{phase}: {reason}")
        in_a_row = state.failed_rounds.get(phase, 0) + 1
        state.failed_rounds[phase] = in_a_row
        left_out = [client for client in record.left_out if client.phase == phase]
        failure = RoundFailed(phase, record.server_round, reason, left_out)
        if in_a_row >= min(self.guard.max_failed_rounds, self.num_rounds):
            raise failure
        logger.warning(
            "%s; the global arrays stay as they were (%d of at most %d failed rounds in a row)",
            failure,
            in_a_row,
            self.guard.max_failed_rounds - 1,
        )


@dataclass
class _Reply:
    kept: KeptReply
    client: ClientRecord


@contextmanager
def _timed(record: RoundRecord, part: str) -> Iterator[None]:
    """Add the seconds of a part of the round to the record."""
    started = time.monotonic()
    try:
        yield
    finally:
        record.seconds[part] = record.seconds.get(part, 0.0) + time.monotonic() - started


def _evaluate_on_server(
    state: Checkpoint, record: RoundRecord, evaluate_fn: EvaluateFn | None
) -> None:
    if evaluate_fn is not None:
        with _timed(record, "server-evaluate"):
            record.server_metrics = _noted(evaluate_fn(record.server_round, state.arrays))


def _noted(metrics: MetricRecord | None) -> Metrics | None:
    if metrics is None:
        return None
    logger.info("\t└──> MetricRecord: %s", metrics)
    return dict(metrics)


def _metrics(reply: Message) -> Metrics:
    records = [record for record in reply.content.values() if isinstance(record, MetricRecord)]
    return {name: value for record in records for name, value in record.items()}


def _num_bytes(message: Message) -> int:
    records = message.content.values()
    return sum(num_bytes(record) for record in records if isinstance(record, ArrayRecord))


def _replay(state: Checkpoint, on_round: Callable[[RoundRecord], None] | None) -> None:
    """Call `on_round` for the rounds before a resume."""
    if on_round is not None:
        for record in state.records:
            is_last = record.server_round == state.server_round
            on_round(replace(record, arrays=state.arrays if is_last else None))


def _log_start(
    federation: _Federation, state: Checkpoint | None, checkpoints: Checkpoints | None
) -> None:
    logger.info(
        "Starting %s for %d rounds", type(federation.strategy).__name__, federation.num_rounds
    )
    for part in (federation.guard, federation.compression, federation.outer, checkpoints):
        if part is not None:
            logger.info("\t├──> %r", part)
    federation.strategy.summary()
    if state is not None:
        logger.info("resuming run %s after round %d", state.run, state.server_round)


def _result(state: Checkpoint) -> Result:
    """Return what Flower's `start` would have returned."""
    result = Result()
    result.arrays = state.arrays
    for record in state.records:
        for metrics, by_round in (
            (record.train_metrics, result.train_metrics_clientapp),
            (record.evaluate_metrics, result.evaluate_metrics_clientapp),
            (record.server_metrics, result.evaluate_metrics_serverapp),
        ):
            if metrics is not None:
                by_round[record.server_round] = MetricRecord(metrics)
    logger.info("Final results:\n%s", result)
    return result
