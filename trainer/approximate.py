"""Nearest passages by an index of faiss, for collections so large that exact search takes too long.

An index proposes candidates; their scores are computed anew, exactly, so that margins mean the same as without one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import UserError
from trainer.topk import Rows

_BLOCK = 1 << 16  # vectors added at a time
_TRAINED_ON = 1 << 20  # vectors that an index is trained on at most, evenly out of all
_SCORED = 1 << 16  # candidates whose vectors are read at a time
NONE = -1


def build(path: Path, vectors: Rows, factory: str) -> None:
    """Train and fill an index, and write it to `path`.

    Args:
        vectors: [m, D].
        factory: in faiss' words, such as "IVF4096,Flat" or "HNSW32".

    Raises:
        UserError: faiss is not installed, or does not know the factory, or has too few vectors to train it.
    """
    faiss = _faiss()
    try:
        made = faiss.index_factory(vectors[:1].shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not made.is_trained:
            made.train(_sample(vectors))
        for start in range(0, len(vectors), _BLOCK):
            made.add(vectors[start : start + _BLOCK].numpy())
    except RuntimeError as error:
        raise UserError(f"index={factory}: faiss refuses it: {_reason(error)}; give one such as IVF1024,Flat") from None
    faiss.write_index(made, str(path))


def _sample(vectors: Rows) -> np.ndarray:
    every = -(-len(vectors) // _TRAINED_ON)
    return np.concatenate(
        [vectors[start : start + _BLOCK * every][::every].numpy() for start in range(0, len(vectors), _BLOCK * every)]
    )


class Index:
    """An index that `build` has written, with its parameters of search, such as "nprobe=64"; empty: faiss' own.

    Raises:
        UserError: faiss is not installed, or the index has no such parameter.
    """

    def __init__(self, path: Path, parameters: str = "") -> None:
        faiss = _faiss()
        self._index = faiss.read_index(str(path))
        try:
            if parameters:
                faiss.ParameterSpace().set_index_parameters(self._index, parameters)
        except RuntimeError as error:
            message = f"index_search={parameters}: faiss refuses it: {_reason(error)}; IVF takes nprobe=64 or another"
            raise UserError(message) from None

    def search(self, queries: Tensor, vectors: Rows, k: int) -> tuple[Tensor, Tensor]:
        """As `topk.top_k`: scores [n, c] fp32, falling, and places int64; -inf and NONE where it found fewer."""
        _, places = self._index.search(np.ascontiguousarray(queries.numpy()), min(k, len(vectors)))
        scores = _scores(queries, vectors, places)
        order = np.lexsort((places, -scores), axis=1)
        found = (np.take_along_axis(array, order, axis=1) for array in (scores, places))
        return torch.from_numpy(next(found)), torch.from_numpy(next(found))


def _scores(queries: Tensor, vectors: Rows, places: np.ndarray) -> np.ndarray:
    """float32 [n, c]: inner products with the candidates; -inf where there is none."""
    scores = np.full(places.shape, -np.inf, np.float32)
    rows, columns = np.nonzero(places != NONE)
    for start in range(0, len(rows), _SCORED):
        some, at = rows[start : start + _SCORED], columns[start : start + _SCORED]
        near = vectors[places[some, at]]  # type: ignore[index]  # rows of a file can be asked for by number
        scores[some, at] = (queries[torch.from_numpy(some)] * near).sum(dim=1).numpy()
    return scores


def _reason(error: RuntimeError) -> str:
    """What faiss says, without the place in its sources."""
    return str(error).strip().splitlines()[0].rpartition(": ")[2]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("index: needs faiss, which is not installed; pip install faiss-cpu") from None
    return faiss
