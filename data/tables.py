"""Plain text tables for the terminal and for logs."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two blanks apart: numbers to the right, anything else to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    right = [bool(rows) and all(_is_number(cell) for cell in column) for column in zip(*rows, strict=True)]
    right = right or [False] * len(head)
    lines = []
    for row in (head, *rows):
        cells = zip(row, widths, right, strict=True)
        lines.append("  ".join(text.rjust(n) if is_right else text.ljust(n) for text, n, is_right in cells).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).replace("-", "", 1).isdigit() or text == "-"
