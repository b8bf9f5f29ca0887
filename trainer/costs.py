"""What one training step costs, counted: parameters, FLOP, elements touched, bytes held and bytes sent.

Pure functions of shapes and lengths. A product of [m, k] and [k, n] is 2 m k n FLOP; bytes are bytes, never bits. The
encoder is that of BERT and XLM-R: other families (MPNet) differ by their relative bias, which is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer import gradcache

Lengths = np.ndarray  # tokens of every text of a rank: int32 [texts]

FP32, BF16 = 4, 2
BLOCK_LOGITS, LEAST_BLOCK_ROWS = 4 << 20, 128  # of trainer/losses.py


@dataclass(frozen=True)
class Shape:
    """An encoder without a head: layers, sizes, and the rows of its three tables."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    types: int = 1

    @property
    def products(self) -> int:
        """Parameters of the matrix products: four of hidden x hidden and two of hidden x intermediate a layer."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)

    @property
    def words(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, without the pooler, which is no part of an embedding."""
        biases_and_norms = self.layers * (9 * self.hidden + self.intermediate) + 2 * self.hidden
        tables = (self.positions + self.types) * self.hidden
        return self.words + tables + self.products + biases_and_norms

    @property
    def config(self) -> dict[str, Any]:
        """The same in the names of transformers' configurations."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "type_vocab_size": self.types,
        }

    def trained(self, freeze_positions: bool) -> int:
        return self.parameters - (self.positions * self.hidden if freeze_positions else 0)


_SMALL, _BASE, _LARGE = (12, 384, 12, 1536), (12, 768, 12, 3072), (24, 1024, 16, 4096)

# The initial models of E5 and multilingual E5, from the config.json of each.
PUBLISHED = {
    "microsoft/MiniLM-L12-H384-uncased": Shape(*_SMALL, 30_522, 512, 2),
    "google-bert/bert-base-uncased": Shape(*_BASE, 30_522, 512, 2),
    "google-bert/bert-large-uncased-whole-word-masking": Shape(*_LARGE, 30_522, 512, 2),
    "microsoft/Multilingual-MiniLM-L12-H384": Shape(*_SMALL, 250_037, 512, 2),
    "FacebookAI/xlm-roberta-base": Shape(*_BASE, 250_002, 514),
    "FacebookAI/xlm-roberta-large": Shape(*_LARGE, 250_002, 514),
}


# --- texts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """Lengths as text from the web has them: lognormal, by median and sigma, cut at `longest`; 3 tokens at least."""

    query: tuple[float, float]
    passage: tuple[float, float]
    longest: int


def draw(law: Law, pairs: int, negatives: int, seed: int) -> Lengths:
    """Lengths of a rank's texts in the order of a batch: [pairs (2 + negatives)], queries first."""
    generator = np.random.default_rng(seed)
    counts = (pairs, pairs * (1 + negatives))
    sides = [
        generator.lognormal(math.log(median), sigma, count)
        for (median, sigma), count in zip((law.query, law.passage), counts, strict=True)
    ]
    return np.clip(np.round(np.concatenate(sides)), 3, law.longest).astype(np.int32)


# --- arithmetic --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    """How an encoder is run: on a "cpu" or a "gpu", packed (without padding) or not, in bf16 (half) or not."""

    kind: str
    tokens_per_chunk: int
    half: bool
    dropout: bool
    packed: bool = False

    @property
    def explicit_attention(self) -> bool:
        """Whether attention's weights are written out (trainer/attention.py)."""
        return self.kind == "cpu" and (self.dropout or self.half)

    @property
    def draw(self) -> int:
        """What a random number costs, in numbers written: a GPU's kernels draw it on the way (trainer/dropout.py)."""
        return 2 if self.kind == "cpu" else 1


