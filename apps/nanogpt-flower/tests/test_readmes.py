"""Every command in the READMEs runs.

`RULES` says how each command is run. A command without a rule fails. `nox -s readmes` runs the slow
commands too.
"""

import io
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import tomli_w
import torch
from readmes import READMES, REPOSITORY, all_commands, blocks

from nanogpt_flower.cli import main
from nanogpt_flower.deployment.credentials import nginx
from nanogpt_flower.interrupts import ENDING_SIGNALS
from nanogpt_flower.local import launch
from nanogpt_flower.local.federation import free_port
from nanogpt_flower.preset import preset_named
from nanogpt_flower.runs import all_runs, find_run

APP = "apps/nanogpt-flower"
RUN_NAME = "2026-11-24-2215-quick"  # the run in the READMEs
TINY = {"num-server-rounds": 1, "max-steps": 2, "batch-size": 4, "block-size": 16}
TINY |= {"sample-tokens": 20, "round-sample-tokens": 10}
QUICK = "corpus={room}/my.txt " + " ".join(f"{key}={value}" for key, value in TINY.items())
CONFIG = "--run-config \"corpus='{room}/my.txt' " + QUICK.partition(" ")[2] + '"'
# The settings of these tests are too small for the default policy of a client.
LOOSE = "--policy {room}/loose.toml"
HAS_GPU = torch.cuda.is_available()
MARK = "NANOGPT_FLOWER_README_TEST"  # environment variable of all processes of the slow tests
TIMEOUT = 1800.0  # seconds

# The ways to run a command: in this process; in a shell; with pip in a new environment; as a job of
# nox; together with the other commands of a deployment; or in vain, because there is no GPU.
FAST, SHELL, PIP, NOX, DEPLOYMENT, REFUSED = "fast", "shell", "pip", "nox", "deployment", "refused"


@dataclass(frozen=True)
class Rule:
    """How to run the commands that match a pattern."""

    pattern: str  # of the beginning of a command
    way: str  # a way to run it, or the job or the test that runs it
    appended: str = ""  # arguments that make the command quick
    replaced: tuple[str, str] = ("", "")

    def changed(self, command: str, room: Path) -> str:
        """Return the command as it is run. "{room}" stands for the directory of the tests."""
        changed = command.replace(*self.replaced) if self.replaced[0] else command
        return f"{changed} {self.appended}".strip().replace("{room}", str(room))


