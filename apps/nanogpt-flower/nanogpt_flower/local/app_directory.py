"""Write the directory of the app from the installed package, for `flwr run`."""

import shutil
from pathlib import Path

import tomli_w

import nanogpt_flower
from nanogpt_flower.settings import Settings


def write_app(directory: Path) -> Path:
    """Write the app into a new directory, and return the directory.

    `flwr run` needs a directory with the code and a `pyproject.toml`. The project has no
    dependencies, because the environment of this process has them all.
    """
    package = Path(nanogpt_flower.__file__).parent
    unused = shutil.ignore_patterns("__pycache__", "local", "deployment")
    shutil.copytree(package, directory / package.name, ignore=unused)
    project = {
        "project": {
            "name": "nanogpt-flower",
            "version": nanogpt_flower.__version__,
            "description": "Federated NanoGPT on Flower",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "nanogpt-flower",
                    "components": {
                        "serverapp": "nanogpt_flower.server_app:app",
                        "clientapp": "nanogpt_flower.client_app:app",
                    },
                    "config": Settings().to_run_config(),
                }
            }
        },
    }
    (directory / "pyproject.toml").write_text(tomli_w.dumps(project), encoding="utf-8")
    return directory
