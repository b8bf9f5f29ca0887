"""Which passages are known to answer a query: those that no row may get as a negative.

The table is a .npy file, mapped into memory: two rows, sorted query hashes and the passage's hash of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data import scan
from data.errors import UserError
from data.mixture import Mixture
from data.parts import save_array
from data.reading import Policy
from data.records import text_hash
from data.tokens import spans
from trainer import sets

Ints = NDArray[np.int64]

_UNIT = 1 << 16


class Known:
    """The known positives of every query.

    Args:
        path: a file of `write`.
    """

    def __init__(self, path: Path) -> None:
        self._pairs: Ints = np.load(path, mmap_mode="r")

    def of(self, query_hash: Ints) -> tuple[Ints, Ints]:
        """The known positives of some queries: (which of the queries, rising; the passage's hash) of each pair."""
        queries, passages = self._pairs
        starts = np.searchsorted(queries, query_hash, side="left")
        counts = np.searchsorted(queries, query_hash, side="right") - starts
        return np.repeat(np.arange(len(query_hash)), counts), passages[spans(starts, counts)]


def write(path: Path, mixture: Mixture, corpus: str = "", *, policy: Policy = "strict") -> None:
    """Collect the pairs of all records and, when the corpus is a BEIR folder, of all its qrels.

    A symmetric record counts in both directions. Takes some 50 bytes a record while it sorts.

    Raises:
        UserError: qrels that cannot be read.
        DataError: damaged shards, under `strict`.
    """
    save_array(path, distinct(np.concatenate([*_of_records(mixture, policy), *_of_qrels(Path(corpus))], axis=1)))


def distinct(pairs: Ints) -> Ints:
    """int64 [2, n], sorted and without repeats."""
    pairs = pairs[:, np.lexsort(pairs[::-1])]
    fresh = np.ones(pairs.shape[1], np.bool_)
    fresh[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
    return pairs[:, fresh]


def _of_records(mixture: Mixture, policy: Policy) -> Iterator[Ints]:
    for unit in scan.units(mixture, _UNIT):
        for _, table in scan.tables(mixture, unit, ["query_hash", "passage_hash", "symmetric"], policy=policy):
            pairs = np.stack([table["query_hash"].to_numpy(), table["passage_hash"].to_numpy()])
            yield pairs
            yield pairs[::-1, table["symmetric"].to_numpy()]


def _of_qrels(folder: Path) -> Iterator[Ints]:
    """By id: what qrels/*.tsv of a BEIR folder call relevant, as hashes of the two texts."""
    files = sorted(folder.glob("qrels/*.tsv")) if folder.name else []
    relevant: dict[str, set[str]] = {}  # passage id -> query ids
    for query, passage in (pair for file in files for pair in _judged(file)):
        relevant.setdefault(passage, set()).add(query)
    if not relevant:
        return
    queries = next((file for file in sorted(folder.glob("queries.jsonl*"))), folder / "queries.jsonl")
    hashes = {key: text_hash(text) for key, text in sets.documents(str(queries))}
    found = [
        (hashes[query], text_hash(text))
        for key, text in sets.documents(str(folder))
        for query in sorted(relevant.get(key, ()))
        if query in hashes
    ]
    yield np.array(found, np.int64).reshape(-1, 2).T


def _judged(file: Path) -> Iterator[tuple[str, str]]:
    """(query id, passage id) of the rows with a grade above 0."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"corpus={file}: cannot be read ({error}); give a readable qrels file") from None
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if (number == 1 and fields[-1].strip() == "score") or not line.strip():
            continue
        try:
            query, passage, grade = fields
            relevant = int(grade) > 0
        except ValueError:
            raise UserError(f"{file}, line {number}: not query-id, corpus-id and a whole score, with tabs") from None
        if relevant:
            yield query, passage
