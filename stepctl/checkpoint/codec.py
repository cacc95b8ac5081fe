"""TrainState <-> the bytes of one HDF5 file, format version 2.

    /counters/<name>   /params/<path>   /optimizers/<name>/<slot>/<path>   /buffers/<path>
    /hooks/<name>/<key>   /config (YAML)   /numerics (JSON)
    /state/<path>   /values (tagged JSON)   of a program

Root attributes: format, format_version, global_step, created_by, run, run_id. The same state of one
run makes the same bytes. Version 1, which is still read, has no run_id.
"""

import contextlib
import functools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from typing import Any, Self

import h5py
import numpy as np

from stepctl.checkpoint import layout, names, user_block
from stepctl.checkpoint.layout import FORMAT
from stepctl.checkpoint.metadata import Metadata
from stepctl.checkpoint.walk import (
    MAX_OBJECTS,
    NUMBER_TYPES,
    TEXTS,
    VALUES,
    Walk,
    is_fixed_string,
)
from stepctl.config import yaml
from stepctl.errors import CheckpointError, ConfigError, StepctlError
from stepctl.state import values
from stepctl.state.arena import Array, check_names, update_views
from stepctl.state.counters import GLOBAL_STEP, Counters
from stepctl.state.program_state import ProgramState, SavedProgramState
from stepctl.state.train_state import PREPROCESSING, StatefulHook, TrainState, restore_counters
from stepctl.state.value_decoder import decode
from stepctl.state.values import CapturedState
from stepctl.system import files

_MAX_CHUNK_BYTES = 1 << 22  # written at a time
_SMALL_BYTES = 1 << 16  # smaller arrays are written together
_N_ELEMENTS = 1 << 20  # read at a time
# Signature, version 3, offsets and lengths of 8 bytes, no flags.
# Base address, extension and end of file follow.
_SUPERBLOCK = b"\x89HDF\r\n\x1a\n\x03\x08\x08\x00"
_NO_EXTENSION = 2**64 - 1
_MAX_ATTRIBUTE_BYTES = 4096
_ROOT_ATTRIBUTES = {"format", "format_version", "global_step", "created_by", "run"}  # of version 1
_STATE = "state/"
_HOOKS = "hooks/"
_LATER_HOOKS = {"hook_stop"}  # which files of earlier versions do not have
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Header:
    """Metadata of a checkpoint. `run_id` is None in format version 1."""

    global_step: int
    counters: dict[str, int]
    created_by: str
    run: str
    run_id: str | None
    config: str
    numerics: str
    values: str | None  # of a program; None for a task
    sha256: str


@dataclass(frozen=True)
class Image:
    """The bytes of a checkpoint from 512 on, in chunks. Large arrays are not copied."""

    metadata: Metadata
    arrays: dict[int, Array]  # by offset in the file

    @property
    def n_bytes(self) -> int:
        """The number of bytes from 512 on."""
        return self.metadata.size - user_block.SIZE

    def __iter__(self) -> Iterator[bytes | memoryview]:
        if self.n_bytes <= _SMALL_BYTES:
            return iter(self._small_chunks)
        return self._chunks()

    @functools.cached_property
    def _small_chunks(self) -> list[bytes | memoryview]:
        """The chunks of a small file, which is written, and then compared with what was written."""
        return list(self._chunks())

    def _chunks(self) -> Iterator[bytes | memoryview]:
        position = user_block.SIZE
        pending = bytearray()
        for offset, array in sorted(self.arrays.items()):
            pending += self.metadata.read_range(position, offset)
            view = array.reshape(-1).view(np.uint8).data
            position = offset + len(view)
            is_small = len(view) < _SMALL_BYTES
            if is_small:
                pending += view
            if len(pending) >= _SMALL_BYTES or not is_small:
                yield memoryview(pending)
                pending = bytearray()
            if not is_small:
                for start in range(0, len(view), _MAX_CHUNK_BYTES):
                    yield view[start : start + _MAX_CHUNK_BYTES]
        pending += self.metadata.read_range(position, self.metadata.size)
        yield memoryview(pending)


