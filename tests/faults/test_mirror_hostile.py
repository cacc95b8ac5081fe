"""Hostile mirrors: refused with exit code 3 and one line; nothing is written outside the run directory.

Every manifest has a valid digest, and is refused for its content. A few are tried by default, all
with `pytest --faults`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import hostile_mirrors, series_files
from tests.support.hostile_mirrors import (
    MANIFESTS,
    STORES,
    change_manifest,
    checkpoint_object,
    encode,
    fields_of,
    manifests,
    newest_manifest,
)
from tests.support.mirror_site import quick_mirror
from tests.support.processes import start
from tests.support.program_runs import rows, saved_state
from tests.support.run_checks import checkpoints
from tests.support.run_files import file_contents
from tests.support.stops import some_of

Figure = Callable[[str, int], None]
DONE, REFUSED = 0, 3
SECONDS = 30.0  # for any refusal
LAST = 12
CONFIG = f"""\
seed: 3
program: {{name: "tests.support.sampler:Sampler"}}
stop: {{last_step: {LAST}}}
log: {{every: 1}}
checkpoint: {{every: 4}}
numerics: {{threads: 1}}
"""


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its run, and `store`, the mirror with three commits, which was moved."""
    folder = tmp_path_factory.mktemp("hostile-mirrors")
    (folder / "config.yaml").write_text(CONFIG)
    command = ["train", "--config", "config.yaml", "--run-dir", folder / "run"]
    mirror = ["--mirror", (folder / "where-it-was").as_uri()]
    with start([*command, *mirror, "--last-step", 4], cwd=folder, call=quick_mirror) as child:
        assert child.wait() == DONE, child.said()
    for last_step in (8, 12):
        command = ["resume", folder / "run", "--last-step", last_step]
        with start(command, cwd=folder, call=quick_mirror) as child:
            assert child.wait() == DONE, child.said()
    (folder / "where-it-was").rename(folder / "store")
    assert len(manifests(folder / "store")) == 3
    return folder


@pytest.fixture
def store(mirrored: Path, tmp_path: Path) -> Path:
    """A copy of the mirror that a test may change."""
    return Path(shutil.copytree(mirrored / "store", tmp_path / "store"))


# what the objects of these are is found out when the run is resumed
FETCHED = {
    "a config that is the checkpoint",
}
# in a folder, what is no regular file is no object
CODES = {
    "a manifest that is a folder": 2,
    "a manifest that is a pipe": 2,
    "a manifest that is a link to itself": 2,
    "a manifest that is a link to a device": 2,
    "a checkpoint that is a link": 1,
    "a checkpoint that is a pipe": 1,
}


@pytest.mark.parametrize("name", some_of(MANIFESTS, every=16))
def test_a_hostile_manifest_is_refused(
    name: str, store: Path, tmp_path: Path, figure: Figure
) -> None:
    change_manifest(store, MANIFESTS[name])
    assert_refused(store, tmp_path, code=DONE if name in FETCHED else REFUSED)
    figure("hostile mirrors", 1)


@pytest.mark.parametrize("name", some_of(STORES, every=8))
def test_a_hostile_store_is_refused(name: str, store: Path, tmp_path: Path, figure: Figure) -> None:
    STORES[name](store)
    assert_refused(store, tmp_path, code=CODES.get(name, REFUSED))
    figure("hostile mirrors", 1)


def assert_refused(store: Path, folder: Path, *, code: int = REFUSED) -> None:
    """Assert that no command trains from this mirror, or changes anything outside its run.

    `code` is that of a pull, DONE if only a resume finds out what was fetched.
    """
    run = folder / "runs" / "pulled"
    url = store.as_uri()
    before = outside(folder)
    more = ["--last-step", LAST + 4]
    refused = {code} if code != DONE else {2, REFUSED}
    commands: list[tuple[list[object], set[int]]] = [
        (["pull", url, run], {code}),
        (["resume", run, "--mirror", url, *more], {2, REFUSED}),
        (["resume", url, "--run-dir", run, *more], refused),
        (["verify", url], {DONE, 1, 2, REFUSED}),  # neither reads all objects
        (["inspect", url], {DONE, 1, 2, REFUSED}),
    ]
    for command, codes in commands:
        found, said = outcome(command, folder)
        assert found in codes, said
        assert outside(folder) == before


