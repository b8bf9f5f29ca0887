"""Walks tar archives held in memory, verifying every header, and goes on behind a damaged place.

Python's tarfile takes a damaged header after the first member for the end of the archive, so what lies behind it is
lost without an error. This walk tells what it found and where, looks for the next sound header, and never believes a
declared size that the archive has no room for. Formats: ustar, and the long names of GNU tar and of pax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MANY_ZEROS = bytes(128 * BLOCK)
_REGULAR = b"0\0"
_DIRECTORY = ord("5")
_GNU_LONG_NAME = ord("L")
_PAX = ord("x")
_PAX_GLOBAL = ord("g")
_PREFIXES = bytes((_GNU_LONG_NAME, _PAX, _PAX_GLOBAL))
# A longer name is no name; this bounds what a prefix member can make us copy.
_MAX_PREFIX_BYTES = 64 * 1024

CAUSES = frozenset(
    {
        "cut in a header",
        "cut in data",
        "cut at a member boundary",
        "damaged header",
        "zero hole",
        "unsupported member",
    }
)


@dataclass(frozen=True, slots=True)
class Member:
    """A member in the bytes [offset, end), long names and padding included; its payload is [data, data + size)."""

    name: str
    kind: int
    offset: int
    data: int
    size: int

    @property
    def end(self) -> int:
        return self.data + _padded(self.size)

    @property
    def is_file(self) -> bool:
        return self.kind in _REGULAR

    @property
    def is_folder(self) -> bool:
        return self.kind == _DIRECTORY


@dataclass(frozen=True, slots=True)
class Fault:
    """Bytes [offset, end) hold no member that can be trusted, for one of CAUSES."""

    cause: str
    offset: int
    end: int


class _BadHeader(Exception):
    def __init__(self, cause: str) -> None:
        self.cause = cause


def walk(view: memoryview, *, archive: bool = True) -> Iterator[Member | Fault]:
    """Every member and every fault of `view` in order, without gap or overlap; offsets count from its start.

    Args:
        view: the bytes of a whole archive, or with `archive=False` of whole members out of one, which have no
            end-of-archive mark behind them.
    """
    offset, end = 0, len(view)
    while offset < end:
        try:
            if view[offset : offset + BLOCK] == _ZEROS:
                if archive and _only_zeros(view, offset):
                    return
                raise _BadHeader("zero hole")
            member = _member(view, offset)
        except _BadHeader as error:
            fault = Fault(error.cause, offset, _next_sound(view, offset + BLOCK))
            yield fault
            offset = fault.end
            if offset == end:
                return
        else:
            yield member
            offset = member.end
    if archive:
        yield Fault("cut at a member boundary", end, end)


def payloads(span: bytes) -> list[bytes]:
    """The payloads of the files in whole members, believing their headers: for bytes whose hash was checked.

    Raises ValueError when the headers do not lead exactly to the end.
    """
    found, offset, end = [], 0, len(span)
    while offset < end:
        size = int(span[offset + 124 : offset + 136].strip(b"\0 "), 8)
        kind, data = span[offset + 156], offset + BLOCK
        if kind in _REGULAR:
            found.append(span[data : data + size])
        elif kind not in _PREFIXES:
            raise ValueError(f"a member of type {chr(kind)!r}")
        offset = data + (size + BLOCK - 1 & -BLOCK)
    if offset != end:
        raise ValueError("the last member ends outside of its span")
    return found


def _padded(size: int) -> int:
    return size + BLOCK - 1 & -BLOCK


def _only_zeros(view: memoryview, offset: int) -> bool:
    step = len(_MANY_ZEROS)
    while offset + step <= len(view):
        if view[offset : offset + step] != _MANY_ZEROS:
            return False
        offset += step
    return not any(view[offset:])


def _next_sound(view: memoryview, offset: int) -> int:
    """Where the first sound header at or behind `offset` is, or the end."""
    while offset + BLOCK <= len(view):
        if _sound(bytes(view[offset : offset + BLOCK])):
            return offset
        offset += BLOCK
    return len(view)


def _sound(header: bytes) -> bool:
    """Whether the checksum holds: the sum of the header's bytes, with blanks in the checksum's own place."""
    field = header[148:156].strip(b"\0 ")
    try:
        return bool(field) and int(field, 8) == sum(header) - sum(header[148:156]) + 8 * 32
    except ValueError:
        return False


def _member(view: memoryview, start: int) -> Member:
    """The member whose headers begin at `start`. Raises _BadHeader when there is none to trust."""
    offset, long_name = start, ""
    while True:
        header = bytes(view[offset : offset + BLOCK])
        if len(header) < BLOCK:
            raise _BadHeader("cut in a header")
        if not _sound(header):
            raise _BadHeader("damaged header")
        size, kind, data = _size(header), header[156], offset + BLOCK
        if data + _padded(size) > len(view):
            raise _BadHeader("cut in data")
        if kind not in _PREFIXES:
            return Member(long_name or _name(header), kind, start, data, size)
        if size > _MAX_PREFIX_BYTES:
            raise _BadHeader("unsupported member")
        body = bytes(view[data : data + size])
        if kind == _GNU_LONG_NAME:
            long_name = _text(body.rstrip(b"\0"))
        elif kind == _PAX:
            long_name = _pax_name(body) or long_name
        offset = data + _padded(size)


def _size(header: bytes) -> int:
    field = header[124:136]
    if field[0] & 0x80:  # GNU writes sizes of 8 GiB and more in base 256
        return int.from_bytes(field[1:], "big")
    try:
        size = int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise _BadHeader("damaged header") from None
    if size < 0:
        raise _BadHeader("damaged header")
    return size


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # Only POSIX ustar (version "00") has a prefix there; GNU's own format keeps times in its place.
    if header[257:265] == b"ustar\x0000" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _pax_name(body: bytes) -> str:
    """The `path` among pax records, each of them "LENGTH KEY=VALUE\\n" with LENGTH counting itself."""
    name = ""
    while body:
        digits = body.partition(b" ")[0]
        if not digits.isdigit() or len(digits) > 6 or not len(digits) + 1 < int(digits) <= len(body):
            raise _BadHeader("damaged header")
        key, _, value = body[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            raise _BadHeader("unsupported member")
        body = body[int(digits) :]
    return name
