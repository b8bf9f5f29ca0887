"""The ranking metrics equal trec_eval's, and hand-worked cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval

from trainer import metrics


def _run(seed: int, queries: int = 40, passages: int = 150) -> tuple[np.ndarray, list[dict[int, int]]]:
    """Random scores with many ties, and 1 to 20 graded answers a query, some of them graded 0."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, 12, size=(queries, passages)).astype(np.float64)
    answers = []
    for _ in range(queries):
        chosen = random.choice(passages, size=random.integers(1, 21), replace=False)
        grades = random.integers(0, 4, size=len(chosen))
        grades[0] = 1  # trec_eval leaves a query without any answer out of its results
        answers.append({int(p): int(g) for p, g in zip(chosen, grades, strict=True)})
    return scores, answers


def _trec(scores: np.ndarray, answers: list[dict[int, int]], depth: int, measures: set[str]) -> list[dict[str, float]]:
    """trec_eval's own figures. It breaks ties by descending name: these names make that the lower number first."""
    name = [f"{10_000 - number:05d}" for number in range(scores.shape[1])]
    truth = {str(q): {name[p]: g for p, g in row.items()} for q, row in enumerate(answers)}
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    run = {str(q): {name[p]: float(scores[q, p]) for p in ranked[q]} for q in range(len(scores))}
    results = pytrec_eval.RelevanceEvaluator(truth, measures).evaluate(run)
    return [results[str(q)] for q in range(len(scores))]


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_trec_eval_with_ties_and_several_graded_answers(seed: int) -> None:
    scores, answers = _run(seed)
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, : metrics.DEPTH]
    ours = metrics.per_query(ranked, metrics.relevance(answers))
    full = _trec(scores, answers, metrics.DEPTH, {"ndcg_cut.10", "recall.100", "success.1"})
    ten = _trec(scores, answers, 10, {"recip_rank"})
    theirs = [
        [f["ndcg_cut_10"], t["recip_rank"], f["recall_100"], f["success_1"]] for f, t in zip(full, ten, strict=True)
    ]
    assert 0.01 < ours[:, 0].mean() < 0.95  # the runs are neither perfect nor empty
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def test_hand_worked_ranking() -> None:
    truth = metrics.relevance([{3: 2, 7: 1, 9: 1}])
    ranked = np.array([[5, 7, 3, 1]])
    reached = 1 / math.log2(3) + 2 / math.log2(4)
    best = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    np.testing.assert_allclose(metrics.per_query(ranked, truth), [[reached / best, 1 / 2, 2 / 3, 0.0]])


def test_missing_results_and_zero_grades_earn_nothing() -> None:
    truth = metrics.relevance([{0: 1}, {4: 0}])
    ranked = np.array([[-1, -1], [4, 0]])
    np.testing.assert_array_equal(metrics.per_query(ranked, truth), np.zeros((2, 4)))


def test_mrr_looks_no_deeper_than_ten() -> None:
    truth = metrics.relevance([{10: 1}, {9: 1}])
    ranked = np.tile(np.arange(12), (2, 1))
    np.testing.assert_allclose(metrics.per_query(ranked, truth)[:, 1], [0.0, 0.1])


def test_taking_rows_of_a_relevance_keeps_their_answers() -> None:
    answers = [{1: 1}, {}, {5: 2, 2: 1}, {9: 3}]
    taken = metrics.relevance(answers).take(np.array([2, 0, 1, 2]))
    again = metrics.relevance([answers[2], answers[0], answers[1], answers[2]])
    for field in ("offsets", "passages", "grades"):
        np.testing.assert_array_equal(getattr(taken, field), getattr(again, field))
