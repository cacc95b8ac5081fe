"""Reading commands: each module computes what one command prints."""
