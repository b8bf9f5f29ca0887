"""Exact nearest-neighbour search by blocks.

The score matrix of n queries and m passages never exists: a block of it does, query_block x passage_block
numbers, and the k best results so far of every query. After the first block few scores beat a query's k-th best so
far; they are found by the maxima of groups of columns, so that almost all scores are looked at once and no more. And
they are so few that where bf16 products are fast, those of rounded vectors are looked at, and only what may be among
the best is computed in fp32.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trainer.device import has_fast_bf16, inner_products
from trainer.rounding import Rounded, scores_and_limits

_GROUP = 16  # columns whose maximum is compared at once
_GATHERED = 1024  # vectors that are gathered at a time: they stay in the cache of a core


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
    rounded = [Rounded.of(tile) for tile in tiles] if _is_rounded_first(queries.dtype, device) else None
    none = torch.empty(0, dtype=torch.int64, device=device)
    best = [(tile.new_empty(len(tile), 0), none.expand(len(tile), 0)) for tile in tiles]
    buffer = queries.new_empty(min(query_block, len(queries)) * min(passage_block, len(passages)), device=device)
    for start in range(0, len(passages), passage_block):
        block = passages[start : start + passage_block].to(device)
        seen = Rounded.of(block) if rounded and start >= k else None
        for place, (scores, numbers) in enumerate(best):
            if start < k:
                found = _best_of_block(inner_products(tiles[place], block, buffer), k)
            elif rounded and seen:
                found = _above_after_rounding(rounded[place], seen, scores[:, -1], buffer)
            else:
                found = _above(inner_products(tiles[place], block, buffer), scores[:, -1])
            best[place] = _merged(scores, numbers, found, start, k)
    scores, numbers = (torch.cat(parts) for parts in zip(*best, strict=True))
    return scores, numbers


def _is_rounded_first(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.float32 and has_fast_bf16(device.type)


def _merged(scores: Tensor, numbers: Tensor, found: tuple[Tensor, Tensor], start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best of what was known [n, <= k] and of what was found in the block of the passages from `start` on."""
    more, columns = found
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
    return _by_row(rows, columns, scores[rows, columns], len(bars))


def _above_after_rounding(queries: Rounded, block: Rounded, bars: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the exact scores, computed where those of the rounded vectors do not rule it out."""
    scores, low, _ = scores_and_limits(queries, block, bars, buffer.view(torch.bfloat16))
    rows, columns = _places_above(scores, low)
    exact = torch.cat(
        [
            (queries.exact[row] * block.exact[column]).sum(dim=1)
            for row, column in zip(rows.split(_GATHERED), columns.split(_GATHERED), strict=True)
        ]
    )
    over = exact > bars[rows]
    return _by_row(rows[over], columns[over], exact[over], len(bars))


def _by_row(rows: Tensor, columns: Tensor, scores: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Scores and columns [n, c] out of single ones, in ascending column order, filled up with -inf."""
    order = (rows * (columns.max() + 1 if len(columns) else 1) + columns).argsort()
    rows, columns, scores = rows[order], columns[order], scores[order]
    counts = rows.bincount(minlength=n)
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (n, int(counts.max()))
    found, numbers = scores.new_full(shape, -torch.inf), torch.zeros(shape, dtype=torch.int64, device=rows.device)
    found[rows, places] = scores
    numbers[rows, places] = columns
    return found, numbers


def _places_above(scores: Tensor, bars: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the scores that are above the bar of their row."""
    n, m = scores.shape
    if m % _GROUP:
        rows, columns = (scores > bars[:, None]).nonzero(as_tuple=True)
        return rows, columns
    # A group is every (m / 16)-th column: their maximum is a maximum of whole rows of memory, which is fast.
    groups = scores.view(n, _GROUP, m // _GROUP)
    rows, members = (groups.amax(dim=1) > bars[:, None]).nonzero(as_tuple=True)
    hits, places = (groups[rows, :, members] > bars[rows, None]).nonzero(as_tuple=True)
    return rows[hits], places * (m // _GROUP) + members[hits]
