"""Hard negatives: `quintet mine` beside sentence-transformers' mine_hard_negatives.

The vectors are given to all of them, so that nothing is encoded: ours reads shards, a corpus and vectors from disk and
writes shards; the peer takes a dataset and the vectors of its embedding cache, and returns a dataset. Both take the 7
best passages out of the 200 nearest whose score is at most 95 % of the positive's.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import util

from benchmarks.common import GateError, Memory, alternate, extra_memory, in_child, ratio, rivals, table, target
from data import mixture
from data.parts import Parts, save_array
from data.records import Record
from data.shards import ShardWriter, load_index, read_block, write_index
from trainer import minework
from trainer.mine import Config
from trainer.minework import Task

SEED, COUNT, DEPTH, MARGIN = 3, 7, 200, 0.95


@dataclass(frozen=True)
class Case:
    """Queries with an answer each, passages, size of a vector; rows that the peer scores at once, its default last."""

    queries: int = 20_000
    passages: int = 200_000
    size: int = 384
    peer_batches: tuple[int, ...] = (1024, 4096, 16_384)
    repeats: int = 3


FULL = Case()
QUICK = Case(queries=300, passages=2_000, size=32, peer_batches=(100, 16_384), repeats=1)


def measure(quick: bool = False) -> dict[str, Any]:
    """The gate, the peer's best settings, the alternation, and the memory in child processes."""
    logging.getLogger("quintet").setLevel(logging.ERROR)
    case = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(case, folder)
        work = {"ours": partial(ours, case, folder)}
        work |= {_named(setting): partial(peer, case, folder, *setting) for setting in _settings(case)}
        memory = {name: in_child(_memory, case, folder, name) for name in _said(work, "memory")}
        checked: dict[str, dict[str, float]] = {}
        print("mining: the time of each ...", flush=True)
        found = alternate(_checked(work, folder, checked), repeats=1, warm_ups=0)
        rivals_of = rivals({name: timing for name, timing in found.items() if name != "ours"})
        print(f"mining: ours beside {', '.join(rivals_of)} ...", flush=True)
        times = alternate({name: work[name] for name in ["ours", *rivals_of]}, case.repeats, warm_ups=0)
    peers = [times[name] for name in rivals_of]
    least = min(memory[name].extra for name in memory if name != "ours")
    default = memory[list(work)[-1]].extra
    return {
        "settings": vars(case) | {"seed": SEED, "negatives": COUNT, "depth": DEPTH, "margin": MARGIN},
        "correctness": checked,
        "tables": [
            table(
                f"{case.queries:,} queries, {case.passages:,} passages, {case.size} numbers a vector, fp32",
                [
                    {"miner": name, **(found | times)[name].cells(), "extra memory MB": round(memory[name].extra / 1e6)}
                    for name in work
                ],
            ),
        ],
        "targets": [
            target("extra memory over the peer's at its default", 0.3, memory["ours"].extra / default, at_most=True),
            target("extra memory over the peer's least", 0.3, memory["ours"].extra / least, at_most=True),
            target("time over the peer's at its fastest", 0.8, 1 / ratio(peers, times["ours"]), at_most=True),
        ],
    }


def _said(names: Iterable[str], what: str) -> Iterator[str]:
    for name in names:
        print(f"mining: {what} of {name} ...", flush=True)
        yield name


def _checked(
    work: dict[str, partial[Any]], folder: Path, checked: dict[str, dict[str, float]]
) -> dict[str, Callable[[], None]]:
    """The same work, ours first, which is compared with what each of the others gives."""

    def run(name: str) -> None:
        made = work[name]()
        if name != "ours":
            checked[name] = compare(folder / "mined", made, folder)

    return {name: partial(run, name) for name in work}


# --- the work ----------------------------------------------------------------------------------------------------


