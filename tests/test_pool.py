"""The published pool, really run: 32,768 pairs over two ranks, against one process that holds the whole batch."""

from __future__ import annotations

import resource
from functools import partial
from pathlib import Path
from typing import Any

import batches
import numpy as np
import pytest
import ranks
import tiny
import torch
import torch.nn.functional as F

PAIRS, STEPS, LR, TEMPERATURE = 32_768, 1, 0.01, 0.01
ADAM = {"betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.01}


def encoder(folder: Path) -> Any:
    from trainer.encoder import Encoder, load_backbone

    return Encoder(load_backbone(str(folder))).eval()  # without dropout: its masks belong to chunks


def batch() -> Any:
    return batches.make(PAIRS, 0, seed=1, longest=8)


def train(model: Path) -> dict[str, Any]:
    from trainer import distributed, objectives
    from trainer.engine import Engine, OptimizerSettings
    from trainer.step import Stepper

    engine = Engine(
        encoder(model),
        OptimizerSettings(max_grad_norm=1.0, **ADAM),
        stage=1,
        local_batch=PAIRS // distributed.world(),
        device=torch.device("cpu"),
    )
    engine.module.eval()
    objective = partial(objectives.contrastive, temperature=TEMPERATURE)
    step = Stepper(engine, objective, 0, 0, tokens_per_chunk=16_384, memory_budget=2**27)
    mine = batches.share(batch(), distributed.rank(), distributed.world())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses, seconds = [], []
    for number in range(STEPS):
        outcome = step(mine, number, LR)
        losses.append(float(outcome.figures["train/loss"]))
        seconds.append((outcome.seconds.loss, sum(vars(outcome.seconds).values()) + outcome.optimizer_seconds))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "weights": {name: engine.weight(name) for name in engine.shapes},
        "losses": losses,
        "loss_share": sum(loss for loss, _ in seconds) / sum(total for _, total in seconds),
        "extra_gib": peak * 1024 / 2**30,
    }


def plain_loss(embeddings: torch.Tensor, data: Any) -> torch.Tensor:
    """Cross-entropy of all queries, some rows at a time so that it fits: the full logits would take 4.3 GB, twice."""
    query, passage = embeddings[:PAIRS], embeddings[PAIRS:]
    asked, answers = torch.from_numpy(data.query_hash).int(), torch.from_numpy(data.passage_hash).int()

    def rows_loss(rows: torch.Tensor, first: int, everything: torch.Tensor) -> torch.Tensor:
        numbers = torch.arange(first, first + len(rows))
        hidden = (answers[None] == answers[numbers][:, None]) | (asked[None] == asked[numbers][:, None])
        hidden[torch.arange(len(rows)), numbers] = False
        logits = (rows @ everything.T / TEMPERATURE).masked_fill(hidden, -torch.inf)
        return F.cross_entropy(logits, numbers, reduction="sum")

    parts = [
        torch.utils.checkpoint.checkpoint(rows_loss, query[first : first + 1024], first, passage, use_reentrant=False)
        for first in range(0, PAIRS, 1024)
    ]
    return torch.stack(parts).sum() / PAIRS


def plain(model_folder: Path) -> tuple[Any, list[float]]:
    model, data = encoder(model_folder), batch()
    groups = [
        {"params": [parameter for parameter in model.parameters() if parameter.ndim > 1]},
        {"params": [parameter for parameter in model.parameters() if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    adam, losses = torch.optim.AdamW(groups, lr=LR, **ADAM), []
    lengths = data.tokens.lengths.astype(np.int64)
    mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.from_numpy(data.tokens.ids.astype(np.int64))
    for _ in range(STEPS):
        adam.zero_grad()
        loss = plain_loss(model(ids, mask), data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        losses.append(loss.item())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


@pytest.mark.timeout(900)
def test_a_pool_of_32768_over_two_ranks_equals_one_process_with_the_whole_batch(tmp_path: Path):
    model = tiny.bert(
        tmp_path / "bert", num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16
    )
    outcomes = ranks.run(train, 2, tmp_path, model, timeout_seconds=600)
    weights, losses = plain(model)
    start = dict(encoder(model).named_parameters())
    update = sum(float((start[name].detach() - weights[name]).double().square().sum()) for name in weights)
    for outcome in outcomes:
        got = outcome["weights"]
        difference = sum(float((got[name] - weights[name]).double().square().sum()) for name in weights)
        assert (difference / update) ** 0.5 < 1e-4
        print(
            f"extra memory {outcome['extra_gib']:.2f} GiB a rank, loss {100 * outcome['loss_share']:.0f}% of the step"
        )
        # Half the logits of one rank alone, in fp32, are 2.1 GB; several copies are usual.
        assert outcome["extra_gib"] < 1.5
    for step, expected in enumerate(losses):
        assert sum(outcome["losses"][step] for outcome in outcomes) / 2 == pytest.approx(expected, rel=1e-5)
