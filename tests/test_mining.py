"""Mined negatives against a brute-force search in float64 and the rules read from the texts, and against faiss.

The model is a stand-in that gives every text a vector of its own, so that scores are known without a network.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from pairs import write_shards

from data import mixture
from data.errors import UserError
from data.parts import Parts
from data.records import Record, normalise, text_hash
from trainer import corpus, known, mined, pools
from trainer.corpus import Vectors
from trainer.known import Known
from trainer.mining import Miner, Settings, given
from trainer.negatives import NONE, Rules
from trainer.pools import Pools

SIZE = 16
TOPICS = 40


@cache
def vector(text: str) -> np.ndarray:
    """A unit vector: texts of one topic, which is their last word, are near each other."""
    topic = np.random.default_rng(sum(map(ord, text.split()[-1]))).normal(size=SIZE)
    own = np.random.default_rng(text_hash(text) & 0xFFFFFFFF).normal(size=SIZE)
    mixed = topic + 0.8 * own
    return mixed / np.linalg.norm(mixed)


class Embedder:
    """What Miner needs of trainer.embed.Embedder."""

    model = SimpleNamespace(query_prompt="query: ", passage_prompt="passage: ")
    device = torch.device("cpu")

    def __call__(self, texts: Sequence[str], progress: Any = None) -> torch.Tensor:
        plain = [text.removeprefix("query: ").removeprefix("passage: ") for text in texts]
        return torch.from_numpy(np.stack([vector(normalise(text)) for text in plain]).astype(np.float32))


def records(count: int, seed: int = 0) -> list[Record]:
    """Pairs on few topics: queries with several answers, answers of several queries, texts on both sides, given
    negatives (some of which answer the query), symmetric pairs, and the same text written differently."""
    rng = random.Random(seed)
    queries = [f"who wrote {n} t{rng.randrange(TOPICS)}" for n in range(count // 2)]
    answers = [f"it was {n} t{rng.randrange(TOPICS)}" for n in range(count // 2)]
    made = []
    for number in range(count):
        query, passage = rng.choice(queries), rng.choice(answers)
        if number % 9 == 0:
            passage = rng.choice(queries)
        if number % 7 == 0:
            passage = f"  {passage}  ".replace(" ", "  ")
        hard = tuple(rng.choices([*answers, passage, query], k=rng.choice([0, 0, 0, 1, 3, 6])))
        made.append(
            Record(
                query,
                passage,
                lang=rng.choice(["en", "de"]),
                negatives=hard,
                symmetric=number % 5 == 0,
                id=f"r{number}",
            )
        )
    return made


@dataclass
class Case:
    """A data set with all that a Miner takes, and its records by source."""

    miner: Miner
    records: dict[str, list[Record]]
    units: list[Any]
    vectors: np.ndarray
    passages: list[str]

    def mine(self) -> dict[str, list[tuple[list[str], Any]]]:
        """Source -> (negatives, mined row) of every record."""
        found: dict[str, list[tuple[list[str], Any]]] = {name: [] for name in self.records}
        for unit in self.units:
            name = self.miner.mixture.sources[unit.source].name
            for row in self.miner(unit, self.miner.read(unit)):
                own = self.records[name][len(found[name])].negatives
                texts = [self.passages[n] if n >= 0 else own[given(n)] for n in row["numbers"] if n != NONE]
                found[name].append((texts, row))
        return found


def case(
    folder: Path,
    by_source: dict[str, list[Record]],
    settings: Settings,
    within: str = "all",
    unit: int = 50,
    loaded: bool = False,
) -> Case:
    for name, rows in by_source.items():
        write_shards(folder / name, rows, source=name, block_records=16)
    data = mixture.load([str(folder / name) for name in by_source])
    with Parts(folder / "work", {}) as parts:
        passages = corpus.collect(parts, "corpus", data)
        texts = passages.texts(np.arange(len(passages)))
        np.save(folder / "vectors.npy", np.stack([vector(text) for text in map(normalise, texts)]).astype(np.float32))
    known.write(folder / "known.npy", data)
    pools.write_groups(folder / "pools.npy", data, passages, within)
    vectors_file = folder / "vectors.npy"
    vectors = Vectors(vectors_file)
    groups = None if within == "all" else folder / "pools.npy"
    choice = Pools(passages, vectors, groups, within, torch.from_numpy(np.load(vectors_file)) if loaded else None)
    miner = Miner(data, choice, Known(folder / "known.npy"), Embedder(), settings)  # type: ignore[arg-type]
    return Case(miner, by_source, mined.cut(data, unit)[0], np.load(folder / "vectors.npy"), texts)


# --- the rules, once more, in words ------------------------------------------------------------------------------


def answers(by_source: dict[str, list[Record]]) -> dict[str, set[str]]:
    """Query -> every text that answers it somewhere, normalised."""
    found: dict[str, set[str]] = {}
    for record in (record for rows in by_source.values() for record in rows):
        query, passage = normalise(record.query), normalise(record.passage)
        found.setdefault(query, set()).add(passage)
        if record.symmetric:
            found.setdefault(passage, set()).add(query)
    return found


def expected(record: Record, pool: list[str], right: set[str], settings: Settings) -> tuple[list[str], list[str], bool]:
    """(given negatives that are kept, all candidates that may be searched for, is the positive first), for a record."""
    query = normalise(record.query)
    kept: dict[str, str] = {}
    for text in record.negatives:
        if normalise(text) not in right | {query}:
            kept.setdefault(normalise(text), text)
    kept = dict(list(kept.items())[: settings.count])
    allowed = [text for text in pool if text not in right | {query} | set(kept)]
    score = {text: float(vector(query) @ vector(text)) for text in [*allowed, normalise(record.passage)]}
    positive = score[normalise(record.passage)]
    ranked = sorted(allowed, key=lambda text: -score[text])
    window = ranked[settings.rules.skip_top : settings.rules.depth]
    limit = np.inf
    if settings.rules.margin is not None:
        limit = positive - (1 - settings.rules.margin) * abs(positive)
    if settings.rules.absolute_margin is not None:
        limit = min(limit, positive - settings.rules.absolute_margin)
    first = not ranked or score[ranked[0]] <= positive
    return list(kept.values()), [text for text in window if score[text] <= limit], first


def check(found: Case, within: str = "all") -> None:
    """Compare every record of a mined data set with what the rules say."""
    settings, right = found.miner.settings, answers(found.records)
    for source, rows in found.mine().items():
        assert len(rows) == len(found.records[source])
        for record, (negatives, row) in zip(found.records[source], rows, strict=True):
            pool = _pool(found, source, record.lang, within)
            query = normalise(record.query)
            kept, candidates, first = expected(record, pool, right[query], settings)
            wanted = settings.count - len(kept) - min(settings.random_count, settings.count - len(kept))
            searched = [normalise(text) for text in negatives[len(kept) : len(kept) + row["mined"]]]
            assert negatives[: len(kept)] == kept
            assert len(searched) == min(wanted, len(candidates))
            if settings.sampling == "top":
                assert searched == candidates[:wanted]
            assert [text for text in candidates if text in set(searched)] == searched, "in rank order"
            assert len({text_hash(text) for text in negatives}) == len(negatives)
            assert not {normalise(text) for text in negatives} & (right[query] | {query})
            assert set(map(normalise, negatives[len(kept) :])) <= set(pool)
            assert bool(row["first"]) == first
            if settings.fill == "random":
                assert len(negatives) == settings.count
            scores = [float(vector(query) @ vector(normalise(text))) for text in negatives[len(kept) :]]
            assert row["scores"][len(kept) : len(negatives)] == pytest.approx(scores, abs=1e-5)


def _pool(found: Case, source: str, lang: str, within: str) -> list[str]:
    if within == "all":
        return [normalise(text) for text in found.passages]
    rows = [record for record in found.records[source] if within == "source" or record.lang == lang]
    return list(dict.fromkeys(normalise(record.passage) for record in rows))


PLAIN = Settings(count=4, random_count=0, sampling="top", rules=Rules(margin=None), fill="random", seed=0)
SETTINGS = {
    "plain": PLAIN,
    "positive-aware": replace(PLAIN, count=7, rules=Rules(margin=0.95, depth=30)),
    "absolute": replace(PLAIN, rules=Rules(margin=None, absolute_margin=0.2, skip_top=3, depth=12)),
    "drawn": replace(PLAIN, sampling="random", rules=Rules(margin=0.9, depth=20)),
    "partly random": replace(PLAIN, count=6, random_count=3, rules=Rules(margin=0.9)),
    "random alone": replace(PLAIN, random_count=4),
    "short": replace(PLAIN, fill="drop", rules=Rules(margin=0.5, depth=10)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_negatives_are_those_of_a_brute_force_search(name: str, tmp_path: Path) -> None:
    check(case(tmp_path, {"one": records(80, 1), "two": records(50, 2)}, SETTINGS[name]))


@pytest.mark.parametrize(
    ("within", "loaded"), [("source", False), ("language", False), ("all", True), ("source", True)]
)
def test_a_record_gets_passages_of_its_own_pool_alone(within: str, loaded: bool, tmp_path: Path) -> None:
    shared = [record for record in records(80, 1)[:40] if not record.negatives]
    data = {"one": records(80, 1), "two": records(50, 2) + shared}
    check(case(tmp_path, data, SETTINGS["positive-aware"], within, loaded=loaded), within)


@pytest.mark.parametrize("name", ["drawn", "partly random"])
def test_units_change_nothing(name: str, tmp_path: Path) -> None:
    data = {"one": records(100, 3)}
    small, large = (case(tmp_path / str(unit), data, SETTINGS[name], unit=unit) for unit in (1, 1000))
    assert len(small.units) > len(large.units) == 1
    assert [texts for texts, _ in small.mine()["one"]] == [texts for texts, _ in large.mine()["one"]]
    other = case(tmp_path / "seed", data, replace(SETTINGS[name], seed=1))
    assert [texts for texts, _ in other.mine()["one"]] != [texts for texts, _ in large.mine()["one"]]


def test_a_query_with_very_many_answers_is_searched_deeper(tmp_path: Path) -> None:
    many = [Record("who was it t1", f"answer {n} t1") for n in range(100)]
    rest = [Record(f"who {n} t2", f"nobody {n} t2") for n in range(30)]
    check(case(tmp_path, {"one": many + rest}, replace(PLAIN, rules=Rules(margin=None, depth=5))))


def test_a_pool_that_is_too_small_is_named_with_its_counts(tmp_path: Path) -> None:
    few = case(tmp_path, {"tiny": [Record(f"q{n} t1", f"p{n} t1") for n in range(4)]}, PLAIN)
    with pytest.raises(UserError, match=r"negatives=4: too few passages for 4 of 4 records of source tiny: only 3 are"):
        few.mine()


def test_candidates_are_those_of_faiss_on_the_same_vectors(tmp_path: Path) -> None:
    rows = [Record(f"who {n} t{n % TOPICS}", f"it was {n} t{n * 7 % TOPICS}") for n in range(400)]
    found = case(tmp_path, {"one": rows}, replace(PLAIN, count=10, rules=Rules(margin=None, depth=10)), unit=256)
    index = faiss.IndexFlatIP(SIZE)
    index.add(found.vectors)
    queries = Embedder()([f"query: {record.query}" for record in rows]).numpy()
    scores, numbers = index.search(queries, 11)
    for row, (negatives, mined_row) in enumerate(found.mine()["one"]):
        theirs = [found.passages[n] for n in numbers[row] if n != row][:10]
        there = [score for score, n in zip(scores[row], numbers[row], strict=True) if n != row][:10]
        assert mined_row["scores"] == pytest.approx(there, abs=1e-6)
        assert negatives == theirs or len(set(np.round(there, 6))) < 10
