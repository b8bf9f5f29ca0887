"""The stage `search` ranks what it is given, for questions from the configuration or the standard input."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from data.errors import NumericError, UserError
from trainer import search
from trainer.embed import encode_texts
from trainer.encoder import open_model

TEXTS = ["the lazy dog", "temperature of the living room", "温度を設定します", "the quick brown fox"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny.bert(tmp_path / "model"))


def _lines(folder: Path) -> Path:
    (folder / "texts.txt").write_text("\n".join([*TEXTS, "", TEXTS[0]]) + "\n", encoding="utf-8")
    return folder / "texts.txt"


def _texts(folder: Path) -> Path:
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    return folder / "texts.jsonl.gz"


def _pairs(folder: Path) -> Path:
    rows = [json.dumps({"query": "?", "passage": text}) for text in [*TEXTS, TEXTS[2]]]
    (folder / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "pairs.jsonl"


def _beir(folder: Path) -> Path:
    (folder / "beir").mkdir()
    rows = [json.dumps({"_id": i, "title": t.split()[0], "text": " ".join(t.split()[1:])}) for i, t in enumerate(TEXTS)]
    (folder / "beir" / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "beir"


def _config(model: str, place: Path, **changes: object) -> search.Config:
    return search.Config(**{"model": model, "input": str(place), "device": "cpu", **changes})


@pytest.mark.parametrize("make", [_lines, _texts, _pairs, _beir])
def test_passages_come_by_falling_inner_product_each_once(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path]
) -> None:
    search.run(_config(model, make(tmp_path), query="where is the dog", top_k=10))
    heading, *lines = capsys.readouterr().out.strip().splitlines()
    opened = open_model(model)
    scores = encode_texts(opened, TEXTS, "passage: ") @ encode_texts(opened, ["where is the dog"], "query: ")[0]
    order = scores.argsort(descending=True).tolist()
    assert heading == "where is the dog"
    assert [line.split(maxsplit=2)[2] for line in lines] == [TEXTS[number] for number in order]
    printed = [float(line.split()[1]) for line in lines]
    assert printed == pytest.approx(scores[order].tolist(), abs=6e-4)


def test_questions_are_taken_from_the_standard_input_until_it_ends(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("first question\n\nsecond question"))
    search.run(_config(model, _lines(tmp_path), top_k=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [lines[0], lines[2]] == ["first question", "second question"]
    assert len(lines) == 4


def test_several_questions_may_be_configured(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    search.run(_config(model, _lines(tmp_path), query=["one", "two"], top_k=2))
    assert len([line for line in capsys.readouterr().out.splitlines() if line]) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"\n  \n", "no text in it"),
        ("latin.txt", "Straße\n".encode("latin-1"), "line 1: no UTF-8"),
        ("odd.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: a row is an object"),
        ("torn.jsonl", b'{"text": "a\n', "line 1: no JSON"),
    ],
)
def test_bad_input_is_named_with_its_place(
    tmp_path: Path, model: str, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        search.run(_config(model, tmp_path / name, query="x"))
    assert name in str(caught.value)


def test_broken_weights_are_no_ranking(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trainer.embed.encode_texts", lambda model, texts, *rest, **more: torch.full((len(texts), 2), torch.nan)
    )
    with pytest.raises(NumericError, match="broken"):
        search.run(_config(model, _lines(tmp_path), query="x"))
