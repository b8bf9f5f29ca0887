"""What a report says about runs: from what their folders hold to the sections of a page. Pure but for the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from trainer import charts, published
from trainer.charts import Chart
from trainer.closeup import Closeup
from trainer.monitor import redacted
from trainer.reportpage import Card, Note, Page, Section, Table
from trainer.runlog import RunLog, flat

_METRICS = {
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "recall_at_100": "Recall@100",
    "accuracy_at_1": "Accuracy@1",
}
_COUNTS = ("queries", "passages")
_OTHER_METRICS = 4  # further columns of an evaluation table at most


def compose(
    runs: Sequence[RunLog], closeups: Sequence[Closeup | str], known: Mapping[str, Any], *, texts: bool = False
) -> Page:
    """The page.

    Args:
        closeups: for each run, or a sentence that says why there is none.
        known: published figures, from `published.load`.
        texts: whether the map may show texts of the held-out data.
    """
    title = f"Training report: {runs[0].name}" if len(runs) == 1 else f"Training report: {len(runs)} runs"
    sections = [
        _training(runs),
        _held_out(runs),
        _evaluation(runs, known),
        _embeddings(runs, closeups, texts),
        _speed(runs),
        _data(runs),
        _settings(runs),
        _making(runs),
    ]
    made = f"Made by quintet {metadata.version('quintet')} on {_when(time.time())} from {_folders(runs)}."
    foot = "This file loads nothing from anywhere: it can be mailed, archived and opened offline."
    cards = [_card(number, run) for number, run in enumerate(runs)]
    return Page(title, made, cards, [section for section in sections if section.blocks], foot)


def _folders(runs: Sequence[RunLog]) -> str:
    return str(runs[0].folder) if len(runs) == 1 else f"{len(runs)} run folders"


# --- the numbers at the top -------------------------------------------------------------------------------------


def _card(number: int, run: RunLog) -> Card:
    total = f"of {run.steps:,}" if run.steps else ""
    ndcg = run.best_ndcg()
    held_out = "best" if run.held_out() else "in results.json"
    numbers = [
        ("Steps", f"{run.step:,}", total),
        ("Time in steps", duration(run.seconds) if run.seconds else "–", _wall(run)),
        ("Loss", _figure(run.last("train/loss"), ".4g"), "last"),
        ("Accuracy in the batch", _figure(run.last("train/acc_top1"), ".1%"), "last"),
        ("Held-out nDCG@10", _figure(ndcg, ".3f"), held_out if ndcg is not None else ""),
        ("Throughput", _figure(_median(run, "perf/samples_per_s"), ",.0f"), "pairs/s, median"),
        ("Pairs seen", _figure(run.last("train/samples_seen"), ",.0f"), _epochs(run)),
        ("Memory of a rank", _figure(_highest(run, "perf/mem_gib"), ".1f"), "GiB, peak"),
    ]
    about = ", ".join(part for part in (run.stage.replace("-", ""), run.reason if run.state != "done" else "") if part)
    return Card(run.name, charts.COLOURS[number % len(charts.COLOURS)], run.state, about, numbers, _hardware(run))


def _wall(run: RunLog) -> str:
    """From the first logged row to the last, pauses between starts included."""
    if not run.starts or not run.starts[0].first_time:
        return ""
    return f"{duration(run.updated - run.starts[0].first_time)} in all" if len(run.starts) > 1 else ""


def _epochs(run: RunLog) -> str:
    epochs = run.last("train/epoch")
    return f"{epochs:.2f} epochs" if epochs is not None and math.isfinite(epochs) else ""


def _hardware(run: RunLog) -> str:
    environment = run.environment
    devices = environment.get("devices")
    cards = ", ".join(map(str, devices)) if isinstance(devices, list) else ""
    cpu = f"{environment.get('cpus', '?')} x {environment['cpu']}" if environment.get("cpu") else ""
    versions = environment.get("versions")
    named = versions if isinstance(versions, dict) else {}
    shown = [f"{name} {named[name]}" for name in ("torch", "deepspeed", "transformers") if named.get(name)]
    parts = [cards, cpu, f"host {environment['host']}" if environment.get("host") else "", *shown]
    return (
        " · ".join(part for part in parts if part)
        or "environment.json is missing: hardware and versions are not known."
    )


def _figure(value: float | None, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form) if math.isfinite(value) else str(value)


def _finite(run: RunLog, metric: str) -> list[float]:
    return sorted(value for value in run.series(metric)[1] if math.isfinite(value))


def _median(run: RunLog, metric: str) -> float | None:
    values = _finite(run, metric)
    return values[len(values) // 2] if values else None


def _highest(run: RunLog, metric: str) -> float | None:
    return max(_finite(run, metric), default=None)


def duration(seconds: float) -> str:
    """Two units at most: 45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


