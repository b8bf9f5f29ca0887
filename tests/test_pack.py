"""Stage pack: every input form, what is rejected and where, the held-out split, order, and what lies in the shards."""

from __future__ import annotations

import csv
import errno
import gzip
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import orjson
import pairs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data import holdout, pack
from data.errors import DataError, UserError
from data.index import Index
from data.pack import Config
from data.packing import _equal_share
from data.records import Record
from data.shards import load_index, read_block
from data.staging import staged
from data.tables import table
from data.workers import run_jobs

Rows = list[dict[str, Any]]


def _run(output: Path, input: Any, **keys: Any) -> Index:
    """Pack in this process with nothing held out unless asked for."""
    defaults: dict[str, Any] = {"holdout_fraction": 0.0, "workers": 1}
    names = [str(name) for name in input] if isinstance(input, list) else str(input)
    config = Config(input=names, output=str(output), **{**defaults, **keys})
    assert config.check() == []
    pack.run(config)
    return load_index(str(output))


def _tables(index: Index) -> Iterator[pa.Table]:
    for shard, info in enumerate(index.shards):
        for block in range(len(info.blocks)):
            yield read_block(index, shard, block).table


def _records(index: Index) -> list[Record]:
    """Every record of the shards, in the order they lie in."""
    names = list(Record.__dataclass_fields__)
    rows = [row for table in _tables(index) for row in table.select(names).to_pylist()]
    return [Record(**{**row, "negatives": tuple(row["negatives"])}) for row in rows]


def _by_text(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (record.query, record.passage))


def _lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(row if isinstance(row, bytes) else orjson.dumps(row) + b"\n" for row in rows))
    return path


def _rows(records: list[Record]) -> Rows:
    return [{"query": r.query, "passage": r.passage, "lang": r.lang, "id": r.id} for r in records]


def _read_lines(path: Path) -> Rows:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


# Input forms


def _write_csv(path: Path, rows: Rows, delimiter: str) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _write_zst(path: Path, rows: Rows) -> Path:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def _write_gz(path: Path, rows: Rows) -> Path:
    # two gzip members one after the other, as parallel compressors and `cat` make them
    halves = rows[:7], rows[7:]
    path.write_bytes(b"".join(gzip.compress(b"".join(orjson.dumps(r) + b"\n" for r in half)) for half in halves))
    return path


def _write_csv_gz(path: Path, rows: Rows) -> Path:
    path.write_bytes(gzip.compress(_write_csv(path, rows, ",").read_bytes()))
    return path


def _write_json(path: Path, rows: Rows) -> Path:
    path.write_bytes(orjson.dumps(rows))
    return path


def _write_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return path


def _write_arrow_file(path: Path, rows: Rows) -> Path:
    content = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, content.schema) as writer:
        writer.write_table(content, max_chunksize=6)
    return path


def _write_dataset(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(path), num_shards=2)
    return path


def _write_dataset_dict(path: Path, rows: Rows) -> Path:
    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:2])}
    datasets.DatasetDict(parts).save_to_disk(str(path))
    return path


def _write_folder(path: Path, rows: Rows) -> Path:
    _lines(path / "a" / "part-00.jsonl", rows[:8])
    _write_parquet(path / "part-01.parquet", rows[8:])
    (path / "README.md").write_text("not records")
    (path / "facts.json").write_text('[{"version": 1}]')
    return path


FORMS: dict[str, Callable[[Path], Path]] = {}


def _form(name: str, write: Callable[[Path, Rows], Path]) -> None:
    FORMS[name] = lambda folder: write(folder / name, _rows(PAIRS))


PAIRS = pairs.pairs(23)
_form("pairs.jsonl", lambda path, rows: _lines(path, rows))
_form("bom.jsonl", lambda path, rows: _lines(path, [b"\xef\xbb\xbf", *rows]))
_form("pairs.jsonl.gz", _write_gz)
_form("pairs.jsonl.zst", _write_zst)
_form("pairs.json", _write_json)
_form("lines.json", lambda path, rows: _lines(path, rows))
_form("pairs.csv", lambda path, rows: _write_csv(path, rows, ","))
_form("pairs.tsv", lambda path, rows: _write_csv(path, rows, "\t"))
_form("pairs.csv.gz", _write_csv_gz)
_form("pairs.parquet", _write_parquet)
_form("pairs.arrow", _write_arrow_file)
_form("dataset", _write_dataset)
_form("dataset_dict", _write_dataset_dict)
_form("folder", _write_folder)


