"""Any torch module to a Flower `ArrayRecord` and back.

- Tied weights travel once.
- bfloat16 and float8, which numpy lacks, travel as float32: every such value is a float32, so the
  round trip is exact and a server that averages `array.numpy()` averages numbers, not bits.
- Names are those of the bare module: what `torch.compile` and `DistributedDataParallel` put in
  front is taken off.
- Loading checks everything before it writes anything.
"""

from collections.abc import Container, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flower_adapter import npy
from flower_adapter.selection import Entry, Selection

_FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)

WIRE_DTYPES: dict[torch.dtype, type[np.generic]] = {
    torch.bool: np.bool_,
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.uint64: np.uint64,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
    torch.bfloat16: np.float32,
    **dict.fromkeys(_FLOAT8, np.float32),
}

WIDENED = frozenset({torch.bfloat16, *_FLOAT8})


T = TypeVar("T")


class ArrayMismatch(ValueError):
    """The arrays do not fit the module; nothing was loaded.

    Attributes:
        module_name: the class of the module.
        mismatches: for each name what it is and what it should be.
    """

    def __init__(self, module_name: str, mismatches: Mapping[str, str]) -> None:
        super().__init__(module_name, mismatches)
        self.module_name = module_name
        self.mismatches = mismatches

    def __str__(self) -> str:
        lines = [f"  {name} {mismatch}" for name, mismatch in self.mismatches.items()]
        return "\n".join([f"arrays do not fit {self.module_name}:", *lines])


def to_arrays(
    module_or_state_dict: nn.Module | Mapping[str, Tensor], *, select: Selection | None = None
) -> ArrayRecord:
    """The parameters and persistent buffers of a module, named as in its `state_dict`.

    Of names that share storage, offset, shape and stride only the first in `state_dict` order is
    in the record. Dtypes stay, except bfloat16 and float8, which become float32 (exactly). With
    `select` (see `flower_adapter.selection`) only those entries are in it for which it is true.

    Raises:
        TypeError: an entry is no dense tensor with data of a supported dtype, or a module's
            `state_dict` gives an entry that is no parameter or buffer of it (extra state).
        ValueError: two names differ only in what `torch.compile` puts into them, or nothing is
            selected.
    """
    tensors = _named_tensors(module_or_state_dict)
    record = ArrayRecord()
    for name, *_ in _selected(module_or_state_dict, tensors, select):
        record[name] = to_array(tensors[name])
    return record


def load_arrays(module: nn.Module, record: ArrayRecord, *, select: Selection | None = None) -> None:
    """Copy `record`, as `to_arrays` makes it, into the parameters and buffers of `module`.

    A tied weight needs one of its names in the record; where there are several they must agree.
    A float array for an integer or bool buffer, which plain averaging makes, is rounded. A float
    array of another width, or an integer array, is cast to a float parameter. With `select` the
    record must hold what it selects and nothing else.

    Raises:
        ArrayMismatch: names are missing or unexpected, shapes differ, or values cannot be cast
            (complex to real, NaN to integer, out of range). The module is as before.
        TypeError: as in `to_arrays`.
        ValueError: nothing is selected.
    """
    if not isinstance(record, ArrayRecord):
        raise TypeError(
            f"record is a {type(record).__name__}, should be an ArrayRecord; to_arrays makes one "
            "of a module or of its state dict"
        )
    tensors = _named_tensors(module)
    arrays = _canonical_names(record, known=tensors)
    fitted: list[tuple[Tensor, NDArray[Any] | Tensor]] = []
    mismatches: dict[str, str] = {}
    groups = _selected(module, tensors, select)
    for names in groups:
        target = tensors[names[0]]
        sent = [name for name in names if name in arrays]
        if not sent:
            mismatches[names[0]] = f"is missing, should be {describe(target)}"
        for name in sent:
            try:
                values = _fit(arrays[name], target)
            except ValueError as err:
                mismatches[name] = str(err)
                continue
            if name == sent[0]:
                fitted.append((target, values))
            elif arrays[name].data != arrays[sent[0]].data:
                mismatches[name] = f"differs from {sent[0]}, should equal it: they are tied"
    allowed = {name for names in groups for name in names}
    for name, array in arrays.items():
        if name not in allowed:
            where = "is not selected" if name in tensors else "should not be there"
            mismatches[name] = f"is {describe(array)}, {where}"
    if mismatches:
        raise ArrayMismatch(type(module).__name__, mismatches)
    with torch.no_grad():
        for target, values in fitted:
            _write(target, values)


def signature(module_or_state_dict: nn.Module | Mapping[str, Tensor]) -> dict[str, str]:
    """Dtype and shape of each parameter and persistent buffer: "float32 (3, 4)"."""
    return {name: describe(tensor) for name, tensor in _named_tensors(module_or_state_dict).items()}


