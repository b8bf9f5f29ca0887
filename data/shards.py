"""Shards: WebDataset tar files with an index beside them, written, opened and read block by block.

The only door to webdataset. It imports torch, which takes seconds, so it is imported where it is used: reading needs
neither.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import orjson
import pyarrow as pa
import xxhash

from data import blocks, tar
from data.blocks import Tokens
from data.errors import DataError, UserError
from data.index import INDEX_NAME, SOURCE_NAME, BlockInfo, Index, ShardInfo, encode, read
from data.records import NAMES, BadRecord, Record, Row

_values = attrgetter(*NAMES)

log = logging.getLogger("quintet")

Policy = Literal["strict", "skip"]

SHARD_BYTES = 256 << 20
BLOCK_RECORDS = 2048
# A block is closed early when its texts reach this: Arrow's offsets end at 2 GiB, and readers hold whole blocks.
MAX_BLOCK_CHARS = 32 << 20


@dataclass(frozen=True)
class Block:
    """What a block gave: `records` as the index counts them, the first `good` rows of it in `table`.

    `problems` are texts "cause: where", empty when the block is whole.
    """

    table: pa.Table
    records: int
    good: int
    problems: tuple[str, ...] = ()


class ShardWriter:
    """Writes the records of one source to `{source}-{000000..}.tar`; equal records give equal bytes.

    A shard appears under its name when it is complete and synced. Use it as a context manager: an error removes the
    unfinished shard.

    Args:
        folder: where shards go; it is made when missing.
        source: the name of the source, given to records that name none.
        kind: "block" (Arrow members of `block_records` records) or "plain" (a JSON member a record).
        shard_bytes: a shard that reaches this many bytes is closed.
        token_dtype: "uint16" or "uint32" when `write` gets tokens; block shards only.
    """

    def __init__(
        self,
        folder: str | Path,
        source: str,
        *,
        kind: str = "block",
        shard_bytes: int = SHARD_BYTES,
        block_records: int = BLOCK_RECORDS,
        token_dtype: str | None = None,
    ) -> None:
        if not SOURCE_NAME.fullmatch(source):
            raise UserError(f"source={source!r}: not usable as a file name; use letters, digits and _ . + @ -")
        assert kind == "block" or token_dtype is None, "plain shards have no place for tokens"
        self._folder, self._source, self._kind = Path(folder), source, kind
        self._shard_bytes, self._block_records, self._token_dtype = shard_bytes, block_records, token_dtype
        self._folder.mkdir(parents=True, exist_ok=True)
        self._shards: list[ShardInfo] = []
        self._rows: list[Row] = []
        self._tokens: list[Tokens] = []
        self._chars = 0
        self._file: Any = None
        self._tar: Any = None

    def write(self, record: Record, tokens: Tokens | None = None) -> None:
        """Append one record, with its tokens (query, passage, [negatives]) when the writer has a `token_dtype`."""
        assert (tokens is None) == (self._token_dtype is None), "tokens go with token_dtype"
        self._rows.append(_values(record))
        if tokens is not None:
            self._tokens.append(tokens)
        self._chars += len(record.query) + len(record.passage) + sum(map(len, record.negatives))
        if len(self._rows) >= self._block_records or self._chars >= MAX_BLOCK_CHARS:
            self._flush()

    def close(self) -> list[ShardInfo]:
        """Complete the last shard and describe all of them; calling it again is harmless."""
        if self._rows:
            self._flush()
        if self._tar is not None:
            self._finish()
        return list(self._shards)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    @property
    def _name(self) -> str:
        return f"{self._source}-{len(self._shards):06d}.tar"

    @property
    def _partial(self) -> Path:
        return self._folder / f".{self._name}.partial"

    def _open(self) -> None:
        from webdataset.writer import TarWriter

        self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by _finish or __exit__
        # Fixed times and names: the same records give the same file, so its hash names its content.
        self._tar = TarWriter(self._file, user="quintet", group="quintet", mtime=0.0, encoder=False)
        self._spans: list[tuple[int, int, int]] = []
        self._languages: Counter[str] = Counter()
        self._written = 0

    def _flush(self) -> None:
        if self._tar is None:
            self._open()
        start = self._tar.tarstream.offset
        for key, extension, body in self._members():
            self._tar.write({"__key__": key, extension: body})
        end = self._tar.tarstream.offset
        self._spans.append((start, end - start, len(self._rows)))
        self._languages.update(row[3] for row in self._rows if row[3])
        self._written += len(self._rows)
        self._rows, self._tokens, self._chars = [], [], 0
        if end >= self._shard_bytes:
            self._finish()

    def _members(self) -> list[tuple[str, str, bytes]]:
        """(key, extension, payload) of the pending records' members."""
        prefix = f"{len(self._shards):06d}-"
        if self._kind == "plain":
            first = self._written
            return [(f"{prefix}{first + n:08d}", "json", _json(row)) for n, row in enumerate(self._rows)]
        block = blocks.table(self._rows, self._source, self._tokens, self._token_dtype)
        return [(f"{prefix}{len(self._spans):06d}", "arrow", blocks.encode(block))]

    def _finish(self) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        size = self._partial.stat().st_size
        sha256, hashes = hash_spans(self._partial, [(offset, length) for offset, length, _ in self._spans])
        infos = tuple(BlockInfo(*span, digest) for span, digest in zip(self._spans, hashes, strict=True))
        languages = dict(sorted(self._languages.items()))
        shard = ShardInfo(self._name, self._source, self._kind, self._written, size, sha256, languages, infos)
        os.replace(self._partial, self._folder / self._name)
        _sync_folder(self._folder)
        self._shards.append(shard)
        self._file = self._tar = None


