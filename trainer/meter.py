"""Adds up what the steps since the last log line did, and turns it into metrics over all ranks."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from data.collate import Batch
from trainer import cards, distributed
from trainer.step import Outcome


@dataclass
class Meter:
    """Figures of one rank between two log lines.

    flops_per_token: arithmetic of forward and backward of one token, without replays: 6 x the parameters that take
    part in matrix products (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    """

    device: torch.device
    flops_per_token: float
    waited: float = 0.0
    _outcomes: list[Outcome] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)
    _last_batch: float = 0.0

    def add(self, outcome: Outcome, batch: Batch) -> None:
        self._outcomes.append(outcome)
        self._last_batch = batch_hash(batch.record_ids)

    def pause(self) -> None:
        """Forget the time since the last log line: it held a save or an evaluation."""
        self._since = time.perf_counter()
        self.waited = 0.0
        self._outcomes.clear()

    def take(self, batch_size: int, steps_left: int) -> dict[str, float]:
        """Metrics of the steps since the last call, over all ranks; then start anew. A collective."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        outcomes, world = self._outcomes, distributed.world()
        count, elapsed = len(outcomes), time.perf_counter() - self._since
        names = list(outcomes[0].figures)
        figures = [float(sum(outcome.figures[name].item() for outcome in outcomes)) for name in names]
        seconds = [
            sum(getattr(outcome.seconds, part) for outcome in outcomes) for part in ("encode", "loss", "backward")
        ]
        seconds.append(sum(outcome.optimizer_seconds for outcome in outcomes))
        tokens = [float(sum(o.tokens for o in outcomes)), float(sum(o.computed_tokens for o in outcomes))]
        totals = distributed.sums([*figures, *seconds, *tokens, self.waited, elapsed, self._last_batch])
        *totals, last_batch = totals
        means = [total / (world * count) for total in totals]
        row = dict(zip(names, means, strict=False))
        row |= dict(zip(_TIMES, means[len(names) :], strict=False))
        token_count, computed, waited, total_elapsed = totals[len(names) + len(_TIMES) :]
        row |= {
            "perf/samples_per_s": count * batch_size / elapsed,
            "perf/samples_per_s_per_gpu": count * batch_size / elapsed / world,
            "perf/tokens_per_s": token_count / elapsed,
            "perf/step_s": elapsed / count,
            "perf/data_wait_frac": waited / total_elapsed,
            "perf/mem_gib": _peak_memory(self.device) / 2**30,
            "perf/eta_h": steps_left * elapsed / count / 3600,
            "data/padding_frac": 1 - token_count / computed,
            "data/batch_hash": last_batch,
        }
        peak = peak_flops(self.device)
        if peak:
            row["perf/mfu"] = self.flops_per_token * token_count / elapsed / (peak * world)
        self.pause()
        return row


def batch_hash(record_ids: np.ndarray) -> float:
    """A number that says which records a batch holds, whatever their order and however ranks divide them.

    The sum of 32-bit hashes (the finalizer of MurmurHash3): exact in a float up to two million records.
    """
    mixed = record_ids.astype(np.uint64)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
    return float((mixed >> np.uint64(32)).sum())


_TIMES = ("perf/encode_s", "perf/loss_s", "perf/backward_s", "perf/optimizer_s")


def _peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def peak_flops(device: torch.device) -> float:
    """Peak of dense bf16 products in FLOP/s; 0 where it is not known, and nothing has an MFU."""
    card = cards.named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card.bf16 if card else 0.0
