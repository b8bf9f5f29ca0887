"""Whether replicas of the weights are equal, by checksums that each rank computes where its weights are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

# Elements at a time: bounds what a checksum needs beside the weights, 64 MB on a GPU. On a CPU they stay in its cache.
_BLOCKS = {"cuda": 1 << 22, "cpu": 1 << 16}
_NEXT_BLOCK = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as an int64


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """One int64 for each fp32 tensor, [n] on the host, in one copy from the device.

    A tensor's bits are read as 32-bit integers, each is multiplied by an odd number of its position, and all are added
    modulo 2^64; blocks are chained by another odd factor. A flipped bit b changes the sum by an odd number times 2^b,
    b < 32, which is never 0 modulo 2^64: every single flip is found, and so are two elements that changed places.
    """
    return torch.stack([_checksum(tensor.detach()) for tensor in tensors]).cpu()


def _checksum(tensor: Tensor) -> Tensor:
    bits = tensor.reshape(-1).view(torch.int32)
    size = min(_BLOCKS.get(tensor.device.type, _BLOCKS["cpu"]), len(bits))
    factors = 2 * torch.arange(size, device=tensor.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for block in bits.split(size) if size else ():
        total = total * _NEXT_BLOCK + (block * factors[: len(block)]).sum()
    return total


def odd_ranks(rows: Tensor) -> list[int]:
    """The ranks whose row of checksums [world, n] is not that of the majority; all of them where there is none."""
    found = [tuple(row) for row in rows.tolist()]
    usual, count = Counter(found).most_common(1)[0]
    if 2 * count <= len(found):
        return list(range(len(found)))
    return [rank for rank, row in enumerate(found) if row != usual]
