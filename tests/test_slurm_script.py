"""The scripts of slurm/ with false srun and scontrol on PATH: what ranks see, and what the job does when they end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from launcher import cli

SCRIPT = Path(__file__).parent.parent / "slurm" / "pretrain.sh"
STAGES = ["pretrain", "finetune", "teacher", "filter", "mine", "distill", "evaluate"]


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A folder with srun, which records its arguments and environment, and scontrol, which knows two nodes.

    Beside it lies a copy of slurm/: the folder above is what jobs are submitted from.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copytree(SCRIPT.parent, tmp_path / "slurm", ignore=shutil.ignore_patterns("site.env"))
    _script(
        folder / "srun",
        """if [ "$1" = --overlap ]; then [[ " $* " != *"--nodelist=${LOST:-none} "* ]]; exit; fi
printf "%s\\n" "$@" >srun.arguments
env >srun.environment
exit "${SRUN_CODE:-0}"""
        + '"',
    )
    _script(
        folder / "scontrol",
        """case "$1 $2" in
  "show hostnames") printf 'localhost\\nnode2.invalid\\n' ;;
  "show node") printf 'NodeName=%s Arch=x86_64\\n   NodeAddr=10.1.2.3 NodeHostName=x\\n' "$3" ;;
  *) printf '%s\\n' "$*" >>scontrol.calls ;;
esac""",
    )
    return folder


