"""Requests to stop, with real signals sent to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.preempt import SIGNALS, STOP_FILE, WARNINGS, StopRequest, leaving_when_warned

ROOT = Path(__file__).resolve().parent.parent


def _start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_and_handlers_come_back(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with StopRequest(tmp_path) as stop:
        asked = [stop.requested]
        os.kill(os.getpid(), number)
        asked.append(stop.requested)
    assert asked == [False, True]
    assert stop.reason == number.name
    assert signal.getsignal(number) == before


def test_a_rank_that_leaves_with_its_checkpoint_is_not_ended_by_a_further_signal(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from data.errors import Stopped
from trainer.preempt import StopRequest
try:
    with StopRequest(sys.argv[1]):
        raise Stopped("saved")
except Stopped:
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive")
"""
    with _start(code, tmp_path) as process:
        said, _ = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "alive\n")


def test_a_file_asks_to_stop_once(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as stop:
        (tmp_path / STOP_FILE).touch()
        assert stop.requested
        assert stop.reason == STOP_FILE
    with StopRequest(tmp_path) as stop:
        assert not stop.requested


def test_a_request_that_nobody_looked_for_stays(tmp_path: Path) -> None:
    with StopRequest(tmp_path):  # such as a second job's, which is refused before its first step
        (tmp_path / STOP_FILE).touch()
    assert (tmp_path / STOP_FILE).exists()


def test_only_rank_0_looks_for_the_file(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    with StopRequest(tmp_path, rank=1) as stop:
        assert not stop.requested
    assert (tmp_path / STOP_FILE).exists()


_INTERRUPTED = """
import sys, time
from trainer.preempt import StopRequest
with StopRequest(sys.argv[1]) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("first", flush=True)
    time.sleep(60)
"""


def test_a_second_interrupt_ends_the_process_at_once(tmp_path: Path) -> None:
    with _start(_INTERRUPTED, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "first\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
        assert process.returncode == -signal.SIGINT
        assert "Ctrl-C again" in said


_BUSY = """
import hashlib
from trainer.preempt import leaving_when_warned
with leaving_when_warned(75):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which Python runs no handler
"""


@pytest.mark.parametrize("number", WARNINGS)
def test_a_warning_ends_a_stage_at_once_even_inside_a_call_that_does_not_return(number: signal.Signals) -> None:
    with _start(_BUSY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=10)
        assert process.returncode == 75
        assert f"{number.name}: what is finished is kept" in said


def test_a_stage_that_ends_gives_its_signals_back() -> None:
    def own(number: int, frame: object) -> None: ...

    found = {number: signal.signal(number, own) for number in WARNINGS}
    try:
        with leaving_when_warned(75):
            assert own not in [signal.getsignal(number) for number in WARNINGS]
        assert [signal.getsignal(number) for number in WARNINGS] == [own, own]
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


_LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
sys.stdin.read()
"""
_RANK = """
import os, time
from trainer.preempt import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of the Linux kernel")
def test_a_rank_ends_with_its_killed_launcher() -> None:
    command = [sys.executable, "-c", _LAUNCHER, _RANK]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        launcher.kill()
        # The rank holds the other end of the pipe: the end of the file comes while it ends.
        started = time.monotonic()
        assert launcher.stdout.read() == ""
        while _running(rank):
            assert time.monotonic() - started < 10
            time.sleep(0.01)


def _running(pid: int) -> bool:
    """Whether a process is there; an orphan that has ended and that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
