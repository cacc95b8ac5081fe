"""The config: what each key may hold, whether a resume may change it, and every error at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from stepctl import registry
from stepctl.errors import ConfigError
from stepctl.problems import Problem, did_you_mean, in_lines, problems_of, unknown_key
from stepctl.registry import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from stepctl.shell import options
from stepctl.state import GLOBAL_STEP, Trigger, trigger
from stepctl.yamlio import Document, dumps, flatten

# Each section that is a component, and its family.
FAMILIES = {"data": "data", "model": "models", "task": "tasks", "optimizer": "optimizers"}
SEVERAL = ("model", "optimizer")  # or one component for each of the task's models, by its name
MODEL = "model"  # the name of the one model of a task that has one

LIVE: dict[str, JsonValue] = {"resume": "live"}  # may change on resume
LOCKED: dict[str, JsonValue] = {"resume": "locked"}  # refused on resume, unless --allow-change names it


class Section(BaseModel):
    """A mapping of known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Named(Section):
    """A component: its name, and its own arguments beside it."""

    model_config = ConfigDict(extra="allow")

    name: str

    def spec(self) -> dict[str, Any]:
        """Return name and arguments."""
        return {"name": self.name, **(self.model_extra or {})}


class Components(Section):
    """A component, or several by name: {critic: {name: mlp, ...}, generator: {name: mlp, ...}}."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None

    def specs(self) -> dict[str, dict[str, Any]]:
        """Return each component's name and arguments; a single one is called "model"."""
        found = dict(self.model_extra or {})
        return found if self.name is None else {MODEL: {"name": self.name, **found}}


class Data(Named):
    """The data component, and how its samples are dealt out."""

    batch_size: PositiveInt = 32
    shards: PositiveInt = Field(1, description="equal parts of a batch; gradients are summed over them in a tree")
    validation_fraction: float = Field(0.0, ge=0, lt=1, description="share of the rows kept for validation")
    n_classes: PositiveInt | None = Field(None, description="found in the data if not given")

    @model_validator(mode="after")
    def _shards_divide(self) -> Data:
        if self.batch_size % self.shards:
            raise ValueError(
                f"shards {self.shards} does not divide batch_size {self.batch_size}; a batch is cut into equal parts"
            )
        return self


class EarlyStopping(Section):
    """Stop after `patience` evaluations in a row that did not better the best by more than `min_delta`."""

    patience: PositiveInt
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    min_delta: NonNegative = 0.0


class TargetMetric(Section):
    """Stop once an evaluation's `metric` is `value` or better."""

    value: float
    metric: str | None = None
    mode: Literal["min", "max"] | None = None


class Stop(Section):
    """When to stop: at an absolute step, or so many steps after the segment's start; or before that."""

    last_step: NonNegativeInt | None = None
    num_steps: NonNegativeInt | None = None
    early_stopping: EarlyStopping | None = None
    target_metric: TargetMetric | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Stop:
        if (self.last_step is None) == (self.num_steps is None):
            raise ValueError("give either last_step (absolute) or num_steps (from the segment's start)")
        return self


class Cadence(Section):
    """Fires where counter % every == offset; the counter is the global step, or one that is named.

    A counter that rises by more than one at a step fires where it comes to such a value or passes it.
    """

    every: PositiveInt | None
    offset: NonNegativeInt = 0
    counter: str = GLOBAL_STEP

    @model_validator(mode="after")
    def _can_fire(self) -> Cadence:
        if self.every is not None and self.offset >= self.every:
            raise ValueError(f"offset {self.offset} never comes with every {self.every}; it must be below it")
        return self

    def trigger(self, also: int | None = None) -> Trigger:
        """Return what tells whether an update came to the grid, or as the first to the global step `also`."""
        return trigger(self.counter, self.every, self.offset, also)


