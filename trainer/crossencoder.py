"""A cross-encoder: a transformers model for sequence classification with one label, which reads a query and a passage
together and says in one number how well they fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import torch
import xxhash
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from data.errors import UserError
from data.pairing import PairEncoder, PairSettings, PairTemplate, read_settings, separator
from data.tokens import load_tokenizer
from trainer.attention import Segments, is_packable, use_own_attention
from trainer.dropout import use_own_dropout
from trainer.embed import weights_hash
from trainer.encoder import first_position, load_weights, local_folder
from trainer.firsttoken import read_first_tokens

MAX_LENGTH = 192  # of SimLM's re-ranker
# What a model's configuration says of its origin and of the library, not of what it computes.
_ORIGIN = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


class CrossEncoder(nn.Module):
    """forward(input_ids [n, T], attention_mask [n, T] bool) reads n padded rows and returns fp32 logits [n, 1].

    forward(input_ids [1, T], segments=...) does so for packed rows, where `packable` says that it can.

    Args:
        backbone: a transformers ...ForSequenceClassification with one label.
        separator: the id behind whose first place in a row token types are 1; None for a family without types.
    """

    def __init__(self, backbone: PreTrainedModel, separator: int | None = None) -> None:
        super().__init__()
        self.backbone, self.separator = backbone, separator
        self.size = 1
        use_own_attention(backbone)
        use_own_dropout(backbone)
        read_first_tokens(backbone)

    @property
    def max_positions(self) -> int:
        """The longest row, in tokens, that the position table holds."""
        return int(self.backbone.config.max_position_embeddings) - first_position(self.backbone.base_model)

    @property
    def packable(self) -> bool:
        """Whether rows may be packed into one (see Segments)."""
        return is_packable(self.backbone)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        types = {} if self.separator is None else {"token_type_ids": token_types(input_ids, self.separator, segments)}
        if segments is not None:
            return self._head(self._first(input_ids, segments, **types)).float()
        assert attention_mask is not None, "padded rows come with their mask"
        logits: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask.long(), **types).logits
        return logits.float()

    def _first(self, input_ids: Tensor, segments: Segments, **types: Tensor) -> Tensor:
        """The last layer's output at the first token of every packed row: [n, 1, D]."""
        base: Any = self.backbone.base_model
        positions = segments.positions + first_position(base)
        hidden = base(input_ids=input_ids, position_ids=positions, segments=segments, **types).last_hidden_state
        return hidden.transpose(0, 1)

    def _head(self, first: Tensor) -> Tensor:
        """Logits [n, 1] of first tokens [n, 1, D]: BERT's head goes through its pooler, RoBERTa's is whole."""
        backbone: Any = self.backbone
        pooler = getattr(backbone.base_model, "pooler", None)
        logits: Tensor = backbone.classifier(first if pooler is None else backbone.dropout(pooler(first)))
        return logits


def token_types(input_ids: Tensor, separator: int, segments: Segments | None = None) -> Tensor:
    """1 behind the first separator of every row [n, T], 0 up to and with it. What padding gets is never attended to.

    segments: where the rows lie, if all are packed into one.
    """
    separators = input_ids == separator
    found = separators.cumsum(1)
    if segments is not None:
        before = (found - separators.long())[0, segments.offsets[:-1].long()]
        found = found - before.repeat_interleave(segments.offsets.diff().long(), output_size=found.shape[1])
    return (found > separators).long()


def load_cross_encoder(path: str, tokenizer: Any, *, key: str = "model.path", **changes: Any) -> CrossEncoder:
    """Open a model to be trained as a cross-encoder; an encoder without a head gets one from torch's random numbers.

    Args:
        path: a folder or hub id, read as `load_backbone` reads it.
        tokenizer: of the rows; it says whether and where token types change.
        key: the configuration key that names the model, for messages.
        changes: to the model's configuration.

    Raises:
        UserError: there is no such model, it lacks more than a head, or its head has several labels.
    """
    # The number of labels is not asked for here: a head of another size must be refused, not thrown away.
    labels = {} if has_head(path, key=key) else {"num_labels": 1}
    backbone, missing = load_weights(AutoModelForSequenceClassification, path, key=key, **labels, **changes)
    _check_labels(backbone, path, key)
    base = f"{backbone.base_model_prefix}."
    lost = [name for name in missing if name.startswith(base) and not name.startswith(f"{base}pooler.")]
    if lost:
        raise UserError(f"{key}={path}: the weights lack {', '.join(lost[:3])}; it is not this architecture's")
    if missing:
        _renew_pooler(backbone)
    return CrossEncoder(backbone, _separator(backbone, tokenizer))


def has_head(path: str, *, key: str) -> bool:
    """Whether a folder's or hub id's weights are those of a cross-encoder, with a head.

    Raises UserError, which names the key, where there is no model.
    """
    return any("ForSequenceClassification" in name for name in _config(path, key).architectures or [])


