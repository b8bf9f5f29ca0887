"""How long a step takes, from what it costs (trainer/costs.py) and how fast a machine is: pure functions, in seconds.

Time is a sum, since nothing of a step overlaps: DeepSpeed's overlap is off, and ranks meet between the phases. Each
term is a count over a rate; the rates are measured by trainer/calibrate.py, or assumed from a card's data sheet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from trainer import balance, costs
from trainer.cards import Card
from trainer.costs import FP32, Compute, Lengths, Shape, Work, state_parts
from trainer.device import GRAPHS_SHARE

# Bytes that the update moves for each trained parameter, by reading the code of the step in fp32: the gradient; what a
# rank updates itself, the norm, the clipping and AdamW (4 read, 3 written). Several ranks divide the gradient, and copy
# it into a bucket and back, but ZeRO reduces a tensor larger than a bucket where it lies: the word table of XLM-R.
# Where the optimizer is shared out, a rank copies its part of the gradient, and the new weights.
UPDATE_GRADIENT, UPDATE_OWN, UPDATE_DIVISION, UPDATE_BUCKET, UPDATE_PART = 16, 40, 8, 16, 16
BUCKET = 50_000_000  # numbers in one reduction; trainer/engine.py


@dataclass(frozen=True)
class Rates:
    """How fast one rank is.

    products: FLOP/s of the encoder's products. elements: numbers/s written between them. layer_pass: seconds that one
    chunk's way through one layer takes however small it is. loss: FLOP/s of the loss's products. update: bytes/s of
    weights, gradients and moments that are moved. step: seconds of what a step does once.
    """

    products: float
    elements: float
    layer_pass: float
    loss: float
    update: float
    step: float


@dataclass(frozen=True)
class Links:
    """How fast ranks exchange.

    node: bytes/s that a rank sends inside its node. network: bytes/s that a node sends to the others. per_node: ranks
    of a node. hop: seconds from one rank to the next, however little is sent.
    """

    node: float
    network: float
    per_node: int
    hop: float

    def bandwidth(self, world: int) -> float:
        """Bytes/s of a ring over `world` ranks: it leaves a node once, so the slower of the two links decides."""
        return self.node if world <= self.per_node else min(self.node, self.network)


# What a card is assumed to reach of its data sheet where nothing was measured. Products, memory and layer passes
# together are within 25% of the six encodings in benchmarks/results/gpu-2026-11-26.json (H100, forward, bf16;
# tests/test_plan.py); those of the loss, of the links and of a step are guesses.
PRODUCTS_SHARE, MEMORY_SHARE, LINK_SHARE = 0.6, 0.8, 0.8
ELEMENT_BYTES = 6  # a number read and written, partly in bf16
GPU_LAYER_PASS, GPU_STEP, GPU_HOP = 4e-4, 0.01, 5e-6


def assumed(card: Card, *, half: bool, tf32: bool) -> Rates:
    """Rates of a card that nobody has measured."""
    peak = card.bf16 if half else (tf32 and card.tf32) or card.fp32
    memory = MEMORY_SHARE * card.bandwidth
    return Rates(
        products=PRODUCTS_SHARE * peak,
        elements=memory / ELEMENT_BYTES,
        layer_pass=GPU_LAYER_PASS,
        loss=PRODUCTS_SHARE * card.fp32,  # never TF32: see trainer/device.py
        update=memory,
        step=GPU_STEP,
    )


def encoder_seconds(work: Work, rates: Rates) -> dict[str, float]:
    """Of one rank's encoder in one step, by what they go into."""
    return {
        "encoder products": work.flop / rates.products,
        "between the products": work.elements / rates.elements,
        "calls": work.passes * rates.layer_pass,
        "weights of each chunk": work.weights / rates.update,
    }


def update_bytes(words: int, trained: int, zero_stage: int, world: int) -> float:
    """Bytes that the optimizer of one rank moves, of `trained` parameters with `words` of them in the word table."""
    own = trained if zero_stage == 0 else trained / world
    moved = UPDATE_GRADIENT * trained + UPDATE_OWN * own
    if world > 1:
        in_buckets = trained - (words if zero_stage and words > BUCKET else 0)
        moved += UPDATE_DIVISION * trained + UPDATE_BUCKET * in_buckets
    return float(moved + (UPDATE_PART * own if zero_stage else 0))


def collective_seconds(sent: dict[str, float], trained: int, links: Links, world: int) -> float:
    """All of a step's collectives, one after the other: a ring of W - 1 hops each, buckets of the gradient apart."""
    if world == 1:
        return 0.0
    calls = len(sent) + math.ceil(trained / BUCKET)
    return sum(sent.values()) / links.bandwidth(world) + calls * (world - 1) * links.hop


