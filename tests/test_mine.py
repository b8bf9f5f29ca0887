"""The stage `mine` from shards to shards: what is written, that ranks and kills change nothing, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import kills
import numpy as np
import pairs
import pytest
import ranks
import tiny
import torch

from data.errors import ConfigError, UserError
from data.records import Record, normalise, text_hash
from data.shards import ShardWriter, load_index, read_block, write_index
from data.tokens import TextEncoder, fingerprint, load_tokenizer
from launcher import config as configuration
from launcher.cli import main
from trainer import approximate, mine
from trainer.embed import Embedder, load_model

COUNT = 4


def _records(count: int, seed: int) -> list[Record]:
    """Pairs of which some share their query or their passage, some are symmetric, and some bring negatives along."""
    made = pairs.pairs(count, seed=seed, negatives=2)
    made = [replace(r, negatives=r.negatives if n % 10 == 0 else (), symmetric=n % 8 == 0) for n, r in enumerate(made)]
    again = [replace(r, passage=f"another answer {r.id}", negatives=()) for r in made[: count // 5]]
    return made + again + [replace(r, query=f"another question {r.id}") for r in made[: count // 5]]


def _write(folder: Path, source: str, records: list[Record], tokenizer: Path | None = None) -> None:
    """Shards of a few blocks each, with tokens when there is a tokenizer."""
    if tokenizer is None:
        pairs.write_shards(folder / source, records, source=source, shard_bytes=9000)
        return
    opened = load_tokenizer(str(tokenizer))
    encoder = TextEncoder(opened, 1 << 60)
    sized = {"block_records": 8, "shard_bytes": 20_000}
    with ShardWriter(folder / source, source, token_dtype="uint16", **sized) as writer:
        for record in records:
            ids = encoder.body([record.query, record.passage, *record.negatives]).lists()
            writer.write(record, (ids[0][:9], ids[1][:9], [row[:9] for row in ids[2:]]))
    described = {"name": str(tokenizer), "fingerprint": fingerprint(opened), "max_tokens": 9}
    write_index(folder / source, writer.close(), described)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of shards with tokens, and a model with their tokenizer."""
    root = tmp_path_factory.mktemp("mine")
    tiny.bert(root / "bert")
    for source, seed in (("alpha", 1), ("beta", 2)):
        _write(root, source, _records(50, seed), root / "bert")
    return root


def _config(folder: Path, output: Path, **changes: Any) -> mine.Config:
    values: dict[str, Any] = {
        "model": str(folder / "bert"),
        "data": [str(folder / "alpha"), str(folder / "beta")],
        "output": str(output),
        "negatives": COUNT,
        "margin": 0.999,
        "unit": 16,
        "tokens_per_chunk": 256,
        "device": "cpu",
        **changes,
    }
    return mine.Config(**values)


def _rows(output: Path) -> list[dict[str, Any]]:
    """The rows of shards in order."""
    index = load_index(output)
    blocks = [(shard, block) for shard, info in enumerate(index.shards) for block in range(len(info.blocks))]
    return [row for shard, block in blocks for row in read_block(index, shard, block).table.to_pylist()]


