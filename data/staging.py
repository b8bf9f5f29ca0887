"""Output folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import UserError
from data.files import system_errors

_log = logging.getLogger("quintet")


@contextmanager
def staged(output: Path, *, overwrite: bool, mark: str) -> Iterator[Path]:
    """A hidden folder beside `output` to write to; it takes the output's name when the block ends without an error.

    What an interrupted run left there is removed, and after an error nothing stays.

    Args:
        overwrite: replace an output that is not empty, provided that it holds the file `mark`, which shows that it
            was written this way: no folder of something else is ever removed.

    Raises:
        UserError: the output is there and may not be replaced, another process is writing to it, or the file
            system refuses.
    """
    output = output.expanduser().absolute()
    check_output(output, overwrite, mark)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, output):
            try:
                _clear(partial)
                with system_errors():
                    yield partial
                publish(partial, output)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or partial}"
        raise UserError(f"output={output}: cannot be written ({reason}); make room or name another folder") from error


def check_output(output: Path, overwrite: bool, mark: str) -> None:
    """Raise UserError when an output is there that may not be replaced; see `staged`."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output={output}: is a file; name a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"output={output}: is not empty; name another folder or set overwrite=true")
    if not (output / mark).is_file():
        raise UserError(
            f"output={output}: holds no {mark}, so it is something else and is not overwritten; name another folder"
        )


@contextmanager
def _locked(partial: Path, output: Path) -> Iterator[None]:
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output={output}: another process is writing it; wait for it or name another") from None
        yield
    finally:
        os.close(handle)


def _clear(partial: Path) -> None:
    leftovers = list(partial.iterdir())
    if leftovers:
        _log.info("removing what an interrupted run left in %s", partial)
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def publish(partial: Path, output: Path) -> None:
    """Rename a finished folder into place; an old output is moved away first and removed last."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)
