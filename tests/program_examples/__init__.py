"""Six NumPy programs, each in a plain version, as a stepctl script, and as a stepctl program."""
