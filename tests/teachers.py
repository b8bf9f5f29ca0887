"""Tiny random re-rankers of several families as folders that transformers opens, and tables of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from data.scores import Scores

TYPED = ["input_ids", "token_type_ids", "attention_mask"]


def bert(folder: Path, **changes: Any) -> Path:
    """A 2-layer BERT with one label; its tokenizer gives the second text, and what follows, token type 1."""
    return _save(folder, "bert", typed_wordpiece(), changes)


def electra(folder: Path, **changes: Any) -> Path:
    """A 2-layer ELECTRA, SimLM's family of teachers, with the same tokenizer."""
    return _save(folder, "electra", typed_wordpiece(), {"embedding_size": 32, **changes})


def xlmr(folder: Path, **changes: Any) -> Path:
    """A 2-layer XLM-R with one label: two separators between the texts, no token types."""
    return _save(folder, "xlm-roberta", tiny.unigram(), changes)


def mpnet(folder: Path, **changes: Any) -> Path:
    """A 2-layer MPNet with one label: BERT's tokenizer, a model without token types."""
    return _save(folder, "mpnet", tiny.wordpiece(), changes)


FAMILIES = {"bert": bert, "electra": electra, "xlmr": xlmr, "mpnet": mpnet}


def typed_wordpiece() -> PreTrainedTokenizerFast:
    """The tiny WordPiece tokenizer with BERT's own rule for pairs."""
    tokenizer = tiny.wordpiece()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)],
    )
    tokenizer.model_input_names = TYPED
    return tokenizer


def _save(folder: Path, architecture: str, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any]) -> Path:
    values = {"num_labels": 1, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **changes}
    # far larger than usual, so that a wrong type, place or mask moves the logit far more than rounding does
    config = AutoConfig.for_model(architecture, **tiny.SIZES, initializer_range=0.5, **values)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if tokenizer.model_input_names == TYPED:  # of a tokenizer that belongs to no family this is not saved
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": TYPED}))
    return folder


def scores(count: int, seed: int = 0) -> Scores:
    """Random scores of distinct pairs."""
    random = np.random.default_rng(seed)
    limits = np.iinfo(np.int64)
    query, passage = random.integers(limits.min, limits.max, (2, count))
    return Scores(query, passage, random.normal(0, 5, count).astype(np.float32))
