"""First pass of `pack`: input files to sorted runs on disk, so that any number of records is shuffled in little memory.

The shuffle is a sort: every pair has a key, a hash of its texts and the seed. A run is an Arrow file of some
checked, normalised records, sorted by source and key; any range of keys of a source is then one slice of every run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data import readers
from data.holdout import mix
from data.inputs import safe_source, source_of
from data.layouts import Columns, Layouts
from data.readers import Fault, Part
from data.records import BadRecord, Record, normalise, parse, text_hashes

RUN_CHARS = 64 << 20
RUN_RECORDS = 1 << 18
EXAMPLES = 20  # rejected rows shown for each reason

_SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("passage", pa.string()),
        ("source", pa.string()),
        ("lang", pa.string()),
        ("id", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("instruction", pa.string()),
        ("symmetric", pa.bool_()),
        ("query_hash", pa.int64()),
        ("passage_hash", pa.int64()),
        ("key", pa.uint64()),
        ("row", pa.int64()),
        ("stratum", pa.int32()),
        ("bytes", pa.int32()),
    ]
)
_TEXTS = len(_SCHEMA) - 6


@dataclass(frozen=True)
class Constants:
    """What a pack says about all of its records."""

    columns: Columns
    seed: int
    source: str = ""  # of records that name none; "": the name of their file
    lang: str = ""
    instruction: str = ""
    symmetric: bool = False


@dataclass(frozen=True)
class Reject:
    """One rejected row."""

    file: str
    line: int
    reason: str
    detail: str
    text: str


@dataclass(frozen=True)
class Run:
    """A sorted run: its file, the (source, lang) behind the column `stratum`, and the rows of each source."""

    path: str
    records: int
    strata: tuple[tuple[str, str], ...]
    sources: dict[str, tuple[int, int]]

    @property
    def table(self) -> pa.Table:
        """The records, mapped into memory."""
        return _mapped(self.path)

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers as an array."""
        return self.table[name].to_numpy()


@cache
def _mapped(path: str) -> pa.Table:
    with pa.memory_map(path) as file:
        return pa.ipc.open_file(file).read_all()


@dataclass(frozen=True)
class Parsed:
    """What one part gave. `rows` counts the rows looked at, so that rows of the next part can be numbered."""

    runs: tuple[Run, ...]
    rows: int
    records: int
    bad: dict[str, int]
    rejects: tuple[Reject, ...]


def parse_part(job: tuple[Part, Constants, Path]) -> Parsed:
    """Read one part, check its records and write them as sorted runs named by the given path plus a number.

    Raises:
        UserError: the file cannot be read.
    """
    part, constants, path = job
    return _Parser(part, constants, path).run()


@dataclass
class _Parser:
    part: Part
    constants: Constants
    path: Path
    records: list[Record] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    chars: int = 0
    runs: list[Run] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)

    def run(self) -> Parsed:
        layouts, number = Layouts(self.constants.columns), 0
        source = self.constants.source or source_of(self.part.file)
        for number, row in readers.rows(self.part, layouts.wants):
            if isinstance(row, Fault):
                self._reject(number, row.reason, row.detail, row.text)
            elif row is not None:
                for value in layouts.objects(row):
                    self._take(number, row, value, source)
        self._flush()
        good = sum(run.records for run in self.runs)
        return Parsed(tuple(self.runs), number, good, dict(self.bad), tuple(self.rejects))

    def _take(self, number: int, row: Any, value: Any, source: str) -> None:
        try:
            record = _cleaned(parse(value), self.constants, source)
        except BadRecord as error:
            self._reject(number, error.reason, str(error).partition(": ")[2], row)
            return
        self.records.append(record)
        self.numbers.append(number)
        self.chars += len(record.query) + len(record.passage) + sum(map(len, record.negatives))
        if len(self.records) >= RUN_RECORDS or self.chars >= RUN_CHARS:
            self._flush()

    def _reject(self, number: int, reason: str, detail: str, row: Any) -> None:
        self.bad[reason] += 1
        if self.bad[reason] <= EXAMPLES:
            self.rejects.append(Reject(self.part.file, number, reason, detail, _excerpt(row)))

    def _flush(self) -> None:
        if self.records:
            path = f"{self.path}-{len(self.runs):04d}.arrow"
            self.runs.append(_write_run(path, self.records, self.numbers, self.constants.seed))
        self.records, self.numbers, self.chars = [], [], 0


def _cleaned(record: Record, constants: Constants, source: str) -> Record:
    """The record with normalised texts and with what the pack says about all records."""
    return replace(
        record,
        query=normalise(record.query),
        passage=normalise(record.passage),
        negatives=tuple(map(normalise, record.negatives)),
        source=safe_source(record.source or source),
        lang=record.lang or constants.lang,
        instruction=record.instruction or constants.instruction,
        symmetric=record.symmetric or constants.symmetric,
    )


def _excerpt(row: Any) -> str:
    """How a row begins, as text that can be written to a file."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return text[:200].encode(errors="replace").decode()


def pair_keys(query_hash: NDArray[np.int64], passage_hash: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """uint64 [n]: the place of each pair in the shuffled order of its source."""
    return mix(mix(query_hash.view(np.uint64), seed) ^ passage_hash.view(np.uint64), seed)


def _write_run(path: str, records: Sequence[Record], numbers: Sequence[int], seed: int) -> Run:
    """Sort records by source and key and write them. `numbers` are their rows in the part."""
    query_hash = text_hashes([record.query for record in records])
    passage_hash = text_hashes([record.passage for record in records])
    keys = pair_keys(query_hash, passage_hash, seed)
    strata = sorted({(record.source, record.lang) for record in records})
    codes = {stratum: code for code, stratum in enumerate(strata)}
    stratum = np.fromiter((codes[record.source, record.lang] for record in records), np.int32, len(records))
    names = sorted({source for source, _ in strata})
    source = np.array([names.index(source) for source, _ in strata])[stratum]
    order = np.lexsort((keys, source))
    size = np.fromiter(map(_num_bytes, records), np.int32, len(records))
    sorted_records = [records[row] for row in order]
    arrays = [pa.array([getattr(r, f.name) for r in sorted_records], f.type) for f in list(_SCHEMA)[:_TEXTS]]
    numbers_of = np.asarray(numbers, np.int64)
    arrays += [pa.array(column[order]) for column in (query_hash, passage_hash, keys, numbers_of, stratum, size)]
    table = pa.Table.from_arrays(arrays, schema=_SCHEMA)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        writer.write_table(table)
    bounds = np.searchsorted(source[order], np.arange(len(names) + 1))
    ranges = {name: (int(bounds[code]), int(bounds[code + 1])) for code, name in enumerate(names)}
    return Run(path, len(records), tuple(strata), ranges)


def _num_bytes(record: Record) -> int:
    """About what a record takes in a shard: its texts, and some for the columns around them."""
    return 80 + sum(len(text.encode()) for text in (record.query, record.passage, *record.negatives))
