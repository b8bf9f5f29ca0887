"""Ranking metrics of retrieval, one number a query, in plain numpy.

Shapes: n queries, k ranked results a query (best first, -1 where a query has fewer results), m passages.
They agree with trec_eval (checked in tests): linear gains, discount 1 / log2(rank + 1), a passage counts as
relevant from grade 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NAMES = ("ndcg_at_10", "mrr_at_10", "recall_at_100", "accuracy_at_1")
DEPTH = 100  # results a query that the metrics above look at


@dataclass(frozen=True)
class Relevance:
    """Which passages answer each query: row q owns entries offsets[q] to offsets[q + 1] of the other two arrays.

    offsets int64 [n + 1]; passages int64, ascending within a row; grades int64, all >= 1.
    """

    offsets: np.ndarray
    passages: np.ndarray
    grades: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Number of relevant passages of each query, int64 [n]."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Relevance:
        """The relevance of some queries, in the order asked."""
        counts = self.counts[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        entries = np.repeat(self.offsets[rows] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Relevance(offsets, self.passages[entries], self.grades[entries])


def relevance(answers: Sequence[dict[int, int]]) -> Relevance:
    """Build a Relevance from one {passage number: grade} for each query; grades below 1 mean not relevant."""
    rows = [sorted((passage, grade) for passage, grade in row.items() if grade >= 1) for row in answers]
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    flat = np.array([entry for row in rows for entry in row], dtype=np.int64).reshape(-1, 2)
    return Relevance(offsets, flat[:, 0].copy(), flat[:, 1].copy())


def gains(ranked: np.ndarray, truth: Relevance) -> np.ndarray:
    """Grade of every ranked result: int64 [n, k], 0 where the passage does not answer the query or there is none.

    ranked: int64 [n, k] passage numbers, best first, -1 for no result.
    """
    if not len(truth.passages):
        return np.zeros(ranked.shape, dtype=np.int64)
    # A (query, passage) pair becomes one number, so that one sorted search answers for all of them.
    span = 1 + max(int(truth.passages.max()), int(ranked.max(initial=0)))
    keys = np.repeat(np.arange(len(truth.counts)), truth.counts) * span + truth.passages
    wanted = np.arange(len(ranked))[:, None] * span + ranked
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((keys[places] == wanted) & (ranked >= 0), truth.grades[places], 0)


def ndcg(gained: np.ndarray, truth: Relevance, k: int = 10) -> np.ndarray:
    """Normalised discounted cumulative gain of the first k results, float64 [n]; 0 for a query without answers."""
    discounts = 1.0 / np.log2(np.arange(k) + 2.0)
    reached = gained[:, :k] @ discounts[: gained.shape[1]]
    best = _best_grades(truth, k) @ discounts
    return np.divide(reached, best, out=np.zeros(len(gained)), where=best > 0)


def _best_grades(truth: Relevance, k: int) -> np.ndarray:
    """The k highest grades of each query, descending, padded with 0: int64 [n, k]."""
    rows = np.repeat(np.arange(len(truth.counts)), truth.counts)
    order = np.lexsort((-truth.grades, rows))
    ranks = np.arange(len(rows)) - np.repeat(truth.offsets[:-1], truth.counts)
    best = np.zeros((len(truth.counts), k), dtype=np.int64)
    kept = ranks < k
    best[rows[kept], ranks[kept]] = truth.grades[order][kept]
    return best


def mrr(gained: np.ndarray, k: int = 10) -> np.ndarray:
    """One over the rank of the first answer among the first k results, 0 when there is none: float64 [n]."""
    hits = gained[:, :k] > 0
    return np.where(hits.any(axis=1), 1.0 / (1.0 + hits.argmax(axis=1)), 0.0)


def recall(gained: np.ndarray, truth: Relevance, k: int = DEPTH) -> np.ndarray:
    """Share of a query's answers that is among its first k results, float64 [n]; 0 for a query without answers."""
    found = (gained[:, :k] > 0).sum(axis=1)
    return np.divide(found, truth.counts, out=np.zeros(len(gained)), where=truth.counts > 0)


def accuracy(gained: np.ndarray) -> np.ndarray:
    """1 where the first result is an answer, else 0: float64 [n]."""
    return (gained[:, 0] > 0).astype(np.float64)


def per_query(ranked: np.ndarray, truth: Relevance) -> np.ndarray:
    """All metrics of NAMES, in that order, for rankings int64 [n, k >= 1]: float64 [n, 4]."""
    gained = gains(ranked, truth)
    return np.stack([ndcg(gained, truth), mrr(gained), recall(gained, truth), accuracy(gained)], axis=1)
