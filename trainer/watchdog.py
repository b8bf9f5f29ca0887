"""Ends a rank that makes no progress, and says which rank the others wait for.

A rank that hangs (a stopped process, a dead disk, a lost link) leaves the others inside a collective, where Python runs
nothing. So a thread of every rank looks at how long its rank has been in one section; past the limit it leaves the
stacks of all threads in run_dir/stacks/ and ends the process with code 124. A second thread tells the other ranks where
this one is, through the job's key-value store: a rank that has not been heard of, or is behind the others, is named.
The first rank that ends says so there, and the others leave their stacks, too.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Protocol, Self

from data.errors import WatchdogError
from trainer import runfolder


class Store(Protocol):
    """What is used of a job's key-value store (torch.distributed.Store)."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


STACKS = "stacks"  # the folder of the run folder
_BEAT_SECONDS = 5.0
_JOIN_SECONDS = 10.0
_SILENT_BEATS = 3  # a rank that has missed so many is taken for stopped
_FIRED = "watchdog/fired"
# What a rank does in a step, in this order; in "meet" it waits for the batches of the others. Of two ranks in the same
# step the one in the earlier section is behind.
SECTIONS = ("open", "data", "meet", "step", "evaluate", "save", "export")


@dataclass(frozen=True)
class Beat:
    """Where a rank is: the step it works on, its section, and seconds in it. `count` numbers what it has told."""

    count: int
    host: str
    step: int
    section: str
    seconds: float

    @property
    def place(self) -> tuple[int, int]:
        return self.step, SECTIONS.index(self.section)

    def __str__(self) -> str:
        return f"in {self.section} of step {self.step} for {self.seconds:.0f} s"


@dataclass(frozen=True)
class Heard:
    """The last beat of another rank, and for how many seconds there was no newer one."""

    beat: Beat
    silent: float


def blame(own: Beat, others: Mapping[int, Heard], silent_limit: float) -> str:
    """Which ranks the others wait for: those not heard of, else those behind `own`; empty where all are as far."""
    gone = {rank: heard for rank, heard in others.items() if heard.silent > silent_limit}
    if gone:
        told = [
            f"rank {rank} on {heard.beat.host} has not been heard of for {heard.silent:.0f} s, it was in "
            f"{heard.beat.section} of step {heard.beat.step}"
            for rank, heard in sorted(gone.items())
        ]
        return "; ".join(told)
    behind = {rank: heard.beat for rank, heard in others.items() if heard.beat.place < own.place}
    return "; ".join(f"rank {rank} on {beat.host} is {beat}" for rank, beat in sorted(behind.items()))


