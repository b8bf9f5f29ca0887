"""What trainings tell: every metric of the registry, in metrics.jsonl, W&B and TensorBoard alike; texts on request."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jobs
import pairs
import pytest
import teachers
import tiny
import torch
from pages import typed
from test_finetune import write_scores

from data import fetch
from data.errors import Stopped, UserError
from launcher import cli
from trainer import clock, distributed, filter, meter, monitor, retrieval, worklog
from trainer.events import EventFile
from trainer.monitor import METRICS, Monitor, WandbConfig
from trainer.watchdog import Watchdog

ROOT = Path(__file__).parent.parent
HELD_OUT = [replace(record, source=f"source{n % 3}") for n, record in enumerate(pairs.pairs(24, seed=9))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short run of each training, with all that may be logged, on a machine without a key of W&B."""
    folder = tmp_path_factory.mktemp("monitoring")
    records = pairs.pairs(64, negatives=2)
    tiny.bert(folder / "bert")
    pairs.write_shards(folder / "shards", records)
    write_scores(folder / "scores", records)
    rows = [{name: getattr(r, name) for name in ("query", "passage", "source", "lang")} for r in HELD_OUT]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held: dict[str, Any] = {"eval.data": folder / "held.jsonl", "eval.every_steps": 2, "wandb.mode": "offline"}
    given: dict[str, dict[str, Any]] = {
        "pretrain": {
            **held,
            "wandb.examples": 2,
            "tensorboard": "true",
            "peak_tflops": 2,
            "mirror": f"file://{folder}/mirror",
        },
        "finetune": {**held, "scores": folder / "scores", "loss.guide.path": folder / "bert", "loss.guide.weight": 0.1},
        "teacher": {"eval.data": folder / "shards", "peak_tflops": 2},
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    logger = logging.getLogger("quintet")
    before = logger.handlers[:], logger.level, logger.propagate  # conftest knows only of what a test itself changes
    with mock.patch.dict(os.environ, clean, clear=True), mock.patch("trainer.loop._export"):
        for stage, changes in given.items():
            values = {"negatives": 0 if stage == "pretrain" else 2, "steps": 4, "save_every_steps": 2, **changes}
            arguments = jobs.settings(folder, run_dir=folder / stage, warmup_steps=1, **values)
            assert cli.main([stage, *arguments, "max_length=60" if stage == "teacher" else "max_length=24"]) == 0
        for stage, words in _other_stages(folder).items():
            assert cli.main([stage, *words, "device=cpu"]) == 0
    logger.handlers[:], logger.level, logger.propagate = before
    return folder


def _other_stages(folder: Path) -> dict[str, list[str]]:
    """Their command lines; one of them tells W&B too."""
    teachers.bert(folder / "cross")
    (folder / "alike.tsv").write_text("sentence1\tsentence2\tscore\n" + "a b\ta b\t5\na b\tc\t1\nd\te f\t2\n")
    data = f"data={folder / 'shards'}"
    filtering = [f"model={folder / 'bert'}", data, f"output={folder / 'kept'}", "wandb.mode=offline", "wandb.group=g"]
    return {
        "filter": [*filtering, "pool_size=40"],
        "mine": [f"model={folder / 'bert'}", data, f"output={folder / 'mined'}"],
        "distill": [f"teacher={folder / 'cross'}", data, f"scores={folder / 'new-scores'}", "max_length=60"],
        "evaluate": [
            *(f"model={folder / 'bert'}", f"data={folder / 'held.jsonl'}", f"sts={folder / 'alike.tsv'}"),
            f"output={folder / 'results'}",
        ],
    }


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    return jobs.metrics(run_dir)


def _inspect(run_dir: Path, *options: str) -> str:
    """What W&B's own reader says of the offline run of a folder."""
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *options, "--json", str(file)]
    return subprocess.run(command, capture_output=True, check=True, timeout=120, text=True).stdout


