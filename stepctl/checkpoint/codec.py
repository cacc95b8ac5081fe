"""TrainState <-> the bytes of one HDF5 file, format version 2.

    /counters/<name>   /params/<path>   /optimizers/<name>/<slot>/<path>   /buffers/<path>
    /hooks/<name>/<key>   /config (YAML)   /numerics (JSON)

Root attributes: format, format_version, global_step, created_by, run, run_id. Same state of one run, same bytes.
Version 1, which is still read, has no run_id.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import h5py
import numpy as np

from stepctl import files, yamlio
from stepctl.arena import Array, check_names, update_views
from stepctl.checkpoint import layout, names, userblock
from stepctl.checkpoint.layout import FORMAT
from stepctl.checkpoint.metadata import Metadata
from stepctl.checkpoint.walk import MAX_OBJECTS, NUMBERS, TEXTS, Walk, is_fixed_string
from stepctl.errors import CheckpointError, ConfigError, StepctlError
from stepctl.state import GLOBAL_STEP, Counters, TrainState, restore_counters

_SLICE = 1 << 22  # bytes written together, at most
_SMALL = 1 << 16  # bytes below which arrays are put together
_PART = 1 << 20  # elements read together
# Signature, version 3, offsets and lengths of 8 bytes, no flags; then base address, extension (none), end of file.
_SUPERBLOCK = b"\x89HDF\r\n\x1a\n\x03\x08\x08\x00"
_MAX_ATTRIBUTE = 4096  # bytes
_UNDEFINED = 2**64 - 1
_ROOT_ATTRIBUTES = {"format", "format_version", "global_step", "created_by", "run"}  # of version 1
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
    sha256: str


@dataclass(frozen=True)
class Image:
    """The bytes of a checkpoint from 512 on, in order, as often as they are asked for; the arrays are not copied."""

    metadata: Metadata
    arrays: dict[int, Array]  # by offset in the file

    @property
    def n_bytes(self) -> int:
        return self.metadata.size - userblock.SIZE

    def __iter__(self) -> Iterator[bytes | memoryview]:
        position, small = userblock.SIZE, bytearray()
        for offset, array in [*sorted(self.arrays.items()), (self.metadata.size, np.empty(0, np.uint8))]:
            small += self.metadata.between(position, offset)
            view = array.reshape(-1).view(np.uint8).data
            position = offset + len(view)
            if len(view) < _SMALL:
                small += view
            if len(small) >= _SMALL or len(view) >= _SMALL:
                yield memoryview(small)
                small = bytearray()
            if len(view) >= _SMALL:
                yield from (view[start : start + _SLICE] for start in range(0, len(view), _SLICE))
        yield memoryview(small)


def encode(state: TrainState, *, run: str, run_id: str, config: str, numerics: str) -> Image:
    """Return the image of a checkpoint; `run_id` is the run's 32 hexadecimal digits."""
    arrays = {f"counters/{name}": np.array(value) for name, value in state.counters.items()}
    arrays |= state.arrays() | {"config": layout.text(config), "numerics": layout.text(numerics)}
    arrays = {path: _little(array) for path, array in arrays.items()}
    laid_out = layout.lay_out(arrays, run=run, run_id=run_id, step=state.counters.global_step)
    return Image(laid_out.metadata, {offset: arrays[path] for path, offset in laid_out.offsets.items()})


def _little(array: Array) -> Array:
    order = array.dtype.newbyteorder("<")
    return np.ascontiguousarray(array.astype(order, copy=False)).reshape(array.shape)


def check_storable(state: TrainState) -> None:
    """Raise ConfigError if an array of the state has a name or a kind that no checkpoint could give back."""
    try:
        check_names({*state.arrays(), *(f"counters/{name}" for name in state.counters)})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    objects = {path[:end] for path in state.arrays() for end in _ends(path)}
    if len(objects) > MAX_OBJECTS // 2:
        raise ConfigError(f"model: makes {len(objects)} arrays and groups; a checkpoint holds {MAX_OBJECTS // 2}")
    for path, array in state.arrays().items():
        if array.dtype.newbyteorder("<").str not in NUMBERS:
            raise ConfigError(
                f"/{path}: an array of {array.dtype}; a checkpoint holds arrays of float32, float64, int64 and uint8"
            )


