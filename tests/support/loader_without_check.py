"""A process that loads the hostile files with one check of the loader removed."""

from __future__ import annotations

import importlib
import resource
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from tests.support import loader_mutants
from tests.support.load_attempts import attempt

Corpus = dict[str, tuple[Path, str, str, str]]  # name -> file, manner, code, what the message names

MAX_OBJECTS = 1000  # few enough to be quick
SECONDS = 5  # for one file


class Hang(BaseException):
    pass


def hangs(*_: object) -> None:
    raise Hang


def find_difference(check: loader_mutants.Check | None, corpus: Corpus, answer: Connection) -> None:
    """Load the corpus without a check; print the first file with another outcome, or None."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.signal(signal.SIGALRM, hangs)
    loader_mutants.load(check)
    vars(importlib.import_module("stepctl.checkpoint.walk"))["MAX_OBJECTS"] = MAX_OBJECTS
    answer.send("loaded")
    for name, (path, manner, code, about) in corpus.items():
        signal.alarm(SECONDS)
        try:
            found, message = attempt(path, manner)
        except Hang:
            found = "no end"
            message = ""
        signal.alarm(0)
        if found != code or about not in message:
            answer.send(f"{name}: {found} instead of {code}: {message}")
            return
    answer.send(None)
