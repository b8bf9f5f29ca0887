"""Watches the numbers of a run: non-finite steps, loss spikes, and whether the ranks hold the same finite weights.

All ranks decide alike, since each decision follows from numbers that all have got from one collective. What is found
goes to the log, to W&B and, with every record of the batch, to run_dir/incidents.jsonl. docs/numeric.md has the rules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from data.collate import Batch
from data.errors import NumericError, Stopped
from data.order import ROW_BITS, Order, batch_number
from trainer import agreement, checkpoint, distributed, rollback
from trainer.engine import Engine
from trainer.journal import Journal
from trainer.monitor import Monitor
from trainer.rollback import Rollback
from trainer.spikes import Spike, SpikeDetector
from trainer.step import Outcome
from trainer.train import Config

FILE = "incidents.jsonl"
# Rollbacks to one checkpoint; after so many the data are not the cause.
MAX_ROLLBACKS = 3
_MEND = "lower lr, raise temperature or warmup_steps, or look at the data"


@dataclass
class Guard:
    """What a run knows of its own soundness. Methods that take a step are collectives; steps are counted from 1."""

    config: Config
    engine: Engine
    order: Order
    monitor: Monitor
    rollbacks: list[Rollback] = field(default_factory=list)
    spikes: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    _last: tuple[Outcome, Batch] | None = None  # the last step, until its loss is judged

    def __post_init__(self) -> None:
        self._detector = SpikeDetector(self.config.spike.factor, self.config.spike.window)

    # --- what a checkpoint keeps

    def state(self) -> dict[str, Any]:
        """Plain data for the checkpoint's manifest."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes": self.spikes,
            "rollbacks": rollback.plain(self.rollbacks),
            "losses": self._detector.state(),
        }

    def restore(self, manifest: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint's manifest says; the run folder may know of later rollbacks than it does."""
        known = rollback.parse(manifest.get("rollbacks", ()))
        self.rollbacks = max(known, self.rollbacks, key=len)
        self.skipped, self.skipped_in_a_row = manifest["skipped"], manifest.get("skipped_in_a_row", 0)
        self.spikes = manifest.get("spikes", 0) + len(self.rollbacks) - len(known)
        if "losses" in manifest:
            self._detector.restore(manifest["losses"])

    @property
    def passed_over(self) -> list[tuple[int, int]]:
        """Ranges of batches that no step takes any more."""
        return rollback.ranges(self.rollbacks)

    def row(self, step: int) -> dict[str, float]:
        """Counters for the log."""
        row: dict[str, float] = {"train/skipped_steps": self.skipped}
        if self.config.spike.factor:
            passed = batch_number(step - 1, self.passed_over) - (step - 1)
            row |= {"train/spikes": self.spikes, "data/batches_passed_over": passed}
        return row

    # --- steps that are not finite

    def note(self, step: int, outcome: Outcome, batch: Batch) -> None:
        """Count a step that was left out, tell of it, and end the run after too many in a row."""
        self._last = outcome, batch
        if outcome.applied:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        losses = distributed.gather_rows(outcome.figures["train/loss"].double().cpu().reshape(1))
        bad = [rank for rank, finite in enumerate(losses.isfinite().tolist()) if not finite]
        where = f"the loss of rank {', '.join(map(str, bad))}" if bad else "the gradient"
        counts = {"skipped": self.skipped, "in_a_row": self.skipped_in_a_row}
        facts = {"loss": losses.tolist(), "grad_norm": outcome.grad_norm, **counts}
        what = f"{where} is not finite, the update was left out ({self.skipped_in_a_row} in a row)"
        self._report("non-finite step", step, what, facts, batch)
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            what = f"{self.skipped_in_a_row} non-finite steps in a row, the last is {step}"
            distributed.end(NumericError(f"{what}; the newest checkpoint is from before them: {_MEND}"))

    # --- loss spikes

    def last_loss(self) -> float:
        """This rank's loss of the last step, if it is still to be judged; else NaN. Local.

        Read after the step it costs no wait of its own: the loss came before the gradient, whose norm has been read.
        """
        return float(self._last[0].figures["train/loss"]) if self._last and self.config.spike.factor else math.nan

    def judge(self, step: int, total: float) -> None:
        """Compare the last step's loss, given its sum over the ranks, with those before it; roll back if so configured.

        fp32 losses of like size add up exactly in float64, so the sum does not depend on the order of the ranks.
        """
        last, self._last = self._last, None
        if not (last and self.config.spike.factor):
            return
        spike = self._detector.observe(total / distributed.world(), last[1].source)
        if spike:
            self.spikes += 1
            what = f"{spike}{f' in batches of {last[1].source}' if last[1].source else ''}"
            facts = {"loss": spike.loss, "median": spike.median, "deviation": spike.deviation}
            self._report("loss spike", step, what, facts, last[1])
            if self.config.spike.action == "rollback":
                self._roll_back(step, spike)

    def _roll_back(self, step: int, spike: Spike) -> None:
        """Decide what to go back to, write it down, and end the run: the next start carries it out."""

        def decide() -> Rollback:
            saved = [found.step for found in checkpoint.complete(self.config.run_dir, deep=True)]
            chosen = rollback.plan(step, saved, self.rollbacks, self.config.spike.skip_steps)
            tries = sum(earlier.to == chosen.to for earlier in self.rollbacks)
            if tries >= MAX_ROLLBACKS:
                what = f"step {step}: {spike}, after {tries} rollbacks to step {chosen.to}"
                raise NumericError(f"{what}; it is not in the data that were passed over: {_MEND}")
            rollback.write(self.config.run_dir, [*self.rollbacks, chosen])
            return chosen

        chosen = distributed.on_first_rank(decide)
        pairs = (chosen.stop - chosen.first) * self.config.batch_size
        distributed.end(
            Stopped(
                f"loss spike at step {step}: the run goes back to step {chosen.to} and passes over batches "
                f"{chosen.first} to {chosen.stop - 1} ({pairs:,} pairs); start the same command to go on"
            )
        )

    # --- weights

    def before_save(self, step: int) -> None:
        """Judge all that has to be judged before the state after `step` may be published."""
        if self._last and self.config.spike.factor:
            self.judge(step, distributed.sums([self.last_loss()])[0])
        if not distributed.all_ok(self.engine.finite()):
            what = f"step {step}: weights or moments of the optimizer are not finite"
            distributed.end(NumericError(f"{what}; the newest checkpoint is from before that: {_MEND}"))
        self.check_weights(step)

    def check_weights(self, step: int) -> None:
        """End the run when ranks that should hold the same weights do not, naming the odd ones.

        Stage 3 has no replicas: every rank holds another part.
        """
        if not self.config.check_weights_every or self.engine.stage == 3 or distributed.world() == 1:
            return
        sums = agreement.checksums(self.engine.parameters.values())
        rows = distributed.gather_rows(sums[None])
        odd = agreement.odd_ranks(rows)
        if odd:
            differing = (rows != rows[0]).any(0).tolist()
            names = [name for name, differs in zip(self.engine.parameters, differing, strict=True) if differs]
            self._end_of_agreement(step, odd, names)

    def _end_of_agreement(self, step: int, odd: Sequence[int], names: Sequence[str]) -> NoReturn:
        world, ranks = distributed.world(), " and ".join(map(str, odd))
        if len(odd) < world:
            who = f"rank {ranks} holds other weights than the other {world - len(odd)}"
        else:
            who = f"ranks {ranks} hold different weights and none has a majority"
        where = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        self._report("replicas differ", step, f"{who}: {where}", {"ranks": list(odd), "parameters": list(names)})
        mend = "start the same command to go on from the newest checkpoint, where all agreed; if it happens again, "
        mend += "leave out the machine of the rank" if len(odd) < world else "look for a faulty machine"
        distributed.end(NumericError(f"step {step}: {who} ({where}); {mend}"))

    def _report(self, kind: str, step: int, what: str, facts: Mapping[str, Any], batch: Batch | None = None) -> None:
        """Say what was found, and write it down with the records that all ranks had in the batch."""
        row: dict[str, Any] = {"kind": kind, "step": step, **facts}
        said = f"step {step}: {what}"
        if batch:
            ids = distributed.gather_rows(torch.from_numpy(batch.record_ids)).numpy()
            row["batch"] = batch_number(step - 1, self.passed_over)
            row["records"] = _by_source(ids, [source.name for source in self.order.sources])
            said += f"; batch {row['batch']}, its records are in {FILE}"
        if distributed.rank() == 0:
            journal = Journal(Path(self.config.run_dir) / FILE)
            journal.write({**row, "time": time.time()})
            journal.close()
        self.monitor.alert(kind, said)


def _by_source(ids: np.ndarray, names: Sequence[str]) -> dict[str, list[int]]:
    """Record ids as the numbers of records in each source."""
    return {names[n]: (ids[ids >> ROW_BITS == n] & ((1 << ROW_BITS) - 1)).tolist() for n in np.unique(ids >> ROW_BITS)}
