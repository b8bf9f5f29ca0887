"""The teacher's logits for the groups of a batch, out of the score cache, and what is said when some are not there."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.scores import ScoreCache


class Targets:
    """Scores of one teacher; safe to share between threads.

    Args:
        cache: the scores.
        name: where they are, for messages.
        missing: what a missing score means: `error`, `contrastive` (the row goes without a teacher), or `wait` (for a
            worker; the caller looks again until it is there).
    """

    def __init__(self, cache: ScoreCache, name: str, missing: str = "error") -> None:
        self.missing, self.teacher = missing, cache.fingerprint
        self._cache, self._name = cache, name
        self._lock = threading.Lock()  # a cache that is being refreshed must not be looked into

    def logits(self, query_hash: NDArray[np.int64], group_hash: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [n, m] for queries [n] and their passages [n, m]; NaN where there is no score."""
        queries = np.repeat(query_hash, group_hash.shape[1])
        with self._lock:
            logits, _ = self._cache.lookup(queries, group_hash.reshape(-1))
        return logits.reshape(group_hash.shape)

    def refresh(self) -> None:
        """Read what the workers have written since."""
        with self._lock:
            self._cache.refresh()

    def lacking(self, where: str, rows: int) -> UserError:
        """The error for a row without its scores, one of `rows` in a batch."""
        more = f" (and {rows - 1} more rows of its batch)" if rows > 1 else ""
        return UserError(
            f"scores={self._name}: no score for {where}{more}; run `quintet distill` over these shards to the end, "
            "mark a source without teacher with `scores: false`, or set missing_scores=contrastive or wait"
        )
