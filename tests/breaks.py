"""Thirty one-line breaks of the product, each with a test that must fail because of it.

python tests/breaks.py              # all, in copies of the repository: minutes
python tests/breaks.py 3 17         # some
python tests/breaks.py --table      # the table of tests/README.md
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Break(NamedTuple):
    """A line of the product, the line that replaces it, and the test that fails then."""

    effect: str
    file: str  # below stepctl/
    line: str  # a part of a line that occurs once in the file
    broken: str
    test: str  # below tests/


BREAKS = (
    Break(
        "A skipped batch is used again",
        "training/trainer.py",
        "self.batches.batch(counters.samples_seen + self._skipped_samples)",
        "self.batches.batch(counters.samples_seen)",
        "training/test_skipped_batches.py::test_every_batch_counts_as_seen_whether_it_made_a_step_or_not",
    ),
    Break(
        "Skipped samples are not counted",
        "training/trainer.py",
        "increments[SAMPLES_SEEN] += self._skipped_samples",
        "increments[SAMPLES_SEEN] += 0",
        "training/test_skipped_batches.py::test_samples_of_a_skipped_batch_are_counted_with_the_next_step",
    ),
    Break(
        "A segment makes one step past its target",
        "stopping/rules.py",
        "if counters.global_step < self.last_step:",
        "if counters.global_step <= self.last_step:",
        "promises/test_step_rules.py::test_the_stop_rule_is_checked_before_a_step",
    ),
    Break(
        "A torn update counts as complete",
        "training/trainer.py",
        "if self._may_be_torn():",
        "if False:",
        "runs/test_failures.py::test_a_task_that_fails_in_the_middle_of_its_step_is_not_saved",
    ),
    Break(
        "The oldest checkpoint is resumed",
        "checkpoint/store.py",
        "for step in reversed(self.steps()):",
        "for step in self.steps():",
        "checkpoint/test_store.py::test_the_newest_is_the_highest_step_not_the_latest_name_or_time",
    ),
    Break(
        "The digest is not compared",
        "checkpoint/user_block.py",
        'if hashlib.file_digest(file, "sha256").hexdigest() != digest:',
        "if False:",
        "checkpoint/test_checkpoint_file.py::test_every_flipped_byte_is_refused",
    ),
    Break(
        "A checkpoint is not read back",
        "checkpoint/store.py",
        "user_block.check_content(self.file(step), content, self._folder.dir_fd())",
        "pass",
        "checkpoint/test_store.py::test_a_checkpoint_that_reads_back_damaged_is_not_acknowledged",
    ),
    Break(
        "A published file is not synced",
        "system/folder.py",
        "                    fsync(descriptor)",
        "                    pass",
        "checkpoint/test_store.py::test_publish_is_durable_before_it_is_acknowledged",
    ),
    Break(
        "A short write is not continued",
        "system/files.py",
        "remaining = remaining[n_written:]",
        "remaining = remaining[len(remaining) :]",
        "checkpoint/test_store.py::test_short_writes_are_completed",
    ),
    Break(
        "A checkpoint of another run is accepted",
        "rundir/ledger.py",
        "return run_id == self.run_id",
        "return True",
        "rundir/test_run_id.py::test_a_checkpoint_of_another_run_is_passed_over_for_an_older_own_one",
    ),
    Break(
        "Data in an external file are read",
        "checkpoint/walk.py",
        "if creation.get_external_count():",
        "if False:",
        "faults/test_hostile_files.py",
    ),
    Break(
        "Extra rows stay on a resume",
        "rundir/directory.py",
        'return row["step"] <= step and not row.get("extra")',
        'return row["step"] <= step',
        "promises/test_step_rules.py::test_extra_rows_are_removed_on_resume",
    ),
    Break(
        "The run's first row is left out",
        "config/cadence.py",
        "return crossed or counters.global_step == self._first_step",
        "return crossed",
        "promises/test_step_rules.py::test_the_first_row_is_written_off_the_grid_once_a_run",
    ),
    Break(
        "The saved state of a hook is a view",
        "state/train_state.py",
        "{key: array.copy() for key, array in hook.state().items()}",
        "dict(hook.state())",
        "hooks/test_hook_state.py::test_the_saved_state_of_a_hook_is_a_copy",
    ),
    Break(
        "A save and the next update share a buffer",
        "state/arena.py",
        "self.in_snapshot = True",
        "self.in_snapshot = False",
        "checkpoint/test_saving.py::test_training_continues_while_a_checkpoint_is_written",
    ),
    Break(
        "The oldest checkpoints are kept",
        "checkpoint/retention.py",
        "kept = set(ordered[-keep_last:])",
        "kept = set(ordered[:keep_last])",
        "checkpoint/test_retention.py::test_the_kept_steps",
    ),
    Break(
        "The step of a fork is pruned",
        "checkpoint/retention.py",
        "if step not in kept and step not in protected]",
        "if step not in kept]",
        "runs/test_fork.py::test_training_on_never_removes_the_step_of_a_fork",
    ),
    Break(
        "Two processes hold one run",
        "rundir/lock.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "rundir/test_run_directory.py::test_the_lock_excludes_in_one_process_too_and_ends_with_its_block",
    ),
    Break(
        "A stale job writes into the run that took its name",
        "system/folder.py",
        "if not os.path.samestat(self._status, named):",
        "if False:",
        "rundir/test_stale_jobs.py::test_no_write_reaches_a_directory_that_took_the_place_of_the_held_one",
    ),
    Break(
        "Draws repeat after 2**32 steps",
        "state/rng.py",
        "words.append(i >> 32)",
        "words.append(0)",
        "state/test_rng.py::test_seed_stream_and_every_index_count",
    ),
    Break(
        "Every epoch has the order of the first",
        "data/permutation.py",
        'seeds = [seed_sequence(seed, "order", epoch) for epoch in range(first, last + 1)]',
        'seeds = [seed_sequence(seed, "order", 0) for epoch in range(first, last + 1)]',
        "state/test_rng.py",
    ),
    Break(
        "Both models draw from one stream",
        "programs/wgan.py",
        'return rng(self._seed, f"{model}/{name}", number, shard)',
        "return rng(self._seed, name, number, shard)",
        "state/test_streams.py",
    ),
    Break(
        "A tree sum joins its subtrees from left to right",
        "state/tree_sum.py",
        "for left in reversed(rest):",
        "for left in rest:",
        "state/test_arena.py::test_a_tree_sum_adds_in_the_order_of_the_tree_step_after_step",
    ),
    Break(
        "A rank computes the shards of its neighbour",
        "distributed/comm.py",
        "return self.shards_by_rank(shards)[self.rank]",
        "return self.shards_by_rank(shards)[self.rank - 1]",
        "distributed/test_ranks.py::test_the_ranks_give_the_bits_and_rows_of_one_process",
    ),
    Break(
        "Adam's bias correction is one update ahead",
        "optimizers/adam.py",
        "correction = math.sqrt(1 - self.beta2**info.number)",
        "correction = math.sqrt(1 - self.beta2 ** (info.number + 1))",
        "optimizers/test_optimizers.py::test_forty_steps_are_the_textbooks",
    ),
    Break(
        "The running variance is biased",
        "models/layers/batch_norm.py",
        "variance, rows / (rows - 1), workspace)",
        "variance, 1.0, workspace)",
        "models/test_batch_norm.py::test_the_new_buffers_take_in_the_momentum_of_mean_and_unbiased_variance",
    ),
    Break(
        "A locked key may change",
        "config/changes.py",
        'if is_locked_change(key, old, change["new"]):',
        "if False:",
        "config/test_config.py::test_locked_changes_are_refused_with_old_and_new",
    ),
    Break(
        "The first of two equal keys counts",
        "config/yaml.py",
        "            if key in values:",
        "            if False:",
        "config/test_yaml.py::test_refused_with_every_problem_at_its_place",
    ),
    Break(
        "A signal counts as a reached target",
        "stopping/signals.py",
        'return StopReason(f"signal {self._stop.name}", done=False) if self._stop else None',
        'return StopReason(f"signal {self._stop.name}", done=True) if self._stop else None',
        "stopping/test_signal_rules.py::test_signals_ignored_at_the_start_stay_ignored",
    ),
    Break(
        "Early stopping counts from zero again",
        "hooks/watch.py",
        'self._set(waited=int(self._state["waited"]) + 1)',
        "self._set(waited=1)",
        "hooks/test_watch.py",
    ),
    Break(
        "A compiled update does not clip",
        "optimizers/kernels.py",
        "clip = 1.0 if scale is None else scale",
        "clip = 1.0",
        "optimizers/test_kernels.py::test_the_bits_are_numpy_s",
    ),
)


def apply(broken: Break, root: Path) -> None:
    """Replace the line in a copy of the repository."""
    path = root / "stepctl" / broken.file
    text = path.read_text()
    count = text.count(broken.line)
    if count != 1:
        raise SystemExit(f"stepctl/{broken.file}: {broken.line!r} occurs {count} times")
    path.write_text(text.replace(broken.line, broken.broken))


def run(test: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Run one test in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, f"tests/{test}"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def copy(root: Path) -> None:
    """Copy the tracked files of the repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if name:
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)


