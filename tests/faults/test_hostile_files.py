"""Hostile HDF5 with a valid digest is refused by name, quickly, and opens no other file."""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import gc
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import stepctl
from stepctl.__main__ import main
from stepctl.checkpoint import walk
from stepctl.checkpoint.store import Store
from stepctl.cli.main import cli
from stepctl.errors import CheckpointError
from stepctl.state.counters import Counters
from tests.support import processes
from tests.support.checkpoints import NAME, small_state, written
from tests.support.hdf5_metadata import patched, sealed_spans
from tests.support.hostile_files import GOOD, HOSTILE, UNFIT
from tests.support.hostile_parts import OTHER, good_body, sealed, tampered
from tests.support.hostile_programs import UNFIT_PROGRAMS
from tests.support.load_attempts import ACCEPTED, MANNERS, attempt, large
from tests.support.runs import make_config, resume, rows, train

# To a command these are a run, a mistake of the user's, a disk that is not mounted, and one that fails.
NO_FILE = ("a directory", "nothing", "a symbolic link to nowhere", "a file whose reading fails")
Figure = Callable[[str, int], None]

OLDER = "step-00000005.h5"
CODES = {hostile.code for hostile in HOSTILE.values()} | {"accepted", "mismatch", "other bits"}
SECONDS = 1.0
MEMORY = 200_000_000
DEADLINE = 100.0  # a command that waits for something


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Opens:
    """Tells which files of a folder anybody opened since this was made (Linux inotify)."""

    def __init__(self, folder: Path) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert (
            self.libc.inotify_add_watch(self.descriptor, os.fsencode(folder), 0x20) > 0
        )  # IN_OPEN

    def names(self) -> set[str]:
        try:
            data, found = os.read(self.descriptor, 1 << 16), set()
        except BlockingIOError:
            return set()
        while data:
            size = struct.unpack_from("iIII", data)[3]
            found.add(data[16 : 16 + size].rstrip(b"\0").decode())
            data = data[16 + size :]
        return found - {""}  # the folder itself

    def __enter__(self) -> Opens:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def decoys(folder: Path) -> None:
    """Put the files there that hostile ones name."""
    for name in (OTHER, *(OTHER.replace(".", f"{number}.") for number in range(3))):
        with h5py.File(folder / name, "w") as other:
            other["x"] = np.ones(2, "<f4")


# HDF5 1 writes the new manner into a file that is in it, so that these are as they should be
NEEDS_HDF5_2 = {"a group in the old manner", "an array in the old manner"}
CASES = [
    case for case in HOSTILE if case not in NEEDS_HDF5_2 or h5py.version.hdf5_version_tuple >= (2,)
]

