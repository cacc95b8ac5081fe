"""The import path of `Task` for tasks of your own; the protocol is in `stepctl.programs.base`."""

from stepctl.programs.base import Metrics, Mode, OneUpdate, Task

__all__ = ["Metrics", "Mode", "OneUpdate", "Task"]
