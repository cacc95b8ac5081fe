"""The config: its sections, its components, its YAML and its error messages."""
