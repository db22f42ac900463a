"""Send the values of each round to experiment trackers: TensorBoard, Weights & Biases, Trackio.

All trackers get the same values under the same names, with the round as the step. The file
`trackers.json` in the run's directory keeps the id of each tracker's run and the last round that it
got. So a resumed run goes on in the same tracker runs, and no round is sent twice.
"""

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

from nanogpt_flower.settings import SettingsError

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "nanogpt-flower"
STATE_FILE = "trackers.json"
PATH_KEYS = ("corpus", "output-dir", "resume-from", "client-state")

logger = logging.getLogger("flwr.nanogpt_flower")


def tracker_names(report_to: str) -> list[str]:
    """Return the trackers in the setting `report-to`.

    Raises:
        SettingsError: a tracker is not known or is named twice.
    """
    names = [name.strip() for name in report_to.split(",")] if report_to.strip() else []
    if not set(names) <= set(TRACKERS) or len(set(names)) < len(names):
        raise SettingsError(
            f"report-to is {report_to!r}; it must be empty or name each of "
            f"{', '.join(TRACKERS)} at most once, separated by commas"
        )
    return names


def check_trackers(report_to: str) -> None:
    """Check that the trackers are known and that their packages are installed.

    Raises:
        SettingsError: a tracker is not known, or its package is missing. The message says how to
            install it.
    """
    for name in tracker_names(report_to):
        if find_spec(name) is None:
            raise SettingsError(
                f"report-to is {report_to!r}, but the package {name} is not installed; install it "
                f'with: pip install "nanogpt-flower[{name}]"'
            )


def values_of(
    row: Mapping[str, Any], clients: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]
) -> dict[str, float]:
    """Return all numbers of a round by name.

    Args:
        row: the line of the round in `metrics.jsonl`.
        clients: the lines of the round in `clients.jsonl`.
        seconds: the seconds of the round by part, as in `timings.jsonl`.

    Returns:
        Names such as "val_loss", "bytes_up", "seconds/train" and
        "clients/partition 0000 of 2/train_loss". The bytes are those of all clients together.
    """
    values = dict(row)
    for key in ("bytes_down", "bytes_up"):
        values[key] = sum(client[key] for client in clients)
    values |= {f"seconds/{part}": value for part, value in seconds.items()}
    taken: set[str] = set()
    for client in clients:
        name = _tag(str(client["client"]), taken)
        values |= {f"clients/{name}/{key}": value for key, value in client.items()}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and name.rpartition("/")[2] != "round"
    }


def _tag(label: str, taken: set[str]) -> str:
    """Return a label without characters that are special in names, and different from the others.

    A client chooses its label, so the label can hold any characters.
    """
    tag = base = re.sub(r"[^\w .-]", "_", label)[:60] or "_"
    number = 1
    while tag in taken:
        number += 1
        tag = f"{base}_{number}"
    taken.add(tag)
    return tag


class _Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float], sample: str | None) -> None: ...

    def close(self, *, failed: bool) -> None: ...


@dataclass(frozen=True)
class _Start:
    """The values with which a tracker starts or goes on with a run."""

    directory: Path
    name: str
    id: str
    config: Mapping[str, Any]
    first_round: int  # the first round that the tracker has not got


class _TensorBoard:
    def __init__(self, start: _Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard does not show what an ended process has sent of this round and later ones.
        purge = start.first_round if start.first_round else None
        self._writer: Any = SummaryWriter(str(start.directory / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float], sample: str | None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if sample is not None:
            # TensorBoard reads Markdown, where indented lines are shown as they are.
            text = "\n".join(f"    {line}" for line in sample.splitlines())
            self._writer.add_text("sample", text, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, start: _Start) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=start.id,
            name=start.name,
            dir=str(start.directory),
            resume="allow",
            config=dict(start.config),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float], sample: str | None) -> None:
        text = {} if sample is None else {"sample": sample}
        self._run.log({**values, **text}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, start: _Start) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{start.name}-{start.id}",
            resume="allow",
            config=dict(start.config),
        )

    def log(self, step: int, values: Mapping[str, float], sample: str | None) -> None:
        text = {} if sample is None else {"sample": sample}
        self._run.log({**values, **text}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[_Start], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


class Trackers:
    """The trackers of a run. Use it as a context manager.

    If a tracker fails, for example without a network, the run goes on without it. The failure is
    logged once. A resumed run sends the missing rounds.

    Args:
        report_to: the setting `report-to`.
        directory: the directory of the run.
        run_name: the name of the run in the trackers.
        config: the settings of the run. Only the last component of a path is sent.
    """

    def __init__(
        self, report_to: str, directory: Path, run_name: str, config: Mapping[str, Any]
    ) -> None:
        self._file = directory / STATE_FILE
        names = tracker_names(report_to)
        self._state: dict[str, dict[str, Any]] = self._read() if names else {}
        self._trackers: dict[str, _Tracker] = {}
        shown = {
            key: Path(str(value)).name if key in PATH_KEYS else value
            for key, value in config.items()
        }
        for name in names:
            state = self._state.setdefault(name, {"id": uuid.uuid4().hex[:8], "rounds": 0})
            start = _Start(directory, run_name, state["id"], shown, state["rounds"])
            self._try(name, lambda name=name, start=start: self._start(name, start))  # type: ignore[misc]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, tracker in list(self._trackers.items()):
            close = tracker.close
            self._try(name, lambda close=close: close(failed=kind is not None))  # type: ignore[misc]

    def log(
        self, server_round: int, values: Mapping[str, float], sample: str | None = None
    ) -> None:
        """Send the values of a round to each tracker that has not got them."""
        for name, tracker in list(self._trackers.items()):
            state = self._state[name]
            if server_round < state["rounds"]:
                continue
            send = tracker.log
            if self._try(name, lambda send=send: send(server_round, values, sample)):  # type: ignore[misc]
                state["rounds"] = server_round + 1
        if self._trackers:
            self._write()

    def _start(self, name: str, start: _Start) -> None:
        self._trackers[name] = _KINDS[name](start)

    def _try(self, name: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # trackers raise errors of many kinds, and the run matters more
            logger.warning("%s failed, so it gets no more values of this run: %s", name, error)
            self._trackers.pop(name, None)
            return False
        return True

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._file.exists():
            return {}
        try:
            saved = json.loads(self._file.read_text(encoding="utf-8"))
            return {
                str(name): {"id": str(state["id"]), "rounds": int(state["rounds"])}
                for name, state in saved.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(f"{self._file} is damaged: {error}") from error

    def _write(self) -> None:
        temporary = self._file.with_name(f".{self._file.name}")
        temporary.write_text(json.dumps(self._state, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self._file)
