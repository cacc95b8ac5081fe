"""The state that a user's program owns: a dict that its steps change, captured and restored.

program = ProgramState({"x": np.zeros(3), "accepted": 0})
captured = program.capture()
program.restore(captured)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, final

import numpy as np

from stepctl.errors import ConfigError
from stepctl.state.arena import Array, same_bits
from stepctl.state.generators import copy_bit_generator
from stepctl.state.value_decoder import SavedObject, decode
from stepctl.state.values import (
    USER_CODE_ERRORS,
    CapturedState,
    capture,
    has_method,
    join,
    place,
)
from stepctl.system.text import in_one_line
from stepctl.system.user_code import describe_error

_KEEP_KEYS = "keep the top-level keys of a run, or start a new run in another directory"


@final
class ProgramState:
    """The live state of a program; `live` is the dict that its steps change."""

    def __init__(self, live: dict[str, Any]) -> None:
        self.live = live
        self._keys = live.keys() | set()
        self._previous: dict[str, Array] = {}  # the arrays of the last capture

    def capture(self) -> CapturedState:
        """Return a copy; ConfigError, with the path, for a value that no checkpoint can hold.

        Memory of the last capture is used again, if nothing else refers to it: mapping fresh pages
        takes several times as long as the copy.
        """
        self._refuse_changed_keys()
        captured = capture(self.live, self._copy)
        self._previous = dict(captured.arrays)
        return captured

    def view(self) -> CapturedState:
        """Return the current state as `capture` does, with the arrays themselves instead of copies."""
        self._refuse_changed_keys()
        return capture(self.live, lambda path, array: array)

    def restore(self, captured: CapturedState) -> None:
        """Give the live state the captured values; see `restore`."""
        restore(self.live, captured)

    def _refuse_changed_keys(self) -> None:
        """Raise ConfigError if a step added or removed a key: a resume begins with the initial ones."""
        changed = sorted(map(repr, self._keys ^ self.live.keys()))
        if changed:
            raise ConfigError(
                f"state: the top-level key {changed[0]} was added or removed by a step; keep the keys of "
                "the initial state, and let a dict in it grow"
            )

    def _copy(self, path: str, array: Array) -> Array:
        if path in self._previous:
            spare, n_references = _pop(self._previous, path)
            if n_references == _UNSHARED and _can_hold(spare, array):
                np.copyto(spare, array)
                return spare
        return array.copy(order="K")


def _pop(arrays: dict[str, Array], path: str) -> tuple[Array, int]:
    """Remove an array; return it and its number of references, those of views included."""
    array = arrays.pop(path)
    return array, sys.getrefcount(array)


_, _UNSHARED = _pop({"": np.empty(0)}, "")


@final
class SavedProgramState:
    """The state of a program that does not run here; it is written again as it was read."""

    def __init__(self) -> None:
        self._captured = CapturedState({}, "{}")

    def capture(self) -> CapturedState:
        """Return what was restored."""
        return self._captured

    def view(self) -> CapturedState:
        """Return what was restored."""
        return self._captured

    def restore(self, captured: CapturedState) -> None:
        """Keep the captured values; CheckpointError if their text is not what `capture` writes."""
        decode(captured.values, captured.arrays)
        self._captured = captured


def restore(state: dict[str, Any], captured: CapturedState) -> None:
    """Give a state the captured values.

    Arrays of the same shape, dtype and order that are not part of a larger one, lists, dicts and
    generators are changed in place; other values are replaced. Raises CheckpointError if the text is
    not what `capture` writes, ConfigError if the top-level keys differ, or an object is missing or
    fails. Only a failing object may leave the state changed.
    """
    saved = decode(captured.values, captured.arrays)
    _refuse_other_keys(state, saved)
    objects = list(_objects(state, saved, ""))
    for found in objects:
        _load(found)
    values = {key: _filled(state[key], value) for key, value in saved.items()}
    state.clear()  # so that its keys have the order of the saved ones
    state.update(values)


def find_changed(before: CapturedState, after: CapturedState) -> str | None:
    """Return the place of a value that differs to the bit, such as state['x']; None if all are equal."""
    for path, array in before.arrays.items():
        other = after.arrays.get(path)
        if other is None or not same_bits(array, other):
            return place(path)
    if before.values == after.values:
        return None
    values = json.loads(before.values)
    other_values = json.loads(after.values)
    for key in [*values, *other_values]:
        if key not in values or values[key] != other_values.get(key):
            return place(key)
    return "the order of the state's keys"


def _refuse_other_keys(state: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    missing = sorted(saved.keys() - state.keys())
    extra = sorted(state.keys() - saved.keys())
    if missing:
        raise ConfigError(
            f"state has no key {missing[0]!r}, which the checkpoint has; {_KEEP_KEYS}"
        )
    if extra:
        raise ConfigError(
            f"state[{extra[0]!r}] is not in the checkpoint, which has {', '.join(saved)}; {_KEEP_KEYS}"
        )


class _Object(NamedTuple):
    """A live object, and what its `state_dict` returned at the save."""

    path: str
    live: Any
    saved: SavedObject


def _objects(old: Any, saved: Any, path: str) -> Iterator[_Object]:
    if isinstance(saved, SavedObject):
        if not has_method(old, "load_state_dict"):
            raise ConfigError(
                f"{place(path)}: the checkpoint holds the state of an object here; put the object into the "
                "state before it is restored"
            )
        yield _Object(path, old, saved)
    elif isinstance(saved, dict):
        for key, item in saved.items():
            yield from _objects(_item(old, key), item, join(path, key))
    elif isinstance(saved, list | tuple):
        for index, item in enumerate(saved):
            yield from _objects(_element(old, index), item, join(path, str(index)))


def _item(container: Any, key: str) -> Any:
    return container.get(key) if type(container) is dict else None


def _element(container: Any, index: int) -> Any:
    if isinstance(container, list | tuple) and index < len(container):
        return container[index]
    return None


def _load(found: _Object) -> None:
    items = _filled(None, found.saved.items)
    try:
        found.live.load_state_dict(items)
    except USER_CODE_ERRORS as error:
        raise ConfigError(
            f"{place(found.path)}: load_state_dict() failed: {in_one_line(describe_error(error))}"
        ) from error


def _filled(old: Any, saved: Any) -> Any:
    """Return the saved value, in the place of `old` where that can be filled."""
    if isinstance(saved, SavedObject):
        return old
    if isinstance(saved, np.ndarray):
        return _filled_array(old, saved)
    if isinstance(saved, dict):
        return _filled_dict(old, saved)
    if isinstance(saved, list | tuple):
        return _filled_sequence(old, saved)
    if isinstance(saved, np.random.Generator):
        if type(old) is np.random.Generator:
            generator = old.bit_generator
            if type(generator) is type(saved.bit_generator):
                copy_bit_generator(saved.bit_generator, generator)
                return old
    elif isinstance(saved, np.random.RandomState) and type(old) is np.random.RandomState:
        saved_state = saved.get_state(legacy=False)
        if old.get_state(legacy=False)["bit_generator"] == saved_state["bit_generator"]:
            old.set_state(saved_state)
            return old
    return saved


def _filled_array(old: Any, saved: Array) -> Array:
    if type(old) is np.ndarray and not _is_part(old) and _can_hold(old, saved):
        old[...] = saved
        return old
    return saved.copy(order="K")


def _is_part(array: Array) -> bool:
    """Tell whether an array is a view of a larger one, which may be the program's data."""
    return isinstance(array.base, np.ndarray) and array.base.nbytes > array.nbytes


def _can_hold(old: Array, saved: Array) -> bool:
    """Return whether `old` can be filled in place and then equals `saved`, memory order included."""
    same_order = (
        old.flags.c_contiguous == saved.flags.c_contiguous
        and old.flags.f_contiguous == saved.flags.f_contiguous
    )
    return (
        old.shape == saved.shape and old.dtype == saved.dtype and same_order and old.flags.writeable
    )


def _filled_dict(old: Any, saved: dict[str, Any]) -> dict[str, Any]:
    values = {key: _filled(_item(old, key), item) for key, item in saved.items()}
    if type(old) is not dict:
        return values
    filled: dict[str, Any] = old
    filled.clear()
    filled.update(values)
    return filled


def _filled_sequence(old: Any, saved: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    values = [_filled(_element(old, index), item) for index, item in enumerate(saved)]
    if isinstance(saved, tuple):
        return tuple(values)
    if type(old) is list:
        old[:] = values
        return old
    return values
