"""Measure how far colluding clients can move the average of a round.

    python benchmarks/colluders.py

`k` of `n` clients collude. Their updates have one common direction, to which the honest updates are
orthogonal. Each round goes through `run_rounds` and its guard, in one process. The table gives the
distance between the average with the colluders and the average of the honest clients alone, in
units of the median norm of the honest updates. The colluders try

- order: their labels sort first or last, and their replies arrive first or last,
- norm: their updates are as long as the guard lets pass, in several lengths,
- weight: they claim as many examples as the protocol can carry,
- all of this together.

The bound is what the rules say: with weights w and norms r of the colluders after the guard, and
total honest weight W, the colluders move the average by at most

    (k w / (k w + W)) (r + a),   a = norm of the average of the honest clients.

The guard takes r from the median norm and w from the median weight. While the colluders are fewer
than half, both medians are at most the largest value of an honest client.
"""

import argparse
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from flower_adapter import Guard, StreamingFedAvg, protocol, run_rounds
from flower_adapter.testing import LocalGrid

SIZE = 1000  # values in the model
SEEDS = range(3)
MOST_EXAMPLES = 2**53
RULES = {
    "old": Guard(max_norm_ratio=100.0, max_weight_ratio=1000.0, clip_norm_ratio=None),
    "new": Guard(),
}


@dataclass(frozen=True)
class Plan:
    """The acts of the colluders. The honest clients' labels are "m…"."""

    label: str = "m"
    arrive_first: bool = True
    norm: float = 1.0  # in units of the honest median
    examples: int = 0  # 0: the median of the honest clients


def plans(by: str) -> Iterator[Plan]:
    """Yield the plans of one kind of collusion."""
    # 99 is below the ratio at which an update is left out, 2.9 below that at which it is clipped
    norms = (2.9, 10.0, 50.0, 80.0, 99.0) if by in ("norm", "all") else (1.0,)
    examples = (MOST_EXAMPLES,) if by in ("weight", "all") else (0,)
    orders = product("az", (True, False)) if by in ("order", "all") else [("m", True)]
    for (label, arrive_first), norm, count in product(orders, norms, examples):
        yield Plan(label, arrive_first, norm, count)


class Round(LocalGrid):
    """One round with `n` clients, of whom the first `k` collude."""

    def __init__(self, n: int, k: int, plan: Plan, seed: int) -> None:
        super().__init__(ClientApp(), n, seed=seed)
        rng = np.random.default_rng(seed)
        self.plan, self.k = plan, k
        norms = rng.lognormal(0.0, 0.2, n)  # honest clients differ by a few tens of percent
        self.examples = rng.integers(50_000, 150_000, n)
        directions = rng.normal(size=(n, SIZE))
        directions[:, 0] = 0.0  # the direction of the colluders
        self.updates = directions * (norms / np.linalg.norm(directions, axis=1))[:, None]
        self.unit = float(np.median(norms[k:]))
        self.updates[:k] = 0.0
        self.updates[:k, 0] = plan.norm * self.unit
        self.examples[:k] = plan.examples or np.median(self.examples[k:])

    def reply(self, message: Message) -> Message:
        index = self.partition(message.metadata.dst_node_id)
        label = f"{self.plan.label if index < self.k else 'm'} {index:02d}"
        content = RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(self.updates[index].astype(np.float32))}),
                "metrics": MetricRecord({"num-examples": int(self.examples[index])}),
                protocol.CLIENT: ConfigRecord({protocol.LABEL: label}),
            }
        )
        if message.metadata.message_type == protocol.LABEL_QUERY:
            content = RecordDict({protocol.CLIENT: content[protocol.CLIENT]})
        return Message(content, reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        def colludes(reply: Message) -> bool:
            return self.partition(reply.metadata.src_node_id) < self.k

        replies = super().pull_messages(message_ids)
        return sorted(replies, key=colludes, reverse=self.plan.arrive_first)

    def shift(self, guard: Guard) -> float:
        """Return how far the colluders move the average, in honest norms."""
        start = ArrayRecord({"w": Array(np.zeros(SIZE, np.float32))})
        strategy = StreamingFedAvg(fraction_evaluate=0.0, min_available_nodes=2)
        result = run_rounds(self, strategy, start, num_rounds=1, guard=guard, seed=0)
        moved = result.arrays["w"].numpy().astype(np.float64) - self.honest_average()
        return float(np.linalg.norm(moved)) / self.unit

    def honest_average(self) -> NDArray[np.float64]:
        return np.average(self.updates[self.k :], axis=0, weights=self.examples[self.k :])

    def bound(self, guard: Guard) -> float:
        """Return the largest shift that the rules allow, in honest norms."""
        assert guard.max_norm_ratio is not None
        assert guard.max_weight_ratio is not None
        norms = np.linalg.norm(self.updates[self.k :], axis=1)
        ratio = min(guard.max_norm_ratio, guard.clip_norm_ratio or math.inf)
        longest = ratio * norms.max() / self.unit
        own = self.k * guard.max_weight_ratio * self.examples[self.k :].max()
        share = own / (own + self.examples[self.k :].sum())
        return float(share * (longest + np.linalg.norm(self.honest_average()) / self.unit))


def largest_shift(n: int, k: int, by: str, guard: Guard) -> float:
    return max(Round(n, k, plan, seed).shift(guard) for plan in plans(by) for seed in SEEDS)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    kinds = ("order", "norm", "weight", "all")
    print(f"{'clients':>8}{'colluders':>11}{'rules':>7}", *(f"{by:>8}" for by in kinds), "  bound")
    for n in (3, 10, 50):
        for k in sorted({1, (n - 1) // 4 or 1, (n - 1) // 2}):
            for name, guard in RULES.items():
                shifts = [largest_shift(n, k, by, guard) for by in kinds]
                bound = max(Round(n, k, Plan(), seed).bound(guard) for seed in SEEDS)
                line = " ".join(f"{value:8.2f}" for value in (*shifts, bound))
                print(f"{n:8}{k:11}{name:>7} {line}", flush=True)
                if max(shifts) > bound:
                    raise SystemExit("the colluders have moved the average beyond the bound")


if __name__ == "__main__":
    main()
