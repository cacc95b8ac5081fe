"""A config is checked before any work: every error at once, each with its place, its key, and what is allowed."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import stepctl
from helpers import make_config, rows, train
from stepctl import config as configs
from stepctl import schema as schemas
from stepctl import yamlio
from stepctl.cli.main import cli
from stepctl.config import Config
from stepctl.errors import ConfigError

SMALL = """\
data: {name: digits, batch_size: 64}
model: {name: mlp, hidden: [128]}
task: {name: classification}
optimizer: {name: adam, learning_rate: 3e-3}
stop: {last_step: 100}
"""
ALL_WRONG = """\
seed: -1
dtype: float16
data: {name: digits, batch_size: "64", shards: true, batchsize: 3}
model: {name: mpl, hidden: [128]}
task: classification
optimizer: {name: adam, learning_rate: {name: cosine, peak: -1, warmup: 3}, beta1: 1}
stop: {}
log: {every: 5, offset: 7}
evaluate: {every: 0}
checkpoint: {keep_last: -1, every: null, keep_best: {metric: loss, mode: up, k: 1}}
numerics: {threads: some}
sed: 1
"""
SECTIONS = "seed, dtype, initial_step, data, model, task, optimizer, ema, stop, log, evaluate, samples, checkpoint, "
SECTIONS += "on_nonfinite, check_determinism, numerics, distributed"
SHARED = "batch_size, n_classes, shards, validation_fraction"
COSINE = "warmup_steps, counter, peak, end, decay_steps"
SCHEDULES = "constant, exponential, inverse_time, polynomial, piecewise_constant, cosine"
OR_YOUR_OWN = "or your own as 'package.module:Name'"
EITHER = "give either last_step (absolute) or num_steps (from the segment's start)"
ALL_WRONG_LINES = [
    "1:7: seed: -1 is wrong; should be greater than or equal to 0",
    "2:8: dtype: \"float16\" is wrong; should be 'float32' or 'float64'",
    '3:34: data.batch_size: "64" is wrong; a whole number is needed',
    "3:48: data.shards: true is wrong; a whole number is needed",
    f"3:54: data.batchsize: unknown key; did you mean 'batch_size'?; allowed: {SHARED}",
    f"4:15: model.name: no models component is called 'mpl'; did you mean 'mlp'?; allowed: linear, mlp, {OR_YOUR_OWN}",
    '5:7: task: "classification" is wrong; a mapping is needed',
    "6:61: optimizer.learning_rate.peak: -1 is wrong; should be greater than or equal to 0",
    f"6:65: optimizer.learning_rate.warmup: unknown key; did you mean 'warmup_steps'?; allowed: {COSINE}",
    "6:84: optimizer.beta1: 1 is wrong; should be less than 1",
    f"7:7: stop: {EITHER}",
    "8:6: log: offset 7 never comes with every 5; it must be below it",
    "9:19: evaluate.every: 0 is wrong; should be greater than or equal to 1",
    "10:25: checkpoint.keep_last: -1 is wrong; should be greater than or equal to 1",
    "10:74: checkpoint.keep_best.mode: \"up\" is wrong; should be 'min' or 'max'",
    "10:78: checkpoint.keep_best.k: unknown key; allowed: metric, mode, n",
    "11:21: numerics.threads: \"some\" is wrong; a whole number is needed, or should be 'auto'",
    f"12:1: sed: unknown key; did you mean 'seed'?; allowed: {SECTIONS}",
]

# what is set in SMALL -> the whole error
WRONG: dict[str, list[str]] = {
    "data.batch_size=true": ["data.batch_size:1:1: data.batch_size: true is wrong; a whole number is needed"],
    "data.batch_size='1'": ['data.batch_size:1:1: data.batch_size: "1" is wrong; a whole number is needed'],
    "data.batch_size=64.0": ["data.batch_size:1:1: data.batch_size: 64.0 is wrong; a whole number is needed"],
    "data.validation_fraction=1": [
        "data.validation_fraction:1:1: data.validation_fraction: 1 is wrong; should be less than 1"
    ],
    "data.validation_fraction=true": [
        "data.validation_fraction:1:1: data.validation_fraction: true is wrong; a number is needed"
    ],
    "data.shards=6": [
        "c.yaml:1:7: data: shards 6 does not divide batch_size 64; a batch is cut into equal parts"
    ],
    "model.hidden=[1, 0, x]": [
        "model.hidden:1:5: model.hidden.1: 0 is wrong; should be greater than or equal to 1",
        'model.hidden:1:8: model.hidden.2: "x" is wrong; a whole number is needed',
    ],
    "model.activation=rleu": [
        'model.activation:1:1: model.activation: "rleu" is wrong; '
        "should be 'relu', 'leaky_relu', 'gelu', 'tanh' or 'sigmoid'"
    ],
    "model={name: mlp}": ["model:1:1: model: hidden is missing; mlp needs it"],
    "model={hidden: [3]}": [
        "model:1:1: model: name is missing; give one component, {name: ...}, or one for each of the models"
    ],
    "model={name: 3}": ["model:1:8: model.name: 3 is wrong; text is needed"],
    "task.hidden=3": ["task.hidden: task.hidden: unknown key; allowed: none"],
    "optimizer={name: adam}": ["optimizer:1:1: optimizer: learning_rate is missing; adam needs it"],
    "optimizer={name: sgd, learning_rate: 1, nesterov: true}": [
        "optimizer:1:1: optimizer: sgd: nesterov needs a momentum above 0"
    ],
    "optimizer.learning_rate=-1": [
        "optimizer.learning_rate:1:1: optimizer.learning_rate: -1 is wrong; should be greater than or equal to 0"
    ],
    "optimizer.learning_rate=[1]": [
        "optimizer.learning_rate:1:1: optimizer.learning_rate: [1] is wrong; "
        f"give a number, or {{name: ...}} with one of {SCHEDULES}"
    ],
    "optimizer.learning_rate={name: cosne, peak: 1}": [
        "optimizer.learning_rate:1:8: optimizer.learning_rate.name: no schedules component is called 'cosne'; "
        f"did you mean 'cosine'?; allowed: {SCHEDULES}, {OR_YOUR_OWN}"
    ],
    "optimizer.learning_rate={name: exponential, peak: 1, decay_steps: 0}": [
        "optimizer.learning_rate:1:1: optimizer.learning_rate: decay_rate is missing; exponential needs it",
        "optimizer.learning_rate:1:43: optimizer.learning_rate.decay_steps: 0 is wrong; "
        "should be greater than or equal to 1",
    ],
    "optimizer.learning_rate={name: piecewise_constant, boundaries: [3, 2], values: [1, 2, 3]}": [
        "optimizer.learning_rate:1:1: optimizer.learning_rate: piecewise_constant: boundaries must rise"
    ],
    "stop.num_steps=3": [f"c.yaml:5:7: stop: {EITHER}"],
    "stop={}": [f"stop:1:1: stop: {EITHER}"],
    "stop.laststep=3": [
        "stop.laststep: stop.laststep: unknown key; did you mean 'last_step'?; allowed: last_step, num_steps, "
        "early_stopping, target_metric"
    ],
    "log={every: 3, offset: 3}": ["log:1:1: log: offset 3 never comes with every 3; it must be below it"],
    "evaluate={every: 1, offset: 2}": [
        "evaluate:1:1: evaluate: offset 2 never comes with every 1; it must be below it"
    ],
    "optimiser={name: adam}": [
        f"optimiser: optimiser: unknown key; did you mean 'optimizer'?; allowed: {SECTIONS}"
    ],
    "model.name=nowhere:Net": [
        "model.name:1:1: model.name: cannot use 'nowhere:Net': No module named 'nowhere' "
        "(looked in the current folder too)"
    ],
    "model.name=user_model:Nets": [
        "model.name:1:1: model.name: cannot use 'user_model:Nets': module 'user_model' has no attribute 'Nets' "
        "(looked in the current folder too)"
    ],
    "model={name: 'user_model:TwoLayers', width: wide, layers: 2}": [
        'model:1:39: model.width: "wide" is wrong; a whole number is needed',
        "model:1:45: model.layers: unknown key; allowed: width",
    ],
}  # fmt: skip

# what is no component, and would do something if it were called -> what it is not
NO_COMPONENTS = {
    "model={name: 'os:system', command: 'touch called'}": "Model",
    "model={name: 'subprocess:Popen', args: [touch, called]}": "Model",
    "model={name: 'stepctl.__main__:main'}": "Model",
    "model={name: 'stepctl.cli.main:cli'}": "Model",
    "task={name: 'os:system', command: 'touch called'}": "Task",
    "task={name: 'subprocess:getoutput', cmd: 'touch called'}": "Task",
    "optimizer={name: 'os:system', command: 'touch called'}": "Optimizer",
    "optimizer.learning_rate={name: 'os:system', command: 'touch called'}": "Schedule",
    "data={name: 'os:system', command: 'touch called'}": "Sources",
}

LEAVES = """\
from __future__ import annotations
from dataclasses import dataclass