def caught(broken: Break) -> bool:
    """Tell whether the test passes without the break, and fails with it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(root)
        before = run(broken.test, root)
        apply(broken, root)
        after = run(broken.test, root)
    if before.returncode != 0:
        print(before.stdout[-2000:])
    return (before.returncode, after.returncode) == (0, 1)


def table() -> str:
    """Return the table of tests/README.md."""
    rows = ["| # | effect | file | line | instead | caught by |", "|---|---|---|---|---|---|"]
    for number, broken in enumerate(BREAKS, 1):
        line = broken.line.strip().replace("|", "\\|")
        instead = broken.broken.strip().replace("|", "\\|")
        test = broken.test.partition("::")
        rows.append(
            f"| {number} | {broken.effect} | `{broken.file}` | `{line}` | `{instead}` "
            f"| `{test[0]}` {test[2] and f'`{test[2]}`'} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    missed = []
    for number, broken in enumerate(BREAKS, 1):
        if arguments.numbers and number not in arguments.numbers:
            continue
        found = caught(broken)
        print(f"{number:2} {'caught' if found else 'MISSED'}: {broken.effect}", flush=True)
        if not found:
            missed.append(number)
    sys.exit(f"missed: {missed}" if missed else 0)


if __name__ == "__main__":
    main()
