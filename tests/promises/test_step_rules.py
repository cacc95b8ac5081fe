"""Step numbers at their boundaries: targets, cadences, rows, saves and counters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.checkpoint import codec
from stepctl.checkpoint.background import Background
from stepctl.cli.segment import train_segment
from stepctl.config.changes import resume_policy
from stepctl.config.model import KEYS, CadenceConfig, CheckpointConfig, StopConfig
from stepctl.errors import CheckpointError, ConfigError
from stepctl.hooks.base import Hook
from stepctl.hooks.save import Save
from stepctl.programs.base import Metrics
from stepctl.rundir.directory import RunDirectory
from stepctl.runs.at_step import ResumeOptions
from stepctl.runs.open import resume_run
from stepctl.state.arena import same_bits
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason
from stepctl.training.build import assemble
from tests.support.messages import without_paths
from tests.support.run_files import file_contents
from tests.support.runs import RUN_ID, file_bytes, make_config, resume, rows, silent, train

N_TRAINING, BATCH = 30, 8
COSINE = {"name": "cosine", "peak": 0.1, "decay_steps": 40, "warmup_steps": 4}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows of 4 numbers, 3 classes; every row is its own number."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    x = generator.normal(size=(60, 4))
    x[:, 0] = np.arange(60)
    np.savez(path, x=x, y=generator.integers(0, 3, 60))
    return path


@pytest.fixture
def small(samples: Path) -> Any:
    """Return a function: sections -> a small config."""
    data = {"name": "arrays", "path": str(samples), "batch_size": BATCH, "validation_fraction": 0.5}
    optimizer = {"name": "sgd", "learning_rate": COSINE}
    base: dict[str, Any] = {
        "data": data,
        "model": {"name": "mlp", "hidden": [3]},
        "optimizer": optimizer,
        "stop": {"last_step": 12},
        "log": {"every": 1},
        "evaluate": {"every": None},
    }
    return lambda **sections: make_config(**base | sections)


def steps(path: Path, kind: str = "train", extra: bool = False) -> list[int]:
    """Return the steps of the rows of a kind that are, or are not, marked extra."""
    return [
        row["step"]
        for row in rows(path)
        if row["kind"] == kind and row.get("extra", False) == extra
    ]


def saved(path: Path) -> list[int]:
    """Return the steps that were published, in order, with repeats."""
    lines = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "checkpoint"]


def there(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "checkpoints").iterdir())


class Killed(BaseException):
    """Stands for the end of a process that could not help it."""


class Kill(Hook):
    """Ends a segment abruptly once a step is complete."""

    name = "kill"
    essential = True  # a kill leaves nothing to save

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.counters.global_step == self.step:
            raise Killed


class Records(Hook):
    """Notes the counters after every step."""

    name = "records"

    def __init__(self) -> None:
        self.counters: list[dict[str, int]] = []

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        self.counters.append(dict(state.counters))


# --- what a step uses, and what its row says


@pytest.mark.training
def test_the_first_update_uses_the_rate_of_step_0(small: Any, tmp_path: Path) -> None:
    train(small(), tmp_path / "run")
    found = [row["learning_rate"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
    warmup = [0.025, 0.05, 0.075, 0.1]  # lr(0) .. lr(3), in the rows of steps 1 .. 4
    cosine = [0.1 * (1 + np.cos(np.pi * (step - 4) / 36)) / 2 for step in range(4, 12)]
    assert found == pytest.approx(warmup + cosine, rel=1e-12)


@pytest.mark.training
def test_row_n_holds_the_loss_of_the_batch_that_produced_n(small: Any, tmp_path: Path) -> None:
    train(small(), tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
    again = assemble(small())
    for step in range(12):
        batch = again.training.batch(step * BATCH)
        measured = again.task.evaluate(
            again.state, [batch]
        )  # before the update, on the batch it will use
        assert losses[step] == pytest.approx(measured["loss"], rel=1e-6)
        again.task.step(again.state, batch)
        again.state.counters.advance(again.task.increments(again.state.counters, len(batch.x)))
    assert len(set(losses)) == len(losses) == 12


def test_samples_are_used_once_an_epoch_and_batches_run_across_epoch_ends(small: Any) -> None:
    batches = assemble(small()).training
    assert batches.subset.n == N_TRAINING
    drawn = np.concatenate(
        [batches.batch(step * BATCH).x[:, 0].copy() for step in range(15)]
    )  # four whole epochs
    assert len(drawn) == 4 * N_TRAINING
    epochs = drawn.reshape(4, N_TRAINING)
    for epoch in epochs:
        assert sorted(epoch) == sorted(set(epochs[0]))
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.training
def test_the_epoch_is_derived_from_the_samples_seen(small: Any, tmp_path: Path) -> None:
    train(small(stop={"last_step": 16}), tmp_path / "run")
    epochs = [row["epoch"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert epochs == [step * BATCH // N_TRAINING for step in range(1, 17)]
    assert epochs[2:4] == [0, 1]  # 24 and 32 samples of 30
    assert epochs[14] == 4  # 120 samples: the fourth epoch is over to the sample


@pytest.mark.training
def test_counters_advance_once_a_step_and_nowhere_else(small: Any, tmp_path: Path) -> None:
    hook = Records()
    train(small(stop={"last_step": 3}), tmp_path / "run", (hook,))
    assert hook.counters == [
        {"global_step": n, "samples_seen": n * BATCH, "model": n} for n in (1, 2, 3)
    ]  # fmt: skip
    assert not [name for name in dir(Counters) if name.startswith("set") or name == "__setitem__"]
    with pytest.raises(AttributeError):
        Counters({"global_step": 0, "samples_seen": 0}).global_step = 5  # type: ignore[misc]


# --- the initial step and the initial checkpoint


@pytest.mark.training
def test_a_fresh_run_publishes_its_initial_checkpoint(small: Any, tmp_path: Path) -> None:
    config = small(checkpoint={"every": 1000, "keep_last": None})
    train(config, tmp_path / "run")
    assert there(tmp_path / "run") == ["step-00000000.h5", "step-00000012.h5"]
    baseline, restored = assemble(config).state, assemble(small(seed=99)).state
    assert not restored.same_bits(baseline)
    with codec.Reader(tmp_path / "run" / "checkpoints" / "step-00000000.h5") as reader:
        codec.restore(reader, restored)
    assert restored.same_bits(baseline)
    assert np.any(baseline.params.flat)


@pytest.mark.training
@pytest.mark.parametrize("stop", [{"last_step": 0}, {"num_steps": 0}], ids=str)
def test_a_fresh_run_of_no_steps_publishes_it_too(
    stop: dict[str, int], small: Any, tmp_path: Path
) -> None:
    train(small(stop=stop), tmp_path / "run")
    assert there(tmp_path / "run") == ["step-00000000.h5"]
    assert rows(tmp_path / "run") == []
    assert resume(tmp_path / "run", last_step=2).counters.global_step == 2


@pytest.mark.training
def test_an_initial_step_shifts_the_clock_and_nothing_else(small: Any, tmp_path: Path) -> None:
    hook = Records()
    config = small(
        initial_step=100,
        stop={"last_step": 103},
        checkpoint={"every": 1000},
        evaluate={"every": 51},
    )
    train(config, tmp_path / "run", (hook,))
    assert there(tmp_path / "run") == ["step-00000100.h5", "step-00000103.h5"]
    assert hook.counters[0] == {"global_step": 101, "samples_seen": BATCH, "model": 1}
    assert steps(tmp_path / "run") == [101, 102, 103]
    assert steps(tmp_path / "run", "eval") == [102]
    with codec.Reader(tmp_path / "run" / "checkpoints" / "step-00000100.h5") as reader:
        assert reader.header.counters == {"global_step": 100, "samples_seen": 0, "model": 0}
    lines = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["local_step"] == 3
    assert resume(tmp_path / "run", last_step=104).counters["model"] == 4


@pytest.mark.training
def test_the_schedule_follows_the_shifted_clock(small: Any, tmp_path: Path) -> None:
    train(small(initial_step=2, stop={"last_step": 4}), tmp_path / "run")
    assert [
        row["learning_rate"] for row in rows(tmp_path / "run") if row["kind"] == "train"
    ] == pytest.approx([0.075, 0.1])


@pytest.mark.training
def test_counters_that_disagree_are_refused(
    small: Any, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    """The model's own count and the global step differ by the initial step, and a load checks it."""
    path = tmp_path / "run"
    train(small(stop={"last_step": 3}), path)
    with codec.Reader(path / "checkpoints" / "step-00000003.h5") as reader:
        state = assemble(small()).state
        codec.restore(reader, state)
        state = dataclasses.replace(state, counters=Counters(dict(state.counters) | {"model": 2}))
        header = reader.header
    image = codec.encode(
        state,
        run=header.run,
        run_id=header.run_id or RUN_ID,
        config=header.config,
        numerics=header.numerics,
    )
    (path / "checkpoints" / "step-00000003.h5").write_bytes(file_bytes(image))
    with pytest.raises(CheckpointError) as caught:
        resume(path, last_step=5, from_step=3)
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    assert caught.value.code == "counter"


