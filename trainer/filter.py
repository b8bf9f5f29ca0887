"""Stage `filter`: the consistency filter of E5, which keeps a pair when its passage ranks among the best for its query.

Source: Wang et al. 2022, arXiv 2212.03533, section 3.2: rank each pair's passage for its query against a million random
passages with a model trained on the noisy pairs, and keep the pair when it is among the first k = 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.settings import key
from trainer.monitor import StageWandbConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet filter`."""

    model: str = key(help="model folder, run folder, or hub id; best trained on the same noisy pairs")
    data: str | list[str] = key(help="shard folders, globs, or a mixture file")
    output: str = key(help="folder for the kept shards, the report and the rejects")
    pool_size: int = key(1_000_000, help="random distinct passages that compete with a pair's own", low=1)
    top_k: int = key(2, help="keep a pair when fewer passages of the pool than this score above its own", low=1)
    seed: int = key(0, help="of the pool, the sample of rejects and planted noise", low=0)
    rejects: int = key(100, help="lost pairs of each source in rejects.jsonl, drawn at random", low=0)
    plant_noise: float = key(
        0.0, help="a test: exchange the passages of this share of the pairs first, and see how many are found", low=0
    )
    max_length: int | None = key(None, help="tokens of a text at most; null: the model's own", low=4)
    dtype: str = key("float16", help="how vectors of the pool are kept", choices=("float16", "float32"))
    shard_mib: int = key(64, help="size of a shard, in MiB", low=1, high=4096)
    tokens_per_chunk: int | None = key(
        None, help="padded tokens of one forward pass; null: 65536 on a GPU, 512 (bf16: 2048) on a CPU", low=1
    )
    precision: str = key("fp32", help="matrix products of the encoder", choices=("fp32", "bf16"))
    device: str = key("auto", help="where to compute; auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    damaged: str = key("strict", help="damaged shards: strict stops, skip counts", choices=("strict", "skip"))
    allow_pipe: bool = key(False, help="let shard lists run commands (pipe:)")
    wandb: StageWandbConfig = key(StageWandbConfig(), help="mirror of progress and results")
    overwrite: bool = key(False, help="replace an output that an earlier filter wrote")

    def check(self) -> list[str]:
        """One message for each setting that cannot be."""
        if self.plant_noise < 1:
            return []
        return [f"plant_noise={self.plant_noise:g}: must be below 1; 0.3 exchanges the passages of three pairs in ten"]


def run(config: Config) -> None:
    """Write the pairs of `config.data` that survive to `config.output`, and print what was kept and lost.

    Collective: every rank of a job calls it. A killed job goes on where it stopped.

    Raises:
        UserError: missing model or data, an output that is in the way, or a disk that is full.
        DataError: damaged shards, under `strict`.
        NumericError: the model gives NaN or infinity.
    """
    from trainer import consistency, work

    work.carry_out(config, consistency.open_judge, consistency.begin, consistency.filter_pairs, consistency.figures)
