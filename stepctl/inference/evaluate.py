"""The metrics of a trained model on its validation part, or on other data of the same kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from stepctl import data as data_sources
from stepctl.checkpoint import codec
from stepctl.config import registry, yaml
from stepctl.config.changes import HOOKS
from stepctl.config.model import DataConfig, LogConfig, TaskConfig, parse_config
from stepctl.data.base import Sources, check_rows
from stepctl.data.batches import Batch, EvaluationBatches
from stepctl.data.preprocessing import scale_of
from stepctl.errors import ConfigError, DataError
from stepctl.inference.load import (
    NEWEST,
    NO_SPLIT,
    OpenedCheckpoint,
    Selection,
    import_paths,
    model_config,
    open_selected,
    refuse_imports,
    refuse_program,
    resolve_model,
    restore_model,
)
from stepctl.inference.trained_model import TrainedModel
from stepctl.programs.base import Metrics, as_numbers
from stepctl.runs.messages import Say, silent
from stepctl.training.build import assemble
from stepctl.training.resolve import ResolvedConfig, build_task, read_sources

VALIDATION = "validation"
OTHER_DATA = "data"


class ClassScores(TypedDict):
    """The scores of one class; None where it is undefined, because of a division by zero.

    precision: share of the rows predicted as this class that are of it; recall: share of the rows
    of this class that are predicted as it; f1: their harmonic mean; support: rows of this class.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class Evaluation(TypedDict):
    """The result of an evaluation. The last three are of classifications only.

    confusion[i][j] is the number of rows of class i that are predicted as class j.
    """

    step: int
    split: str  # validation, or data
    metrics: Metrics
    per_class: NotRequired[dict[str, ClassScores]]
    confusion: NotRequired[list[list[int]]]
    class_names: NotRequired[list[str]]


def evaluate(
    path: str,
    selection: Selection = NEWEST,
    data: Sequence[str] = (),
    say: Say = silent,
) -> Evaluation:
    """Evaluate a run or a checkpoint file on its validation part.

    `data` are KEY=VALUE changes of the config's data section, such as "path=test.csv". With them,
    the named data are evaluated instead: the validation part that they bring, or all of their rows.
    The metrics on the run's validation part have the bits of the row that training wrote.
    """
    with open_selected(path, selection, say) as opened:
        if opened.reader.header.values is not None:
            return _evaluate_program(opened, selection, data)
        given = yaml.Document({"data": {}}, {("data",): "--data"})
        given.set_all(data, "data")
        opened = opened._replace(allowed=opened.allowed | import_paths(given.value))
        section = _data_section(opened, given.value["data"])
        config = model_config(opened, section, places=given.places if data else {})
        sources = read_sources(config, build_task(config))
        _refuse_other_shape(config, sources)
        resolved = resolve_model(config, sources)
        subset = resolved.validation
        if data:
            check_rows(resolved.sources[-1], config.data.n_classes)
            subset = subset or resolved.training
        else:
            _report_changed_data(opened, resolved, say)
        if subset is None:
            raise ConfigError(
                f"{path}: the run has no validation part; name the data: --data path=FILE"
            )
        model = restore_model(opened, resolved, average=selection.average)
        batches = EvaluationBatches(subset, batch_size=config.data.batch_size, dtype=config.dtype)
        return evaluate_model(model, batches, OTHER_DATA if data else VALIDATION)


def evaluate_model(model: TrainedModel, batches: Iterable[Batch], split: str) -> Evaluation:
    """Evaluate a model on batches; `split` is their name."""
    if model.class_names is None:
        return {"step": model.global_step, "split": split, "metrics": model.evaluate(batches)}
    n_classes = len(model.class_names)
    confusion = np.zeros((n_classes, n_classes), np.int64)
    metrics = model.evaluate(_counted(model, batches, confusion))
    per_class = class_scores(confusion)
    return {
        "step": model.global_step,
        "split": split,
        "metrics": metrics,
        "per_class": dict(zip(model.class_names, per_class, strict=True)),
        "confusion": confusion.tolist(),
        "class_names": model.class_names,
    }


def _counted(
    model: TrainedModel, batches: Iterable[Batch], confusion: npt.NDArray[np.int64]
) -> Iterator[Batch]:
    """Yield the batches, and add their predictions to the confusion matrix."""
    for batch in batches:
        yield batch
        predicted = model.predict_batch(batch.x).values
        np.add.at(confusion, (batch.y, predicted), 1)


