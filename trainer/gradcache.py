"""The gradient of a loss over a whole batch, computed chunk by chunk.

GradCache (Gao et al. 2021, arXiv 2101.06983): embed every chunk, take the loss's gradient at the embeddings, then
send each chunk's part of it back through the encoder. Order inside a batch does not change the loss, so rows are
sorted by length and cut by a token budget: padding is almost nothing. Chunks whose activations fit the memory
budget keep their graph from the first pass; only the rest are run again, with the same dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.tokens import Ragged
from trainer.clock import CPU, Mark, mark, seconds_between
from trainer.device import onto

Rows = np.ndarray  # the numbers of a chunk's rows; an empty chunk takes part in a collective forward only


def plan(lengths: np.ndarray, tokens_per_chunk: int, packed: bool = False) -> list[Rows]:
    """Cut rows into chunks of at most `tokens_per_chunk` tokens, longest rows first; padding counts, unless packed.

    The longest come first so that a run that will not fit in memory fails in its first step. A row longer than
    the budget makes a chunk of its own. Equal lengths keep their order: the plan is a function of the lengths.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    ends = np.cumsum(lengths[order], dtype=np.int64)
    chunks, start = [], 0
    while start < len(order):
        longest = int(lengths[order[start]])
        if packed:
            stop = int(np.searchsorted(ends, ends[start] - longest + tokens_per_chunk, side="right"))
        else:
            stop = start + tokens_per_chunk // max(1, longest)
        stop = max(stop, start + 1)
        chunks.append(order[start:stop])
        start = stop
    return chunks


def computed_tokens(lengths: np.ndarray, chunk: Rows, packed: bool = False) -> int:
    """Tokens that a chunk's forward pass computes: with padding, unless packed."""
    own = lengths[chunk]
    return int(own.sum(dtype=np.int64)) if packed else len(chunk) * int(own.max(initial=0))


def pad(tokens: Ragged, rows: Rows, padding_id: int = 0) -> tuple[Tensor, Tensor]:
    """The chosen rows as a rectangle: ids [n, T] and mask [n, T] (True on tokens), T the longest chosen length."""
    lengths = tokens.lengths[rows].astype(np.int64)
    columns = np.arange(lengths.max(initial=1))
    mask = columns < lengths[:, None]
    ids = np.full(mask.shape, padding_id, dtype=np.int64)
    ids[mask] = flat(tokens, rows)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def flat(tokens: Ragged, rows: Rows) -> np.ndarray:
    """The token ids of the chosen rows, one row after the other."""
    lengths = tokens.lengths[rows].astype(np.int64)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return tokens.ids[np.repeat(tokens.offsets[:-1][rows], lengths) + within]


@dataclass(frozen=True)
class Seconds:
    """Where a step's time went, by the marks between its parts."""

    begun: Mark
    encoded: Mark
    scored: Mark
    ended: Mark

    @property
    def encode(self) -> float:
        """Of the first pass."""
        return seconds_between(self.begun, self.encoded)

    @property
    def loss(self) -> float:
        """Of the loss with its collectives, and of its gradient at the embeddings."""
        return seconds_between(self.encoded, self.scored)

    @property
    def backward(self) -> float:
        """Of the backward passes through the encoder, replays included."""
        return seconds_between(self.scored, self.ended)


def forward_backward(
    embed: Callable[[Rows], Tensor],
    chunks: Sequence[Rows],
    keep: int,
    objective: Callable[[Tensor], tuple[Tensor, Any]],
    backward: Callable[[Tensor], object],
    *,
    seed: int,
    device: torch.device = CPU,
) -> tuple[Any, Seconds]:
    """Run one step's forward and backward; parameter gradients are left where `backward` puts them.

    Args:
        embed: rows -> their embeddings [len(rows), D], differentiable in the encoder's parameters.
        chunks: a partition of the batch's rows, from `plan`; empty chunks may follow.
        keep: the first `keep` chunks hold on to their graph between the passes; the rest are replayed.
        objective: embeddings of all rows [n, D] -> (scalar loss, figures for the log).
        backward: called with a scalar per chunk whose gradient is the chunk's share of the loss's.
        seed: of this step and rank; chunk i draws its dropout from (seed, i), so a replay draws the same.
        device: whose time is taken.

    Returns:
        The objective's figures, and the time split.
    """
    begun = mark(device)
    graphs, embeddings = _first_pass(embed, chunks, keep, seed)
    encoded = mark(device)
    loss, figures = objective(embeddings.requires_grad_())
    (gradient,) = torch.autograd.grad(loss, embeddings)
    # A loss that is not finite may have a gradient that is. Times 1, or NaN: so all ranks find that the gradient's norm
    # is not finite and leave the step out, without reading the loss on the host or asking each other.
    gradient *= 1 + 0 * loss.detach()
    scored = mark(device)
    for number, rows in enumerate(chunks):
        output = graphs[number]
        graphs[number] = None  # freed by its own backward, before the next chunk needs memory
        if output is None:
            output = _embed(embed, rows, seed, number)
        backward(_surrogate(output, gradient, rows))
    return figures, Seconds(begun, encoded, scored, mark(device))


def _first_pass(
    embed: Callable[[Rows], Tensor], chunks: Sequence[Rows], keep: int, seed: int
) -> tuple[list[Tensor | None], Tensor]:
    """Embed every chunk; return the outputs that keep their graph, and all embeddings in the batch's own order."""
    graphs: list[Tensor | None] = []
    embeddings = None
    for number, rows in enumerate(chunks):
        with torch.set_grad_enabled(number < keep):
            output = _embed(embed, rows, seed, number)
        graphs.append(output if number < keep else None)
        if embeddings is None:
            embeddings = output.new_empty(sum(map(len, chunks)), output.shape[1])
        if len(rows):
            embeddings[onto(torch.from_numpy(rows), output.device)] = output.detach()
    assert embeddings is not None, "a batch has rows"
    return graphs, embeddings


def _embed(embed: Callable[[Rows], Tensor], rows: Rows, seed: int, number: int) -> Tensor:
    torch.manual_seed((seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63)
    return embed(rows)


def _surrogate(output: Tensor, gradient: Tensor, rows: Rows) -> Tensor:
    """A scalar whose gradient at `output` is this chunk's part of the loss's gradient; zero for an empty chunk."""
    if len(rows) == 0:
        return output.sum() * 0.0
    return (output * gradient[onto(torch.from_numpy(rows), gradient.device)]).sum()


def activation_bytes(embed: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that a forward pass holds for its backward, beside the parameters: every saved storage counted once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    held: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return saved.detach()  # an output that its own graph held would never go

    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        output = embed()
    total = sum(held.values())
    del output  # only now may the storages go: until here no address could be used twice
    return total
