"""The progress of a segment: a bar on a terminal, in a notebook a bar in the output cell.

Elsewhere there is a line per metrics row, on stderr.
"""

from __future__ import annotations

import contextlib
import html
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from stepctl.errors import StepctlError
from stepctl.hooks.base import Hook
from stepctl.hooks.progress import Progress, ProgressBar, ProgressDisplay, ProgressText
from stepctl.runs.messages import Messages, Say, silent
from stepctl.runs.segment import Segment
from stepctl.system.terminal import is_notebook, is_terminal, say
from stepctl.writers.base import Writer
from stepctl.writers.console import Console

_LINE_SECONDS = 10.0
ShowProgress = Callable[[Progress, str], None]


class Shown(NamedTuple):
    """The writers, hooks and messages that show a segment."""

    writers: list[Writer]
    hooks: list[Hook]
    messages: Messages


@contextlib.contextmanager
def show_progress(segment: Segment, *, quiet: bool, verbose: bool) -> Iterator[Shown]:
    """Show the progress of a segment; release the terminal at the end."""
    report_saved = say if verbose else silent
    if quiet:
        yield Shown([], [], Messages(say, report_saved=report_saved))
        return
    if is_terminal(sys.stderr):
        with _bar(segment, verbose) as progress:
            yield progress
        return
    show_text = _notebook_output() if is_notebook() else None
    if show_text is not None:
        yield _in_notebook(segment, show_text, verbose)
    else:
        console = Console(say, start=segment.start, target=segment.target)
        yield Shown([console], [], _after_rows(segment, say, verbose))


@contextlib.contextmanager
def _bar(segment: Segment, verbose: bool) -> Iterator[Shown]:
    from rich.console import Console as Terminal

    terminal = Terminal(stderr=True, highlight=False, markup=False)
    bar = ProgressBar(terminal, title=segment.directory.name, target=segment.target)

    def print_above_bar(line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            terminal.print(line)

    console = Console(
        print_above_bar, start=segment.start, target=segment.target, kinds=_kinds(verbose)
    )
    try:
        yield Shown([console], [bar], _after_rows(segment, print_above_bar, verbose))
    finally:
        bar.close()


def _in_notebook(segment: Segment, show: ShowProgress, verbose: bool) -> Shown:
    text = ProgressText(show, title=segment.directory.name, target=segment.target)
    console = Console(say, start=segment.start, target=segment.target, kinds=_kinds(verbose))
    return Shown([console], [text], _after_rows(segment, say, verbose))


def display_for(segment: Segment) -> ProgressDisplay:
    """Return the display of a segment that Python code trains: a bar, or a line every 10 seconds."""
    title = segment.directory.name
    target = segment.target
    if is_terminal(sys.stderr):
        from rich.console import Console as Terminal

        terminal = Terminal(stderr=True, highlight=False, markup=False)
        return ProgressBar(terminal, title=title, target=target)
    show = _notebook_output() if is_notebook() else None
    if show is not None:
        return ProgressText(show, title=title, target=target)
    return ProgressText(
        lambda progress, text: say(text), title=title, target=target, refresh=_LINE_SECONDS
    )


def _notebook_output() -> ShowProgress | None:
    """Return a function that shows a bar in the place of the last one; None outside of a notebook."""
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        return None
    handle: Any = None

    def show(progress: Progress, text: str) -> None:
        nonlocal handle
        percent = f"{100 * progress.fraction:.1f}"
        bar = f'<progress value="{percent}" max="100" style="width: 20em"></progress>'
        content = {
            "text/plain": text,
            "text/html": f"<div>{bar} <code>{html.escape(text)}</code></div>",
        }
        if handle is None:
            handle = display(content, raw=True, display_id=True)
        else:
            handle.update(content, raw=True)

    return show


def _kinds(verbose: bool) -> tuple[str, ...]:
    """Return the kinds of rows that are shown beside the progress."""
    return ("train", "eval") if verbose else ("eval",)


def _after_rows(segment: Segment, say: Say, verbose: bool) -> Messages:
    """Return messages that are shown after the rows before them."""

    def show(message: str) -> None:
        with contextlib.suppress(StepctlError):  # the next row raises it again
            segment.assembly.rows.flush()
        say(message)

    return Messages(show, note=show, report_saved=show if verbose else silent)
