"""The device of this rank: which one it is, what is free on it, and how exactly it multiplies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import psutil
import torch

from data.errors import UserError
from trainer import distributed


def pick_device(name: str) -> torch.device:
    """This rank's device; `auto` takes CUDA when there is one. Raises UserError for one that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda: torch sees no GPU; check the driver and the torch build, or use device=cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", distributed.place().local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def free_memory(device: torch.device) -> float:
    """Bytes that this rank may still take: free memory of its GPU, or its share of the host's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or distributed.world())
    return float(psutil.virtual_memory().available) / ranks_here


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """Keep TF32 out of the matrix products inside, where the encoder may have been allowed it.

    It would move a logit by about 0.1 at temperature 0.01, and change the order of near neighbours.
    """
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
