"""Checkpoints under kills, full disks and damage: resume always finds a complete step or says why it cannot."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import models

from data.errors import UserError
from trainer import checkpoint
from trainer.checkpoint import MANIFEST, SaveError

ROOT = Path(__file__).resolve().parent.parent
STATE = {"stage": 1, "data": {"epoch": 0.1 + 0.2, "lanes": 64}, "config_hash": "abc"}


def _write(step: int) -> Callable[[Path], list[Path]]:
    """Writes what a rank may write: files in folders, an empty one, and one that it does not name."""

    def write(staging: Path) -> list[Path]:
        model, optimizer = staging / "model" / "weights.bin", staging / "optimizer.bin"
        model.parent.mkdir()
        model.write_bytes(bytes(range(256)) * step)
        optimizer.write_bytes(str(step).encode() * 1000)
        (staging / "empty").touch()
        return [model, optimizer]

    return write


def _save(run_dir: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.Saving(run_dir, step, _write(step), STATE).publish()


def _steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def _holds(found: checkpoint.Checkpoint | None, step: int) -> bool:
    """Whether a checkpoint is the whole of that step, read back without the code under test."""
    assert found is not None
    model = (found.folder / "model" / "weights.bin").read_bytes() == bytes(range(256)) * step
    return model and (found.folder / "optimizer.bin").read_bytes() == str(step).encode() * 1000


def test_a_saved_checkpoint_comes_back_with_its_state(tmp_path: Path) -> None:
    saved = _save(tmp_path, 7)
    found = checkpoint.newest(tmp_path)
    assert _holds(found, 7)
    assert found == saved
    assert {name: found.manifest[name] for name in STATE} == STATE
    assert (found.step, found.manifest["world_size"], found.bytes) == (7, 1, 7 * 256 + 1000)
    assert set(found.manifest["files"]) == {"model/weights.bin", "optimizer.bin", "empty"}
    assert _steps(tmp_path) == ["step-00000007"]


def test_a_run_without_checkpoints_starts_at_the_beginning(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        checkpoint.Saving(tmp_path, step, lambda staging: None, {}).publish()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


# Killed at every point of a save

_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = ["tests"]
from test_checkpoint import STATE, _write
from trainer import checkpoint

run_dir, step, target = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
reached = 0

def at(point):
    global reached
    if reached == target:
        print(point, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    reached += 1

def write(staging):
    at("nothing written")
    files = _write(step)(staging)
    at("all written")
    return files

checkpoint.Saving(run_dir, step, write, STATE, at=at).publish()
at("published")
checkpoint.prune(run_dir, 1)
"""


def _save_killed_at(run_dir: Path, step: int, point: int) -> str:
    """Save in a process that is killed at its n-th point; the name of the point, empty when there are fewer."""
    command = [sys.executable, "-c", _KILLED, str(run_dir), str(step), str(point)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (-signal.SIGKILL if done.stdout else 0), done.stderr
    return done.stdout.strip()


def test_killed_at_every_point_of_a_save_a_complete_step_is_found(tmp_path: Path) -> None:
    seen: list[str] = []
    while True:
        run_dir = tmp_path / str(len(seen))
        _save(run_dir, 1)
        name = _save_killed_at(run_dir, 2, len(seen))
        if not name:
            break
        seen.append(name)
        found = checkpoint.newest(run_dir)
        assert found is not None
        assert found.step == (2 if name in ("renamed", "published") else 1), name
        assert _holds(found, found.step)
        checkpoint.clean(run_dir)
        assert _holds(_save(run_dir, 2), 2), name
        checkpoint.prune(run_dir, 1)
        assert _steps(run_dir) == ["step-00000002"], name
    assert {"staged", "nothing written", "file", "before manifest", "before rename", "renamed", "published"} <= set(
        seen
    )


def test_killed_twice_while_a_step_is_written_anew_the_only_one_is_never_lost(tmp_path: Path) -> None:
    points: list[str] = []
    while name := _save_killed_at(_saved(tmp_path / f"once-{len(points)}"), 1, len(points)):
        assert _holds(checkpoint.newest(tmp_path / f"once-{len(points)}"), 1), name
        points.append(name)
    for second in range(len(points)):
        run_dir = _saved(tmp_path / f"twice-{second}")
        assert _save_killed_at(run_dir, 1, points.index("replaced")) == "replaced"
        name = _save_killed_at(run_dir, 1, second)
        assert _holds(checkpoint.newest(run_dir), 1), name
        checkpoint.clean(run_dir)
        assert _holds(_save(run_dir, 1), 1), name
        assert _steps(run_dir) == ["step-00000001"], name


def _saved(run_dir: Path) -> Path:
    """A run folder whose only checkpoint is that of step 1."""
    _save(run_dir, 1)
    return run_dir


# Damage


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_cut, Path.unlink, _flip])
@pytest.mark.parametrize("name", ["model/weights.bin", "optimizer.bin", MANIFEST])
def test_a_damaged_step_is_named_and_an_older_one_used(
    name: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 1)
    damage(_save(tmp_path, 2).folder / name)
    with caplog.at_level(logging.WARNING, "quintet"):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    (said,) = caplog.messages
    assert f"step-00000002/{name}" in said
    with pytest.raises(UserError, match=name):
        checkpoint.load(tmp_path / "checkpoints" / "step-00000002", deep=True)
    _save(tmp_path, 2)
    assert _holds(checkpoint.newest(tmp_path), 2)


