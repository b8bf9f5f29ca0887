"""Numeric safety: non-finite steps, loss spikes with rollback, and replicas that differ, in real jobs."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batches
import jobs
import pytest
import ranks
import steps
import torch
from safetensors.torch import load_file

from data.order import batch_number
from launcher import cli
from trainer.rollback import Rollback, plan, undone
from trainer.spikes import SpikeDetector

EXACT = ("train/loss", "train/grad_norm", "train/lr", "train/acc_top1", "data/batch_hash")
# A spike here is a loss times 100. With the usual factor a batch of so small a model is one by itself now and then.
SPIKES = {
    "spike.window": 20,
    "spike.factor": 100,
    "spike.skip_steps": 8,
    "spike.action": "rollback",
    "steps": 40,
    "keep_last": 9,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("numeric")
    jobs.settings(made)
    return made


# --- jobs with faults


def order(folder: Path, batch_size: int = 16, lanes: int = 4) -> Any:
    """The order of data of a job with the settings of tests/jobs.py."""
    from data import mixture

    return mixture.load(str(folder / "shards")).order(batch_size, lanes=lanes, shuffle_blocks=8)


def job(folder: Path, changes: dict[str, Any], fault: Callable[..., Any] | None = None, *given: Any) -> int:
    """`quintet pretrain` in this process; fault(patch, *given) puts something in its way. Returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            fault(patch, *given)
        return cli.main(["pretrain", *jobs.settings(folder, **changes)])


def before_steps(patch: pytest.MonkeyPatch, act: Callable[[Any, Any, int], None]) -> None:
    """Call act(stepper, batch, step) before each step; a changed loss or gradient holds for that step."""
    from trainer.step import Stepper

    plain = Stepper.__call__

    def call(stepper: Any, batch: Any, step: int, lr: float) -> Any:
        objective, backward = stepper.objective, stepper.engine.backward
        act(stepper, batch, step)
        try:
            return plain(stepper, batch, step, lr)
        finally:
            stepper.objective, stepper.engine.backward = objective, backward

    patch.setattr(Stepper, "__call__", call)


def change_loss(stepper: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    objective = stepper.objective

    def changed(embeddings: Any, batch: Any) -> Any:
        loss, figures = objective(embeddings, batch)
        return change(loss), figures | {"train/loss": change(figures["train/loss"])}

    stepper.objective = changed


def change_gradient(stepper: Any, factor: float) -> None:
    backward = stepper.engine.backward
    stepper.engine.backward = lambda loss: backward(loss * factor)


def trajectory(run_dir: Path) -> dict[int, tuple[float, ...]]:
    return {step: tuple(row[name] for name in EXACT) for step, row in jobs.steps(run_dir).items()}


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "incidents.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def ending(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "exit.json").read_text())


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*"))


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / f"checkpoints/step-{step:08d}").rglob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- steps that are not finite


def on_rank_1_alone(patch: pytest.MonkeyPatch) -> None:
    """Rank 1: a NaN added to the loss of step 4, which leaves the gradient finite; infinite gradients at step 7; an
    infinite loss from step 10 on."""

    def act(stepper: Any, batch: Any, step: int) -> None:
        from trainer import distributed

        if distributed.rank() == 1 and step + 1 in (4, 10, 11, 12):
            change_loss(stepper, lambda loss: loss + (math.nan if step + 1 == 4 else math.inf))
        if distributed.rank() == 1 and step + 1 == 7:
            change_gradient(stepper, math.inf)

    before_steps(patch, act)


