"""The learning rate of every update: linear warm-up, then linear decay."""

from __future__ import annotations


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate of update number `step`, counted from 0, of a run of `steps` updates.

    It rises to `peak` over the first `warmup_steps` updates and falls towards 0, which the update after the last one
    would have. The decay is that of transformers' get_linear_schedule_with_warmup. Its warm-up begins at 0, so that its
    first update changes nothing; here update s of the warm-up has (s + 1) / warmup_steps of the peak.
    """
    assert 0 <= step < steps, (step, steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps)
