"""A copy of a run in object storage, kept up to date in the background."""
