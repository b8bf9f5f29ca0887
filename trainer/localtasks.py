"""Tasks of mteb over local files: a user's own, and copies of the data of known ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import torch.nn.functional as F
import xxhash
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from data.rules import Prompts
from trainer import localdata, retrieval, sets
from trainer.localdata import TABLES, Group, Table
from trainer.margin import best_by_margin, f1_of_each
from trainer.sets import RetrievalSet

log = logging.getLogger("quintet")

# What BEIR calls the folders of the sets that mteb names otherwise than by letter case and punctuation.
_BEIR = {"FiQA2018": "fiqa", "DBPedia": "dbpedia-entity", "QuoraRetrieval": "quora", "Touche2020": "webis-touche2020"}


@dataclass(frozen=True)
class Local:
    """A task of the user's files, made when the prompts are known.

    Attributes:
        prompted: whether its texts have their prompts already.
    """

    name: str
    make: Callable[[Prompts], AbsTask]
    prompted: bool = False


def load(given: Mapping[str, Sequence[str]], split: str = "test") -> list[Local]:
    """Read the files of each key: sts, bitext, classification, reranking, retrieval.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    return [
        _local(key, Path(path), name, split)
        for key, paths in given.items()
        for path, name in zip(paths, sets.names([Path(path) for path in paths]), strict=True)
    ]


def _local(key: str, path: Path, name: str, split: str) -> Local:
    name = name.replace("/", "-")  # it names a file of results
    if key == "retrieval":
        (data,) = sets.load(str(path), split=split)
        return Local(name, lambda prompts: retrieval_task(name, data, prompts), prompted=True)
    if key == "classification":
        train, test = localdata.labelled(path)
        return Local(name, lambda _: classification(name, train, test))
    if key == "reranking":
        groups, fingerprint = localdata.groups(path)
        return Local(name, lambda _: reranking(name, groups, fingerprint))
    read, make = {"sts": (localdata.graded_pairs, sts), "bitext": (localdata.translations, bitext)}[key]
    table = read(path)
    return Local(name, lambda _: make(name, table))


def sts(name: str, table: Table) -> AbsTask:
    """Graded pairs: the rank correlation of cosines with the scores."""
    bounds = {"min_score": min(table.columns["score"]), "max_score": max(table.columns["score"])}
    task = _new(AbsTaskSTS, name, "STS", "cosine_spearman", table.fingerprint, **bounds)
    return _with(task, {"default": DatasetDict(test=Dataset.from_dict(table.columns))})


def bitext(name: str, table: Table) -> AbsTask:
    """Translations: the right one found among all, by cosine (mteb's figures) and by margin."""
    task = _new(_BitextMining, name, "BitextMining", "f1", table.fingerprint)
    return _with(task, {"default": DatasetDict(test=Dataset.from_dict(table.columns))})


def classification(name: str, train: Table, test: Table) -> AbsTask:
    """Labelled texts: a logistic regression on 8 examples of each label, ten times."""
    fingerprint = f"{train.fingerprint}-{test.fingerprint}"
    task = _new(AbsTaskClassification, name, "Classification", "accuracy", fingerprint)
    return _with(task, {"default": DatasetDict(_numbered(train, test))})


def reranking(name: str, groups: Sequence[Group], fingerprint: str) -> AbsTask:
    """Groups: each query's own passages put in order."""
    task = _new(AbsTaskRetrieval, name, "Reranking", "map_at_1000", fingerprint)
    return _with(task, {"default": {"test": _ordered(groups)}})


