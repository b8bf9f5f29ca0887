"""Tiny random models of three families, with tokenizers made on the spot, as folders that transformers opens.

Their pieces are counted here, since the trainers of tokenizers break ties by hash tables: another tokenizer, and
another training, in every process.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "Wie stelle ich die Heizung im Wohnzimmer ein?",
    "Sets the temperature of the living room.",
    "Indique a temperatura desejada para a sala de estar.",
    "温度を設定します",
    "Выберите устройство для подключения",
    "query: passage: Instruct: Query:",
]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 70,
}


def bert(folder: Path, **sizes: Any) -> Path:
    """A 2-layer BERT with a WordPiece tokenizer: [CLS] ... [SEP], positions from 0."""
    return _save(folder, "bert", wordpiece(), sizes)


def mpnet(folder: Path, **sizes: Any) -> Path:
    """A 2-layer MPNet: relative bias in its attention, positions from padding + 1."""
    return _save(folder, "mpnet", wordpiece(), sizes)


def xlmr(folder: Path, **sizes: Any) -> Path:
    """A 2-layer XLM-R with a Unigram tokenizer: <s> ... </s>, positions from padding + 1."""
    return _save(folder, "xlm-roberta", unigram(), sizes)


def wordpiece() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer in BERT's layout."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = wordpieces(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def unigram() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer in XLM-R's layout."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    normalizer, splitter = normalizers.NFKC(), pre_tokenizers.Metaspace()
    counts = _pieces(normalizer, splitter, 200 - len(special))
    scored = [(piece, math.log(count / sum(counts.values()))) for piece, count in counts.items()]
    tokenizer = Tokenizer(models.Unigram([*((token, 0.0) for token in special), *scored], special.index("<unk>")))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(["bos_token", "pad_token", "eos_token", "unk_token", "mask_token"], special, strict=True))
    names.update(cls_token="<s>", sep_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def wordpieces(special: list[str]) -> Tokenizer:
    """WordPiece over the texts, in lower case, in front of it these special tokens, one of which is the unknown one."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces = _pieces(normalizer, splitter, 300 - len(special), inside="##")
    vocabulary = {piece: number for number, piece in enumerate([*special, *pieces])}
    unknown = next(token for token in special if "unk" in token.lower())
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    return tokenizer


def _pieces(normalizer: Any, splitter: Any, size: int, inside: str = "") -> dict[str, int]:
    """Every character and word of the texts, and of other parts of words those that save most, with their counts.

    inside: stands before a part that does not begin a word.
    """
    split = [splitter.pre_tokenize_str(normalizer.normalize_str(text)) for text in TEXTS]
    words = [word for found in split for word, _ in found]
    counts: Counter[str] = Counter()
    for word in words:
        counts.update([*word, *(inside + character for character in word)])
        for start in range(len(word)):
            counts.update((inside if start else "") + word[start:end] for end in range(start + 2, len(word) + 1))
    first = {piece for piece in counts if len(piece.removeprefix(inside)) == 1} | set(words)
    others = sorted(counts.keys() - first, key=lambda piece: (-len(piece) * counts[piece], piece))
    return {piece: counts[piece] for piece in [*sorted(first), *others[: size - len(first)]]}


def _save(folder: Path, architecture: str, tokenizer: PreTrainedTokenizerFast, sizes: dict[str, Any]) -> Path:
    values = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **sizes}
    config = AutoConfig.for_model(architecture, **values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
