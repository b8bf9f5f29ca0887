"""BM25, the word-counting baseline that gives a model's numbers their meaning.

Words are runs of letters, digits and the marks that belong to them, case folded. Scripts that put no blanks
between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are cut into pairs of neighbouring characters. There
is no stemming and no stop list, since the texts may be in any language.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import chain

import numpy as np

K1, B = 1.2, 0.75  # Lucene's defaults

# First and last character of the blocks written without blanks.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # ideographic iteration marks
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Chinese characters
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def words(text: str) -> list[str]:
    """The terms of a text, in no particular order."""
    word, unspaced = _patterns()
    terms: list[str] = []
    for run in word.findall(unicodedata.normalize("NFKC", text).casefold().replace("_", " ")):
        pieces = unspaced.split(run)  # spaced and unspaced pieces take turns
        terms.extend(filter(None, pieces[::2]))
        terms.extend(chain.from_iterable(map(_pairs, pieces[1::2])))
    return terms


def _pairs(run: str) -> list[str]:
    return [run[i : i + 2] for i in range(len(run) - 1)] or [run]


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A word, and a run of characters written without blanks.

    Python's \\w leaves out combining marks, which would tear Hindi, Tamil or Thai words apart at every vowel sign.
    """
    marks = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Mn", "Mc")]
    unspaced = "".join(f"{chr(first)}-{chr(last)}" for first, last in _UNSPACED)
    return re.compile(f"[\\w{_character_class(marks)}]+"), re.compile(f"([{unspaced}]+)")


def _character_class(codes: Sequence[int]) -> str:
    """Ascending code points as the ranges of a regular expression's [...]."""
    breaks = np.flatnonzero(np.diff(codes) > 1)
    firsts, lasts = [0, *(breaks + 1)], [*breaks, len(codes) - 1]
    return "".join(f"{chr(codes[first])}-{chr(codes[last])}" for first, last in zip(firsts, lasts, strict=True))


def rank(queries: Sequence[str], passages: Sequence[str], k: int) -> np.ndarray:
    """The k passages with the highest BM25 score for each query: int64 [n, k], best first.

    Of equal scores the lower number comes first. A passage that shares no word with the query is no result: its
    place, and any place beyond the number of passages, holds -1.
    """
    import bm25s

    ranked = np.full((len(queries), k), -1, dtype=np.int64)
    terms = [words(passage) for passage in passages]
    if not any(terms):
        return ranked
    index = bm25s.BM25(method="lucene", k1=K1, b=B)
    index.index(terms, show_progress=False)
    for row, query in enumerate(queries):
        known = [index.vocab_dict[term] for term in words(query) if term in index.vocab_dict]
        best = _best(index.get_scores_from_ids(known), k) if known else ranked[row, :0]
        ranked[row, : len(best)] = best
    return ranked


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k highest positive scores, best first, lower numbers first among equals."""
    found = np.flatnonzero(scores > 0)
    if len(found) > k:
        least = np.partition(scores[found], len(found) - k)[len(found) - k]
        found = found[scores[found] >= least]  # may be more than k where the last place is shared
    return found[np.argsort(-scores[found], kind="stable")][:k]
