"""Functions called in a child process that has little memory, little time and no HDF5 plugins.

What is read there may be hostile: whatever it does to the child, the caller gets an answer or one clear error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stepctl import files
from stepctl.errors import CheckpointError, StepctlError, UnreadableError

MEMORY = 256 << 20  # bytes beyond what the imports take
SECONDS = 20.0
_BYTES_PER_SECOND = 20e6  # a slow disk: a large file gets more time
_LARGEST_ANSWER = 1 << 28  # bytes
_UNREADABLE = "unreadable"  # the code of an UnreadableError in an answer


class Sandbox:
    """A child process that answers calls, one at a time; one that it does not survive costs only that call.

    A context manager: the child ends with it.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def call(self, function: str, path: str, *arguments: Any) -> Any:
        """Return what "module:function" of the package returns for a file's path and further JSON arguments.

        A StepctlError of the function is raised here; CheckpointError("timeout" or "crash") if there is no answer.
        """
        size = os.path.getsize(path) if os.path.isfile(path) and not os.path.islink(path) else 0
        seconds = SECONDS + min(size / _BYTES_PER_SECOND, 1e6)
        child = self._start()
        assert child.stdin is not None
        with contextlib.suppress(OSError):
            child.stdin.write(json.dumps([function, path, *arguments]).encode() + b"\n")
            child.stdin.flush()
        line = self._line(child, time.monotonic() + seconds)
        name = os.path.basename(path)
        if line is None:
            self._end()
            raise CheckpointError("timeout", f"{name}: reading it took more than {seconds:.0f} s, and was given up")
        if not line.endswith(b"\n"):
            code = self._end()
            how = signal.Signals(-code).name if code < 0 else f"exit {code}"
            raise CheckpointError("crash", f"{name}: reading it ended the reader ({how})")
        answer = json.loads(line)
        if "error" in answer:
            if answer["code"] == _UNREADABLE:
                raise UnreadableError(answer["error"])
            if answer["code"] is None:
                raise StepctlError(answer["error"])
            raise CheckpointError(answer["code"], answer["error"])
        return answer["result"]

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            environment = os.environ | {"HDF5_PLUGIN_PRELOAD": "::", "OPENBLAS_NUM_THREADS": "1"}
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "stepctl.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        return self._child

    def _line(self, child: subprocess.Popen[bytes], deadline: float) -> bytes | None:
        assert child.stdout is not None
        line = bytearray()
        while not line.endswith(b"\n") and len(line) < _LARGEST_ANSWER:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                return None
            part = os.read(child.stdout.fileno(), 1 << 16)
            if not part:
                break
            line += part
        return bytes(line)

    def _end(self) -> int:
        child, self._child = self._child, None
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


def answer_all() -> None:
    """Answer calls from stdin until it ends: the child's side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the child
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer
    limited = False
    for line in sys.stdin.buffer:
        name, *arguments = json.loads(line)
        module, _, attribute = name.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        if not limited:
            _limit()
            limited = True
        answers.write(json.dumps(_answer(function, arguments)).encode() + b"\n")


def _answer(function: Any, arguments: list[Any]) -> dict[str, Any]:
    try:
        return {"result": function(*arguments)}
    except CheckpointError as error:
        return {"error": str(error), "code": error.code}
    except UnreadableError as error:
        return {"error": str(error), "code": _UNREADABLE}
    except StepctlError as error:
        return {"error": str(error), "code": None}
    except MemoryError:
        return {"error": f"{os.path.basename(arguments[0])}: reading it takes too much memory", "code": "memory"}
    except Exception as error:
        if isinstance(error, OSError) and files.is_unavailable(error):
            return {"error": str(files.unreadable(arguments[0], error)), "code": _UNREADABLE}
        text = " ".join(str(error).split())
        return {"error": f"{os.path.basename(arguments[0])}: {type(error).__name__}: {text}", "code": "unexpected"}


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # not every system tells its size, nor keeps to the limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    answer_all()
