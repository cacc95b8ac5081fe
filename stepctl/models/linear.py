"""Linear and softmax regression."""

from stepctl.models.layers.dense import Dense
from stepctl.models.sequential import Sequential, flat_size
from stepctl.state.arena import Shape


def linear(*, input_shape: Shape, n_outputs: int, input_gradient: bool = False) -> Sequential:
    """One dense layer: linear regression, or softmax regression with cross-entropy."""
    layer = Dense(
        name="dense0",
        n_in=flat_size("linear", input_shape),
        n_out=n_outputs,
        input_gradient=input_gradient,
    )
    return Sequential([layer])
