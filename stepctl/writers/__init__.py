"""Writers: where rows of metrics go."""
