"""A guard around an outside service: its calls wait in a bounded queue for a thread that may fail or hang alone."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger("quintet")


class Mirror:
    """Calls to a run elsewhere, made by a thread, so that no error, stall or dead helper reaches the training loop.

    `open_run` is called in that thread and returns an object with log, table, alert, finish(exit_code) and `hint`, a
    last word for the reader. `abandon` is called when it does not come to an end: it makes the call that hangs fail.
    """

    def __init__(
        self,
        open_run: Callable[[], Any],
        *,
        name: str = "W&B",
        abandon: Callable[[], None] = lambda: None,
        queue_size: int = 10_000,
    ) -> None:
        self._open_run, self._name = open_run, name
        self._abandon = abandon
        self._calls: queue.Queue[tuple[str, Callable[[Any], object]] | None] = queue.Queue(queue_size)
        self._off = False
        self._errors = 0
        self._lost = 0
        self._hint = ""
        self._ending = False
        self._exit_code = 0
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def send(self, what: str, call: Callable[[Any], object]) -> None:
        """Queue `call`, which will get the run; never waits."""
        if self._off:
            return
        try:
            self._calls.put_nowait((what, call))
        except queue.Full:
            self._lost += 1

    def finish(self, exit_code: int, limit_seconds: float) -> None:
        """Let the queue drain and the run end, for at most `limit_seconds` and a few more for cleaning up."""
        self._exit_code = exit_code
        if not self._join(limit_seconds):
            log.warning("%s did not finish within %g s; metrics.jsonl has everything", self._name, limit_seconds)
            self._off = True
            self._abandon()
            self._join(5.0)
        if self._lost:
            log.warning("%s missed %d calls; metrics.jsonl has everything", self._name, self._lost)
        if self._hint:
            log.info(self._hint)

    def _join(self, limit_seconds: float) -> bool:
        """Tell the thread to end, once, and wait for it; False when it is still busy."""
        deadline = time.monotonic() + limit_seconds
        try:
            if not self._ending:
                self._calls.put(None, timeout=limit_seconds)
                self._ending = True
        except queue.Full:
            return False
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            run = self._open_run()
        except Exception as error:
            self._switch_off("start", error)
            run = None
        else:
            self._hint = run.hint
        while (entry := self._calls.get()) is not None:
            what, call = entry
            if not self._off:
                self._try(what, call, run)
        if run is None:
            return
        try:
            run.finish(self._exit_code)
        except Exception as error:
            self._switch_off("finish", error)

    def _try(self, what: str, call: Callable[[Any], object], run: Any) -> None:
        try:
            call(run)
            self._errors = 0
        except Exception as error:
            self._errors += 1
            self._lost += 1
            if self._errors >= 3 or isinstance(error, ConnectionError):
                self._switch_off(what, error)

    def _switch_off(self, what: str, error: Exception) -> None:
        if not self._off:
            self._off = True
            log.warning("%s is off from here (%s: %s); metrics.jsonl goes on", self._name, what, one_line(error))


def one_line(error: Exception) -> str:
    """An error's text, for a log line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
