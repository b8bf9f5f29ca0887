"""The score cache against a dict, under damage, under kills and with a full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import teachers

from data import files, scores
from data.errors import DataError, NumericError, UserError
from data.scores import ScoreCache, Scores, ScoreWriter, fingerprints, open_cache, pair_keys

ROOT = Path(__file__).resolve().parent.parent
TEACHER, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2


def _write(folder: Path, rows: Scores, teacher: str = TEACHER) -> Path:
    writer = ScoreWriter(folder, teacher)
    writer.add(rows.query_hash, rows.passage_hash, rows.logit)
    path = writer.flush()
    assert path is not None
    return path


def _loaded(folder: Path, teacher: str = TEACHER) -> ScoreCache:
    cache = ScoreCache(folder, teacher)
    cache.load()
    return cache


def _rows(query: list[int], passage: list[int], logit: list[float]) -> Scores:
    return Scores(np.array(query, np.int64), np.array(passage, np.int64), np.array(logit, np.float32))


def test_every_score_comes_back_and_no_other(tmp_path: Path) -> None:
    """Segments of all sizes, so that tables of all sizes are joined; the reference is a dict."""
    known: dict[tuple[int, int], float] = {}
    cache = ScoreCache(tmp_path, TEACHER)
    for number, size in enumerate([1, 700, 3, 20, 1, 1, 350, 9]):
        rows = teachers.scores(size, seed=number)
        _write(tmp_path, rows)
        columns = (rows.query_hash.tolist(), rows.passage_hash.tolist(), rows.logit.tolist())
        known.update({(query, passage): logit for query, passage, logit in zip(*columns, strict=True)})
        assert cache.refresh() == size
        assert len(cache) == len(known)
    pairs = np.array([*known, *((q, p + 1) for q, p in known), *((q - 1, p) for q, p in known)])
    pairs = np.random.default_rng(0).permutation(pairs)
    for held in (cache, _loaded(tmp_path)):
        logits, found = held.lookup(pairs[:, 0].copy(), pairs[:, 1].copy())
        wanted = [known.get((q, p)) for q, p in pairs.tolist()]
        assert found.tolist() == [score is not None for score in wanted]
        assert logits[found].tolist() == [score for score in wanted if score is not None]
        assert np.isnan(logits[~found]).all()
        assert logits.dtype == np.float32
    assert len(cache.segments) == 8


def test_the_key_and_the_query_give_the_passage() -> None:
    rows = teachers.scores(1000)
    key = pair_keys(rows.query_hash, rows.passage_hash)
    zeros = np.zeros(1000, np.int64)
    assert np.array_equal((key ^ pair_keys(rows.query_hash, zeros)).view(np.int64), rows.passage_hash)
    equal = pair_keys(rows.query_hash, rows.query_hash)
    assert len(np.unique(equal)) == 1000, "pairs of equal texts, as duplicates and NLI have them"


def test_pairs_that_share_a_key_are_told_apart(tmp_path: Path) -> None:
    query = np.array([1, 2, 3], np.int64)
    # the passage that gives query n the key 7: xor is its own inverse
    passage = (pair_keys(query, np.zeros(3, np.int64)) ^ np.uint64(7)).view(np.int64)
    assert len(np.unique(pair_keys(query, passage))) == 1
    _write(tmp_path, Scores(query[:2], passage[:2], np.array([0.5, 1.5], np.float32)))
    logits, found = _loaded(tmp_path).lookup(query, passage)
    assert found.tolist() == [True, True, False]
    assert logits[:2].tolist() == [0.5, 1.5]


def test_of_two_scores_for_a_pair_the_one_read_first_stands(tmp_path: Path) -> None:
    paths = sorted(_write(tmp_path, _rows([1, 1], [2, 3], [logit, 7.0])) for logit in (0.5, 0.75))
    first = float(scores.read_segment(paths[0], TEACHER).logit[0])
    cache = _loaded(tmp_path)
    assert cache.lookup(np.array([1]), np.array([2]))[0].tolist() == [first]
    assert (len(cache), cache.repeated, cache.spread) == (2, 2, 0.25)
    _write(tmp_path, _rows([1, 9], [2, 9], [4.0, 4.0]))
    assert cache.refresh() == 1
    assert cache.lookup(np.array([1, 9]), np.array([2, 9]))[0].tolist() == [first, 4.0]
    assert (cache.repeated, cache.spread) == (3, 4.0 - first)


def test_equal_work_gives_the_same_file(tmp_path: Path) -> None:
    rows = teachers.scores(20)
    first = _write(tmp_path, rows)
    content = first.read_bytes()
    assert _write(tmp_path, rows) == first
    assert first.read_bytes() == content
    assert [path.name for path in (tmp_path / TEACHER).iterdir()] == [first.name]


def test_scores_of_two_teachers_are_never_mixed(tmp_path: Path) -> None:
    rows = teachers.scores(5)
    foreign = _write(tmp_path, rows, OTHER)
    assert fingerprints(tmp_path) == [OTHER]
    assert _loaded(tmp_path).lookup(rows.query_hash, rows.passage_hash)[1].sum() == 0
    _write(tmp_path, teachers.scores(5, seed=1))
    copied = tmp_path / TEACHER / foreign.name
    copied.write_bytes(foreign.read_bytes())
    with pytest.raises(DataError, match=f"{foreign.name} .scores of another teacher, {OTHER}.; delete them"):
        _loaded(tmp_path)


def _damage(name: str, content: bytes) -> bytes:
    rows = teachers.scores(3)
    columns = [pa.array(rows.query_hash), pa.array(rows.passage_hash), pa.array(rows.logit)]
    about = {b"format": b"quintet-scores-1", b"teacher": TEACHER.encode(), b"xxh3": b"0" * 32}
    if name == "compressed":
        schema, options = scores.SCHEMA.with_metadata(about), pa.ipc.IpcWriteOptions(compression="zstd")
    else:
        schema, options = scores.SCHEMA.with_metadata(about if name == "other checksum" else {}), None
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=options) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))
    made = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "flipped": content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
        "pickle": b"\x80\x04\x95" + b"cos\nsystem\n(S'touch canary'\ntR.",
    }
    return made.get(name, sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    "name", ["cut", "empty", "flipped", "pickle", "compressed", "other checksum", "no word on its origin"]
)
def test_damaged_and_foreign_files_are_named_in_one_message(name: str, tmp_path: Path) -> None:
    good, bad = (_write(tmp_path, teachers.scores(50, seed)) for seed in (0, 1))
    bad.write_bytes(_damage(name, bad.read_bytes()))
    with pytest.raises(DataError) as error:
        _loaded(tmp_path)
    assert f"1 of 2 files cannot be used: {bad.name} (" in str(error.value)
    assert good.name not in str(error.value)
    bad.unlink()
    assert len(_loaded(tmp_path)) == 50


def test_a_score_that_is_no_number_is_refused_when_it_comes(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path, TEACHER)
    with pytest.raises(NumericError, match="gave inf for a pair; use precision=fp32"):
        writer.add(np.zeros(2, np.int64), np.zeros(2, np.int64), np.array([1, np.inf], np.float32))
    assert writer.flush() is None
    assert not (tmp_path / TEACHER).exists()


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, teachers.scores(5))
    writer = ScoreWriter(tmp_path, TEACHER)
    rows = teachers.scores(9, seed=1)
    writer.add(rows.query_hash, rows.passage_hash, rows.logit)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(UserError, match=f"{TEACHER}: cannot be written .No space left on device"):
        writer.flush()
    monkeypatch.undo()
    assert len(_loaded(tmp_path)) == 5
    assert len(list((tmp_path / TEACHER).iterdir())) == 1, "nothing half written stays"
    writer.flush()
    assert len(_loaded(tmp_path)) == 14


_KILLED = """
import os, signal, sys
from pathlib import Path
import teachers
from data import files
from data.scores import ScoreWriter

