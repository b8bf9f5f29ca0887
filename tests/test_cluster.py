"""configs/cluster: machines made ready over a real ssh, a shared folder, and a SkyPilot task run as SkyPilot would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
import yaml
from pages import typed
from test_hosts import hosts
from test_hosts import pytestmark as needs_hosts

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "configs" / "cluster"

__all__ = ["hosts"]  # a fixture


# --- prepare.sh -------------------------------------------------------------------------------------------------------

# In the place of `make install`, which fetches gigabytes (.ci/run tests it): it says that it ran, once for each stamp.
MAKEFILE = """\
install: .venv/installed
.venv/installed:
\t@mkdir -p .venv/bin && cp python .venv/bin/python && echo "$(PYTHON) $(TORCH_INDEX)" >>installs && touch $@
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project on a path with a blank: configs/cluster, and a Makefile that is quick."""
    folder = tmp_path / "my project"
    shutil.copytree(CLUSTER, folder / "configs" / "cluster")
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    shutil.copy(ROOT / "constraints.txt", folder)
    return folder


def prepare(project: Path, *arguments: str, inside: bool = True) -> subprocess.CompletedProcess[str]:
    where = ["ip", "netns", "exec", "quintet1"] if inside else []
    command = [*where, "bash", str(project / "configs/cluster/prepare.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def hide_from_second_host(hosts: Path, project: Path) -> None:
    """Give the second host a file system of its own where the project lies; it shares files with this machine else."""
    pid = (hosts / "sshd2.pid").read_text().strip()
    subprocess.run(["nsenter", "-t", pid, "-m", "mount", "-t", "tmpfs", "none", str(project)], check=True)


def on_second_host(hosts: Path, *command: str) -> str:
    pid = (hosts / "sshd2.pid").read_text().strip()
    return subprocess.run(["nsenter", "-t", pid, "-m", *command], capture_output=True, text=True, check=True).stdout


@needs_hosts
def test_every_host_gets_the_project_at_the_same_path_and_is_told_in_one_line(hosts: Path, project: Path) -> None:
    hide_from_second_host(hosts, project)
    hostfile = str(hosts / "hostfile")
    for _ in range(2):  # the second time there is nothing to do
        more = ["--torch-index", "https://example.org/cpu", "--packages", "fsspec pyyaml"]  # that are there
        result = prepare(project, "--no-gpu", *more, hostfile)
        assert result.returncode == 0, result.stderr
        python = f"Python {sys.version.split()[0]}"
        assert result.stdout.splitlines() == [f"10.77.0.1: ready, {python}", f"10.77.0.2: ready, {python}"]
    assert (project / "installs").read_text().split()[1:] == ["https://example.org/cpu"]
    assert on_second_host(hosts, "cat", f"{project}/installs").split()[1:] == ["https://example.org/cpu"]
    script = (project / "configs/cluster/machine.sh").read_text()
    assert on_second_host(hosts, "cat", f"{project}/configs/cluster/machine.sh") == script
    assert not list(project.glob(".prepare*"))
    missing = prepare(project, "--no-gpu", "--packages", "./no-such-package", hostfile)
    assert missing.stdout.splitlines()[0] == "10.77.0.1: FAILED: pip install ./no-such-package"


@needs_hosts
def test_the_page_s_line_makes_the_machines_ready_and_shares_a_folder(hosts: Path, project: Path) -> None:
    (words,) = typed("bash configs/cluster/prepare.sh")
    shutil.copy(hosts / "hostfile", project / "configs/cluster")
    # both hosts are this machine, so there is nothing to share; share.sh has tests of its own
    (project / "configs/cluster/share.sh").write_text('echo "share: $*"\n')
    result = prepare(project, *words[2:], "--no-gpu", "--packages", "fsspec")  # which is there
    assert result.returncode == 0, result.stderr
    ready = [f"10.77.0.{number}: ready, Python {sys.version.split()[0]}" for number in (1, 2)]
    assert result.stdout.splitlines() == [*ready, "share: serve /shared 10.77.0.2", "share: mount 10.77.0.1 /shared"]


@needs_hosts
def test_a_host_that_is_not_ready_is_named_with_the_reason(hosts: Path, project: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\n10.77.0.1 slots=2\n10.77.0.9 slots=2 # gone\n")
    result = prepare(project, "--no-gpu", str(tmp_path / "hosts"))
    assert result.returncode == 1
    assert result.stdout.splitlines()[0].startswith("10.77.0.1: ready")
    assert result.stdout.splitlines()[1] == "10.77.0.9: FAILED: no answer over ssh; try: ssh 10.77.0.9"
    assert result.stderr.splitlines()[-1] == "prepare.sh: not ready: 10.77.0.9"
    if not shutil.which("nvidia-smi"):
        result = prepare(project, str(hosts / "hostfile"))
        assert result.returncode == 1
        assert [line.partition(";")[0] for line in result.stdout.splitlines()] == [
            "10.77.0.1: FAILED: no NVIDIA driver",
            "10.77.0.2: FAILED: no NVIDIA driver",
        ]
    (project / "Makefile").write_text("install:\n\t@echo no room; false\n")
    result = prepare(project, "--no-gpu", str(hosts / "hostfile"))
    assert "10.77.0.1: FAILED: make install" in result.stdout
    assert "  10.77.0.1| no room" in result.stderr


@pytest.mark.parametrize(
    ("lines", "arguments", "said"),
    [
        (None, [], "hosts: no such file; copy configs/cluster/hostfile.example"),
        ("# nobody\n", [], "names no machine"),
        ("10.0.0.1\n", [], "is not HOST slots=NUMBER"),
        ("10.0.0.1 slots=0\n", [], "is not HOST slots=NUMBER"),
        ("10.0.0.1 slots=8\n", ["--wrong"], "--wrong: not an option"),
        ("10.0.0.1 slots=8\n", ["--share"], "--share: a value must follow"),
        ("10.0.0.1 slots=8\n", ["--share", "runs"], "--share runs: give a path that begins with /"),
    ],
)
def test_mistakes_are_told_before_anything_is_tried(
    project: Path, tmp_path: Path, lines: str | None, arguments: list[str], said: str
) -> None:
    if lines is not None:
        (tmp_path / "hosts").write_text(lines)
    result = prepare(project, str(tmp_path / "hosts"), *arguments, inside=False)
    assert result.returncode == 2
    assert said in result.stderr


@pytest.fixture
def machine(project: Path, tmp_path: Path) -> dict[str, str]:
    """An environment with a false nvidia-smi: two GPUs, of which a torch without CUDA sees none."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\ncase $1 in *name*) printf "H100\\nH100\\n" ;; *) echo 570.1 ;; esac\n')
    smi.chmod(0o755)
    return {**os.environ, "PATH": f"{smi.parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ("3", "FAILED: 2 GPUs where the hostfile says slots=3"),
        ("2", "FAILED: torch sees 0 GPUs of 2; driver 570.1 may"),
    ],
)
@pytest.mark.skipif(not shutil.which("pdsh"), reason="without pdsh the script installs it")
def test_gpus_that_are_missing_are_counted(project: Path, machine: dict[str, str], gpus: str, said: str) -> None:
    command = ["bash", str(project / "configs/cluster/machine.sh"), gpus]
    result = subprocess.run(command, env=machine, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith(said)


# --- share.sh ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, str]:
    """An environment in which sudo only notes what it is asked for, and a mount works at the third try."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sudo": """printf '%s\\n' "$*" >>"$CALLS"
case "$1" in
  sh) exit 0 ;;
  mkdir) exec "$@" ;;
  tee) cat >>"$CALLS" ;;
  mount) n=$(grep -c '^mount ' "$CALLS"); [ "$n" -ge 3 ] && touch "$CALLS.mounted" ;;
