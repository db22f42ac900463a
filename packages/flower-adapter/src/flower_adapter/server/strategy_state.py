"""Save and load the state that a strategy keeps from round to round."""

from collections.abc import Iterator
from typing import Any

from flwr.serverapp import strategy as flower

from flower_adapter import protocol
from flower_adapter.server.streaming import StreamingFedAvg

# The attributes that change from round to round, for each strategy of Flower 1.41. Attributes that
# `configure_train` sets in every round are not in this table.
STATE_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    StreamingFedAvg: (),
    flower.FedAvg: (),
    flower.FedAvgM: ("current_arrays", "momentum_vector"),
    flower.FedAdam: ("m_t", "v_t"),
    flower.FedAdagrad: ("m_t", "v_t"),
    flower.FedYogi: ("m_t", "v_t"),
    flower.FedProx: (),
    flower.FedMedian: (),
    flower.FedTrimmedAvg: (),
    flower.Krum: (),
    flower.MultiKrum: (),
    flower.Bulyan: (),
    flower.QFedAvg: (),
    flower.FedXgbBagging: (),
    flower.FedXgbCyclic: ("registered_nodes",),
    flower.DifferentialPrivacyServerSideFixedClipping: (),
    flower.DifferentialPrivacyClientSideFixedClipping: (),
    flower.DifferentialPrivacyServerSideAdaptiveClipping: ("clipping_norm",),
    flower.DifferentialPrivacyClientSideAdaptiveClipping: ("clipping_norm",),
}


def with_inner(strategy: object) -> Iterator[object]:
    """Yield a strategy and each strategy inside it, such as the one in a privacy wrapper."""
    inner: object = strategy
    while inner is not None:
        yield inner
        inner = getattr(inner, "strategy", None)


def weight_key(strategy: object) -> str:
    """Return the name of the metric that the strategy uses as a reply's weight.

    If strategies wrap each other, it is the `weighted_by_key` of the outermost one that has this
    attribute. If none has it, the name is "num-examples".
    """
    for inner in with_inner(strategy):
        key = getattr(inner, "weighted_by_key", None)
        if isinstance(key, str):
            return key
    return protocol.NUM_EXAMPLES


def strategy_state(strategy: object) -> list[list[Any]]:
    """Return the class name and state of a strategy and of each strategy inside it.

    Raises:
        TypeError: a strategy is not one of Flower's own and lacks `state_dict` or
            `load_state_dict`, or a strategy of Flower has a privacy accountant. The accountant's
            state cannot be saved.
    """
    return [[type(inner).__name__, _state(inner)] for inner in with_inner(strategy)]


def load_strategy_state(strategy: object, state: list[list[Any]]) -> None:
    """Load a state that `strategy_state` returned.

    Raises:
        ValueError: the state belongs to other strategies.
    """
    saved = [name for name, _ in state]
    here = [type(inner).__name__ for inner in with_inner(strategy)]
    if saved != here:
        raise ValueError(
            f"the saved run had the strategy {_nested(saved)}, this run has {_nested(here)}"
        )
    for inner, (_, values) in zip(with_inner(strategy), state, strict=True):
        if _keeps_own_state(inner):
            inner.load_state_dict(values)  # type: ignore[attr-defined]
        else:
            vars(inner).update(values)


def _state(strategy: object) -> Any:
    if _keeps_own_state(strategy):
        return strategy.state_dict()  # type: ignore[attr-defined]
    name = type(strategy).__name__
    if type(strategy) not in STATE_ATTRIBUTES:
        raise TypeError(
            f"{name} is not a strategy of Flower, so checkpoints need its methods state_dict and "
            "load_state_dict"
        )
    if getattr(strategy, "accountant", None) is not None:
        raise TypeError(f"{name} has an accountant, whose state cannot be saved in a checkpoint")
    return {
        attribute: getattr(strategy, attribute) for attribute in STATE_ATTRIBUTES[type(strategy)]
    }


def _keeps_own_state(strategy: object) -> bool:
    return all(
        callable(getattr(strategy, name, None)) for name in ("state_dict", "load_state_dict")
    )


def _nested(names: list[str]) -> str:
    return "(".join(names) + ")" * (len(names) - 1)
