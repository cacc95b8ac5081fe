"""Models that are trained by their loss, each beside a plain program of nearly the same length, are exact.

`pytest -n 0 -s tests/program_examples/test_loss_examples.py` prints the lengths.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import pytest

from tests.distributed import test_ranks as ranks
from tests.support.mpi_jobs import needs_mpi
from tests.support.processes import start
from tests.support.program_examples import LOSS_EXAMPLES, LossExample, write_data
from tests.support.program_runs import LOSS, config, rows, saved_state, train
from tests.support.run_checks import checkpoints

MOST_LONGER = 10  # lines
LAST_STEP = 20  # of the runs that are stopped
STOPS = range(LAST_STEP)
SOME_STOPS = (0, 8, LAST_STEP - 1)
by_name = pytest.mark.parametrize("name", LOSS_EXAMPLES)
by_shards = pytest.mark.parametrize("shards", [1, 4])
# by default the harder case: four shards use the tree sum too
mostly_four_shards = pytest.mark.parametrize(
    "shards", [pytest.param(1, marks=pytest.mark.faults), 4]
)
Unbroken = Callable[[str, int], tuple[LossExample, Path]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Return a function: (name, shards) -> the example, and its run with a checkpoint of every step."""
    data = tmp_path_factory.mktemp("data")
    write_data(data)
    known: dict[tuple[str, int], tuple[LossExample, Path]] = {}

    def find(name: str, shards: int) -> tuple[LossExample, Path]:
        if (name, shards) not in known:
            example = LossExample(name, data, shards, LAST_STEP)
            run = tmp_path_factory.mktemp("unbroken") / "run"
            train(example, LOSS, run, checkpoint_every=1)
            known[name, shards] = example, run
        return known[name, shards]

    return find


# --- the plain programs


def length(path: Path) -> int:
    """Return the number of lines of a file that are not blank."""
    return sum(bool(line.strip()) for line in path.read_text().splitlines())


@by_name
def test_model_and_config_are_hardly_longer_than_the_plain_program(
    name: str, tmp_path: Path
) -> None:
    """All lines that are not blank count, those of the config too. The plain program cannot be resumed."""
    example = LossExample(name, tmp_path)
    plain = length(example.file("plain.py"))
    model = length(example.file("model.py"))
    written = length(example.file("config.yaml"))
    print(f"\n{name}: {plain} lines; with stepctl {model} lines and a config of {written}")
    assert model + written <= plain + MOST_LONGER


