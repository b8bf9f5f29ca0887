"""Prefix rules, and batches against the tokenizer called text by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
from pairs import pairs

from data import blocks
from data.collate import Collate, Part
from data.errors import UserError
from data.records import Record, text_hash
from data.rules import Prompts, passage_prefix, query_prefix
from data.tokens import TextEncoder, fingerprint

LENGTH = 24


def rows(record: Record) -> blocks.Row:
    return (record.query, record.passage, "", "", "", record.negatives, record.instruction, record.symmetric)


def tokens(record: Record, encoder: TextEncoder) -> blocks.Tokens:
    negatives = encoder.body(record.negatives).lists() if record.negatives else []
    return *encoder.body([record.query, record.passage]).lists(), negatives


def table(records: list[Record], tokenizer: Any = None) -> pa.Table:
    if tokenizer is None:
        return blocks.table([rows(record) for record in records], "s")
    encoder = TextEncoder(tokenizer, LENGTH)
    return blocks.table(
        [rows(record) for record in records], "s", [tokens(record, encoder) for record in records], "uint16"
    )


def part(records: list[Record], places: list[int], tokenizer: Any = None, **flags: Any) -> Part:
    located = {"locate": lambda row: f"row {row}", "stored": tokenizer is not None}
    return Part(table(records, tokenizer), np.array(places), **located, **flags)


def one_by_one(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in texts]


@pytest.fixture(params=["wordpiece", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return getattr(tiny, request.param)()


# Rules


def test_the_two_sides_of_retrieval_have_their_own_prefix() -> None:
    prompts = Prompts()
    assert query_prefix(prompts) == "query: "
    assert passage_prefix(prompts) == "passage: "


def test_both_sides_of_a_symmetric_pair_are_queries() -> None:
    assert passage_prefix(Prompts(query="q ", passage="p "), symmetric=True) == "q "


def test_an_instruction_stands_on_the_query_alone() -> None:
    assert query_prefix(Prompts(), "Find it") == "Instruct: Find it\nQuery: "
    assert passage_prefix(Prompts(), "Find it") == ""


def test_an_instruction_stands_on_both_sides_of_a_symmetric_pair() -> None:
    assert passage_prefix(Prompts(), "Same?", symmetric=True) == "Instruct: Same?\nQuery: "


# Batches


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("negatives", [0, 2])
def test_a_batch_equals_the_tokenizer_called_on_every_prefixed_text(
    tokenizer: Any, stored: bool, negatives: int
) -> None:
    records = [
        *pairs(4, negatives=3),
        Record("where", "here", symmetric=True, negatives=("a", "b", "c")),
        Record("which", "this", instruction="Choose one", negatives=("d", "e", "f")),
        Record("same", "equal", instruction="Choose one", symmetric=True, negatives=("g", "h", "i")),
        Record("long " * 50, "longer " * 60, negatives=("longest " * 70, "k", "l")),
    ]
    batch = Collate(tokenizer, LENGTH, Prompts(), negatives)(
        [part(records, list(range(8)), tokenizer if stored else None)], np.arange(8), "s"
    )
    queries = ["query: "] * 5 + ["Instruct: Choose one\nQuery: "] * 2 + ["query: "]
    passages = ["passage: "] * 4 + ["query: ", "", "Instruct: Choose one\nQuery: ", "passage: "]
    texts = [p + r.query for p, r in zip(queries, records, strict=True)]
    texts += [p + r.passage for p, r in zip(passages, records, strict=True)]
    texts += [p + text for p, r in zip(passages, records, strict=True) for text in r.negatives[:negatives]]
    assert batch.tokens.lists() == one_by_one(tokenizer, texts)
    hard = [text for record in records for text in record.negatives[:negatives]]
    assert batch.query_hash.tolist() == [text_hash(r.query) for r in records]
    assert batch.passage_hash.tolist() == [text_hash(text) for text in [*(r.passage for r in records), *hard]]
    assert (batch.num_queries, batch.num_negatives, batch.source, batch.bad) == (8, negatives, "s", {})
    assert batch.tokens.ids.dtype == batch.tokens.lengths.dtype == np.int32
    assert batch.query_hash.dtype == batch.passage_hash.dtype == np.int64


def test_parts_of_several_sources_come_together_in_the_order_of_the_batch(tokenizer: Any) -> None:
    records = pairs(6, negatives=2)
    collate = Collate(tokenizer, LENGTH, Prompts(), 2)
    whole = collate([part(records, list(range(6)))], np.arange(6))
    places = [[0, 3, 4], [1], [2, 5]]
    stored = [None, tokenizer, None]
    parts = [part([records[n] for n in at], at, kind) for at, kind in zip(places, stored, strict=True)]
    mixed = collate(parts, np.arange(6))
    assert mixed.tokens.lists() == whole.tokens.lists()
    assert mixed.query_hash.tolist() == whole.query_hash.tolist()
    assert mixed.passage_hash.tolist() == whole.passage_hash.tolist()


def test_what_the_mixture_says_of_a_source_goes_before_or_after_its_records(tokenizer: Any) -> None:
    records = [Record("a", "b"), Record("c", "d", instruction="Own", symmetric=True)]
    batch = Collate(tokenizer, LENGTH, Prompts())(
        [part(records, [0, 1], symmetric=False, instruction="Common")], np.arange(2)
    )
    texts = ["Instruct: Common\nQuery: a", "Instruct: Own\nQuery: c", "b", "d"]
    assert batch.tokens.lists() == one_by_one(tokenizer, texts)


def test_a_slice_of_a_table_gives_its_own_rows(tokenizer: Any) -> None:
    records = pairs(6, negatives=2)
    for kind in (None, tokenizer):
        whole = part(records, list(range(6)), kind)
        middle = Part(whole.table.slice(2, 3), np.arange(3), whole.stored, whole.locate)
        expected = part(records[2:5], [0, 1, 2], kind)
        collate = Collate(tokenizer, LENGTH, Prompts(), 2)
        found, wanted = collate([middle], np.arange(3)), collate([expected], np.arange(3))
        assert found.tokens.lists() == wanted.tokens.lists()
        assert found.passage_hash.tolist() == wanted.passage_hash.tolist()


def test_too_few_negatives_are_told_with_their_record(tokenizer: Any) -> None:
    records = [*pairs(2, negatives=3), Record("a", "b", negatives=("c",))]
    with pytest.raises(UserError, match=r"negatives=2: row 2 has only 1; mine more, or set negatives=1"):
        Collate(tokenizer, LENGTH, Prompts(), 2)([part(records, [0, 1, 2])], np.arange(3))


# Stored tokens


def test_stored_tokens_of_the_same_tokenizer_fit(tokenizer: Any) -> None:
    sample = table(pairs(10), tokenizer)
    stored_by = {"fingerprint": fingerprint(tokenizer)}
    assert Collate(tokenizer, LENGTH, Prompts()).misfit(sample, stored_by) == ""


def test_stored_tokens_that_are_not_those_of_the_text_do_not_fit(tokenizer: Any) -> None:
    records = pairs(10)
    stored_by = {"fingerprint": fingerprint(tokenizer)}
    collate = Collate(tokenizer, LENGTH, Prompts())
    sound = table(records, tokenizer)
    for side in ("query_tokens", "passage_tokens"):
        shuffled = sound.set_column(
            sound.column_names.index(side), side, sound[side].take(pa.array([*range(1, 10), 0]))
        )
        assert "they are not the ids of the text" in collate.misfit(shuffled, stored_by)
    assert collate.misfit(sound, {"fingerprint": "other"}) == "they were made by another tokenizer"
    assert "cut at" in collate.misfit(sound, {**stored_by, "max_tokens": LENGTH - 1})
    assert collate.misfit(sound, {**stored_by, "max_tokens": 0}) == collate.misfit(sound, stored_by)
    assert collate.misfit(table(records), stored_by) == "it has none"


def test_tokens_of_a_tokenizer_that_joins_blanks_to_words_do_not_fit(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.train_from_iterator(
        ["a river and a stone"] * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    )
    plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    bpe = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="</s>")
    sample = table(pairs(10), bpe)
    assert "with the prefix 'query: '" in Collate(bpe, LENGTH, Prompts()).misfit(
        sample, {"fingerprint": fingerprint(bpe)}
    )
