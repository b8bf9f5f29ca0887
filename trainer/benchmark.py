"""The field's benchmarks, run by mteb around our encoder: their names, E5's protocol, their results.

Source of the protocol: the evaluation code of E5 and multilingual E5 (microsoft/unilm). "passage: " stands before the
documents of retrieval alone; every other text of any task is a query, and Quora's documents are too. Vectors have
length 1 but for classification. An instruct model gets the task's instruction, and nothing before documents.

mteb takes seconds to import, so this module is imported only when it is needed.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import orjson
import torch
import torch.nn.functional as F
import xxhash
from mteb.abstasks import AbsTask
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.results import TaskResult
from mteb.types import PromptType
from torch import Tensor

from data.errors import QuintetError, UserError
from data.rules import Prompts, passage_prefix, query_prefix
from data.tokens import fingerprint
from trainer.classic import SYMMETRIC_TASKS
from trainer.embed import weights_hash
from trainer.encoder import Model

log = logging.getLogger("quintet")
datasets.disable_progress_bars()  # one for every subset fills a log
logging.getLogger("mteb").setLevel(logging.ERROR)  # and so do its hints, for each of its tasks

# The 16 languages that multilingual E5 is reported on: those of MIRACL's training set. German and Yoruba came later.
_MIRACL_16 = ("ar", "bn", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw", "te", "th", "zh")

# Short names: a benchmark of mteb, or a task and its subsets; no subsets: all.
_SHORT: dict[str, tuple[str, tuple[str, ...]]] = {
    "mteb-en-v1": ("MTEB(eng, v1)", ()),
    "mteb-en": ("MTEB(eng, v2)", ()),
    "mteb-multilingual": ("MTEB(Multilingual, v2)", ()),
    "miracl": ("MIRACLRetrieval", _MIRACL_16),
    "miracl-18": ("MIRACLRetrieval", ()),
    "miracl-hard": ("MIRACLRetrievalHardNegatives", _MIRACL_16),
    "miracl-hard-18": ("MIRACLRetrievalHardNegatives", ()),
}

# Figures worth a place in results.json, beside a task's main score.
_FIGURES = (
    *(
        "ndcg_at_10",
        "mrr_at_10",
        "map_at_1000",
        "recall_at_100",
        "hit_rate_at_1",
        "accuracy",
        "f1",
        "precision",
        "recall",
    ),
    *("margin_f1", "margin_accuracy", "cosine_spearman", "cosine_pearson", "v_measure", "max_ap"),
)

_TEXTS_A_BATCH = 1024  # that mteb's loader hands over at once; our encoder makes its own batches

Embed = Callable[..., Tensor]  # (n texts, normalize=...) -> [n, D]


@dataclass(frozen=True)
class Suite:
    """What a name stands for: one task, or the tasks of a benchmark."""

    name: str
    tasks: tuple[AbsTask, ...]
    is_benchmark: bool = False

    @property
    def task_names(self) -> list[str]:
        """Of a benchmark's tasks, which have entries of their own."""
        return [task.metadata.name for task in self.tasks] if self.is_benchmark else []


@dataclass(frozen=True)
class Missing:
    """A task without a result, and why: its data are not to be had, or its own code failed."""

    name: str
    reason: str
    no_data: bool


# --- names -----------------------------------------------------------------------------------------------------


def suites(names: Sequence[str]) -> list[Suite]:
    """What each name stands for: a short name, a benchmark or a task of mteb in any case, or TASK/SUBSET.

    Raises:
        UserError: there is no such name, with near ones, or its tasks are not of text.
    """
    benchmarks = {benchmark.name.lower(): benchmark for benchmark in mteb.get_benchmarks()}
    found = [_suite(name, benchmarks) for name in names]
    for suite in found:
        others = sorted({task.metadata.name for task in suite.tasks if set(task.metadata.modalities) != {"text"}})
        if others:
            raise UserError(f"tasks={suite.name}: {others[0]} is not of text alone; this model reads text")
    return found


