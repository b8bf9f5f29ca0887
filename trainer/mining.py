"""Hard negatives for the rows of shards: known positives out, exact search, the rules, random passages for the rest.

Rows are mined unit by unit. What comes out for a row depends on its unit, the collection and the settings, and not on
which rank mined it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import scan
from data.errors import UserError
from data.holdout import mix
from data.mixture import Mixture
from data.reading import Policy
from data.rules import Prompts
from data.scan import Unit
from data.spill import pair_keys
from trainer.embed import Embedder, Progress
from trainer.known import Known
from trainer.negatives import NONE, Rules, among, choose, draw, keep_given
from trainer.pools import Pool, Pools

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Mined = NDArray[np.void]

_COLUMNS = ("query", "passage", "lang", "instruction", "symmetric", "query_hash", "passage_hash", "negative_hash")
_FIRST_GIVEN = -2  # negative number g that a row brought along stands as -2 - g
_SPARE = 8  # candidates beyond the depth, for those that are banned; a row with more of them is searched deeper
_SCORED_ROWS = 1024  # rows whose random passages are scored together


@dataclass(frozen=True)
class Settings:
    """What a row gets.

    Attributes:
        count: negatives of a row.
        random_count: how many of them are drawn at random from the row's pool.
        sampling: "top" takes the best candidates that the rules allow, "random" draws from them.
        rules: which candidates may be taken.
        fill: "random" draws what the search did not give; "drop" leaves such a row short.
        seed: of all draws.
    """

    count: int
    random_count: int
    sampling: str
    rules: Rules
    fill: str
    seed: int


def row_type(count: int) -> np.dtype[np.void]:
    """One mined row.

    numbers: `count` passages, the kept given ones first, then mined ones by falling score, then random ones; NONE
    where there is none; see `given`. scores: of mined and random ones, NaN for others. positive: the score of the
    row's own passage. first: whether no passage but a known positive scores higher. too_close: candidates that the
    margin refused. kept, mined, drawn: how many of the negatives were given, found, random. brought: how many were
    given before some were left out.
    """
    small = [(name, "<i4") for name in ("too_close", "brought", "kept", "mined", "drawn")]
    return np.dtype(
        [("numbers", "<i8", (count,)), ("scores", "<f4", (count,)), ("positive", "<f4"), ("first", "?"), *small]
    )


def given(numbers: Ints) -> Ints:
    """Which of a record's own negatives stands at some places of `numbers`; below 0 where none of them does."""
    return _FIRST_GIVEN - numbers


