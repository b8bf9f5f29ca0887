"""A run's copy in object storage: what survives the machines, and what an empty run folder is filled from.

    MIRROR/run.json                                the run that goes on from here: its id
    MIRROR/ID/checkpoints/step-00001000/...        a complete checkpoint: its done.json was written last
    MIRROR/ID/metrics.jsonl, config.yaml, ...      as in the run folder
    MIRROR/ID/model/...                            the finished model; exit.json, written after all else, says so

Rank 0 alone copies, in a thread, so that no step waits for it and no failure stops a run. Every run has a folder of its
own, so that a fresh start never mixes with what was there.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from data import fetch, files
from data.errors import EXIT_DONE, DataError, QuintetError, Stopped, UserError
from trainer import checkpoint, rollback
from trainer.checkpoint import MANIFEST, Checkpoint, folder_name

log = logging.getLogger("quintet")

TRANSFERS = 8
# Between two tries of a checkpoint that storage refuses.
RETRY_SECONDS = 60.0
# After a crash: other ranks and launchers do not wait for us.
CRASH_SECONDS = 10.0
_RUN = "run.json"
_BROUGHT_BACK = (_RUN, "config.yaml", "metrics.jsonl", rollback.FILE, "incidents.jsonl")
_SMALL = (*_BROUGHT_BACK, "ds_config.json", "environment.json")
_STEP = re.compile(r"step-(\d{8,})")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def problems(url: str) -> list[str]:
    """What is wrong with the key `mirror`, told before anything starts."""
    if "::" in url or not url.isprintable():
        return [f"mirror={url!r}: not a folder or a URL such as s3://bucket/runs/mine"]
    if urlsplit(url).password:
        return ["mirror: holds a password; leave it to the environment or the files that the store's client reads"]
    return []


class Store:
    """A folder of one of fsspec's file systems. Every call is repeated while it fails, and ends in a QuintetError."""

    def __init__(self, url: str) -> None:
        """Raises UserError when there is no such file system, or a package for it is missing."""
        from fsspec.core import url_to_fs
        from fsspec.utils import get_protocol

        self.url = url.rstrip("/")
        # Object stores have no folders; asked to make one, some clients make a bucket.
        self._is_local = get_protocol(url) in ("file", "local")
        options = {"auto_mkdir": True} if self._is_local else {}
        try:
            self._system, root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise UserError(f"mirror={url}: cannot be opened: {error}") from None
        self._root = root.rstrip("/")

    def write(self, name: str, content: bytes) -> None:
        self._try(name, lambda place: self._whole(place, lambda path: self._system.pipe_file(path, content)))

    def read(self, name: str) -> bytes | None:
        """The content of a file, None when it is not there."""
        return self._try_found(name, self._system.cat_file)

    def put(self, file: Path, name: str) -> None:
        """Copy a file there."""
        self._try(name, lambda place: self._whole(place, lambda path: self._system.put_file(str(file), path)))

    def get(self, name: str, file: Path) -> None:
        """Copy a file here. One that is not there gives none."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._try_found(name, lambda place: self._system.get_file(place, str(file)))

    def names(self, folder: str) -> list[str]:
        """What lies in a folder, files and folders; nothing when it is not there."""

        def look(place: str) -> list[str]:
            self._system.invalidate_cache()
            return [str(path).rstrip("/").rpartition("/")[2] for path in self._system.ls(place, detail=False)]

        return self._try_found(folder, look) or []

    def remove(self, name: str) -> None:
        """Delete a file or a folder with all that is in it, if it is there."""

        def delete(place: str) -> None:
            self._system.invalidate_cache()
            self._system.rm(place, recursive=True)

        self._try_found(name, delete)

    def _whole(self, place: str, write: Callable[[str], None]) -> None:
        """Write a file that nobody sees half: object storage does that itself, a plain folder by a new name."""
        if self._is_local:
            write(f"{place}.part")
            Path(f"{place}.part").replace(place)
        else:
            write(place)

    def _try_found(self, name: str, call: Callable[[str], Any]) -> Any:
        """What a call gives for the full path of `name`, None when that is not there."""

        def unless_missing(place: str) -> Any:
            try:
                return call(place)
            except FileNotFoundError:
                return None

        return self._try(name, unless_missing)

    def _try(self, name: str, call: Callable[[str], Any]) -> Any:
        place, location = f"{self._root}/{name}", f"{self.url}/{name}"

        def attempt() -> Any:
            try:
                return call(place)
            except (PermissionError, NotImplementedError) as error:
                raise UserError(f"{location}: refused ({error}); look at the credentials and the URL") from None

        return fetch.with_retries(location, attempt)


class Mirror:
    """The copy of one run. Without a URL, and on ranks other than 0, every method does nothing.

    Args:
        url: where it lies.
        keep_last, keep_every: which checkpoints stay there, as in the run folder.
        limit_seconds: how long the end of a run waits for what is still to be sent.
    """

    def __init__(
        self, url: str, run_dir: str | Path, *, keep_last: int, keep_every: int, limit_seconds: float, rank: int = 0
    ) -> None:
        self._store = Store(url) if url and rank == 0 else None
        self._run_dir = Path(run_dir)
        self._keep_last, self._keep_every, self._limit_seconds = keep_last, keep_every, limit_seconds
        self._pointer = ""  # the id that run.json of the mirror names
        self._id = ""
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # Under the condition:
        self._waiting: Checkpoint | None = None
        self._sending: Checkpoint | None = None
        self._code: int | None = None
        self._failures, self._last_step, self._failing = 0, 0, False
        self._news: list[str] = []

    # --- before the run -------------------------------------------------------------------------------------------

    def restore(self, *, fresh: bool) -> None:
        """Fill a run folder without checkpoints with the newest complete one of the mirror, hash by hash.

        Raises:
            UserError: the mirror cannot be read and nothing else is there to go on from; all its checkpoints are
                damaged; it is the mirror of another run.
        """
        if self._store is None or fresh:
            return
        has_checkpoints = any((self._run_dir / "checkpoints").glob("step-*"))
        try:
            self._pointer = self._read_pointer(self._store)
            own = _local_id(self._run_dir)
            if own and self._pointer and own != self._pointer:
                raise UserError(
                    f"mirror={self._store.url}: belongs to run {self._pointer}, and {self._run_dir} is run {own}; "
                    "name another mirror or another run_dir"
                )
            if self._pointer and not has_checkpoints:
                self._bring_back(self._store)
        except DataError as error:
            if not has_checkpoints:
                raise UserError(f"mirror: {error}; a start without it must be asked for: fresh=true") from None
            log.warning("mirror: %s; going on with what is in %s", error, self._run_dir)

    def _read_pointer(self, store: Store) -> str:
        text = store.read(_RUN)
        if text is None:
            return ""
        try:
            found = str(json.loads(text)["id"])
        except (ValueError, TypeError, KeyError):
            found = ""
        if not _ID.fullmatch(found):
            raise UserError(f"{store.url}/{_RUN}: damaged; delete it to start a new run there")
        return found

    def _bring_back(self, store: Store) -> None:
        for name in _BROUGHT_BACK:
            text = store.read(f"{self._pointer}/{name}")
            if text is not None:
                files.put(self._run_dir / name, partial(Path.write_bytes, data=text))
        # A rollback that is still to be carried out goes on from an older checkpoint than the newest.
        all_of_them, newest, step, found = (self._run_dir / rollback.FILE).exists(), "", 0, False
        for number in self._complete(store, self._pointer):
            newest = newest or f"step {number}"
            problem = self._fetch(store, number)
            if problem:
                log.warning("mirror: the checkpoint of step %d is passed over: %s", number, problem)
                continue
            step, found = max(step, number), True
            if not all_of_them:
                break
        if newest and not found:
            raise UserError(
                f"mirror={store.url}: no checkpoint of run {self._pointer} is complete; start over with fresh=true"
            )
        if newest:
            what = "run_dir=%s has no checkpoint; that of step %d was restored from mirror=%s"
            log.info(what, self._run_dir, step, store.url)

    def _complete(self, store: Store, run_id: str) -> list[int]:
        """The steps whose manifest is there, newest first."""
        found = [int(match[1]) for name in store.names(f"{run_id}/checkpoints") if (match := _STEP.fullmatch(name))]
        place = f"{run_id}/checkpoints"
        return [step for step in sorted(found, reverse=True) if MANIFEST in store.names(f"{place}/{folder_name(step)}")]

    def _fetch(self, store: Store, step: int) -> str:
        """Copy one checkpoint into the run folder; what is wrong with it, "" when nothing is."""
        place, parent = f"{self._pointer}/checkpoints/{folder_name(step)}", self._run_dir / "checkpoints"
        text = store.read(f"{place}/{MANIFEST}") or b""
        try:
            listed = json.loads(text)["files"]
            names, size = list(listed), sum(int(entry["bytes"]) for entry in listed.values())
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{MANIFEST}: not a manifest"
        if outside := [name for name in names if not _is_below(name)]:
            return f"{MANIFEST} names {outside[0]!r}"
        checkpoint.space_needed(size, self._run_dir)
        staging = parent / f".staging-{folder_name(step)}"  # removed by checkpoint.clean when we are killed here
        staging.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: store.get(f"{place}/{name}", staging / name), names))
        (staging / MANIFEST).write_bytes(text)
        problem = next(iter(checkpoint.verify(staging)), "")
        if not problem and json.loads(text)["step"] != step:
            problem = f"{MANIFEST}: the checkpoint of another step"
        if problem:
            checkpoint.clean(self._run_dir)
            return problem
        for path in sorted(staging.rglob("*"), reverse=True):
            files.sync(path)
        files.sync(staging)
        staging.rename(parent / folder_name(step))
        files.sync(parent)
        return ""

    # --- while it goes on -----------------------------------------------------------------------------------------

    def begin(self, run_id: str, saved: Checkpoint | None) -> None:
        """Start to copy the run `run_id`, which goes on from `saved`.

        Raises:
            UserError: this is the first start that uses the mirror, and it cannot be written.
        """
        if self._store is None:
            return
        self._id, self._waiting, store = run_id, saved, self._store
        log.info("mirror: %s/%s", store.url, run_id)
        if self._pointer != run_id:
            try:
                store.write(_RUN, json.dumps({"id": run_id}).encode())
            except DataError as error:
                raise UserError(f"mirror: {error}") from None
        self._thread = threading.Thread(target=self._work, name="mirror of checkpoints", daemon=True)
        self._thread.start()

    def send(self, saved: Checkpoint) -> None:
        """Copy a checkpoint as soon as the one before it is through; never waits. One that still waits is left out."""
        with self._changed:
            if self._thread is not None:
                self._waiting = saved
                self._changed.notify_all()

    @property
    def held(self) -> set[int]:
        """The steps whose checkpoints must stay in the run folder, because they are being copied or will be."""
        with self._changed:
            return {job.step for job in (self._sending, self._waiting) if job}

    def figures(self) -> dict[str, float]:
        """What is logged of the mirror, under ckpt/."""
        if self._thread is None:
            return {}
        with self._changed:
            return {"mirrored_step": self._last_step, "mirror_failures": self._failures}

    def news(self) -> list[str]:
        """What went wrong since the last call."""
        with self._changed:
            found, self._news = self._news, []
        return found

    def finish(self, code: int) -> None:
        """Copy what is still to be copied, and the end of the run; waits for it, but not for ever."""
        if self._thread is None or self._store is None:
            return
        with self._changed:
            self._code = code
            self._changed.notify_all()
        limit = self._limit_seconds if code in (EXIT_DONE, Stopped.exit_code) else CRASH_SECONDS
        self._thread.join(limit)
        place = f"{self._store.url}/{self._id}"
        for text in self.news():
            log.error("mirror: %s", text)
        if self._thread.is_alive():
            log.error(
                "mirror: %s lacks what was not copied within %.0f s; its newest step is %d",
                place,
                limit,
                self._last_step,
            )
        elif self._failing:
            log.error("mirror: %s lacks the end of the run; its newest step is %d", place, self._last_step)
        else:
            log.info("mirror: %s has all of the run, to step %d", place, self._last_step)

    # --- in the thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        assert self._store is not None
        store = self._store
        self._guarded(lambda: store.remove(f"{self._id}/exit.json"))
        while (job := self._next()) is not None:
            if not self._guarded(partial(self._copy, store, job)):
                self._put_off(job)
        self._guarded(lambda: self._copy_end(store))

    def _put_off(self, job: Checkpoint) -> None:
        """Try a checkpoint again after a while, or at once when the run ends; none when a newer one waits."""
        with self._changed:
            if self._code is None and self._waiting is None:
                self._waiting = job
                self._changed.wait_for(lambda: self._waiting is not job or self._code is not None, RETRY_SECONDS)

    def _next(self) -> Checkpoint | None:
        """The next checkpoint to copy, None when the run has ended and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._code is not None)
            self._sending, self._waiting = self._waiting, None
            return self._sending

    def _guarded(self, work: Callable[[], None]) -> bool:
        """Do something that may fail: the failure is counted, and told when it follows a success."""
        try:
            work()
        except Exception as error:  # no error of a store's client may end the thread
            reason = str(error) if isinstance(error, QuintetError) else f"{type(error).__name__}: {error}"
            with self._changed:
                self._failures += 1
                if not self._failing:
                    self._news.append(reason)
                self._failing = True
            return False
        self._failing = False
        return True

    def _copy(self, store: Store, saved: Checkpoint) -> None:
        """Copy one checkpoint, its manifest last, and delete those that it makes needless."""
        place = f"{self._id}/checkpoints/{saved.folder.name.removesuffix('.replaced')}"
        text = (saved.folder / MANIFEST).read_bytes()
        listed = json.loads(text)["files"]
        before = store.read(f"{place}/{MANIFEST}")
        copied = before is not None and _files(before) == listed  # the same was saved and copied before
        if not copied:
            if before is not None:
                store.remove(f"{place}/{MANIFEST}")
            self._put_all(store, saved.folder, place, listed)
        # Before the manifest: a checkpoint without the run's id and journal would go on as another run.
        self._put_small(store)
        if not copied:
            if (saved.folder / MANIFEST).read_bytes() != text:
                return  # saved anew meanwhile: that one waits
            store.write(f"{place}/{MANIFEST}", text)
        self._last_step = saved.step
        self._prune(store)

    def _prune(self, store: Store) -> None:
        """Keep what the run folder keeps. A manifest goes before its files, so that no half one ever counts."""
        place = f"{self._id}/checkpoints"
        complete = self._complete(store, self._id)
        kept = set(complete[: self._keep_last])
        kept |= {step for step in complete if self._keep_every and step % self._keep_every == 0}
        for name in store.names(place):
            match = _STEP.fullmatch(name)
            if match and int(match[1]) not in kept and int(match[1]) < self._last_step:
                store.remove(f"{place}/{name}/{MANIFEST}")
                store.remove(f"{place}/{name}")

    def _copy_end(self, store: Store) -> None:
        """Copy what the end of a run leaves: the journal, the finished model, and last of all how it ended."""
        model = self._run_dir / "model"
        if self._code == EXIT_DONE and model.is_dir():
            paths = [path.relative_to(model).as_posix() for path in sorted(model.rglob("*")) if path.is_file()]
            self._put_all(store, model, f"{self._id}/model", paths)
        self._put_small(store)
        store.put(self._run_dir / "exit.json", f"{self._id}/exit.json")

    def _put_small(self, store: Store) -> None:
        self._put_all(store, self._run_dir, self._id, [name for name in _SMALL if (self._run_dir / name).exists()])

    def _put_all(self, store: Store, folder: Path, place: str, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: store.put(folder / name, f"{place}/{name}"), names))


def _local_id(run_dir: Path) -> str:
    try:
        return str(json.loads((run_dir / _RUN).read_bytes())["id"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _files(manifest: bytes) -> Any:
    try:
        return json.loads(manifest)["files"]
    except (ValueError, TypeError, KeyError):
        return None


def _is_below(name: str) -> bool:
    """Whether a name out of a manifest stays inside of its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
