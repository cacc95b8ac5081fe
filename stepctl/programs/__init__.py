"""Programs: what one update computes, and the metrics it reports."""

NAMES = {
    "classification": "stepctl.programs.supervised:Classification",
    "binary_classification": "stepctl.programs.supervised:BinaryClassification",
    "wgan": "stepctl.programs.wgan:WGAN",
    "regression": "stepctl.programs.supervised:Regression",
    "loss": "stepctl.programs.model_loss:ModelLoss",
}
