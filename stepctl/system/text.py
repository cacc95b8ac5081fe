"""Text for messages: one line, printable, of limited length."""

from collections.abc import Collection, Sequence
from typing import Any

from stepctl.errors import printable

_MAX_PROBLEMS = 50
_MAX_LINE = 1000  # characters
_MAX_VALUE = 60  # characters


def in_one_line(text: str, max_length: int = _MAX_LINE) -> str:
    """Escape line ends and control characters; cut the middle out of a long text."""
    if len(text) > max_length:
        text = f"{text[: max_length // 2]} ... {text[-max_length // 2 :]}"
    return printable(text)


def has_surrogate(text: str) -> bool:
    """Return whether a text contains a lone surrogate, which UTF-8 cannot encode."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def in_lines(problems: list[str]) -> str:
    """Return a line for each of the first problems, and one with the number of the others."""
    lines = [in_one_line(problem) for problem in problems[:_MAX_PROBLEMS]]
    n_more = len(problems) - len(lines)
    if n_more:
        lines.append(f"... and {n_more} more")
    return "\n".join(lines)


def counted(n: int, word: str) -> str:
    """Return "1 problem", "2 problems"."""
    plural = "" if n == 1 else "s"
    return f"{n:,} {word}{plural}"


def local_step_note(step: int, start: int) -> str:
    """Return " (local 20)", the steps since the segment's start; "" if it started at step 0."""
    return f" (local {step - start})" if start else ""


def a_or_an(noun: str) -> str:
    """Return a noun with its article: "a float", "an int"."""
    article = "an" if noun[:1].lower() in "aeiou" else "a"
    return f"{article} {noun}"


def did_you_mean(word: str, known: list[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known word, "" if none is close."""
    import difflib  # only an error needs it

    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def config_text(value: Any) -> str:
    """Return a value as a config file contains it, cut after 60 characters."""
    import json

    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    if len(text) > _MAX_VALUE:
        text = text[: _MAX_VALUE - 3] + "..."
    return text


def align_columns(rows: Sequence[Sequence[str]], *, left: Collection[int]) -> list[str]:
    """Return a line for each row, with the cells of a column padded to one width.

    `left` are the indices of the columns that are aligned to the left; the others are aligned to
    the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if number in left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines
