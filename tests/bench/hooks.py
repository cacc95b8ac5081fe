"""The time spent around the steps (hooks, rows, saves) as a share of the bare steps, in one process.

    PYTHONPATH=. python tests/bench/hooks.py
    PYTHONPATH=. python tests/bench/hooks.py --set log.means=true --rounds 1000

Stretches of one log interval with everything that a run has (rows to metrics.jsonl and to a console that is a file,
the checks of evaluation and save, watches, stop rules, signals) and of `Trainer.step()` alone take turns on one
state; no evaluation and no save falls into them. Each step's time is the process's own. The time of an interval is the
sum over its steps of the median at that place in it; writing rows, which happens in some intervals only, counts as
often as it happened. So neither busy neighbours nor a step that was disturbed count for much. All is
computed for each tenth of the rounds; printed are the median and quartiles of these.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
# far away, so that no save and no evaluation falls into the measured stretch; all else as the config has it
FAR = ("stop.last_step=1000000000", "evaluate.every=999999999", "checkpoint.every=999999999")
WARM_UP = 20  # rounds


class Enough(BaseException):
    """Ends the run that was measured."""


class Stretch(NamedTuple):
    """The seconds of each step of a log interval, and whether rows were written in it."""

    seconds: list[float]
    wrote: bool


def measure(options: argparse.Namespace) -> list[tuple[Stretch, Stretch]]:
    """Return (with everything, bare), one a round."""
    from stepctl.config import yaml
    from stepctl.config.model import parse_config
    from stepctl.runs.open import create_run
    from stepctl.system import blas

    document = yaml.load(options.config)
    document.set_all([*FAR, *options.set])
    blas.set_environment(*blas.requested_numerics(document.value))
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.progress import show_progress
    from stepctl.training.trainer import Trainer
    from stepctl.writers import row_buffer

    found: list[tuple[Stretch, Stretch]] = []

    def measured_run(trainer: Trainer) -> Any:
        trainer.start()
        row_buffer.HOLD_SECONDS *= 2  # as the bare steps take half of the time
        metrics = segment.directory.metrics
        bare = Trainer(trainer.task, trainer.batches, trainer.state, stop=[])

        def whole() -> None:
            if trainer.is_due:
                trainer.stop_reason()
            trainer.step()

        def stretch(part: Any) -> Stretch:
            seconds, size = [], metrics.stat().st_size
            for _ in range(segment.config.log.every):
                start = time.process_time()
                part()
                seconds.append(time.process_time() - start)
            return Stretch(seconds, metrics.stat().st_size > size)

        for number in range(options.rounds + WARM_UP):
            if number % 2:
                found.append((stretch(whole), stretch(bare.step)))
            else:
                second = stretch(bare.step)
                found.append((stretch(whole), second))
        raise Enough

    Trainer.run = measured_run  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / "run")
        with create_run(parse_config(document), directory) as segment:
            try:
                with show_progress(segment, quiet=False, verbose=False) as (
                    writers,
                    hooks,
                    messages,
                ):
                    segment.train(writers, hooks, messages=messages)
            except Enough:
                pass
    return found[WARM_UP:]


def interval(stretches: Sequence[Stretch]) -> float:
    """Return the seconds of a typical interval, with its share of writing, which is done at its last step."""
    *others, _ = medians(stretches)
    wrote = [stretch.wrote for stretch in stretches]
    groups = [[s.seconds[-1] for s in stretches if s.wrote == value] for value in {*wrote}]
    return sum(others) + sum(len(group) / len(wrote) * statistics.median(group) for group in groups)


def medians(stretches: Sequence[Stretch]) -> list[float]:
    """Return the median of each place in an interval."""
    return [
        statistics.median(seconds)
        for seconds in zip(*(stretch.seconds for stretch in stretches), strict=True)
    ]


def quartiles(values: list[float], form: str) -> str:
    """Return median (lower quartile..upper quartile)."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}}..{high:{form}})"


def main() -> None:
    """Measure in a process with a clean environment, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3000)
    options = parser.parse_args()
    if any(name in os.environ for name in UNSET):
        environment = {key: value for key, value in os.environ.items() if key not in UNSET}
        raise SystemExit(subprocess.call([sys.executable, *sys.argv], env=environment))
    kept = os.dup(2)
    with tempfile.TemporaryFile() as console:
        os.dup2(console.fileno(), 2)
        try:
            found = measure(options)
        finally:
            os.dup2(kept, 2)
    size, steps = len(found) // 10, len(found[0][0].seconds)
    parts = [
        tuple(map(interval, zip(*found[at : at + size], strict=True)))
        for at in range(0, 10 * size, size)
    ]
    print(
        f"with everything {quartiles([1e6 * whole / steps for whole, _ in parts], '.1f')} us a step"
    )
    print(
        f"bare            {quartiles([1e6 * bare / steps for _, bare in parts], '.1f')} us a step"
    )
    print(
        f"the difference  {quartiles([1e6 * (whole - bare) / steps for whole, bare in parts], '.1f')} us"
    )
    print(f"as a share      {quartiles([whole / bare - 1 for whole, bare in parts], '.2%')}")
    print(
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}, {len(found)} rounds of {steps} steps"
    )


if __name__ == "__main__":
    main()