def subtract(arrays: ArrayRecord, base: ArrayRecord) -> ArrayRecord:
    """The delta that `add` turns back into `arrays`, for names and shapes that both have.

    Floats and complex numbers keep their dtype and so lose what their precision cannot hold;
    integers become int64 and bools int8, exactly.

    Raises:
        ArrayMismatch: names, shapes or dtypes differ.
    """
    _require_alike(arrays, base)
    return ArrayRecord({name: _difference(array, base[name]) for name, array in arrays.items()})


def add(base: ArrayRecord, delta: ArrayRecord) -> ArrayRecord:
    """`base` moved by `delta`, as `subtract` makes it, in the dtypes of `base`.

    A float delta of an integer or bool array, which averaging makes, is rounded. Integer deltas of
    64 bits wrap round, as those of `subtract` do.

    Raises:
        ArrayMismatch: names or shapes differ, a delta cannot be cast, or a sum is out of the range
            of its dtype.
    """
    _require_alike(delta, base, dtypes=False)
    moved, mismatches = ArrayRecord(), {}
    for name, array in base.items():
        try:
            moved[name] = npy.to_array(_sum(npy.from_array(array), npy.from_array(delta[name])))
        except ValueError as err:
            mismatches[name] = str(err)
    if mismatches:
        raise ArrayMismatch("the base", mismatches)
    return moved


