"""The differences between two states: counters, config, values, and every array to the bit."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypedDict

import numpy as np

from stepctl.checkpoint import codec
from stepctl.config import yaml
from stepctl.reports.inspect import fork_origin, open_path
from stepctl.rundir import series
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.series import RecordType, series_folder
from stepctl.runs.messages import silent
from stepctl.state.arena import Array
from stepctl.state.train_state import TrainState
from stepctl.state.value_text import ValueDifference, compare_values
from stepctl.system import files
from stepctl.system.folder import Folder
from stepctl.system.text import counted

Shapes = Mapping[str, tuple[tuple[int, ...], str]]


class KeyDifference(TypedDict):
    """Two values of a counter or of a config key; None where it is absent."""

    key: str
    a: Any
    b: Any


class ArrayDifference(TypedDict, total=False):
    """The outcome of comparing two arrays; `equal` alone if all bits are the same.

    Arrays of different shapes or dtypes have `a` and `b`, others the figures. `max_abs` and
    `max_ulp` (distance in representable numbers) are over the elements that are finite in both; of
    complex numbers, over their real and imaginary parts.
    """

    path: str
    equal: bool
    a: Any
    b: Any
    n_different: int
    first: int  # flat index of the first different element
    max_abs: float
    max_ulp: int | None  # None for integers


# saved steps, each with the differences of a repeated training from its checkpoint
Replayed = Iterator[tuple[int, list[ArrayDifference]]]


class CheckpointComparison(TypedDict):
    """The differences between two checkpoints. The config does not count for `equal`."""

    equal: bool
    counters: list[KeyDifference]
    config: list[KeyDifference]
    arrays: list[ArrayDifference]  # every array, and every series of two runs
    values: list[ValueDifference]  # plain values of a program, as text


def compare_paths(path: str, other: str) -> CheckpointComparison:
    """Compare two checkpoints, or the newest good ones of two runs."""
    with open_path(path, silent) as a, open_path(other, silent) as b:
        counters = _key_differences(a.header.counters, b.header.counters)
        config = _key_differences(_flat_config(a), _flat_config(b))
        values = compare_values(a.header.values, b.header.values)
        arrays = list(_compare_by_path(a, b.array_shapes(), b.parts))
        last = min(a.header.global_step, b.header.global_step)
    arrays += _compare_series_of(path, other, last)
    equal = not counters and not values and all(array["equal"] for array in arrays)
    return {
        "equal": equal,
        "counters": counters,
        "config": config,
        "arrays": arrays,
        "values": values,
    }


def _compare_series_of(path: str, other: str, last: int) -> Iterator[ArrayDifference]:
    """Compare the series of two runs up to `last`; those of a fork begin with its step."""
    if not (files.is_directory(path) and files.is_directory(other)):
        return
    runs = [RunDirectory(run) for run in (path, other)]
    folders = [series_folder(run) for run in runs]
    known = [series.names(folder) for folder in folders]
    if not any(known):
        return
    origins = [fork_origin(run.read_ledger()) for run in runs]
    first = max(origin["step"] if origin else 0 for origin in origins)
    for name in dict.fromkeys([*known[0], *known[1]]):
        if name not in known[0] or name not in known[1]:
            presence = ["a series" if name in names else "nothing" for names in known]
            yield {"path": f"series/{name}", "equal": False, "a": presence[0], "b": presence[1]}
            continue
        a, b = (series.read(folder, name, last=last, after=first) for folder in folders)
        difference = _compare_records(a, b)
        yield {"path": f"series/{name}", **difference}


def _compare_by_path(
    a: codec.Reader, shapes_b: Shapes, parts_b: Callable[[str], Iterable[Array]]
) -> Iterator[ArrayDifference]:
    """Compare the arrays of a checkpoint with others, by path."""
    shapes_a = a.array_shapes()
    for name in dict.fromkeys([*shapes_a, *shapes_b]):
        difference: ArrayDifference
        if shapes_a.get(name) == shapes_b.get(name):
            difference = compare_arrays(a.parts(name), parts_b(name))
        else:
            difference = {
                "equal": False,
                "a": codec.describe_array(shapes_a.get(name)),
                "b": codec.describe_array(shapes_b.get(name)),
            }
        yield {"path": name, **difference}


def _flat_config(reader: codec.Reader) -> dict[str, Any]:
    return yaml.flatten(yaml.loads(reader.header.config, reader.name).value)


def _key_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[KeyDifference]:
    return [{"key": key, "a": a.get(key), "b": b.get(key)} for key in yaml.differing_keys(a, b)]


def compare_state(reader: codec.Reader, state: TrainState) -> list[ArrayDifference]:
    """Return the counters, arrays and values in which a checkpoint and a state differ."""
    found: list[ArrayDifference] = []
    for item in _key_differences(reader.header.counters, dict(state.counters)):
        found.append({"path": f"counters/{item['key']}", "a": item["a"], "b": item["b"]})
    arrays = state.arrays()
    shapes = {path: (array.shape, array.dtype.name) for path, array in arrays.items()}
    for difference in _compare_by_path(reader, shapes, lambda path: [arrays[path].reshape(-1)]):
        if not difference["equal"]:
            found.append(difference)
    for value in compare_values(reader.header.values, state.values):
        found.append({"path": value["path"], "a": value["a"], "b": value["b"]})
    return found


def compare_series(
    recorded: Folder,
    other: Callable[[str, RecordType], Array],
    other_names: Iterable[str],
    *,
    after: int,
    last: int,
) -> list[ArrayDifference]:
    """Return the series of a run that differ from others in the rows past `after` up to `last`.

    `other` returns the records of a series by name and type; `other_names` are those it has.
    """
    found: list[ArrayDifference] = []
    for name in dict.fromkeys([*series.names(recorded), *other_names]):
        if name not in series.names(recorded):
            found.append(
                {"path": f"series/{name}", "equal": False, "a": "nothing", "b": "a series"}
            )
            continue
        kind = series.read_type(recorded, name)
        a = series.read(recorded, name, after=after, last=last)
        b = other(name, kind)
        b = b[(b["step"] > after) & (b["step"] <= last)]
        difference = _compare_records(a, b)
        if not difference["equal"]:
            found.append({"path": f"series/{name}", **difference})
    return found


def _compare_records(a: Array, b: Array) -> ArrayDifference:
    """Compare rows of series; those with the same steps are compared by their bits."""
    if a.dtype != b.dtype:
        return {"equal": False, "a": str(a.dtype["value"]), "b": str(b.dtype["value"])}
    if not np.array_equal(a["step"], b["step"]):
        return {"equal": False, "a": counted(len(a), "row"), "b": counted(len(b), "row")}
    values = (np.ascontiguousarray(a["value"]), np.ascontiguousarray(b["value"]))
    return compare_arrays([values[0].reshape(-1)], [values[1].reshape(-1)])


def compare_arrays(a: Iterable[Array], b: Iterable[Array]) -> ArrayDifference:
    """Compare the bits of two arrays of one size and dtype; each comes in 1-D parts of any lengths."""
    n_different = position = 0
    first = None
    max_abs = 0.0
    max_ulp = None
    for x, y in _align_parts(a, b):
        components_x = _components(x)
        components_y = _components(y)
        differs = _bits(components_x) != _bits(components_y)
        different = np.flatnonzero(differs.any(axis=1))
        if different.size:
            n_different += different.size
            if first is None:
                first = position + int(different[0])
            values_x = components_x[differs]
            values_y = components_y[differs]
            max_abs = max(max_abs, _largest_difference(values_x, values_y))
            if values_x.dtype.kind == "f":
                max_ulp = max(max_ulp or 0, _largest_ulp(values_x, values_y))
        position += x.size
    if first is None:
        return {"equal": True}
    return {
        "equal": False,
        "n_different": n_different,
        "first": first,
        "max_abs": max_abs,
        "max_ulp": max_ulp,
    }


def _align_parts(a: Iterable[Array], b: Iterable[Array]) -> Iterator[tuple[Array, Array]]:
    """Yield pairs of parts of equal lengths."""
    lefts = iter(a)
    rights = iter(b)
    left = right = np.empty(0)
    while True:
        if not left.size:
            left = next(lefts, left)
        if not right.size:
            right = next(rights, right)
        size = min(left.size, right.size)
        if not size:
            return
        yield left[:size], right[:size]
        left = left[size:]
        right = right[size:]


def _bits(values: Array) -> Array:
    """Return floats as unsigned integers of the same bits; other arrays as they are."""
    return values.view(f"u{values.itemsize}") if values.dtype.kind == "f" else values


def _components(values: Array) -> Array:
    """Return the real and imaginary parts of each element; the element alone if it is real."""
    if values.dtype.kind == "c":
        return values.view(values.real.dtype).reshape(-1, 2)
    if values.dtype.kind == "b":
        values = values.view(np.uint8)
    return values.reshape(-1, 1)


def _largest_difference(x: Array, y: Array) -> float:
    if x.dtype.kind in "iu":
        # modulo 2**64, which is right because the larger one comes first
        difference = np.maximum(x, y).astype(np.uint64) - np.minimum(x, y).astype(np.uint64)
        return float(difference.max(initial=0))
    finite = np.isfinite(x) & np.isfinite(y)
    with np.errstate(over="ignore"):
        distance = np.abs(x[finite].astype(np.float64) - y[finite].astype(np.float64))
    return float(distance.max(initial=0))


def _largest_ulp(x: Array, y: Array) -> int:
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        return 0
    ranks_x = _float_ranks(x[finite])
    ranks_y = _float_ranks(y[finite])
    return int((np.maximum(ranks_x, ranks_y) - np.minimum(ranks_x, ranks_y)).max())


def _float_ranks(values: Array) -> Array:
    """Return unsigned integers in the order of the floats, the same for -0.0 and 0.0."""
    bits = _bits(values)
    sign = bits.dtype.type(1 << (8 * values.itemsize - 1))
    ranks: Array = np.where(bits >= sign, sign - (bits - sign), bits + sign)
    return ranks
