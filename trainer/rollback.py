"""Going back after a loss spike: to which checkpoint, and which batches are passed over from there on.

As PaLM was trained (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1): from a checkpoint about 100 steps before the
spike, without the 200 to 500 batches around it.

    run_dir/rollbacks.json    every rollback of the run, in order

The file is written before the run ends with the decision; the next start carries it out: it deletes the checkpoints
that the decision has undone, goes on from the newest that is left, and passes the batches over. Each checkpoint's
manifest holds the rollbacks that were known when it was written, so it can be told which ones a later rollback has
undone, and a kill at any moment changes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.order import batch_number
from trainer import checkpoint
from trainer.runfolder import write_json

log = logging.getLogger("quintet")

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """From the loss of step `spike` (from 1) back to the state after step `to`, on without batches [first, stop)."""

    spike: int
    to: int
    first: int
    stop: int


def ranges(rollbacks: Iterable[Rollback]) -> list[tuple[int, int]]:
    """The batches passed over, for `data.order.batch_number`."""
    return [(one.first, one.stop) for one in rollbacks]


def plan(spike: int, saved: Iterable[int], before: Sequence[Rollback], skip_steps: int) -> Rollback:
    """The rollback for a spike at step `spike` of a run that has checkpoints of the steps `saved`.

    `skip_steps` batches are passed over, half of them before the spiked one. The checkpoint is the newest from before
    them. Where there is none so old, it is the oldest from before the spike, and fewer batches are passed over, since
    what a checkpoint has seen cannot be left out; where there is none at all, it is the beginning of the run.
    """
    known = ranges(before)
    number = batch_number(spike - 1, known)
    first = number - skip_steps // 2
    earlier = [step for step in saved if step < spike]
    older = [step for step in earlier if batch_number(step, known) <= first]
    to = max(older) if older else min(earlier, default=0)
    return Rollback(spike, to, max(first, batch_number(to, known)), first + skip_steps)


def undone(step: int, known: int, rollbacks: Sequence[Rollback]) -> bool:
    """Whether a checkpoint of `step`, written when `known` of the rollbacks were, holds what a later one took back."""
    return any(step > later.to for later in rollbacks[known:])


def read(run_dir: str | Path) -> list[Rollback]:
    """The rollbacks of a run, in order. Raises UserError when the file is damaged."""
    path = Path(run_dir) / FILE
    if not path.exists():
        return []
    try:
        return parse(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; restore it, or start again with fresh=true") from None


def parse(rows: Iterable[dict[str, Any]]) -> list[Rollback]:
    """Rollbacks out of plain data."""
    return [Rollback(**row) for row in rows]


def plain(rollbacks: Iterable[Rollback]) -> list[dict[str, Any]]:
    """Rollbacks as plain data."""
    return [asdict(one) for one in rollbacks]


def write(run_dir: str | Path, rollbacks: Sequence[Rollback]) -> None:
    """Put down the rollbacks of a run, whole or not at all."""
    write_json(Path(run_dir) / FILE, plain(rollbacks))


def carry_out(run_dir: str | Path) -> None:
    """Delete the checkpoints that a rollback has undone. For the job that holds the lease, before it looks for one."""
    rollbacks = read(run_dir)
    for saved in checkpoint.complete(run_dir) if rollbacks else ():
        if undone(saved.step, len(saved.manifest.get("rollbacks", ())), rollbacks):
            checkpoint.discard(saved)
            log.info("checkpoint of step %d was deleted: a loss spike made the run go back further", saved.step)
