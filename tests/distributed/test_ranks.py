"""With the same shards, the number of ranks changes no bit, wherever a run stops and resumes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepctl.distributed import shared_memory
from stepctl.distributed.comm import Comm
from stepctl.rundir.directory import RunDirectory
from tests.support.flowers import FLOWERS
from tests.support.mpi_jobs import launcher, needs_mpi, run_python
from tests.support.runs import BASE, content, make_config, rows, train

Figure = Callable[[str, int], None]
pytestmark = needs_mpi
DIGITS = {"name": "digits", "batch_size": 48, "validation_fraction": 0.9}
SHORT = {
    "stop": {"last_step": 12},
    "log": {"every": 1},
    "checkpoint": {"every": 3, "keep_last": None},
}
SLICED = {
    "name": "mlp",
    "hidden": [512],
    "dropout": 0.2,
}  # of five blocks: several ranks have one to update
WGAN = {
    "model": {
        "critic": {"name": "mlp", "hidden": [200], "activation": "leaky_relu"},
        "generator": {"name": "mlp", "hidden": [200], "output": "sigmoid"},
    },
    "optimizer": {
        name: {"name": "adam", "learning_rate": 0.001} for name in ("critic", "generator")
    },
}
MOMENTUM = {
    "name": "sgd",
    "learning_rate": {"name": "cosine", "peak": 0.1, "decay_steps": 20},
    "momentum": 0.9,
}
OPTIMIZERS = {"adam": BASE["optimizer"], "momentum": MOMENTUM}
SKIPPING = {
    "on_nonfinite": "skip",
    "data": {"name": "arrays", "path": "spoiled.npz", "batch_size": 8, "shards": 4},
    "model": {"name": "linear"},
    "task": {"name": "regression"},
    "evaluate": {"every": None},
}
SPOILED_GAN = {
    **SKIPPING,
    "data": {"name": "arrays", "path": "spoiled.npz", "batch_size": 8, "shards": 2},
    "model": {
        "critic": {"name": "mlp", "hidden": [4000], "activation": "leaky_relu"},
        "generator": {"name": "mlp", "hidden": [4000]},
    },
    "optimizer": WGAN["optimizer"],
    "task": {"name": "wgan", "n_critic": 3, "latent": 4, "weight_clip": 0.9},
}


def sharded(shards: int, **sections: Any) -> dict[str, Any]:
    """Return a config that differs from the others' in these sections."""
    return BASE | SHORT | {"data": DIGITS | {"shards": shards}, "model": SLICED} | sections


