"""Objectives over a small batch, on 1, 2 and 4 ranks, against the definition of each option cell by cell in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import batches
import numpy as np
import pytest
import ranks
import steps
import torch
from torch import Tensor

from trainer.objectives import Options, contrastive, distillation, ranking

PAIRS, SIZE, TEMPERATURE, ALPHA = 8, 12, 0.05, 0.3
GUIDE_SIZE = 5  # where it only judges; to take over its embeddings, they must be as long

# name -> (negatives, options by name, whether every other query sees its own group alone)
CASES: dict[str, tuple[int, dict[str, Any], bool]] = {
    "plain": (2, {}, False),
    "no negatives": (0, {}, False),
    "one negative": (1, {}, False),
    "seven negatives": (7, {}, False),
    "both directions": (2, {"both_directions": True}, False),
    "both directions alone": (0, {"both_directions": True}, False),
    "same tower": (2, {"same_tower": True}, False),
    "margin": (2, {"margin": 0.02}, False),
    "teacher margin": (3, {"teacher_margin": 1.0}, False),
    "guide": (2, {"guide": "random", "guide_margin": 0.1}, False),
    "toward the guide": (2, {"guide": "random", "guide_margin": None, "guide_weight": 3.0}, False),
    "own group alone": (2, {}, True),
    "shorter": (2, {"sizes": ((4, 0.5), (7, 2.0))}, False),
    "all at once": (
        2,
        {
            "both_directions": True,
            "same_tower": True,
            "margin": 0.3,
            "teacher_margin": 1.0,
            "guide": "random",
            "guide_weight": 0.5,
            "sizes": ((4, 0.5),),
        },
        True,
    ),
}


def whole_batch(negatives: int, own_only: bool) -> Any:
    """A global batch in which texts repeat: between passages, between queries, and queries as passages."""
    batch = batches.make(PAIRS, negatives, 5, scored=True)
    generator = np.random.default_rng(8)
    passages = generator.integers(0, 3 * PAIRS, len(batch.passage_hash))
    queries = generator.integers(2 * PAIRS, 4 * PAIRS, PAIRS)
    alone = np.arange(PAIRS) % 2 == 0 if own_only else None
    return replace(batch, query_hash=queries, passage_hash=passages, own_only=alone)


def vectors(batch: Any, size: int, seed: int) -> Tensor:
    """Unit vectors of the batch's texts, in which a passage is as near its query as its hard negatives are."""
    b, k = batch.num_queries, batch.num_negatives
    query = steps.unit(b, size, seed)
    passages = torch.cat([query, query.repeat_interleave(k, 0)]) + 1.2 * steps.unit(b * (1 + k), size, seed + 1)
    return torch.nn.functional.normalize(torch.cat([query, passages]), dim=1)


def guide_vectors(batch: Any, options: dict[str, Any]) -> Tensor:
    return vectors(batch, SIZE if options.get("guide_weight") else GUIDE_SIZE, 50)


def rows_of(batch: Any, rank: int, world: int) -> np.ndarray:
    """Which rows of the global batch's vectors a rank holds."""
    k, each = batch.num_negatives, batch.num_queries // world
    mine = np.arange(rank * each, (rank + 1) * each)
    negatives = 2 * batch.num_queries + (mine[:, None] * k + np.arange(k)).reshape(-1)
    return np.concatenate([mine, batch.num_queries + mine, negatives])


def outcomes(names: list[str]) -> list[tuple[float, Tensor, float, Tensor]]:
    """This rank's loss and gradient of its embeddings, for both objectives and every case."""
    from trainer import distributed

    rank, world = distributed.rank(), distributed.world()
    found = []
    for name in names:
        negatives, options, own_only = CASES[name]
        whole = whole_batch(negatives, own_only)
        rows = rows_of(whole, rank, world)
        batch = batches.share(whole, rank, world)
        guide = guide_vectors(whole, options)[rows]
        chosen = Options(**{**options, "guide": lambda _, guide=guide: guide} if "guide" in options else options)
        pair: list[Any] = []
        for objective, more in ((contrastive, {}), (distillation, {"alpha": ALPHA})):
            local = vectors(whole, SIZE, 1)[rows].requires_grad_()
            loss, _ = objective(local, batch, temperature=TEMPERATURE, options=chosen, **more)
            (gradient,) = torch.autograd.grad(loss, local)
            pair += [float(loss.detach()), gradient]
        found.append(tuple(pair))
    return found


# --- the definition -------------------------------------------------------------------------------------------------


