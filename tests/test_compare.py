"""The scripts beside the benchmarks: the table that joins results, and the choice of out-of-domain rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, outofdomain
from benchmarks.outofdomain import Row
from data.records import text_hash


def figures(value: float, queries: int, **sources: tuple[float, int]) -> dict[str, Any]:
    by_source = {name: {"ndcg_at_10": score, "queries": count} for name, (score, count) in sources.items()}
    return {"ndcg_at_10": value, "queries": queries, "by_source": by_source}


def write(folder: Path, name: str, results: dict[str, Any]) -> str:
    (folder / name).mkdir()
    (folder / name / "results.json").write_text(json.dumps(results))
    return str(folder / name / "results.json")


def test_models_stand_below_each_other_with_bm25_above(tmp_path: Path) -> None:
    words = figures(0.25, 3, titles=(0.25, 1), api=(0.5, 2))
    first = write(tmp_path, "first", {"holdout": figures(0.4, 3, titles=(0.2, 1), api=(0.6, 2)) | {"bm25": words}})
    second = write(tmp_path, "second", {"holdout": figures(0.6, 3, titles=(0.7, 1), api=(0.8, 2))})
    lines = compare.table(compare.rows([first, f"best={second}"], by_source=True), "ndcg_at_10").splitlines()
    assert lines[0] == "| model | titles | api | mean |"
    assert lines[2:] == [
        "| BM25 | 0.250 | 0.500 | 0.375 |",
        "| first | 0.200 | 0.600 | 0.400 |",
        "| best | 0.700 | 0.800 | 0.750 |",
    ]
    lines = compare.table(compare.rows([first, second], by_source=False), "ndcg_at_10").splitlines()
    assert lines[0] == "| model | holdout | mean |"
    assert lines[4] == "| second | 0.600 | 0.600 |"


def test_models_that_were_scored_on_different_data_are_not_put_side_by_side(tmp_path: Path) -> None:
    files = [write(tmp_path, str(queries), {"holdout": figures(0.5, queries)}) for queries in (10, 20)]
    with pytest.raises(ValueError, match="20: holdout has 20 queries, and the first row 10"):
        compare.table(compare.rows(files, by_source=False), "ndcg_at_10")


def row(number: int, group: str = "de") -> Row:
    return Row(f"Frage {number} nach der Lampe", f"answer {number} about the lamp", "x", "de", group)


def test_the_rows_chosen_do_not_depend_on_the_order_found_and_groups_share_alike() -> None:
    found = [row(number) for number in range(40)] + [row(number, "fr") for number in range(40, 44)]
    chosen = outofdomain.choose(found, 10, frozenset())
    random.Random(1).shuffle(found)
    assert outofdomain.choose([*found, found[0]], 10, frozenset()) == chosen
    assert [one.group for one in chosen].count("fr") == 4
    assert len(chosen) == 10


def test_texts_that_training_sees_queries_met_twice_and_empty_rows_are_left_out() -> None:
    poor = [row(3)._replace(passage="lamp"), row(4)._replace(query="?"), row(5)._replace(query="answer 5 about")]
    foreign = row(6)._replace(lang="ru")  # no Cyrillic in it
    twice = [row(1), row(1)._replace(passage="another answer about the lamp")]
    assert len(outofdomain.choose([*twice, *poor, foreign], 10, frozenset())) == 1
    assert outofdomain.choose([row(1), row(2)], 10, frozenset({text_hash(row(1).passage)})) == [row(2)]


MANUAL = r"""
.\" a comment
.TH COMM 1
.SH NAME
comm \- compare two sorted files \fIline by line\fP
.SH SYNOPSIS
.B comm
[\fIOPTION\fR]... \fIFILE1 FILE2\fR
.SH DESCRIPTION
.PP
Compare \fBsorted\fP files line by line, and
.I write
three columns of lines.
"""


def test_a_manual_gives_its_summary_and_its_first_paragraph_of_prose() -> None:
    assert outofdomain._manual(MANUAL) == (
        "compare two sorted files line by line",
        "Compare sorted files line by line, and write three columns of lines.",
    )


def test_a_page_of_answers_gives_headings_without_numbers_and_the_text_below() -> None:
    page = (
        '<h2 class="title"><a id="a"></a>12.2. Why a lamp?</h2><p>Since it is dark.</p><pre>code</pre>'
        '<h3>12.2.1. And now?</h3><p>Light <b>it</b>.</p><div class="navfooter">next</div>'
    )
    assert list(outofdomain._answers(page)) == [("Why a lamp?", "Since it is dark."), ("And now?", "Light it.")]
