"""Scores of vectors rounded to bf16, with how far they can be from those of the vectors themselves.

Where a processor multiplies bf16 several times faster than fp32 (`device.has_fast_bf16`), products of rounded vectors
settle almost all comparisons with a bar. Only a score so near its bar that rounding might have moved it across has to
be computed in fp32, so that the outcome is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainer.device import inner_products

_RELATIVE = 2.0**-8  # of rounding a number to bf16


@dataclass(frozen=True)
class Rounded:
    """Vectors [n, D] in fp32 and rounded to bf16; the lengths [n] of what each has lost by that and of what it kept."""

    exact: Tensor
    rounded: Tensor
    lost: Tensor
    kept: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Rounded:
        rounded = vectors.bfloat16()
        back = rounded.float()
        return cls(vectors, rounded, (vectors - back).norm(dim=1), back.norm(dim=1))

    def __len__(self) -> int:
        return len(self.exact)


def scores_and_limits(queries: Rounded, passages: Rounded, bars: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 scores [n, m], and what they say of each row's bar: low [n] and high [n].

    An exact score above its row's bar has a rounded one above low; a rounded one above high has an exact one above the
    bar. By Cauchy and Schwarz: q.p - q'.p' = q.(p - p') + (q - q').p', each at most the product of the lengths; then
    the sum is rounded once more.

    Args:
        bars: fp32 [n].
        out: memory for n * m results, bf16.
    """
    scores = inner_products(queries.rounded, passages.rounded, out)
    error = (queries.kept + queries.lost) * passages.lost.max() + queries.lost * passages.kept.max()
    low, high = bars - error, bars + error
    return scores, low - _RELATIVE * low.abs(), high + _RELATIVE * high.abs()
