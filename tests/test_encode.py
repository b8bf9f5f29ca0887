"""Texts and shards to vectors: whose, in which order, under which id; ranks and kills change nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import kills
import numpy as np
import pairs
import pyarrow as pa
import pytest
import ranks
import tiny
import torch
from transformers import AutoModel, AutoTokenizer

from data.records import Record
from launcher.cli import main
from trainer import encode

TEXTS = [
    "the river runs",
    "a stone",
    "Wie stelle ich die Heizung ein?",
    "温度を設定します",
    "fox " * 80,
    "the river runs",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a file of texts, and shards of two sources."""
    root = tmp_path_factory.mktemp("encode")
    tiny.bert(root / "bert")
    (root / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    for source in ("alpha", "beta"):
        records = [Record(r.query, r.passage, source, r.lang, r.id if n % 2 else "") for n, r in _numbered(source)]
        pairs.write_shards(
            root / "shards" / source, records, source=source, kind="plain" if source == "beta" else "block"
        )
    return root


def _numbered(source: str) -> list[tuple[int, Record]]:
    return list(enumerate(pairs.pairs(30, seed=len(source), source=source)))


def _peer(folder: Path, texts: list[str], prompt: str) -> np.ndarray:
    """The mean of the last layer over a text's tokens, at length 1: in float64, each text alone, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    model = AutoModel.from_pretrained(folder / "bert").double().eval()
    rows = []
    for text in texts:
        tokens = tokenizer(prompt + text, truncation=True, max_length=70, return_tensors="pt")
        with torch.no_grad():
            mean = model(**tokens).last_hidden_state[0].mean(0)
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def _config(folder: Path, output: Path, **changes: Any) -> encode.Config:
    values = {"model": str(folder / "bert"), "input": str(folder / "texts.txt"), "output": str(output), "device": "cpu"}
    return encode.Config(**{**values, "tokens_per_chunk": 256, **changes})


def _digests(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.iterdir())}


def _ids(output: Path) -> list[str]:
    return [json.loads(line) for line in (output / "ids.jsonl").read_text().splitlines()]


def test_a_text_file_gives_a_row_for_each_line_as_another_library_encodes_it(folder: Path, tmp_path: Path) -> None:
    for side in ("query", "passage"):
        encode.run(_config(folder, tmp_path / side, side=side))
        vectors = np.load(tmp_path / side / "vectors.npy")
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, _peer(folder, TEXTS, f"{side}: "), atol=2e-6)
        assert _ids(tmp_path / side) == ["1", "2", "3", "4", "5", "6"]


def test_rows_of_jsonl_and_of_beir_keep_their_ids_and_the_side_chooses_the_text(folder: Path, tmp_path: Path) -> None:
    rows = [{"id": "x", "query": TEXTS[0], "passage": TEXTS[1]}, {"query": TEXTS[2], "passage": TEXTS[3]}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    encode.run(_config(folder, tmp_path / "q", input=str(tmp_path / "pairs.jsonl"), side="query", prompt=""))
    np.testing.assert_allclose(
        np.load(tmp_path / "q" / "vectors.npy"), _peer(folder, [TEXTS[0], TEXTS[2]], ""), atol=2e-6
    )
    assert _ids(tmp_path / "q") == ["x", "3"]
    (tmp_path / "beir").mkdir()
    (tmp_path / "beir" / "corpus.jsonl").write_text(json.dumps({"_id": "d", "title": "Stone", "text": "runs"}))
    (tmp_path / "beir" / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "stone?"}))
    for side, text in (("query", "stone?"), ("passage", "Stone runs")):
        encode.run(_config(folder, tmp_path / f"{side}.npy", input=str(tmp_path / "beir"), side=side))
        np.testing.assert_allclose(np.load(tmp_path / f"{side}.npy"), _peer(folder, [text], f"{side}: "), atol=2e-6)


def test_shards_give_a_row_for_each_record_in_arrow_blocks_with_ids(folder: Path, tmp_path: Path) -> None:
    shards = [str(folder / "shards" / source) for source in ("alpha", "beta")]
    encode.run(_config(folder, tmp_path / "out", input=shards, side="query", format="arrow", dtype="float16"))
    files = sorted((tmp_path / "out").glob("*.arrow"))
    assert len(files) == 2
    table = pa.concat_tables([pa.ipc.open_file(str(file)).read_all() for file in files])
    records = [(source, *numbered) for source in ("alpha", "beta") for numbered in _numbered(source)]
    assert table["id"].to_pylist() == [r.id if n % 2 else f"{source}/{n}" for source, n, r in records]
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, 32)
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(vectors, _peer(folder, [r.query for _, _, r in records], "query: "), atol=3e-4)


def _small_blocks(folder: Path, output: Path) -> None:
    """Encode in blocks of 7 texts."""
    from trainer import vectors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "BLOCK", 7)
        encode.run(_config(folder, output, input=str(folder / "lines.txt"), dtype="float16"))


def test_two_ranks_and_any_number_of_kills_write_the_same_files(folder: Path, tmp_path: Path) -> None:
    (folder / "lines.txt").write_text("\n".join(f"stone number {n} " + "fox " * (n % 9) for n in range(50)))
    _small_blocks(folder, tmp_path / "one")
    ranks.run(_small_blocks, 2, tmp_path, folder, tmp_path / "two")
    finished = kills.until_done(
        _small_blocks, folder, tmp_path / "killed", log=tmp_path / "log", preload="trainer.vectors"
    )
    assert len(finished) == len(set(finished)) >= 8
    assert _digests(tmp_path / "one") == _digests(tmp_path / "two") == _digests(tmp_path / "killed")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no/such/model"}, "no/such/model"),
        ({"input": "nothing.txt"}, "input=nothing.txt: no such file or folder"),
        ({"input": "{empty}"}, "there is no text in it"),
        ({"output": "{here}"}, "name another folder"),
        ({"output": "{here}/texts.txt.npy", "format": "arrow"}, "Arrow blocks need a folder"),
        ({"input": "{bad}"}, "line 2: a row is an object with a `text` or a `passage`"),
    ],
)
def test_mistakes_are_one_message(
    folder: Path, tmp_path: Path, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": "not"}\n')
    places = {"here": str(folder), "empty": str(tmp_path / "empty.txt"), "bad": str(tmp_path / "bad.jsonl")}
    values = {"model": folder / "bert", "input": folder / "texts.txt", "output": tmp_path / "out", **change}
    assert main(["encode", *(f"{name}={str(value).format(**places)}" for name, value in values.items())]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_is_there_is_replaced_only_on_request(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model={folder / 'bert'}", f"input={folder / 'texts.txt'}", f"output={tmp_path / 'x.npy'}"]
    assert main(["encode", *words]) == 0
    assert main(["encode", *words, "side=query"]) == 2
    assert "set overwrite=true" in capsys.readouterr().err
    before = np.load(tmp_path / "x.npy")
    assert main(["encode", *words, "side=query", "overwrite=true"]) == 0
    assert not np.allclose(np.load(tmp_path / "x.npy"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
