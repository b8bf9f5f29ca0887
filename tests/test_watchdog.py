"""A job that hangs ends in time, with code 124, the rank that is waited for, and the stacks of those that live."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jobs
import psutil
import pytest
from test_launch import ranks_of
from test_resume import trajectory

from launcher.local import GRACE_SECONDS, LAST_SECONDS
from trainer.watchdog import Beat, Heard, blame

LIMIT = 4.0  # seconds, in place of minutes
LIMITS = {"step_timeout_minutes": LIMIT / 60, "timeout_minutes": 4 * LIMIT / 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hanging jobs")


def beat(step: int, section: str, host: str = "a", count: int = 9) -> Beat:
    return Beat(count, host, step, section, 700.0)


def test_a_rank_that_is_not_heard_of_is_named_before_one_that_is_behind() -> None:
    others = {1: Heard(beat(17, "data"), 1.0), 2: Heard(beat(17, "step", "b"), 31.0)}
    found = blame(beat(17, "step"), others, 15.0)
    assert found == "rank 2 on b has not been heard of for 31 s, it was in step of step 17"


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (beat(17, "data"), "rank 3 on a is in data of step 17 for 700 s"),  # reads while the others wait in the step
        (beat(16, "save"), "rank 3 on a is in save of step 16 for 700 s"),
        (beat(17, "step"), ""),  # as far as this one
        (beat(18, "data"), ""),  # ahead
    ],
)
def test_a_rank_is_behind_by_its_step_and_then_by_its_section(there: Beat, named: str) -> None:
    assert blame(beat(17, "step"), {3: Heard(there, 2.0)}, 15.0) == named


_ALONE = """
import sys, time
from trainer.watchdog import Watchdog
with Watchdog(sys.argv[1], {"data": 0.5, "save": 30.0}, store=None) as dog:
    for step in range(30):
        dog.at("data", step)  # moves on in time
        time.sleep(0.05)
    dog.at("save", step)
    time.sleep(1.5)  # longer than data may take
    print("alive", flush=True)
    dog.at("data", step)
    time.sleep(60)
"""


def test_a_rank_ends_in_the_section_that_takes_too_long_and_in_no_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(tmp_path)], capture_output=True, text=True, timeout=30, cwd=jobs.ROOT
    )
    assert done.returncode == 124
    assert done.stdout == "alive\n"
    assert "rank 0" in done.stderr
    assert "in data of step 29 for" in done.stderr
    stacks = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert "in data of step 29" in stacks
    assert 'File "<string>", line 12' in stacks
    ending = json.loads((tmp_path / "exit.json").read_text())
    assert (ending["code"], ending["step"]) == (124, 29)


def test_a_process_that_was_stopped_and_goes_on_is_not_ended(tmp_path: Path) -> None:
    text = _ALONE.replace("0.5", "2.0").replace("sleep(60)", "sleep(0.5); print('done', flush=True)")
    with subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path)], stdout=subprocess.PIPE, cwd=jobs.ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"alive\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4.0)  # twice the limit
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == b"done\n"
        assert process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_the_job_resumes_to_the_same_losses(folder: Path, stopped: int) -> None:
    """Rank 0 keeps the list in which ranks tell where they are, so its stop is another case."""
    run_dir, log = folder / f"stopped-{stopped}", folder / f"stopped-{stopped}.log"
    words = [*jobs.settings(folder, run_dir=run_dir, steps=60), *(f"{name}={value}" for name, value in LIMITS.items())]
    command = [jobs.QUINTET, "launch", "--ranks", "2", "pretrain", *words]
    job = jobs.start(command, log)
    try:
        jobs.wait_for_step(job, run_dir, 7)
        ranks = ranks_of(job)
        os.kill(ranks[stopped].pid, signal.SIGSTOP)
        begin = time.monotonic()
        assert job.wait(LIMIT + GRACE_SECONDS + LAST_SECONDS + 20) == 124
        said = log.read_text()
        assert time.monotonic() - begin < LIMIT + 35
        assert not [rank for rank in ranks.values() if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    finally:
        jobs.end(job)
    other = 1 - stopped
    named = (
        "rank 0 does not answer" if stopped == 0 else f"rank {stopped} on {socket.gethostname()} has not been heard of"
    )
    (line,) = [line for line in said.splitlines() if line.startswith("quintet watchdog")]
    assert f"rank {other} on" in line
    assert named in line
    assert "of step" in line
    assert "trainer/loop.py" in (run_dir / "stacks" / f"rank-{other}.txt").read_text()
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 124
    if stopped:  # what resumes is the same for both
        assert jobs.run(command, log) == 0
        steady = folder / "steady"
        words = jobs.settings(folder, run_dir=steady, steps=60)
        assert jobs.run([jobs.QUINTET, "launch", "--ranks", "2", "pretrain", *words], folder / "steady.log") == 0
        assert trajectory(run_dir) == trajectory(steady)


@contextmanager
def held_port() -> Iterator[int]:
    """A port of this machine on which somebody listens and never answers."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(16)
        yield holder.getsockname()[1]


def start_rank(folder: Path, rank: int, port: int, **changes: object) -> tuple[int, str, float]:
    """One rank of two, of which the other never comes: exit code, output, seconds."""
    of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    met = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = jobs.settings(folder, run_dir=folder / f"never-{rank}-{port}", **changes)
    begin = time.monotonic()
    done = subprocess.run(
        [jobs.QUINTET, "pretrain", *words],
        env={**jobs.environment(), **of_rank, **met},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr, time.monotonic() - begin


def test_ranks_that_do_not_meet_end_in_time_and_name_the_address(folder: Path) -> None:
    with held_port() as port:
        code, said, _ = start_rank(folder, 1, port, start_timeout_minutes=3 / 60)
    assert code == 124
    assert f"rank 1 of 2 has not met the others at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)" in said
    assert "firewall" in said


def test_a_first_rank_that_stays_alone_ends_in_time(folder: Path) -> None:
    with held_port() as port:
        free = port
    code, said, _ = start_rank(folder, 0, free, start_timeout_minutes=3 / 60)
    assert code == 124
    assert f"rank 0 of 2 has not met the others at 127.0.0.1:{free}" in said


def test_a_port_in_use_is_named_with_its_mend(folder: Path) -> None:
    with held_port() as port:
        code, said, _ = start_rank(folder, 0, port)
    assert code == 2
    assert f"MASTER_PORT={port}" in said
    assert "set MASTER_PORT to a free one" in said
    assert "Traceback" not in said


def test_a_start_compiles_nothing_and_does_not_wait_for_the_lock_of_a_dead_build(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's builder of extensions waits for such a lock without end; nothing of ours is built by it."""
    compiler = folder / "bin/gcc"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\necho "$@" >>"{folder}/compiled"\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    for name in ("deepspeed_shm_comm", "fused_adam", "cpu_adam"):
        (folder / "extensions" / name).mkdir(parents=True, exist_ok=True)
        (folder / "extensions" / name / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
    words = jobs.settings(folder, run_dir=folder / "locked", steps=4)
    assert jobs.run([jobs.QUINTET, "launch", "--ranks", "2", "pretrain", *words], folder / "locked.log", 110) == 0
    assert not (folder / "compiled").exists()
