"""The run folder: its lease between real processes, and what is written into it."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from trainer import runfolder
from trainer.runfolder import Lease

ROOT = Path(__file__).resolve().parent.parent

_HOLDER = """
import sys, time
from trainer.runfolder import Lease
with Lease(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(run_dir: Path) -> subprocess.Popen[str]:
    """Another job that holds the lease of `run_dir` until its stdin is closed."""
    command = [sys.executable, "-c", _HOLDER, str(run_dir)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def _prepare(run_dir: Path, text: str = "steps: 3\n", **options: Any) -> runfolder.Run:
    return runfolder.prepare(run_dir, config_text=text, ds_config={"train_batch_size": 4}, **options)


def test_a_second_job_is_refused_by_name_and_a_killed_one_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with _holder(tmp_path) as first:
        with pytest.raises(
            UserError, match=rf"run_dir={re.escape(str(tmp_path))}: process {first.pid} on host \S+ .* 0 minutes"
        ):
            Lease(tmp_path).__enter__()
        first.send_signal(signal.SIGKILL)
        first.wait(10)
    with caplog.at_level(logging.WARNING, "quintet"), Lease(tmp_path):
        assert f"process {first.pid}" in caplog.text
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_hold_a_lease_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lease\.json: cannot be written \(.*\); make room or choose another folder"):
        Lease(tmp_path / "not there").__enter__()


def test_a_lease_given_back_is_free(tmp_path: Path) -> None:
    with _holder(tmp_path) as first:
        first.communicate(timeout=10)
    with Lease(tmp_path):
        pass


def test_a_process_of_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    with Lease(tmp_path):
        lease = json.loads((tmp_path / "lease.json").read_text())
    (tmp_path / "lease.json").write_text(json.dumps({**lease, "process_start": "1"}))
    with Lease(tmp_path):
        pass


class _Elsewhere:
    """A lease of another host, which its owner renews or not while we wait."""

    def __init__(self, run_dir: Path, *, renews: bool) -> None:
        with Lease(run_dir):
            lease = json.loads((run_dir / "lease.json").read_text())
        self._path = run_dir / "lease.json"
        self._path.write_text(json.dumps({**lease, "host": "node7", "process_table": "another", "token": "theirs"}))
        self._renews = renews
        self.waited = 0.0

    def sleep(self, seconds: float) -> None:
        self.waited += seconds
        if self._renews and self.waited == 12:
            stamp = self._path.stat().st_mtime_ns + 12 * 10**9
            os.utime(self._path, ns=(stamp, stamp))


def test_a_live_job_on_another_host_is_noticed_by_its_renewal(tmp_path: Path) -> None:
    other = _Elsewhere(tmp_path, renews=True)
    with pytest.raises(UserError, match="on host node7 has been working here for 0 minutes; stop it"):
        Lease(tmp_path, sleep=other.sleep).__enter__()
    assert other.waited == 12


def test_a_silent_job_on_another_host_is_taken_over_after_the_limit(tmp_path: Path) -> None:
    other = _Elsewhere(tmp_path, renews=False)
    with Lease(tmp_path, sleep=other.sleep, limit_seconds=60):
        assert other.waited == 60


def test_a_damaged_lease_is_taken_over_only_after_the_limit(tmp_path: Path) -> None:
    other = _Elsewhere(tmp_path, renews=False)
    (tmp_path / "lease.json").write_bytes(b'{"host": ')
    with Lease(tmp_path, sleep=other.sleep, limit_seconds=60):
        assert other.waited == 60


def test_a_job_whose_lease_was_taken_learns_it_and_leaves_the_other_alone(tmp_path: Path) -> None:
    lease = Lease(tmp_path, renew_seconds=0.01)
    with lease:
        theirs = json.dumps({"token": "theirs"})
        runfolder.write_text(tmp_path / "lease.json", theirs)
        for thread in _threads("lease"):
            thread.join(10)
        assert lease.lost
    assert (tmp_path / "lease.json").read_text() == theirs


def _threads(name: str) -> list[Any]:
    import threading

    return [thread for thread in threading.enumerate() if thread.name == name and thread.is_alive()]


def test_a_lease_is_renewed_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with Lease(tmp_path, renew_seconds=0.01):
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:  # ends with the first renewal, or with the time limit of the test
            pass


# What is written


def test_a_run_keeps_its_id_and_counts_its_starts(tmp_path: Path) -> None:
    first, second = _prepare(tmp_path / "run"), _prepare(tmp_path / "run")
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.id == second.id
    assert first.id != _prepare(tmp_path / "other").id


def test_a_changed_configuration_is_kept_beside_the_old_one(tmp_path: Path) -> None:
    for text in ("steps: 3\n", "steps: 3\n", "steps: 4\n"):
        _prepare(tmp_path, text)
    assert (tmp_path / "config.yaml").read_text() == "steps: 4\n"
    assert (tmp_path / "config.attempt-2.yaml").read_text() == "steps: 3\n"
    assert not (tmp_path / "config.attempt-1.yaml").exists()


def test_the_environment_is_told_without_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "fake-key-0123456789")
    monkeypatch.setenv("HF_TOKEN", "fake-token-0123456789")
    _prepare(tmp_path, "wandb: ${oc.env:WANDB_API_KEY}\n", devices=["H100"])
    told = json.loads((tmp_path / "environment.json").read_text())
    assert torch.__version__.startswith(told["versions"]["torch"])
    assert told["devices"] == ["H100"]
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"0123456789" not in everything


def test_the_commit_is_the_checkouts() -> None:
    told = runfolder.commit()
    if not (ROOT / ".git").exists():  # the sources out of an archive
        assert told is None
        return
    assert told is not None
    assert told[:40] == subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True).strip()


