"""`data.order: sequential`: rows in the order of the file, across epoch ends, for shards and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

from stepctl.cli.main import cli
from stepctl.config import yaml
from stepctl.data.base import Source
from stepctl.data.batches import EvaluationBatches, Subset, TrainingBatches, split_source
from stepctl.data.memory import InMemory
from stepctl.errors import ConfigError
from stepctl.state.arena import Array
from stepctl.training.assembly import TaskAssembly
from stepctl.training.build import prepare
from tests.support.runs import BASE, make_config, resume, rows, train

ORDER = "sequential"
DATA = {**BASE["data"], "order": ORDER}


def numbers(n: int) -> Source:
    """Return a source whose row i holds i."""
    x = np.arange(n)
    return InMemory(x, x, origin="numbers", targets="any", dtype="float64", integer_inputs=True)


def batches(subset: Subset, batch_size: int, **options: Any) -> TrainingBatches:
    return TrainingBatches(
        subset, seed=5, batch_size=batch_size, dtype="float64", order=ORDER, **options
    )


def read(found: TrainingBatches, position: int) -> Array:
    """Return the rows of a batch."""
    x, y = found.batch(position)
    np.testing.assert_array_equal(x, y)
    return x.copy()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 25])
def test_a_batch_is_the_next_rows_of_the_file_again_and_again(batch_size: int) -> None:
    subset = Subset(numbers(10), 10)
    one_after_another = batches(subset, batch_size)
    for step in range(200):
        position = step * batch_size
        expected = np.arange(position, position + batch_size) % 10
        np.testing.assert_array_equal(read(one_after_another, position), expected)
    jumping = batches(subset, batch_size)
    for position in np.random.default_rng(0).integers(0, 10**15, 50).tolist():
        expected = (position + np.arange(batch_size)) % 10
        np.testing.assert_array_equal(read(jumping, position), expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("per_step", [1, 3])
def test_the_ranks_read_consecutive_parts_of_each_batch(per_step: int, ranks: int) -> None:
    subset = Subset(numbers(30), 30)
    parts = [batches(subset, 8, per_step=per_step, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(40):
        position = step * 8 * per_step
        found = [read(part, position).reshape(per_step, 8 // ranks) for part in parts]
        expected = (position + np.arange(8 * per_step)) % 30
        np.testing.assert_array_equal(np.concatenate(found, axis=1).ravel(), expected)


@pytest.mark.parametrize(("n", "fraction"), [(10, 0.1), (23, 0.3), (2, 0.5)])
def test_the_validation_rows_are_the_last_ones(n: int, fraction: float) -> None:
    training, validation = split_source(numbers(n), fraction, seed=3, order=ORDER)
    found = [training.rows(np.arange(training.n)), validation.rows(np.arange(validation.n))]
    np.testing.assert_array_equal(np.concatenate(found), np.arange(n))
    assert validation.n == round(n * fraction)
    evaluation = EvaluationBatches(validation, batch_size=4, dtype="float64")
    evaluated = np.concatenate([batch.x.copy() for batch in evaluation])
    np.testing.assert_array_equal(evaluated, np.arange(training.n, n))


def test_a_run_reads_the_first_rows_and_evaluates_the_last_ones() -> None:
    assembly = prepare(make_config(data=DATA))
    assert isinstance(assembly, TaskAssembly)
    assert assembly.validation is not None
    [(_, x, _)] = assembly.sources[0].slices()
    np.testing.assert_array_equal(assembly.training.batch(0).x, x[:48])
    around_the_end = np.concatenate([x[144:180], x[:12]])
    np.testing.assert_array_equal(assembly.training.batch(144).x, around_the_end)
    evaluated = np.concatenate([batch.x.copy() for batch in assembly.validation])
    np.testing.assert_array_equal(evaluated, x[180:])


@pytest.mark.training
def test_an_epoch_ends_where_the_counter_says(tmp_path: Path) -> None:
    config = make_config(data=DATA, log={"every": 1}, stop={"last_step": 9})
    train(config, tmp_path / "run")
    found = [row["epoch"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert found == [step * 48 // 180 for step in range(1, 10)]


@pytest.mark.training
def test_the_order_is_locked(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    train(make_config(data=DATA, stop={"last_step": 2}), tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        resume(tmp_path / "run", last_step=4, assignments=("data.order=shuffled",))
    assert str(caught.value) == snapshot
    changed = {"assignments": ("data.order=shuffled",), "allow_change": ("data.order",)}
    assert resume(tmp_path / "run", last_step=4, **changed).counters.global_step == 4


@pytest.mark.training
def test_the_reading_commands_know_the_order(tmp_path: Path) -> None:
    config = {**BASE, "data": DATA, "stop": {"last_step": 4}}
    (tmp_path / "c.yaml").write_text(yaml.dumps(config))

    def call(*arguments: object) -> str:
        done = CliRunner().invoke(cli, [*map(str, arguments)])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    planned = json.loads(call("plan", tmp_path / "c.yaml", "--json"))
    assert planned["samples"] == {"training": 180, "validation": 1617, "shape": [64]}
    run = tmp_path / "run"
    call("train", "--config", tmp_path / "c.yaml", "--run-dir", run, "-q")
    for command in ("inspect", "plan"):
        assert json.loads(call(command, run, "--json"))
    assert "order: sequential" in (run / "config.yaml").read_text()
    call("verify", run, "--replay", "0:4")


def test_an_unknown_order_is_refused(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(data={**DATA, "order": "random"})
    assert str(caught.value) == snapshot
