"""Every Python example in the READMEs runs.

Most examples need nothing else. The others are continued by the tests with the names that the
README takes for granted.
"""

import json
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.app import Context, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from readmes import READMES, Block, blocks
from safetensors.torch import load_file, save_file

import flower_adapter
import gpt_core
from flower_adapter.testing import LocalGrid

GPT_CORE, ADAPTER = "packages/gpt-core/README.md", "packages/flower-adapter/README.md"
DATA = "packages/shakespeare-data/README.md"
EXAMPLES = [block for readme in READMES for block in blocks(readme, "python")]
STANDALONE = [block for block in EXAMPLES if block.readme not in (GPT_CORE, ADAPTER)]
STANDALONE += [next(block for block in EXAMPLES if block.readme == GPT_CORE)]


def run(block: Block, names: dict[str, Any], **replaced: str) -> None:
    """Run an example. An error names its README and its line."""
    text = block.text
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    exec(compile("\n" * (block.line - 1) + text, block.readme, "exec"), names)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory. Tiny Shakespeare is not available, so the nine plays are used."""
    monkeypatch.setenv("SHAKESPEARE_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SHAKESPEARE_DATA_URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("example", STANDALONE, ids=lambda block: f"{block.readme}:{block.line}")
def test_an_example_runs(example: Block, capsys: pytest.CaptureFixture[str]) -> None:
    if "datasets/" in example.text:  # the README's first commands write this directory
        commands = blocks(DATA, "console")[0].commands
        write = next(command for command in commands if command.startswith("shakespeare-data"))
        program, *arguments = shlex.split(write)
        path = Path(sysconfig.get_path("scripts")) / program
        subprocess.run([path, *arguments], check=True)
    run(example, {})
    assert bool(capsys.readouterr().out) == ("print(" in example.text)


def test_the_example_of_conversion_runs_with_a_tiny_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nox -s parity` converts models of the real `transformers`."""
    config = gpt_core.GPTConfig(50257, block_size=16, n_layer=1, n_head=1, n_embd=4, dropout=0.0)
    model = gpt_core.GPT(config)
    weights, settings = gpt_core.to_hf_gpt2(model)

    class GPT2LMHeadModel(torch.nn.Module):
        config = settings

        @classmethod
        def from_pretrained(cls, name: str) -> "GPT2LMHeadModel":
            return cls()

        def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
            return dict(weights)

    transformers = ModuleType("transformers")
    vars(transformers)["GPT2LMHeadModel"] = GPT2LMHeadModel
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, "model.safetensors")
    Path("config.json").write_text(json.dumps(settings), encoding="utf-8")
    gpt_core.to_nanogpt_checkpoint(model, "out-shakespeare-char/ckpt.pt")
    names = {name: getattr(gpt_core, name) for name in gpt_core.__all__}
    names |= {"json": json, "load_file": load_file}
    names |= {"prompt": torch.tensor([1]), "a_longer_prompt": torch.tensor([1, 2])}
    first, *others = blocks(GPT_CORE, "python")
    assert first in STANDALONE
    for example in others:
        run(example, names)
    assert len(names["rows"]) == 2


def test_the_examples_of_flower_adapter_run_one_after_another(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_one_process(server_app: ServerApp, client_app: ClientApp, num_supernodes: int) -> None:
        server_app(LocalGrid(client_app, num_supernodes), Context(1, 0, {}, RecordDict(), {}))

    monkeypatch.setattr("flwr.simulation.run_simulation", in_one_process)
    names: dict[str, Any] = {}
    first, federation, client, server, state, policy, testing = blocks(ADAPTER, "python")
    run(first, names)
    run(federation, names)
    names |= {name: getattr(flower_adapter, name) for name in flower_adapter.__all__}
    model = names["build_model"](None, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names |= {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "steps": 1,
        "context": Context(1, 1, {}, RecordDict(), {}),
        "evaluate": lambda model, config, context: {"loss": 1.0, "num-examples": 1},
        "measure": lambda config, context: {"parameters": 1},
        "evaluate_on_server": lambda server_round, arrays: MetricRecord({"val-loss": 1.0}),
    }
    run(client, names, **{"/data/state": str(directory / "state")})
    names["grid"] = LocalGrid(names["app"], 3)
    run(server, names, **{"num_rounds=100": "num_rounds=2"})
    assert list((directory / "checkpoints").glob("round-*"))
    assert list((directory / "state").iterdir())
    run(state, names)
    assert names["saved"] is not None
    (rules,) = blocks(ADAPTER, "toml")
    (tmp_path / "policy.toml").write_text(rules.text, encoding="utf-8")
    run(policy, names | {"state": tmp_path})
    run(testing, names)
