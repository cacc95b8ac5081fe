"""The import path `stepctl.tasks.base` for tasks of your own; tasks are in `stepctl.programs`."""
