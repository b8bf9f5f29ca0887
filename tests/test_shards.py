"""Shards are written, indexed, found and read back; what may not be opened is refused."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow as pa
import pytest
import webdataset
from pairs import pairs, write_shards

from data import fetch, opening
from data.errors import DataError, UserError
from data.index import Index, decode, encode
from data.records import Record, text_hash
from data.shards import ShardInfo, ShardWriter, build_index, load_index, read_block, verify, write_index


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUINTET_CACHE", str(folder))
    monkeypatch.setattr(fetch, "FIRST_WAIT_SECONDS", 0.0)
    return folder


def rows(index: Index) -> list[dict[str, object]]:
    tables = [read_block(index, s, b).table for s, shard in enumerate(index.shards) for b in range(len(shard.blocks))]
    return pa.concat_tables(tables).to_pylist() if tables else []


def texts(index: Index) -> list[tuple[object, object]]:
    return [(row["query"], row["passage"]) for row in rows(index)]


def foreign(folder: Path, count: int = 30, per_shard: int = 10) -> list[dict[str, object]]:
    """Shards as any user of webdataset writes them."""
    samples: list[dict[str, object]] = [
        {"query": f"q {n} ü", "passage": f"p {n}", "lang": "de" if n % 3 else "el"} for n in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / "news-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"doc/{number:05d}", "json": sample})
    return samples


# Writing


@pytest.mark.parametrize("kind", ["block", "plain"])
def test_records_come_back_in_order_with_their_hashes(tmp_path: Path, kind: str) -> None:
    records = [*pairs(20, negatives=2), Record("a  b", "c", instruction="Do", symmetric=True), *pairs(9, seed=1)]
    index = write_shards(tmp_path, records, kind=kind)
    found = rows(load_index(str(tmp_path)))
    assert index.records == len(found) == 30
    for record, row in zip(records, found, strict=True):
        assert row["source"] == "pairs"
        assert (row["query"], row["passage"], row["lang"]) == (record.query, record.passage, record.lang)
        assert row["negatives"] == list(record.negatives)
        assert (row["instruction"], row["symmetric"], row["id"]) == (record.instruction, record.symmetric, record.id)
        assert (row["query_hash"], row["passage_hash"]) == (text_hash(record.query), text_hash(record.passage))
        assert row["negative_hash"] == [text_hash(text) for text in record.negatives]


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    records = pairs(25)
    index = write_shards(tmp_path, records, kind="plain", shard_bytes=10_240)
    assert len(index.shards) > 1
    urls = [index.path(number) for number in range(len(index.shards))]
    read = [sample["json"] for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()]
    assert [(row["query"], row["passage"]) for row in read] == [(r.query, r.passage) for r in records]


def test_equal_records_give_equal_files_and_python_reads_them(tmp_path: Path) -> None:
    for kind in ("block", "plain"):
        first = write_shards(tmp_path / "a", pairs(20), kind=kind, source=kind)
        second = write_shards(tmp_path / "b", pairs(20), kind=kind, source=kind)
        assert Path(first.path(0)).read_bytes() == Path(second.path(0)).read_bytes()
        assert first.fingerprint == second.fingerprint
        with tarfile.open(first.path(0)) as archive:
            assert {Path(name).suffix for name in archive.getnames()} == {".arrow" if kind == "block" else ".json"}


def test_shards_are_closed_at_their_size_and_described_exactly(tmp_path: Path) -> None:
    index = write_shards(tmp_path, pairs(200), shard_bytes=20_000, block_records=10)
    assert [shard.file for shard in index.shards] == [f"pairs-{n:06d}.tar" for n in range(len(index.shards))]
    for shard in index.shards[:-1]:
        assert 20_000 <= shard.bytes < 20_000 + 2 * max(block.bytes for block in shard.blocks) + 10_240
    for number, shard in enumerate(index.shards):
        digest = subprocess.run(["sha256sum", index.path(number)], capture_output=True, check=True, text=True)
        assert digest.stdout.split()[0] == shard.sha256
    assert index.sources == {"pairs": (200, dict.fromkeys(["de", "el", "en", "ja"], 50))}


def test_block_members_are_mapped_not_copied(tmp_path: Path) -> None:
    index = write_shards(tmp_path, pairs(2000), block_records=2000)
    before = pa.total_allocated_bytes()
    block = read_block(index, 0, 0)
    assert block.good == 2000
    assert block.table.nbytes > 100_000
    assert pa.total_allocated_bytes() - before < block.table.nbytes / 20


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_come_back_beside_the_texts(tmp_path: Path, dtype: str) -> None:
    records = pairs(5, negatives=2)
    tokens = [([1, n], [2, 3, n], [[4], [5, 60_000]]) for n in range(5)]
    with ShardWriter(tmp_path, "t", token_dtype=dtype, block_records=3) as writer:
        for record, ids in zip(records, tokens, strict=True):
            writer.write(record, ids)
    index = write_index(tmp_path, writer.close(), {"fingerprint": "abc", "name": "tiny"})
    found = rows(load_index(tmp_path))
    assert [(r["query_tokens"], r["passage_tokens"], r["negative_tokens"]) for r in found] == tokens
    table = read_block(index, 0, 0).table
    assert table.schema.field("query_tokens").type == pa.list_(pa.type_for_alias(dtype))
    assert load_index(tmp_path).tokenizer == {"fingerprint": "abc", "name": "tiny"}


def test_a_token_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pa.ArrowInvalid), ShardWriter(tmp_path, "t", token_dtype="uint16") as writer:
        writer.write(Record("a", "b"), ([70_000], [1], []))
    assert list(tmp_path.iterdir()) == []


def test_an_index_with_a_tokenizer_wants_tokens_in_every_block(tmp_path: Path) -> None:
    index = write_shards(tmp_path, pairs(3))
    write_index(tmp_path, index.shards, {"fingerprint": "abc"})
    with pytest.raises(DataError, match="no tokens, though the index names a tokenizer"):
        read_block(load_index(tmp_path), 0, 0)


def test_an_interrupted_writer_leaves_complete_shards_only(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path, "s", block_records=4, shard_bytes=1) as writer:
            for record in [*pairs(10), None]:
                writer.write(record)  # type: ignore[arg-type]

    with pytest.raises(AttributeError):
        write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-000000.tar", "s-000001.tar"]


def test_a_source_that_is_no_file_name_is_refused(tmp_path: Path) -> None:
    for source in ("../up", "a/b", "", ".hidden", "ä"):
        with pytest.raises(UserError, match="source="):
            ShardWriter(tmp_path, source)


# The index


def test_the_index_survives_its_file_and_the_folder_may_move(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "a", pairs(30), kind="plain", shard_bytes=10_240)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = load_index(tmp_path / "b")
    assert moved.shards == index.shards
    assert moved.fingerprint == index.fingerprint
    assert write_shards(tmp_path / "c", pairs(30, seed=1)).fingerprint != index.fingerprint


def hostile(**change: object) -> dict[str, object]:
    shard = {
        "file": "a-000000.tar",
        "source": "a",
        "kind": "plain",
        "records": 3,
        "bytes": 10_240,
        "sha256": "0" * 64,
        "languages": {"de": 3},
        "blocks": [[0, 3072, 3, "0" * 16]],
    }
    return {"format": "quintet-shards-1", "shards": [shard | change], "sources": {}, "tokenizer": None}


def test_the_hostile_cases_differ_from_a_sound_index() -> None:
    assert decode(orjson.dumps(hostile()), "", "index.json").records == 3


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"format": "something else"},
        hostile() | {"shards": {}},
        hostile() | {"shards": [7]},
        hostile() | {"shards": hostile()["shards"] * 2},  # type: ignore[operator]
        hostile() | {"tokenizer": "abc"},
        hostile() | {"tokenizer": {"name": "abc"}},
        hostile(file="../a-000000.tar"),
        hostile(file="/etc/a.tar"),
        hostile(file="..\\a.tar"),
        hostile(file=".tar"),
        hostile(file="a.pickle"),
        hostile(file=5),
        hostile(source="../a"),
        hostile(source=None),
        hostile(kind="pickle"),
        hostile(records=-1),
        hostile(records=True),
        hostile(records=3.0),
        hostile(records=4),
        hostile(records=1 << 62, blocks=[[0, 3072, 1 << 62, "0" * 16]]),
        hostile(records=4, blocks=[[0, 3072, 4, "0" * 16]]),
        hostile(bytes=2048),
        hostile(bytes="10240"),
        hostile(sha256="0" * 63),
        hostile(languages={"de": 4}),
        hostile(languages=["de"]),
        hostile(blocks=None),
        hostile(blocks=[[0, 3072, 3]]),
        hostile(blocks=[[0, 3000, 3, "0" * 16]]),
        hostile(blocks=[[-512, 3072, 3, "0" * 16]]),
        hostile(blocks=[[0, 3072, 3, "0" * 16], [1024, 3072, 0, "0" * 16]]),
        hostile(blocks=[[0, 3072, 3, "zz"]]),
        hostile(blocks=[[0, 20_480, 3, "0" * 16]]),
        hostile(bad={"cut": -1}),
    ],
)
def test_a_hostile_index_is_refused_by_name(tmp_path: Path, content: object) -> None:
    (tmp_path / "index.json").write_bytes(orjson.dumps(content))
    with pytest.raises(DataError, match=r"index\.json.*the index"):
        load_index(tmp_path)


def test_an_index_that_is_no_json_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.json").write_text("{" * 5000)
    with pytest.raises(DataError, match="is not JSON"):
        load_index(tmp_path)
    monkeypatch.setattr("data.index.MAX_INDEX_BYTES", 4999)
    with pytest.raises(DataError, match="has 5000 bytes"):
        load_index(tmp_path)


def test_verify_names_the_block_that_changed_only_when_it_hashes(tmp_path: Path) -> None:
    index = write_shards(tmp_path, pairs(30), kind="plain")
    path = Path(index.path(0))
    content = bytearray(path.read_bytes())
    content[index.shards[0].blocks[0].offset + 520] ^= 1
    path.write_bytes(content)
    assert verify(index) == []
    (problem,) = verify(index, hashes=True)
    assert problem.startswith(("changed payload: ", "invalid JSON: ", "missing query: "))
    assert f"{path}, offset 0" in problem


def test_verify_finds_a_change_between_the_blocks(tmp_path: Path) -> None:
    index = write_shards(tmp_path, pairs(3))
    path = Path(index.path(0))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify(index, hashes=True) == [f"wrong hash: {path}, outside of its blocks"]


# Folders that others wrote


def test_a_folder_of_webdataset_is_indexed_on_first_use_and_read_like_webdataset_reads_it(tmp_path: Path) -> None:
    samples = foreign(tmp_path / "news")
    index = load_index(tmp_path / "news")
    assert [(r["query"], r["passage"], r["lang"]) for r in rows(index)] == [
        (s["query"], s["passage"], s["lang"]) for s in samples
    ]
    assert index.sources == {"news": (30, {"de": 20, "el": 10})}
    assert {row["source"] for row in rows(index)} == {"news"}
    stamp = (tmp_path / "news" / "index.json").stat().st_mtime_ns
    assert load_index(tmp_path / "news").fingerprint == index.fingerprint
    assert (tmp_path / "news" / "index.json").stat().st_mtime_ns == stamp


def test_long_plain_shards_are_cut_into_blocks_that_can_be_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.indexing.PLAIN_BLOCK_RECORDS", 4)
    samples = foreign(tmp_path / "news", per_shard=15)
    index = load_index(tmp_path / "news")
    assert [[block.records for block in shard.blocks] for shard in index.shards] == [[4, 4, 4, 3]] * 2
    assert read_block(index, 1, 2).table["query"].to_pylist() == [s["query"] for s in samples[23:27]]


def test_an_index_is_the_same_whether_we_wrote_the_shard_or_looked_through_it(tmp_path: Path) -> None:
    for kind in ("plain", "block"):
        written = write_shards(tmp_path / kind, pairs(20), kind=kind, block_records=1024)
        assert build_index(tmp_path / kind).shards == written.shards


def test_the_source_may_be_given(tmp_path: Path) -> None:
    foreign(tmp_path)
    assert list(build_index(tmp_path, source="other").sources) == ["other"]
    with pytest.raises(UserError, match=r"source='\.\./x'"):
        build_index(tmp_path, source="../x")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_in_every_tar_format(tmp_path: Path, form: int) -> None:
    names = ["a.json", "deep/" * 20 + "b.json", "x" * 90 + "/c.json"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long" * 60 + ".json", "Straße/é.json"]
    with tarfile.open(tmp_path / "s-000000.tar", "w", format=form) as archive:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            body = json.dumps({"query": name, "passage": "p"}).encode()
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    assert [query for query, _ in texts(load_index(tmp_path))] == names


def test_one_process_builds_an_index_that_many_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path / "news", count=10)
    built = []
    original = opening.index_shard

    def count(path: Path, *others: Any) -> ShardInfo:
        built.append(path)
        return original(path, *others)

    monkeypatch.setattr(opening, "index_shard", count)
    threads = [threading.Thread(target=load_index, args=(tmp_path / "news",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path / "news")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert load_index(tmp_path / "news").records == 30
    assert not (tmp_path / "news" / "index.json").exists()
    assert len(list((cache / "index").glob("*.json"))) == 1


# Where shards may be


def test_folders_files_globs_braces_and_lists_find_the_same_shards(tmp_path: Path) -> None:
    foreign(tmp_path / "a")
    write_shards(tmp_path / "b", pairs(20), source="own", shard_bytes=4096)
    everything = texts(load_index(tmp_path / "a"))
    here = str(tmp_path)
    assert texts(load_index(f"{here}/a/news-{{000000..000002}}.tar")) == everything
    assert texts(load_index(f"{here}/a/*.tar")) == everything
    assert texts(load_index(f"file://{here}/a")) == everything
    assert (
        texts(load_index([f"{here}/a/news-000002.tar", f"{here}/a/news-000000.tar"]))
        == everything[:10] + everything[20:]
    )
    both = load_index([f"{here}/a", f"{here}/b"])
    assert list(both.sources) == ["news", "own"]
    assert texts(both) == everything + texts(load_index(tmp_path / "b"))
    assert load_index(f"{here}/{{a,b}}").fingerprint == load_index(f"{here}/[ab]").fingerprint == both.fingerprint
    assert load_index(f"{here}/b/own-000001.tar").shards == load_index(tmp_path / "b").shards[1:2]


def test_a_shard_outside_of_the_index_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path, pairs(5))
    foreign(tmp_path)
    with caplog.at_level("WARNING", "quintet"):
        assert load_index(tmp_path).records == 5
    assert "3 tar files are not in its index" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{here}/nothing", "no such folder or file"),
        ("{here}/nothing.tar", "no index.json and no .tar file"),
        ("{here}/*.tar", "no folder and no .tar file has such a name"),
        ("{here}/empty", "no index.json and no .tar file"),
        ("{here}/x.tar.gz", "neither a folder nor a .tar file"),
        ("", "not a path"),
        ("{here}/a\nb", "not a path"),
        ("{here}/{{0..99999999999}}.tar", "stands for more than 1,000,000 files"),
        ("{here}/" + "{{a,b}}" * 40 + ".tar", "stands for more than 1,000,000 files"),
        ("{here}/{{a,b.tar", "braces are not balanced"),
        ("ftp://host/a.tar", "ftp: is not read"),
        ("data:text/plain,a.tar", "data: is not read"),
        ("s3://bucket/a.tar::pipe:touch x", "not a path"),
    ],
)
def test_what_is_not_there_or_not_readable_is_one_clear_message(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=message) as caught:
        load_index(spec.format(here=tmp_path))
    assert str(caught.value).startswith("data=")


def test_no_list_of_nothing() -> None:
    with pytest.raises(UserError, match="no shards are named"):
        load_index([])


def test_no_spec_can_start_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    foreign(tmp_path / "news")
    monkeypatch.setenv("WDS_X", f"pipe:touch {canary}")
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {canary};")
    for spec in (
        f"pipe:touch {canary}",
        f"PIPE:touch {canary}",
        f"{{pipe,x}}:touch {canary}",
        f"{{{tmp_path}/news,pipe:touch {canary}}}",
        "${X}",
        f"{tmp_path}/news; touch {canary}",
        f"$(touch {canary})",
        f"`touch {canary}`.tar",
    ):
        with pytest.raises(UserError):
            load_index(spec)
    assert load_index(tmp_path / "news").records == 30
    assert write_shards(tmp_path / "own", pairs(3)).records == 3
    assert not canary.exists()


def test_a_pipe_that_is_allowed_runs_one_command_without_a_shell(tmp_path: Path) -> None:
    samples = foreign(tmp_path / "news")
    index = load_index(f"pipe:cat {tmp_path}/news/news-00000{{0..2}}.tar", allow_pipe=True)
    assert [query for query, _ in texts(index)] == [sample["query"] for sample in samples]
    with pytest.raises(UserError, match="no shell runs it"):
        load_index(f"pipe:cat x.tar | touch {tmp_path}/canary", allow_pipe=True)
    with pytest.raises(DataError, match=r"gave up after 5 attempts.*ended with code 1"):
        load_index(f"pipe:cat {tmp_path}/none.tar", allow_pipe=True)
    assert not (tmp_path / "canary").exists()


# Shards elsewhere


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of ours in fsspec's memory store."""
    monkeypatch.setitem(fetch.STORES, "memory", "fsspec")
    write_shards(tmp_path / "there", pairs(30), shard_bytes=1)
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/there/", "/bucket/set/", recursive=True)
    yield "memory://bucket/set"
    store.rm("/bucket", recursive=True)


