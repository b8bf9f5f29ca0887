"""Forward passes side by side on the cores of a CPU: the results of one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import teachers
import tiny
import torch

from data.groups import PairRows, tokenized
from data.tokens import Ragged
from trainer import gradcache
from trainer.cores import each_on_a_core
from trainer.crossencoder import open_teacher
from trainer.embed import encode
from trainer.encoder import open_model
from trainer.scoring import Scorer

CORES = 3


@pytest.fixture(autouse=True)
def cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


def texts(count: int, vocabulary: int) -> Ragged:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 40, count).astype(np.int32)
    return Ragged(random.integers(5, vocabulary, lengths.sum()).astype(np.int32), lengths)


def test_items_are_shared_by_single_threads_and_results_come_in_order():
    seen = set()

    def work(item: int) -> int:
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        time.sleep(0.001 * (item % 5))
        return 10 * item

    assert list(each_on_a_core(work, range(50))) == [10 * item for item in range(50)]
    assert len(seen) == CORES
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == CORES


def test_few_items_have_all_cores_one_after_the_other():
    seen = [(threading.current_thread(), torch.get_num_threads())] * 5
    assert list(each_on_a_core(lambda _: (threading.current_thread(), torch.get_num_threads()), range(5))) == seen


def test_what_an_item_raises_ends_the_work():
    done = []

    def work(item: int) -> None:
        if item == 3:
            raise ValueError("three")
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(ValueError, match="three"):
        list(each_on_a_core(work, range(200)))
    assert len(done) < 100, "the rest is not begun"
    assert torch.get_num_threads() == CORES


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_vectors_are_those_of_one_core(precision: str, tmp_path: Path):
    encoder = open_model(tiny.bert(tmp_path / "bert")).encoder.train()
    tokens = texts(300, 200)

    def vectors(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        return encode(encoder, tokens, tokens_per_chunk=100, precision=precision)

    wanted = vectors(1)
    assert all(torch.equal(vectors(CORES), wanted) for _ in range(5))
    assert encoder.training
    assert not wanted.requires_grad
    if precision == "fp32":
        with torch.no_grad():
            exact = encoder.double().eval()(*gradcache.pad(tokens, np.arange(300)))
        assert (wanted - exact).abs().max() < 1e-6


def test_logits_are_those_of_one_core(tmp_path: Path):
    teacher = open_teacher(str(teachers.bert(tmp_path / "teacher")))
    sides = [
        tokenized(side, [f"{text} {number}" for number in range(20) for text in tiny.TEXTS[:5]])
        for side in (teacher.pairs.queries, teacher.pairs.passages)
    ]
    pairs = np.random.default_rng(1).integers(0, 100, (2, 300))
    rows = PairRows(teacher.pairs, *sides, *pairs)

    def logits(threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        found = np.empty(300, np.float32)
        for chunk, some in Scorer(teacher, torch.device("cpu"), "fp32", 200)(rows):
            found[chunk] = some
        return found

    wanted = logits(1)
    assert all(np.array_equal(logits(CORES), wanted) for _ in range(3))
