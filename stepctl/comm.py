"""Who computes a step: this process alone, or the ranks of an MPI job together.

This is the only file that loads mpi4py, and only where a launcher started this process.

How far it scales. A step of W ranks takes

    T(W) = (C + U) / W + E                                    on one host
    T(W) = C / W + U + 2 (W - 1) / W B / b + 2 (W - 1) a      between hosts

C: forward and backward of the whole batch; U: the update, of which each rank makes its part where all share the state,
and all of it elsewhere; E: the exchange in shared memory; B: bytes of the gradient, of which a reduce-scatter and an
all-gather each move (W - 1) / W; b: a rank's bandwidth; a: the latency of a message.
Measured (tests/bench/ranks.py: an MLP 784-1024-1024-10, batch 256, Adam, one BLAS thread a rank, 2 cores): B = 7.5 MB,
T(1) = 46.7 ms, of which U = 6.3 ms; T(2) = 25.9 ms with E = 1.4 ms. Two ranks are 1.78 times as fast, and not twice,
for E, and as (C + U) / 2 takes 5 % longer: two busy cores share cache and memory. On a network, with a = 5 us:

    ranks                                         8               64              512
    one batch of 256, 10 Gbit/s      21.9 ms, 2.1 x  19.4 ms, 2.4 x  23.5 ms, 2.0 x
    one batch of 256, 100 Gbit/s     12.5 ms, 3.7 x   8.7 ms, 5.3 x  12.7 ms, 3.7 x
    256 samples a rank, 10 Gbit/s     57.3 ms, 82 %   59.1 ms, 79 %   63.8 ms, 73 %
    256 samples a rank, 100 Gbit/s    47.8 ms, 98 %   48.5 ms, 96 %   53.0 ms, 88 %

A batch that stays the same stops gaining at about 8 ranks: U and the exchange do not shrink. A batch that grows with
the ranks scales to hundreds on a fast network, and then the W - 1 messages of each rank count.

What changes then. (1) Between hosts too each rank updates only its part, and parameters are gathered instead of
gradients: the same bytes, U / W, and the optimizer's slots in W parts: 64 ranks at 100 Gbit/s then take 2.5 ms for the
one batch, 18 times as fast. (2) No rank has the whole state any more, so a checkpoint is a file of each rank, and a
manifest of their digests that is published last, and alone is acknowledged. (3) The exchange of the last layers can
begin while the first ones' backward still runs, where the network moves bytes without the cores; between two busy
cores of one host there is nothing to gain: the exchange is 5 % of the step, and takes the cores that backward needs.
(4) Trees of messages, W -> log2 W, and one exchange a host.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import signal
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stepctl import __version__, extras, launcher, process_signals
from stepctl.errors import ConfigError, NonFiniteError
from stepctl.launcher import Launcher, NoAnswer, RankError
from stepctl.problems import in_user_code

if TYPE_CHECKING:
    from stepctl.arena import Arena, Array, TreeSum
    from stepctl.window import Window

_FAILED = -1  # where others tell a signal's number, or 0
_EAGER, _REST = 300, 5e-5  # looks at a request before sleeping, and seconds of sleep between two looks
_AT_ONCE = 1 << 28  # elements that are sent together
_LAST_WORDS = 1.0  # seconds from the last message of a job that fails to its end
_LOST, _ENDING = 1, 2  # the tags of what a rank tells rank 0: that it cannot go on, that it ends as it was told to
_PING, _PONG = 3, 4  # the tags of rank 0's question whether a rank is there, and of the answer

# Seconds that rank 0 waits for the other ranks before it asks who is there, and then for their answers.
ASK_AFTER = 30.0
ANSWER_WITHIN = 2.0

Row = dict[str, float]


class Order(IntEnum):
    """What rank 0 tells the others to do next."""

    END = 0
    PIN = 1
    TRAIN = 2
    STEP = 3


class SaidElsewhere(ConfigError):
    """What is wrong here is wrong in rank 0 too, which says it."""


class Comm:
    """One process, alone: rank 0 of 1. The ranks of a job are a `World`."""

    rank, size = 0, 1

    def mine(self, parts: int) -> range:
        """Return which of so many equal parts of a batch are this rank's: as many for each, one after another."""
        return self._leaves(parts)[self.rank]

    def _leaves(self, parts: int) -> list[range]:
        """Return which of so many parts are each rank's."""
        each = parts // self.size
        return [range(rank * each, (rank + 1) * each) for rank in range(self.size)]

    def refuse_uneven(self, parts: int) -> None:
        """Raise ConfigError if so many shards cannot be dealt out evenly."""
        if parts % self.size:
            allowed = ", ".join(str(n) for n in range(1, parts + 1) if parts % n == 0)
            raise ConfigError(
                f"data.shards: {parts} cannot be dealt out evenly to {self.size} processes; start as many as divide "
                f"it ({allowed}), or start a new run with data.shards a multiple of {self.size}"
            )

    def in_common(self, arenas: Sequence[Arena]) -> bool:
        """Let all ranks have rank 0's arenas in one memory, of which each updates its part.

        False, and nothing is done, where they cannot.
        """
        return False

    def tree_sum(self, layout: Arena, parts: int) -> TreeSum:
        """Return the sum over all parts, to which this rank adds its own; it is whole in `layout.part`."""
        from stepctl.arena import TreeSum

        return TreeSum(layout)

    def gather(self, rows: list[Row], names: Sequence[str], parts: int, error: Exception | None) -> list[Row]:
        """Return every rank's rows in order, `parts` of each with these names; raise in every rank if one failed.

        Where there is an `error`, that is raised, and RankError elsewhere.
        """
        if error is not None:
            raise error
        return rows

    def lead(self, order: Order, value: int = 0) -> None:
        """Tell the other ranks what to do next."""

    def share(self, value: Any = None) -> Any:
        """Return rank 0's value, something small, in every rank."""
        return value

    def collect(self, value: Any) -> list[Any]:
        """Return the ranks' values, something small, in every rank."""
        return [value]

    def copy(self, values: Array) -> None:
        """Give a 1-D array in every rank the values that it has in rank 0."""

    def neighbours(self) -> int:
        """Return how many of the job's processes share this one's cores, itself included."""
        return 1

    def end(self, code: int, *, failed: bool) -> None:
        """Let the other ranks end too, with this exit code; at once if this one failed."""


