"""The rows of a cross-encoder are those of the tokenizer itself, and settings come back from where they were saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import teachers
import tiny
import torch
from tokenizers import processors

from data.errors import UserError
from data.pairing import PairEncoder, PairSettings, PairTemplate, read_settings, separator
from trainer.crossencoder import token_types

QUERIES = ["heizung", "the quick brown fox", "", "Wie stelle ich die Heizung ein?", "  spaces  ", "温度", "the fox"]
PASSAGES = [*tiny.TEXTS[:5], "x", " ".join(tiny.TEXTS)]
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "wordpiece": tiny.wordpiece,
    "typed wordpiece": teachers.typed_wordpiece,
    "unigram": tiny.unigram,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_are_those_of_the_tokenizer_with_the_passage_cut(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    pairs = PairEncoder(tokenizer, 40, max_query_length=28)
    assert max(map(len, pairs.queries(QUERIES).lists())) < 28, "none of these queries is cut"
    wanted = [
        tokenizer(query, passage, truncation="only_second", max_length=40)["input_ids"]
        for query, passage in zip(QUERIES, PASSAGES, strict=True)
    ]
    assert pairs.encode(QUERIES, PASSAGES).lists() == wanted
    assert max(map(len, wanted)) == 40


def test_a_long_query_is_cut_to_its_own_limit_and_the_passage_to_the_rest() -> None:
    tokenizer = tiny.wordpiece()
    query, passage = " ".join(tiny.TEXTS), " ".join(reversed(tiny.TEXTS))
    (row,) = PairEncoder(tokenizer, 20, max_query_length=6).encode([query], [passage]).lists()
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (query, passage)]
    assert row == [2, *plain[0][:6], 3, *plain[1][: 20 - 6 - 3], 3]


def test_whole_rows_are_those_that_the_tokenizer_alone_makes() -> None:
    tokenizer = tiny.unigram()
    pairs = PairEncoder(tokenizer, 20, max_query_length=8, template=PairTemplate(query="query: {query}"))
    uncut = [
        tokenizer(f"query: {query}", passage)["input_ids"] for query, passage in zip(QUERIES, PASSAGES, strict=True)
    ]
    rows = pairs.encode(QUERIES, PASSAGES).lists()
    found = pairs.whole(QUERIES, PASSAGES).tolist()
    assert found == [row == whole for row, whole in zip(rows, uncut, strict=True)]
    assert 0 < sum(found) < len(found)


def test_the_query_has_half_of_the_row_where_nothing_is_said() -> None:
    assert PairEncoder(tiny.wordpiece(), 40).settings.max_query_length == 20


def test_texts_go_into_the_template() -> None:
    tokenizer = tiny.unigram()
    template = PairTemplate(query="Instruct: query: {query}", passage="passage: {passage} .")
    rows = PairEncoder(tokenizer, 64, template=template).encode(["fox"], ["a dog"]).lists()
    assert rows == [tokenizer("Instruct: query: fox", "passage: a dog .")["input_ids"]]


def test_braces_of_a_text_are_text() -> None:
    tokenizer = tiny.wordpiece()
    rows = PairEncoder(tokenizer, 64).encode(["{passage} {query}"], ["{query} {0}"]).lists()
    assert rows == [tokenizer("{passage} {query}", "{query} {0}")["input_ids"]]


def test_bodies_that_occur_in_several_rows_are_tokenised_once() -> None:
    pairs = PairEncoder(tiny.wordpiece(), 24)
    queries, passages = pairs.queries(["fox", "dog"]), pairs.passages(["lazy", "brown"])
    joined = pairs.join(queries.take(torch.tensor([0, 0, 1]).numpy()), passages.take(torch.tensor([1, 0, 1]).numpy()))
    assert joined.lists() == pairs.encode(["fox", "fox", "dog"], ["brown", "lazy", "brown"]).lists()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_types_are_those_of_the_tokenizer(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    encoded = tokenizer(QUERIES, PASSAGES, padding=True, return_tensors="pt", return_token_type_ids=True)
    mark = separator(tokenizer)
    if mark is None:
        assert not encoded["token_type_ids"].any()
        return
    found = token_types(encoded["input_ids"], mark)
    assert torch.equal(found * encoded["attention_mask"], encoded["token_type_ids"])
    assert found.any()


def test_types_by_another_rule_are_refused() -> None:
    tokenizer = teachers.typed_wordpiece()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A:1 [SEP]:1 $B [SEP]", special_tokens=[("[SEP]", 3)]
    )
    with pytest.raises(UserError, match="token types"):
        separator(tokenizer)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_query_length": 21}, "max_query_length=21: leaves no room"),
        ({"template": PairTemplate(query="no place")}, "template.query='no place': needs {query} once"),
        ({"template": PairTemplate(passage="{passage} {passage}")}, "template.passage="),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        PairEncoder(tiny.wordpiece(), 24, **options)
    assert named in str(error.value)


def test_a_tokenizer_whose_pairs_are_not_made_of_its_texts_is_refused() -> None:
    tokenizer = tiny.wordpiece()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $B [SEP] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with pytest.raises(UserError, match="otherwise than its two texts"):
        PairEncoder(tokenizer, 24)


def test_settings_come_back_and_damaged_ones_are_named(tmp_path: Path) -> None:
    assert read_settings(tmp_path) is None
    pairs = PairEncoder(tiny.wordpiece(), 40, max_query_length=9, template=PairTemplate(query="q: {query}"))
    pairs.save(tmp_path)
    assert read_settings(tmp_path) == PairSettings(PairTemplate(query="q: {query}"), 40, 9) == pairs.settings
    file = tmp_path / "pairing.json"
    file.write_text(json.dumps({"template": {"strange": 1}, "max_length": 3, "max_query_length": 1}))
    with pytest.raises(UserError, match=r"pairing\.json: cannot be read"):
        read_settings(tmp_path)
