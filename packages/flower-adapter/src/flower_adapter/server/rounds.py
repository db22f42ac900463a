"""Run the rounds of a federation. The code follows the order of events in a round."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flower_adapter.arrays.convert import narrow_like
from flower_adapter.printable import shown
from flower_adapter.server.checkpoints import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    new_checkpoint,
    random_states,
    set_random_states,
)
from flower_adapter.server.compression import Compression
from flower_adapter.server.exchange import (
    EVALUATE,
    TRAIN,
    DecodedReplies,
    Exchange,
    GoodReply,
)
from flower_adapter.server.guard import Guard, check_arrays, not_finite
from flower_adapter.server.nodes import Nodes
from flower_adapter.server.outer import OuterOptimizer
from flower_adapter.server.record import (
    LONGEST_REASON,
    Metrics,
    RoundFailed,
    RoundRecord,
)
from flower_adapter.server.replies import ReplyStore
from flower_adapter.server.strategy_state import (
    load_strategy_state,
    strategy_state,
    weight_key,
)
from flower_adapter.server.streaming import StreamingFedAvg

DEFAULT_GUARD = Guard()

# Flower's own logger, so that the lines of this module appear among the strategy's lines.
logger = logging.getLogger("flwr")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Configure = Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]
Step = Callable[[Checkpoint, RoundRecord], None]

# The phases of a round in addition to TRAIN and EVALUATE, and what follows when one has failed.
SERVER_EVALUATE, CHECKPOINT, ON_ROUND = "server-evaluate", "checkpoint", "on-round"
_CONSEQUENCES = {
    TRAIN: "the global arrays stay as they were",
    EVALUATE: "it has no evaluation",
    SERVER_EVALUATE: "it has no evaluation on the server",
    CHECKPOINT: "it has no checkpoint, and the next round writes one again",
    ON_ROUND: "the run goes on",
}


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
    reply_disk: int = 2**36,
) -> Result:
    """Run the rounds of a federation with any Flower strategy, and return Flower's `Result`.

    A round takes these steps. The strategy chooses clients. The messages are sent, and each reply
    is checked when it arrives and kept encoded. When all replies have arrived, or the timeout has
    passed, the replies are compared with each other. The strategy aggregates the good replies in
    the order of the clients' labels, and the outer optimizer takes its step. The clients evaluate
    the new arrays, and then the server evaluates them. The checkpoint is written, and `on_round`
    is called.

    With a guard, a phase (training or evaluation) fails if there are too few good replies. The
    strategy then sees no reply. Training also fails if the new global arrays would hold NaN or Inf.
    An exception from anywhere in a round also fails its phase and not the run. This includes the
    server's evaluation ("server-evaluate"), the checkpoint ("checkpoint") and `on_round`
    ("on-round"). The exception is logged with its traceback. When training fails, the global
    arrays, the strategy's state and the outer optimizer stay as they were. When a checkpoint cannot
    be written, the run goes on in memory, and the next round writes one again. Without a guard
    every exception ends the run.

    Args:
        grid: Flower's grid.
        strategy: any strategy of Flower, or a subclass. With checkpoints, a subclass needs the
            methods `state_dict` and `load_state_dict`, see `flower_adapter.server.strategy_state`.
        arrays: the initial global arrays. In a resumed run only their names, shapes and dtypes are
            used, to check that the model is the same.
        num_rounds: number of rounds, including those before a resume.
        timeout: seconds to wait for the replies of a phase. None waits for all replies.
        seed: decides, together with the clients' labels, which clients are sampled. Two runs with
            the same seed and the same connected clients sample the same clients. With None the
            choice is random.
        guard: decides which replies count. With a guard, integer and bool arrays reach the strategy
            as float64, because some Flower strategies cannot average integers. The aggregate is
            then converted back to the dtypes of the global arrays. With None the strategy gets
            every reply that carries no error and can be decoded, without further checks. Strategies
            for XGBoost need None.
        compression: codecs for the arrays. None sends arrays without compression.
        outer: the outer optimizer. With None the strategy's aggregate becomes the global arrays.
        checkpoints: where and how to write checkpoints, and whether to resume. With None no
            checkpoint is written.
        train_config: values for the config of train messages. If the strategy changes the config
            from round to round, a resumed run continues with the changed config. If the resumed run
            is given other values than the saved run, it takes the new values.
        evaluate_config: values for the config of evaluate messages, treated in the same way.
        evaluate_fn: evaluates the global arrays on the server, before the first round and after
            each round.
        on_round: a function that gets the record of each round after the checkpoint is written. The
            first call is for round 0. A resumed run first calls `on_round` again for each round
            before the resume. In these calls only the last record has `arrays`. If the run ends
            with `RoundFailed`, `on_round` gets the record of the last round, of which no checkpoint
            is written.
        reply_memory: how many bytes of replies stay in memory during a phase. Further replies stay
            in a temporary file until they are aggregated.
        reply_disk: how many bytes this temporary file may take. A reply beyond it is left out.

    Raises:
        CheckpointError: another run uses the directory of the checkpoints, this run would overwrite
            checkpoints, or the checkpoint to resume from is damaged or does not fit this run.
        FileNotFoundError: the path to resume from does not exist, or it holds no checkpoint
            although the directory of `checkpoints` holds one.
        RoundFailed: a phase has failed in `guard.max_failed_rounds` rounds in a row. If the run has
            fewer rounds, the phase has failed in all of them. Or the checkpoint or `on_round` of
            the last round has failed. If an exception made the phase fail, it is the `__cause__`.
        TypeError: an argument has the wrong type, checkpoints cannot save the strategy's state, or
            before the first round `evaluate_fn` returns something else than a MetricRecord or None.
    """
    for name, value, kind in (
        ("strategy", strategy, Strategy),
        ("arrays", arrays, ArrayRecord),
        ("guard", guard, Guard | None),
        ("compression", compression, Compression | None),
        ("outer", outer, OuterOptimizer | None),
        ("checkpoints", checkpoints, Checkpoints | None),
    ):
        if not isinstance(value, kind):
            expected = getattr(kind, "__name__", str(kind))
            raise TypeError(f"{name} is a {type(value).__name__}, should be {expected}")
    for part in (compression, outer):
        if part is not None:
            part.reset()
    nodes = Nodes(grid, seed, timeout)
    exchange = Exchange(grid, nodes, guard, compression, weight_key(strategy), timeout)
    federation = _Federation(
        strategy, guard, compression, outer, exchange, num_rounds, reply_memory, reply_disk
    )

    def write(state: Checkpoint, record: RoundRecord) -> None:
        if checkpoints is not None:
            with record.timed(CHECKPOINT):
                state.states = federation.states()
                state.random_states = random_states()
                checkpoints.write(state)

    def report(state: Checkpoint, record: RoundRecord) -> None:
        if on_round is not None:
            on_round(replace(record, arrays=state.arrays))

    def evaluate_on_server(state: Checkpoint, record: RoundRecord) -> None:
        _evaluate_on_server(state, record, evaluate_fn)

    with checkpoints.locked() if checkpoints is not None else nullcontext():
        state = checkpoints.find(arrays) if checkpoints is not None else None
        _log_start(federation, state, checkpoints)
        if state is None:
            state = new_checkpoint(str(grid.run.run_id) if checkpoints is not None else "", arrays)
            record = RoundRecord(0)
            # An exception before the first round ends the run, because it would come again.
            evaluate_on_server(state, record)
            state.add(record)
            write(state, record)
            report(state, record)
        else:
            federation.load_states(state)
            state.failed_rounds.pop(CHECKPOINT, None)  # this one was written
            _replay(state, on_round)
        for phase, given in ((TRAIN, train_config), (EVALUATE, evaluate_config)):
            _first_config(phase, given, state)
        exchange.saved = state if checkpoints is not None else None

        for server_round in range(state.server_round + 1, num_rounds + 1):
            logger.info("")
            logger.info("[ROUND %s/%s]", server_round, num_rounds)
            record = RoundRecord(server_round)
            try:
                federation.attempt(TRAIN, federation.train, state, record)
                federation.attempt(EVALUATE, federation.evaluate, state, record)
                federation.attempt(SERVER_EVALUATE, evaluate_on_server, state, record)
                state.add(record)
                federation.attempt(CHECKPOINT, write, state, record)
            except RoundFailed:
                with suppress(Exception):  # the failed round is the error to report
                    report(state, record)
                raise
            federation.attempt(ON_ROUND, report, state, record)
        nodes.end(exchange.tokens())
    return _result(state)


class _PhaseFailed(Exception):
    """A phase has failed without an exception. The text says why."""


@dataclass
class _Federation:
    """Holds the parts of a run. `train` and `evaluate` run the two phases of a round."""

    strategy: Strategy
    guard: Guard | None
    compression: Compression | None
    outer: OuterOptimizer | None
    exchange: Exchange
    num_rounds: int
    reply_memory: int
    reply_disk: int

    def attempt(self, phase: str, step: Step, state: Checkpoint, record: RoundRecord) -> None:
        """Run a step of a round. With a guard, an exception fails the round and not the run.

        Raises:
            RoundFailed: this phase has failed in too many rounds in a row.
        """
        try:
            step(state, record)
        except _PhaseFailed as failure:
            self._fail(phase, str(failure), None, state, record)
        except Exception as error:
            if self.guard is None:
                raise
            logger.exception("%s round %d has failed", phase, record.server_round)
            self._fail(phase, f"{type(error).__name__}: {error}", error, state, record)
        else:
            state.failed_rounds[phase] = 0

    def train(self, state: Checkpoint, record: RoundRecord) -> None:
        """Let clients train, and compute the new global arrays from their replies."""
        with ReplyStore(self.reply_memory, self.reply_disk) as store:
            replies = self._replies(TRAIN, self.strategy.configure_train, state, record, store)
            record.train_clients = [reply.client for reply in replies]
            with record.timed("aggregate"), self._restored_on_failure():
                aggregate, metrics = self.strategy.aggregate_train(
                    record.server_round, self._for_strategy(replies)
                )
                arrays = self._next_arrays(state.arrays, aggregate)
                record.train_metrics = _noted(metrics)
        state.arrays = arrays

    def evaluate(self, state: Checkpoint, record: RoundRecord) -> None:
        """Let clients evaluate the global arrays."""
        with ReplyStore(self.reply_memory, self.reply_disk) as store:
            configure = self.strategy.configure_evaluate
            replies = self._replies(EVALUATE, configure, state, record, store)
            record.evaluate_clients = [reply.client for reply in replies]
            metrics = self.strategy.aggregate_evaluate(
                record.server_round, self._for_strategy(replies)
            )
        record.evaluate_metrics = _noted(metrics)

    @contextmanager
    def _restored_on_failure(self) -> Iterator[None]:
        """Restore the strategy's state and the outer optimizer if an exception ends the context."""
        try:
            saved = deepcopy(strategy_state(self.strategy))
        except TypeError:  # this state cannot be saved, which only a run with checkpoints needs
            saved = None
        velocity = None if self.outer is None else self.outer.state_dict()
        try:
            yield
        except Exception:
            if saved is not None:
                load_strategy_state(self.strategy, saved)
            if self.outer is not None and velocity is not None:
                self.outer.load_state_dict(velocity)
            raise

    def states(self) -> dict[str, Any]:
        """Return the states that a checkpoint saves: strategy, compression and outer optimizer."""
        states: dict[str, Any] = {"strategy": strategy_state(self.strategy)}
        return states | {name: part.state_dict() for name, part in self._stateful().items()}

    def load_states(self, checkpoint: Checkpoint) -> None:
        """Load the states that a checkpoint has saved."""
        saved, here = checkpoint.states.keys() - {"strategy"}, self._stateful().keys()
        if changed := sorted(saved ^ here):
            then, now = ("with", "without") if changed[0] in saved else ("without", "with")
            raise CheckpointError(f"the saved run was {then} {changed[0]}, this run is {now}")
        try:
            load_strategy_state(self.strategy, checkpoint.states["strategy"])
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        for name, part in self._stateful().items():
            part.load_state_dict(checkpoint.states[name])
        set_random_states(checkpoint.random_states)

    def _stateful(self) -> dict[str, Compression | OuterOptimizer]:
        parts = {"compression": self.compression, "outer": self.outer}
        return {name: part for name, part in parts.items() if part is not None}

    def _replies(
        self,
        phase: str,
        configure: Configure,
        state: Checkpoint,
        record: RoundRecord,
        store: ReplyStore,
    ) -> list[GoodReply]:
        """Choose clients and return their good replies.

        Raises:
            _PhaseFailed: there are too few good replies.
        """
        _, config = state.configs[phase]
        before = dict(config)

        def choose(grid: Grid) -> Iterable[Message]:
            # `Nodes` may let the strategy choose twice. The strategy may change the config, but it
            # should not change it twice.
            config.clear()
            config.update(before)
            return configure(record.server_round, state.arrays, config, grid)

        with record.timed(phase):
            messages = self.exchange.nodes.choose(choose, f"{record.server_round}-{phase}")
            usual = _usual_metrics(phase, state.records)
            replies = self.exchange.run(phase, messages, state.arrays, record, store, usual)
        shortage = self.guard and self.guard.shortage(len(replies), len(messages))
        if shortage:
            raise _PhaseFailed(shortage)
        return replies

    def _for_strategy(self, replies: list[GoodReply]) -> Iterable[Message]:
        """Return the decoded replies in the form that the strategy needs.

        `StreamingFedAvg` decodes the replies while it reads them, so that only one decoded reply is
        in memory. Other strategies get a list, because they may change the replies.
        """
        decoded = DecodedReplies(self.exchange, replies)
        return decoded if isinstance(self.strategy, StreamingFedAvg) else list(decoded)

    def _next_arrays(self, arrays: ArrayRecord, aggregate: ArrayRecord | None) -> ArrayRecord:
        """Return the next global arrays.

        Raises:
            _PhaseFailed: the next global arrays would be unusable.
        """
        if aggregate is None:
            return arrays
        if self.guard is not None:
            aggregate = narrow_like(aggregate, arrays)
            self._require_usable(aggregate, arrays)
        moved = aggregate if self.outer is None else self.outer.step(arrays, aggregate)
        if self.guard is not None and moved is not aggregate:
            self._require_usable(moved, arrays)
        return moved

    def _require_usable(self, new: ArrayRecord, arrays: ArrayRecord) -> None:
        try:
            check_arrays(new, arrays)
            fault = not_finite(new)
        except ValueError as error:
            fault = str(error)
        if fault:
            raise _PhaseFailed(f"the new global arrays are unusable: {fault}")

    def _fail(
        self,
        phase: str,
        reason: str,
        error: Exception | None,
        state: Checkpoint,
        record: RoundRecord,
    ) -> None:
        """Count a failed phase. Raise `RoundFailed` after too many failed rounds in a row.

        The checkpoint and the report of the last round have no later round that makes up for them.
        """
        assert self.guard is not None
        reason = shown(reason, LONGEST_REASON)
        record.failures.append(f"{phase}: {reason}")
        in_a_row = state.failed_rounds.get(phase, 0) + 1
        state.failed_rounds[phase] = in_a_row
        left_out = [client for client in record.left_out if client.phase == phase]
        failure = RoundFailed(phase, record.server_round, reason, left_out)
        limit = min(self.guard.max_failed_rounds, self.num_rounds)
        is_last = phase in (CHECKPOINT, ON_ROUND) and record.server_round == self.num_rounds
        if in_a_row >= limit or is_last:
            raise failure from error
        logger.warning(
            "%s; %s (the run fails after %d such rounds in a row, this is number %d)",
            failure,
            _CONSEQUENCES[phase],
            limit,
            in_a_row,
        )


