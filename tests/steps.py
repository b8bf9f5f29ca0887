"""Training steps of a tiny model on n ranks, and the same in plain PyTorch: one graph, one backward, clip, AdamW."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import batches
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS, STEPS, LR, SEED, ALPHA = 16, 2, 0.01, 3, 0.2
# Dropout is on. A large epsilon, since Adam with a tiny one turns rounding noise into full-size updates wherever
# the true gradient is 0 (the bias of attention keys, to which softmax is blind).
ADAM = {"betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.01}
MAX_NORM = 0.5


def unit(rows: int, size: int, seed: int) -> Tensor:
    """Random vectors of unit length."""
    return F.normalize(torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def encoder(folder: Path) -> Any:
    from trainer.encoder import Encoder, freeze_positions, load_backbone

    made = Encoder(load_backbone(str(folder)))
    freeze_positions(made)
    return made.train()


def train(
    model: Path, stage: int, tokens_per_chunk: int, budget: float, negatives: int, objective: str = "contrastive"
) -> tuple[Any, list[Any]]:
    """This rank's part of the steps: final weights, and what each step reported."""
    from trainer import distributed, objectives
    from trainer.engine import Engine, OptimizerSettings
    from trainer.step import Stepper

    engine = Engine(
        encoder(model),
        OptimizerSettings(max_grad_norm=MAX_NORM, **ADAM),
        stage=stage,
        local_batch=PAIRS // distributed.world(),
        device=torch.device("cpu"),
    )
    chosen = {
        "contrastive": partial(objectives.contrastive, temperature=0.01),
        "distillation": partial(objectives.distillation, temperature=0.01, alpha=ALPHA),
    }[objective]
    step = Stepper(engine, chosen, SEED, 0, tokens_per_chunk, memory_budget=budget)
    reports = []
    for number in range(STEPS):
        whole = batches.make(PAIRS, negatives, number, scored=objective == "distillation")
        outcome = step(batches.share(whole, distributed.rank(), distributed.world()), number, LR)
        assert outcome.applied
        reports.append((float(outcome.figures["train/loss"]), outcome.grad_norm, outcome.chunks, outcome.kept))
    return {name: engine.weight(name) for name in engine.shapes}, reports


def train_all(model: Path, cases: list[tuple[Any, ...]]) -> list[Any]:
    return [train(model, *case) for case in cases]


def dropout_seed(step: int, rank: int, chunk: int) -> int:
    """The rule of trainer/step.py and trainer/gradcache.py, written again: the masks must be the same ones."""
    state = int(np.random.SeedSequence([SEED, step, rank]).generate_state(1, np.uint64)[0]) >> 1
    return (state + 0x9E3779B97F4A7C15 * (chunk + 1)) % 2**63


def embed_share(model: torch.nn.Module, batch: Any, tokens_per_chunk: int, step: int, rank: int) -> Tensor:
    """All texts of one rank's share with their graphs, chunk by chunk since dropout masks belong to chunks."""
    texts = np.split(batch.tokens.ids, np.cumsum(batch.tokens.lengths)[:-1])
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    embedded: list[Any] = [None] * len(texts)
    chunk = 0
    while order:
        longest = len(texts[order[0]])
        rows, order = order[: max(1, tokens_per_chunk // longest)], order[max(1, tokens_per_chunk // longest) :]
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for place, row in enumerate(rows):
            ids[place, : len(texts[row])] = torch.from_numpy(texts[row].astype(np.int64))
            mask[place, : len(texts[row])] = True
        torch.manual_seed(dropout_seed(step, rank, chunk))
        for row, vector in zip(rows, model(ids, mask), strict=True):
            embedded[row] = vector
        chunk += 1
    return torch.stack(embedded)


def global_loss(shares: list[tuple[Any, Tensor]]) -> Tensor:
    """Cross-entropy of all queries against all passages of the joined batch."""
    parts = [part for part, _ in shares]
    query = torch.cat([rows[: part.num_queries] for part, rows in shares])
    passage = torch.cat([rows[part.num_queries :] for part, rows in shares])
    texts = np.concatenate([part.passage_hash for part in parts])
    asked = np.concatenate([part.query_hash for part in parts])
    nobody = [np.full(len(part.passage_hash) - part.num_queries, -1) for part in parts]
    owners = np.concatenate([np.r_[part.query_hash, none] for part, none in zip(parts, nobody, strict=True)])
    firsts = np.cumsum([0] + [len(part.passage_hash) for part in parts])[:-1]
    positive = np.concatenate([first + np.arange(part.num_queries) for first, part in zip(firsts, parts, strict=True)])
    hidden = (texts[None] == texts[positive][:, None]) | (owners[None] == asked[:, None])
    hidden[np.arange(len(positive)), positive] = False
    logits = (query @ passage.T / 0.01).masked_fill(torch.from_numpy(hidden), -torch.inf)
    return F.cross_entropy(logits, torch.from_numpy(positive))


def distilled_loss(shares: list[tuple[Any, Tensor]]) -> Tensor:
    """KL by torch's own kl_div over each query's scored passages + ALPHA x cross-entropy over the joined batch."""
    kl, queries = torch.zeros(()), 0
    for batch, vectors in shares:
        b, k = batch.num_queries, batch.num_negatives
        query, positive, negatives = vectors.split([b, b, b * k])
        for row in range(b):
            texts = [batch.passage_hash[row], *batch.passage_hash[b + row * k : b + (row + 1) * k]]
            scored = [
                n for n in range(1 + k) if not math.isnan(batch.scores[row, n]) and (not n or texts[n] != texts[0])
            ]
            queries += 1
            if 0 not in scored or len(scored) < 2:
                continue
            group = torch.cat([positive[row : row + 1], negatives[row * k : (row + 1) * k]])[scored]
            student = F.log_softmax(group @ query[row] / 0.01, 0)
            teacher = F.log_softmax(torch.from_numpy(batch.scores[row, scored]), 0)
            kl = kl + F.kl_div(student, teacher, reduction="sum", log_target=True)
    return kl / queries + ALPHA * global_loss(shares)


def plain(
    model_folder: Path,
    world: int,
    tokens_per_chunk: int,
    negatives: int,
    objective: str = "contrastive",
) -> tuple[Any, list[Any]]:
    """The steps that `train` takes on `world` ranks together: the same global batches, the same dropout."""
    model = encoder(model_folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=LR, **ADAM)
    reports = []
    for number in range(STEPS):
        whole = batches.make(PAIRS, negatives, number, scored=objective == "distillation")
        parts = [batches.share(whole, rank, world) for rank in range(world)]
        adam.zero_grad()
        embedded = [embed_share(model, part, tokens_per_chunk, number, rank) for rank, part in enumerate(parts)]
        loss = {"contrastive": global_loss, "distillation": distilled_loss}[objective](
            list(zip(parts, embedded, strict=True))
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        adam.step()
        reports.append((loss.item(), float(norm)))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, reports


def update_error(start: Any, got: Any, wanted: Any) -> float:
    """Norm of the difference over the norm of the whole update."""
    difference = sum(float((got[name] - wanted[name]).double().square().sum()) for name in wanted)
    update = sum(float((start[name].detach() - wanted[name]).double().square().sum()) for name in wanted)
    return (difference / update) ** 0.5
