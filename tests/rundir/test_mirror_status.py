"""The mirror's state in a run directory: which checkpoint is mirrored, and its ledger lines."""

from pathlib import Path

from stepctl.checkpoint.expected import pending_set_aside
from stepctl.rundir.ledger import Ledger
from stepctl.rundir.mirror_status import MirrorStatus, is_mirrored
from stepctl.system.folder import Folder

URL = "s3://bucket/runs/digits"


def test_a_checkpoint_is_mirrored_only_if_the_newest_commit_has_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert not is_mirrored(folder, URL, "a" * 64)
    MirrorStatus(URL, epoch=1, seq=2, step=100, sha256="a" * 64).write(folder)
    assert is_mirrored(folder, URL, "a" * 64)
    assert is_mirrored(folder, f"{URL}/", "a" * 64)
    assert not is_mirrored(folder, URL, "b" * 64)
    assert not is_mirrored(folder, f"{URL}-2", "a" * 64)


def test_a_line_of_the_mirror_leaves_checkpoints_to_be_set_aside() -> None:
    start = {
        "event": "start",
        "segment": 2,
        "step": 5,
        "target": 9,
        "data": "0",
        "set_aside": ["step-00000007.h5.aside-1"],
    }
    mirror = {"event": "mirror", "url": URL, "state": "failing"}
    pending = pending_set_aside(Ledger([start]))
    assert list(pending) == [7]
    assert pending_set_aside(Ledger([start, mirror])) == pending