def test_a_store_is_copied_once_and_read_like_a_folder(tmp_path: Path, bucket: str, cache: Path) -> None:
    index = load_index(bucket)
    assert texts(index) == texts(load_index(tmp_path / "there"))
    assert index.folder.startswith(str(cache))
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*.tar")}
    assert len(stamps) == len(index.shards)
    assert texts(load_index(f"{bucket}/pairs-{{000000..000001}}.tar")) == texts(index)[:16]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.tar")} == stamps


def test_a_store_without_an_index_is_copied_by_name_and_indexed(bucket: str) -> None:
    fsspec.filesystem("memory").rm("/bucket/set/index.json")
    with pytest.raises(UserError, match=r"name its \.tar files"):
        load_index(bucket)
    assert load_index(f"{bucket}/pairs-000001.tar").records == 8


def test_a_shard_that_is_not_the_one_of_the_index_is_not_taken(bucket: str) -> None:
    store = fsspec.filesystem("memory")
    content = store.cat("/bucket/set/pairs-000000.tar")
    store.pipe("/bucket/set/pairs-000000.tar", content[:600] + b"x" + content[601:])
    with pytest.raises(DataError, match=r"gave up after 5 attempts.*SHA-256"):
        load_index(bucket)
    store.pipe("/bucket/set/pairs-000000.tar", content + bytes(512))
    with pytest.raises(DataError, match=r"gave up after 5 attempts.*more than the \d+ bytes expected"):
        load_index(bucket)
    store.rm("/bucket/set/pairs-000000.tar")
    with pytest.raises(DataError, match=r"missing shard: memory://bucket/set/pairs-000000\.tar"):
        load_index(bucket)
    index = load_index(bucket, policy="skip")
    block = read_block(index, 0, 0, policy="skip")
    assert (block.records, block.good, block.problems[0].partition(":")[0]) == (8, 0, "missing shard")