def test_the_page_s_line_draws_the_curves_in_a_terminal(runs: Path) -> None:
    (words,) = typed("wandb leet")
    words = [
        sys.executable,
        "-m",
        *(str(runs / "pretrain/wandb") if word.startswith("runs/") else word for word in words),
    ]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # rows and columns
    environment = {**os.environ, "TERM": "xterm-256color"}
    program = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    shown, asked = b"", 0
    try:
        with contextlib.suppress(OSError):  # the terminal ends with the program
            while drawn := os.read(ours, 1 << 16):
                shown += drawn
                if not asked and b"[x: train/step]" in shown:  # a chart, over the axis that we gave it
                    asked = os.write(ours, b"q")
        assert program.wait(60) == 0
    finally:
        jobs.end(program)
        os.close(ours)
    assert asked, shown


def _entry(name: str) -> str:
    """The name of the registry that allows a logged one."""
    head, _, rest = name.partition("/")
    return name if name in METRICS else f"{head}/*/{rest.rpartition('/')[2]}"


def test_short_runs_log_every_metric_of_the_registry(runs: Path) -> None:
    (worker,) = runs.glob("new-scores/*/log/*")
    folders = [
        runs / name for name in ("pretrain", "finetune", "teacher", "kept.log", "mined.log", "results/results.log")
    ]
    logged = {name for folder in [*folders, worker] for row in _rows(folder) for name in row}
    assert {_entry(name) for name in logged} == set(METRICS)


def test_mfu_is_the_arithmetic_of_the_tokens_over_the_peak_that_is_given(runs: Path) -> None:
    """2 layers of 32: four products of 32 x 32, two of 32 x 64, their biases, two layer norms a layer."""
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 2 * 2 * 32
    useful = 6 * (2 * layer + 2 * 32)  # and the layer norm of the embeddings
    rows = [row for row in _rows(runs / "pretrain") if "perf/mfu" in row]
    assert rows
    for row in rows:
        assert row["perf/mfu"] == pytest.approx(row["perf/tokens_per_s"] * useful / 2e12)


def test_mfu_of_a_teacher_leaves_out_what_it_computes_once_a_text(runs: Path) -> None:
    """Of the last layer keys and values are left, and the head is gone."""
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 2 * 2 * 32
    useful = 6 * (layer + 2 * (32 * 32 + 32) + 2 * 32)
    rows = [row for row in _rows(runs / "teacher") if "perf/mfu" in row]
    assert rows
    for row in rows:
        assert row["perf/mfu"] == pytest.approx(row["perf/tokens_per_s"] * useful / 2e12)


def test_a_filter_tells_its_progress_and_what_it_kept(runs: Path) -> None:
    report = json.loads((runs / "kept/report.json").read_text())["all"]
    *progress, last = _rows(runs / "kept.log")
    assert last["filter/all/pairs"] == report["pairs"] == 64
    assert last["filter/all/kept_frac"] == last["filter/pairs/kept_frac"] == report["kept"] / 64
    done = [row["work/pairs_scored/done"] for row in progress if "work/pairs_scored/done" in row]
    assert done[-1] == pytest.approx(64)
    seconds = [row["work/seconds"] for row in [*progress, last]]
    assert seconds == sorted(seconds)
    told = json.loads(_inspect(runs / "kept.log", "--summary"))
    assert (told["state"], told["name"]) == ("finished", "kept")
    assert told["summary"]["filter/all/pairs"] == 64
    (record,) = [json.loads(line)["run"] for line in _inspect(runs / "kept.log").splitlines() if '"run"' in line[:40]]
    assert (record["run_group"], record["job_type"]) == ("g", "filter")


