"""The word vectors of a batch, looked up once for all of its chunks.

The gradient of a lookup is as large as the table: 384 MB for XLM-R's 250,002 pieces of 384 numbers. Chunks that read
the table itself would each write such a gradient and add it up. Here they read the rows that the batch uses, whose
gradient is small, and the table gets its own once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.device import onto


class Words:
    """The rows of a word table that stand in a batch: a leaf whose gradient chunks add to."""

    def __init__(self, table: nn.Embedding, used: Tensor) -> None:
        self._rows: Tensor = table(used)
        self._leaf = self._rows.detach().requires_grad_()
        self._leaf.grad = torch.zeros_like(self._rows)
        self._place = used.new_zeros(table.num_embeddings)
        self._place[used] = torch.arange(len(used), device=used.device)

    def look_up(self, ids: Tensor) -> Tensor:
        """Word vectors [..., D] of ids [...] that are all among the batch's."""
        places = self._place[ids]
        if places.device.type == "cpu":
            vectors: Tensor = _LookUp.apply(self._leaf, places)
            return vectors
        # there index_add_ would not give the same bits each time
        return F.embedding(places, self._leaf)

    def pass_on(self, backward: Callable[[Tensor], object]) -> None:
        """Give the table the gradient that has come together here, by one `backward` of a scalar."""
        assert self._leaf.grad is not None, "set at the beginning"
        backward(_Given.apply(self._rows, self._leaf.grad))


class _LookUp(torch.autograd.Function):
    """F.embedding whose backward adds to the leaf's gradient in place.

    Autograd's own writes zeros for all words of the batch and adds them up, in every chunk: 83 ms rather than 2 for
    2,048 tokens of a batch with 60,000 different ones (384 numbers, one thread; benchmarks/LOG.md).
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, places: Tensor) -> Tensor:
        ctx.leaf = leaf
        ctx.save_for_backward(places)
        return F.embedding(places, leaf)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        (places,) = ctx.saved_tensors
        ctx.leaf.grad.index_add_(0, places.flatten(), gradient.reshape(-1, gradient.shape[-1]))
        return None, None


class _Given(torch.autograd.Function):
    """A scalar, 0, whose gradient at `rows` is the given one: without the products that a sum of them would hold."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.mul_(outer), None


@contextmanager
def shared(table: nn.Embedding, ids: np.ndarray) -> Iterator[Words]:
    """Let the table look up only `ids` (any order, repeats allowed), and collect their gradient, until the end."""
    used = np.zeros(table.num_embeddings, dtype=bool)  # ten times faster than to sort the ids
    used[ids] = True
    words = Words(table, onto(torch.from_numpy(np.flatnonzero(used)), table.weight.device))
    table.forward = words.look_up  # type: ignore[method-assign, assignment]
    try:
        yield words
    finally:
        del table.forward
