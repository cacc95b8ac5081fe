"""Rows as lines for people."""

from collections.abc import Callable, Sequence
from typing import final

from stepctl.writers.base import Row, Writer


@final
class Console(Writer):
    """Prints one line a row: global and local step, epoch, metrics."""

    def __init__(
        self, say: Callable[[str], None], *, start: int, target: int, kinds: tuple[str, ...] = ("train", "eval")
    ) -> None:
        self._say, self._start, self._target, self._kinds = say, start, target, kinds

    def write(self, rows: Sequence[Row]) -> None:
        lines = [self._line(row) for row in rows if row["kind"] in self._kinds]
        if lines:
            self._say("\n".join(lines))

    def sync(self) -> None:
        return None

    def close(self) -> None:
        return None

    def _line(self, row: Row) -> str:
        return f"step {row['step']}/{self._target} (local {row['step'] - self._start})  {describe(row)}"


def describe(row: Row) -> str:
    """Return the row's figures in a few words."""
    rate = row.get("samples_per_second")
    parts = ["validation"] if row["kind"] == "eval" else [f"epoch {row['epoch']}"]
    skip = ("step", "kind", "extra", "epoch", "samples_per_second")
    parts += [f"{name} {value:.4g}" for name, value in row.items() if name not in skip]
    parts += [f"{rate:,.0f} samples/s"] if rate is not None else []
    return "  ".join(parts)
