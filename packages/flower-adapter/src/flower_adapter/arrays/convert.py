"""Convert any torch module to a Flower `ArrayRecord` and back.

- Tied weights travel once.
- numpy lacks bfloat16 and float8. Such tensors travel as float32, which holds every bfloat16 and
  float8 value exactly.
- Names are those of the bare module. They have no prefixes from `torch.compile` or
  `DistributedDataParallel`.
- Loading checks all arrays before it writes the first one.
"""

from collections.abc import Container, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flower_adapter.arrays import npy
from flower_adapter.arrays.selection import Entry, Selection

# numpy lacks these dtypes, so their tensors travel as float32.
WIDENED = frozenset(
    {
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)

# For each torch dtype, the numpy dtype in which its tensors travel.
ARRAY_DTYPES: dict[torch.dtype, type[np.generic]] = {
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
    **dict.fromkeys(sorted(WIDENED, key=str), np.float32),
}

T = TypeVar("T")


class ArrayMismatch(ValueError):
    """An error: the arrays do not fit the module. Nothing was loaded.

    Attributes:
        module_name: the class name of the module.
        mismatches: for each array name, a text that says what the array is and should be.
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
    """Return the parameters and persistent buffers of a module, by their `state_dict` names.

    If several names share storage, offset, shape and stride, the record holds only the first name.
    bfloat16 and float8 become float32 without any loss. All other dtypes stay. With `select` (see
    `flower_adapter.arrays.selection`) the record holds only the selected entries.

    Raises:
        TypeError: an entry is not a dense tensor with data of a supported dtype, or the module's
            `state_dict` holds extra state.
        ValueError: two names differ only in the part "_orig_mod" that `torch.compile` adds, or
            nothing is selected.
    """
    tensors = _named_tensors(module_or_state_dict)
    record = ArrayRecord()
    for name, *_ in _selected(module_or_state_dict, tensors, select):
        record[name] = to_array(tensors[name])
    return record


def load_arrays(module: nn.Module, record: ArrayRecord, *, select: Selection | None = None) -> None:
    """Copy a record from `to_arrays` into the parameters and buffers of `module`.

    The record must hold at least one name of each tied weight. If it holds several names of one
    tied weight, their values must be equal. Averaging turns integer and bool buffers into floats.
    Loading rounds these floats and casts them back. A float parameter or buffer also takes integers
    and floats of another width, and loading casts them to its dtype. With `select` the record must
    hold the arrays of the selected entries and no others.

    Raises:
        ArrayMismatch: a name is missing or unexpected, a shape differs, or values cannot be cast
            (complex to real, NaN to integer, out of range). The module is unchanged.
        TypeError: `record` is not an ArrayRecord, or `to_arrays` would reject the module.
        ValueError: nothing is selected.
    """
    if not isinstance(record, ArrayRecord):
        raise TypeError(
            f"record is a {type(record).__name__}, should be an ArrayRecord: to_arrays makes one "
            "from a module or its state dict"
        )
    tensors = _named_tensors(module)
    arrays = _bare_names(record, known=tensors)
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


def check_fit(module: nn.Module, record: ArrayRecord, *, select: Selection | None = None) -> None:
    """Compare the names and shapes of a record with a module, which may be on the meta device.

    With `select` the record may lack names, because the module holds more than what travels.

    Raises:
        ArrayMismatch: a name is missing or unexpected, a shape differs, or an array holds other
            bytes than it declares.
    """
    arrays = _bare_names(record, known=module.state_dict())
    tensors = _bare_names(module.state_dict(keep_vars=True))
    mismatches = {}
    for name, array in arrays.items():
        try:
            shape = npy.from_array(array).shape
        except ValueError as error:
            mismatches[name] = str(error)
            continue
        if name not in tensors:
            mismatches[name] = f"is {describe(array)}, should not be there"
        elif shape != tuple(tensors[name].shape):
            mismatches[name] = f"is {describe(array)}, should be {describe(tensors[name])}"
    sent = {id(tensors[name]) for name in arrays if name in tensors}
    for name, tensor in tensors.items():
        if select is None and id(tensor) not in sent:  # tied names share one tensor
            mismatches[name] = f"is missing, should be {describe(tensor)}"
    if mismatches:
        raise ArrayMismatch(type(module).__name__, mismatches)


def signature(module_or_state_dict: nn.Module | Mapping[str, Tensor]) -> dict[str, str]:
    """Return the dtype and shape of each parameter and buffer, such as "float32 (3, 4)"."""
    return {name: describe(tensor) for name, tensor in _named_tensors(module_or_state_dict).items()}


def to_array(tensor: Tensor) -> Array:
    """Return a dense tensor as an `Array`. bfloat16 and float8 become float32."""
    values = tensor.detach().to("cpu", torch.float32 if tensor.dtype in WIDENED else tensor.dtype)
    return npy.to_array(values.resolve_conj().resolve_neg().numpy())


def widen_integers(arrays: ArrayRecord) -> None:
    """Turn integer and bool arrays into float64, in place.

    Some Flower strategies scale arrays in place, and numpy cannot scale integers in place.
    """
    for name, array in list(arrays.items()):
        if np.dtype(array.dtype).kind in "biu":
            arrays[name] = _as_dtype(array, np.dtype(np.float64))


def narrow_like(arrays: ArrayRecord, like: ArrayRecord) -> ArrayRecord:
    """Return `arrays` in the dtypes of `like`. For an integer dtype the values are rounded."""
    narrowed = ArrayRecord()
    for name, array in arrays.items():
        changed = name in like and array.dtype != like[name].dtype
        narrowed[name] = _as_dtype(array, np.dtype(like[name].dtype)) if changed else array
    return narrowed


def entries(module: nn.Module) -> list[Entry]:
    """Return an `Entry` for each distinct parameter and persistent buffer."""
    return [entry for _, entry in _entries(module, _named_tensors(module))]


def describe(values: Tensor | Array | NDArray[Any]) -> str:
    """Return the dtype and shape as a text, such as "float32 (3, 4)"."""
    dtype = _dtype_name(values.dtype) if isinstance(values, Tensor) else str(values.dtype)
    return f"{dtype} {tuple(values.shape)}"


def _entries(
    module_or_state_dict: nn.Module | Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> list[tuple[list[str], Entry]]:
    """Return the names and the `Entry` of each tensor. A tied tensor has several names."""
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
    """Return the names of each selected tensor. A tied tensor has several names."""
    if select is None:
        return _tied_names(tensors)
    found = _entries(module_or_state_dict, tensors)
    chosen = [names for names, entry in found if _is_selected(select, entry)]
    if found and not chosen:
        raise ValueError(f"nothing is selected of {', '.join(entry.name for _, entry in found)}")
    return chosen


def _is_selected(select: Selection, entry: Entry) -> bool:
    selected = select(entry)
    if not isinstance(selected, bool):
        raise TypeError(
            f"select returned {selected!r} for {entry.name}, should return True or False; matching "
            "and excluding must be called with patterns"
        )
    return selected


def _owners(module: nn.Module) -> dict[str, tuple[Tensor, nn.Module]]:
    """Return each parameter and buffer together with the module that holds it."""
    owned: dict[str, tuple[Tensor, nn.Module]] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    for prefix, holder in modules.items():
        # The tensors of a parametrization belong to the parametrized module.
        owner = modules[f".{prefix}".partition(".parametrizations.")[0].removeprefix(".")]
        own = (*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False))
        for name, tensor in own:
            owned[f"{prefix}.{name}" if prefix else name] = (tensor, owner)
    return _bare_names(owned)


def _named_tensors(module_or_state_dict: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check the tensors of a module or state dict, and return them under their `_bare_names`."""
    if isinstance(module_or_state_dict, Mapping):
        return _bare_names(_checked(module_or_state_dict))
    if not isinstance(module_or_state_dict, nn.Module):
        kind = type(module_or_state_dict).__name__
        raise TypeError(f"a module or its state dict is needed, not a {kind}")
    tensors = _checked(module_or_state_dict.state_dict(keep_vars=True))
    own = (*module_or_state_dict.parameters(), *module_or_state_dict.buffers())
    live = {t.untyped_storage().data_ptr() for t in own if t.layout == torch.strided}
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() not in live:
            raise TypeError(f"{name} is extra state, should be a parameter or buffer of the module")
    return _bare_names(tensors)


def _checked(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, should be a tensor")
        if is_lazy(tensor):
            raise TypeError(f"{name} is not initialized yet: call the model once to initialize it")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in ARRAY_DTYPES:
            allowed = ", ".join(_dtype_name(dtype) for dtype in ARRAY_DTYPES)
            raise TypeError(
                f"{name} is {describe(tensor)}, layout {tensor.layout}, on {tensor.device}; "
                f"should be a dense tensor with data, of {allowed}"
            )
        if tensor.numel() and any(
            step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise TypeError(f"{name} is expanded over one value, should have memory of its own")
    return state_dict


def _bare_names(named: Mapping[str, T], known: Container[str] = ()) -> dict[str, T]:
    """Return `named` under the names of the bare module, in the same order.

    The part "_orig_mod", which `torch.compile` adds, is always removed. The prefix "module.", which
    `DistributedDataParallel` adds, is removed if all names have it. It stays if one of these names
    is in `known`, because then the bare module itself has a child called "module".
    """
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
    """Put all names of one tensor into one list. The lists keep the order of `tensors`."""
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
        # An empty tensor has no storage to share.
        groups.setdefault(key if tensor.numel() else name, []).append(name)
    return list(groups.values())


def _fit(array: Array, target: Tensor) -> NDArray[Any] | Tensor:
    """Return the values of `array` in the dtype of `target`, or raise ValueError."""
    values = npy.from_array(array)
    if values.shape != tuple(target.shape):
        raise ValueError(f"is {describe(values)}, should be {describe(target)}")
    dtype = np.dtype(ARRAY_DTYPES[target.dtype])
    if values.dtype != dtype:
        values = _cast(values, dtype)
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
    # The comparison uses Python integers, because float(2**63 - 1) is 2**63.
    if values.size and not (low <= int(values.min()) and int(values.max()) <= high):
        raise ValueError(f"holds {values.min()} to {values.max()}, should be {low} to {high}")
    return values.astype(dtype)


def _as_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    return npy.to_array(npy.cast(npy.from_array(array), dtype))


def _write(target: Tensor, values: NDArray[Any] | Tensor) -> None:
    if isinstance(values, Tensor):
        target.copy_(values)
    elif target.device.type == "cpu" and not (target.is_conj() or target.is_neg()):
        # This copies once. `torch.from_numpy` needs a writable array, which would be a second copy.
        np.copyto(target.numpy(), values)
        torch.autograd.graph.increment_version(target)
    else:
        target.copy_(torch.from_numpy(np.array(values)))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
