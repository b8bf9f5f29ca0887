"""Jobs over a real network: two namespaces with an sshd in each (two_hosts.sh), pdsh, and a hostfile."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import psutil
import pytest
import tiny
from pages import typed
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
TWO_HOSTS = ROOT / "tests" / "two_hosts.sh"
LAUNCHES = typed("quintet launch --hostfile")
STEPS = 120  # some seconds, in which a fault can come
LONGER: dict[str, Any] = {"steps": STEPS, "save_every_steps": 20}
SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"


def _may_make_namespaces() -> bool:
    made = subprocess.run(["ip", "netns", "add", "quintet-probe"], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", "quintet-probe"], check=True)
    return made


pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or " " in sys.executable
    or not all(shutil.which(name, path=SBIN) for name in ("ip", "sshd", "ssh", "pdsh"))
    or not _may_make_namespaces(),
    reason="needs iproute2, openssh-server, pdsh, root, the right to make namespaces, and a path without blanks",
)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a hostfile; the variables that ssh needs are in the environment."""
    folder = tmp_path_factory.mktemp("hosts")
    started = subprocess.run([TWO_HOSTS, "start", folder], capture_output=True, text=True, timeout=60, check=False)
    try:
        assert started.returncode == 0, started.stderr
        with pytest.MonkeyPatch.context() as patch:
            for word in shlex.split(started.stdout)[1:]:
                patch.setenv(*word.split("=", 1))
            yield folder
    finally:
        subprocess.run([TWO_HOSTS, "stop", folder], timeout=60, check=False)


@pytest.fixture(scope="module")
def alone(hosts: Path) -> Path:
    """The run of two ranks on one host, with which the others are compared."""
    run_dir = hosts / "local"
    assert jobs.run(jobs.command(2, jobs.settings(hosts, run_dir=run_dir, **LONGER)), hosts / "local.log") == 0
    return run_dir


def same_losses(run_dir: Path, other: Path) -> None:
    one, two = jobs.steps(other), jobs.steps(run_dir)
    assert sorted(one) == sorted(two) == list(range(1, STEPS + 1))
    for step in one:
        assert two[step]["data/batch_hash"] == one[step]["data/batch_hash"]
        assert two[step]["train/loss"] == one[step]["train/loss"]


def on_first(command: list[str]) -> list[str]:
    return ["ip", "netns", "exec", "quintet1", *command]


def launch(hosts: Path, **changes: object) -> list[str]:
    words = jobs.settings(hosts, **LONGER | changes)
    return on_first([jobs.QUINTET, "launch", "--hostfile", str(hosts / "hostfile"), "pretrain", *words])


@pytest.fixture
def desk(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout as the pages have it, where one types: its configurations, hostfiles and .venv."""
    desk = hosts / "desk"
    if not desk.exists():
        shutil.copytree(ROOT / "configs", desk / "configs")
        for name in ("hosts", "configs/cluster/hostfile"):
            shutil.copy(hosts / "hostfile", desk / name)
        (desk / ".venv/bin").mkdir(parents=True)
        (desk / ".venv/bin/quintet").symlink_to(jobs.QUINTET)
    monkeypatch.chdir(desk)
    return desk


def launch_of_page(number: int, hosts: Path, **changes: object) -> list[str]:
    """A page's own line to launch over a hostfile, with what makes it a small job behind it."""
    small = {"steps": 3000, "save_every_steps": 20, "device": "cpu", "precision": "fp32", "mirror": ""}
    return on_first([*LAUNCHES[number], *jobs.settings(hosts, **small | changes)])


def ranks_there() -> dict[int, psutil.Process]:
    """The ranks that run on the two hosts, by number."""
    found = {}
    for number in (1, 2):
        pids = subprocess.run(["ip", "netns", "pids", f"quintet{number}"], capture_output=True, text=True, check=True)
        for pid in pids.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(pid))
                if "pretrain" in process.cmdline() and "launch" not in process.cmdline():
                    found[int(process.environ()["RANK"])] = process
    return found


