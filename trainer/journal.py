"""metrics.jsonl and incidents.jsonl, the records of a run: one JSON object a logged step, or an incident."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("quintet")


class Journal:
    """A file of JSON lines: append-only, an object each, flushed at once; a half line left by a crash is cut off first.

    Floats are written so that reading gives the same bits. JSON has no word for the others: they are the strings
    "NaN", "Infinity" and "-Infinity", which float() reads. When the disk is full, lines wait in memory for room.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = _whole_lines(self._descriptor)
        self._cut()

    def write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps({name: _jsonable(value) for name, value in row.items()}, allow_nan=False)
        self._waiting.append(line.encode() + b"\n")
        self._flush()

    def close(self) -> None:
        self._flush()
        if self._waiting:
            log.error("%s: the last %d lines could not be written", self._path, len(self._waiting))
        os.close(self._descriptor)

    def _flush(self) -> None:
        waited = len(self._waiting) > 1
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._end += len(self._waiting.pop(0))
        except OSError as error:
            self._cut()
            if not waited:
                log.warning("%s: %s; metrics wait in memory until there is room", self._path, error)

    def _append(self, line: bytes) -> None:
        if os.pwrite(self._descriptor, line, self._end) < len(line):
            raise OSError("only a part of a line could be written")

    def _cut(self) -> None:
        os.ftruncate(self._descriptor, self._end)


def _whole_lines(descriptor: int) -> int:
    """Bytes of a file up to and with its last line end."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 4096)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _jsonable(value: Any) -> Any:
    if isinstance(value, list):
        return [_jsonable(one) for one in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
