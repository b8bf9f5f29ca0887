"""What tests/soak.sh runs: rounds of one job under faults drawn from a seed, each compared with an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jobs
import psutil
from test_launch import ranks_of
from test_resume import attempts, same_weights, trajectory

STEPS, SAVE_EVERY = 400, 20
SETTINGS = {
    "steps": STEPS,
    "save_every_steps": SAVE_EVERY,
    "step_timeout_minutes": 6 / 60,
    "timeout_minutes": 30 / 60,
}
PAUSE = (4.0, 14.0)  # seconds between a step of a start and its fault
ENDS_WITHIN = 120.0  # seconds from a fault to the end of the job

Fault = Callable[[subprocess.Popen[bytes], Path, random.Random], None]


def _kill_a_rank(job: subprocess.Popen[bytes], run_dir: Path, draw: random.Random) -> None:
    os.kill(draw.choice(list(ranks_of(job).values())).pid, signal.SIGKILL)


def _stop_a_rank(job: subprocess.Popen[bytes], run_dir: Path, draw: random.Random) -> None:
    os.kill(draw.choice(list(ranks_of(job).values())).pid, signal.SIGSTOP)


def _warn_a_rank(job: subprocess.Popen[bytes], run_dir: Path, draw: random.Random) -> None:
    os.kill(draw.choice(list(ranks_of(job).values())).pid, signal.SIGTERM)


def _warn_the_launcher(job: subprocess.Popen[bytes], run_dir: Path, draw: random.Random) -> None:
    job.send_signal(signal.SIGTERM)


def _kill_the_launcher(job: subprocess.Popen[bytes], run_dir: Path, draw: random.Random) -> None:
    job.kill()


def _stop_file(job: subprocess.Popen[bytes], run_dir: Path, draw: random.Random) -> None:
    (run_dir / "STOP").touch()


# Each with the exit codes that may follow: 0 where the job was done before it was met, 75 after a checkpoint.
FAULTS: dict[str, tuple[Fault, set[int]]] = {
    "rank killed": (_kill_a_rank, {0, 1, 137}),
    "rank stopped": (_stop_a_rank, {0, 124}),
    "SIGTERM to a rank": (_warn_a_rank, {0, 75}),
    "SIGTERM to the launcher": (_warn_the_launcher, {0, 75}),
    "launcher killed": (_kill_the_launcher, {0, -9}),
    "STOP file": (_stop_file, {0, 75}),
}


def main(minutes: float, seed: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    draw, end, faults = random.Random(seed), time.monotonic() + 60 * minutes, Counter[str]()
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"] = str(folder / "tmp")  # of the jobs, so that nobody else's files are taken for theirs
    shared_memory = set(os.listdir("/dev/shm"))
    steady = folder / "steady"
    command = [jobs.QUINTET, "launch", "--ranks", "2", "--restarts", "0", "pretrain"]
    assert jobs.run([*command, *jobs.settings(folder, run_dir=steady, **SETTINGS)], folder / "steady.log") == 0
    rounds = wasted = starts = 0
    while time.monotonic() < end:
        run_dir = folder / f"round-{rounds}"
        _round([*command, *jobs.settings(folder, run_dir=run_dir, **SETTINGS)], run_dir, draw, faults)
        assert trajectory(run_dir) == trajectory(steady), f"{run_dir}: other losses"
        assert same_weights(run_dir, steady, STEPS), f"{run_dir}: other weights"
        trained = attempts(run_dir)
        again = sum(map(len, trained.values())) - STEPS
        assert again <= SAVE_EVERY * (len(trained) - 1), f"{again} steps were done again in {len(trained)} starts"
        rounds, wasted, starts = rounds + 1, wasted + again, starts + len(trained)
        assert not [process for process in psutil.process_iter() if _works_in(process, run_dir)], "processes are left"
        print(
            f"round {rounds}: {len(trained)} starts, {again} steps done again, losses and weights identical", flush=True
        )
    left = [*(set(os.listdir("/dev/shm")) - shared_memory), *os.listdir(folder / "tmp")]
    assert not left, f"left behind in /dev/shm or among temporary files: {sorted(left)}"
    told = ", ".join(f"{count} x {name}" for name, count in faults.most_common())
    print(f"{rounds} rounds of {STEPS} steps, {starts} starts, {sum(faults.values())} faults ({told})")
    print(f"every round bit-identical to the undisturbed run; {wasted} steps done again; nothing left behind")


def _round(command: list[str], run_dir: Path, draw: random.Random, faults: Counter[str]) -> None:
    """Start the job, and again after every fault, until it says that it is done."""
    while True:
        done_before = max(jobs.steps(run_dir), default=0)
        job = jobs.start(command, run_dir.with_suffix(".log"))
        try:
            name, (fault, allowed) = draw.choice(list(FAULTS.items()))
            pause = draw.uniform(*PAUSE)
            while job.poll() is None and max(jobs.steps(run_dir), default=0) <= min(done_before, STEPS - 1):
                time.sleep(0.1)
            time.sleep(pause)
            if job.poll() is None:
                fault(job, run_dir, draw)
                faults[name] += 1
                begin = time.monotonic()
                code = job.wait(ENDS_WITHIN)
                print(f"  {name}: exit code {code} after {time.monotonic() - begin:.0f} s", flush=True)
                assert code in allowed, run_dir.with_suffix(".log").read_text()[-3000:]
            if job.wait() == 0:
                return
        finally:
            jobs.end(job)
        _wait_for_the_ranks_to_go(run_dir)


def _wait_for_the_ranks_to_go(run_dir: Path) -> None:
    deadline = time.monotonic() + 15
    while any(_works_in(process, run_dir) for process in psutil.process_iter()):
        assert time.monotonic() < deadline, f"{run_dir}: ranks are left"
        time.sleep(0.2)


def _works_in(process: psutil.Process, run_dir: Path) -> bool:
    try:
        return f"run_dir={run_dir}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