def _script(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def _environment(bin_folder: Path, **extra: str) -> dict[str, str]:
    slurm = {
        "SLURM_SUBMIT_DIR": str(bin_folder.parent),
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "6",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    return inherited | slurm | {"PATH": f"{bin_folder}:{os.environ['PATH']}"} | extra


def _run(bin_folder: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments], env=_environment(bin_folder, **extra), capture_output=True, text=True, timeout=60
    )


def _seen_by_the_ranks(bin_folder: Path) -> dict[str, str]:
    lines = (bin_folder.parent / "srun.environment").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _requeues(bin_folder: Path) -> list[str]:
    calls = bin_folder.parent / "scontrol.calls"
    return calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


def test_arguments_reach_quintet_unchanged(bin_folder: Path) -> None:
    result = _run(bin_folder, "--config", "my recipe.yaml", "prompts.query=query: ", "lr=3e-4")
    assert result.returncode == 0, result.stderr
    arguments = (bin_folder.parent / "srun.arguments").read_text(encoding="utf-8").splitlines()
    expected = ["quintet", "pretrain", "--config", "my recipe.yaml", "prompts.query=query: ", "lr=3e-4"]
    assert arguments == ["--kill-on-bad-exit=1", *expected]


@pytest.mark.parametrize("stage", STAGES)
def test_every_script_runs_its_stage(bin_folder: Path, stage: str) -> None:
    environment = _environment(bin_folder, SRUN_CODE="75")
    script = SCRIPT.with_name(f"{stage}.sh")
    result = subprocess.run([str(script), "a=1 2"], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 75, result.stderr
    arguments = (bin_folder.parent / "srun.arguments").read_text(encoding="utf-8").splitlines()
    assert arguments == ["--kill-on-bad-exit=1", "quintet", stage, "a=1 2"]
    assert _requeues(bin_folder) == ["requeue 41234"]
    assert f"#SBATCH --job-name=quintet-{stage}\n" in script.read_text(encoding="utf-8")


def test_a_dry_run_says_what_each_node_would_run_and_runs_nothing(bin_folder: Path) -> None:
    result = _run(bin_folder, "--dry-run", "--config", "my recipe.yaml")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "job: 16 tasks on 2 nodes, MASTER_ADDR=localhost MASTER_PORT=21234",
        "localhost: 8 x OMP_NUM_THREADS=6 quintet pretrain --config my\\ recipe.yaml",
        "node2.invalid: 8 x OMP_NUM_THREADS=6 quintet pretrain --config my\\ recipe.yaml",
    ]
    assert not (bin_folder.parent / "srun.arguments").exists()


def test_a_dry_run_outside_of_a_job_takes_the_numbers_of_the_script(bin_folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "SLURM_"))}
    command = ["bash", "slurm/filter.sh", "--dry-run"]
    result = subprocess.run(command, cwd=bin_folder.parent, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[1:] == ["node1: 8 x OMP_NUM_THREADS=8 quintet filter"], result.stderr


def test_outside_of_a_job_the_script_says_how_to_submit_it(bin_folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", "slurm/mine.sh", "data=x"]
    result = subprocess.run(command, cwd=bin_folder.parent, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "slurm/mine.sh: not inside a Slurm job" in result.stderr


def test_restarts_have_a_limit(bin_folder: Path) -> None:
    few = {"SRUN_CODE": "75", "QUINTET_MAX_RESTARTS": "2"}
    assert _run(bin_folder, SLURM_RESTART_COUNT="1", **few).returncode == 75
    assert _requeues(bin_folder) == ["requeue 41234"]
    last = _run(bin_folder, SLURM_RESTART_COUNT="2", **few)
    assert last.returncode == 75
    assert "QUINTET_MAX_RESTARTS" in last.stderr
    assert _requeues(bin_folder) == ["requeue 41234"]


def test_options_of_the_site_go_to_srun(bin_folder: Path) -> None:
    _run(bin_folder, "lr=1", QUINTET_SRUN_OPTIONS="--container-image=a.sqsh --mpi=none")
    arguments = (bin_folder.parent / "srun.arguments").read_text(encoding="utf-8").splitlines()
    assert arguments == [
        "--kill-on-bad-exit=1",
        "--container-image=a.sqsh",
        "--mpi=none",
        "quintet",
        "pretrain",
        "lr=1",
    ]


def test_ranks_are_told_where_to_meet_and_how_many_threads_they_have(bin_folder: Path) -> None:
    _run(bin_folder)
    seen = _seen_by_the_ranks(bin_folder)
    assert seen["MASTER_ADDR"] == "localhost"
    assert seen["MASTER_PORT"] == str(20000 + 41234 % 20000)
    assert (seen["OMP_NUM_THREADS"], seen["SRUN_CPUS_PER_TASK"]) == ("6", "6")


def test_a_node_name_that_does_not_resolve_is_replaced_by_its_address(bin_folder: Path) -> None:
    _script(bin_folder / "getent", "exit 2")
    _run(bin_folder)
    assert _seen_by_the_ranks(bin_folder)["MASTER_ADDR"] == "10.1.2.3"


def test_the_variables_of_the_site_are_read(bin_folder: Path) -> None:
    (bin_folder.parent / "slurm" / "site.env").write_text("export NCCL_SOCKET_IFNAME=ib0\n", encoding="utf-8")
    _run(bin_folder)
    assert _seen_by_the_ranks(bin_folder)["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(("code", "requeues"), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (75, 1), (124, 0), (137, 0)])
def test_only_a_complete_checkpoint_is_requeued(bin_folder: Path, code: int, requeues: int) -> None:
    result = _run(bin_folder, SRUN_CODE=str(code))
    assert result.returncode == code
    assert _requeues(bin_folder) == ["requeue 41234"] * requeues


def test_a_cluster_where_no_further_step_starts_says_nothing_about_its_nodes(bin_folder: Path) -> None:
    assert _run(bin_folder, SRUN_CODE="1", LOST="localhost").returncode == 1
    assert _requeues(bin_folder) == []


@pytest.mark.parametrize(("code", "requeues"), [(0, 0), (1, 1), (2, 0), (4, 0), (75, 1), (124, 1), (137, 1)])
def test_a_crash_on_a_node_that_is_lost_is_requeued(bin_folder: Path, code: int, requeues: int) -> None:
    result = _run(bin_folder, SRUN_CODE=str(code), LOST="node2.invalid")
    assert result.returncode == code
    assert _requeues(bin_folder) == ["requeue 41234"] * requeues
    assert ("lost node2.invalid, requeued" in result.stdout) == (code in (1, 124, 137))


@pytest.mark.parametrize(("warning", "requeues"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_a_warning_is_passed_on_and_the_ranks_are_waited_for(
    bin_folder: Path, warning: signal.Signals, requeues: int
) -> None:
    # TERM is sent to a job that is cancelled or preempted: Slurm starts it again, or nobody does.
    # srun stands for ranks that save on the signal: they end some time after it, with 75
    _script(
        bin_folder / "srun",
        """trap 'sleep 0.3; echo saved >>saved; exit 75' USR1 TERM
echo ready >"$READY"
while true; do sleep 0.05; done""",
    )
    ready = bin_folder.parent / "ready"
    os.mkfifo(ready)
    job = subprocess.Popen([str(SCRIPT)], env=_environment(bin_folder, READY=str(ready)), stdout=subprocess.DEVNULL)
    try:
        ready.read_text(encoding="utf-8")  # returns when the ranks run
        job.send_signal(warning)
        assert job.wait(timeout=30) == 75
    finally:
        job.kill()
    assert (bin_folder.parent / "saved").read_text(encoding="utf-8") == "saved\n"
    assert _requeues(bin_folder) == ["requeue 41234"] * requeues


def test_an_unset_variable_of_slurm_stops_the_job_before_it_starts_ranks(bin_folder: Path) -> None:
    environment = _environment(bin_folder)
    del environment["SLURM_JOB_NODELIST"]
    result = subprocess.run([str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "SLURM_JOB_NODELIST" in result.stderr
    assert not (bin_folder.parent / "srun.arguments").exists()


# --- the whole recipe -------------------------------------------------------------------------------------------------

RECIPE = ["/runs of mine", "--size", "small", "--pairs", "weak", "--labelled", "good", "--evaluate", "beir/scifact"]


def _pipeline(bin_folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    _script(
        bin_folder / "sbatch",
        'printf "%s|" "$@" >>"$CALLS"; echo >>"$CALLS"; echo "$(wc -l <"$CALLS");cluster"',
    )
    calls = bin_folder.parent / "calls"
    calls.touch()
    return subprocess.run(
        ["bash", str(SCRIPT.with_name("pipeline.sh")), *arguments],
        env=_environment(bin_folder, CALLS=str(calls)),
        capture_output=True,
        text=True,
        timeout=60,
    )


def _calls(bin_folder: Path) -> list[list[str]]:
    return [line.rstrip("|").split("|") for line in (bin_folder.parent / "calls").read_text().splitlines()]


def test_the_pipeline_submits_every_stage_after_the_one_before_it(bin_folder: Path) -> None:
    result = _pipeline(bin_folder, *RECIPE, "--workers", "3", "--sbatch", "--account=mine", "--sbatch", "--nodes=2")
    assert result.returncode == 0, result.stderr
    calls = _calls(bin_folder)
    scripts = [next(Path(word).stem for word in call if word.endswith(".sh")) for call in calls]
    assert scripts == ["pretrain", "filter", "pretrain", "mine", "teacher", "distill", "finetune", "evaluate"]
    assert all({"--account=mine", "--nodes=2"} <= set(call) for call in calls)
    after = [[word for word in call if word.startswith("--dependency")] for call in calls]
    assert after == [[], *([f"--dependency=afterok:{number}"] for number in range(1, 8))]
    assert "--array=0-2" in calls[5]
    assert {"model=/runs of mine/filtered", "data=good", "output=/runs of mine/mined"} <= set(calls[3])
    assert {"teacher=/runs of mine/teacher/model", "scores=/runs of mine/scores"} <= set(calls[5])
    assert [line.split() for line in result.stdout.splitlines()][-1] == ["evaluate", "job", "8"]


def test_a_teacher_that_is_there_is_not_trained(bin_folder: Path) -> None:
    assert _pipeline(bin_folder, *RECIPE, "--teacher", "cross/encoder").returncode == 0
    calls = _calls(bin_folder)
    assert not any("slurm/teacher.sh" in call for call in calls)
    assert {"teacher=cross/encoder", "--dependency=afterok:4"} <= set(calls[4])


def test_the_keys_of_the_pipeline_are_keys_of_its_stages(bin_folder: Path) -> None:
    """Each line, run with --print-config, is one that the stage takes."""
    result = _pipeline(bin_folder, *RECIPE)
    assert result.returncode == 0, result.stderr
    for call in _calls(bin_folder):
        place = next(number for number, word in enumerate(call) if word.endswith(".sh"))
        assert cli.main([Path(call[place]).stem, *call[place + 1 :], "--print-config"]) == 0, call


def test_a_dry_run_of_the_pipeline_submits_nothing(bin_folder: Path) -> None:
    result = _pipeline(bin_folder, *RECIPE, "--dry-run")
    assert len(result.stdout.splitlines()) == 8
    assert _calls(bin_folder) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--size small --pairs"),
        (["runs", "--size", "small", "--pairs", "weak"], "--labelled must be given"),
        (["runs", "--size", "tiny", "--pairs", "weak", "--labelled", "good"], "configs/pretrain/tiny.yaml"),
        ([*RECIPE, "--workers", "none"], "--workers none"),
        ([*RECIPE, "--wrong"], "--wrong: not an option"),
        ([*RECIPE, "more"], "more: RUNS is"),
        (["runs", "--size"], "--size: a value must follow"),
    ],
)
def test_mistakes_of_the_pipeline_are_one_message(bin_folder: Path, arguments: list[str], said: str) -> None:
    result = _pipeline(bin_folder, *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert _calls(bin_folder) == []


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "script",
    [
        *SCRIPT.parent.glob("*.sh"),
        *Path(__file__).parent.glob("*.sh"),
        *SCRIPT.parent.parent.glob("*.sh"),
        *SCRIPT.parent.parent.glob("configs/cluster/*.sh"),
        SCRIPT.parent.parent / ".ci" / "run",
    ],
    ids=lambda path: path.name,
)
def test_shellcheck_finds_nothing(script: Path) -> None:
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
