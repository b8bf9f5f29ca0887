"""Blocked search equals sorting the whole score matrix, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import rounding, topk
from trainer.device import inner_products
from trainer.topk import top_k


@pytest.fixture(params=[False, True], ids=["fp32", "bf16 first"])
def rough(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to search, whatever this processor is good at."""
    monkeypatch.setattr(topk, "has_fast_bf16", lambda kind: request.param)
    return bool(request.param)


def _reference(queries: torch.Tensor, passages: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.numpy() @ passages.numpy().T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("bf16", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 40),
    k=st.integers(1, 45),
    query_block=st.integers(1, 10),
    passage_block=st.integers(1, 41),
    seed=st.integers(0, 10_000),
)
def test_any_blocks_give_the_stable_order_of_the_whole_matrix(bf16, n, m, k, query_block, passage_block, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    queries = torch.randint(-2, 3, (n, 3), generator=random).float()  # small integers: exact products, many ties
    passages = torch.randint(-2, 3, (m, 3), generator=random).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "has_fast_bf16", lambda kind: bf16)
        patch.setattr(topk, "_GATHERED", 3)
        scores, numbers = top_k(queries, passages, k, query_block=query_block, passage_block=passage_block)
    right_scores, right_numbers = _reference(queries, passages, k)
    np.testing.assert_array_equal(numbers.numpy(), right_numbers)
    np.testing.assert_array_equal(scores.numpy(), right_scores)


def test_equal_passages_come_in_their_own_order_across_blocks(rough: bool) -> None:
    passages = torch.ones(10, 2)
    _, numbers = top_k(torch.ones(3, 2), passages, 4, passage_block=3)
    assert numbers.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("passage_block", [7, 1000])
def test_real_vectors_find_their_nearest(passage_block: int, rough: bool) -> None:
    random = torch.Generator().manual_seed(1)
    passages = torch.nn.functional.normalize(torch.randn(500, 16, generator=random), dim=1)
    queries = passages[[17, 401]] + 0.01 * torch.randn(2, 16, generator=random)
    scores, numbers = top_k(queries, passages, 5, passage_block=passage_block)
    right_scores, right_numbers = _reference(queries, passages, 5)
    assert numbers[:, 0].tolist() == [17, 401]
    np.testing.assert_array_equal(numbers.numpy(), right_numbers)
    np.testing.assert_allclose(scores.numpy(), right_scores, atol=1e-6)


@pytest.mark.parametrize("length", [0.1, 1.0, 30.0])
def test_rounding_first_loses_none_of_the_best(length: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "has_fast_bf16", lambda kind: True)
    random = torch.Generator().manual_seed(4)
    middle = torch.randn(64, generator=random)
    queries, passages = (  # all alike: the scores of a row lie within a few hundredths, and rounding moves most
        length * torch.nn.functional.normalize(middle + 0.4 * torch.randn(count, 64, generator=random), dim=1)
        for count in (50, 4000)
    )
    rounded = queries.bfloat16().float() @ passages.bfloat16().float().T
    scores, numbers = top_k(queries, passages, 20, query_block=16, passage_block=256)
    right = queries.double() @ passages.double().T
    assert (rounded.topk(20, dim=1).indices != right.topk(20, dim=1).indices).any(dim=1).all()
    np.testing.assert_allclose(scores, right.topk(20, dim=1).values, atol=1e-6 * length**2, rtol=0)
    np.testing.assert_allclose(scores, right.gather(1, numbers), atol=1e-6 * length**2, rtol=0)


def test_memory_stays_at_a_block_of_the_matrix(rough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    memory: set[int] = set()

    def watched(queries: torch.Tensor, passages: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        sizes.append((out.nbytes, len(queries) * len(passages)))
        memory.add(out.untyped_storage().data_ptr())
        return inner_products(queries, passages, out)

    monkeypatch.setattr(topk, "inner_products", watched)
    monkeypatch.setattr(rounding, "inner_products", watched)
    top_k(torch.randn(64, 4), torch.randn(300, 4), 2, query_block=8, passage_block=20)
    assert len(sizes) == 8 * 15
    assert set(sizes) == {(8 * 20 * 4, 8 * 20)}
    assert len(memory) == 1


def test_groups_of_columns_hide_nothing(rough: bool) -> None:
    random = torch.Generator().manual_seed(3)
    queries, passages = (torch.randint(-3, 4, (count, 5), generator=random).float() for count in (20, 64 * 9 + 7))
    scores, numbers = top_k(queries, passages, 12, passage_block=128)  # blocks of two groups, and a shorter one
    right_scores, right_numbers = _reference(queries, passages, 12)
    np.testing.assert_array_equal(numbers.numpy(), right_numbers)
    np.testing.assert_array_equal(scores.numpy(), right_scores)
