"""The mirror of a segment: claimed at its start, given each checkpoint, awaited at its end.

    mirroring = start_mirroring(directory, config.mirror, run_id=..., restored=..., ...)
    mirroring.offer(100, sha256)    # after the ledger has acknowledged the checkpoint
    mirroring.close(say)

Importing this module imports the whole of `stepctl.mirror`.
"""

from __future__ import annotations

import os
import threading
import time
from typing import final

from stepctl.config.model import MirrorConfig
from stepctl.errors import CheckpointError, ConfigError
from stepctl.hooks.base import Hook
from stepctl.mirror import fetch
from stepctl.mirror.chunks import Digest, matching_pieces
from stepctl.mirror.claimed import ClaimedMirror
from stepctl.mirror.manifest import Manifest, Owner
from stepctl.mirror.protocol import Claim
from stepctl.mirror.store import ObjectStore, open_store
from stepctl.mirror.uploader import Behind, Uploader
from stepctl.mirror.writer import Checkpoint
from stepctl.programs.base import Metrics
from stepctl.rundir.directory import RunDirectory
from stepctl.rundir.json_lines import parse_row
from stepctl.rundir.ledger import Ledger
from stepctl.runs.compatibility import MirrorFacts
from stepctl.runs.messages import Say
from stepctl.state.train_state import TrainState
from stepctl.system.shell import command

_CLAIM_SECONDS = 5.0  # that the start of a segment waits for the store
_MAX_LEDGER = 1 << 28  # bytes


