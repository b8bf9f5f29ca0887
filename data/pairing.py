"""Query and passage as the one row of token ids that a cross-encoder reads.

Both texts go into a template and are tokenised apart; special tokens then join them as the tokenizer joins a pair. So a
query is tokenised once for all its passages, and a passage once for all its queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.errors import UserError
from data.settings import key
from data.tokens import Ragged, TextEncoder, fingerprint, ragged, spans, stateless_copy

SETTINGS_FILE = "pairing.json"
_SAMPLES = ("a", "What is 1+1?", " Straße,  zwei ", "温度を設定します", "")


@dataclass(frozen=True, kw_only=True)
class PairTemplate:
    """What a cross-encoder reads on its two sides."""

    query: str = key("{query}", help="text of the first side, with {query} in it")
    passage: str = key("{passage}", help="text of the second side, with {passage} in it")


@dataclass(frozen=True)
class PairSettings:
    """How a teacher's rows are made; stored beside its weights as pairing.json."""

    template: PairTemplate
    max_length: int
    max_query_length: int


class PairEncoder:
    """Token ids of (query, passage) rows; safe to share between threads.

    Row i is `tokenizer(query_text, passage_text, truncation="only_second", max_length=max_length)`, where query_text is
    the templated query, cut to `max_query_length` tokens.

    Args:
        tokenizer: a fast transformers tokenizer; it is never changed.
        max_length: tokens of a row at most, special tokens included.
        max_query_length: tokens of the query at most, without special tokens; 0: half of max_length.
        template: the texts of the two sides.

    Raises:
        UserError: the lengths leave no room, the template has no place for its text, or the tokenizer does not make a
            pair out of its two texts' own tokens.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, *, max_query_length: int = 0, template: PairTemplate = PairTemplate()
    ) -> None:
        self.settings = PairSettings(template, max_length, max_query_length or max_length // 2)
        self.tokenizer_fingerprint = fingerprint(tokenizer)
        self._around_query = _around(template.query, "query")
        self._around_passage = _around(template.passage, "passage")
        self._encoder = TextEncoder(tokenizer, max_length)
        self._frame = _frame(self._encoder.backend)
        self._specials = sum(map(len, self._frame))
        _check_room(self.settings, self._specials)
        self._check()

    def encode(self, queries: Sequence[str], passages: Sequence[str]) -> Ragged:
        """The rows of n pairs: queries[i] with passages[i]."""
        return self.join(self.queries(queries), self.passages(passages))

    def queries(self, texts: Sequence[str]) -> Ragged:
        """The queries' own ids, cut, for `join`."""
        body = self._body(texts, self._around_query)
        return _cut(body, np.minimum(body.lengths, self.settings.max_query_length))

    def passages(self, texts: Sequence[str]) -> Ragged:
        """The passages' own ids for `join`, which cuts them to fit."""
        body = self._body(texts, self._around_passage)
        return _cut(body, np.minimum(body.lengths, self.settings.max_length))

    def whole(self, queries: Sequence[str], passages: Sequence[str]) -> NDArray[np.bool_]:
        """Which of the rows of n pairs hold both texts uncut."""
        sides = ((queries, self._around_query), (passages, self._around_passage))
        query, passage = (self._body(texts, around).lengths for texts, around in sides)
        fits: NDArray[np.bool_] = query + passage + np.int32(self._specials) <= self.settings.max_length
        return fits & (query <= self.settings.max_query_length)

    def _body(self, texts: Sequence[str], around: tuple[str, str]) -> Ragged:
        before, after = around
        return self._encoder.body([before + text + after for text in texts])

    def lengths(self, queries: NDArray[np.int32], passages: NDArray[np.int32]) -> NDArray[np.int32]:
        """The lengths of the rows that `join` makes of queries and passages of such lengths."""
        return np.minimum(queries + passages + np.int32(self._specials), np.int32(self.settings.max_length))

    def join(self, queries: Ragged, passages: Ragged) -> Ragged:
        """Row i is the i-th query with the i-th passage, the passage cut to fit, and the special tokens."""
        room = self.settings.max_length - self._specials - queries.lengths
        return self._framed(queries, _cut(passages, np.minimum(passages.lengths, room)))

    def _framed(self, queries: Ragged, passages: Ragged) -> Ragged:
        left, middle, right = (_repeated(ids, len(queries)) for ids in self._frame)
        return _side_by_side([left, queries, middle, passages, right])

    def save(self, folder: Path) -> None:
        """Leave the settings beside a model, where `read_settings` finds them."""
        text = orjson.dumps(asdict(self.settings), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        (folder / SETTINGS_FILE).write_bytes(text)

    def _check(self) -> None:
        """Compare with the tokenizer's own pairs on a few texts: this refuses one whose texts change each other."""
        pairs = list(itertools.product(_SAMPLES, repeat=2))
        wanted = ragged([encoding.ids for encoding in self._encoder.backend.encode_batch(pairs)])
        first, second = (self._encoder.body(texts) for texts in zip(*pairs, strict=True))
        joined = self._framed(first, second)
        if not (np.array_equal(joined.lengths, wanted.lengths) and np.array_equal(joined.ids, wanted.ids)):
            raise UserError("tokenizer: it tokenises a pair otherwise than its two texts; use another teacher")


def read_settings(folder: Path) -> PairSettings | None:
    """The settings that `PairEncoder.save` left beside a model; None where there are none. Raises UserError."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return None
    try:
        found = orjson.loads(file.read_bytes())
        template = PairTemplate(**found.pop("template"))
        return PairSettings(template, int(found["max_length"]), int(found["max_query_length"]))
    except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); export the teacher again") from None


def separator(tokenizer: Any) -> int | None:
    """The id behind whose first place in a row the token types change from 0 to 1; None when they are all 0.

    So it is done for BERT and its like; the tokenizer itself says whether.

    Raises:
        UserError: its types follow another rule.
    """
    if "token_type_ids" not in tokenizer.model_input_names:
        return None
    encoding = stateless_copy(tokenizer).encode("a b", "a b c")
    if not any(encoding.type_ids):
        return None
    first = encoding.type_ids.index(1) - 1
    wanted = [0] * (first + 1) + [1] * (len(encoding.ids) - first - 1)
    if first < 0 or encoding.type_ids != wanted or encoding.ids.index(encoding.ids[first]) != first:
        raise UserError("tokenizer: its token types do not change behind the first separator; use another teacher")
    return int(encoding.ids[first])


def _around(template: str, name: str) -> tuple[str, str]:
    """What a template has before and behind the text."""
    parts = template.split(f"{{{name}}}")
    if len(parts) != 2:
        raise UserError(f"template.{name}={template!r}: needs {{{name}}} once, where the text goes")
    return parts[0], parts[1]


def _check_room(settings: PairSettings, specials: int) -> None:
    if settings.max_query_length + specials >= settings.max_length:
        raise UserError(
            f"max_query_length={settings.max_query_length}: leaves no room for a passage in max_length="
            f"{settings.max_length} beside {specials} special tokens; lower it, or raise max_length"
        )


def _frame(backend: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before, between and behind the two texts of a pair."""
    text = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", "a").ids
    starts = [n for n in range(len(whole)) if whole[n : n + len(text)] == text]
    first, second = starts[0], starts[-1]
    return whole[:first], whole[first + len(text) : second], whole[second + len(text) :]


def _repeated(ids: Sequence[int], times: int) -> Ragged:
    return Ragged(np.tile(np.asarray(ids, np.int32), times), np.full(times, len(ids), np.int32))


def _cut(rows: Ragged, lengths: NDArray[np.integer[Any]]) -> Ragged:
    """The first `lengths` ids of every row."""
    return Ragged(rows.ids[spans(rows.offsets[:-1], lengths)], lengths.astype(np.int32))


def _side_by_side(parts: Sequence[Ragged]) -> Ragged:
    """Row i is the parts' rows i, one after the other."""
    lengths: NDArray[np.int64] = np.sum([part.lengths for part in parts], axis=0, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    ids = np.empty(int(lengths.sum()), np.int32)
    for part in parts:
        ids[spans(starts, part.lengths)] = part.ids
        starts = starts + part.lengths
    return Ragged(ids, lengths.astype(np.int32))
