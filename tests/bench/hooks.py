"""What a run does around its steps: its time as a share of the bare steps', in turns, in one process.

    PYTHONPATH=. python tests/bench/hooks.py
    PYTHONPATH=. python tests/bench/hooks.py --set log.means=true --set log.every=10 --rounds 100

A round is a stretch of steps with everything that a run has (rows to metrics.jsonl and to a console that is a file,
the checks of evaluation and save, watches, stop rules, signals) and one of `Trainer.step()` alone, in changing order,
on one state; no evaluation and no save falls into it. The time is the process's own, so that busy neighbours
count little. Printed are the median and quartiles over the rounds of each
one's microseconds a step, and of the difference as a share of the bare step's.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
# far away, so that no save and no evaluation falls into the measured stretch; all else as the config has it
FAR = ("stop.last_step=1000000000", "evaluate.every=999999999", "checkpoint.every=999999999")


class Enough(BaseException):
    """Ends the run that was measured."""


def measure(options: argparse.Namespace) -> list[tuple[float, float]]:
    """Return (seconds a step with everything, seconds a bare step), one a round."""
    from stepctl import config as configs
    from stepctl import numerics, run, yamlio

    document = yamlio.load(options.config)
    document.set_all([*FAR, *options.set])
    numerics.pin(*numerics.asked_for(document.value))
    from stepctl.cli.display import shown
    from stepctl.rundir import RunDirectory
    from stepctl.trainer import Trainer

    found: list[tuple[float, float]] = []

    def measured_run(trainer: Trainer) -> Any:
        trainer.start()

        def whole() -> None:
            while trainer.stop_reason() is None and trainer.state.counters.global_step < end:
                trainer.make_step()

        def bare() -> None:
            while trainer.state.counters.global_step < end:
                trainer.step()

        end = 0
        for number in range(options.rounds + 2):
            seconds: dict[Callable[[], None], float] = {}
            for part in (whole, bare) if number % 2 else (bare, whole):
                end = trainer.state.counters.global_step + options.steps
                start = time.process_time()
                part()
                seconds[part] = (time.process_time() - start) / options.steps
            found.append((seconds[whole], seconds[bare]))
        raise Enough

    Trainer.run = measured_run  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / "run")
        with run.create(configs.parse(document), directory) as segment:
            try:
                with shown(segment, quiet=False, verbose=False) as (writers, hooks):
                    segment.train(writers, hooks)
            except Enough:
                pass
    return found[2:]


def quartiles(values: list[float], form: str) -> str:
    """Return median (lower quartile..upper quartile)."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}}..{high:{form}})"


def main() -> None:
    """Measure in a process with a clean environment, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=10, help="of a stretch")
    parser.add_argument("--rounds", type=int, default=3000)
    options = parser.parse_args()
    if any(name in os.environ for name in UNSET):
        environment = {key: value for key, value in os.environ.items() if key not in UNSET}
        raise SystemExit(subprocess.call([sys.executable, *sys.argv], env=environment))
    kept = os.dup(2)
    with tempfile.TemporaryFile() as console:
        os.dup2(console.fileno(), 2)
        try:
            rounds = measure(options)
        finally:
            os.dup2(kept, 2)
    print(f"with everything {quartiles([1e6 * whole for whole, _ in rounds], '.1f')} us a step")
    print(f"bare            {quartiles([1e6 * bare for _, bare in rounds], '.1f')} us a step")
    print(f"the difference  {quartiles([1e6 * (whole - bare) for whole, bare in rounds], '.1f')} us")
    print(f"as a share      {quartiles([whole / bare - 1 for whole, bare in rounds], '.2%')}")
    whole, bare = (sorted(times)[len(rounds) // 100] for times in zip(*rounds, strict=True))
    print(f"undisturbed     {1e6 * whole:.1f} and {1e6 * bare:.1f} us (hundredths): {whole / bare - 1:.2%}")
    print(f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}, {len(rounds)} rounds of {options.steps}")


if __name__ == "__main__":
    main()