def nothing_left(seconds: float) -> bool:
    """Whether no process but sshd runs on the hosts any more, in the end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not ranks_there():
            return True
        time.sleep(0.5)
    return False


def _on_both(program: str, *words: str) -> None:
    for number in (1, 2):
        subprocess.run([program, "-n", f"quintet{number}", *words], check=True)


# What is done to the cable between the hosts, at both ends, and how it is undone.
FAULTS = {
    "cut": (("ip", "link", "set", "cable", "down"), ("ip", "link", "set", "cable", "up")),
    "slowed": (
        ("tc", *["qdisc", "add", "dev", "cable", "root", "tbf", "rate", "2kbit", "burst", "2kb", "latency", "9s"]),
        ("tc", *["qdisc", "del", "dev", "cable", "root"]),
    ),
}


def test_plain_deepspeed_trains_over_a_hostfile_to_the_losses_of_one_host(
    hosts: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hosts' own name leads to loopback, as Debian has it: the ranks must find the cable by themselves."""
    apart = hosts / "apart"
    (hosts / "environment").write_text("OMP_NUM_THREADS=1\n")  # what deepspeed's launcher passes on to the hosts
    monkeypatch.setenv("DS_ENV_FILE", str(hosts / "environment"))
    first = ["--master_addr", "10.77.0.1", "--master_port", "29790", "--no_ssh_check"]
    launcher = [jobs.DEEPSPEED, "--hostfile", str(hosts / "hostfile"), *first, "--no_python", "--no_local_rank"]
    command = [*launcher, jobs.QUINTET, "pretrain", *jobs.settings(hosts, run_dir=apart, **LONGER)]
    assert jobs.run(on_first(command), hosts / "apart.log", 120) == 0
    same_losses(apart, alone)


