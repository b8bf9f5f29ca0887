"""Files that are there whole or not at all, even after a power cut: the one way in which they are written here."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"  # what the name of an unfinished file ends in; it begins with a dot


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Put a file in its place at once: temporary name, sync, rename, sync. Readers see the old file or the new one.

    Args:
        path: the file; one that is there is replaced. Its folder must be there.
        write: called with the temporary path, where it leaves a file. Other processes may put the same file at the
            same time: each has a temporary name of its own, and the last to finish stands.

    Raises:
        OSError: the file system refuses, because it is full for instance; no piece of the file stays.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PARTIAL}")
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a crash: a rename is only safe after that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise as OSError what safetensors and tokenizers raise for it as exceptions of their own: a full disk, mostly.

    They tell it by the text alone, as everything written in Rust does: "No space left on device (os error 28)".
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None or isinstance(error, OSError):
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error
