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
from launcher import cli
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


def test_labels_of_the_rows_are_shown_before_the_text_and_of_equal_texts_the_first(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": TEXTS[0], "lang": "en", "source": "dogs"},
        {"text": TEXTS[0] + "  ", "lang": "xx"},
        {"passage": TEXTS[2], "lang": "ja", "source": 7},
        {"text": TEXTS[3]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    search.run(_config(model, tmp_path / "rows.jsonl", query="dog"))
    lines = capsys.readouterr().out.strip().splitlines()[1:]
    assert sorted(line[12:] for line in lines) == sorted(
        [f"en dogs  {TEXTS[0]}", f"ja       {TEXTS[2]}", f"         {TEXTS[3]}"]
    )


def test_two_models_answer_each_with_its_own_prompts_and_point_at_each_other(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.xlmr(tmp_path / "other")
    (other / "quintet.json").write_text(json.dumps({"query_prompt": "Q ", "passage_prompt": ""}), encoding="utf-8")
    search.run(_config(model, _lines(tmp_path), compare=str(other), query="dog", top_k=3))
    blocks = [block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n")]
    assert blocks[0] == ["dog"]
    best = []
    for name, query, passage in ((model, "query: ", "passage: "), (str(other), "Q ", "")):
        opened = open_model(name)
        scores = encode_texts(opened, TEXTS, passage) @ encode_texts(opened, ["dog"], query)[0]
        best.append([TEXTS[number] for number in scores.argsort(descending=True).tolist()[:3]])
    shared = len(set(best[0]) & set(best[1]))
    assert [block[0] for block in blocks[1:]] == [
        f"{name}: {shared} of 3 are among the other's, too" for name in (model, str(other))
    ]
    for block, own, elsewhere in zip(blocks[1:], best, reversed(best), strict=True):
        marks = [f"={elsewhere.index(text) + 1:<3d}" if text in elsewhere else "    " for text in own]
        assert [line[12:] for line in block[1:]] == [f"{mark}  {text}" for mark, text in zip(marks, own, strict=True)]


def test_a_passage_cannot_steer_the_terminal(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("red \x1b[31m text\x07 שלום\n", encoding="utf-8")
    search.run(_config(model, tmp_path / "texts.txt", query="a\x1b[2Jb"))
    heading, line = capsys.readouterr().out.strip().splitlines()
    assert heading == "a\ufffd[2Jb"
    assert line.endswith("red \ufffd[31m text\ufffd שלום")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["query="], "query: a question is empty"),
        (["query=[a, ' ']"], "query: a question is empty"),
        (["query=a", "serve=true"], "leave one of them out"),
        (["compare=m"], "compare=m: that is the model itself"),
        (["port=65536"], "port=65536"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_mend(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["search", "model=m", "input=i", *words]) == 2
    assert message in capsys.readouterr().err


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
    monkeypatch.setattr("trainer.embed.encode", lambda encoder, tokens, **more: torch.full((len(tokens), 2), torch.nan))
    with pytest.raises(NumericError, match="broken"):
        search.run(_config(model, _lines(tmp_path), query="x"))


def test_questions_that_are_no_utf8_are_told(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("größer\n".encode("latin-1")), encoding="utf-8"))
    with pytest.raises(UserError, match=r"the standard input is no UTF-8 \("):
        search.run(_config(model, _lines(tmp_path)))
