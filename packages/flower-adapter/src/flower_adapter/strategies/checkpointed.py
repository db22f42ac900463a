"""Checkpoints after every round, and runs that go on where they were cut off."""

import inspect
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path, PurePath
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import log_strategy_start_info

from flower_adapter.arrays import describe
from flower_adapter.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    find_checkpoint,
    holds_checkpoint,
    read_checkpoint,
    remove_checkpoint,
    remove_leftovers,
    round_of,
    write_checkpoint,
)
from flower_adapter.checks import require_count
from flower_adapter.durable import RESUMED, RUN
from flower_adapter.packing import pack, unpack
from flower_adapter.state import GENERATORS, load_state, state_of
from flower_adapter.strategies.grid import StreamingGrid
from flower_adapter.strategies.wrapper import Wrapper, chain, logger

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]

_DATA = (bool, int, float, str, bytes, type(None), np.generic, Enum, PurePath)
# What can change in place, so that identity does not show whether it has.
_CONTAINERS = (list, dict, tuple, set, deque)
_ARRAYS = (np.ndarray, torch.Tensor, Array)
_RECORDS = (RecordDict, ArrayRecord, ConfigRecord, MetricRecord)
_MUTABLE = (*_ARRAYS, *_RECORDS)
# Of Flower's privacy wrappers: filled and emptied within one round.
_TRANSIENT = frozenset({"strategy", "_pending_events"})