def test_a_full_disk_is_told_before_anything_is_copied(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"QUINTET_CACHE=.*are free"):
        load_index(bucket)


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Fails in another way at every first requests for a file, as its name's faults say."""

    faults: dict[str, list[str]] = {}  # noqa: RUF012 - replaced by each test
    over = threading.Event()

    def do_GET(self) -> None:
        waiting = self.faults.get(Path(self.path).name, [])
        fault = waiting.pop(0) if waiting else ""
        if fault.isdigit():
            self.send_error(int(fault))
        elif fault == "short":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
        elif fault == "stall":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.over.wait(60)
        elif fault == "hang up":
            self.connection.close()
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    write_shards(tmp_path / "web", pairs(30), kind="plain", shard_bytes=10_240)

    def handler(*args: object) -> Flaky:
        return Flaky(*args, directory=str(tmp_path / "web"))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}"
        Flaky.over.set()
        web.shutdown()
        thread.join()
    Flaky.faults = {}
    Flaky.over.clear()


def test_a_flaky_server_changes_nothing_but_time(tmp_path: Path, server: str) -> None:
    Flaky.faults = {"index.json": ["503"], "pairs-000000.tar": ["500", "short", "hang up", "429"]}
    assert texts(load_index(server)) == texts(load_index(tmp_path / "web"))
    assert not any(Flaky.faults.values())