def prepare(case: Case, folder: Path) -> None:
    """Shards, a corpus of which the first passages are the answers, and the vectors of both."""
    generator = torch.Generator().manual_seed(SEED)
    topics = torch.randn(case.passages // 50, case.size, generator=generator)
    passages = torch.randn(case.passages, case.size, generator=generator)
    passages += 0.7 * topics[torch.randint(len(topics), (case.passages,), generator=generator)]
    passages = F.normalize(passages, dim=1)
    queries = F.normalize(torch.randn(case.queries, case.size, generator=generator), dim=1)
    queries = F.normalize(passages[: case.queries] + 1.2 * queries, dim=1)
    save_array(folder / "queries.npy", queries.numpy())
    save_array(folder / "passages.npy", passages.numpy())
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        file.writelines(f'{{"text": "passage {number}"}}\n' for number in range(case.passages))
    with ShardWriter(folder / "shards", "asked") as writer:
        for number in range(case.queries):
            writer.write(Record(f"query {number}", f"passage {number}"))
    write_index(folder / "shards", writer.close())


@dataclass(frozen=True)
class _Embedder:
    """Stands for trainer.embed.Embedder: a text's vector is the one that its number names."""

    folder: Path
    size: int
    device = torch.device("cpu")

    @property
    def model(self) -> Any:
        prompts = {"query_prompt": "", "passage_prompt": ""}
        return SimpleNamespace(name="given", tokenizer=None, encoder=SimpleNamespace(size=self.size), **prompts)

    @property
    def identity(self) -> dict[str, Any]:
        return {"weights": "given"}

    def __call__(self, texts: Sequence[str], progress: Any = None) -> torch.Tensor:
        numbers = np.array([int(text.split()[-1]) for text in texts])
        return torch.from_numpy(np.load(self.folder / "queries.npy", mmap_mode="r")[numbers])


def ours(case: Case, folder: Path) -> Path:
    """The whole stage but for the encoding; returns its output."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        output = folder / "mined"
        config = Config(
            model="given",
            data=str(folder / "shards"),
            corpus=str(folder / "corpus.jsonl"),
            output=str(output),
            negatives=COUNT,
            depth=DEPTH,
            margin=MARGIN,
        )
        task = Task(config, _Embedder(folder, case.size), mixture.load(config.data))  # type: ignore[arg-type]
        with Parts(Path(name) / "work", {}) as parts, contextlib.redirect_stdout(io.StringIO()):
            parts.path("corpus.npy").symlink_to(folder / "passages.npy")
            minework.mine(task, parts, output)
    return output


def _settings(case: Case) -> list[tuple[int, bool]]:
    """(queries at once, with faiss) of the peer, its default last."""
    return [(case.peer_batches[-1], True), *((batch, False) for batch in case.peer_batches)]


def _named(setting: tuple[int, bool]) -> str:
    return f"peer, {setting[0]:,} at once{', faiss' * setting[1]}"


def peer(case: Case, folder: Path, batch: int, with_faiss: bool) -> datasets.Dataset:
    """mine_hard_negatives with a model that has nothing to do but to hand out the vectors, as its cache does."""
    stand_in = SimpleNamespace(
        device=torch.device("cpu"),
        get_embedding_dimension=lambda: case.size,
        encode_query=lambda texts, **_: np.load(folder / "queries.npy"),
        encode_document=lambda texts, **_: np.load(folder / "passages.npy"),
        similarity=util.dot_score,
        similarity_pairwise=util.pairwise_dot_score,
    )
    pairs = {
        "query": [f"query {number}" for number in range(case.queries)],
        "passage": [f"passage {number}" for number in range(case.queries)],
    }
    with contextlib.redirect_stderr(io.StringIO()):
        return util.mine_hard_negatives(
            datasets.Dataset.from_dict(pairs),
            stand_in,  # type: ignore[arg-type]
            corpus=[f"passage {number}" for number in range(case.passages)],
            range_max=DEPTH,
            relative_margin=1 - MARGIN,
            num_negatives=COUNT,
            output_format="n-tuple",
            faiss_batch_size=batch,
            use_faiss=with_faiss,
            verbose=False,
        )


def _memory(case: Case, folder: Path, name: str) -> Memory:
    """The peak of one miner, after a small run that brings in what libraries allocate once."""
    logging.getLogger("quintet").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as small:
        prepare(QUICK, Path(small))
        ours(QUICK, Path(small))
        peer(QUICK, Path(small), 100, True)
    settings = {_named(setting): setting for setting in _settings(case)}
    return extra_memory(lambda: peer(case, folder, *settings[name]) if name in settings else ours(case, folder))


# --- correctness -------------------------------------------------------------------------------------------------


def compare(output: Path, theirs: datasets.Dataset, folder: Path) -> dict[str, float]:
    """Our negatives beside the peer's, which drops queries without enough of them.

    Raises:
        GateError: a query's negatives differ by more than the order of equal scores.
    """
    mined = _negatives(output)
    queries, passages = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("queries", "passages"))
    worst, other = 0.0, 0
    for row in theirs:
        names = mined[row["query"]], [row[f"negative_{place + 1}"] for place in range(COUNT)]
        if names[0] != names[1]:
            vector = queries[_number(row["query"])].astype(np.float64)
            scores = [passages[list(map(_number, texts))].astype(np.float64) @ vector for texts in names]
            worst, other = max(worst, float(abs(scores[0] - scores[1]).max())), other + 1
    if worst > 1e-6:
        raise GateError(f"negatives whose scores differ by {worst:.1e}")
    return {"queries": len(theirs), "in another order": other, "largest difference of a score": worst}


def _negatives(output: Path) -> dict[str, list[str]]:
    index = load_index(output)
    tables = [
        read_block(index, shard, block).table
        for shard, info in enumerate(index.shards)
        for block in range(len(info.blocks))
    ]
    return {
        row["query"]: row["negatives"] for found in tables for row in found.select(["query", "negatives"]).to_pylist()
    }


def _number(text: str) -> int:
    return int(text.split()[-1])
