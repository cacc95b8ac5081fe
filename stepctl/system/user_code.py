"""Locations in the user's own code, for error messages.

Code is the user's if it belongs to neither stepctl, Python's library nor a package that stepctl
uses.
"""

import inspect
import os
import sys
import traceback

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_PACKAGES_IN_USE = {
    "stepctl",
    "numpy",
    "h5py",
    "yaml",
    "click",
    "pydantic",
    "pydantic_core",
    "rich",
    "threadpoolctl",
    "matplotlib",
    "plotext",
    "tensorboard",
    "mpi4py",
    "autograd",
}


def describe_error(error: BaseException) -> str:
    """Return the text of an error and its line in the user's code: "no such layer (model.py:12)".

    The type is added where the text alone is not informative.
    """
    text = str(error)
    if not text or isinstance(error, SystemExit | KeyError):
        text = f"{type(error).__name__}: {text}"
    return f"{text}{user_location(error)}"


def describe_with_type(error: BaseException) -> str:
    """Return the type, the text and the line of an error: "KeyError: 'x' (model.py:12)"."""
    name = type(error).__name__
    if str(error):
        name = f"{name}: {error}"
    return f"{name}{user_location(error)}"


def user_location(error: BaseException) -> str:
    """Return " (file:line)" of the innermost line of user code in a traceback, or ""."""
    location = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if is_user_code(frame.f_globals.get("__name__", ""), file):
            location = f" ({relative_path(file)}:{line})"
    return location


def defined_at(thing: object) -> str:
    """Return "file:line" of the definition of a class or function, "" if it is not known."""
    try:
        file = inspect.getsourcefile(thing)  # type: ignore[arg-type]
        _, line = inspect.findsource(thing)  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
    if file is None:
        return ""
    return f"{relative_path(file)}:{line + 1}"


def is_user_code(module: str, file: str) -> bool:
    """Tell whether code of this module, in this file, is the user's."""
    if file.startswith((_PACKAGE, "<string>", "<frozen")):
        return False
    package = module.partition(".")[0]
    return package not in _PACKAGES_IN_USE and package not in sys.stdlib_module_names


def relative_path(file: str) -> str:
    """Return a path relative to the working directory if it lies below it, else the path itself."""
    relative = os.path.relpath(file)
    if relative.startswith(os.pardir) or file.startswith("<"):
        return file
    return relative
