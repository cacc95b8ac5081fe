"""Errors in user code are reported with the user's file and line."""

from __future__ import annotations

import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import stepctl
from stepctl.cli.main import cli
from stepctl.config import yaml
from tests.support.runs import BASE, silent

OWN = """
from dataclasses import dataclass
import numpy as np
import stepctl
from stepctl.data.base import Sources
from stepctl.data.digits import digits
from stepctl.data.memory import InMemory
from stepctl.models.linear import linear
from stepctl.models.base import Model
from stepctl.optimizers.sgd import SGD
from stepctl.optimizers.schedules import Schedule
from stepctl.programs.supervised import Supervised


class Own(Model):
    def __init__(self, *, input_shape, n_outputs):
        self.shape = (input_shape[0], n_outputs)

    def parameter_shapes(self):
        return {"w": self.shape}

    def initialize(self, params, rng):
        params["w"][...] = 0

    def forward(self, params, x, workspace):
        def backward(dy, grads):
            np.dot(x.T, dy, out=grads["w"])

        return x @ params["w"], backward


class InInit(Own):
    def __init__(self, *, input_shape, n_outputs):
        raise ValueError("no")  # InInit


class InShapes(Own):
    def parameter_shapes(self):
        return {"w": 1 / 0}  # InShapes


class InInitialize(Own):
    def initialize(self, params, rng):
        params["v"][...] = 0  # InInitialize


class InForward(Own):
    def forward(self, params, x, workspace):
        return x @ params["w"].T, None  # InForward


class InNumPy(Own):
    def forward(self, params, x, workspace):
        np.linalg.inv(np.zeros((2, 2)))  # InNumPy


class InLibrary(Own):
    def forward(self, params, x, workspace):
        import json
        json.loads("{")  # InLibrary


class InFile(Own):
    def forward(self, params, x, workspace):
        open("no/such/file")  # InFile


class InBackward(Own):
    def forward(self, params, x, workspace):
        def backward(dy, grads):
            grads["w"][...] = x @ dy  # InBackward
        return x @ params["w"], backward


class Late(Own):
    def forward(self, params, x, workspace):
        if np.any(params["w"]):
            raise RuntimeError("late")  # Late
        return super().forward(params, x, workspace)


class GivesNothing(Own):  # GivesNothing
    def forward(self, params, x, workspace):
        return None


class Rows(InMemory):
    def read(self, rows, x, y):
        x[...] = self.nothing[rows]  # in read


def in_read(*, targets, dtype):
    source = digits(targets=targets, dtype=dtype).train
    source.__class__ = Rows
    return Sources(source)


def in_function(*, targets, dtype):
    return Sources(np.loadtxt([]).reshape(3, 2))  # in function


class InStep(Supervised):
    targets = "classes"
    metrics = {"loss": "min"}
    training_metrics = ("loss",)

    @staticmethod
    def n_outputs(n_classes, target_shape):
        return n_classes

    @staticmethod
    def measure(outputs, y, n, workspace):
        return {"loss": outputs["loss"]}, outputs  # InStep


@dataclass(frozen=True, kw_only=True)
class Rate(Schedule):
    def after_warmup(self, step):
        return [0.1][step]  # Rate


class InHook(stepctl.Hook):
    name = "own"

    def after_step(self, state, metrics):
        metrics["lost"]  # InHook
"""
LINES = {
    line.rpartition("# ")[2]: number
    for number, line in enumerate(OWN.splitlines(), 1)
    if "  # " in line
}
MODELS = [
    "InInit",
    "InShapes",
    "InInitialize",
    "InForward",
    "InNumPy",
    "InLibrary",
    "InFile",
    "InBackward",
]
MODELS += ["Late", "GivesNothing"]
SECTIONS: dict[str, dict[str, Any]] = {name: {"model": {"name": f"own:{name}"}} for name in MODELS}
SECTIONS["in read"] = {"data": {"name": "own:in_read", "batch_size": 8}, "evaluate": None}
SECTIONS["in function"] = {"data": {"name": "own:in_function", "batch_size": 8}, "evaluate": None}
SECTIONS["InStep"] = {"task": {"name": "own:InStep"}}
SECTIONS["Rate"] = {"optimizer": {"name": "sgd", "learning_rate": {"name": "own:Rate"}}}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


@pytest.mark.parametrize("case", SECTIONS)
def test_the_command_line_names_the_user_s_line(case: str, own: Path) -> None:
    Path("c.yaml").write_text(yaml.dumps({**BASE, **SECTIONS[case]}))
    result = CliRunner().invoke(cli, ["train", "c.yaml", "-q"])
    assert result.exit_code in (1, 2)
    assert f"own.py:{LINES[case]})" in result.stderr, result.stderr
    for other in Path(stepctl.__file__).parent.rglob("*.py"):
        assert f"{other.name}:" not in result.stderr.replace("own.py:", "")


@pytest.mark.training
@pytest.mark.parametrize("case", [*SECTIONS, "InHook"])
def test_python_names_the_user_s_line(case: str, own: Path) -> None:
    """In the message, or in the traceback."""
    import own as module  # type: ignore[import-not-found]

    hooks = [module.InHook()] if case == "InHook" else []
    config = {**BASE, **SECTIONS.get(case, {})}
    with (
        pytest.raises(Exception) as caught,  # noqa: PT011  (any)
        stepctl.create(config, "run", hooks=hooks, say=silent) as run,
    ):
        run.train()
    text = "".join(traceback.format_exception(caught.value))
    if case == "GivesNothing":
        assert "forward returned None" in str(caught.value)
    else:
        assert f'own.py", line {LINES[case]}, in' in text


MODULES = {
    "a name that is not defined": ("x = 1\ny = z\n", "own_broken.py:2"),
    "an error in what it imports": ("import own_helper\n", "own_helper.py:3"),
    "no Python at all": ("x = 1\ndef f(:\n", "own_broken.py, line 2"),
    "a module that is missing": ("\nimport no_such_module\n", "own_broken.py:2"),
}


@pytest.mark.parametrize("case", MODULES)
def test_a_module_that_cannot_be_imported(
    case: str, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, where = MODULES[case]
    Path("own_broken.py").write_text(text)
    Path("own_helper.py").write_text("\n\n1 / 0\n")
    for name in ("own_broken", "own_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Path("c.yaml").write_text(yaml.dumps({**BASE, "model": {"name": "own_broken:Model"}}))
    result = CliRunner().invoke(cli, ["train", "c.yaml"])
    assert result.exit_code == 2
    assert where in result.stderr, result.stderr


@pytest.mark.process
def test_a_rank_that_fails_names_the_user_s_line(own: Path) -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("needs mpiexec")
    sections = {"model": {"name": "own:Late"}, "data": {**BASE["data"], "shards": 2}}
    Path("c.yaml").write_text(yaml.dumps({**BASE, **sections}))
    command = [mpiexec, "-n", "2", sys.executable, "-m", "stepctl", "train", "c.yaml", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert f"own.py:{LINES['Late']}" in done.stderr, done.stderr
