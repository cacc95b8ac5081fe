"""Config checks: all errors at once, each with its place, key and allowed values."""

from __future__ import annotations

import copy
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.cli.main import cli
from stepctl.config import json_schema as schemas
from stepctl.config import yaml
from stepctl.config.changes import find_changes, refuse_locked_changes, resume_policy
from stepctl.config.model import Config, TaskConfig, parse_config
from stepctl.errors import ConfigError
from tests.support.messages import normalize
from tests.support.runs import make_config, rows, train

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
# what is set in SMALL
WRONG = [
    "data.batch_size=true",
    "data.batch_size='1'",
    "data.batch_size=64.0",
    "data.validation_fraction=1",
    "data.validation_fraction=true",
    "data.shards=6",
    "model.hidden=[1, 0, x]",
    "model.activation=rleu",
    "model={name: mlp}",
    "model={hidden: [3]}",
    "model={name: 3}",
    "task.hidden=3",
    "optimizer={name: adam}",
    "optimizer={name: sgd, learning_rate: 1, nesterov: true}",
    "optimizer.learning_rate=-1",
    "optimizer.learning_rate=[1]",
    "optimizer.learning_rate={name: cosne, peak: 1}",
    "optimizer.learning_rate={name: exponential, peak: 1, decay_steps: 0}",
    "optimizer.learning_rate={name: piecewise_constant, boundaries: [3, 2], values: [1, 2, 3]}",
    "stop.num_steps=3",
    "stop={}",
    "stop.laststep=3",
    "log={every: 3, offset: 3}",
    "evaluate={every: 1, offset: 2}",
    "optimiser={name: adam}",
    "model.name=nowhere:Net",
    "model.name=tests.support.user_model:Nets",
    "model={name: 'tests.support.user_model:TwoLayers', width: wide, layers: 2}",
]

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

from stepctl.optimizers.schedules import Schedule

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
    "data.order": "locked",
    "data.validation_fraction": "locked",
    "data.stratify": "locked",
    "data.n_classes": "locked",
    "data.sample_shape": "locked",
    "data.scale": "locked",
    "data.target_shape": "locked",
    "data.integer_samples": "locked",
    "data.class_names": "locked",
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
    "optimizer.learning_rate_multipliers": "locked",
    "optimizer.frozen": "locked",
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
    "mirror": "live",
    "hooks": "live; locked with state",
    "on_nonfinite": "live",
    "check_determinism": "live",
    "numerics.threads": "locked",
    "numerics.blas_kernel": "locked",
    "numerics.compiled": "live",
    "distributed.mode": "locked",
}


def parse(text: str, *assignments: str) -> Config:
    document = yaml.loads(text, "c.yaml")
    for assignment in assignments:
        document.set(assignment)
    return parse_config(document)


def refusal(text: str, *assignments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, *assignments)
    return str(caught.value).splitlines()


def test_every_error_at_once_in_the_order_of_the_file(snapshot: SnapshotAssertion) -> None:
    lines = refusal(ALL_WRONG)
    places = [tuple(map(int, line.split(":")[1:3])) for line in lines]
    assert places == sorted(places)
    assert {row for row, _ in places} == set(range(1, 13))
    assert lines == snapshot


@pytest.mark.parametrize("assignment", WRONG)
def test_wrong_by_set(assignment: str, snapshot: SnapshotAssertion) -> None:
    lines = refusal(SMALL, assignment)
    key = assignment.partition("=")[0]
    section = re.escape(key.partition(".")[0])
    for line in lines:  # where it was set, or where the section stands in the file
        assert re.match(
            rf"--set {re.escape(key)}(:\d+:\d+)?: {section}|c.yaml:\d+:\d+: {section}", line
        )
    assert lines == snapshot


def test_the_place_of_a_section_that_an_option_makes_is_the_option() -> None:
    (line,) = refusal(SMALL, "stop.early_stopping.min_delta=1.0")
    option = "--set stop.early_stopping.min_delta"
    assert line == f"{option}: stop.early_stopping: patience is missing"


