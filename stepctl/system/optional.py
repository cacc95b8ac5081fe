"""Optional packages, imported on first use."""

import importlib
import warnings
from typing import Any

from stepctl.errors import ConfigError

_EXTRA_OF = {"autograd": "autograd"}  # packages that a user's own module imports


def require(module: str, extra: str) -> Any:
    """Import a module of an optional package; ConfigError with the pip command if it is missing.

    Warnings of the package about itself are suppressed: the user of stepctl cannot act on them.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{package} is needed, but it cannot be imported ({error}); {_pip_command(extra)}"
        ) from error


def remedy(error: BaseException) -> str:
    """Return "; " and the pip command if user code failed to import the package of an extra."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRA_OF:
        return ""
    return f"; {_pip_command(_EXTRA_OF[package])}"


def version(package: str) -> str:
    """Return the version of an installed package."""
    from importlib import metadata  # takes milliseconds

    return metadata.version(package)


def _pip_command(extra: str) -> str:
    return f"install it with: pip install 'stepctl[{extra}]'"
