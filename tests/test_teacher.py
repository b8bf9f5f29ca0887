"""Training a teacher: it learns on held-out groups, any number of ranks gives the same model, bad input is refused."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pairs
import pytest
import ranks
import tiny
from safetensors.torch import load_file

from data.errors import UserError
from data.groups import pairs_of
from data.mixture import load
from data.pairing import PairEncoder, PairTemplate, read_settings
from data.reading import read_block
from data.records import Record
from data.tokens import load_tokenizer
from launcher import cli
from trainer import heldout, teacher
from trainer.monitor import WandbConfig
from trainer.train import ModelConfig

KEYS = ("fox", "dog", "lazy", "brown", "quick", "jumps")
# Adam with a tiny epsilon turns rounding noise into full-size updates where the true gradient is 0.
EPS = 1e-3
FILLERS = ("the", "over", "room", "temperature", "living")


def records(count: int, seed: int) -> list[Record]:
    """A passage answers a query when it has the query's word."""
    random_words = random.Random(seed)

    def text(key: str, number: int) -> str:
        words = random_words.choices(FILLERS, k=3)
        words.insert(random_words.randrange(4), key)
        return " ".join([*words, str(number)])

    made = []
    for number in range(count):
        first, *others = random_words.sample(KEYS, 4)
        hard = tuple(text(key, number) for key in others)
        made.append(Record(f"{first} {number}", text(first, number), negatives=hard))
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny.bert(folder / "bert")
    pairs.write_shards(folder / "mined", records(256, 0), block_records=64)
    pairs.write_shards(folder / "held", records(100, 1))
    return folder


def config(place: Path, run_dir: Path, **changes: Any) -> teacher.Config:
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": str(place / "mined"),
        "model": ModelConfig(path=str(place / "bert"), dropout=0.0),
        "negatives": 3,
        "max_length": 40,
        "batch_size": 32,
        "lanes": 4,
        "steps": 3,
        "warmup_steps": 1,
        "lr": 0.003,
        "tokens_per_chunk": 512,
        "log_every": 1,
        "wandb": WandbConfig(mode="disabled"),
        "device": "cpu",
    }
    return teacher.Config(**{**values, **changes})


def test_a_teacher_learns_what_answers_a_query_on_groups_it_has_not_seen(place: Path, tmp_path: Path) -> None:
    held = teacher.EvalConfig(data=str(place / "held"))
    template = PairTemplate(query="query: {query}", passage="{passage}")
    teacher.run(config(place, tmp_path / "run", steps=400, warmup_steps=20, log_every=50, eval=held, template=template))
    found = [row for row in jobs.metrics(tmp_path / "run") if "eval/pairs/accuracy_at_1" in row][-1]
    assert found["eval/pairs/accuracy_at_1"] > 0.6, "chance is 0.25"
    assert found["eval/pairs/mrr_at_10"] > 0.75, "chance is 0.52"
    settings = read_settings(tmp_path / "run" / "model")
    assert settings is not None
    assert (settings.template, settings.max_length, settings.max_query_length) == (template, 40, 20)
    assert _accuracy(place, tmp_path / "run" / "model") == found["eval/pairs/accuracy_at_1"]


def _accuracy(place: Path, model: Path) -> float:
    """The same through sentence-transformers, group by group."""
    from sentence_transformers import CrossEncoder

    reader = CrossEncoder(str(model), device="cpu")
    hits = []
    for record in records(100, 1):
        texts = [(f"query: {record.query}", text) for text in (record.passage, *record.negatives)]
        logits = reader.predict(texts, show_progress_bar=False)
        hits.append(logits[0] > logits[1:].max())
    return float(np.mean(hits))


def _train(place: Path, folder: Path, stages: list[int], world: int) -> None:
    from trainer import distributed

    distributed.stop = lambda: None  # the group is needed again
    for stage in stages:
        teacher.run(config(place, folder / f"{world}-{stage}", zero_stage=stage, eps=EPS))