def _ends(path: str) -> Iterator[int]:
    yield from (match.start() for match in re.finditer("/", path))
    yield len(path)


class Reader:
    """One verified checkpoint, open: its header, and its arrays by path. Use as a context manager.

    Opening it checks the digest first, which `vet` may refuse, and then walks the file once, admitting only what
    the format lists; CheckpointError names the first object that it does not. UnreadableError if the file cannot be
    read now.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vet: Callable[[str], None] = lambda digest: None,
        *,
        dir_fd: int | None = None,
    ) -> None:
        self.name = os.path.basename(path)
        self._path = path
        self._verified = userblock.open_verified(path, dir_fd)
        self._raw, digest = self._verified.file, self._verified.digest
        try:
            vet(digest)
            self._file = _open_hdf5(self._raw, self.name)
            self.datasets: dict[str, h5py.Dataset] = Walk(self.name).group(self._file)
            self.header = self._read_header(digest)
        except StepctlError:
            self.close()
            raise
        except Exception as error:  # h5py raises many kinds for a file that is not what it should be
            self.close()
            if (failed := self._verified.read_error) is not None:
                raise files.unreadable(path, failed) from error
            raise CheckpointError(
                "hdf5", f"{self.name}: not readable as HDF5 ({' '.join(str(error).split())})"
            ) from error

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            self._file.close()
        self._raw.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def array_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return path -> (shape, dtype) of every array of the state."""
        return {
            path: (dataset.shape, dataset.dtype.name)
            for path, dataset in self.datasets.items()
            if path not in TEXTS and not path.startswith("counters/")
        }

    def read_into(self, path: str, out: Array) -> None:
        """Read one array into C-ordered memory of its shape and dtype."""
        dataset = self.datasets[path]
        values = out if out.dtype == dataset.dtype else np.empty(out.shape, dataset.dtype)  # of another byte order
        if out.size:
            self._read(path, dataset.id.get_offset(), values)
            if values is not out:
                out[...] = values

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
            raise CheckpointError("changed", f"{self.name}: /{path}: cut short while it was read")

    def parts(self, path: str) -> Iterator[Array]:
        """Yield the elements of one array in C order, a 1-D part at a time."""
        dataset = self.datasets[path]
        size, dtype = math.prod(dataset.shape), dataset.dtype
        position = dataset.id.get_offset()
        for start in range(0, size, _PART):
            part = np.empty(min(_PART, size - start), dtype)
            self._read(path, position + start * dtype.itemsize, part)
            yield part

    def _read_header(self, digest: str) -> Header:
        version = self._verified.version
        attributes = self._attributes(_ROOT_ATTRIBUTES if version == 1 else _ROOT_ATTRIBUTES | {"run_id"})
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
            raise CheckpointError("attribute", f"{self.name}: root attribute 'run_id' is not 32 hexadecimal digits")
        self._check_steps(attributes["global_step"], counters)
        texts = {name: self._string(self.datasets[name][()], name) for name in TEXTS}
        self._check_texts(texts)
        return Header(
            global_step=attributes["global_step"],
            counters=counters,
            created_by=attributes["created_by"],
            run=attributes["run"],
            run_id=run_id,
            config=texts["config"],
            numerics=texts["numerics"],
            sha256=digest,
        )

    def _check_texts(self, texts: dict[str, str]) -> None:
        try:
            yamlio.loads(texts["config"], "/config")
        except ConfigError as error:
            raise CheckpointError("text", f"{self.name}: {str(error).splitlines()[0]}") from error
        try:
            if not isinstance(json.loads(texts["numerics"]), dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            raise CheckpointError("text", f"{self.name}: /numerics: {' '.join(str(error).split())}") from error

    def _attributes(self, expected: set[str]) -> dict[str, Any]:
        found = set(self._file.attrs)
        if found != expected:
            odd = sorted(found ^ expected)[0]
            raise CheckpointError("attribute", f"{self.name}: root attribute {odd!r} is missing or unknown")
        values: dict[str, Any] = {}
        for name in sorted(found):
            space, kind = self._file.attrs.get_id(name).get_space(), self._file.attrs.get_id(name).get_type()
            whole = name in ("format_version", "global_step")
            large = kind.get_size() > _MAX_ATTRIBUTE
            if (
                large
                or space.get_simple_extent_type() != h5py.h5s.SCALAR
                or not (kind.equal(NUMBERS["<i8"]) if whole else is_fixed_string(kind))
            ):
                raise CheckpointError("attribute", f"{self.name}: root attribute {name!r} is of a wrong type")
            value = self._file.attrs[name]
            values[name] = int(value) if whole else self._string(value, name)
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


def check(path: str) -> dict[str, Any]:
    """Open a checkpoint, and return its step, digest, config and run_id; CheckpointError if it is refused."""
    with Reader(path) as reader:
        header = reader.header
        return {
            "step": header.global_step,
            "sha256": header.sha256,
            "config": header.config,
            "run_id": header.run_id,
        }


def _open_hdf5(raw: BufferedReader, name: str) -> h5py.File:
    size = os.fstat(raw.fileno()).st_size
    raw.seek(userblock.SIZE)
    if raw.read(len(_SUPERBLOCK) + 24) != _SUPERBLOCK + struct.pack("<QQQ", userblock.SIZE, _UNDEFINED, size):
        raise CheckpointError("hdf5", f"{name}: no superblock at byte {userblock.SIZE} such as the format has")
    raw.seek(0)
    return h5py.File(raw, "r")


def restore(reader: Reader, state: TrainState) -> None:
    """Read a checkpoint into a state that was built for the same config.

    CheckpointError lists every array and counter that is missing, extra, or of another shape or dtype, before
    anything is read: nothing of the state has changed then.
    """
    expected = {path: (array.shape, array.dtype.name) for path, array in state.arrays().items()}
    found = reader.array_shapes()
    expected |= {f"counters/{name}": ((), "int64") for name in state.counters}
    found |= {f"counters/{name}": ((), "int64") for name in reader.header.counters}
    differences = list(_differences(expected, found))
    if differences:
        raise CheckpointError("mismatch", f"{reader.name}: does not fit this config\n" + "\n".join(differences))
    for folder, arena in [*state.arenas.items(), ("buffers", state.buffers)]:
        for name, array in update_views(arena).items():
            reader.read_into(f"{folder}/{name}", array)
        arena.turn()
    remembered = []
    for hook in state.hooks:
        arrays = {key: np.empty(array.shape, array.dtype) for key, array in hook.state().items()}
        for key, array in arrays.items():
            reader.read_into(f"hooks/{hook.name}/{key}", array)
        remembered.append(arrays)
    reader.check_unchanged()
    for hook, arrays in zip(state.hooks, remembered, strict=True):
        hook.load_state(arrays)
    restore_counters(state.counters, reader.header.counters)


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for path in [*expected, *(path for path in found if path not in expected)]:
        if expected.get(path) != found.get(path):
            foreign = path.startswith("hooks/") and not (expected.get(path) and found.get(path))
            own = " (of a hook of your own? resume from Python, with that hook)" if foreign else ""
            yield f"  /{path}: expected {_describe(expected.get(path))}, found {_describe(found.get(path))}{own}"


def _describe(entry: tuple[tuple[int, ...], str] | None) -> str:
    return f"{entry[1]} {entry[0]}" if entry else "nothing"
