"""The score cache: what a teacher said of (query, passage) pairs, in a folder that many processes write and read.

    scores/<teacher fingerprint>/<checksum>.arrow     immutable segments of rows (query_hash, passage_hash, logit)

There is no database: on network storage LMDB and SQLite are unsafe. A segment is written under a temporary name,
synced, then renamed, so it is there whole or not at all. Its name is the checksum of its rows: the same work done
twice, by two workers or after a restart, gives the same file. Reading decodes Arrow's plain buffers, nothing else.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from data.blocks import BadBlock, refuse_compression
from data.errors import DataError, NumericError, UserError
from data.parts import write_whole

log = logging.getLogger("quintet")

Hashes = NDArray[np.int64]
Logits = NDArray[np.float32]

FORMAT = b"quintet-scores-1"
FINGERPRINT = re.compile(r"[0-9a-f]{32}")
SCHEMA = pa.schema([("query_hash", pa.int64()), ("passage_hash", pa.int64()), ("logit", pa.float32())])
# Segments are read side by side: opening a file on a network disk takes milliseconds, and there are many thousands.
_READERS = 16
_SHOWN = 5


class BadSegment(Exception):
    """A file that holds no scores of this teacher; the text says why."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scored pairs: query_hash int64 [n], passage_hash int64 [n], logit float32 [n], the raw output of the teacher."""

    query_hash: Hashes
    passage_hash: Hashes
    logit: Logits

    def __len__(self) -> int:
        return len(self.logit)


def fingerprints(folder: str | Path) -> list[str]:
    """The teachers that a cache folder has scores of, sorted; none when there is no such folder."""
    if not Path(folder).is_dir():
        return []
    return sorted(path.name for path in Path(folder).iterdir() if FINGERPRINT.fullmatch(path.name) and path.is_dir())


def open_cache(scores: str | Path, fingerprint: str = "") -> ScoreCache:
    """The cache of one teacher, not yet loaded.

    Args:
        scores: the cache folder, or the folder of one teacher in it.
        fingerprint: which teacher; needed where the folder has several.

    Raises:
        UserError: there is no such folder or teacher, or there are several teachers to choose from.
    """
    folder = Path(scores)
    if FINGERPRINT.fullmatch(folder.name) and not fingerprint and folder.is_dir():
        return ScoreCache(folder.parent, folder.name)
    found = fingerprints(folder)
    if fingerprint and fingerprint not in found:
        there = f"there are {', '.join(found)}" if found else "there are none"
        raise UserError(f"scores={scores}: no scores of the teacher {fingerprint}; {there}; run quintet distill first")
    if not found:
        raise UserError(f"scores={scores}: no teacher's scores are there; run quintet distill first")
    if len(found) > 1 and not fingerprint:
        raise UserError(
            f"scores={scores}: holds the scores of {len(found)} teachers; name one of their folders: "
            f"{', '.join(str(folder / name) for name in found)}"
        )
    return ScoreCache(folder, fingerprint or found[0])


