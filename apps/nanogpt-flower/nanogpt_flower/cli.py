"""The command `nanogpt-flower`."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
import typer.core

import nanogpt_flower
from nanogpt_flower.interrupts import Interrupted, handle_signals

if TYPE_CHECKING:
    from nanogpt_flower.local.launch import Launch

typer.core.HAS_RICH = False  # else Typer puts a backslash before each "[" in a help without Rich

# The commands import torch and Flower only when they run, so `--help` is fast.

app = typer.Typer(
    name="nanogpt-flower",
    help="Train one small GPT together with others, and write text with it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help='a run: "latest", its name in runs/, or its path')
]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="the directory with the runs")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="settings of the run")
]
PresetAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[preset] [key=value]...", help="a preset (default: quick), then settings"
    ),
]
Clients = Annotated[
    int | None, typer.Option("--clients", help="number of clients; the preset's own by default")
]
Cpus = Annotated[
    int | None, typer.Option("--cpus", help="cores of each simulated client (default: 1)")
]
Gpus = Annotated[
    float | None, typer.Option("--gpus", help="share of a GPU of each simulated client")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="show the lines of Flower and Ray too")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest character")
]
TopK = Annotated[
    int, typer.Option("--top-k", min=0, max=2**31 - 1, help="draw from the k likeliest; 0 is all")
]
TopP = Annotated[
    float, typer.Option("--top-p", help="draw from the likeliest with this total probability")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")]
Int8 = Annotated[bool, typer.Option("--int8", help="keep the weights as int8 numbers")]
Length = Annotated[
    int, typer.Option("--tokens", min=0, max=2**31 - 1, help="number of characters to write")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=2**63 - 1, help="equal seeds give equal texts"),
]
RUNS = Path("runs")
INTERRUPTED = "nanogpt-flower: interrupted; all processes have been stopped"


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Train one small GPT together with others, and write text with it."""
    if version:
        print(nanogpt_flower.__version__)
        raise typer.Exit


@app.command()
def run(
    arguments: PresetAndOverrides = None,
    clients: Clients = None,
    deploy: Annotated[
        bool, typer.Option("--deploy", help="a SuperLink and SuperNodes instead of a simulation")
    ] = False,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="a policy file for the clients of --deploy")
    ] = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    verbose: Verbose = False,
) -> None:
    """Train, and show the progress. The exit status is 0 only if the run completed.

    \b
    nanogpt-flower run quick
    nanogpt-flower run quick corpus=my.txt
    nanogpt-flower run best uplink=2-bit downlink=2-bit
    nanogpt-flower run quick --clients 4 partition=by-play --deploy
    """
    from nanogpt_flower.local.launch import prepare

    launch = prepare(
        arguments or [], clients=clients, deploy=deploy, policy=policy, cpus=cpus, gpus=gpus
    )
    _run(launch, verbose)


@app.command()
def resume(
    name: RunName,
    arguments: Overrides = None,
    output_dir: OutputDir = RUNS,
    verbose: Verbose = False,
) -> None:
    """Go on with a run from its newest checkpoint, with its own settings.

    \b
    nanogpt-flower resume latest
    nanogpt-flower resume 2026-11-24-2215-quick num-server-rounds=8
    """
    from nanogpt_flower.local.launch import prepare_resume

    _run(prepare_resume(name, output_dir, arguments or []), verbose)


def _run(launch: "Launch", verbose: bool) -> None:
    from rich.console import Console

    from nanogpt_flower.local.federation import LocalRunError
    from nanogpt_flower.local.launch import LOG_FILE, run

    try:
        directory = run(launch, Console(highlight=False), verbose=verbose)
    except LocalRunError as error:
        raise click.ClickException(str(error)) from error
    sample = directory / "sample.txt"
    if sample.exists() and (text := sample.read_text(encoding="utf-8")).strip():
        print(f"\n{text}\n")
    print(f"report: {_short(directory / 'report.html')}")
    print(f"log: {_short(directory / LOG_FILE)}")


