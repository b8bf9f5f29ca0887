"""The run folder: who works in it, what it says about the run, and how small files get into it whole.

config.yaml        the configuration as the user wrote it, unresolved; config.attempt-N.yaml where a restart changed it
ds_config.json     what DeepSpeed was given
environment.json   versions, machine, commit; no environment variables, no arguments
run.json           the run's id, which W&B uses too, and how often it was started
incidents.jsonl    non-finite steps, loss spikes and replicas that differ, with the records of their batches
rollbacks.json     what loss spikes made the run go back to and pass over (trainer/rollback.py)
exit.json          how the last start ended; absent while it runs and after a crash
lease.json         which process works here now
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data import files
from data.errors import UserError

log = logging.getLogger("quintet")

_PACKAGES = (
    *("torch", "deepspeed", "transformers", "tokenizers", "sentence-transformers", "safetensors", "numpy", "pyarrow"),
    *("webdataset", "wandb", "omegaconf", "orjson", "xxhash", "rich", "quintet"),
)
# What belongs to one training run, as against the folder: set aside when a run starts over.
_OF_A_RUN = (
    *("checkpoints", "model", "wandb", "metrics.jsonl", "results.json", "report.html", "run.json", "exit.json"),
    *("incidents.jsonl", "rollbacks.json", "tensorboard"),
    *("config.yaml", "ds_config.json", "environment.json"),
)


def write_text(path: Path, text: str) -> None:
    """Put a text file in place whole, or not at all."""
    files.put(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def make_folder(name: str | Path, key: str = "run_dir") -> Path:
    """Create a folder, or see that it can be written to. Raises UserError, which names the key, when it cannot."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{key}={name}: cannot be written to ({error.strerror}); choose another folder") from None
    return folder


@dataclass(frozen=True)
class Run:
    """Who a run is, the same over restarts, and the how-manieth start this is (1 is the first)."""

    id: str
    attempt: int


def prepare(
    run_dir: str | Path,
    *,
    config_text: str,
    ds_config: Mapping[str, Any],
    devices: Sequence[str] = (),
    fresh: bool = False,
) -> Run:
    """Open the run folder for one more start of its run: count it, and write down what it is made of.

    For rank 0, which holds the lease. With `fresh`, what an earlier run left is set aside, not deleted.

    Args:
        config_text: the unresolved configuration, so that no secret is written.
        devices: names of the accelerators, as the caller knows them.
    Raises UserError when the folder cannot be written.
    """
    folder = make_folder(run_dir)
    if fresh:
        set_aside(folder)
    (folder / "exit.json").unlink(missing_ok=True)
    run = _next_attempt(folder)
    config = folder / "config.yaml"
    if config.exists() and config.read_text(encoding="utf-8") != config_text:
        config.rename(folder / f"config.attempt-{run.attempt - 1}.yaml")
    write_text(config, config_text)
    write_json(folder / "ds_config.json", ds_config)
    write_json(folder / "environment.json", environment(devices))
    write_json(folder / "run.json", asdict(run))
    return run


