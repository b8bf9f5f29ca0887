"""Retrieval sets, their scores, and the stage `evaluate`."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import orjson
import pytest
import pytrec_eval
import ranks
import tiny
import torch
import zstandard
from transformers import AutoModel, AutoTokenizer

from data.errors import NumericError, UserError
from data.rules import Prompts
from data.tokens import stateless_copy
from trainer import bm25, checkpoint, distributed, evaluate, retrieval, sets
from trainer.embed import encode_texts
from trainer.encoder import open_model
from trainer.metrics import NAMES
from trainer.runfolder import Lease

PROMPTS = Prompts(query="q: ", passage="p: ")

ROWS = [
    {"query": "living room", "passage": "Where the sofa stands.", "source": "titles", "lang": "en"},
    {"query": "Wohnzimmer", "passage": "Wo das Sofa steht.", "source": "titles", "lang": "de"},
    {"query": "living  room", "passage": "The room with the television.", "source": "titles", "lang": "en"},
    {"query": "Wo das Sofa steht.", "passage": "Where the sofa stands.", "source": "bitext", "symmetric": True},
]


def _jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def _beir(folder: Path, documents: Sequence[dict], queries: dict[str, str], qrels: Sequence[tuple]) -> Path:
    _jsonl(folder / "corpus.jsonl", documents)
    _jsonl(folder / "queries.jsonl", [{"_id": key, "text": text} for key, text in queries.items()])
    (folder / "qrels").mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _by_text(vectors: dict[str, list[float]]) -> Callable[[Sequence[str]], torch.Tensor]:
    """An encoder that looks its vectors up."""
    return lambda texts: torch.tensor([vectors[text] for text in texts])


# --- sets ------------------------------------------------------------------------------------------------------


def test_rows_of_one_query_text_share_their_answers_and_equal_passages_are_one(tmp_path: Path) -> None:
    (data,) = sets.load(str(_jsonl(tmp_path / "rooms.jsonl", ROWS)))
    assert data.name == "rooms"
    assert data.queries == ("living room", "Wohnzimmer", "Wo das Sofa steht.")
    assert data.passages == ("Where the sofa stands.", "Wo das Sofa steht.", "The room with the television.")
    assert data.rows.tolist() == [0, 1, 0, 2]
    assert np.split(data.relevance.passages, data.relevance.offsets[1:-1])[0].tolist() == [0, 2]
    assert data.langs == ("en", "de", "en", "")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_give_the_same_set(tmp_path: Path, suffix: str) -> None:
    plain = _jsonl(tmp_path / "rooms.jsonl", ROWS)
    squeeze = gzip.compress if suffix == "gz" else zstandard.compress
    packed = tmp_path / "packed" / f"rooms.jsonl.{suffix}"
    packed.parent.mkdir()
    packed.write_bytes(squeeze(plain.read_bytes()))
    (left,), (right,) = sets.load(str(plain)), sets.load(str(packed))
    assert (left.name, left.queries, left.passages) == (right.name, right.queries, right.passages)


def test_bad_rows_are_counted_by_reason_with_the_first_place(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "rooms.jsonl", [*ROWS, {"query": "no passage"}, {"query": "", "passage": "x"}, 7])
    with path.open("ab") as file:
        file.write(b"{not json\n")
    (data,) = sets.load(str(path))
    assert len(data.rows) == len(ROWS)
    (note,) = data.notes
    assert "4 rows left out" in note
    assert "line 5: missing passage" in note
    for reason in ("missing passage 1", "empty text 1", "not an object 1", "invalid JSON 1"):
        assert reason in note


def test_two_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [str(_jsonl(tmp_path / side / "holdout.jsonl", ROWS)) for side in ("left", "right")]
    assert [data.name for data in sets.load(paths)] == ["left/holdout", "right/holdout"]


def test_a_link_keeps_its_name_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    blob = _jsonl(tmp_path / "blobs" / "0123", ROWS)
    blob.write_bytes(b"\xef\xbb\xbf" + blob.read_bytes())
    (tmp_path / "rooms.jsonl").symlink_to(blob)
    (data,) = sets.load(str(tmp_path / "rooms.jsonl"))
    assert (data.name, len(data.rows), data.notes) == ("rooms", len(ROWS), ())


def test_a_limit_draws_rows_and_keeps_the_corpus(tmp_path: Path) -> None:
    rows = [{"query": f"query {i}", "passage": f"passage {i}", "lang": f"l{i}"} for i in range(50)]
    path = str(_jsonl(tmp_path / "many.jsonl", rows))
    (some,), (again,), (other,) = (sets.load(path, limit=10, seed=seed) for seed in (1, 1, 2))
    assert len(some.rows) == len(some.queries) == 10
    assert len(some.passages) == 50
    assert some.queries == again.queries != other.queries
    for row, query in enumerate(some.rows):
        number = int(some.queries[query].split()[1])
        assert some.relevance.take(np.array([query])).passages.tolist() == [number]
        assert some.langs[row] == f"l{number}"


def test_beir_documents_are_title_and_text_and_unanswered_queries_are_left_out(tmp_path: Path) -> None:
    folder = _beir(
        tmp_path / "nano",
        [{"_id": "d1", "title": "Sofa", "text": "A seat. "}, {"_id": "d2", "title": "", "text": " A lamp"}],
        {"q1": "where to sit", "q2": "nothing judged", "q3": "only zeros"},
        [("q1", "d1", 2), ("q1", "d2", 0), ("q3", "d2", 0)],
    )
    (data,) = sets.load(str(folder))
    assert data.passages == ("Sofa A seat.", "A lamp")
    assert data.queries == ("where to sit",)
    assert (data.relevance.passages.tolist(), data.relevance.grades.tolist()) == ([0], [2])


def test_a_document_with_the_querys_number_stays_unless_it_is_the_query_itself(tmp_path: Path) -> None:
    folder = _beir(
        tmp_path / "arguments",
        [{"_id": "1", "text": "first"}, {"_id": "2", "text": "Second  query"}, {"_id": "3", "text": "third"}],
        {"1": "a question numbered like a document", "2": "Second query", "3": "third"},
        [("1", "1", 1), ("2", "3", 1), ("3", "3", 1)],
    )
    (data,) = sets.load(str(folder))
    assert data.own.tolist() == [-1, 1, -1]  # query 3 is its own passage too, but that is a judged answer
    vectors = {"q: Second query": [1.0, 0.0], "q: third": [0.0, 1.0], "q: " + data.queries[0]: [0.5, 0.0]}
    vectors |= {"p: first": [0.6, 0.6], "p: Second  query": [1.0, 0.0], "p: third": [0.9, 1.0]}
    result = retrieval.score(data, _by_text(vectors), PROMPTS)
    # Query 2 finds passages 2, 3, 1; without itself its answer is first. Query 1 finds 2, 3, 1: third place.
    assert result["mrr_at_10"] == pytest.approx((1 / 3 + 1 + 1) / 3)


def test_unknown_ids_are_counted_and_a_missing_answer_counts_as_never_found(tmp_path: Path) -> None:
    folder = _beir(
        tmp_path / "torn",
        [{"_id": "d1", "text": "there"}],
        {"q1": "query"},
        [("q1", "d1", 1), ("q1", "gone", 1), ("q9", "d1", 1)],
    )
    (data,) = sets.load(str(folder))
    assert "1 query ids are not in queries.jsonl" in data.notes[0]
    assert "1 answers are not in the corpus" in data.notes[1]
    result = retrieval.score(data, lambda texts: torch.ones(len(texts), 1), PROMPTS)
    assert result["recall_at_100"] == 0.5
    assert result["ndcg_at_10"] == pytest.approx(1 / (1 + 1 / math.log2(3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none.jsonl", "no such file or folder"),
        (lambda path: _jsonl(path / "empty.jsonl", []), "the file is empty"),
        (lambda path: _jsonl(path / "bad.jsonl", [{"title": "x"}]), "line 1: missing query"),
        (lambda path: _jsonl(path / "table.csv", []), "neither a folder nor one of"),
        (lambda path: _jsonl(path / "shards" / "holdout.jsonl", ROWS).parent, "did you mean"),
        (lambda path: _beir(path / "a", [], {"q": "x"}, []), "its corpus is empty"),
        (lambda path: _beir(path / "b", [{"_id": "d", "text": "t"}], {"q": "x"}, []), "no query with an answer"),
        (lambda path: _beir(path / "c", [{"_id": "d", "text": "t"}] * 2, {"q": "x"}, []), "line 2: the id 'd'"),
        (lambda path: _beir(path / "d", [{"_id": "d"}], {"q": "x"}, []), "line 1: a row is an object"),
        (lambda path: _beir(path / "e", [{"_id": "d", "text": "t"}], {"q": "x"}, [("q", "d")]), "line 2: not query-id"),
    ],
)
def test_bad_data_is_named_with_its_place(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        sets.load(str(path))
    assert path.name in str(caught.value)


def test_a_missing_split_names_those_that_are_there(tmp_path: Path) -> None:
    folder = _beir(tmp_path / "a", [{"_id": "d", "text": "t"}], {"q": "x"}, [("q", "d", 1)])
    with pytest.raises(UserError, match=r"no qrels/dev.tsv in it; set split to one it has: test"):
        sets.load(str(folder), split="dev")


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "noise.jsonl.zst"])
def test_a_damaged_archive_is_a_clear_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"query": "a", "passage": "b"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        sets.load(str(path))


# --- scores ----------------------------------------------------------------------------------------------------


def _random_rows(seed: int, count: int = 120) -> list[dict[str, str]]:
    """Pairs with repeated queries and passages in two sources."""
    random = np.random.default_rng(seed)
    return [
        {
            "query": f"query {random.integers(80)}",
            "passage": f"passage {random.integers(100)}",
            "source": ("a", "b")[int(random.integers(2))],
        }
        for _ in range(count)
    ]


def test_scores_equal_trec_evals_over_rows_and_within_each_source(tmp_path: Path) -> None:
    rows = _random_rows(3)
    (data,) = sets.load(str(_jsonl(tmp_path / "random.jsonl", rows)))
    random = np.random.default_rng(4)
    texts = [f"q: {row['query']}" for row in rows] + [f"p: {row['passage']}" for row in rows]
    vectors = {text: random.normal(size=8).tolist() for text in texts}
    result = retrieval.score(data, _by_text(vectors), PROMPTS)

    passages = list(dict.fromkeys(row["passage"] for row in rows))
    truth: dict[str, dict[str, int]] = {}
    for row in rows:
        truth.setdefault(row["query"], {})[row["passage"]] = 1
    run = {query: {p: float(np.dot(vectors[f"q: {query}"], vectors[f"p: {p}"])) for p in passages} for query in truth}
    theirs = pytrec_eval.RelevanceEvaluator(truth, {"ndcg_cut.10", "recall.100", "success.1"}).evaluate(run)
    for label, scores in {"": result, **result["by_source"]}.items():
        of_rows = [theirs[row["query"]] for row in rows if label in ("", row["source"])]
        assert scores["queries"] == len(of_rows)
        for ours, name in (
            ("ndcg_at_10", "ndcg_cut_10"),
            ("recall_at_100", "recall_100"),
            ("accuracy_at_1", "success_1"),
        ):
            assert scores[ours] == pytest.approx(np.mean([row[name] for row in of_rows]), abs=1e-6)
    assert result["passages"] == len(passages)
    assert "by_lang" not in result


def test_each_side_takes_the_prompt_that_training_gives_it(tmp_path: Path) -> None:
    rows = [
        {"query": "plain", "passage": "p1"},
        {"query": "even", "passage": "p2", "symmetric": True},
        {"query": "told", "passage": "p3", "instruction": "Find it"},
        {"query": "both", "passage": "p4", "instruction": "Match it", "symmetric": True},
    ]
    (data,) = sets.load(str(_jsonl(tmp_path / "kinds.jsonl", rows)))
    told, both = "Instruct: Find it\nQuery: ", "Instruct: Match it\nQuery: "
    assert retrieval.query_texts(data, PROMPTS) == ["q: plain", "q: even", told + "told", both + "both"]
    assert retrieval.passage_texts(data, PROMPTS) == ["p: p1", "q: p2", "p3", both + "p4"]


def test_broken_weights_end_as_a_numeric_error(tmp_path: Path) -> None:
    (data,) = sets.load(str(_jsonl(tmp_path / "rooms.jsonl", ROWS)))
    for bad in ("living", "sofa"):  # a query, a passage

        def encode(texts: Sequence[str], bad: str = bad) -> torch.Tensor:
            return torch.tensor([[math.nan if bad in text else 1.0] for text in texts])

        with pytest.raises(NumericError, match="rooms"):
            retrieval.score(data, encode, PROMPTS)


# --- BM25 ------------------------------------------------------------------------------------------------------


def test_bm25_ranks_as_the_formula_says() -> None:
    random = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(30)]
    passages = [" ".join(random.choice(vocabulary, size=random.integers(1, 15))) for _ in range(60)]
    queries = [" ".join(random.choice(vocabulary, size=3)) for _ in range(20)] + ["unknown words", ""]
    split = [passage.split() for passage in passages]
    mean_length = np.mean([len(words) for words in split])

    def score(query: str, words: list[str]) -> float:
        total = 0.0
        for term in query.split():
            holders = sum(term in other for other in split)
            if not holders:
                continue
            weight = math.log(1 + (len(split) - holders + 0.5) / (holders + 0.5))
            count = words.count(term)
            total += weight * count / (count + bm25.K1 * (1 - bm25.B + bm25.B * len(words) / mean_length))
        return total

    ranked = bm25.rank(queries, passages, 10)
    for query, row in zip(queries, ranked, strict=True):
        scores = np.array([score(query, words) for words in split])
        expected = [number for number in np.argsort(-np.round(scores, 5), kind="stable") if scores[number] > 0][:10]
        found = [number for number in row if number >= 0]
        np.testing.assert_allclose(scores[found], scores[expected], atol=1e-5)
        assert len(set(found)) == len(found) == len(expected)


def test_equal_bm25_scores_come_in_passage_order_and_strangers_are_no_results() -> None:
    assert bm25.rank(["cat"], ["a dog", "the cat", "a dog", "the cat", "the cat"], 2).tolist() == [[1, 3]]
    assert bm25.rank(["cat", "bird"], ["a dog", "the cat"], 3).tolist() == [[1, -1, -1], [-1, -1, -1]]
    assert bm25.rank(["cat"], ["...", "!"], 2).tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Straße_name, 3.5", ["strasse", "name", "3", "5"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("東京都へ go", ["東京", "京都", "都へ", "go"]),
        ("火", ["火"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_words_keep_their_marks_and_unspaced_scripts_become_pairs(text: str, terms: list[str]) -> None:
    assert sorted(bm25.words(text)) == sorted(terms)


# --- encoding --------------------------------------------------------------------------------------------------


TEXTS = [*tiny.TEXTS, "", "one", "Wo das Sofa steht. " * 30, *(text * 3 for text in tiny.TEXTS)]


@pytest.mark.parametrize("family", [tiny.bert, tiny.xlmr, tiny.mpnet])
def test_vectors_equal_those_of_transformers_text_by_text_in_order(tmp_path: Path, family: Callable) -> None:
    folder = str(family(tmp_path / "model"))
    model = open_model(folder)
    vectors = encode_texts(model, TEXTS, "query: ", tokens_per_chunk=100)
    tokenizer, backbone = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for text, vector in zip(TEXTS, vectors, strict=True):
        inputs = tokenizer("query: " + text, truncation=True, max_length=model.max_length, return_tensors="pt")
        with torch.no_grad():
            hidden = backbone(**inputs).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        assert (vector - expected).abs().max() < 1e-5


def test_encoding_leaves_no_trace_and_runs_as_many_forwards_as_all_ranks(tmp_path: Path) -> None:
    model = open_model(tiny.bert(tmp_path / "model"))
    shapes = []
    model.encoder.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    model.encoder.train()
    done: list[tuple[float, int]] = []

    def count(texts: float, tokens: int = 0) -> None:
        done.append((texts, tokens))

    vectors = encode_texts(model, TEXTS, agree_max=lambda chunks: chunks + 2, progress=count)
    assert model.encoder.training
    assert not vectors.requires_grad
    texts, tokens = map(sum, zip(*done, strict=True))
    assert texts == len(TEXTS)
    assert shapes[:-2] == [(1, tokens)], "packed, in one chunk"
    assert shapes[-2:] == [(1, 1), (1, 1)]
    model.encoder.eval()
    assert torch.equal(vectors, encode_texts(model, TEXTS))
    assert encode_texts(model, [], agree_max=lambda chunks: 1).shape == (0, model.encoder.size)


def test_a_model_copies_its_tokenizer_once_for_all_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For 250,000 pieces a copy takes a second, and a benchmark embeds hundreds of small pieces."""
    copied = Mock(wraps=stateless_copy)
    monkeypatch.setattr("data.tokens.stateless_copy", copied)
    model = open_model(tiny.bert(tmp_path / "model"))
    for text in TEXTS[:3]:
        encode_texts(model, [text])
    assert copied.call_count == 1
    shorter = replace(model, max_length=4)
    assert shorter.text_encoder.max_length == 4, "its own, not that of the model that it came from"


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    model = open_model(tiny.bert(tmp_path / "model"))
    exact, rounded = encode_texts(model, TEXTS), encode_texts(model, TEXTS, precision="bf16")
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05


