"""Fine-tuning as a user meets it: scores and their absence, negatives that turn, resuming, refusals, what comes out."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import jobs
import numpy as np
import pairs
import pytest
import tiny
import torch
from safetensors.torch import load_file

from data.records import Record, text_hash
from data.scores import ScoreWriter
from data.targets import Targets
from launcher import cli

TEACHER = "0" * 32
RECORDS = pairs.pairs(48, negatives=5)


def write_scores(folder: Path, records: list[Record], teacher: str = TEACHER) -> Path:
    """A cache in which a positive has a logit near 3, and negatives near 0, by their hashes."""
    writer = ScoreWriter(folder, teacher)
    for record in records:
        passages = np.array([text_hash(text) for text in (record.passage, *record.negatives)])
        logits = (passages % 1000 / 500).astype(np.float32) + np.r_[2, [-1] * len(record.negatives)].astype(np.float32)
        writer.add(np.full(len(passages), text_hash(record.query)), passages, logits)
    writer.flush()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("finetune")
    tiny.bert(made / "bert")
    pairs.write_shards(made / "shards", RECORDS, block_records=8)
    write_scores(made / "scores", RECORDS)
    return made


def finetune(folder: Path, *, export: bool = False, **changes: Any) -> int:
    """`quintet finetune` in this process: 3 steps are one pass, so the negatives change every third step.

    The export at its end takes half of the time, and most tests do not ask for it.
    """
    values = {
        "scores": folder / "scores",
        "negatives": 2,
        "temperature": 0.05,
        "steps": 8,
        "warmup_steps": 2,
        **changes,
    }
    with nullcontext() if export else mock.patch("trainer.loop._export"):
        return cli.main(["finetune", *jobs.settings(folder, **values)])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run_dir / "checkpoints").glob("step-*"))[-1] / "model/model.safetensors")


def test_the_loss_is_the_teachers_term_and_alpha_times_the_contrastive_one(folder: Path, tmp_path: Path, capsys):
    assert finetune(folder, run_dir=tmp_path / "run", alpha=0.3, export=True) == 0
    rows = jobs.steps(tmp_path / "run")
    assert sorted(rows) == list(range(1, 9))
    for row in rows.values():
        parts = row["train/loss_distill"] + 0.3 * row["train/loss_contrastive"]
        assert row["train/loss"] == pytest.approx(parts, rel=1e-5)
        assert (row["data/scored_frac"], row["data/samples_unscored"]) == (1.0, 0)
    shown = capsys.readouterr()
    assert "16 queries x 48 candidates, 47 negatives a query" in shown.out + shown.err
    assert TEACHER in shown.out + shown.err
    reopened = pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(tmp_path / "run/model"), device="cpu"
    )
    assert reopened.prompts["query"] == "query: "


def test_a_run_that_goes_on_from_a_checkpoint_is_the_same_bit_for_bit(folder: Path, tmp_path: Path):
    """With dropout, scores and negatives that have turned twice between the checkpoint and the end."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert finetune(folder, run_dir=whole, save_every_steps=2, keep_last=9) == 0
    shutil.copytree(whole, resumed)
    for step in (4, 6, 8):
        shutil.rmtree(resumed / f"checkpoints/step-{step:08d}")
    assert finetune(folder, run_dir=resumed, save_every_steps=2, keep_last=9) == 0
    again = [row for row in jobs.metrics(resumed) if row["run/attempt"] == 2 and "train/loss" in row]
    first = jobs.steps(whole)
    assert [row["train/step"] for row in again] == [3, 4, 5, 6, 7, 8]
    for row in again:
        for name in (
            "train/loss",
            "train/loss_distill",
            "train/loss_contrastive",
            "train/grad_norm",
            "data/batch_hash",
        ):
            assert row[name] == first[row["train/step"]][name]
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_source_without_teacher_takes_the_contrastive_term_alone(folder: Path, tmp_path: Path):
    nli = pairs.pairs(20, seed=3, source="nli", negatives=2)
    pairs.write_shards(tmp_path / "nli", nli, source="nli")
    (tmp_path / "mix.yaml").write_text(
        f"sources: {{nli: {{shards: nli, scores: false, symmetric: true}}, qa: {{shards: {folder / 'shards'}}}}}"
    )
    assert finetune(folder, run_dir=tmp_path / "run", data=tmp_path / "mix.yaml") == 0
    rows = jobs.steps(tmp_path / "run").values()
    assert {row["data/scored_frac"] for row in rows} == {0.0, 1.0}
    assert all((row["train/loss_distill"] == 0.0) == (row["data/scored_frac"] == 0.0) for row in rows)


