"""Score an encoder on retrieval sets, by one process or by all ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import NumericError
from data.rules import Prompts, passage_prefix, query_prefix
from trainer import bm25, metrics
from trainer.sets import RetrievalSet
from trainer.topk import top_k

Encode = Callable[[Sequence[str]], Tensor]  # n texts, prompts included -> [n, D] on the host
Result = dict[str, Any]  # one entry of results.json

_SHOWN = 3  # passages of an example


@dataclass(frozen=True)
class Ranks:
    """How processes share an evaluation: text i is embedded by rank i % world.

    gather stacks the equally many rows [n, ...] that every rank holds to [world n, ...], in rank order.
    """

    rank: int = 0
    world: int = 1
    gather: Callable[[Tensor], Tensor] = lambda rows: rows

    def split(self, count: int) -> np.ndarray:
        """The numbers below `count` that are this rank's."""
        return np.arange(self.rank, count, self.world)

    def join(self, rows: Tensor, count: int) -> Tensor:
        """The rows of all ranks, put back in order: this rank's part [., d] -> [count, d]."""
        each = -(-count // self.world)
        padded = torch.cat([rows, rows.new_zeros(each - len(rows), *rows.shape[1:])])
        stacked = self.gather(padded)
        return stacked.unflatten(0, (self.world, each)).transpose(0, 1).flatten(0, 1)[:count]


def score(
    data: RetrievalSet,
    encode: Encode,
    prompts: Prompts,
    *,
    ranks: Ranks = Ranks(),
    device: torch.device | str = "cpu",
    rerank: Callable[[np.ndarray], np.ndarray] | None = None,
    examples: int = 0,
) -> Result:
    """Rank every passage for every query by inner product and average the metrics over the rows.

    Collective when `ranks` has more than one: every rank calls it with the same data and gets the same result.

    Args:
        encode: the encoder. Where its forward is a collective, it has to run equally often on all ranks.
        device: where the passages are searched.
        rerank: gives the results of all queries, int64 [q, k], another order, whose figures come under "reranked"; for
            a single process.
        examples: so many of the queries are shown under "examples", with the passages found for them.

    Raises:
        NumericError: the encoder gave a vector with NaN or infinity (on all ranks at once).
    """
    queries, passages = query_texts(data, prompts), passage_texts(data, prompts)
    mine = ranks.split(len(passages))
    corpus = ranks.join(encode([passages[number] for number in mine]), len(passages))
    asked = ranks.split(len(queries))
    vectors = encode([queries[number] for number in asked])
    _, found = top_k(vectors, corpus, _depth(data), device=device)
    results = _results(found.cpu().numpy(), data.own[asked])
    values = metrics.per_query(results, data.relevance.take(asked))
    # A vector that is not finite spoils its query's values, so that every rank learns of it from the gather.
    values[~torch.isfinite(vectors).all(dim=1).numpy()] = np.nan
    values = ranks.join(torch.from_numpy(values), len(queries)).numpy()
    if not (torch.isfinite(corpus).all() and np.isfinite(values).all()):
        raise NumericError(f"data {data.name}: the model gives vectors with NaN or infinity; its weights are broken")
    if rerank is None:
        shown = {"examples": _examples(data, results, ranks, min(examples, len(queries)))} if examples else {}
        return averages(data, values) | shown
    assert ranks.world == 1, "every query's results are here"
    reordered = metrics.per_query(rerank(results), data.relevance)
    return averages(data, values) | {"reranked": averages(data, reordered)}


def score_bm25(data: RetrievalSet) -> Result:
    """The same figures for BM25, on the bare texts."""
    found = bm25.rank(data.queries, data.passages, _depth(data))
    return averages(data, metrics.per_query(_results(found, data.own), data.relevance))


def query_texts(data: RetrievalSet, prompts: Prompts) -> list[str]:
    """What is encoded for each query."""
    queries = zip(data.queries, data.instructions, strict=True)
    return [query_prefix(prompts, instruction) + query for query, instruction in queries]


def passage_texts(data: RetrievalSet, prompts: Prompts) -> list[str]:
    """What is encoded for each passage."""
    passages = zip(data.passages, data.kinds, strict=True)
    return [passage_prefix(prompts, instruction, symmetric) + text for text, (instruction, symmetric) in passages]


def averages(data: RetrievalSet, values: np.ndarray) -> Result:
    """One entry of results.json from the values of each distinct query, float64 [q, 4]: every row counts once.

    The groups by source and language are those rows' averages; the corpus is the whole of it for all of them.
    """
    values = values[data.rows]
    result: Result = _means(values)
    for group, labels, unknown in (("by_source", data.sources, "unnamed"), ("by_lang", data.langs, "und")):
        if any(labels):
            result[group] = _groups(values, [label or unknown for label in labels])
    return result | {"queries": len(values), "passages": len(data.passages)}


def named(name: str, result: Result) -> dict[str, float]:
    """The averages of a data set by metric name: eval/<name>/<metric>, and where there are several sources or languages
    eval/<name>/<source>/<metric> and eval/<name>/lang/<language>/<metric>."""
    groups = {name: result}
    for part, place in (("by_source", name), ("by_lang", f"{name}/lang")):
        if len(result.get(part, {})) > 1:
            groups |= {f"{place}/{label}": group for label, group in result[part].items()}
    return {f"eval/{place}/{metric}": group[metric] for place, group in groups.items() for metric in metrics.NAMES}


def _examples(data: RetrievalSet, results: np.ndarray, ranks: Ranks, count: int) -> list[dict[str, Any]]:
    """The first `count` queries and what was found for them, a row a passage; results int64 [., k] are this rank's.

    The first queries of all are the first of each rank's. Collective.
    """
    own = results[: len(ranks.split(count)), :_SHOWN]
    found = ranks.join(torch.from_numpy(own.copy()), count).numpy()
    right = metrics.gains(found, data.relevance.take(np.arange(len(found)))) > 0
    return [
        {"query": data.queries[query], "place": place + 1, "passage": data.passages[number], "right": bool(answers)}
        for query, row in enumerate(zip(found.tolist(), right, strict=True))
        for place, (number, answers) in enumerate(zip(*row, strict=True))
        if number >= 0
    ]


def _groups(values: np.ndarray, labels: Sequence[str]) -> dict[str, Result]:
    names, members = np.unique(labels, return_inverse=True)
    groups = {}
    for number, name in enumerate(names):
        rows = values[members == number]
        groups[str(name)] = _means(rows) | {"queries": len(rows)}
    return groups


def _means(values: np.ndarray) -> Result:
    return dict(zip(metrics.NAMES, values.mean(axis=0).tolist(), strict=True))


def _depth(data: RetrievalSet) -> int:
    """Results asked for: one more where a query may find itself, to be left out afterwards."""
    return metrics.DEPTH + bool((data.own >= 0).any())


def _results(found: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The first DEPTH of the passages found, int64 [q, k], without each query's own text `own` [q]."""
    itself = found == np.where(own < 0, -2, own)[:, None]  # -1 in `found` means no result
    order = np.argsort(itself, axis=1, kind="stable")
    return np.take_along_axis(np.where(itself, -1, found), order, axis=1)[:, : metrics.DEPTH]
