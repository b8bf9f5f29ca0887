"""Every claim of speed or memory, measured beside its peer in the same run: `make bench`."""
