"""The checkpoints of a run: publish, find the newest good one, set aside, remove.

    store = Store(directory.checkpoint_folder, directory.read_ledger)
    sha256 = store.publish(step, codec.encode(state, ...))
    with store.newest(report=print) as reader:
        codec.restore(reader, state)

The newest checkpoint is computed from the directory: there is no pointer file, and no file is
edited or replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from stepctl.checkpoint import codec, names, user_block
from stepctl.checkpoint.check import check
from stepctl.errors import CheckpointError, StepctlError, UnreadableError
from stepctl.rundir.ledger import Ledger
from stepctl.system.files import write_all, write_errors
from stepctl.system.folder import Folder

Accept = Callable[[codec.Reader], None]  # raises CheckpointError to refuse a checkpoint
Chunks = Iterable[bytes | memoryview]

_MAX_LISTINGS = 10  # of a directory whose files are pruned meanwhile
_UNFIT = {"mismatch", "config"}  # codes of good checkpoints that do not fit the config


class Abandoned(Exception):
    """The checkpoint was abandoned while it was written."""


class Store:
    """A directory of `step-%08d.h5` files."""

    def __init__(
        self, folder: Folder | Path, read_ledger: Callable[[], Ledger] | None = None
    ) -> None:
        """Open checkpoints of one run, if its ledger is given, or of any.

        A file whose sha256 the ledger does not acknowledge is first opened in a sandbox.
        The ledger is read once, and again for a checkpoint that it does not acknowledge: another
        process may be training the run.
        """
        self._folder = folder if isinstance(folder, Folder) else Folder(folder)
        self._read_ledger = read_ledger
        self._ledger: Ledger | None = None
        self.path = self._folder.path
        self._display_path = self._folder.display_path

    def file(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.path / names.file_name(step)

    def steps(self) -> list[int]:
        """Return the steps that have a file, good or not, in ascending order.

        UnreadableError if the directory cannot be listed now.
        """
        return names.steps(self._folder.names())

    # --- publishing

    def publish(
        self, step: int, image: Chunks, abandoned: Callable[[], bool] = lambda: False
    ) -> str:
        """Write a checkpoint durably, read it back, and return its sha256 for the ledger.

        An existing file of that name (damaged, so that a resume skipped it) is set aside first.
        UnreadableError if it cannot be read now: it may be good. Abandoned if `abandoned` returns
        True between two chunks.
        """
        path = self._display_path / names.file_name(step)
        self._free_name(step)
        with self._folder.publishing(path.name) as descriptor:
            head, sha256 = _write_image(descriptor, image, abandoned)
        try:
            content = itertools.chain([head], image)
            user_block.check_content(self.file(step), content, self._folder.dir_fd())
        except (CheckpointError, UnreadableError, OSError) as error:
            raise StepctlError(
                f"{path}: written, but reading it back failed: {error}; check the disk"
            ) from error
        return sha256

    def _free_name(self, step: int) -> None:
        """Set an existing file of this step aside, unless it cannot be read now."""
        with write_errors(self._display_path / names.file_name(step)):
            exists = self._exists(step)
        if not exists:
            return
        with contextlib.suppress(CheckpointError):
            self.open_verified(step).file.close()
        self.set_aside(step)

    # --- opening

    def newest(
        self, report: Callable[[str], None], accept: Accept = lambda reader: None
    ) -> codec.Reader:
        """Open the checkpoint of the highest step that verifies and that `accept` does not refuse.

        Refused ones are reported and left in place. CheckpointError if no other is left;
        UnreadableError at one that cannot be read now, because it may be the newest good one.
        """
        for listing in range(_MAX_LISTINGS):
            may_list_again = listing + 1 < _MAX_LISTINGS
            refused: list[CheckpointError] = []
            for step in reversed(self.steps()):
                try:
                    reader = self.open(step, accept)
                except CheckpointError as error:
                    if may_list_again and not self._exists(step):
                        break  # pruned meanwhile, so a newer one exists
                    refused.append(error)
                else:
                    for reason in refused:
                        report(f"{str(reason).splitlines()[0]}; using {reader.name}")
                    return reader
            else:
                break
        raise self._no_checkpoint(refused)

    def _no_checkpoint(self, refused: list[CheckpointError]) -> CheckpointError:
        if refused and all(error.code in _UNFIT for error in refused):
            return refused[0]  # the reason why the newest good one does not fit
        reasons = "; ".join(str(error).splitlines()[0] for error in refused)
        if any(error.code == "newer" for error in refused):
            return CheckpointError(
                "newer",
                f"{self._display_path}: no checkpoint that this stepctl can read ({reasons})",
            )
        if refused:
            return CheckpointError(
                "none",
                f"{self._display_path}: no usable checkpoint "
                f"({len(refused)} files, none good: {reasons}); start again in a new --run-dir",
            )
        if self._read_ledger is not None and self._read_ledger().acknowledged:
            return CheckpointError(
                "none",
                f"{self._display_path}: no usable checkpoint (ledger.jsonl acknowledges some, but all "
                "are missing); if they are on another disk, mount it; else start again in a new --run-dir",
            )
        return CheckpointError(
            "none", f"{self._display_path}: no checkpoint found; start the run with: stepctl train"
        )

    def open(self, step: int, accept: Accept = lambda reader: None) -> codec.Reader:
        """Open one checkpoint; CheckpointError if it is missing, not good, or not accepted."""
        steps = self.steps()
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                "none",
                f"{self._display_path}: no checkpoint of step {step}; available steps: {have}",
            )
        reader = codec.Reader(
            self.file(step),
            lambda sha256: self._check_unacknowledged(step, sha256),
            dir_fd=self._folder.dir_fd(),
        )
        try:
            header = reader.header
            ledger = self.ledger_with(header.sha256)
            if ledger is not None:
                refuse_other_run(reader.name, header.run_id, header.sha256, ledger)
            accept(reader)
        except BaseException:
            reader.close()
            raise
        return reader

    def ledger_with(self, sha256: str) -> Ledger | None:
        """Return the ledger, read again unless it acknowledges this checkpoint; None without one."""
        if self._read_ledger is None:
            return None
        if self._ledger is None or sha256 not in self._ledger.acknowledged:
            self._ledger = self._read_ledger()
        return self._ledger

    def _check_unacknowledged(self, step: int, sha256: str) -> None:
        """Open a file that the ledger does not acknowledge in a sandbox, which may refuse it."""
        ledger = self.ledger_with(sha256)
        if ledger is None or sha256 in ledger.acknowledged:
            return
        check_in_sandbox(self.file(step), sha256)

    def open_verified(self, step: int) -> user_block.Verified:
        """Open a step's file and check its digest only; errors as in `user_block.open_verified`."""
        return user_block.open_verified(self.file(step), self._folder.dir_fd())

    # --- setting aside and removing

    def aside_name(self, step: int) -> str:
        """Return the name that a step's file gets when it is set aside."""
        name = names.file_name(step)
        with write_errors(self._display_path / name):
            return self._folder.aside_name(name)

    def set_aside(self, step: int, aside: str | None = None) -> None:
        """Rename a step's file: it is kept, but never loaded again."""
        name = names.file_name(step)
        with write_errors(self._display_path / name):
            self._folder.rename(name, aside or self.aside_name(step))

    def set_aside_all(self, asides: Mapping[int, str]) -> None:
        """Set several steps aside, unless that was done before; `asides` is step -> new name.

        The newest is renamed first. After a kill, the newest of the rest is still one to be set
        aside.
        """
        for step, aside in sorted(asides.items(), reverse=True):
            if self._exists(step) and self._folder.stat(aside) is None:
                self.set_aside(step, aside)

    def remove(self, steps: Iterable[int]) -> None:
        """Remove checkpoints; a file that cannot be removed is left and does not stop training."""
        for step in steps:
            with contextlib.suppress(OSError):
                self._folder.remove(names.file_name(step))

    def _exists(self, step: int) -> bool:
        return self._folder.stat(names.file_name(step)) is not None


