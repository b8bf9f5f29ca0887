"""Real jobs that are killed, stopped and resumed at other world sizes, against an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jobs
import pytest
from safetensors.torch import load_file

# Equal, bit for bit, in a run that was interrupted and one that was not.
EXACT = ("train/loss", "train/grad_norm", "train/lr", "train/acc_top1", "data/batch_hash", "train/samples_seen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume job")  # with a blank, as a user's folder may have


def trajectory(run_dir: Path) -> dict[int, tuple[float, ...]]:
    return {step: tuple(row[name] for name in EXACT) for step, row in jobs.steps(run_dir).items()}


def weights(run_dir: Path, step: int = 12) -> dict[str, Any]:
    files = sorted((run_dir / f"checkpoints/step-{step:08d}/model").glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_weights(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    run_dir = folder / "uninterrupted"
    overrides = jobs.settings(folder, run_dir=run_dir)
    assert jobs.run(jobs.command(2, overrides), folder / "uninterrupted.log") == 0
    assert sorted(trajectory(run_dir)) == list(range(1, 13))
    return run_dir


def test_a_rank_killed_in_mid_run_ends_the_job_and_the_next_start_goes_on_bit_for_bit(
    folder: Path, uninterrupted: Path
):
    run_dir = folder / "killed"
    arguments = jobs.command(2, jobs.settings(folder, run_dir=run_dir))
    job = jobs.start(arguments, folder / "killed.log")
    try:
        jobs.wait_for_step(job, run_dir, 7)
        jobs.kill(jobs.rank_process(job, 1))
        killed_at = time.monotonic()
        assert job.wait(60) != 0
        while jobs.members(job):
            assert time.monotonic() - killed_at < 15, "processes are left"
            time.sleep(0.05)
        assert time.monotonic() - killed_at < 15
    finally:
        jobs.end(job)
    assert json.loads((run_dir / "exit.json").read_text())["code"] != 0 if (run_dir / "exit.json").exists() else True
    assert jobs.run(arguments, folder / "resumed.log") == 0
    resumed = [row["train/step"] for row in jobs.metrics(run_dir) if row["run/attempt"] == 2 and "train/loss" in row]
    assert resumed[0] in (6, 11), "the second start goes on from a checkpoint"
    assert trajectory(run_dir) == trajectory(uninterrupted)
    assert same_weights(run_dir, uninterrupted)
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0


def test_sigterm_to_one_rank_stops_all_after_a_checkpoint_with_code_75(folder: Path, uninterrupted: Path):
    run_dir = folder / "stopped"
    overrides = jobs.settings(folder, run_dir=run_dir, zero_stage=1)
    job = jobs.start(jobs.command(1, overrides), folder / "stopped.log")
    try:
        jobs.wait_for_step(job, run_dir, 3)
        os.kill(job.pid, signal.SIGTERM)
        assert job.wait(60) == 75
    finally:
        jobs.end(job)
    stopped_at = max(jobs.steps(run_dir))
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75
    assert (run_dir / f"checkpoints/step-{stopped_at:08d}/done.json").exists()


def test_world_size_may_change_between_starts(folder: Path):
    """2 -> 1 -> 2 ranks against 2 ranks throughout: the same batches, losses within 1e-5. Dropout is off, since
    its masks belong to chunks, and other ranks cut other chunks."""
    changes = {"model.dropout": 0.0, "steps": 12, "save_every_steps": 4}
    steady, moved = folder / "steady", folder / "moved"
    assert jobs.run(jobs.command(2, jobs.settings(folder, run_dir=steady, **changes)), folder / "steady.log") == 0
    for ranks, last in ((2, 4), (1, 8), (2, 12)):
        arguments = jobs.settings(folder, run_dir=moved, **changes)
        job = jobs.start(jobs.command(ranks, arguments), folder / "moved.log")
        try:
            if last < 12:
                jobs.wait_for_step(job, moved, last)
                (moved / "STOP").touch()
            code = job.wait(120)
        finally:
            jobs.end(job)
        print((folder / "moved.log").read_text()[-3000:])
        assert code == (75 if last < 12 and max(jobs.steps(moved)) < 12 else 0) or ranks == 2
    one, other = jobs.steps(steady), jobs.steps(moved)
    assert sorted(one) == sorted(other) == list(range(1, 13))
    for step in one:
        assert other[step]["data/batch_hash"] == one[step]["data/batch_hash"]
        assert other[step]["train/loss"] == pytest.approx(one[step]["train/loss"], rel=1e-5)