@pytest.mark.parametrize(
    ("written", "commit"),
    [
        ('{"url": "https://example.org/q.git", "vcs_info": {"vcs": "git", "commit_id": "0123abcd"}}', "0123abcd"),
        ('{"url": "file:///q", "dir_info": {"editable": true}}', None),
        ("{", None),
        (None, None),
    ],
)
def test_the_commit_of_an_installed_package_is_what_pip_took_from_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | None, commit: str | None
) -> None:
    folder = tmp_path / "quintet-9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: quintet\nVersion: 9\n", encoding="utf-8")
    if written is not None:
        (folder / "direct_url.json").write_text(written, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(runfolder, "__file__", str(tmp_path / "trainer" / "runfolder.py"))
    assert runfolder.commit() == commit


def test_the_end_is_on_record_until_the_next_start(tmp_path: Path) -> None:
    _prepare(tmp_path)
    runfolder.finish(tmp_path, 75, "SIGTERM", 12)
    ended = json.loads((tmp_path / "exit.json").read_text())
    assert (ended["code"], ended["reason"], ended["step"]) == (75, "SIGTERM", 12)
    _prepare(tmp_path)
    assert not (tmp_path / "exit.json").exists()


def test_starting_over_sets_the_old_run_aside_whole(tmp_path: Path) -> None:
    before = _prepare(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("the user's own")
    after = _prepare(tmp_path, fresh=True)
    assert (after.attempt, after.id != before.id) == (1, True)
    assert (tmp_path / "before-1" / "checkpoints" / "step-00000001").is_dir()
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "notes.txt").exists()
    _prepare(tmp_path, fresh=True)
    assert (tmp_path / "before-2" / "run.json").exists()


def test_starting_over_in_a_new_folder_sets_nothing_aside(tmp_path: Path) -> None:
    _prepare(tmp_path / "run", fresh=True)
    assert not list((tmp_path / "run").glob("before-*"))


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_told_at_once(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run_dir=.*cannot be written"):
        runfolder.make_folder(tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_told_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"run_dir=.*Permission denied"):
        runfolder.make_folder(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "exit.json"
    runfolder.write_json(path, {"code": 0})
    with pytest.raises(ValueError, match="JSON"):
        runfolder.write_json(path, {"code": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        runfolder.write_text(path, "half of it \ud800")
    assert json.loads(path.read_text()) == {"code": 0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["exit.json"]
