"""Work that the fork server does once for all processes; it is imported last."""

from __future__ import annotations

import gc

from stepctl.system import blas

blas.fingerprint(())
gc.freeze()  # no collection in a fork touches, and so copies, what is here
