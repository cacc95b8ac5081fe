"""A clear error where a user's code writes into a read-only array of the state."""

from __future__ import annotations

import re
import traceback
from types import FrameType, TracebackType

import numpy as np

from stepctl.arena import Array
from stepctl.errors import ConfigError
from stepctl.problems import in_one_line, is_users, shortest
from stepctl.state import TrainState

# what NumPy and Python say at a write to an array, mapping or attribute that does not allow it
_REFUSED = re.compile(
    r"read-?only|WRITEABLE flag|writable, aligned|output array is not acceptable"
    r"|'mappingproxy' object does not support|cannot assign to field|has no setter",
    re.IGNORECASE,
)
_REMEDY = (
    "the arrays of the state and of a batch are read-only: parameters change by "
    "self.learners[...].update(state, gradient, state.counters) alone, buffers by workspace.new_buffers; to change a "
    "value for yourself, copy the array first"
)


class explained:
    """Raise ConfigError, with the line and the remedy, where a user's code writes what it was handed to read.

    A context manager that costs a step next to nothing.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | TypeError | AttributeError) and _REFUSED.search(str(error)):
            _explain(error, self._state)


def _explain(error: BaseException, state: TrainState) -> None:
    where = _where(error.__traceback__)
    if where is None:
        return
    frame, line = where
    path = _path(frame, state)
    at = f"{shortest(line.filename)}:{line.lineno}"
    code = in_one_line(line.line or "", 100)
    # the error's own words stay where no array is known: it may be about something of the user's own
    what = path or f"what it may only read ({in_one_line(str(error), 200)})"
    raise ConfigError(f"{at}: `{code}` writes into {what}; {_REMEDY}") from error


def _where(trace: TracebackType | None) -> tuple[FrameType, traceback.FrameSummary] | None:
    """Return the innermost frame of a user's code, and its line; None if there is none."""
    found = None
    while trace is not None:
        frame = trace.tb_frame
        if is_users(frame.f_globals.get("__name__", ""), frame.f_code.co_filename):
            found = frame, trace.tb_lineno
        trace = trace.tb_next
    if found is None:
        return None
    frame, number = found
    code = frame.f_code
    return frame, traceback.FrameSummary(code.co_filename, number, code.co_name)


def _path(frame: FrameType, state: TrainState) -> str | None:
    """Return the path of the one array of the state that a variable of this frame is a view of."""
    views = [value for value in frame.f_locals.values() if isinstance(value, np.ndarray) and not value.flags.writeable]
    folders = {**state.arenas, "buffers": state.buffers}
    found = {
        f"/{folder}/{name}"
        for folder, arena in folders.items()
        for name, array in arena.items()
        if any(_overlap(view, array) for view in views)
    }
    return found.pop() if len(found) == 1 else None


def _overlap(one: Array, other: Array) -> bool:
    return one.size > 0 and np.may_share_memory(one, other)
