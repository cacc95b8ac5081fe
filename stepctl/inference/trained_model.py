"""A trained model: predictions for rows of x, and generated samples.

    model = stepctl.load_model("runs/digits")
    model.predict(x)          # (rows,) classes, or values
    model.predict_proba(x)    # (rows, n_classes)

The methods follow the conventions of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from stepctl.config.model import TaskConfig
from stepctl.data.batches import Batch
from stepctl.errors import ConfigError
from stepctl.inference.inputs import InputFormat
from stepctl.models.base import Model
from stepctl.programs.base import Metrics, Predictions, Task, as_numbers
from stepctl.programs.learner import MODEL
from stepctl.state.arena import Array
from stepctl.state.train_state import TrainState
from stepctl.system import blas


class TrainedModel:
    """The weights of one step, and the preprocessing of their inputs.

    `predict` and `predict_proba` take x as the data files have it: numbers, (rows, *sample_shape) or
    (rows, features); or the cells of a table, in the order of `inputs.columns`. What the config says
    of it (scale, words, missing values, standardize) is applied here.
    """

    def __init__(
        self,
        task: Task,
        state: TrainState,
        built_from: TaskConfig,
        *,
        config: dict[str, Any],
        origin: str,
        threads: int,
        average: bool = False,
    ) -> None:
        """`origin` is the model's name in messages, `threads` the number of BLAS threads.

        `config` is that of the run, as plain values; `built_from` has what the model needs of it.
        With `average`, the weights are their moving average.
        """
        if average and not built_from.has_average:
            raise ConfigError(
                f"{origin}: there is no moving average of the weights; leave out ema, or train with "
                "ema: {decay: 0.999}"
            )
        self.config = config
        self._built_from = built_from
        self.origin = origin
        self.task = task
        self._state = state
        self._threads = threads
        self._average = average
        self.inputs = InputFormat(built_from, state.preprocessing)
        self.class_names: list[str] | None = None
        if task.classifies:
            self.class_names = self.inputs.preprocessing.class_names

    def __repr__(self) -> str:
        return f"TrainedModel({self.origin!r}, global step {self.global_step})"

    @property
    def global_step(self) -> int:
        """The number of updates that made the weights."""
        return self._state.counters.global_step

    @property
    def parameters(self) -> dict[str, Array]:
        """The weights by path, such as "dense0/weight"; read-only.

        With several models, a path begins with the model's name.
        """
        found = {}
        for name, learner in self.task.learners.items():
            prefix = "" if name == MODEL else f"{name}/"
            for path, array in learner.params(self._state, average=self._average).items():
                found[f"{prefix}{path}"] = array
        return found

    @property
    def buffers(self) -> dict[str, Array]:
        """The arrays without a gradient by path, such as "batch_norm0/mean"; read-only."""
        return dict(self._state.buffers)

    @property
    def models(self) -> dict[str, Model]:
        """The models by name; a single one is called "model"."""
        return {name: learner.model for name, learner in self.task.learners.items()}

    @property
    def n_outputs(self) -> int:
        """The outputs of the model of a task with one model."""
        return self.task.learners[MODEL].shapes.n_outputs

    def predict(self, x: npt.ArrayLike) -> Array:
        """Return the class of each row, (rows,), or its values: (rows,) or (rows, n_outputs).

        ConfigError if the task makes no predictions, DataError if x does not fit the model.
        """
        return self.named(self.predictions(x).values)

    def named(self, values: Array) -> Array:
        """Return the values of `predictions` as `predict` does: a class that has a name by its name."""
        names = self._built_from.data.class_names
        if self.class_names is None or names is None:
            return values
        return np.array(names)[values]

    def predict_proba(self, x: npt.ArrayLike) -> Array:
        """Return the probability of each class: (rows, n_classes), in the order of `class_names`.

        ConfigError unless the model is a classifier, DataError if x does not fit it.
        """
        if self.class_names is None:
            raise ConfigError(
                f"{self.origin}: the task {self._built_from.task.name} is no classification, so there "
                "are no probabilities; use predict"
            )
        probabilities = self.predictions(x).probabilities
        assert probabilities is not None
        return probabilities

    def predictions(self, x: npt.ArrayLike, origin: str = "x") -> Predictions:
        """Return values and probabilities together; classes are numbers from 0.

        `origin` is the name of x in messages.
        """
        return self.predictions_of(self.inputs.batches(x, origin))

    def predictions_of(self, batches: Iterable[Array]) -> Predictions:
        """Return the predictions for batches that `InputFormat` preprocessed."""
        blas.restore_threads(self._threads)
        parts = [self.predict_batch(batch) for batch in batches]
        values = np.concatenate([part.values for part in parts])
        if self._built_from.data.target_shape == [1] and values.ndim == 2:
            values = values[:, 0]  # of y: (rows,)
        probabilities = [part.probabilities for part in parts if part.probabilities is not None]
        if not probabilities:
            return Predictions(values)
        return Predictions(values, np.concatenate(probabilities))

    def predict_batch(self, x: Array) -> Predictions:
        """Return the predictions for x as the data source gives it: (rows, *input_shape)."""
        predictions = self.task.predict(self._state, x, average=self._average)
        if predictions is None:
            remedy = "for a LossModel, define predict"
            if self.task.generate(self._state, 1) is not None:
                remedy = "it generates samples: use stepctl sample"
            raise ConfigError(
                f"{self.origin}: the task {self._built_from.task.name} makes no predictions; {remedy}"
            )
        return predictions

    def sample(self, n: int, *, seed: int | None = None) -> Array:
        """Return n generated samples, (n, *sample_shape), which depend on the seed alone.

        `seed` is by default the run's. ConfigError if the task generates none.
        """
        blas.restore_threads(self._threads)
        try:
            samples = self.task.generate(self._state, n, average=self._average, seed=seed)
        except (MemoryError, ValueError) as error:  # ValueError: of np.empty
            raise ConfigError(
                f"{n} samples do not fit in memory ({error}); ask for fewer"
            ) from error
        if samples is None:
            raise ConfigError(
                f"{self.origin}: the task {self._built_from.task.name} generates no samples; use predict"
            )
        return samples

    def evaluate(self, batches: Iterable[Batch]) -> Metrics:
        """Return the task's metrics over all batches."""
        blas.restore_threads(self._threads)
        returned = self.task.evaluate(self._state, batches, average=self._average)
        return as_numbers(returned, "task: evaluate returned")
