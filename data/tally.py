"""What a collection gave: counts by kind and language, what was dropped and why, and the tables that show it."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.sources import KINDS, Pair
from data.texts import num_words


@dataclass
class _Length:
    pairs: int = 0
    query_words: int = 0
    passage_words: int = 0


@dataclass
class Tally:
    """What one source gave: (kind, language) -> lengths of the pairs kept, and reason -> pairs dropped."""

    source: str
    facts: dict[str, Any] = field(default_factory=dict)
    licence_texts: list[tuple[str, str]] = field(default_factory=list)
    not_read: list[str] = field(default_factory=list)
    lengths: dict[tuple[str, str], _Length] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Number of pairs kept."""
        return sum(length.pairs for length in self.lengths.values())

    def summary(self) -> dict[str, Any]:
        """What SOURCES.json says about the source."""
        pairs: dict[str, dict[str, int]] = {}
        for (kind, lang), length in sorted(self.lengths.items()):
            pairs.setdefault(kind, {})[lang] = length.pairs
        counts = {"pairs": pairs, "dropped": dict(sorted(self.dropped.items())), "not_read": self.not_read}
        return self.facts | counts

    def keep(self, pair: Pair) -> None:
        """Count a pair that is kept."""
        length = self.lengths.setdefault((pair.kind, pair.lang), _Length())
        length.pairs += 1
        length.query_words += num_words(pair.query)
        length.passage_words += num_words(pair.passage)


def report(tallies: Sequence[Tally]) -> str:
    """Tables of sources, kinds with their lengths, languages and reasons, as plain text."""
    parts = [
        _table(("source", "version", "licence", "sha256", "pairs"), [_origin_row(tally) for tally in tallies]),
        _table(("kind", "source", "languages", "pairs", "query words", "passage words"), _length_rows(tallies)),
        _languages(tallies),
        _table(("dropped", *(tally.source for tally in tallies)), _dropped_rows(tallies)),
    ]
    return "\n\n".join(parts)


def _origin_row(tally: Tally) -> tuple[str, ...]:
    facts = tally.facts
    return tally.source, facts["version"], facts["licence"], facts.get("sha256", "-")[:12], f"{tally.kept:,}"


def _length_rows(tallies: Sequence[Tally]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for kind in KINDS:
        for tally in tallies:
            lengths = [length for (of, _), length in tally.lengths.items() if of == kind]
            pairs = sum(length.pairs for length in lengths)
            if pairs:
                query = sum(length.query_words for length in lengths) / pairs
                passage = sum(length.passage_words for length in lengths) / pairs
                rows.append((kind, tally.source, str(len(lengths)), f"{pairs:,}", f"{query:.1f}", f"{passage:.1f}"))
    return rows


def _languages(tallies: Sequence[Tally]) -> str:
    """One paragraph a kind: its languages with their pairs, the largest first."""
    lines = []
    for kind in KINDS:
        counts: Counter[str] = Counter()
        for tally in tallies:
            counts.update({lang: length.pairs for (of, lang), length in tally.lengths.items() if of == kind})
        if counts:
            largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            line = f"{kind} by language: " + ", ".join(f"{lang}\xa0{pairs:,}" for lang, pairs in largest)
            filled = textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False)
            lines.append(filled.replace("\xa0", " "))  # it kept a language and its number on one line
    return "\n".join(lines)


def _dropped_rows(tallies: Sequence[Tally]) -> list[tuple[str, ...]]:
    reasons = sorted({reason for tally in tallies for reason in tally.dropped})
    rows = [(reason, *(f"{tally.dropped[reason]:,}" for tally in tallies)) for reason in reasons]
    return rows + [("files not read", *(str(len(tally.not_read)) for tally in tallies))]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain columns under `head`; a column of numbers is set to the right."""
    columns = [_column(cells) for cells in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def _column(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells))
    numeric = all(cell.replace(",", "").replace(".", "").isdigit() for cell in cells[1:])
    return [cell.rjust(width) if numeric else cell.ljust(width) for cell in cells]
