"""The loss stage: embeddings in, loss and the gradient of every embedding out.

Ours beside the loss stage of sentence-transformers' cached loss (`calculate_loss(with_backward=True)`), at its default
and at the best of its chunk sizes and similarity functions, and beside plain autograd over the full matrix. All are
first compared with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import util
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor, nn

from benchmarks.common import Memory, Timing, alternate, extra_memory, gate, in_child, ratio, rivals, table, target
from trainer import losses

TEMPERATURE, SEED = 0.01, 11


@dataclass(frozen=True)
class Case:
    """Local queries, candidates and size of an embedding; rows of the peer's chunks and of our blocks to search."""

    queries: int = 4096
    candidates: int = 4096
    size: int = 384
    chunks: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    blocks: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    repeats: int = 7


SQUARE = Case()
POOL = Case(queries=2048, candidates=32_768, chunks=(32, 256, 512, 1024, 2048), blocks=(64, 128, 256, 512), repeats=5)
# Ours alone, for whether time and memory grow as the pool does: 256 queries of a rank among that many passages.
GROWTH, GROWTH_QUICK = (16_384, 65_536, 262_144), (256,)
QUICK = Case(queries=96, candidates=192, size=32, chunks=(32, 96), blocks=(32,), repeats=1)

Run = Callable[[], tuple[Tensor, Tensor, Tensor]]  # loss, gradient of the queries, gradient of the candidates


def measure(quick: bool = False) -> dict[str, Any]:
    """Every case: the gate, the search, the alternation, and the memory in child processes."""
    cases = {"small": QUICK} if quick else {"batch of 4,096": SQUARE, "2,048 queries, pool of 32,768": POOL}
    results = {name: _compare(case) for name, case in cases.items()}
    (first, compared), *_ = results.items()
    growth = _growth(GROWTH_QUICK if quick else GROWTH)
    tables = [
        table(f"{kind}, {name}, {cases[name].size} numbers an embedding, fp32", found[kind])
        for name, found in results.items()
        for kind in ("search", "loss")
    ]
    return {
        "settings": {name: vars(case) for name, case in cases.items()} | {"seed": SEED, "temperature": TEMPERATURE},
        "correctness": {name: found["correctness"] for name, found in results.items()},
        "tables": [*tables, table("ours, 256 queries, by the size of the pool", growth)],
        "targets": [
            target(
                f"time of a logit, pool of {growth[-1]['pool']:,} over {growth[0]['pool']:,}",
                *(1.25, growth[-1]["ns a logit"] / growth[0]["ns a logit"]),
                at_most=True,
            ),
            target(f"loss stage over the peer's best chunk, {first}", 2.0, compared["over best"]),
            target(f"extra memory over naive autograd's, {first}", 1 / 8, compared["memory"], at_most=True),
        ],
    }


# --- what is compared --------------------------------------------------------------------------------------------


def embeddings(case: Case) -> tuple[Tensor, Tensor]:
    """Unit vectors. A positive is about as similar as the nearest of the other candidates, so that the loss is of
    order 1 and a relative error of it means something."""
    generator = torch.Generator().manual_seed(SEED)
    query = F.normalize(torch.randn(case.queries, case.size, generator=generator), dim=1)
    passage = F.normalize(torch.randn(case.candidates, case.size, generator=generator), dim=1)
    cosine = 3 / case.size**0.5  # other candidates' cosines have the deviation 1 / sqrt(size)
    passage[: case.queries].mul_((1 - cosine**2) ** 0.5).add_(cosine * query)
    return query.requires_grad_(), F.normalize(passage, dim=1).requires_grad_()


def identity(case: Case, device: torch.device) -> losses.Identity:
    """All texts are different, as the peer assumes."""
    queries = torch.arange(case.queries, device=device)
    owner = torch.full((case.candidates,), losses.NO_OWNER, device=device)
    owner[: case.queries] = queries
    return losses.Identity(queries, queries, torch.arange(case.candidates, device=device) + case.queries, owner)


def ours(case: Case, query: Tensor, passage: Tensor, block_rows: int = 0) -> Run:
    """trainer.losses.info_nce; block_rows 0: as it chooses."""
    texts = identity(case, query.device)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        loss, _ = losses.info_nce(query, passage, texts, temperature=TEMPERATURE, block_rows=block_rows)
        return _with_gradients(loss, query, passage)

    return run


def peer(case: Case, query: Tensor, passage: Tensor, chunk: int, similarity: str) -> Run:
    """The loss stage as its cached loss runs it: a backward for every chunk, into the embeddings' .grad.

    Candidates beyond the positives are handed over as columns of hard negatives, which is the same pool.
    """
    encoder: Any = nn.Sequential(nn.Identity())  # this stage calls no model
    function = getattr(util, similarity)
    stage = CachedMultipleNegativesRankingLoss(
        encoder, scale=1 / TEMPERATURE, mini_batch_size=chunk, similarity_fct=function
    )

    def run() -> tuple[Tensor, Tensor, Tensor]:
        query.grad = passage.grad = None
        columns = [[column] for column in passage.split(case.queries)]
        loss = stage.calculate_loss([[query], *columns], with_backward=True)
        return loss, *(tensor.grad for tensor in (query, passage))  # type: ignore[return-value]

    return run