class Log(Cadence):
    """When to write a training row; also at the run's first step. What else to write, and where.

    `means`: the mean of each metric over the steps since the row before. `norms`: of gradients and parameters.
    Beside metrics.jsonl: `csv`, `tensorboard`, and there every `histograms` steps those of the parameters.
    """

    every: PositiveInt = 10
    means: bool = False
    norms: bool = False
    csv: bool = False
    tensorboard: bool = False
    histograms: PositiveInt | None = None

    @model_validator(mode="after")
    def _histograms_have_a_place(self) -> Log:
        if self.histograms is not None and not self.tensorboard:
            raise ValueError("histograms are written to tensorboard/; set tensorboard: true too, or leave them out")
        return self


class Evaluate(Cadence):
    """When to evaluate on the validation part; without `every`, at the end of a segment only.

    `metric` is the one whose best value is kept (the task's first if not given); `mode` tells which value is the
    better one. With `ema`, the moving average's weights are evaluated too: ema_loss, ...
    """

    every: PositiveInt | None = None
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    ema: bool = False


class Samples(Cadence):
    """When to write a picture of `n` samples that a generator makes, always of the same noise.

    `shape` is that of a sample, (height, width) or (height, width, 3); a square one is found.
    """

    every: PositiveInt
    n: PositiveInt = 64
    shape: list[PositiveInt] | None = Field(None, min_length=2, max_length=3)


class Average(Section):
    """A moving average of the weights: a <- decay a + (1 - decay) p, with `warmup` of a lesser decay at first."""

    decay: Fraction
    warmup: bool = False


class KeepBest(Section):
    """Keep the checkpoints of the `n` best evaluations too."""

    metric: str
    mode: Literal["min", "max"]
    n: PositiveInt = 1


class Checkpoint(Cadence):
    """When to save, beside the start, the end and a signal, and what to keep.

    Saved is on the grid, and when `every_seconds` have passed. Kept are the `keep_last` newest
    (null: all), the steps that `keep_every` divides, and the best. After a save that failed, `on_error` says.
    """

    every: PositiveInt | None = 100
    every_seconds: Positive | None = None
    keep_last: PositiveInt | None = 3
    keep_every: PositiveInt | None = None
    keep_best: KeepBest | None = None
    on_error: Literal["stop", "continue"] = "stop"


class Numerics(Section):
    """What the last bits depend on; "auto" is resolved when the run starts."""

    threads: PositiveInt | Literal["auto"] = "auto"
    blas_kernel: str = "auto"


class Distributed(Section):
    """How several processes share a run: each step together, or each updating on its own (other bits every time)."""

    mode: Literal["sync", "async"] = "sync"


