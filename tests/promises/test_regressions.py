"""Former ways to lose a row, a checkpoint or a bit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.errors import CheckpointError, ConfigError, DataError
from stepctl.hooks.evaluate import Evaluate
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.open import create_run
from tests.support.messages import without_paths
from tests.support.runs import make_config, resume, rows, train

SAVES = {"checkpoint": {"every": 10, "keep_last": None}}


@pytest.mark.training
def test_a_kill_in_the_final_evaluation_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**SAVES)
    expected = train(config, tmp_path / "whole")

    class Kill(BaseException):
        pass

    def end(*_: Any) -> None:
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(Evaluate, "end", end)
        with pytest.raises(Kill):
            train(config, tmp_path / "killed")
    assert resume(tmp_path / "killed").same_bits(expected)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.training
def test_a_config_too_long_to_read_back_is_refused_before_training(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    n = 9000
    schedule = {"name": "piecewise_constant", "boundaries": list(range(1, n)), "values": [0.1] * n}
    with pytest.raises(ConfigError) as caught:
        train(make_config(optimizer={"name": "sgd", "learning_rate": schedule}), tmp_path / "run")
    size = r"\d{6}(?= bytes)"  # the name of the BLAS kernel counts
    assert without_paths(str(caught.value), (size,), HERE=tmp_path) == snapshot
    assert not (tmp_path / "run").exists()


@pytest.mark.training
def test_a_new_schedule_without_a_horizon_is_refused_and_not_recorded(tmp_path: Path) -> None:
    train(make_config(stop={"last_step": 5}), tmp_path / "run")
    key = "optimizer.learning_rate"
    change = {"assignments": (f"{key}={{name: cosine, peak: 0.01}}",), "allow_change": (key,)}
    with pytest.raises(ConfigError, match="decay_steps: is missing"):
        resume(tmp_path / "run", last_step=8, **change)
    assert resume(tmp_path / "run", last_step=8).counters.global_step == 8


@pytest.mark.training
@pytest.mark.parametrize(
    "stranger", [{"model": {"name": "mlp", "hidden": [24]}}, {"seed": 5}], ids=["shape", "seed"]
)
def test_another_runs_checkpoint_is_passed_over(stranger: dict[str, Any], tmp_path: Path) -> None:
    expected = train(make_config(), tmp_path / "whole")
    train(make_config(stop={"last_step": 20}), tmp_path / "run")
    train(make_config(stop={"last_step": 30}, **stranger), tmp_path / "other")
    name = "checkpoints/step-00000030.h5"
    shutil.copy(tmp_path / "other" / name, tmp_path / "run" / name)
    said: list[str] = []
    state = resume(tmp_path / "run", last_step=40, say=said.append)
    assert state.same_bits(expected)
    assert len(said) == 1
    assert said[0].startswith("step-00000030.h5: belongs to another run (run_id ")
    assert said[0].endswith("using step-00000020.h5")


@pytest.mark.training
def test_a_locked_key_edited_in_the_frozen_config_is_noticed(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    train(make_config(stop={"last_step": 5}), tmp_path / "run")
    frozen = tmp_path / "run" / "config.yaml"
    text = frozen.read_text()
    assert "value: 0.01" in text
    frozen.write_text(text.replace("value: 0.01", "value: 0.5"))
    with pytest.raises(CheckpointError) as caught:
        resume(tmp_path / "run", last_step=8)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot


@pytest.mark.training
def test_a_checkpoint_that_cannot_be_removed_does_not_stop_training(tmp_path: Path) -> None:
    train(make_config(stop={"last_step": 20}), tmp_path / "run")
    os.mkdir(tmp_path / "run" / "checkpoints" / "step-00000010.h5")
    changed = {"assignments": ("checkpoint.every=5", "checkpoint.keep_last=1")}
    assert resume(tmp_path / "run", last_step=40, **changed).counters.global_step == 40


@pytest.mark.training
def test_lines_that_no_segment_wrote_do_not_stop_a_resume(tmp_path: Path) -> None:
    train(make_config(stop={"last_step": 20}), tmp_path / "run")
    for name, lines in (
        ("ledger", '{}\n{"event": "start"}\n[1]\n'),
        ("metrics", '{}\n{"step": null}\n'),
    ):
        with open(tmp_path / "run" / f"{name}.jsonl", "a") as file:
            file.write(lines)
    expected = train(make_config(), tmp_path / "whole")
    assert resume(tmp_path / "run", last_step=40).same_bits(expected)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.training
def test_a_run_whose_checkpoints_are_elsewhere_is_not_restarted(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    train(make_config(stop={"last_step": 5}), tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        train(make_config(), tmp_path / "run")
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        resume(tmp_path / "run")
    assert rows(tmp_path / "run")


@pytest.mark.training
def test_a_state_of_too_many_arrays_is_refused_before_it_is_saved(tmp_path: Path) -> None:
    model = {"name": "mlp", "hidden": [1] * 4500}
    with pytest.raises(ConfigError, match="arrays and groups"):
        train(make_config(model=model), tmp_path / "run")


@pytest.mark.training
def test_a_run_directory_of_an_odd_name_trains(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/nu\xff"))
    assert train(make_config(stop={"last_step": 2}), path).counters.global_step == 2


@pytest.mark.training
def test_falling_back_behind_a_config_change_is_reported(tmp_path: Path) -> None:
    train(make_config(**SAVES, stop={"last_step": 20}), tmp_path / "run")
    change = {"assignments": ("data.batch_size=24",), "allow_change": ("data.batch_size",)}
    resume(tmp_path / "run", last_step=30, **change)
    said: list[str] = []
    resume(tmp_path / "run", from_step=10, say=said.append)
    assert "step-00000010.h5 was saved with data.batch_size 48; continuing with 24" in said


@pytest.mark.training
@pytest.mark.parametrize("name", ["cosine", "polynomial"])
@pytest.mark.parametrize(("end", "left"), [(0.0, "0, which changes no weight"), (0.001, "0.001")])
def test_a_target_past_the_decay_is_reported_with_the_remaining_rate(
    name: str, end: float, left: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    optimizer = {"name": "adam", "learning_rate": {"name": name, "peak": 0.01, "end": end}}
    before = train(make_config(optimizer=optimizer, stop={"last_step": 4}), tmp_path / "run")
    said: list[str] = []
    after = resume(tmp_path / "run", last_step=6, say=said.append)
    assert (before.params.flat == after.params.flat).all() == (end == 0)
    key = "optimizer.learning_rate.decay_steps"
    remedy = f"--set {key}=6 --allow-change {key}"
    assert [without_paths(line, HERE=tmp_path) for line in said] == snapshot
    _, assignment, _, allowed = remedy.split()
    said.clear()
    resume(
        tmp_path / "run",
        last_step=8,
        assignments=(assignment.replace("6", "8"),),
        allow_change=(allowed,),
    )
    assert said == []


@pytest.mark.training
def test_a_new_run_past_its_decay_says_it_too(tmp_path: Path) -> None:
    schedule = {"name": "cosine", "peak": 0.01, "decay_steps": 4}
    said: list[str] = []
    config = make_config(
        optimizer={"name": "adam", "learning_rate": schedule}, stop={"last_step": 6}
    )
    with create_run(config, RunDirectory(tmp_path / "run"), said.append):
        pass
    assert (
        "from there to 6 the rate is 0, which changes no weight (to stretch the decay: --set "
        in said[0]
    )


@pytest.mark.process
def test_another_libm_is_another_numerics() -> None:
    code = "from stepctl.system import blas; print(blas.set_threads(1)['functions'])"
    environments = ({}, {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX"})
    probes = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | extra,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in ({}, *environments)
    ]
    assert probes[0] == probes[1]
    if platform.machine() == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text():
        assert probes[1] != probes[2]


@pytest.mark.training
def test_data_that_were_changed_with_leave_are_looked_through(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    x, path = np.linspace(0, 1, 60).reshape(30, 2).astype("f4"), str(tmp_path / "a.npz")
    np.savez(path, x=x, y=np.arange(30) % 3)
    data = {"name": "arrays", "path": path, "batch_size": 10, "n_classes": 3}
    train(make_config(data=data, evaluate={"every": None}, stop={"last_step": 2}), tmp_path / "run")
    np.savez(path, x=x, y=np.arange(30) % 5)
    with pytest.raises(DataError) as caught:
        resume(tmp_path / "run", last_step=4, allow_change=("data",))
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
