"""A model that is trained by its loss alone, without a forward and a backward function.

    import autograd.numpy as np
    import stepctl

    class Linear(stepctl.LossModel):
        def initial_params(self, rng):
            return {"w": np.zeros(3), "b": np.zeros(())}

        def loss(self, params, x, y, rng):
            return (x @ params["w"] + params["b"] - y) ** 2

A config names it as `model: {name: "module:Class", ...}` with `task: {name: loss}`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from itertools import combinations
from typing import Any, NamedTuple, final

import numpy as np

from stepctl.errors import ConfigError
from stepctl.models.base import Backward, Model
from stepctl.models.trees import Tree, leaves, map_leaves, paths
from stepctl.state.arena import Arena, Array, Shape, check_names
from stepctl.state.rng import NamedGenerators, rng
from stepctl.state.workspace import Workspace
from stepctl.system.text import a_or_an, in_one_line
from stepctl.system.user_code import defined_at

_INITIAL = "model: initial_params"


class LossModel(Model):
    """A model that gives the loss of each row.

    Define `initial_params`, and `loss` or `loss_and_gradients`. `params` are nested dicts, lists
    and tuples of arrays, as `initial_params` returns them; their paths, such as "encoder/0/weight",
    name the arrays of a checkpoint. They are read-only and have the run's dtype. `rng("name")`
    returns a generator, whose draws depend on the seed, the name, the step and the shard; in
    an evaluation they depend on the seed, the name and the number of its batch, so that every
    evaluation draws the same numbers. `rng.training` is False in an evaluation.

    The constructor takes keyword arguments: `input_shape` (the shape of one row of x) and
    `n_outputs` (numbers in one row of y) come from the data if its signature names them, all others
    from the config. Integers in the data stay integers.
    """

    integer_inputs = True

    @abstractmethod
    def initial_params(self, rng: NamedGenerators) -> Tree:
        """Return the initial parameters: nested dicts, lists and tuples of float arrays.

        They are converted to the run's dtype. It is called twice, and must return the same
        structure and shapes.
        """

    def loss(self, params: Tree, x: Array, y: Array | None, rng: NamedGenerators) -> Array:
        """Return the loss of each row, (rows,), written with autograd.numpy.

        x: (rows, *input_shape); y: (rows, ...), or None if the data have no targets. Integers have
        their own dtype, all else the run's. The mean over the batch plus the penalty is minimized.
        """
        raise NotImplementedError

    def loss_and_gradients(
        self, params: Tree, x: Array, y: Array | None, rng: NamedGenerators
    ) -> tuple[Array, Tree]:
        """Return the loss of each row, and the gradients of their sum, structured as `params`.

        With it, training needs no autograd. The gradients are converted to the run's dtype. If
        there is `loss` too, that is used in evaluations.
        """
        raise NotImplementedError

    def penalty(self, params: Tree) -> Any:
        """Return a number that is added to the mean loss, written with autograd.numpy."""
        raise NotImplementedError

    def predict(self, params: Tree, x: Array) -> Any:
        """Return the outputs for x. Training does not use it."""
        raise NotImplementedError

    @final
    def nested(self, params: Mapping[str, Any], prefix: str = "") -> Tree:
        """Return parameters by path, nested as `initial_params` nests them.

        `params` may be the arrays of a checkpoint, with the prefix "params/", or "ema/" for the
        moving average; arrays with other paths are not used. ConfigError if one is missing.
        """
        if not prefix:
            return map_leaves(params.__getitem__, self.__layout.tree)
        missing = [path for path in self.__layout.shapes if prefix + path not in params]
        if missing:
            raise ConfigError(
                f"there is no array {prefix + missing[0]}, which {type(self).__name__} needs; "
                "construct it with the arguments of the run, and give the prefix params/ or ema/"
            )
        return map_leaves(lambda path: params[prefix + path], self.__layout.tree)

    @final
    def defines(self, method: str) -> bool:
        """Tell whether the model has its own version of one of the optional methods."""
        return getattr(type(self), method) is not getattr(LossModel, method)

    # The protocol of a model

    @final
    def parameter_shapes(self) -> dict[str, Shape]:
        return self.__layout.shapes

    @final
    def initialize(self, params: Arena, rng: Callable[[str], np.random.Generator]) -> None:
        _, initial = _initial_params(self, rng)
        found = {path: array.shape for path, array in initial.items()}
        if found != self.__layout.shapes:
            raise ConfigError(
                f"{_INITIAL} returned other paths or shapes when it was called again; they must depend "
                f"on the constructor's arguments alone{_where(self)}"
            )
        with np.errstate(over="ignore"):  # the first save refuses infinity
            for path, array in initial.items():
                params[path] = array

    def forward(self, params: Arena, x: Array, workspace: Workspace) -> tuple[Array, Backward]:
        raise NotImplementedError("a LossModel is trained by its loss")

    @cached_property
    def __layout(self) -> _Layout:
        tree, initial = _initial_params(self, partial(rng, 0))
        return _Layout(paths(tree), {path: array.shape for path, array in initial.items()})


class _Layout(NamedTuple):
    """The tree of the parameters' paths, and their shapes by path."""

    tree: Tree
    shapes: dict[str, Shape]


def _initial_params(
    model: LossModel, create: Callable[[str], np.random.Generator]
) -> tuple[Tree, dict[str, Array]]:
    """Return the tree, and its arrays by path; ConfigError if they cannot be trained."""
    tree = model.initial_params(NamedGenerators(create))
    if type(tree) not in (dict, list, tuple):
        kind = a_or_an(type(tree).__name__)
        raise ConfigError(
            f"{_INITIAL} returned {kind}; return arrays in a dict, list or tuple{_where(model)}"
        )
    try:
        initial = leaves(tree)
        check_names(initial)
        for path, leaf in initial.items():
            _check_array(path, leaf)
        _refuse_shared_memory(initial)
    except ValueError as error:
        raise ConfigError(in_one_line(f"{_INITIAL}: {error}{_where(model)}")) from error
    return tree, initial


def _where(model: LossModel) -> str:
    return f" ({defined_at(type(model))})"


def _check_array(path: str, leaf: object) -> None:
    """Raise ValueError unless a leaf is an array of floats."""
    if not isinstance(leaf, np.ndarray):
        kind = a_or_an(type(leaf).__name__)
        raise ValueError(
            f"{path} is {kind}; parameters are NumPy arrays in dicts, lists and tuples"
        )
    if leaf.dtype.kind != "f":
        raise ValueError(f"{path} has dtype {leaf.dtype}; parameters are floats")
    if leaf.size == 0:
        raise ValueError(f"{path} has shape {leaf.shape}, without an element; leave it out")


def _refuse_shared_memory(arrays: Mapping[str, Array]) -> None:
    """Raise ValueError if two arrays overlap: they would be trained as two parameters."""
    for (path, array), (other_path, other) in combinations(arrays.items(), 2):
        if np.may_share_memory(array, other) and np.shares_memory(array, other):
            raise ValueError(
                f"{path} and {other_path} share memory, but would be trained apart; return the "
                "array once and use it twice in loss, or copy it"
            )
