"""The rank count against brute force, ties and equal texts included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import rankcount, rounding
from trainer.device import inner_products
from trainer.rankcount import TIES, count_above, own_scores

TIE = TIES["fp32"]


def _counts(queries: torch.Tensor, own: torch.Tensor, pool: torch.Tensor, same: torch.Tensor) -> np.ndarray:
    scores = queries.double().numpy() @ pool.double().numpy().T
    above = scores > own.double().numpy()[:, None] + TIE
    for row, number in enumerate(same.tolist()):
        if number >= 0:
            above[row, number] = False
    return above.sum(axis=1)


@pytest.fixture(params=[False, True], ids=["fp32", "bf16 first"])
def rough(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to count, whatever this processor is good at."""
    monkeypatch.setattr(rankcount, "has_fast_bf16", lambda kind: request.param)
    return bool(request.param)


@pytest.mark.parametrize("bf16", [False, True])
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), m=st.integers(1, 60), limit=st.integers(1, 70), seed=st.integers(0, 10_000))
def test_counts_are_those_of_the_whole_matrix_up_to_the_limit(
    bf16: bool, n: int, m: int, limit: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    queries = torch.randint(-2, 3, (n, 3), generator=random).float()  # small integers: exact products, many ties
    pool = torch.randint(-2, 3, (m, 3), generator=random).float()
    own = torch.randint(-6, 7, (n,), generator=random).float()
    same = torch.randint(-1, m, (n,), generator=random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankcount, "has_fast_bf16", lambda kind: bf16)
        patch.setattr(rankcount, "_FIRST_BLOCK", 3)
        patch.setattr(rankcount, "_LAST_BLOCKS", {"cpu": 12})
        patch.setattr(rankcount, "_TILES", {"cpu": 40})
        patch.setattr(rankcount, "_PAIRS", 5)
        found = count_above(queries, own, pool, same, limit=limit)
    np.testing.assert_array_equal(found.numpy(), np.minimum(_counts(queries, own, pool, same), limit))


def test_a_pair_does_not_lose_to_its_own_text_or_to_one_with_nearly_the_same_vector(rough: bool) -> None:
    random = torch.Generator().manual_seed(1)
    queries = F.normalize(torch.randn(200, 64, generator=random), dim=1)
    passages = F.normalize(torch.randn(200, 64, generator=random), dim=1)
    own = own_scores(queries, passages)
    twins = F.normalize(passages + 1e-6 * torch.randn(200, 64, generator=random), dim=1)
    none = torch.full((200,), -1)
    for number in range(0, 200, 20):
        row = slice(number, number + 1)
        assert count_above(queries[row], own[row], passages[row], none[row], limit=9).tolist() == [0]
        assert count_above(queries[row], own[row], twins[row], none[row], limit=9).tolist() == [0]
    better = passages + 10 * TIE * queries
    same = torch.arange(200)
    assert (
        count_above(queries, own, better, none, limit=500) - count_above(queries, own, better, same, limit=500) == 1
    ).all()


def test_real_vectors_in_a_float16_pool_get_their_true_rank(rough: bool) -> None:
    random = torch.Generator().manual_seed(2)
    queries = F.normalize(torch.randn(300, 48, generator=random), dim=1)
    passages = F.normalize(torch.randn(300, 48, generator=random) + 1.5 * queries, dim=1).half().float()
    pool = torch.cat([passages, F.normalize(torch.randn(2000, 48, generator=random), dim=1)]).half()
    own = own_scores(queries, passages)
    found = count_above(queries, own, pool, torch.arange(300), limit=5000)
    np.testing.assert_array_equal(found.numpy(), _counts(queries, own, pool, torch.arange(300)))


@pytest.mark.parametrize("length", [0.1, 1.0, 30.0])
def test_rounding_to_bf16_first_changes_no_count(length: float, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(4)
    middle = torch.randn(64, generator=random)
    queries, passages, pool = (  # all alike: the scores of a row lie within a few hundredths
        length * F.normalize(middle + 0.4 * torch.randn(count, 64, generator=random), dim=1)
        for count in (300, 300, 4000)
    )
    own, none = own_scores(queries, passages), torch.full((300,), -1)
    scores = queries.double() @ pool.double().T - own.double()[:, None]
    tie, noise = 2e-5 * length**2, 1e-6 * length**2
    least, most = ((scores > bar).sum(dim=1) for bar in (tie + noise, tie - noise))
    assert len(set(least.tolist())) > 200
    for bf16 in (False, True):
        monkeypatch.setattr(rankcount, "has_fast_bf16", lambda kind, bf16=bf16: bf16)
        found = count_above(queries, own, pool, none, limit=4000, tie=tie)
        assert ((found >= least) & (found <= most)).all()
    assert (least == most).float().mean() > 0.7


def test_rows_that_have_lost_leave_the_products(rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def watched(queries: torch.Tensor, passages: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        rows.append(len(queries))
        return inner_products(queries, passages, out)

    queries = torch.ones(10, 2)
    pool = torch.ones(5000, 2)
    own = torch.tensor([0.0] * 7 + [5.0] * 3)  # seven are beaten by every passage
    monkeypatch.setattr(rankcount, "inner_products", watched)
    monkeypatch.setattr(rounding, "inner_products", watched)
    assert count_above(queries, own, pool, torch.full((10,), -1), limit=2).tolist() == [2] * 7 + [0] * 3
    assert rows[0] == 10
    assert len(rows) > 1
    assert set(rows[1:]) == {3}
