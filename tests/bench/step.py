"""One training step, tool by tool: gather the shuffled batch, forward, backward, Adam 1e-3, the loss as a float.

MLPs with relu and softmax cross-entropy, float32: widths@batch size. With :float64 in that dtype, with :regression
with the mean squared error, and with :wgan a step of a WGAN with RMSprop (five critic updates and one of the
generator), whose two models have the widths after the first between their ends. stepctl-numpy is stepctl without
numba, stepctl is with it if it is installed. Each tool is a child process with the same threads on the same
cores; the children take turns, so that only one computes at a time. A turn is some untimed steps, then k timed
ones. Tools that cannot be imported are left out. By hand, from the checkout:

    PYTHONPATH=. python tests/bench/step.py
    PYTHONPATH=. python tests/bench/step.py --sizes 64-128-10@64 784-256-128-10@128 --rounds 40 --tools stepctl torch

A cell is the median over the rounds in microseconds (least..most). Ratios are of stepctl to the fastest other tool,
round by round, so that what slows a whole round down cancels; "best" is the ratio of the two least times. A turn during
which other processes compute is measured again, for --patience seconds; the last column counts those that never were
left alone (with as many threads as cores, a single busy neighbour can make a step a hundred times slower).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from step_tools import TOOLS

SIZES = (
    "64-128-10@64",
    "784-256-128-10@128",
    "784-1024-1024-10@256",
    "1024-4096-4096-10@512",
    "784-256-128-10@128:float64",
    "784-256-128-10@128:regression",
    "64-256-256@64:wgan",
)
TURN, MOST = 0.1, 256  # seconds and steps that a turn is timed for
REST = 0.05  # seconds between turns: thread pools spin for a while after their last task
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
SHARE = 0.15  # of a core, that other processes may take from a turn's
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Child:
    """A tool in a process of its own."""

    def __init__(self, tool: str, size: str, threads: int, kernel: str | None) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in UNSET}
        if kernel is not None and tool.startswith("stepctl"):
            environment["OPENBLAS_CORETYPE"] = kernel  # as numerics.blas_kernel does
        environment |= dict.fromkeys(THREADS, str(threads)) | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        program = str(Path(__file__).with_name("step_tools.py"))
        command = [sys.executable, "-W", "ignore", program, tool, size, str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=environment
        )
        ready = json.loads(self.answer())
        self.about: str = ready["about"]
        self.disturbed = 0  # turns
        self.steps = min(MOST, max(1, round(TURN / ready["seconds"])))

    def answer(self) -> str:
        """Return the next line that the child writes."""
        assert self.process.stdout is not None
        return self.process.stdout.readline() or sys.exit(
            f"a child ended: {' '.join(map(str, self.process.args))}"
        )

    def turn(self, patience: float, quiet: float) -> float:
        """Return the microseconds per step of one turn, the least disturbed of those that patience allows.

        Other processes may keep `quiet` cores busy.
        """
        assert self.process.stdin is not None
        turns, end = [], time.monotonic() + patience
        while True:
            self.process.stdin.write(f"{self.steps}\n")
            answer = json.loads(self.answer())
            time.sleep(REST)
            turns.append((answer["others"], answer["seconds"] * 1e6))
            if answer["others"] < quiet or time.monotonic() > end:
                break
        others, microseconds = min(turns)
        self.disturbed += others >= quiet
        return microseconds


def measure(
    size: str, tools: list[str], options: argparse.Namespace
) -> tuple[dict[str, list[float]], list[str], float]:
    """Return (microseconds per step, tool -> one a round; what the tools are; the share of turns disturbed)."""
    children = {tool: Child(tool, size, options.threads, options.kernel) for tool in tools}
    times: dict[str, list[float]] = {tool: [] for tool in tools}
    quiet = (os.cpu_count() or 1) - options.threads + SHARE
    for i in range(options.rounds):
        for tool in tools[i % len(tools) :] + tools[: i % len(tools)]:
            times[tool].append(children[tool].turn(options.patience, quiet))
    for one in children.values():
        one.process.communicate()
    disturbed = sum(one.disturbed for one in children.values()) / (options.rounds * len(tools))
    return times, list(dict.fromkeys(one.about for one in children.values())), disturbed


def ratio(mine: list[float], other: list[float]) -> str:
    """Return the median and quartiles of the ratio round by round, and that of the two least times."""
    rounds = sorted(a / b for a, b in zip(mine, other, strict=True))
    low, middle, high = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else rounds * 3
    return f"{middle:.2f} ({low:.2f}..{high:.2f}, best {min(mine) / min(other):.2f})"


def cpu() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def main() -> None:
    """Measure and print."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WIDTHS@BATCH")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument(
        "--threads", type=int, default=cores, help="threads and cores of each child (all)"
    )
    parser.add_argument("--kernel", help="OpenBLAS kernel of stepctl (numerics.blas_kernel)")
    parser.add_argument(
        "--patience", type=float, default=3.0, help="seconds to wait for a turn without disturbance"
    )
    options = parser.parse_args()
    installed = [tool for tool in options.tools if importlib.util.find_spec(TOOLS[tool][0])]
    about: list[str] = []
    print(
        "".join(["size".ljust(32), *(f"{tool} us".ljust(26) for tool in installed), "disturbed"]),
        flush=True,
    )
    summary = []
    for size in options.sizes:
        tools = [tool for tool in installed if tool != "sklearn" or not size.endswith(":wgan")]
        times, tools_of_size, disturbed = measure(size, tools, options)
        about = about or tools_of_size
        cells = [
            f"{statistics.median(times[tool]):.0f} ({min(times[tool]):.0f}..{max(times[tool]):.0f})"
            if tool in times
            else "-"
            for tool in installed
        ]
        cells = [cell.ljust(26) for cell in cells]
        print("".join([size.ljust(32), *cells, f"{disturbed:.0%}"]), flush=True)
        others = [tool for tool in times if not tool.startswith("stepctl")]
        for mine in ("stepctl", "stepctl-numpy"):
            if mine in times and others:
                fastest = min(others, key=lambda tool: statistics.median(times[tool]))
                compared = dict.fromkeys(
                    [fastest, *(tool for tool in ("torch",) if tool in others)]
                )
                ratios = [f"{ratio(times[mine], times[tool])} of {tool}" for tool in compared]
                summary.append(f"{size}: {mine} takes {'; '.join(ratios)}")
    print("\n" + "\n".join(summary))
    load = os.getloadavg()[0]
    print(f"{cpu()}, {options.threads} of {cores} cores, load {load:.1f}, Python {platform.python_version()}; "
          f"{'; '.join(about)}; {options.rounds} rounds")  # fmt: skip


if __name__ == "__main__":
    main()
