"""What the consistency filter found: counts by source and language, score histograms, and a sample of what was lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.holdout import mix
from data.noise import is_planted
from data.tables import table as text_table

BINS = 100  # of a score of 1.0
_UNKNOWN = "und"  # the language of pairs that name none
_PANELS = 12  # sources with a histogram of their own
_TEXTS = ("query", "passage", "lang", "id", "instruction", "symmetric")

Reject = dict[str, Any]


@dataclass
class Tally:
    """The pairs of a source, counted; `rejects` bounds the sample of lost ones."""

    rejects: int
    unreadable: int = 0
    planted: int = 0
    found: int = 0  # planted pairs that were lost
    kept: Counter[str] = field(default_factory=Counter)  # by language
    lost: Counter[str] = field(default_factory=Counter)
    kept_scores: Counter[str] = field(default_factory=Counter)  # by bin
    lost_scores: Counter[str] = field(default_factory=Counter)
    sample: list[Reject] = field(default_factory=list)

    def add(self, table: pa.Table, verdicts: NDArray[np.void], top_k: int) -> None:
        """Count the rows of a table; a verdict has a `score`, and as `count` how many of the pool beat the pair."""
        kept, planted = verdicts["count"] < top_k, is_planted(table)
        languages = np.array([lang or _UNKNOWN for lang in table["lang"].to_pylist()], object)
        bins = np.floor(verdicts["score"].astype(np.float64) * BINS).astype(np.int64)
        for mask, by_language, by_bin in ((kept, self.kept, self.kept_scores), (~kept, self.lost, self.lost_scores)):
            by_language.update(languages[mask].tolist())
            by_bin.update(map(str, bins[mask].tolist()))
        self.planted += int(planted.sum())
        self.found += int((planted & ~kept).sum())
        self._draw(table, verdicts, np.flatnonzero(~kept))

    def _draw(self, table: pa.Table, verdicts: NDArray[np.void], lost: NDArray[np.int64]) -> None:
        """Keep the lost pairs with the smallest keys: random numbers that belong to the texts."""
        query, passage = (table[name].to_numpy().view(np.uint64)[lost] for name in ("query_hash", "passage_hash"))
        keys = mix(query ^ mix(passage, 0), 0)
        first = np.argsort(keys, kind="stable")[: self.rejects]
        texts = table.select(_TEXTS).take(pa.array(lost[first])).to_pylist()
        found = [
            {**text, "score": float(verdict["score"]), "count": int(verdict["count"]), "key": key}
            for text, verdict, key in zip(texts, verdicts[lost[first]], keys[first].tolist(), strict=True)
        ]
        self.sample = sorted(self.sample + found, key=itemgetter("key"))[: self.rejects]

    def merge(self, facts: Mapping[str, Any]) -> None:
        """Take in the `vars` of another tally of the same source."""
        for name, value in facts.items():
            if isinstance(value, Mapping):
                getattr(self, name).update(value)
            elif name == "sample":
                self.sample = sorted(self.sample + list(value), key=itemgetter("key"))[: self.rejects]
            elif name != "rejects":
                setattr(self, name, getattr(self, name) + value)

    @property
    def records(self) -> int:
        return self.kept.total() + self.lost.total()


def content(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """The counts of all sources together and of each, for the report's file."""
    everything = Tally(0)
    for tally in tallies.values():
        everything.merge(vars(tally))
    return {"all": _entry(everything), "sources": {name: _entry(tally) for name, tally in tallies.items()}}


def _entry(tally: Tally) -> dict[str, Any]:
    languages = {
        lang: {"kept": tally.kept[lang], "lost": tally.lost[lang]} for lang in sorted({*tally.kept, *tally.lost})
    }
    entry = {
        "pairs": tally.records,
        "kept": tally.kept.total(),
        "lost": tally.lost.total(),
        "unreadable": tally.unreadable,
        "languages": languages,
        "scores": {"bins_in_1": BINS, "kept": _by_bin(tally.kept_scores), "lost": _by_bin(tally.lost_scores)},
    }
    return entry | ({"noise": _noise(tally)} if tally.planted else {})


def _by_bin(scores: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(scores.items(), key=lambda item: int(item[0])))


def _noise(tally: Tally) -> dict[str, Any]:
    """How well the planted pairs were found: of what was lost the share that was planted, and the reverse."""
    return {
        "planted": tally.planted,
        "found": tally.found,
        "precision": round(tally.found / max(1, tally.lost.total()), 4),
        "recall": round(tally.found / tally.planted, 4),
    }


def shown(report: Mapping[str, Any]) -> str:
    """The report's tables as text: by source and language, and what became of planted noise."""
    entries = {**report["sources"], **({"all": report["all"]} if len(report["sources"]) > 1 else {})}
    rows = []
    for name, entry in entries.items():
        rows.append((name, "all", *_counts(entry)))
        if len(entry["languages"]) > 1 and name in report["sources"]:
            rows += [("", lang, *_counts(counts)) for lang, counts in entry["languages"].items()]
    parts = [text_table(("source", "language", "pairs", "kept", "lost", "kept %"), rows)]
    if "noise" in report["all"]:
        head = ("source", "planted", "found", "precision", "recall")
        noise = [(name, entry["noise"]) for name, entry in entries.items() if "noise" in entry]
        cells = [
            (name, *(f"{n[key]:,}" for key in head[1:3]), *(f"{n[key]:.3f}" for key in head[3:])) for name, n in noise
        ]
        parts.append(text_table(head, cells))
    return "\n\n".join(parts)


def _counts(entry: Mapping[str, Any]) -> tuple[str, ...]:
    kept, lost = entry["kept"], entry["lost"]
    return f"{kept + lost:,}", f"{kept:,}", f"{lost:,}", f"{100 * kept / max(1, kept + lost):.1f}"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The histograms of the pairs' own scores, kept and lost, as a PNG: all sources, and the largest ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    largest = sorted(report["sources"].items(), key=lambda item: -item[1]["pairs"])[:_PANELS]
    panels = [("all", report["all"]), *(largest if len(largest) > 1 else [])]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns + 0.5, 2.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for axes, (name, entry) in zip(grid.flat, panels, strict=False):
        _panel(axes, name, entry)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    grid.flat[0].legend(frameon=False)
    figure.supxlabel("score of a pair with its own passage")
    figure.supylabel("pairs")
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _panel(axes: Any, name: str, entry: Mapping[str, Any]) -> None:
    bins = [int(number) for side in ("kept", "lost") for number in entry["scores"][side]]
    low, high = min(bins, default=0), max(bins, default=0) + 1
    edges = np.arange(low, high + 1) / BINS
    for side, colour in (("lost", "#c44e52"), ("kept", "#4c72b0")):
        counts = [entry["scores"][side].get(str(number), 0) for number in range(low, high)]
        axes.stairs(counts, edges, fill=True, alpha=0.55, color=colour, label=side)
    axes.set_title(f"{name}: {_counts(entry)[-1]} % of {entry['pairs']:,} kept", fontsize=9)
    axes.tick_params(labelsize=8)
