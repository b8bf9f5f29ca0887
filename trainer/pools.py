"""Where the negatives of a row come from: all passages, or those of its own source, or of its source and language.

Within a pool, passages are known by their place, 0 .. len(pool) - 1. A pool is what trainer/topk.py searches: a slice
of it is read from disk when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import scan
from data.mixture import Mixture
from data.parts import save_array
from data.reading import Policy
from data.records import text_hash
from trainer.approximate import Index
from trainer.corpus import Passages, Vectors
from trainer.device import free_memory
from trainer.known import distinct
from trainer.topk import top_k

Ints = NDArray[np.int64]

WITHIN = ("all", "source", "language")
_UNIT = 1 << 16
_TYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class Pool:
    """Some passages with their vectors.

    Attributes:
        members: their numbers, rising, or None for all of them.
        loaded: all vectors on the device that searches, or None where they are read from their file.
        index: what proposes candidates out of all passages; None: exact search.
    """

    passages: Passages
    vectors: Vectors
    members: Ints | None = None
    loaded: Tensor | None = None
    index: Index | None = None

    def search(self, queries: Tensor, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scores and places [n, c] of the nearest passages, best first; -inf and -1 where an index found fewer."""
        if self.index is not None:
            return self.index.search(queries, self.vectors, depth)
        return top_k(queries, self, depth, device=device)

    def __len__(self) -> int:
        return len(self.passages) if self.members is None else len(self.members)

    def __getitem__(self, places: slice) -> Tensor:
        """fp32 [n, D]: the vectors of some places, where they are searched."""
        if self.loaded is None:
            return self.of(places)
        if self.members is None:
            return self.loaded[places].float()
        return self.loaded[torch.from_numpy(self.members[places]).to(self.loaded.device)].float()

    def of(self, places: slice | Ints) -> Tensor:
        """fp32 [n, D] on the host: the vectors of some places."""
        return self.vectors[places if self.members is None else self.members[places]]

    def numbers(self, places: Ints) -> Ints:
        """The passages at some places."""
        return places if self.members is None else self.members[places]

    def hashes(self, places: Ints) -> Ints:
        """The text hashes of some places."""
        return self.passages.hashes[self.numbers(places)]

    def places_of(self, hashes: Ints) -> Ints:
        """The place of each text, -1 where it is not in the pool."""
        numbers = self.passages.numbers_of(hashes)
        if self.members is None:
            return numbers
        places = np.searchsorted(self.members, numbers).clip(max=len(self.members) - 1)
        return np.where(self.members[places] == numbers, places, -1)


class Pools:
    """The pools of a data set.

    Args:
        passages, vectors: the collection.
        groups: a file of `write_groups`; None for one pool of everything.
        within: one of WITHIN, as the file was written with.
        loaded, index: see Pool. An index is of all passages, so it needs the one pool of everything.
    """

    def __init__(
        self,
        passages: Passages,
        vectors: Vectors,
        groups: Path | None = None,
        within: str = "all",
        loaded: Tensor | None = None,
        index: Index | None = None,
    ) -> None:
        assert index is None or groups is None, "an index of all passages cannot be asked for some"
        self.everything = Pool(passages, vectors, loaded=loaded, index=index)
        self._within = within
        self._groups: Ints | None = None if groups is None else np.load(groups, mmap_mode="r")

    def of(self, source: int, table: pa.Table) -> Iterator[tuple[Pool, Ints]]:
        """Every pool that rows of a source take their negatives from, and those rows."""
        if self._groups is None:
            yield self.everything, np.arange(len(table))
            return
        codes = _codes(source, table, self._within)
        for code in np.unique(codes):
            start = np.searchsorted(self._groups[0], code, side="left")
            stop = np.searchsorted(self._groups[0], code, side="right")
            members = np.array(self._groups[1, start:stop])
            yield replace(self.everything, members=members), np.flatnonzero(codes == code)


def load(vectors: Vectors, device: torch.device) -> Tensor | None:
    """All vectors on a GPU, when they take at most half of what is free there: it searches faster than a disk reads."""
    if device.type == "cpu" or vectors.rows.nbytes > free_memory(device) / 2:
        return None
    loaded = torch.empty(vectors.shape, dtype=_TYPES[str(vectors.rows.dtype)], device=device)
    for start in range(0, len(vectors), _UNIT):
        loaded[start : start + _UNIT] = vectors[start : start + _UNIT].to(device)
    return loaded


def write_groups(path: Path, mixture: Mixture, passages: Passages, within: str, policy: Policy = "strict") -> None:
    """Sort the passages of all records by the pools they belong to: int64 [2, x], pools and passages."""
    pieces = [np.empty((2, 0), np.int64)]
    for unit in scan.units(mixture, _UNIT):
        for _, table in scan.tables(mixture, unit, ["passage_hash", "lang"], policy=policy):
            numbers = passages.numbers_of(table["passage_hash"].to_numpy())
            pieces.append(np.stack([_codes(unit.source, table, within), numbers]))
    save_array(path, distinct(np.concatenate(pieces, axis=1)))


def _codes(source: int, table: pa.Table, within: str) -> Ints:
    """int64 [n]: the pool of each row."""
    if within == "source":
        return np.full(len(table), source)
    code = cache(lambda lang: text_hash(f"{source}/{lang}"))
    return np.fromiter(map(code, table["lang"].to_pylist()), np.int64, len(table))
