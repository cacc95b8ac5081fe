"""Train NumPy models; stop anywhere, and resume at the exact global step, bit for bit.

    import stepctl

    with stepctl.create(config, "runs/mine") as run:       # or stepctl.resume("runs/mine")
        run.train()

`loop` saves and continues the loop of a script. `Program` is the base class for a step of your
own; `Model`, `LossModel`, `Source`, `Optimizer` and `Hook` are base classes for your own components.
`load_model` predicts with a trained
model; `load_checkpoint`, `load_series` and `global_step` read a run. `errors` holds the exceptions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from stepctl import errors
    from stepctl.api import (
        Checkpoint,
        Run,
        create,
        global_step,
        load_checkpoint,
        load_model,
        resume,
    )
    from stepctl.config.registry import File
    from stepctl.data.base import Source
    from stepctl.hooks.base import Hook
    from stepctl.inference.trained_model import TrainedModel
    from stepctl.models.base import Model
    from stepctl.models.loss_model import LossModel
    from stepctl.optimizers.base import Optimizer
    from stepctl.programs.program import Program
    from stepctl.rundir.series import load_series
    from stepctl.runs.loop import loop

# Public name -> module, imported on first use: BLAS reads its settings when NumPy is imported.
_MODULES = {
    "Checkpoint": "stepctl.api",
    "File": "stepctl.config.registry",
    "Hook": "stepctl.hooks.base",
    "LossModel": "stepctl.models.loss_model",
    "Model": "stepctl.models.base",
    "Optimizer": "stepctl.optimizers.base",
    "Program": "stepctl.programs.program",
    "Run": "stepctl.api",
    "Source": "stepctl.data.base",
    "TrainedModel": "stepctl.inference.trained_model",
    "create": "stepctl.api",
    "global_step": "stepctl.api",
    "load_checkpoint": "stepctl.api",
    "load_model": "stepctl.api",
    "load_series": "stepctl.rundir.series",
    "loop": "stepctl.runs.loop",
    "resume": "stepctl.api",
}

__all__ = [
    "Checkpoint",
    "File",
    "Hook",
    "LossModel",
    "Model",
    "Optimizer",
    "Program",
    "Run",
    "Source",
    "TrainedModel",
    "__version__",
    "create",
    "errors",
    "global_step",
    "load_checkpoint",
    "load_model",
    "load_series",
    "loop",
    "resume",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("stepctl.errors")
    if name not in _MODULES:
        raise AttributeError(f"module 'stepctl' has no attribute {name!r}")
    from stepctl.errors import check_system

    check_system()
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
