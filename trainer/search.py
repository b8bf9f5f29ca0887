"""Stage `search`: embed texts once, then rank them for every question."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.errors import NumericError, UserError
from data.settings import key

if TYPE_CHECKING:
    import torch

    from trainer.embed import Progress
    from trainer.encoder import Model

_SHOWN = 300  # characters of a passage on the screen


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet search`."""

    model: str = key(help="model folder, run folder, or hub id")
    input: str = key(help="what is searched: text file (one a line), JSONL with text or passage, or BEIR folder")
    query: str | list[str] = key([], help="questions; none: asked for, one a line")
    top_k: int = key(5, help="passages shown for each question", low=1)
    tokens_per_chunk: int | None = key(
        None, help="padded tokens of one forward pass; null: 65536 on a GPU, 2048 on a CPU", low=1
    )
    precision: str = key("fp32", help="matrix products", choices=("fp32", "bf16"))
    device: str = key("auto", help="where to compute; auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))


def run(config: Config) -> None:
    """Print the best passages of the input for every question, with their scores (inner products).

    Raises:
        UserError: missing model or input, or nothing to search in.
    """
    from trainer import sets
    from trainer.device import pick_device
    from trainer.embed import load_model, progress_bar

    device = pick_device(config.device)
    passages = sets.corpus(config.input)
    model = load_model(config.model, device)
    with progress_bar(len(passages), "passages embedded") as progress:
        vectors = _embed(model, passages, model.passage_prompt, config, device, progress)
    questions = [config.query] if isinstance(config.query, str) else config.query
    for question in questions or _asked():
        found = _embed(model, [question], model.query_prompt, config, device)
        _print_best(question, found, vectors, passages, config.top_k, device)


def _embed(
    model: Model,
    texts: Sequence[str],
    prompt: str,
    config: Config,
    device: torch.device,
    progress: Progress | None = None,
) -> torch.Tensor:
    import torch

    from trainer.embed import encode_texts

    vectors = encode_texts(
        model,
        texts,
        prompt,
        tokens_per_chunk=config.tokens_per_chunk,
        device=device,
        precision=config.precision,
        progress=progress,
    )
    if not torch.isfinite(vectors).all():
        raise NumericError(f"model={config.model}: it gives vectors with NaN or infinity; its weights are broken")
    return vectors


def _asked() -> Iterator[str]:
    """Questions from the standard input, up to its end; on a terminal with a prompt."""
    prompt = "question (Ctrl-D ends): " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"query: the standard input is no UTF-8 ({error.reason})") from None
        if question:
            yield question


def _print_best(
    question: str, found: torch.Tensor, vectors: torch.Tensor, passages: Sequence[str], k: int, device: torch.device
) -> None:
    from trainer.topk import top_k

    scores, numbers = top_k(found, vectors, k, device=device)
    print(f"\n{question}")
    for place, (score, number) in enumerate(zip(scores[0].tolist(), numbers[0].tolist(), strict=True), start=1):
        text = passages[number]
        print(f"{place:3d}  {score:.3f}  {text[:_SHOWN]}{'…' if len(text) > _SHOWN else ''}", flush=True)
