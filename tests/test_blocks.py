"""Blocks as tables: hashes of whole columns, and what is encoded comes back."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import blocks
from data.blocks import Tokens
from data.hashes import column_hashes
from data.records import BadRecord, Row, text_hash

# Characters that normalising, white space, UTF-8 lengths and bytes that look alike are about.
_LETTERS = (
    "a Z\t\n\x1c\x1f\x7f\x85\u00a0\u00a9\u00e9e\u0301\u1680\u1681\u2000\u200a\u200b\u2028"
    "\u202f\u205f\u2060\u3000\u3001\u2126\uac00\u1100\u1161\U0001f600"
)
texts = st.text(alphabet=st.sampled_from(_LETTERS) | st.characters(codec="utf-8"), max_size=12)


@given(st.lists(texts, max_size=8))
@settings(max_examples=500, deadline=None)
def test_a_columns_hashes_are_those_of_its_texts(column: list[str]) -> None:
    assert column_hashes(pa.array(column, pa.string())).tolist() == [text_hash(text) for text in column]


def test_every_white_space_character_is_seen_at_every_place() -> None:
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    assert len(spaces) > 25
    column = [form.format(space) for space in spaces for form in ("{}", "{}a", "a{}", "a{}b", "a {}b", "ä{}é")]
    assert column_hashes(pa.array(column)).tolist() == [text_hash(text) for text in column]


labels = st.none() | texts
records = st.fixed_dictionaries(
    {"query": texts.filter(str.strip), "passage": texts.filter(str.strip)},
    optional={
        **dict.fromkeys(("source", "lang", "instruction"), labels),
        "id": labels | st.integers(-(2**40), 2**70),
        "negatives": st.lists(texts.filter(str.strip), max_size=3),
        "symmetric": st.none() | st.booleans(),
        "more": st.recursive(st.none() | st.floats(allow_nan=False) | st.integers() | texts, st.lists, max_leaves=4),
    },
)


@given(st.lists(records, min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=500, deadline=None)
def test_members_read_by_arrow_give_the_table_of_their_rows(
    found: list[dict[str, object]], escaped: bool, indent: int | None
) -> None:
    payloads = [json.dumps(record, ensure_ascii=escaped, indent=indent).encode() for record in found]
    rows = blocks.good_rows(payloads)
    by_arrow = blocks.table_of_json(payloads, "src") if len(rows) == len(payloads) else None
    if by_arrow is not None:
        assert by_arrow.equals(blocks.table(rows, "src"))
        by_arrow.validate(full=True)
    plain = not any(type(record.get("id")) is int for record in found)
    assert len(rows) < len(payloads) or indent or not plain or by_arrow is not None


@pytest.mark.parametrize(
    "odd",
    [
        b'{"query":"a","passage":"b","id":7}',
        b'{"query":"a","query":"c","passage":"b"}',
        b'{"query":"a","passage":"b","negatives":"c"}',
        b'{"query":"a",\n"passage":"b"}',
        b'{"query":"a","passage":"b"}{"query":"c","passage":"d"}',
        b" ",
    ],
)
def test_members_that_arrow_reads_otherwise_are_left_to_be_read_one_by_one(odd: bytes) -> None:
    sound = b'{"passage":"b","negatives":null,"query":"a","lang":null}'
    assert blocks.table_of_json([sound, sound], "s") is not None
    assert blocks.table_of_json([sound, odd], "s") is None


def test_json_nested_without_end_is_refused() -> None:
    deep = b'{"query":"a","passage":"b","x":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"
    with pytest.raises(BadRecord, match="invalid JSON"):
        blocks.row(deep)


@pytest.mark.parametrize("dtype", [None, "uint16", "uint32"])
def test_a_block_is_read_back_as_it_was_encoded(dtype: str | None) -> None:
    rows: list[Row] = [("a", "b", "", "de", "1", ("c", "d"), "", True), ("e", "f", "s", "", "", (), "i", False)]
    tokens: list[Tokens] = [([1, 2], [3], [[4], []]), ([], [5], [])]
    table = blocks.table(rows, "src", tokens if dtype else (), dtype)
    assert blocks.decode(pa.py_buffer(blocks.encode(table))).equals(table)
    assert table["source"].to_pylist() == ["src", "s"]
    if dtype:
        assert table["negative_tokens"].to_pylist() == [[[4], []], []]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compressed_block_is_refused_before_it_grows(codec: str) -> None:
    row: Row = ("\0" * 1_000_000, "b", "", "", "", (), "", False)
    table, sink = blocks.table([row] * 50, "src"), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table)
    small = sink.getvalue()
    assert small.size < table.nbytes / 50
    before = pa.total_allocated_bytes()
    with pytest.raises(blocks.BadBlock, match="compressed"):
        blocks.decode(small)
    assert pa.total_allocated_bytes() - before < 1_000_000


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=500, deadline=None)
def test_a_changed_byte_in_an_arrow_stream_is_refused_or_harmless(place: float, value: int) -> None:
    row: Row = ("query", "passage", "", "de", "", ("c", "d"), "", False)
    content = bytearray(blocks.encode(blocks.table([row] * 3, "src", [([1], [2], [[3], []])] * 3, "uint16")))
    content[int(place * len(content))] = value
    try:
        table = blocks.decode(pa.py_buffer(bytes(content)))
    except blocks.BadBlock:
        return
    assert len(table.to_pylist()) == table.num_rows


def test_a_table_of_no_rows_has_the_same_columns() -> None:
    assert blocks.table([], "src").schema == blocks.schema()
    assert blocks.table([], "src", [], "uint16").schema == blocks.schema("uint16")
