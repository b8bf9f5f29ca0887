"""A model's scores beside the published ones of E5 and multilingual E5 (configs/evaluate/published.yaml)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

log = logging.getLogger("quintet")

FILE = Path(__file__).parent.parent / "configs" / "evaluate" / "published.yaml"

Line = tuple[str, str, float, Mapping[str, Any]]  # benchmark, row, our score in percent, the published by family


def print_beside(results: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Print one table of all figures that were both published and measured here, in percent."""
    published = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    lines = list(pairs(results, published["tables"]))
    if not lines:
        log.warning("compare=true: nothing was published for these tasks; %s has what was", FILE)
        return
    shown = {
        family: title for family, title in published["families"].items() if any(family in row for *_, row in lines)
    }
    table = Table("benchmark", "", name, *shown.values(), title="percent; families are small / base / large")
    for column in table.columns[2:]:
        column.justify = "right"
    before = ""
    for benchmark, row, ours, theirs in lines:
        if benchmark != before:
            table.add_section()
        cells = (_cell(theirs.get(family)) for family in shown)
        table.add_row(benchmark if benchmark != before else "", row, f"{ours:.1f}", *cells)
        before = benchmark
    console = Console()
    wide = console if console.is_terminal else Console(width=160)
    wide.print(table)


def pairs(results: Mapping[str, Mapping[str, Any]], tables: Mapping[str, Mapping[str, Any]]) -> Iterator[Line]:
    """Every published row that the results have too, in the order of the file.

    A benchmark that lacks a task has none: its means are not of the same tasks.
    """
    for benchmark, rows in tables.items():
        found = results.get(benchmark, {})
        for row, theirs in rows.items() if found and not found.get("missing") else ():
            ours = _ours(found, row)
            if ours is not None:
                yield benchmark, row, 100 * ours, theirs


def _ours(found: Mapping[str, Any], row: str) -> float | None:
    if row == "mean":
        return found.get("score")
    grouped = {**found.get("by_type", {}), **found.get("by_subset", {})}
    return grouped.get(row, found.get(row))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return " / ".join("–" if one is None else str(one) for one in value) if isinstance(value, list) else str(value)