def test_an_index_of_no_sane_size_is_not_read(server: str) -> None:
    with pytest.raises(DataError, match=r"index\.json: larger than 10 bytes, which is too large for an index"):
        fetch.read(f"{server}/index.json", 10)


def test_a_stalled_transfer_is_given_up_and_repeated(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_SECONDS", 0.3)
    Flaky.faults = {"pairs-000000.tar": ["stall"]}
    assert texts(load_index(server)) == texts(load_index(tmp_path / "web"))
    assert not Flaky.faults["pairs-000000.tar"]


def test_a_server_that_stays_down_ends_with_one_message(server: str) -> None:
    Flaky.faults = {"pairs-000000.tar": ["500"] * 5}
    with pytest.raises(DataError, match=r"pairs-000000\.tar: gave up after 5 attempts.*500"):
        load_index(server)


def test_a_refusal_is_not_repeated(server: str) -> None:
    Flaky.faults = {"pairs-000000.tar": ["403", "403"]}
    with pytest.raises(DataError, match="the server answers 403"):
        load_index(server)
    assert Flaky.faults["pairs-000000.tar"] == ["403"]


class Drip(io.BytesIO):
    """Gives two bytes at a time, as a socket would."""

    def read1(self, size: int | None = -1) -> bytes:
        return self.read(2)


def test_a_trickle_is_taken_for_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(fetch.time, "monotonic", lambda: next(clock))
    with pytest.raises(fetch.Interrupted, match="only 6 bytes in 75 s"):
        list(fetch._chunks(Drip(b"x" * 100), 100))


# What reading needs


def test_reading_imports_neither_torch_nor_webdataset(tmp_path: Path) -> None:
    write_shards(tmp_path, pairs(3))
    code = (
        "import sys; from data.shards import load_index, read_block\n"
        f"assert read_block(load_index({str(tmp_path)!r}), 0, 0).good == 3\n"
        "assert not {'torch', 'webdataset', 'fsspec', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_text_of_an_index_is_read_back_as_it_was(tmp_path: Path) -> None:
    index = write_shards(tmp_path, pairs(10))
    assert decode(encode(index), index.folder, "x") == index
