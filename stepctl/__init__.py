"""Train NumPy models; stop anywhere, and resume at the exact global step, bit for bit.

From Python: `create` and `resume` hold a run that can be stepped by hand, `load_checkpoint` and `global_step` read
one, `Hook` is what a hook of your own subclasses. See "From Python" in the README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stepctl.hooks.base import Hook as Hook
    from stepctl.library import Checkpoint as Checkpoint
    from stepctl.library import Run as Run
    from stepctl.library import create as create
    from stepctl.library import global_step as global_step
    from stepctl.library import load_checkpoint as load_checkpoint
    from stepctl.library import resume as resume

__all__ = ["Checkpoint", "Hook", "Run", "__version__", "create", "global_step", "load_checkpoint", "resume"]


def __getattr__(name: str) -> Any:
    # not before they are asked for: NumPy is imported after the BLAS is set
    if name == "Hook":
        from stepctl.hooks.base import Hook

        return Hook
    if name in __all__:
        from stepctl import library

        return getattr(library, name)
    raise AttributeError(f"module 'stepctl' has no attribute {name!r}")
