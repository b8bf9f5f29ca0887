"""Runs a function in n processes joined by gloo, as n ranks on one machine."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

# Ranks are forked from a process that has imported what takes ten seconds, and has used nothing of it.
_RANKS = multiprocessing.get_context("forkserver")
_RANKS.set_forkserver_preload(["trainer.loop", *(["deepspeed"] if os.environ.get("DS_ACCELERATOR") == "cpu" else [])])


def run(function: Callable[..., Any], world: int, folder: Path, *args: Any, timeout_seconds: float = 240) -> list[Any]:
    """Call function(*args) on `world` ranks and return their results in rank order.

    The ranks meet through a file, not a port, so that two test runs never meet each other. `function` must be
    importable (defined at a module's top level) and its result picklable.
    """
    results = _RANKS.SimpleQueue()
    rendezvous = f"file://{folder / f'rendezvous-{function.__name__}-{world}-{os.urandom(4).hex()}'}"
    environment = dict(os.environ)  # the process that forks has that of its own start
    processes = [
        _RANKS.Process(target=_rank, args=(environment, rank, world, rendezvous, results, function, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        outcomes = _collect(processes, results, timeout_seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [outcomes[rank] for rank in range(world)]


def _collect(processes: list[Any], results: Any, timeout_seconds: float) -> dict[int, Any]:
    outcomes: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(outcomes) < len(processes):
        while not results.empty():
            rank, ok, value = results.get()
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            outcomes[rank] = pickle.loads(value)
        for rank, process in enumerate(processes):
            if rank not in outcomes and process.exitcode not in (None, 0):
                raise AssertionError(f"rank {rank} ended with exit code {process.exitcode}")
        if time.monotonic() > deadline:
            raise AssertionError(f"ranks {sorted(set(range(len(processes))) - set(outcomes))} gave no answer in time")
        time.sleep(0.02)
    return outcomes


def _rank(
    environment: dict[str, str],
    rank: int,
    world: int,
    rendezvous: str,
    results: Any,
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29611", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    try:
        from trainer import distributed

        distributed.start(torch.device("cpu"), 120, rendezvous)
        # Pickled here: the queue's own way shares tensors by file handle, which ends with this process.
        results.put((rank, True, pickle.dumps(function(*args))))
        distributed.stop()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise
