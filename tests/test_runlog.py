"""What is read back from run folders, whole or broken, and the list that `quintet runs` prints of them."""

from __future__ import annotations

import json
import math
import os
import pty
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from trainer import runfolder, runlog
from trainer.journal import Journal


def _run(folder: Path, rows: Sequence[dict[str, Any]] = (), **files: Any) -> Path:
    """A run folder with a journal and the named .json files."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("objective: contrastive\nsteps: 100\nlog_every: 10\n", encoding="utf-8")
    journal = Journal(folder / "metrics.jsonl")
    for row in rows:
        journal.write({"run/attempt": 1, "run/time": 1_000.0 + row["train/step"], **row})
    journal.close()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _logged(step: int, loss: float, attempt: int = 1, **more: float) -> dict[str, Any]:
    return {"train/step": step, "train/loss": loss, "run/attempt": attempt, "perf/step_s": 2.0, **more}


def test_of_a_repeated_step_the_last_start_counts_and_what_it_undid_is_gone(tmp_path: Path) -> None:
    rows = [_logged(10, 5.0), _logged(20, 4.0), _logged(30, 3.0)]
    rows += [_logged(15, 4.5, 2), _logged(25, 3.6, 2), _logged(25, 3.6, 2) | {"eval/h/ndcg_at_10": 0.5}]
    log = runlog.read(_run(tmp_path / "run", rows))
    assert log.series("train/loss") == ([10, 15, 25], [5.0, 4.5, 3.6])
    assert log.series("eval/h/ndcg_at_10") == ([25], [0.5])
    assert (log.repeated, [start.first_step for start in log.starts]) == (2, [10, 15])
    # the first start: 30 steps of 2 s; the second: a log interval up to its first row, and 10 steps more
    assert log.seconds == 60.0 + 20.0 + 20.0


def test_a_start_that_goes_on_where_the_last_one_stopped_takes_nothing_away(tmp_path: Path) -> None:
    log = runlog.read(_run(tmp_path / "run", [_logged(10, 5.0), _logged(20, 4.0), _logged(30, 3.0, 2)]))
    assert log.series("train/loss")[0] == [10, 20, 30]
    assert (log.repeated, log.attempts) == (0, 2)


def test_numbers_that_are_not_finite_come_back_and_half_lines_are_left_out(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", [_logged(10, math.nan), _logged(20, math.inf), _logged(30, 1.0)])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'[1, 2]\n{"train/loss": 1.0}\n{"train/step": "x"}\nnot json\n{"train/step": 40, "train/lo')
    log = runlog.read(folder)
    steps, losses = log.series("train/loss")
    assert steps == [10, 20, 30]
    assert math.isnan(losses[0])
    assert losses[1:] == [math.inf, 1.0]
    assert log.damaged == 4  # the last line is still being written


def test_the_best_held_out_score_is_the_mean_over_data_sets_without_their_parts(tmp_path: Path) -> None:
    def scores(a: float, b: float) -> dict[str, float]:
        return {"eval/a/ndcg_at_10": a, "eval/a/titles/ndcg_at_10": 0.9, "eval/b/ndcg_at_10": b}

    rows = [{"train/step": 10, **scores(0.2, 0.8)}, {"train/step": 20, **scores(0.5, 0.7)}]
    rows.append({"train/step": 30, **scores(0.4, 0.6)})
    assert runlog.read(_run(tmp_path / "run", rows)).best_ndcg() == pytest.approx(0.6)
    results = {"a": {"ndcg_at_10": 0.25}, "b": {"ndcg_at_10": 0.75}, "c": "broken"}
    assert runlog.read(_run(tmp_path / "evaluated", results=results)).best_ndcg() == 0.5


def test_a_state_comes_from_exit_json_and_the_lease(tmp_path: Path) -> None:
    rows = [_logged(10, 1.0)]
    for code, state in ((0, "done"), (75, "stopped"), (4, "failed")):
        ended = {"code": code, "reason": "x", "step": 12, "time": 5_000.0}
        log = runlog.read(_run(tmp_path / state, rows, exit=ended))
        assert (log.state, log.step, log.updated) == (state, 12, 5_000.0)
    crashed = _run(tmp_path / "crashed", rows)
    assert runlog.read(crashed).state == "failed"
    assert "without exit.json" in runlog.read(crashed).reason
    assert runlog.read(_run(tmp_path / "new")).state == "new"
    with runfolder.Lease(crashed):
        assert runlog.read(crashed).state == "running"
    assert runlog.read(crashed).state == "failed"


def test_a_lease_of_another_machine_counts_while_it_is_renewed(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", [_logged(10, 1.0)])
    lease = folder / "lease.json"
    lease.write_text(json.dumps({"process_table": "elsewhere", "process_start": "1", "pid": 1}), encoding="utf-8")
    assert runfolder.is_held(folder)
    os.utime(lease, (time.time() - 61, time.time() - 61))
    assert not runfolder.is_held(folder)
    lease.write_text("{", encoding="utf-8")
    assert not runfolder.is_held(folder)


def test_names_are_as_short_as_tells_the_folders_apart() -> None:
    folders = [Path("/a/x/run"), Path("/a/y/run"), Path("/a/y/other")]
    assert runlog.names_of(folders) == ["x/run", "y/run", "y/other"]
    assert runlog.names_of([Path("/a/one"), Path("/b/two")]) == ["one", "two"]


def _listed(root: Path, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    assert main(["runs", f"root={root}"]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_runs_are_listed_with_the_last_to_change_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    done = {"code": 0, "reason": "done", "step": 100, "time": now - 7_200}
    rows = [_logged(100, 0.25, 3, **{"perf/samples_per_s": 1234.4, "eval/h/ndcg_at_10": 0.789})]
    _run(tmp_path / "old" / "run", rows, exit=done, run={"id": "a", "attempt": 3})
    fresh = [_logged(10, 2.0) | {"run/time": now - 300}]
    teacher = _run(tmp_path / "old" / "run" / "teacher", fresh)
    (teacher / "config.yaml").write_text("objective: ranking\nsteps: 20\n", encoding="utf-8")
    _run(tmp_path / "old" / "run" / "before-1", rows)  # set aside by fresh=true
    _run(tmp_path / "old" / "run" / "checkpoints" / "step-1", rows)
    _run(tmp_path / "new")
    (tmp_path / "shards").mkdir()
    head, *lines = _listed(tmp_path, capsys)
    assert head == ["run", "stage", "state", "step", "loss", "nDCG@10", "pairs/s", "starts", "last", "sign"]
    assert lines == [
        ["old/run/teacher", "teacher", "failed", "10/20", "2.0000", "-", "-", "1", "5", "min", "ago"],
        ["old/run", "pretrain", "done", "100/100", "0.2500", "0.789", "1,234", "3", "2", "h", "ago"],
        ["new", "pretrain", "new", "0/100", "-", "-", "-", "0", "-"],
    ]
    assert _listed(tmp_path / "new", capsys)[1][0] == "new"


def test_runs_says_what_is_wrong_with_its_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for root, what in ((tmp_path / "none", "no such folder"), (tmp_path, "no run folder in it")):
        assert main(["runs", f"root={root}"]) == 2
        assert f"root={root}: {what}" in capsys.readouterr().err


def test_on_a_terminal_the_list_has_colours_and_names_are_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(tmp_path / "[red]x", [_logged(10, 1.0)], exit={"code": 0, "step": 10})
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["runs", f"root={tmp_path}"]) == 0
        terminal.flush()
        shown = os.read(ours, 65_536).decode()
    os.close(ours)
    assert "[red]x" in shown
    assert "\x1b[32mdone" in shown
