"""Real runs of Flower's two runtimes, with a tiny model."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanogpt_flower.local import Federation, LocalRunError
from shakespeare_data import load_corpus, partition

PR_SET_CHILD_SUBREAPER = 36  # of Linux' prctl


def command(runtime: str, app: Path, settings: dict[str, Any], *options: str) -> list[str]:
    pairs = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    start = [sys.executable, "-m", "nanogpt_flower.local", runtime, "full", *pairs]
    return [*start, "--app", str(app), *options]


def run(runtime: str, app: Path, settings: dict[str, Any], *options: str) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    finished = subprocess.run(
        command(runtime, app, settings, *options),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return finished.returncode, finished.stdout + finished.stderr


def run_directories(output: Path) -> list[Path]:
    return sorted(output.iterdir()) if output.exists() else []


def descendants() -> list[psutil.Process]:
    """Living processes that this one started, however far down."""
    children = psutil.Process().children(recursive=True)
    return [process for process in children if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    if sys.platform == "linux":
        # orphans become children of this process, so that none can hide behind init
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    assert descendants() == []


def test_two_simulated_runs_of_one_seed_have_equal_metrics(
    app_directory: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    metrics, samples = [], []
    for name in ("first", "second"):
        output = tmp_path / name
        settings = tiny | {"output-dir": str(output), "dropout": 0.1, "optimizer": "muon"}
        clients = ("--num-clients", "3")
        status, printed = run("simulate", app_directory, settings, *clients)
        assert status == 0, printed
        (directory,) = run_directories(output)
        metrics.append((directory / "metrics.jsonl").read_text())
        samples.append((directory / "sample.txt").read_text())
    assert metrics[0] == metrics[1]
    assert samples[0] == samples[1]

    rows = [json.loads(line) for line in metrics[0].splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[2]["val_loss"] < rows[0]["val_loss"] - 0.5
    assert rows[2]["clients"] == 3
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    model = {f"model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
    checkpoints = {
        f"checkpoints/round-{at:06d}/{name}"
        for at in range(3)
        for name in ("arrays.safetensors", "round.json", "state.safetensors")
    }
    figures = {"config.json", "metrics.jsonl", "sample.txt", "curve.png", ".checkpoints.lock"}
    assert files == figures | model | checkpoints
    assert f"output: {directory}" in printed
    assert "tokens/s" in printed


def failed_simulation(app: Path, settings: dict[str, Any], home: Path) -> str:
    """The reason of a run that Flower is given as it is, without a look at its settings before."""
    with Federation(home) as federation:
        federation.start_superlink("--simulation", "--isolation", "subprocess")
        with pytest.raises(LocalRunError) as caught:
            federation.run(app, settings, "--federation-config", "num-supernodes=2")
    return str(caught.value)


def test_a_bad_setting_ends_the_run_before_any_client_works(
    app_directory: Path, tiny: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = tiny | {"n-head": 3, "output-dir": str(tmp_path / "out")}
    failure = failed_simulation(app_directory, settings, tmp_path / "home")
    assert "n-embd is 16; it must be divisible by n-head, which is 3" in failure
    assert "trains on" not in capfd.readouterr().out
    assert run_directories(tmp_path / "out") == []


def test_a_run_whose_clients_all_fail_fails_with_their_reason(
    app_directory: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny | {"block-size": 500, "output-dir": str(tmp_path / "out")}
    failure = failed_simulation(app_directory, settings, tmp_path / "home")
    # all rounds of the run have failed, though fewer in a row than max-failed-rounds
    assert "train round 2: 0 good of 2 replies" in failure
    assert failure.count("block-size 500 needs at least 501") == 2


def test_ctrl_c_ends_every_process(
    app_directory: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny | {"max-steps": 1_000_000, "output-dir": str(tmp_path)}
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command("simulate", app_directory, settings),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while "trains on" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert "trains on" in log.read_text()
        assert len(descendants()) > 5
        for _ in range(2):  # twice, as the impatient do
            os.killpg(process.pid, signal.SIGINT)  # to the group, as a terminal does
            time.sleep(0.5)
        assert process.wait(60) == 130


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, of which nothing is left afterwards."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            # Flower's programs and Ray's start sessions of their own
            while living := descendants():
                for found in living:
                    with suppress(psutil.NoSuchProcess):
                        found.kill()
                psutil.wait_procs(living, timeout=0.2)
            process.wait()


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    app_directory: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny | {
        "num-server-rounds": 4,
        "max-steps": 5,
        "uplink": "2-bit",
        "downlink": "2-bit",
        "outer-momentum": 0.5,
    }

    def of_run(name: str, **more: str) -> dict[str, Any]:
        places = {"output-dir": str(tmp_path / name), "client-state": str(tmp_path / f"{name}-c")}
        return settings | places | more

    status, printed = run("simulate", app_directory, of_run("whole"))
    assert status == 0, printed
    (whole,) = run_directories(tmp_path / "whole")

    second = "*/checkpoints/round-000002/round.json"
    with started(command("simulate", app_directory, of_run("cut")), tmp_path / "log") as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "cut").glob(second)) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
    (cut,) = run_directories(tmp_path / "cut")
    done = len((cut / "metrics.jsonl").read_text().splitlines())
    assert done < 5, "the run had finished before it was killed"
    assert not (cut / "sample.txt").exists()

    status, printed = run("simulate", app_directory, of_run("cut", **{"resume-from": str(cut)}))
    assert status == 0, printed
    assert run_directories(tmp_path / "cut") == [cut]
    for name in ("metrics.jsonl", "sample.txt"):
        assert (cut / name).read_text() == (whole / name).read_text()
    assert (cut / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()


def test_supernodes_train_on_their_own_directories_reproducibly(
    app_directory: Path, tiny: dict[str, Any], tmp_path: Path
) -> None:
    metrics = []
    for name in ("first", "second"):
        settings = tiny | {"num-server-rounds": 1, "output-dir": str(tmp_path / name)}
        status, printed = run("deploy", app_directory, settings)
        assert status == 0, printed
        for number in range(2):
            _, of_this_node = printed.split(f"--- log of supernode-{number}\n")
            first = of_this_node.splitlines()[0]
            assert f"/datasets/shakespeare_part_{number}] trains on 3,600 characters" in first
        (directory,) = run_directories(tmp_path / name)
        metrics.append((directory / "metrics.jsonl").read_text())
    assert metrics[0] == metrics[1]
    rows = [json.loads(line) for line in metrics[0].splitlines()]
    assert rows[1]["val_loss"] < rows[0]["val_loss"]
    assert rows[1]["clients"] == 2


def test_a_server_without_text_takes_its_clients_vocabulary(
    app_directory: Path, tiny: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    parts = partition(load_corpus(str(text_file)), 2).write(tmp_path / "datasets")
    settings = tiny | {
        "corpus": "none",
        "num-server-rounds": 1,
        "output-dir": str(tmp_path / "out"),
    }
    with Federation(tmp_path / "home") as federation:
        federation.start_superlink()
        for number, part in enumerate(parts):
            federation.start_supernode(f"supernode-{number}", f"data-path='{part}'")
        federation.run(app_directory, settings)
    (directory,) = run_directories(tmp_path / "out")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["val_loss"] is None
    assert 0 < rows[1]["client_val_loss"] < 3
    tokenizer = json.loads((directory / "model" / "tokenizer.json").read_text())
    assert tokenizer["vocab"] == "".join(sorted(set(text_file.read_text())))
    assert json.loads((directory / "config.json").read_text())["corpus"] is None


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
