"""Tiny random models of three families, with tokenizers trained on the spot, as folders that transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
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
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def unigram() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer in XLM-R's layout."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(["bos_token", "pad_token", "eos_token", "unk_token", "mask_token"], special, strict=True))
    names.update(cls_token="<s>", sep_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def _save(folder: Path, architecture: str, tokenizer: PreTrainedTokenizerFast, sizes: dict[str, Any]) -> Path:
    values = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **sizes}
    config = AutoConfig.for_model(architecture, **values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
