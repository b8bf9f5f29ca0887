"""slurm/pretrain.sh with false srun and scontrol on PATH: what the ranks see, and what the job does when they end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "slurm" / "pretrain.sh"


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A folder with srun, which records its arguments and environment, and scontrol, which knows two nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _script(
        folder / "srun",
        'printf "%s\\n" "$@" >srun.arguments\nenv >srun.environment\nexit "${SRUN_CODE:-0}"',
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


def test_the_script_for_fine_tuning_is_the_same_with_another_stage(bin_folder: Path) -> None:
    (bin_folder.parent / "slurm").mkdir()
    shutil.copy(SCRIPT, bin_folder.parent / "slurm")
    environment = _environment(bin_folder, SRUN_CODE="75")
    finetune = SCRIPT.with_name("finetune.sh")
    result = subprocess.run([str(finetune), "lr=1e-5"], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 75, result.stderr
    arguments = (bin_folder.parent / "srun.arguments").read_text(encoding="utf-8").splitlines()
    assert arguments == ["--kill-on-bad-exit=1", "quintet", "finetune", "lr=1e-5"]
    assert _requeues(bin_folder) == ["requeue 41234"]


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
    (bin_folder.parent / "slurm").mkdir()
    (bin_folder.parent / "slurm" / "site.env").write_text("export NCCL_SOCKET_IFNAME=ib0\n", encoding="utf-8")
    _run(bin_folder)
    assert _seen_by_the_ranks(bin_folder)["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(("code", "requeues"), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (75, 1), (124, 0), (137, 0)])
def test_only_a_complete_checkpoint_is_requeued(bin_folder: Path, code: int, requeues: int) -> None:
    result = _run(bin_folder, SRUN_CODE=str(code))
    assert result.returncode == code
    assert _requeues(bin_folder) == ["requeue 41234"] * requeues


@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_is_passed_on_and_the_ranks_are_waited_for(bin_folder: Path, warning: signal.Signals) -> None:
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
    assert _requeues(bin_folder) == ["requeue 41234"]


def test_an_unset_variable_of_slurm_stops_the_job_before_it_starts_ranks(bin_folder: Path) -> None:
    environment = _environment(bin_folder)
    del environment["SLURM_JOB_NODELIST"]
    result = subprocess.run([str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "SLURM_JOB_NODELIST" in result.stderr
    assert not (bin_folder.parent / "srun.arguments").exists()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "script",
    [*SCRIPT.parent.glob("*.sh"), *SCRIPT.parent.parent.glob("*.sh"), SCRIPT.parent.parent / ".ci" / "run"],
    ids=lambda path: path.name,
)
def test_shellcheck_finds_nothing(script: Path) -> None:
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