@final
class Mirroring(Hook):
    """The uploader of a segment. As a hook it shows the messages, and stops a deposed segment.

    `seconds_on_training_thread` is the time that the training thread has spent here.
    """

    name = "mirror"

    def __init__(
        self, uploader: Uploader, directory: RunDirectory, config: MirrorConfig, say: Say
    ) -> None:
        self.seconds_on_training_thread = 0.0
        self._uploader = uploader
        self._directory = directory
        self._config = config
        self._say = say
        self._is_closed = False
        self._has_raised = False  # that another process owns the mirror
        self._training_thread = threading.get_ident()

    @property
    def facts(self) -> MirrorFacts:
        """What the segment's first ledger line records."""
        claim = self._uploader.claim
        epoch = None if claim is None else claim.epoch
        return {"url": self._config.url, "epoch": epoch}

    def offer(self, step: int, sha256: str) -> None:
        """Mirror a checkpoint that the ledger acknowledges; called from any thread."""
        started = time.perf_counter()
        self._uploader.offer(Checkpoint(step, sha256))
        if threading.get_ident() == self._training_thread:
            self.seconds_on_training_thread += time.perf_counter() - started

    def start(self, state: TrainState) -> None:
        self._uploader.begin()

    def after_step(self, state: TrainState, metrics: Metrics) -> None:
        if not self._uploader.has_news:
            return
        started = time.perf_counter()
        self._show_messages()
        deposed = self._uploader.deposed
        self.seconds_on_training_thread += time.perf_counter() - started
        if deposed is not None:
            self._has_raised = True
            raise deposed

    def _show_messages(self) -> None:
        for message in self._uploader.take_messages():
            self._say(message)

    def close(self, seconds: float | None = None) -> None:
        """Wait for the upload, by default as long as the config says; report what is not mirrored.

        A second call does nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if seconds is None:
            seconds = self._config.wait_at_stop
        behind = self._uploader.close(seconds, self._announce_wait)
        self._show_messages()
        if behind is not None and not self._has_raised:
            self._say(self._describe(behind))

    def _announce_wait(self, seconds: float) -> None:
        self._show_messages()
        self._say(
            f"{self._directory.path}: waiting up to {seconds:g} s for the upload to {self._config.url}"
        )

    def _describe(self, behind: Behind) -> str:
        path = self._directory.path
        push = command("push", path, self._config.url)
        missing = f"step {behind.step} is not mirrored"
        if behind.mirrored is not None:
            missing += f", the newest that is is step {behind.mirrored}"
        return f"{path}: {missing} ({behind.error}); to mirror it: {push}"


def start_mirroring(
    directory: RunDirectory,
    config: MirrorConfig,
    say: Say,
    *,
    run_id: str,
    ledger: Ledger,
    start: int | None,
    going_back: bool,
    take_over: bool,
    claimed: ClaimedMirror | None,
) -> Mirroring:
    """Claim the mirror of a locked run, and start the thread that uploads to it.

    A store that does not answer is reported, and is tried again in the background. Raises
    OwnedByAnother if another process owns the mirror, ConfigError if it is of another run, or has a
    checkpoint that the local run does not know. `start` is the step of the checkpoint that the
    segment continues from, None in a fresh run; with `going_back` the mirror returns to it too.
    """
    store = open_store(config.url)
    restored = None
    if start is not None:
        event = ledger.newest_checkpoint(start)
        assert event is not None, "a restored checkpoint is acknowledged before"
        restored = Checkpoint(start, event["sha256"])

    def check(claim: Claim) -> None:
        if claim.newest is not None and not going_back:
            refuse_unknown_checkpoint(store, claim.newest, directory, ledger, restored)

    claim = None
    is_damaged = False
    if claimed is not None and claimed.store.url == store.url:
        claim = claimed.take()
        is_damaged = claimed.is_damaged
    uploader = Uploader(
        store,
        directory,
        owner=Owner.this_process(run_id),
        keep_last=config.keep_last,
        every=config.every,
        restored=restored,
        check=check,
        take_over=take_over,
        claim=claim,
        going_back=going_back,
        is_damaged=is_damaged,
    )
    try:
        uploader.wait_for_claim(_CLAIM_SECONDS, say)
    except BaseException:
        uploader.close(0)
        raise
    return Mirroring(uploader, directory, config, say)


def refuse_unknown_checkpoint(
    store: ObjectStore,
    manifest: Manifest,
    directory: RunDirectory,
    ledger: Ledger,
    restored: Checkpoint | None,
) -> None:
    """Raise ConfigError if the ledger does not know the checkpoint of a commit.

    It may have been made on another machine: this copy of the run is older than its mirror.
    """
    if restored is None or _begins_with_mirrored(directory, manifest):
        return
    mirrored = _mirrored_ledger(store, manifest)
    found = [
        event["sha256"]
        for event in mirrored
        if event["event"] == "checkpoint" and event["step"] == manifest.step
    ]
    if found and found[-1] in ledger.acknowledged:
        return
    elsewhere = command("resume", store.url, "--run-dir", "DIR")
    back = command("resume", directory.path, "--from-step", restored.step)
    raise ConfigError(
        f"{directory.path}: is at step {restored.step}, and its mirror {store.url} at step "
        f"{manifest.step}, which was trained elsewhere; continue from the mirror with: {elsewhere}; "
        f"or give up what it has, and go back, with: {back}"
    )


def _begins_with_mirrored(directory: RunDirectory, manifest: Manifest) -> bool:
    """Tell whether the ledger in the mirror is the beginning of the local one."""
    objects = manifest.contents.files.get(directory.ledger.name, ())
    chunks = [Digest(stored.sha256, stored.size) for stored in objects]
    try:
        with directory.folder.open_regular(directory.ledger.name) as file:
            size = os.fstat(file.fileno()).st_size
            return len(matching_pieces(file, size, chunks)) == len(chunks)
    except OSError:
        return False


def _mirrored_ledger(store: ObjectStore, manifest: Manifest) -> Ledger:
    objects = manifest.contents.files.get("ledger.jsonl", ())
    if sum(stored.size for stored in objects) > _MAX_LEDGER:
        raise CheckpointError("mirror", f"{store.url}: its ledger is too large to be compared")
    content = b"".join(fetch.fetched(store, objects))
    rows = (parse_row(line) for line in content.splitlines())
    return Ledger(row for row in rows if row is not None)
