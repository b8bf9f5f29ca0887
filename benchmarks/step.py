"""One training step, forward, backward and update, beside sentence-transformers' cached loss.

The same weights (a random XLM-R-like encoder), texts and AdamW; dropout is on, except in the gate that compares loss
and gradients before anything is timed. The peer runs at its default and at the best setting that a search in the same
run finds among mini-batch sizes and token budgets; ours keeps its graphs, or replays all of them.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from benchmarks import common
from benchmarks.common import Memory, Timing, alternate, extra_memory, gate, in_child, ratio, rivals, table, target
from data import mixture
from data.collate import Batch
from data.reading import read_block
from data.tokens import Ragged
from trainer import costs, distributed, gradcache, objectives
from trainer.device import has_fast_bf16, keep_freed_memory, pick_device
from trainer.encoder import Encoder, compile_layers
from trainer.engine import MOMENTS, Engine, OptimizerSettings
from trainer.step import Stepper

LR, TEMPERATURE, SEED, PADDING = 1e-4, 0.01, 7, 1
SHARDS = common.DEMO / "shards"
BETA, MAX_NORM = 0.9, 1.0
ADAM: dict[str, Any] = {"weight_decay": 0.01, "betas": (BETA, 0.999), "eps": 1e-8}
KEEP_ALL, KEEP_NONE = math.inf, 0.0
TOLERANCES = {"fp32": common.FP32, "bf16": common.Tolerance(0.05, 0.3, 0.95)}  # at temperature 0.01 rounding is large


@dataclass(frozen=True)
class Case:
    """What is trained on, and the settings that are searched.

    lengths: "natural" (lognormal: queries median 12, sigma 0.6, cut at 64; passages 70, 0.9, 512), "equal" (64), or
        "collected": those of the docstrings that `make demo-full` collects.
    sizes, budgets: the peer's mini_batch_size and mini_batch_num_tokens; chunks: our tokens_per_chunk.
    """

    lengths: str = "natural"
    pairs: int = 256
    vocabulary: int = 32_000
    layers: int = 4
    hidden: int = 192
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    budgets: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    chunks: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    repeats: int = 5
    precision: str = "fp32"
    device: str = "cpu"


NATURAL = Case()
EQUAL = Case(lengths="equal", budgets=())  # a budget of tokens is a number of texts there
COLLECTED = Case(lengths="collected", repeats=3)
# XLM-R's own vocabulary: the gradient of its table, 192 MB a mini-batch, makes small mini-batches dear.
LARGE = Case(vocabulary=250_002, sizes=(8, 16, 32), budgets=(2048, 4096), chunks=(1024, 2048, 4096), repeats=3)
# A model as it is trained, in the precision that it is trained in, where this processor has products of it.
HALF = Case(pairs=128, layers=6, hidden=384, sizes=(2, 4, 8, 16, 32), budgets=(1024, 2048, 4096), precision="bf16")
CASES = {
    "natural lengths": NATURAL,
    **({"collected text": COLLECTED} if SHARDS.is_dir() else {}),
    "equal lengths": EQUAL,
    "large vocabulary": LARGE,
    "bf16": HALF,
}
# What the encoder's products could be: a large product of the same type on the same cores.
SHARE = Case(layers=12, hidden=384, pairs=96, lengths="equal", chunks=(2048, 4096, 8192))
QUICK = Case(pairs=16, vocabulary=500, layers=1, hidden=32, sizes=(4, 32), budgets=(512,), chunks=(256,), repeats=1)

Peer = tuple[str, int]  # the keyword of the peer's loss, and its value
DEFAULT: Peer = ("mini_batch_size", 32)


def measure(quick: bool = False) -> dict[str, Any]:
    """Every case: the gate, the search, the alternation; then peak memory in child processes."""
    cases = {"small": QUICK, "bf16": replace(QUICK, precision="bf16")} if quick else CASES
    cases = {name: case for name, case in cases.items() if case.precision in precisions()}
    results = {}
    for name, case in cases.items():
        print(f"step: {name} ...", flush=True)
        results[name] = in_child(_compare, case)
    (first, compared), *_ = results.items()
    memory = _memory_rows(cases[first], compared["chosen"])
    shares = [in_child(_share, replace(QUICK if quick else SHARE, precision=each)) for each in precisions()]
    tables = [table(f"step, {name}: {_describe(cases[name])}", found["rows"]) for name, found in results.items()]
    searches = [table(f"search, {name}", found["search"]) for name, found in results.items()]
    return {
        "settings": {name: vars(case) for name, case in cases.items()} | {"seed": SEED, "temperature": TEMPERATURE},
        "correctness": {name: found["correctness"] for name, found in results.items()},
        "tables": [
            *(*searches, *tables),
            table(f"resident memory of one step, {first}", memory),
            table("arithmetic of a step beside that of a large product", shares),
            table("what the table of word vectors takes of a step", in_child(_words, QUICK if quick else LARGE)),
        ],
        "targets": [
            *(
                target(f"{row['precision']}: of a large product's FLOP/s", row["wanted"], row["share"])
                for row in shares
            ),
            target("step over the peer's default, natural lengths", 2.8, compared["over default"]),
            target("step over the peer's best, natural lengths", 2.0, compared["over best"]),
        ],
    }


# --- what is compared --------------------------------------------------------------------------------------------


class Sides:
    """Ours and the peer, with equal weights in objects of their own, and the texts as each wants them.

    DeepSpeed hooks into the parameters it is given, and the peer should not pay for that.
    """

    def __init__(self, case: Case) -> None:
        self.batch, device = texts(case), pick_device(case.device)
        self.peer_model = sentence_transformer(case)
        encoder = Encoder(copy.deepcopy(self.peer_model[0].auto_model))
        self.plain = copy.deepcopy(encoder)
        if device.type == "cpu":
            keep_freed_memory()  # as every stage does; the peer, in the same process, has it too
        distributed.start(device, 60)
        settings = OptimizerSettings(max_grad_norm=MAX_NORM, **ADAM)
        self.half, self._on_gpu = case.precision == "bf16", device.type == "cuda"
        stage = costs.stage_that_runs(1, distributed.world())
        self.engine = Engine(encoder, settings, stage=stage, local_batch=case.pairs, device=device, bf16=self.half)
        if self._on_gpu:
            compile_layers(encoder.backbone)
        if self.half:
            self.plain.forward = torch.autocast(case.device, dtype=torch.bfloat16)(self.plain.forward)
        self.peer_adam = torch.optim.AdamW(self.peer_model.parameters(), lr=LR, fused=True, **ADAM)
        self.plain_adam = torch.optim.AdamW(self.plain.parameters(), lr=LR, fused=True, **ADAM)
        self.objective = partial(objectives.contrastive, temperature=TEMPERATURE)
        self.train(True)

    def train(self, on: bool) -> None:
        """Dropout on or off, on all sides."""
        for model in (self.peer_model, self.engine.module, self.plain):
            model.train(on)

    def ours(
        self, tokens_per_chunk: int, budget: float | None, batch: Batch | None = None, share_words: bool = True
    ) -> Callable[..., Any]:
        """The step that `quintet pretrain` runs."""
        stepper = Stepper(
            *(self.engine, self.objective, SEED, PADDING, tokens_per_chunk, budget),
            packed=self._on_gpu,
            share_words=share_words,
        )
        return lambda lr=LR: stepper(batch or self.batch, 0, lr)

    def without_engine(self, tokens_per_chunk: int) -> Callable[[], None]:
        """Our chunks and loss, all graphs kept, with plain backward and AdamW in place of DeepSpeed."""
        chunks = gradcache.plan(self.batch.tokens.lengths, tokens_per_chunk)

        def embed(rows: gradcache.Rows) -> Tensor:
            vectors: Tensor = self.plain(*gradcache.pad(self.batch.tokens, rows, PADDING))
            return vectors

        def step() -> None:
            gradcache.forward_backward(
                embed, chunks, len(chunks), lambda vectors: self.objective(vectors, self.batch), Tensor.backward, seed=1
            )
            torch.nn.utils.clip_grad_norm_(self.plain.parameters(), MAX_NORM)
            self.plain_adam.step()
            self.plain_adam.zero_grad()

        return step

    def peer(self, setting: Peer, batch: Batch | None = None, wrapped: Any = None) -> Callable[..., float]:
        """The loop that sentence-transformers' trainer runs, without its logging and data loading.

        wrapped: the model in DistributedDataParallel, on several ranks, whose passages are then gathered.
        """
        chosen: dict[str, Any] = dict([setting]) | {"gather_across_devices": wrapped is not None}
        loss = CachedMultipleNegativesRankingLoss(self.peer_model, scale=1 / TEMPERATURE, **chosen)
        loss.model = wrapped or self.peer_model
        columns = _padded_columns(batch or self.batch, self.peer_model.device)

        # transformers' Trainer leaves autocast before the backward, in which this loss runs its chunks again: in fp32
        @torch.autocast(self.peer_model.device.type, dtype=torch.bfloat16, enabled=self.half)
        def step(update: bool = True) -> float:
            self.peer_adam.zero_grad()
            value = loss([dict(column) for column in columns], torch.empty(0, device=self.peer_model.device))
            value.backward()
            if update:
                torch.nn.utils.clip_grad_norm_(self.peer_model.parameters(), MAX_NORM)
                self.peer_adam.step()
            return float(value.detach())

        return step


def texts(case: Case) -> Batch:
    """Random token ids of the case's lengths, all different."""
    generator = np.random.default_rng(SEED)

    def drawn(median: float, sigma: float, longest: int) -> np.ndarray:
        return np.clip(np.round(generator.lognormal(math.log(median), sigma, case.pairs)), 3, longest)

    if case.lengths == "natural":
        sizes = np.concatenate([drawn(12, 0.6, 64), drawn(70, 0.9, 512)]).astype(np.int32)
    elif case.lengths == "equal":
        sizes = np.full(2 * case.pairs, 64, np.int32)
    else:
        sizes = _collected(case.pairs)
    ids = generator.integers(5, case.vocabulary, int(sizes.sum())).astype(np.int32)
    numbers = np.arange(case.pairs)
    return Batch(Ragged(ids, sizes), case.pairs, 0, numbers, numbers + case.pairs, numbers)


