"""A SIGINT that OpenBLAS sends to its own process is not reported as Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepctl.errors import Exit

pytestmark = pytest.mark.process


SENDERS = {
    "OpenBLAS": (
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
        Exit.NEGATIVE,
        "OpenBLAS could not start",
    ),
    "a user": (
        "import subprocess, os; subprocess.run(['kill', '-INT', str(os.getpid())], check=True)",
        Exit.INTERRUPTED,
        "interrupted",
    ),
}


@pytest.mark.parametrize("sender", SENDERS)
def test_a_sigint_while_numpy_loads_is_classified_by_its_sender(
    sender: str, tmp_path: Path
) -> None:
    code, exit_code, words = SENDERS[sender]
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text(code + "\n")
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    command = [sys.executable, "-m", "stepctl", "train", "--config", "c.yaml", "--run-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == exit_code, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "run").exists()
