"""Units of texts (words; characters where a script has no blanks) and the hashes of runs of them, column by column.

A unit is a longest run of letters, digits and their marks, after NFKC and case folding; everything else only separates,
and invisible format characters do not even that. A character of Han, kana, Thai, Lao, Khmer, Burmese or a Tai script is
a unit of its own: these write words without blanks (class SA of UAX #14, and ideographs), and what a dictionary would
make of them changes with its version.

Hashes are polynomials modulo 2^64 in scrambled values, so the hash of any run comes from two sums over all units: with
S[i] = sum of h[j] B^j for j < i, a run from i of length n has (S[i + n] - S[i]) / B^i. Two given runs that differ have
the same hash with a chance of about 2^-56 or less.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from data.holdout import mix

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]

_OTHER, _WORD, _ALONE, _DROPPED = range(4)
_NO_BLANKS = (
    *("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "COMBINING KATAKANA"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TAI LE", "NEW TAI", "TAI THAM", "TAI VIET", "AHOM"),
)
_BASE = 0x9E3779B97F4A7C15  # odd, so that it can be divided by
_SEPARATOR = "\x1e"
_PIECE_CHARS = 1 << 18  # whose arrays stay in the processor's cache


@dataclass(frozen=True, eq=False)
class Units:
    """The units of n texts, one text after the other.

    Attributes:
        hashes: [u], one for each unit.
        alone: [u], whether it is a character of a script without blanks.
        starts: int64 [n + 1], the first unit of each text, then u.
    """

    hashes: Hashes
    alone: NDArray[np.bool_]
    starts: Ints

    @property
    def counts(self) -> Ints:
        """int64 [n]: units of each text."""
        return np.diff(self.starts)

    @cached_property
    def _sums(self) -> Hashes:
        return _sums(self.hashes)

    def runs(self, length: int) -> Hashes:
        """[max(u - length + 1, 0)]: the hash of the run from each unit on, over the ends of texts too."""
        size = max(len(self.hashes) - length + 1, 0)
        return (self._sums[length:] - self._sums[:size]) * _inverse_powers(size)[:size]

    def inside(self, first: Ints, length: int) -> tuple[Ints, NDArray[np.bool_]]:
        """The texts that runs from these units begin in, and whether they end in them too."""
        texts = np.searchsorted(self.starts, first, side="right") - 1
        return texts, first + length <= self.starts[texts + 1]

    def whole(self) -> Hashes:
        """[n]: the hash of each whole text."""
        begins = self.starts[:-1]
        return (self._sums[self.starts[1:]] - self._sums[begins]) * _inverse_powers(len(self.hashes) + 1)[begins]


def pieces(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """(number of the first, texts) of runs of texts that are quick to take at once."""
    first, chars = 0, 0
    for number, text in enumerate(texts):
        chars += len(text)
        if chars >= _PIECE_CHARS or number == len(texts) - 1:
            yield first, texts[first : number + 1]
            first, chars = number + 1, 0


def units(texts: Sequence[str]) -> Units:
    """The units of all texts."""
    codes = _codes(texts)
    kinds = _kinds()[codes]
    kept = kinds != _DROPPED
    codes, kinds = codes[kept], kinds[kept]
    word, alone = kinds == _WORD, kinds == _ALONE
    first, last = word.copy(), word.copy()
    first[1:] &= ~word[:-1]
    last[:-1] &= ~word[1:]
    begins, ends = np.flatnonzero(first | alone), np.flatnonzero(last | alone) + 1
    sums = _sums(_scrambled()[codes])
    hashes = mix((sums[ends] - sums[begins]) * _inverse_powers(len(codes))[begins], 1)
    bounds = np.flatnonzero(codes == ord(_SEPARATOR))
    assert len(bounds) == max(len(texts) - 1, 0)
    starts = np.concatenate([[0], np.searchsorted(begins, bounds), [len(begins)]]).astype(np.int64)
    return Units(hashes, alone[begins], starts[: len(texts) + 1])


def _codes(texts: Sequence[str]) -> NDArray[np.uint32]:
    """The code points of all texts, folded, with a separator between them."""
    joined = _SEPARATOR.join(texts)
    if joined.count(_SEPARATOR) >= max(len(texts), 1):
        joined = _SEPARATOR.join(text.replace(_SEPARATOR, " ") for text in texts)
    if joined.isascii():
        joined = joined.lower()
    else:  # folding can undo the normal form (Unicode's NFKC_Casefold)
        joined = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", joined).casefold())
    return np.frombuffer(joined.encode("utf-32-le"), np.uint32)


def _sums(values: Hashes) -> Hashes:
    """[n + 1]: sums of values times powers of the base, from none to all of them."""
    found = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers(len(values))[: len(values)], out=found[1:])
    return found


def _powers(size: int) -> Hashes:
    return _power_table(_BASE, max(size, _PIECE_CHARS).bit_length())


def _inverse_powers(size: int) -> Hashes:
    return _power_table(pow(_BASE, -1, 1 << 64), max(size, _PIECE_CHARS).bit_length())


@cache
def _power_table(base: int, bits: int) -> Hashes:
    """The first 2^bits powers of a number, modulo 2^64."""
    factors = np.full(1 << bits, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


@cache
def _scrambled() -> Hashes:
    """A random-looking value for every code point."""
    return mix(np.arange(sys.maxunicode + 1, dtype=np.uint64), 0)


@cache
def _kinds() -> NDArray[np.uint8]:
    """What every code point does to units."""
    kinds = np.full(sys.maxunicode + 1, _OTHER, np.uint8)
    for code in (*range(0x40000), *range(0xE0000, 0xE0200)):  # there is nothing beyond but private use
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] in "LNM":
            name = unicodedata.name(character, "")
            kinds[code] = _ALONE if name.startswith(_NO_BLANKS) else _WORD
            if name.startswith("VARIATION SELECTOR"):
                kinds[code] = _DROPPED
        elif category == "Cf":
            kinds[code] = _DROPPED
    return kinds
