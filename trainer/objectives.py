"""What a batch's embeddings are asked to be: an objective maps embeddings to a loss and figures for the log.

Every loss is a mean over this rank's own queries, all ranks have equally many, and the engine averages over ranks: so
the gradient is that of one process with the whole batch, for every term here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.collate import Batch
from trainer import distributed
from trainer.device import full_products, onto
from trainer.losses import (
    NO_FILTERS,
    NO_OWNER,
    Filters,
    Identity,
    Pool,
    distance_to,
    info_nce,
    kl_to_teacher,
    margin_mse,
)

Figures = dict[str, Tensor]

DISTILLATIONS = {"kl": kl_to_teacher, "margin_mse": margin_mse}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the losses of embeddings may do beyond E5's; nothing of it by default.

    both_directions: passages are asked for their query too; the mean of the two losses.
    same_tower: the queries of other rows are candidates too.
    margin, teacher_margin: see `Filters.margin`; the same for a hard negative's teacher logit.
    guide: embeds the batch's texts with another model, [n, E]; guide_margin: see `Filters`; guide_weight: of
        `distance_to` the guide's embeddings, beside 1 for the contrastive loss and for KL.
    sizes: (numbers, weight) of shorter embeddings that get the same loss, beside the whole one with weight 1
        (Matryoshka: Kusupati et al. 2022, arXiv 2205.13147).
    """

    both_directions: bool = False
    same_tower: bool = False
    margin: float | None = None
    teacher_margin: float | None = None
    guide: Callable[[Batch], Tensor] | None = None
    guide_margin: float | None = 0.0
    guide_weight: float = 0.0
    sizes: tuple[tuple[int, float], ...] = ()


PLAIN = Options()


def contrastive(
    embeddings: Tensor, batch: Batch, *, temperature: float, options: Options = PLAIN
) -> tuple[Tensor, Figures]:
    """InfoNCE of the local queries against the passages of all ranks.

    Args:
        embeddings: [n, D] of this rank's texts, in the order of the batch: queries, positives, negatives.
        batch: says which row is what.
        temperature: divisor of the similarities.

    Returns:
        This rank's mean loss (the engine averages over ranks) and figures by metric name.
    """
    scene = _scene(embeddings, batch, options)
    with full_products():
        whole, figures = _contrast(scene, temperature)
        loss = whole
        for size, weight in options.sizes:
            loss = loss + weight * _contrast(scene.cut(size), temperature)[0]
    imitation, more = _imitate(embeddings, scene, options)
    loss = loss + imitation
    return loss, {"train/loss": loss.detach(), "train/loss_contrastive": whole.detach(), **figures, **more}


def distillation(
    embeddings: Tensor,
    batch: Batch,
    *,
    temperature: float,
    alpha: float,
    term: str = "kl",
    options: Options = PLAIN,
) -> tuple[Tensor, Figures]:
    """The distance to the teacher over each query's own group, plus alpha x InfoNCE.

    E5's fine-tuning. A query without teacher scores, as those of NLI, has the second term alone. Its weight there is
    alpha too: what it was is not published. `term` is one of DISTILLATIONS; the rest is as for `contrastive`.
    """
    assert batch.scores is not None, "a batch for distillation has scores, if only NaN"
    teacher = onto(torch.from_numpy(batch.scores), embeddings.device)
    scene = _scene(embeddings, batch, options)
    hidden = _equal_to_positive(batch, embeddings.device)
    distill = DISTILLATIONS[term]
    loss = torch.zeros((), device=embeddings.device)
    parts: Figures = {}
    with full_products():
        for size, weight in ((0, 1.0), *options.sizes):
            at_size = scene.cut(size) if size else scene
            to_teacher = distill(at_size.own_similarity(), teacher, temperature=temperature, hidden=hidden)
            contrast, figures = _contrast(at_size, temperature)
            loss = loss + weight * (to_teacher + alpha * contrast)
            if not size:
                parts = {
                    "train/loss_contrastive": contrast.detach(),
                    "train/loss_distill": to_teacher.detach(),
                    **figures,
                }
    imitation, more = _imitate(embeddings, scene, options)
    loss = loss + imitation
    scored = (~teacher.isnan()).all(1).float().mean()
    return loss, {"train/loss": loss.detach(), **parts, **more, "data/scored_frac": scored}