def test_non_finite_numbers_on_one_rank_are_left_out_by_all_logged_with_their_records_and_end_with_code_4(
    folder: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    changes = {"run_dir": run_dir, "save_every_steps": 1, "keep_last": 20, "max_skipped_steps": 3, "steps": 20}
    assert ranks.run(job, 2, tmp_path, folder, changes, on_rank_1_alone) == [4, 4]
    assert ending(run_dir)["code"] == 4
    assert "3 non-finite steps in a row, the last is 12" in ending(run_dir)["reason"]
    found = incidents(run_dir)
    assert [row["step"] for row in found] == [4, 7, 10, 11, 12]
    assert [row["skipped"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["in_a_row"] for row in found] == [1, 1, 1, 2, 3]
    assert [[math.isfinite(float(loss)) for loss in row["loss"]] for row in found] == [
        [True, rank_1] for rank_1 in (False, True, False, False, False)
    ]
    for row in found:
        expected = sorted(order(folder).global_batch(row["step"] - 1).tolist())
        ((_, records),) = row["records"].items()
        assert sorted(records) == expected
    assert [row["train/skipped_steps"] for row in jobs.steps(run_dir).values()] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4]
    assert saved_steps(run_dir) == [1, 2, 3, 5, 6, 8, 9], "nothing is published right after a step that was left out"
    for step in saved_steps(run_dir):
        assert all(tensor.isfinite().all() for tensor in weights(run_dir, step).values())


def left_out_or_never_there(model: Path) -> list[bool]:
    """At each stage: batches 0, 1 with NaN on rank 1, and 2, against batches 0 and 2 alone, at the same rates."""
    from functools import partial

    from trainer import distributed, objectives
    from trainer.engine import MOMENTS, Engine, OptimizerSettings
    from trainer.step import Stepper

    def state(stage: int, numbers: list[int]) -> list[torch.Tensor]:
        settings = OptimizerSettings(max_grad_norm=steps.MAX_NORM, **steps.ADAM)
        local = steps.PAIRS // distributed.world()
        engine = Engine(steps.encoder(model), settings, stage=stage, local_batch=local, device=torch.device("cpu"))
        stepper = Stepper(engine, partial(objectives.contrastive, temperature=0.01), steps.SEED, 0, 64)
        with pytest.MonkeyPatch.context() as patch:
            bad = distributed.rank() == 1
            before_steps(patch, lambda it, _, step: change_gradient(it, math.nan) if bad and step == 1 else None)
            for number in numbers:
                whole = batches.make(steps.PAIRS, 0, number)
                batch = batches.share(whole, distributed.rank(), distributed.world())
                assert stepper(batch, number, 0.01 / (1 + number)).applied == (number != 1)
        read = [engine.weight(name) for name in engine.shapes]
        return read + [engine.moment(name, key) for name in engine.trained() for key in MOMENTS]

    def equal(stage: int) -> bool:
        with_it, without = state(stage, [0, 1, 2]), state(stage, [0, 2])
        return all(torch.equal(one, other) for one, other in zip(with_it, without, strict=True))

    return [equal(stage) for stage in (0, 1, 2, 3)]


def test_a_step_left_out_changes_neither_weights_nor_moments_nor_adams_count_and_the_rate_goes_on(
    folder: Path, tmp_path: Path
):
    assert ranks.run(left_out_or_never_there, 2, tmp_path, folder / "bert") == [[True] * 4] * 2


def never_finite_from(patch: pytest.MonkeyPatch, first: int, stop_after: int, run_dir: Path) -> None:
    def act(stepper: Any, batch: Any, step: int) -> None:
        if step + 1 >= first:
            change_gradient(stepper, math.nan)
        if step + 1 == stop_after:
            (run_dir / "STOP").touch()

    before_steps(patch, act)


def test_non_finite_steps_in_a_row_are_counted_on_over_a_restart(folder: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    changes = {"run_dir": run_dir, "max_skipped_steps": 5}
    assert job(folder, changes, never_finite_from, 4, 6, run_dir) == 75
    assert job(folder, changes, never_finite_from, 4, 0, run_dir) == 4
    assert incidents(run_dir)[-1]["step"] == 8


def out_of_range(patch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """What a large but finite gradient does to a weight or a moment, after the update of a step."""
    from trainer.loop import Run

    train_on = Run._train_on

    def call(run: Any, batch: Any) -> None:
        train_on(run, batch)
        if run.step == after:
            engine = run.parts.engine
            flat = engine._flat_parameters()[0]
            held = flat if name == "weight" else engine._optimizer.state[flat][name]
            held.detach().view(-1)[3] = math.inf

    patch.setattr(Run, "_train_on", call)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", ["weight", "exp_avg_sq"])
def test_a_state_that_is_not_finite_is_never_published(folder: Path, tmp_path: Path, name: str, stage: int):
    run_dir = tmp_path / "run"
    changes = {"run_dir": run_dir, "save_every_steps": 5, "zero_stage": stage}
    assert job(folder, changes, out_of_range, name, 10) == 4
    assert saved_steps(run_dir) == [5]
    assert "step 10: weights or moments" in ending(run_dir)["reason"]


# --- the detector


def quiet(count: int, level: float = 2.0) -> list[float]:
    """Losses that vary by up to 0.1 around a level."""
    return [level + 0.1 * math.sin(7.0 * n) for n in range(count)]


def found_in(losses: list[float], detector: SpikeDetector) -> list[int]:
    return [n for n, loss in enumerate(losses) if detector.observe(loss)]


def test_a_spike_of_several_steps_is_told_once_and_the_next_one_again():
    losses = [*quiet(40), 200.0, 210.0, 190.0, *quiet(20), 50.0, *quiet(5)]
    assert found_in(losses, SpikeDetector(7.0, 20)) == [40, 63]


def test_the_bound_is_the_median_plus_factor_times_the_robust_deviation():
    recent = [1.0, 2.0, 3.0, 4.0, 5.0]  # median 3, median absolute deviation 1
    bound = 3.0 + 7.0 * 1.4826
    assert not found_in([*recent, bound - 1e-6], SpikeDetector(7.0, 5))
    assert found_in([*recent, bound + 1e-6], SpikeDetector(7.0, 5)) == [5]


def test_a_falling_loss_a_nan_and_a_short_history_are_no_spikes():
    falling = [10.0 * 0.97**n for n in range(200)]
    assert not found_in(falling, SpikeDetector(7.0, 20))
    assert not found_in([*quiet(30), math.nan, math.inf, *quiet(5)], SpikeDetector(7.0, 20))
    assert not found_in([*quiet(19), 200.0], SpikeDetector(7.0, 20))


def test_losses_are_compared_with_those_of_their_own_source():
    detector = SpikeDetector(7.0, 20)
    for easy, hard in zip(quiet(40, 0.5), quiet(40, 9.0), strict=True):
        assert not detector.observe(easy, "titles")
        assert not detector.observe(hard, "questions")
    assert detector.observe(9.0, "titles")


def test_a_level_that_stays_becomes_the_usual_one():
    detector = SpikeDetector(7.0, 20)
    assert found_in([*quiet(30), *quiet(30, 6.0)], detector) == [30]
    assert found_in([60.0], detector) == [0]


@pytest.mark.parametrize("cut", [0, 5, 25, 40, 41, 43])
def test_the_detector_goes_on_from_its_state_as_if_it_had_never_stopped(cut: int):
    losses = [*quiet(40), 200.0, 200.0, 200.0, *quiet(20), 99.0]
    first, second = SpikeDetector(7.0, 20), SpikeDetector(7.0, 20)
    before = found_in(losses[:cut], first)
    second.restore(json.loads(json.dumps(first.state())))
    assert before + [cut + n for n in found_in(losses[cut:], second)] == [40, 63]


# --- which batches, which checkpoint


def test_steps_take_the_batches_that_are_not_passed_over_each_once():
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        starts = torch.randint(0, 60, (4,), generator=generator).tolist()
        passed = [(start, start + length) for start, length in zip(starts, (1, 7, 0, 12), strict=True)]
        left = [n for n in range(200) if not any(first <= n < stop for first, stop in passed)]
        assert [batch_number(step, passed) for step in range(100)] == left[:100]


def test_a_rollback_goes_to_the_newest_checkpoint_from_before_the_batches_it_passes_over():
    # The spike of step 30 came with batch 29; 4 of the 8 batches lie before it.
    assert plan(30, [30, 25, 20], [], 8) == Rollback(spike=30, to=25, first=25, stop=33)
    assert plan(30, [28, 24, 20], [], 8) == Rollback(spike=30, to=24, first=25, stop=33)
    # None so old: the oldest that is not from after the spike, and nothing is passed over that it has seen.
    assert plan(30, [31, 29, 27], [], 8) == Rollback(spike=30, to=27, first=27, stop=33)
    assert plan(3, [], [], 8) == Rollback(spike=3, to=0, first=0, stop=6)
    # After 8 batches were passed over, step 40 has batch 47, and step 35 begins with batch 43.
    before = [Rollback(spike=30, to=25, first=25, stop=33)]
    assert plan(40, [35, 25], before, 8) == Rollback(spike=40, to=35, first=43, stop=51)


def test_a_checkpoint_is_undone_by_a_rollback_it_does_not_know_to_a_step_before_it():
    rollbacks = [Rollback(30, 25, 25, 33), Rollback(50, 40, 44, 52)]
    assert [undone(step, 0, rollbacks) for step in (25, 26)] == [False, True]
    assert [undone(step, 1, rollbacks) for step in (35, 40, 41)] == [False, False, True]
    assert not undone(60, 2, rollbacks)


# --- spikes in jobs


def spiking(patch: pytest.MonkeyPatch, folder: Path, first: int, kill_at: int = 0, count: int = 3) -> None:
    """The loss of batches first .. first + count - 1 times 100; a process that comes to step `kill_at` is killed."""
    from trainer import distributed

    found = [set(order(folder).global_batch(first + n).tolist()) for n in range(count)]

    def act(stepper: Any, batch: Any, step: int) -> None:
        if any(found_in.issuperset(batch.record_ids.tolist()) for found_in in found):
            change_loss(stepper, lambda loss: 100 * loss)
        if step + 1 == kill_at and distributed.rank() == distributed.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    before_steps(patch, act)


def without_batches(patch: pytest.MonkeyPatch, first: int, count: int) -> None:
    """The reference: a run whose data simply lack some batches."""
    from data.stream import Stream

    prepare = Stream._prepare
    patch.setattr(Stream, "_prepare", lambda stream, n: prepare(stream, n if n < first else n + count))


def test_a_spike_is_rolled_back_and_its_batches_passed_over_bit_for_bit_also_after_a_kill(folder: Path, tmp_path: Path):
    """The loss of steps 30 to 32 x 100 on both ranks. Rank 1 is killed at step 28; the resumed run decides the same."""
    run_dir, plain = tmp_path / "run", tmp_path / "plain"
    changes = {"run_dir": run_dir, **SPIKES}
    with pytest.raises(AssertionError, match=r"exit code -9|Connection"):
        ranks.run(job, 2, tmp_path, folder, changes, spiking, folder, 29, 28)
    assert max(jobs.steps(run_dir)) == 27
    assert not incidents(run_dir)
    assert ranks.run(job, 2, tmp_path, folder, changes, spiking, folder, 29) == [75, 75]
    assert json.loads((run_dir / "rollbacks.json").read_text()) == [{"spike": 30, "to": 25, "first": 25, "stop": 33}]
    assert "the run goes back to step 25 and passes over batches 25 to 32 (128 pairs)" in ending(run_dir)["reason"]
    assert saved_steps(run_dir) == [5, 10, 15, 20, 25], "the state of the spiked step was due, and is not published"
    assert ranks.run(job, 2, tmp_path, folder, changes, spiking, folder, 29) == [0, 0]

    (spike,) = incidents(run_dir)
    assert (spike["kind"], spike["step"], spike["batch"]) == ("loss spike", 30, 29)
    ((_, records),) = spike["records"].items()
    assert sorted(records) == sorted(order(folder).global_batch(29).tolist())
    last = jobs.steps(run_dir)
    assert [last[step]["train/spikes"] for step in (25, 26, 40)] == [0, 1, 1]
    assert [last[step]["data/batches_passed_over"] for step in (25, 26, 40)] == [0, 8, 8]

    reference = {"run_dir": plain, **SPIKES, "spike.factor": 0, "spike.action": "warn"}
    assert ranks.run(job, 2, tmp_path, folder, reference, without_batches, 25, 8) == [0, 0]
    assert sorted(trajectory(plain)) == list(range(1, 41))
    assert trajectory(run_dir) == trajectory(plain)
    assert same(weights(run_dir, 40), weights(plain, 40))


def test_checkpoints_between_the_one_gone_back_to_and_the_spike_are_not_resumed_from(folder: Path, tmp_path: Path):
    """Steps 26 and 28 are saved, and have batches in them that are passed over. The start after is killed at once."""
    run_dir, plain = tmp_path / "run", tmp_path / "plain"
    changes = {"run_dir": run_dir, **SPIKES, "save_every_steps": 2}
    assert job(folder, changes, spiking, folder, 28) == 75
    assert json.loads((run_dir / "rollbacks.json").read_text()) == [{"spike": 29, "to": 24, "first": 24, "stop": 32}]
    assert saved_steps(run_dir)[-2:] == [26, 28]
    with pytest.raises(AssertionError, match="exit code -9"):
        ranks.run(job, 1, tmp_path, folder, changes, spiking, folder, 28, 26)
    assert job(folder, changes, spiking, folder, 28) == 0
    assert first_steps(run_dir) == {1: 1, 2: 25, 3: 25}
    reference = {**changes, "run_dir": plain, "spike.factor": 0, "spike.action": "warn"}
    assert job(folder, reference, without_batches, 24, 8) == 0
    assert trajectory(run_dir) == trajectory(plain)


def first_steps(run_dir: Path) -> dict[int, int]:
    """The first step that every start of a run has trained."""
    found: dict[int, int] = {}
    for row in jobs.metrics(run_dir):
        if "train/loss" in row:
            found.setdefault(row["run/attempt"], row["train/step"])
    return found


def two_spikes(patch: pytest.MonkeyPatch, folder: Path) -> None:
    spiking(patch, folder, 29)
    spiking(patch, folder, 38)


def test_a_second_spike_passes_over_more_and_the_checkpoints_know_it_too(folder: Path, tmp_path: Path):
    """Batch 38 comes at step 31 once 25 to 32 are left out. At the end rollbacks.json is lost."""
    run_dir, plain = tmp_path / "run", tmp_path / "plain"
    changes = {"run_dir": run_dir, **SPIKES}
    assert [job(folder, changes, two_spikes, folder) for _ in range(3)] == [75, 75, 0]
    rollbacks = json.loads((run_dir / "rollbacks.json").read_text())
    assert rollbacks == [
        {"spike": 30, "to": 25, "first": 25, "stop": 33},
        {"spike": 31, "to": 25, "first": 34, "stop": 42},
    ]
    reference = {"run_dir": plain, **SPIKES, "spike.factor": 0, "spike.action": "warn"}
    assert job(folder, reference, one_batch_between) == 0
    assert trajectory(run_dir) == trajectory(plain)

    (run_dir / "rollbacks.json").unlink()
    shutil.rmtree(run_dir / "checkpoints/step-00000040")
    assert job(folder, changes, two_spikes, folder) == 0
    assert first_steps(run_dir)[4] == 36
    assert trajectory(run_dir) == trajectory(plain)


def one_batch_between(patch: pytest.MonkeyPatch) -> None:
    """The reference for two rollbacks: batches 0 to 24, 33, then 42 and on."""
    from data.stream import Stream

    prepare = Stream._prepare
    patch.setattr(Stream, "_prepare", lambda it, n: prepare(it, n if n < 25 else 33 if n == 25 else n + 16))


def by_step(patch: pytest.MonkeyPatch, first: int) -> None:
    """A model that breaks whatever it is fed."""
    before_steps(patch, lambda it, _, step: change_loss(it, lambda loss: 100 * loss) if step + 1 >= first else None)


def test_a_spike_that_comes_back_after_three_rollbacks_ends_with_code_4(folder: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    changes = {"run_dir": run_dir, **SPIKES, "save_every_steps": 25}
    assert [job(folder, changes, by_step, 30) for _ in range(4)] == [75, 75, 75, 4]
    assert "after 3 rollbacks to step 25; it is not in the data" in ending(run_dir)["reason"]


def test_a_spike_is_by_default_a_warning_and_the_run_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    assert (
        job(folder, {"run_dir": run_dir, "spike.window": 20, "spike.factor": 100, "steps": 40}, spiking, folder, 28)
        == 0
    )
    assert "loss spike: step 29: loss" in capsys.readouterr().err
    assert [row["step"] for row in incidents(run_dir)] == [29]
    assert jobs.steps(run_dir)[40]["train/spikes"] == 1
    assert not (run_dir / "rollbacks.json").exists()


def test_a_rollback_without_a_detector_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes = {"run_dir": tmp_path / "run", "spike.factor": 0, "spike.action": "rollback"}
    assert job(folder, changes) == 2
    assert "spike.factor=0" in capsys.readouterr().err


# --- replicas that differ


def test_every_single_flipped_bit_changes_a_checksum(monkeypatch: pytest.MonkeyPatch):
    from trainer import agreement

    monkeypatch.setitem(agreement._BLOCKS, "cpu", 16)  # 50 elements are four blocks
    tensor = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    (right,) = agreement.checksums([tensor]).tolist()
    bits = tensor.view(-1).view(torch.int32)
    for element in range(50):
        for bit in range(32):
            flip = torch.tensor(1 << bit).to(torch.int32)
            bits[element] ^= flip
            assert agreement.checksums([tensor]).tolist() != [right], (element, bit)
            bits[element] ^= flip
    assert agreement.checksums([tensor, tensor]).tolist() == [right, right]
    tensor[[0, 4]] = tensor[[4, 0]]
    assert agreement.checksums([tensor]).tolist() != [right]


def test_the_odd_rank_is_named_by_majority_and_without_one_all_are():
    from trainer.agreement import odd_ranks

    rows = torch.tensor([[1, 2], [1, 2], [1, 3], [1, 2]])
    assert odd_ranks(rows) == [2]
    assert odd_ranks(rows[:1]) == []
    assert odd_ranks(rows[1:3]) == [0, 1]
    assert odd_ranks(torch.tensor([[1], [2], [2], [1]])) == [0, 1, 2, 3]


def flip(parameter: torch.Tensor) -> None:
    """Flip a bit high in the fraction of a weight, in place: the rounding of an update may lose a low one."""
    parameter.detach().reshape(-1)[:1].view(torch.int32).bitwise_xor_(torch.tensor(1 << 22, dtype=torch.int32))


def flipping(patch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """Flip a bit of a weight of rank 1 before step `at`, counted from 1."""

    def act(stepper: Any, batch: Any, step: int) -> None:
        from trainer import distributed

        if distributed.rank() == 1 and step + 1 == at:
            flip(stepper.engine.parameters[name])

    before_steps(patch, act)


FROZEN, TRAINED = "backbone.embeddings.position_embeddings.weight", "backbone.encoder.layer.0.output.dense.bias"


def test_a_flipped_bit_of_one_rank_of_three_is_found_within_one_interval_and_the_rank_named(
    folder: Path, tmp_path: Path
):
    """ZeRO-1; a bit of a weight that no update touches. Then the same command goes on from where all agreed."""
    run_dir = tmp_path / "run"
    changes = {"run_dir": run_dir, "check_weights_every": 4, "batch_size": 18, "lanes": 6}
    assert ranks.run(job, 3, tmp_path, folder, changes, flipping, FROZEN, 6) == [4, 4, 4]
    assert max(jobs.steps(run_dir)) == 8
    reason = ending(run_dir)["reason"]
    assert f"step 8: rank 1 holds other weights than the other 2 ({FROZEN})" in reason
    assert "go on from the newest checkpoint" in reason
    (row,) = incidents(run_dir)
    assert (row["kind"], row["step"], row["ranks"], row["parameters"]) == ("replicas differ", 8, [1], [FROZEN])
    assert ranks.run(job, 3, tmp_path, folder, changes) == [0, 0, 0]
    assert first_steps(run_dir)[2] == 6


def test_of_two_ranks_that_differ_both_are_named_and_no_checkpoint_is_written(folder: Path, tmp_path: Path):
    """ZeRO-0, where a trained weight stays different; the save of step 5 comes before the check of step 8."""
    run_dir = tmp_path / "run"
    changes = {"run_dir": run_dir, "check_weights_every": 8, "zero_stage": 0}
    assert ranks.run(job, 2, tmp_path, folder, changes, flipping, TRAINED, 3) == [4, 4]
    assert "step 5: ranks 0 and 1 hold different weights" in ending(run_dir)["reason"]
    assert saved_steps(run_dir) == []


def flips_after_an_update(model: Path) -> dict[int, list[bool]]:
    """Whether ranks differ, by stage: at first, after a bit of rank 1's trained weight was flipped, a step later."""
    from functools import partial

    from trainer import agreement, distributed, objectives
    from trainer.engine import Engine, OptimizerSettings
    from trainer.step import Stepper

    found = {}
    for stage in (0, 1, 2):
        settings = OptimizerSettings(max_grad_norm=1.0, **steps.ADAM)
        engine = Engine(steps.encoder(model), settings, stage=stage, local_batch=8, device=torch.device("cpu"))
        stepper = Stepper(engine, partial(objectives.contrastive, temperature=0.01), 0, 0, 64)
        found[stage] = []
        for number in range(3):
            if number == 1 and distributed.rank() == 1:
                flip(engine.parameters[TRAINED])
            sums = agreement.checksums(engine.parameters.values())
            found[stage].append(bool(agreement.odd_ranks(distributed.gather_rows(sums[None]))))
            batch = batches.make(16, 0, number)
            assert stepper(batches.share(batch, distributed.rank(), 2), number, 0.01).applied
    return found


def test_a_flipped_trained_weight_stays_at_stage_0_and_is_overwritten_by_its_owner_at_1_and_2(
    folder: Path, tmp_path: Path
):
    expected = {0: [False, True, True], 1: [False, True, False], 2: [False, True, False]}
    assert ranks.run(flips_after_an_update, 2, tmp_path, folder / "bert") == [expected] * 2
