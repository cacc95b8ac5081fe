"""The step is written into a file's root group as HDF5 itself writes it."""

from __future__ import annotations

import io

import h5py
import numpy as np
import pytest

from stepctl.checkpoint import layout, root_header
from stepctl.checkpoint.metadata import Metadata
from stepctl.checkpoint.root_header import RootHeader
from stepctl.errors import StepctlError

STEPS = [0, 1, 255, 65_536, 10**9, 2**53 + 1, 2**63 - 1]


def laid_out(step: int, n_arrays: int) -> bytes:
    arrays = {"counters/global_step": np.array(0)}
    arrays |= {f"params/{n}/weight": np.zeros((2, 3), np.float32) for n in range(n_arrays)}
    arrays |= {"config": layout.text("seed: 0\n"), "numerics": layout.text("{}")}
    metadata, _ = layout.lay_out(arrays, run="moon", run_id="0" * 32, step=step)
    return metadata.read_range(0, metadata.size)


@pytest.mark.parametrize("n_arrays", [0, 3, 40])
@pytest.mark.parametrize("step", STEPS)
def test_another_step_is_written_as_hdf5_writes_it(step: int, n_arrays: int) -> None:
    file = io.BytesIO(laid_out(7, n_arrays))
    with h5py.File(file, "r+", libver=("v110", "v110")) as opened:
        assert opened.attrs["global_step"] == 7
        opened.attrs.modify("global_step", np.int64(step))
    assert file.getvalue() == laid_out(step, n_arrays)


def test_the_checksum() -> None:
    found = root_header._checksum(b"Four score and seven years ago")
    assert int.from_bytes(found, "little") == 0x17770551, "as in the comments of lookup3.c"


def test_an_unknown_form_of_the_header_is_refused() -> None:
    metadata = Metadata()
    metadata.write(laid_out(7, 3))
    for offset in (560, 700):
        damaged = metadata.copy()
        damaged.seek(offset)
        damaged.write(b"?")
        with pytest.raises(StepctlError, match="does not know; install another version of h5py"):
            RootHeader.find(damaged, 560, 7)
