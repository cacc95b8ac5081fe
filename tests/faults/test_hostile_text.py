"""Hostile configs and command lines: refused at once, each thing wrong in a line of its own, and nothing made."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
from hostile_texts import Attack
from hostile_words import ALL

from stepctl.errors import Exit

SECONDS, BYTES = 1.0, 200 << 20  # of processor time, and of memory above what the command began with
LIMITS = {resource.RLIMIT_CPU: 20, resource.RLIMIT_AS: 4 << 30}  # so that what goes wrong does not take the machine


def measured() -> None:
    """Run `stepctl` as it is run, and write down what it took beside the folder."""
    from stepctl.__main__ import main

    for limit, value in LIMITS.items():
        resource.setrlimit(limit, (value, value))
    cost, memory = time.process_time(), resident("VmRSS")
    try:
        main()
    finally:
        taken = {"seconds": time.process_time() - cost, "bytes": resident("VmHWM") - memory}
        Path("../taken").write_text(json.dumps(taken))


def resident(name: str) -> int:
    """Return a number of bytes that the kernel keeps about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def prepare(attack: Attack) -> None:
    if callable(attack.config):
        attack.config()
    else:
        text = attack.config
        Path("c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))


def every_fifth_at_once() -> list[object]:
    """Return the names of all attacks; four of five are for the long run."""
    return [pytest.param(name, marks=pytest.mark.faults if i % 5 else ()) for i, name in enumerate(ALL)]


@pytest.mark.parametrize("name", every_fifth_at_once())
def test_a_hostile_text_is_refused_at_once_and_in_full(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str, int], None]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    prepare(ALL[name])
    before = sorted(os.listdir())
    with processes.hold(ALL[name].arguments, cwd=here, output=tmp_path / "said", call=measured) as process:
        process.release()
        code = process.wait(60)
    lines = process.said().rstrip("\n").split("\n")
    starts = [start.replace("HERE", str(here)) for start in ALL[name].lines]
    if not lines[0].startswith("Usage: "):
        starts = [f"stepctl: {starts[0]}", *starts[1:]]
    assert code == Exit.USAGE, process.said()
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=False)] == starts
    assert len(lines) == len(starts), process.said()
    assert all(line.isprintable() for line in lines)
    assert sorted(set(os.listdir()) - {"__pycache__"}) == before  # no run, and nothing that a config asked for
    taken = json.loads((tmp_path / "taken").read_text())
    assert taken["seconds"] < SECONDS
    assert taken["bytes"] < BYTES
    figure("hostile texts refused", 1)
