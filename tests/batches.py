"""Batches of random token ids for tests of the step, global and cut into ranks."""

from __future__ import annotations

import numpy as np

from data.collate import Batch
from data.tokens import Ragged

VOCABULARY = 90


def make(pairs: int, negatives: int, seed: int, longest: int = 20, *, scored: bool = False) -> Batch:
    """A global batch of random texts; a few queries and passages occur twice, so the equal-text mask has work.

    `scored` gives it a teacher's logits: of every fourth query none, of some others all but one.
    """
    generator = np.random.default_rng(seed)
    texts = pairs * (2 + negatives)
    lengths = generator.integers(3, longest, texts).astype(np.int32)
    ids = generator.integers(5, VOCABULARY, int(lengths.sum())).astype(np.int32)
    passages = generator.integers(0, 20 * pairs, pairs * (1 + negatives))
    queries = generator.integers(0, 4 * pairs, pairs)
    return Batch(
        tokens=Ragged(ids, lengths),
        num_queries=pairs,
        num_negatives=negatives,
        query_hash=queries,
        passage_hash=passages,
        record_ids=np.arange(pairs),
        scores=logits(pairs, negatives, generator) if scored else None,
    )


def logits(pairs: int, negatives: int, generator: np.random.Generator) -> np.ndarray:
    """float32 [pairs, 1 + negatives], NaN where the teacher has said nothing."""
    found = generator.normal(0, 4, (pairs, 1 + negatives)).astype(np.float32)
    found[::4] = np.nan
    found[1::6, -1] = np.nan
    return found


def share(batch: Batch, rank: int, world: int) -> Batch:
    """The part of a global batch that a rank gets: a run of its queries, with their passages."""
    k, each = batch.num_negatives, batch.num_queries // world
    queries = np.arange(rank * each, (rank + 1) * each)
    negatives = (queries[:, None] * k + np.arange(k)).reshape(-1)
    passages = np.concatenate([queries, batch.num_queries + negatives])
    return Batch(
        tokens=batch.tokens.take(np.concatenate([queries, batch.num_queries + passages])),
        num_queries=each,
        num_negatives=k,
        query_hash=batch.query_hash[queries],
        passage_hash=batch.passage_hash[passages],
        record_ids=batch.record_ids[queries],
        scores=None if batch.scores is None else batch.scores[queries],
        own_only=None if batch.own_only is None else batch.own_only[queries],
    )
