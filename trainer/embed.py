"""Texts to vectors: the forward pass alone, over any number of texts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.errors import UserError
from data.tokens import Ragged, TextEncoder, concat
from trainer import checkpoint
from trainer.encoder import Encoder, Model, open_model
from trainer.gradcache import Rows, pad, plan

log = logging.getLogger("quintet")

TOKENS_PER_CHUNK = 16_384
_TEXTS_PER_PIECE = 16_384  # tokenised at once: the tokenizer's own records take some hundred bytes a token


def encode(
    encoder: Encoder,
    tokens: Ragged,
    *,
    tokens_per_chunk: int = TOKENS_PER_CHUNK,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    agree_max: Callable[[int], int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Embed n texts, without dropout and gradients: fp32 [n, D] on the host, in the order given.

    Args:
        encoder: on `device`; it is left in the mode (train or eval) it came in.
        tokens: the texts' ids; texts of similar length share a chunk.
        tokens_per_chunk: padded tokens of one forward at most, but at least one text.
        precision: fp32, or bf16 for autocast.
        agree_max: where a forward is a collective (ZeRO-3), the largest of all ranks' values: ranks with fewer
            chunks then run one-token chunks for the rest.
        progress: called with the number of texts done after every chunk.
    """
    chunks = plan(tokens.lengths, tokens_per_chunk)
    rounds = agree_max(len(chunks)) if agree_max else len(chunks)
    vectors = torch.empty(len(tokens), encoder.size)
    training = encoder.training
    encoder.eval()
    try:
        # No inference mode: tensors made in it could not be used in a backward pass later, and ZeRO-3 keeps
        # parameters that it has gathered here.
        with torch.no_grad(), _autocast(torch.device(device), precision):
            for rows in chunks:
                vectors[torch.from_numpy(rows)] = _forward(encoder, tokens, rows, device).cpu()
                if progress:
                    progress(len(rows))
            for _ in range(rounds - len(chunks)):
                one = torch.zeros(1, 1, dtype=torch.int64, device=device)
                encoder(one, one == 0)
    finally:
        encoder.train(training)
    return vectors


def _forward(encoder: Encoder, tokens: Ragged, rows: Rows, device: torch.device | str) -> Tensor:
    ids, mask = pad(tokens, rows)
    vectors: Tensor = encoder(ids.to(device), mask.to(device))
    return vectors.float()


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def encode_texts(
    model: Model,
    texts: Sequence[str],
    prompt: str = "",
    *,
    tokens_per_chunk: int = TOKENS_PER_CHUNK,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    agree_max: Callable[[int], int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Embed prompt + text for every text, cut to the model's length: fp32 [n, D] on the host.

    The other arguments are those of `encode`.
    """
    cutter = TextEncoder(model.tokenizer, model.max_length)
    starts = range(0, len(texts), _TEXTS_PER_PIECE)
    tokens = concat([cutter.encode(texts[start : start + _TEXTS_PER_PIECE], prompt) for start in starts])
    return encode(
        model.encoder,
        tokens,
        tokens_per_chunk=tokens_per_chunk,
        device=device,
        precision=precision,
        agree_max=agree_max,
        progress=progress,
    )


# --- what the stages that use a model have in common -----------------------------------------------------------


def load_model(path: str, device: torch.device) -> Model:
    """Open a model folder, a hub id, a checkpoint, or a run folder: its exported model, else its newest checkpoint.

    Raises:
        UserError: there is no model, or the run has none yet.
    """
    folder = Path(path)
    if (folder / checkpoint.MANIFEST).is_file():
        source = checkpoint.load(folder, deep=True).folder / "model"
    elif (folder / "config.yaml").is_file():
        source = _model_of_run(folder)
    else:
        return open_model(path, device=device)
    return replace(open_model(source, device=device), name=folder.resolve().name)


def _model_of_run(run_dir: Path) -> Path:
    if (run_dir / "model").is_dir():
        return run_dir / "model"
    newest = checkpoint.newest(run_dir)
    if newest is None:
        raise UserError(f"model={run_dir}: this run has neither a model/ nor a checkpoint yet; train it first")
    log.info("%s has no model/ yet: its checkpoint of step %d is used", run_dir, newest.step)
    return newest.folder / "model"


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done: a bar on a terminal, and one line at the end.

    Yields the function to call with every further number done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    begin = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
    log.info("%s: %d in %.1f s", what, total, time.perf_counter() - begin)