def _evaluate_on_server(
    state: Checkpoint, record: RoundRecord, evaluate_fn: EvaluateFn | None
) -> None:
    if evaluate_fn is not None:
        with record.timed(SERVER_EVALUATE):
            metrics = evaluate_fn(record.server_round, state.arrays)
            if not isinstance(metrics, MetricRecord | None):
                raise TypeError(
                    f"evaluate_fn returned a {type(metrics).__name__}, should be a MetricRecord or "
                    "None"
                )
            record.server_metrics = _noted(metrics)


def _noted(metrics: MetricRecord | None) -> Metrics | None:
    if metrics is None:
        return None
    logger.info("\t└──> MetricRecord: %s", metrics)
    return dict(metrics)


def _usual_metrics(phase: str, records: Sequence[RoundRecord]) -> Metrics | None:
    """Return the metrics of a client in the last such phase that did not fail, if there is one."""
    for record in reversed(records):
        is_train = phase == TRAIN
        metrics = record.train_metrics if is_train else record.evaluate_metrics
        clients = record.train_clients if is_train else record.evaluate_clients
        if metrics is not None and clients:
            return clients[0].metrics
    return None


def _first_config(phase: str, given: ConfigRecord | None, state: Checkpoint) -> None:
    """Set the config for the next round, which the strategy may change from round to round.

    The config is kept in `state` together with the values that `run_rounds` was given.
    """
    new = ConfigRecord(dict(given or {}))
    saved, present = state.configs.get(phase, (new, new))
    if dict(saved) != dict(new):
        logger.warning("the %s config is not that of the saved run; the new one is used", phase)
        present = new
    state.configs[phase] = (new, ConfigRecord(dict(present)))


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
        "Starting %s for %d rounds",
        type(federation.strategy).__name__,
        federation.num_rounds,
    )
    for part in (
        federation.guard,
        federation.compression,
        federation.outer,
        checkpoints,
    ):
        if part is not None:
            logger.info("\t├──> %r", part)
    federation.strategy.summary()
    if state is not None:
        logger.info("resuming run %s after round %d", state.run, state.server_round)


def _result(state: Checkpoint) -> Result:
    """Return the `Result` that Flower's `start` would return for these rounds."""
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