@pytest.mark.parametrize("form", FORMS)
def test_every_input_form_gives_the_same_records(form: str, tmp_path: Path) -> None:
    index = _run(tmp_path / "out", FORMS[form](tmp_path), source="s")
    expected = [Record(r.query, r.passage, "s", r.lang, r.id) for r in PAIRS]
    assert _by_text(_records(index)) == _by_text(expected)


def test_forms_are_mixed_in_one_pack_and_sources_follow_the_files(tmp_path: Path) -> None:
    rows = _rows(PAIRS)
    _lines(tmp_path / "nq-0001.jsonl", rows[:5])
    _lines(tmp_path / "nq-0002.jsonl", rows[5:10])
    _write_parquet(tmp_path / "wiki.parquet", rows[10:15])
    _write_csv(tmp_path / "named.csv", [row | {"source": "other/name"} for row in rows[15:]], ",")
    index = _run(tmp_path / "out", [tmp_path / "nq-*.jsonl", tmp_path / "wiki.parquet", tmp_path / "named.csv"])
    counts = {source: records for source, (records, _) in index.sources.items()}
    slashed = next(source for source in counts if source.startswith("other_name-"))
    assert counts == {"nq": 10, "wiki": 5, slashed: 8}
    assert {shard.file for shard in index.shards} == {f"{source}-000000.tar" for source in counts}


@pytest.mark.parametrize("part_bytes", [1, 50, 777])
def test_a_large_file_is_read_in_parts_without_losing_a_line(
    part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.readers.PART_BYTES", part_bytes)
    rows = _rows(PAIRS)
    file = _lines(
        tmp_path / "p.jsonl", [*rows[:10], b"\n", b"broken\n", *rows[10:], b'{"query": "no newline at the end"}']
    )
    index = _run(tmp_path / "out", file)
    assert _by_text(_records(index)) == _by_text([Record(r.query, r.passage, "p", r.lang, r.id) for r in PAIRS])
    rejects = _read_lines(tmp_path / "out" / "rejects.jsonl")
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [(12, "invalid JSON"), (26, "missing passage")]


def test_small_parts_and_runs_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(pairs.pairs(200)) * 2
    files = [_lines(tmp_path / "a.jsonl", rows), _write_parquet(tmp_path / "b.parquet", rows)]
    whole = _run(tmp_path / "whole", files, holdout_fraction=0.1)
    monkeypatch.setattr("data.readers.PART_BYTES", 3000)
    monkeypatch.setattr("data.readers.PART_ROWS", 12)
    monkeypatch.setattr("data.spill.RUN_RECORDS", 7)
    split = _run(tmp_path / "split", files, holdout_fraction=0.1)
    assert split.shards == whole.shards
    assert (tmp_path / "split" / "holdout.jsonl").read_bytes() == (tmp_path / "whole" / "holdout.jsonl").read_bytes()


# Columns


def _packed(tmp_path: Path, rows: Rows, **keys: Any) -> list[Record]:
    return _by_text(_records(_run(tmp_path / "out", _lines(tmp_path / "s.jsonl", rows), **keys)))


def test_columns_are_mapped(tmp_path: Path) -> None:
    rows = [{"title": "t", "body": "b", "hard_1": "x", "hard_2": ["y", "z"], "tongue": "de", "other": 1}]
    columns = {"query": "title", "passage": "body", "negatives": ["hard_2", "hard_1"], "lang": "tongue"}
    assert _packed(tmp_path, rows, columns=columns) == [Record("t", "b", "s", "de", "", ("y", "z", "x"))]


def test_a_map_leaves_files_without_its_columns_alone(tmp_path: Path) -> None:
    own = _lines(tmp_path / "own.jsonl", [{"query": "q", "passage": "p"}])
    theirs = _lines(tmp_path / "theirs.jsonl", [{"title": "t", "body": "b"}])
    index = _run(tmp_path / "out", [own, theirs], columns={"query": "title", "passage": "body"})
    assert _by_text(_records(index)) == [Record("q", "p", "own"), Record("t", "b", "theirs")]


def test_sentence_transformers_columns_are_known(tmp_path: Path) -> None:
    row = {"anchor": "a", "positive": "p", **{f"negative_{n}": f"n{n}" for n in (10, 1, 2)}, "negative": "n0"}
    assert _packed(tmp_path, [row]) == [Record("a", "p", "s", negatives=("n0", "n1", "n2", "n10"))]


def test_tevatron_rows_give_one_record_a_positive(tmp_path: Path) -> None:
    def passages(*texts: str) -> list[dict[str, str]]:
        return [{"docid": text, "title": f"T{text}", "text": text} for text in texts]

    row = {"query_id": "7", "query": "q", "positive_passages": passages("a", "b"), "negative_passages": passages("c")}
    row["positive_passages"][0]["title"] = ""
    bare = {"query_id": "8", "query": "r", "positive_passages": [], "negative_passages": []}
    assert _packed(tmp_path, [row, bare]) == [
        Record("q", "Tb b", "s", "", "7", ("Tc c",)),
        Record("q", "a", "s", "", "7", ("Tc c",)),
    ]
    assert [reject["reason"] for reject in _read_lines(tmp_path / "out" / "rejects.jsonl")] == ["missing passage"]


def test_lists_of_positives_and_negatives_are_known(tmp_path: Path) -> None:
    rows = [{"query": "q", "pos": ["a", "b"], "neg": ["c", "d"]}]
    assert _packed(tmp_path, rows) == [Record("q", text, "s", negatives=("c", "d")) for text in "ab"]


def _beir(folder: Path) -> Path:
    _lines(folder / "corpus.jsonl", [{"_id": f"d{n}", "title": "T" if n else "", "text": f"doc {n}"} for n in range(4)])
    _lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"ask {n}"} for n in range(3)])
    (folder / "qrels").mkdir()
    judged = ["q0\td0\t1", "q0\td1\t2", "q1\td2\t0", "q2\td9\t1"]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td3\t1\n")
    return folder


