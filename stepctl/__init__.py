"""Train NumPy models; stop anywhere, and resume at the exact global step, bit for bit.

From Python: `create` and `resume` hold a run that can be stepped by hand, `load_checkpoint` and `global_step` read
one, `Hook` is what a hook of your own subclasses, `errors` are the exceptions. See "From Python" in the README.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stepctl import errors as errors
    from stepctl.hooks.base import Hook as Hook
    from stepctl.library import Checkpoint as Checkpoint
    from stepctl.library import Run as Run
    from stepctl.library import create as create
    from stepctl.library import global_step as global_step
    from stepctl.library import load_checkpoint as load_checkpoint
    from stepctl.library import resume as resume

__all__ = ["Checkpoint", "Hook", "Run", "__version__", "create", "errors", "global_step", "load_checkpoint", "resume"]


def __getattr__(name: str) -> Any:
    # imported on first use: the BLAS is set up before NumPy is imported
    if name == "errors":
        return importlib.import_module("stepctl.errors")
    if name not in __all__:
        raise AttributeError(f"module 'stepctl' has no attribute {name!r}")
    from stepctl.errors import check_system

    check_system()
    if name == "Hook":
        from stepctl.hooks.base import Hook

        return Hook
    from stepctl import library

    return getattr(library, name)


def __dir__() -> list[str]:
    return __all__
