"""Ranks on several hosts: deepspeed's launcher starts one process on each (over pdsh and ssh), which starts its ranks.

What that launcher lacks goes through a folder that all hosts share, the board. The launcher and the hosts write a
number there that grows, so that each notices when another falls silent; signals go out through it, exit codes come
back.

    plan.json    the hosts, where their ranks meet, and what a rank runs; no secrets
    launcher     {"count", "signal"}: that the launcher lives, and which signal the ranks shall get
    host-N       {"count", "codes"}: that host N lives; at its end the exit codes of its ranks
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import files
from data.errors import UserError
from launcher import local

log = logging.getLogger("quintet")

# A host, or the launcher, that has said nothing for so long is taken for lost. Disks that machines share may show a new
# file some seconds late.
SILENT_SECONDS, BEAT_SECONDS = 30.0, 1.0
START_SECONDS = 90.0  # for a host to be reached and to begin
STOP_SECONDS = 60.0  # for ranks without a launcher to write a checkpoint
# What the ranks get of the launcher's environment; a login on another host brings nothing of it.
_PASSED = re.compile(r"^(QUINTET|NCCL|GLOO|OMP|HF|WANDB|TORCH|TRITON|PYTHON)_|^DS_ACCELERATOR$|^PATH$")
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)


@dataclass(frozen=True)
class Host:
    """A machine by name or address, and how many ranks it runs."""

    name: str
    slots: int


def read_hostfile(path: str) -> list[Host]:
    """The hosts of a file of lines such as `worker-1 slots=8`; `#` begins a comment.

    Raises:
        UserError: the file is not there, or a line says something else or names a host again.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read: {error}") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([A-Za-z0-9][\w.:-]*)\s+slots\s*=\s*([1-9]\d*)", text)
        if not found:
            raise UserError(f"{path}:{number}: {text!r} is no line of a hostfile; write for example: worker-1 slots=8")
        host = Host(found[1], int(found[2]))
        if host.name in {other.name for other in hosts}:
            raise UserError(f"{path}:{number}: {host.name} stands there twice; give it one line with all its slots")
        hosts.append(host)
    if not hosts:
        raise UserError(f"--hostfile {path}: names no host; write a line for each, for example: worker-1 slots=8")
    return hosts


class Silence:
    """For how long something that should change has not."""

    def __init__(self) -> None:
        self._seen: object = None
        self._since = time.monotonic()

    def seconds(self, seen: object) -> float:
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since


