"""Pictures of what a generator makes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np

from stepctl.arena import Array, Shape
from stepctl.config import Samples as SamplesConfig
from stepctl.errors import ConfigError
from stepctl.extras import require
from stepctl.folder import Folder, writing
from stepctl.hooks.base import Hook
from stepctl.state import TrainState
from stepctl.tasks.base import Metrics

_GAP = 1  # pixels between two samples
_ENLARGED = 4  # pixels of the picture to one of a sample


class Samples(Hook):
    """Writes samples/step-%08d.png on the grid: samples of values 0..1 in rows and columns, white is 1.

    `generate` makes n samples: (n, *sample_shape), with the moving average's weights where there is one.
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
        self._config, self._generate, self._folder = config, generate, folder
        self.trigger = config.trigger()
        self._shape = picture_shape(config, sample_shape)

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        samples = self._generate(state, self._config.n).reshape(-1, *self._shape)
        picture = png(grid(samples))
        with writing(self._folder.shown):
            self._folder.make()
        self._folder.publish(f"step-{state.counters.global_step:08d}.png", [picture])


def picture_shape(config: SamplesConfig, sample_shape: Shape) -> Shape:
    """Return a sample's shape as a picture, (height, width) or (height, width, 3); ConfigError if it has none."""
    size = math.prod(sample_shape)
    if config.shape is not None:
        if math.prod(config.shape) != size or (len(config.shape) == 3 and config.shape[2] != 3):
            raise ConfigError(
                f"samples.shape: {config.shape} is not {size} numbers as (height, width) or (height, width, 3)"
            )
        return tuple(config.shape)
    side = math.isqrt(size)
    if side * side != size:
        raise ConfigError(f"samples.shape: a sample has {size} numbers, which make no square; give (height, width)")
    return side, side


def grid(samples: Array) -> Array:
    """Return samples: (n, height, width[, 3]) in about as many rows as columns, enlarged, 0..1."""
    n, height, width = samples.shape[:3]
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    whole = np.zeros((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, *samples.shape[3:]))
    for i, sample in enumerate(samples):
        top, left = (_GAP + (i // columns) * (height + _GAP), _GAP + (i % columns) * (width + _GAP))
        whole[top : top + height, left : left + width] = np.clip(np.nan_to_num(sample), 0, 1)
    return whole.repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)


def png(picture: Array) -> bytes:
    """Return a picture: (height, width[, 3]) of values 0..1 as a PNG file."""
    image = require("matplotlib.image", "plot")
    file = io.BytesIO()
    image.imsave(file, picture, cmap="gray", vmin=0, vmax=1, format="png")
    return file.getvalue()
