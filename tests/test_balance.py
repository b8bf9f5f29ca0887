"""A global batch dealt anew: nothing of it is lost or changed, and every rank has as many tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import batches
import numpy as np
import pytest
import ranks
import torch
from torch.nn.functional import normalize

from data.collate import Batch
from data.tokens import ragged
from trainer import balance, distributed, objectives

PAIRS = 24


def natural(pairs: int, seed: int = 0) -> np.ndarray:
    """Tokens of pairs by the law of the benchmarks: lognormal, queries median 12, passages median 70."""
    generator = np.random.default_rng(seed)
    sides = [(12, 0.6, 64), (70, 0.9, 512)]
    drawn = [np.clip(np.round(generator.lognormal(np.log(m), s, pairs)), 3, longest) for m, s, longest in sides]
    return np.sum(drawn, axis=0).astype(np.int64)


@pytest.mark.parametrize(
    ("world", "pairs"), [(2, 64), (2, 16_384), (8, 512), (8, 4096), (64, 32), (64, 512), (256, 128)]
)
def test_ranks_have_equally_many_pairs_and_tokens_within_two_per_cent(world: int, pairs: int) -> None:
    tokens = natural(world * pairs)
    owner = balance.owners(tokens, world)
    assert (np.bincount(owner, minlength=world) == pairs).all()
    sums = np.bincount(owner, tokens, world)
    by_number = tokens.reshape(world, pairs).sum(1)
    assert sums.max() / sums.mean() - 1 <= 0.02
    assert sums.max() <= by_number.max()


def pairs_of(batch: Batch) -> dict[int, tuple[Any, ...]]:
    """All that belongs to a pair, by the number of its record."""
    b, k = batch.num_queries, batch.num_negatives
    rows = batch.tokens.lists()
    sides = len(rows) // b - k
    found = {}
    for i in range(b):
        texts = [rows[side * b + i] for side in range(sides)] + rows[sides * b + i * k : sides * b + (i + 1) * k]
        hashes = [batch.passage_hash[i], *batch.passage_hash[b + i * k : b + (i + 1) * k]]
        scores = b"" if batch.scores is None else batch.scores[i].tobytes()
        marks = (i in batch.unscored, batch.own_only is not None and bool(batch.own_only[i]))
        found[int(batch.record_ids[i])] = (texts, list(map(int, hashes)), int(batch.query_hash[i]), scores, marks)
    return found


def batch_of(negatives: int, *, scored: bool = False, joint: bool = False) -> Batch:
    whole = batches.make(PAIRS, negatives, seed=negatives, scored=scored)
    if scored:
        whole = replace(whole, unscored=np.flatnonzero(np.isnan(whole.scores).any(1)))
        whole = replace(whole, own_only=np.arange(PAIRS) % 3 == 0)
    if joint:
        whole = replace(whole, tokens=whole.tokens.take(np.arange(PAIRS, len(whole.tokens))))
    return whole


def share(whole: Batch) -> Batch:
    """This rank's part, by number. Every rank reads another run of pairs."""
    rank, world = distributed.rank(), distributed.world()
    each = PAIRS // world
    if len(whole.tokens) == PAIRS * (2 + whole.num_negatives):
        part = batches.share(whole, rank, world)
    else:  # with an empty query in front, as `batches.share` knows batches, and without it again
        empty = replace(whole, tokens=ragged([[0]] * PAIRS + whole.tokens.lists()))
        part = batches.share(empty, rank, world)
        part = replace(part, tokens=part.tokens.take(np.arange(each, len(part.tokens))))
    mine = whole.unscored[(whole.unscored >= rank * each) & (whole.unscored < (rank + 1) * each)]
    return replace(part, unscored=mine - rank * each)


CASES = [(0, False, False), (2, True, False), (3, False, True)]


def deal_all() -> list[tuple[dict[int, tuple[Any, ...]], int]]:
    dealt = [balance.deal(share(batch_of(k, scored=scored, joint=joint))) for k, scored, joint in CASES]
    return [(pairs_of(batch), int(batch.tokens.lengths.sum())) for batch in dealt]


@pytest.mark.parametrize("world", [2, 3])
def test_every_pair_arrives_whole_on_one_rank(world: int, tmp_path: Path) -> None:
    found = ranks.run(deal_all, world, tmp_path)
    for number, (negatives, scored, joint) in enumerate(CASES):
        parts, tokens = zip(*(each[number] for each in found), strict=True)
        whole = batch_of(negatives, scored=scored, joint=joint)
        assert [len(part) for part in parts] == [PAIRS // world] * world
        assert {key: value for part in parts for key, value in part.items()} == pairs_of(whole)
        shares = whole.tokens.lengths
        assert max(tokens) / (int(shares.sum()) / world) < 1.05


def test_a_single_process_keeps_its_batch() -> None:
    whole = batch_of(2)
    assert balance.deal(whole) is whole


def loss_of_the_ranks() -> float:
    """The mean over ranks of a distillation whose embeddings are a function of a text's tokens alone."""
    batch = balance.deal(share(batch_of(2, scored=True)))
    return sum(distributed.sums([loss_of(batch)])) / distributed.world()


def loss_of(batch: Batch) -> float:
    table = torch.randn(batches.VOCABULARY, 16, generator=torch.Generator().manual_seed(0))
    vectors = torch.stack([table[torch.tensor(row)].mean(0) for row in batch.tokens.lists()])
    objective = partial(objectives.distillation, temperature=0.1, alpha=0.2)
    return float(objective(normalize(vectors, dim=1), batch)[0])


def test_the_loss_is_that_of_one_process(tmp_path: Path) -> None:
    assert ranks.run(loss_of_the_ranks, 3, tmp_path) == pytest.approx([loss_of(batch_of(2, scored=True))] * 3, rel=1e-6)