def test_a_beir_folder_gives_its_judged_training_pairs(tmp_path: Path) -> None:
    index = _run(tmp_path / "out", _beir(tmp_path / "fiqa"))
    assert _by_text(_records(index)) == [
        Record("ask 0", "T doc 1", "fiqa", "", "q0"),
        Record("ask 0", "doc 0", "fiqa", "", "q0"),
    ]
    (reject,) = _read_lines(tmp_path / "out" / "rejects.jsonl")
    assert (reject["line"], reject["reason"]) == (5, "missing passage")


def test_another_split_of_a_beir_folder_is_read_by_name(tmp_path: Path) -> None:
    index = _run(tmp_path / "out", _beir(tmp_path / "fiqa") / "qrels" / "test.tsv")
    assert _records(index) == [Record("ask 1", "T doc 3", "fiqa", "", "q1")]


def test_constants_fill_what_records_leave_open(tmp_path: Path) -> None:
    rows = [{"query": "a", "passage": "b", "lang": "fi"}, {"query": "c", "passage": "d", "instruction": "own"}]
    constants = {"source": "src", "lang": "sv", "instruction": "Find it", "symmetric": True}
    assert _packed(tmp_path, rows, **constants) == [
        Record("a", "b", "src", "fi", instruction="Find it", symmetric=True),
        Record("c", "d", "src", "sv", instruction="own", symmetric=True),
    ]


# What is left out


def test_texts_are_normalised(tmp_path: Path) -> None:
    rows = [{"query": "  Cafe\u0301\t au\n lait ", "passage": "\u00a0b\u3000c", "negatives": [" n\u0301 "]}]
    assert _packed(tmp_path, rows) == [Record("Caf\u00e9 au lait", "b c", "s", negatives=("\u0144",))]


def test_bad_records_are_counted_by_reason_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"query": f"q{n}", "passage": f"p{n}"} for n in range(20)]
    bad: list[tuple[Any, str]] = [
        (b"{cut\n", "invalid JSON"),
        (b'{"query": "a", "passage": "\xff"}\n', "invalid UTF-8"),
        ([1], "not an object"),
        ({"query": "q"}, "missing passage"),
        ({"passage": "p"}, "missing query"),
        ({"query": "q", "passage": "\u3000"}, "empty text"),
        ({"query": "q", "passage": 3}, "wrong type"),
        ({"query": "q", "passage": "p", "negatives": None}, "null list"),
        ({"query": "q", "passage": "p" * 100_001}, "text too long"),
        ({"query": "q"}, "missing passage"),
    ]
    file = _lines(tmp_path / "s.jsonl", [*good, *(row for row, _ in bad)])
    index = _run(tmp_path / "out", file)
    assert index.records == 20
    rejects = _read_lines(tmp_path / "out" / "rejects.jsonl")
    found = [(reject["file"], reject["line"], reject["reason"]) for reject in rejects]
    assert found == [(str(file), 21 + n, reason) for n, (_, reason) in enumerate(bad)]
    paper = orjson.loads((tmp_path / "out" / "pack.json").read_bytes())
    assert paper["input"][str(file)] == {"records": 20, "bad": dict(Counter(reason for _, reason in bad))}
    printed = capsys.readouterr().out
    assert any(line.split()[:3] == ["missing", "passage", "2"] and ":24" in line for line in printed.splitlines())


