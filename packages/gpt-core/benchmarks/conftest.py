"""Define a fixture that measures gpt-core and a reference alternately, in one run."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    """Return a function that measures `ours` with pytest-benchmark, and also measures `reference`.

    `reference` runs before each round of `ours`, so that the load on the machine is the same for
    both functions. The report contains the median time of `reference`. `amount` is the work done in
    one call, measured in `unit`.
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

        ours()  # one call of each function to warm up
        reference()
        benchmark.pedantic(ours, setup=timed_reference, rounds=rounds)
        benchmark.extra_info.update(
            reference=reference_name,
            reference_seconds=median(reference_seconds),
            amount=amount,
            unit=unit,
        )

    return run
