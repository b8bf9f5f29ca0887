"""Distillation workers: right scores, each computed once, whatever is killed, claimed, changed or damaged."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import teachers
import torch
from pairs import pairs, write_shards
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data import files, mixture
from data.errors import DataError, Stopped, UserError
from data.groups import first_places, windows
from data.records import Record, text_hash
from data.scores import ScoreCache, ScoreWriter, fingerprints, read_segment
from launcher import cli
from trainer import distill, scoring
from trainer.runfolder import Lease

RECORDS = [replace(record, negatives=record.negatives[: 3 - n % 2]) for n, record in enumerate(pairs(48, negatives=3))]
# One pair twice in a record, one negative of two records, one query with two passages.
RECORDS[1] = replace(RECORDS[1], negatives=(*RECORDS[1].negatives, RECORDS[1].negatives[0]))
RECORDS[2] = replace(RECORDS[2], query=RECORDS[3].query, negatives=RECORDS[3].negatives)
DISTINCT = {(r.query, text) for r in RECORDS for text in (r.passage, *r.negatives)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and two mined shards."""
    folder = tmp_path_factory.mktemp("distill")
    teachers.bert(folder / "teacher")
    index = write_shards(folder / "mined", RECORDS, shard_bytes=1, block_records=24)
    assert len(index.shards) == 2
    return folder


@pytest.fixture(scope="module")
def reference(place: Path) -> Path:
    """What one worker writes that nobody disturbs."""
    distill.run(_config(place, place / "reference"))
    return place / "reference"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.groups.WINDOW_PAIRS", 40)


def _config(place: Path, scores: Path, **changes: Any) -> distill.Config:
    values = {"teacher": place / "teacher", "data": place / "mined", "scores": scores}
    texts = {name: str(value) for name, value in values.items()}
    small = {"tokens_per_chunk": 256, "flush_pairs": 16, "max_query_length": 60, "device": "cpu"}
    return distill.Config(**{**texts, **small, **changes})


def _cache(scores: Path) -> ScoreCache:
    (name,) = fingerprints(scores)
    cache = ScoreCache(scores, name)
    cache.load()
    return cache


def _files(scores: Path) -> dict[str, bytes]:
    (name,) = fingerprints(scores)
    return {path.name: path.read_bytes() for path in (scores / name).glob("*.arrow")}


def _hashes(texts: list[tuple[str, str]]) -> tuple[Any, Any]:
    return tuple(np.array([text_hash(text) for text in column]) for column in zip(*texts, strict=True))


def test_scores_are_those_of_transformers_one_pair_at_a_time(place: Path, reference: Path) -> None:
    cache, texts = _cache(reference), sorted(DISTINCT)
    assert len(cache) == len(texts)
    logits, found = cache.lookup(*_hashes(texts))
    assert found.all()
    tokenizer = AutoTokenizer.from_pretrained(place / "teacher")
    model = AutoModelForSequenceClassification.from_pretrained(place / "teacher").eval()
    for (query, passage), logit in list(zip(texts, logits.tolist(), strict=True))[::7]:
        inputs = tokenizer(query, passage, truncation="only_second", max_length=70, return_tensors="pt")
        with torch.no_grad():
            assert model(**inputs).logits.item() == pytest.approx(logit, abs=1e-5)


def test_windows_hold_every_pair_once(place: Path) -> None:
    (source,) = mixture.load(str(place / "mined")).sources
    found, sizes = set(), []
    for number in range(2):
        for window in windows(source.index, number):
            sizes.append(window.records)
            queries, passages = window.queries.to_pylist(), window.passages.to_pylist()
            rows = zip(window.query_row.tolist(), window.passage_row.tolist(), strict=True)
            texts = [(queries[q], passages[p]) for q, p in rows]
            assert len(set(texts)) == len(texts)
            assert [text_hash(query) for query, _ in texts] == window.query_hash.tolist()
            assert [text_hash(passage) for _, passage in texts] == window.passage_hash.tolist()
            found.update(texts)
    assert found == DISTINCT
    assert sum(sizes) == len(RECORDS)


