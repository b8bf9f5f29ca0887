"""Shards: WebDataset tar files with an index beside them, written, opened and read block by block.

The only door to webdataset. It imports torch, which takes seconds, so it is imported where it is used: reading needs
neither.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
import xxhash

from data import blocks, fetch, readthrough
from data.blocks import Tokens
from data.errors import UserError
from data.files import sync
from data.index import FILE_NAME, INDEX_NAME, SOURCE_NAME, BlockInfo, Index, ShardInfo, join, write
from data.indexing import index_shard
from data.opening import open_local, open_remote, tar_files
from data.reading import CAUSES, Block, Policy, Problem, cause, damaged, read_block, sniff
from data.records import NAMES, Record, Row

__all__ = [
    "CAUSES",
    "Block",
    "BlockInfo",
    "Index",
    "Policy",
    "ShardInfo",
    "ShardWriter",
    "build_index",
    "cause",
    "load_index",
    "read_block",
    "verify",
    "write_index",
]

log = logging.getLogger("quintet")

Spec = str | Path

MAX_LOCATIONS = 1_000_000
SHARD_BYTES = 256 << 20
BLOCK_RECORDS = 2048
# A block is closed early when its texts reach this: Arrow's offsets end at 2 GiB, and readers hold whole blocks.
MAX_BLOCK_CHARS = 32 << 20


_BAD_SOURCE = "source={!r}: not usable in a file name; use letters, digits and _ . + @ - after a letter or digit"
_values = attrgetter(*NAMES)


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
            raise UserError(_BAD_SOURCE.format(source))
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
        try:
            if kind is None:
                self.close()
        finally:
            if self._tar is not None:
                self._abandon()

    def _abandon(self) -> None:
        with suppress(OSError):  # what could not be written before cannot be completed now
            self._tar.close()
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

        self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by _finish or _abandon
        # Fixed times and names: the same records give the same file, so its hash names its content. An integer as
        # the time: for a float, TarWriter puts a second header before every member.
        self._tar = TarWriter(self._file, user="quintet", group="quintet", mtime=0, encoder=False)
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
        sha256, hashes = _hash_spans(self._partial, [(offset, length) for offset, length, _ in self._spans])
        infos = tuple(BlockInfo(*span, digest) for span, digest in zip(self._spans, hashes, strict=True))
        languages = dict(sorted(self._languages.items()))
        shard = ShardInfo(self._name, self._source, self._kind, self._written, size, sha256, languages, infos)
        os.replace(self._partial, self._folder / self._name)
        sync(self._folder)
        self._shards.append(shard)
        self._file = self._tar = None


def _json(row: Row) -> bytes:
    """A row as a JSON object, without the fields that say nothing."""
    return orjson.dumps({name: value for name, value in zip(NAMES, row, strict=True) if value})


def _hash_spans(path: Path, spans: Sequence[tuple[int, int]]) -> tuple[str, list[str]]:
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


def write_index(folder: str | Path, shards: Sequence[ShardInfo], tokenizer: dict[str, Any] | None = None) -> Index:
    """Write index.json for the shards of a folder, all at once: readers see the old one or the new one.

    `tokenizer` describes the tokenizer of the token columns; readers compare its "fingerprint".
    """
    assert tokenizer is None or isinstance(tokenizer.get("fingerprint"), str)
    index = Index(str(folder), tuple(shards), tokenizer)
    write(Path(folder) / INDEX_NAME, index)
    return index


def build_index(folder: str | Path, *, source: str | None = None, policy: Policy = "strict") -> Index:
    """Look through every tar file of a folder and write its index.json, replacing one that is there.

    Args:
        folder: a folder of tar files with one .json (or .arrow) member a sample.
        source: their source; by default what stands before the number in each file's name.
        policy: what to do about bad samples; see `index_shard`.
    """
    if source is not None and not SOURCE_NAME.fullmatch(source):
        raise UserError(_BAD_SOURCE.format(source))
    shards = [index_shard(Path(folder) / name, source, policy) for name in tar_files(Path(folder))]
    return write_index(folder, shards)


def load_index(spec: Spec | Sequence[Spec], *, allow_pipe: bool = False, policy: Policy = "strict") -> Index:
    """Open shards, comparing the size of every file with the index.

    Args:
        spec: a folder, a tar file, a glob or a brace expansion of those, a URL of those, or a list of all these. URLs
            (http, https, s3, gs, hf) are copied to the cache folder first, or where that has a limit
            (data/readthrough.py) when they are read. A folder without index.json is indexed
            on first use; the index is kept beside the shards, or in the cache folder where that cannot be written.
        allow_pipe: run the commands of `pipe:` URLs, which write a tar to their output. No shell is involved.
        policy: `strict` stops at any damage; `skip` keeps damaged shards, and `read_block` gives what is whole.

    Raises:
        UserError: nothing is there, or it may not be opened.
        DataError: the index or, under `strict`, a shard is damaged.
    """
    specs = [spec] if isinstance(spec, str | Path) else list(spec)
    wanted: dict[tuple[bool, str], set[str]] = {}
    for each in specs:
        for location in _expand(str(each), allow_pipe):
            remote, folder, name = _place(location)
            wanted.setdefault((remote, folder), set()).add(name)
    if not wanted:
        raise UserError("data=[]: no shards are named")
    indexes = []
    for (remote, folder), found in wanted.items():
        names = [] if "" in found else sorted(found)
        indexes.append(open_remote(folder, names, policy) if remote else open_local(Path(folder), names, policy))
    index = join(indexes)
    _check(index, policy)
    return index


def verify(index: Index, *, hashes: bool = False) -> list[str]:
    """Every problem of the shards, as texts "cause: where": wrong sizes and, when asked for, wrong SHA-256."""
    by_shard = _size_problems(index)
    problems = [problem for problem in by_shard if problem]
    for number, shard in enumerate(index.shards):
        if hashes and not by_shard[number] and _hash_spans(Path(index.path(number)), [])[0] != shard.sha256:
            problems += _damage(index, number) or [f"wrong hash: {index.path(number)}, outside of its blocks"]
    return problems


def _damage(index: Index, shard: int) -> list[str]:
    """The problems of all blocks of one shard."""
    numbers = range(len(index.shards[shard].blocks))
    return [text for block in numbers for text in read_block(index, shard, block, policy="skip").problems]


def _expand(spec: str, allow_pipe: bool) -> list[str]:
    """The locations that a spec stands for; schemes are checked before and after anything is expanded."""
    if not spec or not spec.isprintable() or "${" in spec or "::" in spec:
        raise UserError(f"data={spec!r}: not a path, a glob, a brace expansion or a URL")
    local = fetch.scheme(spec, allow_pipe=allow_pipe) in fetch.LOCAL
    literal = "{" not in spec or (local and os.path.exists(fetch.local_path(spec)))
    found = [spec] if literal else _expand_braces(spec)
    for location in found:
        fetch.scheme(location, allow_pipe=allow_pipe)
    return [path for location in found for path in (_glob(fetch.local_path(location)) if local else [location])]


def _expand_braces(spec: str) -> list[str]:
    if _most_expansions(spec) > MAX_LOCATIONS:
        raise UserError(f"data={spec!r}: stands for more than {MAX_LOCATIONS:,} files; give their folder instead")
    from webdataset.shardlists import expand_urls

    try:
        return list(expand_urls(spec))
    except ValueError:
        raise UserError(f"data={spec!r}: its braces are not balanced") from None


def _most_expansions(spec: str) -> int:
    """An upper bound on what a brace expansion gives, taken before anything is allocated for it."""
    most, rest = 1, spec
    while inner := re.search(r"\{([^{}]*)\}", rest):
        numbers = re.match(r"(-?\d{1,18})\.\.(-?\d{1,18})", inner[1])
        letters = 52 if ".." in inner[1] else inner[1].count(",") + 1
        most *= abs(int(numbers[2]) - int(numbers[1])) + 1 if numbers else letters
        rest = rest[: inner.start()] + rest[inner.end() :]
    return most


def _glob(path: str) -> list[str]:
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    found = sorted(name for name in glob.glob(path) if os.path.isdir(name) or name.endswith(".tar"))
    if not found:
        raise UserError(f"data={path!r}: no folder and no .tar file has such a name")
    return found


def _place(location: str) -> tuple[bool, str, str]:
    """(is it remote, its folder, the tar file in it or "" for all of them) of a location."""
    if fetch.scheme(location, allow_pipe=True) not in fetch.LOCAL:
        folder, name = fetch.split(location)
        return (True, folder, name) if FILE_NAME.fullmatch(name) else (True, location.rstrip("/"), "")
    path = Path(fetch.local_path(location))
    if path.is_dir():
        return False, str(path), ""
    if path.suffix == ".tar":
        return False, str(path.parent), path.name
    what = "neither a folder nor a .tar file; unpack or pack it" if path.exists() else "no such folder or file"
    raise UserError(f"data={location!r}: {what}")


def _check(index: Index, policy: Policy) -> None:
    """Compare sizes, and look at what was left out when the index was built: `strict` stops, `skip` tells."""
    problems = [problem for problem in _size_problems(index) if problem]
    for number, shard in enumerate(index.shards):
        problems += [f"{name}: {index.path(number)}: {count} left out" for name, count in shard.bad.items()]
    if problems and policy == "strict":
        raise damaged(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    for problem in problems:
        log.warning("%s", problem)


def _size_problems(index: Index) -> list[str]:
    # On a network file system a look at a file takes a millisecond, and there may be many thousands.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda number: _size_problem(index, number), range(len(index.shards))))


def _size_problem(index: Index, shard: int) -> str:
    """What the size of a shard tells, "" when it is right."""
    path, expected = index.path(shard), index.shards[shard].bytes
    try:
        size = os.stat(path).st_size
        if size == expected:
            return ""
        with open(path, "rb") as file:
            sniff(file.read(512), path)
    except Problem as problem:
        return str(problem)
    except FileNotFoundError:
        return "" if readthrough.origin(os.path.dirname(path)) else f"missing shard: {path}"
    except OSError as error:
        return f"unreadable shard: {path}: {error.strerror}"
    for number, block in enumerate(index.shards[shard].blocks):
        if block.offset + block.bytes > size:
            return read_block(index, shard, number, policy="skip").problems[0]
    return f"wrong size: {path}: {size} bytes, {expected} in the index"
