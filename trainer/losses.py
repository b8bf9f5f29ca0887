"""The losses, as pure functions of tensors: no rank, no config, no logger.

Shapes: B local rows (queries), G gathered rows (candidate passages of all ranks), D size of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_OWNER = torch.iinfo(torch.int64).min

# Rows whose logits are computed at once: enough for full-speed products with the candidates, few enough for the
# block to stay in cache and to be small beside the gradient of the candidates. Measured in benchmarks/loss.py.
_BLOCK_BYTES, _LEAST_ROWS = 4 << 20, 128


@dataclass(frozen=True)
class Identity:
    """What the texts of a batch are, as 64-bit hashes, so that equal texts are never each other's negatives.

    query: [B], the local queries. positive: [B], the column of each query's positive among the candidates.
    passage: [G], every candidate. owner: [G], the query whose positive the candidate is; a hard negative is
    nobody's positive and carries NO_OWNER.
    """

    query: Tensor
    positive: Tensor
    passage: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Pool:
    """What the rows saw, as means over the local rows, for the log: no gradient flows through these."""

    accuracy: Tensor  # share of the rows whose positive ranks first
    positive_similarity: Tensor
    negative_similarity: Tensor  # over the candidates that are neither the positive nor masked
    masked: Tensor  # candidates of a row hidden because their text is equal


def info_nce(
    query: Tensor, passage: Tensor, identity: Identity, *, temperature: float, block_rows: int = 0
) -> tuple[Tensor, Pool]:
    """Mean over the local queries of -log softmax(q.p / temperature) at the positive, over all candidates.

    InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4). A candidate is hidden from a row when its text
    equals the positive's, or when it is the positive of a query with the same text. Value and both gradients
    come from one pass over blocks of rows, in fp32, so that memory is O(block x G): with S = q p^T / temperature
    and dS = (softmax(S) - onehot) / B, dq = dS p / temperature and dp = dS^T q / temperature.

    Args:
        query: [B, D]; passage: [G, D]; used as they are (normalise before).
        identity: hashes for the equal-text mask, and the columns of the positives.
        temperature: divisor of the similarities.
        block_rows: rows computed at once; 0 chooses by memory.

    Returns:
        The loss, a scalar differentiable in both embeddings, and the figures of the pool.
    """
    if block_rows == 0:
        block_rows = max(_LEAST_ROWS, _BLOCK_BYTES // (4 * len(passage)))
    loss, *figures = _InfoNCE.apply(query, passage, identity, temperature, min(block_rows, len(query)))
    return loss, Pool(*figures)


class _InfoNCE(torch.autograd.Function):
    """Computes the gradients with the value; its backward only scales what is stored."""

    @staticmethod
    def forward(ctx, query, passage, identity, temperature, block_rows):  # type: ignore[no-untyped-def]
        queries, candidates = query.detach().float(), passage.detach().float()
        grad_query, grad_passage = torch.empty_like(queries), torch.zeros_like(candidates)
        hidden, sharpness = _EqualTexts(identity), 1.0 / temperature
        candidate_sum = candidates.sum(0)
        logits, shares = (queries.new_empty(block_rows, len(candidates)) for _ in range(2))
        sums = torch.zeros(5, dtype=torch.float64, device=query.device)
        for start in range(0, len(queries), block_rows):
            rows = slice(start, min(start + block_rows, len(queries)))
            block, residual = logits[: rows.stop - start], shares[: rows.stop - start]
            torch.addmm(block, queries[rows], candidates.T, beta=0, alpha=sharpness, out=block)
            total, masked = queries[rows] @ candidate_sum * sharpness, hidden.hide(block, rows)
            sums += _softmax_residual(block, identity.positive[rows], total, masked, out=residual)
            torch.mm(residual, candidates, out=grad_query[rows])
            grad_passage.addmm_(residual.T, queries[rows])
        mean = 1.0 / len(queries)
        ctx.gradients = grad_query.mul_(mean * sharpness), grad_passage.mul_(mean * sharpness)
        ctx.dtypes = query.dtype, passage.dtype
        loss, accuracy, positive, negative, masked = (sums * mean).float()
        figures = accuracy, positive * temperature, negative * temperature, masked
        ctx.mark_non_differentiable(*figures)
        return loss, *figures

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        assert ctx.gradients is not None, "the gradients are handed out once: they are as large as the embeddings"
        grad_query, grad_passage = (gradient.mul_(grad_loss) for gradient in ctx.gradients)
        ctx.gradients = None
        query_dtype, passage_dtype = ctx.dtypes
        return grad_query.to(query_dtype), grad_passage.to(passage_dtype), None, None, None


def _softmax_residual(logits: Tensor, positive: Tensor, total: Tensor, masked: Masked, *, out: Tensor) -> Tensor:
    """Write softmax(logits) - onehot(positive) to `out` and return the block's sums.

    The sums are of: loss, rows whose positive ranks first, positive logits, mean negative logits, masked candidates.
    """
    columns = positive[:, None]
    at_positive = logits.gather(1, columns)[:, 0]
    best, best_column = logits.max(1)
    torch.softmax(logits, dim=1, out=out)
    # log-sum-exp through the best candidate: its share is at least 1/G, while the positive's own may underflow.
    log_sum_exp = best - out.gather(1, best_column[:, None])[:, 0].log()
    out.scatter_add_(1, columns, out.new_full((1, 1), -1.0).expand_as(columns))
    negatives = (total - at_positive - masked.logits) / (logits.shape[1] - 1 - masked.count).clamp(min=1)
    rows = [log_sum_exp - at_positive, (best_column == positive).float(), at_positive, negatives, masked.count.float()]
    return torch.stack(rows).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class Masked:
    """What was hidden from each row of a block: how many candidates [R], and the sum of their logits [R]."""

    count: Tensor
    logits: Tensor


class _EqualTexts:
    """Finds the candidates to hide by sorted search, so that no B x G comparison is made."""

    def __init__(self, identity: Identity) -> None:
        self.positive, self.columns = identity.positive, len(identity.passage)
        self.ranges = [
            _equal_ranges(identity.passage, identity.passage[identity.positive]),
            _equal_ranges(identity.owner, identity.query),
        ]

    def hide(self, logits: Tensor, rows: slice) -> Masked:
        """Set the hidden candidates of a block [R, G] to -inf."""
        count, hidden_sum = torch.zeros_like(logits[:, 0], dtype=torch.int64), torch.zeros_like(logits[:, 0])
        cells = torch.cat([_cells(ranges, rows, self.columns) for ranges in self.ranges]).unique()
        row, column = cells // self.columns, cells % self.columns
        other = column != self.positive[rows][row]
        row, column = row[other], column[other]
        count.index_add_(0, row, torch.ones_like(row))
        hidden_sum.index_add_(0, row, logits[row, column])
        logits[row, column] = float("-inf")
        return Masked(count, hidden_sum)


@dataclass(frozen=True)
class _Ranges:
    """For every key, the places [first, first + count) of `order` that hold the columns with an equal hash."""

    order: Tensor
    first: Tensor
    count: Tensor


def _equal_ranges(hashes: Tensor, keys: Tensor) -> _Ranges:
    ordered, order = hashes.sort()
    first = torch.searchsorted(ordered, keys)
    return _Ranges(order, first, torch.searchsorted(ordered, keys, right=True) - first)


def _cells(ranges: _Ranges, rows: slice, columns: int) -> Tensor:
    """Flat numbers (row in the block) * G + column of the block's candidates with an equal hash.

    A row whose only match is one column is left out: that column is its own positive.
    """
    count = ranges.count[rows]
    row = (count > 1).nonzero()[:, 0]
    first, count = ranges.first[rows][row], count[row]
    place = torch.arange(int(count.sum()), device=count.device) - (count.cumsum(0) - count).repeat_interleave(count)
    return row.repeat_interleave(count) * columns + ranges.order[first.repeat_interleave(count) + place]
