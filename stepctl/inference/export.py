"""The weights of a trained model in a file that other programs read: .npz, .safetensors, .onnx."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from stepctl.errors import ConfigError
from stepctl.inference.output_file import check_output, new_file, write_arrays
from stepctl.inference.trained_model import TrainedModel
from stepctl.models.base import Model
from stepctl.models.sequential import Sequential
from stepctl.state.arena import Array
from stepctl.system import optional

EXTENSIONS = (".npz", ".safetensors", ".onnx")
METADATA = "__metadata__"
_EXTRA = "export"


def export_model(model: TrainedModel, output: str) -> list[str]:
    """Write a model to a file, and return the names of its arrays.

    The extension decides the format. ConfigError if it is unknown, if its package is missing, or if
    the model cannot be an .onnx file.
    """
    extension = check_output(output, EXTENSIONS)
    arrays = exported_arrays(model)
    if extension == ".onnx":
        onnx = optional.require("onnx", _EXTRA)
        from stepctl.inference.onnx_graph import build_onnx

        content = build_onnx(onnx, model, metadata(model)).SerializeToString()
    elif extension == ".safetensors":
        content = optional.require("safetensors.numpy", _EXTRA).save(
            {path: np.ascontiguousarray(array) for path, array in arrays.items()}, metadata(model)
        )
    with new_file(output) as file:
        if extension == ".npz":
            facts = {key: json.loads(text) for key, text in metadata(model).items()}
            write_arrays(file, {**arrays, METADATA: np.array(json.dumps(facts))})
        else:
            file.write(content)
    return [*arrays]


def exported_arrays(model: TrainedModel) -> dict[str, Array]:
    """Return the parameters and buffers by path, such as "dense0/weight"."""
    arrays = model.parameters
    for path, array in model.buffers.items():
        if path in arrays:
            raise ConfigError(
                f"{model.origin}: {path} is a parameter and a buffer; rename one, to export both"
            )
        arrays[path] = array
    return arrays


def metadata(model: TrainedModel) -> dict[str, str]:
    """Return facts about a model, each as JSON, by name.

    global_step; config; class_names (null unless it is a classifier); preprocessing: the shape of a
    sample, the factors of its values, of a table the names of its columns and features, and the
    statistics; layout: the layers in order, with their arguments, by the name of the model, null for
    a model that is not made of layers.
    """
    facts: dict[str, Any] = {
        "global_step": model.global_step,
        "config": model.config,
        "class_names": model.class_names,
        "preprocessing": _preprocessing(model),
        "layout": {name: layout(each) for name, each in model.models.items()},
    }
    return {name: json.dumps(value, default=str) for name, value in facts.items()}


def _preprocessing(model: TrainedModel) -> dict[str, Any]:
    """Return the preprocessing of x before the first layer.

    x <- factors x; NaN <- fill; x <- (x - mean) / deviation, as far as there are such arrays.
    """
    preprocessing = model.inputs.preprocessing
    return {
        "shape": [*model.inputs.shape],
        "columns": preprocessing.columns,
        "features": preprocessing.feature_names,
        "factors": preprocessing.factors.tolist(),
        **{name: array.tolist() for name, array in preprocessing.arrays.items()},
    }


def layout(model: Model) -> list[dict[str, Any]] | None:
    """Return the layers of a model in order: {"layer": "Dense", "name": "dense0", "n_in": 64, ...}.

    The weight of a Dense layer is (n_in, n_out): y = x W + b.
    """
    if not isinstance(model, Sequential):
        return None
    layers: list[dict[str, Any]] = []
    for layer in model.layers:
        layers.append({"layer": type(layer).__name__, **vars(layer)})
    return layers
