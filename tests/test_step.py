"""The step on n ranks, at any ZeRO stage, chunk size and memory budget, against one process in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from steps import MAX_NORM, STEPS, encoder, plain, train, train_all, update_error

CHUNKS = {"one text": 1, "several": 70, "all": 10**6}  # tokens of a chunk
WAYS = [(1, 0.0), (70, 0.0), (70, 1e12), (10**6, 1e12)]  # and bytes of kept graphs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("step") / "bert")


# (ZeRO stage, tokens a chunk, bytes of kept graphs, hard negatives): KL to a teacher on, clipping on
DISTILLED = [(0, 70, 0.0, 3), (1, 10**6, 1e12, 3), (2, 70, 0.0, 1), (3, 70, 0.0, 3)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parameter_update_equals_one_process_in_plain_pytorch(world: int, model: Path, tmp_path: Path):
    stages = (0, 1, 2, 3) if world < 4 else (1, 3)
    cases = [
        *((stage, *way, 3, "contrastive") for stage in stages for way in WAYS),
        *((1, *way, 0, "contrastive") for way in WAYS),
        *((*case, "distillation") for case in DISTILLED),
    ]
    outcomes = ranks.run(train_all, world, tmp_path, model, cases)
    start = dict(encoder(model).named_parameters())
    references = {(size, negatives, objective) for _, size, _, negatives, objective in cases}
    wanted = {key: plain(model, world, *key) for key in references}
    for number, case in enumerate(cases):
        _, size, budget, negatives, objective = case
        weights, steps = wanted[size, negatives, objective]
        for got, _ in (outcome[number] for outcome in outcomes):
            assert update_error(start, got, weights) < 1e-5, case
        reports = [outcome[number][1] for outcome in outcomes]
        for step, (loss, norm) in enumerate(steps):
            mean = sum(report[step][0] for report in reports) / world
            assert mean == pytest.approx(loss, rel=1e-5), case
            for _, own_norm, chunks, kept in (report[step] for report in reports):
                assert own_norm == pytest.approx(norm, rel=1e-4), case
                assert own_norm > MAX_NORM, "clipping has to act in this test"
                assert kept == (0 if budget == 0.0 else chunks), case
                assert (chunks == 1) == (size == CHUNKS["all"]), case


def test_part_of_the_graphs_kept_gives_the_same_update(model: Path, tmp_path: Path):
    (outcomes,) = ranks.run(train_all, 1, tmp_path, model, [(1, 70, 4e5, 3), (1, 70, 0.0, 3)])
    (some, reports), (none, _) = outcomes
    assert all(0 < kept < chunks for *_, chunks, kept in reports)
    assert all(torch.equal(some[name], none[name]) for name in none)


def count_collectives(model: Path, cases: list[tuple[Any, ...]]) -> list[dict[str, int]]:
    """How often each collective runs in one more step, at different numbers of chunks."""
    import torch.distributed as dist

    from trainer import distributed

    counts: list[dict[str, int]] = []

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            counts[-1][name] = counts[-1].get(name, 0) + 1
            return function(*arguments, **named)

        return call

    distributed._all_gather = counting("gather", distributed._all_gather)
    distributed._reduce_scatter = counting("scatter", distributed._reduce_scatter)
    dist.all_reduce = counting("all_reduce", dist.all_reduce)
    for case in cases:
        counts.append({})
        train(model, *case)
    return counts


def test_collectives_do_not_grow_with_the_number_of_chunks(model: Path, tmp_path: Path):
    cases = [(stage, size, 0.0, 3) for stage in (0, 1, 2) for size in CHUNKS.values()]
    first, second = ranks.run(count_collectives, 2, tmp_path, model, cases)
    assert first == second
    for number, case in enumerate(cases):
        counts = first[number]
        assert counts["gather"] == 2 * STEPS, case  # the passages' embeddings, and their hashes
        assert counts["scatter"] == STEPS, case  # the gradient of the passages
        assert counts == first[number - number % len(CHUNKS)], case
