"""The config: its sections and keys, and the check of a document.

The "Args:" blocks describe the keys; they become the descriptions of the JSON Schema.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from stepctl.config import registry
from stepctl.config.cadence import Cadence
from stepctl.config.messages import ConfigProblem, KeyPath, problems_of, unknown_key
from stepctl.config.registry import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from stepctl.config.yaml import Document, dumps
from stepctl.errors import ConfigError
from stepctl.state.counters import GLOBAL_STEP
from stepctl.system import store_url
from stepctl.system.text import in_lines

# Sections that are components of the family of the same name. Those of PER_MODEL hold one component,
# or one for each model of the task, by the model's name.
COMPONENT_SECTIONS = ("data", "model", "task", "optimizer", "program")
PER_MODEL = ("model", "optimizer")
MODEL = "model"  # the name of the model of a task that has one

LIVE: dict[str, JsonValue] = {"resume": "live"}  # may change on a resume
LOCKED: dict[str, JsonValue] = {"resume": "locked"}  # changes on a resume only with --allow-change
BY_STATE: dict[str, JsonValue] = {"resume": "live; locked with state"}

# Of every source: keys that are null until the run starts.
DECIDED_DATA_KEYS = ("n_classes", "class_names", "sample_shape", "target_shape", "integer_samples")

Order = Literal["shuffled", "sequential"]  # of the samples in an epoch


class Section(BaseModel):
    """A mapping with known keys. Its validator is built on first use: that takes milliseconds."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True
    )


class ComponentConfig(Section):
    """A component with its arguments.

    Args:
        name: A built-in component, or your own class or function as "package.module:Name".
    """

    model_config = ConfigDict(extra="allow")

    name: str

    def spec(self) -> dict[str, Any]:
        """Return the name and the arguments as one dict."""
        return {"name": self.name, **(self.model_extra or {})}


