"""A cross-encoder puts results in order: against its own logits pair by pair, and end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import teachers
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data.errors import NumericError
from launcher import cli
from trainer import sets
from trainer.crossencoder import open_teacher
from trainer.embed import encode
from trainer.rerank import rerank
from trainer.scoring import Scorer

ROWS = [{"query": text[:12], "passage": text} for text in tiny.TEXTS[:6]]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_the_first_results_come_by_their_logit_and_the_rest_stay(tmp_path: Path, held_out: Path) -> None:
    folder = teachers.bert(tmp_path / "teacher")
    (data,) = sets.load(str(held_out))
    scorer = Scorer(open_teacher(str(folder)), torch.device("cpu"), "fp32", 128)
    found = np.array([[3, 1, 0, 2], [0, 1, 2, -1], [5, -1, -1, -1], [4, 3, 2, 1], [0, 5, 1, 4], [2, 4, 0, 1]])
    got = rerank(scorer, data, found, 3)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for query, before, after in zip(data.queries, found.tolist(), got.tolist(), strict=True):
        logits = {}
        for number in before[:3]:
            inputs = tokenizer(query, data.passages[number], return_tensors="pt")
            with torch.no_grad():
                logits[number] = float(model(**inputs).logits) if number >= 0 else -np.inf
        assert after[:3] == sorted(before[:3], key=lambda number: -logits[number])
        assert after[3:] == before[3:]


def test_a_teacher_with_broken_weights_is_named(tmp_path: Path, held_out: Path) -> None:
    (data,) = sets.load(str(held_out))
    teacher = open_teacher(str(teachers.bert(tmp_path / "teacher")))
    with torch.no_grad():
        teacher.encoder.backbone.classifier.weight.fill_(torch.nan)
    with pytest.raises(NumericError, match="rerank=teacher: it gives"):
        rerank(Scorer(teacher, torch.device("cpu"), "fp32", 128), data, np.zeros((6, 2), np.int64), 2)


def test_evaluate_writes_the_figures_of_both_orders(tmp_path: Path, held_out: Path) -> None:
    teachers.bert(tmp_path / "teacher")
    tiny.bert(tmp_path / "model")
    words = [f"model={tmp_path / 'model'}", f"data={held_out}", f"output={tmp_path / 'out'}", "device=cpu"]
    assert cli.main(["evaluate", *words, f"rerank={tmp_path / 'teacher'}", "rerank_depth=6"]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text()).values()
    assert result["reranked"].keys() == {*result} - {"reranked", "bm25"}
    # All six passages are read, so the order is the teacher's alone.
    teacher = open_teacher(str(tmp_path / "teacher"))
    ranks = []
    for number, row in enumerate(ROWS):
        rows = teacher.pairs.encode([row["query"]] * len(ROWS), [other["passage"] for other in ROWS])
        logits = encode(teacher.encoder, rows)[:, 0]
        ranks.append(1 + int((logits > logits[number]).sum()))
    assert result["reranked"]["mrr_at_10"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    about = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (about["rerank"], about["rerank_depth"]) == (str(tmp_path / "teacher"), 6)