def test_rows_of_a_table_that_do_not_fit_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_bytes(b'query,passage\na,"b\nc"\nd,e,f\ng\n\nh,\ni,\xff\n')
    index = _run(tmp_path / "out", tmp_path / "s.csv", max_bad_fraction=1.0)
    assert _records(index) == [Record("a", "b c", "s")]
    rejects = _read_lines(tmp_path / "out" / "rejects.jsonl")
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (4, "not an object"),
        (5, "missing passage"),
        (7, "missing passage"),
        (8, "invalid UTF-8"),
    ]


def test_only_the_first_rejects_of_a_reason_are_written_out(tmp_path: Path) -> None:
    rows = [{"query": "q", "passage": f"p{n}"} for n in range(60)] + [{"query": "q"}] * 50
    _run(tmp_path / "out", _lines(tmp_path / "s.jsonl", rows))
    rejects = _read_lines(tmp_path / "out" / "rejects.jsonl")
    assert [reject["line"] for reject in rejects] == list(range(61, 81))


def test_duplicates_are_dropped_within_a_source_and_the_first_is_kept(tmp_path: Path) -> None:
    rows = [{"query": "q", "passage": f"p {n % 5}", "id": f"{n}"} for n in range(15)]
    rows.append({"query": "q ", "passage": "p\t0", "id": "same after normalising"})
    rows.append({"query": "q", "passage": "p 0", "source": "other"})
    records = _packed(tmp_path, rows)
    assert [(r.passage, r.source, r.id) for r in records if r.source == "s"] == [
        (f"p {n}", "s", f"{n}") for n in range(5)
    ]
    assert [r.source for r in records].count("other") == 1
    counts = orjson.loads((tmp_path / "out" / "pack.json").read_bytes())["sources"]
    assert (counts["s"]["duplicates"], counts["s"]["training"], counts["other"]["duplicates"]) == (11, 5, 0)


def test_limit_keeps_a_sample_of_every_source(tmp_path: Path) -> None:
    rows = [row | {"source": source} for source in ("a", "b") for row in _rows(pairs.pairs(50))]
    records = _packed(tmp_path, rows, limit=20)
    assert Counter(record.source for record in records) == {"a": 20, "b": 20}
    chosen = {record.id for record in records if record.source == "a"}
    assert chosen != {f"r-{n}" for n in range(20)}
    assert chosen != {record.id for record in _packed(tmp_path, rows, limit=20, seed=1, overwrite=True)}


# The held-out split


def _texts(records: Any) -> set[str]:
    return {text for record in records for text in (record.query, record.passage)}


def test_held_out_records_share_no_text_with_training(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"query": f"t {rng.randrange(900)}", "passage": f"t {rng.randrange(900)}"} for _ in range(400)]
    index = _run(tmp_path / "out", _lines(tmp_path / "s.jsonl", rows), holdout_fraction=0.1)
    held_out = [Record(**row) for row in _read_lines(tmp_path / "out" / "holdout.jsonl")]
    training = _records(index)
    assert not _texts(held_out) & _texts(training)
    assert 20 <= len(held_out) <= 40
    assert len(held_out) + len(training) == len({(row["query"], row["passage"]) for row in rows})


def test_the_split_has_its_share_of_every_source_and_language(tmp_path: Path) -> None:
    rows = [row | {"source": source} for source in ("a", "b") for row in _rows(pairs.pairs(400, seed=ord(source)))]
    _run(tmp_path / "out", _lines(tmp_path / "s.jsonl", rows), holdout_fraction=0.05)
    for source in ("a", "b"):
        held_out = _read_lines(tmp_path / "out" / "holdout" / f"{source}.jsonl")
        assert Counter(row["lang"] for row in held_out) == dict.fromkeys(pairs.LANGUAGES, 5)
    everything = (tmp_path / "out" / "holdout.jsonl").read_bytes()
    assert everything == b"".join((tmp_path / "out" / "holdout" / f"{s}.jsonl").read_bytes() for s in ("a", "b"))


