"""Keep torch state in a Flower `Context` between rounds, bit for bit.

`context.state` gets two records for a state called `name`. The ArrayRecord `name.arrays` holds the
arrays. The ConfigRecord `name.structure` holds dicts, lists, tuples, numbers and strings as JSON.
The module does not use pickle. A context is lost when its run ends. To keep it longer, use
`DiskState`, which saves the context in a directory.
"""

import copy
import hashlib
import json
import logging
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import nn

from flower_adapter._flwr import ConfigRecordValues
from flower_adapter.arrays.convert import signature
from flower_adapter.packing import pack, unpack

FORMAT = 2
GENERATORS = (torch.Generator, np.random.Generator, random.Random)

# Flower's own logger, so that the lines appear in the client's log.
_logger = logging.getLogger("flwr")


class StateFormatError(ValueError):
    """An error: a saved state in a context or file is incomplete, altered or in another format."""


def save_state(
    context: Context, *, name: str = "state", valid_for: nn.Module | None = None, **states: Any
) -> int:
    """Save `states` in `context.state` under `name`. Replace an earlier state with this name.

    A state may be an object with a `state_dict()` (an optimizer, a scheduler, a module, a data
    loader), a random generator of torch, numpy or Python, or nested dicts, lists, tuples, tensors,
    numpy arrays, numbers and strings. The model `valid_for` itself is not saved, only the names,
    shapes and dtypes of its parameters and buffers. If `restore_state` is called with a model that
    has other names, shapes or dtypes, it drops the state.

    Returns:
        the number of bytes that the state takes in the context. This number is also logged at debug
        level.

    Raises:
        TypeError: a state holds a value that cannot be saved. The message says where in the state
            the value is. The earlier state stays.
    """
    packed = {key: state_of(value) for key, value in states.items()}
    structure, arrays = pack(packed, name)
    kinds = json.dumps({key: _kind(value, valid_for) for key, value in states.items()})
    model = json.dumps(None if valid_for is None else list(signature(valid_for).items()))
    fields: dict[str, ConfigRecordValues]
    fields = {"format": FORMAT, "json": structure, "kinds": kinds, "model": model}
    records = (ArrayRecord(arrays), ConfigRecord(fields))
    context.state[f"{name}.arrays"], context.state[f"{name}.structure"] = records
    size = sum(record.count_bytes() for record in records)
    _logger.debug("state %s: %s bytes in the context", name, f"{size:,}")
    return size


def restore_state(
    context: Context, *, name: str = "state", valid_for: nn.Module | None = None, **targets: Any
) -> dict[str, Any] | None:
    """Return the states that were saved under `name`, or None if there are none that fit.

    Each target is an object with `load_state_dict`, or a random generator. The target loads the
    state that was saved under the same keyword. Tensors in the result are new tensors on the CPU
    with the same dtype and bits.

    If the saved state no longer fits, the whole state is dropped with a warning, the targets stay
    unchanged, and the result is None. The state does not fit if
    - the names, shapes, dtypes or order of the model's parameters or buffers have changed,
    - the class of a target has changed,
    - an optimizer has other parameters than before,
    - no state was saved under the keyword of a target, or
    - a target rejects its state.

    Raises:
        StateFormatError: the records are incomplete, altered or have another format version.
        TypeError: a target has no `load_state_dict` and is not a generator.
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
            f"{name}: has format {structure.get('format')!r}, should have format {FORMAT}"
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


def state_digest(context: Context, *, name: str = "state") -> str:
    """Return a SHA-256 of the state under `name`. Without a state it is that of nothing."""
    total = hashlib.sha256()
    structure, arrays = (context.state.get(f"{name}.{part}") for part in ("structure", "arrays"))
    if isinstance(structure, ConfigRecord):
        total.update(json.dumps(dict(structure), sort_keys=True).encode())
    if isinstance(arrays, ArrayRecord):
        for key, array in arrays.items():
            total.update(key.encode())
            total.update(array.data)
    return total.hexdigest()


def drop_state(context: Context, *, name: str = "state") -> None:
    """Remove the state under `name` from the context, if there is one."""
    for part in ("structure", "arrays"):
        context.state.pop(f"{name}.{part}", None)


def state_of(value: Any) -> Any:
    """Return the state of a random generator or of an object with `state_dict`.

    Any other value is returned unchanged.
    """
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, random.Random):
        return value.getstate()
    return value.state_dict() if callable(getattr(value, "state_dict", None)) else value


def load_state(target: Any, state: Any) -> None:
    """Load `state`, which comes from `state_of`, into `target`."""
    if isinstance(target, torch.Generator):
        target.set_state(state)
    elif isinstance(target, np.random.Generator):
        target.bit_generator.state = state
    elif isinstance(target, random.Random):
        target.setstate(state)
    else:
        target.load_state_dict(state)


def _load_all(states: Mapping[str, Any], targets: Mapping[str, Any]) -> list[str]:
    """Load the saved state of each target, and return an empty list.

    If a target rejects its state, all targets get back the states that they had before, and the
    list holds the reason.
    """
    before = {key: copy.deepcopy(state_of(target)) for key, target in targets.items()}
    for key, target in targets.items():
        try:
            load_state(target, states[key])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            for other, unchanged in before.items():
                load_state(targets[other], unchanged)
            return [f"{key} refuses the saved state: {error}"]
    return []


def _kind(value: Any, model: nn.Module | None) -> str:
    """Return the class name of a state. For an optimizer add the names of its parameters."""
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
    """Return a sentence for each difference between the saved model and the present model."""
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
