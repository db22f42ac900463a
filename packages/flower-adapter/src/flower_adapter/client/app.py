"""Build a Flower `ClientApp` from a torch model and a train function.

The client answers every message. If a function raises an exception, the server gets an error reply
with a code and a sentence. The exception and its traceback go to the client's log alone (see
`flower_adapter.client.refusals`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.overrides import TorchFunctionMode

from flower_adapter import protocol
from flower_adapter._flwr import Mod
from flower_adapter.arrays.convert import check_fit, entries, load_arrays, to_arrays
from flower_adapter.arrays.selection import Selection
from flower_adapter.client.refusals import Refusal, refusing_mod
from flower_adapter.client.state import restore_state, save_state

Metrics: TypeAlias = Mapping[str, float | int]
Model = TypeVar("Model", bound=nn.Module)
BuildModel: TypeAlias = Callable[[ConfigRecord, Context], Model]
Work: TypeAlias = Callable[[Model, ConfigRecord, Context], Metrics]
Query: TypeAlias = Callable[[Context], ConfigRecord]
Handler: TypeAlias = Callable[[Message, Context], Message]


def torch_client_app(
    build_model: BuildModel[Model],
    train: Work[Model],
    evaluate: Work[Model] | None = None,
    *,
    label: Callable[[Context], str] = protocol.default_label,
    queries: Mapping[str, Query] | None = None,
    select: Selection | None = None,
    skeleton: BuildModel[Model] | None = None,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """Return a ClientApp that trains and evaluates the model that the server sends.

    For each train message, `build_model(config, context)` makes the model, and the server's arrays
    are loaded into it. Then `train(model, config, context)` trains the model and returns metrics.
    The reply carries the model's arrays and these metrics. An evaluate message calls `evaluate` in
    the same way, and its reply carries metrics only. Without `evaluate` the client cannot answer
    evaluate messages, so the strategy needs `fraction_evaluate=0`.

    Args:
        build_model: makes the module on the client.
        train: returns int or float metrics by name, with "num-examples" above 0.
        evaluate: returns metrics in the same form.
        label: returns the name of the client. The name should be the same in every run, for
            example a digest of the client's data. The default is "partition 0007" for
            partition-id 7. Without a partition-id the default is the node id, which is new in every
            run.
        queries: functions that answer the server's query messages, by name. The function named
            "vocabulary" answers messages of type "query.vocabulary". The reply carries the
            function's result as the record "client".
        select: chooses the arrays that travel (see `flower_adapter.arrays.selection`). Trained
            parameters and buffers that are not selected stay in the client's context from round to
            round. Frozen parameters that are not selected keep the values from `build_model`.
        skeleton: makes the same module as `build_model`. It runs on torch's meta device, where
            tensors have a shape and no memory. The server's arrays are compared with this module
            before `build_model` takes any memory.
        mods: mods from Flower and from this package, the outermost first, for example
            `[DiskState("/data/state"), compression_mod]`.

    If one of the functions raises an exception, the client logs it with its traceback, and the
    server gets the name of the exception's class. To tell the server more, raise a `Refusal`.
    """
    app = _AnsweringClientApp([refusing_mod, *mods])

    def run(work: Work[Model], message: Message, context: Context) -> tuple[str, Model, RecordDict]:
        key, arrays = _single_arrays(message)
        config = protocol.config_of(message)
        if skeleton is not None:
            with torch.device("meta"), _WithoutInitialisation():
                check_fit(skeleton(config, context), arrays, select=select)
        model = build_model(config, context)
        if select is not None:
            _load_personal(model, context, select)
        load_arrays(model, arrays, select=select)
        metrics = _checked_metrics(work(model, config, context), work)
        client = protocol.label_record(label(context))
        return key, model, RecordDict({"metrics": metrics, protocol.CLIENT: client})

    @app.train()
    def handle_train(message: Message, context: Context) -> Message:
        key, model, records = run(train, message, context)
        records[key] = to_arrays(model, select=select)
        if select is not None:
            _save_personal(model, context, select)
        return Message(records, reply_to=message)

    if evaluate is not None:

        @app.evaluate()
        def handle_evaluate(message: Message, context: Context) -> Message:
            _, _, records = run(evaluate, message, context)
            return Message(records, reply_to=message)

    def answer_label(context: Context) -> ConfigRecord:
        return protocol.label_record(label(context))

    for action, answer in {protocol.LABEL_ACTION: answer_label, **(queries or {})}.items():
        app.query(action)(_answering(answer))
    return app


class _WithoutInitialisation(TorchFunctionMode):
    """A context in which the functions in `torch.nn.init` do nothing.

    On the meta device there is nothing to initialise, but the first random number there makes torch
    import its compiler, which takes more than a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class _AnsweringClientApp(ClientApp):
    """A ClientApp whose mods see every message, also one of a type that it does not answer.

    Flower's own ClientApp raises ValueError for such a message before it calls a mod.
    """

    def __init__(self, mods: Sequence[Mod]) -> None:
        super().__init__()
        handler: Handler = super().__call__
        for mod in reversed(mods):
            handler = partial(_handle, mod, handler)
        self._handler = handler

    def __call__(self, message: Message, context: Context) -> Message:
        return self._handler(message, context)


def _handle(mod: Mod, call_next: Handler, message: Message, context: Context) -> Message:
    return mod(message, context, call_next)


def _answering(answer: Query) -> Handler:
    def handle_query(message: Message, context: Context) -> Message:
        return Message(RecordDict({protocol.CLIENT: answer(context)}), reply_to=message)

    return handle_query


def _personal(model: nn.Module, select: Selection) -> set[str]:
    """Return the names of the buffers and trainable parameters that are not selected."""
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
        save_state(context, name=protocol.PERSONAL, valid_for=model, arrays=arrays)


def _load_personal(model: nn.Module, context: Context, select: Selection) -> None:
    saved = restore_state(context, name=protocol.PERSONAL, valid_for=model)
    if saved is not None:
        names = _personal(model, select)
        load_arrays(model, saved["arrays"], select=lambda entry: entry.name in names)


def _single_arrays(message: Message) -> tuple[str, ArrayRecord]:
    records = list(message.content.array_records.items())
    if len(records) != 1:
        raise Refusal("message", f"holds {len(records)} ArrayRecords, should hold one")
    return records[0]


def _checked_metrics(metrics: Metrics, work: Work[Any]) -> MetricRecord:
    source = getattr(work, "__qualname__", repr(work))
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{source} returned {metrics!r}, should return metrics by name")
    for name, value in metrics.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(
                f"{source} returned {name} = {value!r} ({type(value).__name__}), "
                "should be an int or a float"
            )
    num_examples = metrics.get(protocol.NUM_EXAMPLES)
    if num_examples is None or not math.isfinite(num_examples) or num_examples <= 0:
        raise ValueError(
            f"{source} returned {protocol.NUM_EXAMPLES} {num_examples}, should be above 0"
        )
    return MetricRecord(dict(metrics))
