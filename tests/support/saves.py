"""The hook that saves, with a function of the test in place of the publisher."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from stepctl.checkpoint.background import Background
from stepctl.config.model import CheckpointConfig
from stepctl.hooks.save import Save
from stepctl.state.train_state import TrainState


def make_save(
    publish: Callable[[TrainState], None],
    background: Background,
    clock: Callable[[], float] = time.monotonic,
    **config: Any,
) -> Save:
    """Return the hook of a run whose initial checkpoint exists; `config` is of `checkpoint`."""
    return Save(
        CheckpointConfig(**config),
        publish,
        flush=lambda: None,
        background=background,
        requested=lambda: False,
        report=lambda: None,
        say=lambda message: None,
        note=lambda message: None,
        saved_step=0,
        target=10**9,
        clock=clock,
    )
