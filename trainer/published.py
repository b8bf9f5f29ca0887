"""A model's scores beside the published ones of E5 and multilingual E5 (configs/evaluate/published.yaml)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from trainer.runlog import mapping

log = logging.getLogger("quintet")

FILE = Path(__file__).parent.parent / "configs" / "evaluate" / "published.yaml"

Results = Mapping[str, Mapping[str, Any]]  # of results.json: name of a data set, task or benchmark, and its entry


class Line(NamedTuple):
    """A published row that was measured here too: our scores as fractions, the published by family in percent."""

    benchmark: str
    row: str
    ours: list[float | None]
    theirs: Mapping[str, Any]


def load() -> dict[str, Any]:
    """The file's `families` (names of models) and `tables`; both empty where the package came without its configs."""
    return {"families": {}, "tables": {}} | mapping(FILE)


def lines(models: Sequence[Results], published: Mapping[str, Any]) -> list[Line]:
    """Every published row that one of the models has a score for, in the order of the file."""
    found = [
        Line(benchmark, row, [_score(results, benchmark, row) for results in models], theirs)
        for benchmark, rows in published["tables"].items()
        for row, theirs in rows.items()
    ]
    return [line for line in found if any(score is not None for score in line.ours)]


def _score(results: Results, benchmark: str, row: str) -> float | None:
    """Our figure for a row. A benchmark that lacks a task has none: its means are not of the same tasks."""
    entry = next((entry for name, entry in results.items() if _plain(name) == _plain(benchmark)), {})
    if entry.get("missing"):
        return None
    known = {**entry, "mean": entry.get("score", entry.get("ndcg_at_10"))}
    for group in ("by_type", "by_subset"):
        known |= entry.get(group, {})
    score = known.get(row)
    return float(score) if isinstance(score, int | float) else None


def _plain(name: str) -> str:
    """BEIR's folders have other letter cases and dashes than mteb's tasks."""
    return "".join(filter(str.isalnum, name.lower()))


def table(models: Sequence[Results], names: Sequence[str], published: Mapping[str, Any]) -> list[list[str]]:
    """A row of heads, then one for every line, in percent; empty where nothing can be compared."""
    found = lines(models, published)
    shown = [family for family in published["families"] if any(family in line.theirs for line in found)]
    heads = ["benchmark", "", *names, *(str(published["families"][family]) for family in shown)]
    rows = [
        [
            *(line.benchmark, line.row),
            *("" if score is None else f"{100 * score:.1f}" for score in line.ours),
            *(_cell(line.theirs.get(family)) for family in shown),
        ]
        for line in found
    ]
    return [heads, *rows] if rows else []


def _cell(figures: Any) -> str:
    """One figure, or three: small / base / large."""
    several = figures if isinstance(figures, list) else [figures]
    return "" if figures is None else " / ".join("–" if one is None else str(one) for one in several)


def print_beside(results: Results, name: str) -> None:
    """Print one table of all figures that were both published and measured here."""
    rows = table([results], [name], load())
    if not rows:
        log.warning("compare=true: nothing was published for these tasks; %s has what was", FILE)
        return
    shown = Table(*rows[0], title="percent; families are small / base / large")
    for column in shown.columns[2:]:
        column.justify = "right"
    before = ""
    for benchmark, *rest in rows[1:]:
        if benchmark != before:
            shown.add_section()
        shown.add_row(benchmark if benchmark != before else "", *rest)
        before = benchmark
    console = Console()
    wide = console if console.is_terminal else Console(width=160)
    wide.print(shown)
