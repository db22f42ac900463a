import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert found is not None
    return found[1]


def run(code: str, directory: Path) -> str:
    script = directory / "example.py"
    script.write_text(code, encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=300
    )
    printed = finished.stdout + finished.stderr
    assert finished.returncode == 0, printed
    return printed


def test_the_first_example_says_that_the_weights_arrived(tmp_path: Path) -> None:
    assert "the client has the server's weights: True" in run(example("example"), tmp_path)


def test_the_federation_of_a_cnn_runs_in_less_than_thirty_lines_and_learns(tmp_path: Path) -> None:
    code = example("federation")
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    printed = run(code, tmp_path)
    [final] = re.findall(r"\{ 1: .*?\}\}", re.sub(r"INFO.*?\t", "", printed), flags=re.DOTALL)[:1]
    losses = [float(loss) for loss in re.findall(r"'loss': '(.*?)'", final)]
    assert len(losses) == 3
    assert losses[2] < losses[0]