class Watchdog:
    """Watches this rank while entered; `at` says where it is.

    Args:
        limits: seconds that a rank may stay in a section, by its name; 0 or no entry: as long as it likes.
        store: the job's key-value store, for this object alone; None for a single rank.
    """

    def __init__(
        self, run_dir: str | Path, limits: Mapping[str, float], *, rank: int = 0, world: int = 1, store: Store | None
    ) -> None:
        self._run_dir, self._limits, self._store = Path(run_dir), dict(limits), store
        self._rank, self._world = rank, world
        shortest = min((seconds for seconds in limits.values() if seconds), default=0.0)
        self._beat_seconds = min(_BEAT_SECONDS, shortest / 8) if shortest else _BEAT_SECONDS
        self._stop = threading.Event()
        self._fire_now = threading.Event()  # another rank has ended
        self.last_words: Callable[[str], object] = lambda reason: None  # called with the reason before the end
        self._step, self._section, self._since = 0, SECTIONS[0], time.monotonic()
        self._others: dict[int, tuple[Beat, float]] = {}  # with the time when the beat was new
        self._answered = time.monotonic()  # by the store

    def __enter__(self) -> Self:
        self.at(SECTIONS[0], 0)
        work = [self._watch] if self._store is None else [self._watch, self._tell]
        self._threads = [threading.Thread(target=each, name="watchdog", daemon=True) for each in work]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # One that is still inside torch when Python ends would abort the process (launcher/cli.py).
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def at(self, section: str, step: int) -> None:
        """This rank begins a section of a step now, or is seen to move in one."""
        self._step, self._section, self._since = step, section, time.monotonic()

    def allow(self, section: str, seconds: float) -> None:
        """Change the limit of a section."""
        self._limits[section] = seconds

    # --- the watching thread ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(min(1.0, self._beat_seconds)):
            now = time.monotonic()
            if now - before > 10 * self._beat_seconds:  # the whole process was stopped: Ctrl-Z, a suspended machine
                self._since += now - before
            before, own = now, self._own(0)
            limit = self._limits.get(own.section, 0.0)
            if (limit and own.seconds > limit) or self._fire_now.is_set():
                self._end(own)

    def _own(self, count: int) -> Beat:
        seconds = time.monotonic() - self._since
        return Beat(count, socket.gethostname(), self._step, self._section, seconds)

    def _end(self, own: Beat) -> NoReturn:
        """Leave stacks and the reason behind, and go. Nothing here may wait for long: the disk may be what hangs."""
        reason = f"rank {self._rank} on {own.host}: {own}, no progress; {self._whom(own)}"
        _say(reason)
        done = threading.Event()

        def write() -> None:
            try:
                self._leave_stacks(reason)
                runfolder.finish(self._run_dir, WatchdogError.exit_code, reason, own.step)
                if self._store is not None:
                    self._store.set(_FIRED, reason)
                self.last_words(reason)
            except (OSError, RuntimeError) as error:
                _say(f"rank {self._rank}: its stacks could not be written: {error}")
            done.set()

        threading.Thread(target=write, daemon=True).start()
        done.wait(5.0)
        os._exit(WatchdogError.exit_code)

    def _whom(self, own: Beat) -> str:
        now = time.monotonic()
        if self._store is not None and now - self._answered > _SILENT_BEATS * self._beat_seconds and self._rank:
            return f"rank 0 does not answer; stacks in {self._run_dir / STACKS}"
        others = {rank: Heard(beat, now - since) for rank, (beat, since) in self._others.items()}
        found = blame(own, others, _SILENT_BEATS * self._beat_seconds)
        mend = f"stacks in {self._run_dir / STACKS}; start the same command to go on from the newest checkpoint"
        return f"{found or 'no other rank is behind it'}; {mend}"

    def _leave_stacks(self, reason: str) -> None:
        folder = self._run_dir / STACKS
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{self._rank}.txt", "w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    # --- the thread that tells and listens --------------------------------------------------------------------

    def _tell(self) -> None:
        """Its calls may block as long as the store's host is silent; the watching thread does not wait for them."""
        count = 0
        while not self._stop.wait(self._beat_seconds):
            count += 1
            try:
                self._exchange(count)
                self._answered = time.monotonic()
            except RuntimeError:  # torch's errors of a store: its host has ended, or is slow
                continue

    def _exchange(self, count: int) -> None:
        assert self._store is not None
        own = self._own(count)
        self._store.set(_key(self._rank), json.dumps(vars(own)))
        if self._store.check([_FIRED]):
            self._fire_now.set()
        limit = self._limits.get(own.section, 0.0)
        if limit and own.seconds > limit / 2:  # others are of interest once it looks as if something hangs
            self._listen([rank for rank in range(self._world) if rank != self._rank])

    def _listen(self, ranks: Sequence[int]) -> None:
        assert self._store is not None
        ranks = [rank for rank in ranks if self._store.check([_key(rank)])]
        now = time.monotonic()
        for rank, said in zip(ranks, self._store.multi_get([_key(rank) for rank in ranks]), strict=True):
            beat = Beat(**json.loads(said))
            if rank not in self._others or self._others[rank][0].count != beat.count:
                self._others[rank] = beat, now


def _key(rank: int) -> str:
    return f"watchdog/{rank}"


def _say(text: str) -> None:
    """Past logging, whose lock the stuck thread may hold."""
    os.write(2, f"\nquintet watchdog: {text}\n".encode())


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """End the process with code 124, after `what` and the stacks of its threads, unless the block is left in time."""

    def end() -> None:
        _say(f"{what} within {seconds:.0f} s")
        faulthandler.dump_traceback(2, all_threads=True)
        os._exit(WatchdogError.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
