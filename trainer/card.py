"""The model card (README.md) that travels with an exported model."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.errors import QuintetError
from data.shards import load_index

# What of a run's configuration a reader needs to judge or repeat it, with the words for the table.
RECIPE = {
    "objective": "objective",
    "negatives": "hard negatives a pair",
    "alpha": "weight of the contrastive term",
    "batch_size": "global batch, pairs",
    "steps": "steps",
    "lr": "peak learning rate",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "temperature": "temperature",
    "max_length": "tokens a text",
    "precision": "precision",
    "zero_stage": "ZeRO stage",
    "seed": "seed",
}

_METRICS = {
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "recall_at_100": "Recall@100",
    "accuracy_at_1": "Accuracy@1",
}

_POOL = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), inputs['attention_mask'].sum(1) - 1]",
}


@dataclass(frozen=True)
class Card:
    """What is known about how a model came about; everything may be left out."""

    name: str = "model"
    base_model: str = ""
    languages: Sequence[str] = ()
    sources: Mapping[str, int] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What the exported folder itself says."""

    size: int
    parameters: int
    max_length: int
    pooling: str
    normalize: bool
    query_prompt: str
    passage_prompt: str
    prompts: Mapping[str, str] = field(default_factory=dict)  # for queries of certain tasks, by name