class ScoreCache:
    """The scores of one teacher in memory, 20 bytes each (40 while they are read), looked up by arrays of pairs.

    Of several scores for one pair the first that was read stands, in the order of the files' names. One teacher's are
    equal up to rounding, which depends on the batch that a pair was scored in; `spread` is the largest difference met.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = Path(folder) / fingerprint, fingerprint
        self.repeated, self.spread = 0, 0.0
        self._read: frozenset[str] = frozenset()
        self._tables: tuple[_Rows, ...] = ()  # replaced at once: other threads may be looking something up

    def __len__(self) -> int:
        """Distinct pairs with a score."""
        return sum(map(len, self._tables))

    @property
    def segments(self) -> frozenset[str]:
        """The names of the files that have been read."""
        return self._read

    def load(self) -> int:
        """Read every segment; returns the number of pairs. A folder that is not there yet has none.

        Raises:
            DataError: files that are damaged or do not belong here, named in one message.
        """
        self.refresh()
        return len(self)

    def refresh(self) -> int:
        """Read the segments that have appeared since; returns the number of pairs that are new. Errors as `load`."""
        names = sorted(name for name in _segments(self.folder) if name not in self._read)
        if not names:
            return 0
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(self._segment, names))
        bad = [f"{name} ({rows})" for name, rows in zip(names, found, strict=True) if isinstance(rows, BadSegment)]
        if bad:
            raise DataError(_bad_segments(self.folder, bad, len(names)))
        before = len(self)
        self._add([rows for rows in found if isinstance(rows, _Rows)])
        self._read |= set(names)
        return len(self) - before

    def add(self, rows: Scores) -> None:
        """Take rows as if they had been read; nothing is written."""
        self._add([_Rows.of(rows)])

    def lookup(self, query_hash: Hashes, passage_hash: Hashes) -> tuple[Logits, NDArray[np.bool_]]:
        """The scores of n pairs: (logits float32 [n], NaN where there is none; found bool [n])."""
        logits = np.full(len(query_hash), np.nan, np.float32)
        found = np.zeros(len(query_hash), np.bool_)
        key = pair_keys(query_hash, passage_hash)
        # In rising order neighbours share the upper levels of the search, which are then in the processor's cache.
        left = np.argsort(key)
        for table in self._tables:
            place = table.find(key[left], query_hash[left])
            here = place >= 0
            logits[left[here]], found[left[here]] = table.logit[place[here]], True
            left = left[~here]
        return logits, found

    def _segment(self, name: str) -> _Rows | BadSegment:
        try:
            return _Rows.of(read_segment(self.folder / name, self.fingerprint))
        except BadSegment as problem:
            return problem

    def _add(self, parts: Sequence[_Rows]) -> None:
        """Put rows into a table of their own, and join tables of like size: few are left, each row is moved seldom."""
        rows = _joined(parts)
        for table in self._tables:
            place = table.find(rows.key, rows.query)
            here = place >= 0
            self._note_repeats(rows.logit[here] - table.logit[place[here]])
            rows = rows.take(np.flatnonzero(~here))
        tables = [*self._tables, self._sorted(rows)]
        while len(tables) > 1 and 2 * len(tables[-1]) > len(tables[-2]):
            last = tables.pop()
            tables[-1] = self._sorted(_joined([tables[-1], last]))
        self._tables = tuple(tables)

    def _sorted(self, rows: _Rows) -> _Rows:
        """The rows by rising key, without those that repeat an earlier one."""
        rows = rows.take(np.argsort(rows.key, kind="stable"))
        repeats = np.zeros(len(rows), np.bool_)
        repeats[1:] = (rows.key[1:] == rows.key[:-1]) & (rows.query[1:] == rows.query[:-1])
        if not repeats.any():
            return rows
        first = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(rows))))
        self._note_repeats(rows.logit[repeats] - rows.logit[first[repeats]])
        return rows.take(np.flatnonzero(~repeats))

    def _note_repeats(self, differences: Logits) -> None:
        self.repeated += len(differences)
        self.spread = max(self.spread, float(np.abs(differences).max(initial=0.0)))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Scores by key; key and query hash together say which pair it is."""

    key: NDArray[np.uint64]
    query: Hashes
    logit: Logits

    @staticmethod
    def of(scores: Scores) -> _Rows:
        """Copies of the columns, so that the file behind them is let go."""
        return _Rows(pair_keys(scores.query_hash, scores.passage_hash), scores.query_hash.copy(), scores.logit.copy())

    def __len__(self) -> int:
        return len(self.key)

    def take(self, rows: NDArray[np.int64]) -> _Rows:
        return _Rows(self.key[rows], self.query[rows], self.logit[rows])

    def find(self, key: NDArray[np.uint64], query: Hashes) -> NDArray[np.int64]:
        """The row of every pair, -1 for one that is not here; the keys of this table must rise."""
        place = np.searchsorted(self.key, key)
        found = np.full(len(key), -1, np.int64)
        open_rows = np.arange(len(key))
        while len(open_rows):  # a second round only where two pairs share a key: about never
            open_rows = open_rows[place[open_rows] < len(self)]
            open_rows = open_rows[self.key[place[open_rows]] == key[open_rows]]
            same = self.query[place[open_rows]] == query[open_rows]
            found[open_rows[same]] = place[open_rows[same]]
            open_rows = open_rows[~same]
            place[open_rows] += 1
        return found


def _joined(parts: Sequence[_Rows]) -> _Rows:
    return _Rows(
        np.concatenate([part.key for part in parts]),
        np.concatenate([part.query for part in parts]),
        np.concatenate([part.logit for part in parts]),
    )


