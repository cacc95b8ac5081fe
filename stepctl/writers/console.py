"""Metrics rows as readable lines."""

from collections.abc import Callable, Sequence
from typing import final

from stepctl.system.text import local_step_note
from stepctl.writers.base import ROW_KEYS, MetricsRow, Writer


@final
class Console(Writer):
    """Prints one line per row: global step, local step if it differs, epoch, metrics, rate."""

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        start: int,
        target: int,
        kinds: tuple[str, ...] = ("train", "eval"),
    ) -> None:
        self._say = say
        self._start = start
        self._target = target
        self._kinds = kinds

    def write(self, rows: Sequence[MetricsRow]) -> None:
        lines = [self._line(row) for row in rows if row["kind"] in self._kinds]
        if lines:
            self._say("\n".join(lines))

    def _line(self, row: MetricsRow) -> str:
        step = row["step"]
        parts = []
        if row["kind"] == "eval":
            parts.append("validation")
        elif "epoch" in row:
            parts.append(f"epoch {row['epoch']}")
        parts += [f"{name} {value:.4g}" for name, value in row.items() if name not in ROW_KEYS]
        for unit in ("samples", "steps"):
            rate = row.get(f"{unit}_per_second")
            if rate is not None:
                parts.append(f"{rate:,.0f} {unit}/s")
        note = local_step_note(step, self._start)
        return f"step {step}/{self._target}{note}  {'  '.join(parts)}"