def _score_on_this_rank(folder: str, paths: list[str]) -> list[dict]:
    encode = partial(encode_texts, open_model(folder), agree_max=distributed.agree_max, tokens_per_chunk=64)
    here = retrieval.Ranks(distributed.rank(), distributed.world(), distributed.gather_rows)
    return [retrieval.score(data, encode, Prompts(), ranks=here, examples=7) for data in sets.load(paths)]


def test_ranks_share_an_evaluation_and_get_what_one_process_gets(tmp_path: Path) -> None:
    folder, rows = str(tiny.bert(tmp_path / "model")), _random_rows(5, count=37)
    parts = {"many": rows, "fewer_than_ranks": rows[:2]}
    paths = [str(_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in parts.items()]
    alone = _score_on_this_rank(folder, paths)
    for together in ranks.run(_score_on_this_rank, 3, tmp_path, folder, paths):
        for mine, right in zip(together, alone, strict=True):
            assert mine.keys() == right.keys()
            named = [retrieval.named("set", result) for result in (mine, right)]
            assert named[0] == pytest.approx(named[1])
            assert mine["examples"] == right["examples"]


# --- the stage -------------------------------------------------------------------------------------------------


def _config(tmp_path: Path, **changes: object) -> evaluate.Config:
    values: dict = {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "rooms.jsonl"),
        "output": str(tmp_path / "scores"),
        "device": "cpu",
    }
    return evaluate.Config(**(values | changes))


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    tiny.bert(tmp_path / "model")
    _jsonl(tmp_path / "rooms.jsonl", ROWS)
    return tmp_path