# --- curves -----------------------------------------------------------------------------------------------------


def _training(runs: Sequence[RunLog]) -> Section:
    lead = "The x axis is optimizer steps. Drag to zoom, double-click to go back, click in a legend to hide a line."
    if any(len(run.starts) > 1 for run in runs):
        lead += " A dotted line is the first step that a run logged after a restart; of repeated steps the last counts."
    blocks: list[Chart | Table | Note] = [*charts.curves(charts.TRAINING, runs), *charts.curves(charts.OPTIMISER, runs)]
    blocks += [Note(f"{run.name}: no step was logged yet.") for run in runs if not run.rows]
    blocks += [
        Note(f"{run.name}: {run.damaged:,} lines of metrics.jsonl cannot be read.") for run in runs if run.damaged
    ]
    return Section("Training", lead, blocks)


def _held_out(runs: Sequence[RunLog]) -> Section:
    blocks: list[Chart | Table | Note] = [*charts.held_out(runs)]
    lacking = [run.name for run in runs if not run.held_out()]
    if lacking:
        blocks.append(
            Note(f"{', '.join(lacking)}: not measured on held-out data in training; eval.data and eval.every_steps do.")
        )
    return Section("Held-out data", "Measured while training, by data set and source.", blocks)


def _speed(runs: Sequence[RunLog]) -> Section:
    return Section(
        "Speed and memory",
        "Measured between two log lines; saves and evaluations are left out.",
        [*charts.step_times(runs), *charts.curves(charts.SPEED, runs)],
    )


def _data(runs: Sequence[RunLog]) -> Section:
    drawn = charts.curves(charts.DATA, runs)
    blocks: list[Chart | Table | Note] = [chart for chart in drawn if chart.name != "left-out" or _anything(chart)]
    if len(blocks) < len(drawn):
        blocks.append(Note(f"Nothing was left out: {_counted(drawn)} stayed at 0."))
    for run in runs:
        if run.incidents:
            counts = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(run.incidents.items()))
            blocks.append(Note(f"{run.name}: incidents.jsonl tells of {counts}."))
    return Section("Data and numerics", "Whether anything had to be left out.", blocks)


def _anything(chart: Chart) -> bool:
    return any(value != 0 for trace in chart.traces for value in trace["y"])


def _counted(drawn: Sequence[Chart]) -> str:
    """What the chart of things left out would show."""
    labels = {line.metric: line.label for spec in charts.DATA for line in spec.lines}
    traces = [trace for chart in drawn if chart.name == "left-out" for trace in chart.traces]
    return ", ".join(dict.fromkeys(labels[trace["meta"]["metric"]] for trace in traces))


# --- evaluation -------------------------------------------------------------------------------------------------


