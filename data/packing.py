"""Second pass of `pack`: which records stay, which are held out, and the shards, each written by one worker.

A plan holds some numbers of every record and no text. Everything follows from hashes and the seed, so the shards are
the same for any number of workers and any order of the records (only which of two duplicates stays depends on it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data import holdout
from data.index import ShardInfo
from data.records import NAMES, Record
from data.shards import BLOCK_RECORDS, ShardWriter
from data.spill import Run
from data.tokens import TextEncoder, load_tokenizer

TRAIN, DUPLICATE, OVER_LIMIT, HELD_OUT = range(4)
_NO_LIMIT = 1 << 60
_KNOWN_TEXTS = 1 << 16


@dataclass(frozen=True)
class Plan:
    """Every record of every run, in the order of the runs, as numbers; `verdict` is one of TRAIN ... HELD_OUT.

    `source` and `stratum` number `sources` and `strata`; `order` sorts the records by source and key.
    """

    runs: tuple[Run, ...]
    sources: tuple[str, ...]
    strata: tuple[tuple[str, str], ...]
    key: NDArray[np.uint64]
    source: NDArray[np.int32]
    stratum: NDArray[np.int32]
    bytes: NDArray[np.int32]
    order: NDArray[np.int64]
    verdict: NDArray[np.uint8]

    def count(self, verdict: int) -> NDArray[np.int64]:
        """Records with a verdict, by stratum."""
        return np.bincount(self.stratum[self.verdict == verdict], minlength=len(self.strata))


@dataclass(frozen=True)
class Share:
    """What is kept of a source (`limit`, 0: all) and held out of it; see holdout.choose."""

    seed: int
    limit: int = 0
    fraction: float = 0.0
    maximum: int = 0


def decide(runs: Sequence[Run], firsts: Sequence[int], share: Share) -> Plan:
    """The verdict on every record.

    Of equal pairs (same query and passage text) of one source the first is kept. `limit` keeps a random sample of
    each source. The held-out split is chosen from what is left.

    Args:
        runs: of all parts, in order.
        firsts: for each run, what to add to its column `row` to number the rows of all the input.
    """
    strata = tuple(sorted({stratum for run in runs for stratum in run.strata}))
    sources = tuple(dict.fromkeys(source for source, _ in strata))
    codes = {stratum: code for code, stratum in enumerate(strata)}
    stratum = np.concatenate(
        [np.array([codes[s] for s in run.strata], np.int32)[run.column("stratum")] for run in runs]
    )
    source = np.array([sources.index(name) for name, _ in strata], np.int32)[stratum]
    query, passage, key, size = (_gathered(runs, name) for name in ("query_hash", "passage_hash", "key", "bytes"))
    row = np.concatenate([run.column("row") + first for run, first in zip(runs, firsts, strict=True)])
    order = np.lexsort((row, key, source))
    verdict = np.full(len(order), TRAIN, np.uint8)
    same = [values[order[1:]] == values[order[:-1]] for values in (source, key, query, passage)]
    verdict[order[1:][np.logical_and.reduce(same)]] = DUPLICATE
    if share.limit:
        unique = order[verdict[order] == TRAIN]
        verdict[unique[_rank_in_group(source[unique]) >= share.limit]] = OVER_LIMIT
    if share.fraction:
        kept = np.flatnonzero(verdict == TRAIN)
        component = holdout.components(query[kept], passage[kept])
        chosen = holdout.choose(
            component, stratum[kept], fraction=share.fraction, maximum=share.maximum, seed=share.seed
        )
        verdict[kept[chosen]] = HELD_OUT
    return Plan(tuple(runs), sources, strata, key, source, stratum, size, order, verdict)


def _gathered(runs: Sequence[Run], column: str) -> NDArray[Any]:
    return np.concatenate([run.column(column) for run in runs])


def _rank_in_group(group: NDArray[np.int32]) -> NDArray[np.int64]:
    """The place of each element among those of its group; the groups stand together."""
    return np.arange(len(group)) - np.searchsorted(group, group)


def save_verdicts(plan: Plan) -> None:
    """Put the verdicts on its records beside each run, for the workers."""
    start = 0
    for run in plan.runs:
        np.save(_verdict_path(run), plan.verdict[start : start + run.records])
        start += run.records


def _verdict_path(run: Run) -> str:
    return f"{run.path}.npy"


def records(runs: Sequence[Run], source: str, verdict: int, low: int = 0, high: int | None = None) -> pa.Table:
    """The records of a source with a verdict and low <= key < high, by key."""
    slices = []
    for run in runs:
        start, stop = run.sources.get(source, (0, 0))
        keys = run.column("key")[start:stop]
        first = int(np.searchsorted(keys, np.uint64(low)))
        last = stop - start if high is None else int(np.searchsorted(keys, np.uint64(high)))
        chosen = np.load(_verdict_path(run), mmap_mode="r")[start + first : start + last] == verdict
        slices.append(run.table.slice(start + first, last - first).filter(pa.array(chosen)))
    table = pa.concat_tables(slices)
    return table.take(pa.array(np.argsort(table["key"].to_numpy(), kind="stable")))


def as_records(table: pa.Table) -> Iterator[Record]:
    """The rows of a table as records."""
    for row in table.select(NAMES).to_pylist():
        yield Record(**{**row, "negatives": tuple(row["negatives"])})


# Shards


@dataclass(frozen=True)
class Shape:
    """How shards are written; `tokenizer` is a folder or hub id, "" for none."""

    folder: Path
    kind: str
    tokenizer: str = ""
    max_tokens: int = 0


@dataclass(frozen=True)
class ShardJob:
    """One shard: the training records of a source with low <= key < high (None: to the end)."""

    runs: tuple[Run, ...]
    source: str
    number: int
    low: int
    high: int | None
    shape: Shape


@dataclass(frozen=True)
class Written:
    """A shard and the words and tokens (0 without a tokenizer) in its queries and passages."""

    shard: ShardInfo
    query_words: int
    passage_words: int
    query_tokens: int
    passage_tokens: int


def shard_jobs(plan: Plan, shape: Shape, shard_bytes: int) -> list[ShardJob]:
    """One job for each shard: sources are cut into shards of equal size, at most about `shard_bytes` each."""
    training = plan.order[plan.verdict[plan.order] == TRAIN]
    bounds = np.searchsorted(plan.source[training], np.arange(len(plan.sources) + 1))
    jobs = []
    for code, name in enumerate(plan.sources):
        rows = training[bounds[code] : bounds[code + 1]]
        # Tokens take about half as much as their text.
        starts = _cuts(plan.key[rows], plan.bytes[rows] * (1.5 if shape.tokenizer else 1.0), shard_bytes)
        spans = zip([0, *starts], [*starts, None], strict=True) if len(rows) else ()
        jobs += [ShardJob(plan.runs, name, n, low, high, shape) for n, (low, high) in enumerate(spans)]
    return jobs


def _cuts(keys: NDArray[np.uint64], sizes: NDArray[np.float64], shard_bytes: int) -> list[int]:
    """The first key of every shard but the first, for rows sorted by key. No shard is empty."""
    ends = np.cumsum(sizes)
    total = ends[-1] if len(ends) else 0.0
    count = max(1, -int(-total // shard_bytes))
    starts = np.unique(keys[np.searchsorted(ends, total * np.arange(1, count) / count)])
    return [int(key) for key in starts if key > keys[0]]


def write_shard(job: ShardJob) -> Written:
    """Gather the records of one shard, tokenise them and write the file."""
    shape = job.shape
    table = records(job.runs, job.source, TRAIN, job.low, job.high)
    tokeniser = _tokeniser(shape.tokenizer, shape.max_tokens) if shape.tokenizer else None
    dtype = tokeniser.dtype if tokeniser else None
    folder = shape.folder / f".{job.source}-{job.number:06d}"
    num_tokens = np.zeros(2, np.int64)
    with ShardWriter(folder, job.source, kind=shape.kind, shard_bytes=_NO_LIMIT, token_dtype=dtype) as writer:
        for start in range(0, table.num_rows, BLOCK_RECORDS):
            block = list(as_records(table.slice(start, BLOCK_RECORDS)))
            if tokeniser is None:
                for record in block:
                    writer.write(record)
            else:
                for record, tokens in zip(block, tokeniser(block), strict=True):
                    writer.write(record, tokens)
                    num_tokens += len(tokens[0]), len(tokens[1])
    shard = _moved(writer.close()[0], folder, job)
    return Written(shard, _num_words(table["query"]), _num_words(table["passage"]), *map(int, num_tokens))


class _Tokeniser:
    """The tokens of records, each text cut to `max_tokens` (0: whole).

    Texts come again, as the one original of many translations does, so the tokens of the last ones are kept.
    """

    def __init__(self, tokenizer: str, max_tokens: int) -> None:
        self._encoder = TextEncoder(load_tokenizer(tokenizer), _NO_LIMIT)
        self._max_tokens = max_tokens or None
        self._known: dict[str, NDArray[np.int32]] = {}
        self.dtype = "uint16" if self._encoder.num_ids <= 1 << 16 else "uint32"

    def __call__(self, block: Sequence[Record]) -> list[tuple[Any, Any, list[Any]]]:
        self._learn([text for record in block for text in (record.query, record.passage, *record.negatives)])
        known = self._known
        return [(known[r.query], known[r.passage], [known[text] for text in r.negatives]) for r in block]

    def _learn(self, texts: Sequence[str]) -> None:
        if len(self._known) > _KNOWN_TEXTS:
            self._known.clear()
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        body = self._encoder.body(fresh)
        rows = np.split(body.ids, body.offsets[1:-1])
        self._known.update(zip(fresh, (row[: self._max_tokens] for row in rows), strict=False))


@lru_cache(maxsize=1)
def _tokeniser(tokenizer: str, max_tokens: int) -> _Tokeniser:
    return _Tokeniser(tokenizer, max_tokens)


def _moved(shard: ShardInfo, folder: Path, job: ShardJob) -> ShardInfo:
    """Put a worker's shard beside the others, under its number."""
    name = f"{job.source}-{job.number:06d}.tar"
    os.replace(folder / shard.file, job.shape.folder / name)
    folder.rmdir()
    return replace(shard, file=name)