def test_a_base_class_is_named_as_a_config_author_imports_it() -> None:
    (line,) = refusal(SMALL, "model={name: 'os:system'}")
    assert line.endswith("it is not a Model; subclass stepctl.Model")


@pytest.mark.parametrize("assignment", NO_COMPONENTS)
def test_an_object_that_is_not_a_component_is_never_called(
    assignment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = refusal(SMALL, assignment)
    assert re.search(
        rf": cannot use '.*': it is not an? {NO_COMPONENTS[assignment]}; subclass stepctl\.", line
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["leaves_at_once:x", "leaves:nothing", "leaves:Leaves", "leaves:number", "leaves:unsaid"],
)
def test_a_module_that_ends_the_program_does_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "leaves", raising=False)
    (tmp_path / "leaves_at_once.py").write_text("raise SystemExit(0)")
    (tmp_path / "leaves.py").write_text(LEAVES)
    (line,) = refusal(SMALL, f"optimizer.learning_rate={{name: '{name}'}}")
    assert line.startswith("--set optimizer.learning_rate:1:")
    assert line.replace(str(tmp_path), "HERE") == snapshot


def test_a_problem_is_one_line_even_with_control_characters(snapshot: SnapshotAssertion) -> None:
    long, odd = refusal(SMALL.replace("mlp", "c" * 20_000) + '"a\\nb\\e[31m": 1\n')
    assert odd.startswith(r"c.yaml:6:1: a\nb\x1b[31m: unknown key; allowed: ")
    assert len(long) < 1100
    assert re.sub("c{4,}", "ccc", long) == snapshot


@pytest.mark.training
def test_a_ruin_is_answered_at_once_and_in_part() -> None:
    items = SMALL.replace("[128]", f"[{'x,' * 8_000}]")
    keys = SMALL + "".join(f"k{i}: 1\n" for i in range(1000))
    for ruin in (items, keys):
        document = yaml.loads(ruin, "c.yaml")
        start = time.process_time()
        with pytest.raises(ConfigError) as caught:
            parse_config(document)
        assert time.process_time() - start < 3
        assert len(str(caught.value).splitlines()) == 51
        assert re.search(r"\.\.\. and \d+ more$", str(caught.value))


def test_a_horizon_may_lie_as_far_as_a_target() -> None:
    config = parse(
        SMALL, f"stop.last_step={2**62 - 1}", "optimizer.learning_rate={name: cosine, peak: 1}"
    )
    again = parse(
        yaml.dumps(config.with_values({next(iter(config.horizon_keys())): 2**62 - 1}).plain())
    )
    assert again.horizon_keys() == {}


def test_missing_sections(snapshot: SnapshotAssertion) -> None:
    lines = refusal("seed: 0")
    assert len(lines) == len(["data", "model", "task", "optimizer", "stop"])
    assert all(line.startswith("c.yaml:1:1: config: ") for line in lines)
    assert lines == snapshot


def test_several_settings_are_refused_together() -> None:
    lines = refusal(SMALL, "seed=yes", "model.hiden=[3]", "data.shards=0")
    assert [line.partition(": ")[0] for line in lines] == [
        "--set seed:1:1",
        "--set model.hiden",
        "--set data.shards:1:1",
    ]


def test_a_bare_number_is_the_constant_schedule() -> None:
    short, long = (
        parse(SMALL),
        parse(SMALL, "optimizer.learning_rate={name: constant, value: 3e-3}"),
    )
    assert short == long
    assert short.rates() == {
        "optimizer.learning_rate": {
            "name": "constant",
            "warmup_steps": 0,
            "counter": "global_step",
            "value": 0.003,
        }
    }


def test_a_whole_number_will_do_for_a_number() -> None:
    assert (
        parse(SMALL, "optimizer.learning_rate=1").rates()["optimizer.learning_rate"]["value"] == 1
    )
    assert parse(SMALL, "data.validation_fraction=0").data.validation_fraction == 0


def test_an_imported_component_is_checked_like_our_own() -> None:
    config = parse(SMALL, "model={name: 'tests.support.user_model:TwoLayers'}")
    assert config.model.specs()["model"] == {
        "name": "tests.support.user_model:TwoLayers",
        "width": 8,
    }


