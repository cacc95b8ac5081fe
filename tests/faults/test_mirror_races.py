"""Several machines on one mirror: one trains, take-overs depose the other, and no two runs are mixed.

Each process has a host of its own, so that no other knows whether it is alive. `pytest --faults` makes 20 races,
`pytest --faults=all` 100.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import series_files
from tests.support.mirror_site import Site, assert_finished, object_store_site, quick_mirror, seq_of
from tests.support.paused_runs import GATE_AT, Gated, at_the_gate, make_gated
from tests.support.processes import Held, Process, hold, start, until
from tests.support.run_checks import assert_nothing_lost, ledger

Figure = Callable[[str, int], None]
DONE, USAGE, IN_USE, STOPPED = 0, 2, 4, 75
SAMPLER = """\
seed: 3
program: {name: "tests.support.sampler:Sampler"}
stop: {last_step: 100000000}
log: {every: 1000}
checkpoint: {every: 1000, keep_last: 1}
mirror: {url: "URL", keep_last: 1}
numerics: {threads: 1}
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with object_store_site() as site:
        yield site


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    return make_gated(tmp_path_factory.mktemp("mirror-races") / "gated", random.Random(1))


@pytest.fixture
def n_races(pytestconfig: pytest.Config) -> int:
    return 10 if pytestconfig.option.faults == "all" else 2


class Machine:
    """A host with a disk of its own, which trains the run or goes on with it."""

    def __init__(self, gated: Gated, site: Site, url: str, name: str) -> None:
        self.name = name
        self.run = gated.trial.new_run(name)
        self._gated = gated
        self._site = site
        self._url = url

    def hold(self, *options: str) -> Held:
        """Fork its process, which waits to be released."""
        environment = {
            **self._site.environment(),
            **self._gated.environment(self.run),
            "MIRROR_HOST": self.name,
        }
        command = self._gated.trial.begin(self.run, "--mirror", self._url, "--or-resume", *options)
        return hold(command, cwd=self._gated.trial.folder, env=environment, call=quick_mirror)

    def is_at_the_gate(self) -> bool:
        return at_the_gate(self.run)

    def open(self) -> None:
        """Let its process pass the gate."""
        self._gated.open(self.run)

    def has_committed(self) -> bool:
        """Tell whether the checkpoint before the gate is in the mirror."""
        return GATE_AT - 1 in [commit.step for commit in self._site.commits(self._url)]


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 5))
def test_of_several_machines_on_an_empty_mirror_exactly_one_trains(
    seed: int, gated: Gated, site: Site, tmp_path: Path, figure: Figure, n_races: int
) -> None:
    chance = random.Random(seed)
    for number in range(n_races):
        begin_together(gated, site, f"{tmp_path.name}-{number}", chance, n_machines=3)
    figure("races on an empty mirror", n_races)


def test_of_two_machines_exactly_one_trains(gated: Gated, site: Site, tmp_path: Path) -> None:
    begin_together(gated, site, tmp_path.name, random.Random(0), n_machines=2)


def begin_together(
    gated: Gated, site: Site, name: str, chance: random.Random, n_machines: int
) -> None:
    site.proxy.restart()
    url = site.new_url()
    machines = [Machine(gated, site, url, f"{name}-{i}") for i in range(n_machines)]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(machine.hold()) for machine in machines]
        release(processes, chance)
        until(lambda: sum(process.running() for process in processes) <= 1)
        (winner,) = [i for i, process in enumerate(processes) if process.running()]
        for process in processes:
            if process is not processes[winner]:
                assert process.wait() in (USAGE, IN_USE), process.said()
        machines[winner].open()
        assert processes[winner].wait() == DONE, processes[winner].said()
    assert_finished(gated.trial, machines[winner].run)
    assert_one_run(gated, site, url)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_take_over_deposes_a_living_owner(
    seed: int, gated: Gated, site: Site, tmp_path: Path, figure: Figure, n_races: int
) -> None:
    chance = random.Random(seed)
    for number in range(n_races):
        take_over(gated, site, f"{tmp_path.name}-{number}", chance)
    figure("take-overs", n_races)


def test_a_take_over_deposes_the_owner_once(gated: Gated, site: Site, tmp_path: Path) -> None:
    take_over(gated, site, tmp_path.name, random.Random(0))


def take_over(gated: Gated, site: Site, name: str, chance: random.Random) -> None:
    """Take a mirror over while its owner may save; both pass the gate at nearly the same moment."""
    site.proxy.restart()
    url = site.new_url()
    first, second = (Machine(gated, site, url, f"{name}-{i}") for i in range(2))
    with first.hold() as old, second.hold("--take-over") as new:
        old.release()
        until(lambda: first.has_committed() or not old.running())
        doors = [first.open, second.open, new.release]
        chance.shuffle(doors)
        for door in doors:
            door()
            old.running(after=chance.choice((0, 0.01, 0.1)) * chance.random())
        assert new.wait() == DONE, new.said()
        code = old.wait()
        assert code in (DONE, IN_USE), old.said()
    if code == DONE:
        assert_finished(gated.trial, first.run)
    else:
        assert "Traceback" not in old.said()
        assert_nothing_lost(first.run, gated.trial.keep_last)
        assert any(line["state"] == "lost" for line in ledger(first.run, "mirror"))
    assert_finished(gated.trial, second.run)
    assert_one_run(gated, site, url)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 3))
