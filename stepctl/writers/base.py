"""The protocol of a writer."""

from abc import ABC, abstractmethod
from typing import Any

Row = dict[str, Any]  # {"step": N, "kind": "train" | "eval", metric: value, ...}


class Writer(ABC):
    """Takes rows, one at a time."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """Take one row."""

    @abstractmethod
    def sync(self) -> None:
        """Make every row so far durable."""

    @abstractmethod
    def close(self) -> None:
        """Take no more rows."""
