"""SIGKILL at random moments of a run with a mirror, the loss of its disk, and a blank machine that continues.

No commit is lost: each process starts from the newest one, or from a later step of a directory that is left. The
run ends with the bits, rows and series of the uninterrupted run. `pytest --faults` kills 20 processes, and
`pytest --faults=all` 300; as many are killed while they pull.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.attack_moments import START_UP, after, inside_a_save, when_there_are
from tests.support.fault_proxy import Fault, When, about
from tests.support.mirror_site import Site, assert_finished, object_store_site, quick_mirror
from tests.support.processes import Process, start, until
from tests.support.run_checks import (
    Trial,
    assert_nothing_lost,
    checkpoints,
    ledger,
    make_trial,
    random_config,
)

Figure = Callable[[str, int], None]
LEAST_INSIDE = 0.5  # of the kills, after the first commit and before the last
BEFORE, BETWEEN, AFTER = "before the first commit", "between commits", "after the last commit"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with object_store_site() as site:
        yield site


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 5))
def test_killed_at_random_moments_a_run_goes_on_from_its_mirror(
    seed: int, site: Site, tmp_path: Path, figure: Figure, pytestconfig: pytest.Config
) -> None:
    kills = 75 if pytestconfig.option.faults == "all" else 5
    places = attack(site, seed, kills, tmp_path)
    for place, count in places.items():
        figure(f"kills of mirrored runs {place}", count)
    figure("kills of mirrored runs", places.total())
    if kills >= 50:
        assert places[BETWEEN] >= LEAST_INSIDE * kills, places


@pytest.mark.faults
def test_killed_where_requests_fail_at_random_a_run_goes_on_from_its_mirror(
    site: Site, tmp_path: Path, figure: Figure, pytestconfig: pytest.Config
) -> None:
    kills = 50 if pytestconfig.option.faults == "all" else 5
    places = attack(site, 99, kills, tmp_path, at_random=0.03)
    figure("kills of mirrored runs where requests fail at random", places.total())


def test_killed_twice_a_run_goes_on_from_its_mirror(site: Site, tmp_path: Path) -> None:
    places = attack(site, 0, 2, tmp_path)
    assert places.total() == 2


def attack(site: Site, seed: int, kills: int, folder: Path, at_random: float = 0.0) -> Counter[str]:
    """Kill runs of ever other configs so many times in all; return where the kills fell.

    `at_random` is the share of the requests that meet a fault.
    """
    chance = random.Random(seed)
    places: Counter[str] = Counter()
    number = 0
    while places.total() < kills:
        trial = make_trial(folder / f"config-{number}", some_config(chance))
        for _ in range(4):
            most = min(4, kills - places.total())
            if most:
                places += broken_run(trial, site, f"{number}", most, chance, at_random)
            number += 1
    return places


def some_config(chance: random.Random) -> dict[str, Any]:
    """Return a config of a run with five to twenty checkpoints: a model, or a program with two series."""
    config = random_config(chance)
    last_step = 400
    if chance.random() < 0.5:
        last_step = 10_000
        shared = {key: config[key] for key in ("seed", "checkpoint", "numerics")}
        program = {"name": "tests.support.sampler:Sampler"}
        config = {"program": program, "log": {"every": 10}, **shared}
    every = last_step // chance.randint(5, 20)
    config["stop"] = {"last_step": last_step}
    config["checkpoint"] = {"every": every, "keep_last": chance.choice((1, 2, 3, None))}
    return config


def broken_run(
    trial: Trial, site: Site, name: str, kills: int, chance: random.Random, at_random: float
) -> Counter[str]:
    """Kill a run so many times, at most, and finish it; the disk is lost at most of the kills."""
    url = site.new_url()
    places: Counter[str] = Counter()
    run = trial.new_run(f"{name}-0")
    while True:
        site.proxy.restart()
        for fault in Fault:
            share = at_random / len(Fault)
            site.proxy.inject(fault, lambda request, share=share: random.random() < share)
        before = site.newest_step(url)
        is_blank = not checkpoints(run)
        with start_process(trial, site, run, url) as child:
            if places.total() < kills:
                some_moment(chance)(child, run, site)
                child.kill()
            code = child.wait()
        site.proxy.restart()
        site.proxy.settle()
        assert site.faults(url) == []
        committed = site.newest_step(url)
        assert before is None or (committed is not None and committed >= before)
        started = [line["step"] for line in ledger(run, "start") if line["pid"] == child.pid]
        if is_blank and started:
            assert started == [before or first_step(trial)]
        if code == 0:
            break
        assert code == -9, child.said()
        places[place_of_kill(trial, committed)] += 1
        if chance.random() < 0.75:
            shutil.rmtree(run, ignore_errors=True)  # it may not be there yet
            run = trial.new_run(f"{name}-{places.total()}")
        elif not (is_blank and before) and not ledger(run, "prune"):  # else it was fetched
            assert_nothing_lost(run, trial.keep_last)
    assert_finished(trial, run)
    assert committed == trial.last_step
    pulled = trial.new_run(f"{name}-pulled")
    with start(["pull", url, pulled], cwd=trial.folder, env=site.environment()) as child:
        assert child.wait() == 0, child.said()
    assert_finished(trial, pulled)
    return places


def start_process(trial: Trial, site: Site, run: Path, url: str) -> Process:
    """Start what each machine starts, blank or not."""
    command = trial.begin(run, "--mirror", url, "--or-resume")
    return start(command, cwd=trial.folder, env=site.environment(), call=quick_mirror)


def first_step(trial: Trial) -> int:
    step: int = trial.config.get("initial_step", 0)
    return step


def place_of_kill(trial: Trial, committed: int | None) -> str:
    if committed is None:
        return BEFORE
    return AFTER if committed == trial.last_step else BETWEEN


# --- moments

KINDS = (
    about("PUT", "/data/"),
    about("PUT", "/data/"),
    about("PUT", "/log/"),
    about("PUT", "/log/"),
    about("DELETE"),
    about("GET"),
)
Moment = Callable[[Process, Path, Site], None]


def some_moment(chance: random.Random) -> Moment:
    """Return a function that waits: for a time, a change in the run, or a request to the store."""
    share = chance.random()
    if share < 0.1:
        return local(after(chance.uniform(0, 5 * START_UP)))
    if share < 0.15:
        return local(when_there_are(chance.randint(1, 8), "ledger.jsonl", 0))
    if share < 0.2:
        return local(inside_a_save(chance.randint(1, 4), 0))
    then = chance.choice((0, 0.001, 0.005, 0.02)) * chance.random()
    if share < 0.5:
        return when_requested(chance.randint(1, 100), lambda request: True, then)
    return when_requested(chance.randint(2, 8), chance.choice(KINDS), then)


def local(moment: Callable[[Process, Path], None]) -> Moment:
    return lambda child, run, site: moment(child, run)


def when_requested(number: int, kind: When, then: float) -> Moment:
    """Wait until the store got the n-th request of a kind, and a little longer."""

    def moment(child: Process, run: Path, site: Site) -> None:
        def enough() -> bool:
            seen = sum(map(kind, site.proxy.requests))
            return seen >= number or not child.running()

        until(enough, every=0.0005)
        child.running(after=then)

    return moment


# --- kills of a pull


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 3))
def test_a_killed_pull_leaves_no_run_and_can_be_repeated(
    seed: int, site: Site, tmp_path: Path, figure: Figure, pytestconfig: pytest.Config
) -> None:
    kills = 150 if pytestconfig.option.faults == "all" else 10
    figure("kills of pulls", kill_pulls(site, seed, kills, tmp_path))


def test_a_pull_killed_twice_can_be_repeated(site: Site, tmp_path: Path) -> None:
    kill_pulls(site, 0, 2, tmp_path)


def kill_pulls(site: Site, seed: int, kills: int, folder: Path) -> int:
    """Kill pulls of a finished run; return how many were killed before they had ended."""
    chance = random.Random(seed)
    trial = make_trial(folder / "config", some_config(chance))
    url = site.new_url()
    with start_process(trial, site, trial.new_run("mirrored"), url) as child:
        assert child.wait() == 0, child.said()
    killed = number = 0
    while killed < kills:
        number += 1
        run = trial.new_run(f"pulled-{number}")
        code = -9
        while code == -9 and killed < kills:
            site.proxy.restart()
            with start(["pull", url, run], cwd=trial.folder, env=site.environment()) as child:
                when_requested(
                    chance.randint(1, 12), lambda request: True, 0.003 * chance.random()
                )(child, run, site)
                child.kill()
                code = child.wait()
            killed += code == -9
            if code == -9:
                assert_no_run(trial, run)
        if code == -9:
            with start(["pull", url, run], cwd=trial.folder, env=site.environment()) as child:
                code = child.wait()
        assert code == 0, child.said()
        assert_finished(trial, run)
        with start(["verify", run], cwd=trial.folder) as child:
            assert child.wait() == 0, child.said()
    return killed


def assert_no_run(trial: Trial, run: Path) -> None:
    """Assert that a directory is no run yet, or that it is the whole run."""
    with start(["resume", run], cwd=trial.folder) as child:
        code = child.wait()
    if code == 0:
        assert_finished(trial, run)
    else:
        assert code in (2, 3), child.said()
