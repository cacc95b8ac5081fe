"""Types of command-line arguments: steps, paths and durations."""

import os
import re
from typing import Any

import click
from click.shell_completion import CompletionItem

from stepctl.system import files, store_url
from stepctl.system.files import expand_path

_RUNS = "runs"  # the default folder of runs
_MAX_NUMBER = (1 << 62) - 1


class WholeNumber(click.ParamType):  # type: ignore[type-arg]  # takes no argument before click 8.4
    """A whole number in decimal digits; Python's int() accepts more, such as "1_000"."""

    name = "integer"

    def __init__(self, *, min: int = 0) -> None:
        self._min = min

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value)
        if not re.fullmatch(r"[-+]?\d{1,99}", text, re.ASCII):
            self.fail(f"{text[:60]!r} is not a whole number.", param, ctx)
        number = int(text)
        if not self._min <= number <= _MAX_NUMBER:
            self.fail(f"{number} is not in the range {self._min} to {_MAX_NUMBER}.", param, ctx)
        return number


class Weight(click.ParamType):  # type: ignore[type-arg]
    """A number from 0 to below 1."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < 1:
            self.fail(f"{str(value)[:60]!r} is not a number from 0 to below 1.", param, ctx)
        return number


class Place(click.Path):
    """A valid path, which need not exist. Shells complete files and folders, or folders only.

    With `run`, a shell also completes the name of a run in `runs/` to its path, and offers both where
    runs and other paths begin so; where nothing is typed yet, only the runs.
    """

    def __init__(self, *, folder: bool = False, run: bool = False) -> None:
        super().__init__(file_okay=not folder)
        self._is_run = run

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        runs = _runs_by_name(incomplete) if self._is_run else []
        if not runs:
            return super().shell_complete(ctx, param, incomplete)
        # listed here: where an item has the type "file" or "dir", bash drops all others
        paths = [*runs, *self._paths(incomplete)]
        return [CompletionItem(path) for path in paths]

    def _paths(self, incomplete: str) -> list[str]:
        """Return the entries of the current folder with this prefix, folders with a trailing /; [] for ""."""
        found = []
        for name in _names("."):
            if not incomplete or not name.startswith(incomplete):
                continue
            if os.path.isdir(name):
                found.append(f"{name}/")
            elif self.file_okay:
                found.append(name)
        return found

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text:
            self.fail("it is empty; give a path.", param, ctx)
        try:
            text = expand_path(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        try:
            os.stat(text)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and files.is_unavailable(error):
                raise files.unreadable(text, error) from error
            reason = getattr(error, "strerror", error)
            self.fail(f"{text[:60]!r}: {reason}; give another path.", param, ctx)
        return text


def _runs_by_name(incomplete: str) -> list[str]:
    """Return the paths of the runs in `runs/` whose names have this prefix."""
    names = [name for name in _names(_RUNS) if name.startswith(incomplete)]
    paths = [os.path.join(_RUNS, name) for name in names]
    return [path for path in paths if os.path.exists(os.path.join(path, "ledger.jsonl"))]


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


class Setting(click.ParamType):  # type: ignore[type-arg]
    """KEY=VALUE with the key of a config, or the key alone; shells complete the key."""

    name = "text"

    def __init__(self, *, with_value: bool) -> None:
        self._end = "=" if with_value else ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from stepctl.config.keys import CONFIG_KEYS

        matching = [key for key in CONFIG_KEYS if key.startswith(incomplete)]
        return [CompletionItem(f"{key}{self._end}") for key in matching]


_UNIT_SECONDS = (86400, 3600, 60, 1)  # day, hour, minute, second
_NUMBER = r"(\d+\.?\d*|\.\d+)"
_WITH_UNITS = re.compile(
    rf"(?:{_NUMBER}d)?(?:{_NUMBER}h)?(?:{_NUMBER}m(?:in)?)?(?:{_NUMBER}s?)?", re.ASCII
)
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", re.ASCII)
_MAX_SECONDS = 10**9


class Duration(click.ParamType):  # type: ignore[type-arg]  # takes no argument before click 8.4
    """A time: 90 (seconds), 55m, 1.5h, 1h30m, 2d, or as in Slurm 1:30:00 and 2-00:00:00."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        text = str(value)
        match = _CLOCK.fullmatch(text) or _WITH_UNITS.fullmatch(text)
        seconds = 0.0
        if match is not None:
            for number, unit in zip(match.groups(), _UNIT_SECONDS, strict=True):
                seconds += float(number or 0) * unit
        if not 0 < seconds <= _MAX_SECONDS:
            remedy = "give one such as 90s, 55m, 1.5h, 2d or 1:30:00 (hours:minutes:seconds)"
            message = f"{text[:60]!r} is not a time above 0 s, up to {_MAX_SECONDS} s; {remedy}"
            self.fail(message, param, ctx)
        return seconds


class StoreURL(click.ParamType):  # type: ignore[type-arg]
    """The URL of a mirror."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        problem = store_url.problem(text)
        if problem is not None:
            self.fail(f"the value {problem}.", param, ctx)
        return text
