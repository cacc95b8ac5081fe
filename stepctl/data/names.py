"""The names of x and y in a file that holds several arrays."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple, final

from stepctl.errors import DataError

AUTO = "auto"


class NamePair(NamedTuple):
    """The names of the samples and of the targets; y is None for data without targets."""

    x: str
    y: str | None


@final
@dataclass(frozen=True)
class ArrayNames:
    """The names that a config gives, and the defaults.

    "x" and "y" stand for "x_train" and "y_train" in a file without "x"; its "x_test" and "y_test"
    are then the validation data. Without `needs_targets`, a "y" that the file lacks is left out.
    """

    x: str
    y: str | None
    validation_x: str | None
    validation_y: str | None
    needs_targets: bool

    def __post_init__(self) -> None:
        if self.y is None and self.needs_targets:
            raise DataError("data.y: is null, but the task learns from the targets; name them")

    def training(self, found: Container[str]) -> NamePair:
        """Return the names of the training arrays among those that a file has, `found`."""
        return self._default(found, "train")

    def validation_in_same_file(self, found: Container[str]) -> NamePair | None:
        """Return the names of the validation arrays in the training file; None if it has none."""
        if self.validation_x not in (None, AUTO):
            return self._named(self.validation_x)
        is_found = self.training(found).x != self.x and "x_test" in found
        if self.validation_x == AUTO and is_found:
            return self._default(found, "test")
        if self.validation_y not in (None, AUTO):
            raise DataError(
                f"data.validation_y: is {self.validation_y}, but there are no validation samples; "
                "name them in data.validation_x"
            )
        return None

    def validation_in_own_file(self, found: Container[str]) -> NamePair:
        """Return the names of the validation arrays in a file of their own."""
        if self.validation_x is None:
            raise DataError("data.validation_x: is null, but there is a validation_path; name it")
        if self.validation_x == AUTO:
            return self._default(found, "test")
        return self._named(self.validation_x)

    def _default(self, found: Container[str], part: str) -> NamePair:
        x = self.x
        y = self.y
        if x == "x" and x not in found and f"x_{part}" in found:
            x = f"x_{part}"
            if y == "y" and y not in found:
                y = f"y_{part}"
        if part == "test" and self.validation_y != AUTO:
            return NamePair(x, self.validation_y)
        if y in ("y", f"y_{part}") and y not in found and not self.needs_targets:
            y = None
        return NamePair(x, y)

    def _named(self, x: str) -> NamePair:
        if self.validation_y != AUTO:
            return NamePair(x, self.validation_y)
        if self.y is not None and self.needs_targets:
            raise DataError("data.validation_y: is missing, but there is validation_x; name it")
        return NamePair(x, None)
