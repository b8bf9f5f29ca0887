"""The results of a search, put in order by a cross-encoder."""

from __future__ import annotations

import numpy as np

from data.errors import NumericError
from data.groups import Numbers, PairRows, tokenized
from trainer.scoring import Scorer
from trainer.sets import RetrievalSet


def rerank(scorer: Scorer, data: RetrievalSet, found: Numbers, depth: int) -> Numbers:
    """The first `depth` results of every query by falling logit, then the rest as they were: int64 [q, k].

    Args:
        scorer: the cross-encoder; it reads the bare texts, in its own template.
        data: queries and passages.
        found: [q, k] numbers of passages, best first; -1 where there is no result.
        depth: results that are read; where logits are equal, the earlier result stays first.

    Raises:
        NumericError: a logit is not finite.
    """
    top = found[:, :depth]
    query_at, column = np.nonzero(top >= 0)
    used, passage_at = np.unique(top[query_at, column], return_inverse=True)
    encoder = scorer.teacher.pairs
    queries = tokenized(encoder.queries, list(data.queries))
    passages = tokenized(encoder.passages, [data.passages[number] for number in used])
    logits = np.full(top.shape, -np.inf, np.float32)
    for rows, some in scorer(PairRows(encoder, queries, passages, query_at, passage_at)):
        logits[query_at[rows], column[rows]] = some
    if not np.isfinite(logits[query_at, column]).all():
        raise NumericError(
            f"rerank={scorer.teacher.name}: it gives logits with NaN or infinity; its weights are broken"
        )
    order = np.argsort(-logits, axis=1, kind="stable")
    return np.concatenate([np.take_along_axis(top, order, axis=1), found[:, depth:]], axis=1)
