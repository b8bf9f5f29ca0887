"""Adds up what the steps since the last log line did, and turns it into metrics over all ranks."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch

from data import fetch
from data.collate import Batch
from trainer import cards, distributed
from trainer.step import Outcome


@dataclass
class Meter:
    """Figures of one rank between two log lines.

    flops_per_token: arithmetic of forward and backward of one token, without replays: 6 x the parameters that take
    part in matrix products (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    peak: FLOP/s of this rank's device; 0 where it is not known, and there is no MFU.
    waited, met: seconds in which there was no batch, and in which the other ranks were waited for before a step.
    """

    device: torch.device
    flops_per_token: float
    peak: float = 0.0
    waited: float = 0.0
    met: float = 0.0
    away: float = field(default_factory=lambda: _age())  # of the seconds of this process, those not in steps
    _outcomes: list[Outcome] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)
    _last_batch: float = 0.0

    def __post_init__(self) -> None:
        _machine()  # the first answer is of no time at all

    def add(self, outcome: Outcome, batch: Batch) -> None:
        self._outcomes.append(outcome)
        self._last_batch = batch_hash(batch.record_ids)

    def pause(self, seconds: float = 0.0) -> None:
        """Forget the time since the last log line: it held a save or an evaluation, which took so many seconds."""
        self.away += seconds
        self._since = time.perf_counter()
        self.waited = self.met = 0.0
        self._outcomes.clear()

    def take(self, batch_size: int, steps_left: int) -> dict[str, float]:
        """Metrics of the steps since the last call, over all ranks; then start anew. A collective."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        outcomes, world = self._outcomes, distributed.world()
        count, elapsed = len(outcomes), time.perf_counter() - self._since
        names = list(outcomes[0].figures)
        figures = [float(sum(outcome.figures[name].item() for outcome in outcomes)) for name in names]
        seconds = [self.waited, self.met, *(sum(_seconds(o)[part] for o in outcomes) for part in range(len(_PARTS)))]
        tokens = [float(sum(o.tokens for o in outcomes)), float(sum(o.computed_tokens for o in outcomes))]
        mine = [*figures, *seconds, *tokens, elapsed, float(fetch.retries()), self._last_batch]
        totals = distributed.sums([*mine, *_in_own_place([float(outcomes[-1].tokens), *_machine()])])
        totals, places = totals[: len(mine)], totals[len(mine) :]
        means = [total / (world * count) for total in totals]
        row = dict(zip(names, means, strict=False))
        row |= (times := dict(zip(_TIMES, means[len(names) :], strict=False)))
        token_count, computed, total_elapsed, retries, last_batch = totals[len(names) + len(_TIMES) :]
        step_seconds = total_elapsed / (world * count)
        row |= {
            "perf/other_s": step_seconds - sum(times.values()) + times["perf/gather_s"],
            "perf/samples_per_s": count * batch_size / elapsed,
            "perf/samples_per_s_per_gpu": count * batch_size / elapsed / world,
            "perf/tokens_per_s": token_count / elapsed,
            "perf/step_s": step_seconds,
            "perf/data_wait_frac": times["perf/data_s"] / step_seconds,
            "perf/mem_gib": _peak_memory(self.device) / 2**30,
            "perf/eta_h": steps_left * elapsed / count / 3600,
            "data/padding_frac": 1 - token_count / computed,
            "data/token_spread": _spread(places[0::3]),
            "data/retries": retries,
            "data/batch_hash": last_batch,
            "run/goodput": 1 - self.away / _age(),
        }
        row |= _nodes(places[1::3], places[2::3])
        if self.peak:
            row["perf/mfu"] = self.flops_per_token * token_count / elapsed / (self.peak * world)
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


# What a step consists of, in order; the gather is a part of the loss.
_PARTS = ("perf/encode_s", "perf/loss_s", "perf/gather_s", "perf/backward_s", "perf/optimizer_s")
_TIMES = ("perf/data_s", "perf/meet_s", *_PARTS)


def _seconds(outcome: Outcome) -> tuple[float, ...]:
    """Those of _PARTS in one step of this rank."""
    seconds = outcome.seconds
    return seconds.encode, seconds.loss, outcome.gather_seconds, seconds.backward, outcome.optimizer_seconds


def _age() -> float:
    """Seconds since this process began."""
    return time.time() - psutil.Process().create_time()


def _in_own_place(values: list[float]) -> list[float]:
    """The values at this rank's place among zeros: summed over ranks, they are those of every rank side by side."""
    rank, count = distributed.rank(), len(values)
    return [0.0] * (rank * count) + values + [0.0] * ((distributed.world() - rank - 1) * count)


def _machine() -> list[float]:
    """This machine's busy share of its cores since the last call, and the share of its memory in use.

    0 from all ranks of a machine but the first, who speaks for it.
    """
    if distributed.place().local_rank:
        return [0.0, 0.0]
    return [psutil.cpu_percent(interval=None) / 100, psutil.virtual_memory().percent / 100]


def _nodes(busy: list[float], memory: list[float]) -> dict[str, float]:
    """Metrics of every machine, numbered by its lowest rank: those that have spoken are those with memory in use."""
    machines = [(cpu, used) for cpu, used in zip(busy, memory, strict=True) if used]
    row: dict[str, float] = {}
    for number, (cpu, used) in enumerate(machines):
        row |= {f"node/{number}/cpu_frac": cpu, f"node/{number}/mem_frac": used}
    return row


def _spread(tokens: list[float]) -> float:
    """How much more than the mean the rank with the most has."""
    return max(tokens) * len(tokens) / sum(tokens) - 1


def _peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def peak_flops(device: torch.device) -> float:
    """Peak of dense bf16 products in FLOP/s; 0 where it is not known."""
    card = cards.named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card.bf16 if card else 0.0
