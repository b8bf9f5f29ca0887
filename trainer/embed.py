"""Texts to vectors: the forward pass alone, over any number of texts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import xxhash
from torch import Tensor, nn

from data.errors import NumericError, UserError
from data.tokens import Ragged, concat
from data.tokens import fingerprint as tokenizer_fingerprint
from trainer import checkpoint
from trainer.attention import feed
from trainer.cores import each_on_a_core
from trainer.device import chunk_tokens
from trainer.encoder import Encoder, Model, open_model
from trainer.gradcache import Rows, plan

if TYPE_CHECKING:
    from trainer.crossencoder import CrossEncoder

log = logging.getLogger("quintet")

_TEXTS_PER_PIECE = 16_384  # tokenised at once: the tokenizer's own records take some hundred bytes a token
_SECONDS_BETWEEN_LINES = 15.0


class Progress(Protocol):
    """Told of every further number of texts done, which may be a broken one, and of their tokens."""

    def __call__(self, texts: float, tokens: int = 0) -> None: ...


def encode(
    encoder: Encoder | CrossEncoder,
    tokens: Ragged,
    *,
    tokens_per_chunk: int | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    agree_max: Callable[[int], int] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Embed n texts, without dropout and gradients: fp32 [n, D] on the host, in the order given.

    Args:
        encoder: on `device`; it is left in the mode (train or eval) it came in. A cross-encoder gives logits, D = 1.
        tokens: the texts' ids; texts of similar length share a chunk.
        tokens_per_chunk: padded tokens of one forward at most, but at least one text; None: what suits the device.
        precision: fp32, or bf16 for autocast.
        agree_max: where a forward is a collective (ZeRO-3), the largest of all ranks' values: ranks with fewer
            chunks then run one-token chunks for the rest.
        progress: called after every chunk.
    """
    device = torch.device(device)
    packed = may_pack(encoder, device, precision)
    chunks = plan(tokens.lengths, chunk_tokens(tokens_per_chunk, device, half=precision != "fp32"), packed)
    rounds = agree_max(len(chunks)) if agree_max else len(chunks)
    vectors = torch.empty(len(tokens), encoder.size)
    training = encoder.training

    def forward(rows: Rows) -> Tensor:
        # No inference mode: tensors made in it could not be used in a backward pass later, and ZeRO-3 keeps
        # parameters that it has gathered here.
        with torch.no_grad(), _autocast(device, precision):
            return feed(encoder, tokens, rows, device, packed=packed)

    encoder.eval()
    try:
        embedded = forwards(forward, chunks, device, collective=agree_max is not None)
        for rows, found in zip(chunks, embedded, strict=True):
            vectors[torch.from_numpy(rows)] = found
            if progress:
                progress(len(rows), int(tokens.lengths[rows].sum()))
        with torch.no_grad(), _autocast(device, precision):
            for _ in range(rounds - len(chunks)):
                one = torch.zeros(1, 1, dtype=torch.int64, device=device)
                encoder(one, one == 0)
    finally:
        encoder.train(training)
    return vectors


def may_pack(encoder: Encoder | CrossEncoder, device: torch.device, precision: str) -> bool:
    """Whether texts are read without padding: on a GPU in the types that its kernel has, on a CPU in all."""
    return encoder.packable and (device.type == "cpu" or (device.type == "cuda" and precision in ("bf16", "fp16")))


def forwards(
    forward: Callable[[Rows], Tensor], chunks: Sequence[Rows], device: torch.device, *, collective: bool = False
) -> Iterator[Tensor]:
    """What `forward` gives for each of the chunks, in their order and on the host.

    A CPU works on several at once, in threads, unless forward passes are collectives; a GPU gets the next one's work
    before the last one's result is waited for.
    """
    side_by_side = device.type == "cpu" and not collective
    return _on_the_host(each_on_a_core(forward, chunks) if side_by_side else map(forward, chunks))


