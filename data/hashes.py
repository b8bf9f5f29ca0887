"""The hashes of a whole column of texts: `records.text_hash` for each, at the speed of reading them.

Normalising is what costs. Most texts are normal already, and that can mostly be told from many texts' bytes at once.
"""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data.records import normalise

_BLANK = ord(" ")
# Small enough for the cache, and for memory that the allocator keeps: fresh pages cost more than the comparisons.
_WINDOW = 64 << 10


def column_hashes(column: pa.StringArray) -> npt.NDArray[np.int64]:
    """`text_hash` of every text of a whole column, which begins at the start of its buffers."""
    if not len(column):
        return np.empty(0, np.int64)
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32)[: len(column) + 1]
    view = memoryview(data or b"")
    digests = (xxhash.xxh3_64_intdigest(view[start:end]) for start, end in pairwise(offsets.tolist()))
    hashes = np.fromiter(digests, np.uint64, len(column))
    spaced = _may_have_other_spaces(np.frombuffer(view, np.uint8), offsets)
    doubtful = np.flatnonzero(spaced | ~pc.string_is_ascii(column).to_numpy(zero_copy_only=False))
    for row, text in zip(doubtful.tolist(), column.take(doubtful).to_pylist(), strict=True):
        if spaced[row] or unicodedata.normalize("NFC", text) != text:
            hashes[row] = xxhash.xxh3_64_intdigest(normalise(text).encode())
    return hashes.view(np.int64)


def _may_have_other_spaces(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which of the texts data[offsets[n]:offsets[n + 1]] may have white space that is not one blank between words."""
    starts, ends = offsets[:-1], offsets[1:]
    found = np.zeros(len(starts), np.bool_)
    filled = np.flatnonzero(ends > starts)
    found[filled] = (data[starts[filled]] == _BLANK) | (data[ends[filled] - 1] == _BLANK)
    for begin in range(0, data.size, _WINDOW):
        places = _other_spaces(data[begin : begin + _WINDOW + 1]) + begin
        found[np.searchsorted(starts, places, side="right") - 1] = True
    return found


def _other_spaces(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Where UTF-8 has a second blank, or a byte that white space other than a blank has.

    Such white space is among the bytes below 32 and the characters that begin with C2 (no-break space), E1 9A (Ogham),
    E2 80 and E2 81 (typographic spaces) and E3 80 (ideographic space).
    """
    blank, odd = data == _BLANK, data < _BLANK
    lead, follow = data[:-1], data[1:]
    odd[1:] |= blank[:-1] & blank[1:]
    odd[:-1] |= lead == 0xC2
    for first, low, high in ((0xE1, 0x9A, 0x9A), (0xE2, 0x80, 0x81), (0xE3, 0x80, 0x80)):
        odd[:-1] |= (lead == first) & (follow >= low) & (follow <= high)
    # Eight at a time, as there are few: looking at each takes as long as all of the above.
    places = (np.flatnonzero(np.packbits(odd))[:, None] * 8 + np.arange(8)).ravel()
    places = places[places < odd.size]
    return places[odd[places]]