def test_launch_trains_over_a_hostfile_and_shows_no_secret(
    hosts: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary" * 7)
    run_dir = hosts / "launched"
    job = jobs.start(launch(hosts, run_dir=run_dir), hosts / "launched.log")
    try:
        while job.poll() is None:
            seen = "".join("".join(process.cmdline()) for process in _all_processes())
            assert "canary" not in seen
            assert "canary" not in "".join(file.read_text() for file in run_dir.glob(".launch-*/*.json"))
            time.sleep(0.2)
        assert job.wait() == 0, (hosts / "launched.log").read_text()
    finally:
        jobs.end(job)
    same_losses(run_dir, alone)
    assert not list(run_dir.glob(".launch-*"))


def _all_processes() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            process.cmdline()
            yield process


@pytest.mark.usefixtures("desk")
def test_a_launch_that_is_stopped_writes_a_checkpoint_on_both_hosts(hosts: Path) -> None:
    run_dir = hosts / "stopped"
    job = jobs.start(launch_of_page(0, hosts, run_dir=run_dir), hosts / "stopped.log")
    try:
        jobs.wait_for_step(job, run_dir, 3)
        _quintet(job).send_signal(signal.SIGTERM)
        assert job.wait(90) == 75, (hosts / "stopped.log").read_text()
        assert nothing_left(20)
    finally:
        jobs.end(job)
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize("words", typed("quintet doctor --hostfile"), ids=" ".join)
def test_doctor_reaches_every_host_of_a_pages_line(words: list[str], hosts: Path) -> None:
    log = hosts / "doctor.log"
    assert jobs.run(on_first(words), log) == 0
    said = log.read_text()
    assert "quintet1" in said or "10.77.0.1" in said
    assert "quintet2" in said or "10.77.0.2" in said


def test_every_line_that_launches_over_hosts_is_typed_above() -> None:
    assert len(LAUNCHES) == 3


def _quintet(job: subprocess.Popen[bytes]) -> psutil.Process:
    """The launcher itself: `ip netns exec` has become it."""
    return psutil.Process(job.pid)


@pytest.mark.usefixtures("desk")
def test_a_killed_launcher_leaves_no_rank_on_any_host(hosts: Path) -> None:
    run_dir = hosts / "orphans"
    job = jobs.start(launch_of_page(1, hosts, run_dir=run_dir), hosts / "orphans.log")
    try:
        jobs.wait_for_step(job, run_dir, 1)
        assert sorted(ranks_there()) == [0, 1]
        _quintet(job).kill()
        job.wait()
        assert nothing_left(60)
    finally:
        jobs.end(job)


@pytest.mark.usefixtures("desk")
def test_a_rank_killed_on_the_second_host_ends_the_job(hosts: Path) -> None:
    """With deepspeed alone the first host's ranks, and the command, stay for ever."""
    run_dir = hosts / "killed"
    job = jobs.start(launch_of_page(2, hosts, run_dir=run_dir), hosts / "killed.log")
    try:
        jobs.wait_for_step(job, run_dir, 2)
        ranks_there()[1].kill()
        assert job.wait(90) not in (0, 75)
        assert nothing_left(20)
    finally:
        jobs.end(job)
    assert "rank 1 was ended by SIGKILL" in (hosts / "killed.log").read_text()


def test_the_wire_carries_two_embedding_collectives_and_the_gradient_once(hosts: Path) -> None:
    """Bytes of the cable, whatever the number of chunks, beside the formula. Two ranks, ZeRO-0, no negatives.

    A rank sends: its passages' embeddings (fp32) and the hashes of its texts, the gradients of the other's passages,
    and the gradient of what is trained by a ring: 2 (W - 1) / W of it. Beside that go TCP's headers and
    acknowledgements and the small sums of the loop.
    """
    pairs, size, begin, end = 128, 256, 3, 11
    tiny.bert(hosts / "wider", hidden_size=size, intermediate_size=size)
    tables = load_file(hosts / "wider" / "model.safetensors")
    frozen = ("position_embeddings", "pooler")  # not trained, and not used
    parameters = sum(table.numel() for name, table in tables.items() if not any(word in name for word in frozen))
    sent: dict[int, float] = {}
    for tokens in (128, 4096):  # many chunks and few
        run_dir = hosts / f"wire-{tokens}"
        changes = {"model.path": hosts / "wider", "batch_size": pairs, "tokens_per_chunk": tokens, "steps": 14}
        job = jobs.start(
            launch(hosts, run_dir=run_dir, zero_stage=0, save_every_steps=0, **changes), hosts / f"wire-{tokens}.log"
        )
        try:
            counted = []
            for step in (begin, end):
                jobs.wait_for_step(job, run_dir, step)
                counted.append((max(jobs.steps(run_dir)), _sent_by_first()))
            assert job.wait(90) == 0
        finally:
            jobs.end(job)
        (first, before), (last, after) = counted
        sent[tokens] = (after - before) / (last - first)
    embeddings, hashes, gradient = pairs / 2 * size * 4, pairs / 2 * 2 * 8, 2 * (2 - 1) / 2 * parameters * 4
    wanted = 2 * embeddings + hashes + gradient
    print(f"bytes a step and rank: {sent}, by the formula {wanted:,.0f}")
    assert all(0.95 * wanted < measured < 1.1 * wanted for measured in sent.values())


def _sent_by_first() -> int:
    """Bytes that the first host has put on the cable."""
    shown = subprocess.run(
        ["ip", "-n", "quintet1", "-s", "-j", "link", "show", "cable"], capture_output=True, text=True, check=True
    )
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_link_that_is_cut_or_slowed_ends_the_job_in_time_and_it_resumes(hosts: Path, alone: Path, fault: str) -> None:
    """What resumes is the same for both, so one of them does."""
    run_dir, log = hosts / fault, hosts / f"{fault}.log"
    command = launch(hosts, run_dir=run_dir, step_timeout_minutes=6 / 60)
    job, (do, undo) = jobs.start(command, log), FAULTS[fault]
    try:
        jobs.wait_for_step(job, run_dir, 5)
        _on_both(*do)
        try:
            assert job.wait(90) == 124, log.read_text()
        finally:
            _on_both(*undo)
        assert nothing_left(20)
    finally:
        jobs.end(job)
    said = log.read_text()
    assert "quintet watchdog: rank 0 on" in said
    assert "rank 1 on" in said.partition("no progress; ")[2]  # who is waited for
    if fault == "cut":
        assert jobs.run(command, log, 120) == 0
        same_losses(run_dir, alone)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("worker-1", "worker-1 slots=8"),
        ("a slots=1\na slots=2\n", "stands there twice"),
        ("$(touch canary) slots=1", "is no line of a hostfile"),
        ("-oProxyCommand=touch,x slots=1", "is no line of a hostfile"),
        ("a slots=0", "is no line of a hostfile"),
    ],
)
def test_a_hostfile_with_a_mistake_is_refused(text: str, said: str, hosts: Path, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text(text)
    words = jobs.settings(hosts, run_dir=tmp_path / "run")
    command = [jobs.QUINTET, "launch", "--hostfile", str(tmp_path / "hostfile"), "pretrain", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
