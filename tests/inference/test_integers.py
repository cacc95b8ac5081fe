"""Integers reach a model that takes them as they are: a float32 would make neighbours equal."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import stepctl
from stepctl.inference.predict import predict_chunks
from stepctl.state.arena import Array
from tests.support.runs import make_config, train

IDS = np.array([2**40 + 1, 2**40 + 2, 2**40 + 999, 5])


class LastDigits(stepctl.LossModel):
    """Predicts the last three digits of an id, if it is an integer."""

    def initial_params(self, rng: Any) -> Any:
        return {"w": np.zeros(())}

    def loss_and_gradients(self, params: Any, x: Array, y: Any, rng: Any) -> Any:
        return np.zeros(len(x), np.float32), {"w": np.zeros((), np.float32)}

    def predict(self, params: Any, x: Array) -> Array:
        assert x.dtype.kind in "iu"
        return x[:, 0] % 1000


@pytest.fixture(scope="module", params=["csv", "hdf5"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model trained on ids, from a file with columns or without."""
    folder = tmp_path_factory.mktemp("ids")
    if request.param == "csv":
        path = folder / "ids.csv"
        np.savetxt(path, np.column_stack([IDS, IDS % 2]), "%d", delimiter=",")
    else:
        path = folder / "ids.h5"
        with h5py.File(path, "w") as file:
            file["x"] = IDS[:, None]
            file["y"] = IDS % 2
    config = make_config(
        data={"name": request.param, "path": str(path), "batch_size": 2},
        model={"name": f"{__name__}:LastDigits"},
        task={"name": "loss"},
        optimizer={"name": "sgd", "learning_rate": 0.1},
        stop={"last_step": 1},
        evaluate={"every": None},
    )
    train(config, folder / "run")
    return stepctl.load_model(folder / "run")


def predicted(model: Any, path: Path) -> list[int]:
    chunks = predict_chunks(model, str(path), lambda done: None)
    return [value for chunk in chunks for value in chunk.values.tolist()]


def test_a_file_of_ids_is_predicted_without_rounding(model: Any, tmp_path: Path) -> None:
    expected = (IDS % 1000).tolist()
    text = "".join(f"{number}\n" for number in IDS)
    (tmp_path / "x.csv").write_text(text)
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "quoted.csv").write_text(text.replace("\n5\n", '\n"5"\n'))
    np.save(tmp_path / "x.npy", IDS[:, None])
    for name in ("x.csv", "x.csv.gz", "quoted.csv", "x.npy"):
        assert predicted(model, tmp_path / name) == expected, name


def test_unsigned_ids_are_predicted_without_rounding(model: Any, tmp_path: Path) -> None:
    ids = IDS.astype(np.uint64) + np.uint64(2**63)
    (tmp_path / "x.csv").write_text("".join(f"{number}\n" for number in ids))
    assert predicted(model, tmp_path / "x.csv") == (ids % 1000).tolist()
    assert model.predict(ids[:, None]).tolist() == (ids % 1000).tolist()


def test_an_array_of_ids_is_predicted_without_rounding(model: Any) -> None:
    assert model.predict(IDS[:, None]).tolist() == (IDS % 1000).tolist()


class Dtype(LastDigits):
    """Predicts the kind of x: 1 for integers, 0 for floats."""

    def predict(self, params: Any, x: Array) -> Array:
        return np.full(len(x), x.dtype.kind in "iu")


def test_a_model_trained_on_decimals_gets_no_integers(tmp_path: Path) -> None:
    """Its arithmetic would be another one, and `evaluate` and `predict` would differ."""
    (tmp_path / "decimals.csv").write_text("0.5,1\n1.5,0\n")
    config = make_config(
        data={"name": "csv", "path": str(tmp_path / "decimals.csv"), "batch_size": 2},
        model={"name": f"{__name__}:Dtype"},
        task={"name": "loss"},
        optimizer={"name": "sgd", "learning_rate": 0.1},
        stop={"last_step": 1},
        evaluate={"every": None},
    )
    train(config, tmp_path / "run")
    model = stepctl.load_model(tmp_path / "run")
    (tmp_path / "x.csv").write_text("1\n2\n")
    np.save(tmp_path / "x.npy", np.array([[1], [2]]))
    for name in ("x.csv", "x.npy"):
        assert predicted(model, tmp_path / name) == [0, 0], name
    assert model.predict([[1], [2]]).tolist() == [0, 0]
