"""The README says what is so: its config, its model and its options are tried."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import make_config, train
from stepctl import config as configs
from stepctl import yamlio
from stepctl.cli.main import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(language: str, with_: str = "") -> str:
    """Return the first block of code in this language, or the first that holds these words."""
    found = re.findall(rf"^```{language}\n((?!apiVersion).*?)^```", README, re.M | re.S)
    return str(next(text for text in found if with_ in text))


def test_its_config_is_a_config() -> None:
    configs.parse(yamlio.loads(block("yaml"), "README.md"))


def test_its_model_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mymodel.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    named = re.search(r"model: (\{name: \"mymodel:.*?\})", block("python"))
    assert named is not None
    model = yamlio.loads(f"model: {named[1]}", "README.md").value["model"]
    state = train(make_config(model=model, stop={"last_step": 3}), tmp_path / "run")
    assert state.counters.global_step == 3


def test_its_program_runs(tmp_path: Path) -> None:
    code = block("python", "import stepctl")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["50", "(64, 128)"]
    assert "'learning_rate': 0.003" in done.stdout


def test_every_option_it_names_exists() -> None:
    known = {option for command in cli.commands.values() for each in command.params for option in each.opts}
    known |= {option for each in cli.params for option in each.opts} | {"--help"}
    known |= {option for each in cli.commands["config"].commands.values() for p in each.params for option in p.opts}  # type: ignore[attr-defined]
    ours = re.sub("^#SBATCH.*|pytest --faults|srun --mpi", "", README, flags=re.M)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= known


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_opens_with_its_command_time_and_result(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first == f"# stepctl train --config configs/{path.name}"
    assert re.match(r"# .*\bs(econds)?\b.*: ", second), second
    command = [sys.executable, "-m", "stepctl.cli.main", "config", "check", str(path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
