"""index.json: what lies in a folder of shards, and the hashes that tell whether it still does.

The file comes with the data, so it is not trusted: names, types, sizes and sums are checked before anything is
allocated by them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import xxhash

from data import files
from data.errors import DataError, UserError

FORMAT = "quintet-shards-1"
INDEX_NAME = "index.json"
KINDS = ("block", "plain")
# Ten million blocks of a thousand records are about 600 MB of index.
MAX_INDEX_BYTES = 1 << 30
# The fewest bytes that a record takes: two tar blocks in a plain shard, its two hashes in an Arrow member.
MIN_RECORD_BYTES = {"plain": 1024, "block": 16}
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+@-]{0,99}")
FILE_NAME = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,250}\.tar")


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A span of a shard that is read at once: whole members with their headers; `xxh3` is the span's hash in hex."""

    offset: int
    bytes: int
    records: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One tar file. `languages` counts the records that name a language, `bad` by cause those left out on indexing."""

    file: str
    source: str
    kind: str
    records: int
    bytes: int
    sha256: str
    languages: dict[str, int]
    blocks: tuple[BlockInfo, ...]
    bad: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Index:
    """Shards whose `file` is relative to `folder`; `tokenizer` is set when every shard has that tokenizer's tokens."""

    folder: str
    shards: tuple[ShardInfo, ...]
    tokenizer: dict[str, Any] | None = None

    def path(self, shard: int) -> str:
        """Where a shard lies."""
        return os.path.join(self.folder, self.shards[shard].file)

    @property
    def records(self) -> int:
        """Records of all shards."""
        return sum(shard.records for shard in self.shards)

    @cached_property
    def sources(self) -> dict[str, tuple[int, dict[str, int]]]:
        """Source name -> (records, records by language), in the order of the shards."""
        records: Counter[str] = Counter()
        languages: dict[str, Counter[str]] = {}
        for shard in self.shards:
            records[shard.source] += shard.records
            languages.setdefault(shard.source, Counter()).update(shard.languages)
        return {name: (records[name], dict(sorted(languages[name].items()))) for name in languages}

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a shard's name, records or content changes, and not when the folder moves."""
        lines = [(Path(s.file).name, s.source, s.records, s.bytes, s.sha256) for s in self.shards]
        return xxhash.xxh3_128_hexdigest(orjson.dumps(lines))


def encode(index: Index) -> bytes:
    """The text of index.json."""
    shards = [asdict(shard) | {"blocks": [_block_row(block) for block in shard.blocks]} for shard in index.shards]
    sources = {name: {"records": n, "languages": languages} for name, (n, languages) in index.sources.items()}
    content = {"format": FORMAT, "shards": shards, "sources": sources, "tokenizer": index.tokenizer}
    return orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)


