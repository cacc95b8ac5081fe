"""Stop rules and signals: what ends a segment."""
