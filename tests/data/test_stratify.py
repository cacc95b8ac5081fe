"""A stratified split keeps the proportions of the classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from syrupy.assertion import SnapshotAssertion

from stepctl.data.base import Source
from stepctl.data.batches import split_source
from stepctl.data.memory import InMemory
from stepctl.errors import ConfigError
from stepctl.state.arena import Array
from stepctl.training.build import assemble
from tests.support.runs import make_config

LABELS = np.repeat([0, 1, 2, 5], [50, 30, 3, 1])


def source(labels: Array = LABELS) -> Source:
    x = np.zeros((len(labels), 1))
    return InMemory(x, labels, origin="x", targets="classes", dtype="float32")


def split(seed: int = 0, fraction: float = 0.2, **options: Any) -> tuple[Array, Array]:
    """Return the rows to train on and the rows to validate."""
    parts = split_source(source(), fraction, seed, labels=LABELS, **options)
    training, validation = (part.rows(np.arange(part.n)) for part in parts)
    return training, validation


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_each_class_is_divided_in_proportion(order: str) -> None:
    """84 rows, of which 16.8 -> 17: the fractions 10, 6, 0.6 and 0.2 of the classes' rows."""
    training, validation = split(order=order)
    assert np.bincount(LABELS[validation]).tolist() == [10, 6, 1]
    assert sorted([*training, *validation]) == [*range(len(LABELS))]


def test_the_split_depends_on_the_seed_alone() -> None:
    assert [part.tolist() for part in split(1)] == [part.tolist() for part in split(1)]
    assert split(1)[1].tolist() != split(2)[1].tolist()


def test_of_sequential_data_the_last_rows_of_each_class_are_validated() -> None:
    _, validation = split(order="sequential")
    assert validation.tolist() == [*range(40, 50), *range(74, 80), 82]


def test_the_epochs_have_the_training_rows() -> None:
    data = {"name": "digits", "stratify": True, "validation_fraction": 0.3, "batch_size": 1258}
    assembly = assemble(make_config(data=data))
    counts = np.bincount(assembly.training.batch(0).y)
    (_, _, y), *_ = assembly.sources[0].slices()  # type: ignore[attr-defined]
    assert np.abs(counts - 0.7 * np.bincount(y)).max() < 1


REFUSED: dict[str, dict[str, Any]] = {
    "no split": {"data": {"name": "digits", "stratify": True}},
    "values": {
        "data": {"name": "digits", "stratify": True, "validation_fraction": 0.1},
        "task": {"name": "regression"},
    },
    "rows that are read": {
        "data": {
            "name": "tests.support.failing_ranks:failing_digits",
            "rank": 9,
            "stratify": True,
            "validation_fraction": 0.1,
        },
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_split_without_labels_in_memory_is_refused(
    case: str, snapshot: SnapshotAssertion
) -> None:
    with pytest.raises(ConfigError) as caught:
        assemble(make_config(**REFUSED[case]))
    assert str(caught.value) == snapshot
