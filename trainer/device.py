"""The device of this rank: which one it is, what is free on it, and how exactly it multiplies."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

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


def keep_freed_memory() -> None:
    """Have glibc hold on to what tensors of up to 32 MiB give back, for those of the next chunk.

    Left alone it returns them to the system, which then zeroes page after page again: an eighth of the time of a step
    in fp32 on a CPU (benchmarks/LOG.md). Elsewhere this does nothing. See mallopt(3).
    """
    trim_threshold, mmap_threshold = -1, -3
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:
        set_option(trim_threshold, -1)  # never
        set_option(mmap_threshold, 32 << 20)  # the most that it takes


def free_memory(device: torch.device) -> float:
    """Bytes that this rank may still take: free memory of its GPU, or its share of the host's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available) / distributed.place().local_world


def chunk_tokens(wanted: int | None, device: torch.device | str) -> int:
    """Padded tokens of one forward pass without gradients: `wanted`, or what suits the device.

    A CPU is twice as fast while activations fit its caches (benchmarks/LOG.md). A GPU wants many rows at once: an H100
    encodes 2.7 million tokens a second by 65,536 and 1.4 million by 16,384 (benchmarks/gpu.py).
    """
    if wanted is not None:
        return wanted
    return 2048 if torch.device(device).type == "cpu" else 65_536


def training_chunk_tokens(wanted: int | None, device: torch.device | str, layers: int, hidden: int) -> int:
    """The same for a pass whose activations are kept: on a GPU some 10 GiB of them, whatever the model.

    Seen on an H100 in bf16: 300 KiB a token at 12 layers of 384. The size of the model decides, not the free memory,
    so that a run that is started again, or on another card, cuts the same chunks and draws the same dropout.
    """
    if wanted is not None or torch.device(device).type == "cpu":
        return chunk_tokens(wanted, device)
    return min(65_536, max(1024, 32_768 * 12 * 384 // (layers * hidden)))


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


def inner_products(queries: Tensor, passages: Tensor, out: Tensor | None = None) -> Tensor:
    """queries [n, d] and passages [m, d] -> [n, m], without TF32.

    Args:
        out: memory for at least n * m results of their type, to be used again from block to block: fresh pages cost
            a tenth of the product.
    """
    n, m = len(queries), len(passages)
    into = queries.new_empty(n, m) if out is None else out[: n * m].view(n, m)
    with full_products():
        return torch.mm(queries, passages.T, out=into)


@cache
def has_fast_bf16(kind: str) -> bool:
    """Whether bf16 products are faster than fp32 ones on this machine's "cpu" or "cuda": two to ten times, where so."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and re.search(r"\b(avx512_bf16|amx_bf16)\b", flags.read_text()) is not None
