"""The choice of negatives against rules written down a second time, row by row in plain Python and float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.negatives import NONE, Found, Rules, among, ceiling, choose, draw, keep_given

ROWS, CANDIDATES, SIZE = 6, 20, 50


def _block(seed: int) -> dict[str, Any]:
    """Random candidates by falling score, some banned; scores are rounded, so that many are equal."""
    random = np.random.default_rng(seed)
    numbers = np.stack([random.permutation(SIZE)[:CANDIDATES] for _ in range(ROWS)])
    scores = np.sort(random.uniform(-1, 1, (ROWS, CANDIDATES)).round(2).astype(np.float32), axis=1)[:, ::-1].copy()
    return {
        "numbers": numbers,
        "scores": scores,
        "banned": random.random((ROWS, CANDIDATES)) < 0.2,
        "positive": random.uniform(-0.5, 1, ROWS).round(2).astype(np.float32),
        "wanted": random.integers(0, 8, ROWS),
        "draws": random.integers(0, 1 << 63, (ROWS, CANDIDATES)).astype(np.uint64),
    }


def _limit(positive: float, rules: Rules) -> float:
    """The margin in words: 95 % of a good positive's score; as far below a negative one; and the absolute distance."""
    limit = math.inf
    if rules.margin is not None:
        limit = positive * rules.margin if positive > 0 else positive * (2 - rules.margin)
    if rules.absolute_margin is not None:
        limit = min(limit, positive - rules.absolute_margin)
    return limit


def _reference(block: dict[str, Any], row: int, rules: Rules) -> tuple[list[int], list[float], int]:
    """(numbers, scores, refused by the margin) of one row."""
    limit = _limit(float(block["positive"][row]), rules)
    free = [place for place in range(CANDIDATES) if not block["banned"][row, place]]
    window = free[rules.skip_top : rules.depth]
    good = [place for place in window if float(block["scores"][row, place]) <= limit + 1e-12]
    wanted = int(block["wanted"][row])
    if block["draws"] is not None:
        taken = sorted(sorted(good, key=lambda place: int(block["draws"][row, place]))[:wanted])
    else:
        taken = good[:wanted]
    numbers = [int(block["numbers"][row, place]) for place in taken]
    return numbers, [float(block["scores"][row, place]) for place in taken], len(window) - len(good)


def _row(found: Found, row: int) -> tuple[list[int], list[float], int]:
    there = found.numbers[row] != NONE
    assert np.array_equal(there, np.arange(len(there)) < there.sum()), "places without a passage come last"
    assert np.isnan(found.scores[row, ~there]).all()
    return found.numbers[row, there].tolist(), found.scores[row, there].tolist(), int(found.too_close[row])


RULES = [
    Rules(margin=None),
    Rules(margin=0.95),
    Rules(margin=0.5, skip_top=2),
    Rules(margin=None, absolute_margin=0.1, depth=7),
    Rules(margin=0.9, absolute_margin=0.05),
    Rules(margin=None, skip_top=3, depth=12),
]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_choice_is_that_of_the_rules_read_row_by_row(rules: Rules, drawn: bool) -> None:
    for seed in range(20):
        block = _block(seed)
        block["draws"] = block["draws"] if drawn else None
        found = choose(**block, rules=rules)
        assert found.numbers.shape == (ROWS, block["wanted"].max())
        assert [_row(found, row) for row in range(ROWS)] == [_reference(block, row, rules) for row in range(ROWS)]


def test_a_relative_margin_of_a_negative_score_keeps_its_distance_below_it() -> None:
    assert ceiling(np.float32([0.8, 0.0, -0.5]), Rules(margin=0.95)) == pytest.approx([0.76, 0.0, -0.525], abs=1e-7)


