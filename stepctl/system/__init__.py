"""The operating system and the libraries: files, signals, BLAS, child processes."""