def _next_attempt(folder: Path) -> Run:
    path = folder / "run.json"
    if not path.exists():
        return Run(secrets.token_hex(4), 1)
    try:
        before = Run(**json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; delete it, and the run gets a new id") from None
    return Run(before.id, before.attempt + 1)


def set_aside(run_dir: str | Path) -> Path | None:
    """Move what an earlier run left into run_dir/before-N; None when there was nothing."""
    folder = Path(run_dir)
    found = [folder / name for name in _OF_A_RUN if (folder / name).exists()]
    found += folder.glob("config.attempt-*.yaml")
    if not found:
        return None
    number = 1
    while (folder / f"before-{number}").exists():
        number += 1
    aside = folder / f"before-{number}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    log.warning("fresh=true: the earlier run was moved to %s; delete it when you no longer need it", aside)
    return aside


def finish(run_dir: str | Path, code: int, reason: str, step: int) -> None:
    """Write exit.json, what scripts trust: its code is 0 when and only when the run is done."""
    write_json(Path(run_dir) / "exit.json", {"code": code, "reason": reason, "step": step, "time": time.time()})


def is_held(run_dir: str | Path, limit_seconds: float = 60.0) -> bool:
    """Whether a process seems to work in the folder now, at one look: to be shown, not to decide who may write.

    Of another machine's lease only its age tells, by the clocks of both.
    """
    path = Path(run_dir) / "lease.json"
    try:
        owner = json.loads(path.read_bytes())
        age = time.time() - path.stat().st_mtime
        if owner["process_table"] and owner["process_table"] == _process_table():
            return _process_start(int(owner["pid"])) == owner["process_start"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return age < limit_seconds


def environment(devices: Sequence[str] = ()) -> dict[str, Any]:
    """What the numbers of a run depend on besides its configuration."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "devices": list(devices),
        "commit": commit(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a run stands on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The commit of this code: of its checkout, with "+changes" when files differ from it, or that pip took from git.

    None where neither is known.
    """
    checkout = Path(__file__).resolve().parent.parent
    git = shutil.which("git")
    if not (checkout / ".git").exists():
        return _installed_commit()
    if not git:
        return None
    # inside a git hook these name the repository of the hook
    around = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def answer(*arguments: str) -> str:
        command = [git, "-C", str(checkout), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=around)
        return done.stdout.strip()

    try:
        changes = answer("status", "--porcelain", "--untracked-files=no")
        return answer("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _installed_commit() -> str | None:
    """What `pip install git+https://...` wrote down (PEP 610)."""
    try:
        origin = json.loads(metadata.distribution("quintet").read_text("direct_url.json") or "{}")
        return str(origin["vcs_info"]["commit_id"])
    except (metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class _Sight:
    """What is known of another process's lease: its last renewal, seen at `since`; whether the process lives."""

    owner: dict[str, Any]
    renewed: int
    since: float
    lives: bool | None


class Lease:
    """The right of one process to work on something: a file in its folder, renewed while the process lives.

    Where the owner shares our process table, a lease is stale when its process is gone. Elsewhere (another host, a
    container) it is watched: one that is renewed is alive, one that is not for `limit_seconds` is stale. No clock of
    another machine is trusted, and a job that was killed and started again on another node waits instead of failing.

    Args:
        folder: where the lease is kept.
        file: its name there; lease.json is that of a run.
        what: what is worked on, as KEY=VALUE; empty: run_dir=FOLDER.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        file: str = "lease.json",
        what: str = "",
        renew_seconds: float = 10.0,
        limit_seconds: float = 60.0,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._path = Path(folder) / file
        self._what = what or f"run_dir={folder}"
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_table": _process_table(),
            "process_start": _process_start(os.getpid()),
            "since": time.time(),
            "token": secrets.token_hex(8),
        }
        self._renew_seconds, self._limit_seconds, self._sleep = renew_seconds, limit_seconds, sleep
        self._stop = threading.Event()
        self._other: _Sight | None = None
        self.lost = False

    def __enter__(self) -> Self:
        """Take the lease. Raises UserError naming the host, process and age of a job that works here."""
        waited = 0.0
        while not self.attempt(waited):
            assert self._other is not None
            owner = self._other.owner
            if self._other.lives:
                raise UserError(self._refusal(owner))
            if not waited:
                who = f"process {owner['pid']} on {owner['host']}"
                log.info("%s: held by %s; waiting for a sign of life", self._path, who)
            self._sleep(1.0)
            waited += 1.0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    def attempt(self, now: float) -> bool:
        """Take the lease if it is free or stale, and say whether it is ours now; never waits.

        Args:
            now: seconds on any clock of the caller's, which later attempts go on with: a lease of another machine is
                stale when attempts `limit_seconds` apart find it unchanged.
        """
        while not self._create():
            owner = self._read()
            if owner is None:
                continue  # given back in between
            self._other = self._watch(owner, now)
            if self._other.lives is not False:
                return False
            log.warning("%s: taken over from process %s on %s, which is gone", self._path, owner["pid"], owner["host"])
            self._set_aside(owner)
        self._stop, self.lost = threading.Event(), False
        threading.Thread(target=self._renew, args=(self._stop,), name="lease", daemon=True).start()
        return True

    def give_back(self) -> None:
        """Let others take the lease, unless somebody has."""
        self._stop.set()
        if self._is_ours():
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            with open(self._path, "x") as file:
                file.write(json.dumps(self._owner))
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}); make room or choose another folder"
            ) from None
        return True

    def _read(self) -> dict[str, Any] | None:
        """Who holds the lease; None when nobody does. Of a damaged one only its renewals can tell."""
        try:
            owner = json.loads(self._path.read_bytes())
            return {name: owner[name] for name in self._owner}
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            return dict.fromkeys(self._owner, "") | {"host": "?", "pid": "?", "since": time.time()}

    def _is_ours(self) -> bool:
        try:
            return _token(self._path) == self._owner["token"]
        except FileNotFoundError:
            return False

    def _watch(self, owner: dict[str, Any], now: float) -> _Sight:
        """Look at another's lease, remembering when it was last seen to change."""
        if owner["process_table"] and owner["process_table"] == self._owner["process_table"]:
            return _Sight(owner, 0, now, _process_start(owner["pid"]) == owner["process_start"])
        renewed, before = self._renewed(), self._other
        if before is None or before.owner["token"] != owner["token"] or not renewed:
            return _Sight(owner, renewed, now, None)
        if renewed != before.renewed:
            return _Sight(owner, renewed, now, True)
        return replace(before, lives=False) if now - before.since >= self._limit_seconds else before

    def _renewed(self) -> int:
        """The lease's last renewal: its time of change, read through an open file, which network disks keep fresh."""
        try:
            with open(self._path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return 0

    def _refusal(self, other: Mapping[str, Any]) -> str:
        minutes = max(0.0, time.time() - other["since"]) / 60
        return (
            f"{self._what}: process {other['pid']} on host {other['host']} has been working here for "
            f"{minutes:.0f} minutes; stop it, or choose another {self._what.partition('=')[0]}"
        )

    def _set_aside(self, stale: Mapping[str, Any]) -> None:
        """Remove a stale lease, unless another job has just taken it over."""
        aside = self._path.with_name(f".lease.{self._owner['token']}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        taken = _token(aside) != stale["token"]
        if taken and not self._path.exists():
            aside.rename(self._path)
        aside.unlink(missing_ok=True)

    def _renew(self, stop: threading.Event) -> None:
        while not stop.wait(self._renew_seconds):
            try:
                if not self._is_ours():
                    self.lost = True
                    log.error("%s: another process has taken it over", self._path)
                    return
                os.utime(self._path)
            except OSError as error:
                log.warning("%s: could not be renewed: %s", self._path, error)


def _token(lease: Path) -> str:
    try:
        return str(json.loads(lease.read_bytes())["token"])
    except (ValueError, TypeError, KeyError):
        return ""


def _process_table() -> str:
    """Names the set of processes that this one can see: the boot and the process namespace; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """When a process of this machine started, in ticks since boot, so that a number used again is told apart.

    Empty when there is no such process, or only its remains that nobody has waited for.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
