"""Mined shards as the pairs that a teacher scores: each query with its passage and with its negatives.

A shard is read in windows of whole blocks. What a window holds depends on the shard alone, so every worker, and a
restarted one, finds the same windows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.index import Index
from data.pairing import PairEncoder
from data.reading import Policy, read_block
from data.tokens import Ragged, concat

log = logging.getLogger("quintet")

Numbers = NDArray[np.int64]

# Enough for rows of one length to fill many batches; their texts are some 100 MB.
WINDOW_PAIRS = 65_536
COLUMNS = ["query", "passage", "negatives", "query_hash", "passage_hash", "negative_hash"]
_TEXTS_AT_ONCE = 16_384  # tokenised: the tokenizer's own records take some hundred bytes a token


@dataclass(frozen=True, eq=False)
class Pairs:
    """The n pairs of some records: their positives, then their negatives.

    Attributes:
        query_hash, passage_hash: int64 [n].
        query_row, passage_row: int64 [n], where a pair's texts stand in `queries` and `passages`. The first is the
            number of the record, and so is the second for a positive.
        records: how many there are; `bare` of them have no negatives.
    """

    query_hash: Numbers
    passage_hash: Numbers
    query_row: Numbers
    passage_row: Numbers
    queries: pa.ChunkedArray
    passages: pa.ChunkedArray
    records: int
    bare: int

    def __len__(self) -> int:
        return len(self.query_hash)

    def distinct(self) -> Pairs:
        """Every pair once: the first of those that are equal."""
        kept = first_places(self.query_hash, self.passage_hash)
        return replace(
            self,
            query_hash=self.query_hash[kept],
            passage_hash=self.passage_hash[kept],
            query_row=self.query_row[kept],
            passage_row=self.passage_row[kept],
        )

    def rows(self, chosen: Numbers, encoder: PairEncoder) -> PairRows:
        """Some of the pairs as token ids; each of their texts is tokenised once."""
        queries, query_at = _distinct_texts(self.queries, self.query_row[chosen], self.query_hash[chosen])
        passages, passage_at = _distinct_texts(self.passages, self.passage_row[chosen], self.passage_hash[chosen])
        return PairRows(
            encoder, tokenized(encoder.queries, queries), tokenized(encoder.passages, passages), query_at, passage_at
        )


@dataclass(frozen=True, eq=False)
class PairRows:
    """Tokenised texts, and which of them make the n rows; a row is put together when it is taken."""

    encoder: PairEncoder
    queries: Ragged
    passages: Ragged
    query_at: Numbers
    passage_at: Numbers

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [n], tokens of each row."""
        return self.encoder.lengths(self.queries.lengths[self.query_at], self.passages.lengths[self.passage_at])

    def take(self, rows: Numbers) -> Ragged:
        """Some of the rows, in the given order."""
        return self.encoder.join(self.queries.take(self.query_at[rows]), self.passages.take(self.passage_at[rows]))


def windows(index: Index, shard: int, *, policy: Policy = "strict") -> Iterator[Pairs]:
    """The distinct pairs of a shard, window by window.

    Under `skip` damaged records are left out and told. Raises DataError under `strict`.
    """
    tables: list[pa.Table] = []
    size = 0
    for number in range(len(index.shards[shard].blocks)):
        block = read_block(index, shard, number, policy=policy)
        for problem in block.problems:
            log.warning("%s", problem)
        tables.append(block.table.slice(0, block.good).select(COLUMNS))
        size += block.good + len(tables[-1]["negative_hash"].combine_chunks().flatten())
        if size >= WINDOW_PAIRS:
            yield pairs_of(tables).distinct()
            tables, size = [], 0
    if tables:
        yield pairs_of(tables).distinct()


def pairs_of(tables: Sequence[pa.Table]) -> Pairs:
    """The pairs of the records of some tables, equal ones included."""
    whole = {
        name: pa.concat_tables(table.select([name]) for table in tables)[name].combine_chunks() for name in COLUMNS
    }
    counts = whole["negative_hash"].value_lengths().to_numpy()
    records = np.arange(len(counts))
    query_row = np.concatenate([records, np.repeat(records, counts)])
    passage_hash = np.concatenate([whole["passage_hash"].to_numpy(), whole["negative_hash"].flatten().to_numpy()])
    return Pairs(
        whole["query_hash"].to_numpy()[query_row],
        passage_hash,
        query_row,
        np.arange(len(passage_hash)),
        pa.chunked_array([whole["query"]]),
        pa.chunked_array([whole["passage"], whole["negatives"].flatten()]),
        len(counts),
        int((counts == 0).sum()),
    )


def first_places(query_hash: Numbers, passage_hash: Numbers) -> Numbers:
    """The first place of every pair that is among n, rising."""
    order = np.lexsort((passage_hash, query_hash))
    changes = (np.diff(query_hash[order]) != 0) | (np.diff(passage_hash[order]) != 0)
    # lexsort is stable: of equal pairs the first comes first
    return np.sort(order[np.concatenate([np.ones(min(len(order), 1), np.bool_), changes])])


def _distinct_texts(column: pa.ChunkedArray, rows: Numbers, hashes: Numbers) -> tuple[list[str], Numbers]:
    """The different texts at some rows of a column, and which of them each row has."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return column.take(pa.array(rows[first])).to_pylist(), inverse


def tokenized(encode: Callable[[list[str]], Ragged], texts: list[str]) -> Ragged:
    """encode(texts), a piece at a time."""
    starts = range(0, len(texts), _TEXTS_AT_ONCE)
    return concat([encode(texts[start : start + _TEXTS_AT_ONCE]) for start in starts])
