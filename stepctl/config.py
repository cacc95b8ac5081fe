"""The config: what each key may hold, whether a resume may change it, and every error at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from stepctl import registry
from stepctl.errors import ConfigError
from stepctl.problems import Problem, did_you_mean, in_lines, problems_of, unknown_key
from stepctl.registry import NonNegativeInt, Positive, PositiveInt
from stepctl.yamlio import Document, flatten

# Each section that is a component, and its family.
FAMILIES = {"data": "data", "model": "models", "task": "tasks", "optimizer": "optimizers"}

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


class Stop(Section):
    """When to stop: at an absolute step, or so many steps after the segment's start."""

    last_step: NonNegativeInt | None = None
    num_steps: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Stop:
        if (self.last_step is None) == (self.num_steps is None):
            raise ValueError("give either last_step (absolute) or num_steps (from the segment's start)")
        return self


class Cadence(Section):
    """Fires where step % every == offset."""

    every: PositiveInt | None
    offset: NonNegativeInt = 0

    @model_validator(mode="after")
    def _can_fire(self) -> Cadence:
        if self.every is not None and self.offset >= self.every:
            raise ValueError(f"offset {self.offset} never comes with every {self.every}; it must be below it")
        return self

    def fires(self, step: int) -> bool:
        """Tell whether this step is on the grid."""
        return self.every is not None and step % self.every == self.offset


class Log(Cadence):
    """When to write a training row (also at the run's first step), and where beside metrics.jsonl."""

    every: PositiveInt = 10
    csv: bool = Field(default=False, description="write metrics.csv too")
    tensorboard: bool = Field(default=False, description="write tensorboard/ too")
    histograms: PositiveInt | None = Field(
        default=None, description="write the parameters' histograms there, on steps that this divides"
    )

    @model_validator(mode="after")
    def _histograms_have_a_place(self) -> Log:
        if self.histograms is not None and not self.tensorboard:
            raise ValueError("histograms are written to tensorboard/; set tensorboard: true too, or leave them out")
        return self


class Evaluate(Cadence):
    """When to evaluate on the validation part; without `every`, at the end of a segment only."""

    every: PositiveInt | None = None


class KeepBest(Section):
    """Keep the checkpoints of the `n` best evaluations too."""

    metric: str
    mode: Literal["min", "max"]
    n: PositiveInt = 1


class Checkpoint(Section):
    """When to save, beside the start, the end and a signal, and what to keep.

    Saved is on steps that `every` divides, and when `every_seconds` have passed. Kept are the `keep_last` newest
    (null: all), the steps that `keep_every` divides, and the best. After a save that failed, `on_error` says.
    """

    every: PositiveInt | None = 100
    every_seconds: Positive | None = None
    keep_last: PositiveInt | None = 3
    keep_every: PositiveInt | None = None
    keep_best: KeepBest | None = None
    on_error: Literal["stop", "continue"] = "stop"

    def fires(self, step: int) -> bool:
        """Tell whether this step is on the grid."""
        return self.every is not None and step % self.every == 0


class Numerics(Section):
    """What the last bits depend on; "auto" is resolved when the run starts."""

    threads: PositiveInt | Literal["auto"] = "auto"
    blas_kernel: str = "auto"