def test_one_of_two_newcomers_follows_a_dead_owner(
    seed: int, gated: Gated, site: Site, tmp_path: Path, figure: Figure, n_races: int
) -> None:
    chance = random.Random(seed)
    for number in range(n_races):
        follow_dead_owner(gated, site, f"{tmp_path.name}-{number}", chance)
    figure("races for the mirror of a dead owner", n_races)


def follow_dead_owner(gated: Gated, site: Site, name: str, chance: random.Random) -> None:
    """Kill the owner and lose its disk; of two others, which cannot know that, one goes on."""
    site.proxy.restart()
    url = site.new_url()
    first, *others = (Machine(gated, site, url, f"{name}-{i}") for i in range(3))
    with first.hold() as old:
        old.release()
        until(lambda: first.has_committed() or not old.running())
        old.kill(signal.SIGKILL)
        assert old.wait() == -9
    shutil.rmtree(first.run)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(machine.hold()) for machine in others]
        release(processes, chance)
        until(lambda: sum(process.running() for process in processes) <= 1)
        (winner,) = [i for i, process in enumerate(processes) if process.running()]
        assert processes[1 - winner].wait() == IN_USE, processes[1 - winner].said()
        others[winner].open()
        assert processes[winner].wait() == DONE, processes[winner].said()
    run = others[winner].run
    assert ledger(run, "start")[-1]["step"] == GATE_AT - 1
    assert_finished(gated.trial, run)
    assert_one_run(gated, site, url)


# --- readers


@pytest.mark.faults
def test_a_run_that_trains_can_be_pulled_at_any_moment(
    site: Site, tmp_path: Path, figure: Figure, pytestconfig: pytest.Config
) -> None:
    pulls = 100 if pytestconfig.option.faults == "all" else 8
    pull_while_training(site, tmp_path, pulls)
    figure("pulls of a run that trains", pulls)


def test_a_run_that_trains_can_be_pulled(site: Site, tmp_path: Path) -> None:
    pull_while_training(site, tmp_path, 2)


def pull_while_training(site: Site, folder: Path, pulls: int) -> None:
    """Pull again and again while commits replace each other; each run that is pulled is good."""
    url = site.new_url()
    (folder / "config.yaml").write_text(SAMPLER.replace("URL", url))
    trained = folder / "trained" / "run"
    command = ["train", "--config", "config.yaml", "--run-dir", trained, "-q"]
    with start(command, cwd=folder, env=site.environment(), call=quick_mirror) as training:
        until(lambda: site.newest_step(url) is not None or not training.running())
        for number in range(pulls):
            run = folder / f"pulled-{number}" / "run"
            run.parent.mkdir()
            with pull(site, url, run) as child:
                assert child.wait() == DONE, child.said()
            with start(["verify", run], cwd=folder) as child:
                assert child.wait() == DONE, child.said()
            assert series_files.is_beginning(run, trained)
        assert training.running(), training.said()
        training.kill(signal.SIGTERM)
        assert training.wait() == STOPPED, training.said()


def release(processes: list[Held], chance: random.Random) -> None:
    spread = chance.choice((0, 0, 0.01, 0.2))
    for process in processes:
        process.release()
        process.running(after=spread * chance.random())


def assert_one_run(gated: Gated, site: Site, url: str) -> None:
    """Assert that a mirror holds one run, whole and finished, of one owner per epoch."""
    site.proxy.settle()
    assert site.faults(url) == []
    created = site.created(url)
    commits = {name: fields for name, fields in created.items() if seq_of(name)}
    owners = {name: fields for name, fields in created.items() if not seq_of(name)}
    assert len({fields["run_id"] for fields in commits.values()}) == 1
    epochs = sorted(int(name[4:14]) for name in owners)
    assert epochs == list(range(1, len(owners) + 1))
    for name, fields in commits.items():
        assert fields["nonce"] == owners[f"{name[:15]}{0:010d}"]["nonce"]
    newest = site.commits(url)[-1]
    assert newest.step == gated.trial.last_step
    pulled = gated.trial.new_run(f"pulled-{url.rpartition('/')[2]}")
    with pull(site, url, pulled) as child:
        assert child.wait() == DONE, child.said()
    assert_finished(gated.trial, pulled)


def pull(site: Site, url: str, run: Path) -> Process:
    return start(["pull", url, run], cwd=run.parent, env=site.environment())
