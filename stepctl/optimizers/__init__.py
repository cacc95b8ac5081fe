"""Optimizers and learning-rate schedules."""

NAMES = {
    "sgd": "stepctl.optimizers.sgd:SGD",
    "adagrad": "stepctl.optimizers.adagrad:Adagrad",
    "rmsprop": "stepctl.optimizers.rmsprop:RMSProp",
    "adam": "stepctl.optimizers.adam:Adam",
    "adamw": "stepctl.optimizers.adam:AdamW",
}
