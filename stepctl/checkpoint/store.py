"""The checkpoints of a run: publish, find the newest good one, set aside, prune.

The directory is the truth: no pointer file, nothing edited, nothing replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepctl.checkpoint import codec, names, retention, userblock
from stepctl.errors import CheckpointError, StepctlError, UnreadableError
from stepctl.folder import Folder, write_all, writing
from stepctl.rundir import Records

if TYPE_CHECKING:
    from stepctl.config import Checkpoint

Accept = Callable[[codec.Reader], None]  # raises CheckpointError at a checkpoint that it cannot use
Body = Iterable[bytes | memoryview]  # all that follows the user block
_LOOKS = 10  # at a directory from which files go while it is looked through
_UNFIT = {"mismatch", "config"}  # codes of whole checkpoints that belong to another config


class Abandoned(Exception):
    """The checkpoint that was being written is wanted no more."""


class Store:
    """A directory of `step-%08d.h5` files."""

    def __init__(self, folder: Folder | Path, records: Callable[[], Records] | None = None) -> None:
        """With a run's `records`, only checkpoints of that run are opened; None: any.

        Files whose sha256 is not acknowledged there are first opened in a sandbox. `records` is called anew for each
        file: the run may be going on.
        """
        self._folder = folder if isinstance(folder, Folder) else Folder(folder)
        self._records = records
        self.path, self._shown = self._folder.path, self._folder.shown

    def file(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.path / names.file_name(step)

    def steps(self) -> list[int]:
        """Return the steps that have a file, rising; whether they are good is not known yet.

        UnreadableError if the directory cannot be listed now.
        """
        return names.steps(self._folder.names())

    def publish(self, step: int, image: Body, abandoned: Callable[[], bool] = lambda: False) -> str:
        """Make a checkpoint durable, read it back, and only then acknowledge it: return its sha256.

        A file that stands under the name already (one that was damaged, and so skipped) is set aside first, unless
        it cannot be read now, and so may be good: UnreadableError.
        """
        path = self._shown / names.file_name(step)
        with writing(path):
            in_the_way = self._folder.stat(path.name) is not None
        if in_the_way:
            with contextlib.suppress(CheckpointError):
                self.verified(step).file.close()
            self.set_aside(step)
        sha256, length = hashlib.sha256(), 0
        with self._folder.publishing(path.name) as descriptor:
            os.lseek(descriptor, userblock.SIZE, os.SEEK_SET)
            for chunk in image:
                if abandoned():
                    raise Abandoned
                sha256.update(chunk)
                write_all(descriptor, chunk)
                length += len(chunk)
            head = userblock.make(sha256.hexdigest(), length)
            os.lseek(descriptor, 0, os.SEEK_SET)
            write_all(descriptor, head)
        try:
            userblock.check_content(self.file(step), itertools.chain([head], image), self._folder.dir_fd)
        except (CheckpointError, UnreadableError, OSError) as error:
            raise StepctlError(f"{path}: written, but it does not read back: {error}; mend the disk") from error
        return sha256.hexdigest()

    def newest(self, report: Callable[[str], None], accept: Accept = lambda reader: None) -> codec.Reader:
        """Open the checkpoint of the highest step that verifies and that `accept` does not refuse.

        Refused ones (CheckpointError) are reported and left in place. CheckpointError if there is no other;
        UnreadableError at one that cannot be read now: it may be the newest good one.
        """
        for look in range(_LOOKS):
            refused: list[CheckpointError] = []
            for step in reversed(self.steps()):
                try:
                    reader = self.open(step, accept)
                except CheckpointError as error:
                    if look + 1 < _LOOKS and self._folder.stat(names.file_name(step)) is None:
                        break  # pruned since, so a newer one is there
                    refused.append(error)
                    continue
                for reason in refused:
                    report(f"{str(reason).splitlines()[0]}; using {reader.name}")
                return reader
            else:
                break
        raise self._none(refused)

    def _none(self, refused: list[CheckpointError]) -> CheckpointError:
        if refused and all(error.code in _UNFIT for error in refused):
            return refused[0]  # all are whole, and none fits: the newest says why
        reasons = "; ".join(str(error).splitlines()[0] for error in refused)
        if not refused and not (self._records and self._records().acknowledged):
            return CheckpointError("none", f"{self._shown}: no checkpoint is there; start the run with: stepctl train")
        if any(error.code == "newer" for error in refused):
            return CheckpointError("newer", f"{self._shown}: no checkpoint that this stepctl can read ({reasons})")
        if refused:
            detail, remedy = f"{len(refused)} files, none good: {reasons}", ""
        else:
            detail = "ledger.jsonl acknowledges some, and all are gone"
            remedy = "if they are on another disk, mount it; else "
        remedy += "start again in a new --run-dir"
        return CheckpointError("none", f"{self._shown}: no usable checkpoint ({detail}); {remedy}")

    def open(self, step: int, accept: Accept = lambda reader: None) -> codec.Reader:
        """Open the checkpoint of one step, if `accept` takes it; CheckpointError names the steps that there are."""
        if step not in self.steps():
            have = ", ".join(str(known) for known in self.steps()) or "none"
            raise CheckpointError("none", f"{self._shown}: no checkpoint of step {step}; there are: {have}")
        reader = codec.Reader(self.file(step), lambda digest: self._vet(step, digest), dir_fd=self._folder.dir_fd)
        try:
            self._refuse_other_run(reader)
            accept(reader)
        except BaseException:
            reader.close()
            raise
        return reader

    def _refuse_other_run(self, reader: codec.Reader) -> None:
        if self._records is not None:
            refuse_other_run(reader.name, reader.header.run_id, reader.header.sha256, self._records())

    def _vet(self, step: int, digest: str) -> None:
        if self._records is not None and digest not in self._records().acknowledged:
            from stepctl.sandbox import Sandbox  # rarely needed, and not light

            with Sandbox() as sandbox:
                answer = sandbox.call("stepctl.checkpoint.codec:check", str(self.file(step)))
            if answer["sha256"] != digest:
                raise CheckpointError("changed", f"{self.file(step).name}: changed while it was read")

    def aside_name(self, step: int) -> str:
        """Return the name that a step's file gets when it is set aside."""
        name = names.file_name(step)
        with writing(self._shown / name):
            return self._folder.free_name(name)

    def set_aside(self, step: int, aside: str | None = None) -> None:
        """Rename a step's file, so that it is kept but never loaded."""
        name = names.file_name(step)
        with writing(self._shown / name):
            self._folder.rename(name, aside or self.aside_name(step))

    def set_aside_all(self, asides: Mapping[int, str]) -> None:
        """Rename the files of several steps, those that still have their names; `asides` is step -> new name.

        The newest comes first: after a kill the newest that is left is still none that training goes on from.
        """
        for step, aside in sorted(asides.items(), reverse=True):
            if self._folder.stat(names.file_name(step)) is not None and self._folder.stat(aside) is None:
                self.set_aside(step, aside)

    def to_prune(
        self,
        published: int,
        keep: Checkpoint,
        metrics: Mapping[int, Mapping[str, Any]],
        protected: Collection[int] = (),
        passed_over: Collection[int] = (),
    ) -> list[int]:
        """Return the steps, up to the one just published, that retention does not keep.

        Files that a resume passed over (`passed_over`, and all of later steps) are damaged: they take no good one's
        place, and stay.
        """
        try:
            steps = self.steps()
        except UnreadableError:  # no reason to stop training: the next save prunes
            return []
        good = [step for step in steps if step <= published and step not in passed_over]
        return retention.to_prune(good, keep, metrics, protected)

    def remove(self, steps: Iterable[int]) -> None:
        """Remove checkpoints that retention does not keep."""
        for step in steps:
            with contextlib.suppress(OSError):  # what cannot be removed is no reason to stop training
                self._folder.remove(names.file_name(step))

    def verified(self, step: int) -> userblock.Verified:
        """Open a step's file whose digest is right; errors as `userblock.open_verified` has them."""
        return userblock.open_verified(self.file(step), self._folder.dir_fd)


def refuse_other_run(name: str, run_id: str | None, sha256: str, records: Records) -> None:
    """Raise CheckpointError if a checkpoint is not one of the run whose ledger says `records`."""
    if records.owns(run_id, sha256):
        return
    if run_id is None:
        reason = "of format version 1, and its sha256 is not acknowledged in ledger.jsonl"
    else:
        reason = f"of another run (run_id {run_id}, this run's is {records.run_id or 'not known'})"
    raise CheckpointError("run", f"{name}: {reason}")
