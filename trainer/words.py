"""The word vectors of a batch, looked up once for all of its chunks.

The gradient of a lookup is as large as the table: 384 MB for XLM-R's 250,002 pieces of 384 numbers. Chunks that read
the table itself would each write such a gradient and add it up. Here they read the rows that the batch uses, whose
gradient is small, and the table gets its own once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
        self._place = used.new_zeros(table.num_embeddings)
        self._place[used] = torch.arange(len(used), device=used.device)

    def look_up(self, ids: Tensor) -> Tensor:
        """Word vectors [..., D] of ids [...] that are all among the batch's."""
        return F.embedding(self._place[ids], self._leaf)

    def pass_on(self, backward: Callable[[Tensor], object]) -> None:
        """Give the table the gradient that has come together here, by one `backward` of a scalar."""
        assert self._leaf.grad is not None, "after the chunks' backward"
        backward((self._rows * self._leaf.grad).sum())


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
