"""Torch state kept in a Flower `Context` between rounds, bit for bit.

`context.state` gets two records for a state called `name`: the arrays in the ArrayRecord
`name.arrays`, and what holds them (dicts, lists, tuples, numbers, strings) as JSON in the
ConfigRecord `name.structure`. Nothing is pickled. A context lives as long as its run; `Durable`
keeps it in a directory.
"""

import copy
import json
import logging
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.app.typing import ConfigRecordValues
from torch import nn

from flower_adapter.arrays import signature
from flower_adapter.packing import pack, unpack

FORMAT = 2
GENERATORS = (torch.Generator, np.random.Generator, random.Random)

# Flower's own logger, so that the lines appear in the client's log.
_logger = logging.getLogger("flwr")


class StateFormatError(ValueError):
    """What the context holds under a name is not a state of this format."""


def save_state(
    context: Context, *, name: str = "state", valid_for: nn.Module | None = None, **states: Any
) -> int:
    """Keep `states` in `context.state` under `name`, in place of what was there.

    Each state is something with a `state_dict()` (an optimizer, a scheduler, a module, the position
    of a data loader), a generator of torch, numpy or Python, or what `flower_adapter.packing`
    takes: nested dicts, lists, tuples, tensors, numpy arrays, numbers, strings. The model
    `valid_for` is not saved, only its names, shapes and dtypes: `restore_state` drops the state
    when they change.

    Returns:
        the bytes that the state takes in the context; they are logged as well, at debug level.

    Raises:
        TypeError: something else is in it; the message gives its path. What was kept stays.
    """
    kept = {key: state_of(value) for key, value in states.items()}
    structure, arrays = pack(kept, name)
    kinds = json.dumps({key: _kind(value, valid_for) for key, value in states.items()})
    of_model = json.dumps(None if valid_for is None else list(signature(valid_for).items()))
    about: dict[str, ConfigRecordValues]
    about = {"format": FORMAT, "json": structure, "kinds": kinds, "model": of_model}
    context.state[f"{name}.arrays"] = ArrayRecord(arrays)
    context.state[f"{name}.structure"] = ConfigRecord(about)
    size = state_size(context, name=name)
    _logger.debug("state %s: %s bytes kept in the context", name, f"{size:,}")
    return size


def restore_state(
    context: Context, *, name: str = "state", valid_for: nn.Module | None = None, **targets: Any
) -> dict[str, Any] | None:
    """The states saved under `name`, or None if there are none.

    Each of `targets` (with a `load_state_dict`, or a generator) is given the state that was saved
    under its keyword. Tensors are new, on the CPU, of the dtype and bits they had.

    A state that no longer fits is dropped as a whole, with a warning that says what has changed,
    and the targets are as before: the model has other names, shapes or dtypes than the one it was
    saved with, or in another order; a target is of another class, or an optimizer of other
    parameters; one was not saved, or refuses its state.

    Raises:
        StateFormatError: the records are incomplete, altered or of another format version.
        TypeError: a target has no `load_state_dict` and is no generator.
    """
    for key, target in targets.items():
        if not isinstance(target, GENERATORS) and not hasattr(target, "load_state_dict"):
            raise TypeError(f"{key} is a {type(target).__name__}, should have load_state_dict")
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
    changes = _model_changes(saved_model, valid_for) + _target_changes(kinds, targets, valid_for)
    changes = changes or _load_all(states, targets)
    if changes:
        _logger.warning("state %s is dropped: %s", name, "; ".join(changes))
        drop_state(context, name=name)
        return None
    return cast(dict[str, Any], states)


def drop_state(context: Context, *, name: str = "state") -> None:
    """Take the state under `name` out of the context, if there is one."""
    for part in ("structure", "arrays"):
        context.state.pop(f"{name}.{part}", None)


def state_size(context: Context, *, name: str = "state") -> int:
    """Bytes that the state under `name` takes in the context; 0 if there is none."""
    records = (context.state.get(f"{name}.{part}") for part in ("structure", "arrays"))
    return sum(record.count_bytes() for record in records if record is not None)


def state_of(value: Any) -> Any:
    """The state of what has one; anything else as it is."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, random.Random):
        return value.getstate()
    return value.state_dict() if callable(getattr(value, "state_dict", None)) else value


def load_state(target: Any, state: Any) -> None:
    """The way back from `state_of`."""
    if isinstance(target, torch.Generator):
        target.set_state(state)
    elif isinstance(target, np.random.Generator):
        target.bit_generator.state = state
    elif isinstance(target, random.Random):
        target.setstate(state)
    else:
        target.load_state_dict(state)


def _load_all(states: Mapping[str, Any], targets: Mapping[str, Any]) -> list[str]:
    """Load each target; if one refuses, put all back and say which and why."""
    before = {key: copy.deepcopy(state_of(target)) for key, target in targets.items()}
    for key, target in targets.items():
        try:
            load_state(target, states[key])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            for other, unchanged in before.items():
                load_state(targets[other], unchanged)
            return [f"{key} refuses what was saved: {error}"]
    return []


def _kind(value: Any, model: nn.Module | None) -> str:
    """The class of a state; of an optimizer also what it optimizes: its state has no names."""
    kind = type(value).__name__
    if model is None or not isinstance(value, torch.optim.Optimizer):
        return kind
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names.get(id(p), "another") for p in g["params"]] for g in value.param_groups]
    return f"{kind} of {groups}"


def _target_changes(
    kinds: Mapping[str, str], targets: Mapping[str, Any], model: nn.Module | None
) -> list[str]:
    return [
        f"{key} is a {_kind(target, model)}, was {kinds.get(key, 'not saved')}"
        for key, target in targets.items()
        if _kind(target, model) != kinds.get(key)
    ]


def _model_changes(saved: list[list[str]] | None, model: nn.Module | None) -> list[str]:
    """What has changed of the model, in words."""
    if model is None or saved is None:
        return []
    was, now = dict(saved), signature(model)
    changes = [
        f"{entry} of the model is {now.get(entry, 'not there')}, was {was.get(entry, 'not there')}"
        for entry in {**was, **now}
        if was.get(entry) != now.get(entry)
    ]
    if not changes and list(was) != list(now):
        changes.append("the parameters of the model are in another order")
    return changes
