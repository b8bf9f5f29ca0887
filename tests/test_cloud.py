"""Runs on machines that come and go: restored from object storage, stopped by a cloud's notice, on fresh hosts."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
from test_resume import same_weights, trajectory
from test_spot import Service, service

from data import fetch
from launcher import cli
from trainer import checkpoint, remote

__all__ = ["service"]  # a fixture

STEPS = 80  # far more than a job gets done between the look at its mirror and the kill, on any machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cloud")


def mirror_of(store: Path) -> Path:
    """The folder of the run that a mirror names."""
    return store / json.loads((store / "run.json").read_text())["id"]


def wait_for(job: subprocess.Popen[bytes], there: Callable[[], bool]) -> None:
    while not there():
        assert job.poll() is None, f"the job ended with {job.returncode}"
        time.sleep(0.02)


# --- a run folder that is lost ----------------------------------------------------------------------------------------


def test_a_killed_run_whose_folder_is_gone_goes_on_bit_for_bit_from_its_mirror(folder: Path) -> None:
    whole, run_dir, store = folder / "whole", folder / "lost", folder / "store"
    assert jobs.run(jobs.command(1, jobs.settings(folder, run_dir=whole, steps=STEPS)), folder / "whole.log") == 0
    arguments = jobs.command(1, jobs.settings(folder, run_dir=run_dir, steps=STEPS, mirror=f"file://{store}"))
    job = jobs.start(arguments, folder / "killed.log")
    try:
        wait_for(job, lambda: any(store.glob("*/checkpoints/step-*/done.json")))
        job.kill()
        job.wait(60)
    finally:
        jobs.end(job)
    shutil.rmtree(run_dir)
    assert jobs.run(arguments, folder / "restored.log") == 0
    assert f"was restored from mirror=file://{store}" in (folder / "restored.log").read_text()
    first = min(row["train/step"] for row in jobs.metrics(run_dir) if row["run/attempt"] == 2)
    wanted = trajectory(whole)
    assert {step: row for step, row in trajectory(run_dir).items() if step >= first} == {
        step: row for step, row in wanted.items() if step >= first
    }
    assert 1 < first < STEPS
    assert same_weights(whole, run_dir, STEPS)
    there = mirror_of(store)
    assert json.loads((there / "exit.json").read_text())["code"] == 0
    kept = sorted(path.name for path in (there / "checkpoints").iterdir())
    assert kept[-1] == f"step-{STEPS:08d}"
    assert len(kept) <= 2  # keep_last; one that still waits when the next is saved is left out
    assert (there / "metrics.jsonl").read_bytes() == (run_dir / "metrics.jsonl").read_bytes()
    (model,) = (there / "model").glob("*.safetensors")
    assert model.read_bytes() == (run_dir / "model" / model.name).read_bytes()


# --- a machine that is taken back -------------------------------------------------------------------------------------


def test_a_spot_notice_stops_all_ranks_with_75_once_the_mirror_has_the_checkpoint(
    folder: Path, service: type[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, store = folder / "taken", folder / "of taken"
    changes = {"steps": 2000, "mirror": f"file://{store}", "preemption": "aws", "save_every_steps": 0}
    job = jobs.start(jobs.command(2, jobs.settings(folder, run_dir=run_dir, **changes)), folder / "taken.log")
    try:
        jobs.wait_for_step(job, run_dir, 3)
        service.taken = True
        code = job.wait(120)
    finally:
        jobs.end(job)
    said = (folder / "taken.log").read_text()
    print(said[-3000:])
    assert code == 75
    assert said.count("preemption=aws: the cloud takes this machine back") == 1, "one rank of a host asks"
    stopped_at = max(jobs.steps(run_dir))
    assert [path.name for path in (mirror_of(store) / "checkpoints").iterdir()] == [f"step-{stopped_at:08d}"]
    assert checkpoint.verify(mirror_of(store) / "checkpoints" / f"step-{stopped_at:08d}") == []
    assert json.loads((mirror_of(store) / "exit.json").read_text())["code"] == 75


def test_a_mirror_that_fails_never_stops_a_run_and_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "FIRST_WAIT_SECONDS", 0.01)
    run_dir, store = folder / "unmirrored", folder / "full"
    begin = remote.Mirror.begin

    def begin_and_break(mirror: remote.Mirror, run_id: str, saved: checkpoint.Checkpoint | None) -> None:
        begin(mirror, run_id, saved)
        mirror_of(store).write_text("a file where the run's folder should be")

    monkeypatch.setattr(remote.Mirror, "begin", begin_and_break)
    words = jobs.settings(folder, run_dir=run_dir, steps=12, mirror=store)
    assert cli.main(["pretrain", *words]) == 0
    said = capsys.readouterr().err
    assert "lacks the end of the run" in said or "lacks what was not copied" in said
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
    assert (run_dir / "model").is_dir()