def _evaluation(runs: Sequence[RunLog], known: Mapping[str, Any]) -> Section:
    blocks: list[Chart | Table | Note] = [*charts.by_language(runs)]
    data = dict.fromkeys(name for run in runs for name in _entries(run))
    tasks = [name for name in data if any("score" in _entries(run).get(name, {}) for run in runs)]
    blocks += [_evaluation_table(runs, name) for name in data if name not in tasks]
    blocks += [_task_table(runs, tasks)] if tasks else []
    blocks += _published_table(runs, known)
    without = [run.name for run in runs if not run.results]
    if without:
        names = ", ".join(without)
        blocks.append(Note(f"{names}: no results.json; quintet evaluate model=RUN data=FILE output=RUN writes it."))
    return Section("Evaluation", "The finished model on whole data sets, from results.json, beside BM25.", blocks)


def _entries(run: RunLog) -> dict[str, dict[str, Any]]:
    """What results.json says of each data set, task and benchmark."""
    return {name: entry for name, entry in run.results.items() if isinstance(entry, dict)}


def _task_table(runs: Sequence[RunLog], tasks: Sequence[str]) -> Table:
    """Tasks and benchmarks that have one main figure."""
    rows = []
    for task in tasks:
        entries = [_entries(run).get(task, {}) for run in runs]
        about = next(entry for entry in entries if entry)
        scores = [_number(entry.get("score")) for entry in entries]
        rows.append([task, str(about.get("type", "")), str(about.get("metric", "")), *scores])
    head = ["task", "type", "figure", *(run.name for run in runs)]
    return Table("Main figures of tasks and benchmarks: higher is better.", head, rows)


def _evaluation_table(runs: Sequence[RunLog], data: str) -> Table:
    scorers = _scorers(runs, data)
    metrics = _columns([entry for _, entry in scorers])
    rows = [_scores("all", name, entry, metrics) for name, entry in scorers]
    faint = [n for n, (name, _) in enumerate(scorers) if name == "BM25"]
    sources = dict.fromkeys(source for _, entry in scorers for source in _parts(entry))
    for source in sources if len(sources) > 1 else ():
        for name, entry in scorers:
            if source in _parts(entry):
                faint += [len(rows)] if name == "BM25" else []
                rows.append(_scores(source, name, _parts(entry)[source], metrics))
    labels = [_METRICS.get(metric, metric) for metric in metrics]
    return Table(f"{data}: higher is better.", ["source", "scorer", "queries", *labels], rows, frozenset(faint))


