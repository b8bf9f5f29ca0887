"""The life of a checkpoint: staged, synced, sealed by a manifest, then published by one rename.

    run_dir/checkpoints/step-00001000/            a complete checkpoint: its done.json names every file
                        step-00001000.replaced/   a complete one that is just being written anew
                        .staging-step-00001000/   being written; never resumed from
                        .trash-step-00001000/     being deleted; never resumed from

What is inside belongs to the caller; nothing here knows torch. A process may die, a disk may fill, at any moment:
a folder called step-* is complete or it fails `verify`, and then an older one is used.

The hashes find accidents, not attackers: XXH3-128 runs at about 27 GB/s on a core where SHA-256 does 1.8, and whoever
may write into the run folder could rewrite the manifest as well. What a load may unpickle is the engine's matter.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from data.errors import UserError
from data.files import sync, system_errors
from trainer.runfolder import write_json

log = logging.getLogger("quintet")

MANIFEST = "done.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")
_READ_BYTES = 1 << 22


class SaveError(UserError):
    """A checkpoint could not be written on some rank; nothing was published and the older ones stand."""


class Ranks(Protocol):
    """What a collective save needs to know of the job: trainer.distributed passes the real one."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def all(self, ok: bool) -> bool:
        """True on every rank when every rank said True. Waits for all of them."""


@dataclass(frozen=True)
class OneProcess:
    """The `Ranks` of a job of one process."""

    rank: int = 0
    world: int = 1

    def all(self, ok: bool) -> bool:
        return ok


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint; `manifest` is its done.json: the caller's state and step, time, world_size, files."""

    folder: Path
    step: int
    manifest: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _no_hook(point: str) -> None:
    """The default of `at`: tests pass one that kills the process at a named point."""


class Saving:
    """The checkpoint of `step`, being written by a thread of every rank; every rank must make and publish it.

    Args:
        write: called on every rank, in the thread, with the staging folder; writes this rank's files below it and
            returns their paths. Files that no rank names are read and listed by rank 0, so a caller of one file system
            may return None.
        state: plain data for the manifest (stage, data state, config hash, W&B run id, versions); rank 0's counts.
        at: called at every point of the save where a process may die.

    Raises SaveError on every rank when one rank failed, after removing what was written. A failure that is no matter of
    files (neither OSError nor RuntimeError, which torch raises for a full disk) keeps its own type on its rank.
    """

    def __init__(
        self,
        run_dir: str | Path,
        step: int,
        write: Callable[[Path], Iterable[Path] | None],
        state: Mapping[str, Any],
        *,
        ranks: Ranks = OneProcess(),
        at: Callable[[str], None] = _no_hook,
    ) -> None:
        self._ranks, self._at, self.step = ranks, at, step
        self._final = Path(run_dir) / "checkpoints" / folder_name(step)
        self._staging = self._final.with_name(f".staging-{folder_name(step)}")
        own = {"format": FORMAT, "step": step, "world_size": ranks.world, "time": time.time(), "files": {}}
        assert not {*own, "digest"} & set(state), sorted(state)
        self._manifest: dict[str, Any] = {**state, **own}
        self._together(lambda: _stage(self._staging, at) if ranks.rank == 0 else None)
        self._part: Future[None] = Future()
        # No error of the run waits for it: what it leaves is removed at the next start.
        threading.Thread(target=self._write, args=(write,), name="checkpoint", daemon=True).start()

    def _write(self, write: Callable[[Path], Iterable[Path] | None]) -> None:
        try:
            _write_part(self._staging, self._ranks.rank, write, self._at)
        except BaseException as error:
            self._part.set_exception(error)
        else:
            self._part.set_result(None)

    @property
    def written(self) -> bool:
        """Whether this rank's part is written, or could not be: `publish` will not wait for it. Local."""
        return self._part.done()

    def publish(self) -> Checkpoint:
        """Wait for the parts of all ranks, and give the checkpoint its name.

        Returns the checkpoint; on ranks other than 0 its manifest lists no files.
        """
        self._together(self._part.result)
        self._together(self._seal if self._ranks.rank == 0 else lambda: None)
        return Checkpoint(self._final, self.step, self._manifest)

    def _seal(self) -> None:
        _seal(self._staging, self._final, self._manifest, self._at)

    def _together(self, part: Callable[[], object]) -> None:
        """Run one part of a save on every rank, agree on its outcome, and raise everywhere when it failed anywhere."""
        failure: Exception | None = None
        try:
            part()
        except Exception as error:
            failure = error
        if self._ranks.all(failure is None):
            return
        if self._ranks.rank == 0:
            _try_remove(self._staging)
        self._ranks.all(True)  # nobody goes on, and perhaps saves again, before the folder is gone
        what = f"the checkpoint of step {self.step}"
        if failure is None:
            raise SaveError(f"{what} was given up: another rank could not write it (its log says why)")
        if isinstance(failure, OSError | RuntimeError):
            raise SaveError(f"{what} could not be written to {self._staging.parent}: {failure}") from failure
        raise failure


