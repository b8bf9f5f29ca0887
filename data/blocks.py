"""A block of records as an Arrow table, and back from the bytes of a shard.

The columns are those of a record, the hashes of its texts and, when packed with a tokenizer, its tokens. A block of
a plain shard becomes the same table as a block that was written as Arrow.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, chain
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from data.hashes import column_hashes
from data.records import BadRecord, Row, values

# Larger than any record that `values` takes, so that no member can make the JSON decoder take more memory.
MAX_MEMBER_BYTES = 64 << 20

_RECORD_FIELDS = (
    ("query", pa.string()),
    ("passage", pa.string()),
    ("source", pa.string()),
    ("lang", pa.string()),
    ("id", pa.string()),
    ("negatives", pa.list_(pa.string())),
    ("instruction", pa.string()),
    ("symmetric", pa.bool_()),
)
_HASH_FIELDS = (("query_hash", pa.int64()), ("passage_hash", pa.int64()), ("negative_hash", pa.list_(pa.int64())))
_AS_RECORDS = pj.ParseOptions(explicit_schema=pa.schema(_RECORD_FIELDS), unexpected_field_behavior="ignore")
TOKEN_COLUMNS = ("query_tokens", "passage_tokens", "negative_tokens")

# The tokens of a record's query, passage and negatives.
Tokens = tuple[Sequence[int], Sequence[int], Sequence[Sequence[int]]]


class BadBlock(Exception):
    """An Arrow member that holds no block of ours; the text says why."""


def schema(token_dtype: str | None = None) -> pa.Schema:
    """The columns of a block; `token_dtype` ("uint16" or "uint32") adds those of the tokens."""
    fields = [*_RECORD_FIELDS, *_HASH_FIELDS]
    if token_dtype is not None:
        tokens = pa.list_(pa.type_for_alias(token_dtype))
        fields += zip(TOKEN_COLUMNS, (tokens, tokens, pa.list_(tokens)), strict=True)
    return pa.schema(fields)


_SCHEMAS = (schema(), schema("uint16"), schema("uint32"))


def table(rows: Sequence[Row], source: str, tokens: Sequence[Tokens] = (), token_dtype: str | None = None) -> pa.Table:
    """Rows as a table; those that name no source get `source`. `tokens` go with the rows when `token_dtype` is set."""
    columns: Sequence[Sequence[Any]] = list(zip(*rows, strict=True)) or [()] * len(_RECORD_FIELDS)
    arrays = {name: pa.array(values, kind) for (name, kind), values in zip(_RECORD_FIELDS, columns, strict=True)}
    arrays = _with_hashes(arrays, source)
    if token_dtype is not None:
        arrays |= zip(TOKEN_COLUMNS, _token_arrays(tokens, token_dtype), strict=True)
    return pa.Table.from_arrays(list(arrays.values()), schema=schema(token_dtype))


def table_of_json(payloads: Sequence[bytes], source: str) -> pa.Table | None:
    """What `table` makes of the rows of JSON members that are known to be good ones, read by Arrow in one call.

    None where Arrow's reader is stricter than ours (a number as id, one text for a list, a key that stands twice), or
    where a member is not of one line: they are then to be read one by one.
    """
    lines = b"\n".join(payloads)
    if not payloads or lines.count(b"\n") >= len(payloads):
        return None
    whole = pj.ReadOptions(use_threads=False, block_size=len(lines) + 1)
    try:
        found = pj.read_json(pa.BufferReader(lines), whole, _AS_RECORDS)
    except pa.ArrowInvalid:
        return None
    if found.num_rows != len(payloads):
        return None
    arrays = {name: found[name].combine_chunks() for name, _ in _RECORD_FIELDS}
    arrays |= {name: array.fill_null("") for name, array in arrays.items() if array.type == pa.string()}
    arrays["symmetric"] = arrays["symmetric"].fill_null(False)
    arrays["negatives"] = pa.ListArray.from_arrays(arrays["negatives"].offsets, arrays["negatives"].values)
    return pa.Table.from_arrays(list(_with_hashes(arrays, source).values()), schema=schema())


def _with_hashes(arrays: dict[str, pa.Array], source: str) -> dict[str, pa.Array]:
    """The columns of records, with the source of those that name none, and the hashes of the texts."""
    hard = pa.array(column_hashes(arrays["negatives"].values))
    return {
        **arrays,
        "source": pc.if_else(pc.equal(arrays["source"], ""), source, arrays["source"]),
        "query_hash": pa.array(column_hashes(arrays["query"])),
        "passage_hash": pa.array(column_hashes(arrays["passage"])),
        "negative_hash": pa.ListArray.from_arrays(arrays["negatives"].offsets, hard),
    }


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
        refuse_compression(buffer)
        reader = pa.ipc.open_stream(buffer)
        if not any(reader.schema.equals(known) for known in _SCHEMAS):
            raise BadBlock(f"the columns are {', '.join(f'{f.name} {f.type}' for f in reader.schema)}")
        block = reader.read_all()
        block.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise BadBlock(f"not a sound Arrow stream ({error})") from None
    if any(_nulls(column) for column in block.columns):
        raise BadBlock("null values")
    return block if len(block.columns[0].chunks) == 1 else block.combine_chunks()


def refuse_compression(buffer: pa.Buffer) -> None:
    """Raise BadBlock for a stream with compressed buffers, which a few bytes could let grow to gigabytes.

    Arrow decompresses while it reads, and cannot be told not to. So the field is looked up before, in the FlatBuffers
    tables of the format: Message.header is field 2, RecordBatch.compression is field 3.
    """
    for message in pa.ipc.MessageReader.open_stream(buffer):
        if message.type != "schema":
            head = memoryview(message.metadata)
            batch = _field(head, struct.unpack_from("<I", head)[0], 2)
            if not batch or _field(head, batch, 3):
                raise BadBlock("compressed, or no record batch: blocks are plain Arrow record batches")


def _field(tables: memoryview, table: int, number: int) -> int:
    """Where the table is that a field of a FlatBuffers table refers to; 0 when the field is not set."""
    entries = table - struct.unpack_from("<i", tables, table)[0]
    slot = 4 + 2 * number
    if slot >= struct.unpack_from("<H", tables, entries)[0]:
        return 0
    offset = struct.unpack_from("<H", tables, entries + slot)[0]
    return table + offset + struct.unpack_from("<I", tables, table + offset)[0] if offset else 0


def row(payload: bytes | memoryview) -> Row:
    """The row of a plain shard's JSON member. Raises BadRecord."""
    if len(payload) > MAX_MEMBER_BYTES:
        raise BadRecord("text too long", f"the member has {len(payload)} bytes")
    try:
        return values(orjson.loads(payload))
    except orjson.JSONDecodeError as error:
        raise _json_fault(payload, error) from None


