"""Steps per second of emcee's EnsembleSampler: in memory, driven through stepctl.loop, and with its HDF5 backend.

    pip install emcee
    PYTHONPATH=. python tests/bench/emcee_rate.py

32 walkers in 5 dimensions sample a standard normal. stepctl writes a checkpoint every 100 steps, of the ensemble and
emcee's random state. emcee keeps the chain, in memory or in its HDF5 file; with stepctl, the chain is left out, or
appended to a series, or part of the state and so of every checkpoint; or the mean log probability of each step is
logged, with a metrics row every 100 steps. The start and the end of a run count too. The
ways take turns; printed are the median rates, their range, and the median share of the rate in memory, by round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import emcee
import numpy as np

import stepctl

UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
N_WALKERS, N_DIMENSIONS = 32, 5
START = np.random.default_rng(0).standard_normal((N_WALKERS, N_DIMENSIONS))


def log_prob(x: np.ndarray) -> float:
    return -0.5 * float(x @ x)


def seeded_sampler(backend: object = None) -> emcee.EnsembleSampler:
    np.random.seed(0)  # noqa: NPY002, emcee copies this state
    return emcee.EnsembleSampler(N_WALKERS, N_DIMENSIONS, log_prob, backend=backend)


def in_memory(n_steps: int, folder: Path) -> np.ndarray:
    """Return the last positions, as each of the ways does."""
    sampler = seeded_sampler()
    for _ in sampler.sample(START, iterations=n_steps):
        pass
    return sampler.get_chain()[-1]


def hdf5_backend(n_steps: int, folder: Path) -> np.ndarray:
    backend = emcee.backends.HDFBackend(folder / "chain.h5")
    backend.reset(N_WALKERS, N_DIMENSIONS)
    sampler = seeded_sampler(backend)
    for _ in sampler.sample(START, iterations=n_steps):
        pass
    return sampler.get_chain()[-1]


def stepctl_loop(
    n_steps: int,
    folder: Path,
    *,
    in_state: bool = False,
    in_series: bool = False,
    logs: bool = False,
) -> np.ndarray:
    sampler = seeded_sampler()
    state = {
        "coords": START.copy(),
        "log_prob": sampler.compute_log_prob(START)[0],
        "random_state": sampler.random_state,
    }
    if in_state:
        state["chain"] = np.empty((n_steps, N_WALKERS, N_DIMENSIONS))
    run_dir = folder / "run"
    with stepctl.loop(
        run_dir, state, last_step=n_steps, checkpoint_every=100, log_every=100
    ) as run:
        ensemble = emcee.State(
            state["coords"], state["log_prob"], random_state=state["random_state"]
        )
        samples = sampler.sample(ensemble, iterations=None, store=False)
        for step in run:
            sample = next(samples)
            state["coords"] = sample.coords
            state["log_prob"] = sample.log_prob
            state["random_state"] = sample.random_state
            if in_state:
                state["chain"][step] = sample.coords
            if in_series:
                run.append("chain", sample.coords)
            if logs:
                run.log(log_prob=sample.log_prob.mean())
    return state["coords"]


WAYS: dict[str, Callable[[int, Path], np.ndarray]] = {
    "in memory": in_memory,
    "stepctl.loop": stepctl_loop,
    "stepctl.loop, with metrics": partial(stepctl_loop, logs=True),
    "stepctl.loop, chain as a series": partial(stepctl_loop, in_series=True),
    "stepctl.loop, chain in the state": partial(stepctl_loop, in_state=True),
    "HDF5 backend": hdf5_backend,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard the messages of runs."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def measure(n_steps: int, rounds: int) -> None:
    """Measure and print."""
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        expected = None
        for name, way in WAYS.items():
            n = n_steps // 10 if way is hdf5_backend else n_steps
            with tempfile.TemporaryDirectory(dir=".") as folder, quiet():
                began = time.perf_counter()
                positions = way(n, Path(folder))
                rates[name].append(n / (time.perf_counter() - began))
            if way is in_memory:
                expected = positions
            assert way is hdf5_backend or np.array_equal(positions, expected), name
    for name, found in rates.items():
        shares = [rate / fastest for rate, fastest in zip(found, rates["in memory"], strict=True)]
        print(
            f"{name:33}{statistics.median(found):8,.0f} steps/s ({min(found):,.0f} to {max(found):,.0f}), "
            f"{statistics.median(shares):.0%}"
        )
    print(
        f"{n_steps} steps, {rounds} rounds, emcee {emcee.__version__}, numpy {np.__version__}, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    """Measure in a child process, in which OpenBLAS chooses its kernel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if set(UNSET) & set(os.environ):
        environment = {key: value for key, value in os.environ.items() if key not in UNSET}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    measure(options.steps, options.rounds)


if __name__ == "__main__":
    main()
