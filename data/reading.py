"""Reads one block of a shard and compares it with the index; what is damaged is named and never guessed.

A span whose hash is right is taken as it is. One whose hash is wrong is walked header by header: in a plain shard the
samples around a fault that can be located are whole and kept; a change that leaves every header and every sample
readable cannot be located, so nothing of the block is believed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import xxhash

from data import blocks, fetch, readthrough, tar
from data.errors import DataError
from data.index import BlockInfo, Index
from data.records import REASONS, BadRecord, Row

Policy = Literal["strict", "skip"]

# Every problem is a text "cause: where"; the causes, beside those of a bad record and of a damaged tar.
CAUSES = (
    REASONS
    | tar.CAUSES
    | {
        "missing shard",
        "unreadable shard",
        "empty file",
        "no records",
        "HTML page instead of a tar",
        "compressed instead of a tar",
        "not a tar",
        "lost behind a cut",
        "wrong size",
        "wrong hash",
        "zeroed member",
        "changed payload",
        "unreadable block",
        "records differ from the index",
        "duplicate key",
        "interleaved keys",
        "unexpected member",
        "pickle member",
    }
)

_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\xfd7zXZ\x00", "xz", "unxz"),
    (b"BZh", "bzip2", "bunzip2"),
)

# How often a shard may be removed from a cache that is too small between its copying and its reading.
_MOST_REMOVALS = 20

_MEND = (
    "fetch or pack the shard again, index it again if it was changed on purpose, "
    "or leave damaged records out with the policy `skip`"
)


@dataclass(frozen=True)
class Block:
    """What a block gave: `records` as the index counts them, and the `good` ones as the rows of `table`.

    `problems` are texts "cause: where", empty when the block is whole.
    """

    table: pa.Table
    records: int
    good: int
    problems: tuple[str, ...] = ()


class Problem(Exception):
    """Why a shard or a part of it cannot be used; the text is "cause: where"."""

    def __init__(self, cause: str, where: str) -> None:
        assert cause in CAUSES, cause
        self.cause = cause
        super().__init__(f"{cause}: {where}")


def cause(problem: str) -> str:
    """The cause at the front of a problem, to count by."""
    return problem.partition(":")[0]


def damaged(problem: str) -> DataError:
    """The error that the policy `strict` raises."""
    return DataError(f"{problem}; {_MEND}")


def read_block(index: Index, shard: int, block: int, *, policy: Policy = "strict") -> Block:
    """Read one block of one shard, checking its hash.

    Under `skip` a damaged plain block gives its whole good samples, a damaged Arrow block none, and `problems` says
    why; the outcome depends on the file's bytes only. Under `strict` damage raises DataError with the first problem.
    """
    info, span = index.shards[shard], index.shards[shard].blocks[block]
    try:
        found = _read(index, shard, span)
    except Problem as problem:
        found = Block(blocks.table([], info.source), span.records, 0, (str(problem),))
    if found.problems and policy == "strict":
        raise damaged(found.problems[0])
    return found


def _read(index: Index, shard: int, span: BlockInfo) -> Block:
    """Read a block of a shard, which is copied first where it lies elsewhere."""
    info, path = index.shards[shard], index.path(shard)
    read = _read_arrow if info.kind == "block" else _read_plain
    for _ in range(_MOST_REMOVALS):
        try:
            readthrough.bring(path, info.bytes, info.sha256)
            return read(index, shard, span)
        except fetch.Missing as missing:
            raise Problem("missing shard", str(missing)) from None
        except Problem as problem:
            # Removed to make room before it could be opened?
            if problem.cause != "missing shard" or not readthrough.origin(os.path.dirname(path)):
                raise
    raise damaged(
        f"missing shard: {path} was removed {_MOST_REMOVALS} times before it was read; raise QUINTET_CACHE_GB"
    )


def sniff(start: bytes, path: str) -> None:
    """Raise a Problem when a file's first 512 bytes (fewer when it is shorter) show that it is something else."""
    if not start:
        raise Problem("empty file", path)
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise Problem("HTML page instead of a tar", f"{path}: an error page saved as data?")
    for magic, name, mend in _COMPRESSED:
        if start.startswith(magic):
            raise Problem("compressed instead of a tar", f"{path} is {name}; unpack it with `{mend}`")


def sample(payload: bytes | memoryview, where: str) -> Row:
    """The row of a JSON member; raises a Problem at `where`."""
    try:
        return blocks.row(payload)
    except BadRecord as error:
        zeroed = len(payload) and not any(payload)
        raise Problem("zeroed member" if zeroed else error.reason, f"{where}: {error.detail}") from None


