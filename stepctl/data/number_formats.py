"""Numbers as spreadsheets format them, which stepctl refuses in a CSV file: "17,5", "1,234", "12 %", "$5".

They are found in order to refuse them: taken for words, they would become categories.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_CURRENCY = r"(?:[$€£¥₹]|EUR|USD|GBP|CHF)"
_SPACE = "[ \u00a0\u2009\u202f]?"  # a space, or one that does not break
_MINUS = "\u2212"
_SIGNS = rf"+\-{_MINUS}"
_FORMATTED = re.compile(
    rf"(?P<prefix>[{_SIGNS}]?(?:{_CURRENCY}{_SPACE})?[{_SIGNS}]?)"
    r"(?P<whole>\d{1,3}(?P<separator>[,.'\u2019_ \u00a0\u2009\u202f])\d{3}(?:(?P=separator)\d{3})*|\d*)"
    r"(?:(?P<point>[.,])(?P<fraction>\d*))?(?P<exponent>(?:[eE][+\-]?\d+)?)"
    rf"(?P<suffix>(?:{_SPACE}(?:[%\u2030]|{_CURRENCY}))?)",
    re.ASCII,
)


class FormattedNumber(NamedTuple):
    """A number as a cell formats it.

    what: what it has that a number of a CSV file does not. plain: the number as it should be written; two
    of them if a comma may be the decimal one or a separator of thousands.
    """

    what: str
    plain: tuple[str, ...]

    @property
    def has_comma(self) -> bool:
        """Whether the comma is, or may be, a decimal comma."""
        return "comma" in self.what


def formatted_number(cell: str) -> FormattedNumber | None:
    """Return the number that a cell formats, such as 17,5 or 12 %; None for plain numbers and words."""
    match = _FORMATTED.fullmatch(cell.strip())
    if match is None or not (match["whole"] or match["fraction"]):
        return None
    if match["separator"] and match["separator"] == match["point"]:
        return None
    what = _what(match)
    if what is None:
        return None
    plain = _plain(match, match["separator"], match["point"])
    if not _may_be_decimal(match):
        return FormattedNumber(what, (plain,))
    decimal = _plain(match, None, match["separator"])
    if match["separator"] == "," and not match["whole"].startswith("0"):
        return FormattedNumber(what, (plain, decimal))
    return FormattedNumber(what, (decimal,))


def _may_be_decimal(match: re.Match[str]) -> bool:
    """Return whether the separator may be the decimal one: in 1,234 and 1.234, but not in 1 234."""
    return (
        match["separator"] in (",", ".")
        and match["point"] is None
        and match["whole"].count(match["separator"]) == 1
    )


def _what(match: re.Match[str]) -> str | None:
    """Return the formatting in the text, such as a percent sign; None for a plain number."""
    may_be_decimal = _may_be_decimal(match)
    is_comma = match["separator"] == ","
    found = {
        "a decimal comma": match["point"] == ","
        or (may_be_decimal and is_comma and match["whole"].startswith("0")),
        "a comma": may_be_decimal and is_comma,
        "a separator of thousands": match["separator"] is not None and not may_be_decimal,
        "a percent sign": match["suffix"].endswith(("%", "\u2030")),
        "a currency": bool(match["prefix"].strip(_SIGNS) or match["suffix"]),
        "a minus sign that is not ASCII": _MINUS in match["prefix"],
    }
    return next((what for what, is_there in found.items() if is_there), None)


def _plain(match: re.Match[str], separator: str | None, point: str | None) -> str:
    """Return the plain spelling of the number, given its separators."""
    number = match["whole"]
    if separator is not None:
        number = number.replace(separator, "")
    if match["fraction"]:
        number += f".{match['fraction']}"
    elif point is not None:
        number = number.replace(point, ".")
    sign = ""
    if "-" in match["prefix"] or _MINUS in match["prefix"]:
        sign = "-"
    return f"{sign}{number}{match['exponent']}"