def class_scores(confusion: npt.NDArray[np.int64]) -> list[ClassScores]:
    """Return the scores of each class from a confusion matrix: (true class, predicted class)."""
    scores: list[ClassScores] = []
    for number in range(len(confusion)):
        correct = int(confusion[number, number])
        predicted = int(confusion[:, number].sum())
        support = int(confusion[number].sum())
        scores.append(
            {
                "precision": correct / predicted if predicted else None,
                "recall": correct / support if support else None,
                # 2 precision recall / (precision + recall), defined where one of them is not
                "f1": 2 * correct / (predicted + support) if predicted + support else None,
                "support": support,
            }
        )
    return scores


def _data_section(opened: OpenedCheckpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data section to evaluate on; `given` are the keys that the user named."""
    made_with = opened.config.get("data")
    section = dict(made_with) if isinstance(made_with, dict) else {}
    if not given:
        return section | _newest_files(opened, section)
    if "name" in given:
        kept = {key: item for key, item in section.items() if key in DataConfig.model_fields}
        if given["name"] in data_sources.NAMES and scale_of(section) != 1:
            kept["scale"] = scale_of(section)  # the model's preprocessing
    else:
        files = _file_arguments(opened, section)
        kept = {key: item for key, item in section.items() if key not in files}
    return {**kept, **NO_SPLIT, "order": "sequential", **given}


def _newest_files(opened: OpenedCheckpoint, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paths of the data files in the run's newest config: they may have moved."""
    if opened.records is None:
        return {}
    newest = opened.records.document.value.get("data")
    if not isinstance(newest, dict) or newest.get("name") != section.get("name"):
        return {}
    files = _file_arguments(opened, section)
    return {key: item for key, item in newest.items() if key in files}


def _file_arguments(opened: OpenedCheckpoint, section: Mapping[str, Any]) -> set[str]:
    """Return the arguments of a data source that are paths of files."""
    refuse_imports(opened, section)
    known = registry.arguments(registry.resolve("data", str(section.get("name"))))
    return {name for name, argument in known.items() if argument.is_file}


def _refuse_other_shape(config: TaskConfig, sources: Sources) -> None:
    """Raise DataError if the samples do not have the shape that the model takes."""
    expected = config.data.sample_shape
    for source in sources:
        if source is not None and expected is not None and [*source.sample_shape] != expected:
            raise DataError(
                f"{source.origin}: samples of shape {source.sample_shape}, but the model takes "
                f"{tuple(expected)}; give data with the columns that it was trained on"
            )


def _report_changed_data(opened: OpenedCheckpoint, resolved: ResolvedConfig, say: Say) -> None:
    """Warn if the data are not those that the run was trained on."""
    recorded = opened.records.ledger.data if opened.records is not None else None
    sources = resolved.sources
    if recorded is None:
        return
    known = (
        "; ".join(source.fingerprint() for source in sources),
        "; ".join(source.former_fingerprint() for source in sources),
    )
    if recorded not in known:
        origins = ", ".join(source.origin for source in sources)
        say(f"warning: {origins}: the data differ from those that the run was trained on")


def _evaluate_program(
    opened: OpenedCheckpoint, selection: Selection, data: Sequence[str]
) -> Evaluation:
    """Evaluate a user's program by its own method."""
    if data or selection.average:
        option = "--data" if data else "--ema"
        raise ConfigError(f"{opened.origin}: {option} is for models; a program evaluates itself")
    plain = {key: item for key, item in opened.config.items() if key != HOOKS}
    if "script" in plain:
        refuse_program(opened)
    refuse_imports(opened, plain)
    config = parse_config(yaml.Document(plain, {(): f"{opened.reader.name}:/config"}))
    config = config.model_copy(update={"log": LogConfig()})
    with contextlib.closing(assemble(config)) as assembly:
        if assembly.validation is None:
            raise ConfigError(
                f"{opened.origin}: the program cannot evaluate; give it a method evaluate(self, "
                "state, rng)"
            )
        state = assembly.state
        changed = codec.saved_hooks(opened.reader) ^ {hook.name for hook in state.hooks}
        codec.restore(opened.reader, state, changed)
        returned = assembly.task.evaluate(state, assembly.validation)
        metrics = as_numbers(returned, "program: evaluate returned")
    return {"step": state.counters.global_step, "split": VALIDATION, "metrics": metrics}
