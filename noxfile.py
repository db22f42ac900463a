"""All jobs of this repository. The command `nox -l` lists the jobs."""

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typecheck", "tests"]

ROOT = Path(__file__).parent
LIBRARIES = ["packages/gpt-core", "packages/shakespeare-data", "packages/flower-adapter"]
APP = "apps/nanogpt-flower"
PACKAGES = [*LIBRARIES, APP]
README_TESTS = f"{APP}/tests/test_readmes.py"
README_EXAMPLES = f"{APP}/tests/test_readme_examples.py"
# Seconds in which a command can stop its own processes, after Ctrl-C and then after SIGTERM.
INTERRUPT = {"interrupt_timeout": 60.0, "terminate_timeout": 30.0}
# Each test process uses one thread. More threads would wait for each other on the shared cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def project(package: str) -> dict[str, object]:
    """Return the table `[project]` from the `pyproject.toml` of a package."""
    return tomllib.loads((ROOT / package / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def install(session: nox.Session, *requirements: str) -> None:
    """Install the requirements with pip, in the versions that are tested.

    Without `--no-compile`, pip would compile every module to bytecode, which takes longer than the
    rest of the installation. Instead, Python compiles each module when it is first imported, and
    keeps the bytecode in the environment of the session.
    """
    session.install("--no-compile", "-c", "constraints.txt", *requirements)
    session.env["PYTHONDONTWRITEBYTECODE"] = ""  # the user's setting may forbid to keep bytecode


@nox.session
def tests(session: nox.Session) -> None:
    """Test all packages in one environment. The arguments are passed to pytest.

    The output ends with the ten slowest tests.
    """
    install(session, *(f"{package}[test]" for package in PACKAGES), "pytest-xdist")
    spread = ["-n", "auto", "--dist", "loadfile"]  # tests of a file share process and fixtures
    session.run("pytest", *spread, "--durations=10", *session.posargs, env=ONE_THREAD)


@nox.session
@nox.parametrize("package", PACKAGES, ids=[Path(package).name for package in PACKAGES])
def slow(session: nox.Session, package: str) -> None:
    """Run the slow tests of the app, or all tests of one library.

    A library is tested alone, so the other packages are not installed.
    """
    libraries = LIBRARIES if package == APP else []
    install(session, *libraries, f"{package}[test]")
    marked = "slow" if package == APP else "slow or not slow"
    others = [f"--ignore={README_TESTS}"] if package == APP else []
    arguments = [f"{package}/tests", "-m", marked, *others, *session.posargs]
    session.run("pytest", *arguments, env=ONE_THREAD)


@nox.session
def readmes(session: nox.Session) -> None:
    """Run every command and every Python example in the READMEs. This takes long."""
    install(session, *(f"{package}[test]" for package in PACKAGES))
    marked = ["-m", "slow or not slow"]
    session.run("pytest", README_TESTS, README_EXAMPLES, *marked, *session.posargs)


@nox.session
def trackers(session: nox.Session) -> None:
    """Test TensorBoard, Weights & Biases and Trackio. The arguments are passed to pytest."""
    install(session, *LIBRARIES, f"{APP}[test,wandb,trackio]")
    session.run("pytest", f"{APP}/tests/test_trackers.py", *session.posargs, env=ONE_THREAD)


@nox.session
def parity(session: nox.Session) -> None:
    """Compare gpt-core with Hugging Face transformers. The arguments are passed to pytest."""
    install(session, "packages/gpt-core[parity]")
    session.run("pytest", "packages/gpt-core/parity", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the style and the formatting of the code with ruff."""
    install(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types with `mypy --strict`."""
    install(session, "mypy", *LIBRARIES, APP)
    for package in LIBRARIES:
        session.run("mypy", "--strict", f"{package}/src")
    session.run("mypy", "--strict", f"{APP}/nanogpt_flower")


@nox.session
def bench(session: nox.Session) -> None:
    """Compare the speed of every package with plain code, and print a table of the ratios."""
    install(session, *(f"{package}[bench]" for package in PACKAGES))
    kept = ROOT / ".benchmarks"
    kept.mkdir(exist_ok=True)
    rows = []
    for package in PACKAGES:
        results = kept / f"{Path(package).name}.json"
        session.run(
            "pytest",
            f"{package}/benchmarks",
            "--benchmark-only",
            "--benchmark-disable-gc",
            f"--benchmark-json={results}",
            "-q",
            "--no-header",
            "--benchmark-columns=median,iqr,rounds",
            *session.posargs,
        )
        rows += [row(Path(package).name, found) for found in read_benchmarks(results)]
    header = ("package", "what", "ours", "reference", "ratio", "ours a second", "reference is")
    print_table([header, *rows])
    session.log("the full figures are in %s", kept)


@nox.session
def measure(session: nox.Session) -> None:
    """Measure gpt-core on this CPU. Arguments: [job ...] [--rows N]; see --help."""
    install(session, "packages/gpt-core[parity]")
    session.run("python", "packages/gpt-core/benchmarks/cpu.py", *session.posargs)


@nox.session
def corpora(session: nox.Session) -> None:
    """Measure shakespeare-data's corpora. Arguments: [parsing|similarity|partitions|mapped ...]."""
    install(session, "packages/shakespeare-data[plays,torch]")
    session.run("python", "packages/shakespeare-data/benchmarks/corpora.py", *session.posargs)


@nox.session
def federations(session: nox.Session) -> None:
    """Test flower-adapter in real simulations. Arguments: [strategies|faults|resume|memory ...]."""
    install(session, "packages/flower-adapter[test]")
    script = "packages/flower-adapter/benchmarks/federations.py"
    for part in session.posargs or ["strategies", "faults", "resume", "memory"]:
        session.run("python", script, part, **INTERRUPT)


@nox.session
def faults(session: nox.Session) -> None:
    """Try named faults on the app, and print what they cost. Arguments: [name|group|entry ...]."""
    install(session, *LIBRARIES, APP)
    path = {"PYTHONPATH": str(ROOT / APP)}
    session.run("python", "-m", "faults", *session.posargs, env=ONE_THREAD | path, **INTERRUPT)


@nox.session
def many(session: nox.Session) -> None:
    """Simulate 1,000 clients, and print times and memory. Arguments: [--clients N] [key=value]."""
    install(session, *LIBRARIES, APP)
    session.run("python", f"{APP}/benchmarks/many_clients.py", *session.posargs, **INTERRUPT)


@nox.session
def reach(session: nox.Session) -> None:
    """Measure the time to a loss of 2.52, here and on a plain path. Arguments: [--loss LOSS]."""
    install(session, *LIBRARIES, APP)
    session.run("python", f"{APP}/benchmarks/time_to_loss.py", *session.posargs, **INTERRUPT)


@nox.session
def colluders(session: nox.Session) -> None:
    """Measure how far colluding clients can move the average of a round."""
    install(session, "packages/flower-adapter[test]")
    session.run("python", "packages/flower-adapter/benchmarks/colluders.py")


@nox.session
def extraction(session: nox.Session) -> None:
    """Measure how much of a client's text a malicious server reads from the client's updates."""
    install(session, *LIBRARIES, APP)
    session.run("python", f"{APP}/benchmarks/extraction.py")


@nox.session
def codecs(session: nox.Session) -> None:
    """Measure message size, time and validation loss of the app for each codec.

    Arguments: [key=value ...] [--codecs a,b].
    """
    install(session, *LIBRARIES, APP)
    session.run("python", f"{APP}/benchmarks/codecs.py", *session.posargs)


def read_benchmarks(results: Path) -> list[dict]:
    return json.loads(results.read_text(encoding="utf-8"))["benchmarks"]


def row(package: str, found: dict) -> tuple[str, ...]:
    """Return one line of the table, with our median, the reference's median and their ratio."""
    about, ours = found["extra_info"], found["stats"]["median"]
    reference = about["reference_seconds"]
    return (
        package,
        re.sub(r"^test_", "", found["name"]).replace("_", " "),
        f"{ours * 1e3:,.2f} ms",
        f"{reference * 1e3:,.2f} ms",
        f"{reference / ours:.1f}x",
        f"{about['amount'] / ours:,.0f} {about['unit']}",
        about["reference"],
    )


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    for line in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


@nox.session
def build(session: nox.Session) -> None:
    """Build wheels and sdists, and test each wheel in a new, empty environment."""
    install(session, "build")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for package in PACKAGES:
        session.run("python", "-m", "build", "--outdir", str(dist), package)
    for package in PACKAGES:
        empty = Path(session.create_tmp()) / f"{Path(package).name}-alone"
        shutil.rmtree(empty, ignore_errors=True)
        session.run("python", "-m", "venv", str(empty))
        python = str(empty / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        name = str(project(package)["name"])
        module = name.replace("-", "_")
        wheel = next(dist.glob(f"{module}-*.whl"))
        found = ["--find-links", str(dist)] if package == APP else []
        options = ["-c", "constraints.txt", *found]
        session.run(python, "-m", "pip", "install", "-q", *options, str(wheel), external=True)
        code = f"import {module}; print('imported', {module}.__name__)"
        session.run(python, "-I", "-c", code, external=True)
        example = readme_example(ROOT / package / "README.md")
        if example:
            session.run(python, "-I", "-c", example, external=True)
            session.log("the example of %s/README.md ran", package)


def readme_example(readme: Path) -> str:
    """Return the Python block after the line `<!-- example -->` in a README.

    If the README has no such block, return an empty string.
    """
    text = readme.read_text(encoding="utf-8")
    found = re.search(r"<!-- example -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    return found[1] if found else ""


@nox.session
def simulate(session: nox.Session) -> None:
    """Train in a Flower simulation. Arguments: [preset] [key=value ...] [--clients N]."""
    federate(session)


@nox.session
def deploy(session: nox.Session) -> None:
    """Train on local SuperNodes with TLS, keys and a proxy if nginx is installed.

    Arguments: [preset] [key=value ...] [--clients N].
    """
    federate(session, "--deploy")


def federate(session: nox.Session, *options: str) -> None:
    install(session, *LIBRARIES, APP)
    session.run("nanogpt-flower", "run", *options, *session.posargs, **INTERRUPT)