def _on_the_host(found: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same tensors on the host, each given out when the next one's work has been handed to the device."""
    waiting: tuple[Tensor, torch.cuda.Event | None] | None = None
    for tensor in found:
        copied, done = tensor.to("cpu", non_blocking=True), None
        if tensor.is_cuda:
            done = torch.cuda.Event()
            done.record()
        if waiting:
            yield _arrived(*waiting)
        waiting = copied, done
    if waiting:
        yield _arrived(*waiting)


def _arrived(copied: Tensor, done: torch.cuda.Event | None) -> Tensor:
    if done:
        done.synchronize()
    return copied


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def encode_texts(
    model: Model,
    texts: Sequence[str],
    prompt: str = "",
    *,
    tokens_per_chunk: int | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    agree_max: Callable[[int], int] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Embed prompt + text for every text, cut to the model's length: fp32 [n, D] on the host.

    The other arguments are those of `encode`.
    """
    starts = range(0, len(texts), _TEXTS_PER_PIECE)
    tokens = concat([model.text_encoder.encode(texts[start : start + _TEXTS_PER_PIECE], prompt) for start in starts])
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


def load_model(path: str, device: torch.device, max_length: int | None = None) -> Model:
    """Open a model folder, a hub id, a checkpoint, or a run folder: its exported model, else its newest checkpoint.

    Args:
        max_length: tokens of a text at most, instead of the model's own.

    Raises:
        UserError: there is no model, the run has none yet, or it takes no texts of that length.
    """
    folder = Path(path)
    if (folder / checkpoint.MANIFEST).is_file():
        source = checkpoint.load(folder, deep=True).folder / "model"
    elif (folder / "config.yaml").is_file():
        source = _model_of_run(folder)
    else:
        return _cut(open_model(path, device=device), max_length)
    return _cut(replace(open_model(source, device=device), name=folder.resolve().name), max_length)


def _cut(model: Model, max_length: int | None) -> Model:
    longest = model.encoder.max_positions
    if max_length is not None and max_length > longest:
        raise UserError(f"max_length={max_length}: this model takes at most {longest} tokens")
    return model if max_length is None else replace(model, max_length=max_length)


def _model_of_run(run_dir: Path) -> Path:
    if (run_dir / "model").is_dir():
        return run_dir / "model"
    newest = checkpoint.newest(run_dir)
    if newest is None:
        raise UserError(f"model={run_dir}: this run has neither a model/ nor a checkpoint yet; train it first")
    log.info("%s has no model/ yet: its checkpoint of step %d is used", run_dir, newest.step)
    return newest.folder / "model"


@dataclass(frozen=True, eq=False)
class Embedder:
    """A model and how it is run: texts, prompts included, to vectors."""

    model: Model
    device: torch.device
    precision: str = "fp32"
    tokens_per_chunk: int | None = None

    def __call__(self, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
        """fp32 [n, D] on the host, in the order given. Raises NumericError when one is not finite."""
        return self._checked(
            encode_texts(
                self.model,
                texts,
                tokens_per_chunk=self.tokens_per_chunk,
                device=self.device,
                precision=self.precision,
                progress=progress,
            )
        )

    def tokens(self, tokens: Ragged, progress: Progress | None = None) -> Tensor:
        """The same for texts that are token ids already."""
        return self._checked(
            encode(
                self.model.encoder,
                tokens,
                tokens_per_chunk=self.tokens_per_chunk,
                device=self.device,
                precision=self.precision,
                progress=progress,
            )
        )

    def _checked(self, vectors: Tensor) -> Tensor:
        if not torch.isfinite(vectors).all():
            raise NumericError(
                f"model={self.model.name}: it gives vectors with NaN or infinity; its weights are broken"
            )
        return vectors

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides a vector, down to its last bits, as plain data for plans and reports."""
        model = self.model
        return {
            "weights": weights_hash(model.encoder),
            "tokenizer": tokenizer_fingerprint(model.tokenizer),
            "query_prompt": model.query_prompt,
            "passage_prompt": model.passage_prompt,
            "max_length": model.max_length,
            "pooling": model.pooling,
            "normalize": model.normalize,
            "precision": self.precision,
            "tokens_per_chunk": chunk_tokens(self.tokens_per_chunk, self.device, half=self.precision != "fp32"),
            "device": self.device.type,
        }


def weights_hash(module: nn.Module) -> str:
    """XXH3 of a module's names and weights, in hex."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Rate:
    """Texts and tokens a second, and the time left, of work whose size is known."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.tokens = total, 0.0, 0
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def add(self, texts: float, tokens: int = 0) -> None:
        self.done += texts
        self.tokens += tokens

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        rates = [f"{_short(self.done / seconds)} a second"]
        if self.tokens:
            rates.append(f"{_short(self.tokens / seconds)} tokens a second")
        if 0 < self.done < self.total - 0.5:
            rates.append(f"{_clock((self.total - self.done) * seconds / self.done)} left")
        return ", ".join(rates)


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


_listeners: list[Callable[[str, Rate], object]] = []


@contextmanager
def listening(told: Callable[[str, Rate], object]) -> Iterator[None]:
    """Tell of every bar inside, now and then and at its end: what it counts, and how far it is."""
    _listeners.append(told)
    try:
        yield
    finally:
        _listeners.remove(told)


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Progress]:
    """Show how many of `total` are done, at what rate, and the time left.

    A bar on a terminal; elsewhere a line every few seconds; and a line at the end. Yields the function to call with
    every further number done, and with the tokens of those texts.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    rate, console = Rate(total), Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    last = time.monotonic()
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total, rate="")

        def advance(texts: float, tokens: int = 0) -> None:
            nonlocal last
            rate.add(texts, tokens)
            bars.update(task, advance=texts, rate=str(rate))
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                if not console.is_terminal:
                    log.info("%s: %s of %s, %s", what, f"{rate.done:,.0f}", f"{total:,}", rate)
                for told in _listeners:
                    told(what, rate)

        yield advance
    log.info("%s: %s in %.1f s, %s", what, f"{total:,}", rate.seconds, rate)
    for told in _listeners:
        told(what, rate)
