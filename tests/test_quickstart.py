"""The commands of docs/quickstart.md, typed one after the other, lead from a file of pairs to a model that searches."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest
from pages import ROOT, commands
from pairs import pairs

from launcher import cli

# what makes the page's commands short; the page's own words stand before these
SIZES = {
    "pack": ["workers=1", "vocab_size=600", "holdout_fraction=0.1"],
    "pretrain": [
        *("steps=6", "warmup_steps=2", "batch_size=64", "save_every_steps=3", "eval.every_steps=3", "log_every=1"),
        *("model.hidden_size=32", "model.heads=2", "model.intermediate_size=64", "wandb.mode=disabled", "device=cpu"),
    ],
    "evaluate": ["device=cpu"],
    "search": ["device=cpu"],
    "report": ["device=cpu"],
}


def test_the_quickstart_runs_from_pairs_to_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rows = [{"query": pair.query, "passage": pair.passage, "lang": pair.lang} for pair in pairs(600)]
    (tmp_path / "quickstart/pairs").mkdir(parents=True)
    (tmp_path / "quickstart/pairs/mine.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))

    lines = [command.words[1:] for command in commands(ROOT / "docs/quickstart.md") if command.words[0] == "quintet"]
    typed = [words for words in lines if words[0] != "collect"]  # the pairs are there; it would read what is installed
    said = {}
    for words in typed:
        sizes = SIZES.get(words[1] if words[0] == "doctor" else words[0], [])
        assert cli.main([*words, *sizes]) == 0, capsys.readouterr().err
        said[words[0]] = capsys.readouterr().out

    assert list(said) == ["pack", "doctor", "pretrain", "evaluate", "export", "search", "report"]
    scores = json.loads((tmp_path / "quickstart/run/results.json").read_text(encoding="utf-8"))["holdout"]
    assert scores["queries"] >= 30
    assert "bm25" in scores
    assert (tmp_path / "quickstart/model/modules.json").is_file()
    assert (tmp_path / "quickstart/run/report.html").is_file()
    assert said["search"].count("\n  ") == 3  # top_k=3
    assert all(row in said["doctor"] for row in ("data ", "model ", "eval ", "lanes ", "memory ", "disk "))