def test_defaults_are_written_out() -> None:
    assert parse(SMALL).plain() == {
        "seed": 0,
        "dtype": "float32",
        "initial_step": 0,
        "data": {
            "name": "digits",
            "batch_size": 64,
            "shards": 1,
            "order": "shuffled",
            "validation_fraction": 0.0,
            "stratify": False,
            "n_classes": None,
            "sample_shape": None,
            "target_shape": None,
            "integer_samples": None,
            "scale": 1 / 16,
            "class_names": None,
        },
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
            "learning_rate": {
                "name": "constant",
                "warmup_steps": 0,
                "counter": "global_step",
                "value": 0.003,
            },
            "weight_decay": 0.0,
            "clip_norm": None,
            "learning_rate_multipliers": None,
            "frozen": [],
            "beta1": 0.9,
            "beta2": 0.999,
            "epsilon": 1e-08,
        },
        "ema": None,
        "stop": {
            "last_step": 100,
            "num_steps": None,
            "early_stopping": None,
            "target_metric": None,
        },
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
        "mirror": None,
        "hooks": [],
        "on_nonfinite": "stop",
        "check_determinism": True,
        "numerics": {"threads": "auto", "blas_kernel": "auto", "compiled": "auto"},
        "distributed": {"mode": "sync"},
    }


VARIED = [
    "optimizer.learning_rate={name: cosine, peak: 1, warmup_steps: 3}",
    "data={name: csv, path: x, target: '1'}",
]
VARIED += [
    "optimizer={name: sgd, learning_rate: 1e-30}",
    "model={name: 'tests.support.user_model:TwoLayers', width: 3}",
    "stop={num_steps: 0}",
]


@pytest.mark.parametrize("assignment", ["seed=0", *VARIED])
def test_a_written_config_is_the_same_config(assignment: str) -> None:
    config = parse(SMALL, assignment)
    again = parse(yaml.dumps(config.plain()))
    assert again == config
    assert yaml.dumps(again.plain()) == yaml.dumps(config.plain())


def test_paths_are_written_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(SMALL, "data={name: csv, path: x.csv}").data.spec()["path"] == str(
        tmp_path / "x.csv"
    )


OPTIONAL = [
    "log",
    "evaluate",
    "samples",
    "checkpoint",
    "mirror",
    "hooks",
    "numerics",
    "distributed",
    "ema",
]


@pytest.mark.training
@pytest.mark.parametrize("section", OPTIONAL)
def test_a_section_that_is_null_is_the_default(section: str) -> None:
    """As it is where all of its keys are commented out."""
    default = parse(SMALL)
    text = f"{SMALL}{section}:  # every: 5\n"
    assert parse(text) == parse(SMALL, f"{section}=null") == default
    assert not list(faults(schemas.schema(), yaml.loads(text, "c.yaml").value, schemas.schema()))
    if section in ("log", "evaluate", "checkpoint"):
        assert getattr(parse(SMALL, f"{section}=null", f"{section}.every=7"), section).every == 7


def test_every_section_that_may_be_left_out_may_be_null() -> None:
    sections = {name for name, key in TaskConfig.model_fields.items() if not key.is_required()}
    assert sections - set(OPTIONAL) == {
        "seed",
        "dtype",
        "initial_step",
        "on_nonfinite",
        "check_determinism",
    }


@pytest.mark.parametrize(
    "key", ["seed", "dtype", "data", "model", "task", "optimizer", "stop", "data.batch_size"]
)
def test_sections_without_a_default_may_not_be_null(key: str) -> None:
    (line,) = refusal(SMALL, f"{key}=null")
    assert line.startswith(f"--set {key}:1:1: {key}: should be ")
    assert line.endswith(", got null")


