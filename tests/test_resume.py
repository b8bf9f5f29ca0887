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

STEPS = 50  # far more than a job gets done between the look at its step and the kill, on any machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume job")  # with a blank, as a user's folder may have


def trajectory(run_dir: Path) -> dict[int, tuple[float, ...]]:
    return {step: tuple(row[name] for name in EXACT) for step, row in jobs.steps(run_dir).items()}


def weights(run_dir: Path, step: int = STEPS) -> dict[str, Any]:
    files = sorted((run_dir / f"checkpoints/step-{step:08d}/model").glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_weights(first: Path, second: Path, step: int = STEPS) -> bool:
    a, b = weights(first, step), weights(second, step)
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    run_dir = folder / "uninterrupted"
    overrides = jobs.settings(folder, run_dir=run_dir, steps=STEPS)
    assert jobs.run(jobs.command(2, overrides), folder / "uninterrupted.log") == 0
    assert sorted(trajectory(run_dir)) == list(range(1, STEPS + 1))
    return run_dir


def test_two_ranks_tell_how_evenly_they_share_a_step_and_how_long_they_talk(uninterrupted: Path):
    for row in jobs.steps(uninterrupted).values():
        parts = [row[f"perf/{name}_s"] for name in ("data", "meet", "encode", "loss", "backward", "optimizer", "other")]
        assert sum(parts) == pytest.approx(row["perf/step_s"])
        assert 0 < row["perf/gather_s"] < row["perf/loss_s"]
        assert row["perf/meet_s"] > 0
        assert 0 <= row["data/token_spread"] < 0.2
        assert [name for name in row if name.startswith("node/")] == ["node/0/cpu_frac", "node/0/mem_frac"]


def kill_after(folder: Path, name: str, arguments: list[str], run_dir: Path, step: int, rank: int) -> None:
    """Start a job, kill -9 one of its ranks once it has logged a step, and see the whole job end in 15 s."""
    job = jobs.start(arguments, folder / f"{name}.log")
    try:
        jobs.wait_for_step(job, run_dir, 1)
        victim = jobs.rank_process(job, rank)
        jobs.wait_for_step(job, run_dir, step)
        while not list(run_dir.glob("checkpoints/step-*")):  # it is written beside the steps
            assert job.poll() is None
            time.sleep(0.02)
        jobs.kill(victim)
        killed_at = time.monotonic()
        assert job.wait(60) != 0
        while jobs.members(job):
            assert time.monotonic() - killed_at < 15, "processes are left"
            time.sleep(0.05)
        assert time.monotonic() - killed_at < 15
    finally:
        jobs.end(job)
    ending = run_dir / "exit.json"  # a rank that outlived the other for a moment may have written it
    assert not ending.exists() or json.loads(ending.read_text())["code"] == 1


def attempts(run_dir: Path) -> dict[int, list[int]]:
    """The steps that every start of a run has trained."""
    found: dict[int, list[int]] = {}
    for row in jobs.metrics(run_dir):
        if "train/loss" in row:
            found.setdefault(row["run/attempt"], []).append(row["train/step"])
    return found


def test_a_rank_killed_in_mid_run_ends_the_job_and_the_next_start_goes_on_bit_for_bit(
    folder: Path, uninterrupted: Path
):
    run_dir = folder / "killed"
    overrides = jobs.settings(folder, run_dir=run_dir, steps=STEPS)
    kill_after(folder, "killed", jobs.deepspeed(2, overrides), run_dir, step=7, rank=1)
    assert jobs.run(jobs.command(2, overrides), folder / "resumed.log") == 0
    assert attempts(run_dir)[2][0] in range(6, STEPS + 1, 5), "the second start goes on from a checkpoint"
    assert trajectory(run_dir) == trajectory(uninterrupted)
    assert same_weights(run_dir, uninterrupted)
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0


def test_sigterm_to_one_rank_stops_all_after_a_checkpoint_with_code_75(folder: Path):
    run_dir = folder / "stopped"
    job = jobs.start(jobs.deepspeed(2, jobs.settings(folder, run_dir=run_dir, steps=2000)), folder / "stopped.log")
    try:
        jobs.wait_for_step(job, run_dir, 3)
        os.kill(jobs.rank_process(job, 1).pid, signal.SIGTERM)
        code = job.wait(60)
    finally:
        jobs.end(job)
    print((folder / "stopped.log").read_text()[-3000:])
    assert code == 75
    stopped_at = max(jobs.steps(run_dir))
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75
    assert (run_dir / f"checkpoints/step-{stopped_at:08d}/done.json").exists()


def test_world_size_and_stage_may_change_between_starts(folder: Path):
    """2 -> 4 -> 1 ranks, ZeRO-2 -> 3 -> 0, against 2 ranks of ZeRO-1 throughout: same batches, losses within 1e-5.

    The optimizer's state goes along. Dropout is off: its masks belong to chunks, and other ranks cut other chunks.
    """
    changes = {"model.dropout": 0.0, "steps": STEPS}
    steady, moved = folder / "steady", folder / "moved"
    assert jobs.run(jobs.command(2, jobs.settings(folder, run_dir=steady, **changes)), folder / "steady.log") == 0
    for world, stage, last in ((2, 2, 3), (4, 3, 8), (1, 0, STEPS)):
        command = jobs.command(world, jobs.settings(folder, run_dir=moved, zero_stage=stage, **changes))
        if last < STEPS:
            stop_after(folder, f"moved-{world}", command, moved, last)
        else:
            assert jobs.run(command, folder / f"moved-{world}.log") == 0
    one, other = jobs.steps(steady), jobs.steps(moved)
    assert sorted(one) == sorted(other) == list(range(1, STEPS + 1))
    assert sorted(attempts(moved)) == [1, 2, 3]
    assert sum(len(steps) for steps in attempts(moved).values()) == STEPS, "no step was done twice"
    for step in one:
        assert other[step]["data/batch_hash"] == one[step]["data/batch_hash"]
        assert other[step]["train/loss"] == pytest.approx(one[step]["train/loss"], rel=1e-5)


@pytest.mark.parametrize(("stage", "workers"), [(2, 1), (3, 2)])
def test_every_stage_resumes_bit_for_bit_whatever_threads_read_the_data(folder: Path, stage: int, workers: int):
    """Stage 1 is what the other tests run."""
    steady, stopped = folder / f"steady-{stage}", folder / f"resumed-{stage}"
    changes = {"zero_stage": stage, "steps": 20, "tokens_per_chunk": 64}
    words = jobs.settings(folder, run_dir=steady, data_workers=1, **changes)
    assert jobs.run(jobs.command(2, words), folder / f"steady-{stage}.log") == 0
    command = jobs.command(2, jobs.settings(folder, run_dir=stopped, data_workers=workers, **changes))
    stop_after(folder, f"stopped-{stage}", command, stopped, 4)
    assert jobs.run(command, folder / f"resumed-{stage}.log") == 0
    assert sorted(attempts(stopped)) == [1, 2]
    assert trajectory(stopped) == trajectory(steady)
    assert same_weights(stopped, steady, 20)


def stop_after(folder: Path, name: str, arguments: list[str], run_dir: Path, step: int) -> None:
    """Start a job, ask it to stop once it has logged a step, and see it leave with a checkpoint."""
    job = jobs.start(arguments, folder / f"{name}.log")
    try:
        jobs.wait_for_step(job, run_dir, step)
        (run_dir / "STOP").touch()
        assert job.wait(60) == 75, (folder / f"{name}.log").read_text()[-3000:]
    finally:
        jobs.end(job)