@pytest.mark.slow
def test_two_ranks_train_the_model_that_one_trains(place: Path, tmp_path: Path) -> None:
    """Clipping is on (max_grad_norm 1), some chunks are replayed, and the ranks' rows differ in number of tokens."""
    ranks.run(_train, 2, tmp_path, place, tmp_path, [1, 3], 2)
    teacher.run(config(place, tmp_path / "1", zero_stage=1, memory_budget_gib=0.0, eps=EPS))
    start = load_file(tmp_path / "1" / "model" / "model.safetensors")
    for stage in (1, 3):
        other = load_file(tmp_path / f"2-{stage}" / "model" / "model.safetensors")
        assert start.keys() == other.keys()
        worst = max(float((start[name] - other[name]).abs().max()) for name in start)
        assert worst < 2e-5, stage
    rows = [jobs.steps(tmp_path / name) for name in ("1", "2-1", "2-3")]
    for step in (1, 2, 3):
        losses = [row[step]["train/loss"] for row in rows]
        assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_positions_count_the_negatives_that_are_not_below() -> None:
    # three records: positives, then negatives 0, 0, 1, 1, 2
    record = np.array([0, 1, 2, 0, 0, 1, 1, 2])
    logits = np.array([1.0, 2.0, 3.0, 1.5, 0.5, 2.0, 9.0, 4.0], np.float32)
    hidden = np.array([False] * 7 + [True])
    assert heldout.positions(logits, record, hidden).tolist() == [2, 3], "the third has nothing to compare with"
    assert heldout.positions(-logits, record, hidden).tolist() == [2, 2]


def test_held_out_groups_are_whole_and_dealt_to_the_ranks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joint = PairEncoder(load_tokenizer(str(place / "bert")), 40)
    (whole,) = heldout.load(str(place / "held"), 0, joint)
    assert len(whole.tokens) == 400
    (source,) = load(str(place / "held")).sources
    tables = [read_block(source.index, *at).table for at in source.blocks.tolist()]
    made = pairs_of(tables)
    texts = [made.passages[row].as_py() for row in made.passage_row.tolist()]
    wanted = joint.encode([made.queries[row].as_py() for row in made.query_row.tolist()], texts)
    assert whole.tokens.lists() == wanted.lists()
    assert whole.record.tolist() == made.query_row.tolist()
    parts = []
    for rank in range(3):
        monkeypatch.setattr(heldout.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(heldout.distributed, "world", lambda: 3)
        parts += heldout.load(str(place / "held"), 50, joint)
    assert [len(part.tokens) for part in parts] == [4 * 17, 4 * 17, 4 * 16]
    dealt = Counter(tuple(row) for part in parts for row in part.tokens.lists())
    assert dealt <= Counter(map(tuple, whole.tokens.lists())), "none twice"


def test_a_negative_with_the_text_of_its_positive_is_hidden(place: Path, tmp_path: Path) -> None:
    (record,) = records(1, 5)
    pairs.write_shards(tmp_path / "held", [replace(record, negatives=(record.passage, *record.negatives))])
    joint = PairEncoder(load_tokenizer(str(place / "bert")), 40)
    (groups,) = heldout.load(str(tmp_path / "held"), 0, joint)
    assert groups.hidden.tolist() == [False, True, False, False, False]


def test_bad_input_ends_with_one_message(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import teachers

    bare = [replace(record, negatives=()) for record in records(64, 0)]
    pairs.write_shards(tmp_path / "bare", bare)
    teachers.bert(tmp_path / "two", num_labels=2)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": tmp_path / "bare"}, "has only 0; `quintet mine` finds some"),
        ({"model.path": tmp_path / "two"}, "it has 2 labels"),
        ({"model.path": tmp_path / "none"}, "none"),
        ({"max_length": 200}, "position table ends at 70"),
        ({"max_query_length": 39}, "max_query_length=39: leaves no room"),
        ({"template.query": "nothing"}, "template.query='nothing': needs {query} once"),
        ({"temperature": 0.5}, "temperature: the training of a teacher has no use for it"),
        ({"eval.data": tmp_path / "bare"}, "eval.data: the records of source pairs have no negatives"),
    ]
    given = {"run_dir": tmp_path / "run", "data": place / "mined", "model.path": place / "bert", "max_length": 40}
    given |= {"batch_size": 32, "lanes": 4, "negatives": 3, "steps": 3, "warmup_steps": 1, "wandb.mode": "disabled"}
    for changes, message in cases:
        words = [f"{name}={value}" for name, value in {**given, **changes, "device": "cpu"}.items()]
        assert cli.main(["teacher", *words]) == UserError.exit_code, message
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("quintet teacher: ")]
        assert len(said) == 1, said
        assert message in said[0]
