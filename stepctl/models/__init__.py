"""Models: parameters, their start, and the way from inputs to outputs."""

NAMES = {
    "linear": "stepctl.models.linear:linear",
    "mlp": "stepctl.models.mlp:mlp",
}