class ComponentsConfig(Section):
    """A component, or one for each model: {critic: {name: mlp, ...}, generator: {...}}."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None

    def specs(self) -> dict[str, dict[str, Any]]:
        """Return name and arguments of each component; the key of a single one is "model"."""
        extra = dict(self.model_extra or {})
        if self.name is None:
            return extra
        return {MODEL: {"name": self.name, **extra}}


class DataConfig(ComponentConfig):
    """The data source, and how its samples are divided.

    Args:
        batch_size: Number of samples of a batch.
        shards: Number of equal parts of a batch. Gradients are summed over the shards in a fixed
            order, so the result does not depend on the number of processes, which must divide it.
        order: The order of the samples in an epoch: shuffled, in a different order each time, or
            sequential, in the order of the file.
        validation_fraction: Fraction of the samples that is held out for validation: random
            samples, or with the order sequential the last ones.
        stratify: Whether the split keeps the proportions of the classes, for data in memory: each
            class is split by itself.
        n_classes: Number of classes; by default it is determined from the labels.
        sample_shape: Shape of one sample. It is recorded when the run starts, so that the trained
            model can be used without the data.
        target_shape: Shape of one target, [] for a label. It is recorded as sample_shape is.
        integer_samples: Whether a model that takes integers gets them, because the data are
            integers. It is recorded as sample_shape is.
        class_names: Names of the classes, in the order of their labels. Words in the target of a csv
            are names of classes: by default they are sorted, and recorded when the run starts.
    """

    batch_size: PositiveInt = 32
    shards: PositiveInt = 1
    order: Order = "shuffled"
    validation_fraction: Fraction = 0.0
    stratify: bool = False
    n_classes: PositiveInt | None = None
    sample_shape: list[NonNegativeInt] | None = None
    target_shape: list[NonNegativeInt] | None = None
    integer_samples: bool | None = None
    class_names: list[str] | None = None

    @model_validator(mode="after")
    def _check_shards(self) -> DataConfig:
        if self.batch_size % self.shards:
            raise ValueError(
                f"shards {self.shards} does not divide batch_size {self.batch_size}; "
                "choose a divisor of it"
            )
        return self

    @model_validator(mode="after")
    def _check_split(self) -> DataConfig:
        if self.stratify and not self.validation_fraction:
            raise ValueError("stratify is about the split; set validation_fraction too")
        return self

    @model_validator(mode="after")
    def _check_class_names(self) -> DataConfig:
        names = self.class_names
        if names is None:
            return self
        if not names:
            raise ValueError("class_names is empty; name the classes, or leave it out")
        if len({*names}) < len(names):
            raise ValueError("class_names has a name twice; each class needs a name of its own")
        if self.n_classes not in (None, len(names)):
            raise ValueError(
                f"class_names has {len(names)} names, but n_classes is {self.n_classes}; give one of "
                "them, or the same number"
            )
        return self


class EarlyStoppingConfig(Section):
    """Stops when the metric has not improved for a number of evaluations.

    Args:
        patience: Number of consecutive evaluations without an improvement after which the run
            stops.
        metric: The metric; by default `evaluate.metric`.
        mode: Whether a smaller ("min") or a larger ("max") value is better; by default as the task
            declares it.
        min_delta: Only a change by more than this is an improvement.
    """

    patience: PositiveInt
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    min_delta: NonNegative = 0.0


class TargetMetricConfig(Section):
    """Stops when the metric of an evaluation reaches a value.

    Args:
        value: The value to reach.
        metric: The metric; by default `evaluate.metric`.
        mode: Whether a smaller ("min") or a larger ("max") value is better; by default as the task
            declares it.
    """

    value: float
    metric: str | None = None
    mode: Literal["min", "max"] | None = None


class StopConfig(Section):
    """When a run stops.

    Args:
        last_step: The global step to stop at. Give either this or num_steps.
        num_steps: The number of steps from the start of the segment (one `train` or `resume`).
        early_stopping: Stops when a metric has not improved for a number of evaluations.
        target_metric: Stops when a metric reaches a value.
    """

    last_step: NonNegativeInt | None = None
    num_steps: NonNegativeInt | None = None
    early_stopping: EarlyStoppingConfig | None = None
    target_metric: TargetMetricConfig | None = None

    @model_validator(mode="after")
    def _check_target(self) -> StopConfig:
        if (self.last_step is None) == (self.num_steps is None):
            raise ValueError(
                "give either last_step (absolute) or num_steps (from the segment's start)"
            )
        return self


class WhenConfig(Section):
    """Stops when a metric of a step is below, or above, a value.

    Args:
        metric: A metric that the program's step returns.
        below: Stop once the metric is less than this. Give either this or above.
        above: Stop once the metric is greater than this.
    """

    metric: str
    below: float | None = None
    above: float | None = None

    @model_validator(mode="after")
    def _check_one(self) -> WhenConfig:
        if (self.below is None) == (self.above is None):
            raise ValueError("give either below or above")
        return self


class ProgramStopConfig(StopConfig):
    """When a run stops.

    Args:
        when: In the run of a program: stops when a metric of a step is below, or above, a value.
    """

    when: WhenConfig | None = None


class CadenceConfig(Section):
    """When a periodic action runs: where counter % every == offset.

    Args:
        every: Number of counts between two actions.
        offset: The remainder of counter / every at which the action runs: `every: 100, offset: 1`
            is 1, 101, 201.
        counter: The counter: global_step, samples_seen, or a model of the task. One that rises by
            more than one a step triggers the action at the step at which it reaches or passes such
            a value.
    """

    every: PositiveInt | None
    offset: NonNegativeInt = 0
    counter: str = GLOBAL_STEP

    @model_validator(mode="after")
    def _check_offset(self) -> CadenceConfig:
        if self.every is not None and self.offset >= self.every:
            raise ValueError(f"offset {self.offset} should be less than every {self.every}")
        return self

    def cadence(self, first_step: int | None = None) -> Cadence:
        """Return the cadence of these keys; it also fires at the global step `first_step`."""
        return Cadence(self.every, self.offset, self.counter, first_step=first_step)


class LogConfig(CadenceConfig):
    """When to write a training row to metrics.jsonl, besides the run's first step, and what it holds.

    Args:
        every: Number of steps between two training rows.
        means: Add the mean of each metric over the steps since the previous row, as
            `mean_<metric>`.
        norms: Add the norms of the gradient (before clipping) and of the parameters.
        csv: Also write metrics.csv.
        tensorboard: Also write event files to tensorboard/.
        histograms: Number of steps between two histograms of the parameters in TensorBoard; by
            default there are none.
    """

    every: PositiveInt = 10
    means: bool = False
    norms: bool = False
    csv: bool = False
    tensorboard: bool = False
    histograms: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_histograms(self) -> LogConfig:
        if self.histograms is not None and not self.tensorboard:
            raise ValueError(
                "histograms are written to tensorboard/; set tensorboard: true too, "
                "or remove histograms"
            )
        return self


class EvaluateConfig(CadenceConfig):
    """When to evaluate on the validation samples.

    Args:
        every: Number of steps between two evaluations; by default the only one is at the end of a
            segment.
        metric: The main metric, which the best value and the stop rules refer to; by default the
            task's first.
        mode: Whether a smaller ("min") or a larger ("max") value is better; by default as the task
            declares it.
        ema: Also evaluate the moving average of the weights, as `ema_<metric>`.
    """

    every: PositiveInt | None = None
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    ema: bool = False


class SamplesConfig(CadenceConfig):
    """When to write a picture of generated samples to samples/; the noise is the same each time.

    Args:
        every: Number of steps between two pictures.
        n: Number of samples of a picture.
        shape: Shape of a sample: [height, width] or [height, width, 3]; by default it is square.
    """

    every: PositiveInt
    n: PositiveInt = 64
    shape: list[PositiveInt] | None = Field(None, min_length=2, max_length=3)


class MovingAverageConfig(Section):
    """An exponential moving average of the weights: a <- decay a + (1 - decay) p.

    It starts as the initial weights.

    Args:
        decay: The decay.
        warmup: Use the smaller decay min(decay, (1 + n) / (10 + n)) at the n-th update.
    """

    decay: Fraction
    warmup: bool = False


class KeepBestConfig(Section):
    """Keeps the checkpoints of the best evaluations.

    Args:
        metric: The metric to compare.
        mode: Whether a smaller ("min") or a larger ("max") value is better.
        n: Number of checkpoints to keep.
    """

    metric: str
    mode: Literal["min", "max"]
    n: PositiveInt = 1


class CheckpointConfig(CadenceConfig):
    """When to save a checkpoint, besides start, end and signals, and which checkpoints to keep.

    Args:
        every: Number of steps between two checkpoints.
        every_seconds: Also save when this many seconds have passed since the previous checkpoint.
        keep_last: Number of newest checkpoints to keep; null keeps all.
        keep_every: Also keep the checkpoints of the steps that this number divides.
        keep_best: Also keep the checkpoints of the best evaluations.
        on_error: The action if a save fails: stop, or continue and retry at the next save.
    """

    every: PositiveInt | None = 100
    every_seconds: Positive | None = None
    keep_last: PositiveInt | None = 3
    keep_every: PositiveInt | None = None
    keep_best: KeepBestConfig | None = None
    on_error: Literal["stop", "continue"] = "stop"


class MirrorConfig(Section):
    """A copy of the run in object storage, which is kept up to date in the background.

    Credentials and endpoint are read from the environment variables of the store, such as
    AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.

    Args:
        url: The place of the copy, which holds one run: s3://BUCKET/PATH, gs://BUCKET/PATH,
            az://CONTAINER/PATH or file:///PATH.
        every: Mirror the first checkpoint at or past each multiple of this number of steps, and
            that of the segment's end; by default every checkpoint.
        keep_last: Number of newest checkpoints that the mirror keeps.
        wait_at_stop: Seconds that the end of a segment waits for the upload.
    """

    url: str
    every: PositiveInt | None = None
    keep_last: PositiveInt = 3
    wait_at_stop: NonNegative = 60.0

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        problem = store_url.problem(url)
        if problem is not None:
            raise ValueError(problem)
        return url


class NumericsConfig(Section):
    """Settings that the last bits depend on; "auto" is replaced when the run starts.

    Args:
        threads: Number of BLAS threads.
        blas_kernel: The OpenBLAS kernel, such as Haswell or SkylakeX; auto: OpenBLAS chooses. Its
            choice is not always the fastest: on AMD Zen 4, steps with layers of 1,024 took 5 to
            29 % less time with Haswell. `stepctl doctor` compares the kernels.
        compiled: auto: a long run compiles its updates if numba is installed (`pip install
            'stepctl[numba]'`). off: it does not. The bits are the same, so this is not replaced,
            and may change on a resume.
    """

    threads: PositiveInt | Literal["auto"] = "auto"
    blas_kernel: str = "auto"
    compiled: Literal["auto", "off"] = Field(default="auto", json_schema_extra=LIVE)

    def deciding_bits(self) -> dict[str, Any]:
        """Return the settings that the last bits do depend on."""
        return self.model_dump(exclude={"compiled"})


class DistributedConfig(Section):
    """How several processes share a run.

    Args:
        mode: sync: each step is shared, and the result does not depend on the number of processes.
            async: each process updates shared parameters independently, and no two runs give the
            same result.
    """

    mode: Literal["sync", "async"] = "sync"


class Config(Section):
    """The keys that every run has.

    Args:
        seed: Seed of all random numbers.
        initial_step: The global step at which a fresh run starts.
        stop: When a run stops.
        log: When to write a training row, and what it holds.
        evaluate: When to evaluate on the validation samples.
        checkpoint: When to save a checkpoint, and which checkpoints to keep.
        mirror: A copy of the run in object storage; by default there is none.
        check_determinism: Whether `train` computes the first step several times and warns if the
            bits differ. Only runs that use components of your own are checked.
        numerics: Settings that the last bits of a result depend on.
    """

    seed: int = Field(0, ge=0, lt=1 << 63, json_schema_extra=LOCKED)
    initial_step: NonNegativeInt = Field(0, json_schema_extra=LOCKED)
    stop: StopConfig = Field(json_schema_extra=LIVE)
    log: LogConfig = Field(default_factory=LogConfig, json_schema_extra=LIVE)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, json_schema_extra=LIVE)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, json_schema_extra=LIVE)
    mirror: MirrorConfig | None = Field(None, json_schema_extra=LIVE)
    check_determinism: bool = Field(True, json_schema_extra=LIVE)
    numerics: NumericsConfig = Field(default_factory=NumericsConfig, json_schema_extra=LOCKED)

    @model_validator(mode="before")
    @classmethod
    def _drop_null_sections(cls, value: Any) -> Any:
        """Replace a null section (all of its keys commented out) by its defaults."""
        if not isinstance(value, dict):
            return value
        nullable = {
            name for name, key in cls.model_fields.items() if key.default_factory is not None
        }
        return {key: item for key, item in value.items() if item is not None or key not in nullable}

    def plain(self) -> dict[str, Any]:
        """Return the config as plain values, with all defaults filled in."""
        plain = self.model_dump(mode="python")
        return {key: plain[key] for key in KEYS if key in plain}

    @functools.cached_property
    def text(self) -> str:
        """The config as YAML, with all defaults filled in."""
        return dumps(self.plain())

    def with_values(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with these dotted keys set. The values are not checked again."""
        changed = self
        for key, value in changes.items():
            changed = _with_value(changed, key.split("."), value)
        changed.__dict__.pop("text", None)  # it was cached for the old values
        return changed

    def target(self, start: int) -> int:
        """Return the global step at which a segment stops that starts at `start`."""
        if self.stop.last_step is not None:
            return self.stop.last_step
        assert self.stop.num_steps is not None
        return start + self.stop.num_steps

    def cadences(self) -> dict[str, Cadence]:
        """Return the cadence of each section that has one."""
        sections = {"log": self.log, "evaluate": self.evaluate, "checkpoint": self.checkpoint}
        return {name: section.cadence() for name, section in sections.items()}

    def data_files(self) -> set[str]:
        """Return the dotted keys of the paths of data files."""
        return set()

    def rates(self) -> dict[str, dict[str, Any]]:
        """Return the learning-rate schedule of each optimizer: dotted key -> name and arguments."""
        return {}

    def horizon_keys(self) -> dict[str, str]:
        """Return the counter of each decay horizon that is not set, by its dotted key.

        A run sets it to the value that the counter has at the run's first target.
        """
        return {}

    @property
    def hook_specs(self) -> list[dict[str, Any]]:
        """Name and arguments of each of the user's own hooks."""
        return []

    def without_hooks(self) -> Self:
        """Return a copy without the user's own hooks."""
        return self

    @property
    def program_name(self) -> str:
        """The name of the task or the program that makes the steps."""
        raise NotImplementedError

    @property
    def when(self) -> WhenConfig | None:
        """The condition on a step's metrics that stops the run."""
        return None

    @property
    def is_async(self) -> bool:
        """Whether several processes update the parameters independently."""
        return False

    @property
    def skips_non_finite(self) -> bool:
        """Whether a batch whose loss or gradient is not finite is skipped."""
        return False

    @property
    def has_average(self) -> bool:
        """Whether there is a moving average of the weights."""
        return False