@contextmanager
def _located(path: str) -> Iterator[None]:
    """Turn what the file system says into a Problem."""
    try:
        yield
    except FileNotFoundError:
        raise Problem("missing shard", path) from None
    except OSError as error:
        raise Problem("unreadable shard", f"{path}: {error.strerror or error}") from None


def _check_damage(start: bytes, size: int, span: BlockInfo, path: str) -> None:
    """Raise a Problem when a span is not what the index says because the file is another, or ends before it."""
    sniff(start, path)
    if span.offset >= size:
        raise Problem("lost behind a cut", f"{path}, offset {span.offset}: the file ends at byte {size}")


def _read_arrow(index: Index, shard: int, span: BlockInfo) -> Block:
    """A block that is one Arrow member, mapped into memory rather than read."""
    path = index.path(shard)
    with _located(path), pa.memory_map(path) as file:
        size = file.size()
        start = file.read_at(min(tar.BLOCK, size), 0)
        file.seek(min(span.offset, size))
        buffer = file.read_buffer(span.bytes)
    view, where = memoryview(buffer), f"{path}, offset {span.offset}"
    item = next(tar.walk(view, archive=False), None)
    if xxhash.xxh3_64_hexdigest(view) != span.xxh3:
        _check_damage(start, size, span, path)
        raise Problem(item.cause if isinstance(item, tar.Fault) else "changed payload", where)
    if not isinstance(item, tar.Member) or item.end != len(view):
        raise Problem("unreadable block", f"{where}: not one whole member")
    try:
        table = blocks.decode(buffer.slice(item.data, item.size))
    except blocks.BadBlock as error:
        raise Problem("unreadable block", f"{where}: {error}") from None
    if index.tokenizer is not None and blocks.TOKEN_COLUMNS[0] not in table.column_names:
        raise Problem("unreadable block", f"{where}: no tokens, though the index names a tokenizer")
    _check_records(table.num_rows, span, where)
    return Block(table, span.records, table.num_rows)


def _check_records(found: int, span: BlockInfo, where: str) -> None:
    if found != span.records:
        raise Problem("records differ from the index", f"{where}: {found} found, {span.records} in the index")


def _read_plain(index: Index, shard: int, span: BlockInfo) -> Block:
    """A block that is a run of JSON members."""
    path, source = index.path(shard), index.shards[shard].source
    with _located(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(tar.BLOCK)
        file.seek(span.offset)
        data = file.read(min(span.bytes, size))
    if xxhash.xxh3_64_hexdigest(data) != span.xxh3:
        _check_damage(start, size, span, path)
        return _recover(path, source, span, data)
    where = f"{path}, offset {span.offset}"
    try:
        payloads = tar.payloads(data)
    except (ValueError, IndexError) as error:
        raise Problem("unreadable block", f"{where}: {error}") from None
    # As many as the index has: each was found good when it was indexed. Bad ones were counted and reported then.
    table = blocks.table_of_json(payloads, source) if len(payloads) == span.records else None
    if table is None:
        table = blocks.table(blocks.good_rows(payloads), source)
    _check_records(table.num_rows, span, where)
    return Block(table, span.records, table.num_rows)


def _recover(path: str, source: str, span: BlockInfo, data: bytes) -> Block:
    """The whole samples of a damaged span, when something in it shows where the damage is."""
    view, rows, problems = memoryview(data), [], []
    located = len(data) < span.bytes
    for item in tar.walk(view, archive=False):
        where = f"{path}, offset {span.offset + item.offset}"
        if isinstance(item, tar.Fault):
            located = True
            problems.append(f"{item.cause}: {where}")
        elif item.is_file:
            try:
                rows.append(sample(view[item.data : item.data + item.size], f"{where}, {item.name}"))
            except Problem as problem:
                problems.append(str(problem))
    if len(data) < span.bytes and not (problems and problems[-1].startswith("cut")):
        problems.append(f"cut at a member boundary: {path}, offset {span.offset + len(data)}")
    # Samples that cannot be read explain the damage when they are more than those that were left out on indexing.
    if not located and len(rows) >= span.records:
        rows, problems = [], [f"changed payload: {path}, offset {span.offset}: cannot tell in which sample"]
    rows = rows[: span.records]
    return Block(blocks.table(rows, source), span.records, len(rows), tuple(problems))
