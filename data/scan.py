"""All records of a mixture, once, in order, and back into shards: for stages that look at everything.

The records are cut into units of whole blocks of one source, which the ranks of a job share.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.blocks import TOKEN_COLUMNS
from data.mixture import Mixture, Source
from data.reading import Policy, read_block
from data.records import NAMES, Record
from data.rules import Prompts, passage_prefix, query_prefix
from data.shards import ShardWriter

_log = logging.getLogger("quintet")


@dataclass(frozen=True, slots=True)
class Unit:
    """The blocks first .. last - 1 of source number `source`, and the `records` that the index counts in them."""

    source: int
    first: int
    last: int
    records: int


def units(mixture: Mixture, records: int) -> list[Unit]:
    """Cut all sources into units of at least `records` records; the last one of a source may have fewer."""
    found = []
    for number, source in enumerate(mixture.sources):
        first = 0
        for last in range(1, len(source.blocks) + 1):
            size = int(source.starts[last] - source.starts[first])
            if size >= records or last == len(source.blocks):
                found.append(Unit(number, first, last, size))
                first = last
    return found


def tables(
    mixture: Mixture, unit: Unit, columns: Sequence[str] | None = None, *, policy: Policy = "strict"
) -> Iterator[tuple[int, pa.Table]]:
    """(number of its first record in the source, good rows) of each block of a unit; None: all columns.

    What a mixture file says about a source's symmetry and instruction stands in the rows. Under the policy `skip`
    what is damaged is reported and left out. Raises DataError under `strict`.
    """
    source = mixture.sources[unit.source]
    for block in range(unit.first, unit.last):
        shard, number = map(int, source.blocks[block])
        found = read_block(source.index, shard, number, policy=policy)
        if found.problems:
            _warn_once(f"source {source.name}: {found.records - found.good} records left out: {found.problems[0]}")
        labelled = _labelled(found.table, source)
        yield int(source.starts[block]), labelled if columns is None else labelled.select(columns)


@cache
def _warn_once(text: str) -> None:
    """A stage reads the same block several times."""
    _log.warning("%s", text)


def read(mixture: Mixture, unit: Unit, columns: Sequence[str] | None = None, *, policy: Policy = "strict") -> pa.Table:
    """All good rows of a unit in one table, as `tables` gives them."""
    read = [table for _, table in tables(mixture, unit, columns, policy=policy)]
    found = [table for table in read if len(table)] or read[:1]  # a lost block has no columns of tokens
    shared = [name for name in found[0].column_names if all(name in table.column_names for table in found)]
    return pa.concat_tables([table.select(shared) for table in found]).combine_chunks()


def _labelled(table: pa.Table, source: Source) -> pa.Table:
    if source.symmetric is not None:
        table = _with(table, "symmetric", pa.repeat(source.symmetric, len(table)))
    if source.instruction:
        filled = pc.if_else(pc.equal(table["instruction"], ""), source.instruction, table["instruction"])
        table = _with(table, "instruction", filled)
    return table


def _with(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def tokenizer(mixture: Mixture) -> dict[str, Any] | None:
    """What the indexes say about the tokenizer of the token columns, when it is the same for all sources."""
    first, *others = (source.index.tokenizer for source in mixture.sources)
    return first if all(other == first for other in others) else None


def token_dtype(mixture: Mixture, policy: Policy = "strict") -> str | None:
    """The number type of the token columns; None when there is no such `tokenizer`."""
    if tokenizer(mixture) is None:
        return None
    table = next(table for unit in units(mixture, 1) for _, table in tables(mixture, unit, policy=policy) if len(table))
    return str(table.schema.field(TOKEN_COLUMNS[0]).type.value_type)


def write_rows(writer: ShardWriter, table: pa.Table, *, tokens: bool) -> None:
    """Append the rows of a table to a shard; `tokens` says whether the writer takes theirs."""
    rows = zip(*(table[name].to_pylist() for name in NAMES), strict=True)
    records = (Record(**{**dict(zip(NAMES, row, strict=True)), "negatives": tuple(row[5])}) for row in rows)
    if not (tokens and len(table)):
        for record in records:
            writer.write(record)
        return
    queries, passages, negatives = (table[name].combine_chunks() for name in TOKEN_COLUMNS)
    sides: Any = zip(_lists(queries), _lists(passages), _lists_of_lists(negatives), strict=True)
    for record, ids in zip(records, sides, strict=True):
        writer.write(record, ids)


def _lists(column: pa.ListArray) -> list[NDArray[Any]]:
    """The lists of a column as views of its numbers."""
    offsets = column.offsets.to_numpy()
    return np.split(column.flatten().to_numpy(), (offsets - offsets[0])[1:-1]) if len(column) else []


def _lists_of_lists(column: pa.ListArray) -> list[list[NDArray[Any]]]:
    offsets = column.offsets.to_numpy() - column.offsets[0].as_py()
    inner = _lists(column.flatten())
    return [inner[start:stop] for start, stop in pairwise(offsets.tolist())]


def query_texts(table: pa.Table, prompts: Prompts) -> list[str]:
    """What is encoded for the query of each row."""
    prefix = cache(lambda instruction: query_prefix(prompts, instruction))
    rows = zip(table["query"].to_pylist(), table["instruction"].to_pylist(), strict=True)
    return [prefix(instruction) + query for query, instruction in rows]


def passage_texts(table: pa.Table, prompts: Prompts, column: str = "passage") -> list[str]:
    """What is encoded for the passage of each row, which stands in `column`."""
    prefix = cache(lambda instruction, symmetric: passage_prefix(prompts, instruction, symmetric))
    labels = zip(table["instruction"].to_pylist(), table["symmetric"].to_pylist(), strict=True)
    return [prefix(*kind) + text for text, kind in zip(table[column].to_pylist(), labels, strict=True)]


def identity(mixture: Mixture) -> dict[str, Any]:
    """What decides the rows, as plain data for plans: contents and labels of every source."""
    return {
        source.name: {
            "records": source.records,
            "fingerprint": source.index.fingerprint,
            "symmetric": source.symmetric,
            "instruction": source.instruction,
        }
        for source in mixture.sources
    }
