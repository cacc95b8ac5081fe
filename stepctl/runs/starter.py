"""A first config: written from a CSV file, or one of the package's examples."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from stepctl.data.proposal import VALIDATION_FRACTION, Proposal, propose
from stepctl.errors import ConfigError
from stepctl.system import shell
from stepctl.system.files import write_errors
from stepctl.system.text import did_you_mean, in_one_line

# Each with the files that it needs; they are written into configs/, where its import paths point.
EXAMPLES = {
    "quickstart": ("quickstart.yaml",),
    "digits": ("digits.yaml",),
    "regression": ("regression.yaml",),
    "wgan-digits": ("wgan-digits.yaml",),
    "wgan-gp-digits": ("wgan-gp-digits.yaml",),
    "ising": ("ising.yaml", "ising.py"),
}
_EXAMPLES_FOLDER = "configs"
_BATCH_SIZE = 32
_N_DIGITS = 1797
_COMMENT_COLUMN = 34
_MAX_NAMED = 5  # classes in a comment
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*", re.ASCII)  # needs no quotes in YAML
_KEYWORDS = frozenset({"true", "false", "null"})
_COMMENTS = {
    "target": "the column to predict",
    "categorical": "its numbers are names of classes",
    "exclude": "columns that are left out",
    "missing": "what to do with missing values: error, drop (the row) or mean",
    "standardize": "numbers: subtract the mean, divide by the standard deviation",
    "validation_fraction": "held out, to evaluate on",
    "stratify": "with the same share of each class",
    "batch_size": "samples of a step",
}


class Starter(NamedTuple):
    """The files to write, by their paths, the config among them, and messages about it."""

    files: dict[Path, str]
    config: Path
    messages: list[str]


def example(folder: Path, name: str) -> Starter:
    """Return the files of an example; ConfigError if there is none of this name."""
    if name not in EXAMPLES:
        known = [*EXAMPLES]
        raise ConfigError(
            f"--example {in_one_line(name, 60)}: there is none{did_you_mean(name, known)}; there are: "
            f"{', '.join(known)}"
        )
    templates = resources.files("stepctl.config").joinpath("examples")
    place = folder / _EXAMPLES_FOLDER
    files = {place / file: templates.joinpath(file).read_text() for file in EXAMPLES[name]}
    return Starter(files, place / EXAMPLES[name][0], [])


def for_digits(folder: Path) -> Starter:
    """Return a commented config that learns the digits of the package."""
    config = folder / "config.yaml"
    section = {"name": "digits", "validation_fraction": VALIDATION_FRACTION}
    classes = [str(number) for number in range(10)]
    proposal = Proposal(section, "classification", _N_DIGITS, classes, {})
    return Starter({config: _text(config, section, proposal)}, config, [])


def for_table(folder: Path, path: str) -> Starter:
    """Return a commented config that learns a column of a CSV file; DataError if none can be."""
    proposal = propose(path)
    stem = os.path.basename(path).partition(".")[0] or "table"
    config = folder / f"{stem}.yaml"
    given = path if folder == Path() else os.path.abspath(path)
    section = {"name": "csv", "path": given, **proposal.section}
    what = f"{len(proposal.classes)} classes" if proposal.classes else "a number"
    messages = [
        f"the target is {proposal.section['target']}: {what} ({proposal.task}); to choose another, set "
        f"data.target in {config}"
    ]
    messages += [f"left out: {reason}" for reason in proposal.excluded.values()]
    return Starter({config: _text(config, section, proposal)}, config, messages)


def write_starter(starter: Starter) -> None:
    """Write the files; ConfigError, before anything is written, if one of them exists."""
    for path in starter.files:
        if os.path.lexists(path):
            raise ConfigError(f"{path}: exists, and is never overwritten; choose another folder")
    for path, text in starter.files.items():
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)


def _text(config: Path, section: Mapping[str, Any], proposal: Proposal) -> str:
    n_training = proposal.n_rows - round(proposal.n_rows * VALIDATION_FRACTION)
    batch_size = min(_BATCH_SIZE, n_training)
    epoch = -(-n_training // batch_size)
    last_step = min(max(20 * epoch, 300), 20_000)
    last_step -= last_step % 10
    every = last_step // 10
    metric = ("loss", "min")
    if proposal.task == "classification":
        metric = ("accuracy", "max")
    lines = [
        f"# {shell.command('train', config.name)}",
        f"# {_described(proposal)}",
        "# All keys and their defaults: stepctl config check FILE",
        "seed: 0  # of the split, the initial weights and the order of the samples",
        "",
        "data:",
        *_data_lines({**section, "batch_size": batch_size}),
        "",
        _commented("model: {name: mlp, hidden: [64], dropout: 0.1}", "or {name: linear}"),
        f"task: {{name: {proposal.task}}}",
        _commented(
            "optimizer: {name: adam, learning_rate: 3e-3}", "or sgd, rmsprop, adagrad, adamw"
        ),
        "",
        _commented(f"stop: {{last_step: {last_step}}}", f"an epoch is about {epoch} steps"),
        _commented(f"log: {{every: {max(1, every // 2)}}}", "steps between two training rows"),
        f"evaluate: {{every: {every}}}",
        "checkpoint:",
        f"  every: {every}",
        f"  keep_best: {{metric: {metric[0]}, mode: {metric[1]}}}  # used by evaluate --best, predict --best",
        "",
    ]
    return "\n".join(lines)


def _described(proposal: Proposal) -> str:
    text = f"{proposal.n_rows:,} rows"
    if proposal.classes:
        names = ", ".join(proposal.classes[:_MAX_NAMED])
        more = ", ..." if len(proposal.classes) > _MAX_NAMED else ""
        text += f"; {len(proposal.classes)} classes: {names}{more}"
    return in_one_line(text, 100)


def _data_lines(section: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in section.items():
        text = f"  {key}: {_yaml(value)}"
        lines.append(_commented(text, _COMMENTS[key]) if key in _COMMENTS else text)
    return lines


def _yaml(value: object) -> str:
    """Return a value in YAML's flow style."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _KEYWORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def _commented(text: str, comment: str) -> str:
    return f"{text.ljust(_COMMENT_COLUMN)}  # {comment}"