@dataclass(frozen=True, eq=False)
class Miner:
    """Mines units of a mixture."""

    mixture: Mixture
    pools: Pools
    known: Known
    embedder: Embedder
    settings: Settings
    policy: Policy = "strict"

    def read(self, unit: Unit) -> pa.Table:
        """What is needed of the rows of a unit."""
        tables = [table for _, table in scan.tables(self.mixture, unit, _COLUMNS, policy=self.policy)]
        return pa.concat_tables(tables).combine_chunks()

    def __call__(self, unit: Unit, table: pa.Table, progress: Progress | None = None) -> Mined:
        """`row_type` [b] for the rows of a unit.

        Raises:
            UserError: a pool has too few passages for a row.
        """
        mined = np.zeros(len(table), row_type(self.settings.count))
        if not len(table):
            return mined
        mined["numbers"], mined["scores"] = NONE, np.nan
        query_hash, passage_hash = (table[name].to_numpy() for name in ("query_hash", "passage_hash"))
        queries = self.embedder(scan.query_texts(table, self._prompts), progress)
        mined["positive"] = (queries * self._passages(table, passage_hash)).sum(dim=1).numpy()
        banned = self._banned(table, query_hash, mined)
        seeds = pair_keys(query_hash, passage_hash, self.settings.seed)
        for pool, rows in self.pools.of(unit.source, table):
            codes = _codes(pool, rows, *banned)
            mined[rows] = self._fill(pool, mined[rows], queries[torch.from_numpy(rows)], seeds[rows], codes)
        self._check(unit, table, mined)
        return mined

    @cached_property
    def _prompts(self) -> Prompts:
        return Prompts(query=self.embedder.model.query_prompt, passage=self.embedder.model.passage_prompt)

    def _passages(self, table: pa.Table, passage_hash: Ints) -> Tensor:
        """fp32 [b, D]: the vectors of the rows' own passages: those of the collection, where it has them."""
        numbers = self.pools.everything.places_of(passage_hash)
        vectors = self.pools.everything.of(numbers.clip(min=0))
        absent = np.flatnonzero(numbers < 0)
        if len(absent):
            texts = scan.passage_texts(table.take(pa.array(absent)), self._prompts)
            vectors[torch.from_numpy(absent)] = self.embedder(texts)
        return vectors

    def _banned(self, table: pa.Table, query_hash: Ints, mined: Mined) -> tuple[Ints, Ints]:
        """(row, text) that no row may get: known positives, the query itself and the given negatives that it keeps.

        Those that are kept are written to `mined`.
        """
        rows, hashes = self.known.of(query_hash)
        rows, hashes = np.concatenate([rows, np.arange(len(table))]), np.concatenate([hashes, query_hash])
        given_rows, given_place, given_hash = _given(table)
        kept = keep_given(given_rows, given_hash, rows, hashes, self.settings.count)
        mined["brought"] = np.bincount(given_rows, minlength=len(table))
        mined["kept"] = np.bincount(given_rows[kept], minlength=len(table))
        given_rows, given_place, given_hash = given_rows[kept], given_place[kept], given_hash[kept]
        slots = np.arange(len(given_rows)) - np.searchsorted(given_rows, given_rows)
        mined["numbers"][given_rows, slots] = _FIRST_GIVEN - given_place
        return np.concatenate([rows, given_rows]), np.concatenate([hashes, given_hash])

    def _fill(self, pool: Pool, mined: Mined, queries: Tensor, seeds: NDArray[np.uint64], codes: Ints) -> Mined:
        """Rows with what the pool gives them; `codes` are `row * len(pool) + place` of what they may not have."""
        settings, size = self.settings, len(pool)
        for depth, rows in _by_depth(np.bincount(codes // size, minlength=len(mined)), settings.rules.depth):
            self._search(pool, depth, rows, mined, queries, seeds, codes)
        found = mined["numbers"] >= 0
        codes = np.union1d(codes, (np.arange(len(mined))[:, None] * size + mined["numbers"])[found])
        missing = settings.count - mined["kept"] - mined["mined"]
        most = settings.count if settings.fill == "random" else settings.random_count
        places = draw(size, np.minimum(missing, most).astype(np.int64), seeds, codes)
        mined["drawn"] = _put(mined, np.arange(len(mined)), places, _scores(pool, queries, places))
        there = mined["numbers"] >= 0
        mined["numbers"][there] = pool.numbers(mined["numbers"][there])
        return mined

    def _search(
        self,
        pool: Pool,
        depth: int,
        rows: Ints,
        mined: Mined,
        queries: Tensor,
        seeds: NDArray[np.uint64],
        codes: Ints,
    ) -> None:
        """Give some rows what the rules take out of their `depth` nearest passages, as places of the pool."""
        settings, device = self.settings, self.embedder.device
        scores, places = (found.cpu().numpy() for found in pool.search(queries[torch.from_numpy(rows)], depth, device))
        banned = among(rows[:, None] * len(pool) + places, codes) | (places == NONE)
        lots = None
        if settings.sampling == "random":
            lots = mix(pool.hashes(places).view(np.uint64) ^ seeds[rows, None], settings.seed)
        positive, free = mined["positive"][rows], settings.count - mined["kept"][rows]
        taken = choose(
            places,
            scores,
            banned,
            positive,
            (free - np.minimum(free, settings.random_count)).astype(np.int64),
            lots,
            settings.rules,
        )
        best = np.where(banned, -np.inf, scores).max(axis=1)
        mined["first"][rows], mined["too_close"][rows] = best <= positive, taken.too_close
        mined["mined"][rows] = _put(mined, rows, taken.numbers, taken.scores)

    def _check(self, unit: Unit, table: pa.Table, mined: Mined) -> None:
        have = mined["kept"] + mined["mined"] + mined["drawn"]
        short = np.flatnonzero(have < self.settings.count)
        if len(short) and self.settings.fill == "random":
            row, name = int(short[0]), self.mixture.sources[unit.source].name
            raise UserError(
                f"negatives={self.settings.count}: too few passages for {len(short)} of {len(table)} records of source "
                f"{name}: only {have[row]} are left for {table['query'][row].as_py()[:60]!r} beside what answers it; "
                "lower negatives, set fill=drop, widen `within`, or name a larger corpus"
            )


def _given(table: pa.Table) -> tuple[Ints, Ints, Ints]:
    """The negatives that the rows bring along: (row, rising; its place among those of the row; the text's hash)."""
    column = table["negative_hash"].combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    counts = np.diff(offsets)
    places = np.arange(counts.sum()) - np.repeat(offsets[:-1] - offsets[0], counts)
    return np.repeat(np.arange(len(table)), counts), places, column.flatten().to_numpy()


def _codes(pool: Pool, rows: Ints, banned_rows: Ints, banned_hashes: Ints) -> Ints:
    """Sorted codes `number in rows * len(pool) + place` of what some rows of the unit may not have from a pool."""
    number = np.full(max(int(banned_rows.max()), int(rows.max())) + 1, -1)
    number[rows] = np.arange(len(rows))
    mine = number[banned_rows] >= 0
    places = pool.places_of(banned_hashes[mine])
    return np.unique((number[banned_rows[mine]] * len(pool) + places)[places >= 0])


def _by_depth(banned: Ints, depth: int) -> Iterator[tuple[int, Ints]]:
    """(candidates, rows that need so many): `depth` and room for what is banned, in few steps."""
    low, spare = -1, _SPARE
    while low < banned.max(initial=0):
        rows = np.flatnonzero((banned > low) & (banned <= spare))
        if len(rows):
            yield depth + spare, rows
        low, spare = spare, spare * 8


def _put(mined: Mined, rows: Ints, numbers: Ints, scores: Floats) -> Ints:
    """Append negatives to rows: [r, n], NONE at their ends; returns how many each row got."""
    have = (mined["kept"] + mined["mined"])[rows]
    at, column = np.nonzero(numbers != NONE)
    mined["numbers"][rows[at], have[at] + column] = numbers[at, column]
    mined["scores"][rows[at], have[at] + column] = scores[at, column]
    return np.bincount(at, minlength=len(rows))


def _scores(pool: Pool, queries: Tensor, places: Ints) -> Floats:
    """float32 like `places`: the inner products with the row's query; NaN where there is no passage."""
    scores = np.full(places.shape, np.nan, np.float32)
    for start in range(0, len(places), _SCORED_ROWS):
        rows, columns = np.nonzero(places[start : start + _SCORED_ROWS] != NONE)
        rows += start
        if len(rows):
            vectors = pool.of(places[rows, columns])
            scores[rows, columns] = (queries[torch.from_numpy(rows)] * vectors).sum(dim=1).numpy()
    return scores
