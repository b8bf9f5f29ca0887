"""Attention as it is written out for training on a CPU, against the formula in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import attention, dropout, gradcache

SHAPE = (3, 4, 11, 8)  # texts, heads, tokens, numbers of a head
LENGTHS = (11, 7, 1)


def inputs(kind: torch.dtype, queries: int = SHAPE[2]) -> list[Tensor]:
    """Queries of the first tokens of each text, and all keys and values."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(SHAPE, generator=generator).to(kind) for _ in range(3)]
    return [tensor.requires_grad_() for tensor in (made[0][:, :, :queries].clone(), *made[1:])]


def mask_of(rows: int) -> Tensor:
    """bool [n, 1, rows, T], True on tokens."""
    mask = torch.arange(SHAPE[2]) < torch.tensor(LENGTHS)[:, None]
    return mask[:, None, None].expand(-1, 1, rows, -1)


def attend(rows: list[Tensor], mask: Tensor | None, p: float, *, training: bool = True) -> Tensor:
    attended, _ = attention.attention(SimpleNamespace(training=training, is_causal=False), *rows, mask, dropout=p)  # type: ignore[arg-type]
    return attended.transpose(1, 2)


def formula(rows: list[Tensor], mask: Tensor | None, kept: Tensor | None, p: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with a given mask of dropout, in float64 (Vaswani et al. 2017, section 3.2.1)."""
    query, key, value = rows
    scores = query @ key.mT / math.sqrt(SHAPE[3])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)
    if kept is not None:
        weights = weights * (kept.view(weights.shape) == -1) / (1 - p)
    return weights @ value


CASES = [(p, rows, SHAPE[2]) for p in (0.0, 0.25) for rows in (0, 1, SHAPE[2])]
FIRST_ONLY = [(p, rows, 1) for p in (0.0, 0.25) for rows in (0, 1)]


@pytest.mark.parametrize(("kind", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("p", "rows", "queries"), CASES + FIRST_ONLY)
def test_output_and_gradients_are_the_formulas(
    kind: torch.dtype, error: float, p: float, rows: int, queries: int
) -> None:
    given, mask = inputs(kind, queries), mask_of(rows) if rows else None
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    torch.manual_seed(9)
    kept = dropout.keep_mask((SHAPE[0] * SHAPE[1], queries, SHAPE[2]), p) if p else None
    torch.manual_seed(9)
    found, wanted = attend(given, mask, p), formula(exact, mask, kept, p)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(kind)
    found.backward(upstream)
    wanted.backward(upstream.double())
    assert found.dtype == kind
    pairs = [(found, wanted), *((tensor.grad, twin.grad) for tensor, twin in zip(given, exact, strict=True))]
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        assert float((ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm()) < error


def test_out_of_training_nothing_is_dropped_and_padding_is_not_seen() -> None:
    given, mask = inputs(torch.float32), mask_of(SHAPE[2])
    wanted = formula([tensor.double() for tensor in given], mask, None, 0.0)
    assert torch.allclose(attend(given, mask, 0.0, training=False).double(), wanted, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_pass_without_gradients_gives_what_its_replay_gives(p: float) -> None:
    given = inputs(torch.bfloat16)
    torch.manual_seed(2)
    replayed = attend(given, mask_of(1), p)
    torch.manual_seed(2)
    with torch.no_grad():
        first = attend(given, mask_of(1), p)
    assert torch.equal(first, replayed)


@pytest.mark.parametrize(("kind", "held"), [(torch.bfloat16, 4), (torch.float32, 6)])
def test_two_tensors_of_the_weights_size_are_held_for_the_backward(kind: torch.dtype, held: int) -> None:
    rows: list[Any] = [torch.randn(2, 4, 128, 8).to(kind).requires_grad_() for _ in range(3)]
    bytes_held = gradcache.activation_bytes(lambda: attend(rows, None, 0.1), rows)
    assert bytes_held / (2 * 4 * 128 * 128) == pytest.approx(held, rel=0.15)
