"""Checks of `quintet doctor` on this machine: libraries, GPUs, shared memory, limits, build locks, the port, W&B."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import re
import resource
import shlex
import socket
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from launcher.checks import Row, bad, guarded, ok, warn

# Why a version below the bound of setup.cfg is dangerous, where it is more than a function that is not there yet.
_HOLES = {"torch": "its torch.load(weights_only=True) can be made to run code (GHSA-63cw-57p8-fm3p)"}
_SHOWN = ("torch", "deepspeed", "transformers", "sentence-transformers", "webdataset", "wandb")
# A build takes a minute or two; nothing holds its lock for longer.
_STALE_SECONDS = 600.0
# The port that deepspeed and torchrun take unless they are told another.
_DEFAULT_PORT = 29500
_MIB = 1 << 20


def rows() -> list[Row]:
    """Everything about this machine and installation that needs no configuration."""
    checks = (
        ("libraries", libraries),
        ("gpus", gpus),
        ("shm", lambda: shared_memory("/dev/shm", len(_devices()))),
        ("ulimits", lambda: limits(bool(glob.glob("/sys/class/infiniband/*")))),
        ("jit", lambda: build_locks(extensions_folder())),
        ("port", port),
    )
    return [row for name, check in checks for row in guarded(name, check)]


# --- libraries ---------------------------------------------------------------------------------------------------


def libraries(requirements: Iterable[str] | None = None) -> list[Row]:
    """Every library that Quintet requires is there, in a version within its bound.

    Args:
        requirements: as `torch>=2.10`; default: those of the installed Quintet.
    """
    wanted = importlib.metadata.requires("quintet") or [] if requirements is None else requirements
    found, versions = [], {}
    for requirement in wanted:
        match = re.fullmatch(r"([\w.-]+?)\s*(?:>=\s*([\d.]+))?", requirement)
        if not match:  # an extra, which has a condition
            continue
        name, bound = match[1], match[2] or "0"
        mend = f"pip install '{name}>={bound}', or `make install` in the checkout"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(bad(name, "not installed", mend))
            continue
        versions[name] = version
        if _numbers(version) < _numbers(bound):
            why = _HOLES.get(name, "the code uses what came later")
            found.append(bad(name, f"{version}, below {bound}: {why}", mend))
    if not found:
        shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
        found.append(ok("libraries", f"{len(versions)} within their bounds: {shown}"))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version as numbers that compare: 2.10.1+cpu -> (2, 10, 1)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


# --- devices -----------------------------------------------------------------------------------------------------


def _devices() -> list[str]:
    return sorted(glob.glob("/dev/nvidia[0-9]*"))


def gpus() -> list[Row]:
    """The GPUs that are there can be used, are of one kind, and are free."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return [ok("gpus", "hidden by CUDA_VISIBLE_DEVICES")]
    devices = _devices()
    if not devices:
        return [ok("gpus", f"none; {os.cpu_count()} CPU cores")]
    import torch

    if torch.version.cuda is None:
        found = f"{len(devices)} GPUs, but torch {torch.__version__} is built without CUDA"
        return [bad("gpus", found, "install torch with CUDA from https://pytorch.org, or set CUDA_VISIBLE_DEVICES=''")]
    if not torch.cuda.is_available():
        found = f"{len(devices)} GPUs and driver {_driver()}, of which torch for CUDA {torch.version.cuda} sees none"
        mend = (
            f"nvidia-smi must list them; update the driver to one for CUDA {torch.version.cuda}, or take another torch"
        )
        return [bad("gpus", found, mend)]
    kinds = Counter(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found = f"{named}, driver {_driver()}, CUDA {torch.version.cuda}, NCCL {nccl}"
    if len(kinds) > 1:
        return [warn("gpus", found, "every step waits for the slowest kind; choose by CUDA_VISIBLE_DEVICES"), *_taken()]
    return [ok("gpus", found), *_taken()]


def _taken() -> list[Row]:
    """GPUs whose memory others hold."""
    import torch

    rows = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        if free < 0.8 * total:
            found = f"GPU {number}: {free / 2**30:.0f} of {total / 2**30:.0f} GiB are free"
            rows.append(warn("gpus", found, "nvidia-smi shows whose process it is; end it, or choose other GPUs"))
    return rows


def _driver() -> str:
    try:
        said = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        said = None
    return said[1] if said else "unknown"


# --- limits of the system ----------------------------------------------------------------------------------------


def shared_memory(folder: str, gpus: int) -> list[Row]:
    """Room in /dev/shm, by which NCCL joins the GPUs of a machine; containers often give 64 MiB.

    The bound of 1 GiB is that of NCCL's own advice for containers. Without GPUs hardly anything lies there.
    """
    mend = "start the container with --shm-size=1g or more; on a machine `ls -l /dev/shm` shows what others left there"
    try:
        stats = os.statvfs(folder)
    except OSError as error:
        return [bad("shm", f"{folder}: {error.strerror}", f"mount a tmpfs at {folder}, {mend}")]
    free, total = stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize
    found = f"{free / _MIB:,.0f} of {total / _MIB:,.0f} MiB are free"
    if free < _MIB or (gpus > 1 and free < 64 * _MIB):
        return [bad("shm", found, mend)]
    if gpus > 1 and free < 1024 * _MIB:
        return [warn("shm", found, mend)]
    return [ok("shm", found)]


def limits(infiniband: bool) -> list[Row]:
    """Open files, and memory that may be locked: InfiniBand needs it without a limit."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    shown = [("open files", files, ""), ("locked memory", locked, " bytes")]
    found = ", ".join(f"{what} {'unlimited' if n == unlimited else f'{n:,}{unit}'}" for what, n, unit in shown)
    if files != unlimited and files < 512:
        return [
            bad("ulimits", found, "ulimit -n 65536, or LimitNOFILE= of the service; each rank holds a socket to each")
        ]
    if infiniband and locked != unlimited:
        mend = "ulimit -l unlimited (containers: --ulimit memlock=-1); InfiniBand locks the memory that it sends from"
        return [warn("ulimits", found, mend)]
    return [ok("ulimits", found)]


def extensions_folder() -> Path:
    """Where torch builds C++ extensions."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")


