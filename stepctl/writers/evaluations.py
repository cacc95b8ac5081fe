"""Evaluation rows, kept in memory."""

from collections.abc import Iterable, Sequence
from typing import final

from stepctl.writers.base import Row, Writer


@final
class Evaluations(Writer):
    """Keeps the evaluation row of each step that has one on the grid; `rows` is step -> row."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows: dict[int, Row] = {}
        self.write([*rows])

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.get("kind") == "eval" and not row.get("extra"):
                self.rows[row["step"]] = row

    def sync(self) -> None:
        return None

    def close(self) -> None:
        return None