def ranking(logits: Tensor, batch: Batch) -> tuple[Tensor, Figures]:
    """Listwise softmax of a cross-encoder: -log softmax of the positive's logit among those of its own group.

    The re-ranker's loss of SimLM (Wang et al. 2022, arXiv 2207.02578), without its R-Drop.

    Args:
        logits: [b(1 + k), 1] of this rank's joint rows: the positives, then k negatives of each query.
        batch: says which row is what. A negative with the positive's text is left out.

    Returns:
        This rank's mean loss over its queries and figures by metric name.
    """
    groups = _groups(logits.float()[:, 0], batch)
    groups = groups.masked_fill(_equal_to_positive(batch, logits.device), float("-inf"))
    loss = F.cross_entropy(groups, groups.new_zeros(len(groups), dtype=torch.int64))
    first = (groups.detach().argmax(1) == 0).float().mean()
    return loss, {"train/loss": loss.detach(), "train/loss_ranking": loss.detach(), "train/acc_top1": first}


def _groups(passages: Tensor, batch: Batch) -> Tensor:
    """[b(1 + k), ...] in the order of the batch to [b, 1 + k, ...]: each query's positive, then its negatives."""
    b, k = batch.num_queries, batch.num_negatives
    positive, negatives = passages.split([b, b * k])
    return torch.cat([positive[:, None], negatives.unflatten(0, (b, k))], dim=1)


def _equal_to_positive(batch: Batch, device: torch.device) -> Tensor:
    """bool [b, 1 + k]: the negatives that have the text of their query's positive."""
    groups = batch.group_hash
    equal = torch.from_numpy(groups == groups[:, :1])
    equal[:, 0] = False
    return onto(equal, device)


# --- the contrastive terms ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """One direction: local rows [b, D] look for their own among candidates [G, D]."""

    rows: Tensor
    candidates: Tensor
    identity: Identity
    filters: Filters

    def cut(self, size: int) -> _Side:
        return replace(self, rows=_shortened(self.rows, size), candidates=_shortened(self.candidates, size))


@dataclass(frozen=True)
class _Scene:
    """A batch as its losses see it: the directions, each query's own group [b, 1 + k, D], and the guide's vectors."""

    sides: tuple[_Side, ...]
    group: Tensor
    guided: Tensor | None = None

    def cut(self, size: int) -> _Scene:
        """The same with only the first numbers of every embedding, at unit length again."""
        return _Scene(tuple(side.cut(size) for side in self.sides), _shortened(self.group, size))

    def own_similarity(self) -> Tensor:
        """[b, 1 + k] of every query with its own group."""
        return (self.sides[0].rows.float()[:, None] * self.group.float()).sum(-1)


def _shortened(vectors: Tensor, size: int) -> Tensor:
    return F.normalize(vectors[..., :size], dim=-1)


def _contrast(scene: _Scene, temperature: float) -> tuple[Tensor, Figures]:
    """The mean of the directions' losses, and the figures of the first, from queries to passages."""
    found = [
        info_nce(side.rows, side.candidates, side.identity, temperature=temperature, filters=side.filters)
        for side in scene.sides
    ]
    loss = found[0][0] if len(found) == 1 else torch.stack([loss for loss, _ in found]).mean()
    pool: Pool = found[0][1]
    figures = {
        "train/acc_top1": pool.accuracy,
        "train/pos_sim": pool.positive_similarity,
        "train/neg_sim": pool.negative_similarity,
    }
    return loss, figures


def _scene(embeddings: Tensor, batch: Batch, options: Options) -> _Scene:
    """Gather what the losses need. All ranks take the same options, so all come to the same collectives."""
    device = embeddings.device
    pairs = _directions(embeddings, batch, options)
    guided = options.guide(batch).to(device) if options.guide else None
    judges = None if options.guide_margin is None else guided
    guides = [None] * len(pairs) if judges is None else _directions(judges, batch, options)
    who = identity(batch, device)
    sides = [_Side(*pairs[0], _with_queries(who, batch) if options.same_tower else who, NO_FILTERS)]
    if options.both_directions:
        sides.append(_Side(*pairs[1], _reversed(who, batch), NO_FILTERS))
    filtered = [
        replace(side, filters=_filters(batch, side.identity, options, guide, reverse=number > 0))
        for number, (side, guide) in enumerate(zip(sides, guides, strict=True))
    ]
    return _Scene(tuple(filtered), _groups(embeddings[batch.num_queries :], batch), guided)


