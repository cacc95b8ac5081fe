"""A series of 10^6 samples: a run that is killed many times has those of the plain program."""

from __future__ import annotations

import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import stepctl
from stepctl.reports.verify import verify
from tests.support.processes import start, until
from tests.support.program_examples import EXAMPLES
from tests.support.program_runs import run_script, script_process
from tests.support.run_checks import assert_nothing_lost, checkpoints

Figure = Callable[[str, int], None]
N = 10**6
KILLS = 12
RECORD = 8 + 2 * 8  # bytes: the step and a sample
SETTINGS = {"last_step": N, "log_every": 1000, "checkpoint_every": 20_000, "keep_last": 2}
MOST_SECONDS = 1800.0  # only a hang comes near it


@pytest.mark.faults
def test_a_million_samples_are_those_of_the_plain_program(tmp_path: Path, figure: Figure) -> None:
    example = next(example for example in EXAMPLES if example.name == "hmc")
    code = example.file("plain").read_text()
    assert "N_STEPS = 40\n" in code
    (tmp_path / "plain.py").write_text(code.replace("N_STEPS = 40\n", f"N_STEPS = {N}\n"))
    plain = runpy.run_path(str(tmp_path / "plain.py"))

    run = tmp_path / "run"
    words = [example.file("script"), run, json.dumps(SETTINGS)]
    chance = random.Random(0)
    ends = sorted(chance.randrange(1, N) for _ in range(KILLS))
    killed_at = []
    for end in ends:
        with start(words, cwd=tmp_path, call=script_process) as child:
            until(lambda: rows(run) >= end or not child.running(), MOST_SECONDS)  # noqa: B023
            child.kill()
            assert child.wait() == -9, child.said()
        killed_at.append(rows(run))
        assert_nothing_lost(run, SETTINGS["keep_last"])
    with start(words, cwd=tmp_path, call=script_process) as child:
        assert child.wait(MOST_SECONDS) == 0, child.said()

    steps, samples = stepctl.load_series(run, "samples", steps=True)
    np.testing.assert_array_equal(steps, np.arange(1, N + 1))
    np.testing.assert_array_equal(samples, plain["samples"])
    state = run_script(example.file("script"), run, **SETTINGS)["state"]  # it makes no step
    np.testing.assert_array_equal(state["x"], plain["x"])
    assert state["accepted"] == plain["accepted"]
    assert state["rng"].bit_generator.state == plain["rng"].bit_generator.state
    assert verify(str(run))[1] == []
    assert max(checkpoints(run)) == N
    assert len(set(killed_at)) > KILLS // 2
    figure("kills of a run of 10^6 samples", KILLS)


def rows(run: Path) -> int:
    """Return the number of rows of the series that are in its file."""
    try:
        return (run / "series" / "samples.bin").stat().st_size // RECORD
    except FileNotFoundError:
        return 0
