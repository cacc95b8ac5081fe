"""Comma-separated numbers, gzipped or not."""

import io
from csv import reader
from typing import Annotated

import numpy as np
from pydantic import Field

from stepctl.data.base import Sources, Targets
from stepctl.data.files import read_bytes, reading
from stepctl.data.memory import InMemory
from stepctl.files import open_regular
from stepctl.registry import File


def csv(
    *,
    path: File,
    validation_path: File | None = None,
    target: int | str = -1,
    header: bool = False,
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ",",
    scale: float = 1.0,
    targets: Targets,
    dtype: str,
) -> Sources:
    """One row a sample; column `target` (a number from 0, or with `header` a name) is y, all others are x."""

    def load(file: str) -> InMemory:
        with reading(file, "CSV"):
            with open_regular(file) as opened:
                text = read_bytes(opened).decode("utf-8-sig")
            if not text.strip() or (header and text.strip().count("\n") == 0):
                raise ValueError("it holds no rows")
            column = _column(text, target, header, delimiter)
            table = _parse(text, header, delimiter)
            if not -table.shape[1] <= column < table.shape[1]:
                raise ValueError(f"no column {column}; it has {table.shape[1]}")
        features = np.delete(table, column, axis=1)
        return InMemory(features, table[:, column], origin=file, targets=targets, dtype=dtype, scale=scale)

    return Sources(load(path), load(validation_path) if validation_path else None)


def _parse(text: str, header: bool, delimiter: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    try:
        return np.loadtxt(
            io.StringIO(text), delimiter=delimiter, skiprows=int(header), ndmin=2, comments=None, quotechar='"'
        )
    except ValueError as error:
        reason = str(error).partition(";")[0]  # the rest is advice about loadtxt
        hint = "; if the first line holds names, set data.header: true" if "at row 0" in reason and not header else ""
        raise ValueError(f"{reason}{hint}") from error


def _column(text: str, target: int | str, header: bool, delimiter: str) -> int:
    if isinstance(target, int):
        return target
    if not header:
        raise ValueError(f"data.target is the name {target!r}, but data.header is false; set it to true")
    names = [name.strip() for name in next(reader(io.StringIO(text), delimiter=delimiter), [])]
    if target not in names:
        raise ValueError(f"no column {target!r}; it has {', '.join(names)}")
    return names.index(target)
