"""A small table with words, missing values and numbers of different sizes, and its data section."""

from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("flowers.csv")
FLOWERS: dict[str, Any] = {
    "name": "csv",
    "path": str(PATH),
    "target": "species",
    "missing": "mean",
    "standardize": True,
    "batch_size": 48,
    "validation_fraction": 0.2,
    "stratify": True,
}
