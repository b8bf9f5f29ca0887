"""Texts to token ids: opening a tokenizer, encoding in bulk, composing prefixes onto stored tokens, training one.

Token ids travel as a `Ragged` array (all ids in one flat array, one length per text), never as padded
matrices or lists of lists. A `TextEncoder` works on its own copy of the tokenizer, so truncation and padding
set on a tokenizer elsewhere (or saved in its tokenizer.json) change nothing here, and nothing here changes them.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.errors import UserError

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # XLM-R's layout: these four first, <mask> last
MASK = "<mask>"
_ASCII = string.ascii_letters + string.digits + string.punctuation
_BLANK = "\u2581"  # what Metaspace writes for a blank
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of different lengths: `ids` int32 [T] are the rows one after another, `lengths` int32 [n]."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [n + 1]: row i is ids[offsets[i] : offsets[i + 1]]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])

    def lists(self) -> list[list[int]]:
        """The rows as lists: for a few rows, for tests and messages."""
        return [row.tolist() for row in np.split(self.ids, self.offsets[1:-1])] if len(self) else []

    def take(self, rows: NDArray[np.integer[Any]]) -> Ragged:
        """The given rows, in the given order."""
        lengths = self.lengths[rows]
        return Ragged(self.ids[spans(self.offsets[:-1][rows], lengths)], lengths)


def ragged(rows: Sequence[Sequence[int]]) -> Ragged:
    """Lists of ids as a Ragged."""
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    return Ragged(np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum(dtype=np.int64))), lengths)


def concat(parts: Sequence[Ragged]) -> Ragged:
    """The rows of all parts, in order."""
    if not parts:
        return ragged([])
    return Ragged(np.concatenate([part.ids for part in parts]), np.concatenate([part.lengths for part in parts]))


def spans(starts: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The numbers start, start + 1, ..., start + length - 1 of every span, one span after another."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total, dtype=np.int64)


def load_tokenizer(path: str) -> Any:
    """Open a tokenizer folder or hub id as transformers' PreTrainedTokenizerFast.

    Raises:
        UserError: nothing can be opened there, or it has no fast (tokenizers) backend.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(
            f"tokenizer={path}: cannot be opened ({reason}); give a folder with tokenizer.json or a hub id"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer={path}: {type(tokenizer).__name__} has no fast version; save it with a tokenizer.json first"
        )
    return tokenizer


def fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides its ids (vocabulary, normaliser, special tokens; not truncation or padding)."""
    parts = orjson.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):
        parts.pop(state, None)
    return xxhash.xxh3_128_hexdigest(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))


class TextEncoder:
    """Bulk encoding with one maximum length; safe to share between threads.

    Args:
        tokenizer: a fast transformers tokenizer; it is copied, never changed.
        max_length: tokens of a row at most, special tokens included.

    Attributes:
        backend: that copy. Making it takes a second for a vocabulary of 250,000.

    Raises:
        UserError: max_length leaves no room for text beside the special tokens.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.max_length = max_length
        self.backend = stateless_copy(tokenizer)
        self._left, self._right = _frame(self.backend)
        if max_length <= len(self._left) + len(self._right):
            raise UserError(
                f"max_length={max_length}: no room for text beside {len(self._left) + len(self._right)} special tokens"
            )

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], prefix: str = "") -> Ragged:
        """Ids of prefix + text with special tokens, cut to max_length.

        Row i equals tokenizer(prefix + texts[i], truncation=True, max_length=max_length)["input_ids"].
        """
        return self._framed(self.body([prefix + text for text in texts] if prefix else texts))

    def body(self, texts: Sequence[str]) -> Ragged:
        """Ids of the texts alone: no special tokens, no cut. This is what `pack` stores."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return ragged([encoding.ids for encoding in encodings])

    def compose(self, body: Ragged, prefix: str = "") -> Ragged:
        """Ids of prefix + text out of the texts' own ids (`body`), without tokenising them again.

        Equals `encode` for tokenizers that split at white space before they look for pieces (WordPiece,
        SentencePiece-like with Metaspace) and a prefix that ends in a blank; `composes` tells for any other.
        """
        before_text, alone = self.body([prefix.rstrip(), prefix]).lists()
        return self._framed(body, before_text, alone)

    def composes(self, texts: Sequence[str], prefix: str) -> bool:
        """Whether compose(body(texts), prefix) gives just what encode(texts, prefix) gives."""
        whole, composed = self.encode(texts, prefix), self.compose(self.body(texts), prefix)
        return np.array_equal(whole.lengths, composed.lengths) and np.array_equal(whole.ids, composed.ids)

    def _framed(self, body: Ragged, prefix: Sequence[int] = (), alone: Sequence[int] = ()) -> Ragged:
        """left specials + prefix + body cut to fit + right specials; `alone` stands for the prefix of an empty row."""
        room = self.max_length - len(self._left) - len(self._right)
        prefix, alone = prefix[:room], alone[:room]
        cut = np.minimum(body.lengths, room - len(prefix))
        empty = body.lengths == 0
        before = len(self._left) + np.where(empty, len(alone), len(prefix))
        ends = np.cumsum(before + cut + len(self._right), dtype=np.int64)
        starts = ends - (before + cut + len(self._right))
        ids = np.empty(int(ends[-1]) if len(ends) else 0, np.int32)
        _put(ids, starts[~empty], [*self._left, *prefix])
        _put(ids, starts[empty], [*self._left, *alone])
        ids[spans(starts + before, cut)] = body.ids[spans(body.offsets[:-1], cut)]
        _put(ids, ends - len(self._right), self._right)
        return Ragged(ids, (ends - starts).astype(np.int32))


def _put(ids: NDArray[np.int32], starts: NDArray[np.int64], values: Sequence[int]) -> None:
    """Write the same few values at every start."""
    ids[starts[:, None] + np.arange(len(values))] = np.asarray(values, np.int32)


def stateless_copy(tokenizer: Any) -> Tokenizer:
    """The backend without truncation and padding, separate from the tokenizer it came from."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _frame(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens the tokenizer puts before and after one text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: str | Path, *, character_coverage: float = 0.9995
) -> None:
    """Train a multilingual Unigram tokenizer and save it so that AutoTokenizer opens the folder offline.

    Layout and special tokens are XLM-R's: <s> <pad> </s> <unk>, the pieces by falling score, the 256 byte pieces,
    <mask> last; NFKC, Metaspace, `<s> text </s>`. Characters outside the vocabulary become byte pieces, so any
    text has ids without <unk> and decodes to itself. The same texts give the same tokenizer.

    Args:
        texts: a sample; training time grows with its distinct words (about a minute for 100,000 short texts).
        vocab_size: pieces in all, special and byte pieces included.
        folder: written to; made when missing.
        character_coverage: the share of all characters that get a piece of their own, beside printable ASCII; the
            rarest ones are left to byte pieces, so that a few strange symbols do not use up a small vocabulary.

    Raises:
        UserError: no text, or vocab_size is too small for the characters of the sample.
    """
    texts = list(texts)
    fixed = len(SPECIALS) + len(BYTES) + 1
    frequent = _frequent_characters(texts, character_coverage)
    if not frequent:
        raise UserError("train_tokenizer: there is no text to train on")
    alphabet = frequent.union(_ASCII, _BLANK)
    if vocab_size < fixed + len(alphabet):
        raise UserError(
            f"vocab_size={vocab_size}: too small; {fixed} special and byte pieces and {len(alphabet)} characters "
            f"need at least {fixed + len(alphabet)}, and good pieces need many more"
        )
    pieces = _unigram_pieces(_without_rare(texts, alphabet), vocab_size - fixed)
    _save_tokenizer(_unigram_tokenizer(pieces), Path(folder))


