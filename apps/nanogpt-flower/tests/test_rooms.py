"""The rooms of the repository: who may import whom."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
LIBRARIES = {
    "gpt_core": REPOSITORY / "packages/gpt-core/src/gpt_core",
    "shakespeare_data": REPOSITORY / "packages/shakespeare-data/src/shakespeare_data",
    "flower_adapter": REPOSITORY / "packages/flower-adapter/src/flower_adapter",
}
ADAPTER = LIBRARIES["flower_adapter"]


def imported_modules(path: Path) -> set[str]:
    """Return every module that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of(directory: Path) -> dict[str, set[str]]:
    """Return the imports of each module below a directory, by its path."""
    files = list(directory.rglob("*.py"))
    assert files
    return {str(path.relative_to(directory)): imported_modules(path) for path in files}


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_library_imports_another_or_the_app(library: str) -> None:
    others = {*LIBRARIES, "nanogpt_flower"} - {library}
    for path, modules in imports_of(LIBRARIES[library]).items():
        assert not {module.split(".")[0] for module in modules} & others, path


def test_gpt_core_and_shakespeare_data_know_nothing_of_flower() -> None:
    for library in ("gpt_core", "shakespeare_data"):
        for path, modules in imports_of(LIBRARIES[library]).items():
            assert "flwr" not in {module.split(".")[0] for module in modules}, path


def test_the_settings_import_no_library() -> None:
    modules = imported_modules(REPOSITORY / "apps/nanogpt-flower/nanogpt_flower/settings.py")
    roots = {module.split(".")[0] for module in modules}
    assert not roots & {*LIBRARIES, "torch", "numpy", "flwr"}


@pytest.mark.parametrize(("side", "other"), [("client", "server"), ("server", "client")])
def test_the_two_sides_of_flower_adapter_do_not_import_each_other(side: str, other: str) -> None:
    for path, modules in imports_of(ADAPTER / side).items():
        assert not [m for m in modules if m.startswith(f"flower_adapter.{other}")], path


def test_private_modules_of_flower_are_imported_in_one_file_alone() -> None:
    public = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")
    for path, modules in imports_of(ADAPTER).items():
        flower = {module for module in modules if module.split(".")[0] == "flwr"}
        # "flwr.app.Message" is a name in a public module, "flwr.app.typing" is another module.
        modules_only = {
            m.rsplit(".", 1)[0] if m.rsplit(".", 1)[1][0].isupper() else m for m in flower
        }
        private = modules_only - {*public, "flwr.serverapp.strategy.strategy"}
        assert path == "_flwr.py" or not private, (path, private)


def test_the_app_imports_private_modules_of_flower_in_one_file_alone() -> None:
    public = {f"flwr.{name}" for name in ("app", "clientapp", "serverapp", "serverapp.strategy")}
    directory = REPOSITORY / "apps/nanogpt-flower/nanogpt_flower"
    for file in directory.rglob("*.py"):
        private = re.findall(
            r"flwr\.(?:supercore|supernode|superlink|common|cli|proto|server)\b",
            (file.read_text(encoding="utf-8")),
        )
        modules = {m for m in imported_modules(file) if m.split(".")[0] == "flwr"}
        others = {m for m in modules if not any(m == p or m.startswith(f"{p}.") for p in public)}
        assert file.name == "flower.py" or not (private or others), file


def test_keys_of_the_protocol_are_spelled_in_one_file_alone() -> None:
    keys = ("flower-adapter.run", "flower-adapter.attempts", "flower-adapter.compression")
    keys += ("flower-adapter.personal", "flower-adapter/", "server-round", "num-examples")
    for path in ADAPTER.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert path.name == "protocol.py" or not texts & set(keys), path