def test_a_worker_tells_what_it_scored_and_an_evaluation_what_it_found(runs: Path) -> None:
    (worker,) = runs.glob("new-scores/*/log/*")
    last = _rows(worker)[-1]
    assert (last["distill/pairs"], last["distill/found"], last["distill/scored"]) == (64 * 3, 0, 64 * 3)
    found = json.loads((runs / "results/results.json").read_text())
    results = found["held"]
    rows: dict[str, Any] = {}
    for row in _rows(runs / "results/results.log"):
        rows |= row
    assert rows["eval/alike/score"] == found["alike"]["score"]
    assert rows["eval/held/ndcg_at_10"] == results["ndcg_at_10"]
    assert rows["eval/held/bm25/ndcg_at_10"] == results["bm25"]["ndcg_at_10"]
    assert rows["eval/held/lang/de/mrr_at_10"] == results["by_lang"]["de"]["mrr_at_10"]


def test_starts_of_one_work_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*parts: Any) -> None:
        raise Stopped("stopped by a test")

    pairs.write_shards(tmp_path / "shards", HELD_OUT)
    words = [f"model={tiny.bert(tmp_path / 'bert')}", f"data={tmp_path / 'shards'}", f"output={tmp_path / 'kept'}"]
    with monkeypatch.context() as patch:
        patch.setattr("trainer.consistency._judge_all", interrupted)
        assert cli.main(["filter", *words, "device=cpu"]) == 75
    first = json.loads((tmp_path / ".kept.work/run.json").read_text())
    seen: list[Any] = []
    monkeypatch.setattr("trainer.worklog.Monitor", _noting(seen))
    assert cli.main(["filter", *words, "device=cpu"]) == 0
    assert [(given["run_id"], given["attempt"]) for given in seen] == [(first["id"], 2)]
    assert {row["run/attempt"] for row in _rows(tmp_path / "kept.log")} == {1, 2}


def _noting(seen: list[Any]) -> Any:
    def made(*places: Any, **given: Any) -> Monitor:
        seen.append(given)
        return Monitor(*places, **given)

    return made


def test_a_configuration_is_shown_without_the_login_of_a_url() -> None:
    from trainer import filter as filtering
    from trainer import worklog

    config = filtering.Config(model="m", data=["s3://user:hunter2@host/x", "plain"], output="o")
    shown = worklog._public(config)
    assert shown["data"] == ["s3://***@host/x", "plain"]
    assert shown["top_k"] == 2
    assert "wandb" not in shown


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_offline_run_of_wandb_ends_with_the_last_values_of_metrics_jsonl(runs: Path, stage: str) -> None:
    told = json.loads(_inspect(runs / stage, "--summary"))
    assert told["state"] == "finished"
    last: dict[str, Any] = {}
    for row in _rows(runs / stage):
        last |= row
    for name, value in last.items():
        found = told["summary"][name]
        found = found["last"] if isinstance(found, dict) else found
        assert found == pytest.approx(value), name


def test_texts_go_to_wandb_when_they_are_asked_for_and_nowhere_else(runs: Path) -> None:
    tables = sorted((runs / "pretrain/wandb").rglob("*.table.json"), key=lambda path: path.stat().st_mtime_ns)
    content = json.loads(tables[-1].read_text())
    assert content["columns"] == ["query", "place", "passage", "right"]
    assert [row[0] for row in content["data"]] == [record.query for record in HELD_OUT[:2] for _ in range(3)]
    answers = {record.query: record.passage for record in HELD_OUT}
    assert all(row[3] == (answers[row[0]] == row[2]) for row in content["data"])
    texts = [text.encode() for record in HELD_OUT for text in (record.query, record.passage)]
    places = [runs / "finetune", runs / "pretrain/tensorboard", runs / "pretrain/metrics.jsonl"]
    files = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
    assert len(files) > 10
    for file in files:
        assert not [text for text in texts if text in file.read_bytes()], file


