"""Attack the app's own client, and read its text from its updates. See `benchmarks/extraction.py`.

These tests show what an update tells. They do not show that anything is safe.
"""

import importlib.util
import random
import string
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nanogpt_flower.settings import Settings
from shakespeare_data import Part, load_corpus, partition

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
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Part, Part]:
    """The text of the client, and a text of the same kind that the attacker knows."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_letters, k=rng.randint(2, 9))) for _ in range(500)]
    text = " ".join(rng.choice(words) for _ in range(8000))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text, encoding="utf-8")
    first, second = partition(load_corpus(str(path)), 2)
    return first, second


def attacked(extraction: ModuleType, name: str, parts: tuple[Part, Part], **changed: Any) -> Any:
    given = {key.replace("_", "-"): value for key, value in changed.items()}
    settings = Settings.from_run_config(extraction.ATTACKER | given)
    known_text = parts[1].train.astype(np.int64)
    return extraction.attack(name, settings, parts[0], known_text)


def test_the_update_of_one_window_gives_the_window_character_by_character(
    extraction: ModuleType, parts: tuple[Part, Part]
) -> None:
    one = {"block_size": 400, "batch_size": 1, "max_steps": 1, "n_layer": 1, "n_embd": 64}
    found = attacked(extraction, "single_window", parts, learning_rate=1e-3, **one)
    assert found.score.windows == 1
    assert found.score.run == 401
    assert found.score.exact == 1


def test_the_same_weights_give_no_more_than_a_blind_guess_from_many_windows(
    extraction: ModuleType, parts: tuple[Part, Part]
) -> None:
    many = {"batch_size": 64, "max_steps": 5, "n_layer": 1, "n_embd": 64, "block_size": 64}
    found = attacked(extraction, "single_window", parts, learning_rate=1e-3, **many)
    assert found.score.windows == 320
    assert found.score.exact == 0
    assert found.score.share < found.baseline + 0.1


def test_gates_in_the_weights_give_whole_windows_out_of_many(
    extraction: ModuleType, parts: tuple[Part, Part]
) -> None:
    # No floor on windows, steps or tokens prevents this attack. SECURITY.md says so.
    found = attacked(extraction, "gates", parts, n_embd=128)
    assert found.score.windows == 320
    assert found.score.exact >= 10
    assert found.score.run == 63
    assert found.loss < 5  # the first loss is that of a model that knows nothing


def test_a_run_is_the_longest_stretch_of_right_characters(extraction: ModuleType) -> None:
    assert extraction.longest_run(np.array([0, 1, 1, 0, 1, 1, 1, 0, 1], bool)) == 3
    assert extraction.longest_run(np.zeros(4, bool)) == 0
    assert extraction.longest_run(np.ones(4, bool)) == 4
