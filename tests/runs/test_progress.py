"""The progress of a segment: a bar on a terminal, one in a notebook, lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import stepctl
from stepctl.hooks.progress import Progress, ProgressBar, ProgressText, fitting_parts
from stepctl.state.counters import Counters
from stepctl.state.train_state import TrainState
from stepctl.stopping.base import StopReason
from tests.support.loops import walk
from tests.support.runs import make_config, silent

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
        self.html: list[str] = []

    def display(self, content: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        texts = [content["text/plain"]]
        pages = self.html
        self.outputs.append(texts)

        class Handle:
            def update(self, content: dict[str, str], *, raw: bool) -> None:
                assert raw
                texts.append(content["text/plain"])
                pages.append(content["text/html"])

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


def test_a_notebook_gets_one_bar_that_is_replaced(
    install: Callable[[bool], Notebook], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = install(True)
    walk(tmp_path / "run", 50)
    (texts,) = notebook.outputs
    assert texts[0] == "run: step 0/50  0 %"
    assert texts[-1].startswith("run: step 50/50  100 %  norm ")
    assert texts[-1].endswith(" steps/s  0:00 left")
    assert '<progress value="100.0" max="100"' in notebook.html[-1]
    written = capsys.readouterr().err.splitlines()
    assert [line for line in written if line.startswith("step ")] == []


def test_a_process_that_only_imported_the_kernel_gets_lines(
    install: Callable[[bool], Notebook], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = install(False)
    walk(tmp_path / "run", 3)
    assert notebook.outputs == []
    assert "step 3/3  norm" in capsys.readouterr().err


def test_the_line_is_replaced_ten_times_a_second() -> None:
    now = 0.0
    texts: list[str] = []
    line = ProgressText(
        lambda progress, text: texts.append(text), title="run", target=1000, clock=lambda: now
    )
    counters = Counters({"global_step": 100, "samples_seen": 0})
    state = TrainState(counters, {})
    line.start(state)
    for _ in range(100):
        now += 0.03
        counters.advance({"global_step": 1})
        line.after_step(state, {"loss": 0.5})
    line.end(state, {"loss": 0.25}, StopReason("done", done=True))
    assert texts[0] == "run: step 100/1000 (local 0)  10 %"
    assert texts[1] == "run: step 101/1000 (local 1)  10 %  loss 0.5  33 steps/s  0:27 left"
    assert texts[-1] == "run: step 200/1000 (local 100)  20 %  loss 0.25  33 steps/s  0:24 left"
    assert 25 <= len(texts) <= 32


def line_at(width: int, progress: Progress) -> str:
    """Return the bar on a terminal of this width."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    bar = ProgressBar(console, title=progress.title, target=progress.target)
    bar.open(progress)
    stream.truncate(0)
    bar.update(progress)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue())
    bar.close()
    return text.strip("\0\r\n")


SMALL = Progress("quickstart", 45, 100, 0, "loss 0.2145", 45678.0, "samples", 83.0)
LARGE = Progress(
    "a-run-with-a-long-name", 1234567, 9999999, 1000000, "log_density -3.25e-05", 1e6, "steps", 4e5
)


@pytest.mark.parametrize("progress", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_nothing_of_the_bar_is_cut(width: int, progress: Progress) -> None:
    line = line_at(width, progress)
    assert len(line.rstrip()) <= width - 3  # a terminal shows ^C at the end
    assert "\u2026" not in line
    shown = re.sub("[\u2501\u2578\u257a]+", "", line)
    words = {word for part in progress.parts().values() for word in part.split()}
    assert set(shown.split()) <= words
    assert f"{progress.step}/{progress.target}" in line
    if width >= 60:
        assert "\u2501" in line
        assert " left" in line
    if width == 200:
        assert set(shown.split()) == words


def test_wider_lines_have_more_parts() -> None:
    widths = {
        "title": 10,
        "percentage": 5,
        "step": 7,
        "local": 0,
        "metric": 11,
        "rate": 16,
        "left": 9,
    }
    assert fitting_parts(widths, 10) == ["percentage", "step"]
    assert fitting_parts(widths, 34) == ["percentage", "step", "left"]
    assert fitting_parts(widths, 76) == ["title", "percentage", "step", "metric", "rate", "left"]


@pytest.mark.training
def test_train_shows_the_progress_if_it_is_asked_to(
    install: Callable[[bool], Notebook], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = install(True)
    config = make_config(stop={"last_step": 8}).plain()
    with stepctl.create(config, tmp_path / "run", say=silent) as run:
        run.step(2)
        assert notebook.outputs == []
        run.train(progress=True)
    (texts,) = notebook.outputs
    assert texts[0] == "run: step 2/8 (local 0)  25 %"
    assert texts[-1].startswith("run: step 8/8 (local 6)  100 %  loss ")
    assert "samples/s" in texts[-1]
    install(False)
    with stepctl.create(config, tmp_path / "other", say=silent) as run:
        run.train(progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "other: step 0/8  0 %"
    assert lines[-1].startswith("other: step 8/8  100 %  loss ")
    assert 2 <= len(lines) <= 4


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
    assert "step 2/200  norm" in text