def test_examples_are_refused_where_nothing_is_searched(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data={runs / 'shards'}", f"run_dir={runs / 'none'}", f"model.path={runs / 'bert'}", "wandb.examples=3"]
    assert cli.main(["teacher", *words]) == 2
    assert "wandb.examples=3: ranking searches nothing" in capsys.readouterr().err


def test_tensorboard_reads_the_values_of_metrics_jsonl(runs: Path) -> None:
    scalars = _scalars(runs / "pretrain/tensorboard")
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in _rows(runs / "pretrain"):
        for name, value in row.items():
            if name != "train/step":
                wanted.setdefault(name, []).append((row["train/step"], value))
    assert scalars.keys() == wanted.keys()
    for name, values in wanted.items():
        assert scalars[name] == [(step, pytest.approx(value)) for step, value in values], name


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_shows_a_repeated_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, steps, loss in ((0, (1, 2, 3, 4), 1.0), (2, (3, 4, 5), 0.5)):
        events = EventFile(tmp_path, first)
        for step in steps:
            events.log({"train/step": step, "train/loss": loss})
        events.finish(0)
    scalars = _scalars(tmp_path / "tensorboard")["train/loss"]
    assert scalars == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5), (5, 0.5)]


def test_a_missing_tensorboard_is_named_before_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from trainer import events

    (problem,) = events.problems(True)
    assert "pip install 'quintet[tensorboard]'" in problem
    assert events.problems(False) == []


# --- what the numbers are -------------------------------------------------------------------------------------------


def test_the_parts_of_a_step_add_up_to_it(runs: Path) -> None:
    for row in jobs.steps(runs / "finetune").values():
        names = ("data", "meet", "encode", "loss", "backward", "optimizer", "other")
        parts = {name: row[f"perf/{name}_s"] for name in names}
        assert sum(parts.values()) == pytest.approx(row["perf/step_s"])
        assert min(parts.values()) >= 0, parts
        assert 0 <= row["perf/gather_s"] <= parts["loss"]
        assert row["perf/data_wait_frac"] == pytest.approx(parts["data"] / row["perf/step_s"])
        assert 0 < row["run/goodput"] < 1
        assert row["data/token_spread"] == 0
        assert row["data/retries"] == fetch.retries()  # of this process, in which other tests may have asked again
        assert 0 < row["node/0/mem_frac"] < 1


def test_the_time_of_a_gather_is_that_of_its_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed.start(torch.device("cpu"), 60)
    distributed.take_gathers()
    gather = distributed.dist.all_gather_into_tensor

    def slow(*tensors: torch.Tensor) -> None:
        time.sleep(0.05)
        gather(*tensors)

    monkeypatch.delattr(distributed.dist, "all_gather_single", raising=False)
    monkeypatch.setattr(distributed.dist, "all_gather_into_tensor", slow)
    distributed._all_gather(torch.ones(2, 3))
    ((begin, end),) = distributed.take_gathers()
    assert clock.seconds_between(begin, end) >= 0.05
    assert distributed.take_gathers() == []


def test_what_ranks_say_side_by_side_is_taken_apart_by_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "world", lambda: 3)
    assert meter._in_own_place([4.0, 5.0]) == [0, 0, 4, 5, 0, 0]
    assert meter._spread([30, 10, 20]) == pytest.approx(0.5)
    busy = meter._nodes([0.5, 0, 0.25, 0], [0.1, 0, 0.2, 0])
    assert busy == {"node/0/cpu_frac": 0.5, "node/0/mem_frac": 0.1, "node/1/cpu_frac": 0.25, "node/1/mem_frac": 0.2}


def test_an_evaluation_is_logged_by_set_source_and_language(runs: Path) -> None:
    row = next(row for row in _rows(runs / "pretrain") if "eval/held/ndcg_at_10" in row)
    groups = ["held", *(f"held/source{n}" for n in range(3)), *(f"held/lang/{lang}" for lang in pairs.LANGUAGES)]
    wanted = {f"eval/{group}/{metric}" for group in groups for metric in retrieval.metrics.NAMES}
    assert {name for name in row if name.startswith("eval/")} == wanted
    by_lang = [row[f"eval/held/lang/{lang}/mrr_at_10"] for lang in pairs.LANGUAGES]  # six rows each
    assert sum(by_lang) / 4 == pytest.approx(row["eval/held/mrr_at_10"])


