"""Torch state kept in a Flower `Context` between rounds, bit for bit.

`context.state` gets two records for a state called `name`: the arrays in the ArrayRecord
`name.arrays`, and what holds them (dicts, lists, tuples, numbers, strings) as JSON in the
ConfigRecord `name.structure`. Nothing is pickled. A context lives as long as its run; `Durable`
keeps it in a directory.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.app.typing import ConfigRecordValues
from torch import nn

from flower_adapter.arrays import signature
from flower_adapter.packing import pack, unpack

FORMAT = 2

# Flower's own logger, so that the lines appear in the client's log.
_logger = logging.getLogger("flwr")


class StateFormatError(ValueError):
    """What the context holds under a name is not a state of this format."""


def save_state(
    context: Context, *, name: str = "state", model: nn.Module | None = None, **states: Any
) -> int:
    """Keep `states` in `context.state` under `name`, in place of what was there.

    Each state is something with a `state_dict()` (an optimizer, a scheduler, a module, the position
    of a data loader), a `torch.Generator`, or nests dict (str or int keys), list, tuple, Tensor,
    numpy array, int, float, bool, str, bytes and None. Of `model` only the names, shapes and dtypes
    are kept: `restore_state` drops the state when they have changed.

    Returns:
        the bytes that the state takes in the context; they are logged as well, at debug level.

    Raises:
        TypeError: something else is in it; the message gives its path. What was kept stays.
    """
    kept = {key: _state_of(value) for key, value in states.items()}
    structure, arrays = pack(kept, name)
    kinds = json.dumps({key: _kind(value) for key, value in states.items()})
    of_model = json.dumps(None if model is None else signature(model))
    about: dict[str, ConfigRecordValues]
    about = {"format": FORMAT, "json": structure, "kinds": kinds, "model": of_model}
    context.state[f"{name}.arrays"] = ArrayRecord(arrays)
    context.state[f"{name}.structure"] = ConfigRecord(about)
    size = state_size(context, name=name)
    _logger.debug("state %s: %s bytes kept in the context", name, f"{size:,}")
    return size


def restore_state(
    context: Context, *, name: str = "state", model: nn.Module | None = None, **targets: Any
) -> dict[str, Any] | None:
    """The states saved under `name`, or None if there are none.

    Each of `targets` (with a `load_state_dict`, or a `torch.Generator`) is given the state that was
    saved under its keyword. Tensors are new, on the CPU, of the dtype and bits they had.

    A state that no longer fits is dropped, with a warning that says what has changed: `model` has
    other names, shapes or dtypes than the one it was saved with, or a target is of another class.

    Raises:
        KeyError: a target was not saved; the message has what was.
        StateFormatError: the records are incomplete, altered or of another format version.
    """
    structure, arrays = (context.state.get(f"{name}.{part}") for part in ("structure", "arrays"))
    if structure is None and arrays is None:
        return None
    if not isinstance(structure, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise StateFormatError(f"{name}: needs both {name}.structure and {name}.arrays")
    if structure.get("format") != FORMAT:
        raise StateFormatError(
            f"{name}: is of format {structure.get('format')!r}, should be of format {FORMAT}"
        )
    try:
        kinds = json.loads(cast(str, structure["kinds"]))
        saved_model = json.loads(cast(str, structure["model"]))
        states = unpack(cast(str, structure["json"]), arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise StateFormatError(f"{name}: {type(err).__name__}: {err}") from err
    if missing := targets.keys() - states.keys():
        raise KeyError(f"{name}: {sorted(missing)} were not saved, only {sorted(states)}")
    if changes := _changes(saved_model, model, kinds, targets):
        _logger.warning("state %s is dropped: %s", name, "; ".join(changes))
        drop_state(context, name=name)
        return None
    for key, target in targets.items():
        if isinstance(target, torch.Generator):
            target.set_state(states[key])
        else:
            target.load_state_dict(states[key])
    return cast(dict[str, Any], states)


def drop_state(context: Context, *, name: str = "state") -> None:
    """Take the state under `name` out of the context, if there is one."""
    for part in ("structure", "arrays"):
        context.state.pop(f"{name}.{part}", None)


def state_size(context: Context, *, name: str = "state") -> int:
    """Bytes that the state under `name` takes in the context; 0 if there is none."""
    records = (context.state.get(f"{name}.{part}") for part in ("structure", "arrays"))
    return sum(record.count_bytes() for record in records if record is not None)


def _state_of(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.state_dict() if callable(getattr(value, "state_dict", None)) else value


def _kind(value: Any) -> str:
    return type(value).__name__


def _changes(
    saved_model: Mapping[str, str] | None,
    model: nn.Module | None,
    kinds: Mapping[str, str],
    targets: Mapping[str, Any],
) -> list[str]:
    """What no longer fits, in words."""
    changes = [
        f"{key} is a {_kind(target)}, was a {kinds[key]}"
        for key, target in targets.items()
        if _kind(target) != kinds[key]
    ]
    if model is None or saved_model is None:
        return changes
    now = signature(model)
    for entry in [*saved_model, *(added for added in now if added not in saved_model)]:
        was, is_now = saved_model.get(entry, "not there"), now.get(entry, "not there")
        if was != is_now:
            changes.append(f"{entry} of the model is {is_now}, was {was}")
    return changes
