"""The chunk planner, and gradients through chunks against one graph over everything."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokens import Ragged
from trainer import gradcache


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_a_plan_is_a_partition_within_the_budget_with_the_longest_first(lengths: list[int], budget: int):
    chunks = gradcache.plan(np.array(lengths, np.int32), budget)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(len(lengths)))
    longest = [max(lengths[row] for row in chunk) for chunk in chunks]
    assert longest == sorted(longest, reverse=True)
    for chunk, length in zip(chunks, longest, strict=True):
        assert len(chunk) * length <= budget or len(chunk) == 1


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_packed_texts_fill_their_chunks_to_the_last_that_fits(lengths: list[int], budget: int):
    chunks = gradcache.plan(np.array(lengths, np.int32), budget, packed=True)
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    assert np.concatenate(chunks).tolist() == order
    sizes = [sum(lengths[row] for row in chunk) for chunk in chunks]
    for size, chunk, following in zip(sizes, chunks, [*chunks[1:], None], strict=True):
        assert size <= budget or len(chunk) == 1
        assert following is None or size + lengths[following[0]] > budget


def test_sorting_leaves_almost_no_padding_on_natural_lengths():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(70), 0.9, 2048), 4, 512).astype(np.int32)
    computed = sum(len(chunk) * int(lengths[chunk].max()) for chunk in gradcache.plan(lengths, 4096))
    assert computed / lengths.sum() < 1.05


def test_pad_puts_every_token_in_its_place():
    tokens = Ragged(np.array([1, 2, 3, 4, 5, 6], np.int32), np.array([3, 1, 2], np.int32))
    ids, mask = gradcache.pad(tokens, np.array([2, 0]), padding_id=9)
    assert ids.tolist() == [[5, 6, 9], [1, 2, 3]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))

    def forward(self, inputs):
        return self.inner(torch.nn.functional.dropout(inputs, 0.5, self.training))


def objective(embeddings):
    return (embeddings @ embeddings.T).logsumexp(1).mean(), "figures"


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_gradients_through_chunks_equal_one_graph_in_float64(keep: int):
    torch.manual_seed(0)
    model = Model().double().eval()
    inputs = torch.randn(10, 6, dtype=torch.float64)
    chunks = [np.array([7, 2, 9]), np.array([0, 1, 3, 4]), np.array([5, 6, 8])]
    loss, _ = objective(model(inputs))
    loss.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    figures, _ = gradcache.forward_backward(
        lambda rows: model(inputs[torch.from_numpy(rows)]), chunks, keep, objective, lambda x: x.backward(), seed=1
    )
    assert figures == "figures"
    for parameter, expected in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, expected, rtol=1e-12, atol=1e-14)


def gradients(model: Model, keep: int, seed: int) -> list[torch.Tensor]:
    model.zero_grad()
    inputs = torch.linspace(-1, 1, 60).view(10, 6)
    chunks = [np.array([7, 2, 9]), np.array([0, 1, 3, 4]), np.array([5, 6, 8])]
    gradcache.forward_backward(
        lambda rows: model(inputs[torch.from_numpy(rows)]), chunks, keep, objective, lambda x: x.backward(), seed=seed
    )
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_replay_draws_the_same_dropout_as_the_first_pass():
    torch.manual_seed(0)
    model = Model().train()
    kept, replayed, other = gradients(model, 3, 5), gradients(model, 0, 5), gradients(model, 0, 6)
    assert all(torch.equal(a, b) for a, b in zip(kept, replayed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept, other, strict=True))


def test_empty_chunks_run_the_forward_and_add_nothing():
    torch.manual_seed(0)
    model = Model().eval()
    inputs, calls = torch.randn(4, 6), []

    def embed(rows):
        calls.append(len(rows))
        return model(inputs[torch.from_numpy(rows)] if len(rows) else torch.ones(1, 6))

    chunks = [np.array([0, 1, 2, 3])]
    gradcache.forward_backward(embed, chunks, 0, objective, lambda x: x.backward(), seed=0)
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    empty = np.empty(0, np.int64)
    gradcache.forward_backward(embed, [*chunks, empty, empty], 2, objective, lambda x: x.backward(), seed=0)
    assert calls == [4, 4, 4, 0, 0, 0]  # the first run's two passes; then three first passes, and one replay
    for parameter, expected in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, expected)


def test_activation_bytes_counts_what_a_forward_holds_beside_the_parameters():
    layer = torch.nn.Linear(16, 16)
    inputs = torch.randn(8, 16, requires_grad=True)
    held = gradcache.activation_bytes(lambda: torch.tanh(layer(inputs)), layer.parameters())
    assert held == 2 * 8 * 16 * 4  # the inputs, for the weight's gradient, and tanh's result


def test_what_was_measured_is_given_back():
    nodes = []

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            nodes.append(weakref.ref(ctx))
            return values**2

        @staticmethod
        def backward(ctx, *grads):
            raise AssertionError("nothing is sent back here")

    weight = torch.ones(1000, requires_grad=True)
    # sigmoid keeps its own output: were that held as it is, it and all behind it would hold each other for ever
    held = gradcache.activation_bytes(lambda: Squared.apply(weight).sigmoid(), [weight])
    gc.collect()
    assert held == 4000
    assert [node() for node in nodes] == [None]
