"""Real runs of Flower's two runtimes, with a tiny model.

Everything that needs none of Flower's processes is tested in test_app.py.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from nanogpt_flower import progress
from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.local.federation import Federation, LocalRunError
from nanogpt_flower.local.processes import processes
from nanogpt_flower.runs import state_of
from nanogpt_flower.trained import evaluate_run
from shakespeare_data import load_corpus, partition

PR_SET_CHILD_SUBREAPER = 36  # of Linux' prctl
ROUNDS = 4


def command(*arguments: str, **settings: Any) -> list[str]:
    """Return a command line of `nanogpt-flower`. The settings have "_" in place of "-"."""
    pairs = [f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in settings.items()]
    return [str(Path(sys.executable).with_name("nanogpt-flower")), *arguments, *pairs]


def run(*arguments: str, **settings: Any) -> tuple[int, str]:
    """Run `nanogpt-flower`. Return its exit status and everything that it printed."""
    finished = subprocess.run(
        command(*arguments, **settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return finished.returncode, finished.stdout + finished.stderr


def run_directories(output: Path) -> list[Path]:
    return sorted(output.iterdir()) if output.exists() else []


EARLIER: set[psutil.Process] = set()  # processes that other test files have started


def descendants() -> list[psutil.Process]:
    """Return all living processes that the tests of this file started, directly or not."""
    children = set(psutil.Process().children(recursive=True)) - EARLIER
    return [process for process in children if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True, scope="module")
def orphans_become_children_of_this_process() -> None:
    """Let no process hide behind init. This comes before the fixtures that start federations."""
    EARLIER.update(descendants())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    assert descendants() == []


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a session of its own, and kill all that it started at the end."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            # Flower's programs and Ray's start sessions of their own.
            while living := descendants():
                for found in living:
                    with suppress(psutil.NoSuchProcess):
                        found.kill()
                psutil.wait_procs(living, timeout=0.2)
            process.wait()


class Resumed(NamedTuple):
    """A finished run in the Simulation Runtime, which was cut off once and then resumed."""

    directory: Path
    printed: str


def cut_off(
    settings: dict[str, Any], log: Path, end: Callable[[subprocess.Popen[bytes]], None]
) -> Path:
    """Start a simulation, call `end` after its first round, and return the run's directory."""
    output = Path(settings["output-dir"])
    with started(command("run", "original", **settings), log) as process:
        deadline = time.monotonic() + 120
        while not list(output.glob("*/checkpoints/round-000001/round.json")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        end(process)
    (directory,) = run_directories(output)
    written = (directory / "metrics.jsonl").read_text().splitlines()
    assert len(written) < ROUNDS + 1, "the run had finished before it was cut off"
    assert not (directory / "sample.txt").exists()
    return directory


def resume(directory: Path) -> Resumed:
    status, printed = run("resume", str(directory))
    assert status == 0, printed
    assert run_directories(directory.parent) == [directory]
    return Resumed(directory, printed)


def press_ctrl_c_twice(process: subprocess.Popen[bytes]) -> None:
    """Press Ctrl-C twice, as the impatient do, and check that nothing runs afterwards."""
    assert len(descendants()) > 5
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)  # to the group, as a terminal does
        time.sleep(0.5)
    assert process.wait(60) == 130
    assert descendants() == []


@pytest.fixture(scope="module")
def long_settings(
    tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], dict[str, Any]]:
    """Settings for two clients, with two bits both ways and all state on disk."""

    def make() -> dict[str, Any]:
        room = tmp_path_factory.mktemp("room")
        return tiny | {
            "num-server-rounds": ROUNDS,
            "max-steps": 100,
            "uplink": "2-bit",
            "downlink": "2-bit",
            "outer-momentum": 0.5,
            "output-dir": str(room / "runs"),
            "client-state": str(room / "clients"),
        }

    return make


@pytest.fixture(scope="module")
def uninterrupted(
    long_settings: Callable[[], dict[str, Any]], run_app: Callable[..., Path]
) -> Path:
    """The directory of the same run in this process, without Flower's processes."""
    return run_app(long_settings())


