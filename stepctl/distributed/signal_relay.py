"""Signals that arrive at one rank and must reach rank 0."""

from collections import deque
from collections.abc import Iterable

from stepctl.system import process_signals


class SignalRelay:
    """Queues this rank's signals for the next collective call, and collects the other ranks'."""

    def __init__(self) -> None:
        self._pending: deque[int] = deque()
        self._received: set[int] = set()

    def install_handlers(self) -> None:
        """Queue the signals that arrive from now on, instead of exiting."""

        def enqueue(number: int, frame: object) -> None:
            self._pending.append(number)

        numbers = process_signals.not_ignored()
        for number in numbers:
            process_signals.set_handler(number, enqueue)
        process_signals.unblock(numbers)  # delivers a signal that was blocked since the start

    @property
    def has_pending(self) -> bool:
        """Whether a signal waits to be sent."""
        return bool(self._pending)

    def pop_pending(self) -> int:
        """Remove and return the oldest signal that waits to be sent; 0 if there is none."""
        if self._pending:
            return self._pending.popleft()
        return 0

    def receive(self, numbers: Iterable[int]) -> None:
        """Collect the signals that the ranks sent; 0 is no signal."""
        self._received.update(number for number in numbers if number)

    def pop_received(self) -> set[int]:
        """Remove and return the signals that the ranks have sent."""
        received = self._received
        self._received = set()
        return received
