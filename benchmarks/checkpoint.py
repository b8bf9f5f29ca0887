"""A checkpoint beside the training: for how long no step is taken, and what the write costs the steps beside it.

The real engine and writer, on models of the sizes of multilingual E5. Beside them, in the same run, the same state is
written by torch.save while the training waits, as trainers do that know no other way.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.common import in_child, table, target
from trainer import calibrate, checkpoint, costs, distributed, snapshot
from trainer.device import keep_freed_memory
from trainer.engine import MOMENTS

EVERY_SECONDS = 600.0


@dataclass(frozen=True)
class Case:
    """An encoder, and the pairs of a step beside which its checkpoint is written."""

    shape: costs.Shape
    pairs: int = 64
    length: int = 64


CASES = {
    "multilingual-e5-small": Case(costs.PUBLISHED["microsoft/Multilingual-MiniLM-L12-H384"]),
    "multilingual-e5-base": Case(costs.PUBLISHED["FacebookAI/xlm-roberta-base"], pairs=16),
}
QUICK = {"tiny": Case(costs.Shape(1, 64, 1, 128, 500, 70), pairs=4, length=8)}


def measure(quick: bool = False) -> dict[str, Any]:
    """Each model in a process of its own."""
    cases = QUICK if quick else CASES
    rows = [{"model": name, **in_child(_measure, case)} for name, case in cases.items()]
    shares = [float(row["stall, s"]) / EVERY_SECONDS for row in rows]
    return {
        "settings": {name: asdict(case) for name, case in cases.items()} | {"every, s": EVERY_SECONDS},
        "tables": [table("one checkpoint", rows)],
        "targets": [target("largest stall, of the time between checkpoints", 0.02, max(shares), at_most=True)],
    }


def _measure(case: Case) -> dict[str, object]:
    device = torch.device("cpu")
    keep_freed_memory()
    distributed.start(device, 60)
    compute = costs.Compute("cpu", 2048, half=False, dropout=True)
    stepper = calibrate.stepper(case.shape, "fp32", device, compute)
    lengths = [case.length] * 2 * case.pairs
    batch = calibrate.texts(torch.tensor(lengths).numpy(), case.shape.vocabulary, 0)

    def step() -> float:
        begin = time.perf_counter()
        stepper(batch, 0, 1e-5)
        return time.perf_counter() - begin

    step()
    alone = min(step() for _ in range(3))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")), unk_token="[UNK]"
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        begin = time.perf_counter()
        write = snapshot.take(stepper.engine, tokenizer, lambda folder: None)
        saving = checkpoint.Saving(folder, 1, write, {})
        stall = time.perf_counter() - begin
        beside = []
        while not saving.written:
            beside.append(step())
        written = time.perf_counter()
        saved = saving.publish()
        stall += time.perf_counter() - written
        return {
            "parameters": stepper.engine.count,
            "GB": saved.bytes / 1e9,
            "stall, s": stall,
            "of 10 minutes": stall / EVERY_SECONDS,
            "written after, s": written - begin,
            "steps beside it": len(beside),
            "longer by": sum(beside) / (len(beside) * alone) - 1 if beside else 0.0,
            "in the step, torch.save, s": _in_the_step(stepper.engine, Path(folder)),
        }


def _in_the_step(engine: Any, folder: Path) -> float:
    """The same state by torch.save, synced, while the training waits."""
    begin = time.perf_counter()
    state = {name: engine.weight(name) for name in engine.shapes}
    state |= {f"{key}/{name}": engine.moment(name, key) for name in engine.trained() for key in MOMENTS}
    with (folder / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        checkpoint.sync(Path(file.name))
    return time.perf_counter() - begin
