"""Copies shards from elsewhere into a local cache folder, with retries and checks.

What may be opened is a short list of schemes; a `pipe:` command runs without a shell, and only when the caller
allows it. Everything else reads local files.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit, urlunsplit

from data.errors import DataError, QuintetError, UserError
from data.files import PARTIAL

log = logging.getLogger("quintet")

Result = TypeVar("Result")

LOCAL = ("", "file")
WEB = ("http", "https")
# These go through fsspec; the value is the package that it needs for them.
STORES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}

DOWNLOADS = 8
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
TIMEOUT_SECONDS = 60.0
# A transfer that stays below this on average, after a first minute, is taken for stuck.
SLOWEST_BYTES_PER_SECOND = 20_000
_CHUNK_BYTES = 1 << 20
_PASSING = (408, 425, 429)  # too slow, too early, too many: the client errors that pass
# "scheme:" at the start; a local file of such a name is written ./scheme:...
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_SHELL_WORDS = frozenset({"|", "||", "&", "&&", ";", ">", ">>", "<"})
_retried: list[str] = []  # locations, each time that one is tried again; by several threads


class Missing(Exception):
    """The other side says that there is no such file."""


class Interrupted(Exception):
    """A transfer that may go better next time."""


def scheme(location: str, *, allow_pipe: bool = False) -> str:
    """The scheme of a location, "" for a local path. Raises UserError for one that is not to be opened."""
    match = _SCHEME.match(location)
    name = match.group(1).lower() if match else ""
    if name == "pipe" and not allow_pipe:
        raise UserError(f"data={location!r}: pipe: runs a command; set allow_pipe=true if the command is yours")
    if name not in (*LOCAL, *WEB, *STORES, "pipe"):
        known = ", ".join((*LOCAL[1:], *WEB, *STORES))
        raise UserError(f"data={location!r}: {name}: is not read; use a path or one of {known} (a file: ./{location})")
    return name


def local_path(location: str) -> str:
    """The path of a local location."""
    return re.sub(r"^file:(//)?", "", location, flags=re.IGNORECASE)


def cache_folder() -> Path:
    """Where copies go: $QUINTET_CACHE, or ~/.cache/quintet."""
    return Path(os.environ.get("QUINTET_CACHE") or Path.home() / ".cache" / "quintet")


def split(location: str) -> tuple[str, str]:
    """The folder and the file name of a location; a command is its own folder."""
    if location.startswith("pipe:"):
        names = re.findall(r"([A-Za-z0-9_.+@-]+\.tar)\b", location)
        digest = hashlib.sha256(location.encode()).hexdigest()[:16]
        return location, names[-1] if names else f"pipe-{digest}.tar"
    parts = urlsplit(location)
    folder, _, name = parts.path.rpartition("/")
    return urlunsplit(parts._replace(path=folder)), name


def child(folder: str, name: str) -> str:
    """The location of a file in a folder; what `split` takes apart."""
    if folder.startswith("pipe:"):
        return folder
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def fetch(
    location: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    reserve: Callable[[], None] = lambda: None,
) -> None:
    """Copy one file to `target`, unless it is there with the right size.

    Several processes may ask for one target: one copies, the others wait for it. A failed attempt is repeated after
    a growing pause; the target appears when it is complete and has the right size and hash. `reserve` is called before
    each attempt, by the process that copies.

    Raises:
        Missing: there is no such file.
        DataError: every attempt failed; the text has the last reason.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if target.exists() and (size is None or target.stat().st_size == size):
            return

        def attempt() -> None:
            reserve()
            _copy(location, target, size, sha256)

        with_retries(location, attempt)


def partial_of(target: Path) -> Path:
    """What a file is called while it is being copied, under the lock of `locked`."""
    return target.with_name(f".{target.name}{PARTIAL}")


def lock_of(target: Path) -> Path:
    """The file that `locked` locks."""
    return target.with_name(f".{target.name}.lock")


