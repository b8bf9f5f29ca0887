"""Bitext mining by the ratio margin: a pair's cosine over the mean of both sides' nearest neighbours.

Source: Artetxe & Schwenk 2019, arXiv 1811.01136, equation 2 with the ratio. Sentences that are near to everything
lose their advantage by it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEIGHBOURS = 4  # k of the paper
_PAIRS_AT_ONCE = 16_777_216  # scores of a block, 64 MiB


def best_by_margin(
    left: Tensor, right: Tensor, neighbours: int = NEIGHBOURS, device: torch.device | str = "cpu"
) -> Tensor:
    """For each vector of `left`, the number of the vector of `right` with the largest margin: int64 [n].

    left [n, D], right [m, D] with length 1; of equal margins the lower number is taken.
    """
    left, right = left.to(device), right.to(device)
    near_left = _mean_of_nearest(left, right, neighbours)
    near_right = _mean_of_nearest(right, left, neighbours)
    found = []
    for rows, means in zip(_blocks(left, len(right)), _blocks(near_left, len(right)), strict=True):
        margins = (rows @ right.T) / ((means[:, None] + near_right) / 2)
        found.append(margins.argmax(dim=1))
    return torch.cat(found).cpu()


def f1_of_each(found: NDArray[Any]) -> NDArray[np.float64]:
    """F1 of each sentence on the right, float64 [n], where the right answer of sentence i is i; `found` int64 [n].

    Their mean is the F1 that mteb reports, weighted by labels that all stand for one sentence.
    """
    count = len(found)
    times_found = np.bincount(found, minlength=count)[:count]
    return 2.0 * (found == np.arange(count)) / (1 + times_found)


def _mean_of_nearest(vectors: Tensor, others: Tensor, neighbours: int) -> Tensor:
    """The mean cosine of each vector to its nearest `others`: [n]."""
    count = min(neighbours, len(others))
    blocks = _blocks(vectors, len(others))
    return torch.cat([(rows @ others.T).topk(count, dim=1).values.mean(dim=1) for rows in blocks])


def _blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, _PAIRS_AT_ONCE // max(1, columns)))
