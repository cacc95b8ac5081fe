"""Every error that stepctl raises on purpose, and the exit code each one ends the command with.

StepctlError                1  an operation failed; every checkpoint stands
|- UnreadableError          1  a file cannot be read now; whether it is whole is not known
|- TornUpdate               1  an update failed half way: the state is that of no step
|- NonFiniteError           1  a loss, gradient or state that is no number; what was finite is saved
|- UnsupportedSystemError   1  neither Linux nor macOS
|- RunMovedError            1  the run's directory was renamed, removed or replaced while it was written
|- ConfigError              2  the command line, the config or a component's argument is wrong
|  `- RunExistsError        2  a run is to be started where there is one already
|- DataError                2  a data file is missing, or holds what it should not
|- CheckpointError          3  no usable checkpoint, or a refused one
|- NumericsError            3  --strict-numerics, and this machine cannot give the same bits
|- RunInUseError            4  another process holds the run
`- StoppedAtOnce           75  a second Ctrl-C: what was published stands

A message says what, where, why and how to mend it, in one line (ConfigError: one line per problem).
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
    """Return a text with all escaped that a terminal might obey, the ends of lines too."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class StepctlError(Exception):
    """Base of all: an operation failed; every checkpoint stands."""

    exit_code = Exit.NEGATIVE


class UnreadableError(StepctlError):
    """A file or directory cannot be read now (EACCES, EIO, ESTALE, a disk that is not mounted); it may be intact."""


class TornUpdate(StepctlError):
    """An update failed half way: the arrays are those of no step, and must not be saved."""


class NonFiniteError(StepctlError):
    """A loss, a gradient or a state holds NaN or infinity."""

    by_all = False  # whether every process that shares the step raises it


class UnsupportedSystemError(StepctlError):
    """The operating system lacks what runs need: locks, signals, durable renames."""


def check_system() -> None:
    """Raise UnsupportedSystemError unless the operating system is of the Unix family."""
    try:
        import fcntl  # noqa: F401
    except ImportError as error:
        raise UnsupportedSystemError(
            f"stepctl needs Linux or macOS, and this is {sys.platform}; on Windows it runs in WSL "
            "(https://learn.microsoft.com/windows/wsl/install)"
        ) from error


class RunMovedError(StepctlError):
    """The run's directory was renamed, removed or replaced while this process wrote in it."""


class ConfigError(StepctlError):
    """The command line, the config or a component's argument is wrong."""

    exit_code = Exit.USAGE


class RunExistsError(ConfigError):
    """A run is to be started where there is one already."""


class DataError(StepctlError):
    """A data file is missing, or holds what it should not."""

    exit_code = Exit.USAGE


class CheckpointError(StepctlError):
    """No usable checkpoint, or a refused one. `code` names the reason in one word."""

    exit_code = Exit.NO_CHECKPOINT

    def __init__(self, code: str, message: str) -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))
        self.code = code


class NumericsError(StepctlError):
    """This machine cannot give the bits that the run was started with, and they were demanded."""

    exit_code = Exit.NO_CHECKPOINT


class RunInUseError(StepctlError):
    """Another process holds the run."""

    exit_code = Exit.IN_USE


class StoppedAtOnce(StepctlError):
    """A second Ctrl-C: the step in flight was given up; what was published stands."""

    exit_code = Exit.STOPPED
