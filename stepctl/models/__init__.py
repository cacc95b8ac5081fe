"""Models: parameters, their initial values, and the forward and backward pass."""

NAMES = {
    "linear": "stepctl.models.linear:linear",
    "mlp": "stepctl.models.mlp:mlp",
}