def _sum(values: NDArray[Any], change: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind in "fc":
        change = _cast(change, values.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.asarray(values + change)
        if np.any(np.isfinite(values) & np.isfinite(change) & ~np.isfinite(total)):
            raise ValueError(f"moves out of the range of {values.dtype}")
        return total
    wraps = change.dtype.kind in "iu"
    change = _cast(change, np.dtype(np.int64))
    if values.dtype.itemsize < 8:
        return _cast(np.asarray(values.astype(np.int64) + change), values.dtype)
    total = np.asarray(values + change.astype(values.dtype))
    if not wraps and np.any((total < values) != (change < 0)):
        raise ValueError(f"moves out of the range of {values.dtype}")
    return total


def _difference(array: Array, base: Array) -> Array:
    values, before = npy.from_array(array), npy.from_array(base)
    kind = values.dtype.kind
    if kind == "b":
        return npy.to_array(values.astype(np.int8) - before.astype(np.int8))
    if kind in "iu":
        # Wraps round, as `_sum` does, so the largest integers come back too.
        return npy.to_array(values.astype(np.int64) - before.astype(np.int64))
    return npy.to_array(np.asarray(values - before))


def _require_alike(arrays: ArrayRecord, base: ArrayRecord, *, dtypes: bool = True) -> None:
    mismatches = {name: "is missing" for name in base if name not in arrays}
    for name, array in arrays.items():
        if np.dtype(array.dtype).kind not in "biufc":
            mismatches[name] = f"is {describe(array)}, which has no difference"
        elif name not in base:
            mismatches[name] = f"is {describe(array)}, should not be there"
        elif array.shape != base[name].shape or (dtypes and array.dtype != base[name].dtype):
            mismatches[name] = f"is {describe(array)}, should be {describe(base[name])}"
    if mismatches:
        raise ArrayMismatch("the base", mismatches)


def to_array(tensor: Tensor) -> Array:
    """A dense tensor of any device and strides as an `Array`; what numpy lacks as float32."""
    array, target = npy.allocate(np.dtype(WIRE_DTYPES[tensor.dtype]), tuple(tensor.shape))
    target.copy_(tensor.detach())
    return array


def entries(module: nn.Module) -> list[Entry]:
    """What `select` is asked about: each distinct parameter and persistent buffer."""
    return [entry for _, entry in _entries(module, _named_tensors(module))]


def _entries(
    module_or_state_dict: nn.Module | Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> list[tuple[list[str], Entry]]:
    """The tied names of each distinct tensor, and its entry."""
    owners = {}
    if isinstance(module_or_state_dict, nn.Module):
        owners = _owners(module_or_state_dict)
    return [
        (names, Entry(names[0], *owners.get(names[0], (tensors[names[0]], None))))
        for names in _tied_names(tensors)
    ]


def _selected(
    module_or_state_dict: nn.Module | Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    select: Selection | None,
) -> list[list[str]]:
    """The groups of tied names that `select` is true for."""
    if select is None:
        return _tied_names(tensors)
    found = _entries(module_or_state_dict, tensors)
    chosen = [names for names, entry in found if _verdict(select, entry)]
    if found and not chosen:
        raise ValueError(f"nothing is selected of {', '.join(entry.name for _, entry in found)}")
    return chosen


def _verdict(select: Selection, entry: Entry) -> bool:
    verdict = select(entry)
    if not isinstance(verdict, bool):
        raise TypeError(
            f"select gave {verdict!r} for {entry.name}, should be True or False; matching and "
            "excluding are to be called with patterns"
        )
    return verdict


def _owners(module: nn.Module) -> dict[str, tuple[Tensor, nn.Module]]:
    """Each parameter and buffer, with its gradient flag, and the module that it is a part of."""
    held: dict[str, tuple[Tensor, nn.Module]] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    for prefix, holder in modules.items():
        # What a parametrization holds belongs to the module that it is put on.
        owner = modules[f".{prefix}".partition(".parametrizations.")[0].removeprefix(".")]
        own = (*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False))
        for name, tensor in own:
            held[f"{prefix}.{name}" if prefix else name] = (tensor, owner)
    return _canonical_names(held)


def _named_tensors(module_or_state_dict: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(module_or_state_dict, Mapping):
        return _canonical_names(_checked(module_or_state_dict))
    if not isinstance(module_or_state_dict, nn.Module):
        kind = type(module_or_state_dict).__name__
        raise TypeError(f"a module or its state dict is needed, not a {kind}")
    tensors = _checked(module_or_state_dict.state_dict(keep_vars=True))
    held = (*module_or_state_dict.parameters(), *module_or_state_dict.buffers())
    live = {t.untyped_storage().data_ptr() for t in held if t.layout == torch.strided}
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() not in live:
            raise TypeError(f"{name} is extra state, should be a parameter or buffer of the module")
    return _canonical_names(tensors)


def _checked(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, should be a tensor")
        if is_lazy(tensor):
            raise TypeError(f"{name} is not initialized yet: call the model once, then it is")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in WIRE_DTYPES:
            allowed = ", ".join(_dtype_name(dtype) for dtype in WIRE_DTYPES)
            raise TypeError(
                f"{name} is {describe(tensor)}, layout {tensor.layout}, on {tensor.device}; "
                f"should be a dense tensor with data, of {allowed}"
            )
        if tensor.numel() and any(
            step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise TypeError(f"{name} is expanded over one value, should have memory of its own")
    return state_dict


def _canonical_names(named: Mapping[str, T], known: Container[str] = ()) -> dict[str, T]:
    """`named` by the names of the bare module, in the same order; `known` are right already."""
    names = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in named]
    while (
        names
        and all(name.startswith("module.") for name in names)
        and not any(name in known for name in names)
    ):
        names = [name.removeprefix("module.") for name in names]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names differ only in _orig_mod: {', '.join(twice)}")
    return dict(zip(names, named.values(), strict=True))


def _tied_names(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each distinct tensor, in the order of the first."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.device,
            tensor.dtype,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )
        # Empty tensors have no storage to share.
        groups.setdefault(key if tensor.numel() else name, []).append(name)
    return list(groups.values())


def _fit(array: Array, target: Tensor) -> NDArray[Any] | Tensor:
    """The values of `array` in the dtype of `target`, or a ValueError saying what is wrong."""
    values = npy.from_array(array)
    if values.shape != tuple(target.shape):
        raise ValueError(f"is {describe(values)}, should be {describe(target)}")
    wire = np.dtype(WIRE_DTYPES[target.dtype])
    if values.dtype != wire:
        values = _cast(values, wire)
    if target.dtype not in WIDENED:
        return values
    narrowed = torch.from_numpy(np.array(values)).to(target.dtype)
    if np.any(np.isfinite(values) & ~np.isfinite(narrowed.float().numpy())):
        raise ValueError(f"holds values outside {_dtype_name(target.dtype)}")
    return narrowed


def _cast(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    allowed = {"b": "biuf", "i": "biuf", "u": "biuf", "f": "biuf", "c": "biufc"}[dtype.kind]
    if values.dtype.kind not in allowed:
        raise ValueError(f"is {describe(values)}, which cannot be cast to {dtype}")
    if dtype.kind in "biu":
        return _round(values, dtype)
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if np.any(np.isfinite(values) & ~np.isfinite(cast)):
        raise ValueError(f"holds values outside {dtype}")
    return cast


def _round(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError(f"is {values.dtype} with NaN or Inf, should be {dtype}")
        values = np.rint(values)
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    # Python integers, since float(2**63 - 1) is 2**63.
    if values.size and not (low <= int(values.min()) and int(values.max()) <= high):
        raise ValueError(f"holds {values.min()} to {values.max()}, should be {low} to {high}")
    return values.astype(dtype)


def _write(target: Tensor, values: NDArray[Any] | Tensor) -> None:
    if isinstance(values, Tensor):
        target.copy_(values)
    elif target.device.type == "cpu" and not (target.is_conj() or target.is_neg()):
        # One copy: torch.from_numpy would need a second, writable one.
        np.copyto(target.numpy(), values)
        torch.autograd.graph.increment_version(target)
    else:
        target.copy_(torch.from_numpy(np.array(values)))


def describe(values: Tensor | Array | NDArray[Any]) -> str:
    """Dtype and shape: "float32 (3, 4)"."""
    dtype = _dtype_name(values.dtype) if isinstance(values, Tensor) else str(values.dtype)
    return f"{dtype} {tuple(values.shape)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
