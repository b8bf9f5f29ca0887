"""What a run records: exact and whole in metrics.jsonl, mirrored to real W&B runs that may break any time."""

from __future__ import annotations

import errno
import http.server
import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import monitor
from trainer.journal import Journal
from trainer.mirror import Mirror
from trainer.monitor import METRICS, Monitor, WandbConfig

ROOT = Path(__file__).resolve().parent.parent
DESIGNED = "train/loss train/loss_contrastive train/acc_top1 train/step perf/samples_per_s perf/data_wait_frac perf/mfu"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no settings of whoever runs the tests; an address where nobody listens."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def _monitor(run_dir: Path, mode: str = "disabled", **options: Any) -> Monitor:
    run_dir.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {"config": {"lr": 1e-4}, "job_type": "pretrain", "run_id": "abcd1234", "steps": 100}
    return Monitor(run_dir, WandbConfig(mode=mode), **{**given, **options})


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _offline_runs(run_dir: Path) -> list[dict[str, Any]]:
    """The W&B runs below a run folder, in the order of their start, as W&B's own reader sees them."""
    found = []
    for path in run_dir.glob("wandb/offline-run-*/*.wandb"):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
        found.append(json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout))
    return sorted(found, key=lambda run: str(run["start_time"]))


def _records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """All records of a kind in the W&B runs below a run folder, in their order."""
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        told = subprocess.run(command, capture_output=True, check=True, timeout=60, text=True).stdout
        records = [json.loads(line) for line in told.splitlines()]
        found += [record[kind] for record in records if record["type"] == kind]
    return found


# The registry


def test_the_designed_names_are_registered() -> None:
    assert set(DESIGNED.split()) <= set(METRICS)
    assert all(metric.unit and metric.help for metric in METRICS.values())


def test_a_name_that_is_not_registered_cannot_be_logged(tmp_path: Path) -> None:
    with_eval = {"eval/me5/de-en/ndcg_at_10": 0.5, "eval/me5/ndcg_at_10": 0.5}
    watched = _monitor(tmp_path)
    watched.log(1, {"train/loss": 1.0, **with_eval})
    for name in ("train/los", "eval/ndcg_at_10", "eval/me5/ndcg", "train/me5/loss", "loss"):
        with pytest.raises(AssertionError, match=name):
            watched.log(2, {name: 1.0})
    watched.finish(0)
    assert [row["train/step"] for row in _rows(tmp_path)] == [1]


# The record


