"""The commands and options about mirrors: exit codes, one line on stderr, what is on stdout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepctl.config import yaml
from stepctl.errors import Exit
from stepctl.mirror import fetch
from stepctl.rundir.directory import RunDirectory
from tests.cli.test_messages import Answer, everything, stepctl
from tests.support.object_store import environment
from tests.support.runs import BASE, content, rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a config."""
    monkeypatch.chdir(tmp_path)
    write_config()
    return tmp_path


def write_config(**sections: Any) -> None:
    Path("c.yaml").write_text(yaml.dumps({**BASE, "stop": {"last_step": 8}, **sections}))


def url(name: str = "store") -> str:
    return f"file://{os.getcwd()}/{name}"


def train(*more: object) -> Answer:
    return stepctl("train", "c.yaml", "-q", *more)


@pytest.mark.training
def test_the_same_command_continues_after_the_disk_is_lost(here: Path) -> None:
    command = ("--mirror", url(), "--or-resume")
    assert train(*command) == (0, "", "")
    shutil.rmtree("runs")
    answer = train(*command, "--last-step", 12)
    assert answer == (0, "", f"runs/c: fetched step 8 from {url()}\n")
    assert train("--last-step", 12, "--run-dir", "once").code == 0
    found, expected = (
        content(Path(run, "checkpoints", "step-00000012.h5")) for run in ("runs/c", "once")
    )
    for contents in (found, expected):
        del contents["config"], contents["@run"]
    assert found == expected
    assert rows(Path("runs/c")) == rows(Path("once"))


@pytest.mark.training
def test_the_mirror_of_the_config_is_used_too(here: Path) -> None:
    write_config(mirror={"url": url()})
    assert train().code == 0
    shutil.rmtree("runs")
    answer = train()
    assert answer.code == Exit.USAGE
    assert answer.stderr == (
        f"stepctl: {url()}: already contains a run, at step 8; continue with: stepctl resume {url()}\n"
    )
    assert not Path("runs").exists()
    answer = stepctl("resume", url(), "--num-steps", 1, "-q", "--run-dir", "there")
    assert answer == (0, "", f"there: fetched step 8 from {url()}\n")
    assert stepctl("inspect", url(), "--step") == (0, "9\n", "")


@pytest.mark.training
def test_resume_of_a_url_goes_on_with_the_run_that_is_here(here: Path) -> None:
    assert train("--mirror", url(), "--run-dir", "runs/store").code == 0
    assert stepctl("resume", url(), "--num-steps", 1, "-q") == (0, "", "")
    assert stepctl("inspect", "runs/store", "--step").stdout == "9\n"


@pytest.mark.training
def test_pull_and_push(here: Path) -> None:
    assert train().code == 0
    answer = stepctl("push", "runs/c", url())
    assert answer == (0, "", f"runs/c: global step 8 is in {url()}\n")
    before = everything(here / "store")
    answer = stepctl("pull", url(), "--json")
    assert json.loads(answer.stdout) == {"run": "runs/store", "step": 8, "url": url()}
    assert answer.stderr.startswith(f"runs/store: global step 8, from {url()}; continue with: ")
    assert everything(here / "store") == before
    assert stepctl("verify", "runs/store").code == 0
    assert json.loads(stepctl("push", "runs/store", url(), "--json").stdout)["step"] == 8


@pytest.mark.training
def test_inspect_of_a_mirror(here: Path) -> None:
    assert train("--mirror", url()).code == 0
    found = json.loads(stepctl("inspect", url(), "--json").stdout)
    local = json.loads(stepctl("inspect", "runs/c", "--json").stdout)
    mirror = found.pop("mirror")
    assert local.pop("mirror")["step"] == 8
    for key in ("segment", "parent"):
        del local[key]
    assert found == local
    assert mirror["run_id"] == found["run_id"]
    assert (mirror["url"], mirror["step"], mirror["released"]) == (url(), 8, True)
    text = stepctl("inspect", url()).stdout
    assert text.startswith(f"{url()}  commit 1-{mirror['seq']}  steps 8")
    assert "params/dense0/weight" in text


@pytest.mark.training
def test_verify_of_a_mirror(here: Path) -> None:
    assert train("--mirror", url()).code == 0
    answer = stepctl("verify", url())
    assert answer.code == 0
    assert answer.stdout.endswith(f"{url()}: good\n")
    assert json.loads(stepctl("verify", url(), "--json").stdout)["ok"] is True
    damaged = max((here / "store" / "data").iterdir(), key=lambda path: path.stat().st_size)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    answer = stepctl("verify", url())
    assert answer.code == Exit.NEGATIVE
    assert f"data/{damaged.name} is damaged" in answer.stdout
    assert f"stepctl push RUN {url()} --all" in answer.stderr
    assert stepctl("push", "runs/c", url(), "--all").code == 0
    assert stepctl("verify", url()).code == 0


