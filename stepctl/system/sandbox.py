"""Function calls in a child process with limited memory and time, and without HDF5 plugins.

    with Sandbox() as sandbox:
        facts = sandbox.call(check, path)

The child reads files that may be hostile. Whatever they do to it, the caller gets a result or one
clear error.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, Self, TypeVar

from stepctl.errors import CheckpointError, StepctlError, UnreadableError
from stepctl.system import files

# Bytes beyond those of the child with HDF5. Modules that a function imports take 20 MB of them.
MEMORY = 280 << 20
SECONDS = 20.0
_BYTES_PER_SECOND = 20e6  # of a slow disk; a large file gets more time
_MAX_ANSWER_BYTES = 1 << 28
_UNREADABLE = "unreadable"  # the code of an UnreadableError in an answer

T = TypeVar("T")


class Sandbox:
    """A child process that runs one call at a time, started again after a call that ended it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def call(self, function: Callable[..., T], path: str, *arguments: Any) -> T:
        """Call a module's function with the path of a file and further JSON arguments.

        The result is a JSON value. A StepctlError of the function is raised here;
        CheckpointError("timeout" or "crash") if there is no answer.
        """
        name = os.path.basename(path)
        seconds = _time_limit(path)
        child = self._start()
        assert child.stdin is not None
        request = [function.__module__, function.__qualname__, path, *arguments]
        with contextlib.suppress(OSError):  # a dead child: there will be no answer
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
        line = self._read_line(child, time.monotonic() + seconds)
        if line is None:
            self._end()
            raise CheckpointError(
                "timeout", f"{name}: reading it took more than {seconds:.0f} s and was aborted"
            )
        if not line.endswith(b"\n"):
            code = self._end()
            how = signal.Signals(-code).name if code < 0 else f"exit {code}"
            raise CheckpointError("crash", f"{name}: reading it crashed the reader process ({how})")
        answer = json.loads(line)
        if "error" in answer:
            if answer["code"] == _UNREADABLE:
                raise UnreadableError(answer["error"])
            if answer["code"] is None:
                raise StepctlError(answer["error"])
            raise CheckpointError(answer["code"], answer["error"])
        result: T = answer["result"]
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            environment = os.environ | {
                "HDF5_PLUGIN_PRELOAD": "::",  # HDF5's value for: load no plugins
                "OPENBLAS_NUM_THREADS": "1",
            }
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "stepctl.system.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        return self._child

    def _read_line(self, child: subprocess.Popen[bytes], deadline: float) -> bytes | None:
        """Return a line, cut short if the child ended; None after the deadline."""
        assert child.stdout is not None
        line = bytearray()
        while not line.endswith(b"\n") and len(line) < _MAX_ANSWER_BYTES:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            ready, _, _ = select.select([child.stdout], [], [], remaining)
            if not ready:
                return None
            part = os.read(child.stdout.fileno(), 1 << 16)
            if not part:
                break
            line += part
        return bytes(line)

    def _end(self) -> int:
        """End the child, and return its exit code."""
        child = self._child
        self._child = None
        if child is None:
            return 0
        if child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.5)
        child.kill()
        if child.stdout is not None:
            child.stdout.close()
        return child.wait()


def _time_limit(path: str) -> float:
    """Return the seconds that a call may take."""
    size = 0
    if os.path.isfile(path) and not os.path.islink(path):
        size = os.path.getsize(path)
    return SECONDS + min(size / _BYTES_PER_SECOND, 1e6)


# --- in the child


def serve_calls() -> None:
    """Run the calls that arrive on stdin until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the child
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # keeps the output of libraries out of the answers
    import h5py  # noqa: F401  # before the memory is limited

    for line in sys.stdin.buffer:
        module, name, *arguments = json.loads(line)
        function = attrgetter(name)(importlib.import_module(module))
        _limit_memory()
        answers.write(json.dumps(_answer(function, arguments)).encode() + b"\n")


def _answer(function: Any, arguments: list[Any]) -> dict[str, Any]:
    """Return {"result": ...}, or {"error": message, "code": code of a CheckpointError}."""
    name = os.path.basename(arguments[0])
    try:
        return {"result": function(*arguments)}
    except CheckpointError as error:
        return {"error": str(error), "code": error.code}
    except UnreadableError as error:
        return {"error": str(error), "code": _UNREADABLE}
    except StepctlError as error:
        return {"error": str(error), "code": None}
    except MemoryError:
        return {"error": f"{name}: reading it takes too much memory", "code": "memory"}
    except Exception as error:
        if isinstance(error, OSError) and files.is_unavailable(error):
            return {"error": str(files.unreadable(arguments[0], error)), "code": _UNREADABLE}
        text = " ".join(str(error).split())
        return {"error": f"{name}: {type(error).__name__}: {text}", "code": "unexpected"}


@functools.cache
def _limit_memory() -> None:
    """Limit the memory of this process, once."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not every system reports the size of a process, or enforces the limit.
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    serve_calls()