def test_the_split_is_bounded_and_depends_on_the_seed(tmp_path: Path) -> None:
    file = _lines(tmp_path / "s.jsonl", _rows(pairs.pairs(400)))
    splits = []
    for seed in (0, 1):
        _run(tmp_path / f"out{seed}", file, holdout_fraction=0.2, holdout_max=7, seed=seed)
        splits.append(_read_lines(tmp_path / f"out{seed}" / "holdout.jsonl"))
    assert [len(split) for split in splits] == [28, 28]
    assert splits[0] != splits[1]


def test_a_text_that_all_share_stays_in_training(tmp_path: Path) -> None:
    giant = [{"query": "the same", "passage": f"g {n}"} for n in range(300)]
    rows = giant + [{"query": f"q {n}", "passage": f"p {n}"} for n in range(100)]
    index = _run(tmp_path / "out", _lines(tmp_path / "s.jsonl", rows), holdout_fraction=0.1)
    assert sum(record.query == "the same" for record in _records(index)) == 300
    assert len(_read_lines(tmp_path / "out" / "holdout.jsonl")) == 40


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=30))
def test_components_are_those_of_a_search(edges: list[tuple[int, int]]) -> None:
    """Against a search over the graph: same component if and only if one text can be reached from the other."""
    neighbours = defaultdict(set)
    for left, right in edges:
        neighbours[left].add(right)
        neighbours[right].add(left)
    smallest: dict[int, int] = {}
    for text in sorted(neighbours):
        queue = [text]
        while queue:
            found = queue.pop()
            if found not in smallest:
                smallest[found] = text
                queue.extend(neighbours[found])
    query, passage = (np.array([edge[side] for edge in edges], np.int64) for side in (0, 1))
    assert holdout.components(query, passage).tolist() == [smallest[left] for left, _ in edges]


def test_components_of_a_long_chain_are_one() -> None:
    texts = np.random.default_rng(0).permutation(100_000).astype(np.int64)
    assert set(holdout.components(texts[:-1], texts[1:]).tolist()) == {0}


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=200),
    st.sampled_from([0.05, 0.2, 0.5]),
    st.integers(0, 10),
    st.integers(0, 3),
)
def test_whole_components_are_chosen_within_every_share(
    rows: list[tuple[int, int]], fraction: float, maximum: int, seed: int
) -> None:
    component = np.array([number for number, _ in rows], np.int64)
    stratum = np.array([stratum for _, stratum in rows], np.int32)
    chosen = holdout.choose(component, stratum, fraction=fraction, maximum=maximum, seed=seed)
    assert not set(component[chosen]) & set(component[~chosen])
    for number in set(stratum):
        share = int(fraction * (stratum == number).sum() + 0.5)
        assert (chosen & (stratum == number)).sum() <= (min(share, maximum) if maximum else share)
    order = np.random.default_rng(0).permutation(len(rows))
    again = holdout.choose(component[order], stratum[order], fraction=fraction, maximum=maximum, seed=seed)
    assert (again == chosen[order]).all()


def test_no_component_that_fits_is_passed_over() -> None:
    rng = np.random.default_rng(0)
    component = np.repeat(rng.permutation(500), rng.integers(1, 5, 500)).astype(np.int64)
    stratum = rng.integers(0, 3, len(component)).astype(np.int32)
    chosen = holdout.choose(component, stratum, fraction=0.1)
    room = np.floor(0.1 * np.bincount(stratum) + 0.5) - np.bincount(stratum[chosen], minlength=3)
    for number in set(component[~chosen]):
        assert (np.bincount(stratum[component == number], minlength=3) > room).any()


# Order and shards


