"""The model card (README.md) that travels with an exported model."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.errors import QuintetError
from data.index import Index
from data.pairing import PairTemplate
from data.shards import load_index
from trainer import onnxfile
from trainer.runlog import mapping

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
    "last": "hidden[{module}.arange(len(hidden)), inputs['attention_mask'].sum(1) - 1]",
}
_QUESTION, _ANSWER = "how tall is the tower?", "The tower is 330 metres tall."
FOLDER = "path/to/this/folder"
_HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")  # a path is the trainer's own business


@dataclass(frozen=True)
class Card:
    """What is known about how a model came about; everything may be left out.

    Attributes:
        license: of the weights, as the hub writes it.
        sources, languages: pairs by source and by language.
        results: what results.json holds.
        sizes: lengths of cut vectors that were trained (Matryoshka); None: not known.
        versions: of Python and of the packages of the training; hardware: names of its accelerators.
        place: what a user opens: a folder, or a name on the hub.
    """

    name: str = "model"
    base_model: str = ""
    license: str = ""
    languages: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Sequence[int] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Sequence[str] = ()
    place: str = FOLDER


@dataclass(frozen=True)
class Facts:
    """What the exported folder itself says; `size` of `whole` numbers are in a vector."""

    size: int
    whole: int
    parameters: int
    max_length: int
    pooling: str
    normalize: bool
    query_prompt: str
    passage_prompt: str
    prompts: Mapping[str, str] = field(default_factory=dict)  # for queries of certain tasks, by name
    graphs: onnxfile.Graphs | None = None


@dataclass(frozen=True)
class RankerFacts:
    """The same of a cross-encoder."""

    parameters: int
    max_length: int
    template: PairTemplate
    graph: bool = False


def readme(card: Card, facts: Facts) -> str:
    """The card as Markdown with its YAML metadata in front."""
    parts = [
        f"---\n{_metadata(card, 'sentence-similarity', 'feature-extraction')}---",
        f"# {card.name}",
        _opening(card, facts),
        _usage(card, facts),
        _training(card),
        _scores(card),
        _limits(card, facts.max_length),
        _papers(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def ranker_readme(card: Card, facts: RankerFacts) -> str:
    """The card of a cross-encoder."""
    opening = (
        f"A cross-encoder trained with Quintet. It reads a query and a passage together, up to {facts.max_length} "
        "tokens, and answers with one logit: the higher, the better the passage answers. It has "
        f"{facts.parameters:,} parameters"
    )
    opening += f" and started from `{card.base_model}`." if card.base_model else "."
    parts = [
        f"---\n{_metadata(card, 'text-ranking')}---",
        f"# {card.name}",
        opening,
        _ranker_usage(card, facts),
        _training(card),
        _scores(card),
        _limits(card, facts.max_length),
        _papers(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def untrained_size(card: Card, size: int) -> str:
    """What to say of vectors cut to a size that was not trained, or not known to be; empty when it was."""
    if card.sizes is None:
        return f"whether {size} is a size that was trained (loss.matryoshka.sizes) is not known here"
    if size in card.sizes:
        return ""
    trained = f"trained were {', '.join(map(str, card.sizes))}" if card.sizes else "no cut was trained"
    return f"{size} is not a size that was trained ({trained}), so expect more loss than a trained cut has"


# --- metadata --------------------------------------------------------------------------------------------------


def _metadata(card: Card, task: str, *more_tags: str) -> str:
    values: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": task,
        "tags": ["sentence-transformers", task, *more_tags, "quintet"],
    }
    if card.license:
        values["license"] = card.license
    if card.base_model:
        values["base_model"] = card.base_model
    if card.languages:
        values["language"] = sorted({language.split("-")[0] for language in card.languages})
    results = [_model_index_entry(name, scores) for name, scores in card.results.items() if _measures(scores)]
    if results:
        values["model-index"] = [{"name": card.name, "results": results}]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _model_index_entry(name: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    kind = scores.get("type") or ("Retrieval" if "ndcg_at_10" in scores else "Sentence Similarity")
    return {
        "task": {"type": kind.lower().replace(" ", "-"), "name": kind},
        "dataset": {"name": name, "type": name},
        "metrics": [
            {"type": metric, "name": _METRICS.get(metric, metric), "value": round(value, 5)}
            for metric, value in _measures(scores).items()
        ],
    }


def _measures(scores: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an entry of results.json: fractions, where whole numbers are counts."""
    return {name: value for name, value in scores.items() if isinstance(value, float)}


# --- use -------------------------------------------------------------------------------------------------------


