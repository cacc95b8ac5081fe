"""The exceptions of stepctl, and the exit code with which each ends a command.

StepctlError                1  an operation failed; existing checkpoints are intact
|- UnreadableError          1  a file cannot be read now; it may be intact
|- TornUpdate               1  an update failed halfway; the state must not be saved
|- NonFiniteError           1  a loss, a gradient or the state holds NaN or infinity
|- UnsupportedSystemError   1  the operating system is neither Linux nor macOS
|- RunMovedError            1  the run directory was renamed, removed or replaced during a write
|- RankError                1  another rank of an MPI job failed or disappeared
|  `- RankUnresponsive     75  a stop was requested while a rank did not respond
|- ConfigError              2  the command line, the config or an argument is wrong
|  `- RunExistsError        2  there is a run where a new one is to start
|- DataError                2  a data file is missing or invalid
|- CheckpointError          3  no usable checkpoint, or a refused one
|- NumericsError            3  --strict-numerics, and this machine computes other bits
|- RunInUseError            4  another process holds the run
`- StoppedAtOnce           75  a second Ctrl-C; published checkpoints are intact

A message is one line (ConfigError: one line for each problem): what happened, where, how to fix it.
"""

import sys
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    NEGATIVE = 1
    USAGE = 2
    NO_CHECKPOINT = 3
    IN_USE = 4
    INTERRUPTED = 130  # Ctrl-C before training began: nothing was changed
    STOPPED = 75  # EX_TEMPFAIL: run it again


def printable(text: str) -> str:
    """Return a text with all control characters escaped, newlines too."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class StepctlError(Exception):
    """Base class: an operation failed; existing checkpoints are intact."""

    exit_code = Exit.NEGATIVE


class UnreadableError(StepctlError):
    """A file or directory cannot be read now; it may be intact (EACCES, EIO, a missing mount)."""


class TornUpdate(StepctlError):
    """An update failed halfway: the arrays belong to no step, and must not be saved."""


class NonFiniteError(StepctlError):
    """A loss, a gradient or the state holds NaN or infinity.

    `on_all_ranks` tells whether every process that shares the step raises it.
    """

    def __init__(self, *message: object, on_all_ranks: bool = False) -> None:
        super().__init__(*message)
        self.on_all_ranks = on_all_ranks


class UnsupportedSystemError(StepctlError):
    """The operating system lacks file locks, signals or durable renames."""


def check_system() -> None:
    """Raise UnsupportedSystemError unless this is a Unix system."""
    try:
        import fcntl  # noqa: F401
    except ImportError as error:
        raise UnsupportedSystemError(
            f"stepctl needs Linux or macOS, and this is {sys.platform}; on Windows it runs in WSL "
            "(https://learn.microsoft.com/windows/wsl/install)"
        ) from error


class RunMovedError(StepctlError):
    """The run directory was renamed, removed or replaced while this process wrote to it."""


class RankError(StepctlError):
    """Another rank failed or disappeared; rank 0 has the state of the last completed step."""


class RankUnresponsive(RankError):
    """A stop was requested while another rank did not respond."""

    exit_code = Exit.STOPPED


class ConfigError(StepctlError):
    """The command line, the config or a component's argument is wrong."""

    exit_code = Exit.USAGE


class RunExistsError(ConfigError):
    """There is a run in the directory where a new one is to start."""


class DataError(StepctlError):
    """A data file is missing or invalid."""

    exit_code = Exit.USAGE


class CheckpointError(StepctlError):
    """No usable checkpoint, or a refused one; `code` is the reason in one word."""

    exit_code = Exit.NO_CHECKPOINT

    def __init__(self, code: str, message: str) -> None:
        super().__init__("\n".join(printable(line) for line in message.split("\n")))
        self.code = code


class NumericsError(StepctlError):
    """This machine computes other bits than the run's, and --strict-numerics was given."""

    exit_code = Exit.NO_CHECKPOINT


class RunInUseError(StepctlError):
    """Another process holds the run."""

    exit_code = Exit.IN_USE


class StoppedAtOnce(StepctlError):
    """A second Ctrl-C abandoned the step in flight; published checkpoints are intact."""

    exit_code = Exit.STOPPED
