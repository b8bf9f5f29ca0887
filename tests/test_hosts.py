"""Jobs over a real network: two namespaces with an sshd in each (two_hosts.sh), pdsh, and a hostfile."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest

TWO_HOSTS = Path(__file__).resolve().parent / "two_hosts.sh"
SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"


def _may_make_namespaces() -> bool:
    made = subprocess.run(["ip", "netns", "add", "quintet-probe"], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", "quintet-probe"], check=True)
    return made


pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or not all(shutil.which(name, path=SBIN) for name in ("ip", "sshd", "ssh", "pdsh"))
    or not _may_make_namespaces(),
    reason="needs iproute2, openssh-server, pdsh, root and the right to make network namespaces",
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


def test_plain_deepspeed_trains_over_a_hostfile_to_the_losses_of_one_host(hosts: Path) -> None:
    """The hosts' own name leads to loopback, as Debian has it: the ranks must find the cable by themselves.

    The launcher does not pass on OMP_NUM_THREADS, and other threads sum in another order.
    """
    local, apart = hosts / "local", hosts / "apart"
    assert jobs.run(jobs.command(2, jobs.settings(hosts, run_dir=local)), hosts / "local.log") == 0
    first = ["--master_addr", "10.77.0.1", "--master_port", "29790", "--no_ssh_check"]
    launcher = [jobs.DEEPSPEED, "--hostfile", str(hosts / "hostfile"), *first, "--no_python", "--no_local_rank"]
    command = [*launcher, jobs.QUINTET, "pretrain", *jobs.settings(hosts, run_dir=apart)]
    assert jobs.run(["ip", "netns", "exec", "quintet1", *command], hosts / "apart.log", 120) == 0
    one, other = jobs.steps(local), jobs.steps(apart)
    assert sorted(one) == sorted(other) == list(range(1, 13))
    for step in one:
        assert other[step]["data/batch_hash"] == one[step]["data/batch_hash"]
        assert other[step]["train/loss"] == pytest.approx(one[step]["train/loss"], rel=1e-5)