class Definition:
    """One global batch at one size of embedding: every softmax as a list of candidates."""

    def __init__(self, batch: Any, embedded: Tensor, options: dict[str, Any]) -> None:
        b, k = batch.num_queries, batch.num_negatives
        self.batch, self.options, self.b, self.k = batch, options, b, k
        self.vector = embedded
        self.guide = guide_vectors(batch, options).double()
        self.text = [*batch.query_hash.tolist(), *batch.passage_hash.tolist()]  # of every row of the vectors
        self.logits = batch.scores

    def negatives(self, query: int) -> list[int]:
        first = 2 * self.b + query * self.k
        return list(range(first, first + self.k))

    def is_equal(self, query: int, candidate: int) -> bool:
        """Whether a candidate of a query is no negative because of its text."""
        b, text = self.b, self.text
        if candidate >= b:
            owner = text[candidate - b] if candidate < 2 * b else None
            return text[candidate] == text[b + query] or owner == text[query]
        positive_of_candidate = text[b + candidate]
        return text[b + query] in (text[candidate], positive_of_candidate) or text[candidate] == text[query]

    def is_filtered(self, row: int, positive: int, candidate: int) -> bool:
        margin = self.options.get("margin")
        if margin is not None and self.similarity(row, candidate) > self.similarity(row, positive) + margin:
            return True
        guide, more = self.guide, self.options.get("guide_margin", 0.0)
        if "guide" not in self.options or more is None:
            return False
        return bool(guide[row] @ guide[candidate] > guide[row] @ guide[positive] + more)

    def is_better_for_the_teacher(self, query: int, candidate: int) -> bool:
        margin = self.options.get("teacher_margin")
        if margin is None or candidate not in self.negatives(query):
            return False
        scores = self.logits[query]
        return bool(scores[1 + self.negatives(query).index(candidate)] > scores[0] + margin)

    def similarity(self, a: int, b: int) -> float:
        return float(self.vector[a].detach() @ self.vector[b].detach())

    def forward(self, query: int) -> Tensor:
        """-log softmax at the positive of a query."""
        b, positive = self.b, self.b + query
        candidates = list(range(b, len(self.vector))) + (list(range(b)) if self.options.get("same_tower") else [])
        if self.batch.own_only is not None and self.batch.own_only[query]:
            candidates = [positive, *self.negatives(query)]
        kept = [positive] + [
            c
            for c in candidates
            if c != positive
            and not self.is_equal(query, c)
            and not self.is_filtered(query, positive, c)
            and not self.is_better_for_the_teacher(query, c)
        ]
        return -torch.log_softmax(self.vector[kept] @ self.vector[query] / TEMPERATURE, 0)[0]

    def backward(self, query: int) -> Tensor:
        """-log softmax at the query of a positive."""
        b, text, row = self.b, self.text, self.b + query
        kept = [query]
        if self.batch.own_only is None or not self.batch.own_only[query]:
            for other in range(b):
                equal = text[other] == text[query] or text[b + other] == text[row]
                if other != query and not equal and not self.is_filtered(row, query, other):
                    kept.append(other)
        return -torch.log_softmax(self.vector[kept] @ self.vector[row] / TEMPERATURE, 0)[0]

    def contrastive(self) -> Tensor:
        losses = [self.forward(query) for query in range(self.b)]
        if self.options.get("both_directions"):
            losses += [self.backward(query) for query in range(self.b)]
        return torch.stack(losses).mean()

    def imitation(self) -> Tensor:
        """Over all texts, 1 - cosine to what the guide says of the same text."""
        cosines = [v @ g / (v.norm() * g.norm()) for v, g in zip(self.vector, self.guide, strict=True)]
        return 1 - torch.stack(cosines).mean()

    def kl(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for query in range(self.b):
            group, scores = [self.b + query, *self.negatives(query)], torch.from_numpy(self.logits[query]).double()
            places = [
                n
                for n, row in enumerate(group)
                if not scores[n].isnan() and (n == 0 or self.text[row] != self.text[group[0]])
            ]
            if 0 in places and len(places) > 1:
                student = torch.log_softmax(
                    self.vector[[group[n] for n in places]] @ self.vector[query] / TEMPERATURE, 0
                )
                teacher = torch.softmax(scores[places], 0)
                total = total + (teacher * (teacher.log() - student)).sum()
        return total / self.b


@cache
def defined(name: str) -> tuple[float, Tensor, float, Tensor]:
    negatives, options, own_only = CASES[name]
    batch = whole_batch(negatives, own_only)
    embedded = vectors(batch, SIZE, 1).double().requires_grad_()
    contrast, teacher = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for size, weight in ((SIZE, 1.0), *options.get("sizes", ())):
        cut = embedded[:, :size]
        scene = Definition(batch, cut / cut.norm(dim=1, keepdim=True) if size < SIZE else cut, options)
        contrast = contrast + weight * scene.contrastive()
        teacher = teacher + weight * scene.kl()
    imitation = torch.zeros((), dtype=torch.float64)
    if options.get("guide_weight"):
        imitation = options["guide_weight"] * Definition(batch, embedded, options).imitation()
    both = ALPHA * contrast + teacher + imitation
    contrast = contrast + imitation
    (of_contrast,) = torch.autograd.grad(contrast, embedded, retain_graph=True)
    (of_both,) = torch.autograd.grad(both, embedded)
    return float(contrast.detach()), of_contrast, float(both.detach()), of_both


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_and_gradient_of_every_option_equal_the_definition_on_any_number_of_ranks(world: int, tmp_path: Path):
    names = list(CASES)
    found = [outcomes(names)] if world == 1 else ranks.run(outcomes, world, tmp_path, names)
    for number, name in enumerate(names):
        batch = whole_batch(CASES[name][0], CASES[name][2])
        contrast, of_contrast, both, of_both = defined(name)
        for place, wanted, wanted_gradient in ((0, contrast, of_contrast), (2, both, of_both)):
            losses = [outcome[number][place] for outcome in found]
            assert sum(losses) / world == pytest.approx(wanted, rel=1e-5), name
            for rank, outcome in enumerate(found):
                # The engine averages over ranks, so each rank's gradient is world times its share of the mean's.
                gradient = outcome[number][place + 1] / world
                expected = wanted_gradient[rows_of(batch, rank, world)]
                assert float((gradient.double() - expected).abs().max()) < 1e-5 * float(wanted_gradient.abs().max()), (
                    name
                )


def test_the_cases_hide_what_they_are_named_after():
    """Each option changes the loss of the plain case, else its test above shows nothing."""
    for name, (negatives, options, own_only) in CASES.items():
        if options or own_only:
            bare = Definition(
                whole_batch(negatives, False), vectors(whole_batch(negatives, False), SIZE, 1).double(), {}
            )
            assert abs(defined(name)[0] - float(bare.contrastive())) > 1e-4, name


@pytest.mark.parametrize(
    ("options", "peer"),
    [
        (
            {"both_directions": True},
            {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        ),
        ({"same_tower": True}, {"directions": ("query_to_doc", "query_to_query"), "partition_mode": "joint"}),
    ],
)
def test_directions_and_towers_equal_those_of_sentence_transformers(options: dict[str, Any], peer: dict[str, Any]):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    batch = batches.make(PAIRS, 2, 5)
    batch = replace(batch, query_hash=np.arange(PAIRS), passage_hash=np.arange(100, 100 + 3 * PAIRS))
    mine = vectors(batch, SIZE, 1).requires_grad_()
    loss, _ = contrastive(mine, batch, temperature=TEMPERATURE, options=Options(**options))
    (gradient,) = torch.autograd.grad(loss, mine)
    wide = mine.detach().double().requires_grad_()
    query, positive, hard = wide.split([PAIRS, PAIRS, 2 * PAIRS])
    theirs = losses.MultipleNegativesRankingLoss(model=None, scale=1 / TEMPERATURE, similarity_fct=torch_dot, **peer)
    wanted = theirs.compute_loss_from_embeddings([query, positive, hard[0::2], hard[1::2]], None)
    (expected,) = torch.autograd.grad(wanted, wide)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float((gradient.double() - expected).norm() / expected.norm()) < 1e-5


def torch_dot(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def test_figures_of_a_distillation_add_up_to_its_loss():
    batch = whole_batch(2, False)
    _, figures = distillation(vectors(batch, SIZE, 1), batch, temperature=TEMPERATURE, alpha=ALPHA)
    parts = float(figures["train/loss_distill"]) + ALPHA * float(figures["train/loss_contrastive"])
    assert float(figures["train/loss"]) == pytest.approx(parts, rel=1e-6)
    complete = (~np.isnan(batch.scores)).all(1)
    assert 0 < complete.mean() < 1
    assert float(figures["data/scored_frac"]) == pytest.approx(complete.mean())


def test_listwise_ranking_equals_a_softmax_over_each_group_in_float64():
    batch = batches.make(6, 3, 4)
    texts = batch.passage_hash.copy()
    texts[6] = texts[0]  # the first negative of the first query has the text of its positive
    batch = replace(batch, passage_hash=texts)
    logits = 3 * torch.randn(24, 1, generator=torch.Generator().manual_seed(0))
    ours, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, figures = ranking(ours, batch)
    loss.backward()
    losses, first = [], []
    for query in range(6):
        group = [query, *range(6 + 3 * query, 9 + 3 * query)]
        group = [row for row in group if row == query or texts[row] != texts[query]]
        losses.append(math.log(1.0) - torch.log_softmax(wide[group, 0], 0)[0])
        first.append(float(logits[group, 0].argmax() == 0))
    wanted = torch.stack(losses).mean()
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert torch.allclose(ours.grad.double(), wide.grad, atol=1e-7)
    assert float(figures["train/acc_top1"]) == pytest.approx(sum(first) / 6)
    assert 0 < sum(first) < 6