def _short(path: Path) -> Path:
    """Return a path relative to the current directory, if it is in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@app.command()
def presets() -> None:
    """List the presets with their size, tokens, loss and time.

    \b
    nanogpt-flower presets
    """
    from gpt_core import GPT
    from nanogpt_flower.composition import model_config
    from nanogpt_flower.preset import all_presets

    for preset in all_presets().values():
        settings = preset.settings
        model = GPT(model_config(settings, 65))
        minutes = "; ".join(f"{value:g} min on {key}" for key, value in preset.minutes.items())
        print(
            f"{preset.name}: {preset.summary}\n"
            f"  size    {model.num_parameters() / 1e6:.2f}M parameters\n"
            f"  clients {preset.clients}\n"
            f"  rounds  {settings.num_server_rounds} x {settings.max_steps} steps of "
            f"{settings.batch_size} x {settings.block_size} characters\n"
            f"  tokens  {preset.tokens:,} of all clients\n"
            f"  loss    {preset.val_loss:.2f} on Tiny Shakespeare\n"
            f"  time    {minutes}"
        )


@app.command()
def policy(
    check: Annotated[Path | None, typer.Option("--check", help="check this policy file")] = None,
) -> None:
    """Print the default policy of a client, with a comment for each key.

    A policy says what a server may ask of a client. Its operator can change every line.

    \b
    nanogpt-flower policy > policy.toml
    nanogpt-flower policy --check policy.toml
    """
    from nanogpt_flower.client_node import default_policy_text, read_policy

    if check is None:
        print(default_policy_text(), end="")
    else:
        read_policy(check)
        print(f"{check} is a sound policy")


@app.command()
def runs(output_dir: OutputDir = RUNS) -> None:
    """List the runs, oldest first.

    \b
    nanogpt-flower runs
    nanogpt-flower runs --output-dir elsewhere
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nanogpt_flower.runs import all_runs

    found = all_runs(output_dir)
    if not found:
        print(f"there are no runs in {output_dir}; start one with: nanogpt-flower run quick")
        return
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("run", "when", "preset", "text", "rounds", "loss", "state"):
        table.add_column(column, no_wrap=column in ("run", "when"), overflow="fold")
    for one in found:
        cells = [
            one.path.name,
            f"{one.started:%Y-%m-%d %H:%M}",
            one.preset or "-",
            one.corpus or "-",
            f"{one.rounds}/{one.num_rounds}" if one.num_rounds is not None else "-",
            "-" if one.loss is None else f"{one.loss:.4f}",
            one.state,
        ]
        table.add_row(*map(Text, cells))
    # A pipe gets whole lines, whatever the width of the terminal is.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


@app.command()
def sample(
    name: RunName,
    prompt: Annotated[str, typer.Option("--prompt", help="start of the text")] = "",
    tokens: Length = 500,
    seed: Seed = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    int8: Int8 = False,
    device: Device = "auto",
    output_dir: OutputDir = RUNS,
) -> None:
    """Print text that the model of a run writes.

    \b
    nanogpt-flower sample latest --prompt "ROMEO:" --tokens 500 --seed 1
    """
    from nanogpt_flower.runs import find_run
    from nanogpt_flower.trained import Writer

    writer = Writer(find_run(name, output_dir), device=device, int8=int8)
    for text in writer.write(
        prompt, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ):
        print(text, end="", flush=True)
    print()


@app.command()
def chat(
    name: RunName,
    tokens: Length = 200,
    seed: Seed = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    int8: Int8 = False,
    device: Device = "auto",
    output_dir: OutputDir = RUNS,
) -> None:
    """Write a text for each prompt, until Ctrl-D. Each prompt starts a new text.

    \b
    nanogpt-flower chat latest --temperature 0.7 --top-p 0.9 --int8
    """
    from nanogpt_flower.runs import find_run
    from nanogpt_flower.trained import Writer

    writer = Writer(find_run(name, output_dir), device=device, int8=int8)
    if sys.stdin.isatty():
        print("Write the start of a text and press Enter. Ctrl-D ends.")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return
        try:
            for text in writer.write(
                prompt, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
            ):
                print(text, end="", flush=True)
            print()
        except ValueError as error:  # a character that the model does not know
            print(error, file=sys.stderr)


@app.command("eval")
def evaluate(
    name: RunName,
    text: Annotated[
        Path | None, typer.Option("--text", help="a text file (default: the validation text)")
    ] = None,
    output_dir: OutputDir = RUNS,
) -> None:
    """Print the loss, the bits per character and the perplexity of the model of a run.

    \b
    nanogpt-flower eval latest
    nanogpt-flower eval latest --text my.txt
    """
    from nanogpt_flower.runs import find_run
    from nanogpt_flower.trained import evaluate_run

    found = evaluate_run(find_run(name, output_dir), text)
    print(f"text                {found.text}, {found.characters:,} characters")
    print(f"loss                {found.loss:.4f} nats per character")
    print(f"bits per character  {found.bits:.4f}")
    print(f"perplexity          {found.perplexity:.2f}")


@app.command()
def report(name: RunName, output_dir: OutputDir = RUNS) -> None:
    """Write the report of a run again, and print its path.

    \b
    nanogpt-flower report latest
    """
    from nanogpt_flower.artifacts import RunDirectory
    from nanogpt_flower.report import write_report
    from nanogpt_flower.runs import find_run, state_of

    directory = find_run(name, output_dir)
    running = state_of(RunDirectory(directory)) == "running"
    print(_short(write_report(directory, refresh=running)))


