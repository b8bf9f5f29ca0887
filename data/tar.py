"""Walks tar archives held in memory, verifying every header, and goes on behind a damaged place.

Python's tarfile takes a damaged header after the first member for the end of the archive, so data behind it is lost
without an error. Here the walk tells what it found and where, looks for the next sound header, and never believes a
declared size that the archive has no room for. Formats: ustar, and the long names of GNU tar and of pax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR = b"0\0"
_LONG_NAME = ord("L")
_PAX = ord("x")
_PREFIXES = b"Lxg"
# A name of that length is no name; it bounds what a prefix member can make us read.
_MAX_PREFIX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Member:
    """One member: bytes [offset, end) with its headers and padding, the payload [data, data + size)."""

    name: str
    regular: bool
    offset: int
    data: int
    size: int

    @property
    def end(self) -> int:
        return self.data + _padded(self.size)


@dataclass(frozen=True, slots=True)
class Fault:
    """A place where the archive is damaged: bytes [offset, end) hold no member that can be trusted."""

    cause: str
    offset: int
    end: int


class _BadHeader(Exception):
    def __init__(self, cause: str, offset: int) -> None:
        self.cause, self.offset = cause, offset


def walk(view: memoryview, *, archive: bool = True) -> Iterator[Member | Fault]:
    """Every member and every fault of `view`, in order; offsets count from its start.

    Args:
        view: the bytes of a whole archive, or of some whole members of one (`archive=False`: then no
            end-of-archive mark is asked for).
    """
    offset, end = 0, len(view)
    while offset < end:
        if view[offset : offset + BLOCK] == _ZEROS:
            after = _after_zeros(view, offset)
            if after == end:
                return
            yield Fault("zero hole", offset, after)
            offset = after
            continue
        try:
            member = _member(view, offset)
        except _BadHeader as error:
            fault = Fault(error.cause, offset, _next_header(view, error.offset + BLOCK))
            yield fault
            offset = fault.end
            continue
        yield member
        offset = member.end
    if archive:
        yield Fault("cut at a member boundary", end, end)


def payloads(view: memoryview) -> list[tuple[int, int]]:
    """(start, end) of every regular member's payload, believing the headers: for bytes whose hash was checked.

    Raises ValueError when the headers do not lead exactly to the end.
    """
    spans = []
    offset, end = 0, len(view)
    while offset < end:
        size = int(view[offset + 124 : offset + 136].tobytes().rstrip(b"\0 "), 8)
        data = offset + BLOCK
        kind = view[offset + 156]
        if kind in _REGULAR:
            spans.append((data, data + size))
        elif kind not in _PREFIXES:
            raise ValueError(f"unexpected type of member at {offset}")
        offset = data + _padded(size)
    if offset != end:
        raise ValueError("the last member is longer than its block")
    return spans


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _after_zeros(view: memoryview, offset: int) -> int:
    """Where the run of zero blocks that begins at `offset` ends."""
    step = 1 << 16
    blank = bytes(step)
    while offset + step <= len(view) and view[offset : offset + step] == blank:
        offset += step
    while offset + BLOCK <= len(view) and view[offset : offset + BLOCK] == _ZEROS:
        offset += BLOCK
    tail = len(view) - offset
    return len(view) if tail < BLOCK and not any(view[offset:]) else offset


def _next_header(view: memoryview, offset: int) -> int:
    """The first sound header or zero block at or behind `offset`."""
    while offset + BLOCK <= len(view):
        header = bytes(view[offset : offset + BLOCK])
        if header == _ZEROS or _sound(header):
            return offset
        offset += BLOCK
    return len(view)


def _sound(header: bytes) -> bool:
    """Whether the checksum is right, which is the sum of all bytes with blanks in the checksum's place."""
    try:
        declared = int(header[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        return False
    return declared == sum(header) - sum(header[148:156]) + 8 * 32


def _member(view: memoryview, start: int) -> Member:
    """The member whose headers begin at `start`; raises _BadHeader when there is none to trust."""
    offset, long_name = start, ""
    while True:
        header = bytes(view[offset : offset + BLOCK])
        if len(header) < BLOCK:
            raise _BadHeader("cut in a header", offset)
        if not _sound(header):
            raise _BadHeader("damaged header", offset)
        size, kind, data = _size(header, offset), header[156], offset + BLOCK
        if data + size > len(view):
            raise _BadHeader("cut in data", offset)
        if kind not in _PREFIXES:
            if data + _padded(size) > len(view):
                raise _BadHeader("cut in data", offset)
            return Member(long_name or _name(header), kind in _REGULAR, start, data, size)
        if size > _MAX_PREFIX_BYTES:
            raise _BadHeader("damaged header", offset)
        body = bytes(view[data : data + size])
        if kind == _LONG_NAME:
            long_name = _text(body.rstrip(b"\0"))
        elif kind == _PAX:
            long_name = _pax_name(body, offset) or long_name
        offset = data + _padded(size)


def _size(header: bytes, offset: int) -> int:
    field = header[124:136]
    if field[0] & 0x80:  # GNU's base 256, for members of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        size = int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise _BadHeader("damaged header", offset) from None
    if size < 0:
        raise _BadHeader("damaged header", offset)
    return size


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:262] == b"ustar" and header[345]:
        prefix = header[345:500].split(b"\0", 1)[0]
        # GNU tar keeps times in the place of the prefix, and says so by its version of the magic.
        if header[262:265] == b"\x0000":
            name = prefix + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _pax_name(body: bytes, offset: int) -> str:
    """The `path` among pax records, each of them "LENGTH KEY=VALUE\\n"."""
    name = ""
    while body:
        digits, _, _ = body.partition(b" ")
        if not digits.isdigit() or len(digits) > 6 or not 0 < int(digits) <= len(body):
            raise _BadHeader("damaged header", offset)
        key, _, value = body[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key == b"path":
            name = _text(value)
        if key in (b"size", b"GNU.sparse.size"):
            raise _BadHeader("member of another format", offset)
        body = body[int(digits) :]
    return name
