"""What is a record, what is not, and when two texts are the same."""

from __future__ import annotations

import re
import struct
import unicodedata

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data.records import NAMES, REASONS, BadRecord, Record, normalise, parse, text_hash, values

PAIR = {"query": "What is a river?", "passage": "Water on its way."}


def test_only_query_and_passage_are_required() -> None:
    assert parse(PAIR) == Record("What is a river?", "Water on its way.")


def test_every_field_is_taken_and_unknown_ones_are_ignored() -> None:
    full = PAIR | {
        "source": "wiki",
        "lang": "en-GB",
        "id": "7",
        "negatives": ["A stone.", "A road."],
        "instruction": "Find the answer",
        "symmetric": True,
        "score": 3.5,
    }
    expected = Record(
        "What is a river?", "Water on its way.", "wiki", "en-GB", "7", ("A stone.", "A road."), "Find the answer", True
    )
    assert parse(full) == expected


def test_other_column_names_are_mapped_and_a_single_negative_is_a_list_of_one() -> None:
    triplet = {"anchor": "a", "positive": "b", "negative": "c", "query": "not this"}
    columns = {"query": "anchor", "passage": "positive", "negatives": "negative"}
    assert parse(triplet, columns) == Record("a", "b", negatives=("c",))


def test_null_counts_as_absent_for_optional_texts_and_integer_ids_are_written_out() -> None:
    assert parse(PAIR | {"lang": None, "source": None, "instruction": None, "symmetric": None, "id": 12}).id == "12"


@pytest.mark.parametrize(
    ("obj", "reason"),
    [
        (["a", "b"], "not an object"),
        (None, "not an object"),
        ({"passage": "b"}, "missing query"),
        ({"query": None, "passage": "b"}, "missing query"),
        ({"query": "a"}, "missing passage"),
        ({"query": 5, "passage": "b"}, "wrong type"),
        ({"query": "a", "passage": ["b"]}, "wrong type"),
        ({"query": "a", "passage": ""}, "empty text"),
        ({"query": " \n\u3000", "passage": "b"}, "empty text"),
        ({"query": "a", "passage": "x" * 10_000_000}, "text too long"),
        ({"query": "a", "passage": "b", "negatives": None}, "null list"),
        ({"query": "a", "passage": "b", "negatives": [None]}, "wrong type"),
        ({"query": "a", "passage": "b", "negatives": {"0": "c"}}, "wrong type"),
        ({"query": "a", "passage": "b", "negatives": ["c", ""]}, "empty text"),
        ({"query": "a", "passage": "b", "lang": 3}, "wrong type"),
        ({"query": "a", "passage": "b", "id": True}, "wrong type"),
        ({"query": "a", "passage": "b", "symmetric": "yes"}, "wrong type"),
        ({"query": "a", "passage": "b", "instruction": "x" * 100_001}, "text too long"),
        ({"query": "a \ud800", "passage": "b"}, "invalid UTF-8"),
    ],
)
def test_each_fault_has_its_own_reason(obj: object, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse(obj)
    assert caught.value.reason == reason
    assert caught.value.reason in REASONS
    assert str(caught.value).startswith(reason)


def test_the_limit_on_characters_is_inclusive() -> None:
    assert parse({"query": "xxx", "passage": "y"}, max_chars=3).query == "xxx"
    with pytest.raises(BadRecord, match="text too long: query has 4 characters, the limit is 3"):
        parse({"query": "xxxx", "passage": "y"}, max_chars=3)


def test_values_are_those_of_the_record_in_the_order_of_names() -> None:
    obj = PAIR | {"negatives": ["c"], "lang": "de"}
    assert values(obj) == tuple(getattr(parse(obj), name) for name in NAMES)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda kids: st.lists(kids, max_size=3)))
def test_no_value_of_a_field_gives_another_error(value: object) -> None:
    for name in NAMES:
        try:
            record = parse(PAIR | {name: value})
        except BadRecord as error:
            assert error.reason in REASONS  # noqa: PT017 - both outcomes are right
        else:
            assert isinstance(record.negatives, tuple)


def test_texts_are_the_same_across_unicode_forms_and_white_space() -> None:
    assert normalise(" Caf\u0065\u0301 \t\n\u00a0au   lait\u3000") == "Caf\u00e9 au lait"
    assert text_hash("Cafe\u0301  au lait") == text_hash("Caf\u00e9 au\nlait ")
    assert text_hash("Café") != text_hash("Cafe")


@given(st.text())
def test_normalise_is_nfc_with_single_blanks_and_idempotent(text: str) -> None:
    parts = [part for part in re.split(r"\s+", unicodedata.normalize("NFC", text)) if part]
    assert normalise(text) == " ".join(parts)
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_text_hash_is_the_signed_value_of_the_xxh3_digest(text: str) -> None:
    digest = xxhash.xxh3_64(normalise(text).encode("utf-8")).digest()
    assert text_hash(text) == struct.unpack(">q", digest)[0]
