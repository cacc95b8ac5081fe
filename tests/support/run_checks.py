"""Configs, the uninterrupted run, and the checks on a run's files that all attacks share.

The files are read as the documented format describes them, without the code under attack.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import runs
from tests.support.processes import start
from tests.support.runs import rows

_NAME = re.compile(r"step-(\d{8,})\.h5")
_HEAD = re.compile(rb"stepctl-checkpoint 2\nsha256: ([0-9a-f]{64})\nlength: (\d+)\n\0*")
_BLOCK = 512
_RATES = (0.01, {"name": "cosine", "peak": 0.02, "decay_steps": 50, "warmup_steps": 8})
_OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "sgd", "momentum": 0.9, "nesterov": True},
    {"name": "adagrad"},
    {"name": "rmsprop"},
    {"name": "adam"},
    {"name": "adamw", "clip_norm": 0.5},
)
_GROUPS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {
        "weight_decay": {"default": 0.1, "*/bias": 0.0},
        "learning_rate_multipliers": {"dense1/*": 3.0},
        "frozen": ["dense0/weight"],
    },
)
_HOOK = {"name": "tests.support.user_hooks:Smoothed", "metric": None}  # it has a state


@dataclass(frozen=True)
class Trial:
    """A config, and what the run of it that nobody disturbed left."""

    folder: Path
    config: dict[str, Any]
    last_step: int
    contents: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def file(self) -> Path:
        """The config's file."""
        return self.folder / "config.yaml"

    @property
    def keep_last(self) -> int | None:
        """How many checkpoints retention keeps; None if it removes none."""
        keep: int | None = self.config["checkpoint"]["keep_last"]
        return keep

    def new_run(self, number: object) -> Path:
        """Return the path of a new run; it has the unbroken run's name, so that files can be equal."""
        folder = self.folder / str(number)
        folder.mkdir()
        return folder / "run"

    def begin(self, run: Path, *more: object) -> list[object]:
        """Return the command that starts the run."""
        return ["train", "--config", self.file, "--run-dir", run, *more]

    def go_on(self, run: Path, either: bool) -> list[object]:
        """Return the command that starts or resumes the run: `--or-resume`, or `train` and `resume`."""
        if either:
            return self.begin(run, "--or-resume")
        return ["resume", run] if checkpoints(run) else self.begin(run)

    def finish(self, run: Path) -> None:
        """Resume to the target; the end must be the unbroken run's, bit for bit and row for row."""
        with start(self.go_on(run, either=False), cwd=self.folder) as child:
            assert child.wait() == 0, child.said()
        self.assert_finished(run)

    def assert_finished(self, run: Path) -> None:
        """Assert that the run ended as the unbroken one did, without leftover files."""
        assert contents(checkpoints(run)[self.last_step]) == self.contents
        assert rows(run) == self.rows
        assert not leftovers(run)


def make_trial(folder: Path, config: dict[str, Any]) -> Trial:
    """Write a config, and train it undisturbed."""
    (folder / "whole").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config))
    run = folder / "whole" / "run"
    last_step = config["stop"]["last_step"]
    with start(
        ["train", "--config", folder / "config.yaml", "--run-dir", run], cwd=folder
    ) as child:
        assert child.wait() == 0, child.said()
    return Trial(folder, config, last_step, contents(checkpoints(run)[last_step]), rows(run))


def random_config(chance: random.Random, **sections: Any) -> dict[str, Any]:
    """Return a config of a run of half a second, or less; `sections` are taken as they are."""
    every = chance.randint(2, 9)
    logged = chance.randint(1, 7)
    first = chance.choice((0, 0, 0, 7))
    hidden = chance.choice(([8], [16], [8, 8], [256]))
    config: dict[str, Any] = {
        "seed": chance.randrange(1 << 31),
        "dtype": chance.choice(("float32", "float32", "float64")),
        "initial_step": first,
        "data": {
            "name": "digits",
            "batch_size": chance.choice((16, 24, 48)),
            "shards": chance.choice((1, 1, 2, 4)),
            "order": chance.choice(("shuffled", "shuffled", "sequential")),
            "validation_fraction": 0.9,
        },
        "model": {
            "name": "mlp",
            "hidden": hidden,
            "dropout": 0.2,
            "layer_norm": chance.random() < 0.3,
        },
        "task": {"name": "classification"},
        "optimizer": {
            **chance.choice(_OPTIMIZERS),
            "learning_rate": chance.choice(_RATES),
            **chance.choice(_GROUPS),
        },
        "stop": {"last_step": first + chance.randint(20, 45)},
        "ema": chance.choice((None, None, {"decay": 0.9, "warmup": True})),
        "log": {
            "every": logged,
            "offset": chance.randrange(logged),
            "means": chance.random() < 0.3,
            "csv": chance.random() < 0.3,
        },
        "evaluate": {"every": chance.randint(10, 25)},
        "checkpoint": {"every": every, "keep_last": chance.choice((1, 2, 3, None))},
        "hooks": chance.choice(([], [_HOOK])),
        "numerics": {"threads": 1},
    }
    one_model = {"model", "task", "optimizer"} & sections.keys()
    return config | (_wgan(chance) if not one_model and chance.random() < 0.2 else {}) | sections


