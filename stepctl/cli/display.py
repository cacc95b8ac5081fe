"""How a segment's progress is shown: a bar on a terminal, a line per row elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from stepctl.cli.options import say
from stepctl.cli.pipes import is_terminal
from stepctl.errors import StepctlError
from stepctl.hooks.base import Hook
from stepctl.plan import Span, best_notes
from stepctl.segment import Say, Segment
from stepctl.writers.base import Writer
from stepctl.writers.console import Console


@contextlib.contextmanager
def shown(segment: Segment, *, quiet: bool, verbose: bool) -> Iterator[tuple[list[Writer], list[Hook]]]:
    """Yield the writers and hooks that show this segment; the terminal is given back at the end."""
    start, target = segment.start, segment.target
    if verbose:
        segment.report = say
    if quiet:
        yield [], []
        return
    for note in best_notes(segment.assembly, Span(start, target, segment.store.steps())):
        say(f"note: {note}")
    if not is_terminal(sys.stderr):
        _tell(segment, say, verbose)
        yield [Console(say, start=start, target=target)], []
    else:
        from rich.console import Console as Terminal

        from stepctl.hooks.progress import ProgressBar

        terminal = Terminal(stderr=True, highlight=False, markup=False)
        bar = ProgressBar(terminal, title=segment.directory.name, target=target)
        kinds = ("train", "eval") if verbose else ("eval",)

        def show(line: str) -> None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                terminal.print(line)

        _tell(segment, show, verbose)  # beside the bar, not into it
        try:
            yield [Console(show, start=start, target=target, kinds=kinds)], [bar]
        finally:
            bar.close()


def _tell(segment: Segment, say: Say, verbose: bool) -> None:
    """Have the segment's messages told, each after the rows before it."""

    def tell(message: str) -> None:
        with contextlib.suppress(StepctlError):  # which comes again at the next row
            segment.assembly.rows.flush()
        say(message)

    segment.say = segment.note = tell
    if verbose:
        segment.report = tell
