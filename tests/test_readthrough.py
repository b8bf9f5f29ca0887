"""Shards that are copied when they are read, from a real HTTP server that counts, fails, stalls and drips."""

from __future__ import annotations

import http.server
import itertools
import multiprocessing
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pairs import pairs, write_shards

from data import fetch, mixture, readthrough
from data.errors import DataError, UserError
from data.index import Index
from data.reading import read_block
from data.shards import load_index
from data.stream import Stream

SHARDS = 12
LIMIT = 4  # shards that the cache has room for


class Web(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `faults` holds what happens to the next requests for a file."""

    asked: Counter[str] = Counter()  # noqa: RUF012
    faults: dict[str, list[str]] = {}  # noqa: RUF012 - replaced by each test
    over = threading.Event()

    def do_GET(self) -> None:
        name = Path(self.path).name
        self.asked[name] += 1
        waiting = self.faults.get(name, [])
        fault = waiting.pop(0) if waiting else ""
        if not fault:
            super().do_GET()
        elif fault.isdigit():
            self.send_error(int(fault))
        else:
            self.send_response(200)
            self.send_header("Content-Length", "10240")
            self.end_headers()
            self.wfile.write(b"x" * 500)
            self.wfile.flush()
            if fault == "stall":
                self.over.wait(60)
            while fault == "drip" and not self.over.wait(0.02):
                try:
                    self.wfile.write(b"x")
                except OSError:  # the other side has had enough
                    return

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of 12 shards of equal sizes, of 8 records in two blocks each."""
    write_shards(tmp_path / "web", pairs(8 * SHARDS), kind="plain", block_records=4, shard_bytes=8 * 1024)
    return tmp_path / "web"


@pytest.fixture
def url(source: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[str]:
    class Here(Web):
        asked: Counter[str] = Counter()  # noqa: RUF012
        faults: dict[str, list[str]] = {}  # noqa: RUF012

    def handler(*args: Any) -> Web:
        return Here(*args, directory=str(source))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setattr(sys.modules[__name__], "Web", Here)
        yield f"http://127.0.0.1:{server.server_port}"
        Web.over.set()
        server.shutdown()
        thread.join()
    Web.over.clear()


@pytest.fixture
def cache(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, with room for LIMIT of the shards."""
    largest = max(path.stat().st_size for path in source.glob("*.tar"))
    monkeypatch.setenv("QUINTET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QUINTET_CACHE_GB", f"{(LIMIT * largest + 100) / 1e9:.9f}")
    monkeypatch.setattr(fetch, "FIRST_WAIT_SECONDS", 0.0)
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*.tar"))


def read(index: Index, shard: int) -> list[Any]:
    return [read_block(index, shard, block).table.to_pylist() for block in range(len(index.shards[shard].blocks))]


def test_nothing_is_copied_before_it_is_read_and_then_once(source: Path, url: str, cache: Path) -> None:
    index, local = load_index(url), load_index(source)
    assert len(index.shards) == SHARDS
    assert kept(cache) == []
    for _ in range(2):
        for shard in (3, 5):
            assert read(index, shard) == read(local, shard)
    assert kept(cache) == ["pairs-000003.tar", "pairs-000005.tar"]
    assert {name: count for name, count in Web.asked.items() if name.endswith(".tar")} == {
        "pairs-000003.tar": 1,
        "pairs-000005.tar": 1,
    }


def test_what_was_read_longest_ago_makes_room(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readthrough, "_TOUCH_SECONDS", -1.0)
    index = load_index(url)
    for shard in (0, 1, 2, 3, 0, 4, 5):
        read(index, shard)
    assert kept(cache) == [f"pairs-{number:06d}.tar" for number in (0, 3, 4, 5)]
    read(index, 1)
    assert Web.asked["pairs-000001.tar"] == 2


def test_the_limit_holds_while_many_are_copied_at_once(url: str, cache: Path) -> None:
    index, most, over = load_index(url), [0], threading.Event()
    limit, folder = readthrough.limit_bytes(), Path(index.folder)

    def look() -> None:
        while not over.is_set():
            with fetch.locked(folder.parent / "room"):  # nothing new is begun meanwhile
                held: dict[int, int] = {}  # by inode: a file that gets its name meanwhile is met under both
                for path in folder.iterdir():
                    with suppress(FileNotFoundError):
                        stat = path.stat()
                        held[stat.st_ino] = stat.st_size if ".tar" in path.name else 0
            most[0] = max(most[0], sum(held.values()))

    looker = threading.Thread(target=look)
    looker.start()
    for first in (0, 4, 8, 0, 4, 8):
        shards = index.shards[first : first + LIMIT]
        readthrough.bring_all([(index.path(first + n), s.bytes, s.sha256) for n, s in enumerate(shards)])
    over.set()
    looker.join()
    assert limit is not None
    assert 0 < most[0] <= limit
    assert len(kept(cache)) == LIMIT


def test_a_shard_that_is_removed_while_it_is_read_stays_readable(source: Path, url: str, cache: Path) -> None:
    index = load_index(url)
    block = read_block(index, 0, 0)
    with open(index.path(0), "rb") as file:
        for shard in range(1, 1 + LIMIT):
            read(index, shard)
        assert "pairs-000000.tar" not in kept(cache)
        assert file.read() == (source / "pairs-000000.tar").read_bytes()
    assert block.table.to_pylist() == read_block(load_index(source), 0, 0).table.to_pylist()


def _read_all(url: str, count: int) -> list[Any]:
    index = load_index(url)
    return [read(index, shard) for shard in range(count)]


def test_the_processes_of_a_host_copy_each_shard_once(source: Path, url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_read_all, [(url, LIMIT)] * 3, chunksize=1)
    assert found == [_read_all(str(source), LIMIT)] * 3
    assert [Web.asked[f"pairs-{number:06d}.tar"] for number in range(LIMIT)] == [1] * LIMIT


_HOLDER = """
import sys, time
from pathlib import Path
from data import fetch
with fetch.locked(Path(sys.argv[1])):
    fetch.partial_of(Path(sys.argv[1])).write_bytes(b"half of a shard")
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_was_copying_is_copied_anew_and_no_longer_counted(url: str, cache: Path) -> None:
    index = load_index(url)
    target = Path(index.path(0))
    with subprocess.Popen([sys.executable, "-c", _HOLDER, target], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        read(index, 1)
        assert fetch.partial_of(target).exists(), "its copier lives"
        holder.kill()
    read(index, 2)
    assert not fetch.partial_of(target).exists()
    read(index, 0)
    assert kept(cache) == ["pairs-000000.tar", "pairs-000001.tar", "pairs-000002.tar"]


def batches(data: str, count: int = 20, **settings: Any) -> list[Any]:
    """What the first batches of a stream hold."""

    def collate(parts: Any, ids: Any, name: str, bad: Any) -> Any:
        texts: dict[int, Any] = {}
        for part in parts:
            texts.update(zip(part.rows.tolist(), part.table["query"].to_pylist(), strict=True))
        return ids.tolist(), [texts[row] for row in sorted(texts)], bad

    collate.columns = lambda stored: ["query"]  # type: ignore[attr-defined]
    collate.takes_stored = False  # type: ignore[attr-defined]
    found = mixture.load(data)
    order = found.order(8, lanes=4, seed=1)
    stream = Stream(found, order, collate, **settings)  # type: ignore[arg-type]
    return [stream._prepare(step)[0] for step in range(count)]


def test_faults_of_the_store_change_neither_the_order_nor_the_texts(
    source: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_SECONDS", 0.3)
    kinds = itertools.cycle(["500", "short", "stall", "drip", "503"])
    Web.faults = {f"pairs-{number:06d}.tar": [next(kinds), next(kinds)] for number in range(SHARDS)}
    monkeypatch.setattr(Web, "faults", Web.faults)
    found = batches(url)
    assert found == batches(str(source))
    assert not any(Web.faults.values())


def test_a_store_that_stays_down_ends_a_run_with_one_message(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = load_index(url)
    monkeypatch.setattr(Web, "faults", {"pairs-000002.tar": ["500"] * fetch.ATTEMPTS})
    with pytest.raises(DataError, match=r"pairs-000002\.tar: gave up after 5 attempts.*500") as told:
        read_block(index, 2, 0, policy="skip")
    assert told.value.exit_code == 3
    assert read(index, 2), "and goes on when it is up again"


def test_a_shard_that_the_store_does_not_have_is_a_missing_shard(source: Path, url: str) -> None:
    index = load_index(url)
    (source / "pairs-000002.tar").unlink()
    with pytest.raises(DataError, match=r"missing shard: http.*pairs-000002\.tar"):
        read_block(index, 2, 0)
    assert read_block(index, 2, 0, policy="skip").good == 0


def test_a_shard_that_is_not_the_one_of_the_index_is_never_read(source: Path, url: str, cache: Path) -> None:
    index = load_index(url)
    content = (source / "pairs-000002.tar").read_bytes()
    (source / "pairs-000002.tar").write_bytes(content[:700] + b"!" + content[701:])
    with pytest.raises(DataError, match="SHA-256"):
        read_block(index, 2, 0)
    assert kept(cache) == []


@pytest.mark.parametrize(
    ("limit", "said"), [("lots", "write 200"), ("-1", "write 200"), ("0.000001", "a shard of .* GB; raise it")]
)
def test_a_limit_that_cannot_be_is_told(url: str, monkeypatch: pytest.MonkeyPatch, limit: str, said: str) -> None:
    monkeypatch.setenv("QUINTET_CACHE_GB", limit)
    with pytest.raises(UserError, match=rf"QUINTET_CACHE_GB={limit}.*{said}"):
        load_index(url)


def test_a_limit_below_what_is_open_at_a_time_is_told(url: str, caplog: pytest.LogCaptureFixture) -> None:
    batches(url, 1)
    assert "of shards are open at a time" in caplog.text


def test_local_folders_are_read_as_ever(source: Path, cache: Path) -> None:
    assert read(load_index(source), 0)
    assert kept(cache) == []
