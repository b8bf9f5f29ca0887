"""Stage `evaluate`: how good a model is: on held-out pairs, on benchmarks of the field, on local tasks."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import Stopped, UserError
from data.settings import key
from trainer.monitor import StageWandbConfig

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from data.groups import Numbers
    from data.rules import Prompts
    from trainer.benchmark import Missing, Suite
    from trainer.encoder import Model
    from trainer.localtasks import Local
    from trainer.retrieval import Result
    from trainer.sets import RetrievalSet
    from trainer.shared import SharedEncoder

_log = logging.getLogger("quintet")

_COLUMNS = {"ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "recall_at_100": "R@100", "accuracy_at_1": "acc@1"}
_LOCAL = ("sts", "bitext", "classification", "reranking", "retrieval")  # keys of local files that mteb scores
_LIBRARIES = ("quintet", "torch", "transformers", "tokenizers", "bm25s")


@dataclass(frozen=True, kw_only=True)
class PromptOverride:
    """What to put before the texts instead of the model's own prompts."""

    query: str | None = key(None, help="before every query; null: the model's own")
    passage: str | None = key(None, help="before every passage; null: the model's own")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet evaluate`."""

    model: str = key(help="model folder, run folder, or hub id")
    data: str | list[str] = key([], help="JSONL files of pairs and BEIR folders: retrieval, beside BM25")
    tasks: str | list[str] = key([], help="benchmarks and tasks of mteb: beir, miracl, bucc, STS17, 'MTEB(eng, v2)'")
    sts: str | list[str] = key([], help="files of sentence1, sentence2, score (TSV, JSONL)")
    bitext: str | list[str] = key([], help="files of sentence1 and its translation sentence2 (TSV, JSONL)")
    classification: str | list[str] = key([], help="folders with train and test: text, label (TSV, JSONL)")
    reranking: str | list[str] = key([], help="JSONL files of query, positive, negative")
    retrieval: str | list[str] = key([], help="like data, but scored by mteb, with its figures")
    output: str = key(help="folder for results.json and evaluation.json, or a .json file")
    compare: bool = key(False, help="print the published figures of E5 and multilingual E5 beside")
    offline: bool = key(False, help="fetch nothing; tasks whose data are not here are left out and named")
    task_data: str = key("", help="folder with copies of tasks' data, by task; empty: mteb fetches them")
    instructions: str = key(
        "auto",
        help="tasks' instructions before queries; auto: if the model's prompt is one",
        choices=("auto", "on", "off"),
    )
    bm25: bool = key(True, help="also score BM25")
    rerank: str = key("", help="cross-encoder that also puts the first results in order; empty: none")
    rerank_depth: int = key(100, help="results of each query that it reads", low=1, high=100)
    split: str = key("test", help="which qrels/<split>.tsv of BEIR folders")
    prompts: PromptOverride = key(PromptOverride(), help="prompts instead of the model's own")
    max_length: int | None = key(None, help="tokens of a text at most; null: the model's own", low=3)
    limit: int = key(0, help="at most so many queries of each data set, drawn with seed; 0: all", low=0)
    seed: int = key(0, help="seed of that draw")
    tokens_per_chunk: int | None = key(
        None, help="padded tokens of one forward pass; null: 65536 on a GPU, 512 (bf16: 2048) on a CPU", low=1
    )
    precision: str = key("fp32", help="matrix products", choices=("fp32", "bf16"))
    device: str = key("auto", help="where to compute; auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    wandb: StageWandbConfig = key(StageWandbConfig(), help="mirror of the results")

    def check(self) -> list[str]:
        """One message for each setting that cannot be."""
        if any(_listed(getattr(self, name)) for name in ("data", "tasks", *_LOCAL)):
            return []
        return [
            "data=[] tasks=[]: nothing to evaluate on; give files of pairs or BEIR folders as data, or names of tasks"
        ]


def run(config: Config) -> None:
    """Score the model on all that is asked for; write results.json and evaluation.json, print tables.

    Collective: rank 0 leads, the others embed for it. Tasks that are finished in the output are not evaluated again.

    Raises:
        UserError: missing model or data, a name that is none, a task without a result, a device that is not there, or
            another job that writes the same results.
        NumericError: the model gives NaN or infinity.
    """
    if config.offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # read when their libraries are imported
    from trainer import distributed, shared, work
    from trainer.device import pick_device
    from trainer.embed import load_model
    from trainer.preempt import leaving_when_warned

    begin = time.perf_counter()
    device = pick_device(config.device)
    with work.job(device), leaving_when_warned(Stopped.exit_code), ExitStack() as stack:
        wanted: list[_Wanted] = []
        distributed.on_first_rank(lambda: wanted.append(_wanted(config)))
        distributed.on_first_rank(lambda: _take_lease(_results_file(config), stack))
        with distributed.together():
            model = _with_prompts(load_model(config.model, device, config.max_length), config.prompts)
        encoder = shared.SharedEncoder(model, device, config.precision, config.tokens_per_chunk)
        shared.lead(encoder, lambda: _evaluate(config, wanted[0], encoder, begin))


@dataclass(frozen=True)
class _Wanted:
    """What to evaluate on, read and found to exist before the model is opened."""

    data: list[RetrievalSet]
    suites: list[Suite]
    local: list[Local]


def _wanted(config: Config) -> _Wanted:
    from trainer import sets

    data = _listed(config.data)
    given = {name: _listed(getattr(config, name)) for name in _LOCAL}
    of_mteb = bool(config.tasks) or any(given.values())
    load = partial(sets.load, data, split=config.split, limit=config.limit, seed=config.seed)
    found = load() if data or not of_mteb else []
    if not of_mteb:
        return _Wanted(found, [], [])
    if config.task_data and not Path(config.task_data).is_dir():
        raise UserError(f"task_data={config.task_data}: no such folder; it has a folder or file for each task's data")
    _import_mteb(config)
    from trainer import benchmark, localtasks

    wanted = _Wanted(found, benchmark.suites(_listed(config.tasks)), localtasks.load(given, config.split))
    names = [data_set.name for data_set in found] + [local.name for local in wanted.local]
    names += {name for suite in wanted.suites for name in (suite.name, *suite.task_names)}
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]!r} would name two of the results; rename one of the files or folders")
    return wanted


def _import_mteb(config: Config) -> None:
    """Import mteb where its results go to the output: on import it makes a folder, else that one in the home."""
    os.environ.setdefault("MTEB_CACHE", str(_mteb_folder(config)))
    try:
        import_module("mteb")
    except ImportError as error:
        raise UserError(
            f"tasks and local files other than data need the library mteb ({error}): pip install 'quintet[mteb]'"
        ) from None


def _mteb_folder(config: Config) -> Path:
    return _results_file(config).parent.absolute() / "mteb"


def _listed(value: str | list[str]) -> list[str]:
    return ([value] if value else []) if isinstance(value, str) else value


def _evaluate(config: Config, wanted: _Wanted, encoder: SharedEncoder, begin: float) -> None:
    from data.rules import Prompts
    from trainer import retrieval

    model, device = encoder.model, encoder.device
    prompts = Prompts(query=model.query_prompt, passage=model.passage_prompt)
    rerank = _reranker(config, device) if config.rerank else None
    results: dict[str, Result] = {}
    for data in wanted.data:
        for note in data.notes:
            _log.warning(note)
        _log.info("%s: %d queries, %d passages", data.name, len(data.rows), len(data.passages))
        again = partial(rerank, data) if rerank else None
        found = retrieval.score(data, encoder, prompts, device=device, rerank=again)
        results[data.name] = found | ({"bm25": retrieval.score_bm25(data)} if config.bm25 else {})
    tasks, missing = _run_tasks(config, wanted, encoder, prompts) if wanted.suites or wanted.local else ({}, [])
    notes = [note for data in wanted.data for note in data.notes]
    about = _about(config, model, device, notes, time.perf_counter() - begin)
    about |= {"missing": {lack.name: lack.reason for lack in missing}}
    _write(_results_file(config), results | tasks, about)
    _tell(config, results, tasks)
    if results:
        _print_table(results, model.name)
    if tasks:
        _print_tasks(tasks, model.name)
    if config.compare:
        from trainer import published

        published.print_beside(results | tasks, model.name)
    _tell_missing(config, missing)


def _run_tasks(
    config: Config, wanted: _Wanted, encoder: SharedEncoder, prompts: Prompts
) -> tuple[dict[str, Result], list[Missing]]:
    """Entries of results.json by task and benchmark, and the tasks without a result."""
    from trainer import benchmark, localtasks

    instruct = {"auto": prompts.query.startswith("Instruct: "), "on": True, "off": False}[config.instructions]
    adapter = benchmark.Adapter(
        encoder.model,
        encoder,
        name=config.model,
        instruct=instruct,
        precision=config.precision,
        device=encoder.device,
    )
    adapter.prompted.update(local.name for local in wanted.local if local.prompted)
    copies = Path(config.task_data) if config.task_data else None
    fill = partial(localtasks.fill, folder=copies) if copies else benchmark.no_copy
    runner = benchmark.Runner(adapter, _mteb_folder(config), fill)
    suites = [benchmark.Suite(local.name, (local.make(prompts),)) for local in wanted.local]
    return benchmark.run_suites(suites + wanted.suites, runner)


def _tell_missing(config: Config, missing: list[Missing]) -> None:
    """Say which tasks have no result; an error unless the data of all of them were not to be fetched."""
    if not missing:
        return
    lines = "".join(f"\n  {lack.name}: {lack.reason}" for lack in missing)
    text = f"tasks without a result: {len(missing)}{lines}"
    if config.offline and all(lack.no_data for lack in missing):
        _log.warning("%s\n  offline=true: their data are neither in the cache of datasets nor in task_data", text)
        return
    raise UserError(
        f"{text}\nthe others are finished: start the same command again, or with offline=true to go without"
    )


def _tell(config: Config, results: dict[str, Result], tasks: dict[str, Result]) -> None:
    """Leave the results as metrics, beside the results."""
    from trainer import retrieval, worklog

    folder = _results_file(config).with_suffix(".log")
    with worklog.follow(folder, "evaluate", folder.absolute().parent.name, config) as log:
        for data, result in results.items():
            beside = {f"{data}/{scorer}": result[scorer] for scorer in ("bm25", "reranked") if scorer in result}
            for name, scores in {data: result, **beside}.items():
                log.log(retrieval.named(name, scores))
        for task, found in tasks.items():
            if "score" in found:
                log.log({f"eval/{task}/score": found["score"]})


def _with_prompts(model: Model, prompts: PromptOverride) -> Model:
    changes: dict[str, Any] = {"query_prompt": prompts.query, "passage_prompt": prompts.passage}
    return dataclasses.replace(model, **{name: value for name, value in changes.items() if value is not None})


def _reranker(config: Config, device: torch.device) -> Callable[[RetrievalSet, Numbers], Numbers]:
    from trainer.crossencoder import open_teacher
    from trainer.rerank import rerank
    from trainer.scoring import Scorer

    scorer = Scorer(open_teacher(config.rerank, device), device, config.precision, config.tokens_per_chunk)
    return lambda data, found: rerank(scorer, data, found, config.rerank_depth)


def _about(config: Config, model: Model, device: torch.device, notes: list[str], seconds: float) -> dict[str, Any]:
    """What has to be known to get the same numbers again."""
    from importlib.metadata import version

    from trainer.embed import weights_hash

    return {
        "model": config.model,
        "weights_xxh3_128": weights_hash(model.encoder),
        "pooling": model.pooling,
        "normalize": model.normalize,
        "query_prompt": model.query_prompt,
        "passage_prompt": model.passage_prompt,
        "max_length": model.max_length,
        "rerank": config.rerank,
        "rerank_depth": config.rerank_depth,
        "precision": config.precision,
        "device": str(device),
        **{name: _listed(getattr(config, name)) for name in ("data", "tasks", *_LOCAL)},
        "task_data": config.task_data,
        "instructions": config.instructions,
        "split": config.split,
        "limit": config.limit,
        "seed": config.seed,
        "notes": notes,
        "versions": {name: version(name) for name in (*_LIBRARIES, *(["mteb"] if "mteb" in sys.modules else []))},
        "seconds": round(seconds, 1),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _results_file(config: Config) -> Path:
    output = Path(config.output).expanduser()
    return output if output.suffix == ".json" else output / "results.json"


def _take_lease(file: Path, stack: ExitStack) -> None:
    """Keep other jobs from writing these results meanwhile; the lease of one that died is taken over."""
    from trainer.runfolder import Lease, make_folder

    make_folder(file.parent, "output")
    stack.enter_context(Lease(file.parent, file=f".{file.stem}.lease", what=f"output={file}"))


def _write(file: Path, results: dict[str, Result], about: dict[str, Any]) -> None:
    from trainer.runfolder import write_json

    beside = file.with_name("evaluation.json" if file.stem == "results" else f"{file.stem}.evaluation.json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside, about)
        write_json(file, results)
    except OSError as error:
        raise UserError(f"output={file}: cannot be written: {error}") from None
    _log.info("results are in %s", file)


def _print_tasks(results: dict[str, Result], name: str) -> None:
    """One line for each task and benchmark."""
    from rich.table import Table

    table = Table("task", "type", "figure", name)
    table.columns[3].justify = "right"
    for task, found in results.items():
        if found["type"] != "benchmark":
            table.add_row(task, found["type"], found["metric"], f"{found['score']:.3f}")
            table.add_row("", "", "margin_f1", f"{found['margin_f1']:.3f}") if "margin_f1" in found else None
    for suite, found in results.items():
        if found["type"] == "benchmark" and found["tasks"]:
            lacking = f", {len(found['missing'])} without a result" if found["missing"] else ""
            table.add_section()
            table.add_row(suite, f"{found['tasks']} tasks{lacking}", "mean", f"{found['score']:.3f}")
            for kind, score in found["by_type"].items() if len(found["by_type"]) > 1 else ():
                table.add_row("", kind, "mean", f"{score:.3f}")
    _console().print(table)


def _print_table(results: dict[str, Result], name: str) -> None:
    """One line for each data set and source, the model above BM25."""
    from rich.table import Table

    table = Table("data", "source", "scorer", *(["queries"] + list(_COLUMNS.values())))
    for column in table.columns[3:]:
        column.justify = "right"
    for data, result in results.items():
        for source, rows in _by_source(result, name):
            for number, (scorer, scores) in enumerate(rows):
                labels = (data, source, scorer, f"{scores['queries']:,}") if number == 0 else ("", "", scorer, "")
                table.add_row(*labels, *(f"{scores[metric]:.3f}" for metric in _COLUMNS))
        table.add_section()
    _console().print(table)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)  # a file or a pipe has no edge to fold at


def _by_source(result: Result, name: str) -> list[tuple[str, list[tuple[str, Result]]]]:
    """(source, [(scorer, its scores)]) for all rows together and for each source, where there are several."""
    others = {"re-ranked": "reranked", "BM25": "bm25"}
    scorers = [(name, result)] + [(label, result[key]) for label, key in others.items() if key in result]
    sources = list(result.get("by_source", {}))
    groups = [("all", scorers)]
    if len(sources) > 1:
        groups += [
            (source, [(scorer, scores["by_source"][source]) for scorer, scores in scorers]) for source in sources
        ]
    return groups
