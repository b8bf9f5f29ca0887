"""Collections of passages: which texts are in them, in which order, and whose vectors they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import pytest
import tiny
import torch

from data import mixture
from data.errors import UserError
from data.parts import Parts
from data.records import Record, text_hash
from trainer import corpus
from trainer.embed import Embedder, load_model


def _records(count: int, seed: int) -> list[Record]:
    """Records of which some share their passage, once with other spaces around its words."""
    records = pairs.pairs(count, seed=seed)
    again = [Record(r.query + " again", f" {r.passage} ", r.source, r.lang) for r in records[: count // 4]]
    return records + again


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of shards, and a model."""
    root = tmp_path_factory.mktemp("corpus")
    for source, kind, seed in (("alpha", "block", 1), ("beta", "plain", 2)):
        pairs.write_shards(root / source, _records(60, seed), source=source, kind=kind, shard_bytes=4000)
    tiny.bert(root / "bert")
    return root


def _data(folder: Path) -> mixture.Mixture:
    return mixture.load([str(folder / "alpha"), str(folder / "beta")])


def _embedder(folder: Path) -> Embedder:
    return Embedder(load_model(str(folder / "bert"), torch.device("cpu")), torch.device("cpu"), tokens_per_chunk=256)


def test_the_first_of_equal_texts_stands_for_them_in_the_order_of_the_data(folder: Path, tmp_path: Path) -> None:
    passages = corpus.collect(Parts(tmp_path / "work", {}), "pool", _data(folder))
    wanted: dict[int, tuple[str, str]] = {}
    for source, seed in (("alpha", 1), ("beta", 2)):
        for number, record in enumerate(_records(60, seed)):
            wanted.setdefault(text_hash(record.passage), (record.passage, f"{source}/{number}"))
    everything = range(len(passages))
    assert passages.hashes.tolist() == list(wanted)
    assert list(zip(passages.texts(everything), passages.ids(everything), strict=True)) == list(wanted.values())


def test_a_sample_is_of_distinct_texts_each_as_likely_as_another(folder: Path, tmp_path: Path) -> None:
    drawn = [
        corpus.collect(Parts(tmp_path / f"work{seed}", {}), "pool", _data(folder), sample=30, seed=seed).hashes
        for seed in range(24)
    ]
    assert all(len(np.unique(hashes)) == 30 for hashes in drawn)
    assert not np.array_equal(np.sort(drawn[0]), np.sort(drawn[1]))
    # 24 draws of 30 out of 120 are 6 for each text; those that stand in the data twice are no likelier.
    twice = {text_hash(record.passage) for seed in (1, 2) for record in _records(60, seed)[:15]}
    counts = np.unique(np.concatenate(drawn), return_counts=True)
    of_twice = [count for value, count in zip(*counts, strict=True) if value in twice]
    assert 4.5 < sum(of_twice) / len(twice) < 7.5
    # and a text's place says nothing about where it stands in the data
    whole = corpus.collect(Parts(tmp_path / "whole", {}), "pool", _data(folder))
    places = np.mean([whole.numbers_of(hashes)[:10].mean() for hashes in drawn])
    assert 50 < places < 70


def test_a_sample_larger_than_the_data_is_all_of_it(folder: Path, tmp_path: Path) -> None:
    whole = corpus.collect(Parts(tmp_path / "whole", {}), "pool", _data(folder))
    sample = corpus.collect(Parts(tmp_path / "work", {}), "pool", _data(folder), sample=10_000)
    assert sorted(sample.hashes) == sorted(whole.hashes)


def test_vectors_are_those_of_the_prompted_texts(folder: Path, tmp_path: Path) -> None:
    parts = Parts(tmp_path / "work", {})
    file = tmp_path / "mixture.yaml"
    file.write_text(f"sources: {{a: {{shards: {folder / 'alpha'}, symmetric: true, instruction: Match it}}}}")
    passages = corpus.collect(parts, "pool", mixture.load(str(file)), sample=20, seed=1)
    embedder = _embedder(folder)
    vectors = corpus.embed(parts, "pool", passages, embedder, block=7)
    alone = [embedder([f"Instruct: Match it\nQuery: {text}"])[0] for text in passages.texts(range(20))]
    torch.testing.assert_close(vectors[0:20], torch.stack(alone), rtol=0, atol=1e-6)
    halves = corpus.embed(Parts(tmp_path / "half", {}), "pool", passages, embedder, dtype="float16")
    assert halves.rows.dtype == np.float16
    # Blocks are cut otherwise here, so last bits differ, and a number between two of float16 may go either way.
    torch.testing.assert_close(halves[3:9], vectors[3:9], rtol=2**-11, atol=1e-6)


def test_documents_of_a_beir_folder_and_of_a_file_are_distinct_and_keep_their_ids(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"_id": "d1", "title": "River", "text": "A river  runs."},
        {"_id": "d2", "title": "", "text": "Stone."},
        {"_id": "d3", "title": "River", "text": "A river runs."},
        {"_id": "d4", "title": "", "text": " "},
    ]
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = corpus.collect(Parts(tmp_path / "work", {}), "corpus", str(tmp_path / "beir"))
    assert passages.texts([0, 1]) == ["River A river runs.", "Stone."]
    assert passages.ids([0, 1]) == ["d1", "d2"]
    assert len(passages) == 2
    (tmp_path / "lines.txt").write_text("one\n\ntwo\none\n")
    lines = corpus.collect(Parts(tmp_path / "work2", {}), "corpus", str(tmp_path / "lines.txt"))
    assert (lines.texts([0, 1]), lines.ids([0, 1]), len(lines)) == (["one", "two"], ["1", "3"], 2)
    assert lines.numbers_of(np.array([text_hash("two"), text_hash("three"), text_hash("one")])).tolist() == [1, -1, 0]


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n \n")
    parts = Parts(tmp_path / "work", {})
    with pytest.raises(UserError, match=r"lines\.txt: there is no text in it"):
        corpus.collect(parts, "corpus", str(tmp_path / "lines.txt"))
    assert not parts.has("corpus.arrow")
