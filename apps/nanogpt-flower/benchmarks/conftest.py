"""Compare our code with a reference. The reference runs before each round of our code."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    """Return a function that measures the time of our code and of a reference.

    Call it as `compare(ours, reference, reference_name=…, amount=…, unit=…)`. The two are measured
    in turn. The benchmark stores the median of the reference beside the times of our code.
    """

    def run(
        ours: Callable[[], object],
        reference: Callable[[], object],
        *,
        reference_name: str,
        amount: float,
        unit: str,
        rounds: int = 5,
    ) -> None:
        reference_seconds: list[float] = []

        def timed_reference() -> None:
            start = perf_counter()
            reference()
            reference_seconds.append(perf_counter() - start)

        ours()  # our code and the reference both warm up
        reference()
        benchmark.pedantic(ours, setup=timed_reference, rounds=rounds)
        benchmark.extra_info.update(
            reference=reference_name,
            reference_seconds=median(reference_seconds),
            amount=amount,
            unit=unit,
        )

    return run
