"""A block of records as an Arrow table, and back from the bytes of a shard.

The columns are those of a record, the hashes of its texts and, when packed with a tokenizer, its tokens. A block of
a plain shard becomes the same table as a block that was written as Arrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from data.records import BadRecord, Row, text_hashes, values

# Larger than any record that `values` takes, so that no member can make the JSON decoder take more memory.
MAX_MEMBER_BYTES = 64 << 20

_STRINGS = pa.list_(pa.string())
_HASHES = pa.list_(pa.int64())
_FIELDS = (
    ("query", pa.string()),
    ("passage", pa.string()),
    ("source", pa.string()),
    ("lang", pa.string()),
    ("id", pa.string()),
    ("negatives", _STRINGS),
    ("instruction", pa.string()),
    ("symmetric", pa.bool_()),
    ("query_hash", pa.int64()),
    ("passage_hash", pa.int64()),
    ("negative_hash", _HASHES),
)
TOKEN_COLUMNS = ("query_tokens", "passage_tokens", "negative_tokens")

# The tokens of a record's query, passage and negatives.
Tokens = tuple[Sequence[int], Sequence[int], Sequence[Sequence[int]]]


class BadBlock(ValueError):
    """An Arrow member that holds no block of ours; the text says why."""


def schema(token_dtype: str | None = None) -> pa.Schema:
    """The columns of a block; `token_dtype` ("uint16" or "uint32") adds those of the tokens."""
    fields = list(_FIELDS)
    if token_dtype is not None:
        tokens = pa.list_(pa.type_for_alias(token_dtype))
        fields += zip(TOKEN_COLUMNS, (tokens, tokens, pa.list_(tokens)), strict=True)
    return pa.schema(fields)


_SCHEMAS = (schema(), schema("uint16"), schema("uint32"))


def table(rows: Sequence[Row], source: str, tokens: Sequence[Tokens] = (), token_dtype: str | None = None) -> pa.Table:
    """Rows as a table; those that name no source get `source`. `tokens` go with the rows when `token_dtype` is set."""
    columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True)) or [()] * 8
    queries, passages, sources, langs, ids, negatives, instructions, symmetric = columns
    hard = list(chain.from_iterable(negatives))
    arrays = [
        pa.array(queries, pa.string()),
        pa.array(passages, pa.string()),
        _strings([name or source for name in sources]),
        _strings(langs),
        pa.array(ids, pa.string()),
        _lists(negatives, pa.array(hard, pa.string())),
        _strings(instructions),
        pa.array(symmetric, pa.bool_()),
        pa.array(text_hashes(queries)),
        pa.array(text_hashes(passages)),
        _lists(negatives, pa.array(text_hashes(hard))),
    ]
    if token_dtype is not None:
        arrays += [_token_lists(side, token_dtype) for side in (_column(tokens, 0), _column(tokens, 1))]
        lists = _column(tokens, 2)
        arrays.append(_lists(lists, _token_lists(list(chain.from_iterable(lists)), token_dtype)))
    return pa.Table.from_arrays(arrays, schema=schema(token_dtype))


def encode(block: pa.Table) -> bytes:
    """A table as an uncompressed Arrow IPC stream of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema) as writer:
        writer.write_table(block.combine_chunks())
    return sink.getvalue().to_pybytes()


def decode(buffer: pa.Buffer) -> pa.Table:
    """The table of an Arrow IPC stream, without a copy; every offset and every text is validated. Raises BadBlock.

    Its columns are those of `schema()`, or all three of TOKEN_COLUMNS beside them.
    """
    try:
        block = pa.ipc.open_stream(buffer).read_all()
        block.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise BadBlock(f"not a sound Arrow stream ({error})") from None
    if not any(block.schema.equals(known) for known in _SCHEMAS):
        raise BadBlock(f"the columns are {', '.join(f'{f.name} {f.type}' for f in block.schema)}")
    if any(_nulls(column) for column in block.columns):
        raise BadBlock("null values")
    return block if len(block.columns[0].chunks) == 1 else block.combine_chunks()


def row(body: bytes | memoryview) -> Row:
    """The row of a plain shard's JSON member. Raises BadRecord."""
    if len(body) > MAX_MEMBER_BYTES:
        raise BadRecord("text too long", f"the member has {len(body)} bytes")
    try:
        return values(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise _json_fault(body, error) from None


def _json_fault(body: bytes | memoryview, error: orjson.JSONDecodeError) -> BadRecord:
    try:
        str(body, "utf-8")
    except UnicodeDecodeError as fault:
        return BadRecord("invalid UTF-8", f"at byte {fault.start} of the member")
    return BadRecord("invalid JSON", str(error))


def _nulls(column: pa.ChunkedArray) -> bool:
    """Whether a column, or the lists in it, has a null."""
    while not column.null_count:
        if not pa.types.is_list(column.type):
            return False
        column = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
    return True


def _column(rows: Sequence[Sequence[Any]], number: int) -> list[Any]:
    return [values[number] for values in rows]


def _offsets(lists: Iterable[Sequence[Any]]) -> pa.Array:
    return pa.array(accumulate(map(len, lists), initial=0), pa.int32())


def _lists(lists: Sequence[Sequence[Any]], flat: pa.Array) -> pa.ListArray:
    """Lists from their lengths and their values one behind the other."""
    return pa.ListArray.from_arrays(_offsets(lists), flat)


def _token_lists(lists: Sequence[Sequence[int]], token_dtype: str) -> pa.ListArray:
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in lists]) if lists else np.empty(0, np.int64)
    return _lists(lists, pa.array(flat).cast(pa.type_for_alias(token_dtype)))


def _strings(texts: Sequence[str]) -> pa.Array:
    """A column of texts; labels are often all the same."""
    if texts and texts.count(texts[0]) == len(texts):
        return pa.repeat(pa.scalar(texts[0], pa.string()), len(texts))
    return pa.array(texts, pa.string())
