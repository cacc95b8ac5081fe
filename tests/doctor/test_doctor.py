"""`stepctl doctor` reports what is missing or broken, and leaves no files behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from syrupy.assertion import SnapshotAssertion

import stepctl
from stepctl.checkpoint import codec
from stepctl.cli.main import cli
from stepctl.doctor import child, filesystem, kernels, machine
from stepctl.system import blas
from tests.support.messages import without_paths

ROOT = Path(stepctl.__file__).parents[1]
PARTS = {
    "stepctl",
    "machine",
    "environment",
    "numerics",
    "kernels",
    "compiled",
    "hdf5",
    "mpi",
    "extras",
    "runs",
    "problems",
}
CORE = ("stepctl", "numerics", "hdf5", "runs")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["doctor", *map(str, arguments)])


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the parts that child processes report, where the test is about the others."""

    def fail(*arguments: object, **options: object) -> None:
        raise child.ChildError("left out")

    monkeypatch.setattr(child, "call", fail)


@pytest.mark.process
def test_every_part_is_reported_good_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_cache: Path
) -> None:
    for name in ("temporary", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    done = call("--json", "--runs", tmp_path / "here" / "runs")
    found = json.loads(done.stdout)
    assert (done.exit_code, done.stderr, found["problems"]) == (0, "", [])
    assert found.keys() == PARTS
    assert [name for name in CORE if "error" in found[name]] == []
    assert found["runs"]["folder"] == str(tmp_path / "here")
    assert all(trial["milliseconds"] >= 0 for trial in found["runs"]["trials"])
    assert found["environment"]["variables"]["OPENBLAS_NUM_THREADS"] == "1"
    assert found["numerics"]["fingerprint"]["threads"] == found["environment"]["threads"] == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "temporary"]
    if found["compiled"]["numba"] is not None:
        assert found["compiled"]["reason"] is None
        assert found["compiled"]["cache"] == str(kernel_cache / "stepctl" / "kernels")


@pytest.mark.process
def test_the_text_has_a_line_for_each_thing(tmp_path: Path, kernel_cache: Path) -> None:
    done = call("--runs", tmp_path)
    assert done.exit_code == 0
    heads = [line[:14].strip() for line in done.stdout.splitlines()]
    for head in (
        "stepctl",
        "Python",
        "CPU",
        "memory",
        "environment",
        "NumPy",
        "BLAS",
        "BLAS kernels",
        "compiled",
        "HDF5",
        "plot",
        "runs",
        "O_EXCL",
    ):
        assert head in heads
    assert "a checkpoint reads back to the bit" in done.stdout


def test_the_fingerprint_equals_a_run_s_and_reading_it_changes_no_threads() -> None:
    settled = blas.set_threads(1)
    assert machine.load_numerics()["fingerprint"] == settled
    assert {library["num_threads"] for library in blas.loaded_blas().info()} <= {1}


# --- what is missing


def with_packages(folder: Path, *hidden: str) -> tuple[int, dict[str, Any]]:
    """Run it where only those of the installed packages can be found whose names do not begin so."""
    done = printed_with_packages(folder, *hidden, options=("--json",))
    return done.returncode, json.loads(done.stdout)


def printed_with_packages(
    folder: Path, *hidden: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    for package in Path(np.__file__).parents[1].iterdir():
        if not package.name.startswith(hidden) and package.name != "stepctl":
            (folder / package.name).symlink_to(package)
    (folder / "stepctl").symlink_to(ROOT / "stepctl")
    command = [sys.executable, "-S", "-m", "stepctl", "doctor", *options]
    variables = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=variables, cwd=folder.parent, capture_output=True, text=True)
    assert done.stderr == ""
    return done


@pytest.mark.process
def test_without_any_extra_all_is_well(tmp_path: Path) -> None:
    extras = [package for packages in machine.EXTRAS.values() for package in packages]
    code, found = with_packages(tmp_path / "packages", *extras)
    assert (code, found["problems"]) == (0, [])
    assert {
        version for extra in found["extras"].values() for version in extra["packages"].values()
    } == {None}
    assert "error" not in found["mpi"]
    assert (found["mpi"]["library"], found["mpi"]["pip"]) == (None, "pip install 'stepctl[mpi]'")
    assert found["compiled"] == {"numba": None, "pip": "pip install 'stepctl[numba]'"}


@pytest.mark.process
def test_without_mpi4py_it_says_how_to_install_it(tmp_path: Path) -> None:
    done = printed_with_packages(tmp_path / "packages", "mpi4py")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MPI"))
    assert "failed" not in done.stdout
    assert "mpi4py is not installed; pip install 'stepctl[mpi]'" in line


