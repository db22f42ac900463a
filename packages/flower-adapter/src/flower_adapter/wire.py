"""How arrays travel: in full, or as compressed deltas against a model that both sides hold.

`Wired` on the server and `wire_mod` on the client are the two ends. The server decides on the
codecs and says so in a ConfigRecord of each message; an encoded array names its codec and the
version of this format as its `stype`, keeps its name, dtype and shape, and cannot be mistaken for
numbers: whoever does not know it gets Flower's "Unsupported serialization type".

Compressed are float arrays of two or more dimensions. Biases, normalization weights, running
statistics and integers travel as they are: they are few, and a variance must not become negative.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from flower_adapter import npy
from flower_adapter.compress import VERSION, Codec, CodecError, codec
from flower_adapter.messages import refusal
from flower_adapter.state import drop_state, restore_state, save_state

WIRE = "flower-adapter.wire"  # the ConfigRecord, and the state in the client's context
_STYPE = "flower-adapter/{codec}/{version}"

Deltas = Mapping[str, Tensor]  # float32 or float64, by the name of the array


class Encoded(NamedTuple):
    """Arrays for the wire, and what was lost on it."""

    arrays: ArrayRecord
    received: ArrayRecord  # what the other side will decode
    residual: dict[str, Tensor]  # what it will lack, for the next time


def encode(
    arrays: ArrayRecord, base: ArrayRecord, codec_name: str, residual: Deltas | None = None
) -> Encoded:
    """`arrays` as deltas against `base`, with the `residual` of the last time added to them.

    Arrays that are not to be compressed, or that `base` does not have in that dtype and shape, are
    in the result as they are.

    Raises:
        CodecError: the codec is unknown, or a delta holds NaN, Inf or values too large for it.
    """
    chosen = codec(codec_name)
    encoded, received, lost = ArrayRecord(), ArrayRecord(), {}
    for name, array in arrays.items():
        before = base.get(name)
        if before is None or not _compressible(array) or not _alike(array, before):
            encoded[name] = received[name] = array
            continue
        delta = _wide(array) - _wide(before)
        if residual is not None and name in residual and residual[name].shape == delta.shape:
            delta += residual[name]
        used, data = chosen, chosen.encode(delta.float())
        if len(data) > 4 * delta.numel():  # so few values that their scales outweigh them
            used = codec("fp32")
            data = used.encode(delta.float())
        received[name] = _moved(before, used.decode(data, array.shape))
        # Not only what the codec loses, but what rounding to the array's own dtype does too.
        lost[name] = delta.sub_(_wide(received[name]) - _wide(before))
        if not torch.isfinite(lost[name].abs().amax()):
            raise CodecError(f"{name} has moved by NaN, Inf or values too large for {chosen.name}")
        encoded[name] = Array(array.dtype, array.shape, stype_of(used.name), data)
    return Encoded(encoded, received, lost)


def decode(arrays: ArrayRecord, base: ArrayRecord) -> ArrayRecord:
    """What `encode` made of arrays, added to `base`; arrays that are not encoded as they are.

    Raises:
        CodecError: a codec or its version is unknown here, the data is damaged, or `base` has no
            array of that name and shape.
    """
    decoded = ArrayRecord()
    for name, array in arrays.items():
        if not is_encoded(array):
            decoded[name] = array
            continue
        before = base.get(name)
        if before is None or not _alike(array, before) or not _compressible(array):
            held = "none" if before is None else f"{before.dtype} {before.shape}"
            raise CodecError(
                f"{name} is {array.dtype} {array.shape}, encoded; the model held has {held}"
            )
        try:
            back = _codec_of(array).decode(array.data, tuple(array.shape))
        except CodecError as error:
            raise CodecError(f"{name}: {error}") from error
        decoded[name] = _moved(before, back)
    return decoded


def stype_of(codec_name: str) -> str:
    """How an array says that it is encoded, and how."""
    return _STYPE.format(codec=codec_name, version=VERSION)


def is_encoded(array: Array) -> bool:
    """Whether `encode` made it."""
    return array.stype.startswith(_STYPE.partition("{")[0])


def wire_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The client's end, a Flower mod: `ClientApp(mods=[wire_mod])`.

    Mods that read arrays, such as Flower's for clipping and local privacy, come after it; `Durable`
    comes before.

    It does what the server's message says, and nothing with one of a server without `Wired`. The
    model held and the error feedback are kept in the context, next to whatever else is there. A
    message that cannot be decoded, or arrays that cannot be encoded, are answered with an error.
    """
    if WIRE not in message.content:
        return call_next(message, context)
    try:
        about = Header.from_record(message.content.pop(WIRE))
        key, received = _receive(message.content, context, about)
    except CodecError as error:
        return refusal(message, error)
    if key is None:
        return call_next(message, context)
    message.content[key] = received
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    try:
        _send(reply.content, received, context, about)
    except CodecError as error:
        return refusal(message, error)
    reply.content[WIRE] = about.to_record()
    return reply


