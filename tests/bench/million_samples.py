"""A Hamiltonian Monte Carlo run of 10^6 samples in a series: the cost of an append, and the time of a resume.

    PYTHONPATH=. python tests/bench/million_samples.py
    PYTHONPATH=. python tests/bench/million_samples.py --samples 100000

The script is tests/program_examples/hmc/script.py, with a metrics row every 1,000 steps and a checkpoint every 100,000.
It is compared with the plain program, and with the script without its `run.append`. A resume is timed from the start of
Python to the end of its one step, with few rows and with all of them, on copies of the finished run. Times are of the
processor, so that busy neighbors count little.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.support.program_examples import FOLDER
from tests.support.program_runs import run_script

UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
SCRIPT = FOLDER / "hmc" / "script.py"
PLAIN = FOLDER / "hmc" / "plain.py"
FEW = 1000  # rows
RESUMES = 5
APPEND = '        run.append("samples", x)\n'
SETTINGS = {"log_every": 1000, "checkpoint_every": 100_000, "keep_last": 2}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what the block prints."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def seconds_of_plain(samples: int, folder: Path) -> float:
    """Return the time of the plain program."""
    code = PLAIN.read_text()
    file = folder / "plain.py"
    file.write_text(code.replace("N_STEPS = 40", f"N_STEPS = {samples}"))
    began = time.process_time()
    with silence():
        runpy.run_path(str(file))
    return time.process_time() - began


def seconds_of_script(samples: int, folder: Path, *, append: bool) -> float:
    """Return the time of the script from its first line to its last."""
    code = SCRIPT.read_text()
    assert APPEND in code
    file = folder / "hmc.py"
    file.write_text(code if append else code.replace(APPEND, ""))
    began = time.process_time()
    with silence():
        run_script(file, run_dir(samples, folder, append=append), last_step=samples, **SETTINGS)
    return time.process_time() - began


def run_dir(samples: int, folder: Path, *, append: bool = True) -> Path:
    return folder / f"{samples}-{append}" / "run"


def seconds_of_resume(samples: int, folder: Path) -> float:
    """Return the median time of a process that resumes a run of so many samples and makes one step."""
    found = []
    copy = folder / "resumed" / "run"
    for _ in range(RESUMES):
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(run_dir(samples, folder), copy)
        settings = f"last_step={samples + 1}, log_every=1000, checkpoint_every=100_000"
        code = (
            "from pathlib import Path; from tests.support.program_runs import run_script; "
            f"run_script(Path({str(SCRIPT)!r}), Path({str(copy)!r}), {settings})"
        )
        began = seconds_of_children()
        command = [sys.executable, "-c", code]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found.append(seconds_of_children() - began)
    return statistics.median(found)


def seconds_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    """Measure in a process in which OpenBLAS chooses its kernel, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10**6)
    options = parser.parse_args()
    if set(UNSET) & set(os.environ):
        environment = {key: value for key, value in os.environ.items() if key not in UNSET}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    n = options.samples
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).resolve()
        plain = seconds_of_plain(n, folder)
        without = seconds_of_script(n, folder, append=False)
        with_rows = seconds_of_script(n, folder, append=True)
        seconds_of_script(FEW, folder, append=True)
        print(
            f"{n:,} samples: plain {plain / n * 1e6:.2f} us a step, script {with_rows / n * 1e6:.2f},"
        )
        print(
            f"  without append {without / n * 1e6:.2f}; append {(with_rows - without) / n * 1e6:.2f} us"
        )
        file = run_dir(n, folder) / "series" / "samples.bin"
        print(f"  series {file.stat().st_size:,} bytes")
        for samples in (FEW, n):
            print(f"resume with {samples:,} rows: {seconds_of_resume(samples, folder):.3f} s")
    print(
        f"Python {platform.python_version()}, numpy {np.__version__}, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
