"""Which passages become the hard negatives of a row: the rules alone, on arrays.

b rows, each with c candidates in rank order (best first). Passages are numbered 0 .. m - 1, no two with equal text;
what a row may not take is a sorted array of codes, `row * m + number`. Nothing here knows texts, models or files.

Every draw is a function of the row's own seed, so it does not depend on which rows stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.holdout import mix

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]
Seeds = NDArray[np.uint64]

NONE = -1  # a place without a passage


@dataclass(frozen=True)
class Rules:
    """How negatives are taken from the candidates.

    Attributes:
        skip_top, depth: the window, as ranks [skip_top, depth) among the candidates that are not banned.
        margin: a candidate scores at most positive - (1 - margin) * |positive|, which is `margin` times the positive's
            score where that is positive (TopK-PercPos of NV-Retriever, arXiv 2407.15831). None: no such limit.
        absolute_margin: a candidate scores at most positive - absolute_margin. None: no such limit.
    """

    skip_top: int = 0
    depth: int = 200
    margin: float | None = 0.95
    absolute_margin: float | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """What the rules took.

    Attributes:
        numbers: int64 [b, n], in rank order, NONE where a row has fewer.
        scores: float32 [b, n], NaN there.
        too_close: int64 [b], candidates of the window that the margin refused.
    """

    numbers: Ints
    scores: Floats
    too_close: Ints


def ceiling(positive: Floats, rules: Rules) -> NDArray[np.float64]:
    """float64 [b]: the highest score that a negative may have beside a positive of this score; inf without a margin."""
    exact = positive.astype(np.float64)
    limit = np.full(len(exact), np.inf)
    if rules.margin is not None:
        limit = np.minimum(limit, exact - (1 - rules.margin) * np.abs(exact))
    if rules.absolute_margin is not None:
        limit = np.minimum(limit, exact - rules.absolute_margin)
    return limit


def choose(
    numbers: Ints, scores: Floats, banned: Flags, positive: Floats, wanted: Ints, draws: Seeds | None, rules: Rules
) -> Found:
    """Take at most `wanted` candidates for each row: the best that the rules allow, or some of those drawn evenly.

    Args:
        numbers, scores, banned: [b, c], by falling score; banned ones have no rank.
        positive: float32 [b], the score of the row's own passage.
        wanted: int64 [b].
        draws: uint64 [b, c], a lot for each candidate: those with the smallest are taken. None: the best are.

    Returns:
        n is the largest of `wanted`.
    """
    rank = np.cumsum(~banned, axis=1) - 1
    window = ~banned & (rank >= rules.skip_top) & (rank < rules.depth)
    allowed = window & (scores <= ceiling(positive, rules)[:, None])
    turn = np.cumsum(allowed, axis=1) - 1 if draws is None else _turns(allowed, draws)
    taken = allowed & (turn < wanted[:, None])
    width = int(wanted.max(initial=0))
    return Found(
        _packed(numbers, taken, width, NONE),
        _packed(scores, taken, width, np.float32(np.nan)),
        (window & ~allowed).sum(axis=1),
    )


def _turns(allowed: Flags, draws: Seeds) -> Ints:
    """int64 [b, c]: the turn of every allowed candidate, by its lot."""
    last = np.uint64(np.iinfo(np.uint64).max)
    order = np.argsort(np.where(allowed, draws, last), axis=1, kind="stable")
    turn = np.empty_like(order)
    np.put_along_axis(turn, order, np.arange(order.shape[1])[None, :], axis=1)
    return turn


def _packed(values: NDArray, taken: Flags, width: int, empty: object) -> NDArray:
    """[b, width]: the taken values of every row, in their order, then `empty`."""
    packed = np.full((len(values), width), empty, values.dtype)
    rows, columns = np.nonzero(taken)
    places = (np.cumsum(taken, axis=1) - 1)[rows, columns]
    packed[rows, places] = values[rows, columns]
    return packed


def draw(size: int, wanted: Ints, seeds: Seeds, banned: Ints) -> Ints:
    """int64 [b, n]: `wanted` different numbers below `size` for each row, drawn evenly, none of them banned.

    n is the largest of `wanted`; a row for which there are not enough ends with NONE.
    A row walks start, start + stride, start + 2 stride, ... modulo size, with a start and a stride of its own. The
    stride has no common divisor with the size, so the walk comes to every number once and needs no memory.

    Args:
        seeds: uint64 [b].
        banned: sorted codes `row * size + number`.
    """
    width = int(wanted.max(initial=0))
    drawn = np.full((len(wanted), width), NONE, np.int64)
    have = np.zeros(len(wanted), np.int64)
    starts, strides = _walks(size, seeds)
    reach = 2 * width + 16
    for begin in range(0, size, reach):
        rows = np.flatnonzero(have < wanted)
        if not len(rows):
            break
        steps = np.arange(begin, min(begin + reach, size))
        numbers = (starts[rows, None] + strides[rows, None] * steps) % size
        free = ~among(rows[:, None] * size + numbers, banned)
        places = have[rows, None] + np.cumsum(free, axis=1) - 1
        at, column = np.nonzero(free & (places < wanted[rows, None]))
        drawn[rows[at], places[at, column]] = numbers[at, column]
        have[rows] += np.bincount(at, minlength=len(rows))
    return drawn


def _walks(size: int, seeds: Seeds) -> tuple[Ints, Ints]:
    """int64 [b] each: where a row's walk starts, and its stride."""
    assert size < 1 << 31, "a step of the walk must fit into int64"
    starts = (mix(seeds, 1) % np.uint64(size)).astype(np.int64)
    strides = (mix(seeds, 2) % np.uint64(max(1, size - 1))).astype(np.int64) + 1
    while len(shared := np.flatnonzero(np.gcd(strides, size) > 1)):
        strides[shared] = strides[shared] % size + 1
    return starts, strides


def among(codes: Ints, known: Ints) -> Flags:
    """Which codes (of any shape) stand in a sorted array."""
    if not len(known):
        return np.zeros(codes.shape, np.bool_)
    places = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    return known[places] == codes


def keep_given(rows: Ints, hashes: Ints, banned_rows: Ints, banned_hashes: Ints, most: int) -> Flags:
    """Which of the negatives that records bring along are kept: banned and repeated ones out, then `most` of each row.

    Args:
        rows, hashes: int64 [g], the row and the text hash of each, rows rising, in their order within a row.
        banned_rows, banned_hashes: int64 [x], the texts that a row may not have: its positives and its query.
    """
    _, codes = np.unique(np.concatenate([hashes, banned_hashes]), return_inverse=True)
    codes = np.concatenate([rows, banned_rows]) * (codes.max(initial=0) + 1) + codes
    mine, banned = codes[: len(rows)], np.unique(codes[len(rows) :])
    _, first = np.unique(mine, return_index=True)
    good = np.zeros(len(rows), np.bool_)
    good[first] = True
    good &= ~among(mine, banned)
    before: Ints = np.cumsum(good) - good  # good ones before each, over all rows
    starts = np.searchsorted(rows, rows)  # the first of the same row
    return good & (before - before[starts] < most)
