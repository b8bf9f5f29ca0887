"""`quintet launch` with real jobs: what it starts, how it ends, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import psutil
import pytest
from test_resume import trajectory

from data.errors import UserError
from launcher import cli, local
from launcher.local import job_code, shares
from trainer import distributed

LAUNCH = [jobs.QUINTET, "launch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launched jobs")


def ranks_of(job: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The ranks of a job by their number; each leads a session of its own."""
    found = {}
    for process in psutil.Process(job.pid).children():
        found[int(process.environ()["RANK"])] = process
    return found


def start(folder: Path, name: str, *options: str, **changes: object) -> tuple[subprocess.Popen[bytes], Path]:
    run_dir = folder / name
    words = [*LAUNCH, "--ranks", "2", *options, "pretrain", *jobs.settings(folder, run_dir=run_dir, **changes)]
    return jobs.start(words, folder / f"{name}.log"), run_dir


def gone(processes: list[psutil.Process], seconds: float = 15) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_two_ranks_give_the_losses_of_one_launcher_and_of_the_other(folder: Path) -> None:
    steady = folder / "steady"
    assert jobs.run(jobs.command(2, jobs.settings(folder, run_dir=steady)), folder / "steady.log") == 0
    job, run_dir = start(folder, "launched")
    assert job.wait(120) == 0, (folder / "launched.log").read_text()
    assert trajectory(run_dir) == trajectory(steady)


def test_a_stopped_run_leaves_with_75_and_nothing_of_it_stays(folder: Path) -> None:
    job, run_dir = start(folder, "stopped", steps=2000)
    try:
        jobs.wait_for_step(job, run_dir, 3)
        ranks = list(ranks_of(job).values())
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 75
        assert gone(ranks)
    finally:
        jobs.end(job)
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75


def test_a_preempted_run_is_started_again_within_its_budget(folder: Path) -> None:
    """A spot instance's notice is the file STOP: nobody has asked the launcher to leave."""
    job, run_dir = start(folder, "preempted", "--restarts", "1", steps=2000)
    try:
        for attempt in (1, 2):
            while not jobs.metrics(run_dir) or jobs.metrics(run_dir)[-1]["run/attempt"] != attempt:
                assert job.poll() is None
                time.sleep(0.1)
            (run_dir / "STOP").touch()
        assert job.wait(60) == 75
    finally:
        jobs.end(job)
    log = (folder / "preempted.log").read_text()
    assert log.count("restart 1 of 1") == 1
    assert "after 1 restarts, the most" in log


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_the_job_along_with_an_error_that_names_it(folder: Path, rank: int) -> None:
    job, run_dir = start(folder, f"killed-{rank}", steps=2000)
    try:
        jobs.wait_for_step(job, run_dir, 2)
        ranks = ranks_of(job)
        ranks[rank].kill()
        assert job.wait(40) not in (0, 75)
        assert gone(list(ranks.values()))
    finally:
        jobs.end(job)
    assert f"rank {rank} was ended by SIGKILL" in (folder / f"killed-{rank}.log").read_text()


def test_a_killed_launcher_takes_its_ranks_along(folder: Path) -> None:
    job, run_dir = start(folder, "orphans", steps=2000)
    jobs.wait_for_step(job, run_dir, 1)
    ranks = list(ranks_of(job).values())
    job.kill()
    job.wait()
    assert gone(ranks)


def test_ranks_that_leave_with_0_and_no_word_of_it_are_not_believed(tmp_path: Path, capsys) -> None:
    """A training that crashed long ago left no exit.json; a false `quintet` stands for ranks that end too early."""
    launcher = """
import os, sys
from launcher import launch, local
from pathlib import Path
def start(): return local.Ranks(["true"], 2, os.environ)
print(launch._once(start, Path(sys.argv[1]))[0], launch._once(start, None)[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", launcher, tmp_path], capture_output=True, text=True, timeout=60, cwd=cli.__file__[:-16]
    )
    assert done.stdout.split() == ["1", "0"], done.stderr


def test_a_rank_that_hangs_after_another_failed_is_ended_and_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(local, "LAST_SECONDS", 0.5)
    deaf = 'if [ "$RANK" = 0 ]; then exit 3; fi; trap "" TERM; while true; do sleep 0.1; done'
    job = local.Ranks(["bash", "-c", deaf], 2, os.environ)
    assert job.wait() == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pack", "input=x"], "pack: not a stage that runs on several ranks"),
        (["--ranks", "0", "pretrain"], "--ranks 0: must be at least 1"),
        (["--ranks", "two", "pretrain"], "two"),
        (["--restarts", "-1", "pretrain"], "--restarts -1"),
        (["pretrain", "data=x", "learning_rate=1"], "learning_rate"),
        (["pretrian"], "pretrian: not a stage"),
        (["--ranks", "2", "--hostfile", "hosts", "pretrain"], "choose one"),
        (["--hostfle", "hosts", "pretrain"], "--hostfle: no such option; did you mean --hostfile?"),
        (["--sbatch=--nodes=2", "pretrain"], "--sbatch --nodes=2: goes with --slurm"),
    ],
)
def test_mistakes_start_nothing(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", *words]) == 2
    assert said in capsys.readouterr().err


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch"]) == 0
    assert "--restarts N" in capsys.readouterr().out
    assert cli.main(["launch", "pretrain", "--help"]) == 0
    assert "batch_size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([1, 2], 2),
        ([1, 124], 124),
        ([-9, 1], 137),
        ([75, 1], 1),
        ([4, 75], 4),
    ],
)
def test_the_code_that_says_most_is_the_jobs(codes: list[int], wanted: int) -> None:
    assert job_code(codes) == wanted


def test_cores_are_dealt_out_in_runs() -> None:
    assert shares([0, 1, 2, 3, 8, 9], 2) == [[0, 1, 2], [3, 8, 9]]
    assert shares([0, 1, 2], 2) == [[0], [1]]
    assert shares([4, 5], 3) == [[4, 5]] * 3


def test_a_host_that_does_not_see_the_shared_folder_says_so(tmp_path: Path) -> None:
    words, environment = [*LAUNCH, "--on-host", str(tmp_path / "board")], {**jobs.environment(), "RANK": "1"}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert f"is not there on {os.uname().nodename}; run_dir must lie on a disk that all hosts share" in ended.stderr


def test_an_address_that_is_missing_or_unknown_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_NNODES", "2")
    with pytest.raises(UserError, match=r"MASTER_ADDR is not set: start with slurm/pretrain\.sh"):
        distributed._complete_rendezvous()
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("MASTER_PORT", "29000")
    with pytest.raises(UserError, match=r"MASTER_ADDR=nowhere\.invalid does not resolve"):
        distributed._complete_rendezvous()
