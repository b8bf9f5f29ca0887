"""Evaluation texts in training data: sorted arrays of hashes, which training blocks are compared with.

A piece of work is a unit of some ten thousand records, which a process reads block by block. What it finds goes into a
file, so memory is that of the evaluation arrays and of one block, whatever the training data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data import mixture, ngrams, scan
from data.mixture import Mixture
from data.reading import Policy
from data.records import text_hashes
from trainer.lookup import Lookup, Members, build
from trainer.sets import RetrievalSet

UNIT = 32_768  # records of a piece of work at least
REASONS = ("query", "passage", "pair", "query_ngram", "passage_ngram")
_QUERY, _PASSAGE, _PAIR, _QUERY_NGRAM, _PASSAGE_NGRAM = (1 << bit for bit in range(len(REASONS)))
_COLUMNS = ("query", "passage", "id", "query_hash", "passage_hash")
_HIT = np.dtype([("record", "<i8"), ("set", "<i4"), ("text", "<i4"), ("reasons", "u1")])

Hits = NDArray[np.void]


# --- what is looked for --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """When texts overlap; the words of the keys of Config."""

    ngram: int
    shortest: int
    characters: int


@dataclass(frozen=True)
class Texts:
    """The t evaluation texts that are looked for: every set's queries with an answer, then their answers.

    Attributes:
        texts: t texts; numbers: the number of each among its set's queries or passages.
        sets: int64 [t]; queries: bool [t], whether it is a query rather than an answer.
        pairs: int64 [p, 2], a query and its answer, as numbers of texts.
    """

    texts: list[str]
    numbers: list[int]
    sets: NDArray[np.int64]
    queries: NDArray[np.bool_]
    pairs: NDArray[np.int64]


def gather(data: Sequence[RetrievalSet]) -> Texts:
    """The queries and the answers of all sets. Passages that answer nothing are no secret: they are not looked for."""
    texts: list[str] = []
    numbers: list[int] = []
    labels: list[tuple[int, bool]] = []
    pairs: list[NDArray[np.int64]] = []
    for number, each in enumerate(data):
        truth = each.relevance
        asked = np.repeat(np.arange(len(each.queries)), truth.counts)
        there = truth.passages < len(each.passages)  # some were judged, but are not in the corpus
        answers, places = np.unique(truth.passages[there], return_inverse=True)
        first = len(texts)
        texts += [*each.queries, *(each.passages[answer] for answer in answers.tolist())]
        numbers += [*range(len(each.queries)), *answers.tolist()]
        labels += [(number, True)] * len(each.queries) + [(number, False)] * len(answers)
        pairs.append(np.stack([first + asked[there], first + len(each.queries) + places], 1))
    kinds = np.array(labels).reshape(-1, 2)
    return Texts(texts, numbers, kinds[:, 0].astype(np.int64), kinds[:, 1] == 1, np.concatenate(pairs))


@dataclass(frozen=True, eq=False)
class Wanted:
    """The arrays that training texts are compared with.

    Attributes:
        sets, queries: of each evaluation text, as in Texts.
        lookups: entries that evaluation texts own: "exact" by the hash of a text, "pairs" by that of a pair (owned by
            its query), "whole" by that of all units of a short text, and a length by that of runs of so many units.
    """

    sets: NDArray[np.int64]
    queries: NDArray[np.bool_]
    lookups: dict[str, Lookup]

    def save(self, file: Path) -> None:
        """Write the arrays to an .npz file."""
        arrays: dict[str, NDArray[Any]] = {f"keys {name}": lookup.keys for name, lookup in self.lookups.items()}
        arrays |= {f"owners {name}": lookup.owners for name, lookup in self.lookups.items()}
        with file.open("wb") as opened:
            np.savez(opened, sets=self.sets, queries=self.queries, **arrays)  # type: ignore[arg-type]

    def find(self, block: pa.Table) -> Iterator[tuple[str, NDArray[np.int64], Hits]]:
        """(lookup, its entries, hits) of a block's records; a record is numbered by its row.

        A text counts on either side of a record, and a pair in either order.
        """
        query, passage = (block[name].to_numpy().view(np.uint64) for name in ("query_hash", "passage_hash"))
        for hashes in (query, passage):
            yield self._hits("exact", *self.lookups["exact"].find(hashes), _QUERY, _PASSAGE)
        for hashes in (_pair_hashes(query, passage), _pair_hashes(passage, query)):
            yield self._hits("pairs", *self.lookups["pairs"].find(hashes), _PAIR, _PAIR)
        for side in ("query", "passage"):
            for first, piece in ngrams.pieces(block[side].to_pylist()):
                yield from self._find_runs(ngrams.units(piece), first)

    def _find_runs(self, found: ngrams.Units, first: int) -> Iterator[tuple[str, NDArray[np.int64], Hits]]:
        """Runs of units that stand in both, and short texts that are the same to the unit."""
        for name, lookup in self.lookups.items():
            if name.isdigit():
                places, entries = lookup.find(found.runs(int(name)))
                rows, kept = found.inside(places, int(name))
            elif name == "whole":
                rows, entries = lookup.find(found.whole())
                kept = found.counts[rows] > 0
            else:
                continue
            yield self._hits(name, first + rows[kept], entries[kept], _QUERY_NGRAM, _PASSAGE_NGRAM)

    def _hits(
        self, name: str, rows: NDArray[np.int64], entries: NDArray[np.int64], if_query: int, if_passage: int
    ) -> tuple[str, NDArray[np.int64], Hits]:
        texts = self.lookups[name].owners[entries]
        hits = np.empty(len(rows), _HIT)
        hits["record"], hits["text"], hits["set"] = rows, texts, self.sets[texts]
        hits["reasons"] = np.where(self.queries[texts], if_query, if_passage)
        return name, entries, hits


def load_wanted(file: Path) -> Wanted:
    """Read what `Wanted.save` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        names = [name.removeprefix("keys ") for name in arrays.files if name.startswith("keys ")]
        lookups = {name: Lookup(arrays[f"keys {name}"], arrays[f"owners {name}"]) for name in names}
        return Wanted(arrays["sets"], arrays["queries"], lookups)


