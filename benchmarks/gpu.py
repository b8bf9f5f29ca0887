"""On one GPU, in bf16: encoding, the filter, a teacher, and the whole training step, each beside sentence-transformers;
and the loss in fp32, beside inf-cl too, where that is installed.

Lengths are natural (`step.texts`), weights random, except that the teacher's reader is small enough to be made here.
MFU is 2 FLOP (forward) or 6 (forward and backward) for each parameter that takes part in a matrix product, a token,
over the card's dense bf16 peak; attention's own products and replays are not counted.
"""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from sentence_transformers.util import semantic_search

from benchmarks import common, encoding, loss, scores, step
from benchmarks.common import GateError, alternate, in_child, table, target
from trainer.device import pick_device, use_same_kernels
from trainer.embed import encode
from trainer.rankcount import count_above, own_scores

SMALL = step.Case(layers=12, hidden=384, vocabulary=250_002, precision="bf16", device="cuda", pairs=2048)
BASE = replace(SMALL, hidden=768)
TINY = replace(step.QUICK, device="cpu", pairs=32)


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    shapes: dict[str, step.Case]
    teacher: scores.Case
    pool: int  # pairs of the whole pool
    texts: int
    chunks: tuple[int, ...]  # our tokens_per_chunk; the step takes all but the last, whose activations may not fit
    batches: tuple[int, ...]  # the peer's batch_size
    peers: tuple[step.Peer, ...]  # its settings in the step
    losses: tuple[loss.Case, ...]
    passages: int
    size: int  # of the filter's vectors
    queries: int
    few: int  # queries of the filter that the peer searches for, too
    repeats: int = 2


FULL = Sizes(
    {"small, 12 x 384": SMALL, "base, 12 x 768": BASE},
    replace(
        scores.FULL, layers=12, queries=1000, batch_sizes=(64, 256, 512), device="cuda", precision="bf16", repeats=3
    ),
    *(32_768, 16_384, (16_384, 65_536, 131_072), (64, 256, 1024)),
    (step.DEFAULT, ("mini_batch_size", 128), ("mini_batch_size", 256), ("mini_batch_num_tokens", 16_384)),
    tuple(loss.Case(pool, pool, chunks=(512, 1024, 4096), repeats=5) for pool in (4096, 32_768)),
    *(1_000_000, 768, 100_000, 5_000),
)
QUICK = Sizes(
    *({"tiny": TINY}, scores.QUICK, 64, 64, (256, 512), (8, 16), (step.DEFAULT, ("mini_batch_size", 8))),
    (replace(loss.QUICK, candidates=loss.QUICK.queries),),
    *(5_000, 32, 200, 100),
    repeats=1,
)


def measure(quick: bool = False) -> dict[str, Any]:
    """Every part; without a GPU only the quick one runs, on the CPU."""
    if not quick and not torch.cuda.is_available():
        raise GateError("there is no GPU")
    sizes = QUICK if quick else FULL
    pick_device("auto")
    tables, targets, correctness = [], [], {}
    for part in (_encoding, _filtering, _teaching, _losing, _stepping):
        print(f"gpu: {part.__name__.strip('_')} ...", flush=True)
        for name, found in part(sizes).items():
            tables.append(table(name, found["rows"]))
            correctness[name] = found["correctness"]
            if "ratio" in found:
                targets.append(target(f"{name}: over the peer's best", 1.0, found["ratio"]))
        gc.collect()
        torch.cuda.empty_cache()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"settings": {"card": card}, "correctness": correctness, "tables": tables, "targets": targets}


# --- encoding ----------------------------------------------------------------------------------------------------


def _encoding(sizes: Sizes) -> dict[str, Any]:
    return {
        f"encode, {name}": encoding.compare(case, sizes.texts, sizes.chunks, sizes.batches, sizes.repeats)
        for name, case in sizes.shapes.items()
    }


# --- the filter --------------------------------------------------------------------------------------------------


