"""The finished pieces of a stage: whole or absent, kept for the same plan, gone with another."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.errors import UserError
from data.parts import Parts, write_whole
from trainer import work

PLAN = {"model": "a1", "settings": {"top_k": 2, "seed": 0}}


def _writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


@contextmanager
def _full_disk(after_bytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, which the kernel refuses much as it refuses a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_parts_of_the_same_plan_are_there_again(tmp_path: Path) -> None:
    with Parts(tmp_path / "work", PLAN) as parts:
        parts.write("block-0", _writer("zero"))
        parts.write("inner/block-1", _writer("one"))
    with Parts(tmp_path / "work", {"settings": {"seed": 0, "top_k": 2}, "model": "a1"}) as parts:
        assert parts.has("block-0")
        assert parts.path("inner/block-1").read_text() == "one"
        assert not parts.has("block-2")


def test_another_plan_clears_the_folder_and_the_log_names_what_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Parts(tmp_path / "work", PLAN) as parts:
        parts.write("inner/block-0", _writer("zero"))
    with caplog.at_level(logging.WARNING, "quintet"):
        parts = Parts(tmp_path / "work", {"model": "a1", "settings": {"top_k": 3, "seed": 0}})
    assert not parts.has("inner/block-0")
    assert "settings.top_k 2 -> 3" in caplog.text
    assert "seed" not in caplog.text
    parts.close()


def test_a_write_that_fails_leaves_nothing_and_what_is_finished_stays(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise ValueError("boom")

    with Parts(tmp_path / "work", PLAN) as parts:
        parts.write("block-0", _writer("zero"))
        with pytest.raises(ValueError, match="boom"):
            parts.write("block-1", write)
        assert sorted(path.name for path in parts.folder.iterdir()) == [".lock", "block-0", "plan.json"]


def test_a_full_disk_is_one_message_that_names_the_folder(tmp_path: Path) -> None:
    with Parts(tmp_path / "work", PLAN) as parts:
        parts.write("block-0", _writer("zero"))
        with _full_disk(4096), pytest.raises(UserError, match=r"work: cannot be written \(File too large: block-1\)"):
            parts.write("block-1", _writer("x" * 9000))
        assert sorted(path.name for path in parts.folder.iterdir()) == [".lock", "block-0", "plan.json"]
        parts.write("block-1", _writer("x" * 9000))
        assert parts.path("block-0").read_text() == "zero"


def test_another_job_is_refused_while_the_folder_is_held_and_other_ranks_are_not(tmp_path: Path) -> None:
    held = Parts(tmp_path / "work", PLAN)
    program = """
import pathlib, sys
from data.parts import Parts
Parts(pathlib.Path(sys.argv[1]), {}, hold=sys.argv[2] == "1")
"""
    for hold, code in (("1", 1), ("0", 0)):
        command = [sys.executable, "-c", program, str(tmp_path / "work"), hold]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        assert ("another job works on it" in done.stderr) == (hold == "1")
    held.close()
    Parts(tmp_path / "work", PLAN).close()


def test_a_killed_writer_leaves_no_part_and_its_leftover_goes(tmp_path: Path) -> None:
    program = """
import os, pathlib, signal, sys
from data.parts import Parts
def write(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
parts = Parts(pathlib.Path(sys.argv[1]), {"a": 1})
parts.write("whole", lambda path: path.write_text("whole"))
parts.write("block", write)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "work")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [name for name in os.listdir(tmp_path / "work") if name.endswith(".partial")]
    with Parts(tmp_path / "work", {"a": 1}) as parts:
        assert sorted(os.listdir(parts.folder)) == [".lock", "plan.json", "whole"]


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(UserError, match="is something else"):
        Parts(tmp_path / "photos", PLAN)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"


def test_removed_work_is_gone_and_may_begin_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "work", PLAN)
    parts.write("block-0", _writer("zero"))
    parts.remove()
    assert not (tmp_path / "work").exists()
    with Parts(tmp_path / "work", PLAN) as parts:
        assert not parts.has("block-0")


def test_a_whole_file_replaces_the_one_before(tmp_path: Path) -> None:
    for text in ("old", "new"):
        write_whole(tmp_path / "deep" / "file.txt", _writer(text))
    assert (tmp_path / "deep" / "file.txt").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_an_output_that_cannot_take_its_place_is_named(tmp_path: Path, tmpfs: Callable[[str], Path]) -> None:
    mounted = tmpfs("1m")  # the kernel renames no folder that something is mounted on
    with Parts(tmp_path / "work", PLAN) as parts:
        parts.path(work.RESULT).mkdir()
        with pytest.raises(UserError, match=r"output=.*: cannot be written \(.*\); name another"):
            work.publish(parts, mounted)
