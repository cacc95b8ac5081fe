"""The tables of the programs in tests/program_examples/, and the data of those that are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stepctl.config import yaml
from stepctl.data.digits import digits

FOLDER = Path(__file__).parents[1] / "program_examples"
LAST_STEP = 40


@dataclass(frozen=True)
class Example:
    """One program in three versions, plain.py, script.py and program.py.

    state: the variables of plain.py that the other versions keep in their state. metric: what they log; `history` is
    the list of it in plain.py. program: the class in program.py. last_step: the target; kmeans ends before. when: the
    config's `stop.when`. series: the series that the other versions append, by the list in plain.py.
    """

    name: str
    program: str
    state: tuple[str, ...]
    metric: str
    history: str
    last_step: int = LAST_STEP
    when: dict[str, Any] = field(default_factory=dict)
    series: tuple[str, ...] = ()

    def file(self, version: str) -> Path:
        """Return the path of a version: "plain", "script" or "program"."""
        return FOLDER / self.name / f"{version}.py"

    def sections(self) -> dict[str, Any]:
        """Return the sections of a config that name the program."""
        return {"program": {"name": f"tests.program_examples.{self.name}.program:{self.program}"}}


EXAMPLES = (
    Example(
        name="hmm",
        program="BaumWelch",
        state=("start", "transition", "emission"),
        metric="log_likelihood",
        history="log_likelihoods",
    ),
    Example(
        name="metropolis",
        program="Metropolis",
        state=("rng", "x", "chain", "accepted"),
        metric="log_density",
        history="log_densities",
    ),
    Example(
        name="evolution",
        program="Evolution",
        state=("population",),
        metric="error",
        history="errors",
    ),
    Example(
        name="policy_gradient",
        program="PolicyGradient",
        state=("policy", "velocity", "returns"),
        metric="episode_return",
        history="returns",
    ),
    Example(
        name="kmeans",
        program="KMeans",
        state=("centers", "labels"),
        metric="inertia",
        history="inertias",
        last_step=1000,
        when={"metric": "n_changed", "below": 1},
    ),
    Example(
        name="char_rnn",
        program="CharRNN",
        state=("params", "squares", "hidden"),
        metric="loss",
        history="losses",
    ),
    Example(
        name="hmc",
        program="HMC",
        state=("rng", "x", "accepted"),
        metric="potential",
        history="potentials",
        series=("samples",),
    ),
    Example(
        name="als",
        program="ALS",
        state=("users", "items"),
        metric="error",
        history="errors",
    ),
)


@dataclass(frozen=True)
class LossExample:
    """A model in two versions: plain.py, and model.py with config.yaml. `data` is the folder of its data.

    With shards, the run also has validation samples, a moving average and clipped gradients.
    """

    name: str
    data: Path
    shards: int = 1
    last_step: int = LAST_STEP
    when: dict[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """Return the path of one of its files."""
        return FOLDER / self.name / name

    def written(self) -> dict[str, Any]:
        """Return the config as its file has it."""
        return yaml.load(str(self.file("config.yaml"))).value

    def sections(self) -> dict[str, Any]:
        """Return the sections of a config that name data, model, task and optimizer."""
        config = self.written()
        class_name = config["model"]["name"].partition(":")[2]
        sections = {
            "data": config["data"] | {"path": str(self.data / config["data"]["path"])},
            "model": {"name": f"tests.program_examples.{self.name}.model:{class_name}"},
            "task": config["task"],
            "optimizer": config["optimizer"],
        }
        if self.shards > 1:
            sections["data"] |= {"shards": self.shards, "validation_fraction": 0.2}
            sections["optimizer"] |= {"clip_norm": 1.0}
            sections |= {"ema": {"decay": 0.9}, "evaluate": {"every": 9, "ema": True}}
        return sections


LOSS_EXAMPLES = ("vae", "gpt")


def write_data(folder: Path) -> None:
    """Write the data of the examples in LOSS_EXAMPLES: digits, and windows of a text."""
    [(_, pixels, _)] = digits(targets="values", dtype="float32").train.slices()
    np.savez(folder / "digits.npz", x=pixels)
    text = np.frombuffer((FOLDER.parents[1] / "LICENSE").read_bytes(), np.uint8)
    np.savez(folder / "text.npz", x=np.lib.stride_tricks.sliding_window_view(text, 17))
