"""Predictions for all rows of a file: one row each, in the same order."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from stepctl.errors import DataError
from stepctl.inference.output_file import new_file, write_arrays
from stepctl.inference.row_files import read_chunks
from stepctl.inference.trained_model import TrainedModel
from stepctl.programs.base import Predictions
from stepctl.state.arena import Array
from stepctl.system.text import in_one_line

Report = Callable[[float], None]  # is called with the share of the input that is done


def predict_to_csv(model: TrainedModel, path: str, file: BinaryIO, report: Report) -> int:
    """Write the predictions for a file of rows as CSV, and return their number.

    The columns are `prediction`, and `probability_<class>` of a classification. Several values have
    the columns `prediction_0`, ... Floats have as many digits as their dtype needs.
    """
    n_rows = 0
    for predictions in predict_chunks(model, path, report):
        if n_rows == 0:
            file.write(_line(_column_names(model, predictions)))
        file.write(_csv_rows(model, predictions))
        n_rows += len(predictions.values)
    return n_rows


def predict_to_npz(model: TrainedModel, path: str, output: str, report: Report) -> int:
    """Write the predictions for a file of rows as an .npz archive, and return their number.

    Its arrays are `prediction`, and `probability` and `class_names` of a classification.
    """
    parts = [*predict_chunks(model, path, report)]
    arrays = {"prediction": model.named(np.concatenate([part.values for part in parts]))}
    if model.class_names is not None:
        probabilities = [part.probabilities for part in parts if part.probabilities is not None]
        arrays["probability"] = np.concatenate(probabilities)
        arrays["class_names"] = np.array(model.class_names)
    with new_file(output) as file:
        write_arrays(file, arrays)
    return len(arrays["prediction"])


def predict_chunks(model: TrainedModel, path: str, report: Report) -> Iterator[Predictions]:
    """Yield the predictions for the rows of a file in order; DataError without a row."""
    n_rows = 0
    for chunk in read_chunks(path, model.inputs):
        yield model.predictions_of(chunk.batches)
        n_rows += len(chunk)
        report(chunk.done)
    if n_rows == 0:
        raise DataError(f"{in_one_line(path)}: it has no rows; give at least one")


def _column_names(model: TrainedModel, predictions: Predictions) -> list[str]:
    names = ["prediction"]
    n_values = predictions.values.reshape(len(predictions.values), -1).shape[1]
    if n_values > 1:
        names = [f"prediction_{number}" for number in range(n_values)]
    return names + [f"probability_{name}" for name in model.class_names or ()]


def _csv_rows(model: TrainedModel, predictions: Predictions) -> bytes:
    values = predictions.values
    if predictions.probabilities is None:
        columns = values.reshape(len(values), -1)
        row_format = ",".join([_number_format(values)] * columns.shape[1]) + "\n"
        return "".join([row_format % tuple(row) for row in columns.tolist()]).encode()
    probabilities = predictions.probabilities
    names = [_line([name]).decode().removesuffix("\n") for name in model.class_names or ()]
    row_format = "%s" + f",{_number_format(probabilities)}" * probabilities.shape[1] + "\n"
    rows = zip(values.tolist(), probabilities.tolist(), strict=True)
    return "".join([row_format % (names[number], *row) for number, row in rows]).encode()


def _number_format(numbers: Array) -> str:
    """Return the format that preserves all bits of a number."""
    if numbers.dtype.kind != "f":
        return "%s"
    digits = {2: 5, 4: 9}.get(numbers.dtype.itemsize, 17)
    return f"%.{digits}g"


def _line(cells: list[str]) -> bytes:
    """Return a line of CSV, with quotes where they are needed."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