class HookedConfig(Config):
    """The keys of runs whose steps stepctl makes; a script has its own loop, and its own hooks.

    Args:
        hooks: Your own callbacks: a list of subclasses of stepctl.Hook as "module:Class", each with
            its arguments. Those without a state of their own may change on a resume.
    """

    hooks: list[ComponentConfig] = Field(default_factory=list, json_schema_extra=BY_STATE)

    @property
    def hook_specs(self) -> list[dict[str, Any]]:
        return [hook.spec() for hook in self.hooks]

    def without_hooks(self) -> Self:
        return self.model_copy(update={"hooks": []})


class TaskConfig(HookedConfig):
    """The config of a built-in task, or of a user's own, which trains a model on data.

    Args:
        dtype: Type of the parameters and of the computation.
        data: The data source, and how its samples are divided. Paths of data files may change on a
            resume if the data are the same.
        model: The model, or one for each model of the task.
        task: The program of a step: its loss, updates and metrics.
        optimizer: The optimizer, or one for each model of the task.
        ema: An exponential moving average of the weights; by default there is none.
        samples: When to write a picture of generated samples; by default never.
        on_nonfinite: The action if a loss or gradient is not finite: stop, or skip
            the batch, which then makes no step.
        distributed: How several processes share a run.
    """

    dtype: Literal["float32", "float64"] = Field("float32", json_schema_extra=LOCKED)
    data: DataConfig = Field(json_schema_extra=LOCKED)
    model: ComponentsConfig = Field(json_schema_extra=LOCKED)
    task: ComponentConfig = Field(json_schema_extra=LOCKED)
    optimizer: ComponentsConfig = Field(json_schema_extra=LOCKED)
    ema: MovingAverageConfig | None = Field(None, json_schema_extra=LOCKED)
    samples: SamplesConfig | None = Field(None, json_schema_extra=LIVE)
    on_nonfinite: Literal["stop", "skip"] = Field("stop", json_schema_extra=LIVE)
    distributed: DistributedConfig = Field(
        default_factory=DistributedConfig, json_schema_extra=LOCKED
    )

    @model_validator(mode="after")
    def _check_async(self) -> TaskConfig:
        if self.is_async and (self.skips_non_finite or self.log.means):
            wrong = "log.means" if self.log.means else "on_nonfinite: skip"
            raise ValueError(
                f"distributed.mode: async does not support {wrong}; remove one of them"
            )
        return self

    def plain(self) -> dict[str, Any]:
        plain = super().plain()
        for section in PER_MODEL:
            if plain[section]["name"] is None:
                del plain[section]["name"]
        return plain

    def data_files(self) -> set[str]:
        return _file_keys("data", self.data.name)

    def open_data_keys(self) -> list[str]:
        """Return the dotted keys of the data section that are null, and that a run decides."""
        known = registry.arguments(registry.resolve("data", self.data.name))
        spec = self.data.spec()
        found = [key for key, argument in known.items() if argument.is_decided]
        found = [key for key in found if spec.get(key) is None]
        found += [key for key in DECIDED_DATA_KEYS if getattr(self.data, key) is None]
        return [f"data.{key}" for key in found]

    def cadences(self) -> dict[str, Cadence]:
        cadences = super().cadences()
        if self.samples is not None:
            cadences["samples"] = self.samples.cadence()
        return cadences

    def rates(self) -> dict[str, dict[str, Any]]:
        return {
            self.learning_rate_key(name): spec["learning_rate"]
            for name, spec in self.optimizer.specs().items()
            if "learning_rate" in spec
        }

    def learning_rate_key(self, name: str) -> str:
        """Return the dotted key of the learning rate of the optimizer of a model."""
        return f"{self.optimizer_key(name)}.learning_rate"

    def optimizer_key(self, name: str) -> str:
        """Return the dotted key of the optimizer of a model."""
        if self.optimizer.name is not None:
            return "optimizer"
        return f"optimizer.{name}"

    def horizon_keys(self) -> dict[str, str]:
        found = {}
        for key, rate in self.rates().items():
            schedule = registry.resolve("schedule", rate["name"])
            if not rate.get("decay_steps") and "decay_steps" in registry.arguments(schedule):
                found[f"{key}.decay_steps"] = rate["counter"]
        return found

    @property
    def program_name(self) -> str:
        return self.task.name

    @property
    def is_async(self) -> bool:
        return self.distributed.mode == "async"

    @property
    def skips_non_finite(self) -> bool:
        return self.on_nonfinite == "skip"

    @property
    def has_average(self) -> bool:
        return self.ema is not None


