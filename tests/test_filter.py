"""The consistency filter: what it keeps, what it writes, and that ranks, kills and a full disk change nothing."""

from __future__ import annotations

import hashlib
import json
import random
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import kills
import numpy as np
import pyarrow as pa
import pytest
import ranks
import tiny
import torch

from data import index, mixture, noise, scan
from data.packing import as_records
from data.records import Record, text_hash
from data.shards import ShardWriter, load_index, write_index
from data.tokens import TextEncoder, fingerprint, load_tokenizer
from launcher.cli import main
from trainer import filter
from trainer.embed import Embedder, load_model

CPU = torch.device("cpu")
SOURCES = {"alpha": "en", "beta": "de", "gamma": ""}


def _records(source: str, lang: str, count: int = 40) -> list[Record]:
    """Pairs that share words, so that even random weights rank most passages first; some passages stand twice."""
    rng = random.Random(source)
    words = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]
    records = []
    for number in range(count):
        common = rng.sample(words, 5)
        query, passage = (" ".join(rng.sample(common, 5) + rng.sample(words, extra)) for extra in (1, 3))
        records.append(Record(query, passage, source, lang, f"{source}-{number}", (f"no {number}",)))
    return records + [replace(record, query=record.query + " too", id="") for record in records[:4]]


def _write(folder: Path, source: str, records: list[Record], model: Path) -> None:
    """Shards with tokens."""
    tokenizer = load_tokenizer(str(model))
    encoder = TextEncoder(tokenizer, 64)
    with ShardWriter(folder, source, block_records=16, shard_bytes=12_000, token_dtype="uint16") as writer:
        for record in records:
            query, passage, *negatives = encoder.body([record.query, record.passage, *record.negatives]).lists()
            writer.write(record, (query, passage, negatives))
    write_index(folder, writer.close(), {"fingerprint": fingerprint(tokenizer), "max_tokens": 64})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of shards with tokens, and a model."""
    root = tmp_path_factory.mktemp("filter")
    tiny.bert(root / "bert")
    for source, lang in SOURCES.items():
        _write(root / "shards" / source, source, _records(source, lang), root / "bert")
    return root


def _config(folder: Path, output: Path, **changes: Any) -> filter.Config:
    data = [str(folder / "shards" / source) for source in SOURCES]
    values = {"model": str(folder / "bert"), "data": data, "output": str(output), "device": "cpu", "seed": 7}
    return filter.Config(**{**values, "dtype": "float32", "tokens_per_chunk": 512, "rejects": 5, **changes})


def _filter(folder: Path, output: Path, changes: dict[str, Any] | None = None) -> None:
    filter.run(_config(folder, output, **(changes or {})))


def _kept(output: Path) -> list[Record]:
    data = mixture.load(str(output))
    return [record for unit in scan.units(data, 1) for record in as_records(scan.read(data, unit))]


def _report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


def _digests(output: Path) -> dict[str, str]:
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


def _counts(records: list[Record], pool: list[str], model: Path) -> np.ndarray:
    """How many texts of the pool beat each pair, at least and at most: every text embedded alone, compared in float64.

    They differ where a text is within float32's rounding of the margin by which it has to win.
    """
    embedder = Embedder(load_model(str(model), CPU), CPU)

    def vectors(texts: list[str]) -> np.ndarray:
        return torch.cat([embedder([text]) for text in texts]).double().numpy()

    queries = vectors([f"query: {record.query}" for record in records])
    own = (queries * vectors([f"passage: {record.passage}" for record in records])).sum(axis=1)
    lead = queries @ vectors([f"passage: {text}" for text in pool]).T - own[:, None]
    other = np.array([text_hash(text) for text in pool]) != np.array([[text_hash(r.passage)] for r in records])
    counts: np.ndarray = np.array([((lead > margin) & other).sum(axis=1) for margin in (2.1e-5, 1.9e-5)]).T
    return counts


def test_a_pair_is_kept_when_fewer_than_k_passages_of_the_pool_beat_its_own(folder: Path, tmp_path: Path) -> None:
    _filter(folder, tmp_path / "kept", {"pool_size": 60, "top_k": 2})
    records = [record for source, lang in SOURCES.items() for record in _records(source, lang)]
    pool = pa.ipc.open_file(str(tmp_path / "kept" / "pool.arrow")).read_all()
    assert len(set(pool["hash"].to_pylist())) == 60
    counts = _counts(records, pool["text"].to_pylist(), folder / "bert")
    kept = _kept(tmp_path / "kept")
    close = [record for record, (least, most) in zip(records, counts, strict=True) if least < 2 <= most]
    wanted = [r for r, (_, most) in zip(records, counts, strict=True) if most < 2 or (r in close and r in kept)]
    assert 20 < len(wanted) < len(records) - 20
    assert len(close) < 3
    assert kept == wanted
    report = _report(tmp_path / "kept")
    assert (report["all"]["kept"], report["all"]["lost"]) == (len(wanted), len(records) - len(wanted))
    for source, lang in SOURCES.items():
        of_source = [record for record in wanted if record.source == source]
        entry = report["sources"][source]
        assert entry["languages"] == {lang or "und": {"kept": len(of_source), "lost": 44 - len(of_source)}}
        assert sum(entry["scores"]["kept"].values()) == len(of_source)
    beaten = {(r.query, r.passage): bounds for r, bounds in zip(records, counts, strict=True)}
    rejects = [json.loads(line) for line in (tmp_path / "kept" / "rejects.jsonl").read_text().splitlines()]
    rejected = {
        source: sum(r.source == source for r in records) - report["sources"][source]["kept"] for source in SOURCES
    }
    assert [reject["source"] for reject in rejects] == [s for s in SOURCES for _ in range(min(5, rejected[s]))]
    for reject in rejects:
        least, most = beaten[reject["query"], reject["passage"]]
        assert max(least, 2) <= reject["count"] <= most
    assert all(len(reject["rivals"]) == 2 and reject["rivals"][1]["score"] > reject["score"] for reject in rejects)


def test_index_tokens_sources_and_languages_are_kept(folder: Path, tmp_path: Path) -> None:
    _filter(folder, tmp_path / "kept", {"pool_size": 60})
    found = load_index(str(tmp_path / "kept"))
    before = load_index(str(folder / "shards" / "alpha"))
    assert found.tokenizer == before.tokenizer
    report = _report(tmp_path / "kept")
    assert {name: (records, langs) for name, (records, langs) in found.sources.items()} == {
        name: (entry["kept"], {lang: n["kept"] for lang, n in entry["languages"].items() if lang != "und"})
        for name, entry in report["sources"].items()
    }
    encoder = TextEncoder(load_tokenizer(str(folder / "bert")), 64)
    data = mixture.load(str(tmp_path / "kept"))
    for table in (scan.read(data, unit) for unit in scan.units(data, 1)):
        assert table["passage_tokens"].to_pylist() == encoder.body(table["passage"].to_pylist()).lists()
        assert [ids[0] for ids in table["negative_tokens"].to_pylist()] == encoder.body(
            [texts[0] for texts in table["negatives"].to_pylist()]
        ).lists()


def test_a_pool_larger_than_the_data_is_all_of_it_and_the_log_says_so(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "quintet")
    _filter(folder, tmp_path / "kept")
    assert "there are only 120 distinct passages; all are taken" in caplog.text
    assert _report(tmp_path / "kept")["pool"]["passages"] == 120


def test_what_a_mixture_file_says_is_in_the_kept_records_and_in_the_prompts(folder: Path, tmp_path: Path) -> None:
    text = f"sources: {{twins: {{shards: {folder / 'shards' / 'alpha'}, symmetric: true, instruction: Match it}}}}"
    (tmp_path / "mixture.yaml").write_text(text)
    _filter(folder, tmp_path / "kept", {"data": str(tmp_path / "mixture.yaml"), "top_k": 3})
    kept = _kept(tmp_path / "kept")
    assert {(record.symmetric, record.instruction) for record in kept} == {(True, "Match it")}
    assert list(load_index(str(tmp_path / "kept")).sources) == ["twins"]
    assert {record.id for record in kept} <= {record.id for record in _records("alpha", "en")}


def test_planted_noise_is_found_counted_and_not_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _filter(folder, tmp_path / "kept", {"plant_noise": 0.3, "top_k": 10})
    report = _report(tmp_path / "kept")
    records = {(record.query, record.passage) for source, lang in SOURCES.items() for record in _records(source, lang)}
    kept = _kept(tmp_path / "kept")
    assert {(record.query, record.passage) for record in kept} <= records
    planted = report["all"]["noise"]
    assert planted["planted"] == pytest.approx(0.3 * 132, abs=4)
    assert len(kept) == report["all"]["kept"] - (planted["planted"] - planted["found"])
    assert planted["recall"] == pytest.approx(planted["found"] / planted["planted"], abs=1e-4)
    assert planted["precision"] == pytest.approx(planted["found"] / report["all"]["lost"], abs=1e-4)
    assert planted["recall"] > 0.6  # a wrong pair is among the first ten of 120 one time in twelve
    printed = capsys.readouterr().out
    assert "precision" in printed
    assert f"{planted['recall']:.3f}" in printed


def test_noise_that_the_data_bring_along_is_reported_and_treated_like_any_pair(folder: Path, tmp_path: Path) -> None:
    data = mixture.load([str(folder / "shards" / source) for source in SOURCES])
    noise.plant(data, tmp_path / "noisy", 0.3, seed=3)
    right = {(r.query, r.passage) for source, lang in SOURCES.items() for r in _records(source, lang)}
    everything = _kept(tmp_path / "noisy")
    marked = [record for record in everything if record.id.startswith(noise.PLANTED)]
    assert all(((r.query, r.passage) in right) == (r not in marked) for r in everything)
    assert len(marked) == pytest.approx(0.3 * 132, abs=4)
    _filter(folder, tmp_path / "kept", {"data": str(tmp_path / "noisy"), "top_k": 10})
    counted = _report(tmp_path / "kept")["all"]["noise"]
    kept = [record for record in _kept(tmp_path / "kept") if record.id.startswith(noise.PLANTED)]
    assert (counted["planted"], counted["planted"] - counted["found"]) == (len(marked), len(kept))


def _on_rank(folder: Path, output: Path) -> None:
    _filter(folder, output, {"pool_size": 60})


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "kept"
    _filter(folder, output, {"pool_size": 60})
    return _digests(output)


def test_the_files_are_those_one_expects(whole: dict[str, str]) -> None:
    beside = {"index.json", "pool.arrow", "rejects.jsonl", "report.json", "scores.png"}
    assert set(whole) == beside | {f"{source}-000000.tar" for source in SOURCES}


def test_two_ranks_write_the_files_of_one(folder: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    ranks.run(_on_rank, 2, tmp_path, folder, tmp_path / "kept")
    assert _digests(tmp_path / "kept") == whole


def test_a_run_that_is_killed_again_and_again_finishes_every_part_once_and_writes_the_same_files(
    folder: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    finished = kills.until_done(
        _on_rank, folder, tmp_path / "kept", log=tmp_path / "log", preload="trainer.consistency", every=7
    )
    assert _digests(tmp_path / "kept") == whole
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    written = [name for name in finished if name.startswith(("pool", "verdicts", "kept"))]
    assert len(written) == len(set(written)) > 30


def test_a_full_disk_ends_with_one_message_and_loses_nothing(
    folder: Path, tmp_path: Path, whole: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(folder, tmp_path / "kept", pool_size=60)
    words = [f"{name}={json.dumps(value)}" for name, value in vars(config).items() if name != "wandb"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))  # the kernel refuses larger files much like a full disk
    try:
        assert main(["filter", *words]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written (File too large" in message
    assert "make room" in message
    assert not (tmp_path / "kept").exists()
    assert main(["filter", *words]) == 0
    assert _digests(tmp_path / "kept") == whole


def test_a_finished_output_is_left_alone_and_one_of_other_settings_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _filter(folder, tmp_path / "kept", {"pool_size": 20})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    _filter(folder, tmp_path / "kept", {"pool_size": 20})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()} == before
    words = [f"model={folder / 'bert'}", f"data={folder / 'shards' / 'alpha'}", f"output={tmp_path / 'kept'}"]
    assert main(["filter", *words]) == 2
    assert "set overwrite=true" in capsys.readouterr().err
    assert main(["filter", *words, "overwrite=true", "top_k=1"]) == 0
    assert list(_report(tmp_path / "kept")["sources"]) == ["alpha"]


def test_damaged_shards_stop_the_filter_or_are_counted(folder: Path, tmp_path: Path) -> None:
    for source in SOURCES:
        _write(tmp_path / source, source, _records(source, ""), folder / "bert")
    tar = tmp_path / "beta" / "beta-000000.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1  # in the first of its blocks, of 16 records
    tar.write_bytes(content)
    words = [f"model={folder / 'bert'}", f"data=[{tmp_path / 'alpha'},{tmp_path / 'beta'}]", "top_k=200"]
    assert main(["filter", *words, f"output={tmp_path / 'kept'}"]) == 3
    assert main(["filter", *words, f"output={tmp_path / 'kept'}", "damaged=skip"]) == 0
    assert _report(tmp_path / "kept")["sources"]["beta"]["unreadable"] == 16
    assert len(_kept(tmp_path / "kept")) == 88 - 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"data": "nowhere"}, "data='nowhere': no such folder or file"),
        ({"plant_noise": "1.5"}, "plant_noise=1.5: must be below 1"),
        ({"output": "{folder}"}, "name another"),
    ],
)
def test_mistakes_are_one_message(
    folder: Path, tmp_path: Path, change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model": folder / "bert", "data": folder / "shards" / "alpha", "output": tmp_path / "kept", **change}
    words = [f"{name}={str(value).format(folder=folder)}" for name, value in values.items()]
    assert main(["filter", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert index.INDEX_NAME not in [path.name for path in tmp_path.rglob("*")]
