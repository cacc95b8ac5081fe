"""The progress of a segment: a bar on a terminal, in a notebook a line that is replaced.

Elsewhere there is a line per metrics row, on stderr.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from stepctl.errors import StepctlError
from stepctl.hooks.base import Hook
from stepctl.runs.messages import Messages, Say, silent
from stepctl.runs.segment import Segment
from stepctl.system.terminal import is_notebook, is_terminal, say
from stepctl.writers.base import Writer
from stepctl.writers.console import Console


class Progress(NamedTuple):
    """The writers, hooks and messages that show a segment."""

    writers: list[Writer]
    hooks: list[Hook]
    messages: Messages


@contextlib.contextmanager
def show_progress(segment: Segment, *, quiet: bool, verbose: bool) -> Iterator[Progress]:
    """Show the progress of a segment; release the terminal at the end."""
    report_saved = say if verbose else silent
    if quiet:
        yield Progress([], [], Messages(say, report_saved=report_saved))
        return
    if is_terminal(sys.stderr):
        with _bar(segment, verbose) as progress:
            yield progress
        return
    show_text = _notebook_line() if is_notebook() else None
    if show_text is not None:
        yield _line(segment, show_text, verbose)
    else:
        console = Console(say, start=segment.start, target=segment.target)
        yield Progress([console], [], _after_rows(segment, say, verbose))


@contextlib.contextmanager
def _bar(segment: Segment, verbose: bool) -> Iterator[Progress]:
    from rich.console import Console as Terminal

    from stepctl.hooks.progress import ProgressBar

    terminal = Terminal(stderr=True, highlight=False, markup=False)
    bar = ProgressBar(terminal, title=segment.directory.name, target=segment.target)

    def print_above_bar(line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            terminal.print(line)

    console = Console(
        print_above_bar, start=segment.start, target=segment.target, kinds=_kinds(verbose)
    )
    try:
        yield Progress([console], [bar], _after_rows(segment, print_above_bar, verbose))
    finally:
        bar.close()


def _line(segment: Segment, show_text: Callable[[str], None], verbose: bool) -> Progress:
    from stepctl.hooks.progress import ProgressLine

    line = ProgressLine(show_text, title=segment.directory.name, target=segment.target)
    console = Console(say, start=segment.start, target=segment.target, kinds=_kinds(verbose))
    return Progress([console], [line], _after_rows(segment, say, verbose))


def _notebook_line() -> Callable[[str], None] | None:
    """Return a function that shows a text in the place of the last one; None outside of a notebook."""
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        return None
    handle: Any = None

    def show(text: str) -> None:
        nonlocal handle
        content = {"text/plain": text}
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