@pytest.mark.process
def test_without_numpy_and_h5py_it_says_so_and_answers_the_rest(tmp_path: Path) -> None:
    code, found = with_packages(tmp_path / "packages", "numpy", "h5py")
    assert (code, found.keys()) == (1, PARTS)
    assert [problem.split(":")[0] for problem in found["problems"]] == ["numerics", "hdf5"]
    assert "No module named 'numpy'" in found["problems"][0]
    assert all(trial["reason"] is None for trial in found["runs"]["trials"])


def test_a_part_that_raises_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_children: None
) -> None:
    for name in ("software", "machine", "environment", "extras"):
        monkeypatch.setattr(machine, name, lambda: [][0])
    monkeypatch.setattr(filesystem, "examine", lambda path: [][0])
    done = call("--runs", tmp_path)
    assert done.exit_code == 1
    failed = [line.split()[0] for line in done.stdout.splitlines() if "failed: " in line]
    assert failed == [
        "stepctl",
        "machine",
        "environment",
        "numerics",
        "kernels",
        "compiled",
        "hdf5",
        "mpi",
        "extras",
        "runs",
    ]


def abort() -> None:
    os.abort()


def leave() -> None:
    os.write(2, b"first\nno such chip\n")
    os._exit(3)


def exit_python() -> None:
    raise SystemExit("never")


def hang() -> None:
    threading.Event().wait()


@pytest.mark.process
@pytest.mark.parametrize(
    ("function", "error"),
    [
        (abort, "ended by SIGABRT"),
        (leave, "exit code 3: no such chip"),
        (exit_python, "SystemExit: never"),
        (hang, "no answer in 1 s"),
    ],
)
def test_a_library_that_ends_its_process_or_hangs_costs_only_its_part(
    function: Callable[[], None], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "CALL_SECONDS", 1.0 if function is hang else 60.0)
    with pytest.raises(child.ChildError, match=f"^{re.escape(error)}$"):
        child.call(function)


def test_an_hdf5_that_gives_other_bits_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    assert machine.checkpoint_round_trip(str(tmp_path / "gone"))["reason"].startswith(
        "a checkpoint cannot be written"
    )
    monkeypatch.setattr(codec, "restore", lambda reader, state: None)
    assert (
        without_paths(machine.checkpoint_round_trip(str(tmp_path))["reason"], HERE=tmp_path)
        == snapshot
    )


def test_the_extras_are_the_ones_declared_for_installation() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra, requirements in declared.items():
        if extra != "dev":
            assert machine.EXTRAS[extra] == tuple(text.split(">")[0] for text in requirements)


# --- the disk