class Config(Section):
    """A whole config. Locked keys decide the result; live ones only when to stop, look and save.

    The paths of data files may change on a resume as long as the data do not.
    """

    seed: int = Field(0, ge=0, lt=1 << 63, json_schema_extra=LOCKED)
    dtype: Literal["float32", "float64"] = Field("float32", json_schema_extra=LOCKED)
    initial_step: NonNegativeInt = Field(0, json_schema_extra=LOCKED)
    data: Data = Field(json_schema_extra=LOCKED)
    model: Components = Field(json_schema_extra=LOCKED)
    task: Named = Field(json_schema_extra=LOCKED)
    optimizer: Components = Field(json_schema_extra=LOCKED)
    ema: Average | None = Field(None, json_schema_extra=LOCKED)
    stop: Stop = Field(json_schema_extra=LIVE)
    log: Log = Field(default_factory=Log, json_schema_extra=LIVE)
    evaluate: Evaluate = Field(default_factory=Evaluate, json_schema_extra=LIVE)
    samples: Samples | None = Field(None, json_schema_extra=LIVE)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, json_schema_extra=LIVE)
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="what to do with a batch whose loss or gradient is not finite", json_schema_extra=LIVE
    )
    check_determinism: bool = Field(
        True,
        description="whether train computes the first step several times, if code of your own takes part, and warns "
        "where the bits differ",
        json_schema_extra=LIVE,
    )
    numerics: Numerics = Field(default_factory=Numerics, json_schema_extra=LOCKED)
    distributed: Distributed = Field(default_factory=Distributed, json_schema_extra=LOCKED)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any) -> Any:
        """Take a section that is null, as one whose keys are all commented out is, for one that is not there."""
        if not isinstance(value, dict):
            return value
        optional = {name for name, key in cls.model_fields.items() if key.default_factory is not None}
        return {name: item for name, item in value.items() if item is not None or name not in optional}

    @model_validator(mode="after")
    def _asynchronous(self) -> Config:
        if self.distributed.mode == "async" and (self.on_nonfinite == "skip" or self.log.means):
            wrong = "log.means" if self.log.means else "on_nonfinite: skip"
            raise ValueError(f"distributed.mode: async cannot do {wrong}; leave one of them out")
        return self

    def plain(self) -> dict[str, Any]:
        """Return plain values, every default written out."""
        plain = self.model_dump(mode="python")
        for section in SEVERAL:
            if plain[section]["name"] is None:
                del plain[section]["name"]
        return plain

    @functools.cached_property
    def text(self) -> str:
        """The plain values as YAML."""
        return dumps(self.plain())

    def with_values(self, changes: Mapping[str, Any]) -> Config:
        """Return a copy with these dotted keys set to values that are known to be right."""
        plain = self.plain()
        for key, value in changes.items():
            *folders, last = key.split(".")
            functools.reduce(dict.__getitem__, folders, plain)[last] = value
        return Config.model_validate(plain)

    def target(self, start: int) -> int:
        """Return the absolute step at which a segment that starts at `start` stops."""
        if self.stop.last_step is not None:
            return self.stop.last_step
        assert self.stop.num_steps is not None
        return start + self.stop.num_steps

    def data_files(self) -> set[str]:
        """Return the keys that name data files: a resume may change them where the data stay the same."""
        known = registry.parameters(registry.resolve("data", self.data.name))
        return {f"data.{name}" for name, (_, hint) in known.items() if registry.is_file(hint)}

    def cadences(self) -> dict[str, Cadence]:
        """Return what fires on a grid, by section."""
        found = {"log": self.log, "evaluate": self.evaluate, "checkpoint": self.checkpoint, "samples": self.samples}
        return {section: cadence for section, cadence in found.items() if cadence is not None}

    def rates(self) -> dict[str, dict[str, Any]]:
        """Return the schedule of each optimizer's learning rate by its key."""
        one = self.optimizer.name is not None
        keys = {name: "optimizer" if one else f"optimizer.{name}" for name in self.optimizer.specs()}
        specs = self.optimizer.specs().items()
        return {f"{keys[name]}.learning_rate": spec["learning_rate"] for name, spec in specs if "learning_rate" in spec}

    def horizon_keys(self) -> dict[str, str]:
        """Return the keys of decay horizons that were left open, each with its counter.

        A run writes there what the counter stands at at its first target.
        """
        return {
            f"{key}.decay_steps": rate["counter"]
            for key, rate in self.rates().items()
            if not rate.get("decay_steps")
            and "decay_steps" in registry.parameters(registry.resolve("schedules", rate["name"]))
        }