def _wgan(chance: random.Random) -> dict[str, Any]:
    """Return the sections of a task with two models and three counters."""
    held = chance.choice(({"weight_clip": 0.1}, {"gradient_penalty": 10.0}))
    rates = {
        "critic": 1e-3,
        "generator": {"name": "exponential", "peak": 1e-3, "decay_rate": 0.5, "decay_steps": 9},
    }
    clock = chance.choice(("generator", "critic"))
    return {
        "model": {
            "critic": {"name": "mlp", "hidden": [8], "activation": "leaky_relu"},
            "generator": {"name": "mlp", "hidden": [8], "output": "sigmoid"},
        },
        "task": {
            "name": "wgan",
            "n_critic": chance.randint(1, 3),
            "latent": 4,
            "clock": clock,
            **held,
        },
        "optimizer": {
            name: {**chance.choice(_OPTIMIZERS), "learning_rate": rate}
            for name, rate in rates.items()
        },
    }


def ledger(run: Path, event: str) -> list[dict[str, Any]]:
    """Return the whole lines of an event; all but the last must be readable."""
    lines = content(run / "ledger.jsonl").splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [line for line in found if line["event"] == event]


def content(path: Path) -> bytes:
    """Return the content of a file, or nothing if it is missing or being replaced."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def checkpoints(run: Path) -> dict[int, Path]:
    """Return the files of a run by their step, rising."""
    names = {path.name: path for path in (run / "checkpoints").glob("step-*.h5")}
    matches = [match for name in sorted(names) if (match := _NAME.fullmatch(name))]
    return {int(match[1]): names[match[0]] for match in matches}


def leftovers(run: Path) -> list[Path]:
    """Return what a writer has not published, or not yet."""
    return [path for folder in (run, run / "checkpoints") for path in folder.glob(".*")]


def digest(path: Path) -> str:
    """Return the sha256 that a checkpoint gives of itself; AssertionError if it is not whole."""
    head = (data := path.read_bytes())[:_BLOCK]
    body = data[_BLOCK:]
    match = _HEAD.fullmatch(head)
    assert match, f"{path.name}: no user block"
    assert (int(match[2]), match[1].decode()) == (len(body), hashlib.sha256(body).hexdigest()), (
        f"{path.name}: damaged"
    )
    return match[1].decode()


def contents(path: Path) -> dict[str, Any]:
    """Return all that a whole checkpoint holds but the id of its run."""
    digest(path)
    return runs.content(path)


def assert_nothing_lost(run: Path, keep_last: int | None) -> None:
    """Assert that checkpoints are intact, and acknowledged ones present or pruned for newer ones."""
    files = checkpoints(run)
    digests = {step: digest(path) for step, path in files.items()}
    removed = {step for line in ledger(run, "checkpoint") for step in line["pruned"]}
    removed |= {step for line in ledger(run, "prune") for step in line["steps"]}
    for step, sha256 in acknowledged(run):
        if step in files:
            assert digests[step] == sha256, f"step {step} is not the one that was acknowledged"
        else:
            newer = sum(other > step for other in files)
            assert step in removed, f"step {step} was acknowledged, and is gone; no line says so"
            assert keep_last is not None, (
                f"step {step} was acknowledged, and is gone; all were to be kept"
            )
            assert newer >= keep_last, (
                f"step {step} was acknowledged, and is gone; {newer} newer ones are there"
            )


def acknowledged(run: Path) -> Iterator[tuple[int, str]]:
    """Return step and sha256 of each checkpoint that the run has promised to keep."""
    return ((line["step"], line["sha256"]) for line in ledger(run, "checkpoint"))
