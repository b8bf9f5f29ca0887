"""InfoNCE of a global pool against float64 autograd, and against sentence-transformers on the same embeddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import losses
from trainer.losses import NO_OWNER, Filters, Identity, info_nce


def embeddings(rows: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, size, generator=generator), dim=1)


def related(query: Tensor, seed: int, noise: float = 0.3) -> Tensor:
    """Passages near their queries, as a trained model has them: logits then really span -100..100."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(query + noise * torch.randn(query.shape, generator=generator), dim=1)


def distinct(queries: int, candidates: int, first: int = 0) -> Identity:
    owner = torch.full((candidates,), NO_OWNER)
    owner[first : first + queries] = torch.arange(queries)
    positive = torch.arange(first, first + queries)
    return Identity(torch.arange(queries), positive, torch.arange(candidates) + 10_000, owner)


def crowded(queries: int, candidates: int, first: int = 0) -> Identity:
    """Many equal texts: about every second row has candidates to hide, some by both rules at once."""
    generator = torch.Generator().manual_seed(5)
    query = torch.randint(0, queries // 2, (queries,), generator=generator)
    owner = torch.full((candidates,), NO_OWNER)
    owner[:first] = torch.randint(0, queries // 2, (first,), generator=generator)
    owner[first : first + queries] = query
    passage = torch.randint(0, candidates // 2, (candidates,), generator=generator)
    return Identity(query, torch.arange(first, first + queries), passage, owner)


def hidden_by_definition(identity: Identity) -> Tensor:
    """The mask [B, G] cell by cell, as the docstring of info_nce words it."""
    mask = torch.zeros(len(identity.query), len(identity.passage), dtype=torch.bool)
    for row, (query, positive) in enumerate(zip(identity.query.tolist(), identity.positive.tolist(), strict=True)):
        for column in range(mask.shape[1]):
            same_passage = identity.passage[column] == identity.passage[positive]
            same_query = identity.owner[column] == query
            mask[row, column] = bool(same_passage or same_query) and column != positive
    return mask


def reference(query: Tensor, passage: Tensor, identity: Identity, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by float64 autograd over the full matrix."""
    q, p = query.double().requires_grad_(), passage.double().requires_grad_()
    logits = (q @ p.T / temperature).masked_fill(hidden_by_definition(identity), -torch.inf)
    loss = F.cross_entropy(logits, identity.positive)
    loss.backward()
    assert q.grad is not None
    assert p.grad is not None
    return loss.detach(), q.grad, p.grad


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("block_rows", [1, 7, 40, 0])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize(("identity", "ahead"), [(distinct, 64), (crowded, 64), (crowded, 0)])
@pytest.mark.parametrize(("negatives", "first"), [(0, 0), (3, 25)])
def test_value_and_gradients_equal_float64_autograd(
    block_rows, temperature, identity, ahead, negatives, first, monkeypatch
):
    monkeypatch.setattr(losses, "_LOOK_AHEAD", ahead)  # 0: equal texts are found block by block
    rows, candidates = 40, first + 40 * (1 + negatives) + 15
    query, passage = embeddings(rows, 24, 1), embeddings(candidates, 24, 2)
    passage[first : first + rows] = related(query, 3)
    who = identity(rows, candidates, first)
    q, p = query.clone().requires_grad_(), passage.clone().requires_grad_()
    loss, _ = info_nce(q, p, who, temperature=temperature, block_rows=block_rows)
    (3 * loss).backward()
    wanted, grad_query, grad_passage = reference(query, passage, who, temperature)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert relative(q.grad, 3 * grad_query) < 1e-5
    assert relative(p.grad, 3 * grad_passage) < 1e-5


def test_a_positive_far_below_the_best_candidate_gives_a_finite_loss():
    query, passage = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    who = Identity(torch.tensor([1]), torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([1, NO_OWNER]))
    loss, pool = info_nce(query, passage, who, temperature=0.01)
    assert loss.item() == pytest.approx(200.0)  # -100 against +100
    assert float(pool.accuracy) == 0.0


def test_figures_of_the_pool_equal_a_count_by_hand():
    query, passage = embeddings(30, 16, 1), embeddings(90, 16, 2)
    passage[:30] = related(query, 3, noise=1.0)
    who = crowded(30, 90)
    _, pool = info_nce(query, passage, who, temperature=0.05, block_rows=8)
    hidden, similarity = hidden_by_definition(who), query.double() @ passage.double().T
    rows = torch.arange(30)
    negative = ~hidden
    negative[rows, rows] = False
    means = (similarity * negative).sum(1) / negative.sum(1)
    best = similarity.masked_fill(hidden, -torch.inf).argmax(1)
    assert float(pool.accuracy) == pytest.approx(float((best == rows).double().mean()))
    assert 0.0 < float(pool.accuracy) < 1.0
    assert float(pool.positive_similarity) == pytest.approx(float(similarity[rows, rows].mean()), abs=1e-6)
    assert float(pool.negative_similarity) == pytest.approx(float(means.mean()), abs=1e-6)
    assert float(pool.masked) == pytest.approx(float(hidden.sum(1).double().mean()))


def test_equal_texts_everywhere_leave_nothing_to_learn():
    query, passage = embeddings(6, 8, 1), embeddings(6, 8, 2)
    who = Identity(
        torch.zeros(6, dtype=torch.int64), torch.arange(6), torch.arange(6), torch.zeros(6, dtype=torch.int64)
    )
    q = query.clone().requires_grad_()
    loss, pool = info_nce(q, passage, who, temperature=0.01)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert float(q.grad.abs().max()) == pytest.approx(0.0, abs=1e-6)
    assert float(pool.masked) == 5.0


def test_own_hard_negatives_stay_negatives_though_their_query_is_the_same():
    query, passage = embeddings(2, 8, 1), embeddings(6, 8, 2)
    who = distinct(2, 6)
    _, pool = info_nce(query, passage, who, temperature=0.01)
    assert float(pool.masked) == 0.0


def test_a_hard_negative_with_the_positives_text_is_hidden():
    query, passage = embeddings(2, 8, 1), embeddings(4, 8, 2)
    who = Identity(
        torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([7, 8, 7, 9]), torch.tensor([1, 2, NO_OWNER, NO_OWNER])
    )
    _, pool = info_nce(query, passage, who, temperature=0.01)
    assert float(pool.masked) == 0.5  # one candidate of the first row, none of the second


def test_bf16_embeddings_get_bf16_gradients_of_an_fp32_loss():
    query, passage = embeddings(16, 32, 1), related(embeddings(16, 32, 1), 2)
    q, p = query.bfloat16().requires_grad_(), passage.bfloat16().requires_grad_()
    loss, _ = info_nce(q, p, distinct(16, 16), temperature=0.01)
    loss.backward()
    wanted, grad_query, _ = reference(q.detach().float(), p.detach().float(), distinct(16, 16), 0.01)
    assert loss.item() == pytest.approx(float(wanted), rel=1e-5)
    assert q.grad.dtype == torch.bfloat16
    assert relative(q.grad.float(), grad_query) < 5e-3


@pytest.mark.parametrize("negatives", [0, 3])
def test_loss_and_gradient_equal_sentence_transformers_multiple_negatives_ranking(negatives):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    query, positive = embeddings(32, 24, 1), related(embeddings(32, 24, 1), 2, noise=1.5)
    hard = [embeddings(32, 24, 3 + number) for number in range(negatives)]
    theirs = [text.double().requires_grad_() for text in (query, positive, *hard)]
    peer = losses.MultipleNegativesRankingLoss(model=None, scale=100.0)
    expected = peer.compute_loss_from_embeddings(theirs, None)
    expected.backward()
    q = query.clone().requires_grad_()
    p = torch.cat([positive, *hard]).requires_grad_()
    # Cosine there, so both sides start before the normalisation.
    loss, _ = info_nce(F.normalize(q), F.normalize(p), distinct(32, 32 * (1 + negatives)), temperature=0.01)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(q.grad, theirs[0].grad.double()) < 1e-5
    assert relative(p.grad, torch.cat([text.grad for text in theirs[1:]]).double()) < 1e-5


# --- filters ----------------------------------------------------------------------------------------------------------


def filters_by_definition(similarity: Tensor, guided: Tensor, identity: Identity, filters: Filters) -> Tensor:
    """The mask [B, G] of the filters cell by cell, as the docstring of Filters words it."""
    mask = hidden_by_definition(identity)
    for row, positive in enumerate(identity.positive.tolist()):
        group = filters.group[row].tolist()
        for column in range(mask.shape[1]):
            far = similarity[row, column] > similarity[row, positive] + filters.margin
            judged = guided[row, column] > guided[row, positive] + filters.guide_margin
            named = column in group and bool(filters.hidden[row, group.index(column)])
            alone = bool(filters.own_only[row]) and column not in group
            mask[row, column] |= bool(far or judged or named or alone) and column != positive
    return mask


@pytest.mark.parametrize("block_rows", [1, 7, 20, 0])
@pytest.mark.parametrize("identity", [distinct, crowded])
def test_filters_hide_what_they_name_in_blocks_of_any_size(block_rows, identity):
    rows, candidates = 20, 60
    query, passage = embeddings(rows, 24, 1), embeddings(candidates, 24, 2)
    passage[:rows] = related(query, 3, noise=2.0)
    who, generator = identity(rows, candidates), torch.Generator().manual_seed(4)
    group = torch.column_stack([torch.arange(rows), rows + torch.arange(2 * rows).view(rows, 2)])
    filters = Filters(
        margin=0.25,
        guide=(embeddings(rows, 8, 6), embeddings(candidates, 8, 7)),
        guide_margin=0.4,
        group=group,
        hidden=torch.rand(rows, 3, generator=generator) < 0.3,  # the positive's own place is to be passed over
        own_only=torch.arange(rows) % 5 == 0,
    )
    q, p = query.clone().requires_grad_(), passage.clone().requires_grad_()
    loss, pool = info_nce(q, p, who, temperature=0.1, block_rows=block_rows, filters=filters)
    loss.backward()
    wide_q, wide_p = query.double().requires_grad_(), passage.double().requires_grad_()
    guided = filters.guide[0].double() @ filters.guide[1].double().T
    mask = filters_by_definition((query.double() @ passage.double().T), guided, who, filters)
    wanted = F.cross_entropy((wide_q @ wide_p.T / 0.1).masked_fill(mask, -torch.inf), who.positive)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert relative(q.grad, wide_q.grad) < 1e-5
    assert relative(p.grad, wide_p.grad) < 1e-5
    assert float(pool.masked) == pytest.approx(float(mask.sum(1).double().mean()))
    similarity, negative = query.double() @ passage.double().T, ~mask
    negative[torch.arange(rows), who.positive] = False
    means = (similarity * negative).sum(1) / negative.sum(1).clamp(min=1)
    assert float(pool.negative_similarity) == pytest.approx(float(means.mean()), abs=1e-6)