def _opening(card: Card, facts: Facts) -> str:
    kind = "unit-length vectors" if facts.normalize else "vectors"
    text = (
        f"A text-embedding model trained with Quintet. It maps texts of up to {facts.max_length} tokens to {kind} of "
        f"{facts.size} numbers; texts that answer each other get a high cosine. It has {facts.parameters:,} parameters "
        f"and {facts.pooling} pooling"
    )
    return f"{text}, and started from `{card.base_model}`." if card.base_model else f"{text}."


def _usage(card: Card, facts: Facts) -> str:
    prompts = (
        f"Every text needs the prompt it was trained with: `{facts.query_prompt!r}` before queries and "
        f"`{facts.passage_prompt!r}` before passages. For texts of equal standing (similarity, translations, clusters) "
        "use the query prompt on both."
        if facts.query_prompt or facts.passage_prompt
        else "Texts are encoded as they are, without a prompt."
    )
    parts = [
        prompts,
        _tasks(facts),
        _SENTENCE_TRANSFORMERS.format(place=card.place, question=_QUESTION, answer=_ANSWER),
        f"Or with transformers alone:\n\n{_transformers(card, facts)}",
        _onnx(card, facts),
        _cut(card, facts),
    ]
    return "## Use\n\n" + "\n\n".join(part for part in parts if part)


def _tasks(facts: Facts) -> str:
    """The prompts of an instruct model, which `encode` finds by name."""
    if not facts.prompts:
        return ""
    rows = [(f"`{name}`", f"`{prompt!r}`") for name, prompt in facts.prompts.items()]
    what = (
        "It was trained with an instruction for every task. Write one for yours, or take one of these by "
        '`prompt_name="..."`; passages are the same for all tasks, so they are indexed once.'
    )
    return f"{what}\n\n{_table(('name', 'prompt of a query'), rows)}"


_SENTENCE_TRANSFORMERS = """\
```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{place}")
queries = model.encode(["{question}"], prompt_name="query")
passages = model.encode(["{answer}"], prompt_name="document")
print(model.similarity(queries, passages))
```"""


def _transformers(card: Card, facts: Facts) -> str:
    normalise = "torch.nn.functional.normalize(vectors, dim=1)" if facts.normalize else "vectors"
    return f"""\
```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{card.place}")
model = AutoModel.from_pretrained("{card.place}").eval()


def embed(texts):
    inputs = tokenizer(texts, padding=True, truncation=True, max_length={facts.max_length}, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    vectors = {_pooled(facts, "torch")}
    return {normalise}


{_embed_both(facts)}
```"""


def _pooled(facts: Facts, module: str) -> str:
    """The expression that makes vectors out of the numbers of tokens."""
    text = _POOL[facts.pooling].format(module=module)
    return f"({text})[:, :{facts.size}]" if facts.size < facts.whole else text


def _onnx(card: Card, facts: Facts) -> str:
    """How to run the graph, and how far int8 is from it."""
    if facts.graphs is None:
        return ""
    normalise = "vectors / np.linalg.norm(vectors, axis=1, keepdims=True)" if facts.normalize else "vectors"
    code = f"""\
Or in onnxruntime, with the graph in `{onnxfile.FILE}` (opset {onnxfile.OPSET}, fp32):

```python
import numpy as np
import onnxruntime
{_import_download(card)}from transformers import AutoTokenizer

folder = {_graph_folder(card)}
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/{onnxfile.FILE}")


def embed(texts):
    inputs = tokenizer(texts, padding=True, truncation=True, max_length={facts.max_length}, return_tensors="np")
    hidden = session.run(None, {{each.name: inputs[each.name] for each in session.get_inputs()}})[0]
    mask = inputs["attention_mask"][:, :, None]
    vectors = {_pooled(facts, "np")}
    return {normalise}


{_embed_both(facts)}
```

sentence-transformers opens the same file with `backend="onnx"`, where `sentence-transformers[onnx]` is installed."""
    if facts.graphs.cosine is None:
        return code
    return (
        f"{code}\n\n`{onnxfile.INT8_FILE}` is the graph with weights in 8 bits "
        f'(`model_kwargs={{"file_name": "{onnxfile.INT8_FILE}"}}`). On a few texts in several languages the cosine of '
        f"its vectors to those in fp32 was {facts.graphs.cosine:.4f} on average and {facts.graphs.lowest:.4f} at the "
        "lowest; measure it on your own before you rely on it."
    )


def _import_download(card: Card) -> str:
    return "" if card.place == FOLDER else "from huggingface_hub import snapshot_download\n"


