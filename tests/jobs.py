"""Real training jobs for tests: what they train on, how they are started, watched and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pairs
import psutil
import tiny

ROOT = Path(__file__).parent.parent
QUINTET = str(Path(sys.executable).parent / "quintet")
DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def settings(folder: Path, **changes: Any) -> list[str]:
    """Overrides of a small job whose data and model stand in `folder` (made on first use)."""
    if not (folder / "shards").exists():
        tiny.bert(folder / "bert")
        pairs.write_shards(folder / "shards", pairs.pairs(300), block_records=32)
    values = {
        "data": folder / "shards",
        "model.path": folder / "bert",
        "batch_size": 16,
        "lanes": 4,
        "steps": 12,
        "warmup_steps": 3,
        "lr": 0.005,
        "max_length": 24,
        "tokens_per_chunk": 128,
        "memory_budget_gib": 0.0002,  # some graphs are kept and some chunks replayed
        "log_every": 1,
        "save_every_steps": 5,
        "wandb.mode": "disabled",
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


def command(ranks: int, overrides: list[str]) -> list[str]:
    """`quintet pretrain` as one process, or several under our own launcher, which finds a free port."""
    if ranks == 1:
        return [QUINTET, "pretrain", *overrides]
    return [QUINTET, "launch", "--ranks", str(ranks), "--restarts", "0", "pretrain", *overrides]


def deepspeed(ranks: int, overrides: list[str]) -> list[str]:
    """The same under DeepSpeed's launcher."""
    launcher = [DEEPSPEED, "--num_accelerators", str(ranks), "--master_port", "29650"]
    return [*launcher, "--no_python", "--no_local_rank", QUINTET, "pretrain", *overrides]


def environment() -> dict[str, str]:
    """What a job starts with: nothing of the ranks that ran inside this process, or `rank_process` finds others."""
    clean = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    return {**clean, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": bin_first()}


def bin_first() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a job in a process group of its own, its output going to a file."""
    with open(log, "wb") as output:
        return subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )


def run(arguments: list[str], log: Path, timeout_seconds: float = 240) -> int:
    """Run a job to its end and return its exit code; a failing test shows the log."""
    job = start(arguments, log)
    try:
        code = job.wait(timeout_seconds)
    finally:
        end(job)
    print(log.read_text(errors="replace")[-5000:])
    return code


def end(job: subprocess.Popen[bytes]) -> None:
    """Leave nothing of a job behind."""
    for process in members(job):
        process.kill()
    if job.poll() is None:
        job.kill()
    job.wait()


def members(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The living processes of a job: those of its session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == job.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def rank_process(job: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process of one rank."""
    for process in members(job):
        arguments = process.cmdline()
        if any(argument == "pretrain" for argument in arguments) and process.environ().get("LOCAL_RANK") == str(rank):
            return process
    raise AssertionError(f"rank {rank} is not there")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What a run has logged so far."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def steps(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The last row of every training step."""
    return {row["train/step"]: row for row in metrics(run_dir) if "train/loss" in row}


def wait_for_step(job: subprocess.Popen[bytes], run_dir: Path, step: int, timeout_seconds: float = 120) -> None:
    """Return when the job has logged a step."""
    deadline = time.monotonic() + timeout_seconds
    while max(steps(run_dir), default=0) < step:
        assert job.poll() is None, f"the job ended with {job.returncode} before step {step}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