def _collected(pairs: int) -> np.ndarray:
    """Tokens of the first docstrings' queries, then of their passages: int32 [2 pairs]."""
    source = next(source for source in mixture.load(str(SHARDS)).sources if source.name == "docstrings")
    block = read_block(source.index, *source.blocks[0].tolist()).table[:pairs]
    sides = [pc.list_value_length(block[name]).to_numpy() for name in ("query_tokens", "passage_tokens")]
    return np.concatenate(sides).astype(np.int32)


def _padded_columns(batch: Batch, device: torch.device) -> list[dict[str, Tensor]]:
    """Queries and passages as sentence-transformers' collator hands them over: each column padded to its longest."""
    columns = []
    for rows in (np.arange(batch.num_queries), np.arange(batch.num_queries, len(batch.tokens))):
        ids, mask = gradcache.pad(batch.tokens, rows, PADDING)
        columns.append({"input_ids": ids.to(device), "attention_mask": mask.long().to(device)})
    return columns


def sentence_transformer(case: Case) -> Any:
    """A random XLM-R-like encoder with mean pooling; the loss normalises. The unused pooler is taken off both sides."""
    config = AutoConfig.for_model(
        "xlm-roberta",
        vocab_size=case.vocabulary,
        pad_token_id=PADDING,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.hidden // 64),
        intermediate_size=4 * case.hidden,
        max_position_embeddings=514,
    )
    words = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        AutoModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model: Any = SentenceTransformer(
            modules=[Transformer(folder), Pooling(case.hidden, "mean")], device=case.device
        )
    model[0].auto_model.pooler = None
    return model