def test_groups_have_names_only_where_there_are_several() -> None:
    scores = dict.fromkeys(retrieval.metrics.NAMES, 0.5)
    result = {**scores, "by_source": {"a": scores}, "by_lang": {"de": scores, "en": scores}}
    heads = {name.rpartition("/")[0] for name in retrieval.named("set", result)}
    assert heads == {"eval/set", "eval/set/lang/de", "eval/set/lang/en"}


# --- alerts -----------------------------------------------------------------------------------------------------------


def _watched(run_dir: Path) -> Monitor:
    run_dir.mkdir()
    return Monitor(run_dir, WandbConfig(mode="offline"), config={}, job_type="pretrain", run_id="abcd1234", steps=9)


def _alerts(run_dir: Path) -> list[tuple[str, str, str]]:
    records = [json.loads(line) for line in _inspect(run_dir).splitlines()]
    found = [record["alert"] for record in records if record["type"] == "alert"]
    return [(alert["title"], alert["text"], alert["level"]) for alert in found]


def test_a_run_alerts_to_trouble_and_to_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = _watched(tmp_path / "run")
    watched.alert("data budget", "600 of 1000")
    watched.end(3, "runs/a, step 7: too many")
    watched.finish(3)
    assert _alerts(tmp_path / "run") == [
        ("data budget", "600 of 1000", "WARN"),
        ("failed with 3", "runs/a, step 7: too many", "ERROR"),
    ]
    assert "data budget: 600 of 1000" in caplog.text


def test_a_finished_training_has_said_so(runs: Path) -> None:
    ((title, text, level),) = _alerts(runs / "finetune")
    assert (title, level) == ("finished", "INFO")
    assert text.endswith("finetune, step 4: done")


def test_the_watchdog_alerts_before_it_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, codes = _watched(tmp_path / "run"), []
    dog = Watchdog(tmp_path / "run", {}, store=None)
    dog.last_words = lambda reason: watched.abandon(124, reason)
    monkeypatch.setattr("os._exit", codes.append)
    for mirror in watched._mirrors:  # W&B takes a second to start
        while not mirror._hint:
            time.sleep(0.01)
    dog._end(dog._own(0))
    assert codes == [124]
    ((title, text, level),) = _alerts(tmp_path / "run")
    assert (title, level) == ("stalled", "ERROR")
    assert "in open of step 0" in text


# --- the page -------------------------------------------------------------------------------------------------------


def test_the_page_on_monitoring_lists_every_metric_with_its_unit() -> None:
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8").partition("## All metrics")[2]
    listed = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (.+) \|$", page, re.MULTILINE)
    wanted = [(name, metric.unit, metric.help) for name, metric in METRICS.items()]
    assert listed == wanted, "\n".join(f"| `{name}` | {unit} | {text} |" for name, unit, text in wanted)


def test_other_outlets_get_no_table(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    given: dict[str, Any] = {"config": {}, "job_type": "pretrain", "run_id": "abcd1234", "steps": 9}
    watched = monitor.Monitor(tmp_path, WandbConfig(mode="disabled"), tensorboard=True, **given)
    watched.table(1, "eval/held/examples", [{"query": "a rare word"}])
    watched.finish(0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"a rare word" in path.read_bytes()]


def test_a_folder_that_cannot_hold_the_log_of_a_stage_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = filter.Config(model="m", data="d", output="o")
    with (
        pytest.raises(UserError, match=r"file/logs: cannot be written \(.*\); name another output"),
        worklog.follow(tmp_path / "file/logs", "filter", "name", config),
    ):
        pass
