"""Torch state kept in a Flower `Context` between rounds, bit for bit.

`context.state` gets two records for a state called `name`: the tensors in the ArrayRecord
`name.arrays`, and what holds them (dicts, lists, tuples, numbers, strings) as JSON in the
ConfigRecord `name.structure`. Nothing is pickled. dtypes that numpy lacks (bfloat16, float8) are
stored as integers of the same bits; such arrays are for `restore_state`, not for averaging.
"""

import json
import math
from collections import OrderedDict
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from torch import Tensor

from flower_adapter import npy
from flower_adapter.arrays import WIDENED, WIRE_DTYPES, numpy_values

FORMAT = 1

State: TypeAlias = (
    dict[Any, Any] | list[Any] | tuple[Any, ...] | Tensor | int | float | bool | str | None
)

_BITS = {1: torch.uint8, 2: torch.int16}


class StateFormatError(ValueError):
    """What the context holds under a name is not a state of this format."""


def save_state(context: Context, name: str, state: State) -> None:
    """Keep `state` in `context.state` under `name`, in place of what was there.

    `state` nests dict (str or int keys), list, tuple, Tensor, int, float, bool, str and None, as
    the `state_dict` of an optimizer or of a learning-rate schedule does.

    Raises:
        TypeError: something else is in it; the message gives its path. What was kept stays.
    """
    arrays = ArrayRecord()
    structure = json.dumps(_encode(state, name, arrays), allow_nan=False, separators=(",", ":"))
    context.state[f"{name}.arrays"] = arrays
    context.state[f"{name}.structure"] = ConfigRecord({"format": FORMAT, "json": structure})


def restore_state(context: Context, name: str) -> Any:
    """The state saved under `name`, or None if there is none.

    Tensors are new, on the CPU, of the dtype and bits they had. A parameter comes back as a plain
    tensor and an OrderedDict as a dict; everything else has the type it had.

    Raises:
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
        return _decode(json.loads(cast(str, structure["json"])), arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise StateFormatError(f"{name}: {type(err).__name__}: {err}") from err


def state_size(context: Context, name: str) -> int:
    """Bytes that the state under `name` takes in the context; 0 if there is none."""
    records = (context.state.get(f"{name}.{part}") for part in ("structure", "arrays"))
    return sum(record.count_bytes() for record in records if record is not None)


def _encode(value: Any, path: str, arrays: ArrayRecord) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind in (list, tuple):
        items = [_encode(item, f"{path}[{i}]", arrays) for i, item in enumerate(value)]
        return {kind.__name__: items}
    if kind in (dict, OrderedDict):
        pairs = [[_key(k, path), _encode(v, f"{path}[{k!r}]", arrays)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, Tensor):
        return {"tensor": _store(value, path, arrays)}
    raise TypeError(f"{path} is a {kind.__name__}, which cannot be saved")


def _key(key: Any, path: str) -> Any:
    if type(key) not in (int, str):
        raise TypeError(f"{path} has the key {key!r}, should have keys of type int or str")
    return key


def _store(tensor: Tensor, path: str, arrays: ArrayRecord) -> list[str]:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in WIRE_DTYPES:
        raise TypeError(
            f"{path} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}, "
            "which cannot be saved"
        )
    key = str(len(arrays))
    bits = tensor.view(_bits_dtype(tensor.dtype)) if tensor.dtype in WIDENED else tensor
    arrays[key] = npy.to_array(numpy_values(bits))
    return [key, str(tensor.dtype).removeprefix("torch.")]


def _decode(node: Any, arrays: ArrayRecord) -> Any:
    if not isinstance(node, dict):
        return node
    [(kind, content)] = node.items()
    if kind == "float":
        return float(content)
    if kind == "list":
        return [_decode(item, arrays) for item in content]
    if kind == "tuple":
        return tuple(_decode(item, arrays) for item in content)
    if kind == "dict":
        return {key: _decode(value, arrays) for key, value in content}
    if kind == "tensor":
        key, dtype = content
        return _load(arrays[key], dtype)
    raise ValueError(f"unknown kind {kind!r}")


def _load(array: Array, dtype_name: str) -> Tensor:
    dtype = getattr(torch, dtype_name)
    if dtype not in WIRE_DTYPES:
        raise ValueError(f"unknown dtype {dtype_name!r}")
    values = npy.from_array(array)
    bits = torch.empty(values.shape, dtype=_bits_dtype(dtype))
    np.copyto(bits.numpy(), values, casting="no")
    return bits.view(dtype)


def _bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or an integer of its size if numpy lacks it."""
    return _BITS[dtype.itemsize] if dtype in WIDENED else dtype
