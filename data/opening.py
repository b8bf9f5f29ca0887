"""Opens folders of shards, here and elsewhere: finds their index, or builds it, or copies it with its shards."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
import xxhash

from data import fetch, readthrough
from data.errors import DataError, UserError
from data.index import INDEX_NAME, MAX_INDEX_BYTES, Index, decode, read, subset, write
from data.indexing import index_shard
from data.reading import Policy, damaged

log = logging.getLogger("quintet")


def tar_files(folder: Path) -> list[str]:
    """The names of a folder's tar files, sorted; hidden ones are unfinished."""
    return sorted(path.name for path in folder.glob("*.tar") if path.name[0] != ".")


def open_local(folder: Path, names: Sequence[str], policy: Policy) -> Index:
    """The index of some shards of a folder, or of all of them when the names are none."""
    present = tar_files(folder)
    if (folder / INDEX_NAME).exists():
        index = read(folder / INDEX_NAME, folder)
        unlisted = set(present) - {shard.file for shard in index.shards}
        if unlisted:
            log.warning("%s: %d tar files are not in its index and are not read", folder, len(unlisted))
        return subset(index, names) if names else index
    if not present:
        raise UserError(f"data={str(folder)!r}: no index.json and no .tar file; `quintet pack` writes both")
    missing = sorted(set(names) - set(present))
    if missing:
        raise UserError(f"data={str(folder / missing[0])!r}: no such file")
    return _built(folder, names or present, policy, _index_place(folder, names or present, present))


def _index_place(folder: Path, names: Sequence[str], present: Sequence[str]) -> Path:
    """Where an index built on first use is kept: with the shards when it lists all of them and may be written."""
    if len(names) == len(present) and os.access(folder, os.W_OK):
        return folder / INDEX_NAME
    stats = [(name, (folder / name).stat()) for name in names]
    content = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    digest = xxhash.xxh3_128_hexdigest(orjson.dumps([str(folder.absolute()), content]))
    place = fetch.cache_folder() / "index" / f"{digest}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _built(folder: Path, names: Sequence[str], policy: Policy, place: Path) -> Index:
    """Read the index that an earlier use left, or build it; of several processes one builds and the others wait."""
    with fetch.locked(place):
        if not place.exists():
            log.info("indexing %d shards of %s, once", len(names), folder)
            shards = [index_shard(folder / name, None, policy) for name in names]
            write(place, Index(str(folder), tuple(shards)))
        return read(place, folder)


def open_remote(folder: str, names: Sequence[str], policy: Policy) -> Index:
    """Copy the shards of a remote folder to the cache folder.

    Where the cache has a limit, those of a folder with an index are copied when they are read.
    """
    try:
        text = b"" if folder.startswith("pipe:") else fetch.read(fetch.child(folder, INDEX_NAME), MAX_INDEX_BYTES)
    except fetch.Missing:
        text = b""
    # Another index means other shards: they get another folder, so that old copies are never taken for them.
    digest = hashlib.sha256(folder.encode() + b"\0" + text).hexdigest()[:16]
    local = fetch.cache_folder() / "shards" / digest
    local.mkdir(parents=True, exist_ok=True)
    if not text:
        if not names:
            raise UserError(f"data={folder!r}: no index.json there; name its .tar files, or index them first")
        _fetch_all(folder, local, [(name, None, None) for name in names], "strict")
        return open_local(local, names, policy)
    index = decode(text, str(local), fetch.child(folder, INDEX_NAME))
    index = subset(index, names) if names else index
    if readthrough.limit_bytes() is None:
        _fetch_all(folder, local, [(shard.file, shard.bytes, shard.sha256) for shard in index.shards], policy)
    else:
        readthrough.keep(local, folder, [shard.bytes for shard in index.shards])
    return index


def _fetch_all(folder: str, local: Path, files: Sequence[tuple[str, int | None, str | None]], policy: Policy) -> None:
    """Copy files (name, size, hash) that are not there yet; under `skip` those that cannot be copied stay missing."""
    absent = [size or 0 for name, size, _ in files if not (local / name).exists()]
    fetch.check_room(local, sum(absent))

    def copy(file: tuple[str, int | None, str | None]) -> None:
        name, size, sha256 = file
        location = fetch.child(folder, name)
        try:
            fetch.fetch(location, local / name, size=size, sha256=sha256)
        except (fetch.Missing, DataError) as error:
            missing = isinstance(error, fetch.Missing)
            problem = damaged(f"missing shard: {location}") if missing else error
            if policy == "strict":
                raise problem from None
            log.warning("%s", problem)

    with ThreadPoolExecutor(fetch.DOWNLOADS) as pool:
        list(pool.map(copy, files))
