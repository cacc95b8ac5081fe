"""Tasks: what one update is, and what is measured. The only code that changes arrays."""

NAMES = {
    "classification": "stepctl.tasks.supervised:Classification",
    "binary_classification": "stepctl.tasks.supervised:BinaryClassification",
    "wgan": "stepctl.tasks.wgan:WGAN",
    "regression": "stepctl.tasks.supervised:Regression",
}