def encode(state: TrainState, *, run: str, run_id: str, config: str, numerics: str) -> Image:
    """Return the image of a checkpoint.

    run: name of the run; run_id: 32 hexadecimal digits; config: YAML; numerics: JSON.
    """
    arrays = {f"counters/{name}": np.array(value) for name, value in state.counters.items()}
    arrays |= state.arrays()
    arrays["config"] = layout.text(config)
    arrays["numerics"] = layout.text(numerics)
    if state.values is not None:
        arrays[VALUES] = layout.padded_text(state.values)
    arrays = {path: _as_stored(array) for path, array in arrays.items()}
    step = state.counters.global_step
    metadata, offsets = layout.lay_out(arrays, run=run, run_id=run_id, step=step)
    return Image(metadata, {offset: arrays[path] for path, offset in offsets.items()})


def _as_stored(array: Array) -> Array:
    """Return a C-ordered little-endian array; the array itself if it is one."""
    dtype = array.dtype.newbyteorder("<")
    return np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(array.shape)


def check_storable(state: TrainState) -> None:
    """Raise ConfigError if a checkpoint cannot store an array, or a value of a program's state."""
    limit = MAX_OBJECTS // 2
    if state.program is not None:
        state.program.view()  # refuses what `/state` and `/values` cannot hold
        limit = (MAX_OBJECTS - values.MAX_OBJECTS) // 2
    arrays = replace(state, program=None).arrays()
    try:
        check_names({*arrays, *(f"counters/{name}" for name in state.counters)})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    objects = {prefix for path in arrays for prefix in _prefixes(path)}
    if len(objects) > limit:
        raise ConfigError(
            f"model: has {len(objects)} arrays and groups; a checkpoint stores at most {limit}"
        )
    for path, array in arrays.items():
        if array.dtype.newbyteorder("<").str not in NUMBER_TYPES:
            raise ConfigError(
                f"/{path}: dtype {array.dtype}; a checkpoint stores float32, float64, int64 and uint8"
            )


