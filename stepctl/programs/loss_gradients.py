"""Losses and gradients of a LossModel: by autograd, or by the model's own method; both checked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from stepctl.errors import ConfigError
from stepctl.models.loss_model import LossModel
from stepctl.models.trees import Tree, leaves
from stepctl.state.arena import Array
from stepctl.state.rng import NamedGenerators
from stepctl.system import optional
from stepctl.system.text import a_or_an, in_one_line
from stepctl.system.user_code import defined_at, describe_error

Params = Mapping[str, Array]  # by path
Gradients = Mapping[str, Array]  # by path
# of errors about an array that autograd follows; "sequence": one is assigned to an element of another
_ARRAY_BOX_MESSAGE = re.compile("ArrayBox|array element with a sequence")
_ONLY_AUTOGRAD = "compute with autograd.numpy (import autograd.numpy as np), and assign to no element of an array"


class Rows(NamedTuple):
    """Rows of a batch, and the generators that their losses draw from. y is None without targets."""

    x: Array
    y: Array | None
    rng: NamedGenerators


class LossGradients:
    """The losses and gradients of one model."""

    def __init__(self, model: LossModel) -> None:
        """Raise ConfigError if the model has no loss, or needs autograd, which is not installed."""
        self._model = model
        self._is_traced = not model.defines("loss_and_gradients")
        self.has_penalty = model.defines("penalty")
        if self._is_traced and not model.defines("loss"):
            raise ConfigError(
                f"model: {type(model).__name__} has neither loss nor loss_and_gradients; define one of "
                f"them{self._where}"
            )
        if self.needs_autograd:
            self._autograd = optional.require("autograd", "autograd")
            # about a penalty that is constant; a constant loss is refused
            warnings.filterwarnings("ignore", "Output seems independent of input", UserWarning)

    @property
    def _where(self) -> str:
        return f" ({defined_at(type(self._model))})"

    @property
    def needs_autograd(self) -> bool:
        """Whether autograd computes gradients."""
        return self._is_traced or self.has_penalty

    def losses(self, params: Params, rows: Rows) -> Array:
        """Return the loss of each row."""
        if not self._model.defines("loss"):
            losses, _ = self._own_gradients(params, rows)
            return losses
        return self._row_losses("loss", self._model.loss(self._model.nested(params), *rows), rows)

    def losses_and_gradients(self, params: Params, rows: Rows) -> tuple[Array, Gradients]:
        """Return the loss of each row, and the gradients of their sum."""
        if not self._is_traced:
            return self._own_gradients(params, rows)
        value, depends, backward = self._trace(
            "loss", params, lambda tree: self._model.loss(tree, *rows)
        )
        losses = self._row_losses("loss", value, rows)
        if not depends:
            raise ConfigError(
                "model: the value of loss does not depend on the parameters, as far as autograd can "
                f"see; {_ONLY_AUTOGRAD}{self._where}"
            )
        return losses, backward(np.ones_like(losses))

    def penalty(self, params: Params) -> float:
        """Return the model's penalty."""
        return float(self._checked_penalty(self._model.penalty(self._model.nested(params))))

    def penalty_and_gradients(self, params: Params) -> tuple[float, Gradients]:
        """Return the model's penalty and its gradients."""
        value, _, backward = self._trace("penalty", params, self._model.penalty)
        penalty = self._checked_penalty(value)
        return float(penalty), backward(np.ones_like(penalty))

    def _trace(
        self, method: str, params: Params, function: Callable[[Tree], Any]
    ) -> tuple[Any, bool, Callable[[Array], Gradients]]:
        """Call a method of the model.

        Returns its value, whether that depends on the parameters, and the function from the
        gradient of the value to the gradients of the parameters.
        """
        names = list(params)
        returned: list[Any] = []

        def traced(arrays: tuple[Array, ...]) -> Any:
            # autograd's own dicts and lists lack some methods; these are plain ones of its arrays
            boxes = {name: arrays[number] for number, name in enumerate(names)}
            returned.append(function(self._model.nested(boxes)))
            return returned[0]

        def backward(seed: Array) -> Gradients:
            try:
                return dict(zip(names, vjp(seed), strict=True))
            except NotImplementedError as error:
                raise _not_traceable(method, error) from error

        try:
            vjp, value = self._autograd.make_vjp(traced)(tuple(params.values()))
        except NotImplementedError as error:  # a function without a derivative
            raise _not_traceable(method, error) from error
        except (TypeError, ValueError) as error:
            if _ARRAY_BOX_MESSAGE.search(str(error)):
                raise _not_traceable(method, error) from error
            raise
        return value, self._autograd.tracer.isbox(returned[0]), backward

    def _own_gradients(self, params: Params, rows: Rows) -> tuple[Array, Gradients]:
        """Return the rows' losses and the gradients that the model's `loss_and_gradients` computes."""
        method = "loss_and_gradients"
        returned: object = self._model.loss_and_gradients(self._model.nested(params), *rows)
        if not isinstance(returned, tuple) or len(returned) != 2:
            kind = a_or_an(type(returned).__name__)
            raise ConfigError(
                f"model: {method} returned {kind}; return (losses, gradients){self._where}"
            )
        value, tree = returned
        return self._row_losses(method, value, rows), self._checked_gradients(method, params, tree)

    def _row_losses(self, method: str, value: object, rows: Rows) -> Array:
        """Return the rows' losses; ConfigError unless they are (rows,) floats."""
        losses = np.asarray(value)
        shape = (len(rows.x),)
        if losses.shape == shape and losses.dtype.kind == "f":
            return losses
        what = f"model: {method} returned"
        if value is None:
            raise ConfigError(f"{what} None; return one loss per row: {shape}{self._where}")
        if losses.dtype.kind == "O":
            raise ConfigError(f"{what} objects instead of numbers; {_ONLY_AUTOGRAD}{self._where}")
        if losses.shape != shape:
            raise ConfigError(
                f"{what} losses of shape {losses.shape}; one loss per row is needed, not their mean: "
                f"{shape}{self._where}"
            )
        raise ConfigError(f"{what} losses of dtype {losses.dtype}; floats are needed{self._where}")

    def _checked_penalty(self, value: object) -> Array:
        penalty = np.asarray(value)
        if penalty.shape != () or penalty.dtype.kind != "f":
            raise ConfigError(
                f"model: penalty returned shape {penalty.shape} of dtype {penalty.dtype}; one float is "
                f"needed{self._where}"
            )
        return penalty

    def _checked_gradients(self, method: str, params: Params, tree: Tree) -> Gradients:
        """Return a tree of gradients by path; ConfigError unless it is as the parameters."""
        prefix = f"model: {method}: the gradient"
        try:
            gradients = leaves(tree)
        except ValueError as error:
            raise ConfigError(in_one_line(f"{prefix}s: {error}{self._where}")) from error
        missing = [path for path in params if path not in gradients]
        extra = [path for path in gradients if path not in params]
        if missing or extra:
            problem = "is missing" if missing else "is the gradient of no parameter"
            raise ConfigError(
                in_one_line(
                    f"{prefix} {(missing or extra)[0]} {problem}; return them structured as the "
                    f"parameters: {', '.join(params)}{self._where}"
                )
            )
        for path, gradient in gradients.items():
            found = np.asarray(gradient)
            if found.dtype.kind != "f" or found.shape != params[path].shape:
                raise ConfigError(
                    f"{prefix} of {path} has shape {found.shape} and dtype {found.dtype}; floats of "
                    f"shape {params[path].shape} are needed{self._where}"
                )
        return gradients


def _not_traceable(method: str, error: Exception) -> ConfigError:
    text = in_one_line(describe_error(error))
    return ConfigError(f"model: autograd cannot differentiate {method}: {text}; {_ONLY_AUTOGRAD}")