def test_every_flipped_bit_of_a_manifest_is_noticed_or_harmless(tmp_path: Path) -> None:
    saved = _save(tmp_path, 3)
    path = saved.folder / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if not checkpoint.verify(saved.folder, deep=False):
            assert checkpoint.load(saved.folder).manifest == saved.manifest


def test_a_flipped_bit_is_only_looked_for_when_asked(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1)
    _flip(saved.folder / "optimizer.bin")
    assert not checkpoint.verify(saved.folder, deep=False)
    assert len(checkpoint.verify(saved.folder, deep=True)) == 1


def test_a_run_whose_steps_are_all_damaged_never_starts_over_unasked(tmp_path: Path) -> None:
    for step in (1, 2):
        _cut(_save(tmp_path, step).folder / "optimizer.bin")
    with pytest.raises(UserError, match=r"step-00000002/optimizer\.bin.*fresh=true"):
        checkpoint.newest(tmp_path)


def test_a_step_under_another_name_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1).folder
    shutil.copytree(folder, folder.with_name("step-00000009"))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1


# Failures while writing


def _full(staging: Path) -> None:
    (staging / "weights.bin").write_bytes(b"a part of it")
    raise OSError(errno.ENOSPC, "No space left on device", str(staging / "weights.bin"))


def test_a_full_disk_leaves_the_older_checkpoint_and_no_rest(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    with pytest.raises(SaveError, match="No space left on device"):
        checkpoint.Saving(tmp_path, 2, _full, STATE).publish()
    assert _steps(tmp_path) == ["step-00000001"]
    assert _holds(checkpoint.newest(tmp_path), 1)
    assert _holds(_save(tmp_path, 2), 2)


def _tensors(staging: Path) -> None:
    save_file({"weights": np.zeros(10**6, np.uint8)}, staging / "model.safetensors")


def _tokenizer(staging: Path) -> None:
    models.WordLevel({f"word {number}": number for number in range(50_000)}, "word 0").save(str(staging))


@pytest.mark.parametrize("write", [_write(2000), _tensors, _tokenizer], ids=["bytes", "safetensors", "tokenizers"])
def test_a_really_full_disk_leaves_the_older_checkpoint(
    write: Callable[[Path], Any], tmpfs: Callable[[str], Path]
) -> None:
    folder = tmpfs("256k")
    _save(folder, 1)
    with pytest.raises(SaveError, match="No space left"):
        checkpoint.Saving(folder, 2, write, STATE).publish()
    assert _holds(checkpoint.newest(folder), 1)
    assert _holds(_save(folder, 2), 2)
    with pytest.raises(UserError, match=r"run_dir=.*free"):
        checkpoint.space_needed(10**6, folder)


def test_a_fault_of_the_program_keeps_its_type(tmp_path: Path) -> None:
    def write(staging: Path) -> None:
        raise KeyError("weights")

    with pytest.raises(KeyError):
        checkpoint.Saving(tmp_path, 1, write, STATE).publish()
    assert _steps(tmp_path) == []


def test_a_place_that_cannot_be_written_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(SaveError, match=str(tmp_path)):
        _save(tmp_path, 1)


def test_space_for_one_checkpoint_is_asked_for_beforehand(tmp_path: Path) -> None:
    checkpoint.space_needed(1, tmp_path)
    with pytest.raises(UserError, match=r"run_dir=.*GiB are free"):
        checkpoint.space_needed(1 << 60, tmp_path)


# Several ranks


class _Threads:
    """Ranks that are threads of this process and agree through a barrier."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, votes: list[bool]) -> None:
        self.rank, self.world, self._barrier, self._votes = rank, world, barrier, votes

    def all(self, ok: bool) -> bool:
        self._votes[self.rank] = ok
        self._barrier.wait(20)
        verdict = all(self._votes)
        self._barrier.wait(20)
        return verdict


def _on_ranks(world: int, work: Callable[[_Threads], Any]) -> list[Any]:
    """Run `work` on every rank; what each returned or raised."""
    barrier, votes = threading.Barrier(world), [True] * world
    outcomes: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(_Threads(rank, world, barrier, votes))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


def _write_shard(rank: int, fails: int = -1) -> Callable[[Path], list[Path]]:
    def write(staging: Path) -> list[Path]:
        path = staging / f"shard-{rank}"
        path.write_bytes(bytes([rank]) * 10)
        if rank == fails:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return [path]

    return write


def test_every_ranks_files_are_in_one_manifest(tmp_path: Path) -> None:
    outcomes = _on_ranks(
        3, lambda ranks: checkpoint.Saving(tmp_path, 1, _write_shard(ranks.rank), STATE, ranks=ranks).publish()
    )
    assert [outcome.step for outcome in outcomes] == [1, 1, 1]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.manifest["world_size"] == 3
    assert set(found.manifest["files"]) == {"shard-0", "shard-1", "shard-2"}
    assert {path.name for path in found.folder.iterdir()} == {"shard-0", "shard-1", "shard-2", MANIFEST}


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_one_failing_rank_stops_the_save_on_all(fails: int, tmp_path: Path) -> None:
    def work(ranks: _Threads) -> checkpoint.Checkpoint:
        return checkpoint.Saving(tmp_path, 1, _write_shard(ranks.rank, fails), STATE, ranks=ranks).publish()

    outcomes = _on_ranks(3, work)
    assert [type(outcome) for outcome in outcomes] == [SaveError] * 3
    assert "quota" in str(outcomes[fails])
    assert _steps(tmp_path) == []
    assert checkpoint.newest(tmp_path) is None


# Keeping and deleting


def test_the_last_ones_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step in range(1, 11):
        _save(tmp_path, step)
    assert checkpoint.prune(tmp_path, keep_last=2, keep_every=4) == [7, 6, 5, 3, 2, 1]
    assert _steps(tmp_path) == [f"step-{step:08d}" for step in (4, 8, 9, 10)]


def test_damaged_steps_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        _save(tmp_path, step)
    for step in (3, 5):
        _cut(tmp_path / "checkpoints" / f"step-{step:08d}" / "optimizer.bin")
    checkpoint.prune(tmp_path, keep_last=2)
    # 5 is newer than every complete one: somebody may still want to look at it; 3 can never be resumed from.
    assert _steps(tmp_path) == [f"step-{step:08d}" for step in (2, 4, 5)]


def test_what_a_killed_process_left_is_removed_at_start(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    for name in (".staging-step-00000002", ".trash-step-00000001-1-1"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "rest").touch()
    checkpoint.clean(tmp_path)
    assert _steps(tmp_path) == ["step-00000001"]


def test_a_manifest_is_plain_json_that_others_can_read(tmp_path: Path) -> None:
    manifest = json.loads((_save(tmp_path, 1).folder / MANIFEST).read_text())
    assert manifest["files"]["optimizer.bin"]["bytes"] == 1000
    assert manifest["data"]["epoch"] == STATE["data"]["epoch"]  # type: ignore[index]


def test_one_that_must_go_and_cannot_is_named(tmpfs: Callable[[str], Path]) -> None:
    mounted = tmpfs("1m")  # the kernel renames no folder that something is mounted on
    with pytest.raises(UserError, match=r"must not be used any more and cannot be deleted .*; delete it"):
        checkpoint.discard(checkpoint.Checkpoint(mounted, 3, {}))
