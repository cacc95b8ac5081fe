"""Each fault of the network or of the store, at each request of an upload, a continued run, and a pull.

Training goes on at its speed, the run ends as without the fault, and the mirror is whole afterwards. `pytest --faults`
injects each fault at a few requests, `pytest --faults=all` at each.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fault_proxy import Fault, at, since
from tests.support.mirror_site import Site, assert_finished, object_store_site, quick_mirror
from tests.support.paused_runs import GATE_AT, Gated, make_gated
from tests.support.processes import Process, start, until
from tests.support.run_checks import Trial

Figure = Callable[[str, int], None]
DONE, FAILED = 0, 1
FEW = 2  # requests of each kind of session, with --faults
MOST_ON_TRAINING_THREAD = 0.001  # of the wall time
# Seconds that a run is taken to last. A request that hangs takes more than 0.1 % of it, and a thread that waits for a
# busy processor less; tests/bench/mirror_faults.py measures the share of longer runs.
LEAST_WALL = 300.0
SECRETS = re.compile(b"test-secret-key|test-key-id|AWS4-HMAC|Signature")
by_fault = pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with object_store_site(rate=200_000) as site:
        yield site


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Gated:
    return make_gated(tmp_path_factory.mktemp("mirror-outages") / "gated", random.Random(1))


@pytest.fixture(scope="module")
def unfinished(gated: Gated, site: Site) -> str:
    """A mirror whose owner was killed at the gate."""
    url = site.new_url()
    run = gated.trial.new_run("unfinished")
    command = gated.trial.begin(run, "--mirror", url)
    environment = site.environment() | gated.environment(run)
    with start(command, cwd=gated.trial.folder, env=environment, call=quick_mirror) as child:
        until(lambda: site.newest_step(url) == GATE_AT - 1 or not child.running())
        child.kill()
        assert child.wait() == -signal.SIGKILL, child.said()
    shutil.rmtree(run)
    return url


@pytest.fixture(scope="module")
def finished(gated: Gated, site: Site) -> str:
    """The mirror of a run that has ended."""
    url = site.new_url()
    session(gated, site, url, "finished")
    return url


@pytest.fixture
def few(pytestconfig: pytest.Config) -> int | None:
    """How many of the requests of a session meet a fault; None: all."""
    return None if pytestconfig.option.faults == "all" else FEW


# --- sessions


def session(gated: Gated, site: Site, url: str, name: str) -> None:
    """Train, or go on, on a blank machine; the run must end as without faults, and its mirror be whole."""
    trial = gated.trial
    run = trial.new_run(name)
    gated.open(run)
    seconds = run.with_name("seconds")
    environment = {**site.environment(), "MIRROR_SECONDS": str(seconds), **gated.environment(run)}
    began = time.perf_counter()
    command = trial.begin(run, "--mirror", url, "--or-resume")
    with start(command, cwd=trial.folder, env=environment, call=quick_mirror) as child:
        assert child.wait() == DONE, child.said()
    wall = time.perf_counter() - began
    on_training_thread = float(seconds.read_text())
    assert on_training_thread < MOST_ON_TRAINING_THREAD * max(wall, LEAST_WALL)
    assert_reports(child.said())
    assert_no_secret(run)
    assert_finished(trial, run)
    site.proxy.settle()
    assert_whole(trial, site, url)


def assert_reports(said: str) -> None:
    """Assert that an output names each failure and recovery once, and holds no secret."""
    failures = said.count("the mirror cannot be written")
    recoveries = said.count("the mirror works again")
    assert failures == recoveries <= 2, said
    assert "Traceback" not in said
    assert not SECRETS.search(said.encode())


def assert_no_secret(run: Path) -> None:
    """Assert that no file of a run holds a credential."""
    for path in run.rglob("*"):
        assert not path.is_file() or not SECRETS.search(path.read_bytes()), path


def assert_whole(trial: Trial, site: Site, url: str) -> None:
    """Assert that the newest commit is the end of the run, and that no object of a commit is missing."""
    assert site.newest_step(url) == trial.last_step
    assert site.faults(url) == []


def some_requests(n_requests: int, few: int | None, fault: Fault, part: str) -> list[int]:
    """Return the numbers of the requests that meet a fault."""
    numbers = range(1, n_requests + 1)
    if few is None:
        return list(numbers)
    return random.Random(f"{fault.name} {part}").sample(numbers, few)


# --- one fault


@pytest.mark.faults
@by_fault
def test_a_fault_in_an_upload(
    fault: Fault, gated: Gated, site: Site, tmp_path: Path, figure: Figure, few: int | None
) -> None:
    site.proxy.restart()
    session(gated, site, site.new_url(), f"{tmp_path.name}-0")
    met = 0
    for number in some_requests(site.proxy.n_requests, few, fault, "upload"):
        met += with_fault(fault, number, gated, site, site.new_url(), f"{tmp_path.name}-{number}")
    figure("faults in an upload", met)


@pytest.mark.faults
@by_fault
def test_a_fault_where_a_blank_machine_continues(
    fault: Fault,
    gated: Gated,
    site: Site,
    unfinished: str,
    tmp_path: Path,
    figure: Figure,
    few: int | None,
) -> None:
    site.proxy.restart()
    session(gated, site, site.copy(unfinished), f"{tmp_path.name}-0")
    met = 0
    for number in some_requests(site.proxy.n_requests, few, fault, "continue"):
        url = site.copy(unfinished)
        met += with_fault(fault, number, gated, site, url, f"{tmp_path.name}-{number}")
    figure("faults where a blank machine continues", met)


@pytest.mark.parametrize(
    ("fault", "number"),
    [(Fault.LOST_REPLY, 13), (Fault.STATUS_503, 20), (Fault.NOT_XML, 16)],
    ids=["lost reply of a claim", "503 in an upload", "a web page as a successor"],
)
def test_a_fault_in_the_middle_of_an_upload(
    fault: Fault, number: int, gated: Gated, site: Site, tmp_path: Path
) -> None:
    assert with_fault(fault, number, gated, site, site.new_url(), tmp_path.name)


def with_fault(fault: Fault, number: int, gated: Gated, site: Site, url: str, name: str) -> bool:
    """Inject a fault at one request of a session; return whether there was such a request."""
    site.proxy.restart()
    site.proxy.inject(fault, at(number))
    try:
        session(gated, site, url, name)
    except BaseException as error:
        requests = site.proxy.requests
        error.add_note(f"{fault.name} at request {number}:")
        for request in requests[: number + 5]:
            error.add_note(f"{request.number} {request.method} {request.target} {request.status}")
        raise
    return any(request.fault for request in site.proxy.requests)


@pytest.mark.faults
@by_fault
def test_a_fault_in_a_pull(
    fault: Fault,
    gated: Gated,
    site: Site,
    finished: str,
    tmp_path: Path,
    figure: Figure,
    few: int | None,
) -> None:
    site.proxy.restart()
    with pull(site, finished, gated.trial.new_run(f"{tmp_path.name}-0")) as child:
        assert child.wait() == DONE, child.said()
    met = 0
    for number in some_requests(site.proxy.n_requests, few, fault, "pull"):
        run = gated.trial.new_run(f"{tmp_path.name}-{number}")
        site.proxy.restart()
        site.proxy.inject(fault, at(number))
        with pull(site, finished, run) as child:
            assert child.wait() == DONE, f"request {number}: {child.said()}"
        assert "Traceback" not in child.said()
        met += any(request.fault for request in site.proxy.requests)
        assert_finished(gated.trial, run)
    figure("faults in a pull", met)


def pull(site: Site, url: str, run: Path) -> Process:
    return start(["pull", url, run], cwd=run.parent, env=site.environment(), call=quick_mirror)


# --- a fault that stays


@pytest.mark.faults
def test_a_link_of_10_kb_per_second_is_slow_and_works(gated: Gated, tmp_path: Path) -> None:
    with object_store_site(rate=10_000) as slow:
        slow.proxy.inject(Fault.SLOW, since(1))
        session(gated, slow, slow.new_url(), tmp_path.name)


@pytest.mark.faults
@by_fault
def test_a_fault_that_stays_stops_no_training_and_a_push_fills_the_mirror(
    fault: Fault, gated: Gated, site: Site, tmp_path: Path, figure: Figure, few: int | None
) -> None:
    if fault in (Fault.DUPLICATE, Fault.SLOW):
        pytest.skip("the mirror works nevertheless")
    chance = random.Random(fault.name)
    starts = [chance.randint(1, 20)] if few else [1, *chance.sample(range(2, 40), 8)]
    for number in starts:
        site.proxy.restart()
        site.proxy.inject(fault, since(number))
        stay_down(gated, site, f"{tmp_path.name}-{number}")
    figure("faults that stay", len(starts))


def test_a_store_that_is_down_for_the_whole_run_costs_one_warning(
    gated: Gated, site: Site, tmp_path: Path
) -> None:
    site.proxy.restart()
    site.proxy.refuse()
    said = stay_down(gated, site, tmp_path.name)
    assert said.count("warning") == 1, said


def stay_down(gated: Gated, site: Site, name: str) -> str:
    """Train while the store fails, heal it, and push; return what training said."""
    trial = gated.trial
    url = site.new_url()
    run = trial.new_run(name)
    gated.open(run)
    environment = {**site.environment(), **gated.environment(run)}
    options = ("--mirror", url, "--set", "mirror.wait_at_stop=0.5")
    command = trial.begin(run, *options)
    with start(command, cwd=trial.folder, env=environment, call=quick_mirror) as child:
        assert child.wait() == DONE, child.said()
    said = child.said()
    assert said.count("the mirror cannot be written") <= 1, said
    assert "Traceback" not in said
    assert_finished(trial, run)
    site.proxy.restart()
    if site.newest_step(url) != trial.last_step:
        assert "not mirrored" in said
    with start(["push", run, url], cwd=run.parent, env=environment, call=quick_mirror) as child:
        assert child.wait() == DONE, child.said()
    assert_whole(trial, site, url)
    pulled = trial.new_run(f"{name}-pulled")
    with pull(site, url, pulled) as child:
        assert child.wait() == DONE, child.said()
    assert_finished(trial, pulled)
    return said