def _suite(name: str, benchmarks: Mapping[str, mteb.Benchmark]) -> Suite:
    wanted, subsets = _SHORT.get(name.lower(), (name, ()))
    if wanted.lower() in benchmarks:
        benchmark = benchmarks[wanted.lower()]
        return Suite(benchmark.name, tuple(benchmark.tasks), True)
    spelled = _spelled(wanted)
    if spelled:
        return Suite(name.lower() if subsets else spelled, (_task(name, spelled, subsets),))
    task, _, subset = wanted.partition("/")
    spelled = _spelled(_SHORT.get(task.lower(), (task, ()))[0]) if subset else ""
    if not spelled:
        raise UserError(_unknown(name, benchmarks))
    return Suite(f"{spelled}/{subset}", (_task(name, spelled, (subset,)),))


def _spelled(name: str) -> str:
    """A task's name as mteb writes it; empty where there is none."""
    try:
        return mteb.get_task(name).metadata.name
    except KeyError:
        return _task_names().get(name.lower(), "")


@cache
def _task_names() -> dict[str, str]:
    """All names of tasks, by their lower case. Takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every task that is in beta
        tasks = mteb.get_tasks(exclude_superseded=False, exclude_private=False, exclude_beta=False)
    return {task.metadata.name.lower(): task.metadata.name for task in tasks}


def _task(given: str, name: str, subsets: Sequence[str]) -> AbsTask:
    task = mteb.get_task(name)
    unknown = [subset for subset in subsets if subset not in task.hf_subsets]
    if unknown:
        has = ", ".join(task.hf_subsets[:20]) + (", ..." if len(task.hf_subsets) > 20 else "")
        raise UserError(f"tasks={given}: {name} has no subset {unknown[0]}; it has {has}")
    return mteb.get_task(name, hf_subsets=list(subsets)) if subsets else task


def _unknown(name: str, benchmarks: Mapping[str, mteb.Benchmark]) -> str:
    spelled = _task_names() | {short: short for short in _SHORT} | {key: benchmarks[key].name for key in benchmarks}
    near = [spelled[found] for found in difflib.get_close_matches(name.lower(), spelled, n=3)]
    hint = f"did you mean {', '.join(near)}?" if near else f"short names are {', '.join(_SHORT)}"
    return f"tasks={name}: mteb has no benchmark or task of that name; {hint}"


# --- the encoder, as mteb sees it -------------------------------------------------------------------------------


class Adapter:
    """mteb's interface of an encoder around ours, with E5's protocol.

    Args:
        embed: texts, prompts included, to vectors; its `normalize` says whether they have length 1.
        name: the folder or hub id, under which results are kept.
        instruct: put the task's instruction before queries instead of the model's own prompt.
        precision: of `embed`; results of another have another revision.
        device: where vectors are compared.

    Attributes:
        prompted: names of tasks whose texts have their prompts already.
    """

    def __init__(
        self,
        model: Model,
        embed: Embed,
        *,
        name: str = "",
        instruct: bool = False,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.prompts = Prompts(query=model.query_prompt, passage=model.passage_prompt)
        self.instruct, self.normalize, self.device = instruct, model.normalize, torch.device(device)
        self.prompted: set[str] = set()
        self._embed = embed
        self.mteb_model_meta = _meta(model, name or model.name, instruct, precision)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> np.ndarray:
        """n texts, in batches with a list `text`, to fp32 [n, D]."""
        prefix = self.prefix(task_metadata, prompt_type)
        texts = [prefix + text for batch in inputs for text in batch["text"]]
        # E5 leaves the lengths to a classifier, which did slightly better with them.
        length_one = self.normalize and task_metadata.type != "Classification"
        return self._embed(texts, normalize=length_one).numpy()

    def prefix(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        """What stands before a text of this task."""
        if task.name in self.prompted:
            return ""
        instruction = _instruction(task) if self.instruct else ""
        if prompt_type != PromptType.document:
            return query_prefix(self.prompts, instruction)
        symmetric = task.type in SYMMETRIC_TASKS or "quora" in task.name.lower()
        return passage_prefix(self.prompts, instruction, symmetric)

    def similarity(self, left: Any, right: Any) -> Tensor:
        """Cosines (inner products for a model that does not normalise), [n, D] and [m, D] -> [n, m]."""
        return self._ready(left) @ self._ready(right).T

    def similarity_pairwise(self, left: Any, right: Any) -> Tensor:
        """The same for pairs: [n, D] and [n, D] -> [n]."""
        return (self._ready(left) * self._ready(right)).sum(dim=1).cpu()

    def _ready(self, vectors: Any) -> Tensor:
        tensor = torch.atleast_2d(torch.as_tensor(vectors).to(self.device))
        return F.normalize(tensor, dim=1) if self.normalize else tensor


def _instruction(task: TaskMetadata) -> str:
    """What mteb says that a task is about; for its older tasks these are the instructions of E5-mistral."""
    prompt = task.prompt.get("query", "") if isinstance(task.prompt, dict) else task.prompt
    return (prompt or get_abstask_prompt(task.name)).strip()


def _meta(model: Model, name: str, instruct: bool, precision: str) -> ModelMeta:
    """Name and revision of a model: what was made with other weights or settings has another revision."""
    settings = {
        "prompts": [model.query_prompt, model.passage_prompt],
        "instruct": instruct,
        "max_length": model.max_length,
        "tokenizer": fingerprint(model.tokenizer),
        "pooling": model.pooling,
        "normalize": model.normalize,
        "precision": precision,
    }
    revision = f"{weights_hash(model.encoder)}-{_digest(settings)[:8]}"
    values = {
        "name": _mteb_name(name),
        "revision": revision,
        "embed_dim": model.encoder.size,
        "max_tokens": float(model.max_length),
        "similarity_fn_name": ScoringFunction.COSINE if model.normalize else ScoringFunction.DOT_PRODUCT,
        "use_instructions": instruct,
    }
    return ModelMeta.create_empty(overwrites=values)


def _mteb_name(given: str) -> str:
    """A hub id as it is; of a folder its name, or its parent's where it is only called model, under "local/"."""
    if not Path(given).exists():
        return given if "/" in given else f"local/{given}"
    path = Path(given).resolve()
    return f"local/{path.parent.name if path.name == 'model' else path.name}"


