"""A model and the vectors of all passages: the nearest passages for a question, by exact inner product."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from data.records import normalise
from trainer.embed import Embedder, progress_bar
from trainer.topk import top_k


@dataclass(frozen=True)
class Found:
    """The nearest passages of a question, best first.

    Attributes:
        numbers: of the passages; scores: their inner products.
        mean: the inner product with all passages, on average: what no likeness at all scores with this model.
        embedding, searching: seconds.
    """

    numbers: tuple[int, ...]
    scores: tuple[float, ...]
    mean: float
    embedding: float
    searching: float


@dataclass(frozen=True, eq=False)
class Finder:
    """Answers questions with one model.

    Attributes:
        name: the model as the user named it.
        vectors: fp32 [m, D] on the host, of m passages.
    """

    name: str
    embedder: Embedder
    vectors: Tensor

    def __call__(self, question: str, k: int) -> Found:
        """The min(k, m) nearest passages. Raises NumericError when the model gives no finite vector."""
        begin = time.perf_counter()
        model = self.embedder.model
        tokens = model.text_encoder.encode([normalise(question)], model.query_prompt)
        vector = self.embedder.tokens(tokens)
        embedded = time.perf_counter()
        scores, numbers = top_k(vector, self.vectors, k, device=self.embedder.device)
        return Found(
            numbers=tuple(numbers[0].tolist()),
            scores=tuple(scores[0].tolist()),
            mean=float(vector[0] @ self._mean),
            embedding=embedded - begin,
            searching=time.perf_counter() - embedded,
        )

    @cached_property
    def _mean(self) -> Tensor:
        return self.vectors.mean(dim=0)


def index(name: str, embedder: Embedder, passages: Sequence[str]) -> Finder:
    """Embed all passages, with the model's own prompt and a bar of progress."""
    prompt = embedder.model.passage_prompt
    with progress_bar(len(passages), f"{name}: passages embedded") as progress:
        vectors = embedder([prompt + text for text in passages], progress)
    return Finder(name, embedder, vectors)
