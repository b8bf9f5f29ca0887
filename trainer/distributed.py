"""Every collective of the project, each with one line on why all ranks reach it. The only door to torch.distributed.

Without a process group (a single process that started none) every function answers for a world of one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import QuintetError, UserError
from trainer import watchdog
from trainer.clock import Mark, mark

Result = TypeVar("Result")

START_SECONDS = 120.0  # for the ranks to find each other
_store: dist.Store | None = None  # of the job's process group
_gathers: deque[tuple[Mark, Mark]] = deque(maxlen=1024)  # when rows were gathered, and their gradients sent back


@dataclass(frozen=True)
class Place:
    """Which rank this process is, as its launcher says: torchrun, deepspeed or srun.

    Attributes:
        local_rank, local_world: its number among the ranks of its host, and how many those are; where nobody says how
            many, all of them.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def place() -> Place:
    """Read the rank from the environment: RANK, WORLD_SIZE, LOCAL_RANK, else the variables of a step of Slurm.

    A batch script has a SLURM_PROCID and the SLURM_NTASKS of its job too, but is none of those tasks: srun starts them.

    Raises:
        UserError: the variables are incomplete or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    try:
        rank, world, local_rank = [int(os.environ.get(name, "010"[n])) for n, name in enumerate(names)]
    except ValueError as error:
        raise UserError(f"{'/'.join(names)}: {error}; start ranks with deepspeed, torchrun or srun") from None
    here = Place(rank, world, local_rank, _local_world(world))
    if not 0 <= here.rank < here.world:
        raise UserError(f"{names[0]}={here.rank} is not below {names[1]}={here.world}; unset both for a single process")
    return here


def _local_world(world: int) -> int:
    """Ranks on this host: as torchrun or deepspeed says, or as Slurm does, such as 8(x3),4 for the most of any host."""
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ""
    if not said and "RANK" not in os.environ:
        said = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return max(map(int, re.findall(r"\d+(?!\d|\))", said)), default=world)


def start(
    device: torch.device, timeout_seconds: float, rendezvous: str = "", start_seconds: float = START_SECONDS
) -> Place:
    """Join the process group of this job and return this process's place in it.

    Args:
        device: CUDA adds NCCL for its tensors; host tensors always travel over gloo.
        timeout_seconds: how long a collective may wait for a rank.
        rendezvous: an init method such as file:///path, for tests; the default is MASTER_ADDR and MASTER_PORT.
        start_seconds: how long the ranks may take to find each other; then this process ends with code 124.

    Raises:
        UserError: the port is taken, or the address is none of this machine's.
    """
    here = place()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name, value in zip(names, astuple(here), strict=True):
        os.environ.setdefault(name, str(value))  # DeepSpeed insists on them, in every run of a process
    if dist.is_initialized():
        return here
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if here.world == 1 and not rendezvous:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        atexit.register(dist.destroy_process_group)  # NCCL complains of a group that is left to the end
        return here
    _complete_rendezvous()
    with watchdog.within(start_seconds, _not_met(here)):
        _meet(here, rendezvous or "env://", backend, timeout)
    return here


def _not_met(here: Place) -> str:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    mend = "see whether all ranks were started, whether that is the address of rank 0's host, and whether a firewall"
    return f"rank {here.rank} of {here.world} has not met the others at {where}; {mend} is in between; gave up"


def _meet(here: Place, init_method: str, backend: str, timeout: timedelta) -> None:
    global _store
    try:
        # What init_process_group does by itself; here the store is kept, for the watchdog.
        _store, _, _ = next(dist.rendezvous(init_method, here.rank, here.world, timeout=timeout))
    except dist.DistNetworkError as error:
        if here.rank:
            raise
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        reason = str(error).partition("[")[0].strip().splitlines()[0]
        mend = "another job may use it: set MASTER_PORT to a free one, or end that job"
        raise UserError(f"MASTER_ADDR={address} MASTER_PORT={port}: cannot be listened on ({reason}); {mend}") from None
    _store.set_timeout(timeout)
    group = dist.PrefixStore("default_pg", _store)
    dist.init_process_group(backend, store=group, rank=here.rank, world_size=here.world, timeout=timeout)


def store() -> dist.Store | None:
    """The job's key-value store through a connection of its own, for another thread; None for a single rank."""
    return _store.clone() if _store is not None and world() > 1 else None  # type: ignore[attr-defined]