CASES: dict[str, tuple[int, dict[str, Any]]] = {  # name -> ranks, config
    "adam, 8 shards": (2, sharded(8)),
    "momentum, 8 shards": (4, sharded(8, optimizer=MOMENTUM)),
    "one subtree is no whole half: 6 shards": (2, sharded(6)),
    "3 shards each: 12 shards": (4, sharded(12)),
    "one shard each": (4, sharded(4)),
    "a model of one block": (4, sharded(4, model=BASE["model"])),
    "batch normalisation": (4, sharded(4, model=SLICED | {"batch_norm": True})),
    "a task that updates by itself": (
        2,
        sharded(2, task={"name": "tests.support.failing_ranks:Whole"}),
    ),
    "float64": (2, sharded(4, dtype="float64")),
    "gradient penalty": (
        2,
        sharded(4, task={"name": "wgan", "latent": 4, "gradient_penalty": 10.0}, **WGAN),
    ),
    "weight clip": (
        2,
        sharded(4, task={"name": "wgan", "n_critic": 2, "latent": 4, "weight_clip": 0.05}, **WGAN),
    ),
    "clipped, averaged, means, norms": (
        2,
        sharded(
            4,
            optimizer={
                "name": "adamw",
                "learning_rate": 0.01,
                "clip_norm": 0.5,
                "weight_decay": 0.1,
            },
            ema={"decay": 0.9},
            log={"every": 2, "means": True, "norms": True},
            evaluate={"every": 5, "ema": True},
        ),
    ),
    "groups": (
        2,
        sharded(
            4,
            optimizer={
                "name": "adamw",
                "learning_rate": 0.01,
                "clip_norm": 0.5,
                "weight_decay": {"default": 0.1, "*/bias": 0.0},
                "learning_rate_multipliers": {"dense1/weight": 3.0},
                "frozen": ["dense0/weight"],
            },
            log={"every": 1, "norms": True},
        ),
    ),
    "a batch that one rank cannot use is skipped by all": (4, BASE | SHORT | SKIPPING),
    "updates of a step are undone": (2, BASE | SHORT | SPOILED_GAN),
    "a loss by autograd, clipped, averaged": (
        2,
        sharded(
            4,
            task={"name": "loss"},
            model={"name": "tests.support.loss_models:Softmax", "width": 512},
            optimizer={"name": "adamw", "learning_rate": 0.01, "clip_norm": 0.5},
            ema={"decay": 0.9},
        ),
    ),
    "a loss by hand": (
        4,
        sharded(
            4,
            task={"name": "loss"},
            model={"name": "tests.support.loss_by_hand:ByHand", "noise": 0.1},
        ),
    ),
    "a table, standardized, stratified": (2, sharded(4, data=FLOWERS | {"shards": 4})),
    "sequential": (2, sharded(4, data=DIGITS | {"shards": 4, "order": "sequential"})),
    "windows of a text": (
        2,
        sharded(
            4,
            data={
                "name": "tests.support.token_model:windows",
                "batch_size": 48,
                "shards": 4,
                "order": "sequential",
                "validation_fraction": 0.1,
            },
            task={"name": "loss"},
            model={"name": "tests.support.token_model:Bigram"},
        ),
    ),
    "stopped by a hook, which only rank 0 has": (
        2,
        sharded(4, hooks=[{"name": "tests.support.user_hooks:Smoothed", "last": 8}]),
    ),
    "stopped early": (
        2,
        sharded(2, stop={"last_step": 40, "early_stopping": {"patience": 1, "min_delta": 9.0}}),
    ),
}


# --- trainings


