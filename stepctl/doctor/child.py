"""Function calls in child processes, where a library that crashes or hangs loses one answer."""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

Facts = dict[str, Any]  # JSON values by name

CALL_SECONDS = 10.0  # only a call that hangs takes as long
# the child takes over the parent's module path before it imports anything from it
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from stepctl.doctor.child import answer
answer(*sys.argv[2:])
"""


class ChildError(Exception):
    """The function raised an error, ended its process, or did not return in time."""


def call(
    function: Callable[..., Facts],
    *arguments: str,
    keep_descriptors: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Facts:
    """Call a function of a module in a child process; return its result.

    `keep_descriptors` lets the child inherit all open files; the variables in `environment` are
    added to this process's. Raises ChildError.
    """
    command = [sys.executable, "-P"]
    if sys.flags.no_site:
        command.append("-S")
    command += ["-c", _PROGRAM, json.dumps(sys.path), function.__module__, function.__qualname__]
    with subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        close_fds=not keep_descriptors,
        start_new_session=True,
    ) as child:
        try:
            output, errors = child.communicate(timeout=CALL_SECONDS)
        except subprocess.TimeoutExpired as error:
            os.killpg(child.pid, signal.SIGKILL)  # with its own children
            raise ChildError(f"no answer in {CALL_SECONDS:.0f} s") from error
    try:
        reply = json.loads(output.splitlines()[-1])  # a library may have printed before
    except (ValueError, IndexError) as error:
        raise ChildError(_describe_exit(child.returncode, errors)) from error
    if "error" in reply:
        raise ChildError(reply["error"])
    result: Facts = reply["result"]
    return result


def answer(module: str, name: str, *arguments: str) -> None:
    """Call a function and print its result, or its error, as the last line: the child's side."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no core file
    try:
        function = attrgetter(name)(importlib.import_module(module))
        reply = {"result": function(*arguments)}
    except BaseException as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(reply))


def _describe_exit(code: int, errors: bytes) -> str:
    text = f"exit code {code}"
    if code < 0:
        text = f"ended by {signal.Signals(-code).name}"
    lines = errors.decode(errors="replace").splitlines()
    printed = [line.strip() for line in lines if line.strip()]
    if printed:
        text += f": {printed[-1]}"
    return text
