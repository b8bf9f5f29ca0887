"""The step on n ranks, at any ZeRO stage, chunk size and memory budget, against one process in plain PyTorch."""

from __future__ import annotations

import itertools
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
from torch import Tensor

PAIRS, STEPS, LR, SEED = 16, 2, 0.01, 3
# Dropout is on. A large epsilon, since Adam with a tiny one turns rounding noise into full-size updates wherever
# the true gradient is 0 (the bias of attention keys, to which softmax is blind).
ADAM = {"betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.01}
MAX_NORM = 0.5
CHUNKS = {"one text": 1, "several": 70, "all": 10**6}
KEPT = {"replayed": 0.0, "kept": 1e12}


def encoder(folder: Path) -> Any:
    from trainer.encoder import Encoder, freeze_positions, load_backbone

    made = Encoder(load_backbone(str(folder)))
    freeze_positions(made)
    return made.train()


def train(model: Path, stage: int, tokens_per_chunk: int, budget: float, negatives: int) -> tuple[Any, list[Any]]:
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
    objective = partial(objectives.contrastive, temperature=0.01)
    step = Stepper(engine, objective, SEED, 0, tokens_per_chunk, memory_budget=budget)
    reports = []
    for number in range(STEPS):
        batch = batches.share(batches.make(PAIRS, negatives, number), distributed.rank(), distributed.world())
        outcome = step(batch, number, LR)
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


def plain(model_folder: Path, world: int, tokens_per_chunk: int, negatives: int) -> tuple[Any, list[Any]]:
    """The same steps as one process writes them in plain PyTorch: one graph, one backward, clip, AdamW."""
    model = encoder(model_folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=LR, **ADAM)
    reports = []
    for number in range(STEPS):
        whole = batches.make(PAIRS, negatives, number)
        parts = [batches.share(whole, rank, world) for rank in range(world)]
        adam.zero_grad()
        embedded = [embed_share(model, part, tokens_per_chunk, number, rank) for rank, part in enumerate(parts)]
        loss = global_loss(list(zip(parts, embedded, strict=True)))
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("step") / "bert")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parameter_update_equals_one_process_in_plain_pytorch(world: int, model: Path, tmp_path: Path):
    stages = (0, 1, 2, 3) if world < 4 else (1, 3)
    cases = list(itertools.product(stages, CHUNKS.values(), KEPT.values(), (0, 3)))
    outcomes = ranks.run(train_all, world, tmp_path, model, cases)
    start = dict(encoder(model).named_parameters())
    wanted = {(size, k): plain(model, world, size, k) for size in CHUNKS.values() for k in (0, 3)}
    for number, case in enumerate(cases):
        _, size, budget, negatives = case
        weights, steps = wanted[size, negatives]
        for got, _ in (outcome[number] for outcome in outcomes):
            assert update_error(start, got, weights) < 1e-5, case
        reports = [outcome[number][1] for outcome in outcomes]
        for step, (loss, norm) in enumerate(steps):
            mean = sum(report[step][0] for report in reports) / world
            assert mean == pytest.approx(loss, rel=1e-5), case
            for _, own_norm, chunks, kept in (report[step] for report in reports):
                assert own_norm == pytest.approx(norm, rel=1e-4), case
                assert own_norm > MAX_NORM, "clipping has to act in this test"
                assert kept == (0 if budget == 0.0 else chunks), case
                assert (chunks == 1) == (size == CHUNKS["all"]), case


def test_part_of_the_graphs_kept_gives_the_same_update(model: Path, tmp_path: Path):
    (outcomes,) = ranks.run(train_all, 1, tmp_path, model, [(1, 70, 4e5, 3), (1, 70, 0.0, 3)])
    (some, reports), (none, _) = outcomes
    assert all(0 < kept < chunks for *_, chunks, kept in reports)
    assert all(torch.equal(some[name], none[name]) for name in none)


def count_collectives(model: Path, cases: list[tuple[Any, ...]]) -> list[dict[str, int]]:
    """How often each collective runs in one more step, at different numbers of chunks."""
    import torch.distributed as dist

    from trainer import distributed

    counts: list[dict[str, int]] = []

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            counts[-1][name] = counts[-1].get(name, 0) + 1
            return function(*arguments, **named)

        return call

    distributed._all_gather = counting("gather", distributed._all_gather)
    distributed._reduce_scatter = counting("scatter", distributed._reduce_scatter)
    dist.all_reduce = counting("all_reduce", dist.all_reduce)
    for case in cases:
        counts.append({})
        train(model, *case)
    return counts


def test_collectives_do_not_grow_with_the_number_of_chunks(model: Path, tmp_path: Path):
    cases = [(stage, size, 0.0, 3) for stage in (0, 1, 2) for size in CHUNKS.values()]
    first, second = ranks.run(count_collectives, 2, tmp_path, model, cases)
    assert first == second
    for number, case in enumerate(cases):
        counts = first[number]
        assert counts["gather"] == 2 * STEPS, case  # the passages' embeddings, and their hashes
        assert counts["scatter"] == STEPS, case  # the gradient of the passages
        assert counts == first[number - number % len(CHUNKS)], case