def _graph_folder(card: Card) -> str:
    if card.place == FOLDER:
        return f'"{FOLDER}"'
    return f'snapshot_download("{card.place}")'


def _embed_both(facts: Facts) -> str:
    return f"""\
queries = embed([{facts.query_prompt!r} + "{_QUESTION}"])
passages = embed([{facts.passage_prompt!r} + "{_ANSWER}"])
print(queries @ passages.T)"""


def _cut(card: Card, facts: Facts) -> str:
    """What was cut here, and what a user may cut."""
    if facts.size < facts.whole:
        doubt = untrained_size(card, facts.size)
        text = f"Vectors are the first {facts.size} of {facts.whole} numbers"
        text += ", brought to unit length after the cut" if facts.normalize else ""
        return f"{text}. Note that {doubt}." if doubt else f"{text}, a size that was trained (Matryoshka)."
    sizes = [size for size in card.sizes or () if size < facts.size]
    if not sizes:
        return ""
    text = (
        f"Vectors may be cut: {', '.join(map(str, sizes))} numbers were trained as well (Matryoshka). "
        f"`encode(..., truncate_dim={sizes[0]})` cuts"
    )
    return f"{text}; add `normalize_embeddings=True` for unit length." if facts.normalize else f"{text}."


def _ranker_usage(card: Card, facts: RankerFacts) -> str:
    query = facts.template.query.replace("{query}", _QUESTION)
    passage = facts.template.passage.replace("{passage}", _ANSWER)
    templates = (
        f"The query goes into `{facts.template.query!r}` and the passage into `{facts.template.passage!r}`, as in "
        "training.\n\n"
        if facts.template != PairTemplate()
        else ""
    )
    text = f"""\
## Use

{templates}```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{card.place}")
scores = model.predict([({query!r}, {passage!r})])
print(scores)
```"""
    if not facts.graph:
        return text
    return f"""\
{text}

Or in onnxruntime, with the graph in `{onnxfile.FILE}` (opset {onnxfile.OPSET}, fp32):

```python
import onnxruntime
{_import_download(card)}from transformers import AutoTokenizer

folder = {_graph_folder(card)}
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/{onnxfile.FILE}")
inputs = tokenizer([{query!r}], [{passage!r}], padding=True, truncation="only_second", return_tensors="np")
scores = session.run(None, {{each.name: inputs[each.name] for each in session.get_inputs()}})[0][:, 0]
print(scores)
```"""


# --- training and scores ---------------------------------------------------------------------------------------


def _training(card: Card) -> str:
    recipe = [(words, card.recipe[name]) for name, words in RECIPE.items() if name in card.recipe]
    if card.sizes:
        recipe.append(("sizes of cut vectors trained", ", ".join(map(str, card.sizes))))
    if not card.sources and not recipe:
        return ""
    parts = ["## Training"]
    if card.sources:
        total = sum(card.sources.values())
        parts.append(f"Trained on {total:,} pairs from {len(card.sources)} sources:")
        parts.append(_table(("source", "pairs"), [(name, f"{count:,}") for name, count in card.sources.items()]))
    if card.languages:
        counts = ", ".join(f"{name} {card.languages[name]:,}" for name in sorted(card.languages))
        rest = sum(card.sources.values()) - sum(card.languages.values())
        unnamed = f", and {rest:,} pairs that name none" if rest > 0 else ""
        parts.append(f"Pairs by language: {counts}{unnamed}.")
    if recipe:
        parts.append(_table(("setting", "value"), recipe))
    return "\n\n".join(parts)


def _scores(card: Card) -> str:
    """The results, with BM25 below the model where it was scored on the same data, and by language."""
    rows: list[Sequence[str]] = []
    others: list[Sequence[str]] = []
    languages: list[Sequence[str]] = []
    for name, scores in card.results.items():
        for scorer, row in (("this model", scores), ("BM25", scores.get("bm25"))):
            if row and all(metric in row for metric in _METRICS):
                rows.append((name, scorer, *(f"{row[metric]:.3f}" for metric in _METRICS)))
            elif row is scores:
                others += [(name, metric, f"{value:.3f}") for metric, value in _measures(scores).items()]
        by_language = scores.get("by_lang", {})
        if len(by_language) > 1:
            languages += [
                (name, language, f"{row['queries']:,}", f"{row['ndcg_at_10']:.3f}")
                for language, row in by_language.items()
                if {"queries", "ndcg_at_10"} <= set(row)
            ]
    tables = [(("data", "scorer", *_METRICS.values()), rows), (("data", "metric", "value"), others)]
    tables.append((("data", "language", "queries", "nDCG@10"), languages))
    shown = [_table(heads, lines) for heads, lines in tables if lines]
    return "\n\n".join(["## Scores", *shown]) if shown else ""


