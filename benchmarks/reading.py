"""Reading shards: records a second beside webdataset, in one process, alternating, on the same files.

    python -m benchmarks.reading [--quick]

Every reader must first give the same texts in the same order. Each then hands out all queries and passages as Python
strings ("texts"), which is what webdataset gives; "columns" is what our trainer takes. Ours checks the hash of every
span and the rules of every record, and adds the hashes of the texts; webdataset checks nothing. "warm" is with the
files in the page cache, "cold" without.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import webdataset
from rich.console import Console
from rich.table import Table

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
    """The same records as webdataset writes them, and as we write them in blocks."""
    foreign, own = folder / "webdataset", folder / "blocks"
    foreign.mkdir()
    pattern = str(foreign / "pairs-%06d.tar")
    with (
        webdataset.ShardWriter(pattern, maxcount=_SAMPLES_PER_SHARD, verbose=0) as plain,
        ShardWriter(own, "pairs") as blocks,
    ):
        for number, record in enumerate(_records(count)):
            sample = {"query": record.query, "passage": record.passage, "lang": record.lang}
            plain.write({"__key__": f"{number:08d}", "json": orjson.dumps(sample)})
            blocks.write(record)
    write_index(own, blocks.close())
    return {"plain": foreign, "blocks": own}


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


# (name, the files it reads, how); the second is what ours is compared with.
_READERS: tuple[tuple[str, str, Callable[[Path], int]], ...] = (
    ("webdataset, .decode()", "plain", _count_texts(_webdataset_default)),
    ("webdataset, orjson", "plain", _count_texts(_webdataset_best)),
    ("ours, plain, texts", "plain", _count_texts(_texts)),
    ("ours, plain, columns", "plain", _count_columns),
    ("ours, blocks, texts", "blocks", _count_texts(_texts)),
    ("ours, blocks, columns", "blocks", _count_columns),
)
_PEER = "webdataset, orjson"


def _check_same_texts(folders: dict[str, Path], count: int) -> None:
    """The gate: no reader is timed before all of them give the records that were written."""
    expected = [(record.query, record.passage) for record in _records(count)]
    for read, kind in (
        (_webdataset_default, "plain"),
        (_webdataset_best, "plain"),
        (_texts, "plain"),
        (_texts, "blocks"),
    ):
        if list(read(folders[kind])) != expected:
            raise SystemExit(f"{read.__name__} on {kind} shards gives other texts than were written")


def _drop_from_cache(folder: Path) -> None:
    for name in _files(folder):
        handle = os.open(name, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _rates(folders: dict[str, Path], count: int, rounds: int, cold: bool) -> dict[str, float]:
    """Records a second: the median of `rounds` passes of each reader, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in _READERS}
    for _ in range(rounds):
        for name, kind, read in _READERS:
            if cold:
                _drop_from_cache(folders[kind])
            started = time.perf_counter()
            found = read(folders[kind])
            seconds[name].append(time.perf_counter() - started)
            assert found == count
    return {name: count / statistics.median(times) for name, times in seconds.items()}


def measure(quick: bool = False) -> dict[str, Any]:
    """Write the shards, check the readers against each other, time them; records a second and ratios to the peer."""
    count, rounds = (10_000, 3) if quick else (100_000, 5)
    with tempfile.TemporaryDirectory() as temporary:
        folders = _write(Path(temporary), count)
        started = time.perf_counter()
        build_index(folders["plain"])
        indexing = count / (time.perf_counter() - started)
        _check_same_texts(folders, count)
        sizes = {kind: sum(os.path.getsize(name) for name in _files(folder)) for kind, folder in folders.items()}
        rates = {state: _rates(folders, count, rounds, state == "cold") for state in ("warm", "cold")}
    ratios = {state: {name: rate / found[_PEER] for name, rate in found.items()} for state, found in rates.items()}
    return {
        "records": count,
        "rounds": rounds,
        "bytes": sizes,
        "peer": f"webdataset {webdataset.__version__}: {_PEER}",
        "records_per_s": rates,
        "ratio_to_peer": ratios,
        "indexing_records_per_s": indexing,
    }


def main() -> None:
    """Measure and print a table."""
    result = measure(quick="--quick" in sys.argv[1:])
    table = Table("reader", "warm, records/s", "x peer", "cold, records/s", "x peer")
    table.title = f"{result['records']:,} records, medians of {result['rounds']}; peer: {result['peer']}"
    for name, _, _ in _READERS:
        cells = [
            f"{result[key][state][name]:{form}}"
            for state in ("warm", "cold")
            for key, form in (("records_per_s", ",.0f"), ("ratio_to_peer", ".1f"))
        ]
        table.add_row(name, *cells)
    Console().print(table)
    print(f"first use of a plain folder: {result['indexing_records_per_s']:,.0f} records/s are indexed, once")


if __name__ == "__main__":
    main()
