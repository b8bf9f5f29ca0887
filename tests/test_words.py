"""Word vectors that are looked up once for all chunks of a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from trainer.words import shared


def loss(vectors: Tensor, weights: Tensor) -> Tensor:
    return (vectors.tanh() * weights).sum()


def test_the_table_gets_the_gradient_of_lookups_of_its_own():
    torch.manual_seed(0)
    table = nn.Embedding(50, 4, padding_idx=1)
    chunks = [torch.tensor([[7, 3, 3], [9, 1, 1]]), torch.tensor([[3, 49]])]
    weights = [torch.randn(*chunk.shape, 4) for chunk in chunks]
    sum(loss(table(chunk), weight) for chunk, weight in zip(chunks, weights, strict=True)).backward()
    wanted, table.weight.grad = table.weight.grad, None
    with shared(table, np.concatenate([chunk.flatten().numpy() for chunk in chunks])) as words:
        for chunk, weight in zip(chunks, weights, strict=True):
            loss(table(chunk), weight).backward()
            assert table.weight.grad is None, "no chunk writes a gradient of the table"
        words.pass_on(Tensor.backward)
    assert wanted is not None
    assert not wanted[1].any(), "padding is not trained"
    assert torch.allclose(table.weight.grad, wanted, atol=1e-7)


def test_the_table_is_whole_again_afterwards():
    table = nn.Embedding(5, 2)
    with shared(table, np.array([1, 3])):
        assert torch.equal(table(torch.tensor([3])), table.weight[3:4])
    assert torch.equal(table(torch.arange(5)), table.weight)