def _json(row: Row) -> bytes:
    """A row as a JSON object, without the fields that say nothing."""
    return orjson.dumps({name: value for name, value in zip(NAMES, row, strict=True) if value})


def hash_spans(path: Path, spans: Sequence[tuple[int, int]]) -> tuple[str, list[str]]:
    """The SHA-256 of a file and the XXH3 of spans (offset, bytes) of it, which are in order and apart."""
    total, hashes, position = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        for offset, length in spans:
            total.update(file.read(offset - position))
            span = file.read(length)
            total.update(span)
            hashes.append(xxhash.xxh3_64_hexdigest(span))
            position = offset + length
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest(), hashes


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_index(folder: str | Path, shards: Sequence[ShardInfo], tokenizer: dict[str, Any] | None = None) -> Index:
    """Write index.json for the shards of a folder, all at once: readers see the old one or the new one.

    `tokenizer` describes the tokenizer of the token columns; its key "fingerprint" is what readers compare.
    """
    index = Index(str(folder), tuple(shards), tokenizer)
    write_atomically(Path(folder) / INDEX_NAME, encode(index))
    return index


def write_atomically(path: Path, content: bytes) -> None:
    """Put a whole file in its place under a temporary name, synced, then renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def load_index(spec: str | Sequence[str], *, allow_pipe: bool = False, policy: Policy = "strict") -> Index:
    """Open shards: a folder with an index.json."""
    assert isinstance(spec, str)
    return read(Path(spec) / INDEX_NAME)


def read_block(index: Index, shard: int, block: int, *, policy: Policy = "strict") -> Block:
    """Read one block."""
    info = index.shards[shard].blocks[block]
    if index.shards[shard].kind == "block":
        with pa.memory_map(index.path(shard)) as file:
            file.seek(info.offset)
            span = file.read_buffer(info.bytes)
        view = memoryview(span)
        member = next(tar.walk(view, archive=False))
        assert isinstance(member, tar.Member)
        table = blocks.decode(span.slice(member.data, member.size))
        return Block(table, info.records, table.num_rows)
    with open(index.path(shard), "rb") as plain:
        plain.seek(info.offset)
        data = memoryview(plain.read(info.bytes))
    rows = []
    for start, end in tar.payloads(data):
        try:
            rows.append(blocks.row(data[start:end]))
        except BadRecord as error:
            raise DataError(str(error)) from None
    return Block(blocks.table(rows, index.shards[shard].source), info.records, len(rows))
