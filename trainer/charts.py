"""From what runs logged to charts: plain data in plotly's form, without plotly.

A run has one colour in all charts; where there is one run, the lines of a chart have the colours instead. Colours of
text, axes and background are the page's (trainer/reportpage.js), which knows whether it is light or dark.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.closeup import Closeup
from trainer.runlog import RunLog

# Told apart by most colour-blind readers, and at least 3:1 on white and on the dark background.
COLOURS = ("#2f7ed8", "#d9622b", "#1f9d72", "#b455a0", "#a07a12", "#5b6ee1", "#c2445b", "#3b93a3")
_DASHES = ("solid", "dash", "dot", "dashdot")
POINTS = 2_000  # of a curve that are drawn at most
_FEW = 40  # points that are shown as such
_LABELLED_RESTARTS = 4


@dataclass(frozen=True)
class Chart:
    """A plotly figure with what stands around it; `name` is its place in the page."""

    name: str
    title: str
    caption: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 300
    wide: bool = False


@dataclass(frozen=True)
class Line:
    metric: str
    label: str


@dataclass(frozen=True)
class Curves:
    """One chart of lines over steps."""

    name: str
    title: str
    caption: str
    unit: str
    lines: tuple[Line, ...]
    layout: Mapping[str, Any] = field(default_factory=dict)


def _one(name: str, metric: str, title: str, caption: str, unit: str, **layout: Any) -> Curves:
    return Curves(name, title, caption, unit, (Line(metric, title),), layout)


_FRACTION = {"tickformat": ".2~%", "hoverformat": ".2%"}
_FROM_ZERO = {"rangemode": "tozero"}

TRAINING = (
    _one("loss", "train/loss", "Loss", "Mean over the global batch; it should fall and level off.", "nat"),
    Curves(
        "loss-parts",
        "Parts of the loss",
        "Each part before its weight; the loss is their weighted sum.",
        "nat",
        (
            Line("train/loss_contrastive", "contrastive"),
            Line("train/loss_distill", "distance to the teacher"),
            Line("train/loss_guide", "distance to the guide"),
            Line("train/loss_ranking", "ranking"),
        ),
    ),
    _one(
        "accuracy",
        "train/acc_top1",
        "Accuracy in the batch",
        "Queries whose own passage scores highest among all candidates of the batch; a larger batch makes it harder.",
        "",
        **_FRACTION,
    ),
    Curves(
        "similarity",
        "Similarity",
        "Mean similarity of a query with its passage and with its negatives; the gap is what the model has learned.",
        "",
        (Line("train/pos_sim", "positives"), Line("train/neg_sim", "negatives")),
    ),
)
OPTIMISER = (
    _one("lr", "train/lr", "Learning rate", "Warm-up, then decay to zero at the last step.", "", **_FROM_ZERO),
    _one(
        "grad-norm",
        "train/grad_norm",
        "Gradient norm",
        "Global norm before clipping; a rise that stays is an early sign of divergence.",
        "",
        **_FROM_ZERO,
    ),
)
SPEED = (
    _one(
        "throughput",
        "perf/samples_per_s",
        "Throughput",
        "Pairs a second over all ranks; dips are waits for data or another job on the machine.",
        "pairs/s",
        **_FROM_ZERO,
    ),
    _one("tokens", "perf/tokens_per_s", "Tokens", "Tokens a second, without padding.", "tokens/s", **_FROM_ZERO),
    _one(
        "data-wait",
        "perf/data_wait_frac",
        "Wait for data",
        "Share of the time in which no batch was ready; above a few percent, give more data_workers or faster storage.",
        "",
        **_FRACTION,
        **_FROM_ZERO,
    ),
    _one("mfu", "perf/mfu", "Use of the device", "Useful arithmetic as a share of the peak.", "", **_FRACTION),
    _one("memory", "perf/mem_gib", "Memory", "Peak of one rank: of the GPU, or of the process.", "GiB", **_FROM_ZERO),
)
DATA = (
    _one(
        "padding",
        "data/padding_frac",
        "Padding",
        "Share of padding among the tokens that were computed.",
        "",
        **_FRACTION,
        **_FROM_ZERO,
    ),
    Curves(
        "left-out",
        "What was left out",
        "Counts since the start of the run; a line that goes on rising needs a look.",
        "",
        (
            Line("data/samples_bad", "damaged pairs"),
            Line("data/samples_unscored", "pairs without the teacher's scores"),
            Line("data/batches_passed_over", "batches passed over"),
            Line("train/skipped_steps", "updates skipped"),
            Line("train/spikes", "loss spikes"),
        ),
        _FROM_ZERO,
    ),
)
HELD_OUT = (
    ("ndcg_at_10", "nDCG@10", "Held-out nDCG@10: 1 when the right passages come first; higher is better."),
    ("mrr_at_10", "MRR@10", "Mean of 1 / rank of the first right passage, 0 beyond rank 10."),
    ("recall_at_100", "Recall@100", "Right passages that are among the first hundred results."),
    ("accuracy_at_1", "Accuracy@1", "Queries whose first result is right."),
)
# What a step's time goes into, from the bottom up, beside the wait for data. Runs differ in what they log.
_PARTS = (
    ("perf/meet_s", "meet"),
    ("perf/encode_s", "encode"),
    ("perf/gather_s", "gather"),
    ("perf/loss_s", "loss"),
    ("perf/backward_s", "backward"),
    ("perf/optimizer_s", "optimiser"),
)


def literal(text: str) -> str:
    """A text that plotly shows as it is: it reads tags and entities, links among them."""
    return html.escape(text, quote=False)


def curves(specs: Sequence[Curves], runs: Sequence[RunLog]) -> list[Chart]:
    """Those charts for which anything was logged."""
    charts = [_curves(spec, runs) for spec in specs]
    return [chart for chart in charts if chart.traces and not _tells_nothing(chart, runs)]


def _tells_nothing(chart: Chart, runs: Sequence[RunLog]) -> bool:
    """Whether the only part of every run's loss is the loss itself."""
    if chart.name != "loss-parts":
        return False
    return all(
        run.series(trace["meta"]["metric"]) == run.series("train/loss") for run in runs for trace in chart.traces
    )


