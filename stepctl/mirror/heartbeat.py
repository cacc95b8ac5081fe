"""The thread that shows other processes that the owner of a mirror is alive."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable
from typing import final

from stepctl.errors import StepctlError
from stepctl.mirror.protocol import Claim, Deposed, beat
from stepctl.mirror.store import ObjectStore
from stepctl.mirror.transition import run


@final
class Heartbeat:
    """Beats until it is stopped, or until another process has taken over, which `report` gets.

    A beat that fails is not repeated: the next upload reports what is wrong with the store.
    """

    def __init__(
        self,
        store: ObjectStore,
        claim: Claim,
        report: Callable[[Deposed], None] = lambda error: None,
    ) -> None:
        """Start the thread."""
        self._report = report
        self._store = store
        self._claim = claim
        self._stopped = threading.Event()
        # a daemon: a request may hang when the process ends
        self._thread = threading.Thread(target=self._run, name="mirror-beat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; a request in flight is not waited for."""
        self._stopped.set()

    def _run(self) -> None:
        # an earlier heartbeat with this claim may have counted from zero
        for count in itertools.count(secrets.randbits(32)):
            try:
                run(beat(self._claim, count), self._store)
            except Deposed as error:
                self._report(error)
                return
            except StepctlError:
                pass
            if self._stopped.wait(self._claim.owner.beat_seconds):
                return