def bucket_bytes(trained: int, zero_stage: int) -> float:
    """Bytes of the buffer that gradients are reduced in."""
    return float(FP32 * min(BUCKET, trained)) if zero_stage else 0.0


# --- a whole step -------------------------------------------------------------------------------------------------

CUDA_BYTES = float(1 << 30)  # what CUDA, its kernels and NCCL take of a card beside tensors; a guess
# Of the largest chunk's graph: what its backward takes beside it. An H100 held 43 GiB beside its state where the two
# chunks that it kept have some 40 (12 x 768, benchmarks/LOG.md).
BACKWARD_SHARE = 0.25


@dataclass(frozen=True)
class Job:
    """What is trained. lengths: those of the whole batch, queries first; sizes: of the embeddings that get a loss.

    budget: bytes for graphs that are kept, None for GRAPHS_SHARE of what is free. gathered_queries: whether these are
    exchanged, too. directions: 2 where passages look for their queries as well.
    """

    shape: Shape
    trained: int
    lengths: Lengths
    batch: int
    negatives: int
    compute: Compute
    zero_stage: int
    sizes: tuple[int, ...]
    budget: float | None = None
    gathered_queries: bool = False
    directions: int = 1

    def shares(self, world: int) -> list[Lengths]:
        """The lengths of each rank's texts, queries first, as trainer/balance.py deals the pairs."""
        queries, positives, negatives = np.split(self.lengths, [self.batch, 2 * self.batch])
        pairs = np.column_stack([queries, positives, negatives.reshape(self.batch, self.negatives)])
        owner = balance.owners(pairs.sum(1, dtype=np.int64), world)
        parts = (np.split(pairs[owner == rank], [1, 2], axis=1) for rank in range(world))
        return [np.concatenate([side.reshape(-1) for side in part]) for part in parts]


@dataclass(frozen=True)
class Prediction:
    """A step on `world` ranks.

    seconds: of the slowest rank, by part. memory: bytes of a rank, by part. sent: bytes that a rank sends, by what for.
    imbalance: of the slowest rank's encoder over the mean, less 1. replayed: share of chunks that go forward twice.
    """

    world: int
    seconds: dict[str, float]
    memory: dict[str, float]
    sent: dict[str, float]
    imbalance: float
    replayed: float
    tokens: int

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())


def predict(job: Job, world: int, rates: Rates, links: Links, memory: float) -> Prediction:
    """The step of `job` on `world` ranks that have `memory` bytes each."""
    stage = costs.stage_that_runs(job.zero_stage, world)
    state = state_parts(job.shape.parameters, stage, world)
    state["bucket"] = bucket_bytes(job.trained, stage)
    reserved = 0.0 if job.compute.kind == "cpu" else CUDA_BYTES
    share = GRAPHS_SHARE["cpu" if job.compute.kind == "cpu" else "cuda"]
    budget = share * max(0.0, memory - state["weights"] - reserved) if job.budget is None else job.budget
    works = [costs.work(job.shape, lengths, job.compute, budget) for lengths in job.shares(world)]
    times = [sum(encoder_seconds(work, rates).values()) for work in works]
    slowest = works[max(range(world), key=times.__getitem__)]
    rows, size = job.batch // world, job.shape.hidden
    texts = rows * (2 + job.negatives)
    gathered = job.batch * (1 + job.negatives + job.gathered_queries)
    sent = costs.collectives(
        trained=job.trained,
        gathered=gathered,
        size=size,
        zero_stage=stage,
        world=world,
        passes=slowest.passes / job.shape.layers,
    )
    compared = job.directions * costs.loss_flop(rows, gathered, sum(job.sizes))
    seconds = encoder_seconds(slowest, rates) | {
        "loss": compared / rates.loss,
        "collectives": collective_seconds(sent, job.trained, links, world),
        "optimizer": update_bytes(job.shape.words, job.trained, stage, world) / rates.update + rates.step,
    }
    held = {
        "graphs": max(max(work.held, work.largest) for work in works),  # of a replay, where none is kept
        "a chunk's backward": BACKWARD_SHARE * max(work.largest for work in works),
        "embeddings and loss": costs.pool_bytes(rows, texts, gathered, size),
        "CUDA": reserved,
    }
    mean = sum(times) / world
    replayed = 1 - sum(work.kept for work in works) / sum(work.chunks for work in works)
    tokens = sum(work.tokens for work in works)
    return Prediction(world, seconds, state | held, sent, max(times) / mean - 1, replayed, tokens)