@pytest.mark.training
def test_a_null_resets_a_section_of_a_run(tmp_path: Path) -> None:
    train(
        make_config(evaluate={"every": 5}, log={"every": 5}, stop={"last_step": 10}),
        tmp_path / "run",
    )
    arguments = [
        "resume",
        str(tmp_path / "run"),
        "--num-steps",
        "10",
        "--set",
        "evaluate=null",
        "--set",
        "log=null",
    ]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    kinds = [(row["kind"], row["step"]) for row in rows(tmp_path / "run") if row["step"] > 10]
    assert kinds == [("train", 20), ("eval", 20)]


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(SMALL).stop.last_step = 3


def test_every_key_has_its_policy() -> None:
    assert {key: resume_policy(key) for key in yaml.flatten(parse(SMALL).plain())} == POLICIES


def test_changes_name_every_key_that_differs() -> None:
    old = parse(SMALL)
    assert find_changes(old, parse(SMALL)) == []
    new = parse(
        SMALL, "seed=3", "stop={num_steps: 5}", "optimizer.learning_rate={name: cosine, peak: 1}"
    )
    assert find_changes(old, new) == [
        {"key": "seed", "old": 0, "new": 3},
        {"key": "optimizer.learning_rate.name", "old": "constant", "new": "cosine"},
        {"key": "optimizer.learning_rate.value", "old": 0.003, "new": None},
        {"key": "stop.last_step", "old": 100, "new": None},
        {"key": "stop.num_steps", "old": None, "new": 5},
        {"key": "optimizer.learning_rate.peak", "old": None, "new": 1},
        {"key": "optimizer.learning_rate.end", "old": None, "new": 0.0},
    ]


def test_locked_changes_are_refused_with_old_and_new(snapshot: SnapshotAssertion) -> None:
    changed = find_changes(
        parse(SMALL), parse(SMALL, "seed=3", "log.every=7", "optimizer.learning_rate=1")
    )
    with pytest.raises(ConfigError) as caught:
        refuse_locked_changes(changed, ())
    seed, rate = str(caught.value).splitlines()
    assert seed.startswith("seed: 0 -> 3 ")
    assert rate.startswith("optimizer.learning_rate.value: 0.003 -> 1.0 ")
    assert [seed, rate] == snapshot
    refuse_locked_changes(changed, ("seed", "optimizer.learning_rate.value"))
    refuse_locked_changes(changed, ("optimizer", "seed"))
    for allowed in [
        ("seed",),
        ("see", "optimizer"),
        ("optimizer.learning", "seed"),
        ("seed.x", "optimizer"),
    ]:
        with pytest.raises(ConfigError):
            refuse_locked_changes(changed, allowed)


def test_live_changes_are_not_refused() -> None:
    live = [
        "stop={num_steps: 1}",
        "log.every=3",
        "evaluate.every=4",
        "checkpoint={every: 9, keep_last: null}",
    ]
    changed = find_changes(parse(SMALL), parse(SMALL, *live))
    assert len(changed) == 6
    refuse_locked_changes(changed, ())


