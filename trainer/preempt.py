"""Being asked to stop: a signal or a file sets a flag, and the loop saves and leaves at its next step."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from data.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "STOP"
WARNINGS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def _ignore(number: int, frame: FrameType | None) -> None:
    """A signal handler that does nothing."""


class StopRequest:
    """While entered, SIGTERM, SIGINT and SIGUSR1 only note that the run shall stop, and so does a file run_dir/STOP.

    A second Ctrl-C ends the process at once. A signal may reach one rank only and rank 0 alone looks for the file, so
    `requested` is one rank's answer: the ranks agree on it. Leaving removes a file that was heeded, so that the next
    start runs.
    """

    def __init__(self, run_dir: str | Path, *, rank: int = 0) -> None:
        self.reason = ""
        self._file = Path(run_dir) / STOP_FILE if rank == 0 else None
        self._speaks = rank == 0
        self._interrupted = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # A rank on its way out with a checkpoint: launchers send SIGTERM to those that are not the first to leave.
            # Not SIG_IGN, which commands started from here would inherit.
            leaving = isinstance(error, Stopped) and number in WARNINGS
            signal.signal(number, _ignore if leaving else handler)
        if self._file and self.reason:
            self._file.unlink(missing_ok=True)

    @property
    def requested(self) -> bool:
        if not self.reason and self._file and self._file.exists():
            self.reason = STOP_FILE
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Note that the run shall stop, for a `reason` other than a signal; any thread may call it."""
        self.reason = self.reason or reason

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        if self._interrupted:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._interrupted = True
        if self._speaks:
            # Not through logging or print: a handler may run in the middle of either.
            os.write(2, b"\nstopping after a checkpoint; Ctrl-C again to leave at once\n")


@contextmanager
def leaving_when_warned(code: int) -> Iterator[None]:
    """While entered, SIGTERM and SIGUSR1 end this process at once with an exit code: what it has finished is kept.

    For stages that a kill does not hurt. Python runs a handler only between two of its instructions, which a rank that
    waits for others inside a collective may never reach; so a thread is told of the signal, and ends the process.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, _ignore) for number in WARNINGS}
    fd_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] in WARNINGS:
                name = signal.Signals(number[0]).name
                os.write(2, f"\n{name}: what is finished is kept; start the same command to go on\n".encode())
                os._exit(code)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)
        watcher.join()
        os.close(reading)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process `number` when the process that started it ends (Linux; elsewhere nothing).

    For ranks started by a launcher: a launcher that is killed leaves them behind otherwise. Not for a process that a
    shell started, which may outlive the shell.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), number)
