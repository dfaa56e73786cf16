"""The two ways a user's input can be wrong, and the exit code the command line gives each."""

from __future__ import annotations


class UsageError(ValueError):
    """An argument or a configuration value that cannot work. The command line exits with 2."""

    exit_code = 2


class DataError(ValueError):
    """A file or a folder that is missing, damaged or not what was declared. Exits with 1."""

    exit_code = 1
