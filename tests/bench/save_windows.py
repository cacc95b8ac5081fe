"""What a save costs a training loop, for each tool: `save.py windows` runs this.

Each tool trains the same model, an MLP 784-512-256-10 with AdamW on batches of 128 (6.4 MB of
state), on two threads. Windows of 300 steps with three saves, at the steps 50, 150 and 250 of the
window, alternate with windows without saves. A window ends when its last save is complete. The cost
of a save is a third of the difference between a window with saves and the mean of its two neighbours.

A save of stepctl computes a SHA-256 and reads the file back; the others do neither.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WINDOW = 300  # steps
SAVES = 3  # in a window that has any
SAVED_AT = {50, 150, 250}  # steps of the window
WIDTHS = (784, 512, 256, 10)
BATCH_SIZE = 128
N_SAMPLES = 4096
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def report(name: str, seconds: list[float]) -> None:
    """Print the cost of a save from the times of windows without, with, without, ..., without."""
    quiet = seconds[0::2]
    saving = seconds[1::2]
    costs = [
        (window - (before + after) / 2) / SAVES * 1e3
        for window, (before, after) in zip(saving, itertools.pairwise(quiet), strict=True)
    ]
    low, median, high = statistics.quantiles(costs, n=4)
    step = statistics.median(quiet) / WINDOW * 1e3
    print(
        f"{name}: {median:.1f} ms a save (quartiles {low:.1f} and {high:.1f}, "
        f"{len(costs)} windows), {step:.3f} ms a step without saves",
        flush=True,
    )


def samples() -> tuple[Any, Any]:
    """Return random inputs and labels."""
    import numpy as np

    generator = np.random.default_rng(0)
    x = generator.normal(size=(N_SAMPLES, WIDTHS[0])).astype(np.float32)
    y = generator.integers(0, WIDTHS[-1], N_SAMPLES)
    return x, y


def batches() -> Iterator[slice]:
    """Yield the rows of one batch after another, forever."""
    for start in itertools.cycle(range(0, N_SAMPLES, BATCH_SIZE)):
        yield slice(start, start + BATCH_SIZE)


def measure(
    name: str, n_windows: int, step: Callable[[], None], save: Callable[[], None],
    wait: Callable[[], None],
) -> None:  # fmt: skip
    """Time alternating windows of a loop of these three calls."""
    for _ in range(WINDOW):
        step()
    save()
    wait()
    seconds = []
    for window in range(2 * n_windows + 1):
        began = time.perf_counter()
        for number in range(WINDOW):
            step()
            if window % 2 and number in SAVED_AT:
                save()
        wait()
        seconds.append(time.perf_counter() - began)
    report(name, seconds)


def stepctl_windows(folder: Path, n_windows: int) -> None:
    import numpy as np

    from stepctl.hooks.base import Hook
    from stepctl.hooks.save import Save
    from stepctl.rundir.directory import RunDirectory
    from stepctl.runs.open import create_run
    from tests.support.runs import make_config

    x, y = samples()
    np.savez(folder / "x.npz", x=x, y=y)
    ends: list[float] = []

    class Windows(Hook):
        """Waits at the end of each window for its last save, and notes the time."""

        name = "windows"

        def after_step(self, state: Any, metrics: Any) -> None:
            if state.counters.global_step % WINDOW == 0:
                savers[0].wait()
                ends.append(time.perf_counter())

    savers: list[Save] = []

    def is_due(saver: Save, state: Any) -> bool:
        savers[:] = [saver]
        window, number = divmod(state.counters.global_step, WINDOW)
        return window % 2 == 0 and number in SAVED_AT  # window 0 warms up

    Save._is_due = is_due  # type: ignore[method-assign]
    config = make_config(
        data={
            "name": "arrays",
            "path": str(folder / "x.npz"),
            "batch_size": BATCH_SIZE,
            "n_classes": WIDTHS[-1],
        },
        model={"name": "mlp", "hidden": list(WIDTHS[1:-1])},
        optimizer={"name": "adamw", "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        evaluate={"every": None},
        log={"every": 1_000_000},
        checkpoint={"every": 1, "keep_last": 1},
        stop={"last_step": WINDOW * (2 * n_windows + 2)},
        numerics={"threads": 2},
    )
    with create_run(config, RunDirectory(folder / "run")) as segment:
        segment.train(hooks=[Windows()])
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    report("stepctl", seconds)


class TorchLoop:
    """The same training loop in PyTorch."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(2)
        torch.manual_seed(0)
        layers: list[Any] = []
        for n_in, n_out in itertools.pairwise(WIDTHS):
            layers += [torch.nn.Linear(n_in, n_out), torch.nn.ReLU()]
        self.model = torch.nn.Sequential(*layers[:-1])
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        x, y = samples()
        self.x = torch.from_numpy(x)
        self.y = torch.from_numpy(y)
        self.rows = batches()

    def step(self) -> None:
        import torch

        rows = next(self.rows)
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def torch_windows(folder: Path, n_windows: int) -> None:
    import torch

    loop = TorchLoop()
    numbers = itertools.count()

    def save() -> None:
        with open(folder / f"{next(numbers)}.pt", "wb") as file:
            torch.save(loop.state(), file)
            file.flush()
            os.fsync(file.fileno())

    measure(f"torch.save + fsync {torch.__version__}", n_windows, loop.step, save, lambda: None)


