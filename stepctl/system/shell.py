"""Command lines in messages, quoted so that they can be pasted into a shell."""

import os
import shlex


def quoted(word: str) -> str:
    """Quote a word for a shell; control characters and undecodable bytes as $'...' (bash)."""
    if word.isprintable():
        return shlex.quote(word)
    text = ""
    for letter in word:
        if letter.isprintable() and letter not in "\\'":
            text += letter
        else:
            text += "".join(f"\\{byte:03o}" for byte in os.fsencode(letter))
    return f"$'{text}'"


def options(*words: object) -> str:
    """Return options and their values as a command line."""
    return " ".join(quoted(str(word)) for word in words)


def command(name: str, path: str | os.PathLike[str], *more: object) -> str:
    """Return the command line `stepctl NAME PATH MORE...`."""
    place = os.fspath(path)
    if place.startswith("-"):  # click would parse it as an option
        place = os.path.join(os.curdir, place)
    return options("stepctl", name, place, *more)