class ProgramConfig(HookedConfig):
    """The config of a user's own program, which needs no data, model, task or optimizer.

    Args:
        program: Your own program of a step: a subclass of stepctl.Program as "module:Class", and
            its arguments. It replaces data, model, task and optimizer.
        stop: When a run stops.
    """

    program: ComponentConfig = Field(json_schema_extra=LOCKED)
    stop: ProgramStopConfig = Field(json_schema_extra=LIVE)

    @model_validator(mode="after")
    def _check_log(self) -> ProgramConfig:
        wrong = {
            "log.norms": self.log.norms,
            "log.histograms": self.log.histograms is not None,
            "log.means": self.log.means,
        }
        for key, is_set in wrong.items():
            if is_set:
                raise ValueError(f"{key}: is for the parameters and losses of tasks; remove it")
        return self

    @property
    def program_name(self) -> str:
        return self.program.name

    @property
    def when(self) -> WhenConfig | None:
        return self.stop.when

    def data_files(self) -> set[str]:
        return _file_keys("program", self.program.name)


class ScriptConfig(Config):
    """The config of a run whose steps a script makes, with `stepctl.loop`.

    Args:
        script: File name of the script.
    """

    script: str = Field(json_schema_extra=LIVE)

    @property
    def program_name(self) -> str:
        return "script"