def readme(card: Card, facts: Facts) -> str:
    """The card as Markdown with its YAML metadata in front."""
    parts = [
        f"---\n{_metadata(card, 'sentence-similarity', 'feature-extraction')}---",
        f"# {card.name}",
        _opening(card, facts),
        _usage(facts),
        _training(card),
        _scores(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def ranker_readme(card: Card, *, parameters: int, max_length: int) -> str:
    """The card of a cross-encoder."""
    opening = (
        f"A cross-encoder trained with Quintet. It reads a query and a passage together, up to {max_length} tokens, "
        f"and answers with one logit: the higher, the better the passage answers. It has {parameters:,} parameters"
    )
    opening += f" and started from `{card.base_model}`." if card.base_model else "."
    parts = [
        f"---\n{_metadata(card, 'text-ranking')}---",
        f"# {card.name}",
        opening,
        f"## Use\n\n{_CROSS_ENCODER}",
        _training(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_CROSS_ENCODER = """\
```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("path/to/this/folder")
print(model.predict([("how tall is the tower?", "The tower is 330 metres tall.")]))
```"""


def _metadata(card: Card, task: str, *more_tags: str) -> str:
    values: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": task,
        "tags": ["sentence-transformers", task, *more_tags, "quintet"],
    }
    if card.base_model:
        values["base_model"] = card.base_model
    if card.languages:
        values["language"] = sorted({language.split("-")[0] for language in card.languages})
    if card.results:
        results = [_model_index_entry(name, scores) for name, scores in card.results.items()]
        values["model-index"] = [{"name": card.name, "results": results}]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _model_index_entry(name: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": {"type": "retrieval", "name": "Retrieval"},
        "dataset": {"name": name, "type": name},
        "metrics": [
            {"type": metric, "name": title, "value": round(float(scores[metric]), 5)}
            for metric, title in _METRICS.items()
        ],
    }


def _opening(card: Card, facts: Facts) -> str:
    kind = "unit-length vectors" if facts.normalize else "vectors"
    text = (
        f"A text-embedding model trained with Quintet. It maps texts of up to {facts.max_length} tokens to {kind} of "
        f"{facts.size} numbers; texts that answer each other get a high cosine. It has {facts.parameters:,} parameters "
        f"and {facts.pooling} pooling"
    )
    return f"{text}, and started from `{card.base_model}`." if card.base_model else f"{text}."


def _usage(facts: Facts) -> str:
    prompts = (
        f"Every text needs the prompt it was trained with: `{facts.query_prompt!r}` before queries and "
        f"`{facts.passage_prompt!r}` before passages. For texts of equal standing (similarity, translations, clusters) "
        "use the query prompt on both."
        if facts.query_prompt or facts.passage_prompt
        else "Texts are encoded as they are, without a prompt."
    )
    tasks = _tasks(facts) if facts.prompts else ""
    code = f"{_SENTENCE_TRANSFORMERS}\n\nOr with transformers alone:\n\n{_transformers(facts)}"
    return f"## Use\n\n{prompts}\n\n{tasks}{code}"


def _tasks(facts: Facts) -> str:
    """The prompts of an instruct model, which `encode` finds by name."""
    rows = [(f"`{name}`", f"`{prompt!r}`") for name, prompt in facts.prompts.items()]
    what = (
        "It was trained with an instruction for every task. Write one for yours, or take one of these by "
        '`prompt_name="..."`; passages are the same for all tasks, so they are indexed once.'
    )
    return f"{what}\n\n{_table(('name', 'prompt of a query'), rows)}\n\n"


_SENTENCE_TRANSFORMERS = """\
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode(["how tall is the tower?"], prompt_name="query")
passages = model.encode(["The tower is 330 metres tall."], prompt_name="document")
print(model.similarity(queries, passages))
```"""


def _transformers(facts: Facts) -> str:
    normalise = "torch.nn.functional.normalize(vectors, dim=1)" if facts.normalize else "vectors"
    return f"""\
```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModel.from_pretrained("path/to/this/folder").eval()


def embed(texts):
    inputs = tokenizer(texts, padding=True, truncation=True, max_length={facts.max_length}, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    vectors = {_POOL[facts.pooling]}
    return {normalise}


queries = embed([{facts.query_prompt!r} + "how tall is the tower?"])
passages = embed([{facts.passage_prompt!r} + "The tower is 330 metres tall."])
print(queries @ passages.T)
```"""


def _training(card: Card) -> str:
    recipe = [(words, card.recipe[name]) for name, words in RECIPE.items() if name in card.recipe]
    if not card.sources and not recipe:
        return ""
    parts = ["## Training"]
    if card.sources:
        parts.append(_table(("source", "pairs"), [(name, f"{count:,}") for name, count in card.sources.items()]))
    if card.languages:
        parts.append(f"Languages of the pairs: {', '.join(sorted(card.languages))}.")
    if recipe:
        parts.append(_table(("setting", "value"), recipe))
    return "\n\n".join(parts)


def _scores(card: Card) -> str:
    """The results, with BM25 below the model where it was scored on the same data."""
    rows = []
    for name, scores in card.results.items():
        for scorer, row in (("this model", scores), ("BM25", scores.get("bm25"))):
            if row:
                rows.append((name, scorer, *(f"{row[metric]:.3f}" for metric in _METRICS)))
    return f"## Scores\n\n{_table(('data', 'scorer', *_METRICS.values()), rows)}" if rows else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --- the facts out of a run folder -----------------------------------------------------------------------------


def _retrieval(results: dict[str, Any]) -> dict[str, Any]:
    """The entries of retrieval sets; tasks of benchmarks have other figures."""
    return {name: scores for name, scores in results.items() if _METRICS.keys() <= scores.keys()}


def of_run(run_dir: Path, name: str) -> Card:
    """The card of a run: its recipe from config.yaml, its scores from results.json, its data from the shards' index.

    What is not there is left out, and of the configuration only the settings of RECIPE are copied: nothing private
    gets onto the card.
    """
    config = _read(run_dir / "config.yaml")
    model = config.get("model")
    base = str(model.get("path", "")) if isinstance(model, dict) else ""
    sources, languages = _training_data(config.get("data"))
    return Card(
        name,
        base_model="" if base == "random" or os.path.exists(base) else base,
        languages=languages,
        sources=sources,
        recipe=_recipe(config),
        results=_retrieval(_read(run_dir / "results.json")),
    )


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of RECIPE that had a part in the run."""
    idle = {"negatives"} if not config.get("negatives") else set()
    if config.get("objective") != "distillation":
        idle.add("alpha")
    return {key: config[key] for key in RECIPE if key in config and key not in idle}


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file with a mapping; empty when there is no such file or it holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _training_data(data: Any) -> tuple[dict[str, int], list[str]]:
    """Pairs by source, and the languages, of those shard folders that are at hand."""
    folders = [str(entry) for entry in (data if isinstance(data, list) else [data]) if entry]
    pairs: Counter[str] = Counter()
    languages: set[str] = set()
    for folder in folders:
        if not (Path(folder) / "index.json").is_file():
            continue
        try:
            sources = load_index(folder).sources
        except QuintetError:
            continue
        for source, (records, spoken) in sources.items():
            pairs[source] += records
            languages.update(spoken)
    return dict(pairs), sorted(languages - {""})
