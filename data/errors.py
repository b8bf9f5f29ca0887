"""The ways a run may end, each with its exit code.

An error raised from here is addressed to the user: the command line prints its text, without a traceback,
and exits with its code. Anything else that escapes is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_DONE = 0


class QuintetError(Exception):
    """A foreseen end of a run; `exit_code` is what the process returns."""

    exit_code = 1


class UserError(QuintetError):
    """Bad configuration or bad input. The text names the key or file, the value and the mend."""

    exit_code = 2


class ConfigError(UserError):
    """Every problem found in a configuration, told at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(QuintetError):
    """Damaged data: at once under the policy `strict`, or when the error budget of `skip` is spent."""

    exit_code = 3


class NumericError(QuintetError):
    """Too many non-finite steps in a row, weights that are not finite or differ between ranks, a spike that stays."""

    exit_code = 4


class Stopped(QuintetError):
    """The run was asked to stop and has written a complete checkpoint: start it again to go on."""

    exit_code = 75


class WatchdogError(QuintetError):
    """A section took longer than its limit; the text names the rank, the step and the section."""

    exit_code = 124
