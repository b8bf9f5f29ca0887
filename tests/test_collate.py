"""Prefix rules, and batches against the tokenizer called text by text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
from pairs import pairs

from data import blocks
from data.collate import Collate, Part, score
from data.errors import UserError
from data.records import Record, text_hash
from data.rules import Prompts, passage_prefix, query_prefix
from data.scores import ScoreCache, ScoreWriter
from data.targets import Targets
from data.tokens import Ragged, TextEncoder, fingerprint, ragged

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


def test_negatives_rotate_by_epoch_through_the_whole_list(tokenizer: Any) -> None:
    records = [Record("q", "p", negatives=tuple(f"negative {n}" for n in range(size))) for size in (5, 3, 2)]
    collate = Collate(tokenizer, LENGTH, Prompts(), 2)
    seen = []
    for epoch in range(4):
        batch = collate([part(records, [0, 1, 2], epochs=np.array([epoch, epoch, epoch + 7]))], np.arange(3))
        seen.append(batch.passage_hash[3:].reshape(3, 2).tolist())
    # Slices of 2 that begin at epoch * 2 of the list and go on at its start.
    wanted = [[0, 1], [2, 3], [4, 0], [1, 2]], [[0, 1], [2, 0], [1, 2], [0, 1]], [[0, 1]] * 4
    for row, slices in enumerate(wanted):
        assert [epoch[row] for epoch in seen] == [[text_hash(f"negative {n}") for n in pair] for pair in slices]


def test_the_tokens_of_rotated_negatives_are_those_of_their_texts(tokenizer: Any) -> None:
    records = pairs(4, negatives=5)
    for kind in (None, tokenizer):
        batch = Collate(tokenizer, LENGTH, Prompts(), 2)(
            [part(records, [0, 1, 2, 3], kind, epochs=np.full(4, 2))], RANGE
        )
        texts = ["passage: " + record.negatives[n] for record in records for n in (4, 0)]
        assert batch.tokens.lists()[8:] == one_by_one(tokenizer, texts)


RANGE = np.arange(4)

# The teacher


FINGERPRINT = "0" * 32


def cache(
    folder: Path, records: list[Record], leave_out: Callable[[Record, str], bool] = lambda *_: False
) -> ScoreCache:
    """Scores of the records' pairs; a pair's logit is a number made of its hashes."""
    rows = [(r, text) for r in records for text in (r.passage, *r.negatives) if not leave_out(r, text)]
    queries, passages = (
        np.array([text_hash(text) for text in texts]) for texts in zip(*((r.query, t) for r, t in rows), strict=True)
    )
    writer = ScoreWriter(folder, FINGERPRINT)
    writer.add(queries, passages, logit(queries, passages))
    writer.flush()
    opened = ScoreCache(folder, FINGERPRINT)
    opened.load()
    return opened


def logit(queries: Any, passages: Any) -> Any:
    return ((queries % 1000) / 100 - (passages % 777) / 70).astype(np.float32)


def test_scores_stand_beside_the_positive_and_the_negatives_that_were_taken(tokenizer: Any, tmp_path: Path) -> None:
    records = pairs(4, negatives=5)
    targets = Targets(cache(tmp_path, records), "scores")
    collate = Collate(tokenizer, LENGTH, Prompts(), 2, targets=targets)
    places = [part(records[:1], [2], epochs=np.array([1])), part(records[1:], [0, 1, 3], epochs=np.array([0, 1, 2]))]
    batch = collate(places, RANGE)
    for row, (record, taken) in enumerate([(1, (0, 1)), (2, (2, 3)), (0, (2, 3)), (3, (4, 0))]):
        query = text_hash(records[record].query)
        texts = [records[record].passage, *(records[record].negatives[n] for n in taken)]
        hashes = np.array([text_hash(text) for text in texts])
        assert batch.group_hash[row].tolist() == hashes.tolist()
        assert batch.scores is not None
        assert batch.scores[row].tolist() == logit(np.full(3, query), hashes).tolist()
    assert not len(batch.unscored)


def test_a_missing_score_is_an_error_that_names_its_record(tokenizer: Any, tmp_path: Path) -> None:
    records = pairs(4, negatives=2)
    found = cache(tmp_path, records, lambda r, text: r is records[3] or text == records[2].negatives[1])
    collate = Collate(tokenizer, LENGTH, Prompts(), 2, targets=Targets(found, "here"))
    with pytest.raises(UserError, match=r"scores=here: no score for row 2 \(and 1 more rows of its batch\)"):
        collate([part(records, [0, 1, 2, 3])], RANGE)


def test_missing_scores_are_nan_and_their_rows_are_told_where_that_is_allowed(tokenizer: Any, tmp_path: Path) -> None:
    records = pairs(4, negatives=2)
    found = cache(tmp_path, records, lambda r, text: r is records[3] or text == records[2].negatives[1])
    targets = Targets(found, "here", "wait")
    batch = Collate(tokenizer, LENGTH, Prompts(), 2, targets=targets)([part(records, [0, 1, 2, 3])], RANGE)
    assert batch.scores is not None
    assert np.isnan(batch.scores).tolist() == [[False] * 3, [False] * 3, [False, False, True], [True] * 3]
    assert batch.unscored.tolist() == [2, 3]
    cache(tmp_path, records)  # a worker finishes
    assert score(batch, targets).unscored.tolist() == [2, 3]
    targets.refresh()
    complete = score(batch, targets)
    assert complete.unscored.tolist() == []
    assert complete.scores is not None
    assert not np.isnan(complete.scores).any()


def test_a_source_without_teacher_is_not_looked_up(tokenizer: Any, tmp_path: Path) -> None:
    records = pairs(4, negatives=2)
    collate = Collate(tokenizer, LENGTH, Prompts(), 2, targets=Targets(cache(tmp_path, records[:2]), "here"))
    batch = collate([part(records[:2], [0, 3]), part(records[2:], [1, 2], scored=False)], RANGE)
    assert batch.scores is not None
    assert np.isnan(batch.scores).all(1).tolist() == [False, True, True, False]
    assert not len(batch.unscored)


def test_rows_of_a_source_without_in_batch_negatives_are_marked(tokenizer: Any) -> None:
    records = pairs(4)
    collate = Collate(tokenizer, LENGTH, Prompts())
    assert collate([part(records, [0, 1, 2, 3])], RANGE).own_only is None
    batch = collate([part(records[:2], [0, 3]), part(records[2:], [1, 2], in_batch_negatives=False)], RANGE)
    assert batch.own_only is not None
    assert batch.own_only.tolist() == [False, True, True, False]


# Rows for a cross-encoder


def test_joint_rows_are_the_positives_then_the_negatives_each_with_its_query(tokenizer: Any) -> None:
    records = pairs(4, negatives=3)

    def joint(queries: Sequence[str], passages: Sequence[str]) -> Ragged:
        return ragged([tokenizer(*texts)["input_ids"] for texts in zip(queries, passages, strict=True)])

    collate = Collate(tokenizer, LENGTH, Prompts(), 2, joint=joint)
    assert not collate.takes_stored
    places = [part(records[:1], [2], epochs=np.array([1])), part(records[1:], [0, 1, 3])]
    batch = collate(places, RANGE)
    rows = [(records[n], taken) for n, taken in ((1, (0, 1)), (2, (0, 1)), (0, (2, 0)), (3, (0, 1)))]
    texts = [(r.query, r.passage) for r, _ in rows] + [(r.query, r.negatives[n]) for r, taken in rows for n in taken]
    assert batch.tokens.lists() == [tokenizer(*pair)["input_ids"] for pair in texts]
    assert batch.passage_hash.tolist() == [text_hash(passage) for _, passage in texts]
    assert (batch.num_queries, batch.num_negatives) == (4, 2)


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
