"""Measures how fast this machine trains, in twenty steps of the real engine; what trainer/estimate.py predicts with.

Two small encoders, narrow and wide, take steps of few and of many tokens, of short and of long texts, in few and in
many chunks, so that the terms of the model can be told apart. Its rates have the least sum of relative errors, are
never negative, and no product is faster than a bare one. Ranks of a job measure together: then the link between them is
measured, too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from data.collate import Batch
from data.errors import UserError
from data.tokens import Ragged
from trainer import costs, distributed, losses, objectives
from trainer.costs import Compute, Shape
from trainer.device import full_products
from trainer.encoder import Encoder, build_random
from trainer.engine import Engine, OptimizerSettings
from trainer.estimate import Links, Rates, collective_seconds, update_bytes
from trainer.step import Stepper

FORMAT = 1
DROPOUT, PADDING = 0.1, 0
SHAPES = (Shape(2, 128, 2, 512, 120_000, 512, 2), Shape(2, 512, 8, 2048, 4_000, 512, 2))
REPEATS = 2
_RING_BYTES = 64 << 20


@dataclass(frozen=True)
class Kind:
    """Steps of one kind: pairs of texts of equal length, and the tokens of a chunk."""

    pairs: int
    length: int
    chunk: int


# With two shapes and two repeats these are 20 steps. A GPU gets more pairs and longer chunks: `_scaled`.
KINDS = (Kind(2, 8, 2048), Kind(64, 16, 2048), Kind(8, 128, 2048), Kind(32, 16, 128), Kind(16, 64, 1024))


@dataclass(frozen=True)
class Sample:
    """What steps of one kind took at best, collectives included; `costs` are the counts that the rates belong to."""

    shape: str
    kind: Kind
    seconds: float
    costs: tuple[float, ...]


Clock = Callable[[], float]


def measure(precision: str, device: torch.device, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Take the twenty steps; the content of a calibration. Collective.

    Args:
        clock: in seconds. `time.process_time` is the steadier one of ranks of one thread on a busy machine.
    """
    links = _measure_links(device, clock) if distributed.world() > 1 else None
    samples = [sample for shape in SHAPES for sample in _steps(shape, precision, device, links, clock)]
    least = np.array([1 / _product_rate(precision, device, clock), 0.0, 0.0, 0.0, 0.0])
    found = fit(np.array([s.costs for s in samples]), np.array([s.seconds for s in samples]), least)
    products, elements, layer_pass, update, step = (float(value) for value in found)
    rates = Rates(
        products=1 / products,
        elements=1 / max(elements, 1e-30),
        layer_pass=layer_pass,
        loss=_loss_rate(device, clock),
        update=1 / max(update, 1e-30),
        step=step,
    )
    fitted = np.array([s.costs for s in samples]) @ found
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "ranks": distributed.world(),
        "memory": _memory(device),
        "rates": asdict(rates),
        "links": None if links is None else asdict(links),
        "steps": [{**asdict(s), "fitted": float(f)} for s, f in zip(samples, fitted, strict=True)],
        "torch": torch.__version__,
    }