def test_a_row_is_chosen_alike_whatever_stands_beside_it() -> None:
    block, rules = _block(0), Rules(margin=0.9)
    together = choose(**block, rules=rules)
    for row in range(ROWS):
        alone = choose(**{name: value[row : row + 1] for name, value in block.items()}, rules=rules)
        assert _row(alone, 0) == _row(together, row)


def test_random_sampling_takes_every_candidate_equally_often() -> None:
    rows, rules = 4000, Rules(margin=None, depth=10)
    random = np.random.default_rng(0)
    found = choose(
        numbers=np.tile(np.arange(20), (rows, 1)),
        scores=np.tile(np.linspace(1, 0, 20, dtype=np.float32), (rows, 1)),
        banned=np.zeros((rows, 20), bool),
        positive=np.ones(rows, np.float32),
        wanted=np.full(rows, 3),
        draws=random.integers(0, 1 << 63, (rows, 20)).astype(np.uint64),
        rules=rules,
    )
    counts = np.bincount(found.numbers.ravel(), minlength=20)
    assert (counts[10:] == 0).all()
    assert (abs(counts[:10] - 1200) < 6 * math.sqrt(1200 * 0.7)).all()


# --- random passages -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 99), st.data())
def test_draws_are_different_allowed_and_as_many_as_there_can_be(
    size: int, wanted: list[int], seed: int, data: st.DataObject
) -> None:
    rows = len(wanted)
    banned = data.draw(st.sets(st.integers(0, rows * size - 1), max_size=rows * size))
    seeds = np.random.default_rng(seed).integers(0, 1 << 63, rows).astype(np.uint64)
    drawn = draw(size, np.array(wanted), seeds, np.array(sorted(banned), np.int64))
    for row in range(rows):
        numbers = [number for number in drawn[row].tolist() if number != NONE]
        allowed = {number for number in range(size) if row * size + number not in banned}
        assert len(numbers) == len(set(numbers)) == min(wanted[row], len(allowed))
        assert set(numbers) <= allowed
        alone = np.array(sorted(code - row * size for code in banned if code // size == row), np.int64)
        by_itself = draw(size, np.array(wanted[row : row + 1]), seeds[row : row + 1], alone)[0].tolist()
        assert by_itself == numbers + [NONE] * (wanted[row] - len(numbers))


@pytest.mark.parametrize("size", [97, 96])
def test_draws_are_even(size: int) -> None:
    rows = 20_000
    seeds = np.arange(rows).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    drawn = draw(size, np.full(rows, 5), seeds, np.zeros(0, np.int64))
    for place in range(5):
        counts = np.bincount(drawn[:, place], minlength=size)
        assert (abs(counts - rows / size) < 6 * math.sqrt(rows / size)).all()


# --- negatives that were there before ------------------------------------------------------------------------------


def test_given_negatives_are_kept_in_order_without_repeats_and_forbidden_texts() -> None:
    rows = np.array([0, 0, 0, 0, 2, 2, 2, 2])
    texts = np.array([-5, 7, -5, 9, 7, 7, 8, 9])
    kept = keep_given(rows, texts, np.array([0, 2, 1]), np.array([9, 8, 7]), most=2)
    assert kept.tolist() == [True, True, False, False, True, False, False, True]
    assert keep_given(rows, texts, np.array([0, 2]), np.array([7, 9]), 1).tolist() == [
        True,
        *[False] * 3,
        True,
        *[False] * 3,
    ]


def test_no_given_negatives_are_no_trouble() -> None:
    empty = np.zeros(0, np.int64)
    assert keep_given(empty, empty, np.array([0]), np.array([3]), 7).tolist() == []


def test_membership_is_that_of_a_set() -> None:
    known = np.array([-(1 << 62), -3, 0, 8, 1 << 62])
    codes = np.array([[-3, 7], [1 << 62, -(1 << 62)], [9, 1]])
    assert among(codes, known).tolist() == [[code in known.tolist() for code in row] for row in codes.tolist()]
    assert not among(codes, known[:0]).any()