def _frequent_characters(texts: Sequence[str], coverage: float) -> frozenset[str]:
    """The most frequent characters that together make up `coverage` of the text; ties go by code point."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(unicodedata.normalize("NFKC", text))
    ordered = sorted((item for item in counts.items() if not item[0].isspace()), key=lambda item: (-item[1], item[0]))
    if not ordered:
        return frozenset()
    seen = np.cumsum([count for _, count in ordered])
    kept = int(np.searchsorted(seen, coverage * seen[-1])) + 1
    return frozenset(character for character, _ in ordered[:kept])


def _without_rare(texts: Sequence[str], alphabet: frozenset[str]) -> list[str]:
    """The texts in NFKC with every character outside the alphabet turned into a blank."""
    normal = [unicodedata.normalize("NFKC", text) for text in texts]
    rare = set().union(*map(set, normal)) - alphabet
    blanks = dict.fromkeys(map(ord, rare), " ")
    return [text.translate(blanks) for text in normal] if rare else normal


def _unigram_pieces(texts: Sequence[str], size: int) -> list[tuple[str, float]]:
    """At most `size` (piece, log probability), best first: every character of the texts and the best longer pieces.

    The trainer walks hash tables in several threads, so its scores differ in the last bits from run to run.
    Rounding, and a cut made here with ties going by text, give the same pieces every time.
    """
    tokenizer = _unigram_tokenizer([])
    trainer = trainers.UnigramTrainer(
        vocab_size=size + size // 20 + 1,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        initial_alphabet=list(_ASCII),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = {piece: round(score, 6) for piece, score in orjson.loads(tokenizer.to_str())["model"]["vocab"]}
    scored = [item for item in trained.items() if item[0] not in {*SPECIALS, *BYTES, MASK}]
    longer = sorted((item for item in scored if len(item[0]) > 1), key=_best_first)
    characters = _level([item for item in scored if len(item[0]) == 1])
    return sorted(characters + longer[: max(0, size - len(characters))], key=_best_first)


def _level(characters: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """One score for the characters that no text needs alone.

    The trainer gives them its lowest score plus 0, 1, 2, ... times 0.0001, in the order of a hash table, which is
    another one in every run.
    """
    lowest = min((score for _, score in characters), default=0.0)
    return [(text, lowest if score <= lowest + 1e-4 * len(characters) else score) for text, score in characters]


def _best_first(piece: tuple[str, float]) -> tuple[float, str]:
    return -piece[1], piece[0]


def _unigram_tokenizer(pieces: Sequence[tuple[str, float]]) -> Tokenizer:
    """A Unigram tokenizer with byte fallback around the pieces; without pieces, one that is ready to be trained."""
    # Byte pieces score below any spelling of their own six characters: the text "<0x0A>" is not a byte.
    byte_score = 6 * min((score for _, score in pieces), default=0.0) - 60
    vocabulary = [(token, 0.0) for token in SPECIALS]
    vocabulary += [*pieces, *((token, byte_score) for token in BYTES), (MASK, 0.0)]
    model = models.Unigram(vocabulary, SPECIALS.index("<unk>"), byte_fallback=True) if pieces else models.Unigram()
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", SPECIALS.index("<s>")), ("</s>", SPECIALS.index("</s>"))],
    )
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=AddedToken(MASK, lstrip=True, special=True),
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
