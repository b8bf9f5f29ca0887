"""What a batch's embeddings are asked to be: an objective maps embeddings to a loss and figures for the log."""

from __future__ import annotations

import torch
from torch import Tensor

from data.collate import Batch
from trainer import distributed
from trainer.device import full_products
from trainer.losses import NO_OWNER, Identity, info_nce

Figures = dict[str, Tensor]


def contrastive(embeddings: Tensor, batch: Batch, *, temperature: float) -> tuple[Tensor, Figures]:
    """InfoNCE of the local queries against the passages of all ranks.

    Args:
        embeddings: [n, D] of this rank's texts, in the order of the batch: queries, positives, negatives.
        batch: says which row is what.
        temperature: divisor of the similarities.

    Returns:
        This rank's mean loss (the engine averages over ranks) and figures by metric name.
    """
    query, passage = embeddings[: batch.num_queries], embeddings[batch.num_queries :]
    with full_products():
        loss, pool = info_nce(
            query, distributed.gather_rows(passage), identity(batch, query.device), temperature=temperature
        )
    figures = {
        "train/loss": loss.detach(),
        "train/loss_contrastive": loss.detach(),
        "train/acc_top1": pool.accuracy,
        "train/pos_sim": pool.positive_similarity,
        "train/neg_sim": pool.negative_similarity,
    }
    return loss, figures


def identity(batch: Batch, device: torch.device) -> Identity:
    """The hashes of the gathered pool, and where this rank's positives stand in it.

    A rank's passages are its positives, then its hard negatives, so the positive of local query i on rank r is
    column r * b(1 + k) + i. One gather of two integers a passage.
    """
    query = torch.from_numpy(batch.query_hash)
    passage = torch.from_numpy(batch.passage_hash)
    owner = torch.cat([query, query.new_full((len(passage) - len(query),), NO_OWNER)])
    pool = distributed.gather_rows(torch.stack([passage, owner], dim=1).to(device))
    first = distributed.rank() * len(passage)
    positive = torch.arange(first, first + len(query), device=device)
    return Identity(query.to(device), positive, pool[:, 0].contiguous(), pool[:, 1].contiguous())
