"""docs/data-format.md says what the code writes and reads."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import orjson
from pages import ROOT, blocks
from pairs import pairs, write_shards

from data import blocks as arrow
from data import index, mixture, records, scores

PAGE = ROOT / "docs/data-format.md"
TEXT = PAGE.read_text(encoding="utf-8")


def _rows(heading: str) -> dict[str, str]:
    """The second column of a section's first table, by each name in the first."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE)
    return {name: cell for names, cell in rows for name in re.findall(r"`([^`]+)`", names)}


def test_the_fields_of_a_record_are_those_of_the_code() -> None:
    assert set(_rows("Records")) == {field.name for field in dataclasses.fields(records.Record)}
    assert f"{records.MAX_CHARS:,} characters" in TEXT


def test_the_columns_of_a_block_are_those_of_the_code() -> None:
    kinds = {"string": "string", "bool": "bool", "int64": "int64", "list<item: string>": "list of string"}
    kinds |= {"list<item: int64>": "list of int64", "list<item: uint16>": "list of uint16"}
    rows = _rows("Shards")
    fields = {field.name: str(field.type) for field in arrow.schema("uint16")}
    assert set(rows) == set(fields)
    for name, kind in fields.items():
        assert rows[name].startswith(kinds.get(kind, "list of lists")), name


def test_the_index_has_the_keys_that_the_page_shows(tmp_path: Path) -> None:
    write_shards(tmp_path, pairs(20))
    written = orjson.loads((tmp_path / index.INDEX_NAME).read_bytes())
    shown = next("".join(block.lines) for block in blocks(PAGE) if "quintet-shards" in block.lines[0])
    assert index.FORMAT in shown
    assert set(written) | set(written["shards"][0]) | {"records"} <= set(re.findall(r'"(\w+)":', shown))


def test_the_columns_of_a_score_file_are_those_of_the_code() -> None:
    fields = {field.name: {"float": "float32"}.get(str(field.type), str(field.type)) for field in scores.SCHEMA}
    assert _rows("Score cache") == fields
    assert scores.FORMAT.decode() in TEXT


def test_the_keys_of_a_source_in_a_mixture_are_those_of_the_code() -> None:
    recipes = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    section = TEXT.split("## Mixture file\n")[1]
    for name in mixture._SOURCE_KEYS:
        assert f"`{name}`" in section
        assert name in recipes.split("## A mixture of sources\n")[1]
