"""Blocks as tables: hashes of whole columns, and what is encoded comes back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import blocks
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
    assert column_hashes(pa.array(column, pa.string()), column).tolist() == [text_hash(text) for text in column]


def test_every_white_space_character_is_seen_at_every_place() -> None:
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    assert len(spaces) > 25
    column = [form.format(space) for space in spaces for form in ("{}", "{}a", "a{}", "a{}b", "a {}b", "ä{}é")]
    assert column_hashes(pa.array(column), column).tolist() == [text_hash(text) for text in column]


def test_json_nested_without_end_is_refused() -> None:
    deep = b'{"query":"a","passage":"b","x":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"
    with pytest.raises(BadRecord, match="invalid JSON"):
        blocks.row(deep)


@pytest.mark.parametrize("dtype", [None, "uint16", "uint32"])
def test_a_block_is_read_back_as_it_was_encoded(dtype: str | None) -> None:
    rows: list[Row] = [("a", "b", "", "de", "1", ("c", "d"), "", True), ("e", "f", "s", "", "", (), "i", False)]
    tokens = [([1, 2], np.array([3]), [[4], []]), ([], [5], [])]
    table = blocks.table(rows, "src", tokens if dtype else (), dtype)
    assert blocks.decode(pa.py_buffer(blocks.encode(table))).equals(table)
    assert table["source"].to_pylist() == ["src", "s"]
    if dtype:
        assert table["negative_tokens"].to_pylist() == [[[4], []], []]


def test_a_table_of_no_rows_has_the_same_columns() -> None:
    assert blocks.table([], "src").schema == blocks.schema()
    assert blocks.table([], "src", [], "uint16").schema == blocks.schema("uint16")