def test_the_first_of_equal_pairs_is_taken() -> None:
    query, passage = np.array([5, -1, 5, 5, -1, 7]), np.array([2, 2, 2, 3, 2, -9])
    assert first_places(query, passage).tolist() == [0, 1, 3, 5]
    assert first_places(query[:0], passage[:0]).tolist() == []


# --- workers that are killed, stopped, or not alone ---------------------------------------------------------------


def _child(function: Callable[..., Any], *arguments: Any) -> Any:
    """A process of its own that calls a function of this module, forked from one that has the imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "trainer.scoring", "trainer.crossencoder", "data.mixture"])
    process = context.Process(target=_in_child, args=(function, arguments))
    process.start()
    return process


def _in_child(function: Callable[..., Any], arguments: Any) -> None:
    import data.groups

    torch.set_num_threads(1)
    data.groups.WINDOW_PAIRS = 40
    function(*arguments)


def _joined(process: Any) -> int:
    process.join(120)
    assert process.exitcode is not None, "still running"
    return int(process.exitcode)


def _killed_after_two_flushes(config: distill.Config) -> None:
    """Work until two segments are written and more scores are waiting for the third; then kill -9."""
    flushed: list[Path | None] = []
    flush, add = ScoreWriter.flush, ScoreWriter.add

    def add_or_die(writer: ScoreWriter, *rows: Any) -> None:
        add(writer, *rows)
        if len(flushed) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    ScoreWriter.flush = lambda writer: flushed.append(flush(writer)) or flushed[-1]  # type: ignore[method-assign,func-returns-value]
    ScoreWriter.add = add_or_die  # type: ignore[method-assign]
    distill.run(config)


def test_a_killed_worker_loses_nothing_committed_and_the_next_computes_nothing_twice(
    place: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _joined(_child(_killed_after_two_flushes, _config(place, tmp_path))) == -signal.SIGKILL
    committed = _files(tmp_path)
    assert len(committed) == 2
    before = len(_cache(tmp_path))
    assert 32 <= before < len(DISTINCT)
    distill.run(_config(place, tmp_path))
    assert _scored(capsys) == len(DISTINCT) - before
    assert _files(tmp_path) == _files(reference), "the same files, byte by byte"
    assert committed.items() <= _files(tmp_path).items()


def _scored(capsys: pytest.CaptureFixture[str]) -> int:
    """What the table of a worker says under `scored`."""
    head, row = capsys.readouterr().out.splitlines()[-2:]
    return int(dict(zip(head.split(), row.split(), strict=False))["scored"].replace(",", ""))


def _unclaimed(config: distill.Config) -> None:
    Lease.attempt = lambda lease, now: True  # type: ignore[method-assign]
    distill.run(config)


def test_two_workers_on_the_same_shards_write_the_same_files(place: Path, reference: Path, tmp_path: Path) -> None:
    workers = [_child(_unclaimed, _config(place, tmp_path)) for _ in range(2)]
    assert [_joined(worker) for worker in workers] == [0, 0]
    cache, wanted = _cache(tmp_path), _cache(reference)
    logits, found = cache.lookup(*_hashes(sorted(DISTINCT)))
    assert found.all()
    assert np.abs(logits - wanted.lookup(*_hashes(sorted(DISTINCT)))[0]).max() < 1e-5


def _tallied(config: distill.Config, file: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "_print_tally", lambda worker: file.write_text(str(worker.tally.scored)))
        distill.run(config)


def test_workers_share_the_shards_out_by_claims(place: Path, reference: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}" for number in range(2)]
    workers = [_child(_tallied, _config(place, tmp_path / "scores"), file) for file in files]
    assert [_joined(worker) for worker in workers] == [0, 0]
    assert sum(int(file.read_text()) for file in files) == len(DISTINCT)
    assert _files(tmp_path / "scores") == _files(reference)
    (name,) = fingerprints(tmp_path / "scores")
    assert not list((tmp_path / "scores" / name / "claims").iterdir())


def test_a_shard_that_is_claimed_is_waited_for(
    place: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard is held by a worker elsewhere, which gives it back while this one waits."""
    (name,) = fingerprints(reference)
    (source,) = mixture.load(str(place / "mined")).sources
    claims = tmp_path / name / "claims"
    claims.mkdir(parents=True)
    held = Lease(claims, file=f"{source.index.shards[0].sha256[:32]}.json")
    assert held.attempt(0.0)
    waits = []
    wait = scoring.Worker.wait

    def waited(worker: scoring.Worker, seconds: float) -> None:
        waits.append(worker.tally.shards)
        held.give_back()
        wait(worker, seconds)

    monkeypatch.setattr(scoring.Worker, "wait", waited)
    distill.run(_config(place, tmp_path))
    assert waits == [1], "it waited once, with the other shard done"
    assert len(_cache(tmp_path)) == len(DISTINCT)