def dcp_windows(folder: Path, n_windows: int) -> None:
    import torch
    import torch.distributed as distributed
    import torch.distributed.checkpoint as checkpoint

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    loop = TorchLoop()
    numbers = itertools.count()
    in_flight: list[Any] = []

    def wait() -> None:
        while in_flight:
            in_flight.pop().result()

    def save() -> None:
        wait()
        path = str(folder / str(next(numbers)))
        in_flight.append(checkpoint.async_save(loop.state(), checkpoint_id=path))

    measure(f"DCP async_save {torch.__version__}", n_windows, loop.step, save, wait)
    distributed.destroy_process_group()


def orbax_windows(folder: Path, n_windows: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as orbax

    generator = np.random.default_rng(0)
    params = [
        (jnp.asarray(generator.normal(0, 0.05, pair), jnp.float32), jnp.zeros(pair[1]))
        for pair in itertools.pairwise(WIDTHS)
    ]
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = {"params": params, "mean": zeros, "square": zeros, "step": jnp.zeros((), jnp.int32)}
    x, y = map(jnp.asarray, samples())

    def loss(params: Any, x: Any, y: Any) -> Any:
        *hidden, (weight, bias) = params
        for hidden_weight, hidden_bias in hidden:
            x = jax.nn.relu(x @ hidden_weight + hidden_bias)
        logits = jax.nn.log_softmax(x @ weight + bias)
        return -jnp.take_along_axis(logits, y[:, None], 1).mean()

    @jax.jit
    def update(state: Any, x: Any, y: Any) -> Any:
        gradients = jax.grad(loss)(state["params"], x, y)
        step = state["step"] + 1
        mean = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, state["mean"], gradients)
        square = jax.tree.map(
            lambda v, g: BETA2 * v + (1 - BETA2) * g * g, state["square"], gradients
        )

        def moved(p: Any, m: Any, v: Any) -> Any:
            direction = m / (1 - BETA1**step) / (jnp.sqrt(v / (1 - BETA2**step)) + EPSILON)
            return p - LEARNING_RATE * (direction + WEIGHT_DECAY * p)

        params = jax.tree.map(moved, state["params"], mean, square)
        return {"params": params, "mean": mean, "square": square, "step": step}

    checkpointer = orbax.AsyncCheckpointer(orbax.StandardCheckpointHandler())
    numbers = itertools.count()
    rows = batches()

    def step() -> None:
        nonlocal state
        chosen = next(rows)
        state = jax.block_until_ready(update(state, x[chosen], y[chosen]))

    def save() -> None:
        checkpointer.save(folder / str(next(numbers)), args=orbax.args.StandardSave(state))

    measure(
        f"Orbax async {orbax.__version__}",
        n_windows,
        step,
        save,
        checkpointer.wait_until_finished,
    )


WINDOWS: dict[str, Callable[[Path, int], None]] = {
    "stepctl": stepctl_windows,
    "torch": torch_windows,
    "torch-async": dcp_windows,
    "orbax": orbax_windows,
}
