"""Software versions that must be equal on all ranks."""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from stepctl import __version__
from stepctl.errors import ConfigError

_COMPARED = ("stepctl", "Python", "NumPy")


def installed_software() -> dict[str, str]:
    """Return this rank's versions, and its host."""
    # a plain dict, because ranks with other versions of stepctl must be able to unpickle it
    return {
        "stepctl": f"{__version__} (sources {_sources_digest()})",
        "Python": platform.python_version(),
        "NumPy": metadata.version("numpy"),
        "host": os.uname().nodename,
    }


def _sources_digest() -> str:
    """Return a digest of this package's modules: two copies of one version may differ."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_same_software(ranks: Sequence[Mapping[str, str]]) -> None:
    """Raise ConfigError if a rank's `installed_software` differs from rank 0's."""
    first = ranks[0]
    for rank, software in enumerate(ranks):
        for name in _COMPARED:
            if software[name] != first[name]:
                raise ConfigError(
                    f"rank {rank} on {software['host']} runs {name} {software[name]}, but rank 0 on "
                    f"{first['host']} runs {name} {first[name]}; install the same versions for all ranks"
                )