def test_a_silent_claim_of_another_machine_is_taken_over(place: Path, reference: Path, tmp_path: Path) -> None:
    (name,) = fingerprints(reference)
    (source,) = mixture.load(str(place / "mined")).sources
    claims = tmp_path / name / "claims"
    claims.mkdir(parents=True)
    file = claims / f"{source.index.shards[0].sha256[:32]}.json"
    owner = {"host": "node7", "pid": 1, "process_table": "another", "process_start": "1", "since": 0, "token": "x"}
    file.write_text(json.dumps(owner))
    distill.run(_config(place, tmp_path, claim_seconds=0.1))
    assert not file.exists()
    assert _files(tmp_path) == _files(reference)


def test_a_request_to_stop_writes_what_is_scored_and_ends_with_75(
    place: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = scoring.Scorer.__call__

    def interrupted(scorer: scoring.Scorer, rows: Any) -> Iterator[Any]:
        for number, result in enumerate(score(scorer, rows)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield result

    monkeypatch.setattr(scoring.Scorer, "__call__", interrupted)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM; the .* scores of this start are written") as stopped:
        distill.run(_config(place, tmp_path, flush_pairs=1000))
    assert stopped.value.exit_code == 75
    done = _scored(capsys)
    assert len(_cache(tmp_path)) == done > 0
    monkeypatch.undo()
    monkeypatch.setattr("data.groups.WINDOW_PAIRS", 40)
    distill.run(_config(place, tmp_path, flush_pairs=1000))
    assert _scored(capsys) == len(DISTINCT) - done
    texts = _hashes(sorted(DISTINCT))
    assert _cache(tmp_path).lookup(*texts)[0].tolist() == _cache(reference).lookup(*texts)[0].tolist(), "the same bits"


def test_a_worker_that_follows_scores_what_comes_until_it_is_told_to_end(place: Path, tmp_path: Path) -> None:
    config = _config(place, tmp_path / "scores", data=str(tmp_path / "coming"), follow=True, poll_seconds=0.05)
    worker = _child(distill.run, config)
    try:
        for number in range(2):
            records = RECORDS[number * 24 : number * 24 + 24]
            staged = tmp_path / f"staged{number}"
            write_shards(staged, RECORDS[: number * 24 + 24], shard_bytes=1, block_records=24)
            if (tmp_path / "coming").exists():
                (tmp_path / "coming").rename(tmp_path / "old")
            staged.rename(tmp_path / "coming")
            _wait_for(tmp_path / "scores", records, worker)
        (tmp_path / "scores" / "STOP").touch()
        assert _joined(worker) == 0
        assert (tmp_path / "scores" / "STOP").exists(), "it is for every worker"
    finally:
        worker.kill()


def _wait_for(scores: Path, records: list[Record], worker: Any) -> None:
    wanted = _hashes([(record.query, text) for record in records for text in (record.passage, *record.negatives)])
    deadline = time.monotonic() + 60
    while not (fingerprints(scores) and _cache(scores).lookup(*wanted)[1].all()):
        assert worker.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- another teacher, damage, bad input ------------------------------------------------------------------------------


def test_another_teacher_gets_its_own_folder_and_no_old_score(
    place: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill.run(_config(place, tmp_path))
    distill.run(_config(place, tmp_path))
    assert _scored(capsys) == 0
    first = set(fingerprints(tmp_path))
    distill.run(_config(place, tmp_path, template=distill.TemplateOverride(passage="passage: {passage}")))
    assert _scored(capsys) == len(DISTINCT)
    (second,) = set(fingerprints(tmp_path)) - first
    old, new = ScoreCache(tmp_path, first.pop()), ScoreCache(tmp_path, second)
    assert old.load() == new.load() == len(DISTINCT)
    texts = _hashes(sorted(DISTINCT))
    assert np.abs(old.lookup(*texts)[0] - new.lookup(*texts)[0]).min() > 0
    assert json.loads((new.folder / "about.json").read_text())["template"]["passage"] == "passage: {passage}"


def test_the_check_passes_on_a_whole_cache_and_finds_what_is_missing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill.run(_config(place, tmp_path))
    distill.run(_config(place, tmp_path, check=True))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("pairs "))
    assert row.split() == ["pairs", "2", str(len(DISTINCT)), str(len(DISTINCT)), "0"]
    (name,) = fingerprints(tmp_path)
    gone = min((tmp_path / name).glob("*.arrow"))
    missing = len(read_segment(gone, name))
    gone.unlink()
    with pytest.raises(DataError, match=f"{missing} of {len(DISTINCT)} pairs have no score by this teacher"):
        distill.run(_config(place, tmp_path, check=True))
    distill.run(_config(place, tmp_path))
    distill.run(_config(place, tmp_path, check=True))


def test_a_damaged_segment_ends_worker_and_check_with_its_name(place: Path, tmp_path: Path) -> None:
    distill.run(_config(place, tmp_path))
    (name,) = fingerprints(tmp_path)
    bad = min((tmp_path / name).glob("*.arrow"))
    bad.write_bytes(bad.read_bytes()[:-9])
    for check in (False, True):
        with pytest.raises(DataError, match=f"{bad.name} .*delete them"):
            distill.run(_config(place, tmp_path, check=check))


def test_a_full_disk_ends_the_worker_and_keeps_what_is_written(
    place: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, written = files.sync, []

    def full(path: Path) -> None:
        if path.name.endswith(".partial") and ".arrow" in path.name:
            written.append(path)
            if len(written) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(UserError, match="No space left on device"):
        distill.run(_config(place, tmp_path))
    assert len(_files(tmp_path)) == 2
    monkeypatch.setattr(files, "sync", sync)
    distill.run(_config(place, tmp_path))
    assert _files(tmp_path) == _files(reference)


def test_bad_input_ends_with_one_message(
    place: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers.bert(tmp_path / "two", num_labels=2)
    write_shards(tmp_path / "bare", pairs(10))
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"teacher": tmp_path / "none"}, 2, "teacher="),
        ({"teacher": tmp_path / "two"}, 2, "it has 2 labels"),
        ({"data": tmp_path / "bare"}, 2, "the records of source pairs have no negatives"),
        ({"data": tmp_path / "nowhere"}, 2, "no such folder or file"),
        ({"max_length": 71}, 2, "max_length=71: the teacher's position table ends at 70"),
        ({"template.query": "nothing"}, 2, "template.query='nothing': needs {query} once"),
        ({"check": "true", "max_length": 60, "scores": reference}, 3, "pairs have no score by this teacher"),
    ]
    given = {"teacher": place / "teacher", "data": place / "mined", "scores": tmp_path / "scores", "device": "cpu"}
    for changes, code, message in cases:
        words = [f"{name}={value}" for name, value in {**given, **changes}.items()]
        assert cli.main(["distill", *words]) == code
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("quintet distill: ")]
        assert message in said
    assert not list(tmp_path.glob("scores/*/*.arrow"))