@given(values=st.lists(st.floats(), min_size=1, max_size=5))
def test_every_float_comes_back_with_the_same_bits(
    values: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    journal = Journal(path)
    for value in values:
        journal.write({"train/loss": value})
    journal.close()
    back = [float(json.loads(line)["train/loss"]) for line in path.read_text().splitlines()]
    same = [a.hex() == b.hex() or (math.isnan(a) and math.isnan(b)) for a, b in zip(values, back, strict=True)]
    assert all(same)


def test_lines_are_there_at_once_and_repeated_steps_carry_their_attempt(tmp_path: Path) -> None:
    for attempt, steps in ((1, (10, 20, 30)), (2, (20, 30, 40))):
        watched = _monitor(tmp_path, attempt=attempt)
        for step in steps:
            watched.log(step, {"train/loss": step / 7})
            assert _rows(tmp_path)[-1]["train/step"] == step
        watched.finish(0)
    marks = [(row["train/step"], row["run/attempt"], row["run/restarts"]) for row in _rows(tmp_path)]
    assert marks == [(10, 1, 0), (20, 1, 0), (30, 1, 0), (20, 2, 1), (30, 2, 1), (40, 2, 1)]


@pytest.mark.parametrize("tail", [b'{"train/st', b"x" * 10_000])
def test_half_a_line_left_by_a_crash_is_cut_off(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"train/step": 1}\n' + tail)
    journal = Journal(path)
    journal.write({"train/step": 2})
    journal.close()
    assert [row["train/step"] for row in _rows(tmp_path)] == [1, 2]


def test_lines_wait_for_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write({"train/step": 1})
    real = os.pwrite

    def full(descriptor: int, line: bytes, offset: int) -> int:
        real(descriptor, line[:5], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for step in (2, 3, 4):
            journal.write({"train/step": step})
            assert [row["train/step"] for row in _rows(tmp_path)] == [1]
    journal.write({"train/step": 5})
    journal.close()
    assert [row["train/step"] for row in _rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert len(caplog.messages) == 1
    assert "No space left" in caplog.text


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    watched = _monitor(tmp_path, "offline", rank=1)
    watched.log(1, {"train/loss": 1.0})
    watched.tick(1)
    watched.alert("title", "text")
    watched.finish(0)
    assert not list(tmp_path.iterdir())


# W&B, really run offline


def test_an_offline_run_holds_what_was_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "run"
    with caplog.at_level(logging.INFO, "quintet"):
        watched = _monitor(run_dir, "auto")
        for step in range(1, 21):
            watched.log(step, {"train/loss": 1 / step, "train/lr": 1e-4, "eval/me5/ndcg_at_10": step / 100})
        watched.finish(0)
    (run,) = _offline_runs(run_dir)
    assert (run["state"], run["exit_code"], run["run_id"]) == ("finished", 0, "abcd1234")
    assert (run["project"], run["name"]) == ("quintet", "run")
    assert run["config"] == {"lr": 1e-4, "attempt": 1}
    assert (run["summary"]["train/loss"], run["summary"]["train/step"]) == (0.05, 20)
    assert run["summary"]["eval/me5/ndcg_at_10"] == {"last": 0.2, "max": 0.2}
    assert run["console"] == []
    assert f"wandb sync {run_dir}/wandb/offline-run-*" in caplog.text


def test_a_restart_adds_a_segment_to_the_same_run(tmp_path: Path) -> None:
    for attempt, steps in ((1, range(1, 26)), (2, range(21, 41))):
        watched = _monitor(tmp_path, "offline", attempt=attempt)
        for step in steps:
            watched.log(step, {"train/loss": 1 / step})
        watched.finish(75 if attempt == 1 else 0)
        _wait_for_next_second()  # W&B names its folders by the second
    runs = _offline_runs(tmp_path)
    assert [run["run_id"] for run in runs] == ["abcd1234"] * 2
    assert [run["exit_code"] for run in runs] == [75, 0]
    assert len(_records(tmp_path, "preempting")) == 1
    items = [record["item"] for record in _records(tmp_path, "history")]
    logged = [(row["train/step"], row["run/attempt"]) for row in items]
    assert logged == [(step, 1) for step in range(1, 26)] + [(step, 2) for step in range(21, 41)]
    assert [(row["train/step"], row["run/attempt"]) for row in _rows(tmp_path)] == logged


def _wait_for_next_second() -> None:
    second = int(time.time())
    while int(time.time()) == second:
        threading.Event().wait(0.01)


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_server_that_cannot_be_reached_delays_nothing(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    started = time.monotonic()
    watched = _monitor(tmp_path, mode)
    watched.log(1, {"train/loss": 1.0})
    assert time.monotonic() - started < 1
    watched.finish(0)
    assert time.monotonic() - started < 30
    assert "does not answer" in caplog.text
    assert [run["state"] for run in _offline_runs(tmp_path)] == ["finished"]


class _NotWandb(http.server.BaseHTTPRequestHandler):
    """Answers, but is no W&B server."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NotWandb) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_a_server_that_refuses_the_run_leaves_it_offline(
    answering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setenv("WANDB_BASE_URL", answering)
    watched = _monitor(tmp_path, "online")
    watched.log(1, {"train/loss": 1.0})
    watched.finish(0)
    assert "did not start online" in caplog.text
    (run,) = _offline_runs(tmp_path)
    assert (run["state"], run["summary"]["train/loss"]) == ("finished", 1.0)


def test_a_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password 0123\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert monitor._has_key("https://wandb.example.org:8080/")
    assert not monitor._has_key("https://api.wandb.ai")


def test_disabled_never_loads_wandb(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from trainer.monitor import Monitor, WandbConfig
watched = Monitor(Path(sys.argv[1]), WandbConfig(mode="disabled"), config={}, job_type="t", run_id="i", steps=1)
watched.log(1, {"train/loss": 1.0})
watched.finish(0)
print("wandb" in sys.modules, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


_BROKEN = """
import logging, os, signal, sys, time
from pathlib import Path
import psutil
from trainer.monitor import Monitor, WandbConfig

run_dir, fault = Path(sys.argv[1]), getattr(signal, sys.argv[2])
logging.basicConfig(level=logging.WARNING, format="%(message)s")
watched = Monitor(run_dir, WandbConfig(mode="offline"), config={}, job_type="pretrain", run_id="abcd1234", steps=60)
slowest = 0.0
for step in range(1, 61):
    if step == 20:
        while not (helpers := [child for child in psutil.Process().children() if child.name() == "wandb-core"]):
            time.sleep(0.01)
        helpers[0].send_signal(fault)
        helpers[0].wait() if fault == signal.SIGKILL else None
    started = time.perf_counter()
    watched.log(step, {"train/loss": 1 / step})
    slowest = max(slowest, time.perf_counter() - started)
    time.sleep(0.01)
watched.finish(0, limit_seconds=2.0)
print(slowest)
"""


@pytest.mark.parametrize(("fault", "said"), [("SIGKILL", "W&B is off from here"), ("SIGSTOP", "W&B did not finish")])
def test_a_dead_or_stuck_helper_neither_stops_nor_slows_a_run(fault: str, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _BROKEN, str(tmp_path), fault]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["train/step"] for row in _rows(tmp_path)] == list(range(1, 61))
    assert float(done.stdout) < 0.25
    warnings = done.stderr.splitlines()
    assert [warning for warning in warnings if said in warning] == warnings[:1]
    assert all(warning.startswith("W&B") for warning in warnings), done.stderr


def test_no_secret_of_the_environment_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "feedfacefeedfacefeedfacefeedfacefeedface")
    monkeypatch.setenv("MY_S3_SECRET", "hunter2-hunter2")
    config = {"data": ["s3://user:hunter2-hunter2@host/x"], "deep": {"key": "feedfacefeedfacefeedfacefeedfacefeedface"}}
    watched = _monitor(tmp_path / "run", "offline", config=config)
    watched.log(1, {"train/loss": 1.0})
    watched.finish(0)
    (run,) = _offline_runs(tmp_path / "run")
    assert run["config"]["data"] == ["s3://user:***@host/x"]
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 2
    assert not [content for content in files if b"hunter2" in content or b"feedface" in content]


# The mirror's guard, against runs that misbehave


class _Run:
    """A run elsewhere that does what it is told to each call."""

    hint = "a last word"

    def __init__(self, behave: Callable[[int], None] = lambda number: None) -> None:
        self.calls: list[int] = []
        self.exit_code: int | None = None
        self._behave = behave

    def log(self, number: int) -> None:
        self.calls.append(number)
        self._behave(number)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def _send(mirror: Mirror, numbers: range) -> None:
    for number in numbers:
        mirror.send("logging", lambda run, number=number: run.log(number))  # type: ignore[misc]


def _wait(event: threading.Event) -> None:
    event.wait(60)


def _raise(error: Exception) -> None:
    raise error


def test_calls_arrive_in_order_and_the_run_is_finished(caplog: pytest.LogCaptureFixture) -> None:
    run = _Run()
    with caplog.at_level(logging.INFO, "quintet"):
        mirror = Mirror(lambda: run)
        _send(mirror, range(1000))
        mirror.finish(75, 10)
    assert run.calls == list(range(1000))
    assert run.exit_code == 75
    assert caplog.messages == ["a last word"]


def test_a_stalled_backend_delays_nothing(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    run = _Run(lambda number: _wait(release))
    mirror = Mirror(lambda: run, queue_size=100)
    started = time.monotonic()
    _send(mirror, range(500))
    assert time.monotonic() - started < 1
    threading.Timer(0.5, release.set).start()  # the stall ends, but only after the limit
    mirror.finish(0, 0.2)
    assert time.monotonic() - started < 3
    assert len(run.calls) < 5
    assert run.exit_code == 0
    late, lost = caplog.messages
    assert "did not finish within 0.2 s" in late
    assert re.fullmatch(r"W&B missed (399|400) calls; .*", lost)


def test_repeated_errors_switch_the_mirror_off_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    run = _Run(lambda number: _raise(ValueError("no such run")) if number >= 10 else None)
    mirror = Mirror(lambda: run)
    _send(mirror, range(100))
    mirror.finish(0, 10)
    assert run.calls == list(range(13))
    off, lost = caplog.messages
    assert "off from here" in off
    assert "no such run" in off
    assert "missed" in lost


def test_a_single_error_is_forgiven_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    run = _Run(lambda number: _raise(ValueError("once")) if number % 3 else None)
    mirror = Mirror(lambda: run)
    _send(mirror, range(100))
    mirror.finish(0, 10)
    assert run.calls == list(range(100))
    (lost,) = caplog.messages
    assert "missed 66 calls" in lost


def test_a_run_that_cannot_be_opened_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    mirror = Mirror(lambda: _raise(RuntimeError("no helper")))
    _send(mirror, range(100))
    mirror.finish(0, 10)
    (said,) = caplog.messages
    assert "no helper" in said


# What the reader sees

FULL = {
    "train/loss": 3.21009,
    "train/acc_top1": 0.4123,
    "train/pos_sim": 0.8125,
    "train/neg_sim": 0.1201,
    "train/grad_norm": 1.2034,
    "train/lr": 2.9871e-4,
    "train/skipped_steps": 12,
    "perf/samples_per_s": 152345.2,
    "perf/tokens_per_s": 98123456.7,
    "perf/data_wait_frac": 0.0123,
    "perf/mem_gib": 71.237,
    "perf/eta_h": 101.02,
}


def test_a_line_is_short_greppable_and_complete() -> None:
    text = monitor.line(29_990, 30_000, FULL)
    assert text.split(" ") == [
        *("step=29990/30000", "loss=3.2101", "acc=0.412", "pos=0.812", "neg=0.120", "gnorm=1.2", "lr=0.000299"),
        *("samples/s=152345", "tok/s=98123457", "wait=1.2%", "mem=71.24GiB", "eta=101h02m", "skipped=12"),
    ]
    evals = {f"eval/a-rather-long-name-{number}/ndcg_at_10": 0.5 for number in range(30)}
    assert len(monitor.line(29_990, 30_000, {**FULL, **evals}).encode()) <= 210


def test_without_a_terminal_a_run_prints_one_plain_line_for_each_logged_step(tmp_path: Path) -> None:
    out = _run_console(tmp_path, terminal=False)
    assert "\r" not in out
    assert "\x1b" not in out
    assert [text.split(" ")[0] for text in out.splitlines()] == [f"step={step}/100" for step in (10, 20, 30)]


def test_on_a_terminal_a_run_shows_a_bar(tmp_path: Path) -> None:
    out = _run_console(tmp_path, terminal=True)
    assert "30/100" in out
    assert "loss=0.5000" in out


_CONSOLE = """
import logging, sys
from pathlib import Path
from trainer.monitor import Monitor, WandbConfig
logging.basicConfig(level=logging.INFO, format="%(message)s")
watched = Monitor(Path(sys.argv[1]), WandbConfig(mode="disabled"), config={}, job_type="t", run_id="i", steps=100)
for step in range(1, 31):
    watched.tick(step)
    if step % 10 == 0:
        watched.log(step, {"train/loss": 0.5})
watched.finish(0)
"""


def _run_console(run_dir: Path, *, terminal: bool) -> str:
    """The stderr of a small run, which is a terminal or a pipe."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", _CONSOLE, run_dir], cwd=ROOT, stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    while piece := _read(ours):
        text += piece
    os.close(ours)
    assert process.wait(60) == 0, text
    return text.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # how a terminal says that its other end is closed
        return b""


def test_a_summary_lines_up_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    monitor.summary("pretrain", [("pool", "1,024 x 1,024"), ("negatives per query", 1023)])
    assert capsys.readouterr().out.splitlines() == [
        "pretrain",
        "  pool                 1,024 x 1,024",
        "  negatives per query  1023",
    ]
