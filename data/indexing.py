"""Builds the index of tar files that came without one, such as those of webdataset's ShardWriter.

Everything in a shard is looked at once: headers, keys, records. What cannot be used is counted by cause; the blocks of
the index then cover the good samples, so that a block read later gives the same rows again.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import xxhash

from data import blocks, tar
from data.index import BlockInfo, ShardInfo
from data.reading import Policy, Problem, damaged, sample, sniff

# A block is read at once. Its bounds depend on nothing but the shard, so every machine finds the same ones.
PLAIN_BLOCK_RECORDS = 1024
PLAIN_BLOCK_BYTES = 16 << 20

_UNPICKLED_BY_OTHERS = ("pickle", "pkl", "pyd", "pth", "pt")
_META = re.compile(r"__[^/]*__")


def source_of(path: str) -> str:
    """The source that a shard's file name tells: what stands before its number, or else its folder's name."""
    stem = re.sub(r"[-_.]?\d+$", "", Path(path).stem) or Path(path).absolute().parent.name
    return re.sub(r"[^A-Za-z0-9_.+@-]", "_", stem).lstrip("_.+@-")[:100] or "shards"


def index_shard(path: str | Path, source: str | None = None, policy: Policy = "strict") -> ShardInfo:
    """Look through one shard.

    Args:
        path: the tar file.
        source: the name of its source; by default what its file name tells.
        policy: `strict` raises DataError at the first problem. `skip` leaves bad samples out, counted by cause in
            the result's `bad`; a file with nothing to read in it gives a shard of no records.
    """
    shard = _Shard(str(path), policy)
    try:
        content = _mapped(path)
    except OSError as error:
        content = pa.py_buffer(b"")
        shard.report(Problem("unreadable shard", f"{path}: {error.strerror or error}"))
    else:
        shard.look_through(content)
    view = memoryview(content)
    infos = [BlockInfo(a, b - a, n, xxhash.xxh3_64_hexdigest(view[a:b])) for a, b, n in shard.spans]
    return ShardInfo(
        file=Path(path).name,
        source=source or source_of(str(path)),
        kind=shard.kind or "plain",
        records=sum(info.records for info in infos),
        bytes=len(view),
        sha256=hashlib.sha256(view).hexdigest(),
        languages=dict(sorted(shard.languages.items())),
        blocks=tuple(infos),
        bad=dict(sorted(shard.bad.items())),
    )


def _mapped(path: str | Path) -> pa.Buffer:
    """The bytes of a file, paged in as they are looked at; the buffer keeps the mapping."""
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


@dataclass
class _Shard:
    """One shard while it is looked through: its good spans (start, end, records) and what was wrong with the rest."""

    path: str
    policy: Policy
    kind: str = ""
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    languages: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    _extensions: dict[str, str] = field(default_factory=dict)
    _last_key: str = ""
    _run_end: int = -1

    def report(self, problem: Problem) -> None:
        """Count a problem, or stop at it."""
        if self.policy == "strict":
            raise damaged(str(problem)) from None
        self.bad[problem.cause] += 1

    def look_through(self, content: pa.Buffer) -> None:
        """Visit every member."""
        view = memoryview(content)
        try:
            sniff(bytes(view[: tar.BLOCK]), self.path)
        except Problem as problem:
            self.report(problem)
            return
        for item in tar.walk(view):
            try:
                if isinstance(item, tar.Fault):
                    self._fault(item, view)
                else:
                    self._member(item, content)
            except Problem as problem:
                self.report(problem)
        if not self.spans and not self.bad:
            self.report(Problem("no records", self.path))

    def _fault(self, fault: tar.Fault, view: memoryview) -> None:
        whole = fault.offset == 0 and fault.end == len(view)
        if whole and view[257:262] != b"ustar" and any(view[: tar.BLOCK]):
            raise Problem("not a tar", f"{self.path} has no tar header anywhere")
        raise Problem(fault.cause, f"{self.path}, offset {fault.offset}")

    def _member(self, member: tar.Member, content: pa.Buffer) -> None:
        where = f"{self.path}, offset {member.offset}, {member.name}"
        name = member.name.rpartition("/")[2]
        if member.is_folder or _META.fullmatch(member.name):
            return
        key, dot, extension = name.partition(".")
        extension = extension.lower()
        if extension.rpartition(".")[2] in _UNPICKLED_BY_OTHERS:
            raise Problem("pickle member", f"{where}: pickle members are never read")
        if not member.is_file or not (key and dot):
            raise Problem("unexpected member", where)
        self._check_key(member.name[: len(member.name) - len(name)] + key, extension, where)
        if extension == "json" and self.kind != "block":
            self._json(member, memoryview(content), where)
        elif extension == "arrow" and self.kind != "plain":
            self._arrow(member, content, where)
        else:
            raise Problem("unexpected member", f"{where}: a shard has either .json or .arrow members")

    def _check_key(self, key: str, extension: str, where: str) -> None:
        """Keys are unique in a shard, and the members of a sample stand together."""
        seen, last = self._extensions.get(key), self._last_key
        self._last_key = key
        if seen is None:
            self._extensions[key] = extension
        elif seen == extension:
            raise Problem("duplicate key", where)
        elif last != key:
            raise Problem("interleaved keys", where)

    def _json(self, member: tar.Member, view: memoryview, where: str) -> None:
        self.kind = "plain"
        if member.size > blocks.MAX_MEMBER_BYTES:
            raise Problem("text too long", f"{where}: the member has {member.size} bytes")
        joins = member.offset == self._run_end
        try:
            row = sample(view[member.data : member.data + member.size], where)
        except Problem:
            # A record that reading leaves out again by itself does not end a run of members.
            self._run_end = member.end if joins else -1
            raise
        if joins and self._has_room(member):
            start, _, records = self.spans[-1]
            self.spans[-1] = (start, member.end, records + 1)
        else:
            self.spans.append((member.offset, member.end, 1))
        self._run_end = member.end
        if row[3]:
            self.languages[row[3]] += 1

    def _has_room(self, member: tar.Member) -> bool:
        start, _, records = self.spans[-1]
        return records < PLAIN_BLOCK_RECORDS and member.end - start <= PLAIN_BLOCK_BYTES

    def _arrow(self, member: tar.Member, content: pa.Buffer, where: str) -> None:
        self.kind = "block"
        try:
            table = blocks.decode(content.slice(member.data, member.size))
        except blocks.BadBlock as error:
            raise Problem("unreadable block", f"{where}: {error}") from None
        if not table.num_rows:
            raise Problem("no records", where)
        self.spans.append((member.offset, member.end, table.num_rows))
        self.languages.update(lang for lang in table["lang"].to_pylist() if lang)
