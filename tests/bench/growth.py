"""What grows with a run: its rows, its ledger, its checkpoints, its data; and what stays with every run.

    PYTHONPATH=. python tests/bench/growth.py
    PYTHONPATH=. python tests/bench/growth.py --before ../before/.venv/bin/python --rounds 5
    PYTHONPATH=. python tests/bench/growth.py --only ledger,verify --ledger-lines 10000

Every case is built in a temporary directory (`--directory`; 8 GB at the full sizes, one case at a time) and removed
again. Each measurement is a fresh process. With `--before`, the stepctl of another environment takes turns with this
one, which goes first alternates, and each has runs of its own, made in the same way. A row is the wall time in
seconds, median (least..most), and the peak resident memory in MB (10^6 bytes), the largest of all rounds. "over" is a
second command whose median is subtracted: the same on a small run, so that what stays is due to the size.

The rows "hooks" and "start-up" are those of hooks.py and start.py beside this file, which have their own rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
HERE = Path(__file__).resolve().parent
LAUNCHER = "import sys\nfrom stepctl.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
CONFIG = """\
data: {name: digits, batch_size: 8, validation_fraction: 0.2}
model: {name: mlp, hidden: [4]}
task: {name: classification}
optimizer: {name: adam, learning_rate: 1e-3}
stop: {last_step: 1}
numerics: {threads: 1}
log: {every: 1}
"""

# --- programs of child processes

MANY_FILES = """\
import os, sys
os.fsync = lambda descriptor: None  # a file need not be durable here
from stepctl.cli.main import main
main()
"""

# The state of a run is restored, as for its next step.
RESTORE = """\
import sys
import stepctl
with stepctl.resume(sys.argv[1], num_steps=1) as run:
    assert run.global_step == 1
