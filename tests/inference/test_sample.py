"""Samples of a generative model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.state.arena import Array
from tests.support.messages import normalize
from tests.support.trained_runs import WGAN, train_digits


@pytest.fixture(scope="module")
def wgan_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wgan") / "run"
    return train_digits(path, stop={"last_step": 3}, ema={"decay": 0.5}, **WGAN)


def call(*arguments: object, expect: int = 0) -> str:
    """Run a command in this process; return stdout, or stderr after an error."""
    result = CliRunner().invoke(cli, [*map(str, arguments)], prog_name="stepctl")
    assert result.exit_code == expect, result.output
    return result.stderr if expect else result.stdout


def samples(run: Path, *options: object) -> Array:
    """Return what the command writes."""
    output = run.parent / "samples.npz"
    call("sample", run, "-o", output, *options)
    with np.load(output) as archive:
        found: Array = archive["x"]
    output.unlink()
    return found


def test_samples_depend_on_weights_and_seed_alone(wgan_run: Path) -> None:
    first = samples(wgan_run)
    assert first.shape == (64, 64)
    assert first.dtype == np.float32
    assert np.array_equal(first, samples(wgan_run))
    assert np.array_equal(first[:5], samples(wgan_run, "-n", 5))
    assert not np.array_equal(first, samples(wgan_run, "--seed", 7))
    assert np.array_equal(samples(wgan_run, "--seed", 7), samples(wgan_run, "--seed", 7))
    assert np.array_equal(first, samples(wgan_run, "--seed", 1))  # the seed of the run
    assert not np.array_equal(first, samples(wgan_run, "--ema"))
    assert not np.array_equal(first, samples(wgan_run, "--step", 0))


def test_they_are_those_of_the_pictures_and_of_python(wgan_run: Path) -> None:
    model = stepctl.load_model(wgan_run)
    assert np.array_equal(samples(wgan_run, "-n", 9), model.sample(9))
    with stepctl.resume(wgan_run, num_steps=0, say=lambda line: None) as run:
        task: Any = run._segment.assembly.task
        assert np.array_equal(task.generate(run.state, 9), model.sample(9))


@pytest.mark.process
def test_a_file_alone_is_enough(wgan_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights.h5"
    copy.write_bytes((wgan_run / "checkpoints" / "step-00000003.h5").read_bytes())
    assert np.array_equal(samples(copy, "-n", 3), samples(wgan_run, "-n", 3))


def test_json(wgan_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.npz"
    found = json.loads(call("sample", wgan_run, "-n", 2, "-o", output, "--json"))
    assert found == {"step": 3, "output": str(output), "shape": [2, 64]}


def test_bad_input(
    wgan_run: Path, digits_run: Path, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    output = tmp_path / "samples.npz"
    tries: list[list[object]] = [
        [digits_run, "-o", output],
        [wgan_run, "-o", tmp_path / "samples.png"],
        [wgan_run, "-o", output, "-n", 0],
        [wgan_run, "-o", output, "-n", 10**18],
        [wgan_run, "-o", output, "--seed", -1],
        [wgan_run],
    ]
    found = []
    for arguments in tries:
        message = call("sample", *arguments, expect=2)
        numbers = r"\(.*\)"  # the words of NumPy
        found.append(normalize(message, (numbers,), HERE=tmp_path, RUN=digits_run))
    assert found == snapshot
    assert [*tmp_path.iterdir()] == []
