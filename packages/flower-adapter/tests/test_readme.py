import re
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from flower_adapter.testing import LocalGrid

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert found is not None
    return found[1]


def losses_in(log: str) -> list[float]:
    """Return the training loss of each round from the final lines of a log."""
    final = re.findall(r"\{ 1: .*?\}\}", re.sub(r"INFO.*?\t", "", log), flags=re.DOTALL)[0]
    return [float(loss) for loss in re.findall(r"'loss': '(.*?)'", final)]


def test_the_first_example_says_that_the_weights_arrived(
    capsys: pytest.CaptureFixture[str],
) -> None:
    exec(example("example"), {})
    assert "the client has the server's weights: True" in capsys.readouterr().out


def test_the_federation_of_a_cnn_has_less_than_thirty_lines_and_learns(
    monkeypatch: pytest.MonkeyPatch, flower_log: pytest.LogCaptureFixture
) -> None:
    def in_one_process(server_app: ServerApp, client_app: ClientApp, num_supernodes: int) -> None:
        server_app(LocalGrid(client_app, num_supernodes), Context(1, 0, {}, RecordDict(), {}))

    monkeypatch.setattr("flwr.simulation.run_simulation", in_one_process)
    code = example("federation")
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    exec(code, {})
    losses = losses_in(flower_log.text)
    assert len(losses) == 3
    assert losses[2] < losses[0]


@pytest.mark.slow
def test_the_federation_of_a_cnn_learns_in_flowers_simulation(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example("federation"), encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    losses = losses_in(finished.stdout + finished.stderr)
    assert len(losses) == 3
    assert losses[2] < losses[0]