def _file_keys(section: str, name: str) -> set[str]:
    """Return the dotted keys of a component's arguments that are paths of data files."""
    known = registry.arguments(registry.resolve(section, name))
    return {f"{section}.{key}" for key, argument in known.items() if argument.is_file}


# The top-level keys, in the order of a written config.
KEYS = (
    "seed",
    "dtype",
    "initial_step",
    "data",
    "model",
    "task",
    "optimizer",
    "program",
    "script",
    "ema",
    "stop",
    "log",
    "evaluate",
    "samples",
    "checkpoint",
    "mirror",
    "hooks",
    "on_nonfinite",
    "check_determinism",
    "numerics",
    "distributed",
)
_CONFIGS: tuple[type[Config], ...] = (TaskConfig, ProgramConfig, ScriptConfig)


def config_class(plain: Mapping[str, Any]) -> type[Config]:
    """Return the class of a config, which its keys decide."""
    if "script" in plain:
        return ScriptConfig
    return ProgramConfig if "program" in plain else TaskConfig


def validate(plain: Mapping[str, Any]) -> Config:
    """Return the config of plain values; pydantic's ValidationError if they are wrong."""
    return config_class(plain).model_validate(plain)


def top_level_field(key: str) -> FieldInfo | None:
    """Return the field of a top-level key, whichever kind of config has it."""
    for config in _CONFIGS:
        if key in config.model_fields:
            return config.model_fields[key]
    return None