def held_out(runs: Sequence[RunLog]) -> list[Chart]:
    groups = sorted({group for run in runs for group in run.held_out()})
    specs = []
    for metric, title, caption in HELD_OUT:
        lines = tuple(Line(f"eval/{group}/{metric}", group) for group in groups)
        specs.append(Curves(f"held-out-{metric.replace('_', '-')}", title, caption, "", lines))
    return curves(specs, runs)


def _curves(spec: Curves, runs: Sequence[RunLog]) -> Chart:
    lines = [line for line in spec.lines if any(run.series(line.metric)[0] for run in runs)]
    traces: list[dict[str, Any]] = []
    notes: list[str] = []
    for number, run in enumerate(runs):
        for place, line in enumerate(lines):
            steps, values = run.series(line.metric)
            if steps:
                look = _look(number, place, several=len(runs) > 1)
                meta = {"run": number, "metric": line.metric, "name": literal(run.name)}
                traces.append(_trace(steps, values, look, line.label) | {"meta": meta})
                notes += _notes(values)
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": spec.unit}, **spec.layout},
        "shapes": _restarts(runs),
        "hovermode": "x unified",
    }
    if len(runs) > 1:
        _name_runs(traces, several_lines=len(lines) > 1)
    return Chart(spec.name, spec.title, " ".join([spec.caption, *dict.fromkeys(notes)]), traces, layout)


def _name_runs(traces: Sequence[dict[str, Any]], *, several_lines: bool) -> None:
    """Say whose line it is: in the legend, or where that has the lines of a chart, on hovering."""
    known: set[str] = set()
    for trace in traces:
        if several_lines:
            first = trace["name"] not in known
            trace |= {"legendgroup": trace["name"], "showlegend": first, "hovertemplate": "%{y:.4~g} (%{meta.name})"}
            known.add(trace["name"])
        else:
            trace["name"] = trace["meta"]["name"]


