"""The MLflow hook of configs/README.md: every step is sent once, although kills make steps repeat.

A small module takes the place of MLflow. It kills its process where a test wants it: after the
points of a step are stored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import start
from tests.support.run_checks import checkpoints

pytestmark = pytest.mark.process

LAST = 12
EVERY = 5
PAGE = (Path(__file__).parents[2] / "configs" / "README.md").read_text()
CONFIG: dict[str, Any] = {
    "data": {"name": "digits", "batch_size": 16},
    "model": {"name": "linear"},
    "task": {"name": "classification"},
    "optimizer": {"name": "sgd", "learning_rate": 0.01},
    "stop": {"last_step": LAST},
    "log": {"every": 1},
    "checkpoint": {"every": EVERY},
    "numerics": {"threads": 1},
}
STAND_IN = '''
"""What the hook calls of MLflow. The metrics of one call are a line of a file."""

import json
import os
import signal
from types import SimpleNamespace

POINTS = "points.jsonl"


def run():
    with open(POINTS) as file:
        calls = [json.loads(line) for line in file]
    latest = {key: value for call in calls for key, value in call["metrics"].items()}
    return SimpleNamespace(info=SimpleNamespace(run_id="7"), data=SimpleNamespace(metrics=latest))


def search_runs(*, filter_string, output_format):
    assert (filter_string, output_format) == ("run_name = 'digits-1'", "list")
    return [run()] if os.path.exists(POINTS) else []


def start_run(run_id, *, run_name):
    assert run_name == "digits-1"
    assert run_id == ("7" if os.path.exists(POINTS) else None)
    open(POINTS, "a").close()
    return run()


def log_metrics(metrics, *, step):
    with open(POINTS, "a") as file:
        file.write(json.dumps({"step": step, "metrics": metrics}) + "\\n")
    if os.path.exists(f"kill-{step}"):
        os.unlink(f"kill-{step}")
        os.kill(os.getpid(), signal.SIGKILL)
'''
CONDITION = "if step > self.sent:"


def send_metrics(
    folder: Path, kills: list[int], condition: str = CONDITION
) -> list[dict[str, Any]]:
    """Train to the end, killed within these steps; return what was sent.

    `condition` takes the place of the one in the hook's code.
    """
    (code,) = re.findall(r"^```python\n(# mlflow_log.py.*?)^```", PAGE, re.M | re.S)
    assert CONDITION in code
    code = code.replace(CONDITION, condition)
    code = code.replace("import mlflow", "import mlflow_stand_in as mlflow")
    (folder / "mlflow_log.py").write_text(code)
    (folder / "mlflow_stand_in.py").write_text(STAND_IN)
    (named,) = re.findall(
        r"`hooks: \[(\{name: \"mlflow_log:MLflow\", run_name: digits-1\})\]`", PAGE
    )
    text = json.dumps(CONFIG)
    (folder / "c.yaml").write_text(f'{text[:-1]}, "hooks": [{named}]}}')
    command = ["train", "--config", "c.yaml", "--run-dir", "run", "--or-resume"]
    for step in kills:
        (folder / f"kill-{step}").touch()
        with start(command, cwd=folder) as child:
            assert child.wait() == -9, child.said()
        assert max(checkpoints(folder / "run")) <= step - step % EVERY
    with start(command, cwd=folder) as child:
        assert child.wait() == 0, child.said()
    return [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kills", [[], [1], [4], [5], [6], [3, 9, 11], [12]], ids=str)
def test_every_step_is_sent_once(kills: list[int], tmp_path: Path) -> None:
    sent = send_metrics(tmp_path, kills)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [*range(1, LAST + 1)]
    assert sent == [
        {
            "step": row["step"],
            "metrics": {key: row[key] for key in ("loss", "accuracy", "learning_rate")}
            | {"global_step": row["step"]},
        }
        for row in rows
    ]


def test_without_the_condition_steps_would_be_sent_twice(tmp_path: Path) -> None:
    sent = send_metrics(tmp_path, [9], condition="if True:")
    counts = Counter(call["step"] for call in sent)
    assert [step for step, count in counts.items() if count > 1] == [6, 7, 8, 9]


def test_the_hook_is_short() -> None:
    (code,) = re.findall(r"^(class MLflow.*?)^```", PAGE, re.M | re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