def _renew_pooler(backbone: PreTrainedModel) -> None:
    """Draw the pooler of a new head where it is all zeros, as exports of encoders have it: no gradient passes those."""
    dense = getattr(getattr(backbone.base_model, "pooler", None), "dense", None)
    if dense is not None and not dense.weight.any():
        nn.init.normal_(dense.weight, std=backbone.config.initializer_range)


def build_cross_encoder(architecture: str, tokenizer: Any, **sizes: Any) -> CrossEncoder:
    """One with random weights, from a transformers architecture name and its configuration's own keys.

    Raises:
        UserError: the architecture is unknown or the sizes do not fit together.
    """
    names = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    try:
        config = AutoConfig.for_model(architecture, **names, **sizes)
        backbone = AutoModelForSequenceClassification.from_config(config)
    except (ValueError, KeyError) as error:
        raise UserError(f"model.architecture={architecture}: {error}") from None
    return CrossEncoder(backbone, _separator(backbone, tokenizer))


def _config(path: str, key: str) -> Any:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}={path}: cannot be opened: {reason}; give a model folder or a hub id") from None


def _check_labels(backbone: PreTrainedModel, path: str, key: str) -> None:
    labels = backbone.config.num_labels
    if labels != 1:
        raise UserError(
            f"{key}={path}: it has {labels} labels; a teacher gives one logit for a pair, take a re-ranker with 1 label"
        )


def _separator(backbone: PreTrainedModel, tokenizer: Any) -> int | None:
    """Where the types change, for a model that has more than one type."""
    return separator(tokenizer) if getattr(backbone.config, "type_vocab_size", 0) > 1 else None


# --- teachers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teacher:
    """A cross-encoder ready to score, and how its rows are made."""

    encoder: CrossEncoder
    pairs: PairEncoder
    name: str
    padding_id: int


def open_teacher(
    path: str,
    device: torch.device | str = "cpu",
    *,
    query: str | None = None,
    passage: str | None = None,
    max_length: int = 0,
    max_query_length: int = 0,
) -> Teacher:
    """Open a re-ranker: a folder that `quintet teacher` wrote, a transformers folder, or a hub id.

    Its template (`query`, `passage`) and lengths are read from the folder; what is given here stands instead. A folder
    that says nothing gets the bare texts and 192 tokens, half of them at most for the query.

    Raises:
        UserError: there is no such model, it is no re-ranker with one label, or it cannot read rows so long.
    """
    folder = local_folder(path, "teacher")
    tokenizer = load_tokenizer(str(folder))
    backbone, missing = load_weights(AutoModelForSequenceClassification, str(folder), key="teacher")
    _check_labels(backbone, path, "teacher")
    if missing:
        raise UserError(
            f"teacher={path}: it has no {', '.join(missing[:3])}, so it is no trained re-ranker; train it with "
            "quintet teacher first"
        )
    encoder = CrossEncoder(backbone, _separator(backbone, tokenizer)).to(device).eval()
    settings = read_settings(folder) or PairSettings(PairTemplate(), min(MAX_LENGTH, encoder.max_positions), 0)
    settings = replace(
        settings,
        template=_changed(settings.template, query, passage),
        max_length=max_length or settings.max_length,
        # the query's share is kept where only the whole is changed
        max_query_length=max_query_length or (0 if max_length else settings.max_query_length),
    )
    if settings.max_length > encoder.max_positions:
        raise UserError(
            f"max_length={settings.max_length}: the teacher's position table ends at {encoder.max_positions} tokens; "
            "lower max_length"
        )
    pairs = PairEncoder(
        tokenizer,
        settings.max_length,
        max_query_length=settings.max_query_length,
        template=settings.template,
    )
    return Teacher(encoder, pairs, Path(path).name, int(tokenizer.pad_token_id or 0))


def _changed(template: PairTemplate, query: str | None, passage: str | None) -> PairTemplate:
    texts = {"query": query, "passage": passage}
    return replace(template, **{name: text for name, text in texts.items() if text is not None})


def fingerprint(teacher: Teacher) -> str:
    """What names a teacher's scores: a hash of its weights, its architecture, its tokenizer and how rows are made."""
    config = {key: value for key, value in _plain(teacher.encoder.backbone.config).items() if key not in _ORIGIN}
    facts = [weights_hash(teacher.encoder), config, teacher.pairs.tokenizer_fingerprint, teacher.pairs.settings]
    return xxhash.xxh3_128_hexdigest(
        orjson.dumps(facts, default=str, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    )


def _plain(config: Any) -> dict[str, Any]:
    """What differs from the library's defaults, so that a later version with more keys gives the same."""
    found: dict[str, Any] = config.to_diff_dict()
    return found
