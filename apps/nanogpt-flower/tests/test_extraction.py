"""Attack the app's own client, and read its text from its updates. See `benchmarks/extraction.py`.

These tests show what an update tells, with and without the default policy.
"""

import importlib.util
import random
import string
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nanogpt_flower.settings import Settings
from shakespeare_data import Partition, load_corpus, partition

pytestmark = pytest.mark.deployed

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "extraction.py"


@pytest.fixture(scope="module")
def extraction() -> ModuleType:
    spec = importlib.util.spec_from_file_location("extraction", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["extraction"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Partition:
    """The text of the client, and a text of the same kind that the attacker knows."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_letters, k=rng.randint(2, 9))) for _ in range(500)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(25_000)), encoding="utf-8")
    return partition(load_corpus(str(path)), 2)


@pytest.fixture
def attack(extraction: ModuleType, parts: Partition, tmp_path: Path) -> Callable[..., Any]:
    """`attack(name, settings)`: attack a client of a deployment. It has the default policy."""
    directory = parts.write(tmp_path / "parts")[0]
    client = extraction.Client(directory, parts[0].train, parts[0].tokenizer)
    anything = tmp_path / "policy.toml"
    anything.write_text(extraction.NO_POLICY, encoding="utf-8")

    def run(name: str, settings: dict[str, Any], *, with_policy: bool = True) -> Any:
        chosen = Settings.from_run_config(extraction.ATTACKER | settings)
        known_text = parts[1].train.astype(np.int64)
        victim = client if with_policy else replace(client, policy=anything)
        return extraction.attack(name, chosen, victim, known_text)

    return run


def test_the_update_of_one_window_gives_the_window_character_by_character(
    extraction: ModuleType, attack: Callable[..., Any]
) -> None:
    found = attack("single_window", extraction.ONE_WINDOW, with_policy=False)
    assert found.score.windows == 1
    assert found.score.run == 401
    assert found.score.exact == 1


def test_the_default_policy_refuses_a_round_of_one_window(
    extraction: ModuleType, attack: Callable[..., Any]
) -> None:
    with pytest.raises(extraction.Refused, match="policy: batch-size is 1"):
        attack("single_window", extraction.ONE_WINDOW)


def test_with_the_default_policy_the_same_weights_give_no_more_than_a_blind_guess(
    attack: Callable[..., Any],
) -> None:
    found = attack("single_window", {"n-embd": 64, "n-layer": 1})
    assert found.score.windows == 2080
    assert found.score.exact == 0
    assert found.score.share < found.baseline


def test_the_default_policy_does_not_prevent_an_attack_with_gates_in_the_weights(
    attack: Callable[..., Any],
) -> None:
    # No floor on windows, steps or tokens prevents it. If this test fails because something new
    # does, SECURITY.md can promise more.
    found = attack("gates", {"n-embd": 128})
    assert found.score.windows == 2080
    assert found.score.exact >= 10
    assert found.score.run == 31
    assert found.loss < 5  # the loss of a model that knows nothing is 4


def test_a_run_is_the_longest_stretch_of_right_characters(extraction: ModuleType) -> None:
    assert extraction.longest_run(np.array([0, 1, 1, 0, 1, 1, 1, 0, 1], bool)) == 3
    assert extraction.longest_run(np.zeros(4, bool)) == 0
    assert extraction.longest_run(np.ones(4, bool)) == 4
