"""One rank leads, all embed: rank 0 reads data and works out scores, and the others embed their share of its texts.

So code that knows nothing of ranks, such as a benchmark's, gets the speed of all of them, reads every file once and
cannot take another path on another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.errors import NumericError, QuintetError
from trainer import distributed
from trainer.embed import Progress, encode_texts, progress_bar
from trainer.encoder import Model
from trainer.retrieval import Ranks

_FEW_TEXTS = 2_000


@dataclass(frozen=True, eq=False)
class SharedEncoder:
    """Texts, prompts included, to vectors, on all ranks of the job. Rank 0 calls it, within `lead`."""

    model: Model
    device: torch.device
    precision: str = "fp32"
    tokens_per_chunk: int | None = None

    def __call__(self, texts: Sequence[str], *, normalize: bool | None = None) -> Tensor:
        """fp32 [n, D] on the host, in the order given.

        Args:
            normalize: whether vectors have length 1; None: as the model says.

        Raises:
            NumericError: a vector is not finite.
        """
        length_one = self.model.normalize if normalize is None else normalize
        vectors = self._embed(*_announce((list(texts), length_one)))
        if not torch.isfinite(vectors).all():
            raise NumericError(
                f"model={self.model.name}: it gives vectors with NaN or infinity; its weights are broken"
            )
        return vectors

    def serve(self) -> None:
        """Embed this rank's share of whatever rank 0 asks for, until it is done.

        Raises:
            Elsewhere: rank 0 has met an error.
        """
        while True:
            request = _announce(None)
            if isinstance(request, int):
                break
            self._embed(*request)
        if request:
            raise distributed.Elsewhere(request)

    def _embed(self, texts: list[str], normalize: bool) -> Tensor:
        ranks = Ranks(distributed.rank(), distributed.world(), distributed.gather_rows)
        mine = [texts[number] for number in ranks.split(len(texts))]
        encoder = self.model.encoder
        before, encoder.normalize = encoder.normalize, normalize
        try:
            with _shown(len(mine)) as progress:
                vectors = encode_texts(
                    self.model,
                    mine,
                    tokens_per_chunk=self.tokens_per_chunk,
                    device=self.device,
                    precision=self.precision,
                    progress=progress,
                )
        finally:
            encoder.normalize = before
        return ranks.join(vectors, len(texts))


def lead(encoder: SharedEncoder, work: Callable[[], None]) -> None:
    """Do the work on rank 0, for which the other ranks embed; its end, or its error, ends all. Collective."""
    if distributed.rank():
        encoder.serve()
        return
    try:
        work()
    except Exception as error:
        _announce(error.exit_code if isinstance(error, QuintetError) else 1)
        raise
    _announce(0)


def _shown(count: int) -> AbstractContextManager[Progress | None]:
    """A progress bar for work that takes a while; benchmarks have hundreds of small pieces."""
    return progress_bar(count, "texts embedded") if count >= _FEW_TEXTS else nullcontext()


def _announce(request: Any) -> Any:
    """Give all ranks what rank 0 asks for: (texts, normalize), or the exit code at the end. Collective."""
    return distributed.on_first_rank(lambda: request)
