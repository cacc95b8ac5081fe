"""The tools that step.py compares, each in a child process: `step_tools.py TOOL SIZE THREADS`.

Size "64-128-10@64" is the layers' widths and the batch size; step.py describes the others. A line "k" is answered
by the seconds per step of k steps, and by how many cores other processes kept busy meanwhile.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ROWS = 4096  # a multiple of every batch size
N_CRITIC, LATENT, CLIP = 5, 32, 0.05  # of a WGAN

Step = Callable[[], float]
Made = tuple[Step, str]  # one step, and what the machine line says about the tool


class Case(NamedTuple):
    """What is trained: an MLP of these widths, or a WGAN whose models have the inner ones."""

    widths: list[int]
    batch_size: int
    kind: str = "classification"  # or regression, wgan
    dtype: str = "float32"


def parse(size: str) -> Case:
    """Return the case of a size, such as "64-128-10@64:float64"."""
    layers, _, rest = size.partition("@")
    rows, _, variant = rest.partition(":")
    widths = [int(width) for width in layers.split("-")]
    if variant == "float64":
        return Case(widths, int(rows), dtype=variant)
    return Case(widths, int(rows), variant or "classification")


def data(case: Case) -> tuple[Any, Any]:
    """Return random rows, each of them twice with two targets: no model learns them, so no gradient dies away."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS // 2, case.widths[0])).astype(case.dtype)
    y = rng.integers(0, case.widths[-1], ROWS)
    if case.kind == "regression":
        y = rng.standard_normal((ROWS, case.widths[-1])).astype(case.dtype)
    return np.concatenate([x, x]), y


def stepctl(case: Case, threads: int, *, compiled: str = "auto") -> Made:
    from stepctl.system import blas

    blas.set_environment(threads, blas.AUTO)  # as the command does it, before NumPy

    import numpy

    from stepctl.config import yaml
    from stepctl.config.model import parse_config
    from stepctl.training.build import assemble
    from stepctl.training.compile_updates import compile_updates
    from stepctl.training.trainer import Trainer

    x, y = data(case)
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        numpy.savez(file.name, x=x, y=y)
        sections = {
            "dtype": case.dtype,
            "data": {"name": "arrays", "path": file.name, "batch_size": case.batch_size},
            "model": {"name": "mlp", "hidden": case.widths[1:-1]},
            "task": {"name": case.kind},
            "optimizer": {"name": "adam", "learning_rate": 1e-3},
            "stop": {"last_step": 1},
            "numerics": {"threads": threads, "compiled": compiled},
        }
        if case.kind == "wgan":
            hidden = {"name": "mlp", "hidden": case.widths[1:]}
            sections["model"] = {
                "critic": hidden | {"activation": "leaky_relu"},
                "generator": hidden,
            }
            rmsprop = {"name": "rmsprop", "learning_rate": 5e-5}
            sections["optimizer"] = {"critic": rmsprop, "generator": rmsprop}
            sections["task"] = {
                "name": "wgan",
                "n_critic": N_CRITIC,
                "latent": LATENT,
                "weight_clip": CLIP,
            }
        run_parts = assemble(parse_config(yaml.Document(sections)))
    failure = compile_updates(run_parts, 10**9)
    assert failure is None, failure
    trainer = Trainer(run_parts.task, run_parts.training, run_parts.state, stop=[])
    settled = run_parts.numerics
    about = f"numpy {numpy.__version__}, {settled['blas']} {settled['blas_kernel']} x{settled['threads']}"
    if compiled == "auto" and importlib.util.find_spec("numba"):
        about += f", numba {importlib.metadata.version('numba')}"
    loss = "critic_loss" if case.kind == "wgan" else "loss"
    return lambda: float(trainer.step()[loss]), about


def stepctl_numpy(case: Case, threads: int) -> Made:
    return stepctl(case, threads, compiled="off")


def torch_eager(case: Case, threads: int, *, compiled: bool = False, fused: bool = False) -> Made:
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    about = f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} x{torch.get_num_threads()}"
    if case.kind == "wgan":
        from step_wgan import torch_wgan

        return torch_wgan(case, data(case)[0], compiled=compiled), about
    widths, batch_size = case.widths, case.batch_size
    x, y = (torch.from_numpy(array) for array in data(case))
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(x.dtype)
    criterion: Any = nn.MSELoss() if case.kind == "regression" else nn.CrossEntropyLoss()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, **({"fused": True} if fused else {}))

    def loss_of(rows: Any) -> Any:
        return criterion(model(x.index_select(0, rows)), y.index_select(0, rows))

    forward = torch.compile(loss_of) if compiled else loss_of

    def batches() -> Iterator[Any]:
        while True:
            yield from torch.randperm(ROWS).split(batch_size)

    rows = batches()

    def step() -> float:
        adam.zero_grad()
        loss = forward(next(rows))
        loss.backward()
        adam.step()
        return float(loss.item())

    return step, about