def build_locks(folder: Path) -> list[Row]:
    """Locks of builds: one that a killed build left makes every later build wait for ever, without a word."""
    now, rows = time.time(), []
    locks = sorted(path for path in folder.glob("**/lock") if path.is_file())
    for lock in locks:
        age, holder = now - lock.stat().st_mtime, _holder(lock)
        if holder:
            continue
        found = f"{lock}: {age / 60:.0f} minutes old, held by no process of this machine"
        mend = f"rm {shlex.quote(str(lock))}"
        if age > _STALE_SECONDS:
            rows.append(bad("jit", found, mend))
        else:
            rows.append(warn("jit", found, f"if no other machine is building: {mend}"))
    if folder.exists() and not os.access(folder, os.W_OK):
        rows.append(warn("jit", f"{folder}: cannot be written", "export TORCH_EXTENSIONS_DIR=/tmp/torch_extensions"))
    return rows or [ok("jit", f"no stale lock in {folder}")]


def _holder(file: Path) -> int | None:
    """A process of this machine that has the file open, as a build has its lock."""
    import psutil

    path = str(file.resolve())
    for process in psutil.process_iter():
        try:
            if any(opened.path == path for opened in process.open_files()):
                return process.pid
        except (psutil.Error, OSError):
            continue
    return None


def port() -> list[Row]:
    """The port at which ranks will meet is free. Inside a job its launcher may hold it already."""
    given = os.environ.get("MASTER_PORT")
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ:
        return []
    if given and not (given.isdigit() and 0 < int(given) < 65536):
        return [bad("port", f"MASTER_PORT={given}: no port", "unset MASTER_PORT, or give a number up to 65535")]
    number = int(given or _DEFAULT_PORT)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
            return [ok("port", f"{number} is free")]
        except OSError:
            pass
    from launcher.local import free_port

    found, mend = f"{number} is taken{_listener(number)}", f"--master_port {free_port()} of deepspeed or torchrun"
    if given:
        return [bad("port", f"MASTER_PORT={found}", f"export MASTER_PORT={free_port()}, or {mend}")]
    return [warn("port", f"{found}, the port of deepspeed and torchrun", f"{mend}; quintet launch takes a free one")]


def _listener(number: int) -> str:
    import psutil

    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return ""
    pids = [one.pid for one in connections if one.laddr and one.laddr.port == number and one.status == "LISTEN"]
    return f" by process {pids[0]}" if pids and pids[0] else ""


# --- W&B ---------------------------------------------------------------------------------------------------------


def weights_and_biases(mode: str) -> list[Row]:
    """Whether curves will reach W&B. A run goes on without it, so nothing here is worse than a warning.

    Args:
        mode: wandb.mode of the configuration; WANDB_MODE speaks where it is auto.
    """
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", mode)
    if mode in ("offline", "disabled", "dryrun"):
        return [ok("wandb", f"{mode}; no server is needed")]
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else wandb calls home
    from trainer import monitor

    address, has_key = monitor.server()
    where = urllib.parse.urlsplit(address)
    server = f"{where.scheme}://{where.hostname}" + (f":{where.port}" if where.port else "")
    offline = "wandb.mode=offline keeps the curves in the run folder, `wandb sync` sends them later"
    if not has_key:
        found = f"no key for {server}: runs are recorded offline"
        login = f"`wandb login`, or WANDB_API_KEY in the environment; {offline}"
        return [warn("wandb", found, login) if mode == "online" else ok("wandb", found)]
    if not monitor.answers(address):
        return [
            warn("wandb", f"a key is there, but {server} does not answer", f"{offline}; behind a proxy set HTTPS_PROXY")
        ]
    return [ok("wandb", f"a key is there and {server} answers")]
