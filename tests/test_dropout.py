"""Dropout on a CPU: how much is dropped, what stays, what comes back, and where it takes the place of torch's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from trainer import dropout
from trainer.dropout import Dropout, keep_mask
from trainer.encoder import open_model

KINDS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 1 / dropout.LEVELS, 0.9])
def test_as_many_are_dropped_as_were_asked_for_in_each_of_the_four_lanes(p: float) -> None:
    torch.manual_seed(0)
    count = 4_000_000
    kept = keep_mask((count,), p)
    assert set(kept.unique().tolist()) == {-1, 0}
    for lane in range(4):
        share = float((kept[lane::4] == 0).double().mean())
        assert abs(share - p) < 4 * (p * (1 - p) / (count / 4)) ** 0.5 + 0.5 / dropout.LEVELS


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    dropped = (keep_mask((2_000_000,), 0.3) == 0).double() - 0.3
    for distance in (1, 2, 3, 4, 8):
        correlation = float((dropped[distance:] * dropped[:-distance]).mean() / 0.21)
        assert abs(correlation) < 5 / len(dropped) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7,), (3, 5, 9), (64, 128)])
def test_what_stays_is_scaled_and_its_gradient_alike(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(kind).requires_grad_()
    torch.manual_seed(5)
    mask = keep_mask(shape, 0.25) == -1
    torch.manual_seed(5)
    out = Dropout(0.25).train()(values)
    wanted = torch.where(mask, values.double() / 0.75, 0.0)
    rounding = torch.finfo(kind).eps
    torch.testing.assert_close(out.double(), wanted, rtol=rounding, atol=0)
    out.backward(torch.ones_like(out) * 3)
    torch.testing.assert_close(values.grad.double(), torch.where(mask, 4.0, 0.0).double(), rtol=rounding, atol=0)


def test_values_of_another_layout_keep_their_places() -> None:
    values = torch.arange(1, 13, dtype=torch.float32).view(3, 4).T
    out = Dropout(0.5).train()(values)
    assert torch.equal(out[out != 0], (2 * values)[out != 0])


def test_a_seed_decides_the_mask() -> None:
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(keep_mask((100,), 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_nothing_is_dropped_out_of_training_or_with_p_0_and_all_with_1() -> None:
    values = torch.randn(50)
    assert torch.equal(Dropout(0.5).eval()(values), values)
    assert torch.equal(Dropout(0.0).train()(values), values)
    assert not Dropout(1.0).train()(values).any()


def test_other_types_are_left_to_torch() -> None:
    torch.manual_seed(0)
    found = Dropout(0.5).train()(torch.ones(10, dtype=torch.float64))
    torch.manual_seed(0)
    assert torch.equal(found, nn.Dropout(0.5).train()(torch.ones(10, dtype=torch.float64)))


@pytest.mark.parametrize("family", [tiny.bert, tiny.xlmr, tiny.mpnet])
def test_an_encoder_has_no_other_dropout_and_its_copies_have_their_own(family: object, tmp_path: Path) -> None:
    encoder = open_model(family(tmp_path / "model")).encoder  # type: ignore[operator]
    found = [module for module in encoder.modules() if isinstance(module, nn.Dropout)]
    assert found
    assert all(type(module) is Dropout and module.p == 0.1 and not module.training for module in found)
    copied = copy.deepcopy(encoder).train()
    assert all(module.training for module in copied.modules() if isinstance(module, nn.Dropout))
    assert not any(module.training for module in found)