def _report(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def _digests(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.iterdir()}


@pytest.fixture(scope="module")
def output(folder: Path) -> Path:
    mine.run(_config(folder, folder / "mined"))
    return folder / "mined"


# --- what is written -----------------------------------------------------------------------------------------------


def test_records_come_out_as_they_were_with_negatives_that_answer_nothing(folder: Path, output: Path) -> None:
    before = _rows(folder / "alpha") + _rows(folder / "beta")
    after = _rows(output)
    labels = ("query", "passage", "source", "lang", "id", "instruction", "symmetric", "query_tokens", "passage_tokens")
    assert [[row[name] for name in labels] for row in after] == [[row[name] for name in labels] for row in before]
    right: dict[int, set[int]] = {}
    for row in before:
        right.setdefault(row["query_hash"], {row["query_hash"]}).add(row["passage_hash"])
        if row["symmetric"]:
            right.setdefault(row["passage_hash"], {row["passage_hash"]}).add(row["query_hash"])
    passages = {row["source"]: {r["passage"] for r in before if r["source"] == row["source"]} for row in before}
    for old, new in zip(before, after, strict=True):
        given = list(dict.fromkeys(text for text in old["negatives"]))
        assert new["negatives"][: len(given)] == given
        assert len(new["negative_hash"]) == len(set(new["negative_hash"])) == COUNT
        assert not set(new["negative_hash"]) & right[new["query_hash"]]
        assert set(new["negatives"][len(given) :]) <= passages[new["source"]]


def test_tokens_of_negatives_are_those_that_packing_would_have_stored(folder: Path, output: Path) -> None:
    index = load_index(output)
    assert index.tokenizer == load_index(folder / "alpha").tokenizer
    encoder = TextEncoder(load_tokenizer(str(folder / "bert")), 1 << 60)
    for row in _rows(output):
        assert row["negative_tokens"] == [ids[:9] for ids in encoder.body(row["negatives"]).lists()]


def test_the_report_counts_what_is_in_the_shards(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine.run(_config(folder, tmp_path / "out", random_negatives=1, margin=0.99))
    report, rows = _report(tmp_path / "out"), _rows(tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    for source in ("alpha", "beta"):
        facts, mine_rows = report["sources"][source], [row for row in rows if row["source"] == source]
        given = sum(len(row["negatives"]) for row in _rows(folder / source))
        assert facts["records"] == len(mine_rows) == 70
        assert facts["negatives"]["given"] == given > 0
        assert sum(facts["negatives"].values()) == COUNT * len(mine_rows)
        assert facts["negatives"]["random"] >= len(mine_rows)
        assert facts["scores"]["searched"] <= facts["scores"]["positive"]
        assert 0 <= facts["positive_first"] <= 1
        (line,) = (line.split() for line in lines if line.startswith(source))
        assert line[:4] == [source, "70", str(given), str(facts["negatives"]["searched"])]
    assert report["plan"]["model"]["weights"]
    assert report["passages"] == len({row["passage_hash"] for row in rows})


def test_negatives_that_answer_the_query_or_come_twice_are_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    others = [Record(f"other question {n}", f"other answer {n}") for n in range(20)]
    first = Record(
        "the question", "the answer", negatives=("an answer too", "wrong", " the  question", "wrong", "false")
    )
    second = Record("the  question", "an answer too", negatives=tuple(f"wrong {n}" for n in range(9)))
    _write(tmp_path, "nli", [first, second, *others])
    mine.run(_config(folder, tmp_path / "out", data=str(tmp_path / "nli"), within="all"))
    rows, facts = _rows(tmp_path / "out"), _report(tmp_path / "out")["sources"]["nli"]
    assert rows[0]["negatives"][:2] == ["wrong", "false"]
    assert rows[1]["negatives"] == [f"wrong {n}" for n in range(COUNT)]
    assert not {"the answer", "an answer too"} & {text for row in rows[:2] for text in row["negatives"]}
    assert (facts["negatives"]["given"], facts["given_left_out"]) == (2 + COUNT, 3 + 5)


def test_answers_in_the_qrels_of_a_corpus_are_excluded_by_their_id(folder: Path, tmp_path: Path) -> None:
    corpus = [{"_id": f"d{n}", "title": "Title", "text": f"body {n}"} for n in range(12)]
    files = {
        "corpus.jsonl": corpus,
        "queries.jsonl": [{"_id": f"q{n}", "text": f"question {n}"} for n in range(2)],
    }
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    for name, rows in files.items():
        (tmp_path / "beir" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [f"q0\td{n}\t1" for n in range(4)] + ["q0\td4\t0", "q1\td5\t2", "q9\td6\t1"]
    (tmp_path / "beir" / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged, ""]))
    _write(tmp_path, "asked", [Record("question 0", "body 0"), Record("question 1", "body 5")])
    changes = {"data": str(tmp_path / "asked"), "corpus": str(tmp_path / "beir"), "negatives": 8, "margin": None}
    mine.run(_config(folder, tmp_path / "out", **changes))
    rows = _rows(tmp_path / "out")
    assert set(rows[0]["negatives"]) == {f"Title body {n}" for n in range(4, 12)}
    assert "Title body 5" not in rows[1]["negatives"]
    with pytest.raises(UserError, match="only 8 are left for 'question 0'"):
        mine.run(_config(folder, tmp_path / "more", **{**changes, "negatives": 9}))


def test_short_records_are_dropped_when_asked(folder: Path, tmp_path: Path) -> None:
    mine.run(_config(folder, tmp_path / "out", fill="drop", margin=0.97))
    facts, rows = _report(tmp_path / "out")["sources"], _rows(tmp_path / "out")
    assert all(len(row["negatives"]) == COUNT for row in rows)
    assert 0 < sum(each["dropped"] for each in facts.values()) == 140 - len(rows) < 140
    assert sum(each["negatives"]["random"] for each in facts.values()) == 0
    with pytest.raises(UserError, match="fill=drop: none of the 140 records has negatives=4"):
        mine.run(_config(folder, tmp_path / "none", fill="drop", margin=0.01))


def test_shards_of_an_unknown_tokenizer_come_out_without_tokens(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.xlmr(tmp_path / "xlmr")
    _write(tmp_path, "alpha", _records(20, 1), tmp_path / "xlmr")
    mine.run(_config(folder, tmp_path / "known", data=str(tmp_path / "alpha")))
    assert load_index(tmp_path / "known").tokenizer == load_index(tmp_path / "alpha").tokenizer
    (tmp_path / "xlmr").rename(tmp_path / "gone")
    mine.run(_config(folder, tmp_path / "out", data=str(tmp_path / "alpha")))
    assert load_index(tmp_path / "out").tokenizer is None
    assert "query_tokens" not in _rows(tmp_path / "out")[0]
    assert "without tokens" in caplog.text
    assert "not to be found" in _report(tmp_path / "out")["no_tokens"]


# --- once, and the same --------------------------------------------------------------------------------------------


def _on_rank(folder: Path, output: Path) -> bool:
    mine.run(_config(folder, output))
    return output.is_dir()


def test_two_ranks_write_the_bytes_of_one(folder: Path, output: Path, tmp_path: Path) -> None:
    assert ranks.run(_on_rank, 2, tmp_path, folder, tmp_path / "two")[0]
    assert _digests(tmp_path / "two") == _digests(output)


def test_a_job_that_is_killed_again_and_again_finishes_every_part_once_with_the_same_bytes(
    folder: Path, output: Path, tmp_path: Path
) -> None:
    finished = kills.until_done(
        _on_rank, folder, tmp_path / "out", log=tmp_path / "log", every=40, preload="trainer.minework"
    )
    assert len(finished) == len(set(finished)) > 20
    assert _digests(tmp_path / "out") == _digests(output)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_output_is_made_once_and_replaced_only_when_asked(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "quintet")
    mine.run(_config(folder, tmp_path / "out"))
    before = _digests(tmp_path / "out")
    mine.run(_config(folder, tmp_path / "out"))
    assert "nothing to do" in caplog.text
    with pytest.raises(UserError, match="is not empty"):
        mine.run(_config(folder, tmp_path / "out", negatives=2))
    assert _digests(tmp_path / "out") == before
    mine.run(_config(folder, tmp_path / "out", negatives=2, overwrite=True))
    assert {len(row["negatives"]) for row in _rows(tmp_path / "out")} == {2}


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "model=nowhere: no such folder"),
        ({"data": "nowhere"}, "data='nowhere': no such folder or file"),
        ({"corpus": "nowhere"}, "corpus=nowhere: no such file or folder"),
    ],
)
def test_what_is_not_there_is_named(
    folder: Path, tmp_path: Path, changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model": folder / "bert", "data": folder / "alpha", "output": tmp_path / "out", "device": "cpu", **changes}
    assert main(["mine", *(f"{name}={value}" for name, value in given.items())]) == 2
    assert capsys.readouterr().err.startswith(f"quintet mine: {message}")
    assert list(tmp_path.iterdir()) == []


def test_empty_data_and_an_empty_corpus_are_refused(folder: Path, tmp_path: Path) -> None:
    write_index(tmp_path, [])
    with pytest.raises(UserError, match="no records there"):
        mine.run(_config(folder, tmp_path / "out", data=str(tmp_path)))
    (tmp_path / "lines.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"lines\.txt: there is no text in it"):
        mine.run(_config(folder, tmp_path / "out", corpus=str(tmp_path / "lines.txt")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["margin=0"], "margin=0: must be above 0"),
        (["margin=1.5"], "margin=1.5: must be at most 1"),
        (["absolute_margin=-1"], "absolute_margin=-1: must be at least 0"),
        (["random_negatives=9"], "random_negatives=9: more than negatives=7"),
        (["depth=5"], "depth=5: leaves 5 candidates behind skip_top=0, and 7 negatives are searched"),
        (["skip_top=300"], "leaves 0 candidates"),
        (["corpus=c", "within=language"], "within=language: cannot be had of corpus=c"),
        (["sampling=best"], "must be one of top, random"),
        (["index_search=nprobe=4"], "index_search=nprobe=4: there is no index to search"),
    ],
)
def test_settings_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.load(mine.Config, overrides=["model=m", "data=d", "output=o", *words])
    assert message in str(caught.value)


@pytest.mark.parametrize(("index", "search"), [("Flat", ""), ("IVF4,Flat", "nprobe=4"), ("HNSW16", "efSearch=200")])
def test_an_index_that_is_searched_whole_gives_the_negatives_of_exact_search(
    folder: Path, tmp_path: Path, index: str, search: str
) -> None:
    mine.run(_config(folder, tmp_path / "exact", within="all", margin=None))
    mine.run(_config(folder, tmp_path / "near", within="all", margin=None, index=index, index_search=search))
    embedder = Embedder(load_model(str(folder / "bert"), torch.device("cpu")), torch.device("cpu"))
    for near, exact in zip(_rows(tmp_path / "near"), _rows(tmp_path / "exact"), strict=True):
        if near["negatives"] != exact["negatives"]:  # two passages that are as near, but for the last bits of a sum
            scores = [_scores(embedder, row) for row in (near, exact)]
            np.testing.assert_allclose(*scores, rtol=0, atol=2e-6)


def _scores(embedder: Embedder, row: dict[str, Any]) -> np.ndarray:
    """The scores of a row's negatives, in float64 of texts that are embedded alone."""
    texts = [f"query: {row['query']}", *(f"passage: {text}" for text in row["negatives"])]
    query, *negatives = torch.cat([embedder([text]) for text in texts]).double().numpy()
    scores: np.ndarray = np.stack(negatives) @ query
    return scores


def test_scores_of_what_an_index_proposes_are_exact_where_its_own_are_not(tmp_path: Path) -> None:
    """So a margin means the same with it. The index keeps each number in four bits."""
    generator = torch.Generator().manual_seed(1)
    vectors, queries = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator)) for n in (400, 9))
    approximate.build(tmp_path / "index", vectors, "SQ4")
    scores, places = approximate.Index(tmp_path / "index").search(queries, vectors, 8)
    exact = (queries[:, None].double() * vectors[places].double()).sum(dim=2)
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-6)
    own = faiss.read_index(str(tmp_path / "index")).search(queries.numpy(), 8)[0]
    assert np.abs(np.sort(own) - np.sort(exact.numpy())).max() > 1e-3
    assert bool((scores.diff(dim=1) <= 0).all())


