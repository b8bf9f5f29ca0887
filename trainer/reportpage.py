"""A page of numbers, charts and tables as one HTML file that loads nothing. The only door to plotly.

What is on it may come from a stranger's run folder, so all text is escaped, and a second guard stands behind that: the
page's own policy forbids every request and every script but the page's own, which it knows by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.charts import Chart

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Note:
    """A sentence, such as why something is not there."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of texts; `faint` are rows that come from elsewhere. With `closed`, a line that opens it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    faint: frozenset[int] = frozenset()
    closed: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    lead: str
    blocks: Sequence[Chart | Table | Note]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower())


@dataclass(frozen=True)
class Card:
    """A run in short. numbers: label, value and what stands small behind it."""

    name: str
    colour: str
    state: str
    about: str
    numbers: Sequence[tuple[str, str, str]]
    hardware: str


@dataclass(frozen=True)
class Page:
    title: str
    made: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    foot: str
    charts: list[Chart] = field(init=False)

    def __post_init__(self) -> None:
        charts = [block for section in self.sections for block in section.blocks if isinstance(block, Chart)]
        object.__setattr__(self, "charts", charts)


def render(page: Page) -> str:
    """The whole file."""
    from plotly.offline import get_plotlyjs

    plotly, script = get_plotlyjs(), _part("reportpage.js")
    values = {
        "POLICY": _policy([plotly, script]),
        "TITLE": _text(page.title),
        "STYLE": _part("reportpage.css"),
        "HEADING": _text(page.title),
        "MADE": _text(page.made),
        "SUMMARY": "\n".join(_card(number, card, len(page.cards) > 1) for number, card in enumerate(page.cards)),
        "CONTENTS": _contents(page.sections),
        "BODY": "\n".join(map(_section, page.sections)),
        "FOOT": _text(page.foot),
        "FIGURES": _json([_figure(chart) for chart in page.charts]),
        "PLOTLY": plotly,
        "SCRIPT": script,
    }
    pieces = re.split(r"@([A-Z]+)@", _part("reportpage.html"))  # values are put in once, whatever stands in them
    return "".join(values[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def _part(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    return html.escape(text)


def _policy(scripts: Sequence[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figure(chart: Chart) -> Mapping[str, Any]:
    return {"id": _place(chart), "data": chart.traces, "layout": chart.layout, "height": chart.height}


def _place(chart: Chart) -> str:
    return f"chart-{chart.name}"


def _card(number: int, card: Card, several: bool) -> str:
    swatch = f'<span class="swatch" style="background:{card.colour}"></span>' if several else ""
    name = f"{swatch}{_text(card.name)}"
    if several:
        facts = f'data-run="{number}" aria-pressed="true" title="Show or hide this run in the charts"'
        name = f'<button type="button" class="toggle" {facts}>{name}</button>'
    numbers = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}{f' <small>{_text(small)}</small>' if small else ''}</dd></div>"
        for label, value, small in card.numbers
    )
    return (
        f'<section class="run{" several" if several else ""}" aria-label="Run {_text(card.name)}">'
        f'<h2>{name} <span class="state {card.state}">{card.state}</span>'
        f'<span class="reason">{_text(card.about)}</span></h2>'
        f'<dl class="numbers">{numbers}</dl><p class="hardware">{_text(card.hardware)}</p></section>'
    )


def _contents(sections: Sequence[Section]) -> str:
    items = "".join(f'<li><a href="#{section.anchor}">{_text(section.title)}</a></li>' for section in sections)
    return f'<nav aria-label="Sections"><ul>{items}</ul></nav>'


def _section(section: Section) -> str:
    parts = [f'<section aria-labelledby="{section.anchor}"><h2 id="{section.anchor}">{_text(section.title)}</h2>']
    parts.append(f'<p class="lead">{_text(section.lead)}</p>')
    charts = [block for block in section.blocks if isinstance(block, Chart)]
    if charts:
        parts.append(f'<div class="charts">{"".join(map(_chart, charts))}</div>')
    for block in section.blocks:
        if isinstance(block, Note):
            parts.append(f'<p class="note">{_text(block.text)}</p>')
        elif isinstance(block, Table):
            parts.append(_table(block))
    return "\n".join([*parts, "</section>"])


def _chart(chart: Chart) -> str:
    """A place for the script to draw in; what it shows is said in words before it."""
    place, wide = _place(chart), ' class="wide"' if chart.wide else ""
    label = _text(f"Chart: {chart.title}")
    return (
        f'<figure{wide}><figcaption id="{place}-text"><h3>{_text(chart.title)}</h3><p>{_text(chart.caption)}</p>'
        f'</figcaption><div class="plot" id="{place}" role="img" aria-label="{label}" '
        f'aria-describedby="{place}-text" style="min-height:{chart.height}px"></div></figure>'
    )


def _table(table: Table) -> str:
    numeric = [bool(table.rows) and all(_is_number(row[n]) for row in table.rows) for n in range(len(table.head))]
    head = "".join(
        f'<th scope="col"{_class("number" if number else "")}>{_text(name)}</th>'
        for name, number in zip(table.head, numeric, strict=True)
    )
    rows = "".join(_table_row(row, numeric, faint=n in table.faint) for n, row in enumerate(table.rows))
    body = f"<caption>{_text(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    region = f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(table.closed or table.caption)}">'
    whole = f"{region}<table>{body}</table></div>"
    return f"<details><summary>{_text(table.closed)}</summary>{whole}</details>" if table.closed else whole


def _table_row(row: Sequence[str], numeric: Sequence[bool], *, faint: bool) -> str:
    cells = [f'<th scope="row">{_text(row[0])}</th>']
    cells += [
        f"<td{_class('number' if number else 'text')}>{_text(cell)}</td>"
        for cell, number in zip(row[1:], numeric[1:], strict=True)
    ]
    return f"<tr{_class('published' if faint else '')}>{''.join(cells)}</tr>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _is_number(text: str) -> bool:
    return text in ("", "–") or bool(re.fullmatch(r"-?[\d,]*\.?\d+(e[+-]?\d+)?%?", text))
