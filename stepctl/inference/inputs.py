"""The form in which a model takes x, and the preprocessing that a config describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from stepctl import data
from stepctl.config import registry
from stepctl.config.model import TaskConfig
from stepctl.data.base import row_name
from stepctl.data.memory import input_dtype, scaled
from stepctl.errors import DataError
from stepctl.models.base import Model
from stepctl.state.arena import Array, Shape, aligned_empty


@dataclass(frozen=True)
class InputFormat:
    """The shape and dtype of a row of x, and the factor it is multiplied by.

    With `integer_inputs`, integers that are not scaled keep their dtype.
    """

    shape: Shape
    dtype: str
    scale: float
    integer_inputs: bool

    @classmethod
    def of(cls, config: TaskConfig, models: Collection[Model]) -> Self:
        """Return the format of a resolved config's data."""
        assert config.data.sample_shape is not None
        return cls(
            shape=tuple(config.data.sample_shape),
            dtype=config.dtype,
            scale=scale_of(config.data.spec()),
            integer_inputs=all(model.integer_inputs for model in models),
        )

    @property
    def n_features(self) -> int:
        """The numbers in one row."""
        return math.prod(self.shape)

    def array(self, x: npt.ArrayLike, origin: str = "x") -> Array:
        """Return x as an array of rows, not preprocessed; DataError if it does not fit."""
        array = np.asarray(x)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{origin}: has dtype {array.dtype}; numbers are needed")
        if array.shape[1:] != self.shape and array.shape[1:] != (self.n_features,):
            needed = ", ".join(["rows", *map(str, self.shape)])
            remedy = ""
            if array.shape == self.shape:
                remedy = "; for one row, give x[None]"
            raise DataError(
                f"{origin}: has shape {array.shape}, but the model takes ({needed}){remedy}"
            )
        return array

    def preprocessed(
        self,
        x: Array,
        *,
        origin: str = "x",
        first_row: int = 0,
        place: Callable[[int], str] = row_name,
    ) -> Array:
        """Return rows of an array that `array` returned as the model takes them.

        `place` returns the name of a row, of which the first is `first_row`, for the DataError at a
        value that is not finite.
        """
        dtype = input_dtype(
            x.dtype, self.dtype, integer_inputs=self.integer_inputs, scale=self.scale
        )
        inputs = scaled(x, self.scale, out=aligned_empty(x.shape, dtype))
        if dtype.kind == "f" and not np.isfinite(inputs).all():
            row = int(np.argwhere(~np.isfinite(inputs))[0][0])
            raise DataError(
                f"{origin}: {place(first_row + row)}: has a value that is not finite as {dtype}; fix "
                "or drop the row"
            )
        return inputs.reshape(len(x), *self.shape)


def scale_of(section: Mapping[str, Any]) -> float:
    """Return the factor of a data section; x of a user's own source is as the source returns it."""
    name = section.get("name")
    if name not in data.NAMES:
        return 1.0
    argument = registry.arguments(registry.resolve("data", name)).get("scale")
    if argument is None:
        return 1.0
    return float(section.get("scale", argument.default))