def retrieval_task(name: str, data: RetrievalSet, prompts: Prompts) -> AbsTask:
    """A retrieval set as a task, its texts with their prompts, as `trainer.retrieval` encodes them."""
    passages = retrieval.passage_texts(data, prompts)
    # mteb leaves out the document that has the query's own id, so a query that stands in the corpus has that.
    ids = [f"d{own}" if own >= 0 else f"q{number}" for number, own in enumerate(data.own.tolist())]
    texts = retrieval.query_texts(data, prompts)
    truth: dict[str, dict[str, int]] = {}
    for number, key in enumerate(ids):
        row = slice(data.relevance.offsets[number], data.relevance.offsets[number + 1])
        found = zip(data.relevance.passages[row].tolist(), data.relevance.grades[row].tolist(), strict=True)
        truth[key] = {f"d{passage}": grade for passage, grade in found}
    fingerprint = xxhash.xxh3_128(orjson.dumps([texts, passages, truth])).hexdigest()
    itself = {"ignore_identical_ids": bool((data.own >= 0).any())}
    task = _new(AbsTaskRetrieval, name, "Retrieval", "ndcg_at_10", fingerprint, **itself)
    documents = Dataset.from_dict({"id": [f"d{number}" for number in range(len(passages))], "text": passages})
    queries = Dataset.from_dict({"id": ids, "text": texts})
    split = RetrievalSplitData(corpus=documents, queries=queries, relevant_docs=truth, top_ranked=None)
    return _with(task, {"default": {"test": split}})


class _BitextMining(AbsTaskBitextMining):
    """mteb's task with the figures of margin scoring beside those of the cosine."""

    def _evaluate_subset(self, model: Any, data_split: Dataset, **options: Any) -> Any:
        recorder = _Recorder(model)
        scores: Any = super()._evaluate_subset(recorder, data_split, **options)
        left, right = (F.normalize(torch.as_tensor(vectors), dim=1) for vectors in recorder.vectors)
        found = best_by_margin(left, right, device=model.device).numpy()
        scores["margin_f1"] = float(f1_of_each(found).mean())
        scores["margin_accuracy"] = float((found == np.arange(len(found))).mean())
        return scores


class _Recorder:
    """An encoder that remembers what it gave."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.vectors: list[Any] = []
        self.mteb_model_meta = model.mteb_model_meta
        self.similarity, self.similarity_pairwise = model.similarity, model.similarity_pairwise

    def encode(self, inputs: Any, **options: Any) -> Any:
        self.vectors.append(self._model.encode(inputs, **options))
        return self.vectors[-1]


def _new(base: type[AbsTask], name: str, kind: Any, main_score: str, fingerprint: str, **attributes: Any) -> Any:
    metadata = TaskMetadata(
        name=name,
        description="A task over local files.",
        dataset={"path": "local", "revision": fingerprint},
        type=kind,
        category="t2t",
        eval_splits=["test"],
        eval_langs=["mul"],
        main_score=main_score,
    )
    return type("LocalTask", (base,), {"metadata": metadata, **attributes})()


def _numbered(train: Table, test: Table) -> dict[str, Dataset]:
    """Both splits with a number for each label, which some of mteb's figures need."""
    numbers = {label: number for number, label in enumerate(sorted(set(train.columns["label"])))}
    return {
        split: Dataset.from_dict(table.columns | {"label": [numbers[label] for label in table.columns["label"]]})
        for split, table in (("train", train), ("test", test))
    }


def _with(task: AbsTask, dataset: Any) -> AbsTask:
    task.dataset, task.data_loaded = dataset, True
    return task


def _ordered(groups: Sequence[Group]) -> RetrievalSplitData:
    """A row is its own query, also where two rows ask the same: each has its own passages to put in order."""
    texts: dict[str, str] = {}
    truth: dict[str, dict[str, int]] = {}
    offered: dict[str, list[str]] = {}
    for number, group in enumerate(groups):
        for passage in (*group.positives, *group.negatives):
            texts.setdefault(passage, f"d{len(texts)}")
        truth[f"q{number}"] = {texts[passage]: 1 for passage in group.positives}
        others = [passage for passage in group.negatives if passage not in group.positives]
        offered[f"q{number}"] = [texts[passage] for passage in (*group.positives, *others)]
    queries = {"id": list(truth), "text": [group.query for group in groups]}
    corpus = {"id": list(texts.values()), "text": list(texts)}
    return RetrievalSplitData(
        corpus=Dataset.from_dict(corpus),
        queries=Dataset.from_dict(queries),
        relevant_docs=truth,
        top_ranked=offered,
    )