class Header(NamedTuple):
    """What goes with the arrays of a message."""

    downlink: str  # codec of this message's arrays
    uplink: str  # codec of the reply's
    base: str  # version of the model that the arrays are deltas against; "" if they are whole
    version: str  # of the model that they give; "" if it need not be held

    @classmethod
    def from_record(cls, record: Any) -> "Header":
        """Raises CodecError for a record of another version of this format."""
        version = record.get("format") if isinstance(record, ConfigRecord) else None
        if version != VERSION:
            raise CodecError(
                f"the message is in version {version!r} of the wire format, this side knows "
                f"{VERSION}: install one version of flower-adapter on both"
            )
        found = [record.get(field, "") for field in cls._fields]
        if not all(isinstance(value, str) for value in found):
            raise CodecError(f"the wire record is {dict(record)}, should have {cls._fields}")
        header = cls(*cast(list[str], found))
        for name in (header.downlink, header.uplink):
            codec(name)
        return header

    def to_record(self) -> ConfigRecord:
        """The ConfigRecord of a message."""
        # Flower's count_bytes, and with it message_size_mod, refuses empty strings.
        given = {name: value for name, value in self._asdict().items() if value}
        return ConfigRecord({"format": VERSION, **given})


def _receive(
    content: RecordDict, context: Context, about: Header
) -> tuple[str | None, ArrayRecord]:
    """The key of the arrays of a message, and the arrays in full."""
    records = list(content.array_records.items())
    if not records:
        return None, ArrayRecord()
    if len(records) > 1:
        raise CodecError(f"the message holds {len(records)} ArrayRecords, should hold one")
    [(key, arrays)] = records
    if about.base:
        held = restore_state(context, name=f"{WIRE}.held")
        version = held and held["version"]
        if held is None or version != about.base:
            drop_state(context, name=f"{WIRE}.held")
            raise CodecError(
                f"the message changes version {about.base} of the model, this client holds "
                f"{version or 'none'}; the server will send it whole the next time"
            )
        arrays = held["arrays"] if about.version == about.base else decode(arrays, held["arrays"])
    if about.version and about.version != about.base:
        save_state(context, name=f"{WIRE}.held", version=about.version, arrays=arrays)
    return key, arrays


def _send(content: RecordDict, received: ArrayRecord, context: Context, about: Header) -> None:
    """Encode the arrays of a reply in place, and keep what is lost."""
    for key, arrays in list(content.array_records.items()):
        kept = restore_state(context, name=f"{WIRE}.residual")
        residual = kept["residual"] if kept and kept["codec"] == about.uplink else None
        encoded = encode(arrays, received, about.uplink, residual)
        save_state(context, name=f"{WIRE}.residual", codec=about.uplink, residual=encoded.residual)
        content[key] = encoded.arrays


def _codec_of(array: Array) -> Codec:
    _, name, version = f"{array.stype}//".split("/", 3)[:3]
    if version != str(VERSION):
        raise CodecError(f"is {name} of version {version or 'none'}, this side knows {VERSION}")
    return codec(name)


def _compressible(array: Array) -> bool:
    is_float = array.dtype in ("float16", "float32", "float64")
    return is_float and len(array.shape) > 1 and 0 not in array.shape


def _alike(array: Array, base: Array) -> bool:
    return (array.dtype, tuple(array.shape)) == (base.dtype, tuple(base.shape))


def _wide(array: Array) -> Tensor:
    """The values in at least single precision; read-only."""
    values = npy.tensor_view(npy.from_array(array))
    return values.float() if values.dtype == torch.float16 else values


def _moved(base: Array, delta: Tensor) -> Array:
    """`base` + `delta`, alike on every machine: one addition, one rounding."""
    array, values = npy.allocate(np.dtype(base.dtype), tuple(base.shape))
    torch.add(npy.tensor_view(npy.from_array(base)), delta, out=values)
    return array
