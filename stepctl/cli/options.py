"""Options that several commands take, and what they have in common when they run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from stepctl import files, interrupt, process_signals
from stepctl.comm import Comm, Order, World, world
from stepctl.errors import ConfigError, Exit, printable
from stepctl.files import expanded
from stepctl.shell import command

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from stepctl.segment import Segment

WHOLE_PROCESS = object()  # the context's obj where the command is all that its process does
F = TypeVar("F", bound=Callable[..., Any])


def set_option(function: F) -> F:
    """Add --set."""
    return click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set a config key, such as data.batch_size=32."
    )(function)


def target_options(function: F) -> F:
    """Add --num-steps and --last-step."""
    steps = Steps(min=0, max=(1 << 62) - 1)
    function = click.option("--last-step", type=steps, metavar="N", help="Stop at this global step.")(function)
    return click.option("--num-steps", type=steps, metavar="N", help="Stop after this many steps from here.")(function)


class Steps(click.IntRange):
    """A whole number as a config would have it: Python's int() takes more."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"[-+]?\d+", value, re.ASCII):
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        return super().convert(value, param, ctx)


class Place(click.ParamType):  # type: ignore[type-arg]  # it takes no type argument before click 8.4
    """A path that the system can have, be something there or not; shells complete it to files, or to folders alone."""

    name = "path"

    def __init__(self, *, folder: bool = False) -> None:
        self._kind = "dir" if folder else "file"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave it to the shell, which completes ~ and variables too."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type=self._kind)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text:
            self.fail("it is empty; give a path.", param, ctx)
        try:
            text = expanded(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        try:
            os.stat(text)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and files.is_unavailable(error):
                raise files.unreadable(text, error) from error
            self.fail(f"{text[:60]!r}: {getattr(error, 'strerror', error)}; give another path.", param, ctx)
        return text


_UNITS = (86400, 3600, 60, 1)  # seconds of a day, an hour, a minute, a second
_NUMBER = r"(\d+\.?\d*|\.\d+)"
_WITH_UNITS = re.compile(rf"(?:{_NUMBER}d)?(?:{_NUMBER}h)?(?:{_NUMBER}m(?:in)?)?(?:{_NUMBER}s?)?", re.ASCII)
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", re.ASCII)
_LONGEST_TIME = 10**9  # seconds


class Duration(click.ParamType):  # type: ignore[type-arg]  # as above
    """A time such as 90s, 55m, 1.5h, 1h30m or 2d, or 1:30:00 and 2-00:00:00 as Slurm has it; a number is seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        match = _CLOCK.fullmatch(text) or _WITH_UNITS.fullmatch(text)
        parts = [] if match is None else [float(part or 0) for part in match.groups()]
        seconds = sum(part * unit for part, unit in zip(parts, _UNITS, strict=False))
        if not 0 < seconds <= _LONGEST_TIME:
            remedy = "give one such as 90s, 55m, 1.5h, 2d or 1:30:00 (hours:minutes:seconds)"
            self.fail(f"{text[:60]!r} is no time above 0 and up to {_LONGEST_TIME} s; {remedy}", param, ctx)
        return seconds


def max_time_option(function: F) -> F:
    """Add --max-time."""
    return click.option(
        "--max-time",
        type=Duration(),
        metavar="TIME",
        help="Stop after this time (55m, 1.5h, 1:30:00), with exit code 75.",
    )(function)


def talk_options(function: F) -> F:
    """Add --quiet and --verbose."""
    function = click.option("-v", "--verbose", is_flag=True, help="Also say what is saved, and every row.")(function)
    return click.option("-q", "--quiet", is_flag=True, help="No progress, only warnings and errors.")(function)


def stop_section(num_steps: int | None, last_step: int | None) -> dict[str, int] | None:
    """Return the stop section that the options ask for; ConfigError if both do."""
    if num_steps is not None and last_step is not None:
        raise ConfigError("--num-steps and --last-step: give one (steps from here, or an absolute step)")
    if num_steps is not None:
        return {"num_steps": num_steps}
    return {"last_step": last_step} if last_step is not None else None


def stop_assignments(num_steps: int | None, last_step: int | None) -> tuple[str, ...]:
    """Return what --set would have to say for the options; ConfigError if both are given."""
    asked = stop_section(num_steps, last_step)
    keys = ("last_step", "num_steps") if asked else ()
    return tuple(f"stop.{key}={(asked or {}).get(key, 'null')}" for key in keys)


def hold_signals() -> None:
    """Keep the signals that stop or save pending until training can answer them; Ctrl-C still ends the build-up.

    `refuse_interrupted` comes at its end: where Python calls back from C, it drops what a handler raises.
    """
    answered = process_signals.answered()
    handlers = {number: signal.getsignal(number) for number in answered}
    held = set(answered) - {signal.SIGINT}
    mask = process_signals.block(held)
    interrupt.watch()

    def restore() -> None:
        process_signals.unblock(held - mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        interrupt.forget()

    root = click.get_current_context().find_root()
    if root.obj is not WHOLE_PROCESS:  # which has nothing left to do but to end
        root.call_on_close(restore)


def refuse_interrupted() -> None:
    """Raise KeyboardInterrupt if there was one since the command was started."""
    if interrupt.received():
        raise KeyboardInterrupt


def joined() -> Comm:
    """Return the job that this process belongs to; one that is not its rank 0 follows that, and ends with it."""
    comm = world()
    if isinstance(comm, World) and comm.rank:
        raise click.exceptions.Exit(_follow(comm))
    return comm


def _follow(comm: World) -> int:
    comm.take_signals()
    order, value = comm.follow()
    if order == Order.END:
        return value
    from stepctl import numerics

    numerics.pin(value, comm.share())
    numerics.load_numpy()
    from stepctl import ranks

    return ranks.follow(comm)


def pin(comm: Comm, asked: tuple[object, object]) -> None:
    """Pin BLAS threads and kernel in every rank of the job, before NumPy is loaded."""
    from stepctl import numerics

    threads, kernel = asked
    count = numerics.pin(threads, kernel, neighbours=comm.neighbours())
    comm.lead(Order.PIN, count)
    comm.share(kernel if isinstance(kernel, str) else None)
    numerics.load_numpy()


def say(message: str) -> None:
    """Print a message to stderr; with nobody left to read it, training goes on all the same."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write("".join(f"{printable(line)}\n" for line in message.split("\n")))


def train_segment(segment: Segment, *, began: float, max_time: float | None, quiet: bool, verbose: bool) -> NoReturn:
    """Train to the segment's target, show the progress, and exit with 0 or 75; `max_time` counts from `began`."""
    from stepctl.cli.display import shown
    from stepctl.hooks.stop import TimeLimit

    run = segment.directory.path
    if (remedy := segment.nothing_to_do()) is not None:
        say(f"{run}: at global step {segment.start}, target {segment.target}: nothing to do ({remedy})")
        raise click.exceptions.Exit(Exit.DONE)
    refuse_interrupted()
    if not quiet:
        say(f"{run}: global step {segment.start} to {segment.target}, from {segment.restored or 'a fresh start'}")
    with shown(segment, quiet=quiet, verbose=verbose) as (writers, hooks):
        outcome = segment.train(writers, hooks, [TimeLimit(max_time, began)] if max_time else [])
    if outcome.waits and not quiet:
        seconds, saves = outcome.wait_seconds, outcome.saves
        say(f"{run}: training waited {seconds:.1f} s in all, at {outcome.waits} of {saves} saves, for the save before")
    if outcome.reason.done and outcome.step >= segment.target:
        if not quiet:
            say(f"{run}: done at global step {outcome.step} (local {outcome.step - outcome.start})")
        raise click.exceptions.Exit(Exit.DONE)
    remedy = outcome.reason.remedy or f"go on with: {command('resume', run)}"
    say(f"{run}: stopped at global step {outcome.step} ({outcome.reason.text}); {remedy}")
    raise click.exceptions.Exit(Exit.DONE if outcome.reason.done else Exit.STOPPED)