# --- copies of the data of known tasks -------------------------------------------------------------------------


def fill(task: AbsTask, folder: Path) -> bool:
    """Give a task of mteb its data from a folder of local copies; whether there was one.

    FOLDER/TASK, or FOLDER/TASK/SUBSET for a task of several, is a BEIR folder for retrieval, a table for pairs (.tsv,
    .jsonl), a JSONL file of groups for re-ranking, a folder with a table for each split for classification. Case and
    punctuation of TASK do not matter, and the names of BEIR's own folders do.

    Raises:
        UserError: a copy is there and cannot be read.
    """
    read = _reader(task)
    places = {subset: _place(folder, task, subset) for subset in task.hf_subsets}
    if read is None or None in places.values():
        return False
    log.info("%s: from the copy in %s", task.metadata.name, folder)
    splits = list(task.eval_splits)
    _with(task, {subset: read(place, splits) for subset, place in places.items() if place})
    return True


def _reader(task: AbsTask) -> Callable[[Path, list[str]], Any] | None:
    if isinstance(task, AbsTaskRetrieval):
        return _groups_of if task.metadata.type == "Reranking" else _beir_splits
    if isinstance(task, AbsTaskBitextMining) and not task.parallel_subsets:
        return lambda path, splits: _same(Dataset.from_dict(localdata.translations(path, "task_data").columns), splits)
    if isinstance(task, AbsTaskSTS):
        return lambda path, splits: _same(Dataset.from_dict(localdata.graded_pairs(path, "task_data").columns), splits)
    if isinstance(task, AbsTaskClassification):
        return _labelled
    return None


def _place(folder: Path, task: AbsTask, subset: str) -> Path | None:
    """Where the copy of a task's subset lies: a folder, or a file without regard to its suffix."""
    name = task.metadata.name
    if name.startswith("CQADupstack") and name.endswith("Retrieval"):
        folder, names = folder / "cqadupstack", {_plain(name[len("CQADupstack") : -len("Retrieval")])}
    else:
        names = {_plain(name), _plain(_BEIR.get(name, name))}
    found = _entry(folder, names)
    alone = len(task.metadata.hf_subsets) == 1
    return found if found is None or alone else _entry(found, {_plain(subset)})


def _entry(folder: Path, names: set[str]) -> Path | None:
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((path for path in entries if _plain(_stem(path)) in names), None)


def _stem(path: Path) -> str:
    suffix = next((suffix for suffix in TABLES if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _same(rows: Dataset, splits: Sequence[str]) -> DatasetDict:
    return DatasetDict(dict.fromkeys(splits, rows))


def _beir_splits(folder: Path, splits: Sequence[str]) -> dict[str, RetrievalSplitData]:
    return {split: _beir_split(folder, split) for split in splits}


def _beir_split(folder: Path, split: str) -> RetrievalSplitData:
    documents, queries, judged = sets.beir_parts(folder, split)
    asked = {key: text for key, text in queries.items() if key in judged}
    return RetrievalSplitData(
        corpus=Dataset.from_dict({"id": list(documents), "text": list(documents.values())}),
        queries=Dataset.from_dict({"id": list(asked), "text": list(asked.values())}),
        relevant_docs={key: judged[key] for key in asked},
        top_ranked=None,
    )


def _groups_of(path: Path, splits: Sequence[str]) -> dict[str, RetrievalSplitData]:
    return dict.fromkeys(splits, _ordered(localdata.groups(path, "task_data")[0]))


def _labelled(folder: Path, splits: Sequence[str]) -> DatasetDict:
    train, test = localdata.labelled(folder, "task_data")
    return DatasetDict(_numbered(train, test) | dict.fromkeys(splits, _numbered(train, test)["test"]))
