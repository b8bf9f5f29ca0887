"""One table out of the results.json of several models, in Markdown, with BM25 as a row of its own.

    python benchmarks/compare.py [--by-source] [--metric ndcg_at_10] NAME=results.json ...

A row is a model under the name given (without one: its folder's), a column a data set, or with --by-source each source
of it; the last column is the mean of the others. Models must have been scored on the same queries and passages.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Scores = dict[str, dict[str, Any]]  # column -> figures


def columns(results: Mapping[str, Any], by_source: bool) -> Scores:
    """The figures of one results.json by column: a data set, or "data set: source" where it has several."""
    found: Scores = {}
    for data, figures in results.items():
        sources = figures.get("by_source", {}) if by_source else {}
        if len(sources) > 1:
            found |= {source if len(results) == 1 else f"{data}: {source}": row for source, row in sources.items()}
        else:
            found[data] = figures
    return found


def bm25(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a results.json that is BM25's; empty where it was not scored."""
    return {data: figures["bm25"] for data, figures in results.items() if "bm25" in figures}


def table(rows: Mapping[str, Scores], metric: str) -> str:
    """The table in Markdown. Raises ValueError when two rows were not scored on the same data."""
    names = list(next(iter(rows.values())))
    for row, scores in rows.items():
        for name in names:
            sizes = [one.get(name, {}).get("queries") for one in (scores, next(iter(rows.values())))]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"{row}: {name} has {sizes[0]} queries, and the first row {sizes[1]}: score them alike"
                )
    lines = [["model", *names, "mean"], ["---", *["---:"] * (len(names) + 1)]]
    for row, scores in rows.items():
        values = [float(scores[name][metric]) for name in names]
        lines.append([row, *(f"{value:.3f}" for value in values), f"{sum(values) / len(values):.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows(arguments: Sequence[str], by_source: bool) -> dict[str, Scores]:
    """Row name -> columns for NAME=results.json arguments; BM25 first, from the first file that has it."""
    read: dict[str, Any] = {}
    for argument in arguments:
        name, _, file = argument.rpartition("=")
        read[name or Path(file).parent.name] = json.loads(Path(file).read_text(encoding="utf-8"))
    words = next((found for found in map(bm25, read.values()) if found), {})
    found = {"BM25": columns(words, by_source)} if words else {}
    return found | {name: columns(results, by_source) for name, results in read.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="NAME=results.json")
    parser.add_argument("--by-source", action="store_true", help="a column for each source of a data set")
    parser.add_argument("--metric", default="ndcg_at_10", help="which figure (ndcg_at_10)")
    arguments = parser.parse_args()
    try:
        print(table(rows(arguments.results, arguments.by_source), arguments.metric))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"compare: {error}")


if __name__ == "__main__":
    main()
