"""The cost of a save: the time it blocks the training thread, and its share of the wall time.

    PYTHONPATH=. python tests/bench/save.py stall            # every step of an MLP of 21 million parameters
    PYTHONPATH=. python tests/bench/save.py share            # every 100 steps of configs/fashion-mnist.yaml
    PYTHONPATH=. python tests/bench/save.py windows          # every 100 steps of a loop, for each tool
    PYTHONPATH=. python tests/bench/save.py memory           # beyond the state, while a save is in flight

stall: each tool in a process of its own saves 252 MB of state (parameters and Adam's two moments, float32) again and
again, and pauses in between until the disk has it, as a long step would; timed is the call that saves, in
milliseconds: median (least..most). stepctl trains for real (batch 2048): timed is its hook, and the step after a
save is compared with steps without one. Tools that cannot be imported are left out.

windows: see tests/bench/save_windows.py; `--saves` is the number of windows with saves.

share: what the steps that a save can touch (the one that begins it and the 20 after it) take longer than the other
79 of each 100: the median over the saves, its quartiles, and the mean. Where BLAS uses every core, a save takes one of
them away for a while; `--threads 1` leaves one free. With `--digest-only` a save hands the state over and computes its
SHA-256, and nothing else: the least that it can cost. Needs Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench.save_windows import WINDOWS

UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
SHAPES = [(1024, 4096), (4096,), (4096, 4096), (4096,), (4096, 10), (10,)]
COPIES = ("params", "first_moment", "second_moment")
ROOT = Path(__file__).parents[2]
EVERY, TOUCHED = 100, 20  # steps from save to save, and those that a save can slow down


def spread(values: list[float], digits: int = 3) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


# --- how long a save holds the training thread


def stepctl_saves(folder: Path, n: int) -> None:
    import numpy as np

    from stepctl.hooks.base import Hook
    from stepctl.hooks.save import Save
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.open import create_run
    from tests.support.runs import make_config

    generator = np.random.default_rng(0)
    np.savez(
        folder / "x.npz",
        x=generator.normal(size=(4096, 1024)).astype("f4"),
        y=generator.integers(0, 10, 4096),
    )
    calls: list[float] = []
    real = Save.after_step

    def timed(self: Save, *arguments: Any) -> None:
        began = time.perf_counter()
        real(self, *arguments)
        calls.append((time.perf_counter() - began) * 1e3)

    Save.after_step = timed  # type: ignore[method-assign]

    class Steps(Hook):
        name = "steps"

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.last = 0.0

        def after_step(self, *_: object) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

    times: dict[str, list[float]] = {}
    for name, every in (("without", None), ("with", 1)):
        config = make_config(
            data={
                "name": "arrays",
                "path": str(folder / "x.npz"),
                "batch_size": 2048,
                "n_classes": 10,
            },
            model={"name": "mlp", "hidden": [4096, 4096]},
            evaluate={"every": None},
            log={"every": 1000},
            checkpoint={"every": every, "keep_last": 1},
            stop={"last_step": n},
            numerics={"threads": "auto"},
        )
        steps = Steps()
        calls.clear()
        with create_run(config, RunDirectory(folder / name)) as segment:
            outcome = segment.train(hooks=[steps])
        times[name] = steps.seconds[2:]
    # the first hand-over maps the second set of arrays
    slower = statistics.median(times["with"]) / statistics.median(times["without"])
    print(f"stepctl: {spread(calls[1:-1])} ms; the first save {calls[0]:.3f}; waits {outcome.waits} of {n}; a step "
          f"beside a save takes {slower:.2f} of one without ({statistics.median(times['without']):.2f} s)")  # fmt: skip


def repeat(name: str, n: int, save: Callable[[int], Any], settle: Callable[[Any], None]) -> None:
    calls = []
    for i in range(n + 1):
        began = time.perf_counter()
        handle = save(i)
        calls.append((time.perf_counter() - began) * 1e3)
        settle(handle)
        time.sleep(0.2)
    print(f"{name}: {spread(calls[1:])} ms; the first save {calls[0]:.1f}")


def torch_state() -> dict[str, Any]:
    import torch

    return {f"{copy}/{i}": torch.randn(shape) for copy in COPIES for i, shape in enumerate(SHAPES)}


def torch_saves(folder: Path, n: int) -> None:
    import torch

    state = torch_state()
    repeat(
        f"torch.save {torch.__version__}",
        n,
        lambda i: torch.save(state, folder / "a.pt"),
        lambda _: None,
    )


def torch_async_saves(folder: Path, n: int) -> None:
    import torch
    import torch.distributed as distributed
    import torch.distributed.checkpoint as checkpoint

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    state = torch_state()
    repeat(
        f"torch async_save {torch.__version__}",
        n,
        lambda i: checkpoint.async_save(state, checkpoint_id=str(folder / str(i))),
        lambda handle: handle.result(),
    )
    distributed.destroy_process_group()


def orbax_saves(folder: Path, n: int) -> None:
    import jax
    import orbax.checkpoint as orbax

    keys = jax.random.split(jax.random.key(0), 18)
    state = {
        f"{copy}-{i}": jax.random.normal(keys[i], shape)
        for copy in COPIES
        for i, shape in enumerate(SHAPES)
    }
    jax.block_until_ready(state)
    checkpointer = orbax.AsyncCheckpointer(orbax.StandardCheckpointHandler())
    repeat(
        f"Orbax async {orbax.__version__}",
        n,
        lambda i: checkpointer.save(folder / str(i), args=orbax.args.StandardSave(state)),
        lambda _: checkpointer.wait_until_finished(),
    )


TOOLS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "stepctl": ("stepctl", stepctl_saves),
    "orbax": ("orbax.checkpoint", orbax_saves),
    "torch-async": ("torch", torch_async_saves),
    "torch": ("torch", torch_saves),
}


# --- what share of the wall time saves take


def digest_only(segment: Any, state: Any, *_: object) -> None:
    """Stand in for a save: the digest of the state, and no file."""
    sha256 = hashlib.sha256()
    for array in state.arrays().values():
        sha256.update(array)


def share(saves: int, threads: int | None, publish: Callable[..., None] | None) -> None:
    import numpy as np

    from stepctl.config import yaml
    from stepctl.config.model import parse_config
    from stepctl.hooks.base import Hook
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.open import create_run
    from stepctl.runs.segment import Segment

    document = yaml.load(str(ROOT / "configs" / "fashion-mnist.yaml"))
    if not Path(document.value["data"]["images"]).exists():
        sys.exit("share: Debian's package dataset-fashion-mnist is not installed")
    document.value |= {"evaluate": {"every": None}, "stop": {"last_step": EVERY * (saves + 2)}}
    document.value |= {"checkpoint": {"every": EVERY}, "numerics": {"threads": threads or "auto"}}
    ends: list[float] = []

    class Ends(Hook):
        name = "ends"

        def after_step(self, state: Any, metrics: Any) -> None:
            ends.append(time.perf_counter())

    config = parse_config(document)
    with (
        tempfile.TemporaryDirectory() as folder,
        create_run(config, RunDirectory(Path(folder) / "run")) as segment,
    ):
        if publish is not None:
            Segment._publish = publish  # type: ignore[method-assign]
        outcome = segment.train(hooks=[Ends()])
    # from the second save on: the first one maps the second set of arrays
    seconds = np.diff(ends[EVERY - 1 : EVERY * (saves + 1)]).reshape(saves, EVERY)
    quiet = seconds[:, TOUCHED:-1].mean(axis=1)
    extra = (seconds[:, :TOUCHED] - quiet[:, None]).sum(axis=1) + seconds[:, -1] - quiet
    low, middle, high = np.quantile(extra, (0.25, 0.5, 0.75)) * 1e3
    step = float(np.median(quiet)) * 1e3
    print(f"saving every {EVERY} steps: {100 * middle / (EVERY * step):.2f} % of wall time; a save takes "
          f"{middle:.1f} ms of training ({low:.1f}..{high:.1f}; mean {extra.mean() * 1e3:.1f}, standard error "
          f"{extra.std() / saves**0.5 * 1e3:.1f}) beside steps of {step:.2f} ms; "
          f"{outcome.saves} saves, {outcome.waits} waits")  # fmt: skip


# --- what memory a save takes


def peak(folder: Path, every: int | None) -> tuple[int, int]:
    """Return the bytes of the state, and the most that were resident while it trained six steps."""
    import numpy as np

    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.open import create_run
    from tests.support.runs import make_config

    np.savez(folder / "x.npz", x=np.ones((64, 1024), "f4"), y=np.arange(64) % 10)
    config = make_config(
        data={"name": "arrays", "path": str(folder / "x.npz"), "batch_size": 64, "n_classes": 10},
        model={"name": "mlp", "hidden": [4096, 4096]},
        evaluate={"every": None},
        checkpoint={"every": every, "keep_last": 1},
        stop={"last_step": 6},
    )
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            most = max(most, pages * os.sysconf("SC_PAGE_SIZE"))

    with create_run(config, RunDirectory(folder / "run")) as segment:
        watcher = threading.Thread(target=watch)
        watcher.start()
        segment.train()
        done.set()
        watcher.join()
        return segment.state.n_bytes, most


def memory() -> None:
    found = []
    for every in (None, 1):
        with (
            tempfile.TemporaryDirectory() as folder,
            multiprocessing.get_context("spawn").Pool(1) as pool,
        ):
            found.append(pool.apply(peak, (Path(folder), every)))
    (size, without), (_, with_saves) = found
    print(
        f"memory beyond the state of {size / 1e6:.0f} MB while saving: {(with_saves - without) / size:.2f} times it"
    )


def in_children(what: str, names: list[str], rounds: int, n: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    for _ in range(rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    __file__,
                    f"one-{what}",
                    "--tool",
                    name,
                    "--saves",
                    str(n),
                ]
                subprocess.run(
                    [*command, "--folder", folder],
                    env=environment,
                    check=True,
                    stderr=subprocess.DEVNULL,
                )


ONE = ("one-stall", "one-windows")  # of one tool, in a process of its own


def available() -> Iterator[str]:
    for name, (module, _) in TOOLS.items():
        if importlib.util.find_spec(module.partition(".")[0]):
            yield name


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["stall", "windows", "share", "memory", *ONE])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(available()))
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--shared-saves", type=int, default=60, help="share: saves to average over")
    parser.add_argument("--threads", type=int, help="share: BLAS threads")
    parser.add_argument(
        "--digest-only", action="store_true", help="share: the least that a save can cost"
    )
    options = parser.parse_args()
    if options.what in ("stall", "windows"):
        in_children(options.what, options.tools, options.rounds, options.saves)
    elif options.what == "one-stall":
        TOOLS[options.tool][1](options.folder, options.saves)
    elif options.what == "one-windows":
        WINDOWS[options.tool](options.folder, options.saves)
    elif options.what == "share":
        share(options.shared_saves, options.threads, digest_only if options.digest_only else None)
    else:
        memory()


if __name__ == "__main__":
    main()