def _with_value(section: Any, path: Sequence[str], value: Any) -> Any:
    """Return a copy of a section, or of a dict in it, with the key at a path set."""
    key, *rest = path
    if rest:
        old = section[key] if isinstance(section, dict) else getattr(section, key)
        value = _with_value(old, rest, value)
    if isinstance(section, dict):
        return {**section, key: value}
    return section.model_copy(update={key: value})


# --- checking a document


def parse_config(document: Document, *, unchecked: Collection[str] = ()) -> Config:
    """Check a document, including the arguments of components; ConfigError with all problems.

    The components of `unchecked` sections are not imported, so their defaults are not filled in.
    """
    value = dict(document.value)
    problems: list[ConfigProblem] = []
    for section in COMPONENT_SECTIONS:
        if section in document.value and section not in unchecked:
            value[section], found = _check_section(section, document.value[section])
            problems += [problem.below(section) for problem in found]
    if "hooks" not in unchecked and isinstance(value.get("hooks"), list):
        value["hooks"], found = _check_hooks(value["hooks"])
        problems += [problem.below("hooks") for problem in found]
    try:
        config = validate(value)
    except ValidationError as error:
        unknown = {item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"}
        for problem in problems_of(error, value):
            is_unknown = problem.path in unknown
            problems.append(_unknown_key(value, problem.path) if is_unknown else problem)
    if not problems and isinstance(config, TaskConfig):
        problems += _wrong_models(config)
    if problems:
        order = {path: number for number, path in enumerate(document.places)}
        problems.sort(key=lambda problem: (order.get(problem.path, -1), _rank(problem)))
        raise ConfigError(in_lines([_line(document, problem) for problem in problems]))
    return config


def _check_section(section: str, spec: Any) -> tuple[Any, list[ConfigProblem]]:
    """Return a component section with the defaults filled in, and its problems."""
    if not isinstance(spec, dict):
        return spec, []
    if _has_name(spec):
        return _check_component(section, spec)
    if section not in PER_MODEL or "name" in spec:
        return spec, []
    if not spec or not all(_has_name(item) for item in spec.values()):
        message = "name is missing; give one component, {name: ...}, or one for each of the models"
        return spec, [ConfigProblem((), message)]
    full: dict[str, Any] = {}
    problems: list[ConfigProblem] = []
    for name, item in spec.items():
        full[name], found = registry.check(section, item)
        problems += [problem.below(name) for problem in found]
    return full, problems


def _check_hooks(specs: list[Any]) -> tuple[list[Any], list[ConfigProblem]]:
    """Return the hooks with the defaults filled in, and their problems."""
    full = []
    problems: list[ConfigProblem] = []
    for number, spec in enumerate(specs):
        found: list[ConfigProblem] = []
        if _has_name(spec):
            spec, found = registry.check("hook", spec)
        full.append(spec)
        problems += [problem.below(number) for problem in found]
    return full, problems


def _check_component(section: str, spec: dict[str, Any]) -> tuple[Any, list[ConfigProblem]]:
    shared = set(DataConfig.model_fields) - {"name"} if section == "data" else set()
    arguments = {key: item for key, item in spec.items() if key not in shared}
    full, problems = registry.check(section, arguments, tuple(sorted(shared)))
    unchecked = {key: item for key, item in spec.items() if key in shared}
    return full | unchecked, problems


def _has_name(spec: Any) -> bool:
    return isinstance(spec, dict) and isinstance(spec.get("name"), str)


def _wrong_models(config: TaskConfig) -> Iterator[ConfigProblem]:
    """Yield a problem for each section without exactly one component for each model."""
    models = tuple(getattr(registry.resolve("task", config.task.name), "models", (MODEL,)))
    for section in PER_MODEL:
        found = tuple(getattr(config, section).specs())
        if sorted(found) == sorted(models):
            continue
        components = ", ".join(f"{name}: ..." for name in models)
        form = "{name: ...}" if models == (MODEL,) else f"{{{components}}}"
        has = "one component" if found == (MODEL,) else ", ".join(found)
        message = f"has {has}, and the task {config.task.name} needs {form}"
        yield ConfigProblem((section,), message)


def _rank(problem: ConfigProblem) -> int:
    """Return the position of a missing section among the top-level keys, which orders them."""
    key = problem.message.partition(" ")[0]
    return KEYS.index(key) if not problem.path and key in KEYS else -1


def _unknown_key(plain: Mapping[str, Any], path: KeyPath) -> ConfigProblem:
    only_in_tasks = TaskConfig.model_fields.keys() - ProgramConfig.model_fields.keys()
    if "program" in plain and path[0] in only_in_tasks:
        message = "does not go with program, which makes its steps without it; remove one of them"
        return ConfigProblem(path, message)
    if "script" in plain and path[0] in KEYS:
        message = "does not go with script, which is for the runs of stepctl.loop; remove script"
        return ConfigProblem(path, message)
    if len(path) == 1:
        known = [key for key in KEYS if key != "script"]  # no key of a file that a user writes
        return ConfigProblem(path, unknown_key(str(path[0]), known))
    section: Any = config_class(plain)
    for key in path[:-1]:
        annotation = section.model_fields[key].annotation
        branches = [branch for branch in get_args(annotation) if branch is not type(None)]
        section = branches[0] if branches else annotation
    return ConfigProblem(path, unknown_key(str(path[-1]), list(section.model_fields)))


def _line(document: Document, problem: ConfigProblem) -> str:
    key = ".".join(str(part) for part in problem.path) or "config"
    place = document.place(problem.path, key=problem.message.startswith("unknown key"))
    return f"{place}: {key}: {problem.message}"
