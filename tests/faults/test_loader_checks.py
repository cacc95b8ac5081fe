"""Every check of the loader is needed: without it, some hostile file is accepted."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import pytest

from stepctl.checkpoint import walk
from tests.support import loader_mutants
from tests.support.checkpoints import NAME, encoded, small_state
from tests.support.hostile_files import GOOD, HOSTILE, UNFIT
from tests.support.hostile_parts import tampered
from tests.support.hostile_programs import UNFIT_PROGRAMS
from tests.support.load_attempts import ACCEPTED, MANNERS, large
from tests.support.loader_without_check import MAX_OBJECTS, Corpus, find_difference
from tests.support.stops import some_of

Figure = Callable[[str, int], None]

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["numpy", "h5py", "yaml", "pytest", "stepctl.runs.compatibility"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """All files, each in a folder of its own."""
    cases = {
        name: (hostile.build, "restored", hostile.code, hostile.about)
        for name, hostile in HOSTILE.items()
    }
    cases |= {
        name: (tampered(change), "restored", "mismatch", about)
        for name, (about, change) in UNFIT.items()
    }
    cases |= {
        name: (build, manner, code, about)
        for name, (code, about, build, manner) in UNFIT_PROGRAMS.items()
    }
    cases |= {name: (build, "restored", *ACCEPTED) for name, build in GOOD.items()}
    cases |= {
        manner: (large, manner, code, "")
        for manner, (_, code) in MANNERS.items()
        if manner != "restored"
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "MAX_OBJECTS", MAX_OBJECTS)
        folder = tmp_path_factory.mktemp("corpus")
        files: Corpus = {}
        for number, (name, (build, *expected)) in enumerate(cases.items()):
            (folder / str(number)).mkdir()
            files[name] = (build(folder / str(number)), *expected)
    return files


def difference(check: loader_mutants.Check | None, corpus: Corpus) -> str | None:
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


CHECKS = loader_mutants.checks()


@pytest.mark.parametrize("check", some_of(CHECKS, every=30), ids=str)
def test_a_removed_check_is_noticed(
    check: loader_mutants.Check, corpus: Corpus, figure: Figure
) -> None:
    assert difference(check, corpus) is not None, (
        "no file of the corpus tells that this check is gone"
    )
    figure("checks of the loader that are missed when taken out", 1)


def test_the_checks_are_found() -> None:
    words = [str(check) for check in CHECKS]
    assert len(words) > 70
    for part in (
        "sha256",
        "get_external_count",
        "TYPE_HARD",
        "self._addresses",
        "O_NOFOLLOW",
        "superblock",
        "Counters(",
    ):
        assert any(part in word for word in words), part


def test_the_corpus_holds_no_file_twice(corpus: Corpus) -> None:
    seen = {encoded(small_state()): "unchanged"}
    for name, (path, manner, _, _) in corpus.items():
        if (
            manner == "restored"
            and path.name == NAME
            and path.is_file()
            and not path.is_symlink()
            and path.stat().st_size < 1 << 30
        ):
            assert seen.setdefault(path.read_bytes(), name) == name
    assert len(corpus) > 200
