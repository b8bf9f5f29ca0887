"""The training loop: open or resume a run, step through it, save, evaluate, and say what happens.

Read `fit` first: it names the parts and the order in which they meet. Pretraining and fine-tuning are this one loop.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from data.collate import Batch, score
from data.errors import DataError, QuintetError, Stopped, UserError, WatchdogError
from trainer import balance, checkpoint, distributed, rollback, runfolder, snapshot, work
from trainer.build import Parts, build, describe
from trainer.checkpoint import Checkpoint, SaveError
from trainer.device import pick_device
from trainer.guard import Guard
from trainer.meter import Meter, peak_flops
from trainer.monitor import Monitor, summary
from trainer.preempt import StopRequest
from trainer.remote import Mirror
from trainer.runlog import STAGES
from trainer.schedule import learning_rate
from trainer.spot import Watch
from trainer.train import Config
from trainer.watchdog import SECTIONS, Watchdog

log = logging.getLogger("quintet")

# Between two looks for scores that a worker has not written yet.
_POLL_SECONDS = 1.0


def fit(config: Config) -> None:
    """Train from the newest checkpoint of the run, or from step 0, to the last step.

    Raises:
        UserError: bad configuration or input. DataError, NumericError: a budget is spent.
        Stopped: asked to stop; a checkpoint was written.
    """
    device = pick_device(config.device)
    with ExitStack() as stack:
        # A collective may wait a little longer than the watchdog, which says more.
        longest = 60 * max(config.timeout_minutes, config.step_timeout_minutes)
        stack.enter_context(work.job(device, longest + 60, 60 * config.start_timeout_minutes))
        dog = stack.enter_context(_watchdog(config))
        stop = stack.enter_context(StopRequest(config.run_dir, rank=distributed.rank()))
        if distributed.place().local_rank == 0:
            stack.enter_context(Watch(config.preemption, stop.ask))
        lease = runfolder.Lease(config.run_dir)
        distributed.on_first_rank(lambda: _take_lease(lease, config, stack))
        mirror = _mirror(config)
        ending = stack.enter_context(_Ending(config, mirror))
        saved = _newest(config, mirror)
        parts = build(config, device, saved)
        ending.run = run = _open(config, parts, saved, lease, dog, mirror)
        run.train(stop)
        dog.at("export", run.step)
        distributed.on_first_rank(lambda: _export(config))


@dataclass
class Run:
    """A run that is being trained; `step` counts the steps that are done, `updates` those that changed the model."""

    config: Config
    parts: Parts
    monitor: Monitor
    meter: Meter
    identity: runfolder.Run
    lease: runfolder.Lease  # held by rank 0
    dog: Watchdog
    mirror: Mirror
    guard: Guard
    step: int = 0
    updates: int = 0
    bad_records: int = 0
    unscored: int = 0
    failed_saves: int = 0
    saving: checkpoint.Saving | None = None  # the checkpoint that is being written
    saved_step: int = 0  # of the newest checkpoint
    saved_at: float = field(default_factory=time.monotonic)  # when the last one was begun
    stalled: float = 0.0  # for how long no step was taken for it

    def train(self, stop: StopRequest) -> None:
        """Step to the end; save, evaluate and log on the way. Leaves a checkpoint of the last step."""
        batches = self.parts.stream.batches(self.step, self.guard.passed_over)
        while self.step < self.config.steps:
            self._train_on(self._next(batches, stop))
            last = self.step == self.config.steps
            if self._due(self.config.check_weights_every):
                self.guard.check_weights(self.step)
            if last or self._due(self.config.eval.every_steps):
                self._evaluate()
            if last or self._due(self.config.save_every_steps) or self._time_to_save():
                self._save(must=last)

    def _next(self, batches: Iterator[tuple[int, Batch]], stop: StopRequest) -> Batch:
        """The next batch, unless some rank has to stop: all ranks learn of it here, before they meet in a step."""
        self.dog.at("data", self.step)
        begin, batch, error = time.perf_counter(), None, None
        try:
            number, batch = next(batches)
            assert number == self.step, (number, self.step)
        except QuintetError as raised:
            error = raised
        self.meter.waited += time.perf_counter() - begin
        bad, lacking = (sum(batch.bad.values()), len(batch.unscored)) if batch else (0, 0)
        code = error.exit_code if error else 0
        self.dog.at("meet", self.step)
        # The last step's loss rides along, and whether this rank has written its part of a checkpoint: neither needs a
        # collective of its own.
        written = self.saving is not None and self.saving.written
        mine = [float(stop.requested), float(bad), float(code), float(lacking), self.guard.last_loss(), float(written)]
        begin = time.perf_counter()
        stops, bad_everywhere, failed, lacking_everywhere, loss, parts = distributed.sums(mine)
        self.meter.met += time.perf_counter() - begin
        if parts == distributed.world() or failed:
            self._settle()
        if failed:
            with distributed.together():  # all have learned of it: the first that met an error tells
                if error is not None:
                    raise error
        self.guard.judge(self.step, loss)
        self._count_bad(int(bad_everywhere))
        if stops:
            self._stop()
        assert batch is not None
        if lacking_everywhere and self.config.missing_scores == "wait":
            return self._wait_for_scores(batch, stop)
        self.unscored += int(lacking_everywhere)
        return batch

    def _stop(self) -> NoReturn:
        if self.step == 0:  # there is nothing to save, nor any state of the optimizer
            distributed.end(Stopped("stopped before the first step; start the same command to begin again"))
        self._settle()
        if self.saved_step != self.step:
            self._save(must=True)
        distributed.end(Stopped(f"stopped at step {self.step} after a checkpoint; start the same command to go on"))

    def _wait_for_scores(self, batch: Batch, stop: StopRequest) -> Batch:
        """Look again and again for the scores that the batch lacks somewhere. All ranks wait together: none is late."""
        targets, config = self.parts.task.targets, self.config
        assert targets is not None, "only a teacher's scores can be missing"
        begin = time.perf_counter()
        while True:
            self.dog.at("data", self.step)
            waited = time.perf_counter() - begin
            late = waited > 60 * config.scores_wait_minutes
            stops, lacking, over = distributed.sums([float(stop.requested), float(len(batch.unscored)), float(late)])
            if stops:
                self._stop()
            if not lacking:
                self.meter.waited += waited
                return batch
            what = f"step {self.step} lacks scores of {int(lacking)} pairs (source {batch.source or 'mixed'})"
            if over:
                self._settle()
                waits = f"scores_wait_minutes={config.scores_wait_minutes:g}"
                error = UserError(
                    f"scores={config.scores}: {what} after {waits}; is a `quintet distill scores={config.scores}` "
                    "running on these shards?"
                )
                distributed.end(error)
            if waited < _POLL_SECONDS and distributed.rank() == 0:
                log.info("%s: waiting for a worker", what)
            time.sleep(_POLL_SECONDS)
            with distributed.together():  # a damaged file may meet one rank alone
                targets.refresh()
                batch = score(batch, targets)

    def _count_bad(self, more: int) -> None:
        before, budget = self.bad_records, self.config.max_bad_records
        self.bad_records += more
        if before <= budget / 2 < self.bad_records <= budget:
            what = f"{self.bad_records} damaged records left out, more than half of max_bad_records={budget}"
            self.monitor.alert("data budget", f"{what}; the run stops at more than {budget}")
        if self.bad_records > self.config.max_bad_records:
            self._settle()
            limit = f"max_bad_records={self.config.max_bad_records}"
            what = f"{self.bad_records} damaged records, more than {limit}"
            distributed.end(DataError(f"{what}; the warnings above name the shards: mend them, or raise the limit"))

    def _train_on(self, batch: Batch) -> None:
        self.dog.at("step", self.step)
        lr = learning_rate(self.step, self.config.steps, self.config.warmup_steps, self.config.lr)
        begin = time.perf_counter()
        batch = balance.deal(batch)
        self.meter.met += time.perf_counter() - begin
        outcome = self.parts.stepper(batch, self.step, lr)
        self.dog.allow("step", 60 * self.config.step_timeout_minutes)  # the first one may have compiled
        self.step += 1
        self.updates += outcome.applied
        self.meter.add(outcome, batch)
        self.guard.note(self.step, outcome, batch)
        if self._due(self.config.log_every) or self.step == self.config.steps:
            self.monitor.log(self.step, self._row(lr, outcome.grad_norm))
        self.monitor.tick(self.step)

    def _row(self, lr: float, grad_norm: float) -> dict[str, float]:
        samples = self.step * self.config.batch_size
        return self.meter.take(self.config.batch_size, self.config.steps - self.step) | {
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/logit_scale": 1 / self.config.temperature,
            "train/samples_seen": samples,
            "train/epoch": samples / self.parts.records,
            "data/samples_bad": self.bad_records,
            **self.guard.row(self.step),
            **({"data/samples_unscored": self.unscored} if self.parts.task.targets else {}),
        }

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _time_to_save(self) -> bool:
        """By rank 0's clock, so that all ranks save at the same step."""
        seconds = 60 * self.config.save_every_minutes
        mine = distributed.rank() == 0 and time.monotonic() - self.saved_at > seconds
        return distributed.any_of(mine) if seconds > 0 else False

    def _evaluate(self) -> None:
        self.dog.at("evaluate", self.step)
        begin = time.monotonic()
        values, examples = self.parts.evaluate()
        seconds = time.monotonic() - begin
        if values:
            self.monitor.log(self.step, values | {"perf/eval_s": seconds})
        for name, rows in examples.items():
            self.monitor.table(self.step, name, rows)
        self.meter.pause(seconds)

    def _save(self, *, must: bool) -> None:
        """Begin a checkpoint, which is written beside the steps that follow. One that `must` be is waited for.

        One that fails is reported and the run goes on, unless it must be.
        """
        if self.guard.skipped_in_a_row and not must:
            return  # a state that has begun to diverge is not published
        self._settle()
        self.dog.at("save", self.step)
        self._check_lease()
        self.guard.before_save(self.step)
        self.saved_at, parts = time.monotonic(), self.parts
        write = snapshot.take(parts.engine, parts.tokenizer, parts.task.describe)
        with self._failing_saves(must):
            run_dir, state = self.config.run_dir, self._state()
            self.saving = checkpoint.Saving(run_dir, self.step, write, state, ranks=distributed.Job())
        self.stalled = time.monotonic() - self.saved_at
        self.meter.pause(self.stalled)
        # A spike goes back to the newest checkpoint before it: which one that is must not depend on the disk's pace.
        rolls_back = self.config.spike.factor and self.config.spike.action == "rollback"
        if must or rolls_back:
            self._publish(must=must)
        self.meter.pause()

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self.saving:
            self._publish(must=False)

    def _publish(self, *, must: bool) -> None:
        """Give the checkpoint that is being written its name, once all ranks have written their parts."""
        self.dog.at("save", self.step)
        begin, saving, self.saving = time.monotonic(), self.saving, None
        if saving is None:
            return  # it has failed at its beginning
        self._check_lease()
        with self._failing_saves(must):
            saved = saving.publish()
            self.saved_step = saved.step
            self.mirror.send(saved)
            if distributed.rank() == 0:
                keep = self.config.keep_last, self.config.keep_every
                checkpoint.prune(self.config.run_dir, *keep, spare=self.mirror.held)
            now = time.monotonic()
            values = {"save_s": now - self.saved_at, "stall_s": self.stalled + now - begin, "bytes": saved.bytes}
            values |= {"last_step": saved.step, "failures": self.failed_saves, **self.mirror.figures()}
            self.monitor.log(self.step, {f"ckpt/{name}": value for name, value in values.items()})
        for text in self.mirror.news():
            self.monitor.alert("mirror", text)
        self.meter.pause(time.monotonic() - begin)

    def _check_lease(self) -> None:
        if not distributed.all_ok(not self.lease.lost):
            raise UserError(f"run_dir={self.config.run_dir}: another job has taken over this folder; stop one of them")

    @contextmanager
    def _failing_saves(self, must: bool) -> Iterator[None]:
        """Report and count a checkpoint that fails inside, and go on unless it must be."""
        try:
            yield
        except SaveError as error:
            self.failed_saves += 1
            self.monitor.alert("checkpoint failed", str(error))
            if must:
                raise

    def _state(self) -> dict[str, Any]:
        """What a resumed run must know and cannot compute: plain data for the checkpoint's manifest."""
        return {
            "stage": self.config.objective,
            "zero_stage": self.config.zero_stage,
            "updates": self.updates,
            "bad_records": self.bad_records,
            "unscored": self.unscored,
            **self.guard.state(),
            "order": self.parts.order.state(),
            "task": self.parts.task.state,
            "config_hash": hashlib.sha256(self.config.config_yaml.encode()).hexdigest(),
            "run_id": self.identity.id,
            "versions": runfolder.versions(),
        }


