"""Define a fixture that measures our code and reference code alternately in one run."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    """Return a function that measures `ours` and `reference` alternately.

    The function stores the median time of `ours` and the median time of `reference`. `amount` and
    `unit` say how much data one call processes.
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

        ours()  # warm up both
        reference()
        benchmark.pedantic(ours, setup=timed_reference, rounds=rounds)
        benchmark.extra_info.update(
            reference=reference_name,
            reference_seconds=median(reference_seconds),
            amount=amount,
            unit=unit,
        )

    return run