def pair_keys(query_hash: Hashes, passage_hash: Hashes) -> NDArray[np.uint64]:
    """A 64-bit number for every pair, spread evenly, that with the query's hash gives the passage's.

    mix(query) xor passage, with the finaliser of SplitMix64 (Steele et al. 2014) as mix: without it a pair of equal
    texts would get 0.
    """
    mixed: NDArray[Any] = query_hash.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    mixed ^= passage_hash.view(np.uint64)
    return mixed


class ScoreWriter:
    """Collects scores and writes them as segments; what is flushed is durable, what is not is lost with the process."""

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        assert FINGERPRINT.fullmatch(fingerprint), fingerprint
        self.folder, self.fingerprint = Path(folder) / fingerprint, fingerprint
        self._pending: list[Scores] = []

    @property
    def pending(self) -> int:
        """Scores that are not flushed yet."""
        return sum(map(len, self._pending))

    def add(self, query_hash: Hashes, passage_hash: Hashes, logit: Logits) -> None:
        """Take the scores of n pairs. Raises NumericError for one that is not finite: nobody could learn from it."""
        if not np.isfinite(logit).all():
            raise NumericError(
                f"the teacher gave {logit[~np.isfinite(logit)][0]} for a pair; use precision=fp32 (or bf16, which has "
                "its range), or another teacher"
            )
        self._pending.append(Scores(query_hash, passage_hash, logit))

    def flush(self) -> Path | None:
        """Write what has been taken as one segment and return its path; None when there is nothing.

        Raises:
            UserError: the disk is full or the folder cannot be written; the scores stay pending.
        """
        if not self.pending:
            return None
        rows = Scores(
            np.concatenate([rows.query_hash for rows in self._pending]),
            np.concatenate([rows.passage_hash for rows in self._pending]),
            np.concatenate([rows.logit for rows in self._pending]),
        )
        path = write_segment(self.folder, self.fingerprint, rows)
        self._pending.clear()
        return path


def write_segment(folder: Path, fingerprint: str, rows: Scores) -> Path:
    """Write rows as one segment into the folder of their teacher. Raises UserError when it cannot be written."""
    checksum = _checksum(rows)
    schema = SCHEMA.with_metadata({b"format": FORMAT, b"teacher": fingerprint.encode(), b"xxh3": checksum.encode()})
    columns = [pa.array(rows.query_hash), pa.array(rows.passage_hash), pa.array(rows.logit)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))
    path = folder / f"{checksum}.arrow"
    content = sink.getvalue()
    write_whole(path, lambda partial: _write(partial, content))
    return path


def _write(path: Path, content: pa.Buffer) -> None:
    with open(path, "wb") as file:
        file.write(content)


def read_segment(path: Path, fingerprint: str) -> Scores:
    """The rows of a segment, checked. Raises BadSegment."""
    try:
        with pa.memory_map(str(path)) as file:
            buffer = file.read_buffer()
        refuse_compression(buffer)
        reader = pa.ipc.open_stream(buffer)
        schema, table = reader.schema, reader.read_all()
    except (BadBlock, pa.ArrowException, OSError, ValueError) as error:
        raise BadSegment(f"no sound Arrow stream: {error}") from None
    about = schema.metadata or {}
    if about.get(b"format") != FORMAT or not schema.equals(SCHEMA):
        raise BadSegment("no segment of scores")
    if about.get(b"teacher") != fingerprint.encode():
        raise BadSegment(f"scores of another teacher, {about.get(b'teacher', b'?').decode(errors='replace')}")
    if any(column.null_count for column in table.columns):
        raise BadSegment("it has nulls")
    rows = Scores(*(column.to_numpy() for column in table.columns))
    if _checksum(rows).encode() != about.get(b"xxh3"):
        raise BadSegment("its checksum is not that of its rows")
    if not np.isfinite(rows.logit).all():
        raise BadSegment("it has scores that are not finite")
    return rows


def _checksum(rows: Scores) -> str:
    digest = xxhash.xxh3_128()
    for column in (rows.query_hash, rows.passage_hash, rows.logit):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _segments(folder: Path) -> list[str]:
    """The names of a teacher's segments; hidden files are unfinished, other files are not read."""
    if not folder.is_dir():
        return []
    return [entry.name for entry in os.scandir(folder) if entry.name.endswith(".arrow") and entry.name[0] != "."]


def _bad_segments(folder: Path, bad: Sequence[str], total: int) -> str:
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return (
        f"scores={folder}: {len(bad)} of {total} files cannot be used: {', '.join(bad[:_SHOWN])}{more}; "
        "delete them, and quintet distill scores their pairs again"
    )
