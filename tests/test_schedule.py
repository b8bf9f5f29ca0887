"""The learning rate against transformers' linear schedule."""

from __future__ import annotations

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from trainer.schedule import learning_rate


def _transformers_rates(steps: int, warmup_steps: int, peak: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("steps", "warmup_steps"), [(100, 10), (7, 3), (50, 0), (5, 5)])
def test_decay_is_that_of_transformers_and_warmup_is_one_update_ahead(steps: int, warmup_steps: int) -> None:
    theirs = _transformers_rates(steps + 1, warmup_steps, 3e-4)
    ours = [learning_rate(step, steps, warmup_steps, 3e-4) for step in range(steps)]
    assert ours[:warmup_steps] == pytest.approx(theirs[1 : warmup_steps + 1])
    decay = _transformers_rates(steps, warmup_steps, 3e-4)[warmup_steps:]
    assert ours[warmup_steps:] == pytest.approx(decay)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 1), (30_000, 1_000), (10, 20)])
def test_no_update_is_wasted_and_none_exceeds_the_peak(steps: int, warmup_steps: int) -> None:
    rates = [learning_rate(step, steps, warmup_steps, 1.0) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) <= 1.0
    if warmup_steps <= steps:
        assert max(rates) == 1.0
