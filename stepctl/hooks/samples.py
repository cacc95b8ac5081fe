"""Pictures of generated samples."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np

from stepctl.config.model import SamplesConfig
from stepctl.errors import ConfigError
from stepctl.hooks.base import PeriodicHook
from stepctl.programs.base import Metrics
from stepctl.state.arena import Array, Shape
from stepctl.state.train_state import TrainState
from stepctl.system.files import write_errors
from stepctl.system.folder import Folder
from stepctl.system.optional import require

_GAP = 1  # pixels between two samples
_SCALE = 4  # magnification


class Samples(PeriodicHook):
    """Writes samples/step-%08d.png: generated samples of values 0..1 in a grid, 1 is white.

    `generate(state, n)` returns n samples, (n, *sample_shape), made with the moving average of the
    weights if there is one.
    """

    name = "samples"

    def __init__(
        self,
        config: SamplesConfig,
        generate: Callable[[TrainState, int], Array],
        folder: Folder,
        *,
        sample_shape: Shape,
    ) -> None:
        super().__init__(config.cadence())
        self._n = config.n
        self._generate = generate
        self._folder = folder
        self._shape = picture_shape(config, sample_shape)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        samples = self._generate(state, self._n).reshape(-1, *self._shape)
        content = png(grid(samples))
        with write_errors(self._folder.display_path):
            self._folder.create()
        self._folder.publish(f"step-{state.counters.global_step:08d}.png", [content])


def picture_shape(config: SamplesConfig, sample_shape: Shape) -> Shape:
    """Return a sample's shape as a picture, (height, width[, 3]); ConfigError if it has none."""
    size = math.prod(sample_shape)
    if config.shape is not None:
        has_colors = len(config.shape) == 3
        if math.prod(config.shape) != size or (has_colors and config.shape[2] != 3):
            raise ConfigError(
                f"samples.shape: {config.shape} should be [height, width] or [height, width, 3] "
                f"with {size} numbers in all"
            )
        return tuple(config.shape)
    side = math.isqrt(size)
    if side * side != size:
        raise ConfigError(
            f"samples.shape: a sample has {size} numbers, which is not a square number; "
            "set samples.shape: [height, width]"
        )
    return side, side


def grid(samples: Array) -> Array:
    """Arrange samples in about as many rows as columns, enlarged; values are clipped to 0..1.

    samples: (n, height, width) or (n, height, width, 3); returns (height, width) or (height, width,
    3).
    """
    n, height, width = samples.shape[:3]
    n_columns = math.ceil(math.sqrt(n))
    n_rows = math.ceil(n / n_columns)
    cell_height = height + _GAP
    cell_width = width + _GAP
    size = (n_rows * cell_height + _GAP, n_columns * cell_width + _GAP)
    picture = np.zeros((*size, *samples.shape[3:]))
    for i, sample in enumerate(samples):
        row, column = divmod(i, n_columns)
        top = _GAP + row * cell_height
        left = _GAP + column * cell_width
        picture[top : top + height, left : left + width] = np.clip(np.nan_to_num(sample), 0, 1)
    return picture.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)


def png(picture: Array) -> bytes:
    """Return the bytes of a PNG file. picture: (height, width[, 3]), values 0..1."""
    image = require("matplotlib.image", "plot")
    file = io.BytesIO()
    image.imsave(file, picture, cmap="gray", vmin=0, vmax=1, format="png")
    return file.getvalue()
