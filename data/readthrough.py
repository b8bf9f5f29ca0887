"""Shards of a store that are copied to the local disk when they are first read, within a limit on what is kept there.

With $QUINTET_CACHE_GB set, a folder of shards elsewhere is not copied as a whole before it is used. Its place in the
cache folder holds a note, origin.json, of where it comes from; a shard that is read and is not there is copied whole,
checked against the index, and renamed into place. Before that, the shards that were read longest ago make room.

The ranks of a host share the folder: whoever comes first copies, holding a lock (flock) that the kernel takes away with
its holder, and the others wait for it. A shard may be removed while somebody reads it: on Linux an open or mapped file
stays readable after its name is gone, and its space is freed with its last reader. So readers need no locks; whoever
finds the name gone before it could open the file copies the shard again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import orjson

from data import fetch, files
from data.errors import UserError

log = logging.getLogger("quintet")

LIMIT = "QUINTET_CACHE_GB"
ORIGIN = "origin.json"
# A shard's time of reading is written down at most this often.
_TOUCH_SECONDS = 30.0


def limit_bytes() -> int | None:
    """The most that copies of shards may take, from $QUINTET_CACHE_GB; None: no limit. Raises UserError."""
    text = os.environ.get(LIMIT, "")
    if not text:
        return None
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e9:
        raise UserError(f"{LIMIT}={text}: not a number of gigabytes above 0; write 200, or unset it for no limit")
    return int(found * 1e9)


def keep(folder: Path, location: str, sizes: Sequence[int]) -> None:
    """Make a folder of the cache one whose shards come from `location` when they are read.

    Raises UserError when a shard is larger than the limit.
    """
    limit = limit_bytes()
    assert limit is not None
    largest = max(sizes, default=0)
    if largest > limit:
        raise UserError(f"{LIMIT}={os.environ[LIMIT]}: a shard of {location} has {largest / 1e9:.3g} GB; raise it")
    if not (folder / ORIGIN).exists():
        files.put(folder / ORIGIN, lambda partial: partial.write_bytes(orjson.dumps({"location": location})))


@cache
def origin(folder: str) -> str:
    """Where the shards of a folder come from when they are read; empty for a folder that is as it is."""
    if not os.environ.get(LIMIT):
        return ""
    try:
        return str(orjson.loads((Path(folder) / ORIGIN).read_bytes())["location"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def bring(path: str, size: int, sha256: str) -> None:
    """Have a shard in its place, if it belongs to a folder that is read through; note that it is used.

    Raises:
        fetch.Missing: the store has no such file. DataError: it could not be copied. UserError: the disk is full.
    """
    folder = os.path.dirname(path)
    location = origin(folder)
    if not location:
        return
    try:
        last = os.stat(path)
    except FileNotFoundError:
        where, target = fetch.child(location, os.path.basename(path)), Path(path)
        fetch.fetch(where, target, size=size, sha256=sha256, reserve=lambda: _make_room(target, size))
        return
    if time.time() - last.st_atime > _TOUCH_SECONDS:
        with suppress(FileNotFoundError):  # removed just now
            os.utime(path, ns=(time.time_ns(), last.st_mtime_ns))


def bring_all(shards: Sequence[tuple[str, int, str]]) -> None:
    """Copy shards (path, size, SHA-256) side by side; what the store lacks is left to whoever reads it."""

    def copy(shard: tuple[str, int, str]) -> None:
        with suppress(fetch.Missing):
            bring(*shard)

    absent = [shard for shard in shards if origin(os.path.dirname(shard[0])) and not os.path.exists(shard[0])]
    if len(absent) < 2:  # one is copied by its reader
        return
    with ThreadPoolExecutor(fetch.DOWNLOADS) as pool:
        list(pool.map(copy, absent))


def _make_room(target: Path, size: int) -> None:
    """Remove what was read longest ago until `size` more bytes are within the limit, and take them for `target`."""
    limit, root = limit_bytes(), target.parent.parent
    assert limit is not None
    with fetch.locked(root / "room"):
        fetch.partial_of(target).unlink(missing_ok=True)
        found = [entry for folder in root.iterdir() if (folder / ORIGIN).exists() for entry in _entries(folder)]
        taken = sum(held for _, held, _ in found)
        for _, held, path in sorted(entry for entry in found if entry[2].suffix == ".tar"):
            if taken + size <= limit:
                break
            path.unlink(missing_ok=True)
            taken -= held
            log.debug("%s: removed from the cache, read longest ago", path)
        fetch.check_room(target.parent, size)
        with open(fetch.partial_of(target), "wb") as file:
            file.truncate(size)  # counted from here on, before its bytes have come


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """(time of the last reading, bytes, path) of every shard of a folder, and of those that are being copied.

    A copy may get its name while the folder is read, and be met under neither: it is read until it holds still.
    """
    while True:
        names = sorted(os.listdir(folder))
        found = _sizes(folder, names)
        if sorted(os.listdir(folder)) == names:
            return found


def _sizes(folder: Path, names: Sequence[str]) -> list[tuple[float, int, Path]]:
    found = []
    for path in (folder / name for name in names):
        unfinished = path.name.endswith(files.PARTIAL) and ".tar." in path.name
        if not unfinished and path.suffix != ".tar":
            continue
        with suppress(FileNotFoundError):
            if unfinished and _is_left_over(path):
                path.unlink()
                continue
            stat = path.stat()
            found.append((stat.st_atime, stat.st_size, path))
    return found


def _is_left_over(partial: Path) -> bool:
    """Whether nobody copies any more to an unfinished file: its copier holds a lock while it lives."""
    with open(fetch.lock_of(partial.with_name(partial.name[1 : -len(files.PARTIAL)])), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
