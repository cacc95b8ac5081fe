"""Options, markers and the summary of the tests."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mpi_jobs import needs_mpi

# Exported variables that would change results. They are removed before NumPy reads them at its import, and before any
# child process inherits them. OPENBLAS_CORETYPE stays: the tests and their children run under the same kernel.
for _name in (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NO_COLOR",
    "FORCE_COLOR",
):
    os.environ.pop(_name, None)

# signals that a background job or nohup ignores would stay ignored in every child process
for _number, _default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)


KINDS = ("faults", "mpi", "process", "training", "unit")
FAULTS = Path(__file__).parent / "faults"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", action="store_true", help="Run the attacks with real faults too (minutes)."
    )
    parser.addoption(
        "--faults=all",  # an option of its own: `--faults FILE` must not take FILE as a value
        dest="faults",
        action="store_const",
        const="all",
        help="Run the attacks too, with ten times as many kills of the example programs.",
    )


def pytest_configure(config: pytest.Config) -> None:
    # a snapshot is unused for certain only in a run of all tests
    if config.option.markexpr or not config.option.faults:
        config.option.warn_unused_snapshots = True


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give each test one of the markers KINDS: the first that it has, or its folder's default.

    A single case of a module's tests may be an attack; it keeps the marker of the module too.
    """
    marked = {marker.name for marker in item.iter_markers()}
    default = "process" if FAULTS in item.path.parents else "unit"
    kind = next((kind for kind in KINDS if kind in marked), default)
    item.own_markers = [marker for marker in item.own_markers if marker.name not in KINDS]
    item.add_marker(kind)
    kinds = {marker.name for marker in item.iter_markers()}.intersection(KINDS)
    if len(kinds) > 1 and kind != "faults":
        raise pytest.UsageError(f"{item.nodeid}: marked {kinds}; drop the marker of the module")
    if kind == "mpi":
        item.add_marker(needs_mpi)


@pytest.hookimpl(trylast=True)  # after syrupy, which must know the tests that do not run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--faults"):
        attacks = [item for item in items if item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=attacks)
        items[:] = [item for item in items if item not in attacks]


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tmp_path the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def kernel_cache(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Keep compiled kernels below the cache folder of pytest, for all tests and processes."""
    cache = getattr(request.config, "cache", None)  # None with -p no:cacheprovider
    folder = tmp_path if cache is None else cache.mkdir("kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Return a function that adds a count to the summary: figure("kills", 12); equal names are added up."""
    return record_property


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    sums: defaultdict[str, int] = defaultdict(int)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) == "call":
            for name, count in report.user_properties:
                sums[name] += count
    for name, count in sorted(sums.items()):
        terminalreporter.write_line(f"{name}: {count:,}")
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = sorted(
        {str(report.longrepr[-1]) for report in skipped if isinstance(report.longrepr, tuple)}
    )
    terminalreporter.write_line(
        f"skipped: {len(skipped)}" + "".join(f"\n  {reason}" for reason in reasons)
    )