def refuse(number: int) -> Callable[..., None]:
    def function(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return function


def nothing(*arguments: object) -> None:
    pass


SPOILT: dict[str, tuple[Any, str, Any, list[str]]] = {
    "fsync fails": (os, "fsync", refuse(errno.EIO), ["fsync of a file", "fsync of a folder"]),
    "rename fails": (os, "rename", refuse(errno.EXDEV), ["rename over a name"]),
    "rename does nothing": (os, "rename", nothing, ["rename over a name"]),
    "O_EXCL is ignored": (os, "O_EXCL", 0, ["O_EXCL"]),
    "O_APPEND is ignored": (os, "O_APPEND", 0, ["O_APPEND"]),
    "flock is not there": (
        fcntl,
        "flock",
        refuse(errno.ENOLCK),
        ["flock excludes", "flock ends with its holder"],
    ),
    "flock does not exclude": (fcntl, "flock", nothing, ["flock excludes"]),
    "flock never ends": (
        fcntl,
        "flock",
        refuse(errno.EAGAIN),
        ["flock excludes", "flock ends with its holder"],
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("case", SPOILT)
def test_a_missing_feature_of_a_disk_is_found(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_children: None
) -> None:
    module, name, replacement, failing = SPOILT[case]
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "_RELEASE_SECONDS", 0.0)
        patch.setattr(module, name, replacement)
        done = call("--runs", tmp_path, "--json")
    found = json.loads(done.stdout)["runs"]
    assert [trial["name"] for trial in found["trials"] if trial["reason"]] == failing
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith(f"{tmp_path}: {', '.join(failing)}: ")
    assert done.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_lock_that_does_not_exclude_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    monkeypatch.setattr(fcntl, "flock", nothing)
    done = call("--runs", tmp_path)
    assert done.exit_code == 1
    assert without_paths(done.stdout.splitlines()[-1], HERE=tmp_path) == snapshot


def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "runs"):
        (problem,) = filesystem.examine(str(path))["problems"]
        assert problem.startswith(
            f"{tmp_path / 'file'}: is not a folder, so no run can be kept in it; move it away"
        )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc")
def test_a_folder_without_write_access_is_one_problem() -> None:
    found = filesystem.examine("/proc/self")
    assert (found["type"], found["trials"], len(found["problems"])) == ("proc", [], 1)
    assert found["problems"][0].startswith("/proc/self: cannot create a folder in it")


def on_a_mount(options: str, fill: str, point: Path) -> dict[str, Any]:
    """Return what is found in a small tmpfs that no other process sees; skip the test where none can be mounted."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("mounting a file system needs root, and unshare")
    point.mkdir()
    code = "import json, sys; from stepctl.doctor import filesystem; print(json.dumps(filesystem.examine(sys.argv[1])))"
    script = (
        f'mount -t tmpfs -o {options} none "$1" || exit 77; {fill}\n"$2" -c "$3" "$1" && ls -A "$1"'
    )
    command = ["unshare", "--mount", "sh", "-c", script, "sh", point, sys.executable, code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"a tmpfs cannot be mounted ({done.stderr.strip()})")
    assert done.returncode == 0, done.stderr
    answer, *left = done.stdout.splitlines()
    assert left == ["filling"] * bool(fill)
    found: dict[str, Any] = json.loads(answer)
    assert found["type"] == "tmpfs"
    return found


@pytest.mark.process
def test_a_read_only_disk_is_one_problem(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    found = on_a_mount("ro", "", tmp_path / "mount")
    assert [without_paths(line, HERE=tmp_path) for line in found["problems"]] == snapshot


@pytest.mark.process
def test_a_full_disk_is_one_problem(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    found = on_a_mount(
        "size=64k", 'cat /dev/zero > "$1/filling" 2> "$1/../said"', tmp_path / "mount"
    )
    assert found["free"] == 0
    assert [without_paths(line, HERE=tmp_path) for line in found["problems"]] == snapshot


MOUNTS = """\
1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
2 1 0:5 / /home rw,nosuid - nfs4 server:/home rw,vers=4.2
3 2 0:6 / /home/with\\040space ro - fuse.sshfs host: rw
4 1 0:7 / /run rw - tmpfs none rw
5 1 0:8 / /home rw,noexec master:2 shared:3 - ceph cluster:/ rw
torn line
"""


@pytest.mark.parametrize(
    ("folder", "kind", "options"),
    [
        ("/", "ext4", "rw,relatime"),
        ("/runs", "ext4", "rw,relatime"),  # not below /run
        ("/run/runs", "tmpfs", "rw"),
        ("/home/me/runs", "ceph", "rw,noexec"),  # the later of two on one point hides the other
        ("/home/with space", "fuse.sshfs", "ro"),
    ],
)
def test_the_file_system_is_found_by_the_longest_mount_point(
    folder: str, kind: str, options: str
) -> None:
    assert filesystem.find_mount(MOUNTS, folder) == {"type": kind, "options": options}


@pytest.mark.process
def test_without_a_mount_table_the_file_system_type_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_MOUNTS", str(tmp_path / "none"))
    found = filesystem.examine(str(tmp_path))
    assert (found["type"], found["problems"]) == ("unknown", [])


# --- which BLAS kernel is fastest


def kernels_of(
    monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float], used: str, supported: set[str]
) -> dict[str, Any]:
    """Compare kernels whose products take these times."""

    def timed(function: object, threads: str, environment: dict[str, str] | None = None) -> Any:
        kernel = (environment or {}).get(blas.KERNEL_VARIABLE, used)
        return {"kernel": kernel, "milliseconds": milliseconds[kernel]}

    monkeypatch.setattr(child, "call", timed)
    monkeypatch.setattr(blas, "cpu_supports", supported.__contains__)
    return kernels.compare_kernels()


def test_a_kernel_that_is_clearly_faster_is_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"Haswell", "SkylakeX"}
    found = kernels_of(monkeypatch, {"Haswell": 2.0, "SkylakeX": 2.5}, "SkylakeX", both)
    assert found["milliseconds"] == {"SkylakeX": 2.5, "Haswell": 2.0}
    assert (found["used"], found["faster"]) == ("SkylakeX", "Haswell")
    found = kernels_of(monkeypatch, {"Haswell": 2.0, "SkylakeX": 2.05}, "SkylakeX", both)
    assert found["faster"] is None


def test_a_kernel_that_would_crash_here_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_of(monkeypatch, {"Haswell": 2.0}, "Haswell", {"Haswell"})
    assert (found["milliseconds"], found["faster"]) == ({"Haswell": 2.0}, None)
    found = kernels_of(monkeypatch, {"unknown": 2.0}, "unknown", {"Haswell"})  # another BLAS
    assert (found["milliseconds"], found["faster"]) == ({"unknown": 2.0}, None)


@pytest.mark.process
def test_each_kernel_is_loaded_that_this_cpu_supports() -> None:
    found = kernels.compare_kernels()
    if found["used"] in ("Haswell", "SkylakeX"):
        assert found["milliseconds"].keys() == {
            name for name in ("Haswell", "SkylakeX") if blas.cpu_supports(name)
        }
    assert all(value > 0 for value in found["milliseconds"].values())