def read(file: str) -> dict[str, Any]:
    """A calibration that `measure` wrote. Raises UserError for what is none."""
    mend = "write one with quintet plan measure=FILE"
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        rates = Rates(**{name: float(value) for name, value in content["rates"].items()})
        links = content["links"] and Links(**content["links"])
        sound = content["format"] == FORMAT and all(math.isfinite(rate) and rate >= 0 for rate in vars(rates).values())
        sound = sound and min(rates.products, rates.elements, rates.loss, rates.update) > 0
        content = {**content, "rates": rates, "links": links, "memory": float(content["memory"])}
    except OSError as error:
        raise UserError(f"measured={file}: cannot be read ({error.strerror}); {mend}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"measured={file}: is no calibration ({type(error).__name__}: {error}); {mend}") from None
    if not sound:
        raise UserError(f"measured={file}: is of another version, or has rates that cannot be; {mend}")
    return content


def fit(costs: np.ndarray, seconds: np.ndarray, least: np.ndarray) -> np.ndarray:
    """The x >= least with the least sum of relative errors of costs @ x against seconds: [n, k], [n], [k] -> [k].

    Least absolute errors, so that a step which other work on the machine held up counts little; as a linear programme
    (Charnes, Cooper and Ferguson 1955, "Optimal estimation of executive compensation by linear programming"): an error
    for each step is at least the difference in either direction.
    """
    from scipy.optimize import linprog

    relative = costs / seconds[:, None]
    scale = np.maximum(np.abs(relative).max(0), 1e-300)
    rows, steps, unknowns = relative / scale, *costs.shape
    errors = np.eye(steps)
    found = linprog(
        np.concatenate([np.zeros(unknowns), np.ones(steps)]),
        A_ub=np.block([[rows, -errors], [-rows, -errors]]),
        b_ub=np.concatenate([np.ones(steps), -np.ones(steps)]),
        bounds=[*((low, None) for low in least * scale), *((0, None) for _ in range(steps))],
    )
    return np.asarray(found.x[:unknowns] / scale)


def texts(lengths: np.ndarray, vocabulary: int, seed: int) -> Batch:
    """A rank's batch of random token ids, all texts different; `lengths` of the queries, then of the passages."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(5, vocabulary, int(lengths.sum())).astype(np.int32)
    pairs = len(lengths) // 2
    numbers = np.arange(pairs) + 2 * pairs * distributed.rank()
    return Batch(Ragged(ids, lengths.astype(np.int32)), pairs, 0, numbers, numbers + pairs, numbers)


def stepper(shape: Shape, precision: str, device: torch.device, compute: Compute, zero_stage: int = 1) -> Stepper:
    """The step that `quintet pretrain` takes, on random weights of this shape."""
    torch.manual_seed(0)
    sizes = shape.config
    vocabulary, dropout = sizes.pop("vocab_size"), DROPOUT * compute.dropout
    backbone = build_random(
        *("bert", vocabulary, PADDING), **sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    settings = OptimizerSettings(weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    bf16 = precision == "bf16"
    stage = costs.stage_that_runs(zero_stage, distributed.world())
    engine = Engine(Encoder(backbone).train(), settings, stage=stage, local_batch=1, device=device, bf16=bf16)
    objective = partial(objectives.contrastive, temperature=0.05)
    return Stepper(engine, objective, 0, PADDING, compute.tokens_per_chunk, math.inf, compute.packed)


def best_seconds(run: Callable[[], object], device: torch.device, repeats: int, clock: Clock) -> float:
    """The shortest of some runs, each as long as the slowest rank takes. Collective."""
    return min(_seconds(run, device, clock) for _ in range(repeats))


def _seconds(run: Callable[[], object], device: torch.device, clock: Clock) -> float:
    distributed.barrier()
    begin = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return distributed.agree_max(int(1e6 * (clock() - begin))) / 1e6


def _steps(shape: Shape, precision: str, device: torch.device, links: Links | None, clock: Clock) -> list[Sample]:
    """Steps of every kind; one more of each comes first and is not counted."""
    step = stepper(shape, precision, device, _compute(KINDS[0], precision, device))
    world, stage, samples = distributed.world(), step.engine.stage, []
    for kind in (_scaled(kind, device) for kind in KINDS):
        compute = _compute(kind, precision, device)
        lengths = np.full(2 * kind.pairs, kind.length, np.int32)
        batch = texts(lengths, shape.vocabulary, distributed.rank())
        step.tokens_per_chunk = kind.chunk
        run = partial(step, batch, 0, 1e-4)
        run()
        seconds = best_seconds(run, device, REPEATS, clock)
        sent = costs.collectives(
            trained=shape.parameters, gathered=world * kind.pairs, size=shape.hidden, zero_stage=stage, world=world
        )
        if links is not None:
            seconds -= collective_seconds(sent, shape.parameters, links, world)
        work = costs.work(shape, lengths, compute)
        moved = work.weights + update_bytes(shape.words, shape.parameters, stage, world)
        counts = (work.flop, work.elements, float(work.passes), moved, 1.0)
        samples.append(Sample(f"{shape.layers} x {shape.hidden}", kind, max(seconds, 1e-6), counts))
    return samples


def _scaled(kind: Kind, device: torch.device) -> Kind:
    return Kind(32 * kind.pairs, kind.length, 16 * kind.chunk) if device.type == "cuda" else kind


def _compute(kind: Kind, precision: str, device: torch.device) -> Compute:
    half = precision == "bf16"
    if device.type == "cpu":
        return costs.Compute("cpu", kind.chunk, half=half, dropout=True)
    return costs.Compute("gpu", kind.chunk, half=half, dropout=True, packed=half)


def _product_rate(precision: str, device: torch.device, clock: Clock, size: int = 512) -> float:
    """FLOP/s of a bare product of the wider encoder's."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows = 2048 if device.type == "cpu" else 32_768
    left = torch.randn(rows, size, device=device, dtype=dtype)
    right = torch.randn(size, 4 * size, device=device, dtype=dtype)
    torch.mm(left, right)
    return 2.0 * rows * size * 4 * size / best_seconds(partial(torch.mm, left, right), device, 10, clock)


def _loss_rate(device: torch.device, clock: Clock, pairs: int = 1024, size: int = 256) -> float:
    """FLOP/s of the loss stage on one rank's queries, masks and softmax included."""
    pairs *= 8 if device.type == "cuda" else 1
    numbers = torch.arange(pairs, device=device)
    identity = losses.Identity(numbers, numbers, numbers + pairs, numbers)
    query, passage = (torch.nn.functional.normalize(torch.randn(pairs, size, device=device), dim=1) for _ in range(2))

    def run() -> None:
        with full_products():
            losses.info_nce(query.requires_grad_(), passage.requires_grad_(), identity, temperature=0.05)

    run()
    return costs.loss_flop(pairs, pairs, size) / best_seconds(run, device, 3, clock)


def _measure_links(device: torch.device, clock: Clock) -> Links:
    """Of these ranks, taken as one node: by all-reduces of 64 MiB, and of 4 bytes."""
    world = distributed.world()
    large, small = (torch.zeros(count, device=device) for count in (_RING_BYTES // 4, 1))
    for tensor in (large, small):
        distributed.sum_in_place(tensor)
    seconds = best_seconds(partial(distributed.sum_in_place, large), device, 3, clock)
    hop = best_seconds(partial(distributed.sum_in_place, small), device, 10, clock) / (2 * (world - 1))
    sent = 2 * (world - 1) / world * _RING_BYTES
    return Links(node=sent / seconds, network=sent / seconds, per_node=world, hop=hop)


def _memory(device: torch.device) -> float:
    """Bytes that one rank has: of its GPU, or its part of the host's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(psutil.virtual_memory().total) / distributed.place().local_world


def spread(samples: Sequence[dict[str, Any]]) -> float:
    """How far the worst of the twenty steps is from what the rates give for it, as a share."""
    return max(abs(sample["fitted"] / sample["seconds"] - 1) for sample in samples)
