"""Stage `encode`: texts to vectors, in blocks that the ranks of a job share."""

from __future__ import annotations

from dataclasses import dataclass

from data.settings import key


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet encode`."""

    model: str = key(help="model folder, run folder, or hub id")
    input: str | list[str] = key(
        help="text file (one a line), JSONL with text, passage or query, BEIR folder, shards, or a mixture file"
    )
    output: str = key(help="folder for vectors and ids, or a .npy file for the vectors alone")
    side: str = key("passage", help="what the texts are: it decides the prompt", choices=("query", "passage"))
    prompt: str | None = key(None, help="put before every text; null: the model's own for that side")
    dtype: str = key("float32", help="of the vectors", choices=("float32", "float16"))
    format: str = key("npy", help="one matrix, or Arrow blocks with ids", choices=("npy", "arrow"))
    tokens_per_chunk: int | None = key(
        None, help="padded tokens of one forward pass; null: 65536 on a GPU, 512 (bf16: 2048) on a CPU", low=1
    )
    precision: str = key("fp32", help="matrix products", choices=("fp32", "bf16"))
    device: str = key("auto", help="where to compute; auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    damaged: str = key("strict", help="damaged shards: strict stops, skip counts", choices=("strict", "skip"))
    allow_pipe: bool = key(False, help="let shard lists run commands (pipe:)")
    overwrite: bool = key(False, help="replace an output that an earlier encode wrote")

    def check(self) -> list[str]:
        """One message for each combination that cannot be."""
        if self.format == "arrow" and self.output.endswith(".npy"):
            return [f"output={self.output}: Arrow blocks need a folder; name one, or leave out format=arrow"]
        return []


def run(config: Config) -> None:
    """Embed every text of the input, in order, into `config.output`.

    Collective: every rank of a job calls it. A killed job goes on where it stopped.

    Raises:
        UserError: missing model or input, no text in it, an output that is in the way, or a disk that is full.
        DataError: damaged shards, under `strict`.
        NumericError: the model gives NaN or infinity.
    """
    from trainer import vectors, work

    work.carry_out(config, vectors.open_task, vectors.begin, vectors.encode)
