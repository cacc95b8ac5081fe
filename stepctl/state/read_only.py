"""A clear error for user code that writes into a read-only array."""

from __future__ import annotations

import re
import traceback
from types import FrameType, TracebackType

import numpy as np

from stepctl.errors import ConfigError
from stepctl.state.arena import Array
from stepctl.state.train_state import TrainState
from stepctl.system.text import in_one_line
from stepctl.system.user_code import is_user_code, relative_path

# messages of NumPy and Python about a write to a read-only array, mapping or attribute
_READ_ONLY_MESSAGE = re.compile(
    r"read-?only|WRITEABLE flag|writable, aligned|output array is not acceptable"
    r"|'mappingproxy' object does not support|cannot assign to field|has no setter",
    re.IGNORECASE,
)
_REMEDY = (
    "the arrays of the state and of a batch are read-only: copy the array to change it; a Task "
    "updates parameters with self.learners[...].update(state, gradient, state.counters), a Model "
    "buffers through workspace.new_buffers"
)


class explain_read_only:
    """A context manager that raises ConfigError for user code that writes a read-only object.

    The message has the line and the remedy. Other errors pass unchanged. A class, because a step
    enters it faster than a generator.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, ValueError | TypeError | AttributeError):
            return
        if _READ_ONLY_MESSAGE.search(str(error)):
            _raise_explained(error, self._state)


def _raise_explained(error: BaseException, state: TrainState) -> None:
    where = _user_frame(error.__traceback__)
    if where is None:
        return
    frame, line = where
    path = _array_path(frame, state)
    location = f"{relative_path(line.filename)}:{line.lineno}"
    code = in_one_line(line.line or "", 100)
    # without a known array, the error may be about an object of the user's own: keep its text
    what = path or f"a read-only object ({in_one_line(str(error), 200)})"
    raise ConfigError(f"{location}: `{code}` writes into {what}; {_REMEDY}") from error


def _user_frame(
    trace: TracebackType | None,
) -> tuple[FrameType, traceback.FrameSummary] | None:
    """Return the innermost frame of user code, and its current line; None if there is none."""
    innermost = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if is_user_code(trace.tb_frame.f_globals.get("__name__", ""), code.co_filename):
            line = traceback.FrameSummary(code.co_filename, trace.tb_lineno, code.co_name)
            innermost = (trace.tb_frame, line)
        trace = trace.tb_next
    return innermost


def _array_path(frame: FrameType, state: TrainState) -> str | None:
    """Return the path of the one array of the state that the frame's variables are views of."""
    views = [
        value
        for value in frame.f_locals.values()
        if isinstance(value, np.ndarray) and not value.flags.writeable
    ]
    folders = {**state.arenas, "buffers": state.buffers}
    paths = {
        f"/{folder}/{name}"
        for folder, arena in folders.items()
        for name, array in arena.items()
        if any(_overlap(view, array) for view in views)
    }
    return paths.pop() if len(paths) == 1 else None


def _overlap(one: Array, other: Array) -> bool:
    return one.size > 0 and np.may_share_memory(one, other)