@pytest.mark.process
@by_name
def test_both_forms_run_as_written_and_learn_alike(name: str, tmp_path: Path) -> None:
    """They draw other batches, so their losses are alike but not equal."""
    write_data(tmp_path)
    example = LossExample(name, tmp_path)
    for file in ("plain.py", "model.py", "config.yaml"):
        shutil.copy(example.file(file), tmp_path)
    plain = subprocess.run(
        [sys.executable, "plain.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, *_, last = (float(loss) for loss in re.findall(r": loss ([\d.]+)", plain.stdout))
    with start(["train", "config.yaml", "-q"], cwd=tmp_path) as child:
        assert child.wait() == 0, child.said()
    losses = [row["loss"] for row in rows(tmp_path / "runs" / "config")]
    assert losses[-1] < 0.75 * losses[0]
    assert losses[0] == pytest.approx(first, rel=0.2)
    assert losses[-1] == pytest.approx(last, rel=0.2)


def test_the_embeddings_of_the_gpt_do_not_decay(unbroken: Unbroken, tmp_path: Path) -> None:
    """A character that never occurs has no gradient: without a decay its embedding keeps its bits."""
    _, run = unbroken("gpt", 1)
    files = checkpoints(run)
    with h5py.File(files[0]) as initial, h5py.File(files[LAST_STEP]) as final:
        paths = [f"params/{name}" for name in ("embedding/characters", "head/weight")]
        before, after = ([file[path][()] for path in paths] for file in (initial, final))
    assert (before[0][0] == after[0][0]).all()
    assert (before[0][ord("e")] != after[0][ord("e")]).any()
    assert (before[1][:, 0] != after[1][:, 0]).all()


# --- exactness


@pytest.mark.training
@mostly_four_shards
@by_name
def test_stopped_after_every_step_of_one_run(
    name: str, shards: int, unbroken: Unbroken, tmp_path: Path
) -> None:
    example, expected = unbroken(name, shards)
    run = tmp_path / "run"
    for step in STOPS:
        train(example, LOSS, run, step)
        assert saved_state(run, step) == saved_state(expected, step)
    train(example, LOSS, run)
    assert saved_state(run) == saved_state(expected)
    assert rows(run) == rows(expected)


@pytest.mark.training
@mostly_four_shards
@by_name
def test_stopped_once(name: str, shards: int, unbroken: Unbroken, tmp_path: Path) -> None:
    stop_once(SOME_STOPS, *unbroken(name, shards), tmp_path)


@pytest.mark.faults
@by_shards
@by_name
def test_stopped_once_after_any_step(
    name: str, shards: int, unbroken: Unbroken, tmp_path: Path
) -> None:
    stop_once(STOPS, *unbroken(name, shards), tmp_path)


def stop_once(stops: Iterable[int], example: LossExample, expected: Path, folder: Path) -> None:
    """Stop a run after each of the steps, and continue it to its end."""
    for step in stops:
        run = folder / f"stopped-at-{step}"
        train(example, LOSS, run, step)
        train(example, LOSS, run)
        assert saved_state(run) == saved_state(expected), step
        assert rows(run) == rows(expected), step


@by_name
def test_shards_and_what_goes_with_them_change_the_bits(name: str, unbroken: Unbroken) -> None:
    """Equal runs would prove nothing."""
    one, four = (saved_state(unbroken(name, shards)[1]) for shards in (1, 4))
    shared = [path for path in one if path.startswith("params/")]
    assert all(one[path] != four[path] for path in shared)
    assert any(path.startswith("ema/") for path in four)
    assert {row["kind"] for row in rows(unbroken(name, 4)[1])} == {"train", "eval"}


@pytest.mark.process
@mostly_four_shards
@by_name
def test_replay_fork_and_diff(name: str, shards: int, unbroken: Unbroken, tmp_path: Path) -> None:
    _, parent = unbroken(name, shards)
    fork = tmp_path / "fork"
    for command in (
        ["verify", parent, "--replay", f"5:{LAST_STEP}"],
        ["fork", parent, "--at", 17, "--run-dir", fork],
        ["resume", fork, "-q"],
    ):
        with start(command, cwd=tmp_path) as child:
            assert child.wait() == 0, child.said()
    assert saved_state(fork) == saved_state(parent)
    assert rows(fork) == [row for row in rows(parent) if row["step"] > 17]
    files = [checkpoints(run)[LAST_STEP] for run in (parent, fork)]
    for other, code in ((files[1], 0), (checkpoints(parent)[LAST_STEP - 1], 1)):
        with start(["diff", files[0], other], cwd=tmp_path) as child:
            assert child.wait() == code, child.said()


@pytest.mark.mpi
@needs_mpi
def test_two_ranks_stopped_once_give_the_bits_of_one(unbroken: Unbroken, tmp_path: Path) -> None:
    items = []
    expected = []
    for name in LOSS_EXAMPLES:
        example, alone = unbroken(name, 4)
        settings = config(example, last_step=LAST_STEP, checkpoint_every=1)
        items.append(ranks.training(ranks.new_run(tmp_path / name), settings, 17))
        expected.append(alone)
    ranks.do("trainings", 2, items, tmp_path)
    resumed = [item | {"config": None, "stop": None} for item in items]
    ranks.do("trainings", 2, resumed, tmp_path)
    for item, alone in zip(items, expected, strict=True):
        run = Path(item["path"])
        assert rows(run) == rows(alone)
        assert checkpoints(run).keys() == checkpoints(alone).keys()
        for step in checkpoints(run):
            assert saved_state(run, step) == saved_state(alone, step)
