"""The training step on two ranks of one thread: ours under ZeRO-1, sentence-transformers' cached loss under DDP.

The peer gathers across devices, as under torchrun with gather_across_devices=True; its loop is that of step.py with the
model in DistributedDataParallel, which transformers' Trainer puts there. Ours deals the pairs and takes the step, as
`quintet pretrain` does. Wall-clock times are the first rank's: both meet in every step.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import step
from benchmarks.common import alternate, gate, table, target
from data.collate import Batch

WORLD = 2
PEERS: tuple[step.Peer, ...] = (
    *(step.DEFAULT, ("mini_batch_size", 4), ("mini_batch_size", 8), ("mini_batch_num_tokens", 1024)),
)


def measure(quick: bool = False) -> dict[str, Any]:
    """The gate and the alternation, in two processes."""
    case = step.QUICK if quick else replace(step.NATURAL, repeats=3)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ProcessPoolExecutor(WORLD, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_rank, rank, port, case) for rank in range(WORLD)]
        found, *_ = [each.result() for each in ranks]
    return {
        "settings": {"case": vars(case), "ranks": WORLD, "seed": step.SEED},
        "correctness": found["correctness"],
        "tables": [table(f"a step on {WORLD} ranks of one thread, {case.pairs} pairs, fp32", found["rows"])],
        "targets": [target("step on two ranks over the peer's best", 3.0, found["ratio"])],
    }


def _rank(rank: int, port: int, case: step.Case) -> dict[str, Any]:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from trainer import balance, distributed

    torch.set_num_threads(1)
    sides = step.Sides(replace(case, pairs=case.pairs // WORLD))
    sides.batch = _share(step.texts(case), rank)
    wrapped = DistributedDataParallel(sides.peer_model)
    chunk = min(case.chunks, key=lambda tokens: abs(tokens - 1024))

    def ours(budget: float) -> Callable[[], object]:
        return lambda: sides.ours(chunk, budget, balance.deal(sides.batch))()

    sides.train(False)
    correctness = {"ours": _gate(sides, wrapped, chunk)}
    sides.train(True)
    work: dict[str, Callable[[], object]] = {
        f"ours, kept, chunk={chunk}": ours(step.KEEP_ALL),
        f"ours, replayed, chunk={chunk}": ours(step.KEEP_NONE),
    }
    work |= {f"peer, {setting[0]}={setting[1]}": sides.peer(setting, wrapped=wrapped) for setting in PEERS}
    timings = alternate(work, case.repeats)
    distributed.stop()
    best = min(timing.median for name, timing in timings.items() if name.startswith("peer"))
    first, *_ = timings.values()
    rows = [{"variant": name, **timing.cells(), "x its best": best / timing.median} for name, timing in timings.items()]
    return {"rows": rows, "ratio": best / first.median, "correctness": correctness}


def _gate(sides: step.Sides, wrapped: Any, chunk: int) -> dict[str, float]:
    """Loss and gradient, averaged over the ranks, against the peer's at its default, without dropout."""
    from trainer import distributed

    ours = step.our_gradient(sides, chunk, step.KEEP_NONE)
    value = sides.peer(step.DEFAULT, wrapped=wrapped)(update=False)
    mean, peers_mean = (found / WORLD for found in distributed.sums([ours[0], value]))
    return gate("two ranks", (mean, ours[1]), (peers_mean, step.gradient_of_peer(sides)))


def _share(whole: Batch, rank: int) -> Batch:
    """A run of the pairs of a batch without negatives."""
    b = whole.num_queries // WORLD
    rows = np.arange(rank * b, (rank + 1) * b)
    return replace(
        whole,
        tokens=whole.tokens.take(np.concatenate([rows, whole.num_queries + rows])),
        num_queries=b,
        query_hash=whole.query_hash[rows],
        passage_hash=whole.passage_hash[rows],
        record_ids=whole.record_ids[rows],
    )
