"""Packages that only some uses need: loaded when they are used."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from stepctl.errors import ConfigError


def require(module: str, extra: str) -> Any:
    """Return a module of a package that comes with an extra; ConfigError says how to install it.

    What the package warns about itself while it is loaded is nothing that the user of stepctl can mend.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        remedy = f"install it with: pip install 'stepctl[{extra}]'"
        raise ConfigError(f"{package} is needed, but it cannot be imported ({error}); {remedy}") from error
