"""Checks of `quintet doctor` inside a job of several ranks: they meet, sum, and the slow one is named.

An all-reduce takes the same time on all ranks, however slow one of them is. So each is also measured at what it does
alone, matrix products, and at its links in a ring of the ranks: who has no fast link is the slow one.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from launcher.checks import OK, Row, bad, of_error, ok, warn
from launcher.checks_hosts import SKEW_SECONDS, skew_row

if TYPE_CHECKING:
    from torch import Tensor

_TIMEOUT_SECONDS = 120.0
_BYTES = 32 << 20
_ROUNDS = 3
# A rank is slow below this share of what the others do: two ranks of a healthy machine differ by less.
_SLOW = 0.5


@dataclass(frozen=True)
class Measured:
    """One rank: where it is, and what it does. Bandwidths in bytes a second, products in operations a second."""

    host: str
    clock: float  # seconds since 1970, read by all ranks at once
    summing: float  # of all ranks: bus bandwidth, as NCCL's tests count it, 2 (W - 1) / W bytes a second
    link: float  # with the next rank, both ways at once; that of the last with the first closes the ring
    products: float


def rows(own: Sequence[Row], timeout_seconds: float = _TIMEOUT_SECONDS) -> list[Row]:
    """Meet the other ranks and measure them. Collective; the rows are whole on rank 0.

    Args:
        own: what this rank has found on its machine; rank 0 gets that of other hosts which is not ok.
    """
    from trainer import distributed
    from trainer.device import pick_device

    device = pick_device("auto")
    try:
        distributed.start(device, timeout_seconds)
    except UserError as error:
        return of_error("ranks", error, "start ranks by quintet launch, deepspeed, torchrun or slurm/stage.sh")
    except RuntimeError as error:
        return [_not_met(error, timeout_seconds)]
    try:
        told = _gather(json.dumps([asdict(row) for row in own if row.status != OK]))
        ranks = [Measured(**json.loads(text)) for text in _gather(json.dumps(asdict(_measured(device))))]
    except RuntimeError as error:
        return [bad("ranks", f"a collective broke off: {_first_line(error)}", _NETWORK)]
    finally:
        distributed.stop()
    elsewhere = _elsewhere([[Row(**row) for row in json.loads(text)] for text in told], ranks)
    return [*judged(ranks, "nccl" if device.type == "cuda" else "gloo"), *elsewhere]


_NETWORK = (
    "look at the other ranks' logs; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the interface that joins the hosts"
)


def _not_met(error: RuntimeError, seconds: float) -> Row:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error):
        return bad("ranks", f"{where} is taken by another process", "export another MASTER_PORT for all ranks")
    found = f"not all {os.environ.get('WORLD_SIZE')} ranks were at {where} within {seconds:.0f} s: {_first_line(error)}"
    return bad("ranks", found, "look whether all ranks run and whether a firewall closes that port on the first host")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- measuring ---------------------------------------------------------------------------------------------------


def _measured(device: Any) -> Measured:
    """What this rank does, alone, with each neighbour and with all. A collective."""
    import torch

    from trainer import distributed

    distributed.barrier()
    clock = time.time()
    data = torch.ones(_BYTES // 4, device=device)
    world = distributed.world()
    products = _products(device)
    summing = _seconds(lambda: distributed.sum_in_place(data), device)
    bus = 2 * (world - 1) / world * _BYTES / summing
    links = [_link(data, pairs, device) for pairs in phases(world)]
    return Measured(socket.gethostname(), clock, bus, max(links, default=0.0), products)


def phases(world: int) -> list[dict[int, int]]:
    """The links of a ring, each rank's to the next one, in phases in which no rank has two of them."""
    if world < 3:
        return [{0: 1}][: world - 1]
    found: list[dict[int, int]] = [{}, {}, {}]
    for rank in range(world):
        closes_odd_ring = rank == world - 1 and world % 2
        found[2 if closes_odd_ring else rank % 2][rank] = (rank + 1) % world
    return [links for links in found if links]


def _link(data: Tensor, links: Mapping[int, int], device: Any) -> float:
    """Bandwidth of this rank's link to the next one; 0 in a phase that has it not. A collective."""
    from trainer import distributed

    rank = distributed.rank()
    distributed.barrier()
    partner = {**links, **{last: first for first, last in links.items()}}.get(rank)
    if partner is None:
        return 0.0
    speed = 2 * _BYTES / _seconds(lambda: distributed.exchange(data, partner), device)
    return speed if rank in links or distributed.world() == 2 else 0.0


