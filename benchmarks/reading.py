"""Reading shards: records a second beside webdataset, in one process, alternating, on the same files.

The tars are those that webdataset's own writer makes (with two headers a member), our plain ones, and our blocks,
which webdataset cannot read: they are compared with its fastest. Every reader must first give the same texts in the
same order. Then "texts" hands out all queries and passages as Python strings, as webdataset does; "columns" is what
our trainer takes. Ours checks the hash of every span and the rules of every record, and adds the hashes of the texts;
webdataset checks nothing. "warm" is with the files in the page cache, "cold" without.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import webdataset

from benchmarks import common
from data.records import Record
from data.shards import ShardWriter, build_index, load_index, read_block, write_index

Texts = Iterator[tuple[str, str]]

_ALPHABETS = {
    "en": "etaoinshrdlucmfwypvbgkqjxz",
    "de": "enisratdhulcgmobwfkzpväüöß",
    "el": "αοιετσνηυρπκμλςωδγχθφβξζψέ",
    "ja": "川石光窓紙朝銅庭手のはをにがとでもしたるい",
}
_SAMPLES_PER_SHARD = 20_000


def _records(count: int) -> Iterator[Record]:
    """Texts of natural lengths, half of them English: queries of 3 to 12 words, passages of 20 to 60."""
    rng = random.Random(0)
    words = {
        lang: ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
        for lang, letters in _ALPHABETS.items()
    }
    for number in range(count):
        lang = "en" if number % 2 else rng.choice(["de", "el", "ja"])
        query, passage = (" ".join(rng.choices(words[lang], k=rng.randint(*r))) for r in ((3, 12), (20, 60)))
        yield Record(f"{query} {number}", f"{passage} {number}", lang=lang)


def _write(folder: Path, count: int) -> dict[str, Path]:
    """The same records as webdataset writes them, as we write them plain, and as we write them in blocks."""
    folders = {name: folder / name for name in ("webdataset", "plain", "blocks")}
    folders["webdataset"].mkdir()
    pattern = str(folders["webdataset"] / "pairs-%06d.tar")
    with (
        webdataset.ShardWriter(pattern, maxcount=_SAMPLES_PER_SHARD, verbose=0) as foreign,
        ShardWriter(folders["plain"], "pairs", kind="plain") as plain,
        ShardWriter(folders["blocks"], "pairs") as blocks,
    ):
        for number, record in enumerate(_records(count)):
            sample = {"query": record.query, "passage": record.passage, "lang": record.lang}
            foreign.write({"__key__": f"{number:08d}", "json": orjson.dumps(sample)})
            plain.write(record)
            blocks.write(record)
    write_index(folders["plain"], plain.close())
    write_index(folders["blocks"], blocks.close())
    return folders


def _files(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def _webdataset_default(folder: Path) -> Texts:
    for sample in webdataset.WebDataset(_files(folder), shardshuffle=False).decode():
        yield sample["json"]["query"], sample["json"]["passage"]


def _webdataset_best(folder: Path) -> Texts:
    """Without its generic decoding, and with a faster JSON decoder than its own."""
    for sample in webdataset.WebDataset(_files(folder), shardshuffle=False).map(lambda s: orjson.loads(s["json"])):
        yield sample["query"], sample["passage"]


def _columns(folder: Path) -> Iterator[Any]:
    index = load_index(folder)
    for shard, info in enumerate(index.shards):
        for block in range(len(info.blocks)):
            yield read_block(index, shard, block).table


def _texts(folder: Path) -> Texts:
    for table in _columns(folder):
        yield from zip(table["query"].to_pylist(), table["passage"].to_pylist(), strict=True)


def _count_texts(read: Callable[[Path], Texts]) -> Callable[[Path], int]:
    return lambda folder: sum(1 for _ in read(folder))


def _count_columns(folder: Path) -> int:
    return sum(table.num_rows for table in _columns(folder))


# (name, whose tars, how, with whom on which tars it is compared: the peer's faster way on the same ones, and for
# blocks, which webdataset cannot read, the peer's fastest).
_PEER = "webdataset, orjson"
_READERS: tuple[tuple[str, str, Callable[[Path], int], str], ...] = (
    ("webdataset, .decode()", "webdataset", _count_texts(_webdataset_default), "webdataset"),
    (_PEER, "webdataset", _count_texts(_webdataset_best), "webdataset"),
    ("ours, texts", "webdataset", _count_texts(_texts), "webdataset"),
    ("ours, columns", "webdataset", _count_columns, "webdataset"),
    ("webdataset, .decode()", "plain", _count_texts(_webdataset_default), "plain"),
    (_PEER, "plain", _count_texts(_webdataset_best), "plain"),
    ("ours, texts", "plain", _count_texts(_texts), "plain"),
    ("ours, columns", "plain", _count_columns, "plain"),
    ("ours, texts", "blocks", _count_texts(_texts), "plain"),
    ("ours, columns", "blocks", _count_columns, "plain"),
)


def _check_same_texts(folders: dict[str, Path], count: int) -> None:
    """The gate: no reader is timed before all of them give the records that were written."""
    expected = [(record.query, record.passage) for record in _records(count)]
    for kind, folder in folders.items():
        readers = (_texts,) if kind == "blocks" else (_webdataset_default, _webdataset_best, _texts)
        for read in readers:
            if list(read(folder)) != expected:
                raise SystemExit(f"{read.__name__} gives other texts of the {kind} shards than were written")


def _drop_from_cache(folder: Path) -> None:
    for name in _files(folder):
        handle = os.open(name, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _rates(folders: dict[str, Path], count: int, rounds: int, cold: bool) -> list[float]:
    """Records a second of each reader: the median of `rounds` passes, taken in turns."""
    seconds: list[list[float]] = [[] for _ in _READERS]
    for _ in range(rounds):
        for times, (_, kind, read, _) in zip(seconds, _READERS, strict=True):
            if cold:
                _drop_from_cache(folders[kind])
            started = time.perf_counter()
            found = read(folders[kind])
            times.append(time.perf_counter() - started)
            assert found == count
    return [count / statistics.median(times) for times in seconds]


def measure(quick: bool = False) -> dict[str, Any]:
    """Write the shards, check the readers against each other, time them; records a second and ratios to the peer."""
    count, rounds = (4_000, 1) if quick else (100_000, 3)
    with tempfile.TemporaryDirectory() as temporary:
        folders = _write(Path(temporary), count)
        started = time.perf_counter()
        build_index(folders["webdataset"])
        indexing = count / (time.perf_counter() - started)
        _check_same_texts(folders, count)
        sizes = {kind: sum(os.path.getsize(name) for name in _files(folder)) for kind, folder in folders.items()}
        warm, cold = (_rates(folders, count, rounds, cold) for cold in (False, True))
    rows = _rows(warm, cold)
    title = f"{count:,} records, medians of {rounds}; peer: {_PEER}, on the same tars, for blocks on our plain ones"
    return {
        "settings": {"records": count, "rounds": rounds, "bytes": sizes},
        "indexing_records_per_s": indexing,
        "tables": [
            common.table(title, rows),
            common.table("indexing", [{"first use of a folder without an index, records/s": round(indexing)}]),
        ],
        "targets": [_target(kind, rows) for kind in ("webdataset", "plain", "blocks")],
    }


def _rows(warm: list[float], cold: list[float]) -> list[dict[str, Any]]:
    """A line for each reader: records a second, and over the peer's."""
    places = {(name, kind): row for row, (name, kind, _, _) in enumerate(_READERS)}
    rows: list[dict[str, Any]] = []
    for row, (name, kind, _, peer) in enumerate(_READERS):
        line: dict[str, Any] = {"tars of": kind, "reader": name}
        for state, rates in (("warm", warm), ("cold", cold)):
            line[f"{state}, records/s"] = round(rates[row])
            line[f"{state}, x peer"] = rates[row] / rates[places[_PEER, peer]]
        rows.append(line)
    return rows


def _target(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Five times the peer, as it was promised, for the slower of warm and cold."""
    (ours,) = (row for row in rows if row["tars of"] == kind and row["reader"] == "ours, texts")
    slower = min(ours["warm, x peer"], ours["cold, x peer"])
    return common.target(f"texts of {kind} shards, records/s over the peer's", 5.0, slower)
