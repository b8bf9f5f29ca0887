"""Exact nearest-neighbour search by blocks.

The score matrix of n queries and m passages never exists: a block of it does, query_block x passage_block
numbers, and the k best results so far of every query. After the first block few scores beat a query's k-th best so
far; they are found by the maxima of groups of columns, so that almost all scores are looked at once and no more.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trainer.device import inner_products

_GROUP = 64  # columns whose maximum is compared at once


class Rows(Protocol):
    """What can be sliced into tensors [n, d]: a tensor, or vectors in a file (corpus.Vectors)."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


def top_k(
    queries: Tensor,
    passages: Rows,
    k: int,
    *,
    query_block: int = 512,
    passage_block: int = 8192,
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
    tiles = queries.to(device).split(query_block)
    none = torch.empty(0, dtype=torch.int64, device=device)
    best = [(tile.new_empty(len(tile), 0), none.expand(len(tile), 0)) for tile in tiles]
    buffer = queries.new_empty(min(query_block, len(queries)) * min(passage_block, len(passages)), device=device)
    for start in range(0, len(passages), passage_block):
        block = passages[start : start + passage_block].to(device)
        best = [
            _improve(*found, inner_products(tile, block, buffer), start, k)
            for found, tile in zip(best, tiles, strict=True)
        ]
    scores, numbers = (torch.cat(parts) for parts in zip(*best, strict=True))
    return scores, numbers


def _improve(scores: Tensor, numbers: Tensor, found: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of what was known [n, <= k] and of the scores [n, m] with the passages from `start` on."""
    if scores.shape[1] < k:
        more, columns = _best_of_block(found, k)
    else:
        more, columns = _above(found, scores[:, -1])
    if not more.shape[1]:
        return scores, numbers
    scores, numbers = torch.cat([scores, more], dim=1), torch.cat([numbers, columns + start], dim=1)
    # Equal scores stand in ascending number, and those of the new block come after those before it.
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), numbers.gather(1, order[:, :k])


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


def _above(scores: Tensor, bars: Tensor) -> tuple[Tensor, Tensor]:
    """What is above the bar of its row: scores and columns [n, c] in ascending column order, filled up with -inf."""
    rows, columns = _places_above(scores, bars)
    order = (rows * scores.shape[1] + columns).argsort()
    rows, columns = rows[order], columns[order]
    counts = rows.bincount(minlength=len(scores))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (len(scores), int(counts.max()))
    found, numbers = scores.new_full(shape, -torch.inf), torch.zeros(shape, dtype=torch.int64, device=rows.device)
    found[rows, places] = scores[rows, columns]
    numbers[rows, places] = columns
    return found, numbers


def _places_above(scores: Tensor, bars: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the scores that are above the bar of their row."""
    n, m = scores.shape
    if m % _GROUP:
        rows, columns = (scores > bars[:, None]).nonzero(as_tuple=True)
        return rows, columns
    # A group is every (m / 64)-th column: their maximum is a maximum of whole rows of memory, which is fast.
    groups = scores.view(n, _GROUP, m // _GROUP)
    rows, members = (groups.amax(dim=1) > bars[:, None]).nonzero(as_tuple=True)
    hits, places = (groups[rows, :, members] > bars[rows, None]).nonzero(as_tuple=True)
    return rows[hits], places * (m // _GROUP) + members[hits]