def _watchdog(config: Config) -> Watchdog:
    longest, step = 60 * config.timeout_minutes, 60 * config.step_timeout_minutes
    limits = dict.fromkeys(SECTIONS, longest) | {"data": step, "meet": step}
    rank, world = distributed.rank(), distributed.world()
    return Watchdog(config.run_dir, limits, rank=rank, world=world, store=distributed.store())


def _take_lease(lease: runfolder.Lease, config: Config, stack: ExitStack) -> None:
    runfolder.make_folder(config.run_dir)
    stack.enter_context(lease)


def _export(config: Config) -> None:
    """Leave the finished model in run_dir/model, as users open it."""
    from trainer import export

    export.run(export.Config(run_dir=config.run_dir, overwrite=True))


def _mirror(config: Config) -> Mirror:
    """The run's copy in object storage, if it has one; errors end all ranks."""
    with distributed.together():
        return Mirror(
            config.mirror,
            config.run_dir,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            limit_seconds=0.9 * 60 * config.timeout_minutes,  # meanwhile the other ranks wait in a barrier
            rank=distributed.rank(),
        )


def _newest(config: Config, mirror: Mirror) -> Checkpoint | None:
    """The checkpoint to go on from. Rank 0 hashes its files, so nothing damaged is loaded anywhere."""

    def find() -> str:
        checkpoint.clean(config.run_dir)
        mirror.restore(fresh=config.fresh)
        if not config.fresh:
            rollback.carry_out(config.run_dir)
        found = None if config.fresh else checkpoint.newest(config.run_dir)
        if found and found.step > config.steps:
            raise UserError(
                f"steps={config.steps}: the run has done {found.step} already; raise steps, or set fresh=true"
            )
        return str(found.folder) if found else ""

    folder = distributed.on_first_rank(find)
    return checkpoint.load(folder) if folder else None


