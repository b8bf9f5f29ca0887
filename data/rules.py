"""What is put before a text: E5's rules, as pure functions of a record's labels.

Source: the evaluation code of E5 and mE5-instruct. Retrieval puts "query: " and "passage: " before the two sides;
a task whose sides play the same part (NLI, STS, duplicates, bitext) takes "query: " on both. An instruct model puts
the instruction on the query and nothing on documents, so that they are indexed once for all tasks; in a symmetric
task it goes on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.settings import key


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prefixes of the two sides, blanks included."""

    query: str = key("query: ", help="put before every query")
    passage: str = key("passage: ", help="put before every passage")


def query_prefix(prompts: Prompts, instruction: str = "") -> str:
    """What goes before a query; `instruction` is the record's, empty when it has none."""
    return f"Instruct: {instruction}\nQuery: " if instruction else prompts.query


def passage_prefix(prompts: Prompts, instruction: str = "", symmetric: bool = False) -> str:
    """What goes before a passage or a negative of such a record."""
    if symmetric:
        return query_prefix(prompts, instruction)
    return "" if instruction else prompts.passage
