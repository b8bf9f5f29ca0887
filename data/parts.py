"""The finished pieces of a stage's work, kept on disk so that a run that was killed goes on where it stopped.

A folder holds plan.json, which names everything that decides the result, and part files, each of which is there whole
or not at all and never changes. What a run with another plan left is of no use and is removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from data import files
from data.errors import UserError
from data.order import differences

_log = logging.getLogger("quintet")

_PLAN, _LOCK = "plan.json", ".lock"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`files.put` for a stage's output: the folder is made when missing, and what the file system refuses is told.

    Raises:
        UserError: the disk is full, for instance; no piece of the file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.put(path, write)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written ({error.strerror or error}: {path.name}); make room or name another "
            "folder, and start again: what is finished stays"
        ) from error


def save_array(path: Path, array: NDArray[Any]) -> None:
    """np.save for any name, and with the system's own word when it fails, which np.save hides."""
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        array_header(file, array.dtype, array.shape)
        file.write(array.reshape(-1).view(np.uint8).data)


def array_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Begin a .npy file: the rows follow as plain bytes."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


class Parts:
    """The resumable work of a stage: a folder beside its output with a plan and immutable part files.

    Use it as a context manager, or call `close`: the folder is held by one job at a time. The ranks of a job share it:
    rank 0 holds it, and the others open it with `hold=False` once rank 0 has.

    Args:
        folder: normally `.<output name>.work` beside the output; made when missing.
        plan: what decides the result (fingerprints of model and data, settings), as JSON can hold it. A folder
            that was begun with another plan is cleared, and the log says what changed.
        hold: take the folder for this process; False for the other ranks of its job.

    Raises:
        UserError: another job holds the folder, it holds something else, or the file system refuses.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], *, hold: bool = True) -> None:
        self.folder = folder
        self._handle = -1
        if hold:
            try:
                self._handle = _lock(folder)
                self._begin(plan)
            except OSError as error:
                self.close()
                reason = f"{error.strerror or error}: {error.filename or folder}"
                raise UserError(f"{folder}: cannot be used ({reason}); make room or name another output") from error
            except UserError:
                self.close()
                raise

    def has(self, name: str) -> bool:
        """Whether a part is finished."""
        return self.path(name).exists()

    def path(self, name: str) -> Path:
        """Where a part is, or will be; a name may have folders in it."""
        return self.folder / name

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Finish a part: `write` leaves it at the path it is called with; see `write_whole`, and its errors."""
        write_whole(self.path(name), write)

    def discard(self, *names: str) -> None:
        """Remove parts that a later one has replaced; those that are not there are no error."""
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder, when the result is where it belongs."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let others take the folder; calling it again is harmless."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, plan: Mapping[str, Any]) -> None:
        """Keep the parts of an earlier run with the same plan; clear away everything else."""
        wanted = orjson.loads(orjson.dumps(plan, option=orjson.OPT_SORT_KEYS))
        found = _read_plan(self.folder)
        if found is None and any(path.name != _LOCK and not _is_partial(path) for path in self.folder.iterdir()):
            raise UserError(
                f"{self.folder}: holds no {_PLAN}, so it is something else and is not touched; move it away, or name "
                "another output"
            )
        if found is not None and found != wanted:
            _log.warning(
                "%s: begun with other settings (%s); starting anew", self.folder, "; ".join(differences(found, wanted))
            )
            # The old plan goes last: killed in between, it still describes what is left.
            _clear(self.folder, lambda path: path.name not in (_LOCK, _PLAN))
        else:
            _clear(self.folder, _is_partial)
        if found != wanted:
            text = orjson.dumps(wanted, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
            write_whole(self.folder / _PLAN, lambda path: path.write_bytes(text))


def _lock(folder: Path) -> int:
    """Take the folder; the handle holds it until it is closed, by us or by our end."""
    folder.mkdir(parents=True, exist_ok=True)
    # A file of its own, open for writing: NFS takes no lock on a folder.
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{folder}: another job works on it; wait for it or name another output") from None
    except OSError:
        os.close(handle)
        raise
    return handle


def _read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of a folder; None when it has none."""
    try:
        plan = orjson.loads((folder / _PLAN).read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None
    return plan if isinstance(plan, dict) else None


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(files.PARTIAL)


def _clear(folder: Path, chosen: Callable[[Path], bool]) -> None:
    """Remove the chosen entries of a folder and of the folders in it."""
    for path in list(folder.rglob("*")):
        if chosen(path):
            with suppress(FileNotFoundError):  # it went with its folder
                shutil.rmtree(path) if path.is_dir() else path.unlink()