def _num_words(texts: pa.ChunkedArray) -> int:
    """Words by blanks; texts are normalised."""
    return len(texts) + int(pc.sum(pc.count_substring(texts, " ")).as_py() or 0)


# What does not become shards


def write_holdout(plan: Plan, folder: Path) -> None:
    """Write the held-out records as holdout.jsonl, and those of each source as holdout/SOURCE.jsonl."""
    if not plan.count(HELD_OUT).any():
        return
    (folder / "holdout").mkdir()
    with open(folder / "holdout.jsonl", "wb") as everything:
        for source in plan.sources:
            lines = b"".join(map(_json_line, as_records(records(plan.runs, source, HELD_OUT))))
            if lines:
                (folder / "holdout" / f"{source}.jsonl").write_bytes(lines)
                everything.write(lines)


def _json_line(record: Record) -> bytes:
    values = {name: getattr(record, name) for name in NAMES}
    return orjson.dumps({name: value for name, value in values.items() if value}, option=orjson.OPT_APPEND_NEWLINE)


def sample_texts(plan: Plan, count: int) -> list[str]:
    """About `count` texts of training pairs, both sides, from every language as many as it has up to an equal share."""
    languages = sorted({lang for _, lang in plan.strata})
    code = np.array([languages.index(lang) for _, lang in plan.strata], np.int32)
    rows = np.flatnonzero(plan.verdict == TRAIN)
    rows = rows[np.lexsort((plan.key[rows], code[plan.stratum[rows]]))]
    language = code[plan.stratum[rows]]
    share = _equal_share(np.bincount(language, minlength=len(languages)), count // 2)
    chosen = np.sort(rows[_rank_in_group(language) < share])
    texts: dict[str, None] = {}
    start = 0
    for run in plan.runs:
        first, last = np.searchsorted(chosen, (start, start + run.records))
        table = run.table.select(["query", "passage"]).take(pa.array(chosen[first:last] - start))
        start += run.records
        texts |= dict.fromkeys(table["query"].to_pylist() + table["passage"].to_pylist())
    return list(texts)


def _equal_share(available: NDArray[np.int64], wanted: int) -> int:
    """The largest share s with sum(min(available, s)) <= wanted, but at least 1; enough for all where it can be."""
    low, high = 1, max(1, int(available.max(initial=0)))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(available, middle).sum() <= wanted else (low, middle - 1)
    return low