from stepctl.schedules import Schedule

def __getattr__(name):
    raise SystemExit(0)

@dataclass(frozen=True, kw_only=True)
class Leaves(Schedule):
    def __post_init__(self):
        raise SystemExit(0)
    def after_warmup(self, step):
        return 1.0

def number():
    return 3

def unsaid(*, size: Nothing = 3):
    return size
"""

POLICIES = {
    "seed": "locked",
    "dtype": "locked",
    "initial_step": "locked",
    "data.name": "locked",
    "data.batch_size": "locked",
    "data.shards": "locked",
    "data.validation_fraction": "locked",
    "data.n_classes": "locked",
    "model.name": "locked",
    "model.hidden": "locked",
    "model.activation": "locked",
    "model.dropout": "locked",
    "model.layer_norm": "locked",
    "model.batch_norm": "locked",
    "model.output": "locked",
    "task.name": "locked",
    "optimizer.name": "locked",
    "optimizer.learning_rate.name": "locked",
    "optimizer.learning_rate.warmup_steps": "locked",
    "optimizer.learning_rate.counter": "locked",
    "optimizer.learning_rate.value": "locked",
    "optimizer.weight_decay": "locked",
    "optimizer.clip_norm": "locked",
    "optimizer.beta1": "locked",
    "optimizer.beta2": "locked",
    "optimizer.epsilon": "locked",
    "stop.last_step": "live",
    "ema": "locked",
    "stop.num_steps": "live",
    "stop.early_stopping": "live",
    "stop.target_metric": "live",
    "log.every": "live",
    "log.offset": "live",
    "log.csv": "live",
    "log.tensorboard": "live",
    "log.histograms": "live",
    "log.counter": "live",
    "log.means": "live",
    "log.norms": "live",
    "evaluate.every": "live",
    "evaluate.offset": "live",
    "evaluate.counter": "live",
    "evaluate.metric": "live",
    "evaluate.mode": "live",
    "evaluate.ema": "live",
    "samples": "live",
    "checkpoint.every": "live",
    "checkpoint.offset": "live",
    "checkpoint.counter": "live",
    "checkpoint.every_seconds": "live",
    "checkpoint.keep_last": "live",
    "checkpoint.keep_every": "live",
    "checkpoint.keep_best": "live",
    "checkpoint.on_error": "live",
    "on_nonfinite": "live",
    "check_determinism": "live",
    "numerics.threads": "locked",
    "numerics.blas_kernel": "locked",
    "distributed.mode": "locked",
}


def parse(text: str, *assignments: str) -> Config:
    document = yamlio.loads(text, "c.yaml")
    for assignment in assignments:
        document.set(assignment)
    return configs.parse(document)


def refusal(text: str, *assignments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, *assignments)
    return str(caught.value).splitlines()


def test_every_error_at_once_in_the_order_of_the_file() -> None:
    assert refusal(ALL_WRONG) == [f"c.yaml:{line}" for line in ALL_WRONG_LINES]


@pytest.mark.parametrize("assignment", WRONG)
def test_wrong_by_set(assignment: str) -> None:
    lines = [line if line.startswith("c.yaml") else f"--set {line}" for line in WRONG[assignment]]
    assert refusal(SMALL, assignment) == lines


@pytest.mark.parametrize("assignment", NO_COMPONENTS)
def test_what_is_no_component_is_never_called(assignment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = refusal(SMALL, assignment)
    assert re.search(rf": cannot use '.*': it is no {NO_COMPONENTS[assignment]}; subclass stepctl\.", line)
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_ends_the_program_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "leaves_at_once.py").write_text("raise SystemExit(0)")
    (tmp_path / "leaves.py").write_text(LEAVES)
    key = "optimizer.learning_rate"
    for name, words in {
        "leaves_at_once:x": f".name: cannot use 'leaves_at_once:x': SystemExit: 0 ({tmp_path}/leaves_at_once.py:1)",
        "leaves:nothing": f".name: cannot use 'leaves:nothing': SystemExit: 0 ({tmp_path}/leaves.py:7)",
        "leaves:Leaves": f": leaves:Leaves: SystemExit: 0 ({tmp_path}/leaves.py:12)",
        "leaves:number": ": leaves:number is no Schedule; subclass stepctl.schedules:Schedule",
        "leaves:unsaid": ".name: cannot use 'leaves:unsaid': name 'Nothing' is not defined",
    }.items():
        (line,) = refusal(SMALL, f"{key}={{name: '{name}'}}")
        assert line.partition(f": {key}")[2] == words


def test_a_problem_is_one_line_whatever_it_holds() -> None:
    long, odd = refusal(SMALL.replace("mlp", "c" * 20_000) + '"a\\nb\\e[31m": 1\n')
    assert odd.startswith(r"c.yaml:6:1: a\nb\x1b[31m: unknown key; allowed: ")
    assert len(long) < 1100
    assert long.endswith(OR_YOUR_OWN)


def test_a_ruin_is_answered_at_once_and_in_part() -> None:
    items = SMALL.replace("[128]", f"[{'x,' * 8_000}]")
    keys = SMALL + "".join(f"k{i}: 1\n" for i in range(1000))
    for ruin in (items, keys):
        document = yamlio.loads(ruin, "c.yaml")
        start = time.process_time()
        with pytest.raises(ConfigError) as caught:
            configs.parse(document)
        assert time.process_time() - start < 3
        assert len(str(caught.value).splitlines()) == 51
        assert re.search(r"\.\.\. and \d+ more$", str(caught.value))


def test_a_horizon_may_lie_as_far_as_a_target() -> None:
    config = parse(SMALL, f"stop.last_step={2**62 - 1}", "optimizer.learning_rate={name: cosine, peak: 1}")
    again = parse(yamlio.dumps(config.with_values({next(iter(config.horizon_keys())): 2**62 - 1}).plain()))
    assert again.horizon_keys() == {}


def test_missing_sections() -> None:
    missing = ("data", "model", "task", "optimizer", "stop")
    assert refusal("seed: 0") == [f"c.yaml:1:1: config: {section} is missing" for section in missing]


def test_several_settings_are_refused_together() -> None:
    lines = refusal(SMALL, "seed=yes", "model.hiden=[3]", "data.shards=0")
    assert [line.partition(": ")[0] for line in lines] == [
        "--set seed:1:1",
        "--set model.hiden",
        "--set data.shards:1:1",
    ]


def test_a_bare_number_is_the_constant_schedule() -> None:
    short, long = parse(SMALL), parse(SMALL, "optimizer.learning_rate={name: constant, value: 3e-3}")
    assert short == long
    assert short.rates() == {
        "optimizer.learning_rate": {"name": "constant", "warmup_steps": 0, "counter": "global_step", "value": 0.003}
    }


def test_a_whole_number_will_do_for_a_number() -> None:
    assert parse(SMALL, "optimizer.learning_rate=1").rates()["optimizer.learning_rate"]["value"] == 1
    assert parse(SMALL, "data.validation_fraction=0").data.validation_fraction == 0


def test_an_imported_component_is_checked_like_our_own() -> None:
    config = parse(SMALL, "model={name: 'user_model:TwoLayers'}")
    assert config.model.specs()["model"] == {"name": "user_model:TwoLayers", "width": 8}


def test_defaults_are_written_out() -> None:
    assert parse(SMALL).plain() == {
        "seed": 0,
        "dtype": "float32",
        "initial_step": 0,
        "data": {"name": "digits", "batch_size": 64, "shards": 1, "validation_fraction": 0.0, "n_classes": None},
        "model": {
            "name": "mlp",
            "hidden": [128],
            "activation": "relu",
            "dropout": 0.0,
            "layer_norm": False,
            "batch_norm": False,
            "output": "linear",
        },
        "task": {"name": "classification"},
        "optimizer": {
            "name": "adam",
            "learning_rate": {"name": "constant", "warmup_steps": 0, "counter": "global_step", "value": 0.003},
            "weight_decay": 0.0,
            "clip_norm": None,
            "beta1": 0.9,
            "beta2": 0.999,
            "epsilon": 1e-08,
        },
        "ema": None,
        "stop": {"last_step": 100, "num_steps": None, "early_stopping": None, "target_metric": None},
        "log": {
            "every": 10,
            "offset": 0,
            "counter": "global_step",
            "means": False,
            "norms": False,
            "csv": False,
            "tensorboard": False,
            "histograms": None,
        },
        "evaluate": {
            "every": None,
            "offset": 0,
            "counter": "global_step",
            "metric": None,
            "mode": None,
            "ema": False,
        },
        "samples": None,
        "checkpoint": {
            "every": 100,
            "offset": 0,
            "counter": "global_step",
            "every_seconds": None,
            "keep_last": 3,
            "keep_every": None,
            "keep_best": None,
            "on_error": "stop",
        },
        "on_nonfinite": "stop",
        "check_determinism": True,
        "numerics": {"threads": "auto", "blas_kernel": "auto"},
        "distributed": {"mode": "sync"},
    }


VARIED = ["optimizer.learning_rate={name: cosine, peak: 1, warmup_steps: 3}", "data={name: csv, path: x, target: '1'}"]
VARIED += [
    "optimizer={name: sgd, learning_rate: 1e-30}",
    "model={name: 'user_model:TwoLayers', width: 3}",
    "stop={num_steps: 0}",
]


@pytest.mark.parametrize("assignment", ["seed=0", *VARIED])
def test_a_written_config_is_the_same_config(assignment: str) -> None:
    config = parse(SMALL, assignment)
    again = parse(yamlio.dumps(config.plain()))
    assert again == config
    assert yamlio.dumps(again.plain()) == yamlio.dumps(config.plain())


def test_paths_are_written_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(SMALL, "data={name: csv, path: x.csv}").data.spec()["path"] == str(tmp_path / "x.csv")


OPTIONAL = ["log", "evaluate", "samples", "checkpoint", "numerics", "distributed", "ema"]


@pytest.mark.parametrize("section", OPTIONAL)
def test_a_section_that_is_null_is_the_default(section: str) -> None:
    """As it is where all of its keys are commented out."""
    default = parse(SMALL)
    text = f"{SMALL}{section}:  # every: 5\n"
    assert parse(text) == parse(SMALL, f"{section}=null") == default
    assert not list(faults(schemas.schema(), yamlio.loads(text, "c.yaml").value, schemas.schema()))
    if section in ("log", "evaluate", "checkpoint"):
        assert getattr(parse(SMALL, f"{section}=null", f"{section}.every=7"), section).every == 7


def test_every_section_that_may_be_left_out_may_be_null() -> None:
    sections = {name for name, key in Config.model_fields.items() if not key.is_required()}
    assert sections - set(OPTIONAL) == {"seed", "dtype", "initial_step", "on_nonfinite", "check_determinism"}


@pytest.mark.parametrize("key", ["seed", "dtype", "data", "model", "task", "optimizer", "stop", "data.batch_size"])
def test_what_has_no_such_default_may_not_be_null(key: str) -> None:
    (line,) = refusal(SMALL, f"{key}=null")
    assert line.startswith(f"--set {key}:1:1: {key}: null is wrong; ")


def test_a_null_resets_a_section_of_a_run(tmp_path: Path) -> None:
    train(make_config(evaluate={"every": 5}, log={"every": 5}, stop={"last_step": 10}), tmp_path / "run")
    arguments = ["resume", str(tmp_path / "run"), "--num-steps", "10", "--set", "evaluate=null", "--set", "log=null"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    kinds = [(row["kind"], row["step"]) for row in rows(tmp_path / "run") if row["step"] > 10]
    assert kinds == [("train", 20), ("eval", 20)]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(SMALL).stop.last_step = 3


def test_every_key_has_its_policy() -> None:
    assert {key: configs.policy(key) for key in yamlio.flatten(parse(SMALL).plain())} == POLICIES


def test_changes_name_every_key_that_differs() -> None:
    old = parse(SMALL)
    assert configs.changes(old, parse(SMALL)) == []
    new = parse(SMALL, "seed=3", "stop={num_steps: 5}", "optimizer.learning_rate={name: cosine, peak: 1}")
    assert configs.changes(old, new) == [
        {"key": "seed", "old": 0, "new": 3},
        {"key": "optimizer.learning_rate.name", "old": "constant", "new": "cosine"},
        {"key": "optimizer.learning_rate.value", "old": 0.003, "new": None},
        {"key": "stop.last_step", "old": 100, "new": None},
        {"key": "stop.num_steps", "old": None, "new": 5},
        {"key": "optimizer.learning_rate.peak", "old": None, "new": 1},
        {"key": "optimizer.learning_rate.end", "old": None, "new": 0.0},
    ]


def test_locked_changes_are_refused_with_old_and_new() -> None:
    changed = configs.changes(parse(SMALL), parse(SMALL, "seed=3", "log.every=7", "optimizer.learning_rate=1"))
    with pytest.raises(ConfigError) as caught:
        configs.refuse_locked(changed, ())
    reason = "would change the result, so a resume refuses it"
    assert str(caught.value).splitlines() == [
        f"seed: 0 -> 3 {reason}; keep 0, or pass --allow-change seed to stepctl resume",
        f"optimizer.learning_rate.value: 0.003 -> 1.0 {reason}; "
        "keep 0.003, or pass --allow-change optimizer.learning_rate.value to stepctl resume",
    ]
    configs.refuse_locked(changed, ("seed", "optimizer.learning_rate.value"))
    configs.refuse_locked(changed, ("optimizer", "seed"))
    for allowed in [("seed",), ("see", "optimizer"), ("optimizer.learning", "seed"), ("seed.x", "optimizer")]:
        with pytest.raises(ConfigError):
            configs.refuse_locked(changed, allowed)


def test_live_changes_are_not_refused() -> None:
    live = ["stop={num_steps: 1}", "log.every=3", "evaluate.every=4", "checkpoint={every: 9, keep_last: null}"]
    changed = configs.changes(parse(SMALL), parse(SMALL, *live))
    assert len(changed) == 6
    configs.refuse_locked(changed, ())


def test_with_values_leaves_the_old_config_alone() -> None:
    config = parse(SMALL)
    changed = config.with_values({"data.n_classes": 10, "numerics.threads": 2})
    assert (changed.data.n_classes, changed.numerics.threads) == (10, 2)
    assert config == parse(SMALL)


def test_a_target_is_absolute_or_from_the_start() -> None:
    assert [parse(SMALL).target(start) for start in (0, 40, 140)] == [100, 100, 100]
    assert [parse(SMALL, "stop={num_steps: 7}").target(start) for start in (0, 40)] == [7, 47]


def test_open_horizons() -> None:
    key = "optimizer.learning_rate.decay_steps"
    for rate, open_keys in {
        "1": {},
        "{name: cosine, peak: 1}": {key: "global_step"},
        "{name: polynomial, peak: 1, counter: samples_seen}": {key: "samples_seen"},
        "{name: cosine, peak: 1, decay_steps: 5}": {},
        "{name: exponential, peak: 1, decay_rate: 1, decay_steps: 3}": {},
    }.items():
        assert parse(SMALL, f"optimizer.learning_rate={rate}").horizon_keys() == open_keys


# The schema. A validator of the keywords that it uses, so that the tests need no package for it.

TYPES: dict[str, type | tuple[type, ...]] = {"object": dict, "array": list, "string": str, "boolean": bool}
TYPES |= {"integer": int, "number": (int, float), "null": type(None)}
KNOWN = {"type", "const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
KNOWN |= {"minLength", "maxLength", "pattern", "items"}
KNOWN |= {"properties", "required", "additionalProperties", "oneOf", "anyOf", "$ref", "$defs", "$schema"}
KNOWN |= {"title", "description", "default", "resume"}  # say nothing about validity


def faults(schema: dict[str, Any], value: Any, root: dict[str, Any], path: str = "$") -> Iterator[str]:
    """Yield the path and keyword of every rule that the value breaks."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        yield from faults(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root, path)
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(isinstance(value, TYPES[name]) and (name == "boolean") >= isinstance(value, bool) for name in types):
            yield f"{path} type"
            return
        if value is None and len(types) > 1:  # the other keywords are about what else it may be
            return
    checks: dict[str, Callable[[Any], Any]] = {
        "const": lambda given: value == given,
        "enum": lambda given: value in given,
        "minimum": lambda given: value >= given,
        "maximum": lambda given: value <= given,
        "exclusiveMinimum": lambda given: value > given,
        "exclusiveMaximum": lambda given: value < given,
        "minLength": lambda given: len(value) >= given,
        "maxLength": lambda given: len(value) <= given,
        "pattern": lambda given: not isinstance(value, str) or re.search(given, value),
        "required": lambda given: set(given) <= value.keys(),
        "anyOf": lambda given: any(not list(faults(each, value, root)) for each in given),
        "oneOf": lambda given: sum(not list(faults(each, value, root)) for each in given) == 1,
        "additionalProperties": lambda given: all(
            given is True or (given and not list(faults(given, value[key], root)))
            for key in value.keys() - schema.get("properties", {}).keys()
        ),
    }
    yield from (f"{path} {word}" for word, holds in checks.items() if word in schema and not holds(schema[word]))
    for key, below in schema.get("properties", {}).items():
        if key in value:
            yield from faults(below, value[key], root, f"{path}.{key}")
    for i, item in enumerate(value if "items" in schema else ()):
        yield from faults(schema["items"], item, root, f"{path}[{i}]")


