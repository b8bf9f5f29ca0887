"""Moments in the work of a device, to tell how long parts of a step take.

A GPU works behind the host that launches its kernels, so the host's clock says nothing of them. An event in the stream
does, and costs no wait: the time between two is asked for when a line is logged.
"""

from __future__ import annotations

import time

import torch

CPU = torch.device("cpu")

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """Now; on a GPU, when it has done what it was given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """The time between two marks of one device; on a GPU this waits for the later one."""
    if isinstance(begin, float):
        assert isinstance(end, float), "marks of two devices"
        return end - begin
    assert not isinstance(end, float), "marks of two devices"
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