class Board:
    """The shared folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, value: Any) -> None:
        files.put(self.folder / name, lambda partial: partial.write_text(json.dumps(value), encoding="utf-8"))

    def read(self, name: str) -> dict[str, Any]:
        """What a file says; empty where it is not there."""
        try:
            found = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def hosts(self, count: int) -> list[dict[str, Any]]:
        return [self.read(f"host-{number}") for number in range(count)]


# --- the launcher's side -------------------------------------------------------------------------------------------


class HostRanks:
    """The ranks of a job on several hosts, with the surface of local.Ranks: signals() and wait()."""

    def __init__(self, command: Sequence[str], hosts: Sequence[Host], shared: Path) -> None:
        self.asked = False
        self._hosts, self._signal, self._count = hosts, 0, 0
        for program in ("pdsh", "ssh"):
            if not shutil.which(program):
                raise UserError(f"--hostfile: {program} is not on the PATH of this machine; install it, or use Slurm")
        for place in (os.getcwd(), sys.executable, str(shared.absolute())):
            if " " in place:  # deepspeed quotes nothing of what it has pdsh type there
                raise UserError(f"--hostfile: {place}: a path with a blank does not reach the other hosts; rename it")
        self._board = Board(shared / f".launch-{secrets.token_hex(4)}")
        try:
            self._board.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{shared}: cannot be written to ({error.strerror}); choose another folder") from None
        passed = {name: value for name, value in os.environ.items() if _PASSED.match(name) and not _SECRET.search(name)}
        plan = {
            "hosts": [vars(host) for host in hosts],
            "folder": os.getcwd(),
            "command": list(command),
            "environment": passed,
            "master_addr": hosts[0].name,
            "master_port": local.free_port(),
        }
        self._board.write("plan.json", plan)
        self._beat()
        self._process = self._start(plan)

    def _start(self, plan: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        """deepspeed's launcher, with one process on each host."""
        from trainer.preempt import die_with_parent

        hostfile = self._board.folder / "hostfile"
        hostfile.write_text("".join(f"{host.name} slots=1\n" for host in self._hosts), encoding="utf-8")
        tools = Path(sys.executable).parent
        meet = ["--master_addr", plan["master_addr"], "--master_port", str(plan["master_port"])]
        command = [tools / "deepspeed", "--hostfile", hostfile, *meet, "--no_ssh_check", "--force_multi"]
        agent = [tools / "quintet", "launch", "--on-host", self._board.folder.resolve()]
        return subprocess.Popen(
            [*map(str, command), "--no_python", "--no_local_rank", *map(str, agent)],
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """While entered, signals to this process go to every rank."""
        with local.forwarding(self._ask):
            yield

    def _ask(self, number: signal.Signals) -> None:
        self.asked, self._signal = True, int(number)

    def wait(self) -> int:
        """The exit code of the job, once all ranks are gone or given up."""
        silences, running = [Silence() for _ in self._hosts], Silence()
        deadline, lost = None, set[int]()
        try:
            while True:
                self._beat()
                said, now = self._board.hosts(len(self._hosts)), time.monotonic()
                ended = {number for number, host in enumerate(said) if "codes" in host}
                if len(ended | lost) == len(said) or (deadline and now > deadline):
                    return self._code(said)
                # Once deepspeed's launcher has ended, a host that has written nothing will not either.
                over = running.seconds(self._process.poll()) > 10 * BEAT_SECONDS and self._process.poll() is not None
                for number in set(range(len(said))) - ended - lost:
                    limit = SILENT_SECONDS if said[number] else START_SECONDS
                    if over or silences[number].seconds(said[number].get("count")) > limit:
                        lost.add(number)
                if deadline is None and (lost or any(any(said[number]["codes"]) for number in ended)):
                    deadline = now + SILENT_SECONDS + local.GRACE_SECONDS + local.LAST_SECONDS + STOP_SECONDS
                time.sleep(BEAT_SECONDS / 4)
        finally:
            self._end()

    def _beat(self) -> None:
        self._count += 1
        self._board.write("launcher", {"count": self._count, "signal": self._signal})

    def _code(self, said: Sequence[Mapping[str, Any]]) -> int:
        codes: list[int] = []
        for host, found in zip(self._hosts, said, strict=True):
            if "codes" in found:
                codes += found["codes"]
                continue
            why = "fell silent" if found else "was not reached, or could not start its ranks"
            log.error(
                "launch: host %s %s; try: ssh %s true, and see that it shares %s",
                host.name,
                why,
                host.name,
                os.getcwd(),
            )
            codes.append(1)
        return local.job_code(codes)

    def _end(self) -> None:
        """Leave no launcher behind. Hosts that still run find the board gone, and end their ranks."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(3 * BEAT_SECONDS)
        shutil.rmtree(self._board.folder, ignore_errors=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10 * BEAT_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


# --- a host's side -------------------------------------------------------------------------------------------------


def on_host(folder: str) -> int:
    """Run this host's ranks as the board says, and return their exit code.

    Raises:
        UserError: the board is not there: the hosts do not share its folder.
    """
    from trainer.preempt import die_with_parent

    die_with_parent(signal.SIGTERM)  # ssh and what it started: the ranks then write a checkpoint
    board, number = Board(Path(folder)), int(os.environ["RANK"])  # as deepspeed numbers the hosts
    plan = board.read("plan.json")
    if not plan:
        raise UserError(
            f"{folder}: is not there on {os.uname().nodename}; run_dir must lie on a disk that all hosts share"
        )
    slots = [host["slots"] for host in plan["hosts"]]
    os.chdir(plan["folder"])
    # deepspeed has chosen a GPU for the one process that it knows of; every rank chooses its own
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    job = local.Ranks(
        plan["command"],
        slots[number],
        {**inherited, **plan["environment"]},
        first=sum(slots[:number]),
        world=sum(slots),
        meet=(plan["master_addr"], plan["master_port"]),
    )
    post = _Post(board, number, len(slots), job)
    with job.signals():
        code = job.wait(post.look)
    post.leave()
    return code


class _Post:
    """A host at the board: it says that it lives, passes signals on, and looks after the launcher and the others."""

    def __init__(self, board: Board, number: int, hosts: int, job: local.Ranks) -> None:
        self._board, self._number, self._job = board, number, job
        self._others = {other: Silence() for other in range(hosts) if other != number}
        self._launcher, self._count, self._passed, self._next = Silence(), 0, 0, 0.0

    def look(self) -> float | None:
        """Seconds that the ranks still have, where others have ended or are lost; else None."""
        if time.monotonic() < self._next:
            return None
        self._next, self._count = time.monotonic() + BEAT_SECONDS, self._count + 1
        if not self._board.folder.is_dir():
            log.error("launch: the launcher has ended; the ranks of this host stop")
            return self._stop()
        self._board.write(f"host-{self._number}", {"count": self._count})
        launcher = self._board.read("launcher")
        if launcher.get("signal", 0) != self._passed:
            self._passed = launcher["signal"]
            self._job.send(signal.Signals(self._passed))
        if self._launcher.seconds(launcher.get("count")) > SILENT_SECONDS:
            log.error("launch: the launcher is silent; the ranks of this host stop")
            return self._stop()
        for other, silence in self._others.items():
            said = self._board.read(f"host-{other}")
            if any(said.get("codes", ())):
                return local.GRACE_SECONDS
            if "codes" not in said and said and silence.seconds(said["count"]) > SILENT_SECONDS:
                log.error("launch: host %d is silent; the ranks of this one end", other)
                return local.GRACE_SECONDS
        return None

    def _stop(self) -> float:
        self._job.send(signal.SIGTERM)
        return STOP_SECONDS

    def leave(self) -> None:
        if self._board.folder.is_dir():
            self._board.write(f"host-{self._number}", {"count": self._count, "codes": self._job.codes})