# --- the gate ----------------------------------------------------------------------------------------------------


def _check_equal(sides: Sides, case: Case) -> dict[str, Any]:
    """Loss and gradient of every setting that may be timed, against the peer's at its default, without dropout."""
    sides.train(False)
    wanted = _peer_gradient(sides, DEFAULT)
    found: dict[str, Any] = {}
    for chunk in (case.chunks[0], case.chunks[-1]):
        for name, budget in (("kept", KEEP_ALL), ("replayed", KEEP_NONE)):
            label = f"ours, {chunk} tokens, {name}"
            found[label] = gate(label, our_gradient(sides, chunk, budget), wanted, TOLERANCES[case.precision])
    sides.train(True)
    return found


def our_gradient(sides: Sides, tokens_per_chunk: int, budget: float) -> tuple[float, Tensor]:
    """The gradient as it reaches AdamW through ZeRO: from zero, its first moment becomes (1 - beta) x clipped gradient.

    A learning rate of 0 leaves the weights where they are.
    """
    engine = sides.engine
    engine.restore_optimizer(0, lambda name, key: torch.zeros(engine.shapes[name]))
    outcome = sides.ours(tokens_per_chunk, budget)(lr=0.0)
    moments = torch.cat([engine.moment(name, MOMENTS[0]).flatten() for name in engine.trained()])
    clipped = min(1.0, MAX_NORM / outcome.grad_norm)
    return float(outcome.figures["train/loss"]), moments / ((1 - BETA) * clipped)


