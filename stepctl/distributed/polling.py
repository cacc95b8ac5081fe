"""Polling that leaves the core to other processes."""

import os
import time
from collections.abc import Callable

POLL_INTERVAL = 5e-5  # seconds
_POLLS_WITHOUT_SLEEP = 300


def poll_until(is_done: Callable[[], bool], on_poll: Callable[[], None] = lambda: None) -> None:
    """Wait until `is_done()` is true.

    After the first few hundred polls, sleep and call `on_poll` between them.
    """
    polls = 0
    while not is_done():
        polls += 1
        if polls < _POLLS_WITHOUT_SLEEP:
            os.sched_yield()
        else:
            time.sleep(POLL_INTERVAL)
            on_poll()
