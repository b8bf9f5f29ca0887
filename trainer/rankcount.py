"""How many passages of a pool score above a pair's own passage: a rank without sorting.

Scores are the inner products of queries and pool, computed block by block and compared at once, so that nothing but one
block of them exists. Most wrong pairs have lost after the first hundreds of passages; their rows leave then, and
the matrix products go on with the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.device import full_products
from trainer.topk import Rows

# Scores that differ by less are equal. The vector of a text has other last bits in a batch of other texts, and float16
# rounds those apart: texts with the same tokens then differ by up to about 1e-5. Neighbours in a pool of a million are
# some 1e-4 apart, so this decides nothing else.
TIE = 2e-5
_FIRST_BLOCK = 512  # passages: small, since most rows that lose do so at once
_LAST_BLOCK = 8192
# Scores computed at a time: on a CPU they stay in the cache until they are compared, a GPU wants many.
_TILES = {"cpu": 1 << 20, "cuda": 1 << 26}


def own_scores(queries: Tensor, passages: Tensor) -> Tensor:
    """The score of each pair: [n, D] and [n, D] -> [n], on the host in fp32."""
    return (queries.float() * passages.float()).sum(dim=1)


def count_above(
    queries: Tensor,
    own: Tensor,
    pool: Rows,
    same: Tensor,
    *,
    limit: int,
    tie: float = TIE,
    device: torch.device | str | None = None,
) -> Tensor:
    """For each query the number of pool passages that score above `own` by more than `tie`, but at most `limit`.

    Args:
        queries: [n, D] fp32; own: [n], the score of each query with its own passage.
        pool: [m, D].
        same: int64 [n], the pool passage with the text of the own one, which does not count, or -1.
        limit: rows with so many are not looked at any further.
        device: where to compute; by default where the queries are.

    Returns:
        int64 [n] on the host.
    """
    device = queries.device if device is None else torch.device(device)
    counts = torch.zeros(len(queries), dtype=torch.int64)
    rows, active, bars, skip = torch.arange(len(queries)), queries.to(device), (own + tie).to(device), same.to(device)
    for start, stop in _blocks(len(pool)):
        with full_products():
            found = _count_block(active, bars, pool[start:stop].to(device).float(), skip - start)
        counts[rows] += found.cpu()
        staying = counts[rows] < limit
        if not staying.all():
            kept = staying.to(device)
            rows, active, bars, skip = rows[staying], active[kept], bars[kept], skip[kept]
        if not len(rows):
            break
    return counts.clamp_(max=limit)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    """Spans of a pool: small ones first."""
    start, length = 0, _FIRST_BLOCK
    while start < size:
        yield start, min(start + length, size)
        start, length = start + length, min(2 * length, _LAST_BLOCK)


def _count_block(queries: Tensor, bars: Tensor, block: Tensor, skip: Tensor) -> Tensor:
    """int64 [n]: how many scores of each row with a block [m, D] are above its bar, column `skip` left out."""
    counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    hidden = ((skip >= 0) & (skip < len(block))).nonzero().flatten()
    height = max(1, _TILES[queries.device.type] // len(block))
    for start in range(0, len(queries), height):
        scores = queries[start : start + height] @ block.T
        inside = hidden[(hidden >= start) & (hidden < start + height)]
        scores[inside - start, skip[inside]] = -torch.inf
        # The largest of a row is found faster than all are compared, and mostly it settles the matter.
        over = (scores.amax(dim=1) > bars[start : start + height]).nonzero().flatten()
        if len(over):
            counts[start + over] = (scores[over] > bars[start + over, None]).sum(dim=1)
    return counts