def open_file(path: str) -> codec.Reader:
    """Open a checkpoint that belongs to no known run; it is first opened in a sandbox."""
    return codec.Reader(path, lambda sha256: check_in_sandbox(Path(path), sha256))


def check_in_sandbox(path: Path, sha256: str) -> None:
    """Open a checkpoint with this digest in a sandbox, which may refuse it."""
    from stepctl.system.sandbox import Sandbox

    with Sandbox() as sandbox:
        answer = sandbox.call(check, str(path))
    if answer["sha256"] != sha256:
        raise CheckpointError("changed", f"{path.name}: changed while it was read")


def _write_image(
    descriptor: int, image: Chunks, abandoned: Callable[[], bool]
) -> tuple[bytes, str]:
    """Write the HDF5 part, then the user block before it; return the user block and the sha256."""
    sha256 = hashlib.sha256()
    length = 0
    os.lseek(descriptor, user_block.SIZE, os.SEEK_SET)
    for chunk in image:
        if abandoned():
            raise Abandoned
        sha256.update(chunk)
        write_all(descriptor, chunk)
        length += len(chunk)
    head = user_block.make(sha256.hexdigest(), length)
    os.lseek(descriptor, 0, os.SEEK_SET)
    write_all(descriptor, head)
    return head, sha256.hexdigest()


def refuse_other_run(name: str, run_id: str | None, sha256: str, ledger: Ledger) -> None:
    """Raise CheckpointError if a checkpoint belongs to another run than the ledger."""
    if ledger.owns(run_id, sha256):
        return
    if run_id is None:
        reason = "has format version 1, and ledger.jsonl does not acknowledge its sha256"
    else:
        reason = f"belongs to another run (run_id {run_id}, this run's is {ledger.run_id or 'not known'})"
    raise CheckpointError("run", f"{name}: {reason}")