ALONE = Comm()
_world: list[Comm] = []


def world() -> Comm:
    """Return the job that this process was started in; ConfigError if its MPI cannot be loaded, or is another."""
    if not _world:
        _world.append(_joined() if launcher.is_rank() else ALONE)
    return _world[0]


def end(code: int, *, failed: bool) -> None:
    """End the job that `world` found, if it was asked for."""
    for comm in _world:
        comm.end(code, failed=failed)


def _joined() -> Comm:
    started, started_by = launcher.size(), Launcher()
    if started == 1:
        return ALONE
    try:
        with started_by.needed():
            return _loaded(started, started_by)
    except ConfigError as error:
        if launcher.is_first():
            raise
        raise SaidElsewhere(str(error)) from error


def _loaded(started: int, started_by: Launcher) -> Comm:
    os.environ.setdefault("MPIR_CVAR_SUPPRESS_ABORT_MESSAGE", "1")
    extras.require("mpi4py", "mpi").rc(thread_level="funneled")  # the thread that writes checkpoints calls no MPI
    mpi = extras.require("mpi4py.MPI", "mpi")
    if mpi.COMM_WORLD.size == 1 < started:
        library = mpi.Get_library_version().split("\n")[0].strip("\0 ")
        raise ConfigError(
            f"{started} processes were started together, but to mpi4py's MPI ({library}) each is alone: start them "
            "with the mpiexec of that MPI, or install mpi4py for the MPI of your mpiexec"
        )
    if mpi.COMM_WORLD.size == 1:
        return ALONE
    _refuse_other_software(mpi.COMM_WORLD.allgather(_software()))
    return World(mpi, started_by)


