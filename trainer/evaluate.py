"""Stage `evaluate`: how well a model finds the right passages, beside BM25 on the same data."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from data.settings import key
from trainer.monitor import StageWandbConfig

if TYPE_CHECKING:
    import torch

    from data.groups import Numbers
    from trainer.encoder import Model
    from trainer.retrieval import Encode, Result
    from trainer.sets import RetrievalSet

_log = logging.getLogger("quintet")

_COLUMNS = {"ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "recall_at_100": "R@100", "accuracy_at_1": "acc@1"}


@dataclass(frozen=True, kw_only=True)
class PromptOverride:
    """What to put before the texts instead of the model's own prompts."""

    query: str | None = key(None, help="before every query; null: the model's own")
    passage: str | None = key(None, help="before every passage; null: the model's own")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet evaluate`."""

    model: str = key(help="model folder, run folder, or hub id")
    data: str | list[str] = key(help="JSONL files of pairs and BEIR folders")
    output: str = key(help="folder for results.json and evaluation.json, or a .json file")
    bm25: bool = key(True, help="also score BM25")
    rerank: str = key("", help="cross-encoder that also puts the first results in order; empty: none")
    rerank_depth: int = key(100, help="results of each query that it reads", low=1, high=100)
    split: str = key("test", help="which qrels/<split>.tsv of BEIR folders")
    prompts: PromptOverride = key(PromptOverride(), help="prompts instead of the model's own")
    max_length: int | None = key(None, help="tokens of a text at most; null: the model's own", low=3)
    limit: int = key(0, help="at most so many queries of each data set, drawn with seed; 0: all", low=0)
    seed: int = key(0, help="seed of that draw")
    tokens_per_chunk: int | None = key(
        None, help="padded tokens of one forward pass; null: 65536 on a GPU, 2048 on a CPU", low=1
    )
    precision: str = key("fp32", help="matrix products", choices=("fp32", "bf16"))
    device: str = key("auto", help="where to compute; auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    wandb: StageWandbConfig = key(StageWandbConfig(), help="mirror of the results")


def run(config: Config) -> None:
    """Score the model on every data set; write results.json and evaluation.json, print a table.

    Raises:
        UserError: missing model or data, or a device that is not there.
        NumericError: the model gives NaN or infinity.
    """
    from data.rules import Prompts
    from trainer import retrieval, sets
    from trainer.device import pick_device
    from trainer.embed import load_model

    begin = time.perf_counter()
    device = pick_device(config.device)
    data_sets = sets.load(config.data, split=config.split, limit=config.limit, seed=config.seed)
    model = _with_prompts(load_model(config.model, device, config.max_length), config.prompts)
    encode = _encode(model, config, device)
    prompts = Prompts(query=model.query_prompt, passage=model.passage_prompt)
    rerank = _reranker(config, device) if config.rerank else None
    results: dict[str, Result] = {}
    for data in data_sets:
        for note in data.notes:
            _log.warning(note)
        _log.info("%s: %d queries, %d passages", data.name, len(data.rows), len(data.passages))
        again = partial(rerank, data) if rerank else None
        found = retrieval.score(data, encode, prompts, device=device, rerank=again)
        results[data.name] = found | ({"bm25": retrieval.score_bm25(data)} if config.bm25 else {})
    notes = [note for data in data_sets for note in data.notes]
    _write(Path(config.output), results, _about(config, model, device, notes, time.perf_counter() - begin))
    _tell(config, results)
    _print_table(results, model.name)


def _tell(config: Config, results: dict[str, Result]) -> None:
    """Leave the results as metrics, beside the results."""
    from trainer import retrieval, worklog

    folder = _file(config.output).with_suffix(".log")
    with worklog.follow(folder, "evaluate", folder.absolute().parent.name, config) as log:
        for data, result in results.items():
            beside = {f"{data}/{scorer}": result[scorer] for scorer in ("bm25", "reranked") if scorer in result}
            for name, scores in {data: result, **beside}.items():
                log.log(retrieval.named(name, scores))


def _with_prompts(model: Model, prompts: PromptOverride) -> Model:
    changes: dict[str, Any] = {"query_prompt": prompts.query, "passage_prompt": prompts.passage}
    return dataclasses.replace(model, **{name: value for name, value in changes.items() if value is not None})


def _encode(model: Model, config: Config, device: torch.device) -> Encode:
    from trainer.embed import encode_texts, progress_bar

    def encode(texts: Sequence[str]) -> torch.Tensor:
        with progress_bar(len(texts), "texts embedded") as progress:
            return encode_texts(
                model,
                texts,
                tokens_per_chunk=config.tokens_per_chunk,
                device=device,
                precision=config.precision,
                progress=progress,
            )

    return encode


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
        "data": config.data,
        "split": config.split,
        "limit": config.limit,
        "seed": config.seed,
        "notes": notes,
        "versions": {name: version(name) for name in ("quintet", "torch", "transformers", "tokenizers", "bm25s")},
        "seconds": round(seconds, 1),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _file(output: str | Path) -> Path:
    """Where the results go."""
    return Path(output) if Path(output).suffix == ".json" else Path(output) / "results.json"


def _write(output: Path, results: dict[str, Result], about: dict[str, Any]) -> None:
    from trainer.runfolder import write_json

    file = _file(output)
    beside = file.with_name("evaluation.json" if file.stem == "results" else f"{file.stem}.evaluation.json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside, about)
        write_json(file, results)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written: {error}") from None
    _log.info("results are in %s", file)


def _print_table(results: dict[str, Result], name: str) -> None:
    """One line for each data set and source, the model above BM25."""
    from rich.console import Console
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
    console = Console()
    wide = console if console.is_terminal else Console(width=120)  # a file or a pipe has no edge to fold at
    wide.print(table)


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