ONE_TEST = "-- packages/gpt-core/tests/test_config.py"
RULES = [  # the first rule that matches applies
    Rule(r"nanogpt-flower (presets|runs)$", FAST),
    Rule(r"nanogpt-flower (sample|chat|eval|report) ", FAST),
    Rule(r"nanogpt-flower run .*--gpus", SHELL if HAS_GPU else REFUSED, QUICK),
    Rule(r"nanogpt-flower run .*--deploy", SHELL, f"{QUICK} {LOOSE}"),
    Rule(r"nanogpt-flower (run|compare) ", SHELL, QUICK),
    Rule(r"nanogpt-flower resume latest$", SHELL, "num-server-rounds=9"),
    Rule(r"nanogpt-flower resume ", SHELL),
    Rule(r"nanogpt-flower --install-completion$", SHELL),
    Rule(r"nanogpt-flower policy --check", SHELL, replaced=("policy.toml", "loose.toml")),
    Rule(r"nanogpt-flower policy", SHELL),
    Rule(r"nanogpt-flower credentials ", DEPLOYMENT),
    Rule(r"nanogpt-flower node ", DEPLOYMENT, LOOSE),
    Rule(r"FLWR_HOME=\S+ flwr run ", DEPLOYMENT, CONFIG),
    Rule(r"FLWR_HOME=\S+ (flower-superexec|flwr supernode register) ", DEPLOYMENT),
    Rule(
        r"flwr run .*\.toml$",
        SHELL,
        replaced=(f"{APP}/nanogpt_flower/presets/quick.toml", "quick.toml"),
    ),
    Rule(
        r"flwr run .*-num-gpus=0\.5",
        SHELL,
        CONFIG,
        ("", "") if HAS_GPU else ("num-gpus=0.5", "num-gpus=0.0"),
    ),
    Rule(r"flwr run ", SHELL, CONFIG),
    Rule(r"shakespeare-data partition .*--corpus", SHELL),
    Rule(r"shakespeare-data partition ", DEPLOYMENT, "--corpus my.txt"),
    Rule(r"(nginx|flower-superlink) ", DEPLOYMENT),
    Rule(r"python packages/gpt-core/benchmarks/gpu\.py$", SHELL, "--dry-run"),
    Rule(r"pip install ", PIP),
    Rule(r"nox -l$", NOX),
    Rule(r"nox$|nox -s tests$", NOX, ONE_TEST),
    Rule(r"nox -s slow$", NOX, "-- --collect-only -q"),
    Rule(r"nox -s parity$", NOX, "-- -k greedy"),
    Rule(r"nox -s bench$", NOX, "-- -k 'int8 or encode or beside'"),
    Rule(r"nox -s federations$", NOX, "-- memory"),
    Rule(r"nox -s faults$", NOX, "-- two_servers_on_one_run"),
    Rule(r"nox -s (colluders|extraction)$", NOX),
    Rule(r"nox -s measure$", NOX, "-- profile --rounds 1"),
    Rule(r"nox -s measure -- loss", NOX, "--steps 1 --rows 1", ("FILE", "{room}/my.txt")),
    Rule(r"nox -s corpora$", NOX, "-- mapped"),
    Rule(r"nox -s many$", NOX, "-- --clients 2"),
    Rule(r"nox -s reach$", NOX, "-- --loss 9 --steps 1"),
    Rule(
        r"nox -s codecs$",
        NOX,
        "-- num-server-rounds=1 max-steps=1 batch-size=1 n-layer=1 --codecs fp32",
    ),
    Rule(r"nox -s simulate$", NOX, f"-- {QUICK} output-dir={{room}}/runs"),
    Rule(r"nox -s deploy$", NOX, f"-- {QUICK} output-dir={{room}}/runs {LOOSE}"),
    Rule(r"nox -s build$", NOX),
    Rule(r"nox -s readmes$", f"{APP}/tests/test_readmes.py"),
    Rule(r"pytest benchmarks$", "nox -s bench"),
    Rule(r"shakespeare-data (download|plot)$", "packages/shakespeare-data/tests/test_cli.py"),
]
COMMANDS = all_commands()


def rule_of(command: str) -> Rule | None:
    return next((rule for rule in RULES if re.match(rule.pattern, command)), None)


def commands_of(way: str, start: str = "") -> pytest.MarkDecorator:
    """Give a test each command that is run in this way and has this beginning."""
    found = [
        command
        for command in sorted(COMMANDS)
        if command.startswith(start) and (rule := rule_of(command)) and rule.way == way
    ]
    return pytest.mark.parametrize("command", found)


def changed(command: str, room: Path) -> str:
    rule = rule_of(command)
    assert rule is not None
    return rule.changed(command, room)


def test_something_runs_each_command() -> None:
    missing = {command: place for command, place in COMMANDS.items() if rule_of(command) is None}
    assert not missing, "write a rule for each of these commands"


def test_each_rule_has_a_command() -> None:
    used = {rule_of(command) for command in COMMANDS}
    assert [rule.pattern for rule in RULES if rule not in used] == []


def test_commands_that_are_run_elsewhere_name_a_job_or_a_test() -> None:
    ways = {rule.way for rule in RULES} - {FAST, SHELL, PIP, NOX, DEPLOYMENT, REFUSED}
    assert [way for way in ways if way not in COMMANDS and not (REPOSITORY / way).is_file()] == []


def test_each_code_block_has_its_language() -> None:
    found = {f"{readme}:{b.line}": b.language for readme in READMES for b in blocks(readme)}
    allowed = ("sh", "console", "python", "toml", "text")
    assert {place: name for place, name in found.items() if name not in allowed} == {}