# --- where a segment stops


@pytest.mark.training
@pytest.mark.parametrize(("start", "last"), [(0, 1), (4, 5), (5, 5), (6, 5), (5, 0)])
def test_the_stop_rule_is_checked_before_a_step(
    start: int, last: int, small: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    train(small(stop={"last_step": start}), path)
    before = file_contents(path, "lock")
    state = resume(path, last_step=last)
    assert state.counters.global_step == max(start, last)
    assert (file_contents(path, "lock") == before) == (start >= last)


@pytest.mark.training
@pytest.mark.parametrize(
    "stop",
    [None, StopConfig(last_step=12), StopConfig(last_step=3), StopConfig(num_steps=0)],
    ids=str,
)
def test_a_finished_run_stays_finished_and_says_so(
    stop: StopConfig | None, small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    train(small(), path)
    before = file_contents(path, "lock")
    for _ in range(2):
        with resume_run(RunDirectory(path), ResumeOptions(stop=stop), silent) as segment:
            with pytest.raises(click.exceptions.Exit) as end:
                train_segment(
                    segment, began=0, max_time=None, quiet=True, verbose=False, as_json=False
                )
            assert end.value.exit_code == 0
        assert "at global step 12" in capsys.readouterr().err
        assert file_contents(path, "lock") == before


@pytest.mark.training
def test_num_steps_counts_from_the_start_of_the_segment(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert train(small(stop={"num_steps": 5}), path).counters.global_step == 5
    assert resume(path).counters.global_step == 5  # the recorded target was reached
    for total in (8, 11):
        with resume_run(
            RunDirectory(path), ResumeOptions(stop=StopConfig(num_steps=3)), silent
        ) as segment:
            segment.train()
            assert segment.state.counters.global_step == total


@pytest.mark.training
def test_num_steps_counts_from_the_initial_step(small: Any, tmp_path: Path) -> None:
    assert (
        train(small(initial_step=50, stop={"num_steps": 2}), tmp_path / "run").counters.global_step
        == 52
    )


@pytest.mark.training
def test_a_target_below_the_initial_step_is_refused(small: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="below initial_step 50"):
        train(small(initial_step=50, stop={"last_step": 49}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stop", [{"last_step": 5, "num_steps": 5}, {}], ids=str)
def test_both_targets_or_none_are_an_error(stop: dict[str, int], small: Any) -> None:
    with pytest.raises(ConfigError, match="give either last_step"):
        small(stop=stop)


@pytest.mark.training
def test_a_killed_segment_is_finished_by_a_plain_resume(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    cadence = {"checkpoint": {"every": 4}}
    with pytest.raises(Killed):
        train(small(stop={"num_steps": 12}, **cadence), path, (Kill(6),))
    with pytest.raises(Killed):
        resume(path, hooks=(Kill(9),))  # from 4, still to 12
    assert resume(path).counters.global_step == 12
    with pytest.raises(Killed):
        resume(path, last_step=20, hooks=(Kill(15),))
    assert resume(path).counters.global_step == 20
    assert resume(path).counters.global_step == 20


@pytest.mark.training
def test_an_explicit_num_steps_counts_from_the_restored_step(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Killed):
        train(small(checkpoint={"every": 4}), path, (Kill(6),))
    with resume_run(
        RunDirectory(path), ResumeOptions(stop=StopConfig(num_steps=3)), silent
    ) as segment:
        assert (segment.start, segment.target) == (4, 7)


@pytest.mark.training
def test_a_changed_stop_section_replaces_the_recorded_target(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(stop={"last_step": 3}), path)
    assert resume(path, assignments=("stop.last_step=6",)).counters.global_step == 6
    assert resume(path).counters.global_step == 6


# --- what fires when

GRIDS: list[tuple[int | None, int, list[int]]] = [
    (1, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
    (5, 0, [0, 5, 10]),
    (5, 1, [1, 6, 11]),
    (5, 4, [4, 9]),
    (12, 0, [0, 12]),
    (13, 12, [12]),
    (100, 0, [0]),
    (None, 0, []),
]


@pytest.mark.parametrize(("every", "offset", "expected"), GRIDS)
def test_the_grid(every: int | None, offset: int, expected: list[int]) -> None:
    cadence = CadenceConfig(every=every, offset=offset).cadence()
    counters, fired = Counters({"global_step": 0, "samples_seen": 0}), []
    for step in range(1, 13):
        counters.advance({"global_step": 1})
        fired += [step] if cadence.fires(counters) else []
    assert fired == [step for step in expected if step]


@pytest.mark.parametrize("offset", [5, 6])
def test_an_offset_that_never_comes_is_refused(
    offset: int, small: Any, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(ConfigError) as caught:
        small(log={"every": 5, "offset": offset})
    assert str(caught.value) == snapshot


@pytest.mark.training
def test_every_10_with_offset_1_reads_1_11_21(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(log={"every": 10, "offset": 1}, stop={"last_step": 21}), path)
    assert (steps(path), steps(path, extra=True)) == ([1, 11, 21], [])


@pytest.mark.training
def test_the_first_row_is_written_off_the_grid_once_a_run(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(log={"every": 5}, stop={"last_step": 7}), path)
    assert (steps(path), steps(path, extra=True)) == ([1, 5], [7])
    resume(path, last_step=11)
    assert (steps(path), steps(path, extra=True)) == (
        [1, 5, 10],
        [11],
    )  # no first row of a segment; 7 was cut


@pytest.mark.training
def test_a_run_of_one_step_has_one_row(small: Any, tmp_path: Path) -> None:
    train(small(log={"every": 5}, stop={"last_step": 1}), tmp_path / "run")
    assert (steps(tmp_path / "run"), steps(tmp_path / "run", extra=True)) == ([1], [])


@pytest.mark.training
@pytest.mark.parametrize(
    ("last", "on_grid", "extra"), [(7, [4], [7]), (8, [4, 8], []), (3, [], [3])]
)
def test_the_final_evaluation_is_extra_off_the_grid_only(
    last: int, on_grid: list[int], extra: list[int], small: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    train(small(evaluate={"every": 4}, stop={"last_step": last}), path)
    assert (steps(path, "eval"), steps(path, "eval", extra=True)) == (on_grid, extra)


@pytest.mark.training
def test_extra_rows_are_removed_on_resume(small: Any, tmp_path: Path) -> None:
    cadence = {"log": {"every": 5}, "evaluate": {"every": 6}}
    train(small(**cadence), tmp_path / "unbroken")
    path = tmp_path / "run"
    train(small(**cadence, stop={"last_step": 3}), path)
    assert (steps(path, extra=True), steps(path, "eval", extra=True)) == ([3], [3])
    resume(path, last_step=12)
    assert rows(path) == rows(tmp_path / "unbroken")


SAVES: list[tuple[int, int, list[int]]] = [
    (5, 12, [0, 5, 10, 12]),
    (5, 10, [0, 5, 10]),
    (5, 4, [0, 4]),
    (1, 3, [0, 1, 2, 3]),
    (100, 3, [0, 3]),
]


@pytest.mark.training
@pytest.mark.parametrize(("every", "last", "expected"), SAVES)
def test_saves_fall_on_the_grid_and_at_the_end_and_never_twice(
    every: int, last: int, expected: list[int], small: Any, tmp_path: Path
) -> None:
    train(small(checkpoint={"every": every}, stop={"last_step": last}), tmp_path / "run")
    assert saved(tmp_path / "run") == expected


@pytest.mark.training
def test_saves_of_a_resumed_run_fall_on_the_same_grid(small: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(small(checkpoint={"every": 5}, stop={"last_step": 3}), path)
    resume(path, last_step=11)
    assert saved(path) == [0, 3, 5, 10, 11]  # absolute, and 3 not again at the start


def test_a_requested_save_is_made_once_also_on_the_grid(small: Any) -> None:
    published, requests = [], {3, 5}
    state = assemble(small()).state
    background = Background()
    hook = Save(
        CheckpointConfig(every=5),
        publish=lambda state: published.append(state.counters.global_step),
        flush=lambda: None,
        report=lambda: None,
        requested=lambda: (
            state.counters.global_step in requests
            and not requests.remove(state.counters.global_step)
        ),
        background=background,
        say=pytest.fail,
        note=silent,
        saved_step=0,
        target=100,
    )
    hook.start(state)
    for _ in range(7):
        state.counters.advance({"global_step": 1})
        hook.after_step(state, {})
    background.finish()
    assert (published, requests) == ([3, 5], set())
    hook.end(state, {}, StopReason("", done=True))
    assert published == [3, 5, 7]


@pytest.mark.training
def test_checkpoint_n_holds_the_state_after_exactly_n_updates(small: Any, tmp_path: Path) -> None:
    """The checkpoint of step N of a long run equals that of a run of N steps."""
    train(small(checkpoint={"every": 4, "keep_last": None}), tmp_path / "long")
    train(small(stop={"last_step": 8}), tmp_path / "short")
    states = []
    for name in ("long", "short"):
        state = assemble(small()).state
        with codec.Reader(tmp_path / name / "checkpoints" / "step-00000008.h5") as reader:
            codec.restore(reader, state)
        states.append(state)
    assert states[0].same_bits(states[1])
    assert states[0].counters.global_step == 8
    assert not states[0].same_bits(assemble(small()).state)


@pytest.mark.training
def test_two_hooks_of_one_name_are_refused(small: Any, tmp_path: Path) -> None:
    """A checkpoint could hold the memory of one of them only."""
    with pytest.raises(ConfigError, match="kill"):
        train(small(), tmp_path / "run", (Kill(5), Kill(6)))
    assert not (tmp_path / "run").exists()


# --- what may change on resume


@pytest.mark.training
def test_a_batch_size_changed_on_resume_keeps_the_position_in_the_data(
    small: Any, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    path, hook = tmp_path / "run", Records()
    train(small(stop={"last_step": 3}), path)
    with pytest.raises(ConfigError) as caught:
        resume(path, last_step=5, assignments=("data.batch_size=6",))
    assert without_paths(str(caught.value), HERE=tmp_path) == snapshot
    options: dict[str, Any] = {
        "assignments": ("data.batch_size=6",),
        "allow_change": ("data.batch_size",),
    }
    resume(path, last_step=5, hooks=(hook,), **options)
    assert [counters["samples_seen"] for counters in hook.counters] == [30, 36]


@pytest.mark.training
@pytest.mark.parametrize(
    "key", ["log.every", "evaluate.every", "checkpoint.every", "checkpoint.keep_last"]
)
def test_live_keys_may_change_and_touch_no_bit(key: str, small: Any, tmp_path: Path) -> None:
    expected = train(small(), tmp_path / "unbroken")
    train(small(stop={"last_step": 5}), tmp_path / "run")
    state = resume(tmp_path / "run", last_step=12, assignments=(f"{key}=2",))
    for path, array in expected.arrays().items():
        if not path.startswith(
            "hooks/"
        ):  # what evaluations came to is another matter if they were others
            assert same_bits(state.arrays()[path], array), path
    assert dict(state.counters) == dict(expected.counters)
    assert resume_policy(key) == "live"


def test_every_key_has_a_policy() -> None:
    policies = {key: resume_policy(key) for key in KEYS}
    assert policies.pop("hooks") == "live; locked with state"
    assert set(policies.values()) == {"live", "locked"}
    for key in ("seed", "dtype", "initial_step", "data", "model", "task", "optimizer", "numerics"):
        assert policies[key] == "locked"
