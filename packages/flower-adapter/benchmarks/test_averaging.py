"""Average replies of 10.6 million parameters, compared with Flower's own function."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from flower_adapter.arrays import npy
from flower_adapter.arrays.average import average_arrays

SHAPES = [(1152, 384), (384, 384), (1536, 384), (384, 1536)] * 6 + [(65, 384)]
DISTINCT = 10  # replies; a hundred of them would take 4 GB


@pytest.fixture(scope="module")
def replies() -> list[RecordDict]:
    rng = np.random.default_rng(0)

    def reply() -> RecordDict:
        arrays = {
            str(i): npy.to_array(rng.standard_normal(shape, np.float32))
            for i, shape in enumerate(SHAPES)
        }
        metrics = MetricRecord({"num-examples": int(rng.integers(1, 100))})
        return RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})

    return [reply() for _ in range(DISTINCT)]


@pytest.mark.parametrize("count", [10, 100])
def test_average(compare: Callable[..., None], replies: list[RecordDict], count: int) -> None:
    chosen = replies * (count // DISTINCT)
    compare(
        lambda: average_arrays(
            (reply["arrays"], reply["metrics"]["num-examples"]) for reply in chosen
        ),
        lambda: aggregate_arrayrecords(chosen, "num-examples"),
        reference_name="aggregate_arrayrecords",
        amount=count,
        unit="replies",
        rounds=9 if count < 100 else 5,
    )