def write_text(path: Path) -> None:
    """Write a text of four roles that a tiny model can learn."""
    choice = random.Random(0).choice
    words = ["to be", "or not", "my lord", "good night", "sweet"]
    speeches = [
        f"{name}:\n" + "".join(f"{choice(words)}\n" for _ in range(8))
        for _ in range(60)
        for name in ("ROMEO", "JULIET", "PARIS", "NURSE")
    ]
    path.write_text("\n".join(speeches), encoding="utf-8")


@pytest.fixture(scope="module")
def room(
    tmp_path_factory: pytest.TempPathFactory, run_app: Callable[..., Path], policy_file: Path
) -> Iterator[Path]:
    """The current directory of the commands: it has a text and the run that the READMEs name.

    Tiny Shakespeare is not available.
    """
    room = tmp_path_factory.mktemp("room")
    write_text(room / "my.txt")
    shutil.copy(policy_file, room / "loose.toml")
    small = {"n-layer": 1, "n-head": 2, "n-embd": 16, "device": "cpu"}
    places = {"corpus": str(room / "my.txt"), "output-dir": str(room / "runs")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHAKESPEARE_DATA_DIR", str(room / "cache"))
        patch.setenv("SHAKESPEARE_DATA_URL", "http://127.0.0.1:9/input.txt")
        run_app(TINY | small | places | {"run-name": RUN_NAME})
        yield room


@pytest.fixture
def here(room: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The room as the directory of this process. `main` may change the handlers of signals."""
    monkeypatch.chdir(room)
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    yield room
    for number, handler in handlers.items():
        signal.signal(number, handler)


@commands_of(FAST)
def test_a_command_about_a_run_succeeds_and_prints(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("ROMEO:\nmy lord\n"))
    assert main(shlex.split(changed(command, here))[1:]) == 0
    assert capsys.readouterr().out.strip()


@commands_of(SHELL, "nanogpt-flower run ")
def test_the_settings_of_a_run_are_accepted(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "run", lambda *_, **__: here)
    assert main(shlex.split(changed(command, here))[1:]) == 0


@commands_of(REFUSED)
def test_a_share_of_a_gpu_is_refused_without_a_gpu(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(changed(command, here))[1:]) == 2
    assert "--gpus is 0.5; it must be from 0 to 0" in capsys.readouterr().err


Call = Callable[..., str]


def marked(mark: str) -> set[psutil.Process]:
    """Return all processes with this mark in their environment, and all that they have started."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found |= {process, *process.children(recursive=True)}
    return found


@contextmanager
def background(
    command: str, directory: Path, log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a shell. At the end, kill all processes that it has started."""
    mark = uuid.uuid4().hex
    with log.open("ab") as output:
        process = subprocess.Popen(
            # The last command replaces the shell, but completion asks for the shell's name.
            ["bash", "-euo", "pipefail", "-c", f"{command}\n:"],
            cwd=directory,
            env=os.environ | environment | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        while living := marked(mark):
            for found in living:
                with suppress(psutil.NoSuchProcess):
                    found.kill()
            psutil.wait_procs(living, timeout=0.2)
            process.poll()


@pytest.fixture
def shell(room: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of the commands: a home of its own, and the programs beside this Python."""
    for name in ("apps", "packages", "constraints.txt"):
        if not (room / name).exists():
            (room / name).symlink_to(REPOSITORY / name)
    (tmp_path / "home").mkdir()
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    home = {"HOME": str(tmp_path / "home"), "FLWR_HOME": str(tmp_path / "flwr")}
    return {**home, "PATH": path, "OMP_NUM_THREADS": "1"}


def call(command: str, directory: Path, log: Path, environment: dict[str, str]) -> str:
    """Run a command that must succeed, and return what it printed."""
    with background(command, directory, log, environment) as process:
        status = process.wait(TIMEOUT)
        printed = log.read_text(encoding="utf-8", errors="replace")
        assert status == 0, f"{command}\n{printed}"
    return printed


@pytest.mark.slow
@commands_of(SHELL)
def test_a_command_runs_in_a_shell(
    command: str, room: Path, shell: dict[str, str], tmp_path: Path
) -> None:
    if command.startswith("flwr run"):
        assert not listens(39093), "another local SuperLink of Flower is running"
        config = preset_named("quick").run_config | TINY | {"corpus": str(room / "my.txt")}
        (room / "quick.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    before = {run.path for run in all_runs(room / "runs")}
    call(changed(command, room), room, tmp_path / "log", shell)
    runs = {run.path: run for run in all_runs(room / "runs")}
    if " run " in command:
        (new,) = runs.keys() - before
        assert (runs[new].state, runs[new].rounds) == ("completed", 1)
        assert (new / "report.html").exists()
    if " resume " in command:
        resumed = runs[find_run(shlex.split(command)[2], room / "runs")]
        assert (resumed.state, resumed.rounds) == ("completed", resumed.num_rounds)
    if " compare " in command:
        assert list((room / "runs").glob("*-compare-quick*/comparison.html"))


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def deployment_commands() -> list[str]:
    return [c for c in COMMANDS if (rule := rule_of(c)) and rule.way == DEPLOYMENT]


def test_the_commands_of_a_deployment_are_those_that_credentials_prints(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(room)
    made, *others = deployment_commands()
    options = [*shlex.split(made)[1:-1], "printed"]
    assert main(options) == 0
    printed = capsys.readouterr().out.replace("printed/", "credentials/")
    commands = [re.sub(r"^\S*/nginx ", "nginx ", line.strip()) for line in printed.splitlines()]
    data = r"--data \S+"
    expected = [re.sub(data, "--data DIRECTORY", c) for c in others if "partition" not in c]
    assert set(expected) <= set(commands)


def two_free_ports() -> tuple[int, int]:
    """Return two free ports, of which the second follows the first."""
    while listens((port := free_port()) + 1):
        pass
    return port, port + 1


@pytest.mark.slow
@pytest.mark.skipif(nginx() is None, reason="nginx is not installed")
def test_the_commands_of_a_deployment_run_together(
    room: Path, shell: dict[str, str], tmp_path: Path
) -> None:
    outside, inside = two_free_ports()
    shell["PATH"] += f"{os.pathsep}{Path(str(nginx())).parent}"

    def adapted(command: str) -> str:
        here = changed(command, room).replace("9093", str(inside))
        return here.replace("gpt.example.org", f"127.0.0.1 --port {outside}")

    in_background = ("nginx ", "flower-superlink ", "nanogpt-flower node ")
    before = {found.path for found in all_runs(room / "runs")}
    with ExitStack() as started:
        for number, command in enumerate(map(adapted, deployment_commands())):
            log = tmp_path / f"{number}.log"
            if command.startswith(in_background) or "flower-superexec" in command:
                started.enter_context(background(command, room, log, shell))
                deadline = time.monotonic() + 60
                while "superlink" in command and not listens(inside):
                    assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
                    time.sleep(0.1)
            else:
                call(command, room, log, shell)
    (new,) = {found.path for found in all_runs(room / "runs")} - before
    assert len((new / "clients.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert (new / "sample.txt").exists()


@pytest.fixture(scope="module")
def new_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a new, empty Python environment."""
    directory = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    path = os.pathsep.join([str(directory / "bin"), os.environ["PATH"]])
    return {"VIRTUAL_ENV": str(directory), "PATH": path}


@pytest.mark.slow
@commands_of(PIP)
def test_pip_installs_in_a_new_environment(
    command: str, new_environment: dict[str, str], tmp_path: Path
) -> None:
    # Other versions than those of the tests can be large downloads.
    constrained = command.replace("pip install", "pip install -c constraints.txt", 1)
    call(constrained, REPOSITORY, tmp_path / "log", new_environment)


@pytest.mark.slow
@commands_of(NOX)
def test_a_job_of_nox_runs(command: str, room: Path, shell: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("nox", path=shell["PATH"]) is None:
        pytest.skip("nox is not in PATH")
    own = {"PATH": shell["PATH"], "FLWR_HOME": shell["FLWR_HOME"]}
    call(changed(command, room), REPOSITORY, tmp_path / "log", own)