@app.command()
def compare(
    arguments: PresetAndOverrides = None,
    clients: Clients = None,
    partition: Annotated[
        str | None, typer.Option("--partition", help="how to divide the text among the clients")
    ] = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    verbose: Verbose = False,
) -> None:
    """Compare training alone, training together, and training on all text in one place.

    \b
    nanogpt-flower compare quick --clients 4 --partition by-play
    """
    import json

    from rich.console import Console

    from nanogpt_flower.compare import RESULT_FILE, table
    from nanogpt_flower.compare import compare as compare_arms
    from nanogpt_flower.local.federation import LocalRunError
    from nanogpt_flower.local.launch import prepare

    given = list(arguments or []) + ([f"partition={partition}"] if partition else [])
    launch = prepare(given, clients=clients, cpus=cpus, gpus=gpus)
    try:
        directory = compare_arms(launch, Console(highlight=False), verbose=verbose)
    except LocalRunError as error:
        raise click.ClickException(str(error)) from error
    except Interrupted as error:
        raise KeyboardInterrupt from error
    print(f"\n{table(json.loads((directory / RESULT_FILE).read_text(encoding='utf-8')))}\n")
    print(f"page: {_short(directory / 'comparison.html')}")
    print(f"picture: {_short(directory / 'comparison.png')}")


@app.command()
def credentials(
    host: Annotated[
        str, typer.Option("--host", help="the name or address by which parties reach the server")
    ],
    supernodes: Annotated[int, typer.Option("--supernodes", help="number of parties")],
    output: Annotated[Path, typer.Option("--output", help="a new directory")] = Path("credentials"),
    port: Annotated[int, typer.Option("--port", help="the port that parties connect to")] = 9092,
) -> None:
    """Make the credentials of a deployment, and print the commands of each party.

    \b
    nanogpt-flower credentials --host gpt.example.org --supernodes 3 --output credentials
    """
    from nanogpt_flower.deployment.credentials import make_credentials

    print(make_credentials(output, host=host, supernodes=supernodes, port=port).explained())


@app.command()
def node(
    party: Annotated[
        Path, typer.Argument(metavar="PARTY", help="the party's directory of credentials")
    ],
    data: Annotated[Path, typer.Option("--data", help="the directory of the party's text")],
    policy: Annotated[
        Path | None, typer.Option("--policy", help="a file: what the server may ask")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="a directory (default: PARTY/state)")
    ] = None,
    superlink: Annotated[
        str | None, typer.Option("--superlink", help="HOST:PORT (default: as in node.toml)")
    ] = None,
    allow_fab: Annotated[
        list[str] | None,
        typer.Option("--allow-fab", help="SHA-256 of a further app whose runs are answered"),
    ] = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="Flower's own programs, which run the code of each run")
    ] = False,
    keep_state: Annotated[
        bool, typer.Option("--keep-state", help="keep the state of runs that have ended")
    ] = False,
    reproducible: Annotated[
        bool,
        typer.Option("--reproducible", help="the run's seed decides all draws: for tests alone"),
    ] = False,
) -> None:
    """Run the SuperNode of one party, until Ctrl-C. It runs the installed app alone.

    \b
    nanogpt-flower node credentials/party-1 --data datasets/part_1
    """
    from nanogpt_flower.deployment.node import run_node

    try:
        run_node(
            party,
            data,
            policy=policy,
            state=state,
            superlink=superlink,
            allowed=allow_fab or (),
            stock=stock,
            keep_state=keep_state,
            reproducible=reproducible,
        )
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    If the input is bad, the command prints one line on stderr and returns 2. If a run fails, it
    returns 1. After Ctrl-C it returns 130.
    """
    handle_signals()
    # The note about a missing Tiny Shakespeare is shown among the notes of the run.
    logging.getLogger("shakespeare_data").addHandler(logging.NullHandler())
    try:
        status = app(args=argv, prog_name="nanogpt-flower", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ValueError as error:  # includes CheckpointError, ConfigError, DataError, SettingsError
        print(f"nanogpt-flower: error: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"nanogpt-flower: error: {error.filename} cannot be written", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        print(f"nanogpt-flower: error: {error.filename} cannot be made or found", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(
            f"{INTERRUPTED}. Go on with: nanogpt-flower resume {_short(error.directory)}",
            file=sys.stderr,
        )
        return 130
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if status == 130:  # typer also turns a KeyboardInterrupt into this status
        print(INTERRUPTED, file=sys.stderr)
    return status if isinstance(status, int) else 0
