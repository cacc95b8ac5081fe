"""Publishing a segment's checkpoints: first the file, then its ledger line, then pruning."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stepctl.checkpoint import codec, names
from stepctl.checkpoint.retention import Retention
from stepctl.checkpoint.store import Store
from stepctl.errors import NonFiniteError
from stepctl.rundir.directory import RunDirectory
from stepctl.state.train_state import TrainState
from stepctl.state.values import CapturedState
from stepctl.training.assembly import Assembly
from stepctl.writers.evaluation_history import EvaluationHistory

if TYPE_CHECKING:
    from stepctl.runs.mirroring import Mirroring


class _Published(NamedTuple):
    """A durable checkpoint, and the steps that are pruned once the ledger acknowledges it."""

    step: int
    file: str
    sha256: str
    pruned: list[int]
    series: dict[str, int]  # number of rows of each

    def facts(self) -> dict[str, Any]:
        """Return the keys of the ledger's line."""
        facts = self._asdict()
        if not self.series:
            del facts["series"]
        return facts


class _StateDigest(NamedTuple):
    """A program's state in short."""

    step: int
    values: str
    arrays: dict[str, tuple[str, tuple[int, ...], int]]  # dtype, shape, checksum


def _digest(step: int, captured: CapturedState) -> _StateDigest:
    arrays = {
        path: (array.dtype.str, array.shape, zlib.crc32(array.ravel(order="K").view(np.uint8).data))
        for path, array in captured.arrays.items()
    }
    return _StateDigest(step, captured.values, arrays)


class Publisher:
    """Publishes states as checkpoints of a run.

    `protected` are steps with forks, and `passed_over` steps whose files a resume did not
    use: neither is pruned. `newest_step` is the step of the newest good checkpoint, None before the
    first. `mirroring` is offered each acknowledged checkpoint.
    """

    def __init__(
        self,
        directory: RunDirectory,
        store: Store,
        assembly: Assembly,
        *,
        run_id: str,
        evaluations: EvaluationHistory,
        protected: Collection[int],
        passed_over: Collection[int],
        newest_step: int | None,
        mirroring: Mirroring | None = None,
    ) -> None:
        self.newest_step = newest_step
        self._directory = directory
        self._store = store
        self._texts = {
            "run": directory.name,
            "run_id": run_id,
            "config": assembly.config.text,
            "numerics": json.dumps(assembly.numerics),
        }
        self._series = assembly.series
        # files that a resume passed over are damaged: they stay, and do not count as kept
        good = [step for step in store.steps() if step not in passed_over]
        self._retention = Retention(good, assembly.config.checkpoint, evaluations.rows, protected)
        self._unacknowledged = deque[_Published]()
        self._saved = deque[str]()
        self._warnings = deque[str]()
        self._mirroring = mirroring
        self._previous_state: _StateDigest | None = None  # of a program
        self._has_warned = False

    def publish(self, state: TrainState, abandoned: Callable[[], bool]) -> None:
        """Make a checkpoint durable, acknowledge it and prune; NonFiniteError on NaN or infinity.

        A checkpoint whose ledger line could not be written, because the disk was full, is acknowledged
        by the next call.
        """
        step = state.counters.global_step
        bad = state.first_non_finite()
        if bad is not None:
            raise NonFiniteError(f"step {step}: /{bad} holds NaN or infinity; not saved")
        if all(published.step != step for published in self._unacknowledged):
            if isinstance(state.program, CapturedState) and not self._has_warned:
                self._compare_with_previous(step, state.program)
            image = codec.encode(state, **self._texts)
            sha256 = self._store.publish(step, image, abandoned)
            counts = self._series.counts(step)
            pruned = self._retention.add(step)
            published = _Published(step, names.file_name(step), sha256, pruned, counts)
            self._unacknowledged.append(published)
        while self._unacknowledged:
            published = self._unacknowledged[0]
            self._directory.append_ledger("checkpoint", **published.facts())
            self._unacknowledged.popleft()
            self.newest_step = published.step
            self._saved.append(published.file)
            if self._mirroring is not None:
                self._mirroring.offer(published.step, published.sha256)
            self._store.remove(published.pruned)

    def _compare_with_previous(self, step: int, captured: CapturedState) -> None:
        """Warn once if a program's state equals the state in the previous checkpoint."""
        digest = _digest(step, captured)
        previous = self._previous_state
        self._previous_state = digest
        if previous is None or digest[1:] != previous[1:]:
            return
        self._has_warned = True
        self._warnings.append(
            f"warning: the states of steps {previous.step} and {step} are identical; if the steps "
            "between them did change something, it is outside of the state, and a resume would lose "
            "it: put it into the state"
        )

    def take_warnings(self) -> list[str]:
        """Return the warnings since the last call."""
        return [self._warnings.popleft() for _ in range(len(self._warnings))]

    def take_saved(self) -> list[str]:
        """Return the names of the checkpoints that were acknowledged since the last call."""
        return [self._saved.popleft() for _ in range(len(self._saved))]