def torch_fused(case: Case, threads: int) -> Made:
    return torch_eager(case, threads, fused=True)


def torch_compiled(case: Case, threads: int) -> Made:
    return torch_eager(case, threads, compiled=True, fused=True)


def jax_jit(case: Case, threads: int) -> Made:
    import jax

    jax.config.update("jax_enable_x64", case.dtype == "float64")

    import jax.numpy as jnp
    import numpy as np

    about = f"jax {jax.__version__}"
    if case.kind == "wgan":
        from step_wgan import jax_wgan

        return jax_wgan(case, data(case)[0]), about
    widths, batch_size = case.widths, case.batch_size
    x, y = (jnp.asarray(array) for array in data(case))
    rng = np.random.default_rng(0)
    params = [
        (
            jnp.asarray(rng.normal(0, math.sqrt(2 / n_in), (n_in, n_out)), case.dtype),
            jnp.zeros(n_out, case.dtype),
        )
        for n_in, n_out in itertools.pairwise(widths)
    ]

    def loss_of(params: Any, x: Any, y: Any) -> Any:
        for weight, bias in params[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        logits = x @ params[-1][0] + params[-1][1]
        if case.kind == "regression":
            return jnp.mean((logits - y) ** 2)
        return jnp.mean(
            jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        )

    def update(state: Any, order: Any, x: Any, y: Any) -> Any:
        params, m, v, t = state
        rows = jax.lax.dynamic_slice(order, (t * batch_size % ROWS,), (batch_size,))
        loss, grads = jax.value_and_grad(loss_of)(params, x[rows], y[rows])
        t = t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
        rate, root = 1e-3 / (1 - 0.9**t), jnp.sqrt(1 - 0.999**t)
        params = jax.tree.map(
            lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + 1e-8), params, m, v
        )
        return (params, m, v, t), loss

    jitted = jax.jit(update, donate_argnums=0)
    zeros = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
    state, order, n_steps = (params, *zeros, jnp.asarray(0)), None, 0

    def step() -> float:
        nonlocal state, order, n_steps
        if n_steps % (ROWS // batch_size) == 0:
            order = jnp.asarray(rng.permutation(ROWS))
        n_steps += 1
        state, loss = jitted(state, order, x, y)
        return float(loss)

    return step, about


def scikit_learn(case: Case, threads: int) -> Made:
    import numpy as np
    import sklearn
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    x, y = data(case)
    widths, batch_size = case.widths, case.batch_size
    is_classifier = case.kind == "classification"
    model = (MLPClassifier if is_classifier else MLPRegressor)(
        hidden_layer_sizes=widths[1:-1],
        solver="adam",
        alpha=0.0,
        batch_size=batch_size,
        learning_rate_init=1e-3,
        shuffle=False,
    )
    rng, classes = np.random.default_rng(0), np.arange(widths[-1])

    def batches() -> Iterator[Any]:
        while True:
            yield from rng.permutation(ROWS).reshape(-1, batch_size)

    rows = batches()
    options = {"classes": classes} if is_classifier else {}

    def step() -> float:
        at = next(rows)
        model.partial_fit(x[at], y[at], **options)
        return float(model.loss_)

    return step, f"scikit-learn {sklearn.__version__}"


TOOLS: dict[str, tuple[str, Callable[[Case, int], Made]]] = {
    "stepctl": ("stepctl", stepctl),
    "stepctl-numpy": ("stepctl", stepctl_numpy),
    "torch": ("torch", torch_eager),
    "torch-fused": ("torch", torch_fused),
    "torch-compiled": ("torch", torch_compiled),
    "jax": ("jax", jax_jit),
    "sklearn": ("sklearn", scikit_learn),
}


def main(tool: str, size: str, threads: int) -> None:
    """Take the cores, warm up, say that it is ready, and answer."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    step, about = TOOLS[tool][1](parse(size), threads)
    start = time.perf_counter()
    losses = [step() for _ in range(3)]
    while time.perf_counter() - start < 0.5:
        losses.append(step())
    start = time.perf_counter()
    losses += [step() for _ in range(3)]
    assert all(map(math.isfinite, losses)), losses
    print(json.dumps({"about": about, "seconds": (time.perf_counter() - start) / 3}), file=answers)
    for line in sys.stdin:
        k = int(line)
        for _ in range(max(1, k // 8)):
            step()
        before = busy() - time.process_time()
        start = time.perf_counter()
        for _ in range(k):
            step()
        seconds = time.perf_counter() - start
        others = busy() - time.process_time() - before
        print(json.dumps({"seconds": seconds / k, "others": others / seconds}), file=answers)


def busy() -> float:
    """Return the seconds that all cores have worked or been withheld, in steps of a hundredth; 0 where unknown."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *rest = map(int, file.readline().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
