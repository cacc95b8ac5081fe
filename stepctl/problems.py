"""What is wrong, in words: one plain line a place; pydantic's reports turned into such lines."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from stepctl.errors import printable

if TYPE_CHECKING:
    from pydantic import ValidationError

Path = tuple[str | int, ...]
_PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
_NOT_USERS = {"stepctl", "numpy", "h5py", "yaml", "click", "pydantic", "pydantic_core", "rich", "threadpoolctl"}
_NOT_USERS |= {"matplotlib", "plotext", "tensorboard", "mpi4py"}
_MOST = 50  # problems shown
_LONGEST = 1000  # characters of a line

# names that other tools give to keys
_USUAL = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "batchsize": "batch_size",
    "steps": "num_steps",
    "max_steps": "last_step",
    "wd": "weight_decay",
}
_EPOCHS = ("epoch", "epochs", "num_epochs", "n_epochs", "max_epochs")

# pydantic's error types -> what is needed there; the others speak for themselves
_NEEDED = {
    "model_type": "a mapping is needed",
    "dict_type": "a mapping is needed",
    "list_type": "a list is needed",
    "string_type": "text is needed",
    "bool_type": "true or false is needed",
    "int_type": "a whole number is needed",
    "float_type": "a number is needed",
}


class Problem(NamedTuple):
    """One thing that is wrong, at a path of keys."""

    path: Path
    message: str


def in_one_line(text: str, longest: int = _LONGEST) -> str:
    """Return a text with all escaped that a terminal might obey, and its middle left out where it is long."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return printable(text)


def in_lines(problems: list[str]) -> str:
    """Return a line for each of the first problems, and how many are left out."""
    left_out = len(problems) - _MOST
    more = [f"... and {left_out} more"] if left_out > 0 else []
    return "\n".join([*map(in_one_line, problems[:_MOST]), *more])


def reason(error: BaseException) -> str:
    """Return an error's own words, after its type where they say nothing without it, and the user's line it is from."""
    text = str(error)
    if not text or isinstance(error, SystemExit | KeyError):
        text = f"{type(error).__name__}: {text}"
    return f"{text}{in_user_code(error)}"


def in_user_code(error: BaseException) -> str:
    """Return " (file:line)" of the innermost line of the user's own code that an error passed through, or nothing.

    Code is the user's if it is neither stepctl's, nor Python's library, nor a package that stepctl uses.
    """
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if is_users(frame.f_globals.get("__name__", ""), frame.f_code.co_filename):
            found = f" ({shortest(frame.f_code.co_filename)}:{line})"
    return found


def defined_at(thing: object) -> str:
    """Return "file:line" where a class or function of the user's is defined; nothing where that is not known."""
    try:
        file = inspect.getsourcefile(thing)  # type: ignore[arg-type]
        _, line = inspect.findsource(thing)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
    return "" if file is None else f"{shortest(file)}:{line + 1}"


def is_users(module: str, file: str) -> bool:
    """Tell whether code of this module, in this file, is the user's."""
    if file.startswith((_PACKAGE, "<string>", "<frozen")):
        return False
    package = module.partition(".")[0]
    return package not in _NOT_USERS and package not in sys.stdlib_module_names


def shortest(file: str) -> str:
    """Return a path as it is from the current folder, if it is below that."""
    relative = os.path.relpath(file)
    return file if relative.startswith(os.pardir) or file.startswith("<") else relative


def counted(n: int, word: str) -> str:
    """Return "1 problem", "2 problems"."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def a_or_an(noun: str) -> str:
    """Return a noun with its article: "a float", "an int"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def did_you_mean(word: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_key(word: str, known: list[str]) -> str:
    """Return the message for a key that is none of the known ones."""
    if word.lower() in _EPOCHS:
        meant = "; steps are counted, not epochs: give stop.num_steps or stop.last_step"
    else:
        usual = _USUAL.get(word.lower())
        meant = f"; did you mean {usual!r}?" if usual in known else did_you_mean(word, known)
    return f"unknown key{meant}; allowed: {', '.join(known) or 'none'}"


def problems_of(error: ValidationError, value: Any) -> list[Problem]:
    """Turn pydantic's report on `value` into Problems: one for each place, and one for each missing key."""
    needs: dict[Path, list[str]] = {}
    problems = []
    for item in error.errors():
        path, _ = _locate(item["loc"], value)
        if item["type"] == "missing":
            problems.append(Problem(path, f"{item['loc'][-1]} is missing"))
        elif item["type"] == "value_error":
            problems.append(Problem(path, item["msg"].removeprefix("Value error, ")))
        elif _words(item) not in needs.setdefault(path, []):
            needs[path].append(_words(item))
    for path, words in needs.items():
        problems.append(Problem(path, f"{shown(_locate(path, value)[1])} is wrong; {', or '.join(words)}"))
    return problems


def _locate(loc: Path, value: Any) -> tuple[Path, Any]:
    # pydantic's location goes on into the branch of a union; stop where the value ends
    path: Path = ()
    for part in loc:
        if not (part in value if isinstance(value, Mapping) else isinstance(value, list) and part in range(len(value))):
            break
        path, value = (*path, part), value[part]
    return path, value


def _words(item: Mapping[str, Any]) -> str:
    text: str = _NEEDED.get(item["type"], item["msg"].removeprefix("Input "))
    return text[:1].lower() + text[1:]


def shown(value: Any) -> str:
    """Return a value as it would stand in the config."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def not_plain(value: Any) -> Iterator[str]:
    """Yield the type names of what a YAML file could not hold."""
    if isinstance(value, dict):
        for item in value.values():
            yield from not_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from not_plain(item)
    elif value is not None and type(value) not in (bool, int, float, str):
        yield type(value).__name__