class Checkpointed(Wrapper):
    """`strategy`, with a checkpoint in `directory` after every round; the outermost wrapper.

    A checkpoint holds the global arrays, the round, what every wrapper and the strategy inside keep
    from round to round (the moments of `FedAdam`, the momentum of `OuterOptimizer`, the model that
    clients of `Wired` hold, …), the random states of Python, numpy and torch, and all metrics. It
    is whole or not there. The last `keep` stay, and the one whose metric `best` is lowest
    (highest, if `highest_is_best`): of the server's evaluation, else of the clients'.

    With `resume_from` (a checkpoint, or a directory of them, then the newest) the run goes on with
    the round after, as if it had never stopped; `num_rounds` counts all rounds, those before too.
    A directory that holds no checkpoint yet starts at round 1. Clients that keep state between
    rounds need the mod `Durable` to have theirs again. `initial_arrays` only say what the model
    must look like.

    `on_round` is called with each checkpoint once it is written, that of the initial arrays
    (round 0) and that which is resumed included.

    A strategy's state is what its `state_dict` gives, if it has one and `load_state_dict`; else it
    is found by what changes in its attributes, and objects among them need these two, or to be
    random generators. Settings that have not changed since the start are taken from the strategy
    that is resumed with.

    Raises:
        CheckpointError: from `start`, `directory` is in use, or holds checkpoints and `resume_from`
            does not name the newest of them, or what is resumed is damaged or of another model or
            strategy.
        FileNotFoundError: from `start`, there is no `resume_from`.
        TypeError: from `start`, the strategy holds an object that cannot be saved; it is named.
    """

    outermost = True

    def __init__(
        self,
        strategy: Strategy,
        directory: str | Path,
        *,
        keep: int = 3,
        best: str | None = None,
        highest_is_best: bool = False,
        resume_from: str | Path | None = None,
        on_round: Callable[[Checkpoint], None] | None = None,
    ) -> None:
        require_count("keep", keep)
        super().__init__(strategy)
        self.directory = Path(directory).expanduser().absolute()
        self.keep = keep
        self.best = best
        self.highest_is_best = highest_is_best
        self.resume_from = resume_from and Path(resume_from).expanduser().absolute()
        self.on_round = on_round
        self._run = ""
        self._resumes: list[str] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._name_run(config)
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._name_run(config)
        return super().configure_evaluate(server_round, arrays, config, grid)

    def _name_run(self, config: ConfigRecord) -> None:
        """Say which run this is, and which attempt, for the clients' `Durable`."""
        config[RUN] = self._run
        if self._resumes:
            config[RESUMED] = list(self._resumes)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Flower's `start`, from the round after the checkpoint; all arguments are its own.

        A resumed run does not evaluate the initial arrays again.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with _only_one(self.directory):
            return self._start(
                StreamingGrid(grid),
                initial_arrays,
                num_rounds,
                timeout,
                ConfigRecord() if train_config is None else train_config,
                ConfigRecord() if evaluate_config is None else evaluate_config,
                evaluate_fn,
            )

    def _start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        timeout: float,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: EvaluateFn | None,
    ) -> Result:
        configured = [_configuration(part) for part in chain(self.strategy)]
        now = self._resumed(initial_arrays) or self._begun(grid, initial_arrays)
        logger.info("Starting %s strategy:", type(self).__name__)
        log_strategy_start_info(num_rounds, now.arrays, train_config, evaluate_config)
        self.summary()
        self._run, self._resumes = now.run, now.resumed
        self.begin(num_rounds)
        began = time.monotonic()
        if now.strategy:
            self._restore(now)
            if self.on_round is not None:
                self.on_round(now)
        else:
            _evaluate(0, now, evaluate_fn)
            self._write(now, configured)
        for server_round in range(now.server_round + 1, num_rounds + 1):
            logger.info("")
            logger.info("[ROUND %s/%s]", server_round, num_rounds)
            now.server_round = server_round
            replies = grid.send_and_receive(
                self.configure_train(server_round, now.arrays, train_config, grid),
                timeout=timeout,
            )
            arrays, metrics = self.aggregate_train(server_round, replies)
            if arrays is not None:
                now.arrays = arrays
            _note(metrics, now.train_metrics, server_round)
            replies = grid.send_and_receive(
                self.configure_evaluate(server_round, now.arrays, evaluate_config, grid),
                timeout=timeout,
            )
            metrics = self.aggregate_evaluate(server_round, replies)
            _note(metrics, now.evaluate_metrics, server_round)
            _evaluate(server_round, now, evaluate_fn)
            self._write(now, configured)
        result = now.result()
        logger.info("")
        logger.info("Strategy execution finished in %.2fs", time.monotonic() - began)
        logger.info("Final results:\n%s", result)
        return result

    def summary(self) -> None:
        logger.info("\t├──> Checkpoints: %s, the last %d", self.directory, self.keep)
        super().summary()

    def _begun(self, grid: Grid, initial_arrays: ArrayRecord) -> Checkpoint:
        return Checkpoint(
            run=str(grid.run.run_id),
            resumed=[],
            server_round=0,
            arrays=initial_arrays,
            model=_described(initial_arrays),
            strategy=[],
            random_states={},
            train_metrics={},
            evaluate_metrics={},
            server_metrics={},
        )

    def _resumed(self, initial_arrays: ArrayRecord) -> Checkpoint | None:
        """The checkpoint to go on from, if there is one, and if that is what is asked for."""
        remove_leftovers(self.directory)
        here = checkpoints(self.directory)
        if not self.resume_from:
            if here:
                raise CheckpointError(
                    f"{self.directory} holds checkpoints up to round {round_of(here[-1])}; give "
                    "another directory, or resume_from this one"
                )
            return None
        if self.resume_from.is_dir() and not here and not holds_checkpoint(self.resume_from):
            logger.warning("%s holds no checkpoint yet: starting at round 1", self.resume_from)
            return None
        path = find_checkpoint(self.resume_from)
        if here and not path.samefile(here[-1]):
            raise CheckpointError(
                f"{self.directory} holds checkpoints up to round {round_of(here[-1])}, which going "
                f"on from round {round_of(path)} would overwrite: {path}; give another directory"
            )
        checkpoint = read_checkpoint(path)
        _require_alike(checkpoint, initial_arrays)
        # A name of its own, since an attempt that is cut off early leaves no checkpoint.
        checkpoint.resumed.append(f"{checkpoint.server_round}:{uuid4().hex}")
        logger.info("resuming run %s after round %d", checkpoint.run, checkpoint.server_round)
        return checkpoint

    def _write(self, now: Checkpoint, configured: list[dict[str, Any]]) -> None:
        # Packed here, so that an error names the class and the attribute.
        now.strategy = [
            [type(part).__name__, *pack(_state_of(part, before), type(part).__name__)]
            for part, before in zip(chain(self.strategy), configured, strict=True)
        ]
        now.random_states = _random_states()
        write_checkpoint(self.directory, now)
        kept = checkpoints(self.directory)
        best = self._best(now)
        for path in kept[: -self.keep]:
            if round_of(path) != best:
                remove_checkpoint(path)
        if self.on_round is not None:
            self.on_round(now)

    def _best(self, now: Checkpoint) -> int | None:
        """The round with the best metric so far, the first of equals."""
        if self.best is None:
            return None
        values = {r: now.metric(self.best, r) for r in range(now.server_round + 1)}
        found = {r: value for r, value in values.items() if value is not None and value == value}
        if not found:
            return None
        return (max if self.highest_is_best else min)(found, key=found.__getitem__)

    def _restore(self, checkpoint: Checkpoint) -> None:
        parts = list(chain(self.strategy))
        saved = [name for name, *_ in checkpoint.strategy]
        here = [type(part).__name__ for part in parts]
        if saved != here:
            raise CheckpointError(
                f"the run was of the strategy {_nested(saved)}, this is {_nested(here)}"
            )
        for part, (_, structure, arrays) in zip(parts, checkpoint.strategy, strict=True):
            _load(part, unpack(structure, arrays))
        _set_random_states(checkpoint.random_states)


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Refuse a second run in the directory; the lock of a killed process is gone with it."""
    # Beside the directory, which holds checkpoints and nothing else.
    lock = FileLock(directory.with_name(f".{directory.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"{directory} is in use by another run") from error
    try:
        yield
    finally:
        lock.release()


def _evaluate(server_round: int, now: Checkpoint, evaluate_fn: EvaluateFn | None) -> None:
    if evaluate_fn is not None:
        _note(evaluate_fn(server_round, now.arrays), now.server_metrics, server_round)


def _note(metrics: MetricRecord | None, by_round: dict[int, MetricRecord], at: int) -> None:
    if metrics is not None:
        logger.info("\t└──> MetricRecord: %s", metrics)
        by_round[at] = metrics


def _nested(names: list[str]) -> str:
    return "(".join(names) + ")" * (len(names) - 1)


def _described(arrays: ArrayRecord) -> dict[str, str]:
    return {name: describe(array) for name, array in arrays.items()}


def _require_alike(checkpoint: Checkpoint, initial_arrays: ArrayRecord) -> None:
    saved, here = checkpoint.model, _described(initial_arrays)
    wrong = [
        f"{name} was {saved.get(name, 'not there')}, is {here.get(name, 'not there')}"
        for name in {**saved, **here}
        if saved.get(name) != here.get(name)
    ]
    if wrong:
        raise CheckpointError(f"the run was of another model: {'; '.join(wrong)}")


def _keeps_own_state(part: object) -> bool:
    return all(callable(getattr(part, name, None)) for name in ("state_dict", "load_state_dict"))


def _configuration(part: object) -> dict[str, Any]:
    """The attributes of a strategy before the first round; containers as they are then."""
    if _keeps_own_state(part):
        return {}
    return {name: _snapshot(value) for name, value in vars(part).items() if name not in _TRANSIENT}


def _snapshot(value: Any) -> Any:
    """What a container holds now; anything else, and what cannot be packed, as it is."""
    if not isinstance(value, _CONTAINERS):
        return value
    try:
        return pack(value, "")
    except TypeError:
        return value


def _state_of(part: Any, before: dict[str, Any]) -> Any:
    """What `part` keeps from round to round; `before` are its attributes before the first."""
    if _keeps_own_state(part):
        return part.state_dict()
    state: dict[str, Any] = {}
    for name, value in vars(part).items():
        if name in _TRANSIENT or _is_configuration(value):
            continue
        if isinstance(value, _CONTAINERS):
            was = before.get(name)  # None of what the first round made, such as moments
            if was is None or pack(value, f"{type(part).__name__}.{name}") != was:
                state[name] = value
        elif isinstance(value, _DATA):
            if value is not before.get(name, _TRANSIENT):
                state[name] = value
        elif isinstance(value, _MUTABLE):
            state[name] = value
        else:
            state[name] = _object_state(f"{type(part).__name__}.{name}", value)
    return state


def _load(part: Any, state: Any) -> None:
    if _keeps_own_state(part):
        part.load_state_dict(state)
        return
    for name, value in state.items():
        held: Any = vars(part).get(name)
        if isinstance(held, GENERATORS) or callable(getattr(held, "load_state_dict", None)):
            load_state(held, value)
        else:
            setattr(part, name, value)


def _is_configuration(value: Any) -> bool:
    if isinstance(value, type | logging.Logger) or inspect.isroutine(value):
        return True
    # Of other callables only those that cannot have changed; partial functions are such.
    return callable(value) and not getattr(value, "__dict__", None)


def _object_state(path: str, value: Any) -> Any:
    if isinstance(value, GENERATORS) or callable(getattr(value, "state_dict", None)):
        return state_of(value)
    raise TypeError(
        f"{path} is a {type(value).__name__}, whose state cannot be saved: it should have "
        "state_dict and load_state_dict"
    )


def _random_states() -> dict[str, Any]:
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if used else []
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        if torch.cuda.is_available() and torch.cuda.device_count() == len(states["cuda"]):
            torch.cuda.set_rng_state_all(states["cuda"])
        else:
            logger.warning("the random state of %d GPUs is not restored", len(states["cuda"]))
