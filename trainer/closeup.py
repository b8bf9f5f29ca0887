"""A close look at a model: how similar held-out pairs are, and where their vectors lie on a plane."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data.errors import NumericError
from data.rules import Prompts

if TYPE_CHECKING:
    import torch

    from trainer.sets import RetrievalSet

Vectors = NDArray[np.float64]
BINS = 80


@dataclass(frozen=True, eq=False)
class Closeup:
    """n pairs of a query and a passage that answers it, drawn from one data set.

    Attributes:
        data: name of the data set.
        sources, langs: of the n pairs, "" where not known.
        queries, passages: their texts.
        edges: float64 [BINS + 1] of the similarity's bins; positives, negatives: int64 [BINS] pairs in each. A negative
            is a query with a passage of another drawn pair that does not answer it.
        plane: float64 [2 n, 2], the queries' places and then the passages', on the two axes of most variance.
        shares: part of the whole variance that lies along each of the two.
    """

    data: str
    sources: tuple[str, ...]
    langs: tuple[str, ...]
    queries: tuple[str, ...]
    passages: tuple[str, ...]
    edges: Vectors
    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]
    plane: Vectors
    shares: tuple[float, float]


def look(model_path: str, data: str, pairs: int, device: torch.device) -> Closeup:
    """Embed `pairs` of a held-out set with a model, as evaluation does, and measure them.

    Raises:
        UserError: there is no such model or data. NumericError: the model gives NaN or infinity.
    """
    from trainer import retrieval, sets
    from trainer.embed import encode_texts, load_model

    model = load_model(model_path, device)
    drawn = sets.load(data, limit=pairs)[0]
    rows, passages = _answers(drawn)
    prompts = Prompts(query=model.query_prompt, passage=model.passage_prompt)
    query_texts, passage_texts = retrieval.query_texts(drawn, prompts), retrieval.passage_texts(drawn, prompts)
    asked = [query_texts[number] for number in drawn.rows[rows]]
    found = encode_texts(model, asked + [passage_texts[number] for number in passages], device=device)
    vectors = found.numpy().astype(np.float64)
    if not np.isfinite(vectors).all():
        raise NumericError(f"model={model_path}: gives vectors with NaN or infinity; its weights are broken")
    count = len(rows)
    edges, positives, negatives = histograms(
        vectors[:count] @ vectors[count:].T, _right(drawn, drawn.rows[rows], passages)
    )
    plane, shares = principal_plane(vectors)
    return Closeup(
        drawn.name,
        tuple(drawn.sources[row] for row in rows),
        tuple(drawn.langs[row] for row in rows),
        tuple(drawn.queries[number] for number in drawn.rows[rows]),
        tuple(drawn.passages[number] for number in passages),
        edges,
        positives,
        negatives,
        plane,
        shares,
    )


def _answers(data: RetrievalSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows whose query has an answer in the corpus, and for each the number of the first."""
    offsets, right = data.relevance.offsets, data.relevance.passages
    first = np.full(len(data.queries), -1)
    for query, (start, stop) in enumerate(pairwise(offsets)):
        inside = right[start:stop][right[start:stop] < len(data.passages)]
        first[query] = inside[0] if len(inside) else -1
    rows = np.flatnonzero(first[data.rows] >= 0)
    return rows, first[data.rows[rows]]


def _right(data: RetrievalSet, queries: NDArray[np.int64], passages: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [n, n]: whether the drawn passage of a column answers the drawn query of a row."""
    offsets, right = data.relevance.offsets, data.relevance.passages
    return np.stack([np.isin(passages, right[offsets[query] : offsets[query + 1]]) for query in queries])


def histograms(similarity: Vectors, right: NDArray[np.bool_]) -> tuple[Vectors, NDArray[np.int64], NDArray[np.int64]]:
    """Edges of equal bins over all similarities [n, n]; counts of the diagonal, and of what answers no query."""
    edges = np.linspace(similarity.min(), similarity.max() + 1e-9, BINS + 1)
    positives, _ = np.histogram(np.diagonal(similarity), edges)
    negatives, _ = np.histogram(similarity[~right], edges)
    return edges, positives, negatives


def principal_plane(vectors: Vectors) -> tuple[Vectors, tuple[float, float]]:
    """Places [n, 2] on the two principal axes of vectors [n, D], and the share of the variance along each.

    An axis points to where its largest component is positive, so that a picture does not flip by chance.
    """
    centred = vectors - vectors.mean(axis=0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(np.take_along_axis(axes[:2], np.abs(axes[:2]).argmax(axis=1)[:, None], axis=1))
    variance = spread**2 / max((spread**2).sum(), np.finfo(np.float64).tiny)
    return centred @ axes.T, (float(variance[0]), float(variance[1]))