def prepare(texts: Texts, rule: Rule) -> tuple[Wanted, dict[str, Members]]:
    """What to look for, and which evaluation texts each entry stands for."""
    hashes = text_hashes(texts.texts).view(np.uint64)
    left, right = texts.pairs[:, 0], texts.pairs[:, 1]
    parts: dict[str, list[tuple[ngrams.Hashes, ngrams.Ints]]] = {
        "exact": [(hashes, np.arange(len(hashes)))],
        "pairs": [(_pair_hashes(hashes[left], hashes[right]), left)],
        "whole": [],
    }
    for first, piece in ngrams.pieces(texts.texts):
        found = ngrams.units(piece)
        short = np.flatnonzero((found.counts > 0) & (found.counts < _lengths(found, rule)[1]))
        parts["whole"].append((found.whole()[short], short + first))
        for length, runs, owners in _runs(found, rule):
            parts.setdefault(str(length), []).append((runs, owners + first))
    lookups: dict[str, Lookup] = {}
    members: dict[str, Members] = {}
    for name, arrays in parts.items():
        keys, owners = (np.concatenate(column) for column in zip(*arrays, strict=True))
        lookups[name], members[name] = build(keys, owners, 2 * texts.sets[owners] + texts.queries[owners])
    return Wanted(texts.sets, texts.queries, lookups), members


def _pair_hashes(left: ngrams.Hashes, right: ngrams.Hashes) -> ngrams.Hashes:
    return ngrams.mix(left, 2) ^ ngrams.mix(right, 3)


def _lengths(found: ngrams.Units, rule: Rule) -> tuple[ngrams.Ints, ngrams.Ints]:
    """int64 [n] each: the units of a run, and of the shortest text that is looked for inside of others.

    A text most of whose units are characters is measured in characters.
    """
    alone = np.concatenate([[0], np.cumsum(found.alone)])
    mostly = 2 * (alone[found.starts[1:]] - alone[found.starts[:-1]]) > found.counts
    factors = np.where(mostly, rule.characters, 1)
    return rule.ngram * factors, rule.shortest * factors


def _runs(found: ngrams.Units, rule: Rule) -> Iterator[tuple[int, ngrams.Hashes, ngrams.Ints]]:
    """(length, hashes, the texts they are of) of all runs to look for: of one length, or a shorter text whole."""
    longest, shortest = _lengths(found, rule)
    lengths = np.where(found.counts >= shortest, np.minimum(longest, found.counts), 0)
    for length in np.unique(lengths[lengths > 0]).tolist():
        hashes = found.runs(length)
        texts, inside = found.inside(np.arange(len(hashes)), length)
        chosen = inside & (lengths[texts] == length)
        yield length, hashes[chosen], texts[chosen]


# --- the comparison ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a process must know; the data are opened once in each."""

    data: tuple[str, ...]
    policy: Policy
    allow_pipe: bool
    wanted: str  # a file of Wanted
    unit: int
    found: str  # where hits go


def compare(job: Job) -> int:
    """Write the hits of a unit, and the entries that were met; returns how many of its records can be read."""
    data, wanted = opened(job.data, job.policy, job.allow_pipe), _loaded(job.wanted)
    hits, readable = [np.empty(0, _HIT)], 0
    met: dict[str, list[NDArray[np.int64]]] = {name: [] for name in wanted.lookups}
    for first, block in scan.tables(data, scan.units(data, UNIT)[job.unit], _COLUMNS, policy=job.policy):
        readable += len(block)
        of_block = []
        for name, entries, found in wanted.find(block):
            met[name].append(np.unique(entries))
            of_block.append(found)
        together = merged(np.concatenate(of_block), ("record", "text"))
        together["record"] += first
        hits.append(together)
    entries_met = {name: np.unique(np.concatenate(parts)) for name, parts in met.items() if parts}
    np.savez(job.found, hits=np.concatenate(hits), **entries_met)  # type: ignore[arg-type]
    return readable


def merged(hits: Hits, names: Sequence[str]) -> Hits:
    """The first of all hits that agree in two fields, with all of their reasons, in order of the first field."""
    hits = hits[np.lexsort([hits[name] for name in reversed(names)])]
    first = np.ones(len(hits), np.bool_)
    first[1:] = np.any([hits[name][1:] != hits[name][:-1] for name in names], 0)
    starts = np.flatnonzero(first)
    found = hits[starts]
    if len(starts):
        found["reasons"] = np.bitwise_or.reduceat(hits["reasons"], starts)
    return found


@lru_cache(maxsize=1)
def opened(data: tuple[str, ...], policy: Policy, allow_pipe: bool) -> Mixture:
    return mixture.load(list(data), policy=policy, allow_pipe=allow_pipe)


@lru_cache(maxsize=1)
def _loaded(file: str) -> Wanted:
    return load_wanted(Path(file))
