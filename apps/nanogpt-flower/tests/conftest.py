import random
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from flower_adapter.testing import LocalGrid
from nanogpt_flower.client_app import app as client_app
from nanogpt_flower.server_app import main
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, load_corpus

APP = Path(__file__).parents[1]
# The package `faults` lies beside the app. At the end of the path, it hides no installed package.
sys.path.append(str(APP))
TINY = {
    "n-layer": 1,
    "n-head": 2,
    "n-embd": 16,
    "block-size": 16,
    "batch-size": 8,
    "max-steps": 20,
    "num-server-rounds": 2,
    "sample-tokens": 20,
    "round-sample-tokens": 10,
    "device": "cpu",
    "learning-rate": 0.01,
}


@pytest.fixture(autouse=True, scope="session")
def ray() -> Iterator[SimpleNamespace]:
    """Take the place of Ray, in whose processes clients are simulated."""
    ray = SimpleNamespace(runs=True)
    ray.is_initialized = lambda: ray.runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        yield ray


@pytest.fixture(autouse=True)
def simulated(request: pytest.FixtureRequest, ray: SimpleNamespace) -> Iterator[None]:
    """Let clients in this process be simulated ones, unless the test is marked "deployed"."""
    ray.runs = request.node.get_closest_marker("deployed") is None
    yield
    ray.runs = True


# A policy without floors, for tiny models and short runs.
LOOSE_POLICY = """
min-replies = 1
max-rounds = 1_000
max-rounds-per-day = 10_000
max-rounds-in-all = 10_000

[run-config]
batch-size = { min = 1 }
block-size = { min = 1 }
max-steps = { min = 0 }
learning-rate = { min = 0 }
n-embd = { min = 1 }

[limits]
characters = { min = 0 }
steps = { min = 0 }
windows = { min = 0 }
tokens = { min = 0 }
learning-rate-sum = { min = 0 }
"""


@pytest.fixture(scope="session")
def app_directory() -> Path:
    return APP


@pytest.fixture(scope="session")
def default_run_config() -> dict[str, Any]:
    project = tomllib.loads((APP / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(project["tool"]["flwr"]["app"]["config"])


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 8,000 characters that a tiny model can learn."""
    choice = random.Random(0).choice
    words = [choice(["to be", "or not", "my lord", "good night", "sweet"]) for _ in range(2000)]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(words)[:8000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> dict[str, Any]:
    return TINY | {"corpus": str(text_file)}


@pytest.fixture
def to_clients(text_file: Path) -> ConfigRecord:
    """The config that the server sends with the model."""
    corpus = load_corpus(str(text_file))
    tokenizer = CharTokenizer.from_text(corpus.text)
    return ConfigRecord(
        {
            "tokenizer": tokenizer.to_json(),
            "corpus": corpus.name,
            "corpus-sha256": corpus.sha256,
            "server-round": 1,
        }
    )


@pytest.fixture
def context(default_run_config: dict[str, Any], tiny: dict[str, Any]) -> Callable[..., Context]:
    def make(node_config: dict[str, Any] | None = None, **run_config: Any) -> Context:
        node = {"partition-id": 0, "num-partitions": 2} if node_config is None else node_config
        changed = {key.replace("_", "-"): value for key, value in run_config.items()}
        config = default_run_config | tiny | changed
        return Context(1, 2, node, RecordDict(), config)

    return make


@pytest.fixture(scope="session")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy for tiny models and short runs."""
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_text(LOOSE_POLICY, encoding="utf-8")
    return path


RunApp = Callable[..., Path]


@pytest.fixture(scope="session")
def run_app(policy_file: Path) -> RunApp:
    """`run_app(settings, num_clients)`: the whole app in this process; returns its run directory.

    `data_paths` gives each client a directory in place of a partition. In a test that is marked
    "deployed" these clients are those of `run --deploy`.
    """

    def run(
        settings: dict[str, Any],
        num_clients: int = 2,
        data_paths: Sequence[Path] = (),
        run_id: int = 1,
    ) -> Path:
        names = {
            "min-clients": num_clients,
            "min-replies": min(2, num_clients),
            "run-name": str(run_id),
        }
        config = Settings.from_run_config({**names, **settings})
        run_config = config.to_run_config()
        grid = LocalGrid(client_app, num_clients, run_config=run_config, run_id=run_id)
        for partition, path in enumerate(data_paths):
            grid.contexts[grid.node(partition)].node_config.update(
                {"data-path": str(path), "reproducible": True, "policy": str(policy_file)}
            )
        main(grid, Context(run_id, 0, {}, RecordDict(), run_config))
        return Path(config.resume_from or Path(config.output_dir) / config.run_name)

    return run
