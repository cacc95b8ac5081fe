"""Which file may import which, and which modules a light command must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stepctl
from stepctl.cli.main import cli

PACKAGE = Path(stepctl.__file__).parent
LEVELS = [
    {"errors", "arena", "extras", "files", "sandbox", "launcher", "interrupt", "process_signals", "shell"},
    {"state", "rng", "ema", "elementary", "problems", "registry", "schedules", "losses", "optimizers"}
    | {"yamlio", "config", "schema", "numerics", "rundir", "folder", "comm", "exchange", "shared", "window"},
    {"layers", "models", "data", "writers", "checkpoint"},
    {"tasks", "hooks"},
    {"trainer"},
    {
        "assembly",
        "determinism",
        "ranks",
        "asynchronous",
        "segment",
        "run",
        "fork",
        "replay",
        "plan",
        "report",
        "compare",
        "verify",
        "prune",
    }
    | {"runs", "curves", "rates", "disk", "doctor"},
    {"library", "cli"},
]
# Within a level, and between families, only this.
ALLOWED = {
    ("extras", "errors"),
    ("files", "errors"),
    ("sandbox", "errors"),
    ("sandbox", "files"),
    ("launcher", "errors"),
    ("schedules", "registry"),
    ("optimizers", "problems"),
    ("optimizers", "registry"),
    ("optimizers", "schedules"),
    ("registry", "problems"),
    ("comm", "exchange"),
    ("comm", "problems"),
    ("comm", "shared"),
    ("exchange", "shared"),
    ("comm", "window"),
    ("window", "comm"),
    ("config", "problems"),
    ("config", "state"),
    ("config", "registry"),
    ("config", "yamlio"),
    ("rundir", "yamlio"),
    ("rundir", "folder"),
    ("schema", "config"),
    ("schema", "registry"),
    ("yamlio", "problems"),
    ("models", "layers"),
    ("hooks", "tasks"),
    ("determinism", "assembly"),
    ("fork", "assembly"),
    ("fork", "run"),
    ("fork", "segment"),
    ("plan", "assembly"),
    ("plan", "rates"),
    ("plan", "run"),
    ("rates", "assembly"),
    ("replay", "assembly"),
    ("verify", "run"),
    ("compare", "report"),
    ("curves", "runs"),
    ("doctor", "disk"),
    ("replay", "compare"),
    ("replay", "run"),
    ("run", "assembly"),
    ("run", "determinism"),
    ("run", "segment"),
    ("ranks", "assembly"),
    ("ranks", "asynchronous"),
    ("segment", "assembly"),
    ("segment", "ranks"),
    ("runs", "verify"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(module: str) -> str:
    """Return the first name below the package: "optimizers" of "stepctl.optimizers.adam"."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from ([f"stepctl.{name.name}" for name in node.names] if module == "stepctl" else [module])


def named_imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file loads by name, such as `require("matplotlib.figure", "plot")`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("require", "import_module", "__import__"):
                yield str(node.args[0].value)


def is_mpi(module: str) -> bool:
    return module.split(".")[0] == "mpi4py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_below(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if here in ("__init__", "__main__"):
        return
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    assert here in level, f"{here} has no level"
    for module in imports(path):
        there = part(module) if module.startswith("stepctl.") else ""
        if there and not there.startswith("__") and there != here:
            assert level[there] < level[here] or (here, there) in ALLOWED, f"{path.name} imports {module}"


def test_mpi_stays_in_one_file() -> None:
    named = [path for path in FILES if "mpi4py" in path.read_text()]
    loaded = {path.name for path in named for name in (*imports(path), *named_imports(path)) if is_mpi(name)}
    assert loaded <= {"comm.py"}


def test_the_top_level_holds_nothing_else() -> None:
    root = PACKAGE.parent
    agreed = {"pyproject.toml", "README.md", "LICENSE", "stepctl", "configs", "tests", "runs"}
    tracked = subprocess.run(["git", "-C", root, "ls-files"], capture_output=True, text=True, check=True).stdout
    assert {name.split("/")[0] for name in tracked.split("\n") if name and not name.startswith(".")} == agreed


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.commands)], ids=str)
def test_help_is_light(arguments: list[str]) -> None:
    code = (
        "import sys; from stepctl.cli.main import cli\n"
        "try: cli(sys.argv[1:])\n"
        "except SystemExit: print('LOADED', *{'numpy', 'h5py', 'pydantic', 'yaml', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED\n")


def test_numerics_comes_before_numpy() -> None:
    code = (
        "import sys; from stepctl import numerics, rundir; numerics.pin(1, 'auto'); assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
