"""The run directory: its files, its lock and its ledger."""
