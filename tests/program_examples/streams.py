"""The random streams of `rng(name)` and `run.rng(name)`, with NumPy alone."""

import hashlib

import numpy as np


def stream(seed, name, step):
    """Return the generator of a stream: a Philox with a key from (seed, name), and the step in its counter."""
    digest = hashlib.sha256(f"program, steps: {name}".encode()).digest()
    sequence = np.random.SeedSequence(seed, spawn_key=np.frombuffer(digest[:16], "<u4").tolist())
    key = sequence.generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, step, 0]))
