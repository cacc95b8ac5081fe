"""The protocol of a writer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]  # {"step": N, "kind": "train" | "eval", metric: value, ...}


class Writer(ABC):
    """Takes rows, in their order."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Take one row, or several at once."""

    @abstractmethod
    def sync(self) -> None:
        """Make every row so far durable."""

    @abstractmethod
    def close(self) -> None:
        """Take no more rows."""
