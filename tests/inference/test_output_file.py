"""Output files are complete, or not there."""

import os
import signal
from pathlib import Path

import pytest

from stepctl.inference.output_file import new_file


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_no_temporary_file(number: signal.Signals, tmp_path: Path) -> None:
    def write() -> None:
        with new_file(str(tmp_path / "out.csv")) as file:
            file.write(b"prediction\n")
            assert len(list(tmp_path.iterdir())) == 1  # the temporary file
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with new_file(str(tmp_path / "out.csv")) as file:
            os.kill(os.getpid(), signal.SIGHUP)
            file.write(b"prediction\n")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "out.csv").read_bytes() == b"prediction\n"
