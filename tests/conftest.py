"""The switch for the long attacks, and the lines that say at the end what they reached."""

from __future__ import annotations

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers.py, for the folders below too

# What the shell may have exported and what would change results. NumPy reads it when it is imported, so it goes now,
# and no child process inherits it. OPENBLAS_CORETYPE stays: the tests and their children run under the same kernel.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(_name, None)

# what a background job or nohup ignores would stay ignored in every process that a test starts
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="Run the attacks with real faults too (minutes).")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults: a long attack; runs with --faults only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--faults"):
        attacks = [item for item in items if item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=attacks)
        items[:] = [item for item in items if item not in attacks]


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
    reasons = sorted({str(report.longrepr[-1]) for report in skipped if isinstance(report.longrepr, tuple)})
    terminalreporter.write_line(f"skipped: {len(skipped)}" + "".join(f"\n  {reason}" for reason in reasons))
