"""Exact nearest-neighbour search by blocks.

The score matrix of n queries and m passages never exists: a block of it does, query_block x passage_block
numbers, and the k best results so far of every query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.device import full_products


def top_k(
    queries: Tensor,
    passages: Tensor,
    k: int,
    *,
    query_block: int = 1024,
    passage_block: int = 16_384,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k passages with the highest inner product for each query; of equal scores the lower number comes first.

    Args:
        queries: [n, d]; passages: [m, d], finite, of one dtype. Scores are computed in that dtype, without TF32.
        k: at least 1; min(k, m) results are given.
        query_block, passage_block: rows of a block of the score matrix. They change memory and speed only
            (and the last bit of a score, where the matrix product sums in another order).
        device: where to compute; by default where the queries are. Blocks travel there one at a time.

    Returns:
        scores [n, min(k, m)] descending and passage numbers int64 of the same shape, on the computing device.
    """
    device = queries.device if device is None else torch.device(device)
    queries = queries.to(device)
    scores = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for start in range(0, len(passages), passage_block):
        block = passages[start : start + passage_block].to(device).T
        with full_products():
            found = [_best_of_block(rows @ block, k) for rows in queries.split(query_block)]
        block_scores, block_numbers = (torch.cat(parts) for parts in zip(*found, strict=True))
        scores, numbers = _merge(scores, numbers, block_scores, block_numbers + start, k)
    return scores, numbers


def _best_of_block(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, lower columns winning ties, in ascending column order: scores, columns."""
    if k >= scores.shape[1]:
        return scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    # torch.topk chooses freely among equal scores. That matters only where the score at place k goes on at
    # place k + 1; there, and only there, a stable sort of the row decides.
    best, columns = scores.topk(k + 1, dim=1)
    torn = (best[:, k] == best[:, k - 1]).nonzero().flatten()
    columns = columns[:, :k]
    if len(torn):
        columns[torn] = scores[torn].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    return scores.gather(1, columns), columns


def _merge(scores: Tensor, numbers: Tensor, more_scores: Tensor, more_numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of both, given that equal scores stand in ascending number, and all of the second after the first."""
    scores, numbers = torch.cat([scores, more_scores], dim=1), torch.cat([numbers, more_numbers], dim=1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), numbers.gather(1, order)[:, :k].contiguous()
