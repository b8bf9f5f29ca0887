"""What mining found, by source: how many negatives came from where, how near they are, and how good the miner is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from data.tables import table as text_table
from trainer.mining import Mined, Settings
from trainer.negatives import NONE

Facts = dict[str, Any]
_OPTIONAL = ("dropped", "given", "random")  # columns that are shown when something is in them


def facts(parts: Iterable[Mined], settings: Settings) -> Facts:
    """What the rows of a source got, as plain data; `parts` are read one by one.

    negatives: how many were given, searched and random. given_left_out: given ones that answer the query, came twice
    or were too many. short: records for which the search found too few. too_close: candidates that the margin refused.
    positive_first: share of the records for which no passage but a known answer scores higher than their own.
    scores: means, None where there is none.
    """
    sums: dict[str, float] = {}
    for rows in parts:
        for name, value in _sums(rows, settings).items():
            sums[name] = sums.get(name, 0) + value
    counts = {name: int(sums.get(name, 0)) for name in ("given", "searched", "random")}
    return {
        **{name: int(sums.get(name, 0)) for name in ("records", "dropped")},
        "negatives": counts,
        **{name: int(sums.get(name, 0)) for name in ("given_left_out", "short", "too_close")},
        "positive_first": _mean(sums.get("first", 0), int(sums.get("records", 0))),
        "scores": {
            "positive": _mean(sums.get("positive", 0), int(sums.get("records", 0))),
            "searched": _mean(sums.get("searched_score", 0), counts["searched"]),
            "random": _mean(sums.get("random_score", 0), counts["random"]),
        },
    }


def _mean(total: float, count: int) -> float | None:
    return round(float(total) / count, 6) if count else None


def _sums(rows: Mined, settings: Settings) -> dict[str, float]:
    """What is added up over rows."""
    place = np.arange(settings.count)[None, :]
    searched_end = (rows["kept"] + rows["mined"])[:, None]
    searched = (place >= rows["kept"][:, None]) & (place < searched_end)
    random = (place >= searched_end) & (place < searched_end + rows["drawn"][:, None])
    free = settings.count - rows["kept"]
    scores = rows["scores"].astype(np.float64)
    return {
        "records": len(rows),
        "dropped": (rows["numbers"] == NONE).any(axis=1).sum(),
        "given": rows["kept"].sum(),
        "given_left_out": (rows["brought"] - rows["kept"]).sum(),
        "searched": searched.sum(),
        "random": random.sum(),
        "short": (rows["mined"] < free - np.minimum(free, settings.random_count)).sum(),
        "too_close": rows["too_close"].sum(),
        "first": rows["first"].sum(),
        "positive": rows["positive"].astype(np.float64).sum(),
        "searched_score": scores[searched].sum(),
        "random_score": scores[random].sum(),
    }


def table_of(sources: Mapping[str, Facts]) -> str:
    """The facts of every source, a line each."""
    rows = [{"source": name, **_cells(each)} for name, each in sources.items()]
    used = [name for name in rows[0] if name not in _OPTIONAL or any(row[name] != "0" for row in rows)]
    return text_table(used, [[row[name] for name in used] for row in rows])


def _cells(facts: Facts) -> dict[str, str]:
    counts, scores = facts["negatives"], facts["scores"]
    return {
        "records": f"{facts['records']:,}",
        "dropped": f"{facts['dropped']:,}",
        **{name: f"{counts[name]:,}" for name in ("given", "searched", "random")},
        "too few": f"{facts['short']:,}",
        "too close": f"{facts['too_close']:,}",
        "positive first %": _cell(facts["positive_first"], 100, 1),
        "positive": _cell(scores["positive"], 1, 3),
        "negative": _cell(scores["searched"], 1, 3),
        "at random": _cell(scores["random"], 1, 3),
    }


def _cell(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"
