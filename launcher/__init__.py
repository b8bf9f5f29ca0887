"""Starts things: the command line and the configuration. Imports no torch at module level."""