def _open(
    config: Config, parts: Parts, saved: Checkpoint | None, lease: runfolder.Lease, dog: Watchdog, mirror: Mirror
) -> Run:
    """Write down what the run is made of, start its monitor, and restore its counters."""
    devices = [torch.cuda.get_device_name(parts.engine.device)] if parts.engine.device.type == "cuda" else []

    def prepare() -> tuple[str, int]:
        checkpoint.space_needed(snapshot.size(parts.engine.count), config.run_dir)
        run = runfolder.prepare(
            config.run_dir,
            config_text=config.config_yaml,
            ds_config=parts.engine.config,
            devices=devices,
            fresh=config.fresh,
        )
        mirror.begin(run.id, saved)
        return run.id, run.attempt

    identity = runfolder.Run(*distributed.on_first_rank(prepare))
    step = saved.step if saved else 0
    described = describe(config, parts)
    if distributed.rank() == 0:
        summary(f"{config.run_dir}: {'resumed at step ' + str(step) if saved else 'a new run'}", described)
    monitor = Monitor(
        config.run_dir,
        config.wandb,
        config={name: str(value) for name, value in described},
        job_type=STAGES[config.objective],
        run_id=identity.id,
        attempt=identity.attempt,
        steps=config.steps,
        first_step=step,
        tensorboard=config.tensorboard,
        rank=distributed.rank(),
    )
    dog.last_words = lambda reason: monitor.abandon(WatchdogError.exit_code, reason)
    device = parts.engine.device
    peak = peak_flops(device) if config.peak_tflops is None else 1e12 * config.peak_tflops
    meter = Meter(device, parts.flops_per_token, peak)
    rollbacks = distributed.on_first_rank(lambda: rollback.read(config.run_dir))
    guard = Guard(config, parts.engine, parts.order, monitor, rollbacks)
    run = Run(config, parts, monitor, meter, identity, lease, dog, mirror, guard, step)
    if saved:
        run.saved_step = saved.step
        run.updates, run.bad_records = saved.manifest["updates"], saved.manifest["bad_records"]
        run.unscored = saved.manifest.get("unscored", 0)
        guard.restore(saved.manifest)
    return run


class _Ending:
    """Writes exit.json when the run ends, however it ends: what scripts trust."""

    def __init__(self, config: Config, mirror: Mirror) -> None:
        self._config, self._mirror, self.code = config, mirror, 1
        self.run: Run | None = None

    def __enter__(self) -> _Ending:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, QuintetError):
            self.code, reason = error.exit_code, str(error) or "another rank ended the run"
        else:
            self.code, reason = (1, f"crashed: {kind.__name__}") if error else (0, "done")
        if self.run:
            self.run.monitor.end(self.code, f"{self._config.run_dir}, step {self.run.step}: {reason}")
            self.run.monitor.finish(self.code)
        if distributed.rank() == 0:
            runfolder.finish(self._config.run_dir, self.code, reason, self.run.step if self.run else 0)
            self._mirror.finish(self.code)
        if self.code in (0, Stopped.exit_code):
            # All ranks are here. A launcher ends the others when one leaves, so rank 0 finishes its writing first.
            distributed.barrier()