def _filtering(sizes: Sizes) -> dict[str, Any]:
    """Own passages at a cosine of 0.2: most rows stay to the end, the dearest case. The pool lies on the host, fp16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(step.SEED)

    def unit(rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, sizes.size, device=device), dim=1)

    pool = torch.cat([unit(count).half().cpu() for count in _pieces(sizes.passages)])
    queries = torch.cat([unit(count).cpu() for count in _pieces(sizes.queries)])
    numbers = torch.randint(sizes.passages, (sizes.queries,))
    queries = torch.nn.functional.normalize(0.2 * pool[numbers].float() + 0.98 * queries, dim=1)
    own = own_scores(queries, pool[numbers].float())
    few = slice(0, sizes.few)
    resident = pool.to(device)

    def ours(rows: slice, where: torch.Tensor) -> torch.Tensor:
        return count_above(queries[rows], own[rows], where, numbers[rows], limit=2, device=device)

    def peers() -> torch.Tensor:
        hits = semantic_search(queries[few].to(device), resident.float(), query_chunk_size=1000, top_k=3)
        return torch.tensor([_above(found, int(number)) for found, number in zip(hits, numbers[few], strict=True)])

    def _above(found: list[dict[str, Any]], number: int) -> int:
        place = [hit["corpus_id"] for hit in found]
        return min(2, place.index(number) if number in place else 2)

    wrong = int((ours(few, resident) != peers()).sum())
    if wrong > sizes.few // 200:  # fp16 vectors leave ties
        raise GateError(f"the filter counts otherwise than a search does for {wrong} of {sizes.few} queries")
    found = alternate(
        {
            f"ours, {sizes.few:,} queries": lambda: ours(few, resident),
            f"peer, semantic_search, {sizes.few:,} queries": peers,
            f"ours, {sizes.queries:,} queries, pool on the GPU": lambda: ours(slice(None), resident),
            f"ours, {sizes.queries:,} queries, pool on the host": lambda: ours(slice(None), pool),
        },
        1,
        warm_ups=0,
    )
    rows = [{"variant": name, "s": timing.median} for name, timing in found.items()]
    first, second, *_ = (timing.median for timing in found.values())
    name = f"filter, {sizes.queries:,} x {sizes.passages:,}, d = {sizes.size}"
    return {name: {"rows": rows, "ratio": second / first, "correctness": {"queries counted otherwise": wrong}}}


def _pieces(total: int, piece: int = 100_000) -> Iterator[int]:
    for start in range(0, total, piece):
        yield min(piece, total - start)


# --- a teacher ---------------------------------------------------------------------------------------------------


def _teaching(sizes: Sizes) -> dict[str, Any]:
    case = sizes.teacher
    found = scores.scoring(case)
    ours, *peers = (row["pairs/s"] for row in found["rows"])  # by the wall: the host's CPU time is that of waiting
    name = f"teacher, {case.layers} x {case.size}, {case.precision}"
    return {
        name: {
            **found,
            "ratio": ours / max(peers),
            "correctness": {"largest difference of a logit": found["difference"]},
        }
    }


# --- the loss ----------------------------------------------------------------------------------------------------


def _losing(sizes: Sizes) -> dict[str, Any]:
    return dict(_loss(case, sizes.repeats) for case in sizes.losses)


def _loss(case: loss.Case, repeats: int) -> tuple[str, dict[str, Any]]:
    """Every variant's time, memory and distance from float64; ours must be near, inf-cl's products are TF32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = [tensor.detach().to(device).requires_grad_() for tensor in loss.embeddings(case)]
    runs = {"ours": loss.ours(case, *given), "autograd over the whole matrix": loss.naive(case, *given)}
    runs |= {f"peer, chunks of {chunk}": loss.peer(case, *given, chunk, "dot_score") for chunk in case.chunks}
    if device.type == "cuda" and importlib.util.find_spec("inf_cl"):
        runs["inf-cl"] = _inf_cl(case, *given)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    wanted = loss.flat(*loss.naive(case, *exact)())
    checked = {name: _checked(run, wanted, device) for name, run in runs.items()}
    if checked["ours"]["error"] > common.FP32.gradient:
        raise GateError(f"the gradient of our loss is {checked['ours']['error']:.1e} from float64")
    del wanted, exact
    timings = alternate({name: _waited(run, device) for name, run in runs.items()}, repeats)
    rows = [{"variant": name, "ms": 1e3 * timings[name].median, **checked[name]} for name in runs]
    best = min(timing.median for name, timing in timings.items() if name.startswith("peer"))
    return f"loss, {case.queries:,} x {case.candidates:,}, d = {case.size}, fp32", {
        "rows": rows,
        "ratio": best / timings["ours"].median,
        "correctness": {name: found["error"] for name, found in checked.items()},
    }


