"""The same function over many jobs in several processes, with progress for whoever watches."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_log = logging.getLogger("quintet")
_SECONDS_BETWEEN_LINES = 10.0
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, title: str) -> list[Result]:
    """function(job) for every job, in the order of the jobs, whichever process ends first.

    Args:
        function: importable by name, since processes are spawned; its jobs and results are pickled.
        workers: processes; with 1, or with a single job, the work is done here.
        title: what the progress bar or the progress lines say.

    Raises:
        UserError: a process died without a word, as it does when memory runs out.
        Exception: what the first failing job raised.
    """
    progress = _Progress(title, len(jobs))
    if min(workers, len(jobs)) <= 1:
        return list(progress.watch(map(function, jobs)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _settle) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            return list(progress.watch(map(Future.result, futures)))
        except BrokenProcessPool as error:
            raise UserError(
                f"workers={workers}: a process was killed, most likely for want of memory; use fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _settle() -> None:
    """Make a process a good worker: one thread, gone at once on Ctrl-C, and never left behind by a killed parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it was killed before the line above
        os._exit(1)


class _Progress:
    """A bar on a terminal; elsewhere one line every few seconds."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total

    def watch(self, results: Iterator[Result]) -> Iterator[Result]:
        """Pass the results through, counting them."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import track

            yield from track(results, self._title, self._total, console=Console(stderr=True), transient=True)
            return
        last = time.monotonic()
        for done, result in enumerate(results, 1):
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                _log.info("%s: %d of %d", self._title, done, self._total)
            yield result
