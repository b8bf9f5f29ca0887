"""What every check of `quintet doctor` gives: rows that say what was found and, where it is wrong, the mend."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.errors import ConfigError, QuintetError

log = logging.getLogger("quintet")

OK, WARN, BAD = "ok", "warn", "bad"


@dataclass(frozen=True)
class Row:
    """One finding. `warn` can be lived with, `bad` cannot; both have a mend. `host` is empty for this machine."""

    name: str
    status: str
    found: str
    mend: str = ""
    host: str = ""

    def __post_init__(self) -> None:
        assert self.status == OK or self.mend, f"{self.name}: a row that is not ok says the mend"


def ok(name: str, found: str) -> Row:
    return Row(name, OK, found)


def warn(name: str, found: str, mend: str) -> Row:
    return Row(name, WARN, found, mend)


def bad(name: str, found: str, mend: str) -> Row:
    return Row(name, BAD, found, mend)


def of_error(name: str, error: QuintetError, mend: str = "") -> list[Row]:
    """The rows of a foreseen error, whose texts end with their mend: "key=value: what is wrong; what to do"."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    rows = []
    for problem in problems:
        found, _, told = problem.rpartition("; ")
        rows.append(bad(name, found or told, (told if found else "") or mend or "correct what the message names"))
    return rows


def guarded(name: str, check: Callable[..., list[Row]], *arguments: Any) -> list[Row]:
    """The rows of a check; one that fails itself is a finding too, and the other checks go on."""
    try:
        return check(*arguments)
    except QuintetError as error:
        return of_error(name, error)
    except Exception as error:
        log.debug("%s", name, exc_info=True)
        reason = next(iter(str(error).strip().splitlines()), "")
        found = f"the check itself failed: {type(error).__name__}: {reason}"
        return [
            bad(name, found, "quintet doctor --debug shows where; a broken installation is mended by `make install`")
        ]
