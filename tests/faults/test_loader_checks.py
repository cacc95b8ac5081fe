"""Every check of the loader is needed: with any one of them taken out, some file of the corpus tells."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import mutants
import pytest
from hostile import GOOD, HOSTILE, UNFIT
from hostile_parts import tampered

from states import NAME, encoded, small_state
from stepctl.checkpoint import walk
from stepctl.errors import CheckpointError

Figure = Callable[[str, int], None]
Corpus = dict[str, tuple[Path, str, str]]  # name -> file, code, what the message names

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["numpy", "h5py", "yaml", "stepctl.checkpoint.codec"])
MAX_OBJECTS = 1000  # few enough to be quick
SECONDS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """All files, each in a folder of its own."""
    cases = {name: (hostile.code, hostile.about, hostile.build) for name, hostile in HOSTILE.items()}
    cases |= {name: ("mismatch", about, tampered(change)) for name, (about, change) in UNFIT.items()}
    cases |= {name: ("accepted", "", build) for name, build in GOOD.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "MAX_OBJECTS", MAX_OBJECTS)
        folder = tmp_path_factory.mktemp("corpus")
        files: Corpus = {}
        for number, (name, (code, about, build)) in enumerate(cases.items()):
            (folder / str(number)).mkdir()
            files[name] = build(folder / str(number)), code, about
    return files


def find_difference(check: mutants.Check | None, corpus: Corpus, answer: Connection) -> None:
    """Load the corpus without a check; answer with the first file that fares otherwise, or with None."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.alarm(SECONDS)  # ends the process
    mutants.load(check)
    answer.send("loaded")
    for name, (path, code, about) in corpus.items():
        found, message = attempt(path)
        if found != code or about not in message:
            answer.send(f"{name}: {found} instead of {code}: {message}")
            return
    answer.send(None)


def attempt(path: Path) -> tuple[str, str]:
    from stepctl.checkpoint import codec, walk

    walk.MAX_OBJECTS = MAX_OBJECTS
    try:
        with codec.Reader(path) as reader:
            codec.restore(reader, small_state())
    except CheckpointError as error:
        return error.code, str(error)
    except Exception as error:
        return type(error).__name__, str(error)
    return "accepted", ""


def difference(check: mutants.Check | None, corpus: Corpus) -> str | None:
    """Return what tells that a check is gone: a file of the corpus, or the death of the process."""
    answer, other_end = PROCESSES.Pipe(duplex=False)
    child = PROCESSES.Process(target=find_difference, args=(check, corpus, other_end))
    child.start()
    other_end.close()
    try:
        assert answer.recv() == "loaded"
        return answer.recv()
    except EOFError:
        return "the process died"
    finally:
        child.join()


def test_the_whole_loader_treats_every_file_as_it_should(corpus: Corpus) -> None:
    assert difference(None, corpus) is None


@pytest.mark.parametrize("check", mutants.checks(), ids=str)
def test_a_check_that_is_taken_out_is_missed(check: mutants.Check, corpus: Corpus, figure: Figure) -> None:
    assert difference(check, corpus) is not None, "no file of the corpus tells that this check is gone"
    figure("checks of the loader that are missed when taken out", 1)


def test_the_checks_are_found() -> None:
    words = [str(check) for check in mutants.checks()]
    assert len(words) == len(set(words)) > 70
    for part in ("sha256", "get_external_count", "TYPE_HARD", "self.seen", "O_NOFOLLOW", "_SUPERBLOCK", "Counters("):
        assert any(part in word for word in words), part


def test_the_corpus_holds_no_file_twice(corpus: Corpus) -> None:
    seen = {encoded(small_state()): "unchanged"}
    for name, (path, _, _) in corpus.items():
        if path.name == NAME and path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 30:
            assert seen.setdefault(path.read_bytes(), name) == name
    assert len(corpus) > 200
