"""What the server that the processes are forked off does once for all of them; it loads this last."""

from __future__ import annotations

import gc

from stepctl import numerics

numerics.fingerprint(())
gc.freeze()  # no collection in a fork touches, and so copies, what is here
