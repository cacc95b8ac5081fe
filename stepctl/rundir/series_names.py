"""The names of series. NumPy is not imported here: a mirror is read before its threads are set."""

import re

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
