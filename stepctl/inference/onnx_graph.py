"""A trained model as an ONNX graph, from the raw samples to the predictions.

Only models made of this package's layers have one. Batch normalization is in its inference form,
dropout is left out. The operators are those of opset 17.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stepctl import __version__
from stepctl.data.statistics import DEVIATION, FILL, MEAN
from stepctl.errors import ConfigError
from stepctl.inference.inputs import InputFormat
from stepctl.inference.trained_model import TrainedModel
from stepctl.models.base import Model
from stepctl.models.layers import gelu
from stepctl.models.layers.base import Layer
from stepctl.models.layers.batch_norm import BatchNorm
from stepctl.models.layers.dense import Dense
from stepctl.models.layers.dropout import Dropout
from stepctl.models.layers.gelu import GELU
from stepctl.models.layers.layer_norm import LayerNorm
from stepctl.models.layers.leaky_relu import LeakyReLU
from stepctl.models.layers.relu import ReLU
from stepctl.models.layers.sigmoid import Sigmoid
from stepctl.models.layers.tanh import Tanh
from stepctl.models.sequential import Sequential
from stepctl.programs.learner import MODEL
from stepctl.programs.supervised import BinaryClassification, Classification, Regression
from stepctl.programs.wgan import WGAN
from stepctl.state.arena import Array, Shape

OPSET = 17
_IR_VERSION = 8  # the oldest that has this opset
_INPUT = "x"
_PREDICTION = "prediction"
_PROBABILITY = "probability"


def build_onnx(onnx: Any, model: TrainedModel, metadata: Mapping[str, str]) -> Any:
    """Return the ONNX model; `onnx` is the package. ConfigError if it cannot be one.

    Input: x (rows, *sample_shape), not preprocessed; of a table its features, in the order of the
    metadata, words as one-hot numbers. It is float64 if features are standardized or filled.
    Outputs: `prediction`, the number of the class, (rows,) int64, and `probability` (rows,
    n_classes); or `prediction`, the values (rows, n_outputs). Of a WGAN, the input is the latent
    vector, (rows, latent), and the output `sample`: (rows, *sample_shape).
    """
    graph = _Graph(onnx, model.inputs.dtype)
    task = model.task
    if isinstance(task, WGAN):
        x = graph.input("latent", (task.latent,))
        flat = graph.model(_sequential(model, "generator"), model.parameters, "generator/", x)
        shape = graph.constant(np.array([-1, *model.inputs.shape], np.int64))
        graph.output("sample", graph.node("Reshape", flat, shape), model.inputs.shape)
    elif isinstance(task, Classification | BinaryClassification | Regression):
        x = graph.preprocessed(model.inputs)
        arrays = {**model.parameters, **model.buffers}
        outputs = graph.model(_sequential(model, MODEL), arrays, "", x)
        if isinstance(task, Classification):
            graph.classes(outputs, len(model.class_names or ()))
        elif isinstance(task, BinaryClassification):
            graph.two_classes(outputs)
        else:
            graph.output(_PREDICTION, outputs, (model.n_outputs,))
    else:
        name = model.config["task"]["name"]
        raise ConfigError(
            f"{model.origin}: the task {name} has no ONNX form; export .npz or .safetensors"
        )
    return graph.finish(metadata)


def _sequential(model: TrainedModel, name: str) -> Sequential:
    found: Model = model.models[name]
    if not isinstance(found, Sequential):
        raise ConfigError(
            f"{model.origin}: {type(found).__name__} is not made of stepctl's layers, so it has no "
            "ONNX form; export .npz or .safetensors"
        )
    return found


class _Graph:
    """The nodes and constants of a graph; a value is known by its name."""

    def __init__(self, onnx: Any, dtype: str) -> None:
        self._onnx = onnx
        self._dtype = np.dtype(dtype)
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, shape: Shape, dtype: npt.DTypeLike | None = None) -> str:
        """Add an input, (rows, *shape), by default in the run's dtype."""
        described = self._described(name, np.dtype(dtype or self._dtype), ("rows", *shape))
        self._inputs.append(described)
        return name

    def preprocessed(self, inputs: InputFormat) -> str:
        """Add the input x, and return it as the model takes it.

        Statistics are applied in float64, as in training.
        """
        statistics = inputs.preprocessing.arrays
        dtype = np.dtype(np.float64) if statistics else self._dtype
        x = self.input(_INPUT, inputs.shape, dtype)
        factors = inputs.preprocessing.factors
        if np.any(factors != 1):
            x = self.node("Mul", x, self.constant(factors.astype(dtype)))
        if FILL in statistics:
            fill = self.constant(statistics[FILL])
            x = self.node("Where", self.node("IsNaN", x), fill, x)
        if MEAN in statistics:
            x = self.node("Sub", x, self.constant(statistics[MEAN]))
            x = self.node("Div", x, self.constant(statistics[DEVIATION]))
        if dtype == self._dtype:
            return x
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(self._dtype)
        return self.node("Cast", x, to=kind)

    def output(
        self, name: str, value: str, shape: Shape, dtype: npt.DTypeLike | None = None
    ) -> None:
        """Give a value, (rows, *shape), the name of an output; by default in the run's dtype."""
        self._nodes.append(self._onnx.helper.make_node("Identity", [value], [name]))
        described = self._described(name, np.dtype(dtype or self._dtype), ("rows", *shape))
        self._outputs.append(described)

    def constant(self, array: Array, name: str | None = None) -> str:
        """Add a constant array; by default it gets a name of its own."""
        if name is None:
            name = f"constant{len(self._constants)}"
        if name not in self._constants:
            contiguous = np.ascontiguousarray(array).reshape(array.shape)
            self._constants[name] = self._onnx.numpy_helper.from_array(contiguous, name)
        return name

    def number(self, value: float) -> str:
        """Add a number in the run's dtype."""
        return self.constant(np.array(value, self._dtype))

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Apply an operator, and return its output."""
        output = f"value{len(self._nodes)}"
        made = self._onnx.helper.make_node(operator, inputs, [output], **attributes)
        self._nodes.append(made)
        return output

    def classes(self, logits: str, n_classes: int) -> None:
        """Add the outputs of a classification."""
        self.output(_PREDICTION, self.node("ArgMax", logits, axis=1, keepdims=0), (), np.int64)
        self.output(_PROBABILITY, self.node("Softmax", logits, axis=1), (n_classes,))

    def two_classes(self, logit: str) -> None:
        """Add the outputs of a binary classification, whose model has one output."""
        is_one = self.node("Greater", logit, self.number(0))
        label = self.node("Cast", is_one, to=self._onnx.TensorProto.INT64)
        flat = self.node("Reshape", label, self.constant(np.array([-1], np.int64)))
        self.output(_PREDICTION, flat, (), np.int64)
        both = [self._logistic(self.node("Neg", logit)), self._logistic(logit)]
        self.output(_PROBABILITY, self.node("Concat", *both, axis=1), (2,))

    def model(self, model: Sequential, arrays: Mapping[str, Array], prefix: str, x: str) -> str:
        """Apply a model to x, and return its outputs; `prefix` begins the paths of its arrays."""

        def weight(path: str) -> str:
            return self.constant(arrays[f"{prefix}{path}"], f"{prefix}{path}")

        y = self.node("Flatten", x, axis=1)
        for layer in model.layers:
            y = self.layer(layer, y, weight)
        return y

    def layer(self, layer: Layer, x: str, weight: Callable[[str], str]) -> str:
        """Apply a layer to x; `weight` adds the array of a path."""
        match layer:
            case Dense():
                inputs = [x, weight(f"{layer.name}/weight")]
                if layer.bias:
                    inputs.append(weight(f"{layer.name}/bias"))
                return self.node("Gemm", *inputs)
            case BatchNorm():
                names = ("scale", "shift", "mean", "variance")
                paths = [weight(f"{layer.name}/{name}") for name in names]
                return self.node("BatchNormalization", x, *paths, epsilon=layer.epsilon)
            case LayerNorm():
                paths = [weight(f"{layer.name}/{name}") for name in ("scale", "shift")]
                return self.node("LayerNormalization", x, *paths, axis=-1, epsilon=layer.epsilon)
            case Dropout():
                return x
        return self._activation(layer, x)

    def _activation(self, layer: Layer, x: str) -> str:
        match layer:
            case ReLU():
                return self.node("Max", x, self.number(0))
            case LeakyReLU():
                return self.node("Max", x, self.node("Mul", x, self.number(layer.slope)))
            case GELU():
                return self._gelu(x)
            case Sigmoid():
                return self._logistic(x)
            case Tanh():
                return self.node("Tanh", x)
        raise ConfigError(
            f"{type(layer).__name__}: a layer of your own has no ONNX form; export .npz or .safetensors"
        )

    def _gelu(self, x: str) -> str:
        """Return x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), as the layer computes it."""
        square = self.node("Mul", x, x)
        factor = self.node("Mul", square, self.number(gelu.SCALE * gelu.CUBIC))
        argument = self.node("Mul", self.node("Add", factor, self.number(gelu.SCALE)), x)
        return self.node("Mul", self._logistic(argument), x)

    def _logistic(self, x: str) -> str:
        """Return 1 / (1 + exp(-x)); the operator Sigmoid is not accurate in the tails."""
        exponential = self.node("Exp", self.node("Neg", x))
        return self.node("Reciprocal", self.node("Add", exponential, self.number(1)))

    def finish(self, metadata: Mapping[str, str]) -> Any:
        """Return the checked ONNX model."""
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes, "stepctl", self._inputs, self._outputs, [*self._constants.values()]
        )
        model = helper.make_model(
            graph,
            producer_name="stepctl",
            producer_version=__version__,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=_IR_VERSION,
        )
        helper.set_model_props(model, dict(metadata))
        self._onnx.checker.check_model(model, full_check=True)
        return model

    def _described(self, name: str, dtype: np.dtype[Any], shape: tuple[str | int, ...]) -> Any:
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return self._onnx.helper.make_tensor_value_info(name, kind, shape)
