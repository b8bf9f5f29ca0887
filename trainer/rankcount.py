"""How many passages of a pool score above a pair's own passage: a rank without sorting.

Scores are the inner products of queries and pool, computed block by block and compared at once, so that nothing but one
block of them exists. Most wrong pairs have lost after the first hundreds of passages; their rows leave then, and
the matrix products go on with the others. Where the processor multiplies bf16 faster than fp32, products are taken of
rounded vectors first: they settle everything but the scores so near a pair's own that rounding might have
moved them across, and those few are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.device import has_fast_bf16, inner_products
from trainer.rounding import Rounded, scores_and_limits
from trainer.topk import Rows

# Scores that differ by less are equal, by the precision of the encoder. The vector of a text has other last bits in a
# batch of other texts, and float16 rounds those apart: by that, scores of 400 real pairs moved by up to 5e-6 (fp32) and
# 1.3e-4 (bf16), while the best of a pool lie some 1e-4 apart.
TIES = {"fp32": 2e-5, "bf16": 2e-4}
_FIRST_BLOCK = 512  # passages: small, since most rows that lose do so at once
_LAST_BLOCKS = {"cpu": 8192, "cuda": 32_768}
# Scores computed at a time: on a CPU they stay in the cache until they are compared, a GPU wants many.
_TILES = {"cpu": 1 << 21, "cuda": 1 << 28}
_PAIRS = 1 << 16  # scores of single pairs computed at a time


def own_scores(queries: Tensor, passages: Tensor) -> Tensor:
    """The score of each pair: [n, D] and [n, D] -> fp32 [n]."""
    return (queries.float() * passages.float()).sum(dim=1)


def count_above(
    queries: Tensor,
    own: Tensor,
    pool: Rows,
    same: Tensor,
    *,
    limit: int,
    tie: float = TIES["fp32"],
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
    rows, active = torch.arange(len(queries)), _Rows(queries.to(device), (own + tie).to(device), same.to(device))
    rough = has_fast_bf16(device.type)
    buffer = active.vectors.new_empty(_TILES[device.type], dtype=torch.bfloat16 if rough else torch.float32)
    for start, stop in _blocks(len(pool), _LAST_BLOCKS[device.type]):
        block = pool[start:stop].to(device).float()
        counts[rows] += (_count_rough if rough else _count)(active, block, start, limit, buffer).cpu()
        staying = counts[rows] < limit
        if not staying.all():
            rows, active = rows[staying], active.take(staying.to(device))
        if not len(rows):
            break
    return counts.clamp_(max=limit)


@dataclass(frozen=True)
class _Rows:
    """Queries that have not lost yet: vectors [n, D], the scores to be above [n], and the passage to pass over [n]."""

    vectors: Tensor
    bars: Tensor
    skip: Tensor

    def take(self, rows: Tensor | slice) -> _Rows:
        return _Rows(self.vectors[rows], self.bars[rows], self.skip[rows])


def _blocks(size: int, longest: int) -> Iterator[tuple[int, int]]:
    """Spans of a pool: small ones first."""
    start, length = 0, _FIRST_BLOCK
    while start < size:
        yield start, min(start + length, size)
        start, length = start + length, min(2 * length, longest)


def _tiles(rows: _Rows, width: int, buffer: Tensor) -> Iterator[tuple[slice, _Rows]]:
    """Runs of rows whose scores with `width` passages fit the buffer."""
    height = max(1, len(buffer) // width)
    for start in range(0, len(rows.bars), height):
        run = slice(start, start + height)
        yield run, rows.take(run)


def _pass_over(scores: Tensor, skip: Tensor, start: int) -> None:
    """Take the scores with each row's own text out of those with the passages from `start` on."""
    rows = ((skip >= start) & (skip < start + scores.shape[1])).nonzero().flatten()
    scores[rows, skip[rows] - start] = -torch.inf


def _count(rows: _Rows, block: Tensor, start: int, limit: int, buffer: Tensor) -> Tensor:
    """int64 [n]: how many scores of each row with a block [m, D] are above its bar."""
    counts = torch.zeros_like(rows.skip)
    for run, tile in _tiles(rows, len(block), buffer):
        scores = inner_products(tile.vectors, block, buffer)
        _pass_over(scores, tile.skip, start)
        # The largest of a row is found faster than all are compared, and mostly it settles the matter.
        over = (scores.amax(dim=1) > tile.bars).nonzero().flatten()
        if len(over):
            counts[run][over] = (scores[over] > tile.bars[over, None]).sum(dim=1)
    return counts


def _count_rough(rows: _Rows, block: Tensor, start: int, limit: int, buffer: Tensor) -> Tensor:
    """The same by way of bf16, for rows with fewer than `limit`; rows with more may be given fewer of them."""
    counts = torch.zeros_like(rows.skip)
    passages = Rounded.of(block)
    for run, tile in _tiles(rows, len(block), buffer):
        scores, low, high = scores_and_limits(Rounded.of(tile.vectors), passages, tile.bars, buffer)
        _pass_over(scores, tile.skip, start)
        over = (scores.amax(dim=1).float() > low).nonzero().flatten()
        if len(over):
            counts[run][over] = _settle(tile.take(over), scores[over].float(), block, low[over], high[over], limit)
    return counts


def _settle(rows: _Rows, scores: Tensor, block: Tensor, low: Tensor, high: Tensor, limit: int) -> Tensor:
    """int64 [n]: how many passages are above each row's bar, of scores that rounding has moved between low and high."""
    sure = scores > high[:, None]
    counts = sure.sum(dim=1)
    unsure = (scores > low[:, None]) & ~sure & (counts < limit)[:, None]
    places, columns = unsure.nonzero(as_tuple=True)
    for piece in torch.arange(len(places), device=places.device).split(_PAIRS):
        row = places[piece]
        exact = own_scores(rows.vectors[row], block[columns[piece]])
        counts += row[exact > rows.bars[row]].bincount(minlength=len(counts))
    return counts