def _checked(run: loss.Run, wanted: tuple[float, torch.Tensor], device: torch.device) -> dict[str, float]:
    """A variant's extra memory on the GPU, and its gradients' distance from float64, in shares of their length."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found = run()
    extra = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else math.nan
    got = loss.flat(*found)[1].double()
    return {"extra MiB": extra / 2**20, "error": float((got - wanted[1]).norm() / wanted[1].norm())}


def _inf_cl(case: loss.Case, query: torch.Tensor, passage: torch.Tensor) -> loss.Run:
    """inf-cl's loss on one GPU (Cheng et al. 2024, arXiv 2410.17243)."""
    from inf_cl import cal_flash_loss

    scale = torch.tensor(1 / loss.TEMPERATURE, device=query.device)

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value = cal_flash_loss(query, passage, scale=scale, head_dim=128).mean()
        return value, *torch.autograd.grad(value, (query, passage))

    return run


# --- the step ----------------------------------------------------------------------------------------------------


def _stepping(sizes: Sizes) -> dict[str, Any]:
    found = {}
    for name, case in sizes.shapes.items():
        # A process each: an engine stays as long as the process that made it.
        compared, whole = in_child(_steps, sizes, case)
        found |= {f"step, {name}, {case.pairs:,} pairs": compared, f"step, {name}, {sizes.pool:,} pairs": whole}
    return found


def _steps(sizes: Sizes, case: step.Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Beside the peer at a pool that it gets through; then alone at the published one."""
    sides, device = step.Sides(case), torch.device(case.device)
    little = step.texts(replace(case, pairs=64))
    correctness = _loss_as_on_the_cpu(sides, little)
    tokens = int(sides.batch.tokens.lengths.sum())
    flops = 6 * encoding.products(sides.plain)
    found = alternate(
        {f"ours, chunk={chunk}": _waited(sides.ours(chunk, None), device) for chunk in sizes.chunks[:-1]}
        | {step.label(setting): _waited(sides.peer(setting), device) for setting in sizes.peers},
        sizes.repeats,
    )
    best = min(sizes.chunks[:-1], key=lambda chunk: found[f"ours, chunk={chunk}"].median)
    whole = _whole_pool(sides, replace(case, pairs=sizes.pool), best, flops, correctness)
    use_same_kernels()  # from here on
    found |= alternate({f"ours, chunk={best}, deterministic": _waited(sides.ours(best, None), device)}, sizes.repeats)
    return encoding.beside(found, tokens, flops * tokens, device) | {"correctness": correctness}, whole


def _whole_pool(
    sides: step.Sides, case: step.Case, chunk: int, flops: float, correctness: dict[str, float]
) -> dict[str, Any]:
    batch, device = step.texts(case), torch.device(case.device)
    tokens = int(batch.tokens.lengths.sum())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    outcomes: list[Any] = []
    take = sides.ours(chunk, None, batch)
    (timing,) = alternate({"": _waited(lambda: outcomes.append(take()), device)}, 1).values()
    last = outcomes[-1]
    row = {
        "variant": f"ours, chunk={chunk}",
        "s": timing.median,
        "tokens": tokens,
        "tokens/s": round(tokens / timing.median),
        "MFU": encoding.mfu(flops * tokens / timing.median, device),
        "loss, share": last.seconds.loss / timing.median,
        "chunks kept": f"{last.kept} of {last.chunks}",
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else math.nan,
    }
    return {"rows": [row], "correctness": correctness}


def _loss_as_on_the_cpu(sides: step.Sides, batch: Any) -> dict[str, float]:
    """The loss of the plain encoder in fp32 on the CPU, and that of the step as it is timed, without dropout."""
    sides.train(False)
    cpu = sides.plain.cpu().float()
    vectors = encode(cpu, batch.tokens)
    wanted = float(sides.objective(vectors, batch)[0])
    got = float(sides.ours(4096, None, batch)(lr=0.0).figures["train/loss"])
    sides.train(True)
    if abs(got - wanted) > 0.02 * abs(wanted):
        raise GateError(f"the loss is {got:.4f}, on the CPU in fp32 {wanted:.4f}")
    return {"loss": got, "loss on the CPU, fp32": wanted}


def _waited(work: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Work that has ended on the device when the call returns."""

    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run