def good_rows(payloads: Sequence[bytes]) -> list[Row]:
    """The rows of those JSON members that `row` takes."""
    try:
        if max(map(len, payloads), default=0) <= MAX_MEMBER_BYTES:
            return list(map(values, map(orjson.loads, payloads)))
    except ValueError:  # a BadRecord or a JSONDecodeError: there is a bad one among them
        pass
    rows = []
    for payload in payloads:
        with suppress(BadRecord):
            rows.append(row(payload))
    return rows


def _json_fault(payload: bytes | memoryview, error: orjson.JSONDecodeError) -> BadRecord:
    try:
        str(payload, "utf-8")
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


def _token_arrays(tokens: Sequence[Tokens], token_dtype: str) -> list[pa.Array]:
    queries, passages, negatives = zip(*tokens, strict=True) if tokens else ((), (), ())
    hard = _token_lists(list(chain.from_iterable(negatives)), token_dtype)
    arrays = [_token_lists(queries, token_dtype), _token_lists(passages, token_dtype)]
    return [*arrays, pa.ListArray.from_arrays(_offsets(negatives), hard)]


def _offsets(lists: Sequence[Sequence[Any]]) -> pa.Array:
    return pa.array(accumulate(map(len, lists), initial=0), pa.int32())


def _token_lists(lists: Sequence[Sequence[int]], token_dtype: str) -> pa.ListArray:
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in lists]) if lists else np.empty(0, np.int64)
    return pa.ListArray.from_arrays(_offsets(lists), pa.array(flat).cast(pa.type_for_alias(token_dtype)))
