"""Command lines for messages, quoted so that they can be pasted into a shell."""

from __future__ import annotations

import os
import shlex


def quoted(word: str) -> str:
    """Return a word as a shell reads it back; control characters and undecodable bytes become $'...' (bash, zsh)."""
    if word.isprintable():
        return shlex.quote(word)
    letters = [letter if letter.isprintable() and letter not in "\\'" else _escaped(letter) for letter in word]
    return f"$'{''.join(letters)}'"


def _escaped(letter: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(letter))


def options(*words: object) -> str:
    """Return command-line options and their values, quoted."""
    return " ".join(quoted(str(word)) for word in words)


def command(name: str, path: str | os.PathLike[str], *more: object) -> str:
    """Return the `stepctl` command of this name on a path, with more options."""
    place = os.fspath(path)
    if place.startswith("-"):  # it would be read as an option
        place = os.path.join(os.curdir, place)
    return options("stepctl", name, place, *more)
