"""Texts to vectors, beside sentence-transformers.

Token ids of natural lengths, beside its forward as its `encode` calls it: sorted by length, by batches. Then the texts
that `make demo-full` holds out, where it has been here, beside `SentenceTransformer.encode` itself, tokenizing
included, on the model that it brings. On this machine's processor, in fp32 and, where it has products of it, in bf16;
benchmarks/gpu.py does so on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks import step
from benchmarks.common import DEMO, GateError, Timing, alternate, in_child, ratio, rivals, table, target
from data.tokens import Ragged
from trainer.device import keep_freed_memory
from trainer.embed import encode, encode_texts, load_model
from trainer.encoder import Encoder
from trainer.meter import peak_flops

SMALL = step.Case(layers=12, hidden=384, vocabulary=32_000)
TEXTS, CHUNKS, BATCHES, REPEATS = 1024, (256, 512, 1024, 2048), (4, 8, 16, 32, 64), 5
HELD_OUT, MODEL = DEMO / "shards" / "holdout.jsonl", DEMO / "e5-small"
COLLECTED = 512  # passages, of all sources alike


def measure(quick: bool = False) -> dict[str, Any]:
    """Each precision in a process of its own."""
    sizes: Any = (64, (256, 512), (8, 16), 1) if quick else (TEXTS, CHUNKS, BATCHES, REPEATS)
    found = {
        precision: in_child(_on_the_host, replace(step.QUICK if quick else SMALL, precision=precision), *sizes)
        for precision in step.precisions()
    }
    if HELD_OUT.is_file() and not quick:
        found |= {f"collected text, {name}": in_child(_collected, name) for name in step.precisions()}
    return {
        "settings": {"model": vars(SMALL), "texts": sizes[0], "collected": COLLECTED, "seed": step.SEED},
        "correctness": {precision: each["correctness"] for precision, each in found.items()},
        "tables": [table(f"encode, 12 x 384, {precision}", each["rows"]) for precision, each in found.items()],
        "targets": [
            target(f"encode, {precision}: over the peer's best", 1.3, each["ratio"])
            for precision, each in found.items()
        ],
    }


def _on_the_host(case: step.Case, *sizes: Any) -> dict[str, Any]:
    keep_freed_memory()
    return compare(case, *sizes)


def compare(
    case: step.Case, texts: int, chunks: tuple[int, ...], batches: tuple[int, ...], repeats: int
) -> dict[str, Any]:
    """Ours by every number of tokens in a chunk, the peer by every batch size; vectors are compared first."""
    peer = step.sentence_transformer(case).eval()
    tokens = step.texts(replace(case, pairs=texts // 2)).tokens
    encoder = Encoder(peer[0].auto_model).eval()
    device = torch.device(case.device)
    flops = 2 * products(encoder) * int(tokens.lengths.sum())

    def ours(chunk: int) -> torch.Tensor:
        return encode(encoder, tokens, tokens_per_chunk=chunk, device=device, precision=case.precision)

    def peers(batch: int) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.precision == "bf16"):
            return _by_peer(peer, tokens, batch, device)

    gated = _gate(ours(chunks[0]), peers(batches[0]), case.precision)
    found = _timed(ours, chunks, peers, batches, repeats, device)
    return beside(found, int(tokens.lengths.sum()), flops, device) | gated


def _collected(precision: str) -> dict[str, Any]:
    """Held-out passages, in several languages, sorted by each as it does: by tokens, and by characters."""
    keep_freed_memory()
    device = torch.device("cpu")
    rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    texts = [row["passage"] for row in rows[:: len(rows) // COLLECTED]][:COLLECTED]
    model, peer = load_model(str(MODEL), device), SentenceTransformer(str(MODEL), device="cpu")
    prompt = model.passage_prompt

    def ours(chunk: int) -> torch.Tensor:
        return encode_texts(model, texts, prompt, tokens_per_chunk=chunk, device=device, precision=precision)

    def peers(batch: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return torch.from_numpy(peer.encode(texts, prompt=prompt, batch_size=batch)).float()

    gated = _gate(ours(CHUNKS[0]), peers(BATCHES[0]), precision)
    tokens = sum(len(ids) for ids in peer.tokenizer([prompt + text for text in texts], truncation=True).input_ids)
    found = _timed(ours, CHUNKS, peers, BATCHES, REPEATS, device)
    return beside(found, tokens, 2 * products(model.encoder) * tokens, device) | gated


def _gate(got: torch.Tensor, wanted: torch.Tensor, precision: str) -> dict[str, Any]:
    cosine = float(torch.nn.functional.cosine_similarity(wanted, got).min())
    if cosine < (0.99 if precision == "bf16" else 0.99999):
        raise GateError(f"the vectors have a cosine of {cosine:.6f} to the peer's")
    return {"correctness": {"smallest cosine": cosine}}


def _timed(
    ours: Callable[[int], torch.Tensor],
    chunks: tuple[int, ...],
    peers: Callable[[int], torch.Tensor],
    batches: tuple[int, ...],
    repeats: int,
    device: torch.device,
) -> dict[str, Timing]:
    """Both sides in turns, each at those of its settings that one search found best."""
    work = {f"ours, chunk={chunk}": partial(ours, chunk) for chunk in chunks}
    theirs = {f"peer, batch={size}": partial(peers, size) for size in batches}
    search = alternate(work | theirs, 1, warm_ups=int(device.type == "cuda"))
    best = [name for side in (work, theirs) for name in rivals({name: search[name] for name in side})]
    return alternate({name: (work | theirs)[name] for name in best}, repeats, warm_ups=0)


def _by_peer(peer: Any, tokens: Ragged, batch: int, device: torch.device) -> torch.Tensor:
    """What SentenceTransformer.encode does behind its tokenizer."""
    order = np.argsort(-tokens.lengths, kind="stable")
    vectors = []
    with torch.no_grad():
        for start in range(0, len(order), batch):
            ids, mask = step.gradcache.pad(tokens, order[start : start + batch], step.PADDING)
            features = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
            embedded = peer(features)["sentence_embedding"]
            vectors.append(torch.nn.functional.normalize(embedded.float(), dim=1))
    found = torch.empty(len(order), vectors[0].shape[1])
    found[torch.from_numpy(order)] = torch.cat(vectors).cpu()
    return found


def products(encoder: torch.nn.Module) -> int:
    """Parameters that take part in matrix products: all but the tables that are looked up."""
    tables = [module for module in encoder.modules() if isinstance(module, torch.nn.Embedding)]
    return sum(p.numel() for p in encoder.parameters()) - sum(table.weight.numel() for table in tables)


def beside(found: dict[str, Timing], tokens: int, flops: float, device: torch.device) -> dict[str, Any]:
    """Rows with tokens a second and MFU; our fastest over the peer's fastest, on a GPU by the wall alone."""
    rows = [
        {
            "variant": name,
            **timing.cells(),
            "tokens/s": round(tokens / timing.median),
            "MFU": mfu(flops / timing.median, device),
        }
        for name, timing in found.items()
    ]
    sides = {side: [timing for name, timing in found.items() if name.startswith(side)] for side in ("ours", "peer")}
    fastest = {side: min(timings, key=lambda timing: timing.median) for side, timings in sides.items()}
    by_wall = fastest["peer"].median / fastest["ours"].median
    return {"rows": rows, "ratio": by_wall if device.type == "cuda" else ratio(sides["peer"], fastest["ours"])}


def mfu(rate: float, device: torch.device) -> str:
    """A rate in FLOP/s as a share of a card's peak; a dash where that is not known."""
    peak = peak_flops(device)
    return f"{rate / peak:.1%}" if peak else "-"