def _trace(steps: Sequence[int], values: Sequence[float], look: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A line; values that are no finite numbers are gaps in it."""
    kept = thin(values)
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(steps) <= _FEW else "lines",
        "x": [steps[n] for n in kept],
        "y": [values[n] if math.isfinite(values[n]) else None for n in kept],
        "name": literal(name),
        "line": {"width": 2, **look},
        "marker": {"size": 5},
    }


def _notes(values: Sequence[float]) -> list[str]:
    """What a reader of the curve should know about it."""
    notes = []
    if len(values) > POINTS:
        notes.append(f"Of {len(values):,} points those are drawn that are the lowest and highest of their stretch.")
    bad = sum(not math.isfinite(value) for value in values)
    if bad:
        notes.append(f"Gaps: {bad:,} times the value was not a finite number.")
    return notes


def thin(values: Sequence[float], points: int = POINTS) -> list[int]:
    """Which values to draw: all, or of equal stretches the lowest, the highest, and one that is not finite.

    At most `points` of finite ones, and with them the first and the last.
    """
    count = len(values)
    if count <= points:
        return list(range(count))
    stretches = points // 2 - 1
    kept = {0, count - 1}
    for stretch in range(stretches):
        places = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        finite = [n for n in places if math.isfinite(values[n])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        kept |= set([n for n in places if not math.isfinite(values[n])][:1])
    return sorted(kept)


def _look(run: int, line: int, *, several: bool) -> dict[str, str]:
    """Colour by run and dash by line; with one run, colour by line."""
    number, dash = (run, line) if several else (line, line // len(COLOURS))
    return {"color": COLOURS[number % len(COLOURS)], "dash": _DASHES[dash % len(_DASHES)]}


def _restarts(runs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """A dotted line at the first step that each start but the first logged."""
    places = [(number, start) for number, run in enumerate(runs) for start in run.starts[1:]]
    shapes = []
    for number, start in places:
        colour = COLOURS[number % len(COLOURS)] if len(runs) > 1 else "#8a8f98"
        shape: dict[str, Any] = {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": start.first_step,
            "x1": start.first_step,
            "y0": 0,
            "y1": 1,
            "line": {"color": colour, "width": 1, "dash": "dot"},
        }
        if len(places) <= _LABELLED_RESTARTS:
            label = {"text": f"start {start.number}", "textposition": "end", "textangle": 0, "font": {"size": 10}}
            shape["label"] = {**label, "xanchor": "left", "yanchor": "top"}
        shapes.append(shape)
    return shapes


# --- where the time of a step goes ------------------------------------------------------------------------------


def step_times(runs: Sequence[RunLog]) -> list[Chart]:
    """One stacked chart for each run that logged its times."""
    charts = []
    for number, run in enumerate(runs):
        steps, parts = step_parts(run)
        if not steps:
            continue
        every = -(-len(steps) // (POINTS // 4))
        chosen = range(0, len(steps), every)
        traces = [
            {
                "type": "scatter",
                "mode": "lines",
                "stackgroup": "step",
                "x": [steps[n] for n in chosen],
                "y": [values[n] for n in chosen],
                "name": part,
                "line": {"width": 1, "color": COLOURS[place % len(COLOURS)]},
                "hovertemplate": "%{y:.3~g} s",
                "meta": {"run": number, "part": part},
            }
            for place, (part, values) in enumerate(parts.items())
        ]
        caption = "Seconds of a step by what they went into; checkpoints are spread over the steps before them."
        caption += f" One logged step in {every} is drawn." if every > 1 else ""
        title = _titled("Time of a step", run.name if len(runs) > 1 else "")
        layout = {
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "s"}, "rangemode": "tozero"},
            "hovermode": "x unified",
            "shapes": _restarts([run]),
        }
        charts.append(Chart(f"step-time-{number}", title, caption, traces, layout, wide=len(runs) == 1))
    return charts


def step_parts(run: RunLog) -> tuple[list[int], dict[str, list[float]]]:
    """Logged steps and, for each part of their time, its seconds in a step; "other" is what no part accounts for."""
    rows = [row for row in run.rows if math.isfinite(row.get("perf/step_s", math.nan))]
    steps = [int(row["train/step"]) for row in rows]
    parts = {"data": [_finite(row, "perf/data_wait_frac") * row["perf/step_s"] for row in rows]}
    parts |= {name: [_finite(row, key) for row in rows] for key, name in _PARTS}
    # the exchange of embeddings is measured within the loss
    parts["loss"] = [max(0.0, loss - part) for loss, part in zip(parts["loss"], parts["gather"], strict=True)]
    known = [sum(values) for values in zip(*parts.values(), strict=True)]
    parts["other"] = [max(0.0, row["perf/step_s"] - part) for row, part in zip(rows, known, strict=True)]
    parts["checkpoint"] = _checkpoint_seconds(run, steps)
    return steps, {name: values for name, values in parts.items() if any(values)}


def _finite(row: Mapping[str, float], key: str) -> float:
    value = row.get(key, 0.0)
    return value if math.isfinite(value) else 0.0


def _checkpoint_seconds(run: RunLog, steps: Sequence[int]) -> list[float]:
    """For each step the time that the next checkpoint held the run up, divided by the steps since the one before."""
    saves, stalls = run.series("ckpt/stall_s")
    seconds, save = [], 0
    for step in steps:
        while save < len(saves) and saves[save] < step:
            save += 1
        before = saves[save - 1] if save else 0
        stall = stalls[save] if save < len(saves) else 0.0
        seconds.append(stall / (saves[save] - before) if stall and math.isfinite(stall) else 0.0)
    return seconds


# --- evaluation: results.json -----------------------------------------------------------------------------------


def by_language(runs: Sequence[RunLog]) -> list[Chart]:
    """nDCG@10 of every language, for each data set that has several: the runs and BM25, languages by their queries."""
    charts: list[Chart] = []
    for data in dict.fromkeys(name for run in runs for name, entry in run.results.items() if isinstance(entry, dict)):
        scorers = _language_scores(runs, data)
        languages = sorted({lang for _, scores in scorers for lang in scores}, key=lambda lang: _order(scorers, lang))
        if len(languages) < 2:
            continue
        shown = languages[:_LANGUAGES]
        traces = [_dots(place, name, scores, shown) for place, (name, scores) in enumerate(scorers)]
        caption = (
            "nDCG@10 on held-out pairs of each language, those with most queries first; few queries mean much noise."
        )
        if len(languages) > len(shown):
            caption += f" The {len(shown)} most frequent of {len(languages)} languages are drawn."
        layout = {
            "xaxis": {"title": {"text": ""}, "type": "category", "tickangle": -60},
            "yaxis": {"title": {"text": "nDCG@10"}},
            "hovermode": "closest",
        }
        charts.append(
            Chart(f"languages-{len(charts)}", f"By language: {data}", caption, traces, layout, 360, wide=True)
        )
    return charts


_LANGUAGES = 60
Scores = dict[str, tuple[float, int]]  # by language: nDCG@10 and queries


def _language_scores(runs: Sequence[RunLog], data: str) -> list[tuple[str, Scores]]:
    entries = [(run.name, run.results.get(data)) for run in runs]
    given = [(name, entry) for name, entry in entries if isinstance(entry, dict)]
    bm25 = [("BM25", entry["bm25"]) for _, entry in given if isinstance(entry.get("bm25"), dict)][:1]
    found = [(name, _of_languages(entry.get("by_lang"))) for name, entry in given + bm25]
    return [(name, scores) for name, scores in found if scores]


def _of_languages(by_lang: Any) -> Scores:
    scores = {}
    for lang, entry in by_lang.items() if isinstance(by_lang, dict) else ():
        score, queries = (entry.get("ndcg_at_10"), entry.get("queries", 0)) if isinstance(entry, dict) else (None, 0)
        if isinstance(score, int | float) and math.isfinite(score) and isinstance(queries, int):
            scores[str(lang)] = (float(score), queries)
    return scores


def _order(scorers: Sequence[tuple[str, Scores]], lang: str) -> tuple[int, str]:
    return -max(scores.get(lang, (0.0, 0))[1] for _, scores in scorers), lang


def _dots(place: int, name: str, scores: Scores, languages: Sequence[str]) -> dict[str, Any]:
    there = [lang for lang in languages if lang in scores]
    grey = name == "BM25"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [literal(lang) for lang in there],
        "y": [scores[lang][0] for lang in there],
        "customdata": [scores[lang][1] for lang in there],
        "name": literal(name),
        "marker": {
            "size": 8,
            "color": "#8a8f98" if grey else COLOURS[place % len(COLOURS)],
            "symbol": "diamond-open" if grey else "circle",
        },
        "hovertemplate": "%{x}: %{y:.3f} (%{customdata:,} queries)",
        "meta": {} if grey else {"run": place},
    }


# --- a close look at the model ----------------------------------------------------------------------------------


def histogram(run: str, place: int, closeup: Closeup) -> Chart:
    """How similar queries are to their passages and to those of others; `run` is named where there are several."""
    middles = [round(float(low + high) / 2, 5) for low, high in zip(closeup.edges, closeup.edges[1:], strict=False)]
    traces = []
    for name, counts, colour in (
        ("negatives", closeup.negatives, COLOURS[1]),
        ("positives", closeup.positives, COLOURS[0]),
    ):
        total = max(1, int(counts.sum()))
        traces.append(
            {
                "type": "bar",
                "x": middles,
                "y": [round(int(count) / total, 6) for count in counts],
                "customdata": [int(count) for count in counts],
                "name": f"{name} ({total:,})",
                "marker": {"color": colour, "opacity": 0.6, "line": {"width": 0}},
                "hovertemplate": "similarity %{x:.2f}: %{y:.1%} (%{customdata:,} pairs)",
                "meta": {"run": place},
            }
        )
    layout = {
        "barmode": "overlay",
        "bargap": 0,
        "xaxis": {"title": {"text": "similarity"}},
        "yaxis": {"title": {"text": "share of pairs"}, "tickformat": ".0%"},
        "hovermode": "closest",
    }
    caption = (
        f"Held-out pairs of {closeup.data}, and each query with the other pairs' passages; "
        "the less the two overlap, the better the model separates."
    )
    return Chart(f"histogram-{place}", _titled("Similarities", run), caption, traces, layout, 420)


def plane(run: str, place: int, closeup: Closeup, by: str, *, texts: bool) -> Chart:
    """The vectors on a plane, coloured by "source" or "language"."""
    known = closeup.sources if by == "source" else closeup.langs
    labels = [label or "not given" for label in known]
    common = [label for label, _ in Counter(labels).most_common(len(COLOURS))]
    groups = common + (["others"] if set(labels) - set(common) else [])
    shown = [label if label in common else "others" for label in labels]
    traces = [
        _points(closeup, [n for n, label in enumerate(shown) if label == group], group, number, texts, place)
        for number, group in enumerate(groups)
    ]
    first, second = (f"{share:.0%} of the variance" for share in closeup.shares)
    layout = {
        "xaxis": {"title": {"text": f"first axis: {first}"}, "zeroline": False},
        "yaxis": {"title": {"text": f"second axis: {second}"}, "zeroline": False},
        "hovermode": "closest",
    }
    caption = f"Queries (dots) and passages (rings) of {closeup.data} on their two principal axes; a good model " + (
        "mixes the two sides and tells topics apart." if by == "source" else "does not sort texts by language."
    )
    return Chart(f"plane-{by}-{place}", _titled(f"Map by {by}", run), caption, traces, layout, 420)


def _points(
    closeup: Closeup, members: Sequence[int], group: str, number: int, texts: bool, place: int
) -> dict[str, Any]:
    """The queries and then the passages of some pairs, as one line of the legend."""
    count = len(closeup.sources)
    places = [*members, *(count + member for member in members)]
    words = [*(closeup.queries[member] for member in members), *(closeup.passages[member] for member in members)]
    labels = [f"{closeup.sources[n] or 'no source'}, {closeup.langs[n] or 'no language'}" for n in members] * 2
    shown = [f"{label}: {_short(text)}" if texts else label for label, text in zip(labels, words, strict=True)]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [round(float(closeup.plane[n, 0]), 4) for n in places],
        "y": [round(float(closeup.plane[n, 1]), 4) for n in places],
        "text": [literal(text) for text in shown],
        "hovertemplate": "%{text}<extra></extra>",
        "name": literal(group),
        "marker": {
            "size": 6,
            "opacity": 0.75,
            "color": "#8a8f98" if group == "others" else COLOURS[number % len(COLOURS)],
            "symbol": ["circle"] * len(members) + ["circle-open"] * len(members),
        },
        "meta": {"run": place},
    }


def _titled(title: str, run: str) -> str:
    return f"{title}: {run}" if run else title


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