def test_the_stage_writes_scores_with_their_circumstances_and_prints_them(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(_config(prepared))
    results = json.loads((prepared / "scores" / "results.json").read_text())
    assert list(results) == ["rooms"]
    entry = results["rooms"]
    assert (entry["queries"], entry["passages"]) == (4, 3)
    assert set(entry["by_source"]) == {"titles", "bitext"}
    assert {lang: scores["queries"] for lang, scores in entry["by_lang"].items()} == {"de": 1, "en": 2, "und": 1}
    assert entry["recall_at_100"] == 1.0  # three passages only
    for name in NAMES:
        assert 0 <= entry[name] <= 1
        assert set(entry["bm25"]) >= {name, "by_source", "by_lang", "queries", "passages"}
    # BM25 finds the answer of "living room" through "room", and nothing for the others but shared words.
    assert entry["bm25"]["by_lang"]["de"]["recall_at_100"] == 0.0
    about = json.loads((prepared / "scores" / "evaluation.json").read_text())
    assert about["query_prompt"] == "query: "
    assert about["weights_xxh3_128"]
    printed = capsys.readouterr().out
    for word in ("rooms", "bitext", "titles", "BM25", "nDCG@10"):
        assert word in printed


def test_two_jobs_do_not_write_the_same_results(prepared: Path) -> None:
    evaluate.run(_config(prepared, output=str(prepared / "scores/one.json")))
    assert not list((prepared / "scores").glob(".*"))
    before = (prepared / "scores/one.json").read_bytes()
    with Lease(prepared / "scores", file=".one.lease"):  # as another job holds it
        with pytest.raises(UserError, match=r"output=.*one\.json: process .* working here .* choose another output"):
            evaluate.run(_config(prepared, output=str(prepared / "scores/one.json")))
        assert (prepared / "scores/one.json").read_bytes() == before
        evaluate.run(_config(prepared, output=str(prepared / "scores/two.json")))
    assert (prepared / "scores/two.json").read_bytes() == before


def test_prompts_and_length_may_be_set_and_bm25_left_out(prepared: Path) -> None:
    changes = {"prompts": evaluate.PromptOverride(query="", passage="Wohnzimmer "), "max_length": 9, "bm25": False}
    evaluate.run(_config(prepared, output=str(prepared / "other.json"), **changes))
    entry = json.loads((prepared / "other.json").read_text())["rooms"]
    assert "bm25" not in entry
    about = json.loads((prepared / "other.evaluation.json").read_text())
    assert (about["query_prompt"], about["passage_prompt"], about["max_length"]) == ("", "Wohnzimmer ", 9)


def test_a_run_folder_stands_for_its_model_or_its_newest_checkpoint(prepared: Path) -> None:
    def weights(model: Path) -> str:
        evaluate.run(_config(prepared, model=str(model)))
        return json.loads((prepared / "scores" / "evaluation.json").read_text())["weights_xxh3_128"]

    first, second = prepared / "model", tiny.bert(prepared / "other", hidden_size=16)
    run = prepared / "run"
    run.mkdir()
    (run / "config.yaml").write_text("steps: 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="neither a model/ nor a checkpoint"):
        weights(run)
    saved = checkpoint.Saving(run, 7, lambda staging: shutil.copytree(first, staging / "model") and None, {}).publish()
    assert weights(run) == weights(saved.folder) == weights(first)
    shutil.copytree(second, run / "model")
    assert weights(run) == weights(second) != weights(first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/at-all/model"}, "model=nowhere/at-all/model"),
        ({"data": "nowhere.jsonl"}, "data=nowhere.jsonl: no such file"),
        ({"data": []}, "nothing to evaluate on"),
        ({"max_length": 5000}, "max_length=5000: this model takes at most 70"),
        pytest.param(
            {"device": "cuda"},
            "device=cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_of_the_user_are_named(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        evaluate.run(_config(prepared, **changes))