def outcome(command: list[object], folder: Path) -> tuple[int, str]:
    """Run a command; return its exit code and what it said, which is text, and short."""
    output = f"said-{command[0]}.txt"
    with start(command, cwd=folder, output=output, call=quick_mirror) as child:
        code, said = child.wait(SECONDS), child.said()
    (folder / output).unlink()
    assert "Traceback" not in said
    assert len(said) < 3000, said[:1000]
    assert not set(said) & set("\x1b\0\x07"), said
    return code, said


def outside(folder: Path) -> dict[str, object]:
    """Return what is in a folder except for runs and owners: the bytes of files, the names of all else."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if not name.startswith(("runs", "store/log", "store/beats", "store/released")):
            is_file = path.is_file() and not path.is_symlink()
            found[name] = path.read_bytes() if is_file else None
    found["/tmp"] = Path("/tmp/evil-of-stepctl").exists()
    return found


def test_the_mirror_that_they_are_made_of_is_good(
    mirrored: Path, store: Path, tmp_path: Path
) -> None:
    code, said = outcome(["pull", store.as_uri(), tmp_path / "runs" / "pulled"], tmp_path)
    assert code == DONE, said
    assert_same_run(tmp_path / "runs" / "pulled", mirrored / "run", LAST)


def assert_same_run(run: Path, expected: Path, step: int) -> None:
    """Assert that a pulled run is the expected one up to a step."""
    assert list(checkpoints(run)) == [step]
    assert saved_state(run, step) == saved_state(expected, step)
    assert rows(run) == [row for row in rows(expected) if row["step"] <= step]
    assert series_files.rows_to(run, step) == series_files.rows_to(expected, step)


# --- damage, where an older commit is good

DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda store: newest_manifest(store).write_bytes(b""),
    "a flipped byte in the manifest": lambda store: flip(newest_manifest(store)),
    "a checkpoint that is missing": lambda store: newest_object(store, "checkpoint").unlink(),
    "a checkpoint with a flipped byte": lambda store: flip(newest_object(store, "checkpoint")),
    "a checkpoint that is cut off": lambda store: cut(newest_object(store, "checkpoint")),
}


def newest_object(store: Path, kind: str) -> Path:
    epoch, seq, sha256, _ = fields_of(newest_manifest(store))[kind]
    return store / "data" / f"{epoch:010d}-{seq:010d}-{sha256}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", some_of(DAMAGES, every=3))
def test_a_damaged_newest_commit_is_passed_over(
    name: str, mirrored: Path, store: Path, tmp_path: Path
) -> None:
    DAMAGES[name](store)
    url = store.as_uri()
    expected = mirrored / "run"
    pulled, resumed, repaired = (tmp_path / "runs" / name / "run" for name in "abc")
    code, said = outcome(["pull", url, pulled], tmp_path)
    assert code == DONE, said
    assert_same_run(pulled, expected, LAST - 4)
    code, said = outcome(["resume", url, "--run-dir", resumed, "--last-step", LAST], tmp_path)
    assert code == DONE, said
    assert rows(resumed) == rows(expected)
    code, said = outcome(["pull", url, repaired], tmp_path)
    assert code == DONE, said
    assert_same_run(repaired, expected, LAST)
    code, said = outcome(["verify", url], tmp_path)
    assert code == DONE, said


# --- files of the run that are not its own


def hostile_content(store: Path, name: str, content: bytes) -> None:
    """Give the newest commit, now the only one, another object, of the right size and digest."""
    import hashlib

    digest = hashlib.sha256(content).hexdigest()
    stored = [1, 1, digest, len(content)]
    (store / "data" / f"{1:010d}-{1:010d}-{digest}").write_bytes(content)

    def change(fields: dict[str, Any]) -> None:
        if name in ("checkpoint", "config"):
            fields[name] = stored
        else:
            fields["files"][name] = [stored]

    change_manifest(store, change)


CONTENTS: dict[str, tuple[str, bytes]] = {
    "a checkpoint of zeros": ("checkpoint", bytes(4096)),
    "an empty checkpoint": ("checkpoint", b""),
    "a config of zeros": ("config", bytes(100)),
    "an empty config": ("config", b""),
    "a config that is a list": ("config", b"[1]"),
    "a config of aliases": ("config", b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    "a config that is nested": ("config", b"[" * 100_000),
    "an empty ledger": ("ledger.jsonl", b""),
    "a ledger of zeros": ("ledger.jsonl", bytes(100)),
    "a ledger of another run": (
        "ledger.jsonl",
        b'{"event": "start", "segment": 1, "step": 0, "target": 12, "run_id": "'
        + b"f" * 32
        + b'"}\n',
    ),
    "a ledger that prunes all": (
        "ledger.jsonl",
        b'{"event": "prune", "steps": [' + b",".join(b"%d" % i for i in range(10**5)) + b"]}\n",
    ),
    "a ledger with a file elsewhere": (
        "ledger.jsonl",
        b'{"event": "checkpoint", "step": 12, "file": "../../evil", "sha256": "00", "pruned": []}\n',
    ),
    "series without a type": ("series/samples.json", b"{}"),
    "series of a huge type": (
        "series/samples.json",
        b'{"dtype": "float64", "shape": [1000000000000]}',
    ),
    "series of objects": ("series/samples.json", b'{"dtype": "object", "shape": []}'),
}


@pytest.mark.parametrize("name", some_of(CONTENTS, every=8))
def test_hostile_files_of_a_run_are_refused_when_it_is_resumed(
    name: str, store: Path, tmp_path: Path, figure: Figure
) -> None:
    hostile_content(store, *CONTENTS[name])
    is_fetched = name.startswith(("a config", "an empty config", "series"))
    assert_refused(store, tmp_path, code=DONE if is_fetched else REFUSED)
    figure("hostile mirrors", 1)


# --- owners

OWNERS: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(100),
    "10 MB": bytes(10_000_000),
    "without fields": encode("stepctl-owner 1", {}),
    "a manifest": encode("stepctl-manifest 1", {}),
    "nested": hostile_mirrors.with_digest("stepctl-owner 1", b"[" * 100_000),
    "a host of control characters": encode(
        "stepctl-owner 1",
        {
            "run_id": "0" * 32,
            "nonce": "0" * 32,
            "host": "\x1b]0;evil\x07\n" * 10,
            "boot_id": "b",
            "pid_namespace": "n",
            "pid": 1,
            "beat_seconds": 0.01,
        },
    ),
    "beats of a year": encode(
        "stepctl-owner 1",
        {
            "run_id": "0" * 32,
            "nonce": "0" * 32,
            "host": "h",
            "boot_id": "b",
            "pid_namespace": "n",
            "pid": 1,
            "beat_seconds": 3e7,
        },
    ),
}


@pytest.mark.parametrize("name", some_of(OWNERS, every=8))
def test_a_hostile_owner_is_refused_or_followed(
    name: str, mirrored: Path, store: Path, tmp_path: Path, figure: Figure
) -> None:
    epoch = max(int(path.name[:10]) for path in (store / "log").iterdir())
    (store / "log" / f"{epoch + 1:010d}-{0:010d}").write_bytes(OWNERS[name])
    run = tmp_path / "runs" / "pulled"
    before = outside(tmp_path)
    code, said = outcome(["resume", store.as_uri(), "--run-dir", run], tmp_path)
    assert code in (DONE, REFUSED, 4), said
    kept = {name: content for name, content in outside(tmp_path).items() if name in before}
    assert kept == before
    run = tmp_path / "runs" / "taken"
    code, said = outcome(
        ["resume", store.as_uri(), "--run-dir", run, "--take-over", "--last-step", 14], tmp_path
    )
    assert code == DONE, said
    assert rows(run)[:LAST] == rows(mirrored / "run")
    figure("hostile mirrors", 1)


def test_the_pull_of_a_hostile_mirror_leaves_a_run_that_is_there_alone(
    mirrored: Path, store: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(mirrored / "run", tmp_path / "runs" / "run"))
    before = file_contents(run)
    checkpoint_object(store).unlink()
    code, said = outcome(["pull", store.as_uri(), run], tmp_path)
    assert code == 2, said
    assert file_contents(run) == before
