"""What `quintet plan` predicts beside what this machine does, on one rank and on two, at other sizes than it measured.

The twenty steps of `quintet plan measure=` come first, in the same processes; then steps of every case on natural
lengths, each one's shortest of some; in bf16 only where the processor has products of it. Ranks have one thread and
times are CPU times, of the rank that takes longest: on a quiet machine that is the wall clock, and on a busy one it is
steadier.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import table, target

SEED, WORLDS = 7, (1, 2)


@dataclass(frozen=True)
class Case:
    """An encoder and a global batch of natural lengths; `replayed`: no graph is kept."""

    layers: int
    hidden: int
    vocabulary: int
    pairs: int
    precision: str = "fp32"
    chunk: int = 2048
    dropout: float = 0.1
    replayed: bool = False

    def __str__(self) -> str:
        more = f"{', replayed' if self.replayed else ''}{'' if self.dropout else ', no dropout'}"
        return f"{self.precision}, {self.layers} x {self.hidden}, {self.vocabulary:,} pieces, {self.pairs} pairs{more}"


CASES = (
    Case(4, 192, 32_000, 128),
    Case(4, 192, 32_000, 128, replayed=True),
    Case(4, 192, 32_000, 128, dropout=0.0),
    Case(6, 256, 60_000, 64, chunk=512),
    Case(12, 384, 30_522, 32),
    Case(2, 384, 250_002, 32),
    Case(2, 768, 30_522, 32),
    Case(4, 192, 32_000, 128, "bf16"),
    Case(6, 256, 60_000, 64, "bf16", chunk=512),
    Case(12, 384, 30_522, 32, "bf16"),
    Case(2, 384, 250_002, 32, "bf16"),
    Case(2, 768, 30_522, 32, "bf16"),
)
QUICK = (Case(1, 64, 500, 8), Case(1, 64, 500, 8, "bf16"))


def measure(quick: bool = False) -> dict[str, Any]:
    """Calibrate, run and predict, for each number of ranks in processes of their own."""
    from trainer.device import has_fast_bf16

    cases, repeats = (QUICK, 1) if quick else (CASES, 2)
    cases = tuple(case for case in cases if case.precision == "fp32" or has_fast_bf16("cpu"))
    tables, targets, calibrations = [], [], {}
    for world in WORLDS:
        print(f"plan: {world} ranks ...", flush=True)
        found = _on_ranks(world, cases, repeats)
        calibrations[f"{world} ranks"] = found["calibrations"]
        tables.append(table(f"a step on {world} ranks, seconds", found["rows"]))
        worst = max(abs(float(row["predicted / measured"]) - 1) for row in found["rows"])
        targets.append(target(f"largest error, {world} ranks", 0.25, worst, at_most=True))
    return {
        "settings": {"cases": [asdict(case) for case in cases], "repeats": repeats},
        "calibrations": calibrations,
        "tables": tables,
        "targets": targets,
    }


def _on_ranks(world: int, cases: tuple[Case, ...], repeats: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, mp_context=context) as pool:
        ranks = [pool.submit(_rank, rank, world, folder, cases, repeats) for rank in range(world)]
        return next(each.result() for each in ranks)


def _rank(rank: int, world: int, folder: str, cases: tuple[Case, ...], repeats: int) -> dict[str, Any]:
    """One rank: for each precision the calibration, then every case measured and predicted."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    import torch

    from trainer import calibrate, distributed

    torch.set_num_threads(1)
    device = torch.device("cpu")
    distributed.start(device, 600, f"file://{Path(folder) / 'meet'}")
    content, rows = {}, []
    for precision in dict.fromkeys(case.precision for case in cases):
        content[precision] = calibrate.measure(precision, device, time.process_time)
        rows += [_compare(case, world, content[precision], repeats) for case in cases if case.precision == precision]
    distributed.stop()
    return {"calibrations": content, "rows": rows}


def _compare(case: Case, world: int, content: dict[str, Any], repeats: int) -> dict[str, object]:
    import math
    from functools import partial

    import torch

    from trainer import calibrate, costs, distributed
    from trainer.estimate import Job, Links, Rates, predict

    device = torch.device("cpu")
    shape = costs.Shape(case.layers, case.hidden, case.hidden // 64, 4 * case.hidden, case.vocabulary, 512, 2)
    compute = costs.Compute("cpu", case.chunk, half=case.precision == "bf16", dropout=case.dropout > 0)
    budget = 0.0 if case.replayed else math.inf
    law = costs.Law((12, 0.6), (70, 0.9), 128)
    lengths = costs.draw(law, case.pairs, 0, SEED)
    job = Job(shape, shape.parameters, lengths, case.pairs, 0, compute, 1, (case.hidden,), budget)
    step = calibrate.stepper(shape, case.precision, device, compute)
    step.memory_budget = budget
    batch = calibrate.texts(job.shares(world)[distributed.rank()], case.vocabulary, SEED)
    run = partial(step, batch, 0, 1e-4)
    run()
    seconds = calibrate.best_seconds(run, device, repeats, time.process_time)
    links = Links(**content["links"]) if content["links"] else Links(1.0, 1.0, 1, 0.0)
    predicted = predict(job, world, Rates(**content["rates"]), links, content["memory"])
    largest = max(predicted.seconds, key=predicted.seconds.__getitem__)
    return {
        "case": str(case),
        "measured": round(seconds, 4),
        "predicted": round(predicted.step, 4),
        "predicted / measured": round(predicted.step / seconds, 3),
        "limited by": f"{largest}, {predicted.seconds[largest] / predicted.step:.0%}",
    }