def parse(document: Document) -> Config:
    """Check a document against the models and the components' signatures; ConfigError lists every problem."""
    value = dict(document.value)
    problems: list[Problem] = []
    for section, family in FAMILIES.items():
        value[section], found = _checked(section, family, value.get(section))
        problems += [Problem((section, *problem.path), problem.message) for problem in found]
        if section not in document.value:
            del value[section]
    try:
        config = Config.model_validate(value)
    except ValidationError as error:
        unknown = {item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"}
        problems += [_named(problem, unknown) for problem in problems_of(error, value)]
    problems += [] if problems else _wrong_models(config)
    if problems:
        order = {path: number for number, path in enumerate(document.places)}
        problems.sort(key=lambda problem: order.get(problem.path, -1))
        raise ConfigError(in_lines([_line(document, problem) for problem in problems]))
    return config


def _checked(section: str, family: str, spec: Any) -> tuple[Any, list[Problem]]:
    """Return a section with the defaults of its components written out, and what is wrong with it."""
    if not isinstance(spec, dict):
        return spec, []
    if isinstance(spec.get("name"), str):
        shared = set(Data.model_fields) if section == "data" else {"name"}
        own = {key: item for key, item in spec.items() if key not in shared or key == "name"}
        full, problems = registry.check(family, own, tuple(sorted(shared - {"name"})))
        return {key: item for key, item in spec.items() if key in shared} | full, problems
    if section not in SEVERAL or "name" in spec:
        return spec, []
    named = {key: item for key, item in spec.items() if isinstance(item, dict) and isinstance(item.get("name"), str)}
    if not named or len(named) < len(spec):
        return spec, [Problem((), "name is missing; give one component, {name: ...}, or one for each of the models")]
    checked = {key: registry.check(family, item) for key, item in named.items()}
    problems = [Problem((key, *each.path), each.message) for key, (_, found) in checked.items() for each in found]
    return {key: full for key, (full, _) in checked.items()}, problems


def _wrong_models(config: Config) -> Iterator[Problem]:
    """Yield a problem for each section that does not have a component for each of the task's models."""
    wanted = tuple(getattr(registry.resolve("tasks", config.task.name), "models", (MODEL,)))
    for section in SEVERAL:
        found = tuple(getattr(config, section).specs())
        if sorted(found) != sorted(wanted):
            form = "{name: ...}" if wanted == (MODEL,) else f"{{{', '.join(f'{name}: ...' for name in wanted)}}}"
            has = "one component" if found == (MODEL,) else ", ".join(found)
            yield Problem((section,), f"has {has}, and the task {config.task.name} needs {form}")


def _named(problem: Problem, unknown: set[tuple[str | int, ...]]) -> Problem:
    if problem.path not in unknown:
        return problem
    model: Any = Config
    for part in problem.path[:-1]:
        kind = model.model_fields[part].annotation
        model = next((option for option in get_args(kind) if option is not type(None)), kind)
    return Problem(problem.path, unknown_key(str(problem.path[-1]), list(model.model_fields)))


def _line(document: Document, problem: Problem) -> str:
    key = ".".join(str(part) for part in problem.path) or "config"
    place = document.place(problem.path, key=problem.message.startswith("unknown key"))
    return f"{place}: {key}: {problem.message}"


def changes(old: Config, new: Config) -> list[dict[str, Any]]:
    """Return every key whose value differs: [{"key", "old", "new"}], None where it is absent."""
    before, after = flatten(old.plain()), flatten(new.plain())
    keys = dict.fromkeys([*before, *after])
    both = [{"key": key, "old": before.get(key), "new": after.get(key)} for key in keys]
    return [change for change in both if change["old"] != change["new"]]


def refuse_unknown(allowed: tuple[str, ...], *known: Config) -> None:
    """Raise ConfigError if `--allow-change` names what is no key, nor above one."""
    keys = sorted({key for config in known for key in flatten(config.plain())})
    for name in allowed:
        if not any(f"{key}.".startswith(f"{name}.") for key in keys):
            raise ConfigError(f"--allow-change {name}: no such key{did_you_mean(name, keys)}")


def refuse_locked(changed: list[dict[str, Any]], allowed: tuple[str, ...]) -> None:
    """Raise ConfigError if a locked key changed that no `--allow-change` names (itself or a key above it)."""
    problems = [
        f"{change['key']}: {change['old']} -> {change['new']} would change the result, so a resume refuses it; "
        f"keep {change['old']}, or pass {options('--allow-change', change['key'])} to stepctl resume"
        for change in changed
        if policy(change["key"]) == "locked" and not any(f"{change['key']}.".startswith(f"{name}.") for name in allowed)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def policy(key: str) -> str:
    """Return the resume policy of a dotted key: "live" or "locked"."""
    extra = Config.model_fields[key.partition(".")[0]].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["resume"])
