"""Store nested state as JSON and named arrays, and restore exactly the same bits.

All state that a `Context` or a file keeps between rounds goes through this module. It does not use
pickle. Dicts, lists, tuples, numbers, strings and bytes become JSON. Tensors, numpy arrays and
Flower's arrays become Flower `Array`s, and the JSON refers to them by name. numpy lacks bfloat16
and float8, so tensors in these dtypes are kept as integers with the same bits. These integers must
not be averaged.
"""

import base64
import hashlib
import json
import math
import os
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from flower_adapter.arrays import npy
from flower_adapter.arrays.convert import ARRAY_DTYPES, WIDENED, to_array

_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "Size": torch.Size,
}
_BITS = {1: torch.uint8, 2: torch.int16}
_RECORDS = {
    "ArrayRecord": ArrayRecord,
    "ConfigRecord": ConfigRecord,
    "MetricRecord": MetricRecord,
    "RecordDict": RecordDict,
}
# numpy dtypes that safetensors can store. Arrays of other dtypes are kept as bytes.
_FILE_KINDS = frozenset(
    ["bool", "float16", "float32", "float64"]
    + [f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64)]
)
_STRUCTURE, _FOREIGN, _SHA256 = "structure", "foreign", "sha256"  # metadata of a file


def pack(value: Any, path: str) -> tuple[str, dict[str, Array]]:
    """Return `value` as JSON, and the arrays that the JSON refers to.

    `value` may hold None, bool, int, float, complex, str, bytes, tensors, numpy arrays, numpy
    numbers, and Flower's arrays and records. These may be nested in list, tuple, torch.Size, and in
    dict and Counter with keys of type str or int. `path` is the value's name in error messages.

    Raises:
        TypeError: `value` holds something else. The message begins with `path` and says where.
    """
    arrays: dict[str, Array] = {}
    structure = _encode(value, path, arrays)
    return json.dumps(structure, allow_nan=False, separators=(",", ":")), arrays


def unpack(structure: str, arrays: Mapping[str, Array]) -> Any:
    """Return the value that was given to `pack`.

    Tensors are new tensors on the CPU with the same dtype and bits. A parameter becomes a plain
    tensor. An OrderedDict or defaultdict becomes a dict. Values of all other types keep
    their type.

    Raises:
        KeyError, TypeError, ValueError: `structure` and `arrays` do not come from `pack`.
    """
    return _decode(json.loads(structure), arrays)