esac""",
        "mountpoint": '[ -e "$CALLS.mounted" ]',
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "calls").touch()
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CALLS": str(tmp_path / "calls"), "QUINTET_SHARE_PAUSE": "0"}


def share(environment: dict[str, str], *arguments: str) -> tuple[int, list[str]]:
    command = ["bash", str(CLUSTER / "share.sh"), *arguments]
    code = subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode
    return code, Path(environment["CALLS"]).read_text().splitlines()


def test_a_folder_is_exported_to_the_named_machines_alone(commands: dict[str, str], tmp_path: Path) -> None:
    code, calls = share(commands, "serve", f"{tmp_path}/my runs", "10.0.0.12", "10.0.0.13")
    options = "(rw,sync,no_subtree_check)"
    assert code == 0
    assert f'"{tmp_path}/my runs" 10.0.0.12{options} 10.0.0.13{options}' in calls
    assert calls[-1] == "exportfs -ra"


def test_a_mount_waits_for_the_machine_that_shares(commands: dict[str, str], tmp_path: Path) -> None:
    code, calls = share(commands, "mount", "10.0.0.11", f"{tmp_path}/runs")
    mount = f"mount -t nfs -o vers=4.2,hard,nosuid,nodev 10.0.0.11:{tmp_path}/runs {tmp_path}/runs"
    assert (code, [call for call in calls if call.startswith("mount ")]) == (0, [mount] * 3)
    assert share(commands, "mount", "10.0.0.11", f"{tmp_path}/runs")[1].count(mount) == 3, "it is there already"
    assert share(commands, "serve")[0] == 2


# --- sky.yaml ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTER / "sky.yaml").read_text())
    return found


def test_the_task_starts_again_after_a_checkpoint_and_on_new_machines(task: dict[str, Any]) -> None:
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert all(isinstance(value, str) for value in task["envs"].values())
    assert (ROOT / task["envs"]["CONFIG"]).exists()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("section", ["setup", "run"])
def test_shellcheck_finds_nothing_in_a_section(task: dict[str, Any], section: str) -> None:
    # SC2086: OPTIONS and PACKAGES are lists of words; SC2154: the variables are SkyPilot's
    command = ["shellcheck", "--shell=bash", "--exclude=SC2086,SC2154", "-"]
    result = subprocess.run(command, input=task[section], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def start_nodes(task: dict[str, Any], folder: Path, **variables: str) -> list[tuple[int, str]]:
    """Run the run section as two nodes of one rank, with SkyPilot's variables; (exit code, output) of each."""
    workdir = folder / "sky_workdir"
    (workdir / ".venv").mkdir(parents=True, exist_ok=True)
    (workdir / "configs/cluster").mkdir(parents=True, exist_ok=True)
    if not (workdir / ".venv/bin").exists():
        (workdir / ".venv/bin").symlink_to(Path(sys.executable).parent)
    # Both nodes are this machine, so there is nothing to share; share.sh has tests of its own.
    (workdir / "configs/cluster/share.sh").write_text('echo "share: $*"\n')
    (workdir / "config.yaml").write_text("log_every: 1\n")
    run = task["run"].replace("--master-port 29500", "--master-port 29791")
    nodes = []
    for rank in range(2):
        sky = {
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "RUN_DIR": str(folder / "run"),
            "CONFIG": "config.yaml",
        }
        environment = {**jobs.environment(), **task["envs"], **sky, **variables}
        nodes.append(
            subprocess.Popen(
                ["bash", "-c", run],
                cwd=workdir,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        said = [node.communicate(timeout=200)[0] for node in nodes]
    finally:
        for node in nodes:
            jobs.end(node)  # type: ignore[arg-type]
    return [(node.returncode, text) for node, text in zip(nodes, said, strict=True)]


def test_the_run_section_trains_two_nodes_as_one_job_and_tells_the_runs_own_exit_code(
    task: dict[str, Any], tmp_path: Path
) -> None:
    options = [word for word in jobs.settings(tmp_path) if not word.startswith("data=")]
    variables = {"DATA": str(tmp_path / "shards"), "MIRROR": str(tmp_path / "store"), "OPTIONS": " ".join(options)}
    first, second = start_nodes(task, tmp_path, **variables)
    print(first[1], second[1])
    assert (first[0], second[0]) == (0, 0)
    assert f"share: serve {tmp_path}/run 127.0.0.2\n" in first[1]
    assert f"share: mount 127.0.0.1 {tmp_path}/run\n" in second[1]
    assert "2, 8 pairs each" in first[1], "one job of two ranks"
    assert sorted(jobs.steps(tmp_path / "run")) == list(range(1, 13))
    assert (tmp_path / "store" / "run.json").exists()
    (tmp_path / "run" / "STOP").touch()
    variables["OPTIONS"] += " steps=2000"
    assert [code for code, _ in start_nodes(task, tmp_path, **variables)] == [75, 75]
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 75


def test_the_run_section_asks_for_what_must_be_given(task: dict[str, Any], tmp_path: Path) -> None:
    for code, said in start_nodes(task, tmp_path):
        assert code == 2
        assert "MIRROR and DATA must be given" in said