def _limits(card: Card, max_length: int) -> str:
    """What the model was not made for or not tested on, as far as it can be known from how it was made."""
    lines = [f"Texts are cut at {max_length} tokens, the prompt included; what comes behind has no effect."]
    if card.languages:
        spoken = len(card.languages)
        known = "one language" if spoken == 1 else f"{spoken} languages"
        lines.append(f"The pairs name {known}, listed above; what it does in others was not trained here.")
    else:
        lines.append("The languages of its training data are not recorded.")
    tested = ", ".join(f"`{name}`" for name in card.results)
    lines.append(
        f"It was scored on {tested} and nothing else: not on other domains or tasks."
        if tested
        else "No scores are recorded: evaluate it on your own data before you use it."
    )
    lines.append("It was not tested for social bias, nor for safety-relevant decisions. It repeats what its data hold.")
    if not card.license:
        base = f" (those of `{card.base_model}`, and of the data)" if card.base_model else " (those of the data)"
        lines.append(f"No licence is stated. Other terms may bind you{base}; ask before you publish or sell.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _papers(card: Card) -> str:
    """Versions and hardware of the training."""
    lines = [f"Versions: {', '.join(f'{name} {version}' for name, version in card.versions.items())}."]
    lines = lines if card.versions else []
    if card.hardware:
        counts = Counter(card.hardware)
        lines.append(f"Hardware: {', '.join(f'{count} x {name}' for name, count in counts.items())}.")
    return "\n".join(["## Made with\n", *lines]) if lines else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --- the facts out of a run folder -----------------------------------------------------------------------------


def of_run(run_dir: Path, name: str) -> Card:
    """The card of a run: recipe from config.yaml, scores from results.json, data from the shards' index, versions.

    What is not there is left out, and of configuration and environment only what is named here is copied: nothing
    private, such as the host's name or a path, gets onto the card.
    """
    config, environment = mapping(run_dir / "config.yaml"), mapping(run_dir / "environment.json")
    model, loss = config.get("model"), config.get("loss")
    base = str(model.get("path", "")) if isinstance(model, dict) else ""
    sources, languages = _training_data(config.get("data"))
    versions, results = environment.get("versions"), mapping(run_dir / "results.json")
    matryoshka = loss.get("matryoshka") if isinstance(loss, dict) else None
    return Card(
        name,
        base_model=base if base != "random" and _HUB_NAME.fullmatch(base) and not os.path.exists(base) else "",
        languages=languages,
        sources=sources,
        recipe=_recipe(config),
        results={name: scores for name, scores in results.items() if isinstance(scores, dict)},
        sizes=[int(size) for size in matryoshka.get("sizes") or ()] if isinstance(matryoshka, dict) else None,
        versions={name: version for name, version in versions.items() if version} if isinstance(versions, dict) else {},
        hardware=[str(device) for device in environment.get("devices") or ()],
    )


def _recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of RECIPE that had a part in the run."""
    idle = {"negatives"} if not config.get("negatives") else set()
    if config.get("objective") != "distillation":
        idle.add("alpha")
    return {key: config[key] for key in RECIPE if key in config and key not in idle}


def _training_data(data: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Pairs by source and by language, of those shard folders that are at hand."""
    pairs: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for name, index in _indexes(data):
        for source, (records, spoken) in index.sources.items():
            pairs[name or source] += records
            languages.update(spoken)
    languages.pop("", None)
    return dict(pairs), dict(languages)


def _indexes(data: Any) -> Iterator[tuple[str, Index]]:
    """(the mixture's name for the source, if any, index) of the local folders that a run's `data` names."""
    for entry in data if isinstance(data, list) else [data] if data else []:
        place = Path(str(entry))
        if place.suffix in (".yaml", ".yml"):
            sources = mapping(place).get("sources")
            named = sources.items() if isinstance(sources, dict) else ()
            folders = [(str(name), place.parent / folder) for name, said in named for folder in _shards(said)]
        else:
            folders = [("", place)]
        for name, folder in folders:
            if (folder / "index.json").is_file():
                with contextlib.suppress(QuintetError):
                    yield name, load_index(folder)


def _shards(source: Any) -> list[str]:
    """What a source of a mixture file names as its shards."""
    found = source.get("shards") if isinstance(source, dict) else None
    return [found] if isinstance(found, str) else [str(each) for each in found or ()]