def _products(device: Any) -> float:
    """Operations a second of matrix products, all ranks at once."""
    import torch

    from trainer import distributed

    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(left)
    distributed.barrier()
    return 2 * 10 * size**3 / _seconds(lambda: [torch.mm(left, left, out=out) for _ in range(10)], device)


def _seconds(work: Callable[[], object], device: Any) -> float:
    """Mean time of a round, after one to warm up."""
    import torch

    work()
    for round in range(_ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if round == 0:
            begin = time.perf_counter()
        if round < _ROUNDS:
            work()
    return (time.perf_counter() - begin) / _ROUNDS


def _gather(text: str) -> list[str]:
    """The texts of all ranks, in their order. A collective."""
    import torch

    from trainer import distributed

    raw = text.encode()
    longest = distributed.agree_max(len(raw))
    rows = distributed.gather_rows(torch.tensor([list(raw.ljust(longest))], dtype=torch.uint8))
    return [bytes(row.tolist()).decode().rstrip() for row in rows]


# --- judging -----------------------------------------------------------------------------------------------------


def judged(ranks: Sequence[Measured], backend: str) -> list[Row]:
    """The rows of a job: how fast it sums, each rank, and who is slow."""
    hosts = len({rank.host for rank in ranks})
    several = "s" if hosts > 1 else ""
    speed = statistics.median(rank.summing for rank in ranks)
    size = f"{_BYTES >> 20} MiB over {len(ranks)} ranks on {hosts} host{several}"
    found = [ok("all-reduce", f"{backend}, {size}: {speed / 1e9:.2f} GB/s")]
    slow_ranks, slow_places = slow([rank.products for rank in ranks]), _slowly_linked(ranks)
    for number, rank in enumerate(ranks):
        name = f"rank {number}"
        speeds = f"{rank.host}: all-reduce {rank.summing / 1e9:.2f} GB/s, link {rank.link / 1e9:.2f} GB/s, "
        speeds += f"{rank.products / 1e9:,.0f} GFLOP/s"
        if number in slow_ranks:
            mend = f"see who else computes on {rank.host} (top, nvidia-smi), whether it is throttled; else leave it out"
            found.append(warn(name, f"{speeds}: SLOW, its products take more than twice the others' time", mend))
        elif _place(number, rank, hosts) in slow_places:
            mend = f"look at the network of {rank.host}: cable, port, `ethtool`, `ibstat`; else leave it out"
            found.append(
                warn(name, f"{speeds}: SLOW, it sends and receives at less than half of the others' speed", mend)
            )
        else:
            found.append(ok(name, speeds))
    return found + _clocks(ranks)


def _place(number: int, rank: Measured, hosts: int) -> object:
    """What has a network of its own: a host, or, on a single host, a rank."""
    return rank.host if hosts > 1 else number


def _slowly_linked(ranks: Sequence[Measured]) -> set[object]:
    """The places whose links to other places are all slow: one slow link alone may be the neighbour's fault."""
    hosts = len({rank.host for rank in ranks})
    places = [_place(number, rank, hosts) for number, rank in enumerate(ranks)]
    best: dict[object, float] = {}
    for number, rank in enumerate(ranks):
        ends = places[number], places[(number + 1) % len(ranks)]
        if ends[0] != ends[1]:
            best |= {place: max(best.get(place, 0.0), rank.link) for place in ends}
    names, speeds = list(best), list(best.values())
    return {names[number] for number in slow(speeds)}


def slow(speeds: Sequence[float]) -> set[int]:
    """The numbers of those whose speed is below half of the median of the others'."""
    found = set()
    for number, speed in enumerate(speeds):
        others = [*speeds[:number], *speeds[number + 1 :]]
        if others and speed < _SLOW * statistics.median(others):
            found.add(number)
    return found


def _clocks(ranks: Sequence[Measured]) -> list[Row]:
    """Hosts whose clock differs from that of rank 0, once each."""
    differing = {rank.host: abs(rank.clock - ranks[0].clock) for rank in ranks}
    found = [skew_row(host, skew) for host, skew in differing.items() if skew > SKEW_SECONDS]
    return found or [ok("clocks", f"at most {max(differing.values()):.2f} s apart")]


def _elsewhere(told: Sequence[Sequence[Row]], ranks: Sequence[Measured]) -> list[Row]:
    """What other hosts have found, with their names; each host once."""
    found, seen = [], {ranks[0].host}
    for rows_of_rank, rank in zip(told, ranks, strict=True):
        if rank.host not in seen:
            seen.add(rank.host)
            found += [Row(row.name, row.status, row.found, row.mend, rank.host) for row in rows_of_rank]
    return found