def read(location: str, limit: int) -> bytes:
    """A small file as bytes. Raises Missing, and DataError when it is larger than `limit` bytes or cannot be read."""
    found = bytearray()

    def copy() -> None:
        found.clear()
        with _source(location) as (stream, _):
            for chunk in _chunks(stream, None):
                found.extend(chunk)
                if len(found) > limit:
                    raise DataError(f"{location}: larger than {limit} bytes, which is too large for an index")

    with_retries(location, copy)
    return bytes(found)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes of this machine from making the same file at the same time."""
    with open(lock_of(target), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: work is done twice, renames keep it right
            log.debug("no locks on %s", target.parent)
        yield


def retries() -> int:
    """How often this process has tried again so far."""
    return len(_retried)


def with_retries(location: str, attempt: Callable[[], Result]) -> Result:
    """What `attempt` returns, tried again after a growing pause when it fails.

    Raises:
        QuintetError, Missing: from the attempt itself, at once.
        DataError: every attempt failed; the text has the last reason.
    """
    wait = FIRST_WAIT_SECONDS
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except (QuintetError, Missing):
            raise
        except Exception as error:  # each store's client has exceptions of its own
            reason = f"{type(error).__name__}: {error}"
            if number == ATTEMPTS:
                raise DataError(f"{location}: gave up after {ATTEMPTS} attempts; the last one: {reason}") from None
            log.warning("%s: %s; trying again in %.0f s (%d of %d)", location, reason, wait, number, ATTEMPTS)
            _retried.append(location)
            time.sleep(wait)
            wait *= 2
    raise AssertionError("the last attempt returns or raises")


def _copy(location: str, target: Path, size: int | None, sha256: str | None) -> None:
    partial = partial_of(target)
    digest, written = hashlib.sha256(), 0
    try:
        # Not emptied: its size may have been reserved.
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with open(handle, "wb") as file, _source(location) as (stream, announced):
            expected = announced if size is None else size
            for chunk in _chunks(stream, expected):
                digest.update(chunk)
                written += len(chunk)
                file.write(chunk)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        if expected is not None and written != expected:
            raise Interrupted(f"got {written} bytes of {expected}")
        if sha256 is not None and digest.hexdigest() != sha256:
            raise Interrupted("the SHA-256 is not that of the index")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _chunks(stream: IO[bytes], expected: int | None) -> Iterator[bytes]:
    """The stream's bytes; never more than expected, and never at a trickle for ever."""
    started, received = time.monotonic(), 0
    # read1 returns what has come; read would wait at a trickle until a whole chunk is there.
    read = getattr(stream, "read1", stream.read)
    while chunk := read(_CHUNK_BYTES):
        received += len(chunk)
        if expected is not None and received > expected:
            raise Interrupted(f"got more than the {expected} bytes expected")
        seconds = time.monotonic() - started
        if seconds > TIMEOUT_SECONDS and received < seconds * SLOWEST_BYTES_PER_SECOND:
            raise Interrupted(f"only {received} bytes in {seconds:.0f} s")
        yield chunk


def _source(location: str) -> AbstractContextManager[tuple[IO[bytes], int | None]]:
    name = scheme(location, allow_pipe=True)
    if name in WEB:
        return _web(location)
    return _command(location) if name == "pipe" else _store(location, name)


@contextmanager
def _web(location: str) -> Iterator[tuple[IO[bytes], int | None]]:
    try:
        with urllib.request.urlopen(location, timeout=TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length", "")
            yield response, int(length) if length.isdigit() else None
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise Missing(location) from None
        if error.code < 500 and error.code not in _PASSING:
            raise DataError(f"{location}: the server answers {error.code} {error.reason}") from None
        raise


@contextmanager
def _store(location: str, name: str) -> Iterator[tuple[IO[bytes], int | None]]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(location)
    except ImportError:
        raise UserError(f"data={location!r}: reading {name}: needs a package; pip install {STORES[name]}") from None
    try:
        with system.open(path, "rb") as stream:
            yield stream, system.size(path)
    except FileNotFoundError:
        raise Missing(location) from None


@contextmanager
def _command(location: str) -> Iterator[tuple[IO[bytes], int | None]]:
    words = shlex.split(location.removeprefix("pipe:"))
    if not words or _SHELL_WORDS & set(words):
        raise UserError(f"data={location!r}: give one command with its arguments; no shell runs it")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield process.stdout, None
        except BaseException:
            process.kill()
            raise
        if process.wait():
            raise Interrupted(f"the command ended with code {process.returncode}")


def check_room(folder: Path, needed: int) -> None:
    """Raise UserError when a folder has no room for `needed` more bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"QUINTET_CACHE={folder}: the shards need {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free; "
            "set it to a larger disk"
        )
