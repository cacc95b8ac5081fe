"""Models, data and schedules that fail in one rank of a job."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stepctl.data.base import Source, Sources, Targets
from stepctl.data.digits import digits
from stepctl.errors import DataError, NonFiniteError
from stepctl.models.base import Backward
from stepctl.optimizers.base import UpdateInfo
from stepctl.optimizers.schedules import Schedule
from stepctl.optimizers.sgd import SGD
from stepctl.programs.supervised import Classification
from stepctl.state.arena import Arena, Array, Shape
from stepctl.state.workspace import Workspace
from tests.support.user_model import TwoLayers

ERRORS: dict[str, Callable[[str], BaseException]] = {
    "value": ValueError,
    "data": DataError,
    "not finite": NonFiniteError,
    "exit": SystemExit,
    "interrupt": KeyboardInterrupt,
}


class Fault:
    """Raises at call number `time` in one rank; `hard` ends the process, `stop` stops it."""

    def __init__(self, rank: int, time: int, error: str) -> None:
        self._left = time if os.environ.get("PMI_RANK", "0") == str(rank) else -1
        self._error = error

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            if self._error == "hard":
                os._exit(3)
            if self._error == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
                return
            raise ERRORS[self._error]("this node has had enough")


class Fails(TwoLayers):
    """Fails in forward pass number `time` of training; time 0 is the constructor."""

    def __init__(
        self, *, rank: int, time: int = 5, error: str = "value", input_shape: Shape, n_outputs: int
    ) -> None:
        super().__init__(input_shape=input_shape, n_outputs=n_outputs)
        self._fault = Fault(rank, time or 1, error)
        if time == 0:
            self._fault()

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        if workspace.rng is not None:
            self._fault()
        return super().forward(params, x, workspace)


@dataclass(frozen=True, kw_only=True)
class FailsToUpdate(SGD):
    """Fails in update number `time`, when the arrays may be torn."""

    rank: int
    time: int = 5
    error: str = "value"
    fault: list[Fault] = field(default_factory=list, init=False)

    def coefficients(self, info: UpdateInfo) -> tuple[float, ...]:
        if not self.fault:
            self.fault.append(Fault(self.rank, self.time + 1, self.error))  # the first is a trial's
        self.fault[0]()
        return super().coefficients(info)


@dataclass(frozen=True, kw_only=True)
class FailingRate(Schedule):
    """A learning rate that fails in one rank at a step."""

    rank: int
    step: int

    def after_warmup(self, step: int) -> float:
        if step == self.step and os.environ.get("PMI_RANK", "0") == str(self.rank):
            raise ValueError("this node has had enough")
        return 0.1


class FailingSource(Source):
    """Digits; reading a batch fails when the fault does."""

    def __init__(self, source: Source, fault: Fault) -> None:
        self._source = source
        self._fault = fault
        self.origin = source.origin
        self.n = source.n
        self.sample_shape = source.sample_shape
        self.target_shape = source.target_shape

    def read(self, rows: npt.NDArray[np.int64], x: Array, y: Array) -> None:
        self._fault()
        self._source.read(rows, x, y)

    def slices(self) -> Iterator[tuple[int, Array, Array]]:
        return self._source.slices()

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def failing_digits(
    *, rank: int, time: int = 5, error: str = "data", targets: Targets, dtype: str
) -> Sources:
    """The digits, on a disk that fails in one rank."""
    return Sources(
        FailingSource(digits(targets=targets, dtype=dtype).train, Fault(rank, time, error))
    )


def own_digits(*, targets: Targets, dtype: str) -> Sources:
    """The digits; rank 0 finds its file, the other ranks do not."""
    rank = os.environ["PMI_RANK"]
    found = digits(targets=targets, dtype=dtype)
    if rank != "0":
        np.load(f"digits-{rank}.npz")
    return found


class Whole(Classification):  # type: ignore[misc]
    """A task that does not say that learners' updates alone change its arrays."""

    sliced = False


class Indivisible(Classification):  # type: ignore[misc]
    """A task whose step computes all of a batch by itself."""

    divisible = False