def _complete_rendezvous() -> None:
    """Fill in where the ranks meet, where the launcher has not said it."""
    if "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("SLURM_NNODES", "1")) > 1:
            raise UserError("MASTER_ADDR is not set: start with slurm/pretrain.sh, or export the first node's address")
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "9500")) % 40000))
    interface = _interface_to(os.environ["MASTER_ADDR"])
    if interface and not interface.startswith("lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _interface_to(host: str) -> str:
    """The network interface by which this machine reaches a host; empty where none is found.

    Gloo, left alone, offers the others the address of the machine's own name, which on Debian is that of loopback.

    Raises:
        UserError: the name does not resolve.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    except OSError:
        raise UserError(f"MASTER_ADDR={host} does not resolve; give the address itself") from None
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing, but chooses a way
            mine = probe.getsockname()[0]
    except OSError:
        return ""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(one.address == mine for one in found)), "")


def stop() -> None:
    """Leave the group of a job of several ranks. That of a single process stays: DeepSpeed holds on to its first."""
    if world() > 1:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Stack the rows of all ranks in rank order: [n, ...] -> [W n, ...]. Every rank holds the same n.

    The backward sums what all ranks did with a row and hands the sum to its owner (one reduce-scatter), so a mean
    over each rank's own queries, averaged over ranks by the engine, has the gradient of one process that holds
    the whole batch.
    """
    if world() == 1:
        return rows
    return _GatherRows.apply(rows) if rows.requires_grad else _all_gather(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _all_gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        owned = grad.new_empty(len(grad) // world(), *grad.shape[1:])
        # Every rank computes the loss of every step, so every rank comes here once per gathered column.
        _reduce_scatter(owned, grad.contiguous())
        return owned


def take_gathers() -> list[tuple[Mark, Mark]]:
    """Begin and end of every exchange by `gather_rows`, backwards included, since the last call. Local."""
    taken = list(_gathers)
    _gathers.clear()
    return taken


def _all_gather(rows: Tensor) -> Tensor:
    begin = mark(rows.device)
    stacked = rows.new_empty(world() * len(rows), *rows.shape[1:])
    # torch 2.13 renames the flat collectives and warns for the old names; the lower bound 2.10 has only the old.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(stacked, rows.detach().contiguous())
    _gathers.append((begin, mark(rows.device)))
    return stacked


def _reduce_scatter(owned: Tensor, grad: Tensor) -> None:
    begin = mark(grad.device)
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(owned, grad)
    _gathers.append((begin, mark(grad.device)))


def deal_rows(rows: Tensor, out: list[int], into: list[int]) -> Tensor:
    """Send the first out[0] rows to rank 0, the next out[1] to rank 1, ...; return what came, in rank order.

    Every rank deals its part of every batch; `into` says how many rows each of them sends here.
    """
    received = rows.new_empty(sum(into), *rows.shape[1:])
    dist.all_to_all_single(received, rows, into, out)
    return received


def agree_max(value: int) -> int:
    """The largest of all ranks' values: how many chunks everyone runs where a forward is a collective."""
    return int(_reduce([value], dist.ReduceOp.MAX)[0])


def agree_min(value: int) -> int:
    """The smallest of all ranks' values: how many graphs everyone has memory for."""
    return int(_reduce([value], dist.ReduceOp.MIN)[0])


def all_ok(ok: bool) -> bool:
    """Whether every rank says yes: a save, a skip or a stop is decided by all or not at all."""
    return bool(_reduce([int(ok)], dist.ReduceOp.MIN)[0])


def any_of(flag: bool) -> bool:
    """Whether some rank says yes: a stop request may reach one rank only."""
    return bool(_reduce([int(flag)], dist.ReduceOp.MAX)[0])


def sums(values: list[float]) -> list[float]:
    """Sums over ranks, in float64, on the host: counts and figures for the log."""
    return _reduce(values, dist.ReduceOp.SUM)


def _reduce(values: list[Any], op: Any) -> list[float]:
    if world() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return [float(value) for value in tensor.tolist()]


def sum_in_place(tensor: Tensor) -> None:
    """Replace a tensor by its sum over ranks: parts that each rank holds become the whole for a checkpoint."""
    if world() > 1:
        dist.all_reduce(tensor)


def exchange(tensor: Tensor, partner: int) -> Tensor:
    """Swap a tensor with another rank, which calls this too; no third rank takes part. Same shape on both sides."""
    received = torch.empty_like(tensor)
    swap = [dist.P2POp(dist.isend, tensor, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(swap):
        work.wait()
    return received


def barrier() -> None:
    """Wait for every rank: rank 0 has made or renamed what the others open next."""
    if world() > 1:
        all_ok(True)


class Elsewhere(QuintetError):
    """Another rank has ended the run and says why; this one ends with the same code, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Do something on rank 0 only and give every rank its result, plain data; its error ends all ranks alike."""
    outcome: list[Any] = [None, 0]
    error: QuintetError | None = None
    if rank() == 0:
        try:
            outcome[0] = work()
        except QuintetError as raised:
            error, outcome[1] = raised, raised.exit_code
    if world() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1]:
        raise Elsewhere(outcome[1])
    result: Result = outcome[0]
    return result


@contextlib.contextmanager
def together() -> Iterator[None]:
    """End all ranks when some rank meets a foreseen error inside the block; the first that met one says it."""
    error: QuintetError | None = None
    try:
        yield
    except QuintetError as raised:
        error = raised
    speaker = agree_min(rank() if error else world())
    code = int(_reduce([error.exit_code if error else 0], dist.ReduceOp.MAX)[0])
    if error is not None and speaker == rank():
        raise error
    if code:
        raise Elsewhere(code)


def end(error: QuintetError) -> NoReturn:
    """End all ranks with an error that all have met: one message, not one for each rank."""
    raise error if rank() == 0 else Elsewhere(error.exit_code)


class Job:
    """This job's ranks, for what takes them as an object (checkpoint.Saving)."""

    rank = property(lambda self: rank())
    world = property(lambda self: world())

    def all(self, ok: bool) -> bool:
        return all_ok(ok)