def test_the_result_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.readers.PART_BYTES", 20_000)
    rows = [row | {"source": f"s{n % 3}"} for n, row in enumerate(_rows(pairs.pairs(900)) + _rows(pairs.pairs(30)))]
    file = _lines(tmp_path / "p.jsonl", rows)
    indexes = [_run(tmp_path / f"w{n}", file, workers=n, holdout_fraction=0.1) for n in (1, 2)]
    assert indexes[0].shards == indexes[1].shards
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")} for name in ("w1", "w2"))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == ["pack.json"]  # it names the folder
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_records_are_shuffled_over_the_whole_source(tmp_path: Path) -> None:
    rows = [{"query": f"q {n}", "passage": f"p {n}", "id": str(n)} for n in range(2000)]
    files = [_lines(tmp_path / f"{n}.jsonl", rows[n * 500 : n * 500 + 500]) for n in range(4)]
    places = np.array([int(record.id) for record in _records(_run(tmp_path / "out", files, source="s"))])
    assert sorted(places) == list(range(2000))
    # the rank correlation of a random order of 2,000 has a standard deviation of 0.022
    assert abs(np.corrcoef(places, np.arange(2000))[0, 1]) < 0.1
    other = [int(record.id) for record in _records(_run(tmp_path / "other", files, source="s", seed=1))]
    assert abs(np.corrcoef(places, other)[0, 1]) < 0.1


def test_shards_have_their_size_and_no_record_is_lost_between_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"query": f"q {n}", "passage": "word " * rng.randrange(1, 800), "id": str(n)} for n in range(2000)]
    index = _run(tmp_path / "out", _lines(tmp_path / "s.jsonl", rows), shard_mib=1)
    assert sorted(int(record.id) for record in _records(index)) == list(range(2000))
    assert [shard.file for shard in index.shards] == [f"s-{n:06d}.tar" for n in range(len(index.shards))]
    sizes = [shard.bytes / (1 << 20) for shard in index.shards]
    assert 0.6 < min(sizes) <= max(sizes) < 1.4


def test_plain_shards_are_read_by_webdataset(tmp_path: Path) -> None:
    index = _run(tmp_path / "out", FORMS["pairs.jsonl"](tmp_path), format="plain", source="s")
    urls = [index.path(n) for n in range(len(index.shards))]
    read = [orjson.loads(sample["json"]) for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert read == [row | {"source": "s"} for row in _rows(_records(index))]
    assert len(read) == len(PAIRS)


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_stored_tokens_are_the_tokenizers_own(max_tokens: int, tmp_path: Path) -> None:
    tokenizer = tiny.unigram()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = [*pairs.pairs(30, negatives=2), Record("same", "same"), Record("same", "twice", negatives=("same",))]
    rows = [row | {"negatives": list(r.negatives)} for row, r in zip(_rows(records), records, strict=True)]
    file = _lines(tmp_path / "s.jsonl", rows)
    index = _run(tmp_path / "out", file, tokenizer=str(tmp_path / "tokenizer"), max_tokens=max_tokens)
    assert index.tokenizer is not None
    assert index.tokenizer["max_tokens"] == max_tokens
    seen = 0
    for block in _tables(index):
        assert block.schema.field("query_tokens").type == pa.list_(pa.uint16())
        for row in block.to_pylist():
            texts = [row["query"], row["passage"], *row["negatives"]]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"][: max_tokens or None] for text in texts]
            assert [row["query_tokens"], row["passage_tokens"], *row["negative_tokens"]] == ids
            seen += 1
    assert seen == len(records)


def test_a_tokenizer_is_trained_on_the_pairs_that_are_not_held_out(tmp_path: Path) -> None:
    rows = [*_rows(pairs.pairs(100)), {"query": "gr\u00fc\u00dfe \u16a0\u16c7", "passage": "\u16bb\u16eb"}]
    file = _lines(tmp_path / "s.jsonl", rows)
    index = _run(tmp_path / "out", file, train_tokenizer=True, vocab_size=500, holdout_fraction=0.1)
    tokenizer = pack._described(str(tmp_path / "out" / "tokenizer"), "tokenizer", Config(input="x", output="y"))
    assert index.tokenizer == tokenizer
    assert all("query_tokens" in block.column_names for block in _tables(index))
    again = _run(tmp_path / "again", file, train_tokenizer=True, vocab_size=500, holdout_fraction=0.1, workers=2)
    assert again.shards == index.shards


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 200))
def test_an_equal_share_is_as_large_as_it_can_be(available: list[int], wanted: int) -> None:
    share = _equal_share(np.array(available), wanted)
    assert share == 1 or sum(min(count, share) for count in available) <= wanted
    assert share >= max(available) or sum(min(count, share + 1) for count in available) > wanted


# Refusals


