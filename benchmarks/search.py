"""Exact search over vectors: `trainer.topk.top_k` and the filter's `trainer.rankcount.count_above` beside faiss.

The peer is faiss' IndexFlatIP, on the same vectors and threads, at its default and the best of its block sizes; its
index is built before the clock starts. As a filter it looks for the best two of the pool for every query, which is what
public pipelines do. Both are first compared: the same numbers up to ties, the same pairs kept up to ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import GateError, Timing, alternate, ratio, rivals, table, target
from trainer.rankcount import count_above, own_scores
from trainer.topk import top_k

SEED, TIE = 13, 1e-5


@dataclass(frozen=True)
class Case:
    """Queries, passages and size of a vector; the depth of the search; blocks of ours and of the peer's to search."""

    queries: int = 20_000
    passages: int = 200_000
    size: int = 384
    depth: int = 100
    blocks: tuple[tuple[int, int], ...] = ((256, 4096), (512, 4096), (512, 8192), (1024, 8192), (1024, 16_384))
    peer_blocks: tuple[tuple[int, int], ...] = ((4096, 1024), (1024, 1024), (1024, 4096), (4096, 4096))
    wrong: tuple[float, ...] = (0.0, 0.3, 0.8)
    repeats: int = 3


FULL = Case()
QUICK = Case(200, 3000, 32, 10, blocks=((64, 512),), peer_blocks=((4096, 1024),), repeats=1)

Found = tuple[np.ndarray, np.ndarray]  # scores and numbers
Run = Callable[[], Any]


def measure(quick: bool = False) -> dict[str, Any]:
    """The search, then the filter with several shares of wrong pairs, each gated and timed beside the peer."""
    case = QUICK if quick else FULL
    queries, pool = vectors(case)
    index = faiss.IndexFlatIP(case.size)
    index.add(pool.numpy())
    faiss.omp_set_num_threads(torch.get_num_threads())
    searched = _search(case, queries, pool, index)
    filtered = {share: _filter(case, share, queries, pool, index, searched["fastest"]) for share in case.wrong}
    return {
        "settings": vars(case) | {"seed": SEED, "tie": TIE, "faiss": faiss.__version__},
        "correctness": {"top-k": searched["correctness"]} | {f"{s:.0%} wrong": f["kept"] for s, f in filtered.items()},
        "tables": [
            table(f"block sizes, best {case.depth}", searched["search"]),
            table(f"the best {case.depth} of {case.passages:,} for {case.queries:,} queries", searched["rows"]),
            *(table(f"filter, {share:.0%} of the pairs wrong", found["rows"]) for share, found in filtered.items()),
        ],
        "targets": [
            target("top-k, time over faiss'", 1.1, searched["time"], at_most=True),
            *(
                target(f"filter, {share:.0%} wrong, time over faiss' best two", 0.7, found["time"], at_most=True)
                for share, found in filtered.items()
            ),
        ],
    }


# --- what is compared --------------------------------------------------------------------------------------------


def vectors(case: Case) -> tuple[Tensor, Tensor]:
    """Random unit vectors: queries and pool. The best of a pool of 200,000 has a cosine of about 0.23."""
    generator = torch.Generator().manual_seed(SEED)
    return tuple(  # type: ignore[return-value]
        F.normalize(torch.randn(count, case.size, generator=generator), dim=1)
        for count in (case.queries, case.passages)
    )


def pairs(queries: Tensor, wrong: float) -> Tensor:
    """A passage for each query: at a cosine of about 0.5 when it is right, and any when it is wrong."""
    generator = torch.Generator().manual_seed(SEED + 1)
    passages = F.normalize(torch.randn(queries.shape, generator=generator), dim=1)
    right = torch.rand(len(queries), generator=generator) >= wrong
    passages[right] = F.normalize(passages[right] + 0.6 * queries[right], dim=1)
    return passages


def peer(index: Any, queries: Tensor, depth: int, blocks: tuple[int, int]) -> Callable[[], Found]:
    """IndexFlatIP.search with block sizes (queries, passages)."""

    def run() -> Found:
        faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs = blocks
        found: Found = index.search(queries.numpy(), depth)
        return found

    return run


def ours(queries: Tensor, pool: Tensor, depth: int, blocks: tuple[int, int]) -> Callable[[], Found]:
    """top_k with block sizes (queries, passages)."""

    def run() -> Found:
        scores, numbers = top_k(queries, pool, depth, query_block=blocks[0], passage_block=blocks[1])
        return scores.numpy(), numbers.numpy()

    return run


