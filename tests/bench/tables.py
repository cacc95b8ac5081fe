"""What it takes to load a CSV file: time and memory, beside np.loadtxt.

    python tests/bench/tables.py
    python tests/bench/tables.py --before ../before/.venv/bin/python --rounds 5
    python tests/bench/tables.py --megabytes 40

The files are made in a temporary directory and removed again:

- wide: 50 columns of numbers with six digits, and a label
- narrow: 4 columns of numbers with two digits, and a label
- words: the narrow file, of a tenth of the size, with two columns of words and class names

Each measurement is a fresh process: the wall time of one load, and its peak resident memory. The loaders take turns, in
alternating order. With `--before`, the stepctl of another environment takes part. Printed are medians (least..most) and
the median of the ratios to np.loadtxt, round by round. np.loadtxt gives one float64 array, stepctl the features and the
labels; its default is float32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
MEASURE = """\
import resource, sys, time
import numpy as np
loader, path = sys.argv[1:]
if loader != "loadtxt":
    from stepctl.data.csv import csv
before = time.perf_counter()
if loader == "loadtxt":
    np.loadtxt(path, delimiter=",", ndmin=2, comments=None)
else:
    csv(path=path, targets="classes", dtype=loader)
print(time.perf_counter() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


class Loader(NamedTuple):
    """A loader: its name, the interpreter that has it, and the argument of MEASURE."""

    name: str
    python: str
    argument: str


def make_file(path: Path, n_bytes: int, row: str, columns: int, words: bool) -> None:
    """Write rows of random numbers until the file has about so many bytes."""
    rng = np.random.default_rng(0)
    numbers = rng.random((2000, columns))
    labels = rng.integers(0, 3, 2000)
    lines = []
    for values, label in zip(numbers, labels, strict=True):
        cells = [row % value for value in values]
        if words:
            cells += [f"word{label * 7 % 5}", f"kind{int(values[0] * 20)}", f"class{label}"]
        else:
            cells.append(str(label))
        lines.append(",".join(cells) + "\n")
    text = "".join(lines)
    with path.open("w") as file:
        for _ in range(max(1, n_bytes // len(text))):
            file.write(text)


def measure(loader: Loader, path: Path) -> tuple[float, float]:
    """Return the seconds and the megabytes of one load."""
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    environment.pop("PYTHONPATH", None)
    if loader.python == sys.executable:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [loader.python, "-c", MEASURE, loader.argument, str(path)],
        env=environment,
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, kilobytes = done.stdout.split()
    return float(seconds), int(kilobytes) * 1024 / 1e6


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", help="the Python of another environment")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    stepctl = [
        Loader("stepctl float64", sys.executable, "float64"),
        Loader("stepctl float32", sys.executable, "float32"),
    ]
    numeric = [Loader("np.loadtxt", sys.executable, "loadtxt"), *stepctl]
    if arguments.before:
        numeric.append(Loader("before, float32", arguments.before, "float32"))
    size = arguments.megabytes * 10**6
    cases = {
        "wide": (size, "%.6f", 50, False, numeric),
        "narrow": (size, "%.2f", 4, False, numeric),
        "words": (size // 10, "%.2f", 4, True, stepctl),
    }
    print(f"{'file':<8}{'loader':<18}{'seconds':<24}{'MB':<26}{'times loadtxt':<16}memory")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        for case, (n_bytes, row, columns, words, loaders) in cases.items():
            make_file(path, n_bytes, row, columns, words)
            found: dict[str, list[tuple[float, float]]] = {each.name: [] for each in loaders}
            for number in range(arguments.rounds):
                for loader in loaders if number % 2 else reversed(loaders):
                    found[loader.name].append(measure(loader, path))
            first = found[loaders[0].name]
            for name, results in found.items():
                ratios = ["", ""]
                if loaders[0].argument == "loadtxt":
                    ratios = [
                        f"{statistics.median(a[i] / b[i] for a, b in zip(results, first, strict=True)):.2f}"
                        for i in range(2)
                    ]
                seconds = spread([result[0] for result in results], 2)
                memory = spread([result[1] for result in results], 0)
                print(f"{case:<8}{name:<18}{seconds:<24}{memory:<26}{ratios[0]:<16}{ratios[1]}")


if __name__ == "__main__":
    main()
