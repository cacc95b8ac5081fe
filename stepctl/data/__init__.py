"""Data sources, and which samples a step reads."""

NAMES = {
    "digits": "stepctl.data.digits:digits",
    "arrays": "stepctl.data.arrays:arrays",
    "csv": "stepctl.data.csv:csv",
    "idx": "stepctl.data.idx:idx",
    "hdf5": "stepctl.data.hdf5:hdf5",
}
