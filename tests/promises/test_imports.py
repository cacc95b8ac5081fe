"""The order of the folders, the public names, and the modules that light commands may not load."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stepctl
from stepctl.cli.main import cli

PACKAGE = Path(stepctl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (
                [f"stepctl.{name.name}" for name in node.names] if module == "stepctl" else [module]
            )


def named_imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file loads by name, such as `require("matplotlib.figure", "plot")`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            if function in ("require", "import_module", "__import__"):
                yield str(node.args[0].value)


def is_mpi(module: str) -> bool:
    return module.split(".")[0] == "mpi4py"


@pytest.mark.process
def test_a_folder_imports_only_from_the_folders_below_it() -> None:
    """The contract is in pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "stepctl.models.base:Model",
        "stepctl.data.base:Source",
        "stepctl.data.base:Sources",
        "stepctl.optimizers.base:Optimizer",
        "stepctl.hooks.base:Hook",
        "stepctl.tasks.base:Task",
        "stepctl.errors:StepctlError",
    ],
)
def test_the_base_classes_stay_importable(name: str) -> None:
    module, _, attribute = name.partition(":")
    assert isinstance(getattr(importlib.import_module(module), attribute), type)


@pytest.mark.parametrize("name", stepctl.__all__)
def test_the_package_offers_its_public_names(name: str) -> None:
    assert getattr(stepctl, name) is not None
    assert name in dir(stepctl)


def test_only_the_communicator_loads_mpi() -> None:
    named = [path for path in FILES if "mpi4py" in path.read_text()]
    loaded = {
        str(path.relative_to(PACKAGE))
        for path in named
        for name in (*imports(path), *named_imports(path))
        if is_mpi(name)
    }
    assert loaded == {"distributed/mpi.py"}


@pytest.mark.process
def test_the_top_level_holds_nothing_else() -> None:
    root = PACKAGE.parent
    agreed = {"pyproject.toml", "README.md", "LICENSE", "stepctl", "configs", "tests", "runs"}
    tracked = subprocess.run(
        ["git", "-C", root, "ls-files"], capture_output=True, text=True, check=True
    ).stdout
    assert {
        name.split("/")[0] for name in tracked.split("\n") if name and not name.startswith(".")
    } == agreed


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in cli.commands)], ids=str
)
def test_help_is_light(arguments: list[str]) -> None:
    code = (
        "import sys; from stepctl.cli.main import cli\n"
        "try: cli(sys.argv[1:])\n"
        "except SystemExit: print('LOADED', *{'numpy', 'h5py', 'pydantic', 'yaml', 'rich', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("LOADED\n")


@pytest.mark.process
def test_the_blas_is_set_up_before_numpy_is_imported() -> None:
    code = """
import sys
from stepctl.rundir import directory
from stepctl.system import blas
blas.set_environment(1, "auto")
assert "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
