"""Rows to several writers."""

from typing import final

from stepctl.writers.base import Row, Writer


@final
class Rows(Writer):
    """Hands every row to each of its writers, which may be others in each segment."""

    def __init__(self) -> None:
        self.writers: list[Writer] = []

    def write(self, row: Row) -> None:
        for writer in self.writers:
            writer.write(row)

    def sync(self) -> None:
        for writer in self.writers:
            writer.sync()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