def do(
    kind: str, ranks: int, items: list[dict[str, Any]], folder: Path, *, how: str = "shared"
) -> str:
    """Have ranks do their work; return what they printed."""
    work = folder / f"work-{ranks}-{len(list(folder.glob('work-*')))}.json"
    work.write_text(json.dumps([{"how": how} | item for item in items]))
    done = run_python(launcher(ranks), "-m", "tests.support.rank_work", kind, work, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def placed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a config whose data are in a folder; make those of which a few are too large to learn from."""
    if config["data"]["name"] != "arrays":
        return config
    generator, path = np.random.default_rng(0), folder / f"{config['task']['name']}.npz"
    if not path.exists():
        x, y = generator.normal(size=(64, 3)), generator.normal(size=(64, 1))
        x[[3, 17, 40]] = 3e38
        labels = np.arange(64) % 2
        np.savez(
            path, x=x.astype("f4"), y=labels if config["task"]["name"] == "wgan" else y.astype("f4")
        )
    return config | {"data": config["data"] | {"path": str(path)}}


def files(run: Path) -> dict[str, dict[str, Any]]:
    """Return what every checkpoint holds: state, config, numerics."""
    return {path.name: content(path) for path in (run / "checkpoints").iterdir()}


def training(
    run: Path, config: dict[str, Any] | None, stop: int | None = None, slow: float = 0.0
) -> dict[str, Any]:
    """Return what a job is told to do: to begin a run, or without a config to continue with it."""
    return {"path": str(run), "config": config, "stop": stop, "slow": slow}


def new_run(folder: Path) -> Path:
    """Return where a run can be made; all have one name, which is in their checkpoints."""
    folder.mkdir(parents=True)
    return folder / "run"


def unbroken(config: dict[str, Any], folder: Path) -> Path:
    """Return the run of one process that was never stopped."""
    train(make_config(**config), new_run(folder))
    return folder / "run"


def assert_as_unbroken(run: Path, alone: Path) -> None:
    assert rows(run) == rows(alone)
    assert files(run) == files(alone)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "how"),
    [(2, "shared"), pytest.param(4, "shared", marks=pytest.mark.faults), (4, "hosts")],
)
def test_the_ranks_give_the_bits_and_rows_of_one_process(
    ranks: int, how: str, tmp_path: Path
) -> None:
    configs = {
        name: placed(config, tmp_path)
        for name, (wanted, config) in CASES.items()
        if wanted == ranks
    }
    items = [training(new_run(tmp_path / name), config) for name, config in configs.items()]
    do("trainings", ranks, items, tmp_path, how=how)
    for item, (name, config) in zip(items, configs.items(), strict=True):
        alone = unbroken(config, tmp_path / f"alone, {name}")
        assert len(files(alone)) >= 2, name
        assert_as_unbroken(Path(item["path"]), alone)


@pytest.mark.mpi
def test_the_cases_match_their_names(tmp_path: Path) -> None:
    """A batch that nobody skipped, or a run that went to its end, would prove nothing."""
    for name, event in (
        ("a batch that one rank cannot use is skipped by all", "skipped_batches"),
        ("updates of a step are undone", "skipped_batches"),
    ):
        path = unbroken(placed(CASES[name][1], tmp_path), tmp_path / name)
        assert any(event in row for row in RunDirectory(path).read_ledger())
    assert max(files(unbroken(CASES["stopped early"][1], tmp_path / "early"))) < "step-00000040.h5"
    by_hook = CASES["stopped by a hook, which only rank 0 has"][1]
    assert max(files(unbroken(by_hook, tmp_path / "by hook"))) == "step-00000008.h5"


@pytest.mark.mpi
def test_a_checkpoint_holds_its_step_though_all_ranks_update_while_it_is_written(
    tmp_path: Path,
) -> None:
    """Each is begun to be made when the steps before the next have long been made; in the other memory, and in place.

    Where there is no room for the memory, or one rank cannot have it, each has a state of its own; where there is none
    for the gradients, they are exchanged by messages.
    """
    config = sharded(4, ema={"decay": 0.9})
    ways = ("shared", "room", "some", "not seen")
    items = [training(new_run(tmp_path / how), config, slow=0.2) | {"how": how} for how in ways]
    do("trainings", 2, items, tmp_path)
    alone = unbroken(config, tmp_path / "alone")
    for how in ways:
        assert_as_unbroken(tmp_path / how / "run", alone)
        [end] = [
            row
            for row in RunDirectory(tmp_path / how / "run").read_ledger()
            if row["event"] == "end"
        ]
        assert end["waits"] >= 2, "training was to be ahead of each save"


@pytest.mark.mpi
def test_shared_memory_is_reserved_completely_or_not_at_all() -> None:
    """What is only promised is missing when it is touched, and the system ends the process then."""
    descriptor = shared_memory._create_file(1 << 20)
    assert descriptor is not None
    assert os.fstat(descriptor).st_blocks * 512 >= 1 << 20
    os.close(descriptor)
    assert shared_memory._create_file(1 << 60) is None


@pytest.mark.mpi
def test_shared_memory_has_no_name_and_is_never_confused_with_another() -> None:
    """A name would outlive a kill; where processes are numbered anew, another file may be found in its place."""
    open_files = os.listdir("/proc/self/fd")

    class Comm0(Comm):
        """Rank 0, whose file keeps its identity, or has got another one."""

        def __init__(self, *, replaced: bool) -> None:
            self.replaced = replaced
            self.sent: list[shared_memory.FileIdentity] = []

        def broadcast(self, value: Any = None) -> Any:
            path, device, inode = value
            assert os.stat(path).st_nlink == 0
            self.sent.append(value)
            return (path, device, inode + 1) if self.replaced else value

    class Comm1(Comm):
        """Rank 1, which receives the identity of a file that is gone."""

        rank = 1

        def broadcast(self, value: Any = None) -> Any:
            assert value is None
            return rank_0.sent[0]

    assert shared_memory.allocate(1 << 16, Comm0(replaced=True)) is None
    assert os.listdir("/proc/self/fd") == open_files
    rank_0 = Comm0(replaced=False)
    memory = shared_memory.allocate(1 << 16, rank_0)
    assert memory is not None
    assert not memory.any()
    assert shared_memory.allocate(1 << 16, Comm1()) is None


@pytest.mark.mpi
def test_resumed_with_other_numbers_of_ranks_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    change_ranks(0, ("adam", "momentum"), [2, 4, 1], tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_number_of_ranks_gives_the_same_bits(
    ranks: int, optimizer: str, tmp_path: Path, figure: Figure
) -> None:
    config = sharded(8, optimizer=OPTIMIZERS[optimizer])
    alone = unbroken(config, tmp_path / "alone")
    for how in ("shared", "hosts"):
        item = training(new_run(tmp_path / how), config)
        do("trainings", ranks, [item], tmp_path, how=how)
        assert_as_unbroken(Path(item["path"]), alone)
        figure("runs on several ranks", 1)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 5))
def test_resumed_again_and_again_with_any_number_of_ranks(
    seed: int, tmp_path: Path, figure: Figure
) -> None:
    chain = [random.Random(seed).choice((1, 2, 4, 8)) for _ in range(5)]
    change_ranks(seed, tuple(OPTIMIZERS), chain, tmp_path)
    figure("changes of the number of ranks", len(chain) * 4)


def change_ranks(seed: int, optimizers: tuple[str, ...], chain: list[int], folder: Path) -> None:
    """Train two runs of each optimizer on ever other numbers of ranks, each stopped at steps of its own."""
    chance, alone, stops = random.Random(seed), {}, {}
    for name in optimizers:
        alone[name] = unbroken(sharded(8, optimizer=OPTIMIZERS[name]), folder / f"alone, {name}")
        for copy in ("a", "b"):
            stops[name, new_run(folder / f"{name}, {copy}")] = [
                *sorted(chance.sample(range(12), len(chain) - 1)),
                None,
            ]
    for number, ranks in enumerate(chain):
        items = [
            training(run, None if number else sharded(8, optimizer=OPTIMIZERS[name]), at[number])
            for (name, run), at in stops.items()
        ]
        do("trainings", ranks, items, folder, how=chance.choice(("shared", "shared", "hosts")))
    for name, run in stops:
        assert rows(run) == rows(alone[name])
        grid = files(alone[name])
        assert grid.items() <= files(run).items(), (name, stops[name, run])


# --- sums


@pytest.mark.mpi
def test_a_sum_over_ranks_has_the_bits_of_the_sum_by_one(tmp_path: Path) -> None:
    """One number, which is fewer than ranks, and a size that does not divide evenly."""
    sums(3, (1, 4099), tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [2, 4, 5, 8])
def test_any_other_number_of_ranks_gives_the_same_sum(
    ranks: int, tmp_path: Path, figure: Figure
) -> None:
    figure("sums over ranks", sums(ranks, (1, 3, 17, 4099, 8192, 20_000), tmp_path))


def sums(ranks: int, sizes: tuple[int, ...], folder: Path) -> int:
    """Compare sums in shared memory and by messages; return how many."""
    shapes = [
        (n, ranks * each, dtype)
        for n in sizes
        for each in (1, 2, 3, 5)
        for dtype in ("float32", "float64")
    ]
    items = [dict(zip(("elements", "parts", "dtype"), shape, strict=True)) for shape in shapes]
    for how, kind in (("shared", "SharedMemoryTreeSum"), ("hosts", "MessageTreeSum")):
        assert do("sums", ranks, items, folder, how=how).split() == [kind] * len(items)
    return 2 * len(items)
