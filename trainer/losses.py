"""The losses, as pure functions of tensors: no rank, no config, no logger.

Shapes: B local rows (queries), G gathered rows (candidate passages of all ranks), D size of an embedding, k hard
negatives of a query: its own group is its positive and those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NO_OWNER = torch.iinfo(torch.int64).min

# Rows whose logits are computed at once: enough for full-speed products with the candidates, few enough for the
# block to stay in cache and to be small beside the gradient of the candidates. Measured in benchmarks/loss.py.
_BLOCK_BYTES, _LEAST_ROWS = 4 << 20, {"cpu": 128, "cuda": 1024}
_LOOK_AHEAD = 64  # equal candidates, in rows of the matrix, that are found for all blocks at once


@dataclass(frozen=True)
class Identity:
    """What the texts of a batch are, as 64-bit hashes, so that equal texts are never each other's negatives.

    query: [B], the local queries. positive: [B], the column of each query's positive among the candidates.
    passage: [G], every candidate. owner: [G], the query whose positive the candidate is; a hard negative is
    nobody's positive and carries NO_OWNER. A candidate that is a query itself is its own owner, and `partner` [G] is
    its positive (NO_OWNER for passages).
    """

    query: Tensor
    positive: Tensor
    passage: Tensor
    owner: Tensor
    partner: Tensor | None = None


@dataclass(frozen=True)
class Filters:
    """What is hidden from the rows beside equal texts. The positive always stays.

    margin: hide a candidate whose similarity exceeds the positive's by more than this (Zhang et al. 2025, arXiv
    2506.05176, use 0.1). guide: another model's embeddings of the queries [B, E] and of the candidates [G, E]; hide a
    candidate whose similarity there exceeds the positive's by more than guide_margin (GISTEmbed: Solatorio 2024,
    arXiv 2402.16829). group: int64 [B, 1 + k], the columns of each row's own group, the positive first; of these,
    hidden [B, 1 + k] says which to hide, and own_only [B] which rows see nothing else.
    """

    margin: float | None = None
    guide: tuple[Tensor, Tensor] | None = None
    guide_margin: float = 0.0
    group: Tensor | None = None
    hidden: Tensor | None = None
    own_only: Tensor | None = None


NO_FILTERS = Filters()


@dataclass(frozen=True)
class Pool:
    """What the rows saw, as means over the local rows, for the log: no gradient flows through these."""

    accuracy: Tensor  # share of the rows whose positive ranks first
    positive_similarity: Tensor
    negative_similarity: Tensor  # over the candidates that are neither the positive nor masked
    masked: Tensor  # candidates hidden from a row


def info_nce(
    query: Tensor,
    passage: Tensor,
    identity: Identity,
    *,
    temperature: float,
    block_rows: int = 0,
    filters: Filters = NO_FILTERS,
) -> tuple[Tensor, Pool]:
    """Mean over the local queries of -log softmax(q.p / temperature) at the positive, over all candidates.

    InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4). A candidate is hidden from a row when its text
    equals the positive's, or when it is the positive of a query with the same text (for a candidate that is a query:
    when it has the row's text, or the same positive), and as `filters` say. Value and both gradients
    come from one pass over blocks of rows, in fp32, so that memory is O(block x G): with S = q p^T / temperature
    and dS = (softmax(S) - onehot) / B, dq = dS p / temperature and dp = dS^T q / temperature.

    Args:
        query: [B, D]; passage: [G, D]; used as they are (normalise before).
        identity: hashes for the equal-text mask, and the columns of the positives.
        temperature: divisor of the similarities.
        block_rows: rows computed at once; 0 chooses by memory.
        filters: what else is hidden.

    Returns:
        The loss, a scalar differentiable in both embeddings, and the figures of the pool.
    """
    if block_rows == 0:
        block_rows = max(_LEAST_ROWS[query.device.type], _BLOCK_BYTES // (4 * len(passage)))
    hidden = _Hidden(identity, filters, temperature)
    loss, *figures = _InfoNCE.apply(query, passage, hidden, temperature, min(block_rows, len(query)))
    return loss, Pool(*figures)


class _InfoNCE(torch.autograd.Function):
    """Computes the gradients with the value; its backward only scales what is stored."""

    @staticmethod
    def forward(ctx, query, passage, hidden, temperature, block_rows):  # type: ignore[no-untyped-def]
        queries, candidates = query.detach().float(), passage.detach().float()
        grad_query, grad_passage = torch.empty_like(queries), torch.zeros_like(candidates)
        sharpness = 1.0 / temperature
        candidate_sum = candidates.sum(0)
        logits = queries.new_empty(block_rows, len(candidates))
        sums = torch.zeros(5, dtype=torch.float64, device=query.device)
        for start in range(0, len(queries), block_rows):
            rows = slice(start, min(start + block_rows, len(queries)))
            block = logits[: rows.stop - start]
            torch.addmm(block, queries[rows], candidates.T, beta=0, alpha=sharpness, out=block)
            total, masked = queries[rows] @ candidate_sum * sharpness, hidden.hide(block, rows)
            sums += _softmax_residual_(block, hidden.positive[rows], total, masked)
            torch.mm(block, candidates, out=grad_query[rows])
            grad_passage.addmm_(block.T, queries[rows])
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


def _softmax_residual_(logits: Tensor, positive: Tensor, total: Tensor, masked: Masked) -> Tensor:
    """Turn logits into softmax(logits) - onehot(positive), in place, and return the block's sums.

    The sums are of: loss, rows whose positive ranks first, positive logits, mean negative logits, masked candidates.
    """
    columns = positive[:, None]
    at_positive = logits.gather(1, columns)[:, 0]
    best = logits.amax(1)
    negatives = (total - at_positive - masked.logits) / (logits.shape[1] - 1 - masked.count).clamp(min=1)
    # In place: half the memory, and faster, since the block stays in the cache.
    shares = torch.softmax(logits, dim=1, out=logits)
    # log-sum-exp through the best candidate: its share is at least 1/G, while the positive's own may underflow.
    log_sum_exp = best - shares.amax(1).log()
    shares.scatter_add_(1, columns, shares.new_full((1, 1), -1.0).expand_as(columns))
    rows = [log_sum_exp - at_positive, (at_positive == best).float(), at_positive, negatives, masked.count.float()]
    return torch.stack(rows).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class Masked:
    """What was hidden from each row of a block: how many candidates [R], and the sum of their logits [R]."""

    count: Tensor
    logits: Tensor


class _Hidden:
    """Hides candidates from rows: those of equal text, found by sorted search, then those that the filters name."""

    def __init__(self, identity: Identity, filters: Filters, temperature: float) -> None:
        self.positive, self.columns = identity.positive, len(identity.passage)
        self.filters, self.temperature = filters, temperature
        positive = identity.passage[identity.positive]
        self._ranges = [_equal_ranges(identity.passage, positive), _equal_ranges(identity.owner, identity.query)]
        if identity.partner is not None:
            self._ranges.append(_equal_ranges(identity.partner, positive))
        self._cells, self._found = self._look_ahead()

    def _look_ahead(self) -> tuple[Tensor | None, list[int]]:
        """The equal cells of all rows, and on the host how many of them come before each row and in all.

        So the host waits for a GPU once, not in every block. Only where they would take too much memory the cells are
        left for later, None, with an upper bound of their numbers.
        """
        counts = torch.stack([ranges.count for ranges in self._ranges])
        found = F.pad(torch.where(counts > 1, counts, 0).sum(0).cumsum(0), (1, 0))
        if int(found[-1]) > _LOOK_AHEAD * self.columns:
            return None, found.tolist()
        cells = self._equal(slice(0, len(self.positive)))
        starts = torch.arange(len(self.positive) + 1, device=cells.device) * self.columns
        return cells, torch.searchsorted(cells, starts).tolist()

    def hide(self, logits: Tensor, rows: slice) -> Masked:
        """Set the hidden candidates of a block [R, G] to -inf."""
        if self.filters is NO_FILTERS:
            return self._hide_equal(logits, rows)
        named = self._named(logits, rows)
        masked = self._hide_equal(logits, rows)
        named &= logits > float("-inf")  # each counts once
        named.scatter_(1, self.positive[rows, None], False)
        more = Masked(named.sum(1), torch.where(named, logits, 0.0).sum(1))
        logits.masked_fill_(named, float("-inf"))
        return Masked(masked.count + more.count, masked.logits + more.logits)

    def _named(self, logits: Tensor, rows: slice) -> Tensor:
        """What the filters hide from a block: bool [R, G]."""
        filters, positive = self.filters, self.positive[rows, None]
        named = torch.zeros_like(logits, dtype=torch.bool)
        if filters.margin is not None:
            named |= logits > logits.gather(1, positive) + filters.margin / self.temperature
        if filters.guide is not None:
            similarity = filters.guide[0][rows] @ filters.guide[1].T
            named |= similarity > similarity.gather(1, positive) + filters.guide_margin
        if filters.own_only is not None:
            assert filters.group is not None
            others = filters.own_only[rows, None].expand_as(named)
            named |= others.scatter(1, filters.group[rows], False)
        if filters.hidden is not None:
            assert filters.group is not None
            row, place = filters.hidden[rows].nonzero(as_tuple=True)
            named[row, filters.group[rows][row, place]] = True
        return named

    def _hide_equal(self, logits: Tensor, rows: slice) -> Masked:
        count, hidden_sum = torch.zeros_like(logits[:, 0], dtype=torch.int64), torch.zeros_like(logits[:, 0])
        if self._found[rows.start] == self._found[rows.stop]:
            return Masked(count, hidden_sum)
        if self._cells is None:
            cells = self._equal(rows)
        else:
            cells = self._cells[self._found[rows.start] : self._found[rows.stop]]
        row, column = cells // self.columns - rows.start, cells % self.columns
        count.index_add_(0, row, torch.ones_like(row))
        hidden_sum.index_add_(0, row, logits[row, column])
        logits[row, column] = float("-inf")
        return Masked(count, hidden_sum)

    def _equal(self, rows: slice) -> Tensor:
        """Flat numbers row * G + column of the candidates of equal text that are not the row's positive, in order."""
        cells = torch.cat([_cells(ranges, rows, self.columns) for ranges in self._ranges]).unique()
        return cells[cells % self.columns != self.positive[cells // self.columns]]


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
    """Flat numbers row * G + column of the rows' candidates with an equal hash.

    A row whose only match is one column is left out: that column is its own positive.
    """
    count = ranges.count[rows]
    row = (count > 1).nonzero()[:, 0]
    first, count = ranges.first[rows][row], count[row]
    place = torch.arange(int(count.sum()), device=count.device) - (count.cumsum(0) - count).repeat_interleave(count)
    column = ranges.order[first.repeat_interleave(count) + place]
    return (row + rows.start).repeat_interleave(count) * columns + column


# --- the teacher ----------------------------------------------------------------------------------------------------


def kl_to_teacher(similarity: Tensor, teacher: Tensor, *, temperature: float, hidden: Tensor | None = None) -> Tensor:
    """Mean over the rows of KL(softmax(teacher) || softmax(similarity / temperature)) over each row's own group.

    The distillation of SimLM and E5 (Wang et al. 2022, arXiv 2207.02578 and 2212.03533): the teacher's raw logits at
    temperature 1. A passage without score is out of the group. A row that has no score for its positive, or for no
    other passage, adds 0, and counts in the mean: it is a mean over all B rows, so that it is the same number however
    the rows are dealt to ranks.

    Args:
        similarity: [B, 1 + k], the student's, of the positive and the negatives.
        teacher: [B, 1 + k], logits; NaN where there is none.
        temperature: divisor of the similarities.
        hidden: bool [B, 1 + k], passages that are left out, such as negatives with the positive's text.
    """
    rows, support = _support(teacher, hidden)
    wanted = _log_softmax(teacher.float()[rows], support)
    found = _log_softmax(similarity.float()[rows] / temperature, support)
    terms = torch.where(support, wanted.exp() * (wanted - found), 0.0)
    return terms.sum() / len(similarity)


def margin_mse(similarity: Tensor, teacher: Tensor, *, temperature: float, hidden: Tensor | None = None) -> Tensor:
    """Mean over the rows of the mean square of (student's margin - teacher's margin) over each row's negatives.

    A margin is the positive's logit less the negative's (Hofstaetter et al. 2020, arXiv 2010.02666, eq. 3); the
    student's logit is similarity / temperature. Arguments, and rows without scores, as for `kl_to_teacher`.
    """
    rows, support = _support(teacher, hidden)
    negatives = support[:, 1:]
    student, wanted = similarity.float()[rows] / temperature, teacher.float()[rows].masked_fill(~support, 0.0)
    difference = (student[:, :1] - student[:, 1:]) - (wanted[:, :1] - wanted[:, 1:])
    squares = torch.where(negatives, difference.square(), 0.0)
    return (squares.sum(1) / negatives.sum(1)).sum() / len(similarity)


def _support(teacher: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows that have something to learn from [R], and which passages of theirs take part: bool [R, 1 + k]."""
    support = ~teacher.isnan()
    if hidden is not None:
        support &= ~hidden
    rows = (support[:, 0] & (support.sum(1) > 1)).nonzero()[:, 0]
    return rows, support[rows]


def _log_softmax(logits: Tensor, support: Tensor) -> Tensor:
    """Over the supported places; 0 elsewhere."""
    return F.log_softmax(logits.masked_fill(~support, float("-inf")), dim=1).masked_fill(~support, 0.0)


def distance_to(embeddings: Tensor, targets: Tensor) -> Tensor:
    """The mean of 1 - cosine between embeddings [n, D] and another model's of the same texts [n, D], in fp32.

    Half the squared distance of unit vectors: the loss by which a student takes over a teacher's space (Reimers and
    Gurevych 2020, arXiv 2004.09813).
    """
    return (1 - F.cosine_similarity(embeddings.float(), targets.float(), dim=1)).mean()