def test_the_schema_admits_what_the_loader_admits() -> None:
    schema = schemas.schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    good = [yamlio.load(str(path)).value for path in Path(stepctl.__file__).parents[1].glob("configs/*.yaml")]
    assert good
    for assignment in ["seed=1", *VARIED]:
        document = yamlio.loads(SMALL, "c.yaml")
        document.set(assignment)
        good += [document.value, parse(SMALL, assignment).plain()]
    for value in good:
        assert list(faults(schema, value, schema)) == [], value


def references(schema: Any) -> Iterator[str]:
    """Yield every $ref in a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for item in schema:
            yield from references(item)


def test_every_reference_of_the_schema_has_its_definition() -> None:
    schema = schemas.schema()
    assert {f"#/$defs/{name}" for name in schema["$defs"]} == set(references(schema))


SCHEMA_FAULTS = {
    "seed=-1": "$.seed minimum",
    "dtype=float16": "$.dtype enum",
    "sed=1": "$ additionalProperties",
    "data.batch_size=0": "$.data oneOf",
    "data.batchsize=3": "$.data oneOf",
    "data={name: csv}": "$.data oneOf",
    "model={name: mpl, hidden: [3]}": "$.model oneOf",
    "model.hidden=[0]": "$.model oneOf",
    "model={name: 3}": "$.model oneOf",
    "optimizer.learning_rate=-1": "$.optimizer oneOf",
    "optimizer.learning_rate={name: cosine}": "$.optimizer oneOf",
    "optimizer.learning_rate=fast": "$.optimizer oneOf",
    "optimizer.clip_norm=0": "$.optimizer oneOf",
    "stop.laststep=1": "$.stop additionalProperties",
    "log.every=1.5": "$.log.every type",
    "evaluate.every=0": "$.evaluate.every anyOf",
    "numerics.threads=some": "$.numerics.threads anyOf",
}


@pytest.mark.parametrize("assignment", SCHEMA_FAULTS)
def test_the_schema_refuses_what_the_loader_refuses(assignment: str) -> None:
    document, schema = yamlio.loads(SMALL, "c.yaml"), schemas.schema()
    document.set(assignment)
    assert list(faults(schema, document.value, schema)) == [SCHEMA_FAULTS[assignment]]
    with pytest.raises(ConfigError):
        configs.parse(document)


def test_the_schema_tells_each_section_s_policy() -> None:
    properties = schemas.schema()["properties"]
    assert {key.partition(".")[0]: policy for key, policy in POLICIES.items()} == {
        key: properties[key]["resume"] for key in properties
    }


def test_checking_changes_no_document() -> None:
    document = yamlio.loads(SMALL, "c.yaml")
    before = copy.deepcopy(document.value)
    configs.parse(document)
    assert document.value == before


def test_a_schedule_that_the_target_leaves_no_room_is_found_by_config_check(tmp_path: Path) -> None:
    rate = {"name": "cosine", "peak": 0.1, "warmup_steps": 40}
    config = make_config(optimizer={"name": "sgd", "learning_rate": rate}, stop={"last_step": 40}).plain()
    (tmp_path / "c.yaml").write_text(yamlio.dumps(config))
    check = ["config", "check", str(tmp_path / "c.yaml")]
    done = CliRunner().invoke(cli, check)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "warmup_steps 40 leaves nothing of decay_steps 40" in done.stderr
    assert CliRunner().invoke(cli, [*check, "--set", "stop.last_step=41"]).exit_code == 0


def test_every_wrong_metric_and_counter_is_listed_by_config_check(tmp_path: Path) -> None:
    config = make_config().plain()
    config["checkpoint"]["keep_best"] = {"metric": "f1", "mode": "max"}
    config["stop"]["early_stopping"] = {"metric": "f2", "patience": 1}
    config["log"]["counter"] = "critic"
    (tmp_path / "c.yaml").write_text(yamlio.dumps(config))
    done = CliRunner().invoke(cli, ["config", "check", str(tmp_path / "c.yaml")])
    lines = done.stderr.splitlines()
    assert (done.exit_code, done.stdout, len(lines)) == (2, "", 3)
    assert [word for word in ("f1", "f2", "critic") if any(repr(word) in line for line in lines)] == [
        "f1",
        "f2",
        "critic",
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimizer.lr", "did you mean 'learning_rate'?"),
        ("data.bs", "did you mean 'batch_size'?"),
        ("epochs", "steps are counted, not epochs: give stop.num_steps or stop.last_step"),
    ],
)
def test_a_name_that_other_tools_use_leads_to_ours(key: str, hint: str) -> None:
    document = yamlio.Document(make_config().plain())
    document.set(f"{key}=1")
    with pytest.raises(ConfigError, match=re.escape(f"{key}: unknown key; {hint}")):
        configs.parse(document)