"""

READ_NPZ = """\
import sys
from stepctl.data.arrays import arrays
sources = arrays(path=sys.argv[1], targets="values", dtype="float32")
assert sources.train.n > 0
"""

WRITE_NPZ = """\
import sys, zipfile
import numpy as np
path, n_bytes = sys.argv[1], int(sys.argv[2])
features = 256
rows = n_bytes // (4 * features)
block = np.random.default_rng(0).random((1024, features), np.float32)
with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
    for name, shape in (("x.npy", (rows, features)), ("y.npy", (rows, 1))):
        with archive.open(name, "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            left = shape[0] * shape[1] * 4
            while left:
                part = block.tobytes()[:left]
                file.write(part)
                left -= len(part)
"""

WRITE_LARGE_DATA = """\
import sys
import numpy as np
generator = np.random.default_rng(0)
np.savez(sys.argv[1], x=generator.random((64, 1024), np.float32), y=generator.integers(0, 10, 64))
"""


class Cost(NamedTuple):
    """Of one process: seconds by the clock, and its peak resident memory in bytes."""

    seconds: float
    memory: int


Runs = dict[str, Path]  # a run of each environment
Command = Callable[[str], Cost]  # runs it in the environment of this name


class Bench:
    """The folder, the sizes and the two interpreters."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.options = options
        self.pythons = {"now": sys.executable}
        if options.before:
            self.pythons["before"] = options.before
        self.launcher = folder / "launcher.py"
        self.launcher.write_text(LAUNCHER)

    def environment(self, which: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key not in UNSET}
        kept.pop("PYTHONPATH", None)
        if which == "now":
            kept["PYTHONPATH"] = str(HERE.parents[1])
        return kept

    def output(self, which: str, *arguments: object) -> str:
        """Run a Python program in the environment `which`; return its standard output."""
        return subprocess.run(
            [self.pythons[which], *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(which),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    def run(self, which: str, *arguments: object) -> Cost:
        """Run a Python program of the environment `which` to its end."""
        command = [self.pythons[which], *map(str, arguments)]
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(which),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{said}")
        return Cost(seconds, used.ru_maxrss * 1024)

    def stepctl(self, which: str, *arguments: object) -> Cost:
        return self.run(which, self.launcher, *arguments)

    def resume(self, which: str, run: Path, steps: int = 1) -> Cost:
        return self.stepctl(which, "resume", run, "-q", "--num-steps", steps)

    def train(self, name: str, *settings: str, config: str = CONFIG, program: str = "") -> Runs:
        """Train a run in every environment."""
        file = self.folder / f"{name}.yaml"
        file.write_text(config)
        options = [text for setting in settings for text in ("--set", setting)]
        how: list[object] = ["-c", program] if program else [self.launcher]
        found = {}
        for which in self.pythons:
            found[which] = self.folder / f"{name}-{which}"
            self.run(which, *how, "train", file, "--run-dir", found[which], "-q", *options)
        return found

    def measure(
        self, name: str, target: str, command: Command, over: Command | None = None
    ) -> None:
        """Measure a command in all environments in turn, and print its row."""
        costs: dict[str, list[Cost]] = {which: [] for which in self.pythons}
        bases: dict[str, list[Cost]] = {which: [] for which in self.pythons}
        for number in range(self.options.rounds):
            order = list(self.pythons)
            for which in order if number % 2 else reversed(order):
                costs[which].append(command(which))
                if over is not None:
                    bases[which].append(over(which))
        for which in self.pythons:
            print_row(name if which == "now" else f"  {which}", target, costs[which], bases[which])


def print_row(name: str, target: str, costs: list[Cost], bases: list[Cost]) -> None:
    seconds = [cost.seconds for cost in costs]
    memory = max(cost.memory for cost in costs)
    spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f}..{max(seconds):.2f})"
    over = ""
    if bases:
        base = statistics.median(cost.seconds for cost in bases)
        extra_seconds = statistics.median(seconds) - base
        extra_memory = memory - max(cost.memory for cost in bases)
        over = f"{extra_seconds:+.2f} s {extra_memory / 1e6:+.0f} MB"
    print(f"{name:<34}{spread:<22}{memory / 1e6:<9.0f}{over:<20}{target}", flush=True)


# --- the cases


def rows(bench: Bench) -> None:
    """Measure a run with many metrics rows, and one with a table of them."""
    n = bench.options.rows
    for label, settings in (("", []), (" and a table", ["log.csv=true"])):
        runs = {}
        for size in (1_000, n):
            runs[size] = bench.train(
                f"rows-{size}{label[-5:]}",
                f"initial_step={size - 1}",
                f"stop.last_step={size}",
                *settings,
            )
            for which, path in runs[size].items():
                prepend(path / "metrics.jsonl", map(metrics_row, range(1, size)))
                (path / "metrics.csv").unlink(missing_ok=True)
                bench.resume(which, path)  # which makes the table
        bench.measure(
            f"resume, {n:,} rows{label}",
            "1 s, 100 MB over a short run",
            lambda which, runs=runs: bench.resume(which, runs[n][which]),
            lambda which, runs=runs: bench.resume(which, runs[1_000][which]),
        )
        if settings:
            continue
        for command in (["verify"], ["runs"], ["plot", "--json"]):
            bench.measure(
                f"{command[0]}, {n:,} rows",
                "",
                lambda which, runs=runs, command=command: bench.stepctl(
                    which, *command, runs[n][which]
                ),
            )


def prepend(path: Path, lines: Iterable[str]) -> None:
    """Write lines before those of a file."""
    written = path.read_text()
    with path.open("w") as file:
        file.writelines(lines)
        file.write(written)


def metrics_row(step: int) -> str:
    values = {
        "step": step,
        "kind": "train",
        "epoch": step // 179,
        "loss": 1 / (1 + step),
        "accuracy": 0.875,
        "learning_rate": 0.001,
        "samples_per_second": 180213.9 + step,
    }
    return json.dumps(values) + "\n"


def ledger(bench: Bench) -> None:
    """Measure a run whose ledger has many lines: checkpoints, all pruned since."""
    n = bench.options.ledger_lines
    runs = {}
    for size in (10, n):
        runs[size] = bench.train(
            f"ledger-{size}", f"initial_step={size}", f"stop.last_step={size + 1}"
        )
        for path in runs[size].values():
            start, *others = (path / "ledger.jsonl").read_text().splitlines(keepends=True)
            lines = itertools.chain([start], map(checkpoint_line, range(size)), others)
            with (path / "ledger.jsonl").open("w") as file:
                file.writelines(lines)
    bench.measure(
        f"resume, ledger of {n:,} lines",
        "0.7 s",
        lambda which: bench.resume(which, runs[n][which]),
        lambda which: bench.resume(which, runs[10][which]),
    )


def checkpoint_line(step: int) -> str:
    event = {
        "event": "checkpoint",
        "time": "2026-01-01T00:00:00.000+00:00",
        "step": step,
        "file": f"step-{step:08d}.h5",
        "sha256": f"{step:064x}",
        "pruned": [step],
    }
    return json.dumps(event) + "\n"


def files(bench: Bench) -> None:
    """Measure a save beside many checkpoints, and `verify` of all of them."""
    n = bench.options.files
    steps = 200
    keep = ["checkpoint.every=1", "checkpoint.keep_last=null", "log.every=1000000"]
    few = bench.train("few", "stop.last_step=99", *keep)
    many = bench.train("many", f"stop.last_step={n - 1}", *keep, program=MANY_FILES)
    for label, runs in (("100", few), (f"{n:,}", many)):
        copies = {which: path.with_name(f"{path.name}-saves") for which, path in runs.items()}

        def saves(which: str, n_steps: int, runs: Runs, copies: Runs) -> Cost:
            shutil.rmtree(copies[which], ignore_errors=True)
            shutil.copytree(runs[which], copies[which], copy_function=os.link)
            for name in ("ledger.jsonl", "metrics.jsonl", "lock"):  # the others are never changed
                (copies[which] / name).unlink()
                shutil.copy(runs[which] / name, copies[which] / name)
            return bench.resume(which, copies[which], n_steps)

        bench.measure(
            f"{steps} saves beside {label} files",
            "flat, over 1 save",
            lambda which, runs=runs, copies=copies: saves(which, steps + 1, runs, copies),
            lambda which, runs=runs, copies=copies: saves(which, 1, runs, copies),
        )
    bench.measure(
        f"verify, {n:,} files", "8 s", lambda which: bench.stepctl(which, "verify", many[which])
    )


def checkpoint(bench: Bench) -> None:
    """Measure the resume from a large checkpoint, up to its next step."""
    n_bytes = bench.options.checkpoint_bytes
    width = int((n_bytes / 3 / 4) ** 0.5) - 512  # parameters and two slots of float32
    data = bench.folder / "large.npz"
    bench.run("now", "-c", WRITE_LARGE_DATA, data)
    config = CONFIG.replace("name: digits", f"name: arrays, path: {data}")
    config = config.replace("hidden: [4]", f"hidden: [{width}, {width}]")
    runs = bench.train("large", "checkpoint.keep_last=1", config=config)
    size = max(file.stat().st_size for file in (runs["now"] / "checkpoints").iterdir())
    bench.measure(
        f"resume, file of {size / 1e6:,.0f} MB",
        f"1.5 s, {1.1 * size / 1e6:,.0f} MB",
        lambda which: bench.run(which, "-c", RESTORE, runs[which]),
    )


def npz(bench: Bench) -> None:
    """Measure the reading of a large uncompressed archive."""
    n_bytes = bench.options.npz_bytes
    path = bench.folder / "data.npz"
    bench.run("now", "-c", WRITE_NPZ, path, n_bytes)
    bench.measure(
        f"npz of {n_bytes / 1e6:,.0f} MB",
        f"{1.1 * n_bytes / 1e6:,.0f} MB",
        lambda which: bench.run(which, "-c", READ_NPZ, path),
    )


def hooks(bench: Bench) -> None:
    """Print what hooks.py prints about the quick-start config."""
    for which in bench.pythons:
        share = other_bench(bench, which, "hooks.py", r"as a share +(.*)")
        print(f"{'hooks, ' + which:<34}{share[0]:<51}2 % of a step", flush=True)


def start(bench: Bench) -> None:
    """Print what start.py prints."""
    for which in bench.pythons:
        for line in other_bench(bench, which, "start.py", r"((?:--help|resume).*)"):
            print(f"{which}: {line}", flush=True)


def other_bench(bench: Bench, which: str, name: str, pattern: str) -> list[str]:
    """Run a benchmark of the measured checkout, whose internals it uses; return what it printed."""
    package = bench.output(which, "-c", "import stepctl; print(stepctl.__file__)")
    script = Path(package.strip()).parents[1] / "tests" / "bench" / name
    return re.findall(pattern, bench.output(which, script))


CASES: dict[str, Callable[[Bench], None]] = {
    "rows": rows,
    "ledger": ledger,
    "files": files,
    "checkpoint": checkpoint,
    "npz": npz,
    "hooks": hooks,
    "start": start,
}


def main() -> None:
    """Build, measure and print the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="PYTHON", help="interpreter of the other environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(CASES), help="names of cases, with commas")
    parser.add_argument("--directory", help="where the cases are built (default: TMPDIR)")
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--ledger-lines", type=int, default=10**5)
    parser.add_argument("--files", type=int, default=10**4)
    parser.add_argument("--checkpoint-bytes", type=int, default=813 * 10**6)
    parser.add_argument("--npz-bytes", type=int, default=2 * 10**9)
    options = parser.parse_args()
    print(f"{'':<34}{'seconds':<22}{'MB':<9}{'over':<20}target")
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            CASES[name](Bench(Path(folder), options))
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {cores} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
