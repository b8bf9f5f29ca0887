"""The device of this rank: which one it is, what is free on it, and how exactly it multiplies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import sysconfig
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
    # Chunks have many sizes: without this, free memory lies in pieces, and to join them the GPU must be waited for.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
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


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device. A GPU copies it when it gets there; the host goes on at once.

    From memory that is not pinned the copy would wait until the GPU has done all that it was given.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# Of what is free when a training begins, for graphs that are kept. On a GPU the rest is for gradients, the optimizer's
# state and a chunk's backward; a host has other users.
GRAPHS_SHARE = {"cpu": 1 / 2, "cuda": 4 / 5}

_CHUNK_OF_A_CORE, _CHUNK_OF_ALL_CORES = 512, 2048


def free_memory(device: torch.device) -> float:
    """Bytes that this rank may still take: free memory of its GPU, or its share of the host's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    return float(psutil.virtual_memory().available) / distributed.place().local_world


def chunk_tokens(wanted: int | None, device: torch.device | str, *, half: bool = False) -> int:
    """Padded tokens of one forward pass without gradients: `wanted`, or what suits the device.

    A CPU has a chunk on each core (trainer/cores.py), which in fp32 is fastest while the activations fit what the core
    has of the caches (benchmarks/LOG.md); in half precision, where products take less time, that was not measured.
    A GPU wants many rows at once: an H100 encodes 2.7 million tokens a second by 65,536 and 1.4 million by 16,384
    (benchmarks/gpu.py).
    """
    if wanted is not None:
        return wanted
    if torch.device(device).type != "cpu":
        return 65_536
    return _CHUNK_OF_ALL_CORES if half else _CHUNK_OF_A_CORE


def training_chunk_tokens(wanted: int | None, device: torch.device | str, layers: int, hidden: int) -> int:
    """The same for a pass whose activations are kept: on a GPU some 10 GiB of them, whatever the model. All cores of a
    CPU share a chunk there.

    Seen on an H100 in bf16: 350 KiB a token at 12 layers of 768. The size of the model decides, not the free memory,
    so that a run that is started again, or on another card, cuts the same chunks and draws the same dropout.
    """
    if wanted is not None:
        return wanted
    if torch.device(device).type == "cpu":
        return _CHUNK_OF_ALL_CORES
    return min(65_536, max(1024, 32_768 * 12 * 768 // (layers * hidden)))


def can_compile() -> bool:
    """Whether torch.compile finds what Triton's launchers need: a C compiler and Python's headers."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.is_file() and any(map(shutil.which, ("cc", "gcc", "clang")))


def use_same_kernels() -> None:
    """From now on take only kernels of a GPU that give the same bits each time, and compiled ones by rule, not by time.

    torch raises RuntimeError where an operation has no such kernel. A CPU's are so anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written
    from torch._inductor import config

    if hasattr(config, "deterministic"):
        config.deterministic = True


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