def decode(text: bytes, folder: str, name: str) -> Index:
    """Check and decode the text of index.json; `name` is what messages call it. Raises DataError."""
    try:
        content = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _bad(name, f"is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _bad(name, f'does not say "format": "{FORMAT}"')
    shards = content.get("shards")
    if not isinstance(shards, list):
        raise _bad(name, "has no list of shards")
    tokenizer = content.get("tokenizer")
    if tokenizer is not None and not (isinstance(tokenizer, dict) and isinstance(tokenizer.get("fingerprint"), str)):
        raise _bad(name, "has a tokenizer without a fingerprint")
    index = Index(folder, tuple(_shard(row, f"{name}, shard {n}") for n, row in enumerate(shards)), tokenizer)
    files = Counter(shard.file for shard in index.shards)
    for file, count in files.items():
        if count > 1:
            raise _bad(name, f"lists {file!r} {count} times")
    return index


def read(path: Path, folder: str | Path) -> Index:
    """Read the index file of the shards in `folder`. Raises DataError."""
    size = path.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise _bad(str(path), f"has {size} bytes, more than an index has ({MAX_INDEX_BYTES})")
    return decode(path.read_bytes(), str(folder), str(path))


def write(path: Path, index: Index) -> None:
    """Put an index file in its place at once."""
    files.put(path, lambda partial: partial.write_bytes(encode(index)))


def _block_row(block: BlockInfo) -> list[int | str]:
    return [block.offset, block.bytes, block.records, block.xxh3]


def _bad(name: str, what: str) -> DataError:
    return DataError(f"{name}: the index {what}; write it again with `quintet pack --index`, or fetch it again")


def _shard(row: object, name: str) -> ShardInfo:
    if not isinstance(row, dict):
        raise _bad(name, "has a shard that is no object")
    file, source, kind = row.get("file"), row.get("source"), row.get("kind")
    if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
        raise _bad(name, f"names the file {file!r}, which is no plain NAME.tar")
    if not isinstance(source, str) or not SOURCE_NAME.fullmatch(source):
        raise _bad(name, f"names the source {source!r}")
    if kind not in KINDS:
        raise _bad(name, f"has the kind {kind!r}, not one of {', '.join(KINDS)}")
    records, size = _count(row.get("records"), name, "records"), _count(row.get("bytes"), name, "bytes")
    blocks = _blocks(row.get("blocks"), kind, size, name)
    if sum(block.records for block in blocks) != records:
        raise _bad(name, f"counts {records} records, its blocks {sum(b.records for b in blocks)}")
    languages = _counts(row.get("languages"), name, "languages")
    if sum(languages.values()) > records:
        raise _bad(name, "counts more languages than records")
    sha256 = _hex(row.get("sha256"), 64, name, "sha256")
    return ShardInfo(
        file, source, kind, records, size, sha256, languages, blocks, _counts(row.get("bad", {}), name, "bad")
    )


def _blocks(rows: object, kind: str, size: int, name: str) -> tuple[BlockInfo, ...]:
    if not isinstance(rows, list):
        raise _bad(name, "has no list of blocks")
    blocks, end = [], 0
    for row in rows:
        if not isinstance(row, list) or len(row) != 4:
            raise _bad(name, f"has the block {row!r}, not [offset, bytes, records, xxh3]")
        offset, length, records = (_count(value, name, "blocks") for value in row[:3])
        if offset % 512 or length % 512 or offset < end or offset + length > size:
            raise _bad(name, f"has the block {row!r}, which is not aligned, overlaps, or is outside of the shard")
        if records < 1 or records * MIN_RECORD_BYTES[kind] > length:
            raise _bad(name, f"has {records} records in a block of {length} bytes")
        blocks.append(BlockInfo(offset, length, records, _hex(row[3], 16, name, "blocks")))
        end = offset + length
    return tuple(blocks)


def _count(value: object, name: str, key: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise _bad(name, f"has {value!r} among its {key}, not a count")
    return value


def _counts(value: object, name: str, key: str) -> dict[str, int]:
    if not isinstance(value, dict):
        raise _bad(name, f"has {key} that are no object")
    return {str(text): _count(number, name, key) for text, number in value.items()}


def _hex(value: object, length: int, name: str, key: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{length}}}", value):
        raise _bad(name, f"has {value!r} among its {key}, not {length} hexadecimal digits")
    return value


def subset(index: Index, files: Iterable[str]) -> Index:
    """The index of some of its files, in the index's order; raises UserError when it does not list one."""
    wanted = set(files)
    unknown = sorted(wanted - {shard.file for shard in index.shards})
    if unknown:
        raise UserError(f"data={os.path.join(index.folder, unknown[0])!r}: not in the {INDEX_NAME} beside it")
    return Index(index.folder, tuple(s for s in index.shards if s.file in wanted), index.tokenizer)


def join(indexes: Sequence[Index]) -> Index:
    """One index over several; its tokenizer is theirs when they all have the same one."""
    if len(indexes) == 1:
        return indexes[0]
    folder = os.path.commonpath([os.path.abspath(index.folder) for index in indexes])
    shards: list[ShardInfo] = []
    for index in indexes:
        prefix = os.path.relpath(os.path.abspath(index.folder), folder)
        shards += [_moved(shard, prefix) for shard in index.shards]
    tokenizer = indexes[0].tokenizer
    return Index(folder, tuple(shards), tokenizer if all(i.tokenizer == tokenizer for i in indexes) else None)


def _moved(shard: ShardInfo, prefix: str) -> ShardInfo:
    return shard if prefix == "." else replace(shard, file=os.path.join(prefix, shard.file))