def _peer_gradient(sides: Sides, setting: Peer) -> tuple[float, Tensor]:
    loss = sides.peer(setting)(update=False)
    return loss, gradient_of_peer(sides)


def gradient_of_peer(sides: Sides) -> Tensor:
    """What the peer's last backward left, in our order of parameters."""
    named = dict(sides.peer_model[0].auto_model.named_parameters())
    gradients = [named[name.removeprefix("backbone.")].grad.flatten() for name in sides.engine.trained()]
    return torch.cat(gradients)


# --- the comparison ----------------------------------------------------------------------------------------------


def _compare(case: Case) -> dict[str, Any]:
    """Gate, search and alternation of one case, in a process of its own."""
    sides = Sides(case)
    correctness = _check_equal(sides, case)
    peers = {setting: _search(sides.peer(setting)) for setting in _peer_settings(case)}
    ours = {
        budget: {chunk: _search(sides.ours(chunk, budget)) for chunk in case.chunks} for budget in (KEEP_ALL, KEEP_NONE)
    }
    kept, replayed = (min(found, key=lambda chunk: found[chunk].median) for found in ours.values())
    first, best = f"ours, kept, chunk={kept}", rivals(peers)
    timings = alternate(
        {
            first: sides.ours(kept, KEEP_ALL),
            f"ours, replayed, chunk={replayed}": sides.ours(replayed, KEEP_NONE),
            f"{first}, no DeepSpeed": sides.without_engine(kept),
            **{label(setting): sides.peer(setting) for setting in dict.fromkeys([DEFAULT, *best])},
        },
        case.repeats,
    )
    default_timing, best_timings = timings[label(DEFAULT)], [timings[label(setting)] for setting in best]
    return {
        "correctness": correctness,
        "search": _search_rows(peers, ours),
        "rows": _rows(timings, default_timing, best_timings, int(sides.batch.tokens.lengths.sum())),
        "chosen": {
            "kept": kept,
            "replayed": replayed,
            "peer": min(best, key=lambda setting: timings[label(setting)].median),
        },
        "over default": ratio([default_timing], timings[first]),
        "over best": ratio(best_timings, timings[first]),
    }


def _peer_settings(case: Case) -> list[Peer]:
    sizes: list[Peer] = [("mini_batch_size", size) for size in case.sizes]
    return sizes + [("mini_batch_num_tokens", budget) for budget in case.budgets]


def label(setting: Peer) -> str:
    short = {"mini_batch_size": "size", "mini_batch_num_tokens": "tokens"}[setting[0]]
    return f"peer, {short}={setting[1]}{', its default' if setting == DEFAULT else ''}"


def _search(step: Callable[[], object]) -> Timing:
    (timing,) = alternate({"": step}, repeats=1, warm_ups=0).values()
    return timing


def _search_rows(peers: dict[Peer, Timing], ours: dict[float, dict[int, Timing]]) -> list[dict[str, object]]:
    found = {label(setting): timing for setting, timing in peers.items()}
    for budget, timings in ours.items():
        name = "kept" if budget == KEEP_ALL else "replayed"
        found |= {f"ours, {name}, chunk={chunk}": timing for chunk, timing in timings.items()}
    return [{"setting": name, "wall s": timing.median, "CPU s": timing.median_cpu} for name, timing in found.items()]


