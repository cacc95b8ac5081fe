"""A user's model, named by its import path, trains and resumes like a built-in one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.state.arena import Arena, Array, same_bits
from stepctl.state.rng import rng
from stepctl.state.workspace import Workspace
from tests.support.messages import normalize
from tests.support.runs import BASE, make_config, resume, train
from tests.support.user_model import TwoLayers

ROOT = Path(__file__).parents[2]
MODEL = {"name": "tests.support.user_model:TwoLayers", "width": 12}
LAST = 24


def stepctl(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command line as the installed script does: -P keeps the current folder off the import path."""
    command = [sys.executable, "-P", "-m", "stepctl.cli.main", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def write_config(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.dumps({**BASE, "model": MODEL, "stop": {"last_step": LAST}, **sections}))
    return path


def arrays(run: Path) -> dict[str, Array]:
    """Return every array of the newest checkpoint by its path in the file."""
    found: dict[str, Array] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name not in ("config", "numerics"):
            found[name] = item[()]

    with h5py.File(max((run / "checkpoints").glob("step-*.h5"))) as file:
        file.visititems(visit)
    return found


@pytest.mark.process
def test_trained_and_resumed_by_the_command_line(tmp_path: Path) -> None:
    config = write_config(tmp_path / "own.yaml")
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    commands = [
        ("train", "--config", config, "--run-dir", unbroken, "-q"),
        ("train", "--config", config, "--run-dir", stopped, "-q", "--last-step", 11),
        ("resume", stopped, "-q", "--last-step", LAST),
    ]
    for command in commands:
        done = stepctl(*command)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    expected, found = arrays(unbroken), arrays(stopped)
    assert found.keys() == expected.keys() > {"params/in/W", "params/in/b", "params/out/V"}
    assert expected["counters/global_step"] == LAST
    assert expected["params/in/W"].shape == (64, 12)
    assert [path for path in expected if not same_bits(expected[path], found[path])] == []
    shown = json.loads(stepctl("inspect", stopped, "--json").stdout)
    assert shown["config"]["model"] == MODEL


@pytest.mark.training
def test_it_learns(tmp_path: Path) -> None:
    config = make_config(
        model=MODEL, data={"name": "digits", "batch_size": 48, "validation_fraction": 0.2}
    )
    train(config, tmp_path / "run")
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[0]["loss"] > 2
    assert rows[-1]["kind"] == "eval"
    assert rows[-1]["accuracy"] > 0.7


@pytest.mark.training
@pytest.mark.parametrize("at", range(0, LAST, 5))
def test_stopped_at_any_step_with_shards(at: int, tmp_path: Path) -> None:
    sections = {"model": MODEL, "data": {**BASE["data"], "shards": 4}, "stop": {"last_step": LAST}}
    unbroken = train(make_config(**sections), tmp_path / "unbroken")
    train(make_config(**{**sections, "stop": {"last_step": at}}), tmp_path / "stopped")
    assert resume(tmp_path / "stopped", last_step=LAST).same_bits(unbroken)


@pytest.mark.training
@pytest.mark.parametrize("own", [{}, {"sizes": [6, 6]}])
def test_a_tuple_survives_a_round_trip_through_the_config_file(
    own: dict[str, Any], tmp_path: Path
) -> None:
    config = make_config(
        model={"name": "tests.support.user_model:TupleOfSizes", **own}, stop={"last_step": 2}
    )
    train(config, tmp_path / "run")
    assert yaml.load(str(tmp_path / "run" / "config.yaml")).value["model"]["sizes"] == own.get(
        "sizes", [4, 2]
    )
    state = resume(tmp_path / "run", last_step=3)
    assert state.params["in/W"].shape == (64, sum(own.get("sizes", (4, 2))))


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_matches_the_forward_pass(training: bool) -> None:
    model = TwoLayers(width=4, input_shape=(5,), n_outputs=3)
    params = Arena(model.parameter_shapes(), "float64")
    model.initialize(params, lambda name: rng(3, name))
    random = np.random.default_rng(0)
    x, direction = random.normal(size=(7, 5)), random.normal(size=(7, 3))
    params["in/b"][:] = random.normal(size=4)
    workspace = Workspace("float64")

    def forward() -> Any:
        workspace.start((lambda name: rng(4, name)) if training else None)
        return model.forward(params, x, workspace)

    grads = params.like()
    _, backward = forward()
    backward(direction, grads)
    h = 1e-6
    for name, values in params.items():
        numeric = np.empty_like(values)
        for at in np.ndindex(values.shape):
            before, values[at] = values[at], values[at] + h
            above = np.vdot(direction, forward()[0])
            values[at] = before - h
            numeric[at] = (above - np.vdot(direction, forward()[0])) / (2 * h)
            values[at] = before
        np.testing.assert_allclose(grads[name], numeric, rtol=1e-7, atol=1e-8, err_msg=name)
        assert np.abs(numeric).min() > 1e-4, "a gradient of 0 would prove little"


REFUSED: dict[str, dict[str, Any]] = {
    "an argument of the wrong type": {**MODEL, "width": "wide"},
    "an argument that it does not take": {**MODEL, "widht": 3},
    "an argument that it refuses": {**MODEL, "width": 3},
    "a module that is not there": {"name": "user_modle:TwoLayers"},
    "a class that is not there": {"name": "tests.support.user_model:ThreeLayers"},
    "something that cannot be called": {"name": "tests.support.user_model:__doc__"},
    "no model at all": {"name": "tests.support.user_model:no_model"},
    "a gradient that is not written": {"name": "tests.support.user_model:ForgetsTheBias"},
    "outputs of the wrong shape": {"name": "tests.support.user_model:OneOutput"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    config = write_config(tmp_path / "own.yaml", model=REFUSED[case])
    done = CliRunner().invoke(
        cli, ["train", "--config", str(config), "--run-dir", str(tmp_path / "run"), "-q"]
    )
    assert (done.exit_code, done.stdout) == (2, "")
    message = normalize(done.stderr, CONFIG=config)
    assert re.sub(r"\([^ ]*(user_model\.py):\d+", r"(\1:LINE", message) == snapshot
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_found_in_the_current_folder_only(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "own_model.py").write_text("from tests.support.user_model import TwoLayers\n")
    config = write_config(tmp_path / "own.yaml", model={"name": "own_model:TwoLayers"})
    command = ("train", "--config", config, "--run-dir", tmp_path / "run")
    elsewhere = stepctl(*command, cwd=tmp_path)
    assert elsewhere.returncode == 2
    assert (
        "model.name: cannot use 'own_model:TwoLayers': No module named 'own_model'"
        in elsewhere.stderr
    )
    assert not (tmp_path / "run").exists()
    assert stepctl(*command, cwd=code).returncode == 0