folder, teacher, point = sys.argv[1:]
writer = ScoreWriter(folder, teacher)

def flush(seed):
    rows = teachers.scores(100, seed)
    writer.add(rows.query_hash, rows.passage_hash, rows.logit)
    writer.flush()

flush(0)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(path, content):
    path.write_bytes(content.to_pybytes()[:1000])
    die()

if point == "writing":
    from data import scores
    scores._write = half
elif point == "synced":
    files.os.replace = die
else:
    files.sync = lambda path: path.is_dir() and die()
flush(1)
"""


@pytest.mark.parametrize("point", ["writing", "synced", "renamed"])
def test_a_writer_killed_at_any_point_leaves_what_is_committed_and_nothing_torn(point: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path), TEACHER, point]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    assert subprocess.run(command, env=environment, cwd=tmp_path, timeout=60).returncode == -signal.SIGKILL
    cache = _loaded(tmp_path)
    for seed in (0, 1):
        rows = teachers.scores(100, seed)
        found = cache.lookup(rows.query_hash, rows.passage_hash)[1]
        assert found.all() if seed == 0 or point == "renamed" else not found.any()


def test_a_cache_is_found_by_its_folder_or_by_its_teachers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no teacher's scores are there; run quintet distill"):
        open_cache(tmp_path / "none")
    _write(tmp_path, teachers.scores(3))
    for name in (tmp_path, tmp_path / TEACHER):
        assert open_cache(name).load() == 3
    _write(tmp_path, teachers.scores(4), OTHER)
    with pytest.raises(UserError, match=f"scores of 2 teachers; name one of their folders: {tmp_path / TEACHER}, "):
        open_cache(tmp_path)
    assert open_cache(tmp_path, OTHER).load() == 4
    with pytest.raises(UserError, match=f"no scores of the teacher {'0' * 32}; there are {TEACHER}, {OTHER}"):
        open_cache(tmp_path, "0" * 32)