def test_with_values_leaves_the_old_config_alone() -> None:
    rate = "optimizer.learning_rate={name: cosine, peak: 0.01}"
    config = parse(SMALL, rate)
    text = config.text
    decided = {
        "data.n_classes": 10,
        "numerics.threads": 2,
        "optimizer.learning_rate.decay_steps": 7,
    }
    changed = config.with_values(decided)
    assert (changed.data.n_classes, changed.numerics.threads) == (10, 2)
    assert decided.items() <= yaml.flatten(yaml.loads(changed.text, "text").value).items()
    assert changed == type(config).model_validate(changed.plain())
    assert config == parse(SMALL, rate)
    assert config.text == text


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

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
}
TYPES |= {"integer": int, "number": (int, float), "null": type(None)}
KNOWN = {"type", "const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
KNOWN |= {"minLength", "maxLength", "pattern", "items"}
KNOWN |= {
    "properties",
    "required",
    "additionalProperties",
    "oneOf",
    "anyOf",
    "$ref",
    "$defs",
    "$schema",
}
KNOWN |= {"title", "description", "default", "resume"}  # say nothing about validity


def faults(
    schema: dict[str, Any], value: Any, root: dict[str, Any], path: str = "$"
) -> Iterator[str]:
    """Yield the path and keyword of every rule that the value breaks."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        yield from faults(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root, path)
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(
            isinstance(value, TYPES[name]) and (name == "boolean") >= isinstance(value, bool)
            for name in types
        ):
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
    yield from (
        f"{path} {word}"
        for word, holds in checks.items()
        if word in schema and not holds(schema[word])
    )
    for key, below in schema.get("properties", {}).items():
        if key in value:
            yield from faults(below, value[key], root, f"{path}.{key}")
    for i, item in enumerate(value if "items" in schema else ()):
        yield from faults(schema["items"], item, root, f"{path}[{i}]")


def test_the_schema_accepts_the_configs_that_the_loader_accepts() -> None:
    schema = schemas.schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    good = [
        yaml.load(str(path)).value
        for path in Path(stepctl.__file__).parents[1].glob("configs/*.yaml")
    ]
    assert good
    for assignment in ["seed=1", *VARIED]:
        document = yaml.loads(SMALL, "c.yaml")
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


@pytest.mark.training
@pytest.mark.parametrize("assignment", SCHEMA_FAULTS)
def test_the_schema_refuses_the_configs_that_the_loader_refuses(assignment: str) -> None:
    document, schema = yaml.loads(SMALL, "c.yaml"), schemas.schema()
    document.set(assignment)
    assert list(faults(schema, document.value, schema)) == [SCHEMA_FAULTS[assignment]]
    with pytest.raises(ConfigError):
        parse_config(document)


def test_the_schema_tells_each_section_s_policy() -> None:
    schema = schemas.schema()
    properties = schema["properties"]
    of_task = {key.partition(".")[0]: policy for key, policy in POLICIES.items()}
    of_task |= {"program": "locked", "numerics": "locked"}
    assert of_task == {key: properties[key]["resume"] for key in properties}
    numerics = schema["$defs"]["NumericsConfig"]["properties"]
    assert [key for key, own in numerics.items() if own.get("resume") == "live"] == ["compiled"]


def test_checking_changes_no_document() -> None:
    document = yaml.loads(SMALL, "c.yaml")
    before = copy.deepcopy(document.value)
    parse_config(document)
    assert document.value == before


def test_a_schedule_that_the_target_leaves_no_room_is_found_by_config_check(
    tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    rate = {"name": "cosine", "peak": 0.1, "warmup_steps": 40}
    config = make_config(
        optimizer={"name": "sgd", "learning_rate": rate}, stop={"last_step": 40}
    ).plain()
    (tmp_path / "c.yaml").write_text(yaml.dumps(config))
    check = ["config", "check", str(tmp_path / "c.yaml")]
    done = CliRunner().invoke(cli, check)
    assert (done.exit_code, done.stdout) == (2, "")
    assert normalize(done.stderr, HERE=tmp_path) == snapshot
    assert CliRunner().invoke(cli, [*check, "--set", "stop.last_step=41"]).exit_code == 0


def test_every_wrong_metric_and_counter_is_listed_by_config_check(tmp_path: Path) -> None:
    config = make_config().plain()
    config["checkpoint"]["keep_best"] = {"metric": "f1", "mode": "max"}
    config["stop"]["early_stopping"] = {"metric": "f2", "patience": 1}
    config["log"]["counter"] = "critic"
    (tmp_path / "c.yaml").write_text(yaml.dumps(config))
    done = CliRunner().invoke(cli, ["config", "check", str(tmp_path / "c.yaml")])
    lines = done.stderr.splitlines()
    assert (done.exit_code, done.stdout, len(lines)) == (2, "", 3)
    assert [
        word for word in ("f1", "f2", "critic") if any(repr(word) in line for line in lines)
    ] == [
        "f1",
        "f2",
        "critic",
    ]


@pytest.mark.parametrize("key", ["optimizer.lr", "data.bs", "epochs"])
def test_a_name_that_other_tools_use_leads_to_ours(key: str, snapshot: SnapshotAssertion) -> None:
    (line,) = refusal(yaml.dumps(make_config().plain()), f"{key}=1")
    assert line.startswith(f"--set {key}: {key}: ")
    assert line == snapshot
