"""Compare our code with a reference. Both run alternately in one benchmark."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    """Return a function that times `ours` with pytest-benchmark, and `reference` before each round.

    The benchmark's extra info holds the median of the reference. It also holds how much data one
    round processes: `amount` in `unit`.
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

        ours()  # warm-up of both sides
        reference()
        benchmark.pedantic(ours, setup=timed_reference, rounds=rounds)
        benchmark.extra_info.update(
            reference=reference_name,
            reference_seconds=median(reference_seconds),
            amount=amount,
            unit=unit,
        )

    return run
