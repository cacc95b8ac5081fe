"""The README's config, commands, model and options work."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stepctl.cli.main import cli
from stepctl.config import model, yaml
from tests.support.runs import make_config, train

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROGRAMS = (ROOT / "stepctl" / "programs" / "README.md").read_text()
PAGES = [
    "README.md",
    "stepctl/cli/README.md",
    "stepctl/distributed/README.md",
    "stepctl/distributed/SCALING.md",
    "stepctl/programs/README.md",
    "configs/README.md",
    "runs/README.md",
    "stepctl/README.md",
    "tests/README.md",
]


def block(language: str, containing: str = "", page: str = README) -> str:
    """Return the first block of code in a language that contains a text."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)
    return str(next(text for text in found if containing in text))


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_example_config_is_valid() -> None:
    page = (ROOT / "configs" / "README.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    model.parse_config(yaml.loads(example, "README.md"))


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.training
def test_its_model_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("python", "mymodel")
    (tmp_path / "mymodel.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    named = re.search(r"model: (\{name: \"mymodel:.*?\})", code)
    assert named is not None
    section = yaml.loads(f"model: {named[1]}", "README.md").value["model"]
    state = train(make_config(model=section, stop={"last_step": 3}), tmp_path / "run")
    assert state.counters.global_step == 3


def run_in(folder: Path, *command: str) -> str:
    """Run a command in a folder; return its standard output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_it_trains_from_python(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    printed = run_in(tmp_path, sys.executable, "-c", block("python", "load_checkpoint"))
    assert printed.splitlines()[-1] == "100 (64, 128)"
    assert "'learning_rate': 0.003" in printed


@pytest.mark.process
def test_its_script_runs_and_is_replayed(tmp_path: Path) -> None:
    code = block("python", "stepctl.loop")
    (tmp_path / "walk.py").write_text(code)
    assert len(code.splitlines()) <= 15
    run_in(tmp_path, sys.executable, "walk.py")
    named = re.search(r"`stepctl (verify runs/walk .*?) -- python walk.py`", README)
    assert named is not None
    replay = [sys.executable, "-m", "stepctl", *named[1].split(), "--", sys.executable, "walk.py"]
    printed = run_in(tmp_path, *replay)
    assert printed == "step 9500: bit-identical\nstep 10000: bit-identical\n"


@pytest.mark.process
def test_the_script_the_program_and_the_hook_of_the_page_run(tmp_path: Path) -> None:
    (tmp_path / "sum.py").write_text(block("python", "runs/sum", PROGRAMS))
    run_in(tmp_path, sys.executable, "sum.py")
    (tmp_path / "walk.py").write_text(block("python", "class Walk", PROGRAMS))
    (tmp_path / "walk.yaml").write_text(block("yaml", "walk:Walk", PROGRAMS))
    run_in(tmp_path, sys.executable, "-m", "stepctl", "train", "walk.yaml", "-q")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "hooked.py").write_text(block("python", "WorstLoss", PROGRAMS))
    assert "last_step 100" in run_in(tmp_path, sys.executable, "hooked.py")
    for run, step in (("sum", "100"), ("walk", "10000"), ("hooked", "100")):
        inspect = ("inspect", f"runs/{run}", "--step")
        assert run_in(tmp_path, sys.executable, "-m", "stepctl", *inspect) == f"{step}\n"


@pytest.mark.process
def test_the_loss_of_the_page_trains_and_predicts(tmp_path: Path) -> None:
    model = block("python", "class Autoencoder", PROGRAMS)
    (tmp_path / "autoencoder.py").write_text(model)
    (tmp_path / "autoencoder.yaml").write_text(block("yaml", "autoencoder:Autoencoder", PROGRAMS))
    run_in(tmp_path, sys.executable, "-m", "stepctl", "train", "autoencoder.yaml", "-q")
    use = block("python", "model.nested", PROGRAMS)
    before = "from stepctl.data.digits import digits\n"
    before += "[(_, x, _)] = digits(targets='values', dtype='float32').train.slices()\n"
    after = "print(np.mean((outputs - x) ** 2) < 0.4 * np.var(x, axis=0).mean())\n"
    (tmp_path / "use.py").write_text(f"{model}\n{before}{use}{after}")
    assert run_in(tmp_path, sys.executable, "use.py") == "True\n"


@pytest.mark.parametrize("page", PAGES)
def test_the_options_on_a_page_exist(page: str) -> None:
    known = {
        option
        for command in cli.commands.values()
        for each in command.params
        for option in each.opts
    }
    known |= {option for each in cli.params for option in each.opts} | {"--help"}
    known |= {
        option
        for each in cli.commands["config"].commands.values()
        for p in each.params
        for option in p.opts
    }  # type: ignore[attr-defined]
    text = (ROOT / page).read_text()
    ours = re.sub("^#SBATCH.*|(pytest|ruff|python) .*|srun --mpi", "", text, flags=re.M)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= known


@pytest.mark.process
@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_config_opens_with_its_command_time_and_result(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first == f"# stepctl train --config configs/{path.name}"
    assert re.match(r"# .*\bs(econds)?\b.*: ", second), second
    command = [sys.executable, "-m", "stepctl.cli.main", "config", "check", str(path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