def _digest(value: Any) -> str:
    return xxhash.xxh3_128(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


# --- running ---------------------------------------------------------------------------------------------------


def no_copy(task: AbsTask) -> bool:
    """There is no local copy of a task's data."""
    return False


@dataclass(frozen=True)
class Runner:
    """Evaluates tasks one by one; what is finished in `folder` is not evaluated again.

    Results are in mteb's own layout: FOLDER/results/MODEL/REVISION/TASK.json.

    Attributes:
        fill: puts a local copy of its data into a task, where there is one; whether it did.
        done: results by task, so that two benchmarks share one.
    """

    adapter: Adapter
    folder: Path
    fill: Callable[[AbsTask], bool] = no_copy
    done: dict[str, TaskResult | Missing] = field(default_factory=dict)

    def __call__(self, task: AbsTask) -> TaskResult | Missing:
        """The result of a task.

        Raises:
            NumericError: the model gives NaN or infinity.
        """
        key = f"{task.metadata.name} {sorted(task.hf_subsets)} {sorted(task.eval_splits)}"
        if key not in self.done:
            self.done[key] = self._aggregate(task) if isinstance(task, AbsTaskAggregate) else self._single(task)
        return self.done[key]

    def _aggregate(self, task: AbsTaskAggregate) -> TaskResult | Missing:
        parts = [self(part) for part in task.metadata.tasks]
        lacking = [part for part in parts if isinstance(part, Missing)]
        if lacking:
            return Missing(task.metadata.name, f"{lacking[0].name}: {lacking[0].reason}", lacking[0].no_data)
        result = task.combine_task_results([part for part in parts if isinstance(part, TaskResult)])
        self._cache.save_to_cache(result, self.adapter.mteb_model_meta)
        return result

    def _single(self, task: AbsTask) -> TaskResult | Missing:
        name = task.metadata.name
        before = self._before(task)
        if before is not None and not before.get_missing_evaluations(task):
            log.info("%s: finished before", name)
            return before
        try:
            if not task.data_loaded and not self.fill(task):
                task.load_data()
        except QuintetError:
            raise
        except Exception as error:  # the tasks' own code raises whatever it likes where there is no network
            return Missing(name, _first_line(error), no_data=True)
        log.info("%s: %s, %d subsets", name, task.metadata.type, len(task.hf_subsets))
        try:
            return self._evaluate(task, "only-missing" if before is not None else "always")
        except QuintetError:
            raise
        except Exception as error:
            log.debug("%s", name, exc_info=True)
            return Missing(name, _first_line(error), no_data=False)
        finally:
            task.unload_data()

    def _evaluate(self, task: AbsTask, overwrite: str) -> TaskResult:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"mteb\.")
            mteb.evaluate(
                self.adapter,
                task,
                co2_tracker=False,
                cache=self._cache,
                overwrite_strategy=overwrite,
                encode_kwargs={"batch_size": _TEXTS_A_BATCH, "show_progress_bar": False},
                show_progress_bar=False,
            )
        stored = self._before(task)  # rounded there, so that the same figures come now and next time
        assert stored is not None, "mteb has just written it"
        return stored

    def _before(self, task: AbsTask) -> TaskResult | None:
        """The result in the folder, which may lack subsets; none where it is of other data or was cut off."""
        try:
            found = self._cache.load_task_result(task.metadata.name, self.adapter.mteb_model_meta)
        except (ValueError, KeyError, OSError):
            return None
        return found if found is not None and found.dataset_revision == task.metadata.revision else None

    @property
    def _cache(self) -> mteb.ResultCache:
        return mteb.ResultCache(self.folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


# --- what is reported ------------------------------------------------------------------------------------------


def run_suites(suites: Sequence[Suite], runner: Runner) -> tuple[dict[str, dict[str, Any]], list[Missing]]:
    """Entries of results.json by task and benchmark, and what has no result."""
    entries: dict[str, dict[str, Any]] = {}
    lacking: dict[str, Missing] = {}
    for suite in suites:
        found: dict[str, dict[str, Any]] = {}
        missing: list[str] = []
        for task in suite.tasks:
            name = task.metadata.name if suite.is_benchmark else suite.name
            result = runner(task)
            if isinstance(result, Missing):
                lacking[name] = result
                missing.append(name)
            else:
                found[name] = entry(task, result)
        entries |= found
        if suite.is_benchmark:
            entries[suite.name] = summary(found, missing)
    return entries, list(lacking.values())


def entry(task: AbsTask, result: TaskResult) -> dict[str, Any]:
    """One entry of results.json: means over the task's splits and subsets, as mteb's leaderboard takes them."""
    rows = [row for split in task.eval_splits for row in result.scores[split] if row["hf_subset"] in _subsets(task)]
    main = task.metadata.main_score
    found: dict[str, Any] = {"type": task.metadata.type, "metric": main, "score": _mean(rows, "main_score")}
    found |= {name: _mean(rows, name) for name in _FIGURES if all(isinstance(row.get(name), float) for row in rows)}
    by_subset = {row["hf_subset"]: [other for other in rows if other["hf_subset"] == row["hf_subset"]] for row in rows}
    if len(by_subset) > 1:
        found["by_subset"] = {subset: _mean(same, "main_score") for subset, same in by_subset.items()}
    return found


def _subsets(task: AbsTask) -> set[str]:
    return {"default"} if isinstance(task, AbsTaskAggregate) else set(task.hf_subsets)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def summary(entries: Mapping[str, dict[str, Any]], missing: Sequence[str]) -> dict[str, Any]:
    """The entry of a benchmark: the mean over its tasks, over each type's, and over the types."""
    by_type: dict[str, list[float]] = {}
    for found in entries.values():
        by_type.setdefault(found["type"], []).append(found["score"])
    means = {kind: float(np.mean(scores)) for kind, scores in by_type.items()}
    result: dict[str, Any] = {"type": "benchmark", "tasks": len(entries), "missing": list(missing)}
    if entries:
        scores = [found["score"] for found in entries.values()]
        result |= {"score": float(np.mean(scores)), "mean_of_types": float(np.mean(list(means.values())))}
    return result | {"by_type": means}