def naive(case: Case, query: Tensor, passage: Tensor) -> Run:
    """Plain autograd over the full matrix of logits."""
    labels = torch.arange(case.queries, device=query.device)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        loss = F.cross_entropy(query @ passage.T / TEMPERATURE, labels)
        return _with_gradients(loss, query, passage)

    return run


def reference(case: Case, normalised: bool) -> tuple[float, Tensor]:
    """Loss and both gradients in float64; the peer's cos_sim normalises again, so its gradients are projected."""
    query, passage = (tensor.detach().double().requires_grad_() for tensor in embeddings(case))
    q, p = (F.normalize(query, dim=1), F.normalize(passage, dim=1)) if normalised else (query, passage)
    loss = F.cross_entropy(q @ p.T / TEMPERATURE, torch.arange(case.queries))
    return flat(loss, *torch.autograd.grad(loss, (query, passage)))


def _with_gradients(loss: Tensor, query: Tensor, passage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_passage = torch.autograd.grad(loss, (query, passage))
    return loss, of_query, of_passage


def flat(loss: Tensor, query: Tensor, passage: Tensor) -> tuple[float, Tensor]:
    return float(loss.detach()), torch.cat([query.flatten(), passage.flatten()])


# --- the comparison ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A maker above, and what it is called with beside the case and the embeddings."""

    name: str
    make: Callable[..., Run]
    settings: tuple[Any, ...] = ()

    def __call__(self, case: Case) -> Run:
        return self.make(case, *embeddings(case), *self.settings)


OURS = Variant("ours", ours)
DEFAULT = Variant("peer, chunks of 32, cos_sim, its default", peer, (32, "cos_sim"))
NAIVE = Variant("naive, full matrix", naive)


def _compare(case: Case) -> dict[str, Any]:
    """Gate, search, alternation and memory of one case."""
    blocks = [Variant(f"ours, blocks of {_of_rows(rows, case)}", ours, (rows,)) for rows in case.blocks]
    chunks = [
        Variant(f"peer, chunks of {chunk}, {function}", peer, (chunk, function))
        for function in ("cos_sim", "dot_score")
        for chunk in case.chunks
    ]
    correctness = _check([OURS, NAIVE, *blocks, *chunks], case)
    found = {variant: _search(variant(case)) for variant in (*blocks, *chunks)}
    best = rivals({variant: found[variant] for variant in chunks})
    finalists = [OURS, NAIVE, DEFAULT, *best]
    timings = alternate({variant.name: variant(case) for variant in finalists}, case.repeats)
    best_timings = [timings[variant.name] for variant in best]
    memory = {variant.name: in_child(_memory, case, variant).extra for variant in (*finalists, *blocks)}
    return {
        "correctness": correctness,
        "search": [
            {"variant": variant.name, **timing.cells(), "extra memory, MB": _megabytes(memory.get(variant.name))}
            for variant, timing in found.items()
        ],
        "loss": _rows(timings, best_timings, memory),
        "over best": ratio(best_timings, timings[OURS.name]),
        "memory": memory[OURS.name] / memory[NAIVE.name],
    }


def _of_rows(rows: int, case: Case) -> str:
    return f"{rows} rows, {4 * rows * case.candidates / 2**20:.3g} MiB"


def _check(variants: list[Variant], case: Case) -> dict[str, Any]:
    wanted = {normalised: reference(case, normalised) for normalised in (False, True)}
    return {
        variant.name: gate(variant.name, flat(*variant(case)()), wanted["cos_sim" in variant.settings])
        for variant in variants
    }


def _search(run: Run) -> Timing:
    (timing,) = alternate({"": run}, repeats=2, warm_ups=0).values()
    return timing


def _memory(case: Case, variant: Variant) -> Memory:
    """What the stage takes beside the embeddings, its own results included."""
    variant(QUICK)()  # brings in what the libraries allocate once
    return extra_memory(variant(case))


def _growth(pools: tuple[int, ...]) -> list[dict[str, Any]]:
    cases = {pool: Case(queries=256, candidates=pool) for pool in pools}
    timings = alternate({str(pool): OURS(case) for pool, case in cases.items()}, repeats=5)
    return [
        {
            "pool": pool,
            "wall s": timings[str(pool)].median,
            "ns a logit": 1e9 * timings[str(pool)].median / (case.queries * pool),
            "extra memory, MB": (extra := in_child(_memory, case, OURS).extra) / 1e6,
            "bytes a passage": extra / pool,
        }
        for pool, case in cases.items()
    ]


def _megabytes(extra: int | None) -> float | str:
    return "" if extra is None else extra / 1e6


def _rows(timings: dict[str, Timing], best: list[Timing], memory: dict[str, int]) -> list[dict[str, object]]:
    default = [timings[DEFAULT.name]]
    return [
        {
            "variant": name,
            **timing.cells(),
            "x its default": ratio(default, timing),
            "x its best": ratio(best, timing),
            "extra memory, MB": memory[name] / 1e6,
            "of naive's": memory[name] / memory[NAIVE.name],
        }
        for name, timing in timings.items()
    ]