@pytest.fixture(scope="module")
def resumed(
    long_settings: Callable[[], dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Resumed:
    """A run that Ctrl-C has cut off, after it was resumed. Several tests look at it."""
    settings = long_settings()
    log = tmp_path_factory.mktemp("log") / "log"
    directory = cut_off(settings, log, press_ctrl_c_twice)
    assert log.read_text().splitlines()[-1] == (
        "nanogpt-flower: interrupted; all processes have been stopped. Go on with: "
        f"nanogpt-flower resume {directory}"
    )
    assert state_of(RunDirectory(directory)) == "interrupted"
    return resume(directory)


def test_a_federation_ends_when_its_program_is_killed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    program = (
        "import os, pathlib\n"
        "from nanogpt_flower.local.federation import Federation\n"
        f"with Federation(pathlib.Path({str(home)!r})) as federation:\n"
        "    federation.start('sleeper', ['python', '-c', 'import time; time.sleep(600)'])\n"
        "    print(federation._id, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    deadline = time.monotonic() + 60
    while home.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not home.exists()
    assert not processes(killed.stdout.strip())


def assert_equal_runs(directory: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "sample.txt", "model/model.safetensors"):
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name


def test_a_simulation_learns_and_leaves_its_files(resumed: Resumed) -> None:
    directory, printed = resumed
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1))
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.2
    assert rows[-1]["clients"] == 2
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    model = {f"model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    checkpoints = {
        f"checkpoints/round-{at:06d}/{name}"
        for at in range(ROUNDS - 2, ROUNDS + 1)
        for name in ("arrays.safetensors", "round.json", "state.safetensors")
    }
    results = {f"{name}.jsonl" for name in ("metrics", "clients", "timings", "samples")}
    results |= {f"{name}.json" for name in ("config", "launch", "parts", "state")}
    results |= {"sample.txt", "curve.png", "report.html", "run.log"}
    results |= {".checkpoints.lock", ".launch.lock"}
    assert files == results | model | checkpoints
    assert f"report: {directory}/report.html" in printed
    assert "tokens/s" in printed
    assert "\x1b" not in printed


def test_the_report_of_a_resumed_run_has_all_rounds_and_the_state(resumed: Resumed) -> None:
    lines = (resumed.directory / "clients.jsonl").read_text().splitlines()
    rounds = [json.loads(line)["round"] for line in lines]
    assert rounds == [at for at in range(1, ROUNDS + 1) for _ in range(2)]
    samples = (resumed.directory / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in samples] == list(range(ROUNDS + 1))
    assert "completed" in (resumed.directory / "report.html").read_text()


def test_evaluating_the_model_of_a_run_gives_the_loss_of_its_last_round(resumed: Resumed) -> None:
    last = json.loads((resumed.directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert evaluate_run(resumed.directory).loss == pytest.approx(last["val_loss"], rel=1e-6)


def test_a_run_that_ctrl_c_cut_off_goes_on_as_the_same_run_in_one_process(
    resumed: Resumed, uninterrupted: Path
) -> None:
    assert_equal_runs(resumed.directory, uninterrupted)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    long_settings: Callable[[], dict[str, Any]],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    def kill(process: subprocess.Popen[bytes]) -> None:
        for living in descendants():
            with suppress(psutil.NoSuchProcess):
                living.kill()

    settings = long_settings()
    directory = cut_off(settings, tmp_path / "log", kill)
    assert state_of(RunDirectory(directory)) == "interrupted"
    resume(directory)
    assert_equal_runs(directory, uninterrupted)


@pytest.mark.slow
def test_a_failed_run_fails_with_its_clients_reasons(
    app_directory: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny | {"block-size": 500, "output-dir": str(tmp_path / "out")}
    with Federation(tmp_path / "home") as federation:
        federation.start_superlink("--simulation", "--isolation", "subprocess")
        # Flower gets the settings as they are, without the check of `nanogpt-flower run`.
        with pytest.raises(LocalRunError) as caught:
            federation.run(app_directory, settings, "--federation-config", "num-supernodes=2")
    assert "train round 2: 0 good of 2 replies" in str(caught.value)
    assert str(caught.value).count("data: this client cannot train on its text") == 2


@pytest.mark.slow
@pytest.mark.deployed
def test_supernodes_train_on_their_own_directories_as_in_one_process(
    tiny: dict[str, Any],
    run_app: Callable[..., Path],
    text_file: Path,
    policy_file: Path,
    tmp_path: Path,
) -> None:
    settings = tiny | {"num-server-rounds": 1}
    output = {"output-dir": str(tmp_path / "deployed")}
    options = ["--deploy", "--policy", str(policy_file)]
    status, printed = run("run", "original", *options, **(settings | output))
    assert status == 0, printed
    (deployed,) = run_directories(tmp_path / "deployed")
    for number in range(2):
        _, log = (deployed / "run.log").read_text().split(f"--- log of supernode-{number}\n")
        first = next(line for line in log.splitlines() if "trains on" in line)
        assert f"/datasets/shakespeare_part_{number}] trains on 3,600 characters" in first
    parts = partition(load_corpus(str(text_file)), 2).write(tmp_path / "datasets")
    local = run_app(settings | {"output-dir": str(tmp_path / "local")}, data_paths=parts)
    metrics = (deployed / "metrics.jsonl").read_text()
    assert metrics == (local / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in metrics.splitlines()]
    assert rows[1]["val_loss"] < rows[0]["val_loss"]
    assert rows[1]["clients"] == 2


@pytest.mark.slow
def test_a_server_without_text_asks_real_supernodes_for_their_vocabulary(
    app_directory: Path,
    tiny: dict[str, Any],
    text_file: Path,
    policy_file: Path,
    tmp_path: Path,
) -> None:
    parts = partition(load_corpus(str(text_file)), 2).write(tmp_path / "datasets")
    settings = tiny | {
        "corpus": "none",
        "num-server-rounds": 1,
        "output-dir": str(tmp_path / "out"),
    }
    events = tmp_path / "events"
    with Federation(tmp_path / "home", {progress.VARIABLE: str(events)}) as federation:
        federation.start_superlink()
        for number, part in enumerate(parts):
            config = f"data-path='{part}' policy='{policy_file}'"
            federation.start_supernode(f"supernode-{number}", config)
        federation.run(app_directory, settings)
    reported = [json.loads(line) for line in progress.Lines(events).new()]
    trained = {e["client"] for e in reported if e["event"] == "client" and e["step"] == e["steps"]}
    assert len(trained) == 2
    (directory,) = run_directories(tmp_path / "out")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["val_loss"] is None
    assert 0 < rows[1]["client_val_loss"] < 3


def test_flower_accepts_the_app_for_publishing(app_directory: Path, tmp_path: Path) -> None:
    flwr = Path(sys.executable).with_name("flwr")
    built = subprocess.run(
        [flwr, "build", "--app", str(app_directory)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert len(list(tmp_path.glob("*.fab"))) == 1
