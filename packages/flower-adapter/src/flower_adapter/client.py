"""A Flower `ClientApp` from a torch model and a train function.

When a ClientApp raises, Flower tells the server: in deployment the exception's type and text, in
simulation a traceback of Ray's with the text in it. Refusals of bad input and failed computations
(ValueError, ArithmeticError, OSError) are worth a plain sentence in both, so they are answered here
with an error reply of that sentence; everything else is left to Flower.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeAlias, TypeVar

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common.constant import ErrorCode
from torch import nn

from flower_adapter.arrays import entries, load_arrays, to_arrays
from flower_adapter.label import CLIENT, LABEL_ACTION, default_label, label_record
from flower_adapter.messages import config_of, error_for
from flower_adapter.selection import Selection
from flower_adapter.state import restore_state, save_state

Metrics: TypeAlias = Mapping[str, float | int]
Model = TypeVar("Model", bound=nn.Module)
BuildModel: TypeAlias = Callable[[ConfigRecord, Context], Model]
Work: TypeAlias = Callable[[Model, ConfigRecord, Context], Metrics]
PERSONAL = "flower-adapter.personal"  # the state of what is not shared
REFUSED = (ValueError, ArithmeticError, OSError)
Query: TypeAlias = Callable[[Context], ConfigRecord]
Handler: TypeAlias = Callable[[Message, Context], Message]

# Flower's own logger, so that the traceback appears in the client's log.
_logger = logging.getLogger("flwr")


def torch_client_app(
    build_model: BuildModel[Model],
    train: Work[Model],
    evaluate: Work[Model] | None = None,
    *,
    label: Callable[[Context], str] | None = None,
    queries: Mapping[str, Query] | None = None,
    select: Selection | None = None,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """A ClientApp that trains, and evaluates, the model that the server sends.

    On a train message the model of `build_model(config, context)` gets the server's arrays, goes
    through `train(model, config, context)`, and its arrays are sent back with the metrics that
    `train` returned. `evaluate` does the same without arrays in the reply; without it no evaluate
    message can be answered, so the strategy needs `fraction_evaluate=0`. Metrics are int or float
    by name, with "num-examples" greater than 0.

    Each reply carries `label(context)`, which must be the same in every run for `Seeded` to work.
    Its default is "partition 0007" for the node's partition-id 7, else the node id, which is new
    in every run.

    `queries` are further questions by name: a message of type "query.vocabulary" is answered with
    the record that the function under "vocabulary" returns, as the record "client" of the reply.

    With `select` (see `flower_adapter.selection`) the server's arrays and the reply's are those
    that it selects. What else is trained, and buffers, stay with the client, in its context, from
    round to round; what is neither selected nor trained is what `build_model` makes it.

    `mods` are Flower's and this package's, the outermost first: `[Durable("state"), wire_mod]`.

    A ValueError (ArrayMismatch is one), ArithmeticError or OSError that one of the functions raises
    is logged on the client with its traceback and sent to the server as "ValueError: its text",
    word for word.
    """
    label = label or default_label
    app = ClientApp(mods=list(mods))

    def run(work: Work[Model], message: Message, context: Context) -> tuple[str, Model, RecordDict]:
        key, arrays = _single_arrays(message)
        config = config_of(message)
        model = build_model(config, context)
        if select is not None:
            _load_personal(model, context, select)
        load_arrays(model, arrays, select=select)
        metrics = _checked_metrics(work(model, config, context), work)
        records = RecordDict({"metrics": metrics, CLIENT: label_record(label(context))})
        return key, model, records

    @app.train()
    @_refusing
    def handle_train(message: Message, context: Context) -> Message:
        key, model, records = run(train, message, context)
        records[key] = to_arrays(model, select=select)
        if select is not None:
            _save_personal(model, context, select)
        return Message(records, reply_to=message)

    if evaluate is not None:

        @app.evaluate()
        @_refusing
        def handle_evaluate(message: Message, context: Context) -> Message:
            _, _, records = run(evaluate, message, context)
            return Message(records, reply_to=message)

    answers = {LABEL_ACTION: lambda context: label_record(label(context)), **(queries or {})}
    for action, answer in answers.items():
        app.query(action)(_answering(answer))
    return app


def _answering(answer: Query) -> Handler:
    @_refusing
    def handle_query(message: Message, context: Context) -> Message:
        return Message(RecordDict({CLIENT: answer(context)}), reply_to=message)

    return handle_query


def _refusing(handler: Handler) -> Handler:
    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except REFUSED as err:
            _logger.error("%s refused", message.metadata.message_type, exc_info=err)
            error = error_for(err, ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
            return Message(error, reply_to=message)

    return handle


def _personal(model: nn.Module, select: Selection) -> set[str]:
    """Names of what a client trains, or counts, but does not share; not what is frozen."""
    return {
        entry.name
        for entry in entries(model)
        if not select(entry)
        and (entry.tensor.requires_grad or not isinstance(entry.tensor, nn.Parameter))
    }


def _save_personal(model: nn.Module, context: Context, select: Selection) -> None:
    names = _personal(model, select)
    if names:
        arrays = to_arrays(model, select=lambda entry: entry.name in names)
        save_state(context, name=PERSONAL, valid_for=model, arrays=arrays)


def _load_personal(model: nn.Module, context: Context, select: Selection) -> None:
    saved = restore_state(context, name=PERSONAL, valid_for=model)
    if saved is not None:
        names = _personal(model, select)
        load_arrays(model, saved["arrays"], select=lambda entry: entry.name in names)


def _single_arrays(message: Message) -> tuple[str, ArrayRecord]:
    records = list(message.content.array_records.items())
    if len(records) != 1:
        raise ValueError(f"the message holds {len(records)} ArrayRecords, should hold one")
    return records[0]


def _checked_metrics(metrics: Metrics, work: Work[Any]) -> MetricRecord:
    source = getattr(work, "__qualname__", repr(work))
    for name, value in metrics.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(
                f"{source} returned {name} = {value!r} ({type(value).__name__}), "
                "should be an int or a float"
            )
    num_examples = metrics.get("num-examples")
    if num_examples is None or not math.isfinite(num_examples) or num_examples <= 0:
        raise ValueError(f"{source} returned num-examples {num_examples}, should be above 0")
    return MetricRecord(dict(metrics))