def _imitate(embeddings: Tensor, scene: _Scene, options: Options) -> tuple[Tensor, Figures]:
    """The weighted distance of the local embeddings to the guide's, where it is asked for."""
    if scene.guided is None or not options.guide_weight:
        return embeddings.new_zeros(()), {}
    distance = distance_to(embeddings, scene.guided)
    return options.guide_weight * distance, {"train/loss_guide": distance.detach()}


def _directions(vectors: Tensor, batch: Batch, options: Options) -> list[tuple[Tensor, Tensor]]:
    """(local rows, candidates of all ranks): queries to passages, and positives to queries when asked for."""
    query, passage = vectors.split([batch.num_queries, len(vectors) - batch.num_queries])
    passages = distributed.gather_rows(passage)
    if not (options.both_directions or options.same_tower):
        return [(query, passages)]
    queries = distributed.gather_rows(query)
    forward = (query, torch.cat([passages, queries]) if options.same_tower else passages)
    return [forward, (passage[: batch.num_queries], queries)] if options.both_directions else [forward]


def _filters(
    batch: Batch, who: Identity, options: Options, guide: tuple[Tensor, Tensor] | None, *, reverse: bool
) -> Filters:
    """What is hidden in one direction. In reverse a row's own group is its query alone."""
    device, hidden = who.query.device, None
    if options.teacher_margin is not None and batch.scores is not None and not reverse:
        hidden = onto(torch.from_numpy(batch.scores > batch.scores[:, :1] + options.teacher_margin), device)
    own_only = None if batch.own_only is None else onto(torch.from_numpy(batch.own_only), device)
    if options.margin is None and guide is None and hidden is None and own_only is None:
        return NO_FILTERS
    group = who.positive[:, None]
    if not reverse:
        first = int(who.positive[0]) + batch.num_queries
        negatives = torch.arange(first, first + batch.num_queries * batch.num_negatives, device=device)
        group = torch.cat([group, negatives.view(batch.num_queries, batch.num_negatives)], dim=1)
    return Filters(options.margin, guide, options.guide_margin or 0.0, group, hidden, own_only)


def identity(batch: Batch, device: torch.device) -> Identity:
    """The hashes of the gathered pool, and where this rank's positives stand in it.

    A rank's passages are its positives, then its hard negatives, so the positive of local query i on rank r is
    column r * b(1 + k) + i. One gather of two integers a passage.
    """
    query = torch.from_numpy(batch.query_hash)
    passage = torch.from_numpy(batch.passage_hash)
    owner = torch.cat([query, query.new_full((len(passage) - len(query),), NO_OWNER)])
    pool = distributed.gather_rows(onto(torch.stack([passage, owner], dim=1), device))
    first = distributed.rank() * len(passage)
    positive = torch.arange(first, first + len(query), device=device)
    return Identity(onto(query, device), positive, pool[:, 0].contiguous(), pool[:, 1].contiguous())


def _with_queries(who: Identity, batch: Batch) -> Identity:
    """Of candidates that are all passages, then all queries."""
    query, positive = _pairs(who, batch)
    return replace(
        who,
        passage=torch.cat([who.passage, query]),
        owner=torch.cat([who.owner, query]),
        partner=torch.cat([torch.full_like(who.passage, NO_OWNER), positive]),
    )


def _reversed(who: Identity, batch: Batch) -> Identity:
    """Of positives that look for their query: a query is hidden when it has the same text, or the same positive."""
    query, positive = _pairs(who, batch)
    first = distributed.rank() * batch.num_queries
    own = torch.arange(first, first + batch.num_queries, device=query.device)
    return Identity(positive[own], own, query, positive)


def _pairs(who: Identity, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hashes of all ranks' queries and of their positives."""
    ranks = (distributed.world(), len(who.passage) // distributed.world())
    owner, passage = who.owner.view(ranks), who.passage.view(ranks)
    return owner[:, : batch.num_queries].reshape(-1), passage[:, : batch.num_queries].reshape(-1)