def _prefixes(path: str) -> list[str]:
    """Return the path and the paths of the groups that hold it."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]


class Reader:
    """An open checkpoint that was verified: its header, and its arrays by path.

    with Reader("step-00000100.h5") as reader:
        reader.header.global_step
        reader.read_into("params/0/weight", weight)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vet: Callable[[str], None] = lambda digest: None,
        *,
        dir_fd: int | None = None,
    ) -> None:
        """Verify the digest, pass it to `vet`, which may raise, and walk over the objects.

        CheckpointError at the first object that the format does not list; UnreadableError if the
        file cannot be read now. With `dir_fd`, only the path's last part is used, in that
        directory.
        """
        self.name = os.path.basename(path)
        self._path = path
        self._verified = user_block.open_verified(path, dir_fd)
        self._open_files = contextlib.ExitStack()
        self._raw = self._open_files.enter_context(self._verified.file)
        try:
            vet(self._verified.digest)
            file = self._open_files.enter_context(_open_hdf5(self._raw, self.name))
            self.datasets: dict[str, h5py.Dataset] = Walk(self.name).visit(file)
            self.header = self._read_header(file)
        except StepctlError:
            self.close()
            raise
        except Exception as error:  # h5py raises errors of many types at a malformed file
            self.close()
            read_error = self._verified.read_error
            if read_error is not None:
                raise files.unreadable(path, read_error) from error
            raise CheckpointError(
                "hdf5", f"{self.name}: not readable as HDF5 ({' '.join(str(error).split())})"
            ) from error

    def close(self) -> None:
        self._open_files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def version(self) -> int:
        """The format version."""
        return self._verified.version

    def content(self, max_bytes: int) -> bytes | None:
        """Return all bytes of the file; None if there are more than `max_bytes`."""
        if self._verified.status.st_size > max_bytes:
            return None
        self._raw.seek(0)
        content = self._raw.read()
        self.check_unchanged()
        return content

    def array_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return path -> (shape, dtype) of the arrays, without counters and texts."""
        return {
            path: (dataset.shape, dataset.dtype.name)
            for path, dataset in self.datasets.items()
            if path not in TEXTS and not path.startswith("counters/")
        }

    def read_into(self, path: str, out: Array) -> None:
        """Read one array into C-ordered memory of its shape and dtype."""
        dataset = self.datasets[path]
        if not out.size:
            return
        if out.dtype == dataset.dtype:
            self._read(path, dataset.id.get_offset(), out)
        else:  # the machine's byte order is not the file's
            values = np.empty(out.shape, dataset.dtype)
            self._read(path, dataset.id.get_offset(), values)
            out[...] = values

    def read_program(self) -> CapturedState | None:
        """Read the state of a program; None for a task's checkpoint."""
        if self.header.values is None:
            return None
        arrays = {}
        for path, dataset in self.datasets.items():
            if path.startswith(_STATE):
                array = np.empty(dataset.shape, dataset.dtype.newbyteorder("="))
                self.read_into(path, array)
                arrays[path.removeprefix(_STATE)] = array
        return CapturedState(arrays, self.header.values)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file was written to since it was opened."""
        if not self._verified.is_unchanged():
            raise CheckpointError("changed", f"{self.name}: changed while it was read")

    def _read(self, path: str, position: int, out: Array) -> None:
        try:
            self._raw.seek(position)
            n_bytes = self._raw.readinto(out.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise files.unreadable(self._path, error) from error
        if n_bytes != out.nbytes:
            raise CheckpointError("changed", f"{self.name}: /{path}: truncated while it was read")
        if out.dtype == bool and out.view(np.uint8).max() > 1:
            raise CheckpointError("bool", f"{self.name}: /{path}: a byte that is neither 0 nor 1")

    def parts(self, path: str) -> Iterator[Array]:
        """Yield the elements of one array in C order, in 1-D parts."""
        dataset = self.datasets[path]
        size = math.prod(dataset.shape)
        offset = dataset.id.get_offset()
        for start in range(0, size, _N_ELEMENTS):
            part = np.empty(min(_N_ELEMENTS, size - start), dataset.dtype)
            self._read(path, offset + start * part.itemsize, part)
            yield part

    def _read_header(self, file: h5py.File) -> Header:
        version = self.version
        expected = _ROOT_ATTRIBUTES if version == 1 else _ROOT_ATTRIBUTES | {"run_id"}
        attributes = self._read_attributes(file, expected)
        counters = {
            path.removeprefix("counters/"): int(dataset[()])
            for path, dataset in self.datasets.items()
            if path.startswith("counters/")
        }
        if attributes["format"] != FORMAT or attributes["format_version"] != version:
            raise CheckpointError(
                "version",
                f"{self.name}: says {attributes['format']} {attributes['format_version']} inside, "
                f"and {FORMAT} {version} in its first bytes",
            )
        run_id = attributes.get("run_id")
        if run_id is not None and not _RUN_ID.fullmatch(run_id):
            raise CheckpointError(
                "attribute", f"{self.name}: root attribute 'run_id' is not 32 hexadecimal digits"
            )
        self._check_steps(attributes["global_step"], counters)
        texts = {
            name: self._string(self.datasets[name][()], name)
            for name in TEXTS
            if name in self.datasets
        }
        self._check_texts(texts)
        return Header(
            global_step=attributes["global_step"],
            counters=counters,
            created_by=attributes["created_by"],
            run=attributes["run"],
            run_id=run_id,
            config=texts["config"],
            numerics=texts["numerics"],
            values=texts[VALUES].rstrip(" ") if VALUES in texts else None,
            sha256=self._verified.digest,
        )

    def _check_texts(self, texts: dict[str, str]) -> None:
        try:
            yaml.loads(texts["config"], "/config")
        except ConfigError as error:
            raise CheckpointError("text", f"{self.name}: {str(error).splitlines()[0]}") from error
        try:
            if not isinstance(json.loads(texts["numerics"]), dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                "text", f"{self.name}: /numerics: {' '.join(str(error).split())}"
            ) from error
        if VALUES in texts:
            self._check_values(texts[VALUES])

    def _check_values(self, text: str) -> None:
        paths = [path.removeprefix(_STATE) for path in self.datasets if path.startswith(_STATE)]
        try:
            decode(text, dict.fromkeys(paths, np.empty(())))
        except CheckpointError as error:
            raise CheckpointError(error.code, f"{self.name}: {error}") from error

    def _read_attributes(self, file: h5py.File, expected: set[str]) -> dict[str, Any]:
        """Return the root attributes; CheckpointError at an unexpected name or type."""
        found = set(file.attrs)
        if found != expected:
            odd = sorted(found ^ expected)[0]
            raise CheckpointError(
                "attribute", f"{self.name}: root attribute {odd!r} is missing or unknown"
            )
        values: dict[str, Any] = {}
        for name in sorted(found):
            attribute = file.attrs.get_id(name)
            kind = attribute.get_type()
            is_large = kind.get_size() > _MAX_ATTRIBUTE_BYTES
            is_scalar = attribute.get_space().get_simple_extent_type() == h5py.h5s.SCALAR
            is_integer = name in ("format_version", "global_step")
            if is_integer:
                has_type = kind.equal(NUMBER_TYPES["<i8"])
            else:
                has_type = is_fixed_string(kind)
            if is_large or not is_scalar or not has_type:
                raise CheckpointError(
                    "attribute", f"{self.name}: root attribute {name!r} has a wrong type"
                )
            value = file.attrs[name]
            values[name] = int(value) if is_integer else self._string(value, name)
        return values

    def _check_steps(self, attribute: int, counters: dict[str, int]) -> None:
        in_name = names.step_of(self.name)
        if counters.get(GLOBAL_STEP) != attribute or (in_name is not None and in_name != attribute):
            raise CheckpointError(
                "step",
                f"{self.name}: its three step numbers disagree (name {in_name}, attribute {attribute}, "
                f"counter {counters.get(GLOBAL_STEP)})",
            )
        try:
            Counters(counters)
        except ValueError as error:
            raise CheckpointError("counter", f"{self.name}: {error}") from error

    def _string(self, value: Any, where: str) -> str:
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError("text", f"{self.name}: /{where} is not UTF-8 text") from error


def _open_hdf5(raw: BufferedReader, name: str) -> h5py.File:
    size = os.fstat(raw.fileno()).st_size
    addresses = struct.pack("<QQQ", user_block.SIZE, _NO_EXTENSION, size)
    superblock = _SUPERBLOCK + addresses
    raw.seek(user_block.SIZE)
    if raw.read(len(superblock)) != superblock:
        raise CheckpointError("hdf5", f"{name}: no valid HDF5 superblock at byte {user_block.SIZE}")
    raw.seek(0)
    return h5py.File(raw, "r")


def restore(reader: Reader, state: TrainState, changed_hooks: Collection[str] = ()) -> None:
    """Read a checkpoint into a state that was built for the same config.

    Of `changed_hooks`, those without arrays in the checkpoint keep their initial state, and arrays of
    those that the state lacks are ignored.

    CheckpointError lists every array and counter that is missing, extra, or of another shape or
    dtype. It is raised before anything is read, and leaves the state unchanged. ConfigError if the
    live state of a program does not have the keys and objects of the checkpoint's.
    """
    _refuse_mismatch(reader, state, changed_hooks)
    captured = reader.read_program()
    for group, arena in [*state.arenas.items(), ("buffers", state.buffers)]:
        for name, array in update_views(arena).items():
            reader.read_into(f"{group}/{name}", array)
        arena.swap_buffers()
    _read_statistics(reader, state)
    saved = saved_hooks(reader)
    hooks = [hook for hook in state.hooks if hook.name in saved]
    hook_states = [_read_hook_state(reader, hook) for hook in hooks]
    reader.check_unchanged()
    if captured is not None:
        assert isinstance(state.program, ProgramState | SavedProgramState)
        state.program.restore(captured)
    for hook, arrays in zip(hooks, hook_states, strict=True):
        hook.load_state(arrays)
    restore_counters(state.counters, reader.header.counters)


def restore_arenas(reader: Reader, state: TrainState) -> None:
    """Read a checkpoint into the arenas, buffers, statistics and counters of a state only.

    CheckpointError lists every one of them that is missing, extra, or of another shape or dtype.
    """
    arenas = {**state.arenas, "buffers": state.buffers}
    expected = {
        f"{folder}/{name}": (shape, arena.dtype.name)
        for folder, arena in arenas.items()
        for name, shape in arena.shapes.items()
    }
    for name, array in state.preprocessing.items():
        expected[f"{PREPROCESSING}/{name}"] = (array.shape, array.dtype.name)
    expected |= {f"counters/{name}": ((), "int64") for name in state.counters}
    refuse_other_arrays(reader, [*arenas, "counters"], expected)
    _read_statistics(reader, state)
    for folder, arena in arenas.items():
        for name, array in update_views(arena).items():
            reader.read_into(f"{folder}/{name}", array)
        arena.swap_buffers()
    reader.check_unchanged()
    restore_counters(state.counters, reader.header.counters)


def _read_statistics(reader: Reader, state: TrainState) -> None:
    for name, array in state.preprocessing.items():
        reader.read_into(f"{PREPROCESSING}/{name}", array)


def refuse_other_arrays(
    reader: Reader, folders: Collection[str], expected: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
    """Raise CheckpointError unless some folders of a checkpoint hold just the `expected` arrays.

    expected: path -> (shape, dtype).
    """
    found = reader.array_shapes()
    found |= {f"counters/{name}": ((), "int64") for name in reader.header.counters}
    inside = tuple(f"{folder}/" for folder in folders)
    found = {path: entry for path, entry in found.items() if path.startswith(inside)}
    _refuse_differences(reader, expected, found)


def restore_hook(reader: Reader, hook: StatefulHook) -> None:
    """Restore the arrays of one hook, unless the checkpoint has none, or other ones."""
    shapes = reader.array_shapes()
    for key, array in hook.state().items():
        if shapes.get(f"{_HOOKS}{hook.name}/{key}") != (array.shape, array.dtype.name):
            return
    hook.load_state(_read_hook_state(reader, hook))
    reader.check_unchanged()


def saved_hooks(reader: Reader) -> set[str]:
    """Return the names of the hooks that have arrays in a checkpoint."""
    return {path.split("/")[1] for path in reader.array_shapes() if path.startswith(_HOOKS)}


def _refuse_mismatch(reader: Reader, state: TrainState, changed_hooks: Collection[str]) -> None:
    saved = "task" if reader.header.values is None else "program"
    configured = "task" if state.program is None else "program"
    if saved != configured:
        raise CheckpointError(
            "mismatch",
            f"{reader.name}: holds the state of a {saved}, and this config has a {configured}; use "
            "the config that it was saved with",
        )
    arrays = replace(state, program=None).arrays()  # the shapes of a program's may change
    expected = {path: (array.shape, array.dtype.name) for path, array in arrays.items()}
    expected |= {f"counters/{name}": ((), "int64") for name in state.counters}
    found = reader.array_shapes()
    found = {path: entry for path, entry in found.items() if not path.startswith(_STATE)}
    found |= {f"counters/{name}": ((), "int64") for name in reader.header.counters}
    one_sided = saved_hooks(reader) ^ {hook.name for hook in state.hooks}
    tolerated = one_sided & {*changed_hooks, *_LATER_HOOKS}
    expected = _without_hooks(expected, tolerated)
    found = _without_hooks(found, tolerated)
    _refuse_differences(reader, expected, found)


def _refuse_differences(
    reader: Reader, expected: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    differences = list(_describe_differences(expected, found))
    if differences:
        raise CheckpointError(
            "mismatch", f"{reader.name}: does not fit this config\n" + "\n".join(differences)
        )


def _without_hooks(arrays: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    folders = tuple(f"{_HOOKS}{name}/" for name in names)
    return {path: entry for path, entry in arrays.items() if not path.startswith(folders)}


def _read_hook_state(reader: Reader, hook: StatefulHook) -> dict[str, Array]:
    arrays = {key: np.empty(array.shape, array.dtype) for key, array in hook.state().items()}
    for key, array in arrays.items():
        reader.read_into(f"{_HOOKS}{hook.name}/{key}", array)
    return arrays


def _describe_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for path in yaml.differing_keys(expected, found):
        wanted = expected.get(path)
        stored = found.get(path)
        hint = ""
        if path.startswith(_HOOKS) and (wanted is None or stored is None):
            hint = " (a hook in Python? resume there with it, or add it to the config's hooks)"
        yield f"  /{path}: expected {describe_array(wanted)}, found {describe_array(stored)}{hint}"


def describe_array(entry: tuple[tuple[int, ...], str] | None) -> str:
    """Return "float32 (3, 4)" for an array's shape and dtype; "nothing" for None."""
    return f"{entry[1]} {entry[0]}" if entry else "nothing"
