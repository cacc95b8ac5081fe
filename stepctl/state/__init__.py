"""The training state: named arrays, counters and random streams."""