def _scorers(runs: Sequence[RunLog], data: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Every run's scores, re-ranked ones as well, and BM25's once."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    bm25 = None
    for run in runs:
        entry = run.results.get(data)
        if isinstance(entry, dict):
            found.append((run.name, entry))
            if isinstance(entry.get("reranked"), dict):
                found.append((f"{run.name}, re-ranked", entry["reranked"]))
            bm25 = bm25 or entry.get("bm25")
    return [*found, ("BM25", bm25)] if isinstance(bm25, dict) else found


def _columns(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The known metrics that are there, and a few others."""
    names = dict.fromkeys(name for entry in entries for name, value in entry.items() if isinstance(value, int | float))
    others = [name for name in names if name not in _METRICS and name not in _COUNTS]
    return [name for name in _METRICS if name in names] + others[:_OTHER_METRICS]


def _scores(group: str, scorer: str, entry: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    queries = entry.get("queries")
    values = [entry.get(metric) for metric in metrics]
    return [group, scorer, f"{queries:,}" if isinstance(queries, int) else "", *map(_number, values)]


def _parts(entry: Mapping[str, Any]) -> dict[str, Any]:
    sources = entry.get("by_source")
    return {name: part for name, part in sources.items() if isinstance(part, dict)} if isinstance(sources, dict) else {}


def _published_table(runs: Sequence[RunLog], known: Mapping[str, Any]) -> list[Table]:
    """Ours beside the published figures of the same data sets, tasks and benchmarks; nothing where there are none."""
    rows = published.table([_entries(run) for run in runs], [run.name for run in runs], known)
    caption = "Beside published figures, in percent; several are small / base / large."
    return [Table(caption, rows[0], rows[1:])] if rows else []


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


# --- embeddings -------------------------------------------------------------------------------------------------


def _embeddings(runs: Sequence[RunLog], closeups: Sequence[Closeup | str], texts: bool) -> Section:
    blocks: list[Chart | Table | Note] = []
    seen = [(number, closeup) for number, closeup in enumerate(closeups) if isinstance(closeup, Closeup)]
    names = [run.name if len(runs) > 1 else "" for run in runs]
    blocks += [charts.histogram(names[number], number, closeup) for number, closeup in seen]
    for by, known in (("source", "sources"), ("language", "langs")):
        mapped = [(number, closeup) for number, closeup in seen if any(getattr(closeup, known))]
        blocks += [charts.plane(names[number], number, closeup, by, texts=texts) for number, closeup in mapped]
    blocks += [Note(closeup) for closeup in closeups if isinstance(closeup, str)]
    pairs = max((len(closeup.sources) for _, closeup in seen), default=0)
    lead = f"What the exported model makes of {pairs:,} held-out pairs. " if pairs else ""
    lead += "The map is a projection (PCA) and keeps only part of the distances."
    return Section("Embeddings", lead, blocks)


# --- what the runs were made of ---------------------------------------------------------------------------------


def _settings(runs: Sequence[RunLog]) -> Section:
    settings = [flat(redacted(run.config)) for run in runs]
    blocks: list[Chart | Table | Note] = []
    if len(runs) > 1:
        names = sorted({name for each in settings for name in each} - {"run_dir"})
        shown = [[name, *(_setting(each, name) for each in settings)] for name in names]
        different = [row for row in shown if len(set(row[1:])) > 1]
        head = ["key", *(run.name for run in runs)]
        blocks.append(
            Table("Keys that differ, as they were written.", head, different)
            if different
            else Note("The runs have the same configuration.")
        )
    for run, each in zip(runs, settings, strict=True):
        rows = [[name, _setting(each, name)] for name in each]
        if rows:
            closed = f"All keys of {run.name}"
            blocks.append(Table("config.yaml of the last start, unresolved.", ["key", "value"], rows, closed=closed))
        else:
            blocks.append(Note(f"{run.name}: config.yaml is missing or cannot be read."))
    return Section("Configuration", "What each run was told.", blocks)


def _setting(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "–"
    value = settings[name]
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return "''" if value == "" else str(value)


def _making(runs: Sequence[RunLog]) -> Section:
    head = ["run", "start", "first step", "last step", "began", "ended", "time in steps"]
    rows = [
        [
            run.name,
            str(start.number),
            f"{start.first_step:,}",
            f"{start.last_step:,}",
            _when(start.first_time),
            _when(start.last_time),
            duration(start.step_seconds),
        ]
        for run in runs
        for start in run.starts
    ]
    blocks: list[Chart | Table | Note] = []
    if rows:
        caption = "Every start that logged something: when its first and last row came."
        blocks.append(Table(caption, head, rows))
    blocks += [
        Note(f"{run.name}: {run.repeated:,} rows were logged again after a restart; the later ones are shown.")
        for run in runs
        if run.repeated
    ]
    versions = [_versions(run) for run in runs]
    names = list(dict.fromkeys(name for each in versions for name in each))
    if names:
        rows = [[name, *(each.get(name, "–") for each in versions)] for name in names]
        head = ["", *(run.name for run in runs)]
        blocks.append(Table("From environment.json.", head, rows, closed="Machine and versions"))
    return Section("Starts and versions", "What is needed to make the numbers again.", blocks)


def _versions(run: RunLog) -> dict[str, str]:
    """Machine, commit and versions."""
    environment = redacted(run.environment)
    versions = environment.get("versions")
    facts = {
        name: environment[name]
        for name in ("host", "cpu", "cpus", "devices", "platform", "commit")
        if name in environment
    }
    facts |= versions if isinstance(versions, dict) else {}
    shown = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in facts.items()}
    return {name: str(value) for name, value in shown.items() if value not in (None, "")}
