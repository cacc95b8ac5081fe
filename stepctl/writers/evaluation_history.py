"""Evaluation rows in memory, for the decision which checkpoints are the best."""

from collections.abc import Iterable
from typing import final

from stepctl.writers.base import MetricsRow, Writer


@final
class EvaluationHistory(Writer):
    """The evaluation rows of a run without those marked extra; `rows` is step -> row."""

    def __init__(self, rows: Iterable[MetricsRow]) -> None:
        self.rows: dict[int, MetricsRow] = {}
        self.write(rows)

    def write(self, rows: Iterable[MetricsRow]) -> None:
        for row in rows:
            if row.get("kind") == "eval" and not row.get("extra"):
                self.rows[row["step"]] = row