def _stage(staging: Path, at: Callable[[str], None]) -> None:
    _remove(staging)
    staging.mkdir(parents=True)
    at("staged")


def _write_part(
    staging: Path, rank: int, write: Callable[[Path], Iterable[Path] | None], at: Callable[[str], None]
) -> None:
    """Write a rank's own files, sync and hash them, and leave the list for rank 0."""
    if not staging.is_dir():
        raise OSError(f"rank {rank} does not see {staging}: put run_dir on storage that every node shares")
    with system_errors():
        files = [Path(path) for path in write(staging) or ()]
    at("written")
    part = {}
    for path in files:
        part[path.relative_to(staging).as_posix()] = _seal_file(path)
        at("file")
    write_json(staging / _part_name(rank), part)
    at("part")


def _seal(staging: Path, final: Path, manifest: dict[str, Any], at: Callable[[str], None]) -> None:
    """List every file in the manifest, make all of it durable, and give the folder its name."""
    manifest["files"] = _merge_parts(staging, manifest["world_size"], at)
    at("before manifest")
    _write_manifest(staging, manifest)
    for folder, _, _ in os.walk(staging):
        sync(Path(folder))
    at("before rename")
    _publish(staging, final, at)


def _merge_parts(staging: Path, world: int, at: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Every file of the checkpoint with its size and hash: the ranks' lists, and whatever none of them named."""
    files: dict[str, dict[str, Any]] = {}
    for rank in range(world):
        part = staging / _part_name(rank)
        if not part.exists():
            raise OSError(f"rank 0 does not see {part}: put run_dir on storage that every node shares")
        files |= json.loads(part.read_text())
        part.unlink()
    for path in sorted(_files_below(staging)):
        name = path.relative_to(staging).as_posix()
        if name not in files:
            files[name] = _seal_file(path)
            at("file")
    return files


def _part_name(rank: int) -> str:
    return f".part-{rank:05d}.json"


def _files_below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root) / name for name in names)


def _seal_file(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": _hash_file(path)}


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(manifest, allow_nan=False))
    write_json(folder / MANIFEST, {**plain, "digest": _digest(plain)})


def _digest(manifest: Mapping[str, Any]) -> str:
    """Hash of a manifest's content, so that a damaged number in it is noticed like a damaged file."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _publish(staging: Path, final: Path, at: Callable[[str], None]) -> None:
    """Give a complete staging folder its name. An older folder of that name stays loadable until the new one stands."""
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        # A folder cannot be renamed onto another. The old one is moved to a name that resume reads too, unless that
        # name holds the last good copy already (a kill between these two renames left it there).
        if replaced.exists() and not verify(final, deep=True):
            _remove(replaced)
        if replaced.exists():
            _remove(final)
        else:
            final.rename(replaced)
        at("replaced")
    staging.rename(final)
    sync(final.parent)
    at("renamed")
    _try_remove(replaced)


def _remove(folder: Path) -> None:
    """Delete a folder, first renaming it, so that no half-deleted one is ever found under a name that counts."""
    if not folder.exists():
        return
    trash = folder
    if not folder.name.startswith(".trash-"):
        trash = folder.with_name(f".trash-{folder.name.lstrip('.')}-{os.getpid()}-{time.time_ns()}")
        folder.rename(trash)
    shutil.rmtree(trash)


def _try_remove(folder: Path) -> None:
    try:
        _remove(folder)
    except OSError as error:
        log.warning("%s could not be deleted (%s); it only takes space", folder, error)


def verify(folder: str | Path, *, deep: bool = True) -> list[str]:
    """What is wrong with a checkpoint folder, one line a problem naming the file; empty when it is complete.

    Sizes are always compared; `deep` also reads every file and compares its hash.
    """
    folder = Path(folder)
    try:
        manifest = _read_manifest(folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    names = list(manifest["files"])
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # the hash releases the interpreter lock
        problems = pool.map(lambda name: _problem(folder, name, manifest["files"][name], deep), names)
        return [problem for problem in problems if problem]


def _problem(folder: Path, name: str, entry: Mapping[str, Any], deep: bool) -> str:
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path}: {size} bytes where {MANIFEST} says {entry['bytes']}"
        if deep and _hash_file(path) != entry["xxh3_128"]:
            return f"{path}: the content is not what was written (hash differs)"
    except FileNotFoundError:
        return f"{path}: the file is missing"
    except OSError as error:
        return f"{path}: {error}"
    return ""


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, without its digest. Raises ValueError or OSError saying what is wrong with it."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{path}: the file is missing, so the checkpoint was never completed")
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("digest")
    except (ValueError, TypeError, AttributeError, KeyError):
        raise ValueError(f"{path}: not a manifest (damaged or foreign)") from None
    if digest != _digest(manifest):
        raise ValueError(f"{path}: the content is not what was written (hash differs)")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
    match = _STEP.fullmatch(folder.name)
    if match and int(match[1]) != manifest["step"]:
        raise ValueError(f"{path}: the checkpoint of step {manifest['step']} under another step's name")
    return manifest


def _step_folders(run_dir: str | Path) -> list[tuple[int, Path]]:
    """Published folders, newest step first; of one step the plain name before the replaced one."""
    parent = Path(run_dir) / "checkpoints"
    if not parent.is_dir():
        return []
    found = [(match, entry) for entry in parent.iterdir() if (match := _STEP.fullmatch(entry.name))]
    found.sort(key=lambda pair: (-int(pair[0][1]), pair[0][2] or ""))
    return [(int(match[1]), entry) for match, entry in found]


def load(folder: str | Path, *, deep: bool = False) -> Checkpoint:
    """The checkpoint in `folder`, after checking it. Raises UserError naming the first damaged file."""
    folder = Path(folder)
    problems = verify(folder, deep=deep)
    if problems:
        raise UserError(f"{folder} is no complete checkpoint: {problems[0]}")
    manifest = _read_manifest(folder)
    return Checkpoint(folder, manifest["step"], manifest)


def newest(run_dir: str | Path, *, deep: bool = True) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None when none was ever published.

    Reads only, so it may be called on a run that is going on. A damaged one is passed over with one warning naming the
    file and the reason. Raises UserError when there are checkpoints and every one is damaged: starting at step 0 must
    be asked for (`fresh=true`).
    """
    first_problem = ""
    for step, folder in _step_folders(run_dir):
        problems = verify(folder, deep=deep)
        if not problems:
            return Checkpoint(folder, step, _read_manifest(folder))
        first_problem = first_problem or problems[0]
        log.warning("checkpoint of step %d is passed over: %s", step, problems[0])
    if first_problem:
        raise UserError(
            f"run_dir={run_dir}: no checkpoint is complete; the newest: {first_problem}. "
            "Restore it, or start over with fresh=true"
        )
    return None


