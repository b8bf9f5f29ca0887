"""One training step: a batch in, an updated model out. The same at any world size, ZeRO stage and chunk size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.collate import Batch
from trainer import distributed, gradcache
from trainer.attention import feed
from trainer.clock import Mark, mark, seconds_between
from trainer.device import GRAPHS_SHARE, free_memory
from trainer.engine import Engine
from trainer.gradcache import Rows, Seconds
from trainer.objectives import Figures
from trainer.words import Words, shared

Objective = Callable[[Tensor, Batch], tuple[Tensor, Figures]]


@dataclass(frozen=True)
class Outcome:
    """What a step did on this rank. `applied` and `grad_norm` are the same on every rank."""

    figures: Figures
    applied: bool
    grad_norm: float
    seconds: Seconds
    gathers: list[tuple[Mark, Mark]]  # begin and end of each collective within the loss
    updated: Mark
    tokens: int
    computed_tokens: int  # with padding
    chunks: int
    kept: int

    @property
    def gather_seconds(self) -> float:
        """In collectives of the loss, waiting for the slowest rank included."""
        return sum(seconds_between(*marks) for marks in self.gathers)

    @property
    def optimizer_seconds(self) -> float:
        """From the end of the backward passes until the weights are new."""
        return seconds_between(self.seconds.ended, self.updated)


@dataclass
class Stepper:
    """Runs steps of one engine.

    tokens_per_chunk bounds one forward pass; memory_budget (bytes; None: GRAPHS_SHARE of what is free) bounds the
    graphs kept between the passes; packed feeds texts without padding; share_words looks word vectors up once a step
    (see words.py).
    """

    engine: Engine
    objective: Objective
    seed: int
    padding_id: int
    tokens_per_chunk: int
    memory_budget: float | None = None
    packed: bool = False
    share_words: bool = True
    _bytes_per_token: float = field(default=0.0, init=False)

    def __call__(self, batch: Batch, step: int, lr: float) -> Outcome:
        """Train on this rank's share of global batch number `step` at learning rate `lr`."""
        chunks, keep = self._plan(batch)
        distributed.take_gathers()  # of what came before the step
        with self.engine.accumulate(), self._words(batch) as words:
            figures, seconds = gradcache.forward_backward(
                lambda rows: self._embed(batch, rows),
                chunks,
                keep,
                lambda embeddings: self.objective(embeddings, batch),
                self.engine.backward,
                seed=self._dropout_seed(step),
                device=self.engine.device,
            )
            gathers = distributed.take_gathers()
            if words:
                words.pass_on(self.engine.backward)
        applied = self.engine.step(lr)
        lengths = batch.tokens.lengths
        computed = sum(gradcache.computed_tokens(lengths, rows, self.packed) for rows in chunks)
        return Outcome(
            figures,
            applied,
            self.engine.grad_norm,
            seconds,
            gathers,
            mark(self.engine.device),
            int(lengths.sum()),
            computed,
            len(chunks),
            keep,
        )

    def _words(self, batch: Batch) -> AbstractContextManager[Words | None]:
        """The batch's word vectors, where they are trained, whole on every rank, and looked up in the plain way."""
        backbone: Any = self.engine.module.backbone
        table = backbone.get_input_embeddings()
        plain = type(table) is nn.Embedding and table.weight.requires_grad
        if not (self.share_words and plain and self.engine.stage < 3):
            return nullcontext()
        return shared(table, np.append(batch.tokens.ids, self.padding_id))

    def _dropout_seed(self, step: int) -> int:
        """Of (run, step, rank): nothing of the random state is saved, and a resumed step draws what it drew."""
        state = np.random.SeedSequence([self.seed, step, distributed.rank()]).generate_state(1, np.uint64)
        return int(state[0] >> 1)

    def _plan(self, batch: Batch) -> tuple[list[Rows], int]:
        """The batch's chunks, and how many of them keep their graph."""
        chunks = gradcache.plan(batch.tokens.lengths, self.tokens_per_chunk, self.packed)
        if not self._bytes_per_token:
            self._measure(batch, chunks[0])
        if self.engine.stage < 3:
            return chunks, self._fitting(batch, chunks)
        # Every forward gathers parameters: all ranks run the same number of first passes and of replays.
        missing = distributed.agree_max(len(chunks)) - len(chunks)
        chunks += [np.empty(0, dtype=np.int64)] * missing
        return chunks, distributed.agree_min(self._fitting(batch, chunks))

    def _measure(self, batch: Batch, longest: Rows) -> None:
        """Find the bytes that a token's graph holds, on the chunk of the longest texts, which need the most."""
        parameters = self.engine.module.parameters()
        held = gradcache.activation_bytes(lambda: self._embed(batch, longest), parameters)
        self._bytes_per_token = held / gradcache.computed_tokens(batch.tokens.lengths, longest, self.packed)
        if self.memory_budget is None:
            device = self.engine.device
            self.memory_budget = GRAPHS_SHARE[device.type] * free_memory(device)

    def _fitting(self, batch: Batch, chunks: list[Rows]) -> int:
        assert self.memory_budget is not None, "measured first"
        lengths = batch.tokens.lengths
        tokens = np.cumsum([gradcache.computed_tokens(lengths, rows, self.packed) for rows in chunks])
        return int((tokens * self._bytes_per_token <= self.memory_budget).sum())

    def _embed(self, batch: Batch, rows: Rows) -> Tensor:
        """Embeddings [len(rows), D] of some of the batch's texts; an empty chunk runs one token and is ignored."""
        device = self.engine.device
        if len(rows) == 0:
            one = torch.full((1, 1), self.padding_id, device=device)
            embedded: Tensor = self.engine(one, torch.ones_like(one, dtype=torch.bool))
            return embedded
        return feed(self.engine, batch.tokens, rows, device, packed=self.packed, padding_id=self.padding_id)