def test_the_output_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = FORMS["pairs.jsonl"](tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data.packing.write_holdout", stop)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    file = FORMS["pairs.jsonl"](tmp_path)
    _lines(tmp_path / ".out.partial" / "old-000000.tar", [{}])
    _lines(tmp_path / ".out.partial" / ".spill-x" / "0.arrow", [{}])
    index = _run(tmp_path / "out", file)
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {shard.file for shard in index.shards}
    assert not (tmp_path / ".out.partial").exists()


def test_an_output_in_the_way_is_kept_unless_it_is_an_old_pack(tmp_path: Path) -> None:
    file = FORMS["pairs.jsonl"](tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for overwrite, message in ((False, "is not empty"), (True, "holds no pack.json")):
        with pytest.raises(UserError, match=message):
            _run(tmp_path / "thesis", file, overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    _run(tmp_path / "out", file, source="first")
    with pytest.raises(UserError, match="set overwrite=true"):
        _run(tmp_path / "out", file)
    assert set(_run(tmp_path / "out", file, source="second", overwrite=True).sources) == {"second"}
    assert [path.name for path in (tmp_path / "out").glob("first*")] == []
    with pytest.raises(UserError, match="is a file"):
        _run(file, file)


def test_an_output_that_cannot_be_made_or_filled_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = FORMS["pairs.jsonl"](tmp_path)
    with pytest.raises(UserError, match=r"output=.*/x: cannot be written \(Not a directory"):
        _run(file / "x", file)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data.packing.write_holdout", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        _run(tmp_path / "out", file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_two_packs_into_one_output_do_not_mix(tmp_path: Path) -> None:
    file = FORMS["pairs.jsonl"](tmp_path)
    with (
        staged(tmp_path / "out", overwrite=False, mark="pack.json") as folder,
        pytest.raises(UserError, match="another process is writing it"),
    ):
        _run(folder.parent / "out", file)


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert _run(tmp_path / "out", FORMS["pairs.jsonl"](tmp_path)).records == len(PAIRS)


def test_a_pack_that_is_mostly_bad_stops_and_writes_nothing(tmp_path: Path) -> None:
    rows = [{"query": "q", "passage": "p"}] + [{"query": "q"}] * 3
    file = _lines(tmp_path / "s.jsonl", rows)
    with pytest.raises(DataError, match=r"3 of 4 records are bad \(3 missing passage\).*s\.jsonl:2"):
        _run(tmp_path / "out", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl"]
    assert _run(tmp_path / "out", file, max_bad_fraction=0.75).records == 1


def _damaged(write: Callable[[Path, Rows], Path], name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write(folder / name, _rows(pairs.pairs(300)))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return path

    return make


BAD_INPUTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: folder / "no.jsonl", "there is no such file or folder"),
    "glob": (lambda folder: folder / "*.jsonl", r"\*\.jsonl: no file matches"),
    "empty folder": (lambda folder: folder, "holds nothing to read"),
    "address": (lambda folder: "https://example.org/p.jsonl", "addresses are not read"),
    "kind": (lambda folder: _lines(folder / "p.xlsx", [b"x"]), "not a known kind of file"),
    "empty file": (lambda folder: _lines(folder / "p.jsonl", []), "has no rows with named columns"),
    "only a header": (lambda folder: _lines(folder / "p.csv", [b"query,passage\n"]), "holds no records"),
    "all bad": (lambda folder: _lines(folder / "p.csv", [b"query,passage\na,\n"]), "all of its 1 records are bad"),
    "columns": (lambda folder: _lines(folder / "p.jsonl", [{"title": "t", "body": "b"}]), "title, body; say which"),
    "cut gzip": (_damaged(_write_gz, "p.jsonl.gz"), r"p\.jsonl\.gz: cannot be read"),
    "cut zstd": (_damaged(_write_zst, "p.jsonl.zst"), r"p\.jsonl\.zst: cannot be read"),
    "cut parquet": (_damaged(_write_parquet, "p.parquet"), r"p\.parquet: cannot be read"),
    "cut arrow": (_damaged(_write_arrow_file, "p.arrow"), r"p\.arrow: cannot be read"),
    "cut json": (_damaged(_write_json, "p.json"), r"p\.json: cannot be read"),
    "html": (lambda folder: _lines(folder / "p.parquet", [b"<html>"]), r"p\.parquet: cannot be read"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_with_one_message_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    make, message = BAD_INPUTS[case]
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=message) as error:
        _run(tmp_path / "out", make(tmp_path / "in"), max_bad_fraction=1.0)
    assert "input=" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_mapped_column_that_is_nowhere_is_named_with_those_that_are(tmp_path: Path) -> None:
    file = _lines(tmp_path / "p.jsonl", [{"title": "t", "body": "b"}])
    with pytest.raises(UserError, match=r"columns\.query=titel: no such column; found are title, body"):
        _run(tmp_path / "out", file, columns={"query": "titel", "passage": "body"})


def test_a_dataset_without_a_training_split_asks_for_one(tmp_path: Path) -> None:
    datasets.DatasetDict(dev=datasets.Dataset.from_list(_rows(PAIRS))).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match="has no split train but dev"):
        _run(tmp_path / "out", tmp_path / "d")
    assert _run(tmp_path / "out", tmp_path / "d" / "dev").records == len(PAIRS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"output": ""}, "output: must be given"),
        ({"input": []}, "nothing to pack"),
        ({"columns": {"qury": "x"}}, r"columns\.qury: no such field"),
        ({"columns": {"query": ["a", "b"]}}, "only negatives may come from several"),
        ({"source": "a/b"}, "not usable as a file name"),
        ({"tokenizer": "t", "train_tokenizer": True}, "cannot go with train_tokenizer"),
        ({"tokenizer": "t", "format": "plain"}, "plain shards hold no tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(keys: dict[str, Any], message: str) -> None:
    (problem,) = Config(**{"input": "x", "output": "y", **keys}).check()
    assert re.search(message, problem)


# Workers


def test_a_worker_that_is_killed_is_reported_with_a_mend() -> None:
    with pytest.raises(UserError, match="workers=2: a process was killed"):
        run_jobs(os._exit, [1, 1], workers=2, title="dying")


def test_what_a_worker_raises_arrives() -> None:
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        run_jobs(math.sqrt, [4.0, -1.0, 9.0], workers=2, title="roots")
    assert run_jobs(math.sqrt, [4.0, 1.0, 9.0], workers=2, title="roots") == [2.0, 1.0, 3.0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_a_killed_parent() -> None:
    root = str(Path(__file__).parent.parent)
    code = f"import sys, time; sys.path.insert(0, {root!r})\nfrom data.workers import run_jobs\n"
    code += "run_jobs(time.sleep, [600, 600], workers=2, title='')"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        _wait_until(lambda: len(children.read_text().split()) == 3)  # two workers and Python's resource tracker
        left = children.read_text().split()
        parent.kill()
    _wait_until(lambda: not any(map(_is_alive, left)))


def _is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Index alone


def test_a_folder_of_plain_tars_gets_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with webdataset.ShardWriter(str(tmp_path / "wiki-%06d.tar"), maxcount=10, verbose=0) as writer:
        for number, row in enumerate(_rows(PAIRS)):
            writer.write({"__key__": f"{number:06d}", "json": row})
    pack.run(Config(input=str(tmp_path), index=True, workers=1))
    index = load_index(str(tmp_path))
    assert (tmp_path / "index.json").is_file()
    assert _by_text(_records(index)) == _by_text([Record(r.query, r.passage, "wiki", r.lang, r.id) for r in PAIRS])
    assert "wiki" in capsys.readouterr().out


def test_indexing_again_keeps_the_tokenizer(tmp_path: Path) -> None:
    tiny.unigram().save_pretrained(tmp_path / "tokenizer")
    keys = {"tokenizer": str(tmp_path / "tokenizer")}
    index = _run(tmp_path / "out", FORMS["pairs.jsonl"](tmp_path), **keys)
    pack.run(Config(input=str(tmp_path / "out"), index=True, workers=1))
    assert load_index(str(tmp_path / "out")) == index


def test_only_folders_of_tars_are_indexed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.tar file"):
        pack.run(Config(input=str(tmp_path), index=True))
    with pytest.raises(UserError, match="wants a folder"):
        pack.run(Config(input=str(tmp_path / "x.tar"), index=True))
    (tmp_path / "x.tar").write_bytes(os.urandom(2000))
    with pytest.raises(DataError, match="nothing is written"):
        pack.run(Config(input=str(tmp_path), index=True))
    assert not (tmp_path / "index.json").exists()


def test_a_table_puts_numbers_to_the_right() -> None:
    assert table(("name", "n"), [("a", "1"), ("bcdef", "1,234")]) == "name       n\na          1\nbcdef  1,234"
