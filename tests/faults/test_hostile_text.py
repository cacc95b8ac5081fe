"""Hostile configs and command lines are refused at once, with one line per problem, and create nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.errors import Exit
from tests.support import processes
from tests.support.hostile_command_lines import ALL
from tests.support.hostile_configs import Attack

SECONDS = 1.0  # of processor time
BYTES = 200 << 20  # of memory, above what the command began with
# so that what goes wrong does not take the machine
LIMITS = {resource.RLIMIT_CPU: 20, resource.RLIMIT_AS: 4 << 30}
SHOWN_LINES = 15
SHOWN_LETTERS = 150
# The words of Python, PyYAML and click, and the sizes of this machine.
NOT_OURS = [
    r"(Try 'stepctl ).*",  # click: --help, or -h
    r"(not YAML: ).*",
    r"(cannot use '(?:bad:Model|builtins:(?:type|dict|int)|:|a:|\.:x|\.\.os:path|os:path:join)': ).*",
    r"(cannot use '(?:no\\x00:y|o\\ns:x\\ny|os/\.\./x:y)': ).*",
    r"(No such command '.*'\.).*",
    r"('9{20,}).*",
    r"(do not fit in memory ).*",
    r"(numerics\.threads: this BLAS ).*",
    r"(NumPy was loaded with ).*",
]


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
        Path("c.yaml").write_bytes(
            text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        )


def summary(lines: list[str], here: Path) -> list[str]:
    """Return the first lines of an answer and their number, without the words of libraries."""
    shown = []
    for line in lines[:SHOWN_LINES]:
        text = line.replace(str(here), "HERE")
        for pattern in NOT_OURS:
            text = re.sub(pattern, r"\1...", text)
        shown.append(text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}...")
    return [*shown, f"lines: {len(lines)}", *lines[SHOWN_LINES:][-1:]]


def every_fifth_at_once() -> list[object]:
    """Return the names of all attacks; four of five are for the long run."""
    return [
        pytest.param(name, marks=pytest.mark.faults if i % 5 else ()) for i, name in enumerate(ALL)
    ]


@pytest.mark.parametrize("name", every_fifth_at_once())
def test_a_hostile_text_is_refused_at_once_and_in_full(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[[str, int], None],
    snapshot: SnapshotAssertion,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    prepare(ALL[name])
    before = sorted(os.listdir())
    with processes.hold(
        ALL[name].arguments, cwd=here, output=tmp_path / "said", call=measured
    ) as process:
        process.release()
        code = process.wait(60)
    lines = process.said().rstrip("\n").split("\n")
    assert code == Exit.USAGE, process.said()
    assert lines[0].startswith(("Usage: stepctl ", "stepctl: "))
    assert all(line.isprintable() for line in lines)
    assert all(len(line) < 1100 for line in lines)
    made = set(os.listdir()) - {"__pycache__"}  # no run, and nothing that a config asked for
    assert sorted(made) == before
    assert summary(lines, here) == snapshot
    taken = json.loads((tmp_path / "taken").read_text())
    assert taken["seconds"] < SECONDS
    assert taken["bytes"] < BYTES
    figure("hostile texts refused", 1)