def _rows(timings: dict[str, Timing], default: Timing, best: list[Timing], tokens: int) -> list[dict[str, object]]:
    return [
        {
            "variant": name,
            **timing.cells(),
            "tokens/s": round(tokens / timing.median),
            "x its default": ratio([default], timing),
            "x its best": ratio(best, timing),
        }
        for name, timing in timings.items()
    ]


def _describe(case: Case) -> str:
    tokens = int(texts(case).tokens.lengths.sum())
    return (
        f"{case.pairs} pairs, {tokens:,} tokens, {case.lengths} lengths, {case.layers} layers x {case.hidden}, "
        f"{case.vocabulary:,} pieces, {case.precision}, dropout on"
    )


def precisions() -> tuple[str, ...]:
    """What this processor has fast products of."""
    return ("fp32", "bf16") if has_fast_bf16("cpu") else ("fp32",)


# --- arithmetic --------------------------------------------------------------------------------------------------


def _share(case: Case) -> dict[str, Any]:
    """FLOP/s of our step, graphs kept and dropout on, over that of a product of two square matrices."""
    sides, half = Sides(case), case.precision == "bf16"
    side = min(4096, 16 * case.hidden)
    square = torch.randn(side, side).to(torch.bfloat16 if half else torch.float32)
    steps = {chunk: sides.ours(chunk, KEEP_ALL) for chunk in case.chunks}
    timings = alternate({"product": partial(torch.mm, square, square), **steps}, case.repeats)
    product = 2 * len(square) ** 3 / timings.pop("product").median
    chunk = min(timings, key=lambda size: timings[size].median)
    shape = costs.Shape(case.layers, case.hidden, case.hidden // 64, 4 * case.hidden, case.vocabulary, 514)
    compute = costs.Compute("cpu", chunk, half=half, dropout=True)
    step = costs.work(shape, sides.batch.tokens.lengths, compute).flop / timings[chunk].median
    return {
        "precision": case.precision,
        "chunk": chunk,
        "step, GFLOP/s": step / 1e9,
        "product, GFLOP/s": product / 1e9,
        "share": step / product,
        "wanted": 0.3 if half else 0.7,
    }


# --- the table of word vectors ---------------------------------------------------------------------------------------


def _words(case: Case) -> list[dict[str, object]]:
    """The step of a large vocabulary, its table's gradient written once or in every chunk, beside that of an eighth."""
    chunk, ways = case.chunks[len(case.chunks) // 2], {"once": True, "in every chunk": False}
    large, small = Sides(case), Sides(replace(case, vocabulary=case.vocabulary // 8))
    steps = {name: large.ours(chunk, KEEP_ALL, share_words=once) for name, once in ways.items()}
    timings = alternate({**steps, "small": small.ours(chunk, KEEP_ALL)}, case.repeats)
    least = timings.pop("small").median
    return [
        {
            "the table's gradient is written": name,
            "s": timing.median,
            "longer than with an eighth of the pieces": f"{timing.median / least - 1:.0%}",
        }
        for name, timing in timings.items()
    ]


# --- memory ------------------------------------------------------------------------------------------------------


def _memory_rows(case: Case, chosen: dict[str, Any]) -> list[dict[str, object]]:
    """One process for each variant."""
    kept, replayed, best = chosen["kept"], chosen["replayed"], chosen["peer"]
    found = {
        "ours, graphs kept": in_child(_peak, case, "ours", (kept, KEEP_ALL)),
        "ours, all replayed": in_child(_peak, case, "ours", (replayed, KEEP_NONE)),
        **{label(setting): in_child(_peak, case, "peer", (setting,)) for setting in dict.fromkeys([DEFAULT, best])},
    }
    return [
        {"variant": name, "before the step, MB": memory.before / 1e6, "peak beyond, MB": memory.extra / 1e6}
        for name, memory in found.items()
    ]


def _peak(case: Case, side: str, setting: tuple[Any, ...]) -> Memory:
    """What a step adds to weights, optimizer state and libraries, which a small step before it has brought in."""
    sides = Sides(case)
    make = getattr(sides, side)
    small = Case(pairs=4, vocabulary=case.vocabulary)
    make(*setting, batch=texts(small))()
    return extra_memory(make(*setting))