@dataclass(frozen=True)
class Work:
    """What a rank's encoder does in one step, replays included.

    tokens: real ones. computed: with padding. flop: of the products, attention included. elements: numbers written
    between the products. passes: of one chunk through one layer, forward or backward. chunks, kept: all, and those
    whose graph is held until the backward. held: bytes of these graphs. largest: bytes that the graph of one chunk
    holds at most.
    """

    tokens: int
    computed: int
    flop: float
    elements: float
    passes: int
    weights: float
    chunks: int
    kept: int
    held: float
    largest: float


def work(shape: Shape, lengths: Lengths, compute: Compute, budget: float = math.inf) -> Work:
    """The step that trainer/step.py makes of these texts, with `budget` bytes for graphs that are kept.

    A chunk goes forward once, or twice where its graph is not kept, and backward once, with twice the forward's
    products (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    """
    chunks = gradcache.plan(lengths, compute.tokens_per_chunk, compute.packed)
    sizes = [lengths[rows].astype(np.int64) for rows in chunks]
    if not compute.packed:
        sizes = [np.full_like(found, found.max()) for found in sizes]
    tokens = np.array([found.sum() for found in sizes])
    squares = np.array([(found**2).sum() for found in sizes])
    held = np.array([saved(shape, int(t), int(s), compute) for t, s in zip(tokens, squares, strict=True)])
    kept = np.cumsum(held) <= budget  # the first chunks, of the longest texts
    forwards = np.where(kept, 1, 2)
    written = [elements(shape, int(n), int(s), compute) for n, s in zip(tokens, squares, strict=True)]
    there, back = np.array(written).T
    return Work(
        tokens=int(lengths.sum()),
        computed=int(tokens.sum()),
        flop=float(((forwards + 2) * flop(shape, tokens, squares)).sum()),
        elements=float((forwards * there + back).sum()),
        passes=int(shape.layers * (forwards + 1).sum()),
        weights=float(sum(weight_bytes(shape, int(times), compute) for times in forwards)),
        chunks=len(chunks),
        kept=int(kept.sum()),
        held=float(held[kept].sum()),
        largest=float(held.max()),
    )


def flop(shape: Shape, tokens: np.ndarray | int, squares: np.ndarray | int) -> np.ndarray | float:
    """FLOP of a forward pass: 2 a parameter of the products and token; attention's two products, 4 T hidden a token.

    `squares` is the sum of the squared lengths.
    """
    return 2.0 * shape.products * tokens + 4.0 * shape.layers * shape.hidden * squares


def elements(shape: Shape, tokens: int, squares: int, compute: Compute) -> tuple[float, float]:
    """Numbers that the operations between the products write, in a forward and in a backward pass.

    A layer and token: biases (5 hidden + intermediate), GELU (intermediate), the sums and norms of both halves
    (4 hidden); for attention that is written out scale, mask and softmax, each heads x T. Dropout of two hidden states
    and of those weights: `draw` in the forward pass, a product in the backward. All else counts the same in both.
    """
    written = shape.heads * squares if compute.explicit_attention else 0
    plain = (9 * shape.hidden + 2 * shape.intermediate) * tokens + 3 * written
    dropped = (2 * shape.hidden * tokens + written) * compute.dropout
    return float(shape.layers * (plain + compute.draw * dropped)), float(shape.layers * (plain + dropped))


def weight_bytes(shape: Shape, forwards: int, compute: Compute) -> float:
    """Bytes of the products' weights that one chunk moves beside its tokens.

    Its gradient is written and added to that of the chunks before (16 a parameter); in bf16 every forward pass casts
    the weights (6), and the gradient is cast back (6).
    """
    return float(shape.products * (16 + (6 * forwards + 6) * compute.half))


# Bytes that a layer holds for its backward: of every token for each number of the hidden state, for each intermediate
# one, and with dropout for each hidden one besides. Counted by saved-tensor hooks (trainer/gradcache.py) on a CPU under
# torch 2.13. Of a GPU the same with masks of a byte: derived, and never looked at.
_SAVED = {("cpu", False): (32, 8, 4), ("cpu", True): (24, 4, 4), ("gpu", False): (32, 8, 2), ("gpu", True): (24, 4, 2)}