def complete(run_dir: str | Path, *, deep: bool = False) -> list[Checkpoint]:
    """The checkpoints of a run that `verify` finds nothing wrong with, newest first."""
    return [
        Checkpoint(folder, step, _read_manifest(folder))
        for step, folder in _step_folders(run_dir)
        if not verify(folder, deep=deep)
    ]


def discard(saved: Checkpoint) -> None:
    """Delete a checkpoint that must not be resumed from. Raises UserError when it cannot be."""
    try:
        _remove(saved.folder)
    except OSError as error:
        raise UserError(
            f"{saved.folder}: must not be used any more and cannot be deleted ({error}); delete it"
        ) from None


def newest_few(run_dir: str | Path, count: int) -> list[Checkpoint]:
    """The newest `count` complete checkpoints of a run, newest first. Raises UserError when there are fewer."""
    found: dict[int, Checkpoint] = {}
    for step, folder in _step_folders(run_dir):
        if len(found) < count and step not in found and not verify(folder):
            found[step] = Checkpoint(folder, step, _read_manifest(folder))
    if len(found) < count:
        raise UserError(
            f"run_dir={run_dir}: has {len(found)} complete checkpoints, not {count}; keep more of them (keep_last, "
            "keep_every), or average fewer"
        )
    return list(found.values())


def prune(run_dir: str | Path, keep_last: int, keep_every: int = 0, *, spare: Collection[int] = ()) -> list[int]:
    """Delete checkpoints but the newest `keep_last` and those whose step is a multiple of `keep_every` (0: none).

    Those of the steps in `spare` stay as well: somebody reads them.

    Called by one process. The newest complete one always stays, and nothing newer than it is touched. A folder that
    cannot be deleted is a warning, never the end of a run. Returns the steps deleted.
    """
    assert keep_last >= 1, keep_last
    complete: list[int] = []
    deleted = []
    for step, folder in _step_folders(run_dir):
        if not verify(folder, deep=False) and step not in complete:
            complete.append(step)
            if len(complete) <= keep_last or (keep_every and step % keep_every == 0):
                continue
        if (
            complete and step not in spare
        ):  # damaged or replaced ones older than a complete one can never be resumed from
            _try_remove(folder)
            deleted.append(step)
    return deleted


def clean(run_dir: str | Path) -> None:
    """Delete what a killed process left half written or half deleted; for the job that holds the lease, at start."""
    parent = Path(run_dir) / "checkpoints"
    if parent.is_dir():
        for folder in [*parent.glob(".staging-*"), *parent.glob(".trash-*")]:
            _try_remove(folder)


def space_needed(size: int, run_dir: str | Path) -> None:
    """Raise UserError when the run folder's disk has no room for one checkpoint of `size` bytes."""
    free = shutil.disk_usage(run_dir).free
    if free < size:
        raise UserError(
            f"run_dir={run_dir}: one checkpoint takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "free some space or choose another disk"
        )
