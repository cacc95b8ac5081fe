"""Where two states differ: counters, config, and every array to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from stepctl import report, yamlio
from stepctl.arena import Array
from stepctl.checkpoint import codec
from stepctl.state import TrainState

_UINT = {4: np.uint32, 8: np.uint64}


def paths(path: str, other: str) -> dict[str, Any]:
    """Compare two checkpoints, or the newest good ones of runs: {"equal", "counters", "config", "arrays"}.

    "counters" and "config" list what differs, as {"key", "a", "b"}; "arrays" has every array, see `arrays`.
    "equal" tells whether counters and arrays are the same; the config is shown, and decides nothing here.
    """
    with report.open_path(path, _quiet) as a, report.open_path(other, _quiet) as b:
        counters = _differences(a.header.counters, b.header.counters)
        config = _differences(*(yamlio.flatten(yamlio.loads(side.header.config, side.name).value) for side in (a, b)))
        shapes, others = a.array_shapes(), b.array_shapes()
        compared = []
        for name in dict.fromkeys([*shapes, *others]):
            if shapes.get(name) != others.get(name):
                sides = {"a": _described(shapes.get(name)), "b": _described(others.get(name))}
                compared.append({"path": name, "equal": False, **sides})
            else:
                compared.append({"path": name, **arrays(a.parts(name), b.parts(name))})
    equal = not counters and all(array["equal"] for array in compared)
    return {"equal": equal, "counters": counters, "config": config, "arrays": compared}


def _quiet(message: str) -> None:
    return None


def state(reader: codec.Reader, state: TrainState) -> list[dict[str, Any]]:
    """Return what differs between a checkpoint and a state of its layout: counters, and arrays as `arrays` says."""
    found = [
        {"path": f"counters/{item['key']}", "a": item["a"], "b": item["b"]}
        for item in _differences(reader.header.counters, dict(state.counters))
    ]
    for path, array in state.arrays().items():
        result = arrays(reader.parts(path), [array.reshape(-1)])
        if not result["equal"]:
            found.append({"path": path, **result})
    return found


def arrays(a: Iterable[Array], b: Iterable[Array]) -> dict[str, Any]:
    """Compare the elements of two arrays of one size and dtype, which come in parts of any lengths.

    Returns "equal" (to the bit); if they are not: "n_different" elements, "first" (the flat index of the first),
    and over the finite ones "max_abs", the largest absolute difference, and "max_ulp", the largest distance in
    representable numbers (None for integers).
    """
    n, first, position, max_abs, max_ulp = 0, None, 0, 0.0, None
    for left, right in _aligned(a, b):
        different = np.flatnonzero(_bits(left) != _bits(right))
        if different.size:
            first = position + int(different[0]) if first is None else first
            n += different.size
            x, y = left[different], right[different]
            finite = np.isfinite(x) & np.isfinite(y)
            x, y = x[finite], y[finite]
            max_abs = max(max_abs, float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0)))
            max_ulp = max(max_ulp or 0, _ulp(x, y)) if x.dtype.kind == "f" else None
        position += left.size
    if not n:
        return {"equal": True}
    return {"equal": False, "n_different": n, "first": first, "max_abs": max_abs, "max_ulp": max_ulp}


def _aligned(a: Iterable[Array], b: Iterable[Array]) -> Iterable[tuple[Array, Array]]:
    lefts, rights = iter(a), iter(b)
    left = right = np.empty(0)
    while True:
        left = left if left.size else next(lefts, left)
        right = right if right.size else next(rights, right)
        size = min(left.size, right.size)
        if not size:
            return
        yield left[:size], right[:size]
        left, right = left[size:], right[size:]


def _bits(values: Array) -> Array:
    return values.view(_UINT.get(values.itemsize, np.uint8)) if values.dtype.kind == "f" else values


def _ulp(x: Array, y: Array) -> int:
    if not x.size:
        return 0
    ordered = []
    for values in (x, y):
        bits, sign = _bits(values), _UINT[values.itemsize](1 << (8 * values.itemsize - 1))
        # as unsigned numbers in the order of the floats, -0.0 and 0.0 at the same place
        ordered.append(np.where(bits >= sign, sign - (bits - sign), bits + sign))
    return int((np.maximum(*ordered) - np.minimum(*ordered)).max())


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(itertools.chain(a, b))
    return [{"key": key, "a": a.get(key), "b": b.get(key)} for key in keys if a.get(key) != b.get(key)]


def _described(entry: tuple[tuple[int, ...], str] | None) -> str:
    return f"{entry[1]} {entry[0]}" if entry else "nothing"
