"""The benchmarks run, and refuse to time what does not compute the same. No timing decides a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import checkpoint, common, encoding, gpu, loss, mining, ranks, scores, search, step
from benchmarks.__main__ import SCRIPTS, run
from trainer.device import has_fast_bf16

ROOT = Path(__file__).parent.parent
MEBIBYTE = 1 << 20


def _allocate(mebibytes: int) -> common.Memory:
    return common.extra_memory(lambda: torch.ones(mebibytes * MEBIBYTE // 4).sum())


def test_peak_memory_is_that_of_the_work_though_it_is_given_back() -> None:
    memory = common.in_child(_allocate, 256)
    assert 256 <= memory.extra / MEBIBYTE < 320  # what torch loads at its first sum is in it
    assert memory.before > 50 * MEBIBYTE


def test_variants_take_turns_after_one_warm_up() -> None:
    calls: list[str] = []
    timings = common.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "ab" * 4
    assert [len(timing.wall) for timing in timings.values()] == [3, 3]


def test_a_ratio_takes_the_fastest_peer_and_the_clock_that_says_less() -> None:
    ours = common.Timing((1.0, 9.0, 1.0), (2.0, 2.0, 2.0))
    peers = [common.Timing((8.0, 4.0, 4.0), (6.0, 6.0, 6.0)), common.Timing((5.0,) * 3, (5.0,) * 3)]
    assert common.ratio(peers, ours) == 2.5
    assert common.ratio(peers[:1], ours) == 3.0


def test_a_search_passes_on_the_two_fastest_by_wall_and_the_fastest_by_cpu() -> None:
    seconds = {"a": (4.0, 1.0), "b": (1.0, 4.0), "c": (2.0, 2.0), "d": (3.0, 3.0)}
    found = {name: common.Timing((wall,), (cpu,)) for name, (wall, cpu) in seconds.items()}
    assert common.rivals(found) == ["b", "c", "a"]


@pytest.mark.parametrize(("value", "gradient"), [(1.0001, [1.0, 2.0]), (1.0, [1.0, 2.001]), (float("nan"), [1.0, 2.0])])
def test_the_gate_refuses_another_loss_or_another_gradient(value: float, gradient: list[float]) -> None:
    wanted = (1.0, torch.tensor([1.0, 2.0]))
    assert common.gate("same", wanted, wanted)["loss_difference"] == 0
    with pytest.raises(common.GateError, match="odd"):
        common.gate("odd", (value, torch.tensor(gradient)), wanted)


@pytest.mark.slow
def test_the_step_of_both_sides_has_the_same_loss_and_gradient_before_it_is_timed() -> None:
    result = step.measure(quick=True)
    found = result["correctness"]
    assert list(found) == ["small", "bf16"][: 1 + has_fast_bf16("cpu")]
    for name, checked in found.items():
        assert set(checked) == {"ours, 256 tokens, kept", "ours, 256 tokens, replayed"}
        assert all(case["gradient_error"] < {"small": 1e-5, "bf16": 0.3}[name] for case in checked.values())
    json.dumps(result)


@pytest.mark.slow
def test_the_loss_stage_of_all_sides_is_that_of_float64_before_it_is_timed() -> None:
    result = loss.measure(quick=True)
    (checked,) = result["correctness"].values()
    assert {name.split(",")[0] for name in checked} == {"ours", "peer", "naive"}
    assert all(case["gradient_error"] < 1e-5 for case in checked.values())
    json.dumps(result)


@pytest.mark.slow
def test_the_cache_and_the_teacher_give_what_their_peers_give_before_they_are_timed() -> None:
    result = scores.measure(quick=True)
    assert max(result["correctness"].values()) < 1e-5
    json.dumps(result)


def test_search_and_filter_give_what_faiss_gives_before_they_are_timed() -> None:
    result = search.measure(quick=True)
    checked = result["correctness"]["top-k"]
    assert checked["score_difference"] < 1e-6
    assert checked["clear_places"] > 0.8 * checked["places"]
    assert result["correctness"]["30% wrong"]["kept"] < result["correctness"]["0% wrong"]["kept"]
    json.dumps(result)


@pytest.mark.slow
def test_mined_negatives_are_the_peers_before_they_are_timed() -> None:
    result = mining.measure(quick=True)
    assert len(result["correctness"]) == 3
    assert all(checked["queries"] > 250 for checked in result["correctness"].values())
    json.dumps(result)


@pytest.mark.slow
def test_the_parts_for_a_gpu_compute_what_the_peer_does_and_run_small_without_one() -> None:
    result = gpu.measure(quick=True)
    checked = result["correctness"]
    assert checked["encode, tiny"]["smallest cosine"] > 0.99
    assert checked["filter, 200 x 5,000, d = 32"]["queries counted otherwise"] == 0
    loss = checked["step, tiny, 32 pairs"]
    assert loss["loss"] == pytest.approx(loss["loss on the CPU, fp32"], rel=1e-4)  # both on the CPU, in fp32, here
    json.dumps(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_for_a_gpu_says_that_there_is_none() -> None:
    with pytest.raises(common.GateError, match="no GPU"):
        gpu.measure()


def test_a_gate_refuses_another_number_and_another_verdict() -> None:
    scores, numbers = np.array([[0.9, 0.5, 0.500001]]), np.array([[1, 2, 3]])
    assert search._gate_search((scores, np.array([[1, 3, 2]])), (scores, numbers))["clear_places"] == 1
    with pytest.raises(common.GateError, match="1 numbers"):
        search._gate_search((scores, np.array([[4, 2, 3]])), (scores, numbers))
    with pytest.raises(common.GateError, match="1 pairs"):
        search._gate_filter(np.array([True, True]), np.array([0.9, 0.3]), np.array([[0.8, 0.5], [0.8, 0.5]]))


@pytest.mark.slow
def test_two_ranks_have_the_loss_and_gradient_of_the_peer_under_ddp_before_they_are_timed() -> None:
    result = ranks.measure(quick=True)
    json.dumps(result)
    (checked,) = result["correctness"].values()
    assert checked["gradient_error"] < 1e-5


def test_encoding_gives_the_vectors_of_the_peer_before_it_is_timed() -> None:
    result = encoding.measure(quick=True)
    json.dumps(result)
    assert result["correctness"]["fp32"]["smallest cosine"] > 0.99999


def test_the_checkpoint_benchmark_runs_at_a_tiny_size() -> None:
    result = checkpoint.measure(quick=True)
    json.dumps(result)
    (shown,) = result["tables"]
    (row,) = shown["rows"]
    assert row["GB"] * 1e9 > 12 * row["parameters"]
    assert 0 < row["stall, s"] < row["written after, s"] + row["stall, s"]


def test_a_benchmark_shows_its_tables_and_saves_nothing_when_it_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    run("reading", quick=True)
    shown = capsys.readouterr().out
    assert "ours, columns" in shown
    assert "written" not in shown


def test_an_unknown_benchmark_is_refused_by_name() -> None:
    command = [sys.executable, "-m", "benchmarks", "stepp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"stepp: no such benchmark; there are {', '.join(SCRIPTS)}, gpu" in done.stderr
