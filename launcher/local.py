"""The ranks of a job on this machine: started together, warned together, and gone together."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from data.errors import EXIT_DONE, DataError, NumericError, Stopped, UserError, WatchdogError

log = logging.getLogger("quintet")

# How long the others have to end by themselves once a rank has left with an error, and then after SIGTERM.
GRACE_SECONDS, LAST_SECONDS = 15.0, 10.0
_POLL_SECONDS = 0.05
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Of several exit codes the first of these says most.
_TELLING = tuple(kind.exit_code for kind in (UserError, DataError, NumericError, WatchdogError))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shares(cores: Sequence[int], ranks: int) -> list[list[int]]:
    """The cores of each rank, neighbours together; all of them for every rank where there are fewer than ranks."""
    each = len(cores) // ranks
    return [list(cores[rank * each : (rank + 1) * each]) if each else list(cores) for rank in range(ranks)]


@contextlib.contextmanager
def forwarding(send: Callable[[signal.Signals], object]) -> Iterator[None]:
    """While entered, signals that ask this process to stop are given to `send` instead."""

    def forward(number: int, frame: FrameType | None) -> None:
        send(signal.Signals(number))

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ranks:
    """`ranks` processes of one command, with the variables that torchrun and deepspeed set.

    They are not in the terminal's process group, so that Ctrl-C reaches them once, through us. The kernel kills them
    when this process is killed.

    Args:
        first: the number of the first of them, where other hosts run ranks, too; world: of all hosts together.
        meet: address and port of rank 0; a free port of this machine when not given.
    """

    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        environment: Mapping[str, str],
        *,
        first: int = 0,
        world: int = 0,
        meet: tuple[str, int] | None = None,
    ) -> None:
        from trainer.preempt import die_with_parent

        self.asked = False  # to stop, by a signal to this process
        self.first, (address, port) = first, meet or ("127.0.0.1", free_port())
        of_job = {"WORLD_SIZE": str(world or ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        of_job |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended_by_us: set[subprocess.Popen[bytes]] = set()
        for rank, cores in enumerate(shares(sorted(os.sched_getaffinity(0)), ranks)):
            of_rank = {"RANK": str(first + rank), "LOCAL_RANK": str(rank)}
            threads = {"OMP_NUM_THREADS": str(len(cores))}
            process = subprocess.Popen(
                command,
                env={**threads, **environment, **of_rank, **of_job},
                start_new_session=True,
                preexec_fn=die_with_parent,  # this process has one thread
            )
            os.sched_setaffinity(process.pid, cores)
            self._processes.append(process)

    @property
    def codes(self) -> list[int]:
        """The exit codes of the ranks, of those that have ended by themselves."""
        return [process.returncode for process in self._processes if process not in self._ended_by_us]

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """While entered, signals to this process go to every rank."""

        def ask(number: signal.Signals) -> None:
            self.asked = True
            self.send(number)

        with forwarding(ask):
            yield

    def wait(self, look: Callable[[], float | None] = lambda: None) -> int:
        """The exit code of the job, once all ranks are gone; after the first error the others have little time.

        Args:
            look: called again and again; seconds that the ranks still have, or None for as long as they like.
        """
        deadline = None
        while running := [process for process in self._processes if process.poll() is None]:
            now, left = time.monotonic(), look()
            if deadline is None and any(process.returncode for process in self._processes):
                deadline = now + GRACE_SECONDS
            elif deadline is None and left is not None:
                deadline = now + left
            elif deadline is not None and now > deadline:
                self._ended_by_us.update(running)
                for process in running:
                    process.send_signal(signal.SIGTERM if now < deadline + LAST_SECONDS else signal.SIGKILL)
                time.sleep(1.0)
            time.sleep(_POLL_SECONDS)
        self._tell()
        return job_code(self.codes)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        for process in self._processes:
            process.send_signal(number)

    def _tell(self) -> None:
        for rank, process in enumerate(self._processes, self.first):
            if process.returncode < 0:
                log.error("rank %d was ended by %s", rank, signal.Signals(-process.returncode).name)


def job_code(codes: Sequence[int]) -> int:
    """One exit code for those of all ranks: the one that says most; for a killed rank that of a shell, 128 + signal."""
    wrong = [code for code in codes if code not in (EXIT_DONE, Stopped.exit_code)]
    for telling in _TELLING:
        if telling in wrong:
            return telling
    if wrong:
        return wrong[0] if wrong[0] > 0 else 128 - wrong[0]
    return Stopped.exit_code if Stopped.exit_code in codes else EXIT_DONE
