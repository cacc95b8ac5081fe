"""The README's config, commands, model and options work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stepctl.cli.main import cli
from stepctl.config import model, yaml
from tests.support.run_checks import checkpoints
from tests.support.runs import make_config, rows, train

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


def test_it_has_the_two_commands_that_the_ci_pastes() -> None:
    assert [*re.findall(r"^```sh paste\n(.*)", README, re.M)] == [
        "python3 -m venv .venv && . .venv/bin/activate &&",
        "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[dev]' && pytest",
    ]


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
@pytest.mark.parametrize(
    ("page", "module", "task"),
    [(README, "mymodel", "loss"), (PROGRAMS, "squares", "regression")],
    ids=["README", "programs"],
)
def test_the_model_of_a_page_trains(
    page: str, module: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = block("python", f"# {module}.py", page)
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    named = re.search(rf"model: (\{{name: \"{module}:.*?\}})", code)
    assert named is not None
    section = yaml.loads(f"model: {named[1]}", "README.md").value["model"]
    np.savez(tmp_path / "line.npz", x=np.ones((8, 2)), y=np.arange(8.0))
    data = {"name": "arrays", "path": str(tmp_path / "line.npz"), "batch_size": 4}
    optimizer = {"name": "sgd", "learning_rate": 0.01}
    config = make_config(
        data=data,
        model=section,
        task={"name": task},
        optimizer=optimizer,
        stop={"last_step": 3},
        evaluate={"every": None},
    )
    state = train(config, tmp_path / "run")
    assert state.counters.global_step == 3


def run_in(folder: Path, *command: str) -> str:
    """Run a command in a folder; return its standard output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_it_trains_from_python(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    printed = run_in(tmp_path, sys.executable, "-c", block("python", "load_model"))
    assert re.fullmatch(r"\[\d\] \(64, 128\)", printed.splitlines()[-1])
    assert "'learning_rate': 0.003" in printed


@pytest.mark.process
def test_its_script_runs_and_is_replayed(tmp_path: Path) -> None:
    code = block("python", "stepctl.loop")
    (tmp_path / "walk.py").write_text(code)
    assert len(code.splitlines()) <= 16
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
    read = block("python", "load_series", PROGRAMS)
    read = f"import stepctl\n{read}print(totals.shape, steps[0])"
    assert run_in(tmp_path, sys.executable, "-c", read) == "(100, 2) 1\n"
    (tmp_path / "metropolis.py").write_text(block("python", "class Metropolis", PROGRAMS))
    (tmp_path / "metropolis.yaml").write_text(block("yaml", "# metropolis.yaml", PROGRAMS))
    run_in(tmp_path, sys.executable, "-m", "stepctl", "train", "metropolis.yaml", "-q")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "mean_loss.py").write_text(block("python", "class MeanLoss", PROGRAMS))
    (tmp_path / "hooked.py").write_text(block("python", "runs/hooked", PROGRAMS))
    assert "hook mean_loss: mean loss 0.4" in run_in(tmp_path, sys.executable, "hooked.py")
    for run, step in (("sum", "100"), ("metropolis", "10000"), ("hooked", "60")):
        inspect = ("inspect", f"runs/{run}", "--step")
        assert run_in(tmp_path, sys.executable, "-m", "stepctl", *inspect) == f"{step}\n"


@pytest.mark.process
def test_the_losses_of_the_page_train_and_predict(tmp_path: Path) -> None:
    for file in (
        "autoencoder.yaml",
        "autoencoder.py",
        "reconstruct.py",
        "bigram.yaml",
        "bigram.py",
    ):
        code = block(file.rpartition(".")[2].replace("py", "python"), f"# {file}", PROGRAMS)
        (tmp_path / file).write_text(code)
    run_in(tmp_path, sys.executable, "-m", "stepctl", "train", "autoencoder.yaml", "-q")
    assert run_in(tmp_path, sys.executable, "reconstruct.py") == "True\n"
    (tmp_path / "rows.csv").write_text("1," * 63 + "1\n")
    predict = re.search(r"`stepctl (predict runs/autoencoder INPUT -o OUT.npz)`", PROGRAMS)
    assert predict is not None
    words = predict[1].replace("INPUT", "rows.csv").split()
    run_in(tmp_path, sys.executable, "-m", "stepctl", *words)
    with np.load(tmp_path / "OUT.npz") as predictions:
        assert predictions["prediction"].shape == (1, 64)
    run_in(tmp_path, sys.executable, "bigram.py")
    run_in(tmp_path, sys.executable, "-m", "stepctl", "train", "bigram.yaml", "-q")
    losses = [row["loss"] for row in rows(tmp_path / "runs" / "bigram")]
    assert losses[0] > 5  # about log(256), that of a guess
    assert losses[-1] < 2.5


@pytest.mark.process
def test_the_hook_of_the_page_is_changed_on_a_resume_and_in_a_fork(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "mean_loss.py").write_text(block("python", "class MeanLoss", PROGRAMS))
    named = re.search(r"`(hooks): (\[\{name: \"mean_loss:MeanLoss\".*?\])`", PROGRAMS)
    assert named is not None
    stepctl = (sys.executable, "-m", "stepctl")
    start = ("train", "configs/quickstart.yaml", "-q", "--run-dir", "runs/start")
    run_in(tmp_path, *stepctl, *start, "--set", f"hooks={named[2]}")
    fork = re.search(r"`stepctl (fork RUN --at 50 --run-dir NEW .*?)`", PROGRAMS)
    resume = re.search(r"`stepctl (resume RUN --set hooks.*?)`", PROGRAMS)
    assert fork is not None
    assert resume is not None
    for command in (fork[1], "resume NEW", resume[1]):
        paths = command.replace("RUN", "runs/start").replace("NEW", "runs/fork")
        run_in(tmp_path, *stepctl, *paths.split(), *(["-q"] if "fork RUN" not in command else []))
    steps = [max(checkpoints(tmp_path / "runs" / name)) for name in ("start", "fork")]
    assert steps == [72, 72]


def in_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line in a shell that finds stepctl."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    script = bin_folder / "stepctl"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m stepctl "$@"\n')
    script.chmod(0o755)
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.process
def test_the_sessions_of_the_readme_print_what_they_show(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    run_in(tmp_path, sys.executable, "-m", "stepctl", "train", "configs/quickstart.yaml", "-q")
    text = "".join(re.findall(r"^```\n(\$.*?)^```", README, re.M | re.S))
    for session in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, *shown = session.splitlines()
        if "Ctrl-C" in command:
            continue
        assert command.startswith("stepctl ")
        done = in_shell(command, tmp_path)
        assert done.returncode == 0, done.stderr
        printed = [without_numbers(line) for line in (done.stderr + done.stdout).splitlines()]
        for line in shown:
            if line != "...":
                assert without_numbers(line) in printed, line
                del printed[: printed.index(without_numbers(line)) + 1]


@pytest.mark.process
def test_its_learning_rates_are_compared(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    loop = block("sh", "for rate in")
    (shown,) = re.findall(r"^```\n(run  .*?)^```", README, re.M | re.S)
    done = in_shell(loop, tmp_path)
    assert done.returncode == 0, done.stderr
    head, best, *others = done.stdout.splitlines()
    assert [head.split(), best.split()[:6]] == [
        shown.splitlines()[0].split(),
        shown.splitlines()[1].split()[:6],
    ]
    assert len(others) == 3
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def without_numbers(line: str) -> str:
    """Return a line without its decimals, which depend on the machine, and without its spaces."""
    return re.sub(r"-?\d+\.\d+(e-\d+)?", "X", line).replace(" ", "")


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