@pytest.mark.training
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "c.yaml", "--mirror", "s3://key:secret@b/x"), 2, "contains user info"),
        (("train", "c.yaml", "--mirror", "runs/x"), 2, "is not a URL of a store"),
        (("train", "c.yaml", "--set", "mirror.url=s3://k:secret@b"), 2, "contains user info"),
        (("train", "c.yaml", "--set", "mirror.every=5"), 2, "url is missing"),
        (("resume", "URL"), 2, "no run in it"),
        (("resume", "s3://"), 2, "no valid bucket"),
        (("resume", "URL", "--mirror", "file:///x"), 2, "two mirrors"),
        (("resume", "c", "--run-dir", "x"), 2, "is for the URL of a mirror"),
        (("pull", "URL"), 2, "no run in it"),
        (("pull", "runs/c"), 2, "is not a URL"),
        (("push", "runs/c", "URL"), 2, "no run found"),
        (("inspect", "URL"), 2, "no run in it"),
        (("inspect", "URL", "--step"), 2, "no run in it"),
        (("inspect", "s3://b?x", "--step"), 2, "query"),
        (("verify", "URL"), 2, "no run in it"),
        (("verify", "URL", "--replay", "1:2"), 2, "--replay needs the run here"),
    ],
)
def test_refused(arguments: tuple[str, ...], code: int, message: str, here: Path) -> None:
    before = everything(here)
    answer = stepctl(*(url() if word == "URL" else word for word in arguments))
    assert answer.code == code
    assert message in answer.stderr
    assert "secret" not in answer.stdout + answer.stderr
    assert everything(here) == before


@pytest.mark.training
def test_a_store_that_does_not_answer_is_no_blank_machine(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_DELAYS", (0.0,))
    for name, value in environment("http://127.0.0.1:1").items():
        monkeypatch.setenv(name, value)
    for command in (("train", "c.yaml", "--or-resume", "--mirror"), ("resume",), ("pull",)):
        answer = stepctl(*command, "s3://bucket/x")
        assert answer.code == Exit.NEGATIVE
        assert answer.stderr.startswith("stepctl: s3://bucket/x: cannot list ")
        assert answer.stderr.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.training
def test_a_refused_mirror_is_one_line(here: Path) -> None:
    assert train("--mirror", url()).code == 0
    assert train("--run-dir", "other").code == 0
    before = everything(here)
    answer = stepctl("resume", "other", "--num-steps", 1, "-q", "--mirror", url())
    assert answer.code == Exit.USAGE
    assert "is the mirror of another run" in answer.stderr
    assert answer.stderr.count("\n") == 1
    del before["other/lock"]
    assert {name: content for name, content in everything(here).items() if name in before} == before


@pytest.mark.training
def test_a_fork_has_no_mirror(here: Path) -> None:
    assert train("--mirror", url()).code == 0
    answer = stepctl("fork", "runs/c", "--run-dir", "fork", "--set", "seed=7", "--last-step", 9)
    assert "the fork has no mirror" in answer.stderr
    assert RunDirectory("fork").newest_config().value["mirror"] is None
    assert stepctl("resume", "fork", "-q").code == 0
    own = f"mirror.url={url('other')}"
    assert stepctl("fork", "runs/c", "--run-dir", "fork2", "--set", own, "--last-step", 9).code == 0
    assert stepctl("resume", "fork2", "-q").code == 0
    assert stepctl("inspect", url("other"), "--step").stdout == "9\n"
    assert stepctl("inspect", url(), "--step").stdout == "8\n"


@pytest.mark.training
def test_a_finished_run_claims_no_mirror(here: Path) -> None:
    assert train("--mirror", url()).code == 0
    before = everything(here / "store")
    assert "nothing to do" in train("--mirror", url(), "--or-resume").stderr
    assert "nothing to do" in stepctl("resume", "runs/c").stderr
    assert everything(here / "store") == before


@pytest.mark.process
def test_a_run_without_a_mirror_loads_nothing_of_it(here: Path) -> None:
    code = """
import sys
from stepctl.cli.main import cli
try:
    cli(sys.argv[1:])
except SystemExit as end:
    print(end.code, sorted(name for name in sys.modules if name.startswith(("stepctl.mirror", "obstore"))))
"""
    for command in (["train", "c.yaml"], ["resume", "runs/c", "--num-steps", "1"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "-q"], capture_output=True, text=True, check=True
        )
        assert done.stdout == "0 []\n"
