"""The terms of distillation against float64 and sentence-transformers; their whole step is in test_step.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import steps
import torch
from torch import Tensor

from trainer.losses import kl_to_teacher, margin_mse

NAN = math.nan


def random_groups(rows: int, passages: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and a teacher's logits, each [rows, passages]."""
    generator = torch.Generator().manual_seed(seed)
    similarity = 0.5 + 0.3 * torch.randn(rows, passages, generator=generator).clamp(-1, 1)
    return similarity, 5 * torch.randn(rows, passages, generator=generator)


def kl_by_definition(similarity: Tensor, teacher: Tensor, hidden: Tensor, temperature: float) -> Tensor:
    """sum p (log p - log q) over each row's places that are scored and not hidden, in float64, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for student, wanted, off in zip(similarity.double(), teacher.double(), hidden, strict=True):
        places = [n for n in range(len(student)) if not off[n] and not wanted[n].isnan()]
        if 0 in places and len(places) > 1:
            p = torch.softmax(wanted[places], 0)
            total = total + (p * (p.log() - torch.log_softmax(student[places] / temperature, 0))).sum()
    return total / len(similarity)


def margins_by_definition(similarity: Tensor, teacher: Tensor, hidden: Tensor, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for student, wanted, off in zip(similarity.double() / temperature, teacher.double(), hidden, strict=True):
        places = [n for n in range(1, len(student)) if not off[n] and not wanted[n].isnan()]
        if places and not wanted[0].isnan():
            total = total + sum(((student[0] - student[n]) - (wanted[0] - wanted[n])) ** 2 for n in places) / len(
                places
            )
    return total / len(similarity)


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize(
    ("ours", "definition"), [(kl_to_teacher, kl_by_definition), (margin_mse, margins_by_definition)]
)
def test_value_and_gradient_equal_float64_by_definition(ours: Any, definition: Any, temperature: float):
    similarity, teacher = random_groups(12, 5)
    hidden = torch.zeros_like(teacher, dtype=torch.bool)
    teacher[1] = NAN  # no score at all
    teacher[2, 0] = NAN  # none for the positive
    teacher[3, 1:] = NAN  # for the positive alone
    teacher[4, 2] = NAN
    hidden[5, 3] = hidden[4, 4] = True
    hidden[6, 1:] = True
    student, reference = similarity.clone().requires_grad_(), similarity.double().requires_grad_()
    loss = ours(student, teacher, temperature=temperature, hidden=hidden)
    (3 * loss).backward()
    wanted = definition(reference, teacher, hidden, temperature)
    wanted.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert student.grad is not None
    assert reference.grad is not None
    assert float((student.grad.double() - 3 * reference.grad).norm() / reference.grad.norm()) < 1e-5
    assert not student.grad[[1, 2, 3, 6]].any()


def test_rows_without_scores_add_nothing_and_count_in_the_mean():
    similarity, teacher = random_groups(4, 3)
    alone = kl_to_teacher(similarity[:1], teacher[:1], temperature=0.1)
    teacher[1:] = NAN
    assert kl_to_teacher(similarity, teacher, temperature=0.1).item() == pytest.approx(alone.item() / 4)
    teacher[:] = NAN
    student = similarity.clone().requires_grad_()
    nothing = kl_to_teacher(student, teacher, temperature=0.1)
    nothing.backward()
    assert nothing.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


def test_a_teacher_that_is_sure_and_wrong_gives_a_finite_loss():
    similarity, teacher = torch.tensor([[-1.0, 1.0]]), torch.tensor([[50.0, -50.0]])
    assert kl_to_teacher(similarity, teacher, temperature=0.01).item() == pytest.approx(200.0)


def test_kl_equals_sentence_transformers_distill_kl_div_loss():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    query, positive, *negatives = embedded = [steps.unit(6, 16, seed) for seed in range(5)]
    teacher = 4 * torch.randn(6, 4, generator=torch.Generator().manual_seed(9))
    # Their student logits are dot products, so the temperature goes into the queries.
    peer = losses.DistillKLDivLoss(model=None, similarity_fct=lambda a, b: (a * b).sum(-1) / 0.02)
    theirs = [vectors.double().requires_grad_() for vectors in embedded]
    expected = peer.compute_loss_from_embeddings(theirs, teacher.double())
    expected.backward()
    q = query.clone().requires_grad_()
    group = torch.stack([positive, *negatives], dim=1)
    loss = kl_to_teacher((q[:, None] * group).sum(-1), teacher, temperature=0.02)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(q.grad.double(), theirs[0].grad, rtol=1e-4, atol=1e-6)


def test_margin_mse_equals_sentence_transformers_margin_mse_loss():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    query, positive, *negatives = embedded = [steps.unit(6, 16, seed) for seed in range(5)]
    teacher = 4 * torch.randn(6, 4, generator=torch.Generator().manual_seed(9))
    peer = losses.MarginMSELoss(model=None, similarity_fct=lambda a, b: (a * b).sum(-1) / 0.1)
    theirs = [vectors.double().requires_grad_() for vectors in embedded]
    expected = peer.compute_loss_from_embeddings(theirs, (teacher[:, :1] - teacher[:, 1:]).double())
    expected.backward()
    q = query.clone().requires_grad_()
    group = torch.stack([positive, *negatives], dim=1)
    loss = margin_mse((q[:, None] * group).sum(-1), teacher, temperature=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(q.grad.double(), theirs[0].grad, rtol=1e-4, atol=1e-6)