_EVERY = 8  # without --faults, every eighth case runs, and the first of each code
_FIRST_OF_CODE = set({HOSTILE[case].code: case for case in reversed(CASES)}.values())
SOME_CASES = [
    case
    if number % _EVERY == 0 or case in _FIRST_OF_CODE
    else pytest.param(case, marks=pytest.mark.faults)
    for number, case in enumerate(CASES)
]


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Let the garbage collections in these tests ignore earlier objects: they take too long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("case", SOME_CASES)
def test_a_hostile_file_is_refused_by_name_at_once_and_no_other_is_opened(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.setattr(walk, "MAX_OBJECTS", 1000)  # the real number has its turn below
    monkeypatch.chdir(tmp_path)  # where a file that names another one would find it
    hostile = HOSTILE[case]
    path = hostile.build(tmp_path)
    decoys(tmp_path)
    gc.collect()  # files that earlier tests left to the garbage collector
    n_open = len(os.listdir("/proc/self/fd"))
    with Opens(tmp_path) as opens:
        start = time.process_time()
        code, message = attempt(path)
        assert time.process_time() - start < SECONDS
        assert opens.names() <= {path.name}
        (tmp_path / OTHER).read_bytes()
        assert opens.names() == {OTHER}  # the watch does see an open
    assert len(os.listdir("/proc/self/fd")) == n_open
    assert code == hostile.code, message
    assert f"{path.name}: " in message
    assert hostile.about in message
    assert message.isprintable()
    assert len(message) < 1000
    if path == tmp_path / NAME and path.exists():
        assert passed_over(tmp_path).startswith(message)
    figure("hostile files refused", 1)


def passed_over(folder: Path) -> str:
    """Load the newest checkpoint of a folder that has an older good one; return what is said of the newest."""
    said = list[str]()
    state = dataclasses.replace(
        small_state(), counters=Counters(dict(small_state().counters) | {"global_step": 5})
    )
    written(folder, state, OLDER)
    with Store(folder).newest(said.append) as reader:
        assert reader.name == OLDER
    assert len(said) == 1
    assert said[0].endswith(f"; using {OLDER}")
    return said[0]


@pytest.mark.parametrize("case", UNFIT)
def test_a_checkpoint_of_another_state_is_refused(
    case: str, tmp_path: Path, figure: Figure
) -> None:
    about, change = UNFIT[case]
    code, message = attempt(tampered(change)(tmp_path))
    assert code == "mismatch"
    assert about in message
    figure("hostile files refused", 1)


@pytest.mark.parametrize("case", UNFIT_PROGRAMS)
def test_a_program_that_does_not_fit_is_refused(case: str, tmp_path: Path, figure: Figure) -> None:
    code, about, build, manner = UNFIT_PROGRAMS[case]
    found, message = attempt(build(tmp_path), manner)
    assert (found, about in message) == (code, True), message
    assert "\n" not in message or code == "mismatch"
    figure("hostile files refused", 1)


@pytest.mark.parametrize("command", ["inspect", "verify", "diff"])
def test_the_commands_refuse_bools_other_than_0_and_1(command: str, tmp_path: Path) -> None:
    _, _, build, _ = UNFIT_PROGRAMS["a bool of two"]
    path = str(build(tmp_path))
    paths = [path, path] if command == "diff" else [path]
    result = CliRunner().invoke(cli, [command, *paths])
    assert result.exit_code == (1 if command == "verify" else 3)
    assert f"{NAME}: /state/flags: a byte that is neither 0 nor 1" in result.output
    with pytest.raises(CheckpointError, match="/state/flags"):
        stepctl.load_checkpoint(path)


@pytest.mark.parametrize("manner", [manner for manner in MANNERS if manner != "restored"])
def test_harm_that_is_done_while_a_file_is_open_is_noticed(manner: str, tmp_path: Path) -> None:
    code, message = attempt(large(tmp_path), manner)
    assert code == MANNERS[manner][1]
    assert f"{NAME}: " in message


@pytest.mark.parametrize("case", GOOD)
def test_a_checkpoint_that_is_odd_but_good_is_read(case: str, tmp_path: Path) -> None:
    """Else the refusals would prove nothing."""
    assert attempt(GOOD[case](tmp_path)) == ACCEPTED


@pytest.mark.parametrize(
    "case", ["external link", "cycle to itself", "two dots", "an array more", "unchanged"]
)
def test_a_run_with_a_hostile_newest_file_ends_exactly(case: str, tmp_path: Path) -> None:
    """`unchanged` is a whole checkpoint, of another run."""
    build = HOSTILE[case].build if case in HOSTILE else None
    if case in UNFIT:
        build = tampered(UNFIT[case][1])
    expected = train(make_config(stop={"last_step": 10}), tmp_path / "whole")
    train(make_config(stop={"last_step": 5}), tmp_path / "run")
    (build or GOOD.get(case) or HOSTILE[f"name: {case}"].build)(tmp_path)
    shutil.copy(tmp_path / NAME, tmp_path / "run" / "checkpoints" / NAME)
    said: list[str] = []
    state = resume(tmp_path / "run", last_step=10, say=said.append)
    assert state.same_bits(expected)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert [
        line for line in said if line.startswith(NAME) and line.endswith("using step-00000005.h5")
    ]


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it took of the machine."""

    code: int
    out: str
    err: str
    seconds: float  # of processor time: others use the machine too
    n_bytes: int


def measured(command: list[str], folder: Path) -> Outcome:
    """Run a command of stepctl in a process of its own, in the folder."""
    with processes.start(command, cwd=folder, output="said", call=_measuring) as child:
        code = child.wait(DEADLINE)
    taken = json.loads((folder / "taken").read_text())
    return Outcome(code, (folder / "out").read_text(), (folder / "err").read_text(), **taken)


def _measuring() -> None:
    """Run `stepctl` as it is run, and write down what it said and took, what it started included."""
    for number, name in ((1, "out"), (2, "err")):
        with open(name, "w") as file:
            os.dup2(file.fileno(), number)
    before = time.process_time()
    try:
        main()
    finally:
        own, others = (
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        seconds = time.process_time() - before + others.ru_utime + others.ru_stime
        n_bytes = max(own.ru_maxrss, others.ru_maxrss) * 1024
        Path("taken").write_text(json.dumps({"seconds": seconds, "n_bytes": n_bytes}))


def quickest(command: list[str], folder: Path, start: float) -> Outcome:
    """Run a command until it has taken no longer than it may, three times at most: the machine may be busy."""
    for _ in range(3):
        outcome = measured(command, folder)
        if outcome.seconds - start < SECONDS:
            break
    return outcome


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The time that each command takes for a good file."""
    folder = tmp_path_factory.mktemp("good")
    path = written(folder, small_state())
    return {
        command: measured([command, str(path)], folder).seconds for command in ("inspect", "verify")
    }


@pytest.mark.faults
@pytest.mark.parametrize("case", [name for name in HOSTILE if name not in NO_FILE])
def test_the_commands_refuse_a_hostile_file_within_a_second_and_200_megabytes(
    case: str, start: dict[str, float], tmp_path: Path, figure: Figure
) -> None:
    hostile = HOSTILE[case]
    path = hostile.build(tmp_path)
    inspected = quickest(["inspect", str(path)], tmp_path, start["inspect"])
    assert inspected.code == 3
    assert inspected.out == ""
    assert inspected.err.startswith(f"stepctl: {path.name}: ")
    assert hostile.about in inspected.err
    assert inspected.err.count("\n") == 1
    verified = quickest(["verify", str(path), "--json"], tmp_path, start["verify"])
    assert verified.code == 1
    answer = json.loads(verified.out)
    assert not answer["ok"]
    assert [problem["code"] for problem in answer["problems"]] == [hostile.code]
    assert hostile.about in answer["problems"][0]["message"]
    assert inspected.seconds - start["inspect"] < SECONDS
    assert verified.seconds - start["verify"] < SECONDS
    assert max(inspected.n_bytes, verified.n_bytes) < MEMORY
    figure("hostile files refused by inspect and verify", 1)


@pytest.mark.faults
@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize(
    "case", [name for name in HOSTILE if "external" in name or "virtual" in name]
)
def test_the_commands_open_no_file_that_a_hostile_one_names(
    command: str, case: str, tmp_path: Path
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is missing")
    decoys(tmp_path)
    path = HOSTILE[case].build(tmp_path)
    watched = [
        "strace",
        "-f",
        "-qq",
        "-e",
        "trace=open,openat,openat2",
        "-o",
        str(tmp_path / "trace"),
    ]
    subprocess.run(
        [*watched, sys.executable, "-m", "stepctl", command, str(path)],
        cwd=tmp_path,
        capture_output=True,
    )
    trace = (tmp_path / "trace").read_text()
    assert trace.count(NAME) == 1
    assert "other" not in trace
    assert "/dev/zero" not in trace


def test_a_file_that_may_not_be_read_now_is_not_called_damaged(tmp_path: Path) -> None:
    path = written(tmp_path, small_state())
    path.chmod(0)
    without_rights = (
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    )
    if without_rights and shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing: root may read any file")
    command = [*without_rights, sys.executable, "-m", "stepctl", "inspect", str(path)]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 1
    assert (
        f"{NAME}: cannot be read now: Permission denied; make it readable for this user"
        in child.stderr
    )


def test_a_broken_inside_behind_a_right_digest_is_refused_by_code_or_harmless(
    tmp_path: Path,
) -> None:
    body, n_refused = good_body(), 0
    for position in range(0, len(body), 41):
        broken = bytearray(body)
        broken[position] ^= 0xFF
        code, message = attempt(sealed(tmp_path / NAME, bytes(broken)))
        assert code in CODES, message
        n_refused += code != "accepted"
    assert n_refused > 50


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(1, 11))]
)
def test_metadata_changed_behind_right_checksums_is_refused_by_code_or_harmless(
    seed: int, tmp_path: Path, figure: Figure
) -> None:
    generator, body, refused = random.Random(seed), good_body(), 0
    n_trials = 200 if seed else 40
    positions = [at for start, end in sealed_spans(body) for at in range(start, end)]
    for _ in range(n_trials):
        at, size = generator.choice(positions), generator.choice((1, 1, 1, 2, 8))
        new = bytes(
            generator.choice((0, 1, 0x80, 0xFF, generator.randrange(256))) for _ in range(size)
        )
        code, message = attempt(sealed(tmp_path / NAME, patched(body, at, new)))
        assert code in CODES, message
        refused += code != "accepted"
    assert refused > n_trials / 10
    figure("changes of metadata that no load came to harm by", n_trials)


def test_only_the_right_checksum_makes_a_change_of_metadata_readable(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    whole = good_body()
    (start, end), *_ = list(sealed_spans(whole))[1:]
    assert patched(whole, start, whole[start : start + 1]) == whole
    broken = whole[:end] + bytes([whole[end] ^ 1]) + whole[end + 1 :]
    code, message = attempt(sealed(tmp_path / NAME, broken))
    assert code == "hdf5"
    assert "checksum" in message
