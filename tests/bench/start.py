"""The duration of whole commands against the imports that they need.

`stepctl --help` against `import click` (target 1.4), and `stepctl resume RUN` of a run that is finished against
`import numpy, h5py, click, yaml` (target 2.2). Byte code and page cache are warm; the two of a pair take turns in
alternating order. By hand, from the checkout:

    PYTHONPATH=. python tests/bench/start.py

A row is the median over the rounds in milliseconds (least..most), and the ratio within each round: its median
(quartiles), then the ratio of the two least times and that of the median processor times.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
LAUNCHER = "import sys\nfrom stepctl.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
CONFIG = """\
data: {name: digits, batch_size: 64, validation_fraction: 0.2}
model: {name: mlp, hidden: [128]}
task: {name: classification}
optimizer: {name: adam, learning_rate: 1e-3}
stop: {last_step: 100}
evaluate: {every: 50}
"""


class Times(NamedTuple):
    """Seconds that a command took: by the clock, and of all processors."""

    wall: float
    cpu: float


def run(command: list[str], folder: Path) -> Times:
    """Run a command to its end."""
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    environment["PYTHONPATH"] = os.pathsep.join(
        map(os.path.abspath, environment.get("PYTHONPATH", ".").split(os.pathsep))
    )
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{said}")
    return Times(wall, used.ru_utime + used.ru_stime)


def compare(
    ours: list[str], theirs: list[str], rounds: int, folder: Path
) -> tuple[list[Times], list[Times]]:
    """Return the times of both commands, round by round; which goes first alternates."""
    mine, others = [], []
    for i in range(-2, rounds):
        both = [(ours, mine), (theirs, others)]
        for command, times in both if i % 2 else reversed(both):
            taken = run(command, folder)
            if i >= 0:  # before that, the caches warm up
                times.append(taken)
    return mine, others


def row(name: str, target: float, mine: list[Times], others: list[Times]) -> str:
    """Return a line of the table."""

    def cell(times: list[Times]) -> str:
        walls = [one.wall * 1e3 for one in times]
        return f"{statistics.median(walls):.0f} ({min(walls):.0f}..{max(walls):.0f})"

    low, middle, high = statistics.quantiles(
        (a.wall / b.wall for a, b in zip(mine, others, strict=True)), n=4
    )
    best = min(one.wall for one in mine) / min(one.wall for one in others)
    cpu = statistics.median(one.cpu for one in mine) / statistics.median(one.cpu for one in others)
    ratio = f"{middle:.2f} ({low:.2f}..{high:.2f})"
    return f"{name:<24}{cell(mine):<18}{cell(others):<18}{ratio:<22}{best:<8.2f}{cpu:<8.2f}{target}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher, config = folder / "launcher.py", folder / "config.yaml"
        launcher.write_text(LAUNCHER)
        config.write_text(CONFIG)
        stepctl = [sys.executable, str(launcher)]
        run([*stepctl, "train", "--config", str(config), "--run-dir", "run"], folder)
        print(f"{'ms':<24}{'stepctl':<18}{'imports':<18}{'ratio':<22}{'best':<8}{'cpu':<8}target")
        for label, target, arguments, imports in (
            ("--help", 1.4, ["--help"], "import click"),
            ("resume, finished run", 2.2, ["resume", "run"], "import numpy, h5py, click, yaml"),
        ):
            theirs = [sys.executable, "-c", imports]
            print(
                row(
                    label, target, *compare([*stepctl, *arguments], theirs, options.rounds, folder)
                ),
                flush=True,
            )
    print(
        f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
