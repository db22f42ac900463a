"""A fixture that measures gpt-core and a reference in turns, in one run."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    """Return a function that measures `ours` with pytest-benchmark and `reference` beside it.

    The reference runs before each round of `ours`, so that both see the same load of the machine.
    Its median time goes into the report. `amount` counts the work of one call in `unit`.
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

        ours()  # one call of each to warm up
        reference()
        benchmark.pedantic(ours, setup=timed_reference, rounds=rounds)
        benchmark.extra_info.update(
            reference=reference_name,
            reference_seconds=median(reference_seconds),
            amount=amount,
            unit=unit,
        )

    return run
