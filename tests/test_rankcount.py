"""The rank count against brute force, ties and equal texts included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import rankcount
from trainer.rankcount import TIE, count_above, own_scores


def _counts(queries: torch.Tensor, own: torch.Tensor, pool: torch.Tensor, same: torch.Tensor) -> np.ndarray:
    scores = queries.double().numpy() @ pool.double().numpy().T
    above = scores > own.double().numpy()[:, None] + TIE
    for row, number in enumerate(same.tolist()):
        if number >= 0:
            above[row, number] = False
    return above.sum(axis=1)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), m=st.integers(1, 60), limit=st.integers(1, 70), seed=st.integers(0, 10_000))
def test_counts_are_those_of_the_whole_matrix_up_to_the_limit(n: int, m: int, limit: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    queries = torch.randint(-2, 3, (n, 3), generator=random).float()  # small integers: exact products, many ties
    pool = torch.randint(-2, 3, (m, 3), generator=random).float()
    own = torch.randint(-6, 7, (n,), generator=random).float()
    same = torch.randint(-1, m, (n,), generator=random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankcount, "_FIRST_BLOCK", 3)
        patch.setattr(rankcount, "_LAST_BLOCK", 12)
        patch.setattr(rankcount, "_TILES", {"cpu": 40})
        found = count_above(queries, own, pool, same, limit=limit)
    np.testing.assert_array_equal(found.numpy(), np.minimum(_counts(queries, own, pool, same), limit))


def test_a_pair_does_not_lose_to_its_own_text_or_to_one_with_nearly_the_same_vector() -> None:
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


def test_real_vectors_in_a_float16_pool_get_their_true_rank() -> None:
    random = torch.Generator().manual_seed(2)
    queries = F.normalize(torch.randn(300, 48, generator=random), dim=1)
    passages = F.normalize(torch.randn(300, 48, generator=random) + 1.5 * queries, dim=1).half().float()
    pool = torch.cat([passages, F.normalize(torch.randn(2000, 48, generator=random), dim=1)]).half()
    own = own_scores(queries, passages)
    found = count_above(queries, own, pool, torch.arange(300), limit=5000)
    np.testing.assert_array_equal(found.numpy(), _counts(queries, own, pool, torch.arange(300)))


def test_rows_that_have_lost_leave_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    product = torch.Tensor.__matmul__

    def watched(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        rows.append(len(left))
        return product(left, right)

    queries = torch.ones(10, 2)
    pool = torch.ones(5000, 2)
    own = torch.tensor([0.0] * 7 + [5.0] * 3)  # seven are beaten by every passage
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    assert count_above(queries, own, pool, torch.full((10,), -1), limit=2).tolist() == [2] * 7 + [0] * 3
    assert rows[0] == 10
    assert len(rows) > 1
    assert set(rows[1:]) == {3}