def test_where_an_index_finds_too_little_random_passages_fill_up(folder: Path, tmp_path: Path) -> None:
    searched = {}
    for name, index in (("exact", {}), ("out", {"index": "IVF24,Flat", "index_search": "nprobe=1"})):
        mine.run(_config(folder, tmp_path / name, within="all", margin=None, **index))
        sources = _report(tmp_path / name)["sources"].values()
        searched[name] = sum(facts["negatives"]["searched"] for facts in sources)
    assert 0 < searched["out"] < searched["exact"]
    rows = _rows(tmp_path / "out")
    assert all(len(set(row["negative_hash"])) == COUNT for row in rows)
    assert not any({row["passage_hash"], row["query_hash"]} & set(row["negative_hash"]) for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": "Flat"}, r"index=Flat: is one of all passages, and within=source asks"),
        ({"index": "Flatt", "within": "all"}, r"index=Flatt: faiss refuses it: "),
        ({"index": "IVF4000,Flat", "within": "all"}, r"index=IVF4000,Flat: faiss refuses it: .*training points"),
        ({"index": "Flat", "index_search": "nprob=4", "within": "all"}, r"index_search=nprob=4: faiss refuses it: "),
    ],
)
def test_an_index_that_cannot_be_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        mine.run(_config(folder, tmp_path / "out", **changes))


def test_a_full_disk_is_told_and_nothing_finished_is_lost(
    folder: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file, renames = os.replace, []

    def full_in_time(source: Any, target: Any) -> None:
        renames.append(target)
        if len(renames) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full_in_time)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        mine.run(_config(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    mine.run(_config(folder, tmp_path / "out"))
    assert _digests(tmp_path / "out") == _digests(output)


def test_the_texts_of_the_tests_differ() -> None:
    """Else the cases above would test less than they say."""
    rows = _records(50, 1)
    assert len({text_hash(normalise(row.query)) for row in rows}) < len(rows) == 70
    assert np.unique([text_hash(row.passage) for row in rows]).size < len(rows)
