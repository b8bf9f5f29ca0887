"""Runs a stage again and again, killing it for real after every few parts that it finishes, until it gets through."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import parts


def until_done(function: Callable[..., Any], *args: Any, log: Path, every: int = 5, preload: str) -> list[str]:
    """Call function(*args) in one process after the other, each killed with SIGKILL in the middle of its n-th write.

    `function` is importable. The first process is killed in its second write, so that one kill comes early, the others
    in write number `every`. Returns the names of all files that were finished by any of them, in order.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload, function.__module__])
    for attempt in range(100):
        limit = 2 if attempt == 0 else every
        process = context.Process(target=_limited, args=(function, args, log, limit))
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        if process.exitcode == 0:
            assert attempt > 1, "it was never killed"
            return log.read_text().split("\n")[:-1]
    raise AssertionError("it never got through")


def _limited(function: Callable[..., Any], args: tuple[Any, ...], log: Path, limit: int) -> None:
    write_whole, writes = parts.write_whole, 0

    def counted(path: Path, write: Callable[[Path], object]) -> None:
        nonlocal writes
        writes += 1
        dying = writes == limit

        def written(target: Path) -> None:
            write(target)
            if dying:
                os.kill(os.getpid(), signal.SIGKILL)

        write_whole(path, written)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{path.name}\n")

    parts.write_whole = counted
    function(*args)
