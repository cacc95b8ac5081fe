"""The progress of a loop: a bar on a terminal, one line in a notebook, lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stepctl.hooks.progress import ProgressLine
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason
from tests.support.loops import walk

ROOT = Path(__file__).parents[2]
SCRIPT = """
from pathlib import Path
from tests.support.loops import walk
walk(Path("run"), 200)
"""


class Notebook:
    """A stand-in for IPython: what each cell output showed, one text after the other."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []

    def display(self, content: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        texts = [content["text/plain"]]
        self.outputs.append(texts)

        class Handle:
            def update(self, content: dict[str, str], *, raw: bool) -> None:
                assert raw
                texts.append(content["text/plain"])

        return Handle()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Notebook]:
    """Return a function that makes this process a notebook's kernel, or one that only imports it."""

    def make(is_kernel: bool) -> Notebook:
        notebook = Notebook()
        modules = {name: ModuleType(name) for name in ("ipykernel", "IPython", "IPython.display")}
        vars(modules["IPython"])["get_ipython"] = lambda: notebook if is_kernel else None
        vars(modules["IPython.display"])["display"] = notebook.display
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return notebook

    return make


def test_a_notebook_gets_one_line_that_is_replaced(
    install: Callable[[bool], Notebook], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = install(True)
    walk(tmp_path / "run", 50)
    (texts,) = notebook.outputs
    assert texts[0] == "run: step 0/50"
    assert texts[-1].startswith("run: step 50/50 (local 50)  norm ")
    assert texts[-1].endswith(" steps/s")
    written = capsys.readouterr().err.splitlines()
    assert [line for line in written if line.startswith("step ")] == []


def test_a_process_that_only_imported_the_kernel_gets_lines(
    install: Callable[[bool], Notebook], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = install(False)
    walk(tmp_path / "run", 3)
    assert notebook.outputs == []
    assert "step 3/3 (local 3)" in capsys.readouterr().err


def test_the_line_is_replaced_ten_times_a_second() -> None:
    now = 0.0
    texts: list[str] = []
    line = ProgressLine(texts.append, title="run", target=1000, clock=lambda: now)
    counters = Counters({"global_step": 100, "samples_seen": 0})
    state = TrainState(counters, {})
    line.start(state)
    for _ in range(100):
        now += 0.03
        counters.advance({"global_step": 1})
        line.after_step(state, {"loss": 0.5})
    line.end(state, {"loss": 0.25}, StopReason("done", done=True))
    assert texts[0] == "run: step 100/1000"
    assert texts[1] == "run: step 101/1000 (local 1)  loss 0.5  33.33 steps/s"
    assert texts[-1] == "run: step 200/1000 (local 100)  loss 0.25  33.33 steps/s"
    assert 25 <= len(texts) <= 32


def on_terminal(cwd: Path, term: str) -> str:
    (cwd / "walk.py").write_text(SCRIPT)
    master, slave = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": term, "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "walk.py"],
        cwd=cwd,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    ) as child:
        os.close(slave)
        written = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(master, 65536):
                written += piece
    os.close(master)
    assert child.returncode == 0, written
    return written.decode()


@pytest.mark.process
def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    text = on_terminal(tmp_path, "xterm")
    assert "\x1b[" in text
    assert "200/200" in text
    assert "step 2/200" not in text
    assert "\x1b[?25h" in text  # the cursor is shown again


@pytest.mark.process
def test_a_dumb_terminal_gets_lines(tmp_path: Path) -> None:
    text = on_terminal(tmp_path, "dumb")
    assert "\x1b" not in text
    assert "step 2/200 (local 2)" in text