# --- scores that are missing ------------------------------------------------------------------------------------------


def test_a_missing_score_ends_the_run_with_code_2_and_names_a_record(folder: Path, tmp_path: Path, capsys):
    write_scores(tmp_path / "scores", RECORDS[:-1])
    assert finetune(folder, run_dir=tmp_path / "run", scores=tmp_path / "scores") == 2
    message = capsys.readouterr().err
    assert "no score for record 47 of source pairs" in message
    assert "missing_scores" in message
    assert "Traceback" not in message


def test_missing_scores_are_counted_where_they_are_allowed(folder: Path, tmp_path: Path):
    write_scores(tmp_path / "scores", RECORDS[:-8])
    changes = {"scores": tmp_path / "scores", "missing_scores": "contrastive", "steps": 3}
    assert finetune(folder, run_dir=tmp_path / "run", **changes) == 0
    rows = jobs.steps(tmp_path / "run")
    assert rows[3]["data/samples_unscored"] == 8, "one pass over the data meets each of them once"
    assert sum(row["data/scored_frac"] for row in rows.values()) == pytest.approx(3 - 8 / 16)


def test_a_run_waits_for_the_scores_of_a_worker(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The worker has written nothing when the run begins, and finishes while it waits."""
    refresh, calls = Targets.refresh, []

    def work(targets: Targets) -> None:
        calls.append(1)
        write_scores(tmp_path / "scores", RECORDS[12 * len(calls) - 12 : 12 * len(calls)])
        refresh(targets)

    monkeypatch.setattr(Targets, "refresh", work)
    monkeypatch.setattr("trainer.loop._POLL_SECONDS", 0.01)
    changes = {"scores": tmp_path / "scores", "teacher_fingerprint": TEACHER, "missing_scores": "wait"}
    assert finetune(folder, run_dir=tmp_path / "run", **changes) == 0
    assert finetune(folder, run_dir=tmp_path / "complete") == 0
    assert len(calls) > 3, "every step of the first pass lacks some until the last records are scored"
    waited, complete = jobs.steps(tmp_path / "run"), jobs.steps(tmp_path / "complete")
    assert [row["train/loss"] for row in waited.values()] == [row["train/loss"] for row in complete.values()]


def test_a_wait_that_is_too_long_ends_with_code_2(folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.loop._POLL_SECONDS", 0.01)
    write_scores(tmp_path / "scores", RECORDS[:3])
    changes = {"scores": tmp_path / "scores", "missing_scores": "wait", "scores_wait_minutes": 0.001}
    assert finetune(folder, run_dir=tmp_path / "run", **changes) == 2
    message = capsys.readouterr().err
    assert "scores_wait_minutes=0.001" in message
    assert "running on these shards?" in message


def test_a_run_that_waits_can_be_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_scores(tmp_path / "scores", RECORDS[:3])
    monkeypatch.setattr("trainer.loop._POLL_SECONDS", 0.01)
    monkeypatch.setattr(Targets, "refresh", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    changes = {"scores": tmp_path / "scores", "missing_scores": "wait"}
    assert finetune(folder, run_dir=tmp_path / "run", **changes) == 75
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 75


def test_without_a_teacher_the_contrastive_loss_is_all(folder: Path, tmp_path: Path):
    assert finetune(folder, run_dir=tmp_path / "run", scores="", missing_scores="contrastive", steps=3) == 0
    for row in jobs.steps(tmp_path / "run").values():
        assert row["train/loss"] == row["train/loss_contrastive"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"negatives": 6}, ["negatives=6", "has only 5", "negatives=5 or less"]),
        ({"negatives": 0}, ["negatives=0", "distillation"]),
        ({"scores": ""}, ["scores", "missing_scores=contrastive"]),
        ({"scores": "nowhere"}, ["scores=nowhere", "quintet distill"]),
        ({"scores": "nowhere", "missing_scores": "wait"}, ["scores=nowhere", "teacher_fingerprint"]),
        ({"teacher_fingerprint": "1" * 32}, ["1" * 32, TEACHER]),
        ({"teacher_fingerprint": "../x", "missing_scores": "wait"}, ["teacher_fingerprint=../x"]),
        ({"objective": "contrastive"}, ["objective", "distillation"]),
        ({"loss.matryoshka.sizes": "[8,32]"}, ["loss.matryoshka.sizes=[8, 32]", "32 numbers"]),
        ({"loss.matryoshka.sizes": "[8,8]"}, ["loss.matryoshka.sizes=[8, 8]"]),
        ({"loss.matryoshka.sizes": "[8]", "loss.matryoshka.weights": "[1,1]"}, ["loss.matryoshka.weights=[1.0, 1.0]"]),
        ({"loss.guide.path": "nowhere"}, ["nowhere"]),
        ({"loss.guide.weight": 1}, ["loss.guide.weight=1: needs a guide"]),
        ({"loss.distill": "js"}, ["loss.distill", "margin_mse"]),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_message_that_names_it(
    changes: dict[str, Any], words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert finetune(folder, run_dir=tmp_path / "run", **changes) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_shards_without_negatives_are_refused(folder: Path, tmp_path: Path, capsys):
    pairs.write_shards(tmp_path / "bare", pairs.pairs(48))
    assert finetune(folder, run_dir=tmp_path / "run", data=tmp_path / "bare") == 2
    message = capsys.readouterr().err
    assert "has only 0" in message
    assert "quintet mine" in message


def test_scores_of_two_teachers_are_never_mixed(folder: Path, tmp_path: Path, capsys):
    """Neither at the start of a run, where one must be named, nor in its middle."""
    scores = write_scores(tmp_path / "scores", RECORDS)
    assert finetune(folder, run_dir=tmp_path / "run", scores=scores, steps=3) == 0
    write_scores(scores, RECORDS, "f" * 32)
    assert finetune(folder, run_dir=tmp_path / "run", scores=scores, steps=6) == 2
    message = capsys.readouterr().err
    assert TEACHER in message
    assert "f" * 32 in message
    changes = {"scores": scores, "teacher_fingerprint": "f" * 32, "steps": 6}
    assert finetune(folder, run_dir=tmp_path / "run", **changes) == 2
    assert f"teacher {TEACHER} -> {'f' * 32}" in capsys.readouterr().err


def test_another_number_of_negatives_is_refused_on_resume(folder: Path, tmp_path: Path, capsys):
    assert finetune(folder, run_dir=tmp_path / "run", steps=3) == 0
    assert finetune(folder, run_dir=tmp_path / "run", steps=6, negatives=3) == 2
    assert "negatives 2 -> 3" in capsys.readouterr().err


def test_a_guide_with_another_tokenizer_or_size_is_refused(folder: Path, tmp_path: Path, capsys):
    guide = tiny.xlmr(tmp_path / "xlmr")
    assert finetune(folder, run_dir=tmp_path / "run", **{"loss.guide.path": guide}) == 2
    assert f"loss.guide.path={guide}" in capsys.readouterr().err
    wide = tiny.bert(tmp_path / "wide", hidden_size=2 * tiny.SIZES["hidden_size"])
    shutil.copy(folder / "bert" / "tokenizer.json", wide)  # one that is trained anew may have other pieces
    assert finetune(folder, run_dir=tmp_path / "run", **{"loss.guide.path": wide, "loss.guide.weight": 1}) == 2
    assert f"{wide} has embeddings of {2 * tiny.SIZES['hidden_size']} numbers" in capsys.readouterr().err


# --- options, and what comes out --------------------------------------------------------------------------------------


def test_every_option_trains_and_changes_the_run(folder: Path, tmp_path: Path):
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "directions": {"loss.both_directions": "true", "loss.same_tower": "true"},
        "margins": {"loss.margin": 0.01, "loss.teacher_margin": -3},
        "guide": {"loss.guide.path": folder / "bert", "loss.guide.margin": -0.001},
        "toward the guide": {
            "loss.guide.path": folder / "bert",
            "loss.guide.margin": "null",
            "loss.guide.weight": 5,
        },
        "sizes": {"loss.matryoshka.sizes": "[8,16]", "loss.matryoshka.weights": "[0.5,1]"},
        "margin mse": {"loss.distill": "margin_mse"},
    }
    last = {}
    for name, changes in options.items():
        run_dir = tmp_path / name
        assert finetune(folder, run_dir=run_dir, steps=3, **changes, **{"model.dropout": 0.0}) == 0, name
        last[name] = jobs.steps(run_dir)[3]["train/loss"]
        assert np.isfinite(last[name])
    assert len(set(last.values())) == len(options), last


def test_a_mean_of_checkpoints_is_exported(folder: Path, tmp_path: Path, capsys):
    run_dir = tmp_path / "run"
    assert finetune(folder, run_dir=run_dir, save_every_steps=2, keep_last=3) == 0
    steps = [load_file(run_dir / f"checkpoints/step-{step:08d}/model/model.safetensors") for step in (4, 6, 8)]
    folders = [f"{run_dir}/checkpoints/step-{step:08d}" for step in (4, 8)]
    given: dict[str, tuple[list[str], list[int]]] = {
        "newest": ([f"run_dir={run_dir}", "average=3"], [0, 1, 2]),
        "listed": ([f"checkpoint=[{','.join(folders)}]"], [0, 2]),
    }
    for name, (arguments, chosen) in given.items():
        assert cli.main(["export", *arguments, f"output={tmp_path / name}"]) == 0
        exported = load_file(tmp_path / name / "model.safetensors")
        for key in steps[0]:
            wanted = np.mean([steps[n][key].double().numpy() for n in chosen], axis=0).astype(np.float32)
            assert np.array_equal(exported[key].numpy(), wanted), (name, key)
    assert cli.main(["export", f"run_dir={run_dir}", "average=4", f"output={tmp_path / 'x'}"]) == 2
    assert "has 3 complete checkpoints, not 4" in capsys.readouterr().err


def test_instructions_become_prompts_of_the_exported_model(folder: Path, tmp_path: Path):
    (tmp_path / "mix.yaml").write_text(
        f"sources: {{qa: {{shards: {folder / 'shards'}, instruction: Find what answers the question}}}}"
    )
    run_dir, prompt = tmp_path / "run", "Instruct: Find what answers the question\nQuery: "
    changes = {"data": tmp_path / "mix.yaml", "prompts.passage": "", "steps": 3}
    assert finetune(folder, run_dir=run_dir, export=True, **changes) == 0
    model = pytest.importorskip("sentence_transformers").SentenceTransformer(str(run_dir / "model"), device="cpu")
    assert (model.prompts["qa"], model.prompts["document"]) == (prompt, "")
    by_name = model.encode(["the quick fox"], prompt_name="qa")
    assert np.array_equal(by_name, model.encode([prompt + "the quick fox"], prompt=""))
    assert f"`{prompt!r}`" in (run_dir / "model/README.md").read_text()


def test_a_cross_encoder_is_trained_and_opens_in_both_libraries(tmp_path: Path):
    """The objective of `quintet teacher`: here a passage answers when it is in Cyrillic letters."""
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from trainer.loop import fit
    from trainer.monitor import WandbConfig
    from trainer.teacher import Config
    from trainer.train import ModelConfig

    hard = tuple("the quick brown fox jumps over the lazy dog"[n : n + 20] for n in range(4))
    records = [Record(f"which {n}", "Как установить "[n % 5 :] + "устройство", negatives=hard) for n in range(48)]
    pairs.write_shards(tmp_path / "shards", records)
    settings: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "data": str(tmp_path / "shards"),
        "model": ModelConfig(path=str(tiny.bert(tmp_path / "bert")), dropout=0.0),
        "negatives": 4,
        "max_length": 60,
        "batch_size": 16,
        "lanes": 4,
        "steps": 30,
        "warmup_steps": 3,
        "lr": 0.005,
        "log_every": 1,
        "wandb": WandbConfig(mode="disabled"),
    }
    fit(Config(**settings))
    rows, model_folder = jobs.steps(tmp_path / "run"), tmp_path / "run/model"
    assert rows[1]["train/loss_ranking"] == pytest.approx(np.log(5), abs=0.3)
    assert rows[30]["train/loss_ranking"] < 0.3
    assert rows[30]["train/acc_top1"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    text_pair = (records[0].query, records[0].passage)
    inputs = AutoTokenizer.from_pretrained(model_folder)(*text_pair, return_tensors="pt")
    with torch.no_grad():
        logit = float(model(**inputs).logits)
    assert float(CrossEncoder(str(model_folder), device="cpu").predict([text_pair])[0]) == pytest.approx(
        logit, abs=1e-4
    )
    assert model.config.architectures == ["BertForSequenceClassification"]


def test_a_changed_objective_is_refused_on_resume(folder: Path, tmp_path: Path, capsys):
    assert finetune(folder, run_dir=tmp_path / "run", steps=3) == 0
    values: dict[str, Any] = {"run_dir": tmp_path / "run", "negatives": 2, "steps": 6}
    assert cli.main(["pretrain", *jobs.settings(folder, **values)]) == 2
    assert "objective distillation -> contrastive" in capsys.readouterr().err