def _search(case: Case, queries: Tensor, pool: Tensor, index: Any) -> dict[str, Any]:
    """Gate, search of block sizes, alternation."""
    print(f"search: the best {case.depth} ...", flush=True)
    default = (faiss.cvar.distance_compute_blas_query_bs, faiss.cvar.distance_compute_blas_database_bs)
    mine = {blocks: ours(queries, pool, case.depth, blocks) for blocks in case.blocks}
    theirs = {blocks: peer(index, queries, case.depth, blocks) for blocks in case.peer_blocks}
    standard = ours(queries, pool, case.depth, (512, 8192))
    correctness = _gate_search(standard(), theirs[default]())
    found = {f"ours, {_name(b)}": _once(run) for b, run in mine.items()}
    found_peer = {blocks: _once(run) for blocks, run in theirs.items()}
    best = list(dict.fromkeys([default, *rivals(found_peer)]))
    finalists: dict[str, Run] = {"ours": standard} | {f"faiss, {_name(b)}": theirs[b] for b in best}
    timings = alternate(finalists, case.repeats)
    peers = [timing for name, timing in timings.items() if name != "ours"]
    search = found | {f"faiss, {_name(b)}": timing for b, timing in found_peer.items()}
    return {
        "correctness": correctness,
        "fastest": rivals(found_peer)[:2],
        "search": [{"variant": name, **timing.cells()} for name, timing in search.items()],
        "rows": _rows(timings, peers),
        "time": 1 / ratio(peers, timings["ours"]),
    }


def _filter(
    case: Case, wrong: float, queries: Tensor, pool: Tensor, index: Any, blocks: list[tuple[int, int]]
) -> dict[str, Any]:
    """Gate and alternation of the filter, nothing of the pool being a pair's own passage."""
    print(f"search: the filter, {wrong:.0%} of the pairs wrong ...", flush=True)
    own = own_scores(queries, pairs(queries, wrong))
    none = torch.full((len(queries),), -1)

    def count() -> np.ndarray:
        return count_above(queries, own, pool, none, limit=2).numpy()

    theirs = {f"faiss, {_name(b)}": peer(index, queries, 2, b) for b in blocks}
    kept = _gate_filter(count() < 2, own.numpy(), next(iter(theirs.values()))()[0])
    timings = alternate({"ours": count, **theirs}, case.repeats)
    peers = [timing for name, timing in timings.items() if name != "ours"]
    return {"kept": kept, "rows": _rows(timings, peers), "time": 1 / ratio(peers, timings["ours"])}


def _gate_search(got: Found, wanted: Found) -> dict[str, Any]:
    """Raise GateError unless scores agree to 1e-5 and numbers wherever no neighbour's score is that near."""
    difference = float(np.abs(got[0] - wanted[0]).max())
    apart = np.diff(wanted[0], axis=1) < -TIE
    clear = np.pad(apart, ((0, 0), (1, 0)), constant_values=True) & np.pad(apart, ((0, 0), (0, 1)))
    other = int((got[1] != wanted[1])[clear].sum())
    if difference > TIE or other:
        raise GateError(f"top-k: scores differ by {difference:.1e}, {other} numbers are others without a tie")
    return {"score_difference": difference, "clear_places": int(clear.sum()), "places": int(clear.size)}


def _gate_filter(kept: np.ndarray, own: np.ndarray, best: np.ndarray) -> dict[str, int]:
    """Raise GateError unless the pairs kept are those that beat the second best of the pool, ties apart."""
    clear = np.abs(own - best[:, 1]) > 3 * TIE
    other = int((kept != (own >= best[:, 1]))[clear].sum())
    if other:
        raise GateError(f"filter: {other} pairs are judged otherwise without a tie")
    return {"kept": int(kept.sum()), "pairs": len(kept), "near_ties": int((~clear).sum())}


def _once(run: Run) -> Timing:
    (timing,) = alternate({"": run}, repeats=2, warm_ups=0).values()
    return timing


def _rows(timings: dict[str, Timing], peers: list[Timing]) -> list[dict[str, object]]:
    return [
        {"variant": name, **timing.cells(), "time over the peer's best": 1 / ratio(peers, timing)}
        for name, timing in timings.items()
    ]


def _name(blocks: tuple[int, int]) -> str:
    return f"blocks of {blocks[0]:,} x {blocks[1]:,}"