def saved(shape: Shape, tokens: int, squares: int, compute: Compute) -> float:
    """Bytes that a forward pass of one chunk holds for its backward, beside the parameters.

    To `_SAVED` come each weight of attention that is written out, with two bytes of a mask, and under bf16 the cast
    weights of the products.
    """
    hidden, wide, masks = _SAVED[compute.kind, compute.half]
    dense = (hidden + masks * compute.dropout) * shape.hidden + wide * shape.intermediate
    number = BF16 if compute.half else FP32
    attention = (number + 2 * compute.dropout) * shape.heads * squares if compute.explicit_attention else 0
    weights = BF16 * shape.products if compute.half else 0
    return float(shape.layers * (dense * tokens + attention) + weights)


def loss_flop(rows: int, candidates: int, size: int) -> float:
    """FLOP of InfoNCE with both gradients: three products of [rows, size] and [candidates, size]."""
    return 6.0 * rows * candidates * size


# --- memory ------------------------------------------------------------------------------------------------------


def stage_that_runs(zero_stage: int, world: int) -> int:
    """The ZeRO stage of `world` ranks: one alone has nothing to share out, and would only pay for copies."""
    return zero_stage if world > 1 else 0


def state_parts(parameters: int, zero_stage: int, world: int) -> dict[str, float]:
    """Bytes of the fp32 state that one of `world` ranks holds.

    Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1, with 4 bytes a number, and two things more: gradients are
    added up over the chunks of a step before they are reduced, so that every rank holds them whole, and DeepSpeed's
    stages 1 to 3 update a copy of a rank's part of the weights (stage 3 has it twice), though those are fp32 already.
    """
    share = 1 / world
    weights = {0: 1.0, 1: 1 + share, 2: 1 + share, 3: 3 * share}[zero_stage]
    return {
        "weights": FP32 * parameters * weights,
        "gradients": float(FP32 * parameters),
        "moments": 2 * FP32 * parameters * (1 if zero_stage == 0 else share),
    }


def pool_bytes(rows: int, texts: int, candidates: int, size: int) -> float:
    """Bytes of the loss stage: own embeddings and their gradient, the gathered candidates and theirs, one block."""
    block = max(LEAST_BLOCK_ROWS, BLOCK_LOGITS // (FP32 * candidates))
    return float(FP32 * (2 * texts * size + 2 * candidates * size + 2 * rows * size + min(block, rows) * candidates))


# --- collectives -------------------------------------------------------------------------------------------------


def collectives(
    *, trained: int, gathered: int, size: int, zero_stage: int, world: int, passes: float = 0.0
) -> dict[str, float]:
    """Bytes that a rank sends in one step, by what for; the same number comes in.

    By a ring every collective over S bytes sends (W - 1) / W of them, an all-reduce twice that (Patarasu and Yuan
    2009, "Bandwidth optimal all-reduce algorithms").

    Args:
        trained: parameters that are trained.
        gathered: texts of the whole pool whose embeddings of `size` fp32 numbers all ranks see, with two 64-bit
            hashes each.
        passes: ZeRO-3 gathers all weights in every forward and backward of a chunk: how many of these there are.
    """
    part = (world - 1) / world
    vectors, weights = float(FP32 * gathered * size), float(FP32 * trained)
    sent = {
        "embeddings": part * vectors,
        "hashes": part * 16 * gathered,
        "their gradient": part * vectors,
        # DeepSpeed's ZeRO-1 and 2 reduce to all ranks, too, and each keeps its part (stage_1_and_2.py, average_tensor).
        "model gradient": (1 if zero_stage == 3 else 2) * part * weights,
    }
    if zero_stage in (1, 2):
        sent["updated weights"] = part * weights
    if zero_stage == 3:
        sent["weights, each pass"] = passes * part * weights
    return sent
