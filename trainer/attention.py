"""Attention for the encoders: packed texts, padded texts, and how each device computes it fastest.

Families whose attention goes through transformers' interface and takes positions come here; MPNet, which adds a
relative bias inside its own attention, keeps its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from data.tokens import Ragged
from trainer import dropout as drop
from trainer.device import onto
from trainer.gradcache import Rows, flat, pad

_OWN = "quintet"
_FAMILIES = ("bert", "xlm-roberta", "roberta", "camembert", "electra")


class Segments(NamedTuple):
    """Where the texts of a packed row lie: offsets int32 [n + 1], tokens of the longest, positions [1, T] from 0."""

    offsets: Tensor
    longest: int
    positions: Tensor

    def to(self, device: torch.device) -> Segments:
        return Segments(onto(self.offsets, device), self.longest, onto(self.positions, device))


def pack(tokens: Ragged, rows: Rows) -> tuple[Tensor, Segments]:
    """The chosen texts one after the other: ids [1, T] and where each lies."""
    lengths = tokens.lengths[rows].astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    ids = torch.from_numpy(flat(tokens, rows).astype(np.int64))[None]
    segments = Segments(
        torch.from_numpy(offsets.astype(np.int32)), int(lengths.max()), torch.from_numpy(positions)[None]
    )
    return ids, segments


def is_packable(backbone: PreTrainedModel) -> bool:
    """Whether texts may be packed into one row of it: whether `use_own_attention` could change it."""
    return bool(backbone.config._attn_implementation == _OWN)


def feed(
    model: Callable[..., Tensor],
    tokens: Ragged,
    rows: Rows,
    device: torch.device,
    *,
    packed: bool = False,
    padding_id: int = 0,
) -> Tensor:
    """What a model (an Encoder, a CrossEncoder, or the engine of one) says of the chosen texts: fp32 [len(rows), D].

    packed: without padding, where the model can be packed; else as a rectangle.
    """
    if packed:
        ids, segments = pack(tokens, rows)
        return model(onto(ids, device), segments=segments.to(device))
    ids, mask = pad(tokens, rows, padding_id)
    return model(onto(ids, device), onto(mask, device))


def use_own_attention(backbone: PreTrainedModel) -> None:
    """Route attention through the function below, in the families where it can be; the others keep theirs."""
    if backbone.config.model_type in _FAMILIES:
        backbone.set_attn_implementation(_OWN)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    first_only: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key, value [n, H, T, d] -> [n, T, H, d].

    first_only: queries are there for the first token of each text alone.
    """
    if segments is not None:
        attend = _varlen if query.is_cuda else _run_by_run
        # not [0], whose gradient is a copy into zeros
        query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        return attend(query, key, value, segments, scaling, first_only)[None], None
    # The same way with and without gradients, so that a replay computes what the first pass did.
    if query.device.type == "cpu" and module.training and (dropout or query.dtype == torch.bfloat16):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.autocast("cpu", enabled=False):
            attended: Tensor = _WrittenOut.apply(query, key, value, attention_mask, scale, dropout)
        return attended.transpose(1, 2), None
    sdpa: Callable[..., tuple[Tensor, None]] = AttentionInterface()["sdpa"]
    return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


class _WrittenOut(torch.autograd.Function):
    """softmax(scale q k^T), dropped out, times v, for training on a CPU: q, k, v [n, H, T, d] -> [n, H, T, d].

    torch writes the weights out there too where they have dropout, in fp32 and with six tensors of their size for the
    backward pass; without dropout its kernel's backward in bf16 takes 60 ms a call. Here products are in the type of
    q, k and v, and two such tensors are held: the weights, and the mask. `mask` is bool [n, 1, 1 or T, T], True where
    a key may be looked at, or None. Queries may be fewer than keys.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, p: float
    ) -> Tensor:
        q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
        weights = torch.softmax(_scores(q, k, mask, scale), -1)
        kept = drop.keep_mask(weights.shape, p) if p else None
        ctx.save_for_backward(q, k, v, weights, kept)
        ctx.scale, ctx.share = scale, drop.scale(p)
        ctx.texts = len(query)
        return _times(_dropped(weights, kept), v, ctx.share).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, kept = ctx.saved_tensors
        grad = grads[0].flatten(0, 1)
        to_value = _times(_dropped(weights, kept).mT, grad, ctx.share)
        to_weights = _dropped(_times(grad, v.mT, ctx.share), kept)
        to_scores = torch._softmax_backward_data(to_weights, weights, -1, weights.dtype)
        to_query, to_key = _times(to_scores, k, ctx.scale), _times(to_scores.mT, q, ctx.scale)
        to_inputs = (gradient.unflatten(0, (ctx.texts, -1)) for gradient in (to_query, to_key, to_value))
        return *to_inputs, None, None, None


def _times(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor x left right, of [N, a, b] and [N, b, c], in one pass."""
    return torch.baddbmm(left.new_zeros(1, 1, 1), left, right, beta=0, alpha=factor)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """scale q k^T of [n H, T, d] each, and -inf where the mask of the n texts is False: [n H, T, T]."""
    if mask is None:
        return _times(q, k.mT, scale)
    bias = q.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    heads, queries = len(q) // len(mask), q.shape[1]
    return torch.baddbmm(bias.expand(-1, heads, queries, -1).flatten(0, 1), q, k.mT, alpha=scale)


def _dropped(weights: Tensor, kept: Tensor | None) -> Tensor:
    return weights if kept is None else drop.keep(weights, kept)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, first_only: bool
) -> Tensor:
    """[T, H, d] each, query [n, H, d] if first_only; the flash kernel. It has no dropout of attention weights."""
    from torch.nn.attention.varlen import varlen_attn

    longest = segments.longest
    offsets, most = (_one_each(segments), 1) if first_only else (segments.offsets, longest)
    attended = varlen_attn(query, key, value, offsets, segments.offsets, most, longest, scale=scaling)
    assert isinstance(attended, Tensor)
    return attended


def _run_by_run(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, first_only: bool
) -> Tensor:
    """The same on the host, where there is no such kernel: one SDPA call for neighbours of the same length.

    Texts of a chunk are sorted by length, so calls are few, and without padding they need no mask.
    """
    outputs, begin, text = [], 0, 0
    for length, run in itertools.groupby(segments.offsets.diff().tolist()):
        texts = sum(1 for _ in run)
        end = begin + texts * length
        asked = query[text : text + texts] if first_only else query[begin:end]
        q, k, v = (rows.unflatten(0, (texts, -1)).transpose(1, 2) for rows in (asked, key[begin:end], value[begin:end]))
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
        begin, text = end, text + texts
    return torch.cat(outputs)


def _one_each(segments: Segments) -> Tensor:
    """Offsets of one query for each text: int32 [n + 1]."""
    offsets = segments.offsets
    return torch.arange(len(offsets), dtype=offsets.dtype, device=offsets.device)


AttentionInterface.register(_OWN, attention)
AttentionMaskInterface.register(_OWN, sdpa_mask)