def write_file(path: Path, structure: str, arrays: Mapping[str, Array]) -> None:
    """Write a safetensors file and sync it to the disk. The write is not atomic.

    An array is stored as plain bytes if its dtype is not in `_FILE_KINDS`, or if its `stype` says
    that its data is not in numpy's format.

    Raises:
        OSError: the file cannot be written.
    """
    values: dict[str, NDArray[Any]] = {}
    foreign: dict[str, tuple[str, list[int], str]] = {}
    for name, array in arrays.items():
        if array.stype == npy.STYPE and array.dtype in _FILE_KINDS:
            values[name] = npy.from_array(array)
        else:
            values[name] = np.frombuffer(array.data, np.uint8)
            foreign[name] = (array.dtype, list(array.shape), array.stype)
    metadata = {_STRUCTURE: structure, _FOREIGN: json.dumps(foreign)}
    metadata[_SHA256] = _sha256(metadata, values)
    try:
        save_file(values, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    sync(path)


def read_file(path: Path) -> tuple[str, dict[str, Array]]:
    """Return the structure and arrays that were given to `write_file`.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is truncated, or `write_file` did not write it.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            structure, foreign = metadata[_STRUCTURE], json.loads(metadata[_FOREIGN])
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sha256 = metadata.pop(_SHA256)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is truncated or has another format: {error}") from error
    if _sha256(metadata, values) != sha256:
        raise ValueError(f"{path} does not have the SHA-256 with which it was written")
    arrays = {}
    for name, found in values.items():
        if name in foreign:
            dtype, shape, stype = foreign[name]
            arrays[name] = Array(dtype, tuple(shape), stype, found.tobytes())
        else:
            arrays[name] = npy.to_array(found)
    return structure, arrays


def make_directory(path: Path) -> None:
    """Make a directory and its parents, and sync each new one, so that it survives a power cut."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync(place.parent)


def _sha256(metadata: Mapping[str, str], values: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of all metadata and arrays. The order does not matter."""
    total = hashlib.sha256(json.dumps([metadata[_STRUCTURE], metadata[_FOREIGN]]).encode())
    for name in sorted(values):
        array = np.ascontiguousarray(values[name])
        total.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def sync(path: Path) -> None:
    """Sync a file, or the entries of a directory, to the disk.

    Windows cannot sync a directory. On Windows this function therefore ignores directories.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a directory on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(value: Any, path: str, arrays: dict[str, Array]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind is complex:
        return {"complex": [_encode(value.real, path, arrays), _encode(value.imag, path, arrays)]}
    if kind in _SEQUENCES.values():
        items = [_encode(item, f"{path}[{i}]", arrays) for i, item in enumerate(value)]
        return {kind.__name__: items}
    if kind in (dict, OrderedDict, defaultdict):
        return {"dict": _pairs(value, path, arrays)}
    if kind is Counter:
        return {"Counter": _pairs(value, path, arrays)}
    if kind in _RECORDS.values():
        return {kind.__name__: _pairs(value, path, arrays)}
    if kind is Array:
        return {"array": _keep(value, arrays)}
    if isinstance(value, np.ndarray | np.generic):
        return {"numpy": _numpy(value, path, arrays)}
    if isinstance(value, Tensor):
        return {"tensor": _tensor(value, path, arrays)}
    raise TypeError(f"{path} is a {kind.__name__}, which cannot be saved")


def _pairs(value: Mapping[Any, Any], path: str, arrays: dict[str, Array]) -> list[list[Any]]:
    return [[_key(k, path), _encode(v, f"{path}[{k!r}]", arrays)] for k, v in value.items()]


def _key(key: Any, path: str) -> Any:
    if type(key) not in (int, str):
        raise TypeError(f"{path} has the key {key!r}, should have keys of type int or str")
    return key


def _keep(array: Array, arrays: dict[str, Array]) -> str:
    name = str(len(arrays))
    arrays[name] = array
    return name


def _numpy(value: NDArray[Any] | np.generic, path: str, arrays: dict[str, Array]) -> list[Any]:
    if value.dtype.hasobject or value.dtype.names:
        raise TypeError(f"{path} is a numpy array of {value.dtype}, which cannot be saved")
    return [_keep(npy.to_array(np.asarray(value)), arrays), isinstance(value, np.generic)]


def _tensor(tensor: Tensor, path: str, arrays: dict[str, Array]) -> list[str]:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in ARRAY_DTYPES:
        raise TypeError(
            f"{path} is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}, "
            "which cannot be saved"
        )
    bits = tensor.view(_bits_dtype(tensor.dtype)) if tensor.dtype in WIDENED else tensor
    name = _keep(to_array(bits), arrays)
    return [name, str(tensor.dtype).removeprefix("torch.")]


def _decode(node: Any, arrays: Mapping[str, Array]) -> Any:
    if not isinstance(node, dict):
        return node
    [(kind, content)] = node.items()
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "complex":
        return complex(*(_decode(part, arrays) for part in content))
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](_decode(item, arrays) for item in content)
    if kind == "Counter":
        return Counter({key: _decode(value, arrays) for key, value in content})
    if kind == "dict":
        return {key: _decode(value, arrays) for key, value in content}
    if kind in _RECORDS:
        return _RECORDS[kind]({key: _decode(value, arrays) for key, value in content})
    if kind == "array":
        return arrays[content]
    if kind == "numpy":
        name, is_scalar = content
        values = npy.from_array(arrays[name])
        return values[()] if is_scalar else values.copy()
    if kind == "tensor":
        name, dtype = content
        return _load(arrays[name], dtype)
    raise ValueError(f"unknown kind {kind!r}")


def _load(array: Array, dtype_name: str) -> Tensor:
    dtype = getattr(torch, dtype_name)
    if dtype not in ARRAY_DTYPES:
        raise ValueError(f"unknown dtype {dtype_name!r}")
    values = npy.from_array(array)
    bits = torch.empty(values.shape, dtype=_bits_dtype(dtype))
    np.copyto(bits.numpy(), values, casting="no")
    return bits.view(dtype)


def _bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or an integer dtype of the same size if numpy lacks `dtype`."""
    return _BITS[dtype.itemsize] if dtype in WIDENED else dtype
