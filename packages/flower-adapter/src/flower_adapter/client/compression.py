"""A Flower mod that decodes the messages to a client and compresses the client's replies."""

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from torch import Tensor

from flower_adapter import protocol
from flower_adapter._flwr import ClientAppCallable
from flower_adapter.arrays.codecs import CodecError, codec
from flower_adapter.arrays.deltas import decode, encode
from flower_adapter.arrays.npy import from_array
from flower_adapter.client.refusals import Refusal, refusal_from, refuse
from flower_adapter.client.state import drop_state, restore_state, save_state

_MODEL = f"{protocol.COMPRESSION}.model"  # the model that server and client both hold
_RESIDUAL = f"{protocol.COMPRESSION}.residual"  # error feedback


def compression_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Decode the message and compress the reply: `ClientApp(mods=[compression_mod])`.

    The server's message names the codecs, so the mod has no settings. If the server does not use
    compression, the mod changes nothing. Put `DiskState` before this mod. Mods that read arrays,
    such as Flower's mods for clipping and local privacy, come after this mod.

    The mod keeps two states in the client's context:
    - the model to which the server's next delta is added,
    - the residual, which is what the compression of the last reply has lost. The residual, or the
      share of it that the codec asks for, is added to the next reply (error feedback).

    If a message cannot be decoded, or a reply cannot be encoded, the server gets an error reply.
    """
    is_query = message.metadata.message_type.startswith(MessageType.QUERY)
    if is_query or protocol.COMPRESSION not in message.content:
        return call_next(message, context)
    try:
        header = protocol.CompressionHeader.from_record(message.content.pop(protocol.COMPRESSION))
        for name in (header.downlink, header.uplink):
            codec(name)
        key, received = _decode(message.content, context, header)
    except Refusal as error:
        return refuse(message, error)
    except ValueError as error:
        return refuse(
            message, refusal_from("compression", "this client cannot decode the arrays", error)
        )
    if key is None:
        return call_next(message, context)
    message.content[key] = received
    reply = call_next(message, context)
    if reply.has_error():
        drop_state(context, name=_MODEL)  # the server sends the whole model next time
        return reply
    try:
        _encode(reply.content, received, context, header)
    except CodecError as error:
        return refuse(
            message, refusal_from("compression", "this client cannot encode its arrays", error)
        )
    reply.content[protocol.COMPRESSION] = header.to_record()
    return reply


def _decode(
    content: RecordDict, context: Context, header: protocol.CompressionHeader
) -> tuple[str | None, ArrayRecord]:
    """Return the key of the message's ArrayRecord, and the decoded arrays.

    The key is None if the message holds no ArrayRecord.
    """
    records = list(content.array_records.items())
    if not records:
        return None, ArrayRecord()
    if len(records) > 1:
        raise CodecError(f"the message holds {len(records)} ArrayRecords, should hold one")
    [(key, arrays)] = records
    if header.base:
        model = restore_state(context, name=_MODEL)
        version = model and model["version"]
        if model is None or version != header.base:
            drop_state(context, name=_MODEL)
            raise Refusal(
                "compression",
                "this client does not hold the model to which the message is a delta; the server "
                "will send the whole model next time",
            )
        if header.version == header.base:  # the client has this model already
            return key, model["arrays"]
        arrays = decode(arrays, model["arrays"])
    else:
        for array in arrays.values():
            from_array(array)  # raises ValueError if the array holds other bytes than it declares
    if header.version:
        save_state(context, name=_MODEL, version=header.version, arrays=arrays)
    return key, arrays


def _encode(
    content: RecordDict,
    received: ArrayRecord,
    context: Context,
    header: protocol.CompressionHeader,
) -> None:
    """Compress the reply's arrays in place, and save the residual for the next reply."""
    for key, arrays in list(content.array_records.items()):
        name = f"{_RESIDUAL}.{key}"
        saved = restore_state(context, name=name)
        residual: dict[str, Tensor] = {}
        if saved and saved["codec"] == header.uplink:
            share = codec(header.uplink).feedback
            residual = {name: share * loss for name, loss in saved["residual"].items()}
        encoded = encode(arrays, received, header.uplink, residual)
        save_state(context, name=name, codec=header.uplink, residual=encoded.residual)
        content[key] = encoded.arrays