class Config(Section):
    """A whole config. Locked keys decide the result; live ones only when to stop, look and save."""

    seed: int = Field(0, ge=0, lt=1 << 63, json_schema_extra=LOCKED)
    dtype: Literal["float32", "float64"] = Field("float32", json_schema_extra=LOCKED)
    initial_step: NonNegativeInt = Field(0, json_schema_extra=LOCKED)
    data: Data = Field(json_schema_extra=LOCKED)
    model: Named = Field(json_schema_extra=LOCKED)
    task: Named = Field(json_schema_extra=LOCKED)
    optimizer: Named = Field(json_schema_extra=LOCKED)
    stop: Stop = Field(json_schema_extra=LIVE)
    log: Log = Field(default_factory=Log, json_schema_extra=LIVE)
    evaluate: Evaluate = Field(default_factory=Evaluate, json_schema_extra=LIVE)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, json_schema_extra=LIVE)
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="what to do with a batch whose loss or gradient is not finite", json_schema_extra=LIVE
    )
    numerics: Numerics = Field(default_factory=Numerics, json_schema_extra=LOCKED)

    def plain(self) -> dict[str, Any]:
        """Return plain values, every default written out."""
        return self.model_dump(mode="python")

    def with_values(self, changes: Mapping[str, Any]) -> Config:
        """Return a copy with these dotted keys set to values that are known to be right."""
        plain = self.plain()
        for key, value in changes.items():
            *folders, last = key.split(".")
            at = plain
            for folder in folders:
                at = at[folder]
            at[last] = value
        return Config.model_validate(plain)

    def target(self, start: int) -> int:
        """Return the absolute step at which a segment that starts at `start` stops."""
        if self.stop.last_step is not None:
            return self.stop.last_step
        assert self.stop.num_steps is not None
        return start + self.stop.num_steps

    def horizon_keys(self) -> list[str]:
        """Return the keys of decay horizons that were left open: a run writes its first target there."""
        rate = self.optimizer.spec().get("learning_rate")
        if isinstance(rate, dict) and "decay_steps" in registry.parameters(registry.resolve("schedules", rate["name"])):
            return [] if rate.get("decay_steps") else ["optimizer.learning_rate.decay_steps"]
        return []


def parse(document: Document) -> Config:
    """Check a document against the models and the components' signatures; ConfigError lists every problem."""
    value = dict(document.value)
    problems: list[Problem] = []
    for section, family in FAMILIES.items():
        spec = value.get(section)
        if isinstance(spec, dict) and isinstance(spec.get("name"), str):
            shared = set(Data.model_fields) if section == "data" else {"name"}
            own = {key: item for key, item in spec.items() if key not in shared or key == "name"}
            full, found = registry.check(family, own, tuple(sorted(shared - {"name"})))
            value[section] = {key: item for key, item in spec.items() if key in shared} | full
            problems += [Problem((section, *problem.path), problem.message) for problem in found]
    try:
        config = Config.model_validate(value)
    except ValidationError as error:
        unknown = {item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"}
        problems += [_named(problem, unknown) for problem in problems_of(error, value)]
    if problems:
        order = {path: number for number, path in enumerate(document.places)}
        problems.sort(key=lambda problem: order.get(problem.path, -1))
        raise ConfigError(in_lines([_line(document, problem) for problem in problems]))
    return config


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
    return [
        {"key": key, "old": before.get(key), "new": after.get(key)}
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


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
        f"keep {change['old']}, or pass --allow-change {change['key']}"
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


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a config, every built-in component with its arguments."""
    result = Config.model_json_schema()
    result["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for section, family in FAMILIES.items():
        shared = result["$defs"]["Data"]["properties"] if section == "data" else {}
        own = result["properties"][section]
        own.pop("$ref", None)
        own["oneOf"] = list(_component_schemas(family, shared))
    for unused in ("Data", "Named"):
        del result["$defs"][unused]
    return result


def _component_schemas(family: str, shared: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in registry.names(family):
        properties: dict[str, Any] = dict(shared) | {"name": {"const": name}}
        required = ["name"]
        for key, (parameter, hint) in registry.parameters(registry.resolve(family, name)).items():
            mark = registry.nested(hint)
            if mark is None:
                properties[key] = registry.json_schema(hint)
            else:
                number = registry.parameters(registry.resolve(mark.family, mark.number))["value"][1]
                properties[key] = {"anyOf": [registry.json_schema(number), *_component_schemas(mark.family, {})]}
            if parameter.default is parameter.empty:
                required.append(key)
            else:
                properties[key] = {**properties[key], "default": parameter.default}
        yield {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    yield {"type": "object", "properties": {"name": {"type": "string", "pattern": ":"}}, "required": ["name"]}