def _software() -> dict[str, str]:
    """Return the versions that must be the same in all ranks, and where this rank runs."""
    from importlib import metadata

    return {
        "stepctl": f"{__version__} (sources {_digest_of_sources()})",
        "Python": platform.python_version(),
        "NumPy": metadata.version("numpy"),
        "host": os.uname().nodename,
    }


def _digest_of_sources() -> str:
    """Return a digest of this package's modules: two copies of one version may differ."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _refuse_other_software(ranks: Sequence[Mapping[str, str]]) -> None:
    """Raise ConfigError if a rank runs another version than rank 0."""
    first = ranks[0]
    for rank, software in enumerate(ranks):
        for name in ("stepctl", "Python", "NumPy"):
            if software[name] != first[name]:
                raise ConfigError(
                    f"rank {rank} on {software['host']} runs {name} {software[name]}, but rank 0 on {first['host']} "
                    f"runs {name} {first[name]}; install the same versions for all ranks"
                )


class World(Comm):
    """The ranks of an MPI job. Rank 0 leads: it says what comes next, and it alone writes files."""

    def __init__(self, mpi: Any, started_by: Launcher) -> None:
        self._mpi, self._comm, self.launcher = mpi, mpi.COMM_WORLD, started_by
        self._torn, self._ended = False, False  # whether rank 0 left a step that others may wait in; whether it is over
        self._orders = self._comm.Dup()  # so that a rank that cannot take part in a step can still follow
        self.rank, self.size = self._comm.rank, self._comm.size
        self._untold: deque[int] = deque()  # signals that came to this rank
        self.agreed: Exception | None = None  # the newest error that every rank knows of
        self._signals: set[int] = set()
        self._windows: list[Any] = []  # every rank's, open
        self._places = self._comm.allgather((os.uname().nodename, os.getpid()))
        self._roll_calls = 0
        self._stop_asked: Callable[[], bool] | None = None
        here = self._comm.Split_type(mpi.COMM_TYPE_SHARED)
        cores = here.allgather(sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None)
        self._neighbours: int = cores.count(cores[here.rank])
        self._one_host = here.size == self.size
        if here.rank == 0:
            launcher.unname_shared_memory()
        here.Free()

    def in_common(self, arenas: Sequence[Arena]) -> bool:
        from stepctl import shared

        memory = self._shared(shared.n_bytes(arenas)) if self._one_host else None
        if memory is not None:
            shared.RankOwners(self._comm, self._wait, self._mpi.IN_PLACE).take(arenas, memory)
        return memory is not None

    def tree_sum(self, layout: Arena, parts: int) -> TreeSum:
        from stepctl import shared
        from stepctl.exchange import MessagedSum, SharedSum

        leaves = self._leaves(parts)
        in_common = isinstance(layout.owners, shared.RankOwners)
        memory = self._shared(self.size * SharedSum.n_bytes(layout, leaves)) if in_common else None
        if memory is None:
            return MessagedSum(layout, self._comm, leaves, self._wait, self._mpi.IN_PLACE)
        return SharedSum(layout, self.rank, leaves, memory)

    def _shared(self, n_bytes: int) -> Array | None:
        from stepctl import shared

        return shared.memory(n_bytes, self.rank, self.share, self.collect)

    def gather(self, rows: list[Row], names: Sequence[str], parts: int, error: Exception | None) -> list[Row]:
        import numpy as np

        table = np.zeros((self.size, 1 + parts * len(names)))
        mine = table[self.rank]
        mine[0] = _FAILED if error is not None else self._signal()
        if error is None:
            mine[1:] = [row[name] for row in rows for name in names]
        self._wait(self._comm.Iallgather(self._mpi.IN_PLACE, table))
        codes = table[:, 0].astype(int).tolist()
        if _FAILED in codes:
            self._fail(codes.index(_FAILED), error)
        self._signals |= {code for code in codes if code}
        return [dict(zip(names, row, strict=True)) for row in table[:, 1:].reshape(-1, len(names)).tolist()]

    def _fail(self, rank: int, error: Exception | None) -> NoReturn:
        """Raise this rank's own error, or what the first rank that has one says of it: of one kind in every rank."""
        words = "" if error is None else f"{error}{in_user_code(error)}"
        mine = (os.uname().nodename, type(error).__name__, words, isinstance(error, NonFiniteError))
        with self._together():
            host, name, text, skippable = self._comm.bcast(mine if rank == self.rank else None, rank)
        told = (NonFiniteError if skippable else RankError)(f"rank {rank} on {host}: {name}: {text}")
        self.agreed = error if error is not None and isinstance(error, NonFiniteError) == skippable else told
        raise self.agreed

    def give_up(self, why: str) -> None:
        """Tell rank 0 that this rank can make no step any more; from now on it may only follow."""
        self._lost = self._comm.isend(why, 0, _LOST)

    def lead(self, order: Order, value: int = 0) -> None:
        self.hear()
        # not NumPy's: it may not be loaded yet
        self._wait(self._orders.Ibcast(array("q", [order, value])))

    def follow(self) -> tuple[Order, int]:
        """Return rank 0's next order; wait for it."""
        told = array("q", [0, 0])
        self._wait(self._orders.Ibcast(told))
        return Order(told[0]), told[1]

    def share(self, value: Any = None) -> Any:
        with self._together():
            return self._comm.bcast(value)

    def collect(self, value: Any) -> list[Any]:
        with self._together():
            found = self._comm.allgather((self._signal(), value))
        self._signals |= {number for number, _ in found if number}
        return [value for _, value in found]

    def window(self, n_bytes: int) -> Window:
        """Return memory of rank 0's, of so many bytes, that every rank can read and write; for all together."""
        from stepctl.window import Window

        size = Window.size(n_bytes) if self.rank == 0 else 0
        with self._together():
            window = self._mpi.Win.Allocate(size, 1, comm=self._comm)
            window.Lock_all()
        self._windows.append(window)
        return Window(window, self._mpi.SUM)

    def copy(self, values: Array) -> None:
        for start in range(0, values.size, _AT_ONCE):
            self._wait(self._comm.Ibcast(values[start : start + _AT_ONCE]))

    def signals(self) -> set[int]:
        """Return the signals that came to other ranks, as far as known, once."""
        heard, self._signals = self._signals, set()
        return heard

    def take_signals(self) -> None:
        """From now on, tell the others of signals that come to this rank."""

        def take(number: int, frame: object) -> None:
            self._untold.append(number)

        answered = process_signals.answered()
        for number in answered:
            process_signals.handle(number, take)
        process_signals.unblock(answered)  # one held since the start is seen now

    def signalled(self) -> bool:
        """Tell whether a signal came to this rank that the others do not know of yet."""
        return bool(self._untold)

    def _signal(self) -> int:
        return self._untold.popleft() if self._untold else 0

    def neighbours(self) -> int:
        return self._neighbours

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Wait for all ranks; in here MPI may wait in its own way."""
        self._wait(self._comm.Ibarrier())
        with self.launcher.needed():
            yield

    def _wait(self, request: Any) -> None:
        """Wait for a request of MPI's, which itself would hold the core.

        RankError in rank 0 if another gave up; in any if the launcher is gone, and with it whoever could end this job.
        """
        if self.rank == 0:
            until(request.Test, RollCall(self).check)
        else:
            until(request.Test, self.hear)

    def stop_waiting_when(self, asked: Callable[[], bool] | None) -> None:
        """In rank 0, end the job if a stop is `asked` for while another rank does not answer."""
        self._stop_asked = asked

    def ask_who_is_there(self) -> int:
        """Send a question to all other ranks; return its number."""
        self._roll_calls += 1
        self._questions = [self._comm.isend(self._roll_calls, rank, _PING) for rank in range(1, self.size)]
        return self._roll_calls

    def answers(self, number: int) -> Iterator[int]:
        """Yield the ranks whose answer to a question has come since the last look."""
        status = self._mpi.Status()
        while self._comm.Iprobe(tag=_PONG, status=status):
            rank = status.Get_source()
            if self._comm.recv(source=rank, tag=_PONG) == number:
                yield rank

    def place(self, rank: int) -> str:
        """Return where a rank runs, in words."""
        host, pid = self._places[rank]
        return f"rank {rank} on {host} (pid {pid})"

    def stop_if_asked(self, missing: str) -> None:
        """Raise NoAnswer if a stop was asked for; RankError if that was before training began."""
        if self._stop_asked is not None and self._stop_asked():
            self._torn = True
            raise NoAnswer(f"stopped while {missing} did not answer; start the job again, with resume")
        if signal.SIGTERM in signal.sigpending():
            self._torn = True
            raise RankError(f"stopped while {missing} did not answer; start the job again")

    def hear(self) -> None:
        """Answer rank 0, or in it take what others have sent; RankError if one gave up or the launcher is gone."""
        self.launcher.check()
        if self.rank and self._comm.Iprobe(source=0, tag=_PING):
            number = self._comm.recv(source=0, tag=_PING)
            self._answer = self._comm.isend(number, 0, _PONG)
        if self.rank == 0 and self._comm.Iprobe(tag=_LOST):
            self._torn = True
            raise RankError(self._comm.recv(tag=_LOST))

    def end(self, code: int, *, failed: bool) -> None:
        if self._ended:
            return
        self._ended = True
        self.launcher.end_together()
        if sys.stderr is not None:
            with contextlib.suppress(OSError):
                sys.stderr.flush()  # now: the launcher needs a moment to pass it on before an abort
        all_end = self._all_end(code, failed)
        if self.launcher.is_gone():
            os._exit(code)  # MPI would wait for it
        if all_end:
            for window in self._windows:
                window.Unlock_all()
                window.Free()
            return
        # what MPI says of an end such as this is no news: the error was told
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        self._comm.Abort(code)

    def _all_end(self, code: int, failed: bool) -> bool:
        """Tell whether all ranks end: one that failed waits a moment for the others, which may be inside a step.

        In that moment the launcher passes on what was said, which it forgets when it is told to abort.
        """
        if self.launcher.is_gone():
            return False
        if self.rank and not failed:
            self._comm.send(None, 0, _ENDING)
            return True
        if self.rank == 0:
            self._orders.Ibcast(array("q", [Order.END, code])).Wait()
        awaited, end = self.size - 1, time.monotonic() + _LAST_WORDS
        while not failed or time.monotonic() < end:
            if self.launcher.is_gone():
                return False
            if self.rank == 0 and self._comm.Iprobe(tag=_ENDING):
                self._comm.recv(tag=_ENDING)
                awaited -= 1
            if awaited == 0 and not self._torn:
                return True
            time.sleep(_REST)
        return False


class RollCall:
    """One wait of rank 0 for the other ranks: where it takes long, the ranks that do not answer are named.

    A rank that waits too answers; one that is stopped, hangs or still computes does not.
    """

    def __init__(self, world: World, clock: Callable[[], float] = time.monotonic) -> None:
        self._world, self._clock = world, clock
        self._began = clock()
        self._asked_at = math.inf
        self._number = 0
        self._silent: set[int] = set()
        self._said = False

    def check(self) -> None:
        """Take what the other ranks have sent; ask them, or name those that do not answer, where it is time."""
        self._world.hear()
        now = self._clock()
        if self._silent:
            self._silent.difference_update(self._world.answers(self._number))
        if not self._silent:
            if now - self._began >= ASK_AFTER:
                self._began = self._asked_at = now
                self._number = self._world.ask_who_is_there()
                self._silent = set(range(1, self._world.size))
            return
        if now - self._asked_at < ANSWER_WITHIN:
            return
        missing = ", ".join(self._world.place(rank) for rank in sorted(self._silent))
        if not self._said:
            self._said = True
            with contextlib.suppress(OSError):
                sys.stderr.write(
                    f"waiting for {missing}: no answer for {ASK_AFTER:.0f} s; let it go on, or end the job with "
                    f"SIGTERM to pid {os.getpid()}\n"
                )
                sys.stderr.flush()
        self._world.stop_if_asked(missing)


def until(ready: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait, and leave the core to others that need it; if it takes long, `meanwhile` is called now and then."""
    looks = 0
    while not ready():
        looks += 1
        if looks < _EAGER:
            os.sched_yield()
        else:
            time.sleep(_REST)
            meanwhile()
