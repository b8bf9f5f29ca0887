"""Forward passes side by side on the cores of a CPU, one chunk on each.

One chunk on all cores waits for the slowest in every product and every layer norm, and its products are small: shared
by two cores a product of 2,048 x 384 x 1,536 runs at three quarters of the speed of a large one (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_ROUNDS = 4  # of items for each core at least, or the last ones leave cores without work for too long


def each_on_a_core(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """work(item) of every item, in their order; few items, or a single core, are worked on one after the other.

    `work` runs in threads: modes of torch that hold for one thread, as no_grad and autocast, are to be set within it.
    What it raises is raised here.
    """
    cores = torch.get_num_threads()
    if cores == 1 or len(items) < _ROUNDS * cores:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(cores, "core", initializer=partial(torch.set_num_threads, 1)) as pool:
        try:
            yield from pool.map(work, items)
        finally:
            torch.set_num_threads(cores)  # it was set for this thread's later children, too
